"""Tokens: the positions and segment ids of the queries and keys at hand."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PADDING_SEGMENT_ID = -1
"""The segment id of padding. Any negative id means padding: under a document mask such a token attends to nothing
and nothing attends to it."""

type Leaf = Any
"""A field of a pytree: an array, or whatever JAX puts in its place (a tracer, a shape, a partition spec)."""


class TokenAxis(NamedTuple):
    """Positions and segment ids of one side, both present, `[B or 1, length]` int32."""

    positions: jax.Array
    segment_ids: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a mask needs to know of the tokens: where each stands and which document it belongs to.

    Every field may be None. Positions None means `0, 1, 2, ...` on that side, whatever the other side's length;
    segment ids None means that all tokens are of one document. With every field None an implementation may take its
    static path. Positions are data, so a permuted sequence (striped, zigzag) needs no mask of its own.

    Attributes:
      q_positions: Position of each query in its document, int32 `[B or 1, T]`.
      kv_positions: Position of each key in its document, int32 `[B or 1, S]`.
      q_segment_ids: Document of each query, int32 `[B or 1, T]`; negative is padding.
      kv_segment_ids: Document of each key, int32 `[B or 1, S]`; negative is padding.
    """

    q_positions: Leaf = None
    kv_positions: Leaf = None
    q_segment_ids: Leaf = None
    kv_segment_ids: Leaf = None

    @classmethod
    def self_attention(
        cls,
        positions: Leaf = None,
        segment_ids: Leaf = None,
    ) -> "Tokens":
        """The tokens of self-attention: queries and keys are the same ones."""
        return cls(
            q_positions=positions,
            kv_positions=positions,
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
        )

    def queries(self, length: int) -> TokenAxis:
        """The query side, with None filled in."""
        return _token_axis(self.q_positions, self.q_segment_ids, length)

    def keys(self, length: int) -> TokenAxis:
        """The key side, with None filled in."""
        return _token_axis(self.kv_positions, self.kv_segment_ids, length)


def validate_tokens(op: str, tokens: Tokens, batch_size: int, q_len: int, kv_len: int) -> None:
    """Raises ValueError, naming the argument, unless every array of `tokens` fits `[B or 1, length]` int32."""
    lengths = {
        "q_positions": q_len,
        "kv_positions": kv_len,
        "q_segment_ids": q_len,
        "kv_segment_ids": kv_len,
    }
    for name, length in lengths.items():
        array = getattr(tokens, name)
        if array is None:
            continue
        if array.shape not in ((batch_size, length), (1, length)):
            raise ValueError(
                f"{op}: tokens.{name} has shape {array.shape}, wanted {(batch_size, length)} or {(1, length)}"
            )
        if array.dtype != jnp.int32:
            raise ValueError(f"{op}: tokens.{name} is {array.dtype}, wanted int32; cast with .astype('int32')")


def repeat_last(x: jax.Array | None, padding: int) -> jax.Array | None:
    """`[B or 1, length]` with so many more tokens, which repeat the last."""
    return x if x is None or not padding else jnp.pad(x, ((0, 0), (0, padding)), mode="edge")


def _token_axis(positions, segment_ids, length: int) -> TokenAxis:
    if positions is None:
        positions = jnp.arange(length, dtype=jnp.int32)[None]
    if segment_ids is None:
        segment_ids = jnp.zeros((1, length), jnp.int32)
    return TokenAxis(positions, segment_ids)

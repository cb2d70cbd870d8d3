"""Which tokens a token of packed documents may attend to, as the two ends of a run of neighbours.

A pair test reads positions and segment ids of both its tokens. Where documents stand one behind the other, in order,
what a window or a causal mask allows a query is a run of keys, and a key a run of queries. Their ends say the same with
two comparisons of numbers of tokens, and nothing is read of the other side.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import current_platform, search_method
from pallas_kernels.mask import And, Causal, Mask, SameDocument, Window
from pallas_kernels.tokens import Leaf, Tokens

OUT_OF_ORDER = jnp.iinfo(jnp.int32).min
_LAST_ID = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Bands:
    """The runs of self-attention, T tokens, ends included, counted over the sequence. Of padding they are empty, the
    first behind the last. Of a row of the batch whose tokens are not in order (documents by ascending ids, padding
    behind them) nothing is known: all first ones are OUT_OF_ORDER.

    Attributes:
      first_key, last_key: Of each query, int32 `[B or 1, T]`.
      first_query, last_query: Of each key.
    """

    first_key: Leaf
    last_key: Leaf
    first_query: Leaf
    last_query: Leaf

    @property
    def in_order(self) -> jax.Array:
        """Whether the runs are what the mask allows, `[B or 1]`."""
        return self.first_key[:, 0] != OUT_OF_ORDER


def make_bands(mask: Mask, tokens: Tokens, *, q_len: int, kv_len: int) -> Bands | None:
    """Those of a mask over tokens; None where it is more than documents and distances, or these are no documents, or
    queries and keys are not the same tokens, whatever these are.

    Cost: O(T log T). None on TPUs, which gather slowly, and whose kernels have no use for them.
    """
    if q_len != kv_len or tokens.q_segment_ids is None or tokens.kv_segment_ids is None or not _is_band(mask):
        return None
    if current_platform() == "tpu":
        return None
    queries, keys = tokens.queries(q_len), tokens.keys(kv_len)
    ids = jnp.where(queries.segment_ids < 0, _LAST_ID, queries.segment_ids)  # padding's behind all others
    before, after = ids[:, :-1], ids[:, 1:]
    follows = queries.positions[:, 1:] == queries.positions[:, :-1] + 1
    in_order = jnp.all((after > before) | (after == _LAST_ID) | (after == before) & follows, axis=1)
    for x, y in zip(queries, keys, strict=True):
        if x is not y:
            in_order &= jnp.all(x == y, axis=1)
    start, stop = (jax.vmap(_search(side))(ids, ids).astype(jnp.int32) for side in ("left", "right"))
    token, is_padding, (left, right) = jnp.arange(q_len, dtype=jnp.int32), ids == _LAST_ID, mask.span

    def run(left: int | None, right: int | None) -> tuple[jax.Array, jax.Array]:
        first = start if left is None else jnp.maximum(start, token - left)
        last = stop - 1 if right is None else jnp.minimum(stop - 1, token + right)
        first, last = jnp.where(is_padding, 1, first), jnp.where(is_padding, 0, last)
        return tuple(jnp.broadcast_arrays(jnp.where(in_order[:, None], first, OUT_OF_ORDER), last))

    (first_key, last_key), (first_query, last_query) = run(left, right), run(right, left)
    return Bands(first_key=first_key, last_key=last_key, first_query=first_query, last_query=last_query)


def _is_band(mask: Mask) -> bool:
    def parts(mask: Mask) -> list[Mask]:
        return [*parts(mask.left), *parts(mask.right)] if isinstance(mask, And) else [mask]

    return mask.uses_segments and all(isinstance(part, Causal | Window | SameDocument) for part in parts(mask))


def _search(side: str) -> Callable:
    return functools.partial(jnp.searchsorted, side=side, method=search_method())

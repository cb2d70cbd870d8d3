"""BlockSelection: the blocks of keys that each block of queries attends to, of those that the mask allows."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.arguments import check_heads
from pallas_kernels.block_lists import can_be_cut, schedule_of_lists
from pallas_kernels.block_sizes import BLOCKWISE_ATTENTION, BlockSizes
from pallas_kernels.dispatch import current_platform
from pallas_kernels.mask import Mask
from pallas_kernels.online_softmax import finite_max
from pallas_kernels.schedule import Schedule
from pallas_kernels.tokens import Leaf, Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSelection:
    """What a selector chose. Of a chosen block a query attends to the keys that the mask allows.

    Attributes:
      blocks: For each block of queries the blocks of keys, ascending, then -1: int32 `[B, heads, T / block_q, most]`,
        rounded up. Heads are query heads, or kv heads, whose group of query heads shares a list.
      q_len, kv_len: Lengths of the sequences; the last block of a side may be ragged.
      block_sizes: Tokens a block holds.
    """

    blocks: Leaf
    q_len: int = dataclasses.field(metadata={"static": True})
    kv_len: int = dataclasses.field(metadata={"static": True})
    block_sizes: BlockSizes = dataclasses.field(metadata={"static": True})

    def chosen(self) -> jax.Array:
        """bool `[B, heads, T / block_q, S / block_kv]`."""
        num_columns = -(-self.kv_len // self.block_sizes.block_kv)
        return (self.blocks[..., None] == jnp.arange(num_columns)).any(axis=-2)

    def schedule(self, *, mask: Mask, tokens: Tokens | None = None, block_sizes: BlockSizes | None = None) -> Schedule:
        """What `blockwise_attention` takes to attend to the chosen blocks alone, with the same mask and tokens.

        Args:
          mask: Which pairs of the chosen blocks may attend.
          tokens: Positions and segment ids; None means arange and one document.
          block_sizes: Tokens a block of the schedule holds, which must divide those of a chosen block; None takes the
            platform's where they do, and otherwise those of a chosen block.
        Raises: ValueError where block_sizes do not divide.
        Cost: as `schedule_of_lists`.
        """
        return schedule_of_lists(
            self.blocks,
            mask=mask,
            tokens=tokens,
            q_len=self.q_len,
            kv_len=self.kv_len,
            list_sizes=self.block_sizes,
            block_sizes=block_sizes or self._schedule_sizes(),
        )

    def _schedule_sizes(self) -> BlockSizes:
        usual = BLOCKWISE_ATTENTION[current_platform()].fit(self.q_len, self.kv_len)
        return usual if can_be_cut(self.block_sizes, usual, self.q_len, self.kv_len) else self.block_sizes

    def num_chosen(self) -> jax.Array:
        """How many blocks of keys each block of queries attends to, int32 `[B, heads, T / block_q]`."""
        return jnp.sum(self.blocks >= 0, axis=-1, dtype=jnp.int32)


def attention_recall(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    selection: BlockSelection,
    *,
    mask: Mask,
    tokens: Tokens | None = None,
    scale: float | None = None,
) -> Float32[Array, "B N T"]:
    """The share of each query's exact attention that falls on keys of its chosen blocks: 1 where nothing is missed.

    Args:
      selection: Of these lengths; its heads are those of q, or of k.
      scale: Multiplies q.k; default H ** -0.5.
    Returns: From 0 to 1; 1 for a query that may attend to nothing.
    Cost: that of all logits, 2 B N T S H FLOPs, in float32; O(B N block_q S) memory.
    """
    check_heads("attention_recall", {"q": q, "k": k})
    B, T, N, H = q.shape
    if k.shape[::3] != (B, H) or N % k.shape[2]:
        raise ValueError(
            f"attention_recall: q and k have shapes {q.shape} and {k.shape}, wanted one B and H, and a multiple of k's "
            "heads in q"
        )
    S, block_q, block_kv = k.shape[1], selection.block_sizes.block_q, selection.block_sizes.block_kv
    if (selection.q_len, selection.kv_len) != (T, S):
        raise ValueError(
            f"attention_recall: selection is of {selection.q_len} queries and {selection.kv_len} keys, wanted {T} and "
            f"{S}, those of q and k"
        )
    if selection.blocks.shape[0] != B:
        raise ValueError(f"attention_recall: selection is of {selection.blocks.shape[0]} rows, wanted {B}, those of q")
    if N % selection.blocks.shape[1]:
        raise ValueError(f"attention_recall: selection has {selection.blocks.shape[1]} heads, wanted a divisor of {N}")
    scale = H**-0.5 if scale is None else scale
    tokens = tokens or Tokens()
    kv = tokens.keys(S)
    num_rows = -(-T // block_q)
    k = jnp.repeat(k.astype(jnp.float32), N // k.shape[2], axis=2)

    def rows(x, axis):
        """Blocks of queries in front; what a ragged one lacks repeats the last."""
        x = jnp.pad(x, [(0, num_rows * block_q - T) if i == axis else (0, 0) for i in range(x.ndim)], mode="edge")
        return jnp.moveaxis(x.reshape(*x.shape[:axis], num_rows, block_q, *x.shape[axis + 1 :]), axis, 0)

    def of_row(row):
        q, positions, segments, blocks = row
        logits = scale * jnp.einsum("btnh,bsnh->bnts", q, k, precision=jax.lax.Precision.HIGHEST)
        allowed = mask.allowed_by_head(
            N, positions[:, :, None], kv.positions[:, None], segments[:, :, None], kv.segment_ids[:, None]
        )
        logits = jnp.where(allowed, logits, -jnp.inf)
        weights = jnp.exp(logits - finite_max(jnp.max(logits, axis=-1, keepdims=True)))
        chosen = (blocks[..., None] == jnp.arange(-(-S // block_kv))).any(axis=-2)
        chosen = jnp.repeat(chosen, N // chosen.shape[1], axis=1)[:, :, None, jnp.arange(S) // block_kv]
        total = jnp.sum(weights, axis=-1)
        there = jnp.sum(jnp.where(chosen, weights, 0.0), axis=-1)
        return jnp.where(total > 0, there / jnp.where(total > 0, total, 1.0), 1.0)

    q_axis = tokens.queries(T)
    each = (
        rows(q.astype(jnp.float32), 1),
        rows(q_axis.positions, 1),
        rows(q_axis.segment_ids, 1),
        jnp.moveaxis(selection.blocks, 2, 0),
    )
    recall = jax.lax.map(of_row, each)
    return jnp.moveaxis(recall, 0, 2).reshape(B, N, -1)[..., :T]

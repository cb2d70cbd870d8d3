"""The tokens of the blocks that Native Sparse Attention compresses, gathered for what makes one key of a block."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.arguments import check_heads
from pallas_kernels.sparse.nsa_blocks import NsaSizes


def tokens_of_blocks(
    x: Float[Array, "B S K H"], start: Int32[Array, "#B M"], sizes: NsaSizes
) -> Float[Array, "B M {sizes.compress_block} K H"]:
    """The rows of x that each compressed block has; zeros for a block that is not there.

    Args:
      x: Keys or values, from which those of blocks are made.
      start: The row at which each block begins, negative where there is none; of two blocks at least
        compress_stride apart.
    Raises: ValueError where shapes or dtypes do not fit.
    Memory: compress_block / compress_stride times that of x.
    """
    op = "tokens_of_blocks"
    check_heads(op, {"x": x})
    if start.ndim != 2 or start.shape[0] not in (1, x.shape[0]) or start.dtype != jnp.int32:
        raise ValueError(f"{op}: start is {start.dtype}{list(start.shape)}, wanted int32 [{x.shape[0]} or 1, blocks]")
    stride = jnp.arange(sizes.compress_stride, dtype=jnp.int32)

    def of_piece(offset: int) -> jax.Array:
        # No row is in two blocks here, so that in the backward pass nothing is added in whatever order, nor at all.
        number = jnp.arange(start.shape[1], dtype=jnp.int32)[:, None] * sizes.compress_stride + stride
        rows = jnp.where(start[..., None] >= 0, start[..., None] + offset + stride, x.shape[1] + number)
        rows = jnp.broadcast_to(rows, (x.shape[0], *rows.shape[1:]))
        return jax.vmap(lambda x, rows: x.at[rows].get(mode="fill", fill_value=0, unique_indices=True))(x, rows)

    pieces = range(0, sizes.compress_block, sizes.compress_stride)
    return jnp.concatenate([of_piece(offset) for offset in pieces], axis=2)

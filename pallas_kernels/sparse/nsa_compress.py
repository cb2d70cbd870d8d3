"""The tokens of the blocks that Native Sparse Attention compresses, gathered for what makes one key of a block."""

import functools

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
    Memory: compress_block / compress_stride times that of x, and as much for its cotangent.
    """
    op = "tokens_of_blocks"
    check_heads(op, {"x": x})
    if start.ndim != 2 or start.shape[0] not in (1, x.shape[0]) or start.dtype != jnp.int32:
        raise ValueError(f"{op}: start is {start.dtype}{list(start.shape)}, wanted int32 [{x.shape[0]} or 1, blocks]")
    return _gathered(sizes.compress_block, sizes.compress_stride, x, start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(block: int, stride: int, x: jax.Array, start: jax.Array) -> jax.Array:
    """`tokens_of_blocks`. Its transpose, left to JAX, is a scatter of every row of every block; here it is gathers."""
    rows = jnp.where(start[..., None] >= 0, start[..., None] + jnp.arange(block, dtype=jnp.int32), x.shape[1])
    return _take(x, rows)


def _gathered_forward(block, stride, x, start):
    return _gathered(block, stride, x, start), (start, jax.ShapeDtypeStruct(x.shape, x.dtype))


def _gathered_backward(block, stride, residuals, dout_BMIKH):
    start, like = residuals
    (b, M), S = start.shape, like.shape[1]
    # A row is in the first tokens of one block at most, as many as blocks are apart; which of those of all, or behind.
    first = jnp.arange(stride, dtype=jnp.int32)
    rows = jnp.where(start[..., None] >= 0, start[..., None] + first, S)
    places = jnp.arange(M, dtype=jnp.int32)[:, None] * block + first
    nowhere = M * block
    place = jnp.full((b, S), nowhere, jnp.int32)
    place = jax.vmap(lambda place, rows: place.at[rows].set(places, mode="drop"))(place, rows)
    dout = dout_BMIKH.reshape(dout_BMIKH.shape[0], nowhere, *dout_BMIKH.shape[3:])
    dx = jnp.zeros(like.shape, jnp.float32)
    for offset in range(0, block, stride):
        # Those that are in the tokens of a block from `offset` on come so far behind.
        behind = jnp.pad(place, ((0, 0), (offset, 0)), constant_values=nowhere)[:, :S]
        dx += _take(dout, jnp.where(behind < nowhere, behind + offset, nowhere)).astype(jnp.float32)
    return dx.astype(like.dtype), None


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _take(x_BSKH: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of x, `[B, ..., K, H]`; zeros for one that is not there."""
    rows = jnp.broadcast_to(rows, (x_BSKH.shape[0], *rows.shape[1:]))
    return jax.vmap(lambda x, rows: x.at[rows].get(mode="fill", fill_value=0))(x_BSKH, rows)

"""What the Hopper kernels do with a tile in registers: vectors along its rows and columns."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import row_of_batch

MATRIX, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def rows(x, shape: tuple[int, ...]) -> jax.Array:
    """`[rows]` as `[rows, columns]`."""
    return lax.broadcast_in_dim(x, shape, [0])


def columns(x, shape: tuple[int, ...]) -> jax.Array:
    """`[columns]` as `[rows, columns]`."""
    return lax.broadcast_in_dim(x, shape, [1])


def vector(ref, batch, start, length: int, layout, default: Callable) -> jax.Array:
    """`ref[batch, start : start + length]`; without a ref `default(start, length, layout)`: `indices` or `zeros`."""
    if ref is None:
        return default(start, length, layout)
    return plgpu.load(ref.at[row_of_batch(ref, batch), pl.ds(start, length)], layout=layout, optimized=False)


def indices(start, length: int, layout) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (length,), 0, layout=layout) + start


def zeros(start, length: int, layout) -> jax.Array:
    del start
    return plgpu.layout_cast(jnp.zeros((length,), jnp.int32), layout)


def store_parts_of_sectors(ref, value) -> None:
    """ref[...] = value, in device memory, where a warp's rows are shorter than the 32 bytes that memory moves."""
    if hasattr(plgpu, "store"):  # JAX 0.12 wants to be told, JAX 0.11 has no way to
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value

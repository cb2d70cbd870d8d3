"""Tiles of a chunk in the Hopper kernels of decays of each dim and of delta rules: vectors as tiles, and products."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear.prepared import CHUNK
from pallas_kernels.wgmma import MATRIX


def spread(x, dim: int, shape: tuple[int, int] = (CHUNK, CHUNK)) -> jax.Array:
    """A vector as a matrix: of one value a row, dim 0, or a column, dim 1."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [dim]), MATRIX)


def matmul(factors, *, acc=None, interpret):
    """acc + the sum of a b over (a, b, transpose_a, transpose_b), `[64, 64]`; a may be in registers."""
    if interpret:
        for a, b, transpose_a, transpose_b in factors:
            a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
            product = jnp.dot(a.T if transpose_a else a, b.T if transpose_b else b, preferred_element_type=jnp.float32)
            acc = product if acc is None else acc + product
        return acc

    def multiply(acc) -> None:
        for a, b, transpose_a, transpose_b in factors:
            a, b = a.transpose((1, 0)) if transpose_a else a, b.transpose((1, 0)) if transpose_b else b
            plgpu.wgmma(acc, a, b)

    def multiplied(acc):
        multiply(acc)
        return acc[...]

    if acc is not None:
        return pl.run_state(multiply)(plgpu.ACC.init(acc))
    return pl.run_scoped(multiplied, plgpu.ACC((CHUNK, CHUNK), jnp.float32))

"""Tiles of a chunk in the Hopper kernels of decays of each dim and of delta rules: vectors as tiles, and products."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear.prepared import CHUNK
from pallas_kernels.wgmma import (
    IN_FLIGHT,
    MATRIX,
    PTX_DTYPES,
    TILE_BYTES,
    TRANSFORMS,
    Ptx,
    array_type,
    as_int32,
    descriptor,
    fragmented,
)

_TILE = plgpu.RefType(TRANSFORMS)


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


def weighted(weights: jax.Array, tiles: Sequence, *, acc: jax.Array | None = None, interpret) -> jax.Array:
    """acc + the sum of weights x over tiles x, float32 `[64, 64]`, of weights in registers, 16 bits.

    In one block of PTX that waits for its own matmuls: what Pallas makes of such a product was seen on a card to read
    registers of the weights that the code behind it had written to already.
    """
    if interpret:
        return matmul([(weights, x, False, False) for x in tiles], acc=acc, interpret=interpret)
    dtype = PTX_DTYPES[weights.dtype.name]
    of_acc = () if acc is None else (MATRIX,)
    types = (MATRIX, *(_TILE,) * len(tiles), *of_acc)

    @plgpu.inline_mgpu(arg_types=types, return_type=array_type((CHUNK, CHUNK), MATRIX))
    def emit(_, weights, *refs):
        ptx = Ptx()
        tiles, acc = refs[: len(refs) - len(of_acc)], refs[len(refs) - len(of_acc) :]
        if acc:
            out = ptx.update(acc[0].to_layout(IN_FLIGHT.to_mgpu()).registers.flat)
        else:
            out = ptx.write(CHUNK // 2)
        registers = ptx.read("r", map(as_int32, weights.registers.flat))
        descriptors = ptx.read("l", [descriptor(x, leading=TILE_BYTES, stride=TILE_BYTES) for x in tiles])
        ptx.begin()
        for i, x in enumerate(descriptors):
            ptx.matmul(out, registers, x, contracted=CHUNK, dtype=dtype, fresh=not (acc or i), b_rows=TILE_BYTES)
        ptx.commit()
        ptx.wait(0)
        return fragmented(ptx.emit(), (CHUNK, CHUNK)).to_layout(MATRIX.to_mgpu())

    return emit(weights, *tiles, *(() if acc is None else (acc,)))

"""One step of a backward pass that computes one gradient at a time, on Hopper's tensor cores, for 64 rows.

    scores      starts S = a b^T and dP = a' b'^T, and waits for S alone; `wgmma_backward.settle` waits for dP
    product     acc += x b, of 16-bit probabilities or gradients of logits x, and waits for it

a and a' are what the rows are (queries and their dout, or keys and values), b and b' what they visit, tile by tile.
"""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.wgmma import (
    IN_FLIGHT,
    MATRIX,
    PTX_DTYPES,
    ROWS,
    SCALAR,
    TILE_BYTES,
    TRANSFORMS,
    Ptx,
    array_type,
    as_int32,
    descriptor,
    fragmented,
    int32s,
    row_of_tiles,
)

_SMEM = plgpu.RefType(TRANSFORMS)


def scores(
    first: tuple, second: tuple | None, *, slot_a: jax.typing.ArrayLike, warpgroup: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array | None]:
    """Starts s = a b^T and dp = a' b'^T, and returns when s is done.

    Args:
      first: a `[slots, 128, H]`, of which this warpgroup reads its 64 rows of a slot, b `[slots, tile, H]`, and a slot.
      second: The same of a' and b', which may have another head dim; None for no dp.
      slot_a: Of a and a'.
    Returns: s, float32 `[64, tile]`, and dp in flight, for `wgmma_backward.settle`; or s and None.
    """
    pairs = [pair for pair in (first, second) if pair is not None]
    tile = first[1].shape[1]
    dtype = PTX_DTYPES[first[1].dtype.name]
    refs = [ref for a, b, _ in pairs for ref in (a, b)]
    dims = [b.shape[2] for _, b, _ in pairs]
    types = [array_type((ROWS, tile), layout) for layout in (MATRIX, IN_FLIGHT)[: len(pairs)]]

    @plgpu.inline_mgpu(
        arg_types=(_SMEM,) * len(refs) + (SCALAR,) * (len(pairs) + 2),
        return_type=tuple(types) if second is not None else types[0],
    )
    def emit(_, *operands):
        refs_in, (warpgroup, slot_a, *slots) = operands[: 2 * len(dims)], operands[2 * len(dims) :]
        ptx = Ptx()
        results = [ptx.write(tile // 2) for _ in dims]
        sides = []
        for i, (dim, slot) in enumerate(zip(dims, slots, strict=True)):
            rows = {"leading": 0, "stride": row_of_tiles(dim)}
            rows_at = (slot_a, 2 * ROWS * dim * 2), (warpgroup, ROWS * dim * 2)
            sides.append(descriptor(refs_in[2 * i], *rows_at, **rows))
            sides.append(descriptor(refs_in[2 * i + 1], (slot, tile * dim * 2), **rows))
        names = ptx.read("l", sides)
        ptx.begin()
        for i, (result, dim) in enumerate(zip(results, dims, strict=True)):
            ptx.matmul(result, names[2 * i], names[2 * i + 1], contracted=dim, dtype=dtype, fresh=True)
            ptx.commit()
        ptx.wait(len(dims) - 1)
        values = ptx.emit()
        count = len(results[0])
        s = fragmented(values[:count], (ROWS, tile)).to_layout(MATRIX.to_mgpu())
        return s if len(dims) == 1 else (s, fragmented(values[count:], (ROWS, tile)))

    results = emit(*refs, *int32s((warpgroup, slot_a, *(slot for _, _, slot in pairs))))
    return results if second is not None else (results, None)


def product(acc: jax.Array, x: jax.Array, b_smem, *, slot: jax.typing.ArrayLike) -> jax.Array:
    """acc + x b.

    Args:
      acc: float32 `[64, H]`.
      x: 16-bit `[64, tile]`.
      b_smem: `[slots, tile, H]`, of which a slot is read.
    """
    tile, dim = b_smem.shape[1:]
    dtype = PTX_DTYPES[x.dtype.name]

    @plgpu.inline_mgpu(arg_types=(MATRIX, MATRIX, _SMEM, SCALAR), return_type=array_type((ROWS, dim), MATRIX))
    def emit(_, acc, x, b_smem, slot):
        row_bytes = row_of_tiles(dim)
        ptx = Ptx()
        registers = ptx.update(acc.to_layout(IN_FLIGHT.to_mgpu()).registers.flat)
        x_registers = ptx.read("r", map(as_int32, x.registers.flat))
        (b,) = ptx.read("l", [descriptor(b_smem, (slot, tile * dim * 2), leading=TILE_BYTES, stride=row_bytes)])
        ptx.begin()
        ptx.matmul(registers, x_registers, b, contracted=tile, dtype=dtype, b_rows=row_bytes)
        ptx.commit()
        ptx.wait(0)
        return fragmented(ptx.emit(), (ROWS, dim)).to_layout(MATRIX.to_mgpu())

    return emit(acc, x, b_smem, *int32s((slot,)))

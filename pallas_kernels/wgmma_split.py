"""One step of a backward pass that computes one gradient at a time, on Hopper's tensor cores, for 64 rows.

    scores      starts S = a b^T and dP = a' b'^T, and waits for S alone; `wgmma_backward.settle` waits for dP
    products    acc += x b, for each gradient, of 16-bit probabilities or gradients of logits x, and waits for them

a and a' are what the rows are (queries and their dout, or keys and values), b and b' what they visit, tile by tile.
"""

import itertools
from collections.abc import Sequence

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
            rows = {"leading": 0, "stride": dim // 64 * TILE_BYTES}
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


def products(accs: Sequence[jax.Array], factors: Sequence[tuple]) -> list[jax.Array]:
    """acc + x b for each.

    Args:
      accs: float32 `[64, H]`.
      factors: For each x, 16-bit `[64, tile]`, b `[slots, tile, H]`, and the slot that is read.
    """
    shapes = [b.shape[1:] for _, b, _ in factors]
    count = len(accs)

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,) * (2 * count) + (_SMEM,) * count + (SCALAR,) * count,
        return_type=tuple(array_type((ROWS, dim), MATRIX) for _, dim in shapes),
    )
    def emit(_, *operands):
        accs, xs, refs, slots = (operands[i * count : (i + 1) * count] for i in range(4))
        ptx = Ptx()
        registers = [ptx.update(acc.to_layout(IN_FLIGHT.to_mgpu()).registers.flat) for acc in accs]
        x_registers = [ptx.read("r", map(as_int32, x.registers.flat)) for x in xs]
        descriptors = ptx.read(
            "l",
            [
                descriptor(ref, (slot, tile * dim * 2), leading=TILE_BYTES, stride=dim // 64 * TILE_BYTES)
                for ref, slot, (tile, dim) in zip(refs, slots, shapes, strict=True)
            ],
        )
        ptx.begin()
        for acc, x, b, (tile, dim) in zip(registers, x_registers, descriptors, shapes, strict=True):
            ptx.matmul(
                acc, x, b, contracted=tile, dtype=PTX_DTYPES[xs_dtype], b_rows=dim // 64 * TILE_BYTES
            )  # fmt: skip
        ptx.commit()
        ptx.wait(0)
        values = iter(ptx.emit())
        return tuple(
            fragmented(list(itertools.islice(values, len(acc))), (ROWS, dim)).to_layout(MATRIX.to_mgpu())
            for acc, (_, dim) in zip(registers, shapes, strict=True)
        )

    xs, refs, slots = zip(*factors, strict=True)
    xs_dtype = xs[0].dtype.name
    return list(emit(*accs, *xs, *refs, *int32s(slots)))

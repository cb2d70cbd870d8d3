"""One step of the backward pass of attention on Hopper's tensor cores, for a block of keys and a tile of queries.

Two warpgroups share a step, 64 keys of the block each. Logits and their gradients are transposed, `[keys, queries]`, so
that they feed dv and dk from registers; only dq, a sum over the keys of both, takes them through shared memory. In its
step a warpgroup

    scores      starts S^T = k q^T and dP^T = v dout^T of the first 64 queries, and waits for S^T alone
    settle      waits for dP^T
    more        where the tile has 128 queries: starts dP^T of the others and dv += P^T dout, and waits for dP^T alone
    gradients   starts dq = dS k of the tile before, dv += P^T dout, if still to be done, and dk += dS^T q; waits for dq
    finish      waits for the others

dq is a step behind, since it needs dS of both warpgroups, which would otherwise wait for each other in each step and so
leave the tensor cores idle at the same time.

P and dS are converted to 16 bits only where nothing is in flight, since ptxas would serialize the matmuls otherwise.

Reference: Shah et al. 2024, FlashAttention-3, arXiv:2407.08608, Appendix B.
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
    Arrival,
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
    k_smem,
    v_smem,
    q_smem,
    dout_smem,
    *,
    warpgroup: jax.typing.ArrayLike,
    slot: jax.typing.ArrayLike,
    rows: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Starts s = k q^T and dp = v dout^T, and returns when s is done.

    Args:
      k_smem, v_smem: `[128, H]` and `[128, V]`, of which this warpgroup reads its 64 rows.
      q_smem, dout_smem: `[slots, tile, H]` and `[slots, tile, V]`, of which a slot is read.
      rows: Of the slot, the first and how many; None for all of q's, and for dp the first 64.
    Returns: s, float32 `[64, rows]`, and dp in flight: only `settle` may have it.
    """
    (tile, head_dim), value_dim = q_smem.shape[1:], dout_smem.shape[2]
    dtype = PTX_DTYPES[q_smem.dtype.name]
    first, num_rows = rows or (0, tile)
    part = min(num_rows, ROWS)

    @plgpu.inline_mgpu(
        arg_types=(_SMEM,) * 4 + (SCALAR,) * 3,
        return_type=(array_type((ROWS, num_rows), MATRIX), array_type((ROWS, part), IN_FLIGHT)),
    )
    def emit(_, k_smem, v_smem, q_smem, dout_smem, warpgroup, slot, first):
        ptx = Ptx()
        s, dp = (ptx.write(columns // 2) for columns in (num_rows, part))
        operands = (
            (k_smem, head_dim, (warpgroup, ROWS)),
            (q_smem, head_dim, (slot, tile), (first, 1)),
            (v_smem, value_dim, (warpgroup, ROWS)),
            (dout_smem, value_dim, (slot, tile), (first, 1)),
        )
        k, q, v, dout = ptx.read(
            "l",
            (
                descriptor(smem, *((i, length * dim * 2) for i, length in at), leading=0, stride=row_of_tiles(dim))
                for smem, dim, *at in operands
            ),
        )
        ptx.begin()
        ptx.matmul(s, k, q, contracted=head_dim, dtype=dtype, fresh=True)
        ptx.commit()
        ptx.matmul(dp, v, dout, contracted=value_dim, dtype=dtype, fresh=True)
        ptx.commit()
        ptx.wait(1)
        values = ptx.emit()
        done = fragmented(values[: len(s)], (ROWS, num_rows)).to_layout(MATRIX.to_mgpu())
        return done, fragmented(values[len(s) :], (ROWS, part))

    return emit(k_smem, v_smem, q_smem, dout_smem, *int32s((warpgroup, slot, first)))


def settle(in_flight, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Waits for what is in flight; hands x through, which may be converted from here on. Both float32."""

    @plgpu.inline_mgpu(
        arg_types=(IN_FLIGHT, MATRIX), return_type=tuple(array_type(y.shape, MATRIX) for y in (in_flight, x))
    )
    def emit(_, in_flight, x):
        ptx = Ptx()
        first = len(ptx.update(in_flight.registers.flat))
        ptx.update(x.to_layout(IN_FLIGHT.to_mgpu()).registers.flat)
        ptx.wait(0)
        values = ptx.emit()
        pieces = (values[:first], in_flight.shape), (values[first:], x.shape)
        return tuple(fragmented(registers, shape).to_layout(MATRIX.to_mgpu()) for registers, shape in pieces)

    return emit(in_flight, x)


def more(
    dv: jax.Array,
    p: jax.Array,
    v_smem,
    dout_smem,
    *,
    warpgroup: jax.typing.ArrayLike,
    slot: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Starts dp = v dout^T of the last 64 of 128 queries and dv += p dout, and returns when dp is done.

    Args:
      dv: float32 `[64, H]`.
      p: 16-bit `[64, 128]`.
      v_smem, dout_smem: As for `scores`.
    Returns: dp, float32 `[64, 64]`, and dv in flight, for `settle`.
    """
    tile, head_dim = dout_smem.shape[1:]
    dtype = PTX_DTYPES[p.dtype.name]

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,) * 2 + (_SMEM,) * 2 + (SCALAR,) * 2,
        return_type=(array_type((ROWS, ROWS), MATRIX), array_type((ROWS, head_dim), IN_FLIGHT)),
    )
    def emit(_, dv, p, v_smem, dout_smem, warpgroup, slot):
        row_bytes = row_of_tiles(head_dim)
        ptx = Ptx()
        dp_registers = ptx.write(ROWS // 2)
        dv_registers = ptx.update(dv.to_layout(IN_FLIGHT.to_mgpu()).registers.flat)
        p_registers = ptx.read("r", map(as_int32, p.registers.flat))
        last, queries = (tile - ROWS, head_dim * 2), (slot, tile * head_dim * 2)
        v, dout_rows, dout = ptx.read(
            "l",
            (
                descriptor(v_smem, (warpgroup, ROWS * head_dim * 2), leading=0, stride=row_bytes),
                descriptor(dout_smem, queries, last, leading=0, stride=row_bytes),
                descriptor(dout_smem, queries, leading=TILE_BYTES, stride=row_bytes),
            ),
        )
        ptx.begin()
        ptx.matmul(dp_registers, v, dout_rows, contracted=head_dim, dtype=dtype, fresh=True)
        ptx.commit()
        ptx.matmul(dv_registers, p_registers, dout, contracted=tile, dtype=dtype, b_rows=row_bytes)
        ptx.commit()
        ptx.wait(1)
        values = ptx.emit()
        dp = fragmented(values[: len(dp_registers)], (ROWS, ROWS)).to_layout(MATRIX.to_mgpu())
        return dp, fragmented(values[len(dp_registers) :], (ROWS, head_dim))

    return emit(dv, p, v_smem, dout_smem, *int32s((warpgroup, slot)))


def gradients(
    dk: jax.Array,
    ds: Sequence[jax.Array],
    dv_and_p: tuple[jax.Array, jax.Array] | None,
    q_smem,
    dout_smem,
    of_dq: tuple | None,
    *,
    warpgroup: jax.typing.ArrayLike,
    slot: jax.typing.ArrayLike,
) -> tuple[jax.Array | None, list[jax.Array]]:
    """Starts dq = ds^T k of another tile, dv += p dout and dk += ds q, and returns when dq is done.

    Each warpgroup computes a piece of dq: at head dim 128 half of the columns for all 64 queries of the tile, at head
    dim 64 half of its 128 queries.

    Args:
      dk: float32 `[64, H]`.
      ds: 16-bit `[64, 64]`, for each 64 queries of the tile.
      dv_and_p: float32 `[64, H]` and 16-bit `[64, tile]`; None where `more` has seen to dv.
      of_dq: ds `[slots, 2, 64, tile]` of both warpgroups, a slot, and k `[128, H]`; None for no dq.
    Returns: This warpgroup's piece of dq, float32 `[64, 64]`, or None; and in flight, for `finish`, dv, if it is still
      to be done, and dk.
    """
    tile, head_dim = q_smem.shape[1:]
    dtype = PTX_DTYPES[q_smem.dtype.name]
    arrays = (*(dv_and_p or ()), dk, *ds)
    refs = (q_smem, dout_smem, *((of_dq[0], of_dq[2]) if of_dq else ()))
    scalars = int32s((warpgroup, slot, *(of_dq[1:2] if of_dq else ())))
    accs = [array_type((ROWS, head_dim), IN_FLIGHT)] * (2 if dv_and_p else 1)

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,) * len(arrays) + (_SMEM,) * len(refs) + (SCALAR,) * len(scalars),
        return_type=(*([array_type((ROWS, ROWS), MATRIX)] if of_dq else []), *accs),
    )
    def emit(_, *operands):
        arrays_in = list(operands[: len(arrays)])
        q_smem, dout_smem, *refs_of_dq = operands[len(arrays) : len(arrays) + len(refs)]
        warpgroup, slot, *other_slot = operands[len(arrays) + len(refs) :]
        row_bytes = row_of_tiles(head_dim)
        queries, rows = (slot, tile * head_dim * 2), {"leading": TILE_BYTES, "stride": row_bytes}
        dv, p = (arrays_in.pop(0), arrays_in.pop(0)) if dv_and_p else (None, None)
        dk, *ds = arrays_in
        ptx = Ptx()
        dq_registers = ptx.write(ROWS // 2) if of_dq else []
        acc_registers = [
            ptx.update(x.to_layout(IN_FLIGHT.to_mgpu()).registers.flat) for x in (dv, dk) if x is not None
        ]  # fmt: skip
        factors = [(ds, q_smem)]
        if dv_and_p:
            factors.insert(0, ([p], dout_smem))
        ptx.begin()
        if of_dq:
            start_dq(
                ptx, dq_registers, *refs_of_dq, *other_slot, warpgroup, tile=tile, head_dim=head_dim, dtype=dtype
            )  # fmt: skip
        for acc, (x, y_smem) in zip(acc_registers, factors, strict=True):
            registers = ptx.read("r", (as_int32(x) for part in x for x in part.registers.flat))
            (y,) = ptx.read("l", (descriptor(y_smem, queries, **rows),))
            ptx.matmul(acc, registers, y, contracted=tile, dtype=dtype, b_rows=row_bytes)
            ptx.commit()
        if of_dq:
            ptx.wait(len(accs))
        values = iter(ptx.emit())
        results = []
        if of_dq:
            registers = list(itertools.islice(values, len(dq_registers)))
            results.append(fragmented(registers, (ROWS, ROWS)).to_layout(MATRIX.to_mgpu()))
        for acc in acc_registers:
            results.append(fragmented(list(itertools.islice(values, len(acc))), (ROWS, head_dim)))
        return tuple(results)

    results = list(emit(*arrays, *refs, *scalars))
    return results.pop(0) if of_dq else None, results


def dq_alone(ds_smem, k_smem, *, slot: jax.typing.ArrayLike, piece: jax.typing.ArrayLike) -> jax.Array:
    """The dq of `gradients` with nothing beside it; of any piece."""
    tile, head_dim = ds_smem.shape[3], k_smem.shape[1]
    dtype = PTX_DTYPES[k_smem.dtype.name]

    @plgpu.inline_mgpu(arg_types=(_SMEM,) * 2 + (SCALAR,) * 2, return_type=array_type((ROWS, ROWS), MATRIX))
    def emit(_, ds_smem, k_smem, slot, piece):
        ptx = Ptx()
        dq = ptx.write(ROWS // 2)
        ptx.begin()
        start_dq(ptx, dq, ds_smem, k_smem, slot, piece, tile=tile, head_dim=head_dim, dtype=dtype)
        ptx.wait(0)
        return fragmented(ptx.emit(), (ROWS, ROWS)).to_layout(MATRIX.to_mgpu())

    return emit(ds_smem, k_smem, *int32s((slot, piece)))


def start_dq(ptx: Ptx, dq: list[str], ds_smem, k_smem, slot, piece, *, tile: int, head_dim: int, dtype: str) -> None:
    """Starts a piece of dq = ds^T k: of 64 columns, at head dim 64 of 64 queries."""
    row_of_k_tiles, row_of_ds_tiles = row_of_tiles(head_dim), row_of_tiles(tile)
    of_piece = piece, TILE_BYTES
    of_k, of_ds = ((of_piece,), ()) if head_dim > 64 else ((), (of_piece,))
    at = slot, 2 * ROWS * tile * 2
    ds, k = ptx.read(
        "l",
        (
            descriptor(ds_smem, at, *of_ds, leading=TILE_BYTES, stride=row_of_ds_tiles),
            descriptor(k_smem, *of_k, leading=TILE_BYTES, stride=row_of_k_tiles),
        ),
    )
    ptx.matmul(
        dq, ds, k, contracted=2 * ROWS, dtype=dtype, fresh=True, a_rows=row_of_ds_tiles, b_rows=row_of_k_tiles
    )  # fmt: skip
    ptx.commit()


def finish(in_flight: Sequence[jax.Array], free: Arrival) -> list[jax.Array]:
    """Waits for what `gradients` left in flight, and arrives at `free` the moment it is done."""

    @plgpu.inline_mgpu(
        arg_types=(*(IN_FLIGHT,) * len(in_flight), SCALAR),
        return_type=tuple(array_type(x.shape, MATRIX) for x in in_flight),
    )
    def emit(_, *operands):
        *accs, free_at = operands
        ptx = Ptx()
        registers = [ptx.update(acc.registers.flat) for acc in accs]
        (free_name,) = ptx.read("r", (free_at.registers.item(),))
        ptx.wait(0)
        ptx.arrive(free_name, free.num_threads)
        values = iter(ptx.emit())
        return tuple(
            fragmented(list(itertools.islice(values, len(names))), acc.shape).to_layout(MATRIX.to_mgpu())
            for names, acc in zip(registers, accs, strict=True)
        )

    return list(emit(*in_flight, *int32s((free.barrier,))))

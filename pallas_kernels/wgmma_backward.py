"""One step of the backward pass of attention on Hopper's tensor cores, for a block of keys and a tile of queries.

Two warpgroups share a step, 64 keys of the block each. Logits and their gradients are transposed, `[keys, queries]`, so
that they feed dv and dk from registers; only dq, a sum over the keys of both, takes them through shared memory. In its
step a warpgroup

    scores      starts S^T = k q^T and dP^T = v dout^T of the first 64 queries, and waits for S^T alone
    settle      waits for dP^T
    more        where the tile has 128 queries: starts dP^T of the others and dv += P^T dout, and waits for dP^T alone
    gradients   starts dv += P^T dout, if still to be done, dq = dS k and dk += dS^T q, and waits for all but the last
    finish      waits for dk

P and dS are converted to 16 bits only where nothing is in flight, since ptxas would serialize the matmuls otherwise.

Reference: Shah et al. 2024, FlashAttention-3, arXiv:2407.08608, Appendix B.
"""

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
)

_SMEM = plgpu.RefType(TRANSFORMS)


def scores(
    k_smem, v_smem, q_smem, dout_smem, *, warpgroup: jax.typing.ArrayLike, slot: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Starts s = k q^T and dp = v dout^T, and returns when s is done.

    Args:
      k_smem, v_smem: `[128, H]`, of which this warpgroup reads its 64 rows.
      q_smem, dout_smem: `[slots, tile, H]`, of which a slot is read; for dp its first 64 rows.
    Returns: s, float32 `[64, tile]`, and dp in flight, `[64, 64]`: only `settle` may have it.
    """
    tile, head_dim = q_smem.shape[1:]
    dtype = PTX_DTYPES[q_smem.dtype.name]

    @plgpu.inline_mgpu(
        arg_types=(_SMEM,) * 4 + (SCALAR,) * 2,
        return_type=(array_type((ROWS, tile), MATRIX), array_type((ROWS, ROWS), IN_FLIGHT)),
    )
    def emit(_, k_smem, v_smem, q_smem, dout_smem, warpgroup, slot):
        row_of_tiles = head_dim // 64 * TILE_BYTES
        ptx = Ptx()
        s, dp = (ptx.write(columns // 2) for columns in (tile, ROWS))
        keys, queries = (warpgroup, ROWS * head_dim * 2), (slot, tile * head_dim * 2)
        operands = (k_smem, keys), (q_smem, queries), (v_smem, keys), (dout_smem, queries)
        k, q, v, dout = ptx.read("l", (descriptor(smem, at, leading=0, stride=row_of_tiles) for smem, at in operands))
        ptx.begin()
        ptx.matmul(s, k, q, contracted=head_dim, dtype=dtype, fresh=True)
        ptx.commit()
        ptx.matmul(dp, v, dout, contracted=head_dim, dtype=dtype, fresh=True)
        ptx.commit()
        ptx.wait(1)
        values = ptx.emit()
        done = fragmented(values[: len(s)], (ROWS, tile)).to_layout(MATRIX.to_mgpu())
        return done, fragmented(values[len(s) :], (ROWS, ROWS))

    return emit(k_smem, v_smem, q_smem, dout_smem, *int32s((warpgroup, slot)))


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
        row_of_tiles = head_dim // 64 * TILE_BYTES
        ptx = Ptx()
        dp_registers = ptx.write(ROWS // 2)
        dv_registers = ptx.update(dv.to_layout(IN_FLIGHT.to_mgpu()).registers.flat)
        p_registers = ptx.read("r", map(as_int32, p.registers.flat))
        last, queries = (tile - ROWS, head_dim * 2), (slot, tile * head_dim * 2)
        v, dout_rows, dout = ptx.read(
            "l",
            (
                descriptor(v_smem, (warpgroup, ROWS * head_dim * 2), leading=0, stride=row_of_tiles),
                descriptor(dout_smem, queries, last, leading=0, stride=row_of_tiles),
                descriptor(dout_smem, queries, leading=TILE_BYTES, stride=row_of_tiles),
            ),
        )
        ptx.begin()
        ptx.matmul(dp_registers, v, dout_rows, contracted=head_dim, dtype=dtype, fresh=True)
        ptx.commit()
        ptx.matmul(dv_registers, p_registers, dout, contracted=tile, dtype=dtype, b_rows=row_of_tiles)
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
    k_smem,
    q_smem,
    dout_smem,
    ds_smem,
    *,
    warpgroup: jax.typing.ArrayLike,
    slot: jax.typing.ArrayLike,
    ds_ready: jax.typing.ArrayLike,
    num_threads: int,
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """Starts dv += p dout, dq = ds^T k and dk += ds q, and returns when dv and dq are done.

    Each warpgroup computes a piece of dq: at head dim 128 half of the columns for all 64 queries of the tile, at head
    dim 64 half of its 128 queries.

    Args:
      dk: float32 `[64, H]`.
      ds: 16-bit `[64, 64]`, for each 64 queries of the tile.
      dv_and_p: float32 `[64, H]` and 16-bit `[64, tile]`; None where `more` has seen to dv.
      ds_smem: `[slots, 2, 64, tile]`, of whose `slot` both warpgroups read what both have written.
      ds_ready: The named barrier at which all `num_threads` wait until that is so.
    Returns: dv, or None; this warpgroup's piece of dq, float32 `[64, 64]`; dk in flight, for `finish`.
    """
    tile, head_dim = q_smem.shape[1:]
    dtype = PTX_DTYPES[q_smem.dtype.name]
    scalars = slot, warpgroup, ds_ready
    arrays = (*(dv_and_p or ()), dk, *ds)
    with_dv = dv_and_p is not None

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,) * len(arrays) + (_SMEM,) * 4 + (SCALAR,) * len(scalars),
        return_type=(
            *((array_type((ROWS, head_dim), MATRIX),) if with_dv else ()),
            array_type((ROWS, ROWS), MATRIX),
            array_type((ROWS, head_dim), IN_FLIGHT),
        ),
    )
    def emit(_, *operands):
        arrays_in, rest = operands[: len(arrays)], operands[len(arrays) :]
        k_smem, q_smem, dout_smem, ds_smem, slot, warpgroup, ds_ready = rest
        *of_dv, dk, ds = *arrays_in[: len(arrays) - len(ds_arrays)], arrays_in[len(arrays) - len(ds_arrays) :]
        row_of_tiles, row_of_ds_tiles = head_dim // 64 * TILE_BYTES, tile // 64 * TILE_BYTES
        ptx = Ptx()
        dq_registers = ptx.write(ROWS // 2)
        updated = [*of_dv[:1], dk]
        updated = [ptx.update(x.to_layout(IN_FLIGHT.to_mgpu()).registers.flat) for x in updated]
        ds_registers = ptx.read("r", (as_int32(x) for part in ds for x in part.registers.flat))
        queries, rows = (slot, tile * head_dim * 2), {"leading": TILE_BYTES, "stride": row_of_tiles}
        # This warpgroup's columns of k, or its queries of ds.
        mine = warpgroup, TILE_BYTES
        of_k, of_ds = ((mine,), ()) if head_dim == 128 else ((), (mine,))
        q, k, ds = ptx.read(
            "l",
            (
                descriptor(q_smem, queries, **rows),
                descriptor(k_smem, *of_k, **rows),
                descriptor(ds_smem, (slot, 2 * ROWS * tile * 2), *of_ds, leading=TILE_BYTES, stride=row_of_ds_tiles),
            ),
        )
        (ready,) = ptx.read("r", (ds_ready.registers.item(),))
        ptx.begin()
        if of_dv:
            p_registers = ptx.read("r", map(as_int32, of_dv[1].registers.flat))
            (dout,) = ptx.read("l", (descriptor(dout_smem, queries, **rows),))
            ptx.matmul(updated[0], p_registers, dout, contracted=tile, dtype=dtype, b_rows=row_of_tiles)
            ptx.commit()
        ptx.lines.append(f"bar.sync {ready}, {num_threads};")
        of_both = {"contracted": 2 * ROWS, "a_rows": row_of_ds_tiles, "b_rows": row_of_tiles}
        ptx.matmul(dq_registers, ds, k, dtype=dtype, fresh=True, **of_both)
        ptx.commit()
        ptx.matmul(updated[-1], ds_registers, q, contracted=tile, dtype=dtype, b_rows=row_of_tiles)
        ptx.commit()
        ptx.wait(1)
        values = ptx.emit()
        first, last = len(dq_registers), len(values) - len(updated[-1])
        dq = fragmented(values[:first], (ROWS, ROWS)).to_layout(MATRIX.to_mgpu())
        dk = fragmented(values[last:], (ROWS, head_dim))
        if not of_dv:
            return dq, dk
        return fragmented(values[first:last], (ROWS, head_dim)).to_layout(MATRIX.to_mgpu()), dq, dk

    ds_arrays = ds
    results = emit(*arrays, k_smem, q_smem, dout_smem, ds_smem, *int32s(scalars))
    return results if with_dv else (None, *results)


def finish(dk, free: Arrival) -> jax.Array:
    """Waits for the dk of `gradients`, and arrives at `free` the moment it is done."""

    @plgpu.inline_mgpu(arg_types=(IN_FLIGHT, SCALAR), return_type=array_type(dk.shape, MATRIX))
    def emit(_, dk, free_at):
        ptx = Ptx()
        ptx.update(dk.registers.flat)
        (free_name,) = ptx.read("r", (free_at.registers.item(),))
        ptx.wait(0)
        ptx.arrive(free_name, free.num_threads)
        return fragmented(ptx.emit(), dk.shape).to_layout(MATRIX.to_mgpu())

    return emit(dk, *int32s((free.barrier,)))

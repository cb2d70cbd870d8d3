"""One step of the backward pass of attention on Hopper's tensor cores, for a block of keys and a tile of queries.

Two warpgroups share a step, 64 keys of the block each. Logits and their gradients are transposed, `[keys, queries]`, so
that they feed dv and dk from registers; only dq, a sum over the keys of both, takes them through shared memory. In its
step a warpgroup

    scores      starts S^T = k q^T and dP^T = v dout^T, and waits for S^T alone
    settle      waits for dP^T
    gradients   starts dv += P^T dout, dq = dS k and dk += dS^T q, and waits for all but the last
    finish      waits for dk

P and dS are converted to 16 bits only where nothing is in flight, since ptxas would serialize the matmuls otherwise.

Reference: Shah et al. 2024, FlashAttention-3, arXiv:2407.08608, Appendix B.
"""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

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
      q_smem, dout_smem: `[slots, tile, H]`, of which a slot is read.
    Returns: s, float32 `[64, tile]`, and dp in flight: only `settle` may have it.
    """
    tile, head_dim = q_smem.shape[1:]
    dtype = PTX_DTYPES[q_smem.dtype.name]

    @plgpu.inline_mgpu(
        arg_types=(_SMEM,) * 4 + (SCALAR,) * 2,
        return_type=(array_type((ROWS, tile), MATRIX), array_type((ROWS, tile), IN_FLIGHT)),
    )
    def emit(_, k_smem, v_smem, q_smem, dout_smem, warpgroup, slot):
        row_of_tiles = head_dim // 64 * TILE_BYTES
        ptx = Ptx()
        s, dp = (ptx.write(ir.VectorType.get((1,), ir.F32Type.get()), tile // 2) for _ in range(2))
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
        done, in_flight = (fragmented(x, (ROWS, tile)) for x in (values[: len(s)], values[len(s) :]))
        return done.to_layout(MATRIX.to_mgpu()), in_flight

    return emit(k_smem, v_smem, q_smem, dout_smem, *int32s((warpgroup, slot)))


def settle(dp, p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Waits for the dp of `scores`; hands p through, which may be converted from here on. Both float32 `[64, tile]`."""

    @plgpu.inline_mgpu(arg_types=(IN_FLIGHT, MATRIX), return_type=tuple(array_type(x.shape, MATRIX) for x in (dp, p)))
    def emit(_, dp, p):
        ptx = Ptx()
        ptx.update(dp.registers.flat)
        count = len(ptx.update(p.to_layout(IN_FLIGHT.to_mgpu()).registers.flat))
        ptx.wait(0)
        values = ptx.emit()
        return tuple(fragmented(x, p.shape).to_layout(MATRIX.to_mgpu()) for x in (values[:-count], values[-count:]))

    return emit(dp, p)


def gradients(
    dv: jax.Array,
    dk: jax.Array,
    p: jax.Array,
    ds: jax.Array,
    k_smem,
    q_smem,
    dout_smem,
    ds_smem,
    *,
    warpgroup: jax.typing.ArrayLike,
    slot: jax.typing.ArrayLike,
    ds_slot: jax.typing.ArrayLike,
    ds_ready: jax.typing.ArrayLike,
    num_threads: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Starts dv += p dout, dq = ds^T k and dk += ds q, and returns when dv and dq are done.

    Each warpgroup computes a piece of dq: at head dim 128 half of the columns for all 64 queries of the tile,
    at head dim 64 half of its 128 queries.

    Args:
      dv, dk: float32 `[64, H]`.
      p, ds: 16-bit `[64, tile]`.
      ds_smem: `[slots, 2, 64, tile]`, of whose `ds_slot` both warpgroups read what both have written.
      ds_ready: The named barrier at which all `num_threads` wait until that is so.
    Returns: dv; this warpgroup's piece of dq, float32 `[64, 64]`; dk in flight, for `finish`.
    """
    tile, head_dim = q_smem.shape[1:]
    dtype = PTX_DTYPES[p.dtype.name]
    scalars = slot, warpgroup, ds_slot, ds_ready

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,) * 4 + (_SMEM,) * 4 + (SCALAR,) * len(scalars),
        return_type=(
            array_type((ROWS, head_dim), MATRIX),
            array_type((ROWS, 64), MATRIX),
            array_type((ROWS, head_dim), IN_FLIGHT),
        ),
    )
    def emit(_, dv, dk, p, ds, k_smem, q_smem, dout_smem, ds_smem, slot, warpgroup, ds_slot, ds_ready):
        row_of_tiles, row_of_ds_tiles = head_dim // 64 * TILE_BYTES, tile // 64 * TILE_BYTES
        ptx = Ptx()
        dq_registers = ptx.write(ir.VectorType.get((1,), ir.F32Type.get()), 32)
        dv_registers, dk_registers = (ptx.update(x.to_layout(IN_FLIGHT.to_mgpu()).registers.flat) for x in (dv, dk))
        p_registers, ds_registers = (ptx.read("r", map(as_int32, x.registers.flat)) for x in (p, ds))
        queries, rows = (slot, tile * head_dim * 2), {"leading": TILE_BYTES, "stride": row_of_tiles}
        # This warpgroup's columns of k, or its queries of ds.
        mine = warpgroup, TILE_BYTES
        of_k, of_ds = ((mine,), ()) if head_dim == 128 else ((), (mine,))
        q, dout, k, ds = ptx.read(
            "l",
            (
                descriptor(q_smem, queries, **rows),
                descriptor(dout_smem, queries, **rows),
                descriptor(k_smem, *of_k, **rows),
                descriptor(ds_smem, (ds_slot, 2 * ROWS * tile * 2), *of_ds, leading=TILE_BYTES, stride=row_of_ds_tiles),
            ),
        )
        (ready,) = ptx.read("r", (ds_ready.registers.item(),))
        ptx.begin()
        ptx.matmul(dv_registers, p_registers, dout, contracted=tile, dtype=dtype, b_rows=row_of_tiles)
        ptx.commit()
        ptx.lines.append(f"bar.sync {ready}, {num_threads};")
        ptx.matmul(
            dq_registers,
            ds,
            k,
            contracted=2 * ROWS,
            dtype=dtype,
            fresh=True,
            a_rows=row_of_ds_tiles,
            b_rows=row_of_tiles,
        )
        ptx.commit()
        ptx.matmul(dk_registers, ds_registers, q, contracted=tile, dtype=dtype, b_rows=row_of_tiles)
        ptx.commit()
        ptx.wait(1)
        values = ptx.emit()
        first, second = len(dq_registers), len(dq_registers) + len(dv_registers)
        dq, dv, dk = (
            fragmented(values[at], (ROWS, columns))
            for at, columns in (
                (slice(0, first), 64),
                (slice(first, second), head_dim),
                (slice(second, None), head_dim),
            )
        )
        return dv.to_layout(MATRIX.to_mgpu()), dq.to_layout(MATRIX.to_mgpu()), dk

    return emit(dv, dk, p, ds, k_smem, q_smem, dout_smem, ds_smem, *int32s(scalars))


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

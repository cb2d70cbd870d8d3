"""One step of forward attention on Hopper's tensor cores.

A step starts S = q k^T and acc += p v at once and waits for S alone, so that the softmax of S runs while p v is still
in flight. p is converted to 16 bits only when p v is done, since ptxas would serialize the matmuls otherwise.

Reference: Shah et al. 2024, FlashAttention-3, arXiv:2407.08608, Algorithm 2.
"""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.wgmma import (
    IN_FLIGHT,
    MATRIX,
    PTX_DTYPES,
    ROW,
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


def start(
    acc: jax.Array,
    p: jax.Array,
    q_smem,
    k_smem,
    v_smem,
    *,
    q_tile: jax.typing.ArrayLike,
    k_slot: jax.typing.ArrayLike,
    v_slot: jax.typing.ArrayLike,
    issued: Arrival,
    k_free: Arrival,
) -> tuple[jax.Array, jax.Array]:
    """Starts s = q k^T and acc += p v, and returns when s is done.

    Args:
      acc: float32 `[64, H]`.
      p: 16-bit `[64, block]`.
      q_smem: `[..., H]`, of which the `q_tile`-th 64 rows are read.
      k_smem, v_smem: `[slots, block, H]`, of which a slot is read.
      issued: Arrived at as soon as both matmuls are issued.
      k_free: Arrived at as soon as s is done.
    Returns: s, float32 `[64, block]`, and acc in flight: only `finish` may have it.
    """
    (block, head_dim), value_dim = k_smem.shape[1:], acc.shape[1]
    dtype = PTX_DTYPES[p.dtype.name]
    smem = plgpu.RefType(TRANSFORMS)
    scalars = q_tile, k_slot, v_slot, issued.barrier, k_free.barrier

    @plgpu.inline_mgpu(
        arg_types=(MATRIX, MATRIX, smem, smem, smem, *(SCALAR,) * len(scalars)),
        return_type=(array_type((ROWS, block), MATRIX), array_type((ROWS, value_dim), IN_FLIGHT)),
    )
    def emit(_, acc, p, q_smem, k_smem, v_smem, q_tile, k_slot, v_slot, issued_at, free_at):
        row_bytes, row_bytes_of_v = row_of_tiles(head_dim), row_of_tiles(value_dim)
        ptx = Ptx()
        s_registers = ptx.write(block // 2)
        acc_registers = ptx.update(acc.to_layout(IN_FLIGHT.to_mgpu()).registers.flat)
        p_registers = ptx.read("r", map(as_int32, p.registers.flat))
        q, k, v = ptx.read(
            "l",
            (
                descriptor(q_smem, (q_tile, ROWS * head_dim * 2), leading=0, stride=row_bytes),
                descriptor(k_smem, (k_slot, block * head_dim * 2), leading=0, stride=row_bytes),
                descriptor(v_smem, (v_slot, block * value_dim * 2), leading=TILE_BYTES, stride=row_bytes_of_v),
            ),
        )
        issued_name, free_name = ptx.read("r", (x.registers.item() for x in (issued_at, free_at)))
        ptx.begin()
        ptx.matmul(s_registers, q, k, contracted=head_dim, dtype=dtype, fresh=True)
        ptx.commit()
        ptx.matmul(acc_registers, p_registers, v, contracted=block, dtype=dtype, b_rows=row_bytes_of_v)
        ptx.commit()
        ptx.arrive(issued_name, issued.num_threads)
        ptx.wait(1)
        ptx.arrive(free_name, k_free.num_threads)
        values = ptx.emit()
        s, acc = values[: len(s_registers)], values[len(s_registers) :]
        return fragmented(s, (ROWS, block)).to_layout(MATRIX.to_mgpu()), fragmented(acc, (ROWS, value_dim))

    return emit(acc, p, q_smem, k_smem, v_smem, *int32s(scalars))


def finish(acc, p: jax.Array, rescale: jax.Array | None, v_free: Arrival | None) -> tuple[jax.Array, jax.Array]:
    """Waits for the acc of `start`, and multiplies its rows by `rescale`.

    Where all of a warp's factors are 1, which is the rule, they are not multiplied by.

    Args:
      p: float32 `[64, block]`, handed through: it may be converted for the next step from here on.
      rescale: float32 `[64]`; None for 1.
      v_free: Arrived at as soon as acc is done.
    Returns: acc and p.
    """

    @plgpu.inline_mgpu(
        arg_types=(IN_FLIGHT, MATRIX, *((ROW,) if rescale is not None else ()), *((SCALAR,) if v_free else ())),
        return_type=tuple(array_type(x.shape, MATRIX) for x in (acc, p)),
    )
    def emit(_, acc, p, *rest):
        rest = list(rest)
        ptx = Ptx()
        acc_registers = ptx.update(acc.registers.flat)
        ptx.update(p.to_layout(IN_FLIGHT.to_mgpu()).registers.flat)
        ptx.wait(0)
        factors = ptx.read("f", rest.pop(0).registers.flat) if rescale is not None else None
        if v_free:
            (free_name,) = ptx.read("r", (rest.pop(0).registers.item(),))
            ptx.arrive(free_name, v_free.num_threads)
        if factors:
            # A thread holds two rows; of four registers in a row, two are of the first.
            upper, lower = factors
            ptx.lines += [
                ".reg .pred changed, other;",
                f"setp.ne.f32 changed, {upper}, 0f3F800000;",
                f"setp.ne.or.f32 changed, {lower}, 0f3F800000, changed;",
                "vote.sync.any.pred other, changed, 0xffffffff;",
                "@!other bra.uni UNCHANGED;",
                *(f"mul.f32 {x}, {x}, {upper if i % 4 < 2 else lower};" for i, x in enumerate(acc_registers)),
                "UNCHANGED:",
            ]
        values = ptx.emit()
        done, p_done = values[: len(acc_registers)], values[len(acc_registers) :]
        layout = MATRIX.to_mgpu()
        return fragmented(done, acc.shape).to_layout(layout), fragmented(p_done, p.shape).to_layout(layout)

    return emit(acc, p, *((rescale,) if rescale is not None else ()), *int32s((v_free.barrier,) if v_free else ()))

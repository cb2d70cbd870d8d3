"""One step of the backward pass of attention on Hopper's tensor cores, for head dims of 192 and values of 128: 64 keys
of a warpgroup, whose dk and dv alone are 160 registers a thread, and a tile of 64 queries.

ptxas has some 206 registers for what matmuls are in the midst of, and serializes them all where it finds no place. So a
step of wgmma_backward.py, which has 32 each for logits, their gradients and dq, goes in smaller portions:

    scores         (of wgmma_backward) and what follows of it, for 32 queries at a time
    store_half     dS of 32 queries to shared memory, from where dk takes it too
    own_gradients  starts dv += P^T dout and dk += dS^T q; waits for dv
    behind         starts a piece of dq = dS k of the tile before; waits for dk, then for dq

Reference: see wgmma_backward.py.
"""

import jax
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

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
from pallas_kernels.wgmma_backward import start_dq

_SMEM = plgpu.RefType(TRANSFORMS)


def store_half(ref, x: jax.Array, first: ArrayLike, *, warpgroup: ArrayLike, slot: ArrayLike) -> None:
    """ref[slot, warpgroup, :, first : first + 32] = x, 16-bit `[64, 32]`; ref is `[slots, 2, 64, 64]` in shared memory.

    Pallas stores no part of the columns of a swizzled tile.
    """

    @plgpu.inline_mgpu(arg_types=(_SMEM, MATRIX) + (SCALAR,) * 3)
    def emit(_, ref, x, warpgroup, slot, first):
        words = [as_int32(register) for register in x.registers.flat]  # for 8 columns each row r, then r + 8
        scalars = [y.registers.item() for y in (warpgroup, slot, first)]
        address = llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref))
        row_bytes = row_of_tiles(ROWS)
        lines = [
            ".reg .b32 thread, row, at, chunk, part, first;",
            "mov.u32 thread, %tid.x;",
            "bfe.u32 row, thread, 2, 3;",
            f"mad.lo.u32 at, $1, {ROWS * ROWS * 2}, $0;",
            f"mad.lo.u32 at, $2, {2 * ROWS * ROWS * 2}, at;",
            # A warp has 16 rows, four threads one of them, and of 8 columns two each.
            "bfe.u32 part, thread, 5, 2;",
            f"mad.lo.u32 at, part, {2 * row_bytes}, at;",
            f"mad.lo.u32 at, row, {row_bytes // 8}, at;",
            "and.b32 part, thread, 3;",
            "mad.lo.u32 at, part, 4, at;",
            "shr.u32 first, $3, 3;",
        ]
        for i in range(x.shape[1] // 8):
            lines += [
                # Of a tile's row the 8 pieces of 16 bytes are swizzled by its number.
                f"add.u32 chunk, first, {i};",
                "xor.b32 chunk, row, chunk;",
                "mad.lo.u32 chunk, chunk, 16, at;",
                f"st.shared.b32 [chunk], ${4 + 2 * i};",
                f"st.shared.b32 [chunk + {row_bytes}], ${5 + 2 * i};",
            ]
        text = "{\n" + "\n".join(lines) + "\n}"
        constraints = ",".join(["r"] * (4 + len(words)) + ["~{memory}"])
        operands = [address, *scalars, *words]
        llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, constraints, has_side_effects=True)

    emit(ref, x, *int32s((warpgroup, slot, first)))


def beside(x: jax.Array, y: jax.Array) -> jax.Array:
    """`[64, n]` and `[64, n]`, 16-bit, as `[64, 2 n]`."""
    result = plgpu.ShapeDtypeStruct((ROWS, 2 * x.shape[1]), x.dtype, layout=MATRIX)

    @plgpu.inline_mgpu(arg_types=(MATRIX,) * 2, return_type=result)
    def emit(_, x, y):
        registers = np.concatenate([x.registers, y.registers], axis=1)  # of 8 columns each
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return emit(x, y)


def own_gradients(
    dv: jax.Array, p: jax.Array, dk: jax.Array, ds_smem, q_smem, dout_smem, *, warpgroup: ArrayLike, slot: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Starts dv += p dout and dk += ds q, and returns when dv is done.

    Args:
      dv, dk: float32 `[64, V]` and `[64, H]`.
      p: 16-bit `[64, 64]`.
      ds_smem: `[slots, 2, 64, 64]`, of which this warpgroup's of a slot is read.
      q_smem, dout_smem: `[slots, 64, H]` and `[slots, 64, V]`.
    Returns: dv, and dk in flight, for `behind`.
    """
    tile, dtype = q_smem.shape[1], PTX_DTYPES[q_smem.dtype.name]
    V, H = dout_smem.shape[2], q_smem.shape[2]

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,) * 3 + (_SMEM,) * 3 + (SCALAR,) * 2,
        return_type=(array_type((ROWS, V), MATRIX), array_type((ROWS, H), IN_FLIGHT)),
    )
    def emit(_, dv, p, dk, ds_smem, q_smem, dout_smem, warpgroup, slot):
        ptx = Ptx()
        dv_registers, dk_registers = (ptx.update(x.to_layout(IN_FLIGHT.to_mgpu()).registers.flat) for x in (dv, dk))
        p_registers = ptx.read("r", map(as_int32, p.registers.flat))
        at_ds = (slot, 2 * ROWS * tile * 2), (warpgroup, ROWS * tile * 2)
        ds, dout, q = ptx.read(
            "l",
            (
                descriptor(ds_smem, *at_ds, leading=0, stride=row_of_tiles(tile)),
                descriptor(dout_smem, (slot, tile * V * 2), leading=TILE_BYTES, stride=row_of_tiles(V)),
                descriptor(q_smem, (slot, tile * H * 2), leading=TILE_BYTES, stride=row_of_tiles(H)),
            ),
        )
        ptx.begin()
        ptx.matmul(dv_registers, p_registers, dout, contracted=tile, dtype=dtype, b_rows=row_of_tiles(V))
        ptx.commit()
        ptx.matmul(dk_registers, ds, q, contracted=tile, dtype=dtype, b_rows=row_of_tiles(H))
        ptx.commit()
        ptx.wait(1)
        values, first = ptx.emit(), len(dv_registers)
        done = fragmented(values[:first], (ROWS, V)).to_layout(MATRIX.to_mgpu())
        return done, fragmented(values[first:], (ROWS, H))

    return emit(dv, p, dk, ds_smem, q_smem, dout_smem, *int32s((warpgroup, slot)))


def behind(
    dk: jax.Array, free: Arrival, ds_smem, k_smem, *, slot: ArrayLike, piece: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Starts a piece of dq behind dk, arrives at `free` when dk is done, and returns when dq is.

    Args:
      dk: In flight, of `own_gradients`.
      ds_smem, slot: `[slots, 2, 64, 64]` of both warpgroups, and of which tile.
      k_smem: `[128, H]`.
      piece: Which 64 columns.
    Returns: dk, and dq, float32 `[64, 64]`.
    """
    tile, dtype = ds_smem.shape[3], PTX_DTYPES[k_smem.dtype.name]

    @plgpu.inline_mgpu(
        arg_types=(IN_FLIGHT,) + (_SMEM,) * 2 + (SCALAR,) * 3,
        return_type=(array_type(dk.shape, MATRIX), array_type((ROWS, ROWS), MATRIX)),
    )
    def emit(_, dk, ds_smem, k_smem, free_at, slot, piece):
        ptx = Ptx()
        dq_registers = ptx.write(ROWS // 2)
        ptx.update(dk.registers.flat)
        (free_name,) = ptx.read("r", (free_at.registers.item(),))
        ptx.begin()
        start_dq(
            ptx, dq_registers, ds_smem, k_smem, slot, piece, tile=tile, head_dim=dk.shape[1], dtype=dtype
        )  # fmt: skip
        ptx.wait(1)
        ptx.arrive(free_name, free.num_threads)
        ptx.wait(0)
        values, first = ptx.emit(), len(dq_registers)
        pieces = (values[first:], dk.shape), (values[:first], (ROWS, ROWS))
        return tuple(fragmented(registers, shape).to_layout(MATRIX.to_mgpu()) for registers, shape in pieces)

    return emit(dk, ds_smem, k_smem, *int32s((free.barrier, slot, piece)))

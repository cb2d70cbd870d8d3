"""What the Hopper forward kernel does with the greatest logits of a tile: writes them, and tells whether any matters.

A tile is the 64 queries of a warpgroup and a block of keys. Each thread has the maxima of two rows, the same as three
others; a warp has 16 rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic_gpu import WARPGROUP
from pallas_kernels.wgmma import ROW, ROWS, SCALAR

ROWS_OF_WARP = 16


def any_not_negative(excess: jax.Array, *, interpret: Any) -> jax.Array:
    """Whether any of a row vector's 64 numbers is not below 0, a nan among them: bool, the same in every thread.

    The warpgroup meets at its barrier for it.
    """
    if interpret:
        return ~jnp.all(excess < 0)

    @plgpu.inline_mgpu(arg_types=(ROW,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
    def emit(_, excess):
        i32 = ir.IntegerType.get_signless(32)
        text = f"""{{
        .reg .pred mine, any;
        setp.geu.f32 mine, $1, 0f00000000;
        setp.geu.or.f32 mine, $2, 0f00000000, mine;
        bar.red.or.pred any, $3, {WARPGROUP}, mine;
        selp.s32 $0, 1, 0, any;
        }}"""
        operands = [*excess.registers.flat, mgpu.utils.warpgroup_barrier_idx(sync=False)]
        found = llvm.inline_asm(i32, operands, text, "=r,f,f,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return emit(excess) != 0


def store(ref, greatest: jax.Array, *, interpret: Any) -> None:
    """ref[:] = greatest of 64 rows, or of each 16 where ref, in device memory, has only 4 places."""
    if ref.shape == (ROWS,):
        ref[...] = greatest
        return
    if interpret:
        ref[...] = jnp.max(greatest.reshape(-1, ROWS_OF_WARP), axis=1)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROW))
    def emit(_, ref, greatest):
        base = llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(ref))
        # Whole numbers of the same order as the floats: of these a warp has a maximum in one instruction.
        turned = "shr.s32 turns, number, 31; and.b32 turns, turns, 0x7fffffff; xor.b32 number, number, turns;"
        text = f"""{{
        .reg .b32 number, turns, thread;
        .reg .f32 greatest;
        .reg .b64 at;
        .reg .pred stores;
        max.NaN.f32 greatest, $1, $2;
        mov.b32 number, greatest;
        {turned}
        redux.sync.max.s32 number, number, 0xffffffff;
        {turned}
        mov.u32 thread, %tid.x;
        and.b32 thread, thread, {WARPGROUP - 1};
        and.b32 turns, thread, 31;
        setp.eq.b32 stores, turns, 0;
        shr.u32 thread, thread, 5;
        mad.wide.u32 at, thread, 4, $0;
        @stores st.global.b32 [at], number;
        }}"""
        operands = [base, *greatest.registers.flat]
        llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, "l,f,f,~{memory}", has_side_effects=True)

    emit(ref, greatest)

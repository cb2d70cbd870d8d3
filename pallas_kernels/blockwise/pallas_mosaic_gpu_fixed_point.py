"""Sums whose bits do not depend on their order: dq in fixed point, on Hopper GPUs.

Many blocks of keys add into a tile of dq at the same time. Sums of float32 depend on who comes first, those of integers
do not. So what a block of keys adds is rounded to a multiple of a unit and added as int32, and nobody waits for a turn.

A unit must be so large that no sum overflows. With P >= 0 and sum_j P_ij <= 1 (lse is of these keys, or of more too),

    |dq_id| / scale = |sum_j P_ij (dP_ij - delta_i) k_jd| <= (|dout_i| max_j |v_j| + |delta_i|) max_jd |k_jd|

since |dP_ij| <= |dout_i| |v_j| (Cauchy and Schwarz), and 1 / (1 - rate) times that with dropout. A query's unit is its
bound over 7/8 2^31; the eighth is for P and dS, which are rounded, so that their sums may exceed 1. A block of keys is
out by at most half a unit, so S keys

    by at most S / 256 units, and by sqrt(S / 128 / 12) of them in the mean square:

2e-9 of the bound at 32,768 keys. Sums that are much smaller than their bound, as of a query that attends to many keys
alike, are less exact in proportion (README.md says how much).

Who adds up in any order has float32, and no bound to find, for which k and v are read once more.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.blockwise.pallas_mosaic_gpu_tiles import MATRIX, ROW, rows
from pallas_kernels.wgmma import ROWS

_MOST = 7 / 8 * 2.0**31
_LEAST_BOUND = 2.0**-90
"""With less the reciprocal of a unit would not be finite."""


def units_of(k_BSKH, v_BSKV, dout_BTNV, delta_BNT, *, dropout_rate: float) -> jax.Array:
    """The units of each query's dq, float32, of delta's shape.

    Args:
      delta_BNT: May be of more queries than dout.
    Cost: k, v and dout are read once.
    """
    most_of_k, most_of_v = jnp.max(jnp.abs(k_BSKH), axis=(1, 3)).astype(jnp.float32), jnp.max(_norms(v_BSKV), axis=1)
    group = dout_BTNV.shape[2] // k_BSKH.shape[2]
    most_of_k, most_of_v = (jnp.repeat(x, group, axis=1)[:, :, None] for x in (most_of_k, most_of_v))
    missing = delta_BNT.shape[2] - dout_BTNV.shape[1]
    norm_of_dout = jnp.pad(_norms(dout_BTNV).swapaxes(1, 2), ((0, 0), (0, 0), (0, missing)))
    bound = (norm_of_dout * most_of_v / (1 - dropout_rate) + jnp.abs(delta_BNT)) * most_of_k
    # A maximum lets through what is not a number, as dq must.
    return jnp.maximum(bound, _LEAST_BOUND) / _MOST


def _norms(x_BLNH) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x_BLNH.astype(jnp.float32)), axis=-1))


def load_early(ref, start) -> jax.Array:
    """ref[start : start + 64], float32 in device memory, as rows of a matmul's result, asked for where this stands.

    An ordinary load would be moved to where its result is wanted, which is a step later and would then wait for memory.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=ROW),
    )
    def emit(_, ref, start):
        f32 = ir.F32Type.get()
        # Of 32 threads, a warp's, four share a row, and the row 8 further on.
        text = """{
        .reg .b64 at;
        .reg .b32 thread, row;
        mov.u32 thread, %tid.x;
        bfe.u32 row, thread, 5, 2;
        shl.b32 row, row, 4;
        bfe.u32 thread, thread, 2, 3;
        add.u32 row, row, thread;
        add.s32 row, row, $3;
        mad.wide.s32 at, row, 4, $2;
        ld.global.nc.f32 $0, [at];
        ld.global.nc.f32 $1, [at + 32];
        }"""
        address = llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(ref))
        loaded = llvm.inline_asm(
            llvm.StructType.get_literal([f32, f32]), [address, start.registers.item()], text, "=f,=f,l,r",
            has_side_effects=True,
        )  # fmt: skip
        layout, one = ROW.to_mgpu(), ir.VectorType.get((1,), f32)
        registers = [vector.broadcast(one, llvm.extractvalue(f32, loaded, [i])) for i in range(2)]
        registers = np.array(registers, dtype=object).reshape(layout.registers_shape((ROWS,)))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return emit(ref, jnp.asarray(start, jnp.int32))


def in_units(x, per_unit, *, interpret: bool):
    """x, float32 `[64, 64]` in a matmul's layout, in units: int32, to the nearest.

    Args:
      per_unit: The reciprocals of the units of x's rows.
    """
    x = x * rows(per_unit, x.shape)
    if interpret:
        return jnp.round(x).astype(jnp.int32)

    @plgpu.inline_mgpu(arg_types=(MATRIX,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.int32, layout=MATRIX))
    def emit(_, x):
        i32 = ir.IntegerType.get_signless(32)

        def nearest(register: ir.Value) -> ir.Value:
            result = llvm.mlir_undef(ir.VectorType.get(register.type.shape, i32))
            for i in range(register.type.shape[0]):
                at = arith.constant(i32, ir.IntegerAttr.get(i32, i))
                element = llvm.inline_asm(i32, [llvm.extractelement(register, at)], "cvt.rni.s32.f32 $0, $1;", "=r,f")
                result = llvm.insertelement(result, element, at)
            return result

        registers = np.array([nearest(x) for x in x.registers.flat], dtype=object).reshape(x.registers.shape)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=True)

    return emit(x)


def of_units(x_BTNH, units_BNT):
    """Sums in units as float32; units may be of more queries."""
    return x_BTNH.astype(jnp.float32) * units_BNT.swapaxes(1, 2)[:, : x_BTNH.shape[1], :, None]

"""What matmuls leave in registers, written to device memory in whole sectors (PTX).

Of a row of a product a thread has two neighbouring columns in eight. At 16 bits a store of them by the four threads of
a row fills half of a sector, of the 32 bytes that memory moves. So these exchange what they have, after which each has
8 neighbouring columns in 32, and a store fills two sectors of a row.

Reference: PTX ISA 9.0, Matrix fragments for wgmma.mma_async.m64nNk16, figure of matrix D.
"""

import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic_gpu import WARPGROUP
from pallas_kernels.wgmma import MATRIX, as_int32, braces

_COLUMNS = 32
"""That the four threads of a row write at a time."""


def store_rows(ref, value: jax.Array) -> None:
    """ref[...] = value: 16-bit `[64, columns]` in device memory, rows of whole sectors, columns a multiple of 32."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), MATRIX))
    def emit(_, ref, value):
        (row_stride, column_stride), _ = ir.MemRefType(ref.type).get_strides_and_offset()
        if column_stride != 1 or value.shape[1] % _COLUMNS:
            raise ValueError(f"store_rows: {ref.type}, wanted rows of a multiple of {_COLUMNS} columns in one piece")
        words = [as_int32(register) for register in value.registers.flat]  # for 8 columns each row r, then r + 8
        address = llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(ref))
        lines = [
            ".reg .b32 thread, row, column;",
            ".reg .b32 has<4>, swaps, keeps;",
            ".reg .b64 at;",
            ".reg .pred is_odd, is_high;",
            "mov.u32 thread, %tid.x;",
            f"and.b32 thread, thread, {WARPGROUP - 1};",
            "and.b32 column, thread, 1;",
            "setp.ne.b32 is_odd, column, 0;",
            "and.b32 column, thread, 2;",
            "setp.ne.b32 is_high, column, 0;",
            # Of 32 threads, a warp's, rows are 8 apart from those of their second half.
            "shr.u32 row, thread, 5;",
            "shl.b32 row, row, 4;",
            "bfe.u32 column, thread, 2, 3;",
            "add.u32 row, row, column;",
            f"mad.wide.u32 at, row, {row_stride * 2}, $0;",
            "and.b32 column, thread, 3;",
            "mad.wide.u32 at, column, 16, at;",
        ]
        for group in range(value.shape[1] // _COLUMNS):
            for half in range(2):
                lines += [f"mov.b32 has{i}, ${1 + 2 * (4 * group + i) + half};" for i in range(4)]
                lines += _exchange((0, 1), "is_odd", 1) + _exchange((2, 3), "is_odd", 1)
                lines += _exchange((0, 2), "is_high", 2) + _exchange((1, 3), "is_high", 2)
                offset = group * _COLUMNS * 2 + half * 8 * row_stride * 2
                lines.append(f"st.global.v4.b32 [at + {offset}], {braces([f'has{i}' for i in range(4)])};")
        text = "{\n" + "\n".join(lines) + "\n}"
        constraints = ",".join(["l", *["r"] * len(words), "~{memory}"])
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [address, *words], text, constraints, has_side_effects=True)

    emit(ref, value)


def _exchange(words: tuple[int, int], upper: str, distance: int) -> list[str]:
    """Two threads so far apart give each other a word: the lower one its second for the upper one's first."""
    first, second = (f"has{i}" for i in words)
    return [
        f"selp.b32 swaps, {first}, {second}, {upper};",
        f"selp.b32 keeps, {second}, {first}, {upper};",
        f"shfl.sync.bfly.b32 swaps, swaps, {distance}, 31, 0xffffffff;",
        f"selp.b32 {first}, swaps, keeps, {upper};",
        f"selp.b32 {second}, keeps, swaps, {upper};",
    ]

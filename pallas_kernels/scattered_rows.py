"""Rows of a matrix in device memory that do not stand together: into shared memory, and added from there (PTX).

TMA moves boxes that begin at whole tiles. What the queries of one block of keys have stands wherever they stand in the
sequence, and a block of keys may begin anywhere. So 128 threads copy rows 16 bytes at a time (cp.async) to where TMA
would put them, swizzled for the tensor cores; and results are added row by row.

Reference: PTX ISA 9.0, Asynchronous copy: cp.async.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels.mosaic_gpu import WARPGROUP
from pallas_kernels.wgmma import (
    IN_FLIGHT,
    MATRIX,
    ROWS,
    SCALAR,
    TILE_BYTES,
    TRANSFORMS,
    Ptx,
    array_type,
    as_int32,
    braces,
    fragmented,
    int32s,
)

# Columns behind each row of a stage, 32 bits each: with them no two of a warp's writes meet in a bank.
_PADDING = 8

_SWIZZLED = plgpu.RefType(TRANSFORMS)
_PLAIN = plgpu.RefType()
_HELD = plgpu.Layout.WG_STRIDED((WARPGROUP,), vec_size=1)


class Listed(NamedTuple):
    """64 rows whose numbers are in a list in device memory, negative for none: `numbers[at]` of int32 `[lists, 64]`."""

    numbers: Any
    at: ArrayLike


class Held(NamedTuple):
    """64 rows whose numbers `read` has put into registers."""

    numbers: Any


class Spaced(NamedTuple):
    """Rows first, first + 1, ..., first + run - 1, and as many from first + step on, from first + 2 step on, ...;
    `count` of them, and none beyond. `run` is a power of two."""

    first: ArrayLike
    step: int
    count: ArrayLike
    run: int = 1


class Numbers(NamedTuple):
    """One number of 32 bits for each row.

    Attributes:
      source: In device memory, one for each row of the matrix.
      target: In shared memory, `[slots, 64]`. Rows that are none become zeros.
    """

    source: Any
    target: Any


class _Asm:
    """Inline PTX under construction: lines, and operands that they read."""

    def __init__(self):
        self.lines: list[str] = []
        self._operands: list[ir.Value] = []
        self._constraints: list[str] = []

    def operand(self, constraint: str, value: ir.Value) -> str:
        """The name of a register: r, l or f for 32 bits, 64 bits or float32."""
        self._operands.append(value)
        self._constraints.append(constraint)
        return f"${len(self._operands) - 1}"

    def address(self, ref: ir.Value) -> str:
        i64 = ir.IntegerType.get_signless(64)
        return self.operand("l", llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref)))

    def shared_address(self, ref: ir.Value) -> str:
        return self.operand("r", _shared_address(ref))

    def scalar(self, array) -> str:
        return self.operand("r", array.registers.item())

    def emit(self) -> None:
        text = "{\n" + "\n".join(self.lines) + "\n}"
        constraints = ",".join([*self._constraints, "~{memory}"])
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, self._operands, text, constraints, has_side_effects=True)


def _row_operands(rows: Held | Spaced) -> tuple[list, list]:
    """What `_RowNumbers` reads of rows: arrays and their types."""
    if isinstance(rows, Held):
        return [rows.numbers], [_HELD]
    return list(int32s((rows.first, rows.count))), [SCALAR, SCALAR]


class _RowNumbers:
    """Puts the numbers of rows into registers."""

    def __init__(self, asm: _Asm, rows: Held | Spaced, operands: Sequence):
        self.asm, self.step = asm, None if isinstance(rows, Held) else rows.step
        if self.step is None:
            self.held = asm.operand("r", as_int32(operands[0].registers.item()))
            asm.lines += [".reg .b32 holder;"]
        else:
            self.run = rows.run
            self.first, self.count = (asm.scalar(x) for x in operands)
            asm.lines += [".reg .b32 of_64, of_run;", ".reg .pred is_row;"]

    def read(self, registers: Sequence[str], index: str) -> None:
        """The numbers of rows index, index + 1, ... of the 64, among the 16 of this warp; negative for none."""
        lines = self.asm.lines
        if self.step is None:
            lines.append(f"and.b32 holder, {index}, 15;")
            for i, register in enumerate(registers):
                lines.append(f"shfl.sync.idx.b32 {register}, {self.held}, holder, 31, 0xffffffff;")
                if i + 1 < len(registers):
                    lines.append("add.u32 holder, holder, 1;")
            return
        for i, register in enumerate(registers):
            lines += [
                f"add.s32 of_64, {index}, {i};",
                f"setp.lt.s32 is_row, of_64, {self.count};",
                f"shr.u32 of_run, of_64, {self.run.bit_length() - 1};",
                f"mad.lo.s32 {register}, of_run, {self.step}, {self.first};",
                f"and.b32 of_run, of_64, {self.run - 1};",
                f"add.s32 {register}, {register}, of_run;",
                f"selp.b32 {register}, {register}, -1, is_row;",
            ]


def read(rows: Listed) -> jax.Array:
    """Starts to read the numbers of rows, which `gather` takes as `Held`: the sooner before, the less it waits.

    By a whole warpgroup, of which each thread has one of the 16 rows that its warp copies.
    """

    @plgpu.inline_mgpu(
        arg_types=(_PLAIN, SCALAR), return_type=plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.int32, layout=_HELD)
    )
    def emit(_, numbers, at):
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        address = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(numbers))
        text = f"""{{
        .reg .b32 thread, lane;
        .reg .b64 from;
        mov.u32 thread, %tid.x;
        and.b32 lane, thread, 15;
        and.b32 thread, thread, {WARPGROUP - 32};
        shr.u32 thread, thread, 1;
        add.u32 thread, thread, lane;
        mad.wide.s32 from, $2, {ROWS * 4}, $1;
        mad.wide.u32 from, thread, 4, from;
        ld.global.nc.b32 $0, [from];
        }}"""
        found = llvm.inline_asm(i32, [address, at.registers.item()], text, "=r,l,r", has_side_effects=True)
        register = vector.broadcast(ir.VectorType.get((1,), i32), found)
        return mgpu.FragmentedArray(
            _registers=np.array([register], dtype=object), _layout=_HELD.to_mgpu(), _is_signed=True
        )

    return emit(rows.numbers, *int32s((rows.at,)))


def gather(matrices: Sequence[tuple], numbers: Sequence[Numbers], rows: Held | Spaced, slot: ArrayLike) -> None:
    """Starts to copy 64 rows of each matrix, and their numbers; one group of copies, for `wait`.

    By a whole warpgroup, of which each thread waits for its own copies.

    Args:
      matrices: Pairs of a matrix `[R, H]` in device memory, of 16 bits, and a target `[slots, 64, H]` in shared memory
        with TRANSFORMS. Rows that are none become zeros.
      slot: Of the targets.
    """
    head_dim = matrices[0][0].shape[1]
    refs = [ref for pair in matrices for ref in pair] + [ref for x in numbers for ref in (x.source, x.target)]
    types = [_PLAIN, _SWIZZLED] * len(matrices) + [_PLAIN, _PLAIN] * len(numbers)
    row_operands, row_types = _row_operands(rows)

    @plgpu.inline_mgpu(arg_types=(*types, *row_types, SCALAR))
    def emit(_, *operands):
        *operands, slot = operands
        asm = _Asm()
        asm.lines.append(".reg .b32 thread, to, offset, row, found; .reg .b64 from, wide; .reg .pred there;")
        asm.lines += ["mov.u32 thread, %tid.x;", f"and.b32 thread, thread, {WARPGROUP - 1};"]
        row_numbers = _RowNumbers(asm, rows, operands[len(types) :])
        slot = asm.scalar(slot)
        sources = [asm.address(x) for x in operands[: len(types) : 2]]
        targets = [asm.shared_address(x) for x in operands[1 : len(types) : 2]]
        pairs = list(zip(sources, targets, strict=True))
        _copy_matrices(asm, pairs[: len(matrices)], row_numbers, slot, head_dim)
        if numbers:
            _copy_numbers(asm, pairs[len(matrices) :], row_numbers, slot)
        asm.lines.append("cp.async.commit_group;")
        asm.emit()

    emit(*refs, *row_operands, *int32s((slot,)))


def _copy_matrices(asm: _Asm, pairs: Sequence[tuple[str, str]], row_numbers: _RowNumbers, slot: str, head_dim: int):
    lanes = head_dim // 8  # threads that copy a row, 16 bytes each
    per_thread = ROWS * lanes // WARPGROUP  # rows, which follow each other
    names = [f"row{i}" for i in range(per_thread)]
    asm.lines += [
        f".reg .b32 first, lane, place, swizzle, size, {', '.join(names)};",
        f"and.b32 lane, thread, {lanes - 1};",
        f"div.u32 first, thread, {lanes};",
        f"mul.lo.u32 first, first, {per_thread};",
    ]
    row_numbers.read(names, "first")
    asm.lines += [
        # Where the first of these rows has its 16 bytes: tiles of 8 rows of 128 bytes, in row i of which the pieces of
        # 16 bytes are exchanged by an exclusive or with i.
        "shr.u32 place, first, 3;",
        f"mul.lo.u32 place, place, {head_dim // 64 * TILE_BYTES};",
        "shr.u32 offset, lane, 3;",
        f"mad.lo.u32 place, offset, {TILE_BYTES}, place;",
        "and.b32 offset, first, 7;",
        "mad.lo.u32 place, offset, 128, place;",
        "and.b32 swizzle, lane, 7;",
        "xor.b32 swizzle, swizzle, offset;",
        f"mad.lo.u32 place, {slot}, {ROWS * head_dim * 2}, place;",
    ]
    for source, target in pairs:
        asm.lines += [f"mad.wide.u32 wide, lane, 16, {source};", f"add.u32 to, {target}, place;"]
        for i, name in enumerate(names):
            asm.lines += [
                f"setp.ge.s32 there, {name}, 0;",
                "selp.b32 size, 16, 0, there;",
                f"max.s32 row, {name}, 0;",
                f"mad.wide.s32 from, row, {head_dim * 2}, wide;",
                f"xor.b32 offset, swizzle, {i};",
                f"mad.lo.u32 offset, offset, 16, {128 * i};",
                "add.u32 offset, offset, to;",
                "cp.async.cg.shared.global [offset], [from], 16, size;",
            ]


def _copy_numbers(asm: _Asm, pairs: Sequence[tuple[str, str]], row_numbers: _RowNumbers, slot: str):
    asm.lines += [
        ".reg .pred copies;",
        # 16 threads of each warp, for its 16 rows.
        "and.b32 first, thread, 31;",
        "setp.lt.u32 copies, first, 16;",
        "and.b32 first, thread, 15;",
        f"and.b32 offset, thread, {WARPGROUP - 32};",
        "shr.u32 offset, offset, 1;",
        "add.u32 first, first, offset;",
    ]
    row_numbers.read(["row"], "first")
    asm.lines += [
        "setp.ge.s32 there, row, 0;",
        "selp.b32 size, 4, 0, there;",
        "max.s32 row, row, 0;",
        f"mul.lo.u32 offset, {slot}, {ROWS * 4};",
        "mad.lo.u32 offset, first, 4, offset;",
    ]
    for source, target in pairs:
        asm.lines += [
            f"mad.wide.s32 from, row, 4, {source};",
            f"add.u32 to, {target}, offset;",
            "@copies cp.async.ca.shared.global [to], [from], 4, size;",
        ]


def wait(in_flight: int) -> None:
    """Waits until no more than the last `in_flight` gathers of this thread are, and shows the others to matmuls, whose
    start must be behind a barrier."""
    _emit(f"cp.async.wait_group {in_flight};\nfence.proxy.async.shared::cta;")


def add(x: jax.Array, stage, target, rows: Spaced, *, part: ArrayLike, part_bytes: int, column: int) -> None:
    """target[rows, column:] += x, float32, by a whole warpgroup; each thread's additions may still be under way.

    Args:
      x: `[64, W]`, W a multiple of 32.
      stage: Shared memory with TRANSFORMS, of whose contents nothing is left.
      target: `[R, H]` in device memory.
      part: Which `part_bytes` of the stage may be written to: 256 (W + 8) at least.
      column: Where the columns of x begin in those of the target.
    """
    width, head_dim = x.shape[1], target.shape[1]
    row_operands, row_types = _row_operands(rows)

    @plgpu.inline_mgpu(arg_types=(MATRIX, _SWIZZLED, _PLAIN, *row_types, SCALAR))
    def emit(_, x, stage, target, *operands):
        *row_operands, part = operands
        asm = _Asm()
        x = [asm.operand("f", value) for value in _registers(x)]
        part, stage, target = asm.scalar(part), asm.shared_address(stage), asm.address(target)
        pitch, rows_of_warp = (width + _PADDING) * 4, ROWS // 4
        asm.lines += [
            ".reg .b32 thread, lane, row, to, offset, first; .reg .f32 value0, value1, value2, value3;",
            ".reg .b64 at; .reg .pred there;",
            "mov.u32 thread, %tid.x;",
            f"and.b32 thread, thread, {WARPGROUP - 1};",
            "and.b32 lane, thread, 31;",
            "shr.u32 first, thread, 5;",
            f"mul.lo.u32 first, first, {rows_of_warp};",
            f"mad.lo.u32 to, {part}, {part_bytes}, {stage};",
            f"mad.lo.u32 to, first, {pitch}, to;",
        ]
        row_numbers = _RowNumbers(asm, rows, row_operands)
        # A warp holds 16 rows, and needs no others: a thread pairs of columns of two of them, 8 apart.
        asm.lines += [
            "shr.u32 row, lane, 2;",
            "and.b32 offset, lane, 3;",
            "shl.b32 offset, offset, 3;",
            f"mad.lo.u32 offset, row, {pitch}, offset;",
            "add.u32 offset, offset, to;",
        ]
        for i in range(0, len(x), 2):
            place = i // 4 * 32 + i // 2 % 2 * 8 * pitch
            asm.lines.append(f"st.shared.v2.f32 [offset + {place}], {{{x[i]}, {x[i + 1]}}};")
        # 8 threads add 32 columns of a row, four rows at a time.
        asm.lines += [
            "bar.warp.sync 0xffffffff;",
            "and.b32 offset, lane, 7;",
            "shl.b32 offset, offset, 4;",
            "shr.u32 row, lane, 3;",
            f"mad.lo.u32 to, row, {pitch}, to;",
            "add.u32 to, to, offset;",
            "add.u32 first, first, row;",
        ]
        for i in range(0, rows_of_warp, 4):
            row_numbers.read(["row"], "first")
            asm.lines += [
                "add.u32 first, first, 4;",
                "setp.ge.s32 there, row, 0;",
                f"mad.wide.s32 at, row, {head_dim * 4}, {target};",
                "mad.wide.u32 at, offset, 1, at;",
            ]
            for j in range(width // 32):
                asm.lines += [
                    f"ld.shared.v4.f32 {_VALUES}, [to + {i * pitch + 128 * j}];",
                    f"@there red.relaxed.gpu.global.add.v4.f32 [at + {4 * column + 128 * j}], {_VALUES};",
                ]
        asm.lines.append("bar.warp.sync 0xffffffff;")
        asm.emit()

    emit(x, stage, target, *row_operands, *int32s((part,)))


def give(pair: tuple[jax.Array, jax.Array], stage, *, part: ArrayLike, part_bytes: int) -> None:
    """Of two warpgroups with a pair each, leaves what the other one, of the two, adds up: `take_sum`.

    Args:
      pair: float32 `[64, W]` both. Warpgroup 0 adds up what both have of the first, 1 of the second.
      stage: Shared memory, of whose contents nothing is left.
      part: The warpgroup. Its part of the stage has `part_bytes`: 256 W at least.
    """
    half = pair[0].size // WARPGROUP

    @plgpu.inline_mgpu(arg_types=(MATRIX, MATRIX, _SWIZZLED, SCALAR))
    def emit(_, first, second, stage, part):
        ptx = Ptx()
        x = ptx.read("f", [value for y in (first, second) for value in _registers(y)])
        part, stage = ptx.read("r", (part.registers.item(), _shared_address(stage)))
        _own_place(ptx, part, stage, part_bytes)
        for i in range(0, half, 4):
            ptx.lines += [f"selp.f32 value{j}, {x[half + i + j]}, {x[i + j]}, is_first;" for j in range(4)]
            ptx.lines.append(f"st.shared.v4.f32 [to + {4 * i * WARPGROUP}], {_VALUES};")
        ptx.emit()

    emit(*pair, stage, *int32s((part,)))


def take_sum(pair: tuple[jax.Array, jax.Array], stage, *, part: ArrayLike, part_bytes: int) -> jax.Array:
    """This warpgroup's of the pair, and what the other one has given; as `give`, behind a barrier of both."""
    shape, half = pair[0].shape, pair[0].size // WARPGROUP

    @plgpu.inline_mgpu(arg_types=(MATRIX, MATRIX, _SWIZZLED, SCALAR), return_type=array_type(shape, MATRIX))
    def emit(_, first, second, stage, part):
        ptx = Ptx()
        total = ptx.update(_registers(first))
        x = ptx.read("f", _registers(second))
        part, stage = ptx.read("r", (part.registers.item(), _shared_address(stage)))
        _own_place(ptx, part, stage, part_bytes, of_other=True)
        for i in range(0, half, 4):
            ptx.lines.append(f"ld.shared.v4.f32 {_VALUES}, [to + {4 * i * WARPGROUP}];")
            for j in range(i, i + 4):
                ptx.lines += [
                    f"selp.f32 {total[j]}, {total[j]}, {x[j]}, is_first;",
                    f"add.f32 {total[j]}, {total[j]}, value{j - i};",
                ]
        return fragmented(ptx.emit(), shape).to_layout(MATRIX.to_mgpu())

    return emit(*pair, stage, *int32s((part,)))


_VALUES = braces([f"value{i}" for i in range(4)])


def _own_place(ptx: Ptx, part: str, stage: str, part_bytes: int, *, of_other: bool = False) -> None:
    """`to`, this thread's place in a warpgroup's part of the stage, and `is_first`, whether that is of warpgroup 0."""
    ptx.lines += [
        ".reg .b32 thread, to, of; .reg .pred is_first; .reg .f32 value0, value1, value2, value3;",
        "mov.u32 thread, %tid.x;",
        f"and.b32 thread, thread, {WARPGROUP - 1};",
        f"setp.eq.s32 is_first, {part}, 0;",
        f"sub.u32 of, 1, {part};" if of_other else f"mov.b32 of, {part};",
        f"mad.lo.u32 to, of, {part_bytes}, {stage};",
        "mad.lo.u32 to, thread, 16, to;",
    ]


def _registers(x: mgpu.FragmentedArray) -> list[ir.Value]:
    """A register an element."""
    return list(x.to_layout(IN_FLIGHT.to_mgpu()).registers.flat)


def _shared_address(ref: ir.Value) -> ir.Value:
    """What instructions for shared memory take: 32 bits."""
    pointer, shared = mgpu.utils.memref_ptr(ref), ir.Type.parse("!llvm.ptr<3>")
    if pointer.type != shared:
        pointer = llvm.addrspacecast(shared, pointer)
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), pointer)


def _emit(text: str) -> None:
    @plgpu.inline_mgpu()
    def emit(_):
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], text, "~{memory}", has_side_effects=True)

    emit()


# What JAX's interpreter, which knows no PTX, does instead.


def interpret_gather(matrices: Sequence[tuple], numbers: Sequence[Numbers], rows: Listed | Spaced, slot) -> None:
    def one_row(i, _):
        row = _row_number(rows, i)
        there = jnp.maximum(row, 0)
        for source, target in matrices:
            x = source[there]
            target.at[slot, i][...] = jnp.where(row >= 0, x, jnp.zeros_like(x))
        for source, target in numbers:
            target[slot, i] = jnp.where(row >= 0, source[there], jnp.zeros((), source.dtype))
        return 0

    jax.lax.fori_loop(0, ROWS, one_row, 0)


def interpret_add(x: jax.Array, target, rows: Spaced, column: int) -> None:
    def one_row(i, _):
        row = _row_number(rows, i)

        @pl.when(row >= 0)
        def _():
            at = target.at[row, pl.ds(column, x.shape[1])]
            at[...] = at[...] + jax.lax.dynamic_index_in_dim(x, i, keepdims=False)

        return 0

    jax.lax.fori_loop(0, ROWS, one_row, 0)


def _row_number(rows: Listed | Spaced, i):
    if isinstance(rows, Listed):
        return rows.numbers[rows.at, i]
    number = rows.first + i // rows.run * rows.step + i % rows.run
    return jnp.where(i < rows.count, number, -1)

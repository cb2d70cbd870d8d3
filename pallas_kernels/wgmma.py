"""Hopper's tensor cores in PTX: what the attention kernels' inner steps are written with, beyond what Pallas can say.

Pallas' `plgpu.wgmma` fences the registers of an operand behind the matmul before, and ptxas serializes matmuls when
registers that one of them reads are defined while another is in flight (C7513). So the steps of the kernels
(wgmma_forward.py, wgmma_backward.py) are blocks of inline PTX that start their matmuls together. Two more things are
gained: a matmul can start from nothing, where Pallas fills its registers with zeros; and a buffer is given back the
moment its matmul is done, where the compiler would move the arrival behind the arithmetic that follows.

Operands lie in shared memory as Pallas lays them out with TRANSFORMS: tiles of 8 rows of 128 bytes, swizzled.

Reference: PTX ISA 9.0, Asynchronous Warpgroup Level Matrix Instructions.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

TILE_ROWS = 8
TRANSFORMS = plgpu.TilingTransform((TILE_ROWS, 64)), plgpu.SwizzleTransform(128)
ROWS = 64
"""Rows of a matmul of one warpgroup."""

TILE_BYTES = TILE_ROWS * 128
K_STEP = 16  # what one instruction contracts, of 16-bit operands
MATRIX, ROW = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
# The same with a register an element: pairs in 64-bit registers would be taken apart while matmuls are in flight.
IN_FLIGHT = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))), warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1
)
SCALAR = plgpu.Layout.WG_SPLAT
PTX_DTYPES = {"bfloat16": "bf16", "float16": "f16"}


class Arrival(NamedTuple):
    """A named barrier to arrive at, as `bar.arrive`: its number, which may be traced, and its threads."""

    barrier: jax.typing.ArrayLike
    num_threads: int


class Ptx:
    """Inline PTX under construction: lines, and the operands that they name."""

    def __init__(self):
        self.lines: list[str] = []
        self._outputs: list[ir.Type] = []
        self._updated: dict[int, ir.Value] = {}
        self._inputs: list[tuple[str, ir.Value]] = []

    def write(self, count: int) -> list[str]:
        """Names of float32 registers that the lines fill."""
        first = len(self._outputs)
        self._outputs += [ir.VectorType.get((1,), ir.F32Type.get())] * count
        return [f"${i}" for i in range(first, first + count)]

    def update(self, values: Iterable[ir.Value]) -> list[str]:
        """Names of float32 registers that begin with these values."""
        values = list(values)
        first = len(self._outputs)
        self._outputs += [value.type for value in values]
        self._updated |= {first + i: value for i, value in enumerate(values)}
        return [f"${i}" for i in range(first, first + len(values))]

    def read(self, constraint: str, values: Iterable[ir.Value]) -> list[str]:
        """Names of registers that are only read: r, l or f for 32 bits, 64 bits or float32."""
        first = len(self._inputs)
        self._inputs += [(constraint, value) for value in values]
        # Inputs are numbered behind the outputs, of which there may be more to come.
        return [f"<{i}>" for i in range(first, len(self._inputs))]

    def matmul(
        self,
        acc: Sequence[str],
        a: str | Sequence[str],
        b: str,
        *,
        contracted: int,
        dtype: str,
        fresh: bool = False,
        a_rows: int = 0,
        b_rows: int = 0,
    ) -> None:
        """Starts acc += a b of 64 rows, or acc = a b where `fresh`; to be committed and waited for.

        Args:
          acc: Registers of float32 `[64, columns]`.
          a: The name of a descriptor, or registers of 16 bits `[64, contracted]`.
          b: The name of a descriptor.
          contracted: Length of the contraction.
          dtype: Of a and b, as PTX_DTYPES name it.
          a_rows, b_rows: Bytes to the next 8 rows where the contraction goes down the rows in memory, and so the
            operand is transposed; 0 where it goes along them.
        """
        columns = 2 * len(acc)
        for i in range(contracted // K_STEP):
            first = "a" if isinstance(a, str) else braces(a[4 * i : 4 * i + 4])
            if isinstance(a, str):
                self.lines.append(f"add.s64 a, {a}, {_step(i, a_rows) >> 4};")
            transposed = [int(bool(rows)) for rows in ((a_rows, b_rows) if isinstance(a, str) else (b_rows,))]
            flags = ", ".join(map(str, ("fresh" if fresh and not i else "running", 1, 1, *transposed)))
            self.lines += [
                f"add.s64 b, {b}, {_step(i, b_rows) >> 4};",
                f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype}.{dtype} "
                f"{braces(acc)}, {first}, b, {flags};",
            ]

    def begin(self) -> None:
        """Before the first matmul of a block: makes what registers hold visible to it."""
        self.lines += [
            ".reg .pred fresh, running;",
            ".reg .b64 a, b;",
            "setp.ne.b32 fresh, 0, 0;",
            "setp.eq.b32 running, 0, 0;",
            "wgmma.fence.sync.aligned;",
        ]

    def commit(self) -> None:
        """Closes a group of matmuls."""
        self.lines.append("wgmma.commit_group.sync.aligned;")

    def wait(self, in_flight: int) -> None:
        """Waits until no more than the last `in_flight` groups are."""
        self.lines.append(f"wgmma.wait_group.sync.aligned {in_flight};")

    def arrive(self, barrier: str, num_threads: int) -> None:
        """Arrives at a named barrier."""
        self.lines.append(f"bar.arrive {barrier}, {num_threads};")

    def emit(self) -> list[ir.Value]:
        """The outputs, in the order in which they were named."""
        text = "\n".join(self.lines)
        first = len(self._outputs) + len(self._updated)
        for i in range(len(self._inputs)):
            text = text.replace(f"<{i}>", f"${first + i}")
        constraints = ["=f"] * len(self._outputs) + [str(i) for i in self._updated] + [c for c, _ in self._inputs]
        results = llvm.inline_asm(
            llvm.StructType.get_literal(self._outputs),
            [*self._updated.values(), *(value for _, value in self._inputs)],
            f"{{\n{text}\n}}",
            ",".join(constraints),
            asm_dialect=0,
            has_side_effects=True,
        )
        return [llvm.extractvalue(dtype, results, [i]) for i, dtype in enumerate(self._outputs)]


def _step(i: int, bytes_of_8_rows: int) -> int:
    """Where in memory the i-th instruction of a matmul reads."""
    if bytes_of_8_rows:
        return 2 * i * bytes_of_8_rows
    # Along a row, four instructions read one tile; the next tile holds the next 64 columns.
    return i // 4 * TILE_BYTES + i % 4 * K_STEP * 2


def descriptor(smem: ir.Value, *at: tuple, leading: int, stride: int) -> ir.Value:
    """What names a piece of `smem` to the tensor cores.

    Args:
      at: Where it begins: the sum over (index, bytes) of what an index steps over.
      leading: Bytes to the next 64 columns; 0 where rows are what is contracted.
      stride: Bytes to the next 8 rows.
    """
    i64 = ir.IntegerType.get_signless(64)

    def constant(x: int) -> ir.Value:
        return arith.constant(i64, ir.IntegerAttr.get(i64, x))

    address = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(smem))
    for index, num_bytes in at:
        if isinstance(index, int):
            offset = constant(index * num_bytes)
        else:
            offset = arith.muli(arith.extsi(i64, index.registers.item()), constant(num_bytes))
        address = arith.addi(address, offset)
    encoded = arith.shrui(arith.andi(address, constant(0x3FFFF)), constant(4))
    swizzle_128 = 1 << 30  # bit 62, of which this is shifted by 32: the constant would not fit a signed one
    high = arith.shli(constant(stride >> 4 | swizzle_128), constant(32))
    return arith.ori(encoded, arith.ori(high, constant(leading >> 4 << 16)))


def row_of_tiles(columns: int) -> int:
    """Bytes of 8 rows of so many columns in shared memory."""
    return columns // 64 * TILE_BYTES


def as_int32(register: ir.Value) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    whole = vector.bitcast(ir.VectorType.get((1,), i32), register)
    return llvm.extractelement(whole, arith.constant(i32, ir.IntegerAttr.get(i32, 0)))


def fragmented(registers: Sequence[ir.Value], shape: tuple[int, int]) -> mgpu.FragmentedArray:
    layout = IN_FLIGHT.to_mgpu()
    array = np.array(registers, dtype=object).reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=None)


def array_type(shape: tuple[int, ...], layout) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)


def braces(registers: Sequence[str]) -> str:
    return f"{{{', '.join(registers)}}}"


def ptx_float(x: float) -> str:
    """A float32 constant, to the last bit."""
    return f"0f{struct.pack('>f', x).hex().upper()}"


def int32s(values: Iterable[jax.typing.ArrayLike]) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(value, jnp.int32) for value in values)

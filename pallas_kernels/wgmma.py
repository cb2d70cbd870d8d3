"""One step of attention on Hopper's tensor cores, in PTX: what Pallas cannot say.

A step starts S = q k^T and acc += p v at once and waits for S alone, so that the softmax of S runs while p v is still
in flight. With `plgpu.wgmma` that cannot be written: it fences the registers of p behind the first matmul, and ptxas
serializes matmuls when registers that one of them reads are defined while another is in flight (C7513). For the same
reason p is converted to 16 bits only when p v is done. Two more things are gained: S starts from nothing, where Pallas
fills its registers with zeros; and a buffer is given back the moment its matmul is done, where the compiler would move
the arrival behind the arithmetic that follows.

Operands lie in shared memory as Pallas lays them out with TRANSFORMS: tiles of 8 rows of 128 bytes, swizzled.

Reference: PTX ISA 9.0, Asynchronous Warpgroup Level Matrix Instructions; Shah et al. 2024, FlashAttention-3,
arXiv:2407.08608, Algorithm 2.
"""

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

_TILE_BYTES = TILE_ROWS * 128
_K = 16  # what one instruction contracts, of 16-bit operands
_MATRIX, _ROW = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
# The same with a register an element: pairs in 64-bit registers would be taken apart while matmuls are in flight.
_IN_FLIGHT = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))), warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1
)
_SCALAR = plgpu.Layout.WG_SPLAT
_PTX_DTYPES = {"bfloat16": "bf16", "float16": "f16"}


class Arrival(NamedTuple):
    """A named barrier to arrive at, as `bar.arrive`: its number, which may be traced, and its threads."""

    barrier: jax.typing.ArrayLike
    num_threads: int


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
    head_dim, block = acc.shape[1], k_smem.shape[1]
    dtype = _PTX_DTYPES[p.dtype.name]
    smem = plgpu.RefType(TRANSFORMS)
    scalars = q_tile, k_slot, v_slot, issued.barrier, k_free.barrier

    @plgpu.inline_mgpu(
        arg_types=(_MATRIX, _MATRIX, smem, smem, smem, *(_SCALAR,) * len(scalars)),
        return_type=(_array((ROWS, block), _MATRIX), _array((ROWS, head_dim), _IN_FLIGHT)),
    )
    def emit(_, acc, p, q_smem, k_smem, v_smem, q_tile, k_slot, v_slot, issued_at, free_at):
        row_of_tiles = head_dim // 64 * _TILE_BYTES
        ptx = _Ptx()
        s_registers = ptx.write(ir.VectorType.get((1,), ir.F32Type.get()), block // 2)
        acc_registers = ptx.update(acc.to_layout(_IN_FLIGHT.to_mgpu()).registers.flat)
        p_registers = ptx.read("r", map(_as_int32, p.registers.flat))
        q, k, v = ptx.read(
            "l",
            (
                _descriptor(q_smem, q_tile, ROWS * head_dim * 2, leading=0, stride=row_of_tiles),
                _descriptor(k_smem, k_slot, block * head_dim * 2, leading=0, stride=row_of_tiles),
                _descriptor(v_smem, v_slot, block * head_dim * 2, leading=_TILE_BYTES, stride=row_of_tiles),
            ),
        )
        issued_name, free_name = ptx.read("r", (x.registers.item() for x in (issued_at, free_at)))
        ptx.lines += [
            ".reg .pred fresh, running;",
            ".reg .b64 a, b;",
            "setp.ne.b32 fresh, 0, 0;",
            "setp.eq.b32 running, 0, 0;",
            "wgmma.fence.sync.aligned;",
        ]
        for i in range(head_dim // _K):
            # Along a row, four instructions read one tile; the next tile holds the next 64 columns.
            offset = i // 4 * _TILE_BYTES + i % 4 * _K * 2
            ptx.lines += [
                f"add.s64 a, {q}, {offset >> 4};",
                f"add.s64 b, {k}, {offset >> 4};",
                f"wgmma.mma_async.sync.aligned.m64n{block}k16.f32.{dtype}.{dtype} {_braces(s_registers)}, a, b, "
                f"{'running' if i else 'fresh'}, 1, 1, 0, 0;",
            ]
        ptx.lines.append("wgmma.commit_group.sync.aligned;")
        for i in range(block // _K):
            # Down the rows of v, an instruction reads two rows of tiles.
            ptx.lines += [
                f"add.s64 b, {v}, {(2 * i * row_of_tiles) >> 4};",
                f"wgmma.mma_async.sync.aligned.m64n{head_dim}k16.f32.{dtype}.{dtype} {_braces(acc_registers)}, "
                f"{_braces(p_registers[4 * i : 4 * i + 4])}, b, running, 1, 1, 1;",
            ]
        ptx.lines += [
            "wgmma.commit_group.sync.aligned;",
            f"bar.arrive {issued_name}, {issued.num_threads};",
            "wgmma.wait_group.sync.aligned 1;",
            f"bar.arrive {free_name}, {k_free.num_threads};",
        ]
        values = ptx.emit()
        s, acc = values[: len(s_registers)], values[len(s_registers) :]
        return _fragmented(s, (ROWS, block)).to_layout(_MATRIX.to_mgpu()), _fragmented(acc, (ROWS, head_dim))

    return emit(acc, p, q_smem, k_smem, v_smem, *_int32(scalars))


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
        arg_types=(_IN_FLIGHT, _MATRIX, *((_ROW,) if rescale is not None else ()), *((_SCALAR,) if v_free else ())),
        return_type=tuple(_array(x.shape, _MATRIX) for x in (acc, p)),
    )
    def emit(_, acc, p, *rest):
        rest = list(rest)
        ptx = _Ptx()
        acc_registers = ptx.update(acc.registers.flat)
        ptx.update(p.to_layout(_IN_FLIGHT.to_mgpu()).registers.flat)
        ptx.lines.append("wgmma.wait_group.sync.aligned 0;")
        factors = ptx.read("f", rest.pop(0).registers.flat) if rescale is not None else None
        if v_free:
            (free_name,) = ptx.read("r", (rest.pop(0).registers.item(),))
            ptx.lines.append(f"bar.arrive {free_name}, {v_free.num_threads};")
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
        layout = _MATRIX.to_mgpu()
        return _fragmented(done, acc.shape).to_layout(layout), _fragmented(p_done, p.shape).to_layout(layout)

    return emit(acc, p, *((rescale,) if rescale is not None else ()), *_int32((v_free.barrier,) if v_free else ()))


class _Ptx:
    """Inline PTX under construction: lines, and the operands that they name."""

    def __init__(self):
        self.lines: list[str] = []
        self._outputs: list[ir.Type] = []
        self._updated: dict[int, ir.Value] = {}
        self._inputs: list[tuple[str, ir.Value]] = []

    def write(self, dtype: ir.Type, count: int) -> list[str]:
        """Names of float32 registers that the lines fill."""
        first = len(self._outputs)
        self._outputs += [dtype] * count
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


def _descriptor(smem: ir.Value, tile, tile_bytes: int, *, leading: int, stride: int) -> ir.Value:
    """What names the `tile`-th piece of `smem` to the tensor cores.

    Args:
      leading: Bytes to the next 64 columns; 0 where rows are what is contracted.
      stride: Bytes to the next 8 rows.
    """
    i64 = ir.IntegerType.get_signless(64)

    def constant(x: int) -> ir.Value:
        return arith.constant(i64, ir.IntegerAttr.get(i64, x))

    offset = arith.muli(arith.extsi(i64, tile.registers.item()), constant(tile_bytes))
    address = arith.addi(llvm.ptrtoint(i64, mgpu.utils.memref_ptr(smem)), offset)
    encoded = arith.shrui(arith.andi(address, constant(0x3FFFF)), constant(4))
    swizzle_128 = 1 << 30  # bit 62, of which this is shifted by 32: the constant would not fit a signed one
    high = arith.shli(constant(stride >> 4 | swizzle_128), constant(32))
    return arith.ori(encoded, arith.ori(high, constant(leading >> 4 << 16)))


def _as_int32(register: ir.Value) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    whole = vector.bitcast(ir.VectorType.get((1,), i32), register)
    return llvm.extractelement(whole, arith.constant(i32, ir.IntegerAttr.get(i32, 0)))


def _fragmented(registers: Sequence[ir.Value], shape: tuple[int, int]) -> mgpu.FragmentedArray:
    layout = _IN_FLIGHT.to_mgpu()
    array = np.array(registers, dtype=object).reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=None)


def _array(shape: tuple[int, ...], layout) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)


def _braces(registers: Sequence[str]) -> str:
    return f"{{{', '.join(registers)}}}"


def _int32(values: Iterable[jax.typing.ArrayLike]) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(value, jnp.int32) for value in values)

"""What the parts of a query are together, one from each block that it chose: a kernel on Hopper GPUs.

A warp takes a query of a kv head, whose G rows stand together in each part, and reads all its parts at once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.online_softmax import finite_max
from pallas_kernels.wgmma import SCALAR, int32s

MOST_PARTS = 32
_WARPS = 4
_BLOCKS_OF_CORE = 8


class Results(NamedTuple):
    """References to what is written.

    Attributes:
      out: `[R, H]` of 16 bits.
      lse: Base 2, float32 `[R]`; None for sums without weights.
    """

    out: Any
    lse: Any


def merge(parts: jax.Array, lse_parts: jax.Array | None, units: "Units", results: Results) -> None:
    """Writes out = sum_i 2^(lse_i - lse) out_i and lse = log2(sum_i 2^lse_i), or without lse out = sum_i out_i.

    Args:
      parts: out_i, `[L, H]` of 16 bits, for rows of lists.
      lse_parts: lse_i, base 2, float32 `[L]`, or None.
      units: Which results there are, and their parts. Without any, 0 and -inf.
      results: Where to, the rows of these units alone. Sums are float32.
    """
    if units.interpret:
        return _formula(parts, lse_parts, units, results)
    (U, n), H = units.place.shape, parts.shape[1]
    operands = [parts, units.place, units.first_row, results.out]
    if lse_parts is not None:
        operands += [lse_parts, results.lse]
    num_blocks = min(units.num_cores * _BLOCKS_OF_CORE, -(-U // _WARPS))
    lines = _unit_lines(U, n, units.group, H, parts.dtype, with_lse=lse_parts is not None)

    def body(*refs):
        block = lax.axis_index("block")

        def one_round(i, _):
            unit = (i * num_blocks + block) * _WARPS

            @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * len(refs), SCALAR))
            def emit(_, *operands):
                *refs, unit = operands
                i64 = ir.IntegerType.get_signless(64)
                addresses = [llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref)) for ref in refs]
                constraints = ",".join(["r", *["l"] * len(addresses), "~{memory}"])
                void = ir.Type.parse("!llvm.void")
                values = [unit.registers.item(), *addresses]
                llvm.inline_asm(void, values, lines, constraints, has_side_effects=True)

            emit(*refs, *int32s((unit,)))
            return 0

        lax.fori_loop(0, -(-U // (num_blocks * _WARPS)), one_round, 0)

    plgpu.kernel(
        body,
        out_type=(),
        grid=(num_blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*operands)


class Units(NamedTuple):
    """The queries of kv heads, each a unit of `group` rows.

    Attributes:
      place: The first of the rows in the lists, of each of its choices, int32 `[U, n]`; -1 for none.
      first_row: The first of the rows of its results, int32 `[U]`; -1 where there is no such query.
      group: Query heads of a kv head.
      num_cores: Multiprocessors.
      interpret: Whether to compute it in plain JAX.
    """

    place: jax.Array
    first_row: jax.Array
    group: int
    num_cores: int
    interpret: Any


def _unit_lines(U: int, n: int, group: int, H: int, dtype, *, with_lse: bool) -> str:
    """PTX of one query of a kv head by each warp of four.

    Operands: the first warp's query; then the addresses of parts, place, first_row, out, lse_parts and lse.
    """
    words = H // 64  # registers of two numbers that a lane has of a row
    registers = [f"word{i}_{j}" for i in range(n) for j in range(words)]
    sums = [f"sum{i}" for i in range(2 * words)]
    vector = f".v{words}" if words > 1 else ""

    def braces(names) -> str:
        return f"{{{', '.join(names)}}}" if words > 1 else names[0]

    lines = [
        f".reg .b32 unit, lane, place, row, number, first, head, {', '.join(registers)}, low, high;",
        ".reg .b64 from, to, wide;",
        f".reg .f32 lse, greatest, shift, weight, total, found, x, y, {', '.join(sums)};",
        ".reg .pred done, there, is_first, again; .reg .b16 half0, half1;",
        "mov.u32 lane, %tid.x;",
        "shr.u32 unit, lane, 5;",
        "and.b32 lane, lane, 31;",
        "add.u32 unit, unit, $0;",
        f"setp.ge.u32 done, unit, {U};",
        "@done bra END;",
        "mov.b32 place, -1;",
        f"mad.wide.u32 from, unit, {4 * n}, $2;",
        "mad.wide.u32 from, lane, 4, from;",
        f"setp.lt.u32 there, lane, {n};",
        "@there ld.global.nc.b32 place, [from];",
        "setp.eq.u32 is_first, lane, 0;",
        "mad.wide.u32 from, unit, 4, $3;",
        "ld.global.nc.b32 first, [from];",
        "setp.lt.s32 done, first, 0;",
        "@done bra END;",
        "mov.b32 head, 0;",
        "ROW:",
    ]
    for i in range(n):
        names = [f"word{i}_{j}" for j in range(words)]
        lines += [
            f"shfl.sync.idx.b32 row, place, {i}, 31, 0xffffffff;",
            "setp.ge.s32 there, row, 0;",
            "add.s32 row, row, head;",
            f"mad.wide.s32 from, row, {2 * H}, $1;",
            f"mad.wide.u32 from, lane, {4 * words}, from;",
            *(f"mov.b32 {name}, 0;" for name in names),
            f"@there ld.global.nc{vector}.b32 {braces(names)}, [from];",
        ]
    if with_lse:
        lines += [
            "mov.b32 lse, 0fFF800000;",
            "setp.ge.s32 there, place, 0;",
            "add.s32 row, place, head;",
            "mad.wide.s32 from, row, 4, $5;",
            "@there ld.global.nc.f32 lse, [from];",
            "mov.f32 greatest, lse;",
        ]
        for step in (16, 8, 4, 2, 1):
            lines += [f"shfl.sync.bfly.b32 x, greatest, {step}, 31, 0xffffffff;", "max.f32 greatest, greatest, x;"]
        lines += [
            "setp.eq.f32 there, greatest, 0fFF800000;",
            "selp.f32 shift, 0f00000000, greatest, there;",
            "sub.f32 x, lse, shift;",
            "ex2.approx.f32 weight, x;",
            "mov.f32 total, weight;",
        ]
        for step in (16, 8, 4, 2, 1):
            lines += [f"shfl.sync.bfly.b32 x, total, {step}, 31, 0xffffffff;", "add.f32 total, total, x;"]
        lines += [
            "lg2.approx.f32 x, total;",
            "add.f32 lse, shift, x;",
            "selp.f32 total, 0f3F800000, total, there;",
            "rcp.approx.f32 x, total;",
            "mul.f32 weight, weight, x;",
            "add.u32 number, first, head;",
            "mad.wide.u32 to, number, 4, $6;",
            "@is_first st.global.f32 [to], lse;",
        ]
    lines += [f"mov.f32 {x}, 0f00000000;" for x in sums]
    for i in range(n):
        if with_lse:
            lines.append(f"shfl.sync.idx.b32 x, weight, {i}, 31, 0xffffffff;")
        for j in range(words):
            name = f"word{i}_{j}"
            if dtype == jnp.bfloat16:
                lines += [f"shl.b32 low, {name}, 16;", f"and.b32 high, {name}, 0xffff0000;"]
                parts = "low", "high"
            else:
                lines += [f"mov.b32 {{half0, half1}}, {name};", "cvt.f32.f16 found, half0;", "cvt.f32.f16 y, half1;"]
                parts = "found", "y"
            for part, total in zip(parts, sums[2 * j : 2 * j + 2], strict=True):
                lines.append(
                    f"fma.rn.f32 {total}, {part}, x, {total};" if with_lse else f"add.f32 {total}, {total}, {part};"
                )
    name = "bf16x2" if dtype == jnp.bfloat16 else "f16x2"
    words_out = [f"word0_{j}" for j in range(words)]
    lines += [f"cvt.rn.{name}.f32 {x}, {sums[2 * j + 1]}, {sums[2 * j]};" for j, x in enumerate(words_out)]
    lines += [
        "add.u32 number, first, head;",
        f"mad.wide.u32 to, number, {2 * H}, $4;",
        f"mad.wide.u32 to, lane, {4 * words}, to;",
        f"st.global{vector}.b32 [to], {braces(words_out)};",
        "add.u32 head, head, 1;",
        f"setp.lt.u32 again, head, {group};",
        "@again bra ROW;",
        "END:",
    ]
    return "{\n" + "\n".join(lines) + "\n}"


def _formula(parts, lse_parts, units: Units, results: Results) -> None:
    """The same in plain JAX."""

    def rows_of(first: jax.Array) -> jax.Array:
        return first[..., None] + jnp.arange(units.group, dtype=jnp.int32)

    there = units.place >= 0
    row = rows_of(jnp.maximum(units.place, 0)).swapaxes(1, 2)  # [U, group, n]
    there = jnp.broadcast_to(there[:, None], row.shape)
    values = jnp.where(there[..., None], parts[row].astype(jnp.float32), 0.0)
    target = jnp.where(units.first_row[:, None] >= 0, rows_of(units.first_row), len(results.out))

    def write(ref, x):
        ref[...] = ref[...].at[target].set(x.astype(ref.dtype), mode="drop")

    if lse_parts is None:
        write(results.out, jnp.sum(values, axis=2))
        return
    lses = jnp.where(there, lse_parts[row], -jnp.inf)
    shift = finite_max(jnp.max(lses, axis=2))
    weights = jnp.exp2(lses - shift[..., None])
    total = jnp.sum(weights, axis=2)
    out = jnp.einsum("ugn,ugnh->ugh", weights, values) / jnp.where(total == 0, 1.0, total)[..., None]
    write(results.out, out)
    write(results.lse, shift + jnp.log2(total))

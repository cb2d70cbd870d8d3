"""What the tokens of a chunk read of each other under a delta rule, on Hopper GPUs (Mosaic GPU): `scores` and `solve`
of prepared.py, and of what the tokens decay by how they read and write a state.

Grid: a warpgroup for a chunk of a head. The triangular system is solved in float32 by substitution, a thread for a
column of the inverse, in registers: as soon as a row is known all later ones are told, so that no sum waits for
another.

Reference: Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule over Sequence Length,
arXiv:2406.06484, section 3.2.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.linear.pallas_mosaic_gpu_chain import CHUNK
from pallas_kernels.linear.pallas_mosaic_gpu_tiles import spread
from pallas_kernels.wgmma import MATRIX, ROW, TRANSFORMS, ptx_float

_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_LOG2_E = math.log2(math.e)
_OF_DECAYS = "log_smem", "cumulative_smem", "reads_smem", "writes_smem"


class Inputs(NamedTuple):
    """What the kernel reads.

    Attributes:
      q, k: 16 bits `[B, T, K, H]`.
      of_tokens: beta and, behind it where there is one, the log decay of each token, float32 `[B, N or 2 N, T']`: one
        array, which is transposed at once.
      document: int32 `[B, T']`; None for one document.
    """

    q: Any
    k: Any
    of_tokens: Any
    document: Any


class Outputs(NamedTuple):
    """What it writes.

    Attributes:
      scores, solve: 16 bits `[B, N, n, CHUNK, CHUNK]`.
      reads, writes: As in chunks.py, of decays in one document, float32 `[B, N, T']`; else None.
    """

    scores: Any
    solve: Any
    reads: Any = None
    writes: Any = None


def scores_and_solve(inputs: Inputs, *, num_heads: int, scale: float, interpret) -> Outputs:
    """Runs the kernel over whole chunks."""
    (B, rows, length), (_, _, K, H), dtype = inputs.of_tokens.shape, inputs.q.shape, inputs.q.dtype
    N, num_chunks = num_heads, length // CHUNK
    given = {name: x for name, x in inputs._asdict().items() if x is not None}
    out = dict.fromkeys(("scores", "solve"), jax.ShapeDtypeStruct((B, N, num_chunks, CHUNK, CHUNK), dtype))
    if rows > N and inputs.document is None:
        out |= dict.fromkeys(("reads", "writes"), jax.ShapeDtypeStruct((B, N, length), jnp.float32))

    def body(*refs):
        refs = dict(zip((*given, *out, *scratch), refs, strict=True))
        _solve_chunk(refs, num_heads=N, num_key_heads=K, num_chunks=num_chunks, scale=scale, interpret=interpret)

    def smem(*shape):
        return plgpu.SMEM(shape, dtype, transforms=TRANSFORMS)

    scratch = {
        "q_smem": smem(CHUNK, H),
        "k_smem": smem(CHUNK, H),
        "scores_smem": smem(CHUNK, CHUNK),
        "system": plgpu.SMEM((CHUNK, CHUNK), jnp.float32),
        "beta_smem": plgpu.SMEM((CHUNK,), jnp.float32),
        "solve_smem": plgpu.SMEM((CHUNK, CHUNK), dtype),
        "full": plgpu.Barrier(num_arrivals=2 + rows // N + (inputs.document is not None)),
    }
    if rows > N:
        scratch |= dict.fromkeys(_OF_DECAYS, plgpu.SMEM((CHUNK,), jnp.float32))
    if inputs.document is not None:
        scratch["document_smem"] = plgpu.SMEM((CHUNK,), jnp.int32)
    results = plgpu.kernel(
        body,
        out_type=[*out.values()],
        grid=(B * N * num_chunks,),
        grid_names=("block",),
        scratch_types=[*scratch.values()],
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(*given.values())
    return Outputs(**dict(zip(out, results, strict=True)))


def _solve_chunk(refs, *, num_heads: int, num_key_heads: int, num_chunks: int, scale: float, interpret) -> None:
    number = lax.axis_index("block")
    # Heads side by side, for the keys that they share.
    head, number = lax.rem(number, num_heads), lax.div(number, num_heads)
    chunk, batch = lax.rem(number, num_chunks), lax.div(number, num_chunks)
    tokens, key_head = pl.ds(chunk * CHUNK, CHUNK), lax.div(head, num_heads // num_key_heads)
    q, k, full = refs["q_smem"], refs["k_smem"], refs["full"]
    plgpu.copy_gmem_to_smem(refs["k"].at[batch, tokens, key_head], k, full)
    plgpu.copy_gmem_to_smem(refs["of_tokens"].at[batch, head, tokens], refs["beta_smem"], full)
    plgpu.copy_gmem_to_smem(refs["q"].at[batch, tokens, key_head], q, full)
    if "log_smem" in refs:
        plgpu.copy_gmem_to_smem(refs["of_tokens"].at[batch, num_heads + head, tokens], refs["log_smem"], full)
    if "document" in refs:
        plgpu.copy_gmem_to_smem(refs["document"].at[batch, tokens], refs["document_smem"], full)
    plgpu.barrier_wait(full)

    if "log_smem" in refs:
        (_add_up_interpreted if interpret else _add_up)(*(refs[name] for name in _OF_DECAYS))
        plgpu.commit_smem()
        for name in ("reads", "writes"):
            if name in refs:
                plgpu.copy_smem_to_gmem(refs[f"{name}_smem"], refs[name].at[batch, head, tokens])

    def of_tokens(layout):
        """Log decay (base 2) up to the chunk's tokens, and their documents."""
        names = "cumulative_smem", "document_smem"
        return [plgpu.load(refs[name], layout=layout, optimized=False) if name in refs else None for name in names]

    row, column = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i, layout=MATRIX) for i in (0, 1))
    # Read on either side of a matmul: the compiler takes two reads in a row for one, of two layouts.
    (of_row, document_of_row), products = of_tokens(ROW), _product(k, k, interpret)
    of_column, document_of_column = of_tokens(_COLUMN)
    seen = None
    if document_of_row is not None:
        rows, columns = spread(document_of_row, 0), spread(document_of_column, 1)
        seen = (rows == columns) & (rows >= 0)
    # Transposed: the column of the system that a known row is told by is a row in memory.
    later = row < column if seen is None else seen & (row < column)
    decay = None
    if of_row is not None:
        # From the earlier of the two tokens to the later, whichever reads.
        decay = jnp.exp2(-jnp.abs(spread(of_row, 0) - spread(of_column, 1)))
        products = products * decay
    beta = plgpu.load(refs["beta_smem"], layout=_COLUMN, optimized=False)
    refs["system"][...] = jnp.where(later, products * spread(beta, 1), 0.0)
    scores = _product(q, k, interpret) * scale
    if decay is not None:
        scores = scores * decay
    earlier = row >= column if seen is None else seen & (row >= column)
    refs["scores_smem"][...] = jnp.where(earlier, scores, 0.0).astype(q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs["scores_smem"], refs["scores"].at[batch, head, chunk])
    if interpret:
        refs["solve_smem"][...] = _substituted(refs["system"][...], refs["beta_smem"][...]).astype(q.dtype)
    else:
        _substitute(refs["system"], refs["beta_smem"], refs["solve_smem"])
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs["solve_smem"], refs["solve"].at[batch, head, chunk])
    plgpu.wait_smem_to_gmem(0)


def _add_up_interpreted(log, cumulative, reads, writes) -> None:
    """What `_add_up` computes, for the interpreter."""
    cumulative[...] = upto = jnp.cumsum(log[...] * _LOG2_E)
    reads[...], writes[...] = jnp.exp2(upto), jnp.exp2(upto[-1] - upto)


def _add_up(log, cumulative, reads, writes) -> None:
    """The log decay (base 2) up to each of 64 tokens, and what follows for the state: by one warp, two tokens a lane,
    whose sums go up the lanes by halves of the way. In shared memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 4)
    def emit(_, *refs):
        i64 = ir.IntegerType.get_signless(64)
        addresses = [llvm.ptrtoint(i64, mgpu.utils.memref_ptr(x)) for x in refs]
        names = "log", "cumulative", "reads", "writes"
        lines = [
            ".reg .f32 a, b, sum, below, total;",
            f".reg .b32 {', '.join(names)}, lane;",
            ".reg .pred idle, there;",
            "mov.u32 lane, %tid.x;",
            f"setp.ge.u32 idle, lane, {_WARP};",
            "@idle bra DONE;",
            *(f"cvt.u32.u64 {name}, ${i};" for i, name in enumerate(names)),
            *(f"mad.lo.u32 {name}, lane, 8, {name};" for name in names),
            "ld.shared.v2.f32 {a, b}, [log];",
            *(f"mul.f32 {x}, {x}, {ptx_float(_LOG2_E)};" for x in "ab"),
            "add.f32 sum, a, b;",
        ]
        for distance in (1, 2, 4, 8, 16):
            lines += [
                f"shfl.sync.up.b32 below|there, sum, {distance}, 0, -1;",
                "@there add.f32 sum, sum, below;",
            ]
        lines += [
            "shfl.sync.idx.b32 total, sum, 31, 31, -1;",
            "sub.f32 a, sum, b;",
            "st.shared.v2.f32 [cumulative], {a, sum};",
            "sub.f32 below, total, a;",
            "sub.f32 total, total, sum;",
            *(f"ex2.approx.f32 {x}, {x};" for x in ("a", "sum", "below", "total")),
            "st.shared.v2.f32 [reads], {a, sum};",
            "st.shared.v2.f32 [writes], {below, total};",
            "DONE:",
        ]
        text = "{\n" + "\n".join(lines) + "\n}"
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, addresses, text, "l,l,l,l,~{memory}", has_side_effects=True)

    emit(log, cumulative, reads, writes)


def _product(a, b, interpret):
    """a b^T"""
    if interpret:
        product = jnp.dot(a[...], b[...].T, preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        return product

    def multiply(acc):
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((CHUNK, CHUNK), jnp.float32))


def _substituted(system: jax.Array, beta: jax.Array) -> jax.Array:
    """What `_substitute` computes, for the interpreter."""

    def tell(m, inverse):
        told = system[m][:, None] * inverse[m][None, :]
        return inverse - jnp.where(jnp.arange(CHUNK)[:, None] > m, told, 0.0)

    return lax.fori_loop(0, CHUNK, tell, jnp.eye(CHUNK, dtype=jnp.float32)) * beta


_WARP = 32
_GROUP = 16


def _told(rows: range) -> list[str]:
    """PTX that tells later rows of those: what the next rows are told by is loaded while the last ones are told."""
    groups = [
        (m, range(first, min(first + _GROUP, CHUNK))) for m in rows for first in range((m + 1) // 4 * 4, CHUNK, _GROUP)
    ]

    def load(number: int) -> list[str]:
        m, group = groups[number]
        name = [f"l{number % 2 * _GROUP + i}" for i in range(_GROUP)]
        return [
            f"ld.shared.v4.f32 {{{', '.join(name[i : i + 4])}}}, [system + {4 * (m * CHUNK + group[i])}];"
            for i in range(0, len(group), 4)
        ]

    lines = load(0)
    for number, (m, group) in enumerate(groups):
        lines += load(number + 1) if number + 1 < len(groups) else []
        if number == 0 or groups[number - 1][0] != m:
            lines.append(f"neg.f32 minus, x{m};")
        lines += [
            f"fma.rn.f32 x{row}, l{number % 2 * _GROUP + i}, minus, x{row};" for i, row in enumerate(group) if row > m
        ]
    return lines


def _substitute(system, beta, solve) -> None:
    """solve = (1 + L)^-1 diag(beta), 16 bits `[64, 64]`, of the system L^T, float32 `[64, 64]`.

    Half of the warps have nothing to do: each of 64 threads has a column.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def emit(_, system, beta, solve):
        i64 = ir.IntegerType.get_signless(64)
        addresses = [llvm.ptrtoint(i64, mgpu.utils.memref_ptr(x)) for x in (system, beta, solve)]
        x, told = [f"x{i}" for i in range(CHUNK)], [f"l{i}" for i in range(2 * _GROUP)]
        lines = [
            f".reg .f32 {', '.join((*x, *told, 'minus', 'b'))};",
            ".reg .b32 system, beta, solve, column, at;",
            ".reg .b16 rounded;",
            ".reg .pred idle, own, second;",
            "cvt.u32.u64 system, $0;",
            "cvt.u32.u64 beta, $1;",
            "cvt.u32.u64 solve, $2;",
            # Of blocks side by side on a multiprocessor half take its other schedulers.
            "mov.u32 column, %ctaid.x;",
            "shr.u32 column, column, 1;",
            f"and.b32 column, column, {CHUNK};",
            "mov.u32 at, %tid.x;",
            "xor.b32 column, column, at;",
            f"setp.ge.u32 idle, column, {CHUNK};",
            "@idle bra DONE;",
            f"setp.ge.u32 second, column, {_WARP};",
        ]
        for i in range(CHUNK):
            lines += [f"setp.eq.u32 own, column, {i};", f"selp.f32 x{i}, 0f3F800000, 0f00000000, own;"]
        # The rows before its own are 0 to a column.
        lines += ["@second bra SECOND;", *_told(range(_WARP)), "SECOND:", *_told(range(_WARP, CHUNK - 1))]
        lines += [
            "shl.b32 at, column, 2;",
            "add.u32 at, at, beta;",
            "ld.shared.f32 b, [at];",
            "shl.b32 at, column, 1;",
            "add.u32 at, at, solve;",
        ]
        for i in range(CHUNK):
            lines += [
                f"mul.f32 x{i}, x{i}, b;",
                f"cvt.rn.bf16.f32 rounded, x{i};",
                f"st.shared.b16 [at + {2 * CHUNK * i}], rounded;",
            ]
        lines.append("DONE:")
        text = "{\n" + "\n".join(lines) + "\n}"
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, addresses, text, "l,l,l,~{memory}", has_side_effects=True)

    emit(system, beta, solve)

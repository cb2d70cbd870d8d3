"""What the tokens of a chunk read of each other under a delta rule, on Hopper GPUs (Mosaic GPU): `scores` and `solve`
of prepared.py.

Grid: a warpgroup for a chunk of a head. The inverse D of the triangular system is that of its blocks of 16 tokens
first, in float32 by substitution, a thread for a column, in registers. Then two blocks become one, twice: with E the
part of the system between them, D becomes D - D E D. The tensor cores make these products of matrices of which each is
the sum of two of 16 bits, so that they are off by about 2^-16; the inverse has 16 bits in the end.

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
from pallas_kernels.linear.pallas_mosaic_gpu_tiles import FLOAT_TRANSFORMS, matmul, spread
from pallas_kernels.wgmma import MATRIX, ROW, TILE_BYTES, TILE_ROWS, TRANSFORMS

_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_LOG2_E = math.log2(math.e)


class Inputs(NamedTuple):
    """What the kernel reads.

    Attributes:
      q, k: 16 bits `[B, T, K, H]`.
      beta: float32 `[B, N, T']`.
      cumulative: float32 `[B, N, T']`; None where nothing decays.
      document: int32 `[B, T']`; None for one document.
    """

    q: Any
    k: Any
    beta: Any
    cumulative: Any
    document: Any


def scores_and_solve(inputs: Inputs, *, scale: float, interpret) -> tuple[jax.Array, jax.Array]:
    """16 bits `[B, N, n, CHUNK, CHUNK]` each."""
    (B, N, length), (_, _, K, H), dtype = inputs.beta.shape, inputs.q.shape, inputs.q.dtype
    num_chunks = length // CHUNK
    given = {name: x for name, x in inputs._asdict().items() if x is not None}
    square = jax.ShapeDtypeStruct((B, N, num_chunks, CHUNK, CHUNK), dtype)

    def body(*refs):
        refs = dict(zip((*given, "scores", "solve", *_SCRATCH), refs, strict=True))
        _solve_chunk(refs, num_heads=N, num_key_heads=K, num_chunks=num_chunks, scale=scale, interpret=interpret)

    def tile():
        return plgpu.SMEM((CHUNK, CHUNK), dtype, transforms=TRANSFORMS)

    def row():
        return plgpu.SMEM((CHUNK,), jnp.float32)

    # Two tiles of each of q and k, though they may have one: what they are for later is two.
    scratch = {
        "q0": tile(),
        "q1": tile(),
        "k0": tile(),
        "k1": tile(),
        "scores_smem": tile(),
        "system": plgpu.SMEM((CHUNK, CHUNK), jnp.float32, transforms=FLOAT_TRANSFORMS),
        "beta_smem": row(),
        "cumulative_smem": row(),
        "full": plgpu.Barrier(num_arrivals=2 * (H // CHUNK) + 1 + ("cumulative" in given)),
    }
    results = plgpu.kernel(
        body,
        out_type=[square, square],
        grid=(B * N * num_chunks,),
        grid_names=("block",),
        scratch_types=[scratch[name] for name in _SCRATCH],
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(*given.values())
    return tuple(results)


_SCRATCH = ("q0", "q1", "k0", "k1", "scores_smem", "system", "beta_smem", "cumulative_smem", "full")


def _solve_chunk(refs, *, num_heads: int, num_key_heads: int, num_chunks: int, scale: float, interpret) -> None:
    number = lax.axis_index("block")
    # Heads side by side, for the keys that they share.
    head, number = lax.rem(number, num_heads), lax.div(number, num_heads)
    chunk, batch = lax.rem(number, num_chunks), lax.div(number, num_chunks)
    tokens, key_head = pl.ds(chunk * CHUNK, CHUNK), lax.div(head, num_heads // num_key_heads)
    q, k, full = (refs["q0"], refs["q1"]), (refs["k0"], refs["k1"]), refs["full"]
    num_tiles = refs["q"].shape[3] // CHUNK
    for source, tiles in ((refs["k"], k), (refs["q"], q)):
        for i in range(num_tiles):
            columns = source.at[batch, tokens, key_head, pl.ds(i * CHUNK, CHUNK)]
            plgpu.copy_gmem_to_smem(columns, tiles[i], full)
    for name in ("beta", "cumulative"):
        if name in refs:
            plgpu.copy_gmem_to_smem(refs[name].at[batch, head, tokens], refs[f"{name}_smem"], full)
    plgpu.barrier_wait(full)

    def of_tokens(layout):
        """Log decay (base 2) and document of the chunk's tokens."""
        cumulative = document = None
        if "cumulative" in refs:
            cumulative = plgpu.load(refs["cumulative_smem"], layout=layout, optimized=False) * _LOG2_E
        if "document" in refs:
            document = plgpu.load(refs["document"].at[batch, tokens], layout=layout, optimized=False)
        return cumulative, document

    def products(a, b):
        """a b^T"""
        return matmul([(a[i], b[i], False, True) for i in range(num_tiles)], interpret=interpret)

    row, column = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i, layout=MATRIX) for i in (0, 1))
    # Read on either side of a matmul: the compiler takes two reads in a row for one, of two layouts.
    (of_row, document_of_row), system = of_tokens(ROW), products(k, k)
    of_column, document_of_column = of_tokens(_COLUMN)
    earlier, itself = row > column, row == column
    if document_of_row is not None:
        rows, columns = spread(document_of_row, 0), spread(document_of_column, 1)
        seen = (rows == columns) & (rows >= 0)
        earlier, itself = earlier & seen, itself & seen
    if of_row is not None:
        decay = jnp.exp2(spread(of_row, 0) - spread(of_column, 1))
        system = system * decay
    beta = plgpu.load(refs["beta_smem"], layout=ROW, optimized=False)
    refs["system"][...] = jnp.where(earlier, system * spread(beta, 0), 0.0)
    scores = products(q, k) * scale
    if of_row is not None:
        scores = scores * decay
    refs["scores_smem"][...] = jnp.where(earlier | itself, scores, 0.0).astype(q[0].dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs["scores_smem"], refs["scores"].at[batch, head, chunk])
    if interpret:
        system = refs["system"][...]
        is_in_block = jnp.arange(CHUNK)[:, None] // _BLOCK == jnp.arange(CHUNK)[None] // _BLOCK
        refs["system"][...] = jnp.where(is_in_block, _substituted(jnp.where(is_in_block, system, 0.0)), system)
    else:
        _substitute(refs["system"])
    plgpu.commit_smem()
    inverse = jnp.where(row & -_BLOCK == column & -_BLOCK, plgpu.load(refs["system"], layout=MATRIX), 0.0)
    for size in _SIZES:
        is_between = ((row & -size) ^ size == column & -size) & (row > column)
        between = jnp.where(is_between, plgpu.load(refs["system"], layout=MATRIX), 0.0)
        inverse = _merged(inverse, between, q, k, interpret)
    staged = q[0]
    plgpu.commit_smem()  # a warp may be ahead of another's matmul
    beta = plgpu.load(refs["beta_smem"], layout=_COLUMN, optimized=False)
    staged[...] = (inverse * spread(beta, 1)).astype(staged.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, refs["solve"].at[batch, head, chunk])
    plgpu.wait_smem_to_gmem(0)


def _merged(inverse, between, between_tiles, inverse_tiles, interpret):
    """The inverse of twice as large blocks: inverse - inverse between inverse."""

    def put(x, tiles) -> None:
        # Their sum is x but for 2^-16 of it.
        high = x.astype(tiles[0].dtype)
        tiles[0][...], tiles[1][...] = high, (x - high.astype(jnp.float32)).astype(high.dtype)

    def product(a, b):
        return matmul([(a[i], b[j], False, False) for i, j in ((0, 0), (1, 0), (0, 1))], interpret=interpret)

    plgpu.commit_smem()  # a warp may be ahead of another's matmul
    put(inverse, inverse_tiles)
    put(between, between_tiles)
    plgpu.commit_smem()
    left = product(inverse_tiles, between_tiles)
    plgpu.commit_smem()
    put(left, between_tiles)
    plgpu.commit_smem()
    return inverse - product(between_tiles, inverse_tiles)


_SIZES = (16, 32)
_BLOCK = 16
"""Tokens of the blocks whose inverse is made by substitution."""


def _substituted(system: jax.Array) -> jax.Array:
    """(1 + system)^-1, for the interpreter."""

    def tell(m, inverse):
        told = system[:, m][:, None] * inverse[m][None, :]
        return inverse - jnp.where(jnp.arange(CHUNK)[:, None] > m, told, 0.0)

    return lax.fori_loop(0, CHUNK, tell, jnp.eye(CHUNK, dtype=jnp.float32))


def _substitute(system) -> None:
    """Puts the inverse of 1 + L in the place of each block of 16 tokens L of the system, float32 `[64, 64]`, swizzled.

    Half of the warps have nothing to do: each of 64 threads has a column of its block.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(FLOAT_TRANSFORMS),))
    def emit(_, system):
        i64 = ir.IntegerType.get_signless(64)
        address = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(system))
        x, told = [f"x{i}" for i in range(_BLOCK)], [f"l{i}" for i in range(2 * _BLOCK)]
        rows_of_tiles = 2 * TILE_BYTES  # a tile has 32 columns
        lines = [
            f".reg .f32 {', '.join((*x, *told, 'minus'))};",
            ".reg .b32 block, side, at, column, quad, row;",
            ".reg .b32 half0, half1;",
            ".reg .pred idle, own;",
            # Of blocks side by side on a multiprocessor half take its other schedulers.
            "mov.u32 column, %ctaid.x;",
            "shr.u32 column, column, 1;",
            f"and.b32 column, column, {CHUNK};",
            "mov.u32 at, %tid.x;",
            "xor.b32 column, column, at;",
            f"setp.ge.u32 idle, column, {CHUNK};",
            "@idle bra DONE;",
            # Where the block's tiles begin: two rows of tiles a block, a column of tiles for each two.
            "cvt.u32.u64 at, $0;",
            f"shr.u32 block, column, {_BLOCK.bit_length() - 1};",
            f"mad.lo.u32 at, block, {2 * rows_of_tiles}, at;",
            "shr.u32 side, block, 1;",
            f"mad.lo.u32 at, side, {TILE_BYTES}, at;",
            # Of a row of 128 bytes it has a half, in quads of floats that are swapped with the row's number.
            "and.b32 side, block, 1;",
            "shl.b32 side, side, 6;",
            "add.u32 half0, at, side;",
            "xor.b32 side, side, 64;",
            "add.u32 half1, at, side;",
            f"and.b32 column, column, {_BLOCK - 1};",
        ]

        def load(row: int) -> list[str]:
            """The values of a row before the diagonal."""
            name = told[row % 2 * _BLOCK :][:_BLOCK]
            of_row = row // TILE_ROWS * rows_of_tiles + row % TILE_ROWS * 128
            half = f"half{row % TILE_ROWS // 4}"
            return [
                f"ld.shared.v4.f32 {{{', '.join(name[4 * i : 4 * i + 4])}}}, [{half} + {of_row + 16 * (i ^ row % 4)}];"
                for i in range(-(-row // 4))
            ]

        lines += load(1)
        for row in range(_BLOCK):
            lines += load(row + 1) if 0 < row < _BLOCK - 1 else []
            lines += [f"setp.eq.u32 own, column, {row};", f"selp.f32 x{row}, 0f3F800000, 0f00000000, own;"]
            for m in range(row):
                lines += [f"neg.f32 minus, l{row % 2 * _BLOCK + m};", f"fma.rn.f32 x{row}, minus, x{m}, x{row};"]
        # Those of a block are in one warp, which has read all of it now.
        lines += [
            "bar.warp.sync 0xffffffff;",
            "shr.u32 quad, column, 2;",
            "and.b32 column, column, 3;",
            "shl.b32 column, column, 2;",
        ]
        for row in range(_BLOCK):
            of_row = row // TILE_ROWS * rows_of_tiles + row % TILE_ROWS * 128
            lines += [
                f"xor.b32 row, quad, {row % 4};",
                f"mad.lo.u32 row, row, 16, half{row % TILE_ROWS // 4};",
                "add.u32 row, row, column;",
                f"st.shared.f32 [row + {of_row}], x{row};",
            ]
        lines.append("DONE:")
        text = "{\n" + "\n".join(lines) + "\n}"
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [address], text, "l,~{memory}", has_side_effects=True)

    emit(system)

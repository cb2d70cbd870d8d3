"""Decays of each dim of the keys within a chunk on Hopper GPUs (Mosaic GPU): `q`, `k`, `scores` and `keeps` of
prepared.py.

Grid: a warpgroup for a chunk of a head. Products of decays are made by a thread for each dim, which goes through the
tokens of its column (inline PTX): an exponential for each token, and for each level a multiplication; no factor is a
quotient. What a level multiplies goes to shared memory, from where the tensor cores take it.

Reference: Yang et al. 2024, Gated Linear Attention, arXiv:2312.06635, section 4.3, whose second level of chunks is here
taken down to single tokens.
"""

import itertools
import math
import struct
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
from pallas_kernels.linear.prepared import LEVELS
from pallas_kernels.mosaic_gpu import WARPGROUP
from pallas_kernels.wgmma import MATRIX, ROW, TILE_BYTES, TILE_ROWS, TRANSFORMS

_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_LOG2_E = math.log2(math.e)
_TILE, _FLOATS = plgpu.RefType(TRANSFORMS), plgpu.RefType()


class Inputs(NamedTuple):
    """What the kernel reads.

    Attributes:
      q, k: 16 bits `[B, T, K, H]`.
      decay: Its log, float32 `[B, T, N, H]`.
      reads, writes: float32 `[B, N, T']`, of documents alone; None for one document.
      document: int32 `[B, T']`; None for one document.
    """

    q: Any
    k: Any
    decay: Any
    reads: Any
    writes: Any
    document: Any


class Outputs(NamedTuple):
    """As `prepared.Prepared` has them; keeps without documents."""

    q: Any
    k: Any
    scores: Any
    keeps: Any


class _Shared(NamedTuple):
    """Shared memory."""

    q: Any
    k: Any
    operand: Any
    decay: Any
    reads: Any
    writes: Any
    scores: Any
    keeps: Any
    full: Any


def to_states_and_scores(inputs: Inputs, *, scale: float, interpret) -> Outputs:
    """Runs the kernel."""
    (B, T, N, H), dtype = inputs.decay.shape, inputs.q.dtype
    num_chunks = -(-T // CHUNK)
    outputs = Outputs(
        q=jax.ShapeDtypeStruct((B, num_chunks * CHUNK, N, H), dtype),
        k=jax.ShapeDtypeStruct((B, num_chunks * CHUNK, N, H), dtype),
        scores=jax.ShapeDtypeStruct((B, N, num_chunks, CHUNK, CHUNK), dtype),
        keeps=jax.ShapeDtypeStruct((B, N, num_chunks, H), jnp.float32),
    )

    def smem(*shape):
        return plgpu.SMEM(shape, dtype, transforms=TRANSFORMS)

    def row(x):
        return None if x is None else plgpu.SMEM((CHUNK,), x.dtype)

    shared = _Shared(
        q=smem(CHUNK, H),
        k=smem(CHUNK, H),
        operand=smem(CHUNK, H),
        decay=plgpu.SMEM((CHUNK, H), jnp.float32),
        reads=row(inputs.reads),
        writes=row(inputs.writes),
        scores=smem(CHUNK, CHUNK),
        keeps=plgpu.SMEM((H,), jnp.float32),
        full=plgpu.Barrier(num_arrivals=3 + 2 * (inputs.reads is not None)),
    )
    trees = [jax.tree.flatten(x) for x in (inputs, outputs, shared)]

    def body(*refs):
        refs = iter(refs)
        given = (jax.tree.unflatten(tree, [next(refs) for _ in range(tree.num_leaves)]) for _, tree in trees)
        _prepare_chunk(*given, num_heads=N, num_chunks=num_chunks, scale=scale, interpret=interpret)

    results = plgpu.kernel(
        body,
        out_type=trees[1][0],
        grid=(B * N * num_chunks,),
        grid_names=("block",),
        scratch_types=trees[2][0],
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(*trees[0][0])
    return jax.tree.unflatten(trees[1][1], results)


def _prepare_chunk(
    inputs: Inputs, outputs: Outputs, shared: _Shared, *, num_heads: int, num_chunks: int, scale: float, interpret
) -> None:
    number = lax.axis_index("block")
    head, number = lax.rem(number, num_heads), lax.div(number, num_heads)
    chunk, batch = lax.rem(number, num_chunks), lax.div(number, num_chunks)
    tokens, key_head = pl.ds(chunk * CHUNK, CHUNK), lax.div(head, num_heads // inputs.q.shape[2])
    plgpu.copy_gmem_to_smem(inputs.decay.at[batch, tokens, head], shared.decay, shared.full)
    plgpu.copy_gmem_to_smem(inputs.q.at[batch, tokens, key_head], shared.q, shared.full)
    plgpu.copy_gmem_to_smem(inputs.k.at[batch, tokens, key_head], shared.k, shared.full)
    if inputs.reads is not None:
        plgpu.copy_gmem_to_smem(inputs.reads.at[batch, head, tokens], shared.reads, shared.full)
        plgpu.copy_gmem_to_smem(inputs.writes.at[batch, head, tokens], shared.writes, shared.full)
    plgpu.barrier_wait(shared.full)
    row, column = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i, layout=MATRIX) for i in (0, 1))
    document = None
    if inputs.document is not None:
        document = spread(plgpu.load(inputs.document.at[batch, tokens], layout=ROW, optimized=False), 0)
    scores = product(shared.q, shared.k, interpret)  # of a token with itself, which nothing decays
    if not interpret:
        exponentials(shared.decay)
    apart = row ^ column
    for size in LEVELS:
        plgpu.commit_smem()  # a warp may be ahead of another's matmul
        if interpret:
            operand = interpreted_level(shared.q[...], shared.k[...], shared.decay[...], size)
            shared.operand[...] = operand.astype(shared.operand.dtype)
        else:
            level(shared.q, shared.k, shared.decay, shared.operand, size)
        plgpu.commit_smem()
        of_level = product(shared.operand, shared.operand, interpret)
        scores = jnp.where((apart >= size) & (apart < 2 * size), of_level, scores)
    seen = row >= column
    if document is not None:
        of_column = plgpu.load(inputs.document.at[batch, tokens], layout=_COLUMN, optimized=False)
        seen &= (document == spread(of_column, 1)) & (document >= 0)
    shared.scores[...] = jnp.where(seen, scores * scale, 0.0).astype(shared.scores.dtype)
    # q and k were read by a matmul before the levels.
    if interpret:
        _interpreted_to_states(shared, scale)
    else:
        _to_states(shared, scale)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared.scores, outputs.scores.at[batch, head, chunk])
    plgpu.copy_smem_to_gmem(shared.q, outputs.q.at[batch, tokens, head])
    plgpu.copy_smem_to_gmem(shared.k, outputs.k.at[batch, tokens, head])
    plgpu.copy_smem_to_gmem(shared.keeps, outputs.keeps.at[batch, head, chunk])
    plgpu.wait_smem_to_gmem(0)


def product(a, b, interpret):
    """a b^T, `[64, 64]`."""
    if interpret:
        result = jnp.dot(a[...], b[...].T, preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        return result

    def multiply(acc):
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((CHUNK, CHUNK), jnp.float32))


_BATCH = 16
"""Tokens whose loads begin before the first store: the assembler moves no load past a store, which may alias."""


class _Columns:
    """Inline PTX by a thread for each dim: tiles of 16 bits `[64, H]` in shared memory and floats `[64, H]`, of which
    there is one for each warpgroup.

    A thread reads and writes its own column alone, so that nothing is to be waited for between two of these.
    """

    def __init__(self, head_dim: int):
        self.head_dim = head_dim
        self.lines = [
            ".reg .b32 column, low, tile, offset, warpgroup, of_warpgroup;",
            f".reg .f32 factor, x, {', '.join(f'y{i}, given{i}' for i in range(_BATCH))};",
            f".reg .b16 half, {', '.join(f'half{i}' for i in range(_BATCH))};",
            ".reg .pred idle;",
            "mov.u32 column, %tid.x;",
            "shr.u32 warpgroup, column, 7;",
            f"and.b32 column, column, {WARPGROUP - 1};",
            f"setp.ge.u32 idle, column, {head_dim};",
            "@idle bra DONE;",
            "and.b32 low, column, 63;",
            "shl.b32 low, low, 1;",
            "shr.u32 tile, column, 6;",
            f"mul.lo.u32 tile, tile, {TILE_BYTES};",
            f"mul.lo.u32 of_warpgroup, warpgroup, {2 * CHUNK * head_dim};",
            "add.u32 tile, tile, of_warpgroup;",
        ]

    def tile(self, name: str, operand: str) -> None:
        """Names a swizzled tile."""
        self.lines += [f".reg .b32 {name}, {', '.join(f'{name}{r}' for r in range(TILE_ROWS))};"]
        self.lines += [f"cvt.u32.u64 {name}, {operand};", f"add.u32 {name}, {name}, tile;"]
        for r in range(TILE_ROWS):
            self.lines += [f"xor.b32 offset, low, {16 * r};", f"add.u32 {name}{r}, {name}, offset;"]

    def floats(self, name: str, operand: str, rows: int = CHUNK) -> None:
        """Names floats `[rows, H]`."""
        self.lines += [
            f".reg .b32 {name};",
            f"cvt.u32.u64 {name}, {operand};",
            f"mad.lo.u32 {name}, warpgroup, {4 * rows * self.head_dim}, {name};",
            "shl.b32 offset, column, 2;",
            f"add.u32 {name}, {name}, offset;",
        ]

    def scalars(self, name: str, operand: str) -> None:
        """Names floats `[64]`, one for each token, of all warpgroups."""
        self.lines += [f".reg .b32 {name};", f"cvt.u32.u64 {name}, {operand};"]

    def load(self, into: str, tile: str, token: int) -> None:
        self.lines.append(f"ld.shared.b16 {into}, [{self._at(tile, token)}];")

    def store(self, tile: str, token: int, x: str) -> None:
        self.lines += [f"cvt.rn.bf16.f32 half, {x};", f"st.shared.b16 [{self._at(tile, token)}], half;"]

    def load_float(self, into: str, name: str, token: int) -> None:
        self.lines.append(f"ld.shared.f32 {into}, [{name} + {4 * token * self.head_dim}];")

    def load_scalar(self, into: str, name: str, token: int) -> None:
        self.lines.append(f"ld.shared.f32 {into}, [{name} + {4 * token}];")

    def store_float(self, name: str, token: int, x: str) -> None:
        self.lines.append(f"st.shared.f32 [{name} + {4 * token * self.head_dim}], {x};")

    def multiply(self, x: str, y: str, z: str) -> None:
        self.lines.append(f"mul.f32 {x}, {y}, {z};")

    def scale(self, half: str, *factors: str) -> None:
        """Makes x the product of 16 bits and the factors."""
        self.lines.append(f"cvt.f32.bf16 x, {half};")
        for factor in factors:
            self.multiply("x", "x", factor)

    def one(self, x: str) -> None:
        self.lines.append(f"mov.f32 {x}, 0f3F800000;")

    def _at(self, tile: str, token: int) -> str:
        row_of_tiles = self.head_dim // 64 * TILE_BYTES
        return f"{tile}{token % TILE_ROWS} + {token // TILE_ROWS * row_of_tiles + token % TILE_ROWS * 128}"

    def emit(self, *refs) -> None:
        i64 = ir.IntegerType.get_signless(64)
        addresses = [llvm.ptrtoint(i64, mgpu.utils.memref_ptr(x)) for x in refs]
        text = "{\n" + "\n".join((*self.lines, "DONE:")) + "\n}"
        constraints = ",".join(("l",) * len(addresses) + ("~{memory}",))
        llvm.inline_asm(ir.Type.parse("!llvm.void"), addresses, text, constraints, has_side_effects=True)


def exponentials(decay) -> None:
    """Puts exp(decay) in the place of decay, float32 `[64, H]`."""
    head_dim = decay.shape[-1]

    @plgpu.inline_mgpu(arg_types=(_FLOATS,))
    def emit(_, decay):
        ptx = _Columns(head_dim)
        ptx.floats("e", "$0")
        log2_e = f"0f{_bits(_LOG2_E)}"
        for batch in itertools.batched(range(CHUNK), _BATCH):
            for i, token in enumerate(batch):
                ptx.load_float(f"y{i}", "e", token)
            for i, token in enumerate(batch):
                ptx.multiply("x", f"y{i}", log2_e)
                ptx.lines.append("ex2.approx.f32 x, x;")
                ptx.store_float("e", token, "x")
        ptx.emit(decay)

    emit(decay)


def level(q, k, decays, operand, size: int) -> None:
    """Z of a level of the tiles q and k, given decays, not their logs."""
    head_dim = decays.shape[-1]

    @plgpu.inline_mgpu(arg_types=(_FLOATS, _TILE, _TILE, _TILE))
    def emit(_, decays, *tiles):
        ptx = _Columns(head_dim)
        ptx.floats("e", "$0")
        for i, name in enumerate(("q", "k", "z")):
            ptx.tile(name, f"${i + 1}")

        steps = []  # what to multiply, the token, and whether a half begins
        for start in range(0, CHUNK, 2 * size):
            middle = start + size
            steps += [("k", token, token == middle - 1) for token in reversed(range(start, middle))]
            steps += [("q", token, token == middle) for token in range(middle, middle + size)]
        for batch in itertools.batched(steps, _BATCH):
            for i, (source, token, _) in enumerate(batch):
                ptx.load(f"half{i}", source, token)
                ptx.load_float(f"y{i}", "e", token)
            for i, (source, token, begins) in enumerate(batch):
                if begins:
                    ptx.one("factor")
                if source == "q":
                    ptx.multiply("factor", "factor", f"y{i}")
                ptx.scale(f"half{i}", "factor")
                ptx.store("z", token, "x")
                if source == "k":
                    ptx.multiply("factor", "factor", f"y{i}")
        ptx.emit(decays, *tiles)

    emit(decays, q, k, operand)


def interpreted_level(q, k, log, size: int) -> jax.Array:
    """Z of `[64, H]`, given the log of the decays, for the interpreter."""
    halves = log.reshape(-1, 2, size, log.shape[1])
    earlier = jnp.sum(halves[:, 0], axis=1, keepdims=True) - jnp.cumsum(halves[:, 0], axis=1)
    factors = jnp.exp(jnp.stack([earlier, jnp.cumsum(halves[:, 1], axis=1)], axis=1)).reshape(log.shape)
    later = (jnp.arange(CHUNK) // size % 2 == 1)[:, None]
    return factors * jnp.where(later, q, k).astype(jnp.float32)


def _to_states(shared: _Shared, scale: float) -> None:
    """Puts what the state is multiplied with in the places of q and k, and what is left of it into keeps."""
    head_dim, with_documents = shared.decay.shape[1], shared.reads is not None
    scalars = (shared.reads, shared.writes) if with_documents else ()
    types = (_FLOATS, _TILE, _TILE, _FLOATS, *(_FLOATS,) * len(scalars))

    @plgpu.inline_mgpu(arg_types=types)
    def emit(_, *refs):
        ptx = _Columns(head_dim)
        ptx.floats("e", "$0")
        ptx.tile("q", "$1")
        ptx.tile("k", "$2")
        ptx.floats("keeps", "$3", rows=1)
        if with_documents:
            ptx.scalars("reads", "$4")
            ptx.scalars("writes", "$5")

        def scale_all(tile: str, of_document: str, tokens, *, reverse: bool, by: tuple[str, ...] = ()) -> None:
            ptx.one("factor")
            for batch in itertools.batched(tokens, _BATCH):
                for i, token in enumerate(batch):
                    ptx.load(f"half{i}", tile, token)
                    ptx.load_float(f"y{i}", "e", token)
                    if with_documents:
                        ptx.load_scalar(f"given{i}", of_document, token)
                for i, token in enumerate(batch):
                    if not reverse:
                        ptx.multiply("factor", "factor", f"y{i}")
                    ptx.scale(f"half{i}", "factor", *by, *((f"given{i}",) if with_documents else ()))
                    ptx.store(tile, token, "x")
                    if reverse:
                        ptx.multiply("factor", "factor", f"y{i}")

        scale_all("q", "reads", range(CHUNK), reverse=False, by=(f"0f{_bits(scale)}",))
        ptx.store_float("keeps", 0, "factor")
        scale_all("k", "writes", reversed(range(CHUNK)), reverse=True)
        ptx.emit(*refs)

    emit(shared.decay, shared.q, shared.k, shared.keeps, *scalars)


def _interpreted_to_states(shared: _Shared, scale: float) -> None:
    upto = jnp.cumsum(shared.decay[...], axis=0)
    reads, writes = scale * jnp.exp(upto), jnp.exp(upto[-1] - upto)
    if shared.reads is not None:
        reads, writes = reads * shared.reads[...][:, None], writes * shared.writes[...][:, None]
    shared.q[...] = (shared.q[...].astype(jnp.float32) * reads).astype(shared.q.dtype)
    shared.k[...] = (shared.k[...].astype(jnp.float32) * writes).astype(shared.k.dtype)
    shared.keeps[...] = jnp.exp(upto[-1])


def _bits(x: float) -> str:
    """A float32 as PTX writes it."""
    return struct.pack(">f", x).hex().upper()

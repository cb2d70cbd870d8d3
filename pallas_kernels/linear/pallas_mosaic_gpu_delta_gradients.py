"""The gradients of a delta rule within its chunks on Hopper GPUs (Mosaic GPU): dq, dk, dbeta and what the gradient of a
decay is made of, from the states before and their cotangents after each chunk. See prepared.py for the maths.

Grid: two warpgroups for a chunk of a head, each with 64 columns of the keys and 64 of the values. Everything is in
tiles of 64 x 64, in shared memory as it comes from memory. What tokens are to each other, `[64, 64]`, both have, in
registers, the one way round and the other, so that each is the left operand of a matmul as it is."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear.pallas_mosaic_gpu_chain import CHUNK
from pallas_kernels.linear.pallas_mosaic_gpu_tiles import matmul, spread
from pallas_kernels.wgmma import MATRIX, ROW, TRANSFORMS

_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_LOG2_E = math.log2(math.e)
_SIDES = 2


class Inputs(NamedTuple):
    """What the kernel reads.

    Attributes:
      q, k: 16 bits `[B, T, K, H]`.
      v, dout, dv: 16 bits `[B, T, N, V]`.
      written: 16 bits `[B, N, n, V, C]`.
      states, dstates: Before and after each chunk, 16 bits `[B, N, n, V, H]`.
      cumulative, reads, writes: float32 `[B, N, T']`; None where nothing decays and there is one document.
      document: int32 `[B, T']`; None for one document.
    """

    q: Any
    k: Any
    v: Any
    dout: Any
    dv: Any
    written: Any
    states: Any
    dstates: Any
    cumulative: Any
    reads: Any
    writes: Any
    document: Any


class Outputs(NamedTuple):
    """What it writes. Sums over the keys' or the values' columns are of each warpgroup's, for XLA to add up.

    Attributes:
      dq, dk: 16 bits `[B, T, N, H]`.
      dbeta: float32 `[sides, B, N, T']`.
      dlog: The derivative by the log decay up to a token, less `to_end`, float32 `[sides, B, N, T']`; None where it is
        not asked for.
      to_end: The same of what a token writes, which has the decay from there to the chunk's end.
      kept: State times cotangent of the state, float32 `[sides, B, N, n, 64]`, to be summed.
    """

    dq: Any
    dk: Any
    dbeta: Any
    dlog: Any
    to_end: Any
    kept: Any


class _Shared(NamedTuple):
    """Shared memory: tiles `[64, 64]`, and the barrier that says when they are full."""

    q: Any
    k: Any
    v: Any
    dout: Any
    dv: Any
    written: Any
    states: Any
    dstates: Any
    out: Any
    full: Any


def gradients(inputs: Inputs, *, num_heads: int, scale: float, with_decay: bool, interpret) -> Outputs:
    """Runs the kernel."""
    (B, T, _, H), (N, num_chunks, V), dtype = inputs.q.shape, inputs.written.shape[1:4], inputs.q.dtype
    of_tokens = jax.ShapeDtypeStruct((_SIDES, B, N, num_chunks * CHUNK), jnp.float32)
    outputs = Outputs(
        dq=jax.ShapeDtypeStruct((B, T, N, H), dtype),
        dk=jax.ShapeDtypeStruct((B, T, N, H), dtype),
        dbeta=of_tokens,
        dlog=of_tokens if with_decay else None,
        to_end=of_tokens if with_decay else None,
        kept=jax.ShapeDtypeStruct((_SIDES, B, N, num_chunks, CHUNK), jnp.float32) if with_decay else None,
    )

    def tiles(*shape):
        return plgpu.SMEM((*shape, CHUNK, CHUNK), dtype, transforms=TRANSFORMS)

    keys, values = H // CHUNK, V // CHUNK
    shared = _Shared(
        q=tiles(keys),
        k=tiles(keys),
        v=tiles(values),
        dout=tiles(values),
        dv=tiles(values),
        written=tiles(values),
        states=tiles(values * keys),
        dstates=tiles(values * keys),
        out=tiles(_SIDES),
        full=plgpu.Barrier(num_arrivals=2 * keys + 4 * values + 2 * keys * values),
    )
    trees = [jax.tree.flatten(x) for x in (inputs, outputs, shared)]

    def body(*refs):
        refs = iter(refs)
        given = (jax.tree.unflatten(tree, [next(refs) for _ in range(tree.num_leaves)]) for _, tree in trees)
        _Chunk(*given, num_heads=num_heads, num_chunks=num_chunks, scale=scale, interpret=interpret).run()

    results = plgpu.kernel(
        body,
        out_type=trees[1][0],
        grid=(B * N * num_chunks,),
        grid_names=("block",),
        num_threads=_SIDES,
        thread_name="warpgroup",
        scratch_types=trees[2][0],
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(*trees[0][0])
    return jax.tree.unflatten(trees[1][1], results)


class _Chunk:
    """What one block of threads does."""

    def __init__(
        self, inputs: Inputs, outputs: Outputs, shared: _Shared, *, num_heads: int, num_chunks: int, scale: float,
        interpret,
    ):  # fmt: skip
        self.inputs, self.outputs, self.shared = inputs, outputs, shared
        self.scale, self.interpret = scale, interpret
        number = lax.axis_index("block")
        self.head, number = lax.rem(number, num_heads), lax.div(number, num_heads)
        self.chunk, self.batch = lax.rem(number, num_chunks), lax.div(number, num_chunks)
        self.num_heads, self.side = num_heads, lax.axis_index("warpgroup")
        self.keys, self.values = shared.q.shape[0], shared.v.shape[0]
        self.tokens = pl.ds(self.chunk * CHUNK, CHUNK)

    def run(self) -> None:
        pl.when(self.side == 0)(self.load)
        plgpu.barrier_wait(self.shared.full)
        self.factors()
        pl.when(self.side < self.values)(self.strengths)
        pl.when(self.side < self.keys)(self.queries_and_keys)
        plgpu.wait_smem_to_gmem(0)

    def load(self) -> None:
        shared, of_head = self.shared, (self.batch, self.head, self.chunk)
        for name in ("k", "q", "dout", "v", "dv"):
            source, target = getattr(self.inputs, name), getattr(shared, name)
            head = lax.div(self.head, self.num_heads // source.shape[2])
            for i in range(target.shape[0]):
                columns = source.at[self.batch, self.tokens, head, pl.ds(i * CHUNK, CHUNK)]
                plgpu.copy_gmem_to_smem(columns, target.at[i], shared.full)
        for i in range(self.values):
            rows = pl.ds(i * CHUNK, CHUNK)
            plgpu.copy_gmem_to_smem(self.inputs.written.at[*of_head, rows], shared.written.at[i], shared.full)
            for name in ("states", "dstates"):
                for j in range(self.keys):
                    tile = getattr(self.inputs, name).at[*of_head, rows, pl.ds(j * CHUNK, CHUNK)]
                    plgpu.copy_gmem_to_smem(tile, getattr(shared, name).at[i * self.keys + j], shared.full)

    # What tokens are to each other.

    def factors(self) -> None:
        """Decays between tokens, and which see which: readers in rows, and transposed."""
        row, column = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i, layout=MATRIX) for i in (0, 1))
        log_row, document_row = self.of_tokens(ROW)
        # Between two reads of the same in two layouts, which the compiler takes for one.
        self.among = self.matmul(self.along(self.keys, self.shared.k, self.shared.k, transpose_b=True))
        log_column, document_column = self.of_tokens(_COLUMN)
        same = None
        if document_row is not None:
            rows = spread(document_row, 0)
            same = (rows == spread(document_column, 1)) & (rows >= 0)
        self.before, self.after, self.itself = (
            x if same is None else x & same for x in (row > column, row < column, row == column)
        )
        self.decay = self.decay_back = None
        if log_row is not None:
            apart = spread(log_row, 0) - spread(log_column, 1)
            self.decay, self.decay_back = jnp.exp2(apart), jnp.exp2(-apart)

    def of_tokens(self, layout):
        """Log decay (base 2) and document of the chunk's tokens."""
        cumulative = document = None
        if self.inputs.cumulative is not None:
            at = self.inputs.cumulative.at[self.batch, self.head, self.tokens]
            cumulative = plgpu.load(at, layout=layout, optimized=False) * _LOG2_E
        if self.inputs.document is not None:
            at = self.inputs.document.at[self.batch, self.tokens]
            document = plgpu.load(at, layout=layout, optimized=False)
        return cumulative, document

    def seen(self, x, *, back: bool = False, strict: bool = False):
        """x[i, j], decayed, where i comes after j or, `back`, before it; unless `strict` also where it is j."""
        decay, seen = (self.decay_back, self.after) if back else (self.decay, self.before)
        x = x if decay is None else x * decay
        return jnp.where(seen if strict else seen | self.itself, x, 0.0)

    # The values' columns.

    def strengths(self) -> None:
        """dbeta."""
        shared, side = self.shared, self.side
        dtype = shared.q.dtype
        v, dout, dv, written = (x.at[side] for x in (shared.v, shared.dout, shared.dv, shared.written))
        dwritten = self.matmul(self.state(shared.dstates))
        dwritten = self.by_tokens(self.inputs.writes, dwritten)
        read = self.matmul(self.along(self.keys, shared.k, shared.q, transpose_b=True)) * self.scale
        dwritten = self.matmul([(self.seen(read, back=True).astype(dtype), dout, False, False)], acc=dwritten)
        told = (-self.seen(self.among, back=True, strict=True)).astype(dtype)
        dwritten = self.matmul([(told, dv, False, False)], acc=dwritten)
        error = plgpu.load(v, layout=MATRIX).astype(jnp.float32)
        error = error - self.by_tokens(self.inputs.reads, self.matmul(self.state(shared.states)))
        told = (-self.seen(self.among, strict=True)).astype(dtype)
        error = self.matmul([(told, written, False, True)], acc=error)
        self.of_side(self.outputs.dbeta)[...] = (dwritten * error).sum(axis=1)

    def state(self, states):
        """k times the columns of a state."""
        return [
            (self.shared.k.at[j], states.at[self.side * self.keys + j], False, True) for j in range(self.keys)
        ]  # fmt: skip

    # The keys' columns.

    def queries_and_keys(self) -> None:
        """dq, dk and the derivative by the log decays."""
        shared, side, outputs = self.shared, self.side, self.outputs
        dtype, with_decay = shared.q.dtype, outputs.dlog is not None
        q, k = shared.q.at[side], shared.k.at[side]
        dscores = self.matmul(self.along(self.values, shared.dout, shared.written)) * self.scale
        dscores = self.seen(dscores)
        damong = -self.seen(self.matmul(self.along(self.values, shared.dv, shared.written)), strict=True)
        transposed = {"transpose_a": True, "transpose_b": True}
        dscores_back = self.matmul(self.along(self.values, shared.written, shared.dout, **transposed)) * self.scale
        dscores_back = self.seen(dscores_back, back=True)
        damong_back = self.matmul(self.along(self.values, shared.written, shared.dv, **transposed))
        damong_back = -self.seen(damong_back, back=True, strict=True)
        dlog = None
        if with_decay:
            dlog = (self.among * (damong - damong_back)).sum(axis=1)
            products = self.matmul(self.along(self.keys, shared.q, shared.k, transpose_b=True))
            dlog += jnp.where(self.itself, 0.0, products * dscores).sum(axis=1)
            products = self.matmul(self.along(self.keys, shared.k, shared.q, transpose_b=True))
            dlog -= jnp.where(self.itself, 0.0, products * dscores_back).sum(axis=1)
            dlog = dlog * (side == 0).astype(jnp.float32)  # both have it
        dscores, dscores_back = dscores.astype(dtype), dscores_back.astype(dtype)
        damong = (damong + damong_back).astype(dtype)
        dq = self.by_tokens(self.inputs.reads, self.matmul(self.from_state(shared.dout, shared.states)) * self.scale)
        if with_decay:
            dlog += self.dots(q, dq)
        self.write(outputs.dq, self.matmul([(dscores, k, False, False)], acc=dq))
        said = self.by_tokens(self.inputs.reads, -self.matmul(self.from_state(shared.dv, shared.states)))
        to_state = self.matmul(self.from_state(shared.written, shared.dstates, transpose_a=True))
        to_state = self.by_tokens(self.inputs.writes, to_state)
        if with_decay:
            to_end = self.dots(k, to_state)
            self.of_side(outputs.to_end)[...] = to_end
            self.of_side(outputs.dlog)[...] = dlog + self.dots(k, said) - to_end
            kept = None
            for i in range(self.values):
                both = (x.at[i * self.keys + side] for x in (shared.states, shared.dstates))
                state, dstate = (plgpu.load(x, layout=MATRIX).astype(jnp.float32) for x in both)
                kept = state * dstate if kept is None else kept + state * dstate
            outputs.kept.at[side, self.batch, self.head, self.chunk][...] = kept.sum(axis=1)
        dk = self.matmul([(dscores_back, q, False, False), (damong, k, False, False)], acc=said + to_state)
        self.write(outputs.dk, dk)

    def from_state(self, values, states, *, transpose_a: bool = False):
        """Of the values' columns and a state the keys' columns."""
        return [
            (values.at[i], states.at[i * self.keys + self.side], transpose_a, False) for i in range(self.values)
        ]  # fmt: skip

    def dots(self, tile, x):
        """Products of a tile's rows with those of x."""
        return (plgpu.load(tile, layout=MATRIX).astype(jnp.float32) * x).sum(axis=1)

    def by_tokens(self, factors, x):
        """x times the factor of each token."""
        if factors is None:
            return x
        at = factors.at[self.batch, self.head, self.tokens]
        return x * spread(plgpu.load(at, layout=ROW, optimized=False), 0)

    def of_side(self, ref):
        return ref.at[self.side, self.batch, self.head, self.tokens]

    def write(self, target, x) -> None:
        staged = self.shared.out.at[self.side]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staged[...] = x.astype(staged.dtype)
        plgpu.commit_smem()
        columns = pl.ds(self.side * CHUNK, CHUNK)
        plgpu.copy_smem_to_gmem(staged, target.at[self.batch, self.tokens, self.head, columns])

    def along(self, num: int, a, b, *, transpose_a: bool = False, transpose_b: bool = False):
        """The factors of a product over all columns."""
        return [(a.at[i], b.at[i], transpose_a, transpose_b) for i in range(num)]

    def matmul(self, factors, **options):
        """`tiles.matmul` by this warpgroup."""
        return matmul(factors, interpret=self.interpret, **options)

"""The gradients of a delta rule within its chunks on Hopper GPUs (Mosaic GPU): dq, dk, dbeta and what the gradient of a
decay is made of, from the states before and their cotangents after each chunk. See prepared.py for the maths.

Grid: two warpgroups for a chunk of a head, each with 64 columns of the keys and 64 of the values. Everything is in
tiles of 64 x 64, in shared memory as it comes from memory. What tokens are to each other, `[64, 64]`, goes there too,
by the first warpgroup what queries read, by the second what keys do; then both multiply with both, either way round."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear.pallas_mosaic_gpu_chain import CHUNK
from pallas_kernels.linear.pallas_mosaic_gpu_tiles import matmul, spread
from pallas_kernels.mosaic_gpu import NAMED_BARRIERS, WARPGROUP, sync
from pallas_kernels.wgmma import MATRIX, ROW, TRANSFORMS

_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_LOG2_E = math.log2(math.e)
_SIDES = 2
_OF_TOKENS = ("cumulative", "reads", "writes", "document")


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
      dlog: The derivative by the log decay up to a token, but for what tokens are to each other and less `to_end`,
        float32 `[sides, B, N, T']`; None where it is not asked for.
      reading, read: That derivative of what tokens read of others, and its negative of what others read of them.
      to_end: The same of what a token writes, which has the decay from there to the chunk's end.
      kept: State times cotangent of the state, float32 `[sides, B, N, n, 64]`, to be summed.
    """

    dq: Any
    dk: Any
    dbeta: Any
    dlog: Any
    reading: Any
    read: Any
    to_end: Any
    kept: Any


class _Shared(NamedTuple):
    """Shared memory: tiles `[64, 64]`, what there is of each token, and the barrier that says when they are full. Tiles
    of q come before those of k, those of dout before those of dv. `among` is scores and, negative, the system; `damong`
    are their cotangents."""

    keys: Any
    values: Any
    v: Any
    written: Any
    states: Any
    dstates: Any
    cumulative: Any
    reads: Any
    writes: Any
    document: Any
    among: Any
    damong: Any
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
        reading=of_tokens if with_decay else None,
        read=of_tokens if with_decay else None,
        to_end=of_tokens if with_decay else None,
        kept=jax.ShapeDtypeStruct((_SIDES, B, N, num_chunks, CHUNK), jnp.float32) if with_decay else None,
    )

    def tiles(*shape):
        return plgpu.SMEM((*shape, CHUNK, CHUNK), dtype, transforms=TRANSFORMS)

    keys, values = H // CHUNK, V // CHUNK
    of_chunk = {name: getattr(inputs, name) for name in _OF_TOKENS}
    of_chunk = {name: None if x is None else plgpu.SMEM((CHUNK,), x.dtype) for name, x in of_chunk.items()}
    num_of_chunk = sum(x is not None for x in of_chunk.values())
    shared = _Shared(
        keys=tiles(2 * keys),
        values=tiles(2 * values),
        v=tiles(values),
        written=tiles(values),
        states=tiles(values * keys),
        dstates=tiles(values * keys),
        **of_chunk,
        among=tiles(_SIDES),
        damong=tiles(_SIDES),
        out=tiles(_SIDES),
        full=plgpu.Barrier(num_arrivals=2 * keys + 4 * values + 2 * keys * values + num_of_chunk),
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
        self.keys, self.values = shared.keys.shape[0] // 2, shared.v.shape[0]
        self.tokens = pl.ds(self.chunk * CHUNK, CHUNK)

    def run(self) -> None:
        pl.when(self.side == 0)(self.load)
        plgpu.barrier_wait(self.shared.full)
        self.of_each_other()
        for num, gradients_of_side in ((self.values, self.strengths), (self.keys, self.queries_and_keys)):
            if num == _SIDES:
                gradients_of_side()
            else:
                pl.when(self.side < num)(gradients_of_side)
        plgpu.wait_smem_to_gmem(0)

    def load(self) -> None:
        shared, of_head = self.shared, (self.batch, self.head, self.chunk)
        of_keys, of_values = (
            [x.at[pl.ds(i * num, num)] for i in (0, 1)]
            for x, num in ((shared.keys, self.keys), (shared.values, self.values))
        )
        targets = {"q": of_keys[0], "k": of_keys[1], "dout": of_values[0], "dv": of_values[1], "v": shared.v}
        for name, target in targets.items():
            source = getattr(self.inputs, name)
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
        for name in _OF_TOKENS:
            source = getattr(self.inputs, name)
            if source is not None:
                heads = () if name == "document" else (self.head,)
                plgpu.copy_gmem_to_smem(source.at[self.batch, *heads, self.tokens], getattr(shared, name), shared.full)

    # What tokens are to each other.

    def of_each_other(self) -> None:
        """Scores and their cotangent, or the same of the system; readers in rows."""
        shared, side, outputs = self.shared, self.side, self.outputs
        log_row, document_row = self.of_tokens(ROW)
        # Between two reads of the same in two layouts, which the compiler takes for one.
        among = [(self.key(side, i), self.key(1, i), False, True) for i in range(self.keys)]
        among = self.matmul(among)
        log_column, document_column = self.of_tokens(_COLUMN)
        damong = self.matmul([(self.value(side, i), shared.written.at[i], False, False) for i in range(self.values)])
        row, column = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i, layout=MATRIX) for i in (0, 1))
        seen = row > column - (side == 0).astype(jnp.int32)  # a score is also of a token with itself
        if document_row is not None:
            rows = spread(document_row, 0)
            seen &= (rows == spread(document_column, 1)) & (rows >= 0)
        decay = jnp.where(seen, jnp.where(side == 0, self.scale, -1.0), 0.0)
        if log_row is not None:
            decay = decay * jnp.exp2(jnp.where(seen, spread(log_row, 0) - spread(log_column, 1), 0.0))
        among = among * decay
        for target, x in ((shared.among, among), (shared.damong, decay * damong)):
            target.at[side][...] = x.astype(target.dtype)
        plgpu.commit_smem()
        both = NAMED_BARRIERS.start, _SIDES * WARPGROUP
        if outputs.dlog is None:
            sync(*both)
            return
        dlog = jnp.where(row == column, 0.0, among * damong)
        self.of_side(outputs.reading)[...] = dlog.sum(axis=1)

        def put() -> None:
            self.of_side(outputs.read)[...] = dlog.sum(axis=0)

        # One warpgroup after the other: a sum over warps goes through memory that the compiler has but once.
        for i in range(_SIDES):
            pl.when(side == i)(put)
            sync(*both)

    def of_tokens(self, layout):
        """Log decay (base 2) and document of the chunk's tokens."""
        cumulative, document = (
            None if x is None else plgpu.load(x, layout=layout, optimized=False)
            for x in (self.shared.cumulative, self.shared.document)
        )
        return None if cumulative is None else cumulative * _LOG2_E, document

    def key(self, which, i):
        """Columns of the queries, 0, or the keys, 1."""
        return self.shared.keys.at[which * self.keys + i]

    def value(self, which, i):
        """Columns of dout, 0, or dv, 1."""
        return self.shared.values.at[which * self.values + i]

    # The values' columns.

    def strengths(self) -> None:
        """dbeta."""
        shared, side = self.shared, self.side
        v, dout, dv, written = shared.v.at[side], self.value(0, side), self.value(1, side), shared.written.at[side]
        scores, system = (shared.among.at[i] for i in (0, 1))
        dwritten = self.by_tokens(self.shared.writes, self.matmul(self.state(shared.dstates)))
        dwritten += self.matmul([(scores, dout, True, False), (system, dv, True, False)])
        error = plgpu.load(v, layout=MATRIX).astype(jnp.float32)
        error -= self.by_tokens(self.shared.reads, self.matmul(self.state(shared.states)))
        error += self.matmul([(system, written, False, True)])
        self.of_side(self.outputs.dbeta)[...] = (dwritten * error).sum(axis=1)

    def state(self, states):
        """k times the columns of a state."""
        return [
            (self.key(1, j), states.at[self.side * self.keys + j], False, True) for j in range(self.keys)
        ]  # fmt: skip

    # The keys' columns.

    def queries_and_keys(self) -> None:
        """dq, dk and the derivative by the log decays."""
        shared, side, outputs = self.shared, self.side, self.outputs
        q, k, with_decay = self.key(0, side), self.key(1, side), outputs.dlog is not None
        dscores, dsystem = (shared.damong.at[i] for i in (0, 1))
        dq = self.by_tokens(self.shared.reads, self.matmul(self.from_state(0, shared.states)) * self.scale)
        dlog = self.dots(q, dq) if with_decay else None
        self.write(outputs.dq, dq + self.matmul([(dscores, k, False, False)]))
        said = self.by_tokens(self.shared.reads, -self.matmul(self.from_state(1, shared.states)))
        written = [
            (shared.written.at[i], shared.dstates.at[i * self.keys + side], True, False) for i in range(self.values)
        ]  # fmt: skip
        to_state = self.by_tokens(self.shared.writes, self.matmul(written))
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
        both_ways = [(dscores, q, True, False), (dsystem, k, False, False), (dsystem, k, True, False)]
        self.write(outputs.dk, said + to_state + self.matmul(both_ways))

    def from_state(self, which, states):
        """Of the values' columns, as `value` names them, and a state the keys' columns."""
        return [
            (self.value(which, i), states.at[i * self.keys + self.side], False, False) for i in range(self.values)
        ]  # fmt: skip

    def dots(self, tile, x):
        """Products of a tile's rows with those of x."""
        return (plgpu.load(tile, layout=MATRIX).astype(jnp.float32) * x).sum(axis=1)

    def by_tokens(self, factors, x):
        """x times the factor of each token."""
        if factors is None:
            return x
        return x * spread(plgpu.load(factors, layout=ROW, optimized=False), 0)

    def of_side(self, ref):
        return ref.at[self.side, self.batch, self.head, self.tokens]

    def write(self, target, x) -> None:
        staged = self.shared.out.at[self.side]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staged[...] = x.astype(staged.dtype)
        plgpu.commit_smem()
        columns = pl.ds(self.side * CHUNK, CHUNK)
        plgpu.copy_smem_to_gmem(staged, target.at[self.batch, self.tokens, self.head, columns])

    def matmul(self, factors, **options):
        """`tiles.matmul` by this warpgroup."""
        return matmul(factors, interpret=self.interpret, **options)

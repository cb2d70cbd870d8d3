"""The gradients of decays of each dim of the keys within their chunks on Hopper GPUs (Mosaic GPU): dq, dk and ddecay,
from the states before and their cotangents after each chunk. See prepared.py for the maths.

Grid: two warpgroups for a chunk of a head, each with 64 columns of the keys, which do not need each other. Decays are
made as in pallas_mosaic_gpu_levels.py, and go to shared memory twice for each level: as factors of what a matmul gives,
and in what it multiplies."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear import pallas_mosaic_gpu_levels as levels
from pallas_kernels.linear.pallas_mosaic_gpu_chain import CHUNK
from pallas_kernels.linear.pallas_mosaic_gpu_tiles import matmul, spread
from pallas_kernels.linear.prepared import LEVELS
from pallas_kernels.mosaic_gpu import NAMED_BARRIERS, WARPGROUP, sync
from pallas_kernels.wgmma import MATRIX, ROW, TRANSFORMS

_COLUMN = plgpu.Layout.WGMMA.reduce(0)


class Inputs(NamedTuple):
    """What the kernel reads.

    Attributes:
      q, k: 16 bits `[B, T, K, H]`.
      v, dout: 16 bits `[B, T, N, V]`.
      decay: Its log, float32 `[B, T, N, H]`.
      states, dstates: Before and after each chunk, 16 bits `[B, N, n, V, H]`.
      keeps: float32 `[B, N, n, H]`.
      reads, writes: float32 `[B, N, T']`, of documents alone; None for one document.
      document: int32 `[B, T']`; None for one document.
    """

    q: Any
    k: Any
    v: Any
    dout: Any
    decay: Any
    states: Any
    dstates: Any
    keeps: Any
    reads: Any
    writes: Any
    document: Any


class Outputs(NamedTuple):
    """16 bits `[B, T, N, H]`, and ddecay float32."""

    dq: Any
    dk: Any
    ddecay: Any


class _Shared(NamedTuple):
    """Shared memory: tiles `[64, 64]`, and the barrier that says when they are full."""

    q: Any
    k: Any
    v: Any
    dout: Any
    decay: Any
    states: Any
    dstates: Any
    reads: Any
    writes: Any
    operand: Any
    factors: Any
    at_end: Any
    full: Any


def gradients(inputs: Inputs, *, num_heads: int, scale: float, interpret) -> Outputs:
    """Runs the kernel."""
    (B, T, _, H), (N, num_chunks, V), dtype = inputs.q.shape, inputs.states.shape[1:4], inputs.q.dtype
    outputs = Outputs(
        dq=jax.ShapeDtypeStruct((B, T, N, H), dtype),
        dk=jax.ShapeDtypeStruct((B, T, N, H), dtype),
        ddecay=jax.ShapeDtypeStruct((B, T, N, H), jnp.float32),
    )

    def tiles(num):
        return plgpu.SMEM((num, CHUNK, CHUNK), dtype, transforms=TRANSFORMS)

    def row(x):
        return None if x is None else plgpu.SMEM((CHUNK,), jnp.float32)

    keys, values = H // CHUNK, V // CHUNK
    shared = _Shared(
        q=tiles(keys),
        k=tiles(keys),
        v=tiles(values),
        dout=tiles(values),
        decay=plgpu.SMEM((keys, CHUNK, CHUNK), jnp.float32),
        states=tiles(values * keys),
        dstates=tiles(values * keys),
        reads=row(inputs.reads),
        writes=row(inputs.writes),
        operand=tiles(keys),
        factors=tiles(keys),
        at_end=plgpu.SMEM((keys, CHUNK), jnp.float32),
        full=plgpu.Barrier(num_arrivals=3 * keys + 2 * values + 2 * keys * values + 2 * (inputs.reads is not None)),
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
        num_threads=keys,
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

    def load(self) -> None:
        shared, of_head = self.shared, (self.batch, self.head, self.chunk)
        for name in ("decay", "q", "k", "dout", "v"):
            source, target = getattr(self.inputs, name), getattr(shared, name)
            head = lax.div(self.head, self.num_heads // source.shape[2])
            for i in range(target.shape[0]):
                columns = source.at[self.batch, self.tokens, head, pl.ds(i * CHUNK, CHUNK)]
                plgpu.copy_gmem_to_smem(columns, target.at[i], shared.full)
        for name in ("states", "dstates"):
            for i in range(self.values):
                for j in range(self.keys):
                    tile = getattr(self.inputs, name).at[*of_head, pl.ds(i * CHUNK, CHUNK), pl.ds(j * CHUNK, CHUNK)]
                    plgpu.copy_gmem_to_smem(tile, getattr(shared, name).at[i * self.keys + j], shared.full)
        if self.inputs.reads is not None:
            for name in ("reads", "writes"):
                row = getattr(self.inputs, name).at[self.batch, self.head, self.tokens]
                plgpu.copy_gmem_to_smem(row, getattr(shared, name), shared.full)

    def run(self) -> None:
        pl.when(self.side == 0)(self.load)
        shared, side = self.shared, self.side
        plgpu.barrier_wait(shared.full)
        if not self.interpret:
            levels.exponentials(shared.decay)
        row, column = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i, layout=MATRIX) for i in (0, 1))
        dscores = self.dscores(row, column)
        zero = jnp.zeros((), dscores.dtype)
        itself = jnp.where(row == column, dscores, zero)
        dq = self.matmul([(itself, shared.k.at[side], False, False)])
        dk = self.matmul([(itself, shared.q.at[side], False, False)])
        self.whole_chunk(shared.q, reverse=False)
        by_state = self.matmul(self.from_state(shared.dout, shared.states)) * self.scale
        dq += self.tile(shared.factors) * by_state
        dlog = self.tile(shared.operand) * by_state
        plgpu.commit_smem()
        self.whole_chunk(shared.k, reverse=True)
        to_state = self.matmul(self.from_state(shared.v, shared.dstates))
        dk += self.tile(shared.factors) * to_state
        to_state = self.tile(shared.operand) * to_state
        dlog -= to_state
        self.put_at_end(to_state)
        apart = row ^ column
        for size in LEVELS:
            plgpu.commit_smem()  # a warp may be ahead of another's matmul
            self.level(size)
            pairs = jnp.where((apart >= size) & (apart < 2 * size), dscores, zero)
            back = self.matmul([(pairs, shared.operand.at[side], False, False)])
            later = (row & size) != 0
            of_log = self.tile(shared.operand) * back
            dlog += jnp.where(later, of_log, -of_log)
            back = self.tile(shared.factors) * back
            dq += jnp.where(later, back, 0.0)
            dk += jnp.where(later, 0.0, back)
        plgpu.commit_smem()
        columns = pl.ds(side * CHUNK, CHUNK)
        for x, staged in ((dq, shared.operand), (dk, shared.factors)):
            staged.at[side][...] = x.astype(staged.dtype)
        shared.decay.at[side][...] = dlog
        plgpu.commit_smem()
        self.sum_from()
        plgpu.commit_smem()
        for staged, target in (
            (shared.operand, self.outputs.dq), (shared.factors, self.outputs.dk), (shared.decay, self.outputs.ddecay)
        ):  # fmt: skip
            plgpu.copy_smem_to_gmem(staged.at[side], target.at[self.batch, self.tokens, self.head, columns])
        plgpu.wait_smem_to_gmem(0)

    def dscores(self, row, column):
        """The cotangent of the scores below the diagonal, its transpose above: 16 bits `[64, 64]`."""
        shared = self.shared
        of_row = self.document(ROW)
        below = self.matmul([(shared.dout.at[i], shared.v.at[i], False, True) for i in range(self.values)])
        above = self.matmul([(shared.v.at[i], shared.dout.at[i], False, True) for i in range(self.values)])
        dscores = jnp.where(row >= column, below, above) * self.scale
        if of_row is not None:
            rows, columns = spread(of_row, 0), spread(self.document(_COLUMN), 1)
            dscores = jnp.where((rows == columns) & (rows >= 0), dscores, 0.0)
        return dscores.astype(shared.q.dtype)

    def document(self, layout):
        if self.inputs.document is None:
            return None
        return plgpu.load(self.inputs.document.at[self.batch, self.tokens], layout=layout, optimized=False)

    def put_at_end(self, to_state) -> None:
        """The derivative by the log decay up to the chunk's end."""
        shared, kept = self.shared, None
        for i in range(self.values):
            both = (x.at[i * self.keys + self.side] for x in (shared.states, shared.dstates))
            state, dstate = (plgpu.load(x, layout=MATRIX).astype(jnp.float32) for x in both)
            kept = state * dstate if kept is None else kept + state * dstate
        columns = pl.ds(self.side * CHUNK, CHUNK)
        keeps = self.inputs.keeps.at[self.batch, self.head, self.chunk, columns]
        keeps = spread(plgpu.load(keeps, layout=_COLUMN, optimized=False), 1)
        of_tokens = to_state + keeps * kept

        def put() -> None:
            shared.at_end.at[self.side][...] = of_tokens.sum(axis=0)

        # One warpgroup after the other: a sum over warps goes through memory that the compiler has but once.
        for side in range(self.keys):
            pl.when(self.side == side)(put)
            sync(NAMED_BARRIERS.start, self.keys * WARPGROUP)

    # Decays.

    def whole_chunk(self, source, *, reverse: bool) -> None:
        shared = self.shared
        of_documents = shared.writes if reverse else shared.reads
        if self.interpret:
            log = shared.decay.at[self.side][...]
            upto = jnp.cumsum(log, axis=0)
            factors = jnp.exp(upto[-1] - upto if reverse else upto)
            factors = factors if of_documents is None else factors * of_documents[...][:, None]
            self.put(factors, factors * source.at[self.side][...].astype(jnp.float32))
        else:
            levels.whole_chunk(source, shared.decay, of_documents, shared.operand, shared.factors, reverse=reverse)
        plgpu.commit_smem()

    def level(self, size: int) -> None:
        shared = self.shared
        if self.interpret:
            q, k, log = (x.at[self.side][...] for x in (shared.q, shared.k, shared.decay))
            self.put(*levels.interpreted_level(q, k, log, size))
        else:
            levels.level(shared.q, shared.k, shared.decay, shared.operand, size, shared.factors)
        plgpu.commit_smem()

    def put(self, factors, operand) -> None:
        for target, x in ((self.shared.factors, factors), (self.shared.operand, operand)):
            target.at[self.side][...] = x.astype(target.dtype)

    def sum_from(self) -> None:
        """Sums the derivatives by the log decay up to a token from each token on."""
        decay, at_end = self.shared.decay, self.shared.at_end
        if self.interpret:
            dlog = decay.at[self.side][...]
            sums = jnp.sum(dlog, axis=0) - jnp.cumsum(dlog, axis=0) + dlog
            decay.at[self.side][...] = sums + at_end.at[self.side][...]
        else:
            levels.sum_from(decay, at_end)

    def tile(self, tiles):
        return plgpu.load(tiles.at[self.side], layout=MATRIX).astype(jnp.float32)

    def from_state(self, values, states):
        """Of the values' columns and a state the keys' columns."""
        return [(values.at[i], states.at[i * self.keys + self.side], False, False) for i in range(self.values)]

    def matmul(self, factors, **options):
        """`tiles.matmul` by this warpgroup."""
        return matmul(factors, interpret=self.interpret, **options)

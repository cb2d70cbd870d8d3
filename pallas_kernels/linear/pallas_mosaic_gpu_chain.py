"""The states of a row from chunk to chunk on Hopper GPUs (Mosaic GPU), where they decay by each row or are corrected by
a delta rule: see prepared.py for what it is handed, and for the maths.

Grid: a block of threads for a part of a row of one head and 64 columns of its values. A producer warpgroup copies
chunks of 64 tokens into shared memory (TMA, several stages ahead). The chain's warpgroup has the state, transposed,
`[64 columns, H]` in float32, in registers: as such it is the left operand of the next matmul without a detour through
shared memory, and what it reads and writes, `[64 columns, 64 tokens]`, is in its turn. That chain of three matmuls a
chunk is what takes the time, so that all that is not in it is left to a third warpgroup: what tokens read, from a copy
of the state in 16 bits, and what goes to memory.

Where there are few rows and heads the parts of a row of a delta rule are swept side by side too. Their maps come first:
the same chain from a state of zero, and in the place of the third warpgroup, by the same keys, from the identity, of
which a block has 64 columns.

Reference: Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule over Sequence Length,
arXiv:2406.06484, section 3; Yang et al. 2024, Gated Linear Attention, arXiv:2312.06635, section 4.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike

from pallas_kernels.linear.pallas_mosaic_gpu_tiles import spread
from pallas_kernels.mosaic_gpu import NAMED_BARRIERS, WARPGROUP, arrive, do_not_unroll, sync
from pallas_kernels.wgmma import MATRIX, ROW, TRANSFORMS

CHUNK = 64
COLUMNS = 64
"""Of the values and of the state that a block of threads has."""
_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_MOST_STAGES = 4
_NUM_STATES = 2  # copies for the third warpgroup, which may be a chunk behind
_SMEM_BYTES = 227 * 1024 - 4096  # less barriers, and what the compiler takes
_CHAIN, _READER, _PRODUCER = range(3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is static of a call.

    Attributes:
      reverse: Whether it is the cotangent of the state that is carried, from the last token to the first.
      scale: Multiplies what is read, unless q has it.
      part_chunks: Chunks of each part but the last.
      starts: Whether to return the state before each part: the row is then one run, not several.
      maps: Whether to return the maps of the parts of a delta rule, without the last in the direction of the sweep,
        from which nothing goes on. Nothing else is then returned.
      snapshots: Whether to return the state before each chunk in the direction of the sweep and, of a delta rule
        forward, what is written.
      interpret: Whether to run on a CPU, in JAX's interpreter.
    """

    reverse: bool
    scale: float
    part_chunks: int
    starts: bool = False
    maps: bool = False
    snapshots: bool = False
    interpret: Any = None


class Inputs(NamedTuple):
    """What the kernel reads; None where there is nothing to read.

    Attributes:
      q, k: 16 bits `[B, T, heads, H]`. Without q nothing is read of the state, forward.
      v: 16 bits `[B, T, N, V]`; in reverse dout.
      scores, solve: 16 bits `[B, N, T' / CHUNK, CHUNK, CHUNK]`.
      reads, writes: float32 `[B, N, T']`.
      keeps: float32 `[B, N, T' / CHUNK, H]`. None of a delta rule: the last of `reads` of each chunk.
      before: The state before each part in the direction of the sweep, transposed, float32 `[B, P, N, V, H]`; with
        `Config.starts` that before the first. None: zeros.
    """

    q: Any
    k: Any
    v: Any
    scores: Any
    solve: Any
    reads: Any
    writes: Any
    keeps: Any
    before: Any


class Outputs(NamedTuple):
    """What it writes; None where it is not asked for.

    Attributes:
      out: `[B, T, N, V]`; in reverse dv.
      end: The state after each part in the direction of the sweep, float32 `[B, P, N, V, H]`.
      starts: The state before each part, float32 `[B, P, N, V, H]`.
      decays: The matrix by which a state before each part is multiplied, transposed, float32 `[B, P, N, H, H]`; with it
        `end` is what is added.
      snapshots: 16 bits `[B, N, T' / CHUNK, V, H]`.
      written: What the delta rule writes, transposed, 16 bits `[B, N, T' / CHUNK, V, CHUNK]`.
    """

    out: Any
    end: Any
    starts: Any
    decays: Any
    snapshots: Any
    written: Any


class _Shared(NamedTuple):
    """Shared memory, and the barriers that say when it is full."""

    q: Any
    k: Any
    v: Any
    scores: Any
    solve: Any
    reads: Any
    writes: Any
    keeps: Any
    state: Any
    out: Any
    full: Any


def sweep(inputs: Inputs, *, num_heads: int, length: int, config: Config) -> Outputs:
    """Runs the kernel over `length` tokens, of which arrays may have a few more."""
    (B, T, _, V), H = inputs.v.shape, inputs.k.shape[3]
    num_chunks = -(-length // CHUNK)
    num_parts = -(-num_chunks // config.part_chunks)
    num_runs = 1 if config.starts else num_parts - config.maps
    num_sides = (max(V, H) if config.maps else V) // COLUMNS
    dtype = inputs.v.dtype
    writes_values = config.snapshots and inputs.solve is not None and not config.reverse
    reads_state = inputs.q is not None and not config.maps
    outputs = Outputs(
        out=jax.ShapeDtypeStruct((B, T, num_heads, V), dtype) if reads_state else None,
        end=jax.ShapeDtypeStruct((B, num_runs, num_heads, V, H), jnp.float32),
        starts=jax.ShapeDtypeStruct((B, num_parts, num_heads, V, H), jnp.float32) if config.starts else None,
        decays=jax.ShapeDtypeStruct((B, num_runs, num_heads, H, H), jnp.float32) if config.maps else None,
        snapshots=jax.ShapeDtypeStruct((B, num_heads, num_chunks, V, H), dtype) if config.snapshots else None,
        written=jax.ShapeDtypeStruct((B, num_heads, num_chunks, V, CHUNK), dtype) if writes_values else None,
    )
    input_leaves, input_tree = jax.tree.flatten(inputs)
    output_leaves, output_tree = jax.tree.flatten(outputs)
    scratch_leaves, scratch_tree = jax.tree.flatten(_scratch(inputs, config))

    def body(*refs):
        refs = iter(refs)
        given = (
            jax.tree.unflatten(tree, itertools.islice(refs, tree.num_leaves))
            for tree in (input_tree, output_tree, scratch_tree)
        )
        _Block(config, num_heads, num_chunks, num_runs, num_sides, *given).run()

    results = plgpu.kernel(
        body,
        out_type=output_leaves,
        grid=(B * num_runs * num_heads * num_sides,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=scratch_leaves,
        # What a thread writes into shared memory and reads there, it has written itself.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=config.interpret,
    )(*input_leaves)
    return jax.tree.unflatten(output_tree, results)


def _scratch(inputs: Inputs, config: Config) -> _Shared:
    H, dtype = inputs.k.shape[3], inputs.v.dtype
    square = CHUNK * COLUMNS * dtype.itemsize
    keys, squares = (sum(x is not None for x in of) for of in ((inputs.q, inputs.k), inputs[2:5]))
    rows = [x for x in (inputs.reads, inputs.writes) if x is not None]
    of_stage = (keys * H // 64 + squares) * square + (len(rows) * CHUNK + (inputs.keeps is not None) * H) * 4
    fixed = 0 if config.maps else (_NUM_STATES * H // 64 + (inputs.q is not None)) * square
    num_stages = min(_MOST_STAGES, (_SMEM_BYTES - fixed) // of_stage)

    def smem(*shape):
        return plgpu.SMEM(shape, dtype, transforms=TRANSFORMS)

    def of_stages(x, *shape):
        return None if x is None else smem(num_stages, *shape)

    def row(x, length):
        return None if x is None else plgpu.SMEM((num_stages, length), jnp.float32)

    copies = keys + squares + len(rows) + (inputs.keeps is not None)
    return _Shared(
        q=of_stages(inputs.q, CHUNK, H),
        k=of_stages(inputs.k, CHUNK, H),
        v=of_stages(inputs.v, CHUNK, COLUMNS),
        scores=of_stages(inputs.scores, CHUNK, CHUNK),
        solve=of_stages(inputs.solve, CHUNK, CHUNK),
        reads=row(inputs.reads, CHUNK),
        writes=row(inputs.writes, CHUNK),
        keeps=row(inputs.keeps, H),
        state=None if config.maps else smem(_NUM_STATES, COLUMNS, H),
        out=None if inputs.q is None or config.maps else smem(CHUNK, COLUMNS),
        full=plgpu.Barrier(num_arrivals=copies, num_barriers=num_stages),
    )


class _Block:
    """What one block of threads does."""

    def __init__(
        self, config: Config, num_heads: int, num_chunks: int, num_runs: int, num_sides: int, inputs: Inputs,
        outputs: Outputs, shared: _Shared,
    ):  # fmt: skip
        self.config, self.num_heads = config, num_heads
        self.inputs, self.outputs, self.shared = inputs, outputs, shared
        self.num_stages = shared.k.shape[0]
        number = lax.axis_index("block")
        self.side, number = lax.rem(number, num_sides), lax.div(number, num_sides)
        self.head, number = lax.rem(number, num_heads), lax.div(number, num_heads)
        self.part, self.batch = lax.rem(number, num_runs), lax.div(number, num_runs)
        chunks_of_run = num_chunks if config.starts else config.part_chunks
        first_part = self.part + (1 if config.maps and config.reverse else 0)
        self.first_chunk = first_part * chunks_of_run
        self.num_chunks = jnp.minimum(chunks_of_run, num_chunks - self.first_chunk)
        self.of_values = self.columns(inputs.v.shape[3])
        self.free = NAMED_BARRIERS.start
        self.ready = self.free + self.num_stages
        self.done = self.ready + _NUM_STATES
        self.scaled = self.done + _NUM_STATES
        self.chain_alone = self.scaled + 1

    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == _CHAIN)
        def _():
            plgpu.set_max_registers(232, action="increase")
            if self.config.maps:
                self.map_part(self.outputs.end, of_values=True)
            else:
                self.carry()

        @pl.when(warpgroup == _READER)
        def _():
            plgpu.set_max_registers(232, action="increase")
            if self.config.maps:
                self.map_part(self.outputs.decays, of_values=False)
            else:
                self.read()

        @pl.when(warpgroup == _PRODUCER)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            self.produce()

    def columns(self, width: int):
        """Those that the block has of an array of `width` columns; the last where it has fewer."""
        return pl.ds(jnp.minimum(self.side, width // COLUMNS - 1) * COLUMNS, COLUMNS)

    def chunk(self, i) -> ArrayLike:
        return self.first_chunk + (self.num_chunks - 1 - i if self.config.reverse else i)

    # The producer.

    def produce(self) -> None:
        @pl.loop(0, self.num_chunks)
        def _(i):
            if not self.config.interpret:
                do_not_unroll()
            slot, chunk = lax.rem(i, self.num_stages), self.chunk(i)
            inputs, shared, full = self.inputs, self.shared, self.shared.full.at[slot]
            sync(self.free + slot, 3 * WARPGROUP)
            for name in ("q", "k"):
                self.copy(self.tokens(getattr(inputs, name), chunk), getattr(shared, name), slot, full)
            self.copy(self.tokens(inputs.v, chunk, self.of_values), shared.v, slot, full)
            for name in ("scores", "solve", "keeps"):
                source = getattr(inputs, name)
                source = None if source is None else source.at[self.batch, self.head, chunk]
                self.copy(source, getattr(shared, name), slot, full)
            for name in ("reads", "writes"):
                source = getattr(inputs, name)
                source = None if source is None else source.at[self.batch, self.head, pl.ds(chunk * CHUNK, CHUNK)]
                self.copy(source, getattr(shared, name), slot, full)

    def copy(self, source, target, slot, full) -> None:
        if source is not None:
            plgpu.copy_gmem_to_smem(source, target.at[slot], full)

    def tokens(self, ref, chunk, *columns):
        """A chunk of an array `[B, T, heads, dim]`."""
        if ref is None:
            return None
        head = lax.div(self.head, self.num_heads // ref.shape[2])
        return ref.at[self.batch, pl.ds(chunk * CHUNK, CHUNK), head, *columns]

    # The chain.

    def carry(self) -> None:
        for stage in range(self.num_stages):
            arrive(self.free + stage, 3 * WARPGROUP)
        if self.inputs.before is None:
            state = self.zeros()
        else:
            state = plgpu.load(self.of_part(self.inputs.before), layout=MATRIX, optimized=False)
        # Without q it adds up what is written, in either direction.
        step = self.step_back if self.config.reverse and self.inputs.q is not None else self.step

        def one(i, state):
            if self.config.starts:
                self.put_start(i, state)
            slot = lax.rem(i, self.num_stages)
            plgpu.barrier_wait(self.shared.full.at[slot])
            copy = lax.rem(i, _NUM_STATES)
            sync(self.done + copy, 2 * WARPGROUP)
            operand = state.astype(self.inputs.v.dtype)
            self.shared.state.at[copy][...] = operand
            state = step(slot, copy, state, operand)
            arrive(self.free + slot, 3 * WARPGROUP)
            return state

        state = lax.fori_loop(0, self.num_chunks, one, state)
        self.of_part(self.outputs.end)[...] = state

    def zeros(self):
        return plgpu.layout_cast(jnp.zeros((COLUMNS, self.inputs.k.shape[3]), jnp.float32), MATRIX)

    def of_part(self, ref, part=None):
        return ref.at[self.batch, self.part if part is None else part, self.head, self.columns(ref.shape[3])]

    def put_start(self, i, state) -> None:
        @pl.when(lax.rem(i, self.config.part_chunks) == 0)
        def _():
            self.of_part(self.outputs.starts, lax.div(i, self.config.part_chunks))[...] = state

    def step(self, slot, copy, state, operand):
        """One chunk: its values, corrected by what the state says of its keys, and the state after it."""
        shared = self.shared
        k, v = shared.k.at[slot], shared.v.at[slot]
        if shared.solve is None:
            plgpu.commit_smem()
            arrive(self.ready + copy, 2 * WARPGROUP)
            return self.matmul(v, k, acc=self.kept(slot, state), transpose_a=True)
        reads, writes, kept = *self.factors(slot), self.kept(slot, state)
        written = self.written(slot, operand, v, reads)
        self.end_matmuls()
        v[...] = written.astype(v.dtype)  # transposed: what readers multiply
        plgpu.commit_smem()
        arrive(self.ready + copy, 2 * WARPGROUP)
        return self.matmul(_by_tokens(writes, written).astype(v.dtype), k, acc=kept)

    def end_matmuls(self) -> None:
        """A warp may be ahead of another's matmul, which reads what is written next."""
        if self.config.interpret:
            plgpu.commit_smem()  # ordinary reads, see `matmul`
        else:
            sync(self.chain_alone, WARPGROUP)

    def written(self, slot, operand, v, reads):
        """What a delta rule writes of values, or of none, to a state: `[columns, tokens]`."""
        k, solve = self.shared.k.at[slot], self.shared.solve.at[slot]
        if v is None:
            said, of_values = self.matmul(operand, k, transpose_b=True), None
        else:
            said, of_values = self.products((operand, k, False, True), (v, solve, True, True))
        said = _by_tokens(reads, said)
        return self.matmul((-said).astype(operand.dtype), solve, acc=of_values, transpose_b=True)

    def step_back(self, slot, copy, state, operand):
        """One chunk: the cotangent of what it writes and of its values, and that of the state before it."""
        shared = self.shared
        of_chunk = shared.q, shared.k, shared.v, shared.scores, shared.solve
        q, k, dout, scores, solve = (None if x is None else x.at[slot] for x in of_chunk)
        if solve is None:
            plgpu.commit_smem()
            arrive(self.ready + copy, 2 * WARPGROUP)
            return self.matmul(dout, q, acc=self.kept(slot, state), transpose_a=True)
        reads, writes, kept = *self.factors(slot), self.kept(slot, state)
        dwritten = self.dwritten(slot, operand, dout, writes)
        self.end_matmuls()
        scores[...] = dwritten  # nobody reads it again
        plgpu.commit_smem()
        arrive(self.ready + copy, 2 * WARPGROUP)
        dsaid = _by_tokens(reads, self.matmul(dwritten, solve))
        state = self.matmul((-dsaid).astype(dout.dtype), k, acc=kept)
        sync(self.scaled, 2 * WARPGROUP)
        return self.matmul(dout, q, acc=state, transpose_a=True)

    def dwritten(self, slot, operand, dout, writes):
        """The cotangent of what a delta rule writes, given that of the state after the chunk and of out, or of none:
        `[columns, tokens]`, 16 bits."""
        k, scores = self.shared.k.at[slot], self.shared.scores.at[slot]
        if dout is None:
            by_state, by_out = self.matmul(operand, k, transpose_b=True), 0.0
        else:
            by_state, by_out = self.products((operand, k, False, True), (dout, scores, True, False))
        return (_by_tokens(writes, by_state) + by_out).astype(operand.dtype)

    def map_part(self, target, *, of_values: bool) -> None:
        """What a part makes of a state of zero or, not `of_values`, of the identity."""
        for stage in range(self.num_stages):
            arrive(self.free + stage, 3 * WARPGROUP)
        step = self.map_back if self.config.reverse else self.map
        if of_values:
            state = self.zeros()
        else:
            shape = COLUMNS, self.inputs.k.shape[3]
            row, column = (plgpu.broadcasted_iota(jnp.int32, shape, i, layout=MATRIX) for i in (0, 1))
            state = jnp.where(row + self.side * COLUMNS == column, 1.0, 0.0)

        def one(i, state):
            slot = lax.rem(i, self.num_stages)
            plgpu.barrier_wait(self.shared.full.at[slot])
            state = step(slot, state, self.shared.v.at[slot] if of_values else None)
            arrive(self.free + slot, 3 * WARPGROUP)
            return state

        state = lax.fori_loop(0, self.num_chunks, one, state)

        @pl.when(self.side < target.shape[3] // COLUMNS)
        def _():
            self.of_part(target)[...] = state

    def map(self, slot, state, v):
        """The state after a chunk, of its values or of none."""
        operand = state.astype(self.inputs.k.dtype)
        reads, writes, kept = *self.factors(slot), self.kept(slot, state)
        written = _by_tokens(writes, self.written(slot, operand, v, reads)).astype(operand.dtype)
        return self.matmul(written, self.shared.k.at[slot], acc=kept)

    def map_back(self, slot, state, dout):
        """The cotangent of the state before a chunk, of that of its outputs or of none."""
        shared = self.shared
        reads, writes, kept = *self.factors(slot), self.kept(slot, state)
        dwritten = self.dwritten(slot, state.astype(self.inputs.k.dtype), dout, writes)
        if dout is not None:
            plgpu.commit_smem()  # a warp may be ahead of another's matmul
            self.scale_dout(slot)
        dsaid = _by_tokens(reads, self.matmul(dwritten, shared.solve.at[slot]))
        state = self.matmul((-dsaid).astype(dwritten.dtype), shared.k.at[slot], acc=kept)
        return state if dout is None else self.matmul(dout, shared.q.at[slot], acc=state, transpose_a=True)

    def scale_dout(self, slot) -> None:
        """By what its tokens read of the state with."""
        dout = self.shared.v.at[slot]
        dout[...] = self.by_readers(slot, plgpu.load(dout, layout=MATRIX).astype(jnp.float32)).astype(dout.dtype)
        plgpu.commit_smem()

    def kept(self, slot, state):
        """What is left of the state after a chunk."""
        shared = self.shared
        if shared.solve is None:
            keeps = plgpu.load(shared.keeps.at[slot], layout=_COLUMN, optimized=False)
            return state * spread(keeps, 1, state.shape)
        # Of a delta rule one number for all dims.
        if shared.keeps is not None:
            return state * shared.keeps[slot, 0]
        return state if shared.reads is None else state * shared.reads[slot, CHUNK - 1]

    def factors(self, slot):
        """What tokens read and write the state with; None where there is nothing of it.

        To be loaded before the first matmul of a chunk: behind one they would be waited for.
        """
        return [
            None if x is None else plgpu.load(x.at[slot], layout=_COLUMN, optimized=False)
            for x in (self.shared.reads, self.shared.writes)
        ]

    # The third warpgroup.

    def read(self) -> None:
        for stage in range(self.num_stages):
            arrive(self.free + stage, 3 * WARPGROUP)
        for copy in range(_NUM_STATES):
            arrive(self.done + copy, 2 * WARPGROUP)

        @pl.loop(0, self.num_chunks)
        def _(i):
            slot, copy, chunk = lax.rem(i, self.num_stages), lax.rem(i, _NUM_STATES), self.chunk(i)
            plgpu.barrier_wait(self.shared.full.at[slot])
            sync(self.ready + copy, 2 * WARPGROUP)
            if self.outputs.snapshots is not None:
                target = self.outputs.snapshots.at[self.batch, self.head, chunk, self.of_values]
                plgpu.copy_smem_to_gmem(self.shared.state.at[copy], target)
            if self.outputs.written is not None:
                target = self.outputs.written.at[self.batch, self.head, chunk, self.of_values]
                plgpu.copy_smem_to_gmem(self.shared.v.at[slot], target)
            if self.inputs.q is not None:
                out = self.read_chunk_back(slot, copy) if self.config.reverse else self.read_chunk(slot, copy)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            arrive(self.done + copy, 2 * WARPGROUP)
            arrive(self.free + slot, 3 * WARPGROUP)
            if self.inputs.q is not None:
                self.shared.out[...] = out.astype(self.shared.out.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(self.shared.out, self.tokens(self.outputs.out, chunk, self.of_values))

        plgpu.wait_smem_to_gmem(0)

    def read_chunk(self, slot, copy):
        """What a chunk's tokens read of the state, and of each other."""
        shared = self.shared
        out = self.matmul(shared.q.at[slot], shared.state.at[copy], transpose_b=True)
        if shared.solve is not None:
            out = self.by_readers(slot, out)
        return self.matmul(shared.scores.at[slot], shared.v.at[slot], acc=out, transpose_b=shared.solve is not None)

    def read_chunk_back(self, slot, copy):
        """dv."""
        shared = self.shared
        dout = shared.v.at[slot]
        if shared.solve is None:
            dv = self.matmul(shared.scores.at[slot], dout, transpose_a=True)
            return self.matmul(shared.k.at[slot], shared.state.at[copy], acc=dv, transpose_b=True)
        self.scale_dout(slot)
        arrive(self.scaled, 2 * WARPGROUP)
        return self.matmul(shared.solve.at[slot], shared.scores.at[slot], transpose_a=True, transpose_b=True)

    def by_readers(self, slot, x):
        """`[tokens, columns]` times the factors with which tokens read the state."""
        x = x * self.config.scale
        if self.shared.reads is None:
            return x
        return x * spread(plgpu.load(self.shared.reads.at[slot], layout=ROW, optimized=False), 0, x.shape)

    def products(self, *factors):
        """a b of each (a, b, transpose_a, transpose_b), all in flight at the same time."""
        if self.config.interpret:
            return [self.matmul(a, b, transpose_a=of_a, transpose_b=of_b) for a, b, of_a, of_b in factors]
        factors = [
            (a.transpose((1, 0)) if of_a else a, b.transpose((1, 0)) if of_b else b) for a, b, of_a, of_b in factors
        ]

        def multiply(*accs):
            for acc, (a, b) in zip(accs, factors, strict=True):
                plgpu.wgmma(acc, a, b)
            return [acc[...] for acc in accs]

        return pl.run_scoped(multiply, *(plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in factors))

    def matmul(self, a, b, *, acc=None, transpose_a: bool = False, transpose_b: bool = False):
        """acc + a b, with a in shared memory or in registers; float32 in registers."""
        if self.config.interpret:
            a_value, b_value = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
            a_value, b_value = a_value.T if transpose_a else a_value, b_value.T if transpose_b else b_value
            product = jnp.dot(a_value, b_value, preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # ordinary reads, which a copy may overwrite only behind a fence
            return product if acc is None else acc + product
        a, b = a.transpose((1, 0)) if transpose_a else a, b.transpose((1, 0)) if transpose_b else b
        if acc is not None:
            return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(acc))

        def multiply(acc):
            plgpu.wgmma(acc, a, b)
            return acc[...]

        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _by_tokens(factors, x):
    """`[columns, tokens]` times the factor of each token."""
    return x if factors is None else x * spread(factors, 1, x.shape)

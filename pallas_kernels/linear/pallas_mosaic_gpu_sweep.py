"""The sweep of linear attention on Hopper GPUs (Mosaic GPU): see sweeps.py for what it computes.

Grid: a block of threads for an item, which is a part of a row of one head; where v has 64 columns, for two items. A
producer warpgroup copies chunks of 64 tokens of q, k and v, and what decays and documents make of them, into shared
memory (TMA, several stages ahead: memory is what is scarce). Two consumer warpgroups have 64 columns of v and of the
state each, and never wait for each other: either shares q and k with the other, or has an item of its own.

On chip: q, k and v of each stage, the state in 16 bits as what q is multiplied with, and out on its way to memory, in
shared memory; the state in float32 and the weights of a chunk, [64, 64], in registers. What a consumer reads of v
nobody else does, so it puts v times `writes` in its place before the state takes it up.

Without q it is the pass over what is written: the state after each part, which is zero before it. That is a sum, which
is taken from its end: what decays or documents leave nothing of is not read, and what was read last, the sweep reads
first, while the L2 cache has it.

Reference: Yang et al. 2024, Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635,
section 4; Qin et al. 2024, Lightning Attention-2, arXiv:2401.04658, Algorithms 1 and 2.
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike

from pallas_kernels.linear.sweeps import part_chunks
from pallas_kernels.mosaic_gpu import NAMED_BARRIERS, WARPGROUP, arrive, do_not_unroll, sync
from pallas_kernels.wgmma import MATRIX, ROW, TRANSFORMS

CHUNK = 64
SNAPSHOT_CHUNKS = 4
"""Chunks from a snapshot to the next. In between, the gradient of a decay adds up what the rounding of states and of
writes to 16 bits does; snapshots are read and written."""
_COLUMNS = 64  # of v and of the state that a consumer has
_NUM_CONSUMERS = 2
_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_MOST_STAGES = 6
_SMEM_BYTES = 227 * 1024 - 4096  # less barriers, and what the compiler takes for reductions
_LOG2_E = math.log2(math.e)


def items_of_block(v_dim: int) -> int:
    """How many items a block of threads has."""
    return _NUM_CONSUMERS * _COLUMNS // v_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is static of a call.

    Attributes:
      num_parts: Parts of a row.
      wanted: Those to be swept.
      reverse: Whether from the last token to the first.
      scale: Multiplies what is read.
      snapshots: Whether to return the state at every SNAPSHOT_CHUNKS chunks.
      interpret: Whether to run on a CPU, in JAX's interpreter.
    """

    num_parts: int
    wanted: range
    reverse: bool
    scale: float = 1.0
    snapshots: bool = False
    interpret: Any = None


class Rows(NamedTuple):
    """What there is for each token, as `chunks.Chunks` has it; None where it is 1, or 0, for all.

    Attributes:
      cumulative, reads, writes: float32 `[B, N, T']`; the last two are exchanged in reverse.
      document: int32 `[B, T']`.
    """

    cumulative: Any = None
    reads: Any = None
    writes: Any = None
    document: Any = None


class Inputs(NamedTuple):
    """What the kernel reads; None where there is nothing to read.

    q, k, v and dot_with are `[B, T, heads, dim]` of lengths that are multiples of 8.

    Attributes:
      before: The state before each part in the direction of the sweep, float32 `[B, P, N, H, V]`.
      keeps: The factor of the state over a chunk, float32 `[B, N, T' / CHUNK]`; without q, what is left of what a chunk
        writes at the end of its part.
      num_chunks: Without q, how many chunks of each part to read, int32 `[B, N, P]`; None for all.
    """

    q: Any
    k: Any
    v: Any
    dot_with: Any
    before: Any
    rows: Rows
    keeps: Any
    num_chunks: Any = None


class Outputs(NamedTuple):
    """What it writes; None where it is not asked for.

    Attributes:
      out: `[B, T, N, V]`.
      end: The state after all parts, or of a pass without q after each, float32 `[B, 1 or wanted, N, H, V]`.
      dots: Rows of out times dot_with, by the columns of each consumer, float32 `[V / 64, B, N, T']`.
      snapshots: 16 bits `[B, N, T' / interval, H, V]`.
    """

    out: Any
    end: Any
    dots: Any
    snapshots: Any


class _Shared(NamedTuple):
    """Shared memory, and the barriers that say when it is full."""

    q: Any
    k: Any
    v: Any
    rows: Rows
    dot_with: Any
    state: Any
    out: Any
    full: Any
    dot_full: Any


class _Item(NamedTuple):
    """A part of a row of a head: its chunks, and where it stands among those wanted."""

    batch: ArrayLike
    head: ArrayLike
    part: ArrayLike
    place: ArrayLike
    first_chunk: ArrayLike
    num_chunks: ArrayLike


def sweep(inputs: Inputs, *, num_heads: int, length: int, config: Config) -> Outputs:
    """Runs the kernel over `length` tokens, of which arrays may have a few more."""
    (B, T, _, V), H = inputs.v.shape, inputs.k.shape[3]
    num_chunks = -(-length // CHUNK)
    reads = inputs.q is not None
    outputs = Outputs(
        out=jax.ShapeDtypeStruct((B, T, num_heads, V), inputs.v.dtype) if reads else None,
        end=jax.ShapeDtypeStruct((B, 1 if reads else len(config.wanted), num_heads, H, V), jnp.float32),
        dots=None,
        snapshots=None,
    )
    if inputs.dot_with is not None:
        dots = jax.ShapeDtypeStruct((V // _COLUMNS, B, num_heads, num_chunks * CHUNK), jnp.float32)
        outputs = outputs._replace(dots=dots)
    if config.snapshots:
        shape = B, num_heads, -(-num_chunks // SNAPSHOT_CHUNKS), H, V
        outputs = outputs._replace(snapshots=jax.ShapeDtypeStruct(shape, inputs.v.dtype))
    input_leaves, input_tree = jax.tree.flatten(inputs)
    output_leaves, output_tree = jax.tree.flatten(outputs)
    scratch_leaves, scratch_tree = jax.tree.flatten(_scratch(inputs))

    def body(*refs):
        refs = iter(refs)
        given = (
            jax.tree.unflatten(tree, itertools.islice(refs, tree.num_leaves))
            for tree in (input_tree, output_tree, scratch_tree)
        )
        _Block(config, num_heads, num_chunks, *given).run()

    num_items = B * num_heads * len(config.wanted)
    results = plgpu.kernel(
        body,
        out_type=output_leaves,
        grid=(-(-num_items // items_of_block(V)),),
        grid_names=("block",),
        num_threads=_NUM_CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=scratch_leaves,
        # What a thread writes into shared memory and reads there, it has written itself.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=config.interpret,
    )(*input_leaves)
    return jax.tree.unflatten(output_tree, results)


def _scratch(inputs: Inputs) -> _Shared:
    H, V = inputs.k.shape[3], inputs.v.shape[3]
    items = items_of_block(V)
    dtype = inputs.v.dtype
    reads, dots = inputs.q is not None, inputs.dot_with is not None
    tile_bytes = CHUNK * _COLUMNS * dtype.itemsize
    rows = [x for x in inputs.rows if x is not None]
    of_stage = items * ((1 + reads) * H // _COLUMNS * tile_bytes + len(rows) * CHUNK * 4) + _NUM_CONSUMERS * tile_bytes
    fixed = _NUM_CONSUMERS * tile_bytes * (reads * (H // _COLUMNS + 1) + dots)
    num_stages = min(_MOST_STAGES, len(NAMED_BARRIERS) // items, (_SMEM_BYTES - fixed) // of_stage)

    def smem(*shape):
        return plgpu.SMEM(shape, dtype, transforms=TRANSFORMS)

    def row(x):
        return None if x is None else plgpu.SMEM((num_stages * items, CHUNK), x.dtype)

    # A copy arrives once: of k, of q, of v for every consumer of the item, and of each row.
    arrivals = 1 + reads + _NUM_CONSUMERS // items + len(rows)
    return _Shared(
        q=smem(num_stages * items, CHUNK, H) if reads else None,
        k=smem(num_stages * items, CHUNK, H),
        v=smem(num_stages, _NUM_CONSUMERS, CHUNK, _COLUMNS),
        rows=Rows(*map(row, inputs.rows)),
        dot_with=smem(_NUM_CONSUMERS, CHUNK, _COLUMNS) if dots else None,
        state=smem(_NUM_CONSUMERS, H, _COLUMNS) if reads else None,
        out=smem(_NUM_CONSUMERS, CHUNK, _COLUMNS) if reads else None,
        full=plgpu.Barrier(num_arrivals=arrivals, num_barriers=num_stages * items),
        dot_full=plgpu.Barrier(num_barriers=_NUM_CONSUMERS) if dots else None,
    )


class _Block:
    """What one block of threads does."""

    def __init__(
        self, config: Config, num_heads: int, num_chunks: int, inputs: Inputs, outputs: Outputs, shared: _Shared
    ):
        self.config, self.num_heads, self.num_chunks = config, num_heads, num_chunks
        self.inputs, self.outputs, self.shared = inputs, outputs, shared
        self.items = items_of_block(inputs.v.shape[3])
        self.num_stages = shared.v.shape[0]
        self.num_items = inputs.k.shape[0] * num_heads * len(config.wanted)
        self.part_chunks = part_chunks(num_chunks, config.num_parts, SNAPSHOT_CHUNKS)
        self.warpgroup = lax.axis_index("warpgroup")
        self.from_last = config.reverse if inputs.q is not None else not config.reverse
        # A consumer's place among those of its item, and its item's among those of the block.
        self.side, self.of_block = (self.warpgroup, 0) if self.items == 1 else (0, self.warpgroup)
        self.threads_of_item = WARPGROUP * (1 + _NUM_CONSUMERS // self.items)

    def run(self) -> None:
        @pl.when(self.warpgroup < _NUM_CONSUMERS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            self.consume(self.item(self.of_block))

        @pl.when(self.warpgroup == _NUM_CONSUMERS)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            self.produce()

    def item(self, of_block) -> _Item:
        """Heads side by side, for what they share; an item that is not there has no chunks."""
        number = lax.axis_index("block") * self.items + of_block
        wanted = self.config.wanted
        place = lax.rem(lax.div(number, self.num_heads), len(wanted))
        part = place + wanted.start
        first_chunk = part * self.part_chunks
        num_chunks = jnp.minimum(self.part_chunks, self.num_chunks - first_chunk)
        batch, head = lax.div(number, self.num_heads * len(wanted)), lax.rem(number, self.num_heads)
        is_there = number < self.num_items
        if self.inputs.num_chunks is not None:
            read = self.inputs.num_chunks[jnp.where(is_there, batch, 0), head, part]
            first_chunk = first_chunk + num_chunks - read if self.from_last else first_chunk
            num_chunks = read
        return _Item(
            batch=batch,
            head=head,
            part=part,
            place=place,
            first_chunk=first_chunk,
            num_chunks=jnp.where(is_there, num_chunks, 0),
        )

    def chunk(self, item: _Item, i) -> ArrayLike:
        """The i-th chunk of an item: in the direction of the sweep, without q against it."""
        return item.first_chunk + (item.num_chunks - 1 - i if self.from_last else i)

    def slot(self, i, of_block) -> ArrayLike:
        return lax.rem(i, self.num_stages) * self.items + of_block

    def tokens(self, ref, item: _Item, chunk, *columns):
        """A chunk of an array `[B, T, heads, dim]`."""
        head = lax.div(item.head, self.num_heads // ref.shape[2])
        return ref.at[item.batch, pl.ds(chunk * CHUNK, CHUNK), head, *columns]

    # The producer.

    def produce(self) -> None:
        most = self.item(0).num_chunks
        for of_block in range(1, self.items):
            most = jnp.maximum(most, self.item(of_block).num_chunks)

        @pl.loop(0, most * self.items)
        def _(number):
            if not self.config.interpret:
                do_not_unroll()
            i, of_block = lax.div(number, self.items), lax.rem(number, self.items)
            item = self.item(of_block)
            if self.items == 1:
                self.load(item, i, of_block)
            else:
                pl.when(i < item.num_chunks)(lambda: self.load(item, i, of_block))

    def load(self, item: _Item, i, of_block) -> None:
        inputs, shared, slot, chunk = self.inputs, self.shared, self.slot(i, of_block), self.chunk(item, i)
        full = shared.full.at[slot]
        sync(NAMED_BARRIERS.start + slot, self.threads_of_item)
        if inputs.q is not None:
            plgpu.copy_gmem_to_smem(self.tokens(inputs.q, item, chunk), shared.q.at[slot], full)
        plgpu.copy_gmem_to_smem(self.tokens(inputs.k, item, chunk), shared.k.at[slot], full)
        for side in range(_NUM_CONSUMERS // self.items):
            columns = pl.ds(side * _COLUMNS, _COLUMNS)
            v = self.tokens(inputs.v, item, chunk, columns)
            plgpu.copy_gmem_to_smem(v, shared.v.at[lax.rem(i, self.num_stages), of_block + side], full)
        for source, target in zip(inputs.rows, shared.rows, strict=True):
            if source is not None:
                of_row = (item.batch, item.head)[: len(source.shape) - 1]
                plgpu.copy_gmem_to_smem(source.at[*of_row, pl.ds(chunk * CHUNK, CHUNK)], target.at[slot], full)

    # A consumer.

    def consume(self, item: _Item) -> None:
        inputs = self.inputs
        for stage in range(self.num_stages):
            arrive(NAMED_BARRIERS.start + stage * self.items + self.of_block, self.threads_of_item)
        columns = pl.ds(self.side * _COLUMNS, _COLUMNS)

        @pl.when(item.num_chunks > 0)
        def _():
            if inputs.q is None:
                self.outputs.end.at[item.batch, item.place, item.head, :, columns][...] = self.sum_up(item)
                return
            before = inputs.before.at[item.batch, item.part, item.head, :, columns]
            state = plgpu.load(before, layout=MATRIX, optimized=False)
            self.put_state(state)
            if inputs.dot_with is not None:
                self.load_dot_with(item, 0)
            state = lax.fori_loop(0, item.num_chunks, lambda i, state: self.step(item, i, state), state)
            last = 0 if self.config.reverse else self.config.num_parts - 1

            @pl.when(item.part == last)
            def _():
                self.outputs.end.at[item.batch, 0, item.head, :, columns][...] = state

            plgpu.wait_smem_to_gmem(0)

    def step(self, item: _Item, i, state):
        """One chunk: what its tokens read, and the state after it."""
        inputs, shared, chunk = self.inputs, self.shared, self.chunk(item, i)
        slot, v = self.slot(i, self.of_block), self.written(i)
        keeps = None if inputs.keeps is None else inputs.keeps[item.batch, item.head, chunk]
        plgpu.barrier_wait(shared.full.at[slot])
        if self.config.snapshots and self.config.reverse:
            self.snapshot(item, chunk)
        self.write(item, i, chunk, v, *self.read(slot, v))
        self.scale_written(slot, v)
        if keeps is not None:
            state = state * keeps
        state = self.add_product(state, shared.k.at[slot], v)
        self.give_back(slot)
        self.put_state(state)
        if self.config.snapshots and not self.config.reverse:
            self.snapshot(item, chunk)
        return state

    def sum_up(self, item: _Item):
        """Without q: the sum of what the chunks write. Each is scaled while the one before is added."""
        inputs, shared = self.inputs, self.shared

        def chunk(i):
            """k and v of a chunk, when they are there."""
            slot, v = self.slot(i, self.of_block), self.written(i)
            left = None if inputs.keeps is None else inputs.keeps[item.batch, item.head, self.chunk(item, i)]
            plgpu.barrier_wait(shared.full.at[slot])
            self.scale_written(slot, v, left)
            return shared.k.at[slot], v

        def add(i, sums):
            sums = self.add_product(sums, *chunk(i))
            self.give_back(self.slot(i, self.of_block))
            return sums

        def add_all(acc):
            @pl.loop(0, item.num_chunks)
            def _(i):
                k, v = chunk(i)
                plgpu.wgmma(acc, k.transpose((1, 0)), v)
                plgpu.wgmma_wait(1)
                pl.when(i > 0)(lambda: self.give_back(self.slot(i - 1, self.of_block)))

        zeros = plgpu.layout_cast(jnp.zeros((inputs.k.shape[3], _COLUMNS), jnp.float32), MATRIX)
        if self.config.interpret:
            return lax.fori_loop(0, item.num_chunks, add, zeros)
        return pl.run_state(add_all)(plgpu.ACC.init(zeros))

    def written(self, i):
        """A consumer's columns of v of the i-th chunk."""
        return self.shared.v.at[lax.rem(i, self.num_stages), self.warpgroup]

    def scale_written(self, slot, v, left=None) -> None:
        """Puts v times `writes`, and times what is left of it, in the place of v."""
        if self.inputs.rows.writes is None:
            return
        writes = self.row(self.shared.rows.writes, slot, ROW)
        if left is not None:
            writes = writes * left
        v[...] = (plgpu.load(v, layout=MATRIX).astype(jnp.float32) * _rows(writes)).astype(v.dtype)
        plgpu.commit_smem()

    def give_back(self, slot) -> None:
        """To the producer, which may load the next chunk into it."""
        arrive(NAMED_BARRIERS.start + slot, self.threads_of_item)

    def put_state(self, state) -> None:
        """Where the next chunk's queries read it."""
        target = self.shared.state.at[self.warpgroup]
        target[...] = state.astype(target.dtype)
        plgpu.commit_smem()

    def snapshot(self, item: _Item, chunk) -> None:
        """Sends the state that queries read to memory, after each interval. `write` waits until it is read."""
        is_last = (lax.rem(chunk, SNAPSHOT_CHUNKS) == SNAPSHOT_CHUNKS - 1) | (chunk == self.num_chunks - 1)

        @pl.when(is_last)
        def _():
            interval = lax.div(chunk, SNAPSHOT_CHUNKS)
            columns = pl.ds(self.side * _COLUMNS, _COLUMNS)
            target = self.outputs.snapshots.at[item.batch, item.head, interval, :, columns]
            plgpu.copy_smem_to_gmem(self.shared.state.at[self.warpgroup], target)

    def row(self, ref, slot, layout):
        return plgpu.load(ref.at[slot], layout=layout, optimized=False)

    def read(self, slot, v):
        """weights (q k^T) v + reads q S, float32 `[64, 64]`; and where there are dots what is not in it: a token's own.

        That is most of a dot where decays are strong, the same in both directions, and no part of their gradient.
        """
        shared = self.shared
        # Read on either side of a matmul: the compiler takes two reads in a row for one, of two layouts.
        of_readers = self.of_tokens(slot, ROW)
        products = self.product_of_transposed(shared.q.at[slot], shared.k, slot)
        weights, itself = self.weights(products, of_readers, self.of_tokens(slot, _COLUMN))
        out = self.product(shared.q.at[slot], shared.state.at[self.warpgroup])
        if shared.rows.reads is not None:
            out = out * _rows(self.row(shared.rows.reads, slot, ROW))
        return self.add(out, weights.astype(v.dtype), v), itself

    def of_tokens(self, slot, layout) -> tuple[jax.Array | None, jax.Array | None]:
        """Log decay (base 2) and document of a chunk's tokens."""
        rows = self.shared.rows
        cumulative = document = None
        if rows.cumulative is not None:
            cumulative = self.row(rows.cumulative, slot, layout) * (-_LOG2_E if self.config.reverse else _LOG2_E)
        if rows.document is not None:
            document = self.row(rows.document, slot, layout)
        return cumulative, document

    def weights(self, products, of_readers, of_writers):
        """Products q.k, decayed, where the writer comes before the reader in its document.

        Returns: `[64, 64]`; and where there are dots what is then not in it, a token's products with itself, `[64]`.
        """
        reader, writer = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i, layout=MATRIX) for i in (0, 1))
        seen = reader <= writer if self.config.reverse else reader >= writer
        (cumulative, document), (cumulative_of_writers, document_of_writers) = of_readers, of_writers
        if document is not None:
            seen &= (_rows(document) == _columns(document_of_writers)) & (_rows(document) >= 0)
        itself = None
        if self.outputs.dots is not None:
            itself = jnp.where(seen & (reader == writer), products, 0.0).sum(axis=1)
            seen &= reader != writer
        if cumulative is not None:
            products = products * jnp.exp2(_rows(cumulative) - _columns(cumulative_of_writers))
        return jnp.where(seen, products, 0.0), itself

    def write(self, item: _Item, i, chunk, v, out, itself) -> None:
        """Sends what a chunk's tokens have read to memory, and its products with dot_with."""
        outputs, shared = self.outputs, self.shared
        out = out * self.config.scale
        staged = shared.out.at[self.warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's, and a snapshot
        if outputs.dots is not None:
            plgpu.barrier_wait(shared.dot_full.at[self.warpgroup])
            with_ = plgpu.load(shared.dot_with.at[self.warpgroup], layout=MATRIX).astype(jnp.float32)
            dots = outputs.dots.at[self.side, item.batch, item.head, pl.ds(chunk * CHUNK, CHUNK)]
            dots[...] = (out * with_).sum(axis=1)
            out += _rows(itself * self.config.scale) * plgpu.load(v, layout=MATRIX).astype(jnp.float32)
        staged[...] = out.astype(staged.dtype)
        plgpu.commit_smem()
        if outputs.dots is not None:
            pl.when(i + 1 < item.num_chunks)(lambda: self.load_dot_with(item, i + 1))
        columns = pl.ds(self.side * _COLUMNS, _COLUMNS)
        plgpu.copy_smem_to_gmem(staged, self.tokens(outputs.out, item, chunk, columns))

    def load_dot_with(self, item: _Item, i) -> None:
        """A consumer's own columns, which it asks for itself."""
        columns = pl.ds(self.side * _COLUMNS, _COLUMNS)
        source = self.tokens(self.inputs.dot_with, item, self.chunk(item, i), columns)
        target, full = (x.at[self.warpgroup] for x in (self.shared.dot_with, self.shared.dot_full))
        plgpu.copy_gmem_to_smem(source, target, full)

    # Matmuls.

    def product_of_transposed(self, a, b, slot):
        """a b^T"""
        if self.config.interpret:
            return _dot(a[...], b[slot].T)
        return self.product(a, b.at[slot].transpose((1, 0)))

    def product(self, a, b):
        """a b"""
        if self.config.interpret:
            return _dot(a[...], b[...])

        def multiply(acc):
            plgpu.wgmma(acc, a, b)
            return acc[...]

        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))

    def add(self, acc, a, b):
        """acc + a b, with a in registers."""
        if self.config.interpret:
            return acc + _dot(a, b[...])
        return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(acc))

    def add_product(self, acc, a, b):
        """acc + a^T b"""
        if self.config.interpret:
            result = acc + _dot(a[...].T, b[...])
            plgpu.commit_smem()  # an ordinary read, which a copy may overwrite only behind a fence
            return result
        return pl.run_state(lambda acc: plgpu.wgmma(acc, a.transpose((1, 0)), b))(plgpu.ACC.init(acc))


def _rows(x) -> jax.Array:
    """`[64]` as `[64, 64]`, one for each row."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (CHUNK, _COLUMNS), [0]), MATRIX)


def _columns(x) -> jax.Array:
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (CHUNK, CHUNK), [1]), MATRIX)


def _dot(x, y) -> jax.Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)

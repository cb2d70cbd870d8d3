"""The forward kernel of blockwise attention on Hopper GPUs (Mosaic GPU).

Grid: one block of threads a multiprocessor, each with a list of items; an item is a tile of queries (64 rows for each
consumer warpgroup) of one head. A producer warpgroup copies the item's queries, and the blocks of keys and values that
its row of the schedule names, into shared memory (TMA, two buffers each); the consumers wait for a buffer, multiply,
and give it back.

On chip: q (two tiles, so that the next item's is there in time), k and v (two blocks each), and out on its way to
memory, in shared memory; logits, probabilities, the running maximum, sum and result in registers. Where head dims are
wide there is room for one tile of q only, and out goes to memory from registers, as with dropout.

Where the time goes, and what hides it:
- The tensor cores are what is scarce. Consumers take turns at them: in its turn one starts the logits of block i and
  the product of block i - 1's probabilities with its values (`wgmma_forward.start`), passes the turn on, and computes
  the softmax of block i while the others' matmuls run.
- This goes on across items: the last product of an item runs with the first logits of the next, whose softmax and the
  writing of the result are hidden like any other.
- The running result is rescaled only where the maximum has grown by more than 2^8 (SLACK), which is rare: probabilities
  are then measured against a maximum that is too low by at most as much, and their sum is as right as before.
- Row sums stay split over the four threads that share a row until the item ends.
- Blocks that need no pair test have a loop of their own; those that do come first.
- Items go out longest first (`mosaic_gpu.Deal`), and what the next item is was read one item ahead.

Reference: Shah et al. 2024, FlashAttention-3, arXiv:2407.08608 (warp specialization, ping-pong, overlap within a
warpgroup); Zadouri et al. 2026, FlashAttention-4 (rescaling only where needed).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike

from pallas_kernels import wgmma_forward
from pallas_kernels.blockwise.pallas_mosaic_gpu_bias import KernelBias, Side, TileBias, bring_distances_near
from pallas_kernels.blockwise.pallas_mosaic_gpu_dropout import Words
from pallas_kernels.blockwise.pallas_mosaic_gpu_pairs import Band, CallConfig, Pairs
from pallas_kernels.blockwise.pallas_mosaic_gpu_tiles import (
    COLUMN,
    MATRIX,
    ROW,
    columns,
    rows,
    store_tile,
)
from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import Item, Walk, row_of_batch
from pallas_kernels.dropout import is_kept
from pallas_kernels.mosaic_gpu import NAMED_BARRIERS, WARPGROUP, Deal, arrive, sync
from pallas_kernels.online_softmax import SoftmaxCarry
from pallas_kernels.schedule import BlockRanges
from pallas_kernels.wgmma import ROWS, TRANSFORMS, Arrival

NUM_STAGES = 2
"""Buffers of keys, and of values."""

SLACK = 8.0
"""By how much (base 2) logits may exceed what they are measured against: 2^8 is far from overflow in 16 bits."""

_LOG2_E = math.log2(math.e)
_LOWEST = -1e30  # of what logits are measured against: finite, so that rows that see nothing make no nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(CallConfig):
    """What is static of a call.

    Attributes:
      block_q: Tokens of a tile of queries, those of the schedule.
      num_cores: Multiprocessors.
      q_slots: Buffers of queries.
      return_carry: Whether to return the running softmax rather than the result.
    """

    block_q: int
    num_cores: int
    q_slots: int = 2
    return_carry: bool = False

    @property
    def stages_out(self) -> bool:
        """Whether there is room for out in shared memory, beside two tiles of q and no words of keys."""
        return self.q_slots > 1 and not self.dropout_rate

    @property
    def num_consumers(self) -> int:
        return self.block_q // ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of the consumers and of the producer may have: 64 Ki are to be shared."""
        return {2: (240, 24), 3: (160, 32)}[self.num_consumers]


class Inputs(NamedTuple):
    """What the kernel reads; None where there is nothing to read.

    q, k and v are of lengths that are multiples of 8, tokens and carry of whole tiles of the kernel. A carry whose acc
    is None has seen no values. The words are dropout's, the band is that of queries, and the values of
    the bias are its `value_table`, where there is one.
    """

    q: Any
    k: Any
    v: Any
    ranges: BlockRanges
    q_positions: Any
    kv_positions: Any
    q_segment_ids: Any
    kv_segment_ids: Any
    words: Words | None
    bias: KernelBias | None
    bias_values: Any
    band: Band | None
    carry: SoftmaxCarry | None


class Outputs(NamedTuple):
    """What it writes: out and lse, or the carry; in whole tiles, but for an out that shared memory has a buffer for."""

    out: Any
    lse: Any
    carry: SoftmaxCarry | None


def attend(inputs: Inputs, config: Config) -> Outputs:
    """Runs the kernel."""
    B, T, N, H = inputs.q.shape
    S, K, V = inputs.v.shape[1:]
    num_rows = -(-T // config.block_q)
    deal = Deal.of(
        num_pairs=B * N,
        num_ranks=num_rows,
        pair_bytes=S * (H + V) * inputs.k.dtype.itemsize,
        group=N // K,
        num_cores=config.num_cores,
    )
    padded_len = num_rows * config.block_q
    row_vector = jax.ShapeDtypeStruct((B, N, padded_len), jnp.float32)
    if config.return_carry:
        acc = jax.ShapeDtypeStruct((B, padded_len, N, V), jnp.float32)
        outputs = Outputs(None, None, SoftmaxCarry(max=row_vector, sum=row_vector, acc=acc))
    else:
        out_len = T if config.stages_out else padded_len
        outputs = Outputs(jax.ShapeDtypeStruct((B, out_len, N, V), inputs.q.dtype), row_vector, None)
    input_leaves, input_tree = jax.tree.flatten(inputs)
    output_leaves, output_tree = jax.tree.flatten(outputs)

    def body(*refs):
        refs = iter(refs)
        input_refs, output_refs = (
            jax.tree.unflatten(tree, itertools.islice(refs, tree.num_leaves)) for tree in (input_tree, output_tree)
        )
        _Block(config, deal, input_refs, output_refs, jax.tree.unflatten(shared_tree, refs)).run()

    def smem(*shape):
        return plgpu.SMEM(shape, inputs.q.dtype, transforms=TRANSFORMS)

    shared = _Shared(
        q=smem(config.q_slots, config.block_q, H),
        k=smem(NUM_STAGES, config.block_kv, H),
        v=smem(NUM_STAGES, config.block_kv, V),
        out=smem(config.num_consumers, ROWS, V) if config.stages_out else None,
        kv_words=plgpu.SMEM((NUM_STAGES, config.block_kv), jnp.uint32) if config.dropout_rate else None,
        q_full=plgpu.Barrier(num_barriers=config.q_slots),
        k_full=plgpu.Barrier(num_barriers=NUM_STAGES),
        v_full=plgpu.Barrier(num_barriers=NUM_STAGES),
        kv_words_full=plgpu.Barrier(num_barriers=NUM_STAGES) if config.dropout_rate else None,
    )
    shared_leaves, shared_tree = jax.tree.flatten(shared)
    results = plgpu.kernel(
        body,
        out_type=output_leaves,
        grid=(deal.num_blocks,),
        grid_names=("block",),
        num_threads=config.num_consumers + 1,
        thread_name="warpgroup",
        scratch_types=shared_leaves,
        # No thread reads shared memory that it has written, so Pallas need not separate the two.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=config.interpret,
    )(*input_leaves)
    return jax.tree.unflatten(output_tree, results)


class _Shared(NamedTuple):
    """Shared memory, and the barriers that say when a buffer is full; out is None where there is no room for it, and
    the words of keys where nothing is dropped."""

    q: Any
    k: Any
    v: Any
    out: Any
    kv_words: Any
    q_full: Any
    k_full: Any
    v_full: Any
    kv_words_full: Any


class _Running(NamedTuple):
    """A consumer's state: an item, whose last block of probabilities is still to be multiplied with its values.

    Attributes:
      started: Whether there is such an item: not before the first.
      batch, head, row: Which.
      num_blocks: Blocks of keys visited until now, in all items.
      acc: Result until now, less the last block, `[64, V]`.
      row_max: What logits are measured against, base 2, `[64]`.
      row_sum: Parts of the sum of probabilities, `[64, 8]`.
      p: Probabilities of the last block, 16 bits, `[64, block_kv]`.
    """

    started: ArrayLike
    batch: ArrayLike
    head: ArrayLike
    row: ArrayLike
    num_blocks: ArrayLike
    acc: jax.Array
    row_max: jax.Array
    row_sum: jax.Array
    p: jax.Array


class _Block:
    """What one block of threads does."""

    def __init__(self, config: Config, deal: Deal, inputs: Inputs, outputs: Outputs, shared: _Shared):
        self.config = config
        self.inputs, self.outputs, self.shared = inputs, outputs, shared
        num_heads, self.value_dim = inputs.q.shape[2], inputs.v.shape[3]
        self.group = num_heads // inputs.k.shape[2]
        self.walk = Walk(deal=deal, ranges=inputs.ranges, num_heads=num_heads, tests_blocks=config.tests_blocks)
        self.dtype = inputs.q.dtype
        self.tile = ROWS, config.block_kv
        self.warpgroup = lax.axis_index("warpgroup")
        # Named barriers: the consumers' turns, and what tells the producer that a buffer may be filled again.
        self.turn = NAMED_BARRIERS.start
        self.q_free = self.turn + config.num_consumers
        self.k_free = self.q_free + config.q_slots
        self.v_free = self.k_free + NUM_STAGES
        assert self.v_free + NUM_STAGES <= NAMED_BARRIERS.stop
        self.everyone = WARPGROUP * (config.num_consumers + 1)

    def run(self) -> None:
        consumer_registers, producer_registers = self.config.registers

        @pl.when(self.warpgroup < self.config.num_consumers)
        def _():
            plgpu.set_max_registers(consumer_registers, action="increase")
            self.consume()

        @pl.when(self.warpgroup == self.config.num_consumers)
        def _():
            plgpu.set_max_registers(producer_registers, action="decrease")
            self.produce()

    # The producer.

    def produce(self) -> None:
        inputs, shared, block_q, block_kv = self.inputs, self.shared, self.config.block_q, self.config.block_kv

        def one_item(number, item: Item, num_blocks):
            slot = lax.rem(number, self.config.q_slots)
            sync(self.q_free + slot, self.everyone)
            queries = inputs.q.at[item.batch, pl.ds(item.row * block_q, block_q), item.head]
            plgpu.copy_gmem_to_smem(queries, shared.q.at[slot], shared.q_full.at[slot])
            kv_head = lax.div(item.head, self.group)

            def load(j, num_blocks):
                slot = lax.rem(num_blocks, NUM_STAGES)
                at = item.batch, pl.ds(j * block_kv, block_kv), kv_head
                sync(self.k_free + slot, self.everyone)
                plgpu.copy_gmem_to_smem(inputs.k.at[at], shared.k.at[slot], shared.k_full.at[slot])
                sync(self.v_free + slot, self.everyone)
                plgpu.copy_gmem_to_smem(inputs.v.at[at], shared.v.at[slot], shared.v_full.at[slot])
                if inputs.words is not None:
                    words = inputs.words.keys
                    words = words.at[row_of_batch(words, item.batch), pl.ds(j * block_kv, block_kv)]
                    plgpu.copy_gmem_to_smem(words, shared.kv_words.at[slot], shared.kv_words_full.at[slot])
                self.bring_bias_near(item, j)
                return num_blocks + 1

            return self.walk.visit(item, load, load, num_blocks, skip=0)

        self.walk.for_each_item(one_item, jnp.int32(0))

    def bring_bias_near(self, item: Item, j) -> None:
        """What consumers will read of the table of biases, at the distances of the item's queries and block j."""
        if self.inputs.bias_values is None or self.config.interpret:
            return
        block_q, block_kv = self.config.block_q, self.config.block_kv
        least = item.row * block_q - j * block_kv - block_kv
        bring_distances_near([self.inputs.bias_values.at[item.head]], least, block_q + block_kv)

    # A consumer.

    def consume(self) -> None:
        for slot in range(self.config.q_slots):
            arrive(self.q_free + slot, self.everyone)
        for slot in range(NUM_STAGES):
            arrive(self.k_free + slot, self.everyone)
            arrive(self.v_free + slot, self.everyone)
        # The last consumer passes the first its first turn.
        pl.when(self.warpgroup == self.config.num_consumers - 1)(self.pass_turn)
        running = self.walk.for_each_item(self.consume_item, self.nothing_running())
        pl.when(running.started)(lambda: self.end(running))
        plgpu.wait_smem_to_gmem(0)

    def consume_item(self, number, item: Item, running: _Running) -> _Running:
        slot = lax.rem(number, self.config.q_slots)
        plgpu.barrier_wait(self.shared.q_full.at[slot])
        words, bias = self.query_words(item), self.bias(item)
        pairs, block_kv = self.pairs(item), self.config.block_kv

        def attend(allowed: Callable, running: _Running) -> _Running:
            running = self.first_step(item, slot, running, allowed, words, bias)
            step = functools.partial(self.next_step, q_slot=slot, words=words, bias=bias)
            return self.walk.visit(item, functools.partial(step, allowed=allowed), step, running, skip=1)

        def attend_by_either(running: _Running) -> _Running:
            in_general = functools.partial(attend, lambda j: pairs.allowed(item.head, j * block_kv))
            if pairs.in_order is None:
                return in_general(running)
            in_band = functools.partial(attend, lambda j: pairs.in_band(j * block_kv))
            return lax.cond(pairs.in_order, in_band, in_general, running)

        def skip(running: _Running) -> _Running:
            nothing = self.nothing_running()
            row_sum = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
            self.write(item.batch, item.head, item.row, nothing.acc, nothing.row_max, row_sum)
            return running

        running = lax.cond(item.visits_any, attend_by_either, skip, running)
        arrive(self.q_free + slot, self.everyone)
        return running

    def nothing_running(self) -> _Running:
        zero = jnp.int32(0)
        return _Running(
            started=jnp.bool(False),
            batch=zero,
            head=zero,
            row=zero,
            num_blocks=zero,
            acc=plgpu.layout_cast(jnp.zeros((ROWS, self.value_dim), jnp.float32), MATRIX),
            row_max=plgpu.layout_cast(jnp.full((ROWS,), _LOWEST, jnp.float32), ROW),
            row_sum=plgpu.layout_cast(jnp.zeros((ROWS, 8), jnp.float32), MATRIX),
            p=plgpu.layout_cast(jnp.zeros(self.tile, self.dtype), MATRIX),
        )

    def first_step(self, item: Item, q_slot, running: _Running, allowed: Callable, words, bias) -> _Running:
        """The first logits of an item, beside the last product of the item before, which is then written.

        Before the first item there is none: then zeros are multiplied with whatever is in the buffer, for nothing.
        """
        nothing = self.nothing_running()
        previous = self.previous_slot(running)
        pl.when(running.started)(lambda: plgpu.barrier_wait(self.shared.v_full.at[previous]))
        j = self.walk.first_block(item)
        add_bias = bias(j)
        s, acc = self.start(q_slot, running)
        kept = self.kept(running, words)
        row_max, row_sum, p, _ = self.softmax(s, nothing.row_max, nothing.row_sum, allowed(j), kept, add_bias)
        acc, p = self.finish(acc, p, None, None)

        @pl.when(running.started)
        def _():
            arrive(self.v_free + previous, self.everyone)
            self.write(running.batch, running.head, running.row, acc, running.row_max, running.row_sum.sum(axis=1))

        return _Running(
            started=jnp.bool(True),
            batch=item.batch,
            head=item.head,
            row=item.row,
            num_blocks=running.num_blocks + 1,
            acc=nothing.acc,
            row_max=row_max,
            row_sum=row_sum,
            p=p.astype(self.dtype),
        )

    def next_step(
        self, j, running: _Running, *, q_slot, words, bias: Callable, allowed: Callable | None = None
    ) -> _Running:
        """Logits of block j, beside the product of the block before."""
        previous = self.previous_slot(running)
        plgpu.barrier_wait(self.shared.v_full.at[previous])
        add_bias = bias(j)
        s, acc = self.start(q_slot, running)
        bits = None if allowed is None else allowed(j)
        kept = self.kept(running, words)
        row_max, row_sum, p, rescale = self.softmax(s, running.row_max, running.row_sum, bits, kept, add_bias)
        acc, p = self.finish(acc, p, rescale, Arrival(self.v_free + previous, self.everyone))
        return running._replace(
            num_blocks=running.num_blocks + 1,
            acc=acc,
            row_max=row_max,
            row_sum=row_sum,
            p=p.astype(self.dtype),
        )

    def end(self, running: _Running) -> None:
        """The last product of the last item."""
        previous = self.previous_slot(running)
        plgpu.barrier_wait(self.shared.v_full.at[previous])
        self.take_turn()
        if self.config.interpret:
            acc = running.acc + self.product(running.p, previous)
        else:

            def multiply(acc_ref):
                plgpu.wgmma(acc_ref, running.p, self.shared.v.at[previous])

            acc = pl.run_state(multiply)(plgpu.ACC.init(running.acc))
        self.pass_turn()
        self.write(running.batch, running.head, running.row, acc, running.row_max, running.row_sum.sum(axis=1))

    # Parts of a step.

    def previous_slot(self, running: _Running) -> ArrayLike:
        return lax.rem(running.num_blocks + NUM_STAGES - 1, NUM_STAGES)

    def following_turn(self) -> ArrayLike:
        following = self.warpgroup + 1
        return self.turn + jnp.where(following == self.config.num_consumers, 0, following)

    def take_turn(self) -> None:
        sync(self.turn + self.warpgroup, 2 * WARPGROUP)

    def pass_turn(self) -> None:
        arrive(self.following_turn(), 2 * WARPGROUP)

    def start(self, q_slot, running: _Running) -> tuple[jax.Array, jax.Array]:
        """Takes a turn and starts its two matmuls; returns logits, and acc with the product still in flight."""
        shared, slot = self.shared, lax.rem(running.num_blocks, NUM_STAGES)
        previous = self.previous_slot(running)
        plgpu.barrier_wait(shared.k_full.at[slot])
        self.take_turn()
        if not self.config.interpret:
            return wgmma_forward.start(
                running.acc,
                running.p,
                shared.q,
                shared.k,
                shared.v,
                q_tile=q_slot * self.config.num_consumers + self.warpgroup,
                k_slot=slot,
                v_slot=previous,
                issued=Arrival(self.following_turn(), 2 * WARPGROUP),
                k_free=Arrival(self.k_free + slot, self.everyone),
            )
        my_q = shared.q.at[q_slot, pl.ds(self.warpgroup * ROWS, ROWS)]

        def logits(s_ref):
            plgpu.wgmma(s_ref, my_q, shared.k.at[slot].transpose((1, 0)))
            return s_ref[...]

        s = pl.run_scoped(logits, plgpu.ACC(self.tile, jnp.float32))
        acc = lax.cond(running.started, lambda: running.acc + self.product(running.p, previous), lambda: running.acc)
        self.pass_turn()
        arrive(self.k_free + slot, self.everyone)
        return s, acc

    def finish(self, acc, p, rescale, v_free: Arrival | None):
        """Waits for the product; returns it rescaled, and p, which may only now be converted."""
        if not self.config.interpret:
            return wgmma_forward.finish(acc, p, rescale, v_free)
        if v_free is not None:
            arrive(v_free.barrier, v_free.num_threads)
        return acc if rescale is None else acc * rows(rescale, acc.shape), p

    def product(self, p, slot) -> jax.Array:
        """p v, as the interpreter can do it: by an ordinary read, which a copy may overwrite only behind a fence."""
        result = jnp.dot(p, self.shared.v[slot], preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        return result

    def softmax(self, s, row_max, row_sum, bits, kept, add_bias):
        """What logits are measured against now, parts of the sums, probabilities, and by what to rescale acc."""
        to_base_2 = self.config.scale * _LOG2_E
        if self.config.soft_cap is not None:
            s = jnp.tanh(s * (self.config.scale / self.config.soft_cap))
            to_base_2 = self.config.soft_cap * _LOG2_E
        of_all = None
        if add_bias is not None:
            s, of_all = add_bias(s)
        if bits is not None:
            s = jnp.where(bits, s, -jnp.inf)
        greatest = s.max(axis=1)
        if of_all is not None:
            greatest = greatest + of_all
        greatest = greatest * to_base_2
        new_max = jnp.where(greatest > row_max + SLACK, greatest, row_max)
        rescale = jnp.exp2(row_max - new_max)
        against = new_max if of_all is None else new_max - of_all * to_base_2
        p = jnp.exp2(s * to_base_2 - rows(against, self.tile))
        row_sum = row_sum * rows(rescale, row_sum.shape)
        for i in range(0, self.config.block_kv, 8):
            row_sum = row_sum + p[:, i : i + 8]
        if kept is not None:
            p = jnp.where(kept, p, 0.0)
        return new_max, row_sum, p, rescale

    def bias(self, item: Item) -> Callable:
        """bias(j): what adds the bias to logits of the item's queries and keys of block j (`TileBias.adding`); None for
        none."""
        inputs, block_kv = self.inputs, self.config.block_kv
        if inputs.bias is None:
            return lambda j: None
        tiles = TileBias(
            bias=inputs.bias,
            values=inputs.bias_values,
            reads_early=self.config.num_consumers == 2,
            columns=block_kv,
            rows_are_queries=True,
            interpret=bool(self.config.interpret),
        )
        of_queries = Side(inputs.q_positions, self.q_start(item.row))
        return lambda j: tiles.adding(item.head, item.batch, of_queries, Side(inputs.kv_positions, j * block_kv))

    def query_words(self, item: Item) -> jax.Array | None:
        """Dropout's words of this warpgroup's queries; None where nothing is dropped."""
        words = self.inputs.words
        if words is None:
            return None
        at = row_of_batch(words.queries, item.batch), item.head, pl.ds(self.q_start(item.row), ROWS)
        return plgpu.load(words.queries.at[at], layout=ROW, optimized=False)

    def kept(self, running: _Running, words: jax.Array | None) -> jax.Array | None:
        """Which pairs with the next block of keys dropout keeps; the words of keys are given back with the values."""
        if words is None:
            return None
        slot = lax.rem(running.num_blocks, NUM_STAGES)
        plgpu.barrier_wait(self.shared.kv_words_full.at[slot])
        kv_words = columns(plgpu.load(self.shared.kv_words.at[slot], layout=COLUMN, optimized=False), self.tile)
        return is_kept(self.config.dropout_rate, rows(words, self.tile), kv_words)

    def q_start(self, row) -> ArrayLike:
        """Where this warpgroup's queries begin. From a row each time: a loop that carried it would forget that it is a
        multiple of what a copy moves."""
        return row * self.config.block_q + self.warpgroup * ROWS

    def pairs(self, item: Item) -> Pairs:
        """Of the item's queries and blocks of keys."""
        return Pairs(
            self.inputs,
            self.config,
            batch=item.batch,
            start=self.q_start(item.row),
            num_columns=self.config.block_kv,
            rows_are_queries=True,
        )

    # The end of an item.

    def write(self, batch, head, row, acc, row_max, row_sum) -> None:
        """Writes what has come of 64 queries: out and lse, or the carry."""
        q_start = self.q_start(row)
        of_rows = batch, head, pl.ds(q_start, ROWS)
        tile = batch, pl.ds(q_start, ROWS), head
        if self.config.dropout_rate:
            acc = acc * (1 / (1 - self.config.dropout_rate))
        if self.inputs.carry is not None:
            before = self.inputs.carry
            old_max, old_sum = (
                plgpu.load(x.at[of_rows], layout=ROW, optimized=False) for x in (before.max, before.sum)
            )
            old_max = jnp.where(old_max == -jnp.inf, _LOWEST, old_max * _LOG2_E)
            new_max = jnp.maximum(row_max, old_max)
            old, new = jnp.exp2(old_max - new_max), jnp.exp2(row_max - new_max)
            acc = acc * rows(new, acc.shape)
            if before.acc is not None:
                old_acc = plgpu.load(before.acc.at[tile], layout=MATRIX, optimized=False)
                acc = acc + old_acc * rows(old, acc.shape)
            row_max, row_sum = new_max, row_sum * new + old_sum * old
        empty = row_sum == 0
        if self.config.return_carry:
            after = self.outputs.carry
            after.max.at[of_rows][...] = jnp.where(empty, -jnp.inf, row_max * (1 / _LOG2_E))
            after.sum.at[of_rows][...] = row_sum
            after.acc.at[tile][...] = acc
            return
        some = jnp.where(empty, 1.0, row_sum)
        lse = (row_max + jnp.log2(some)) * (1 / _LOG2_E)
        self.outputs.lse.at[of_rows][...] = jnp.where(empty, -jnp.inf, lse)
        out = acc * rows(1.0 / some, acc.shape)
        if self.shared.out is None:
            store_tile(self.outputs.out.at[tile], out, interpret=bool(self.config.interpret))
            return
        staged = self.shared.out.at[self.warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last item's
        staged[...] = out.astype(self.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, self.outputs.out.at[tile])

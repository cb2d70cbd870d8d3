"""The backward kernels of blockwise attention on Hopper GPUs for wide heads (Mosaic GPU): one of dq, one of dk and one
of dv, each of which adds up its gradient where it stays.

Grid: one block of threads a multiprocessor, each with a list of items or, where nobody knows beforehand how long these
are, all with one line of them; an item is 128 rows of one head, queries for dq, keys for dk and dv. A producer
warpgroup copies the rows, those of the next item ahead of time where there is room, and tiles of what the schedule says
that they visit (for dk and dv of all query heads of the kv head), into shared memory. Two consumers, 64 rows each, keep
the gradients of their rows in registers over the whole item.

On chip: the rows, as queries with dout or keys with values, and the tiles, in shared memory; logits, their gradients
and dq, dk or dv in registers.

At head dim 256 dk and dv of 64 keys are 256 registers a thread, and there are 232: so the fused kernel
(pallas_mosaic_gpu_backward.py) cannot be. Its 5 matmuls are 8 here, 3 of them to compute logits and the gradients of
probabilities anew; in exchange no sum of dq goes through shared memory and the second-level cache, and each gradient
has one owner, so that it comes out the same each time. At 192 with values of 128 the fused kernel can be, but has no
registers left for a soft cap, dropout or a bias: those go here too.

Reference: Dao 2023, FlashAttention-2, arXiv:2307.08691, Algorithm 2.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike

from pallas_kernels import wgmma_backward, wgmma_split
from pallas_kernels.blockwise import pallas_mosaic_gpu_queue as queue
from pallas_kernels.blockwise.pallas_mosaic_gpu_bias import (
    KernelBias,
    Side,
    TileBias,
    added,
    nothing_summed,
    num_sums,
    store_sums,
    sums_type,
)
from pallas_kernels.blockwise.pallas_mosaic_gpu_dropout import KeptPairs, Words, dropped, kept_pairs
from pallas_kernels.blockwise.pallas_mosaic_gpu_pairs import Band, CallConfig, Pairs
from pallas_kernels.blockwise.pallas_mosaic_gpu_tiles import (
    COLUMN,
    MATRIX,
    ROW,
    columns,
    rows,
    store_tile,
)
from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import Item, Visit, Walk
from pallas_kernels.mosaic_gpu import NAMED_BARRIERS, WARPGROUP, Deal, arrive, sync
from pallas_kernels.schedule import BlockRanges
from pallas_kernels.wgmma import ROWS, TRANSFORMS

BLOCK = 128
"""Tokens of the schedule's blocks, and rows of an item."""
TILE = 64
"""Tokens of what the rows visit in a step."""
_SLOTS = 2
_NUM_CONSUMERS = 2
_SHARED_BYTES = 224 * 1024  # of the 227 KB that a block of threads may have, what buffers of operands may take
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(CallConfig):
    """What is static of a call.

    Attributes:
      gradient: Which.
      num_cores: Multiprocessors.
      in_line: Whether items go out in one line, to whoever asks next, and are not dealt beforehand.
      bias_gradient: Whether sums are made for the gradient of the bias: by the kernel of dk.
    """

    gradient: Literal["dq", "dk", "dv"]
    num_cores: int
    in_line: bool
    bias_gradient: bool = False

    @property
    def rows_are_queries(self) -> bool:
        return self.gradient == "dq"

    @property
    def needs_dp(self) -> bool:
        return self.gradient != "dv"


class Inputs(NamedTuple):
    """What a kernel reads; None where there is nothing to read.

    q, k, v and dout are of lengths that are multiples of 8, the others of whole blocks of the schedule.

    Attributes:
      lse, delta: As the fused kernel has them (pallas_mosaic_gpu_backward.py).
      ranges: The schedule's `kv_blocks` for dq, its `q_blocks` for dk and dv.
      words: Dropout's.
      bias_values: The bias' `value_table`, where there is one.
      band: Of the rows.
      running: What to add the gradient to, float32, or None.
    """

    q: Any
    k: Any
    v: Any
    dout: Any
    lse: Any
    delta: Any
    ranges: BlockRanges
    q_positions: Any
    kv_positions: Any
    q_segment_ids: Any
    kv_segment_ids: Any
    words: Words | None
    bias: KernelBias | None
    bias_values: Any
    band: Band | None
    running: Any


def differentiate(inputs: Inputs, config: Config) -> tuple[jax.Array, ...]:
    """Runs the kernel: the gradient in whole blocks, float32 where something is running.

    With `bias_gradient` also the sums of which that of the bias is made (`sums_type`).
    """
    own, other = (inputs.q, inputs.k) if config.rows_are_queries else (inputs.k, inputs.q)
    (B, length, num_heads, H), V = own.shape, inputs.v.shape[3]
    num_rows = -(-length // BLOCK)
    deal = Deal.of(
        num_pairs=B * num_heads,
        num_ranks=num_rows,
        pair_bytes=other.shape[1] * max(1, other.shape[2] // num_heads) * (H + V) * own.dtype.itemsize,
        group=max(1, num_heads // other.shape[2]),
        num_cores=config.num_cores,
    )
    dim = V if config.gradient == "dv" else H
    dtype = own.dtype if inputs.running is None else jnp.float32
    outputs = [jax.ShapeDtypeStruct((B, num_rows * BLOCK, num_heads, dim), dtype)]
    leaves, tree = jax.tree.flatten((inputs, queue.new_notes(deal.num_blocks)))

    def smem(*shape):
        return plgpu.SMEM(shape, own.dtype, transforms=TRANSFORMS)

    def vector():
        return plgpu.SMEM((_SLOTS, TILE), jnp.float32)

    def fit(slots_a: int, slots_2: int) -> bool:
        rows = slots_a * BLOCK
        held = (rows + _SLOTS * TILE) * H + (config.needs_dp * rows + slots_2 * TILE) * V
        return held * own.dtype.itemsize <= _SHARED_BYTES

    # b' takes one slot where two do not fit: it is given back while b is still needed.
    slots_a, slots_2 = next((x for x in ((2, _SLOTS), (1, _SLOTS)) if fit(*x)), (1, 1))
    vectors = 0 if config.rows_are_queries else 2 if config.needs_dp else 1
    shared = _Shared(
        a=smem(slots_a, BLOCK, H),
        a_2=smem(slots_a, BLOCK, V) if config.needs_dp else None,
        b=smem(_SLOTS, TILE, H),
        b_2=smem(slots_2, TILE, V),
        lse=vector() if vectors else None,
        delta=vector() if vectors == 2 else None,
        a_full=plgpu.Barrier(num_arrivals=1 + config.needs_dp, num_barriers=slots_a),
        b_full=plgpu.Barrier(num_arrivals=1 + vectors, num_barriers=_SLOTS),
        b_2_full=plgpu.Barrier(num_barriers=slots_2),
        item_full=plgpu.Barrier(num_barriers=queue.SLOTS),
    )
    shared_leaves, shared_tree = jax.tree.flatten(shared)

    def body(*refs):
        refs = iter(refs)
        inputs, notes = jax.tree.unflatten(tree, itertools.islice(refs, tree.num_leaves))
        output, sums = next(refs), next(refs) if config.bias_gradient else None
        _Block(config, deal, inputs, notes, output, sums, jax.tree.unflatten(shared_tree, refs)).run()

    if config.bias_gradient:
        outputs.append(sums_type(inputs.bias, (B, inputs.q.shape[2], num_rows * BLOCK)))
    gradients = plgpu.kernel(
        body,
        out_type=outputs,
        grid=(deal.num_blocks,),
        grid_names=("block",),
        num_threads=_NUM_CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=shared_leaves,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=config.interpret,
    )(*leaves)
    return tuple(gradients)


class _Shared(NamedTuple):
    """Shared memory, and the barriers that say when a buffer is full.

    Attributes:
      a, a_2: The rows of one item or two: queries and dout for dq, else keys and values; values only where they are
        needed.
      b, b_2: Tiles of what they visit: keys and values for dq, else queries and dout.
      lse, delta: Of a tile of queries; None where the rows are queries, and delta for dv.
    """

    a: Any
    a_2: Any
    b: Any
    b_2: Any
    lse: Any
    delta: Any
    a_full: Any
    b_full: Any
    b_2_full: Any
    item_full: Any


class _Tile(NamedTuple):
    """A tile that an item visits.

    Attributes:
      head: The query head.
      index: The tile, counted over the whole length.
      is_full: Whether it needs no pair test.
      is_last: Whether the item visits no tile after it, of this head.
      is_near_end: Whether it is the first of the last block that the item visits.
    """

    head: ArrayLike
    index: ArrayLike
    is_full: ArrayLike
    is_last: ArrayLike
    is_near_end: ArrayLike


class _Block:
    """What one block of threads does."""

    def __init__(self, config: Config, deal: Deal, inputs: Inputs, notes, output, sums, shared: _Shared):
        self.config, self.inputs, self.shared = config, inputs, shared
        self.output, self.sums = output, sums
        self.num_heads, num_kv_heads = inputs.q.shape[2], inputs.k.shape[2]
        self.group = self.num_heads // num_kv_heads
        self.walk = Walk(
            deal=deal,
            ranges=inputs.ranges,
            num_heads=self.num_heads if config.rows_are_queries else num_kv_heads,
            tests_blocks=config.tests_blocks,
        )
        self.dtype = inputs.q.dtype
        self.slots_a, self.slots_2 = shared.a.shape[0], shared.b_2.shape[0]
        self.warpgroup = lax.axis_index("warpgroup")
        # Named barriers that tell the producer that a buffer may be filled again.
        self.a_free = NAMED_BARRIERS.start
        self.b_free = self.a_free + self.slots_a
        self.b_2_free = self.b_free + _SLOTS
        self.everyone = WARPGROUP * (_NUM_CONSUMERS + 1)
        self.queue = queue.Queue(
            walk=self.walk,
            # The interpreter's blocks take no turns.
            in_line=config.in_line and not config.interpret,
            notes=notes,
            full=shared.item_full,
            free=self.b_2_free + self.slots_2,
            num_threads=self.everyone,
            interpret=config.interpret,
        )

    def run(self) -> None:
        @pl.when(self.warpgroup < _NUM_CONSUMERS)
        def _():
            plgpu.set_max_registers(240, action="increase")
            self.consume()

        @pl.when(self.warpgroup == _NUM_CONSUMERS)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            self.produce()

    def for_each_tile(self, item: Item, body: Callable, state, *, end_of_head: Callable | None = None):
        """state = body(a _Tile, state), tile by tile, for dk and dv of all query heads; end_of_head(head, state) after
        each."""

        num_heads = 1 if self.config.rows_are_queries else self.group

        def one_head(number, state):
            head = item.head if self.config.rows_are_queries else item.head * self.group + number
            num_lists = self.inputs.ranges.num_lists
            which = 0 if num_lists == 1 else lax.div(head * num_lists, self.num_heads)

            def one_block(block: Visit, state):
                tiles_of_block = BLOCK // TILE

                def one_tile(i, state):
                    is_last = block.is_last & (i == tiles_of_block - 1)
                    is_near_end = block.is_last & (i == 0) & (number == num_heads - 1)
                    index = block.index * tiles_of_block + i
                    return body(_Tile(head, index, block.is_full, is_last, is_near_end), state)

                return lax.fori_loop(0, tiles_of_block, one_tile, state)

            state = self.walk.visit_in_order(item, which, one_block, state, ascending=True)
            return state if end_of_head is None else end_of_head(head, state)

        return lax.fori_loop(0, num_heads, one_head, state)

    # The producer.

    def produce(self) -> None:
        config, inputs, shared = self.config, self.inputs, self.shared
        queries, keys = (inputs.q, inputs.dout), (inputs.k, inputs.v)
        own, others = (queries, keys) if config.rows_are_queries else (keys, queries)

        def one_item(item: Item, state, ahead: queue.Ahead):
            number, count = state
            slot_a = lax.rem(number, self.slots_a)
            sync(self.a_free + slot_a, self.everyone)
            at = item.batch, pl.ds(item.row * BLOCK, BLOCK), item.head
            for source, target in zip(own, (shared.a, shared.a_2), strict=True):
                if target is not None:
                    plgpu.copy_gmem_to_smem(source.at[at], target.at[slot_a], shared.a_full.at[slot_a])

            def load(tile: _Tile, state):
                count, ahead = state
                # While the buffers of what is visited last are not free yet.
                ahead = lax.cond(tile.is_near_end, self.queue.look_ahead, lambda ahead: ahead, ahead)
                slot, slot_2 = lax.rem(count, _SLOTS), lax.rem(count, self.slots_2)
                tokens = pl.ds(tile.index * TILE, TILE)
                head = lax.div(tile.head, self.group) if config.rows_are_queries else tile.head
                at = item.batch, tokens, head
                sync(self.b_free + slot, self.everyone)
                plgpu.copy_gmem_to_smem(others[0].at[at], shared.b.at[slot], shared.b_full.at[slot])
                for source, target in ((inputs.lse, shared.lse), (inputs.delta, shared.delta)):
                    if target is not None:
                        rows_at = item.batch, tile.head, tokens
                        plgpu.copy_gmem_to_smem(source.at[rows_at], target.at[slot], shared.b_full.at[slot])
                sync(self.b_2_free + slot_2, self.everyone)
                plgpu.copy_gmem_to_smem(others[1].at[at], shared.b_2.at[slot_2], shared.b_2_full.at[slot_2])
                return count + 1, ahead

            count, ahead = self.for_each_tile(item, load, (count, ahead))
            return (number + 1, count), ahead

        self.queue.hand_out(one_item, (jnp.int32(0), jnp.int32(0)))

    # A consumer.

    def consume(self) -> None:
        for slot in range(self.slots_a):
            arrive(self.a_free + slot, self.everyone)
        for slot in range(_SLOTS):
            arrive(self.b_free + slot, self.everyone)
        for slot in range(self.slots_2):
            arrive(self.b_2_free + slot, self.everyone)
        self.queue.take(self.consume_item, (jnp.int32(0), jnp.int32(0)))

    def consume_item(self, item: Item, state):
        number, count = state
        slot_a = lax.rem(number, self.slots_a)
        start = item.row * BLOCK + self.warpgroup * ROWS
        lse_and_delta = None
        if self.config.rows_are_queries:
            at = item.batch, item.head, pl.ds(start, ROWS)
            lse_and_delta = [
                plgpu.load(x.at[at], layout=ROW, optimized=False) for x in (self.inputs.lse, self.inputs.delta)
            ]
        plgpu.barrier_wait(self.shared.a_full.at[slot_a])
        pairs, kept = self.pairs(item, start)
        nothing = plgpu.layout_cast(jnp.zeros((ROWS, self.output.shape[3]), jnp.float32), MATRIX)
        no_sums = nothing_summed(num_sums(self.inputs.bias)) if self.config.bias_gradient else ()

        def one_tile(tile: _Tile, state):
            def step(state):
                return self.step(item, slot_a, tile, pairs, kept, lse_and_delta, *state)

            if self.config.span is None:
                return step(state)
            is_empty = pairs.holds_none(tile.index * TILE)
            return lax.cond(is_empty, functools.partial(self.pass_by, slot_a, tile), step, state)

        def end_of_head(head, state):
            count, gradient, sums = state
            for i, x in enumerate(sums):
                target = self.sums.at[item.batch, head, i, pl.ds(start, ROWS)]
                store_sums(target, x, interpret=bool(self.config.interpret))
            return count, gradient, no_sums

        state, before = (count, nothing, no_sums), count
        count, gradient, _ = self.for_each_tile(item, one_tile, state, end_of_head=end_of_head if no_sums else None)
        is_held = count == before if self.frees_a_early else True
        pl.when(is_held)(lambda: arrive(self.a_free + slot_a, self.everyone))
        return (number + 1, count), functools.partial(self.write, item, start, gradient)

    def step(
        self, item: Item, slot_a, tile: _Tile, pairs: Pairs, kept: KeptPairs | None, lse_and_delta,
        count, gradient, sums,
    ):  # fmt: skip
        """One tile."""
        config, shared = self.config, self.shared
        slot, slot_2 = lax.rem(count, _SLOTS), lax.rem(count, self.slots_2)
        plgpu.barrier_wait(shared.b_full.at[slot])
        if config.needs_dp:
            plgpu.barrier_wait(shared.b_2_full.at[slot_2])
        add_bias = None
        if self.inputs.bias is not None:
            add_bias = self.bias.adding(tile.head, item.batch, *self.sides(item, tile))
        s, dp = self.scores(slot_a, slot, slot_2)

        # Along which queries are.
        spread = columns if lse_and_delta is None else rows

        def of_queries(number: int, ref):
            if lse_and_delta is not None:
                return lse_and_delta[number]
            return plgpu.load(ref.at[slot], layout=COLUMN, optimized=False)

        to_base_2, slope = config.scale * _LOG2_E, None
        if config.soft_cap is not None:
            s = jnp.tanh(s * (config.scale / config.soft_cap))
            to_base_2, slope = config.soft_cap * _LOG2_E, 1.0 - s * s
        lse = of_queries(0, shared.lse)
        if add_bias is not None:
            s, of_all = add_bias(s)
            lse = lse if of_all is None else lse - of_all * to_base_2
        p = jnp.exp2(s * to_base_2 - spread(lse, s.shape))
        if kept is not None:
            # Those that are dropped are negative from here on.
            p = jnp.where(kept.of_tile(tile.head, tile.index * TILE), p, -p)
        if config.needs_dp:
            dp, p = self.settle(dp, p)
            if self.frees_a_early:
                pl.when(tile.is_last)(lambda: arrive(self.a_free + slot_a, self.everyone))
            arrive(self.b_2_free + slot_2, self.everyone)
        else:
            plgpu.barrier_wait(shared.b_2_full.at[slot_2])
        if config.tests_blocks:
            start = tile.index * TILE
            p = lax.cond(tile.is_full, lambda p: p, lambda p: pairs.keep(p, tile.head, start), p)
        if not config.needs_dp:
            gradient = self.product(gradient, p if kept is None else jnp.maximum(p, 0.0), shared.b_2, slot_2)
        else:
            if kept is not None:
                p, dp = dropped(p, dp)
            x = p * (dp - spread(of_queries(1, shared.delta), s.shape))
            if sums:
                sums = added(sums, self.bias.slopes(tile.head, item.batch, *self.sides(item, tile)), x)
            gradient = self.product(gradient, x if slope is None else x * slope, shared.b, slot)
        arrive(self.b_free + slot, self.everyone)
        if not config.needs_dp:  # the product was of b'
            arrive(self.b_2_free + slot_2, self.everyone)
        return count + 1, gradient, sums

    def pass_by(self, slot_a, tile: _Tile, state):
        """A tile that holds no pair: its buffers are given back."""
        count, gradient, sums = state
        slot, slot_2 = lax.rem(count, _SLOTS), lax.rem(count, self.slots_2)
        plgpu.barrier_wait(self.shared.b_full.at[slot])
        plgpu.barrier_wait(self.shared.b_2_full.at[slot_2])
        if self.frees_a_early:
            pl.when(tile.is_last)(lambda: arrive(self.a_free + slot_a, self.everyone))
        arrive(self.b_2_free + slot_2, self.everyone)
        arrive(self.b_free + slot, self.everyone)
        return count + 1, gradient, sums

    @property
    def frees_a_early(self) -> bool:
        """Whether the rows' buffer is given back in the last step, before its products: the only one of an item that
        visits tiles of one head."""
        return self.config.rows_are_queries and self.slots_a == 1

    @property
    def bias(self) -> TileBias:
        """Of tiles of this warpgroup's rows."""
        return TileBias(
            bias=self.inputs.bias,
            values=self.inputs.bias_values,
            reads_early=True,
            columns=TILE,
            rows_are_queries=self.config.rows_are_queries,
            interpret=bool(self.config.interpret),
        )

    def sides(self, item: Item, tile: _Tile) -> tuple[Side, Side]:
        """This warpgroup's rows, and a tile."""
        of_q, of_kv = self.inputs.q_positions, self.inputs.kv_positions
        own, other = (of_q, of_kv) if self.config.rows_are_queries else (of_kv, of_q)
        return Side(own, item.row * BLOCK + self.warpgroup * ROWS), Side(other, tile.index * TILE)

    # Parts of a step: matmuls.

    def scores(self, slot_a, slot, slot_2):
        shared = self.shared
        second = (shared.a_2, shared.b_2, slot_2) if self.config.needs_dp else None
        if not self.config.interpret:
            first = shared.a, shared.b, slot
            return wgmma_split.scores(first, second, slot_a=slot_a, warpgroup=self.warpgroup)
        mine = slot_a, pl.ds(self.warpgroup * ROWS, ROWS)
        s = _dot(shared.a.at[mine][...], shared.b[slot].T)
        return s, None if second is None else _dot(shared.a_2.at[mine][...], shared.b_2[slot_2].T)

    def settle(self, in_flight, x):
        return (in_flight, x) if self.config.interpret else wgmma_backward.settle(in_flight, x)

    def product(self, gradient, x, b, slot):
        """The gradient with the product added of logits' gradients, or probabilities, and a slot of b or b'."""
        x = x.astype(self.dtype)
        if not self.config.interpret:
            return wgmma_split.product(gradient, x, b, slot=slot)
        gradient = gradient + _dot(x, b[slot])
        plgpu.commit_smem()  # an ordinary read, which a copy may overwrite only behind a fence
        return gradient

    def pairs(self, item: Item, start) -> tuple[Pairs, KeptPairs | None]:
        """Of this warpgroup's rows and tiles of what they visit: which may attend, and which are kept, None for all."""
        of_rows = {
            "batch": item.batch,
            "start": start,
            "num_columns": TILE,
            "rows_are_queries": self.config.rows_are_queries,
        }
        pairs = Pairs(self.inputs, self.config, **of_rows)
        return pairs, kept_pairs(self.inputs.words, self.config.dropout_rate, head=item.head, **of_rows)

    def write(self, item: Item, start, gradient) -> None:
        """Writes the gradient of 64 rows, added to what is running."""
        at = item.batch, pl.ds(start, ROWS), item.head
        if self.config.gradient != "dv":
            gradient = gradient * self.config.scale
        if self.inputs.running is not None:
            gradient = gradient + plgpu.load(self.inputs.running.at[at], layout=MATRIX, optimized=False)
        store_tile(self.output.at[at], gradient, interpret=bool(self.config.interpret))


def _dot(x, y) -> jax.Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)

"""The backward kernel of blockwise attention on Hopper GPUs (Mosaic GPU): dq, dk and dv in one walk.

Grid: one block of threads a multiprocessor, which does one item after the other (pallas_mosaic_gpu_queue.py); an item
is a block of 128 keys of one kv head, or, where those are few, of it and a share of its query heads. A producer
warpgroup copies its keys and values, and of each block of queries that its row of the schedule names the tiles of all
its query heads, with their dout, lse and delta, into shared memory (TMA, two buffers). Two consumers, 64 keys each,
keep dk and dv in registers over the whole item and hand a tile's dq, a step later, to a fourth warpgroup, the adder,
through shared memory (two buffers); it adds them into dq in device memory by TMA reductions, and makes the sums of
which the gradient of a bias is made.

On chip: k, v, q and dout (two tiles each), dS (two, for dq) and dq (two, float32) in shared memory; logits, their
gradients, dk and dv in registers.

dS = P (dP - delta) with P = exp(S - lse), dP = dout v^T; delta comes with dlse subtracted.

Many items add into one tile of dq, and float32 sums depend on their order. So unless told otherwise the adder waits for
its turn (pallas_mosaic_gpu_turns.py): a counter for each tile says how many have added. Items that visit scattered
blocks would wait long; what they add is in fixed point (pallas_mosaic_gpu_fixed_point.py), in any order.

Reference: Dao 2023, FlashAttention-2, arXiv:2307.08691, Algorithm 2; Shah et al. 2024, FlashAttention-3,
arXiv:2407.08608, Appendix B.
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

from pallas_kernels.blockwise import pallas_mosaic_gpu_queue as queue
from pallas_kernels.blockwise.pallas_mosaic_gpu_backward_matmuls import PIECE, Matmuls
from pallas_kernels.blockwise.pallas_mosaic_gpu_bias import (
    KernelBias,
    Side,
    TileBias,
    added,
    bring_distances_near,
    nothing_summed,
    num_sums,
    store_sums,
    sums_type,
)
from pallas_kernels.blockwise.pallas_mosaic_gpu_bias_sums import KeySums, near_zeros
from pallas_kernels.blockwise.pallas_mosaic_gpu_dropout import KeptPairs, Words, dropped, kept_pairs
from pallas_kernels.blockwise.pallas_mosaic_gpu_fixed_point import in_units, load_early
from pallas_kernels.blockwise.pallas_mosaic_gpu_pairs import Band, CallConfig, Pairs
from pallas_kernels.blockwise.pallas_mosaic_gpu_tiles import (
    COLUMN,
    MATRIX,
    ROW,
    columns,
    store_tile,
)
from pallas_kernels.blockwise.pallas_mosaic_gpu_turns import Plan, Turns
from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import Item, Visit, Walk, either_way, row_of_batch
from pallas_kernels.mosaic_gpu import (
    NAMED_BARRIERS,
    WARPGROUP,
    arrive,
    bring_near,
    end_turn,
    fence_smem,
    sync,
    take_turn,
)
from pallas_kernels.schedule import BlockRanges
from pallas_kernels.wgmma import ROWS, TRANSFORMS, Arrival

BLOCK = 128
"""Tokens of the schedule's blocks, and keys of an item."""
TILES = {64: 128, 128: 64}
"""Queries of a step, by head dim: what registers and shared memory have room for."""
_SLOTS = 2
_NUM_CONSUMERS = 2
_DQ_TRANSFORMS = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(CallConfig):
    """What is static of a call; it is interpreted by one block of threads, which need not take turns.

    Attributes:
      scales_dq: Whether dq is to be multiplied with `scale` as it is added; else the caller does, as in fixed point.
      bias_gradient: Whether sums are made for the gradient of the bias. Then the plan visits the heads of a group one
        after the other.
      adder_sums: Whether the adder makes those, rather than consumers; of a bias that has a reach those within it too.
      shares: Among how many items the query heads of a kv head are shared out. If several, dk and dv are of each of
        them, in float32, and nothing is running.
    """

    scales_dq: bool
    bias_gradient: bool = False
    adder_sums: bool = False
    shares: int = 1


class Inputs(NamedTuple):
    """What the kernel reads; None where there is nothing to read.

    q, k, v and dout are of lengths that are multiples of 8, the others of whole blocks of the schedule.

    Attributes:
      lse: Base 2, infinite for queries that see nothing, float32 `[B, N, T]`; with dropout log2(1 - rate) more, so that
        probabilities come as 1 / (1 - rate) of what they are.
      delta: rowsum(dout out) - dlse, times 1 - rate, float32 `[B, N, T]`.
      ranges: The schedule's `q_blocks`, from which the plan was made, in the plan's order.
      words: Dropout's.
      bias_values: Its `value_table`, where there is one.
      slopes: The words of its `SlopeTable`, where the adder makes sums for it and it needs one.
      band: Of keys.
      turns: The plan's.
      per_unit: Reciprocals of the units of each query's dq, float32 `[B N T]`, where it is added up in fixed point.
      running: dk and dv to add to, float32.
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
    slopes: Any
    band: Band | None
    turns: Turns | None
    per_unit: Any
    running: tuple[Any, Any] | None


def differentiate(inputs: Inputs, dq: jax.Array, plan: Plan, config: Config) -> tuple[jax.Array, ...]:
    """Runs the kernel: `dq` (of q's shape; float32, or int32 in units) with the rest of dq added, dk and dv, in whole
    blocks of keys.

    Where heads are shared out, dk and dv are `[B, S, K shares, H]`. With `bias_gradient` also the sums of which that is
    made (`sums_type`), and those by distance or None (`near_zeros`).
    """
    B, T, N, H = inputs.q.shape
    S, K = inputs.k.shape[1:3]
    tile = TILES[H]
    is_added_to = config.shares > 1 or inputs.running is not None
    kv_shape = B, -(-S // BLOCK) * BLOCK, K * config.shares, H
    kv_type = jax.ShapeDtypeStruct(kv_shape, jnp.float32 if is_added_to else inputs.k.dtype)
    dq_ref = jax.new_ref(dq)
    counters = None
    if inputs.turns is not None:
        counters = jax.new_ref(jnp.zeros((B * N * -(-T // BLOCK) * (BLOCK // tile),), jnp.int32))
    near = None
    if config.adder_sums and inputs.bias.reach is not None:
        near = jax.new_ref(near_zeros(inputs.bias, (B, N, config.kv_len)))
    leaves, tree = jax.tree.flatten((inputs, dq_ref, counters, near, queue.new_notes(plan.deal.num_blocks)))

    def body(*refs):
        refs = iter(refs)
        inputs, dq_ref, counters, near, notes = jax.tree.unflatten(tree, itertools.islice(refs, tree.num_leaves))
        dk, dv, sums = next(refs), next(refs), next(refs) if config.bias_gradient else None
        outputs = _Outputs(dq=dq_ref, counters=counters, dk=dk, dv=dv, sums=sums, near=near)
        _Block(config, plan, inputs, notes, outputs, jax.tree.unflatten(shared_tree, refs)).run()

    def smem(*shape):
        return plgpu.SMEM(shape, inputs.q.dtype, transforms=TRANSFORMS)

    # With tiles of 128 queries barriers find no room beside them.
    stages_words = config.dropout_rate > 0 and tile == ROWS
    shared = _Shared(
        k=smem(BLOCK, H),
        v=smem(BLOCK, H),
        q=smem(_SLOTS, tile, H),
        dout=smem(_SLOTS, tile, H),
        lse_and_delta=plgpu.SMEM((2, _SLOTS, tile), jnp.float32),  # an array takes whole kilobytes
        words=plgpu.SMEM((_SLOTS, tile), jnp.uint32) if stages_words else None,
        ds=smem(_SLOTS, _NUM_CONSUMERS, ROWS, tile),
        dq=plgpu.SMEM((_SLOTS, _NUM_CONSUMERS, PIECE, PIECE), dq.dtype, transforms=_DQ_TRANSFORMS),
        kv_full=plgpu.Barrier(num_arrivals=2),
        tile_full=plgpu.Barrier(num_arrivals=5 if stages_words else 4, num_barriers=_SLOTS),
        ds_full=plgpu.Barrier(num_arrivals=_NUM_CONSUMERS, num_barriers=_SLOTS),
        ds_free=plgpu.Barrier(num_arrivals=_NUM_CONSUMERS + config.adder_sums, num_barriers=_SLOTS),
        dq_free=plgpu.Barrier(num_barriers=_SLOTS),
        item_full=plgpu.Barrier(num_barriers=queue.SLOTS),
    )
    shared_leaves, shared_tree = jax.tree.flatten(shared)
    out_types = [kv_type, kv_type]
    if config.bias_gradient:
        shape = B, N, kv_shape[1]
        out_types.append(sums_type(inputs.bias, shape, parts=1) if config.adder_sums else sums_type(inputs.bias, shape))
    gradients = plgpu.kernel(
        body,
        out_type=out_types,
        grid=(plan.deal.num_blocks,),
        grid_names=("block",),
        num_threads=_NUM_CONSUMERS + 2,
        thread_name="warpgroup",
        scratch_types=shared_leaves,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=config.interpret,
    )(*leaves)
    if config.bias_gradient:
        gradients.append(None if near is None else jax.freeze(near))
    return jax.freeze(dq_ref), *gradients


class _Outputs(NamedTuple):
    """What it writes; dq, the counters of its tiles' turns and sums by distance are read too."""

    dq: Any
    counters: Any
    dk: Any
    dv: Any
    sums: Any
    near: Any


class _Shared(NamedTuple):
    """Shared memory, and the barriers that say when a buffer is full; words are None where nothing is dropped, or there
    is no room for them.

    Those that say when one of ds or dq may be filled again are here too: at a named barrier consumers would wait for
    each other as well.
    """

    k: Any
    v: Any
    q: Any
    dout: Any
    lse_and_delta: Any
    words: Any
    ds: Any
    dq: Any
    kv_full: Any
    tile_full: Any
    ds_full: Any
    ds_free: Any
    dq_free: Any
    item_full: Any


class _Tile(NamedTuple):
    """A tile of queries that an item visits.

    Attributes:
      head: Of the queries.
      which: Of the lists of ranges.
      block: The block of queries.
      index: The tile, counted over the whole length.
      is_full: Whether it needs no pair test.
    """

    head: ArrayLike
    which: ArrayLike
    block: ArrayLike
    index: ArrayLike
    is_full: ArrayLike


class _Block:
    """What one block of threads does."""

    def __init__(self, config: Config, plan: Plan, inputs: Inputs, notes, outputs: _Outputs, shared: _Shared):
        self.config, self.inputs, self.outputs, self.shared = config, inputs, outputs, shared
        self.heads_together, self.table = plan.heads_together, None if inputs.turns is None else inputs.turns.table
        self.num_heads, self.head_dim = inputs.q.shape[2:]
        num_heads_of_items = inputs.k.shape[2] * config.shares
        self.group = self.num_heads // num_heads_of_items
        self.tile_len = TILES[self.head_dim]
        self.tiles_of_block = BLOCK // self.tile_len
        self.num_tiles = -(-inputs.q.shape[1] // BLOCK) * self.tiles_of_block
        self.walk = Walk(
            deal=plan.deal,
            section=None if self.table is None else self.table.section,
            ranges=inputs.ranges,
            num_heads=num_heads_of_items,
            tests_blocks=config.tests_blocks,
        )
        self.dtype = inputs.q.dtype
        self.tile = ROWS, self.tile_len
        self.warpgroup = lax.axis_index("warpgroup")
        # Named barriers.
        self.kv_free, self.tile_free, _, self.dq_full, _, item_free, _ = NAMED_BARRIERS[:7]
        self.consumers_and_one = WARPGROUP * (_NUM_CONSUMERS + 1)
        self.matmuls = Matmuls(shared, warpgroup=self.warpgroup, interpret=bool(config.interpret))
        self.queue = queue.Queue(
            walk=self.walk,
            in_line=True,
            notes=notes,
            full=shared.item_full,
            free=item_free,
            num_threads=WARPGROUP * (_NUM_CONSUMERS + 2),
            interpret=config.interpret,
        )

    def run(self) -> None:
        for warpgroups, registers, role in (
            (range(2), 232, self.consume),
            (range(2, 3), 24, self.produce),
            (range(3, 4), 24, self.add),
        ):

            @pl.when((self.warpgroup >= warpgroups.start) & (self.warpgroup < warpgroups.stop))
            def _(registers=registers, role=role):
                plgpu.set_max_registers(registers, action="increase" if registers > 128 else "decrease")
                role()

    def for_each_tile(self, item: Item, body: Callable, state, *, end_of_heads: Callable | None = None):
        """state = body(a _Tile, state), tile by tile, and end_of_heads(the first of some heads, state) after these.

        A block of some heads of the group before the next, so that items that follow each other in the schedule do so
        in the tiles of each of these heads; then other heads of the group.
        """
        # Read for each item: there are no registers to keep it in.
        ascends = False if self.table is None or self.table.ascends is None else self.table.ascends[0] != 0

        def some_heads(number, state):
            first_head = item.head * self.group + number * self.heads_together
            num_lists = self.inputs.ranges.num_lists
            which = 0 if num_lists == 1 else lax.div(first_head * num_lists, self.num_heads)

            def one_block(block: Visit, state):
                def one_tile(i, state):
                    member, i = lax.div(i, self.tiles_of_block), lax.rem(i, self.tiles_of_block)
                    tile = block.index * self.tiles_of_block + either_way(ascends, i, self.tiles_of_block - 1 - i)
                    head = first_head + member
                    return body(_Tile(head, which, block.index, tile, block.is_full), state)

                return lax.fori_loop(0, self.heads_together * self.tiles_of_block, one_tile, state)

            state = self.walk.visit_in_order(item, which, one_block, state, ascending=ascends)
            return state if end_of_heads is None else end_of_heads(first_head, state)

        return lax.fori_loop(0, self.group // self.heads_together, some_heads, state)

    # The producer.

    def produce(self) -> None:
        inputs, shared = self.inputs, self.shared

        def one_item(item: Item, count, ahead: queue.Ahead):
            sync(self.kv_free, self.consumers_and_one)
            kv_head = lax.div(item.head, self.config.shares) if self.config.shares > 1 else item.head
            keys = item.batch, pl.ds(item.row * BLOCK, BLOCK), kv_head
            plgpu.copy_gmem_to_smem(inputs.k.at[keys], shared.k, shared.kv_full)
            plgpu.copy_gmem_to_smem(inputs.v.at[keys], shared.v, shared.kv_full)

            def load(tile: _Tile, count):
                slot = lax.rem(count, _SLOTS)
                queries = pl.ds(tile.index * self.tile_len, self.tile_len)
                sync(self.tile_free + slot, self.consumers_and_one)
                for source, target in ((inputs.q, shared.q), (inputs.dout, shared.dout)):
                    at = item.batch, queries, tile.head
                    plgpu.copy_gmem_to_smem(source.at[at], target.at[slot], shared.tile_full.at[slot])
                lse, delta = shared.lse_and_delta.at[0], shared.lse_and_delta.at[1]
                vectors = [(inputs.lse, lse), (inputs.delta, delta)]
                if shared.words is not None:
                    vectors.append((inputs.words.queries, shared.words))
                for source, target in vectors:
                    at = row_of_batch(source, item.batch), tile.head, queries
                    plgpu.copy_gmem_to_smem(source.at[at], target.at[slot], shared.tile_full.at[slot])
                self.bring_tokens_near(item.batch, tile.block, tile.is_full)
                self.bring_bias_near(item, tile)
                return count + 1

            return self.for_each_tile(item, load, count), ahead

        self.queue.hand_out(one_item, jnp.int32(0))

    def bring_tokens_near(self, batch, block, is_full) -> None:
        """Those of queries that consumers will wait for, to test pairs: there is no shared memory left for them."""
        given = [x for x in (self.inputs.q_positions, self.inputs.q_segment_ids) if x is not None]
        if self.config.pair_test is None or not given or self.config.interpret:
            return
        at = [x.at[row_of_batch(x, batch), pl.ds(block * BLOCK, BLOCK)] for x in given]
        pl.when(jnp.logical_not(is_full))(lambda: bring_near(*at))

    def bring_bias_near(self, item: Item, tile: _Tile) -> None:
        """What consumers will read of the table of biases."""
        if self.inputs.bias_values is None or self.config.interpret:
            return
        distance = tile.index * self.tile_len - item.row * BLOCK
        bring_distances_near([self.inputs.bias_values.at[tile.head]], distance - BLOCK, 2 * BLOCK)

    # The adder.

    def add(self) -> None:
        for slot in range(_SLOTS):
            plgpu.barrier_arrive(self.shared.dq_free.at[slot])
            if self.config.adder_sums:
                plgpu.barrier_arrive(self.shared.ds_free.at[slot])
        counters, none = self.outputs.counters, jnp.int32(-1)
        no_sums = self.key_sums.nothing() if self.config.adder_sums else ()

        def one_item(item: Item, state):
            def one_tile(tile: _Tile, state):
                count, last, sums = state
                slot = lax.rem(count, _SLOTS)
                pair = item.batch * self.num_heads + tile.head
                counter = pair * self.num_tiles + tile.index
                if sums:
                    sums, last = self.with_sums_of(item, tile, slot, sums, last)
                if self.takes_turns:
                    turn = self.inputs.turns.at(item.batch, tile.which, item.row, tile.block)
                    take_turn(counters, counter, turn, last, by_copies=True)
                else:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                # What was added last need no longer be kept.
                pl.when(count > 0)(lambda: plgpu.barrier_arrive(self.shared.dq_free.at[_SLOTS - 1 - slot]))
                sync(self.dq_full + slot, self.consumers_and_one)
                for piece in range(_NUM_CONSUMERS):
                    self.add_piece(item.batch, tile.head, tile.index, slot, piece)
                return count + 1, counter, sums

            def end_of_head(head, state):
                count, last, sums = state
                for i, x in enumerate(sums):
                    self.outputs.sums.at[item.batch, head, i, pl.ds(item.row * BLOCK, BLOCK), 0][...] = x
                return count, last, no_sums

            end_of_heads = end_of_head if no_sums else None
            state = self.for_each_tile(item, one_tile, (*state, no_sums), end_of_heads=end_of_heads)
            return state[:2], lambda: None

        count, last = self.queue.take(one_item, (jnp.int32(0), none))
        if self.takes_turns:
            end_turn(counters, last, by_copies=True)
        plgpu.wait_smem_to_gmem(0)
        pl.when(count > 0)(lambda: plgpu.barrier_arrive(self.shared.dq_free.at[lax.rem(count - 1, _SLOTS)]))

    @property
    def key_sums(self) -> KeySums:
        return KeySums(
            bias=self.inputs.bias,
            table=self.inputs.slopes,
            near=self.outputs.near,
            kv_len=self.config.kv_len,
            ds=self.shared.ds,
            interpret=bool(self.config.interpret),
        )

    def with_sums_of(self, item: Item, tile: _Tile, slot, sums, last):
        """Sums for the bias with those of a tile, and `last`, none if that turn has ended."""
        distance = jnp.asarray(tile.index * self.tile_len - item.row * BLOCK, jnp.int32)
        self.key_sums.bring_near(tile.head, distance)
        plgpu.barrier_wait(self.shared.ds_full.at[slot])
        # The turn is not kept until all sums are made, unless they read what its wait drives from the cache.
        ends_turn = self.takes_turns and self.inputs.slopes is None

        def between():
            if ends_turn:
                end_turn(self.outputs.counters, last, by_copies=True)

        sums = self.key_sums.added(sums, slot, tile.head, item.batch, item.row, distance, between)
        plgpu.barrier_arrive(self.shared.ds_free.at[slot])
        return sums, jnp.int32(-1) if ends_turn else last

    @property
    def takes_turns(self) -> bool:
        return self.inputs.turns is not None and not self.config.interpret

    def add_piece(self, batch, head, tile, slot, piece) -> None:
        q_start = tile * self.tile_len + (piece * PIECE if self.matmuls.two_parts else 0)
        column = 0 if self.matmuls.two_parts else piece * PIECE
        target = self.outputs.dq.at[batch, pl.ds(q_start, PIECE), head, pl.ds(column, PIECE)]
        source = self.shared.dq.at[slot, piece]
        if not self.config.interpret:
            plgpu.copy_smem_to_gmem(source, target, reduction_op="add")
            return
        target[...] = plgpu.load(target, layout=MATRIX, optimized=False) + source[...]

    # A consumer.

    def consume(self) -> None:
        arrive(self.kv_free, self.consumers_and_one)
        for slot in range(_SLOTS):
            arrive(self.tile_free + slot, self.consumers_and_one)
            plgpu.barrier_arrive(self.shared.ds_free.at[slot])
        self.queue.take(self.consume_item, jnp.int32(0))
        for slot in range(_SLOTS):  # so that no barrier is left that nobody waits at
            plgpu.barrier_wait(self.shared.ds_free.at[slot])
            plgpu.barrier_wait(self.shared.dq_free.at[slot])

    def consume_item(self, item: Item, count):
        plgpu.barrier_wait(self.shared.kv_full)
        pairs, kept = self.pairs(item)
        nothing = plgpu.layout_cast(jnp.zeros((ROWS, self.head_dim), jnp.float32), MATRIX)
        no_sums = ()
        if self.config.bias_gradient and not self.config.adder_sums:
            no_sums = nothing_summed(num_sums(self.inputs.bias))

        def one_tile(tile: _Tile, state):
            return self.step(item, tile, pairs, kept, state[0] == begin, state)

        def end_of_head(head, state):
            count, dk, dv, sums, per_unit = state
            for i, x in enumerate(sums):
                at = item.batch, head, i, pl.ds(item.row * BLOCK + self.warpgroup * ROWS, ROWS)
                store_sums(self.outputs.sums.at[at], x, interpret=bool(self.config.interpret))
            return count, dk, dv, no_sums, per_unit

        begin, per_unit = count, None
        if self.inputs.per_unit is not None:
            per_unit = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
        state = count, nothing, nothing, no_sums, per_unit
        end_of_heads = end_of_head if no_sums else None
        count, dk, dv, _, per_unit = self.for_each_tile(item, one_tile, state, end_of_heads=end_of_heads)
        pl.when(count > begin)(lambda: self.hand_over_last(lax.rem(count - 1, _SLOTS), per_unit))
        arrive(self.kv_free, self.consumers_and_one)
        return count, functools.partial(self.write, item, dk * self.config.scale, dv)

    def step(self, item: Item, tile: _Tile, pairs: Pairs, kept: KeptPairs | None, is_first, state):
        """One tile of queries; dq of the tile before, if it is not the item's first.

        Args:
          state: Of tiles so far, their number, dk and dv, the sums for the bias that consumers make, and `per_unit` of
            the last.
        """
        count, dk, dv, sums, per_unit_before = state
        config, shared, slot = self.config, self.shared, lax.rem(count, _SLOTS)
        per_unit = None if self.inputs.per_unit is None else self.per_unit(item, tile)
        add_bias = None
        if self.inputs.bias is not None:
            add_bias = self.bias(self.tile_len).adding(tile.head, item.batch, *self.sides(item, tile))
        plgpu.barrier_wait(shared.tile_full.at[slot])
        s, dp = self.matmuls.scores(slot)
        lse = plgpu.load(shared.lse_and_delta.at[0, slot], layout=COLUMN, optimized=False)
        to_base_2, slope = config.scale * _LOG2_E, None
        if config.soft_cap is not None:
            s = jnp.tanh(s * (config.scale / config.soft_cap))
            # As precise as the tanh; with float32's registers beside those of p there would be spills.
            to_base_2, slope = config.soft_cap * _LOG2_E, (1.0 - s * s).astype(jnp.float16)
        if add_bias is not None:
            s, of_all = add_bias(s)
            lse = lse if of_all is None else lse - of_all * to_base_2
        p = jnp.exp2(s * to_base_2 - columns(lse, self.tile))
        if kept is not None:
            # Those that are dropped are negative from here on.
            if shared.words is None:
                is_kept = kept.of_tile(tile.head, tile.index * self.tile_len)
            else:
                is_kept = kept.of_columns(plgpu.load(shared.words.at[slot], layout=COLUMN, optimized=False))
            p = jnp.where(is_kept, p, -p)
        dp, p = self.matmuls.settle(dp, p)

        summed = list(sums)

        def gradient_of_logits(p, dp, part: int):
            """Of the part-th 64 queries."""
            of_part = shared.lse_and_delta.at[1, slot, pl.ds(part * ROWS, ROWS)]
            delta = plgpu.load(of_part, layout=COLUMN, optimized=False)
            if kept is not None:
                p, dp = dropped(p, dp)
            ds = p * (dp - columns(delta, p.shape))
            if summed:
                sides = self.sides(item, tile, part)
                summed[:] = added(summed, self.bias(ROWS).slopes(tile.head, item.batch, *sides), ds)
            return ds if slope is None else ds * slope[:, part * ROWS : (part + 1) * ROWS].astype(jnp.float32)

        if config.tests_blocks:
            start = tile.index * self.tile_len
            p = lax.cond(tile.is_full, lambda p: p, lambda p: pairs.keep(p, tile.head, start), p)
        ds = [gradient_of_logits(p[:, :ROWS] if self.matmuls.two_parts else p, dp, 0).astype(self.dtype)]
        others = p[:, ROWS:] if self.matmuls.two_parts else None
        p = (p if kept is None else jnp.maximum(p, 0.0)).astype(self.dtype)
        if self.matmuls.two_parts:
            dp, dv = self.matmuls.more(slot, dv, p)
            dv, second = self.matmuls.settle(dv, gradient_of_logits(others, dp, 1))
            ds.append(second.astype(self.dtype))
        plgpu.barrier_wait(shared.ds_free.at[slot])
        for part, x in enumerate(ds):
            shared.ds.at[slot, self.warpgroup, :, pl.ds(part * ROWS, ROWS)][...] = x
        self.fence()
        plgpu.barrier_arrive(shared.ds_full.at[slot])
        products = functools.partial(self.products, slot, per_unit_before, p, ds)
        dv, dk = lax.cond(is_first, products, functools.partial(products, with_dq=True), dv, dk)
        return count + 1, dk, dv, tuple(summed), per_unit

    def products(self, slot, per_unit, p, ds, dv, dk, *, with_dq: bool = False):
        """dv and dk with those of a tile added; hands over dq of the tile before."""
        before = _SLOTS - 1 - slot
        if with_dq:
            plgpu.barrier_wait(self.shared.ds_full.at[before])
        dq, in_flight = self.matmuls.gradients(slot, dv, dk, p, ds, before if with_dq else None)
        if with_dq:
            self.hand_over(before, dq, per_unit)
        return self.matmuls.finish(dv, in_flight, Arrival(self.tile_free + slot, self.consumers_and_one))

    def hand_over_last(self, slot, per_unit) -> None:
        """dq of the item's last tile, to the adder."""
        plgpu.barrier_wait(self.shared.ds_full.at[slot])
        self.hand_over(slot, self.matmuls.dq(slot), per_unit)

    def hand_over(self, slot, dq, per_unit) -> None:
        """This warpgroup's piece of dq, to the adder; what it was made of may be overwritten."""
        shared = self.shared
        plgpu.barrier_arrive(shared.ds_free.at[slot])
        if per_unit is not None:
            dq = in_units(dq, per_unit, interpret=bool(self.config.interpret))
        plgpu.barrier_wait(shared.dq_free.at[slot])
        shared.dq.at[slot, self.warpgroup][...] = dq * self.config.scale if self.config.scales_dq else dq
        self.fence()
        arrive(self.dq_full + slot, self.consumers_and_one)

    def per_unit(self, item: Item, tile: _Tile):
        """Of this warpgroup's piece of a tile's dq."""
        start = tile.index * self.tile_len + (self.warpgroup * PIECE if self.matmuls.two_parts else 0)
        start += (item.batch * self.num_heads + tile.head) * (self.num_tiles * self.tile_len)
        if self.config.interpret:
            return plgpu.load(self.inputs.per_unit.at[pl.ds(start, PIECE)], layout=ROW, optimized=False)
        return load_early(self.inputs.per_unit, start)

    def bias(self, num_queries: int) -> TileBias:
        """Of tiles of this warpgroup's keys and so many queries."""
        return TileBias(
            bias=self.inputs.bias,
            values=self.inputs.bias_values,
            reads_early=True,
            columns=num_queries,
            rows_are_queries=False,
            interpret=bool(self.config.interpret),
        )

    def sides(self, item: Item, tile: _Tile, part: int = 0) -> tuple[Side, Side]:
        """This warpgroup's keys, and a tile's queries from its part-th 64 on."""
        keys = Side(self.inputs.kv_positions, item.row * BLOCK + self.warpgroup * ROWS)
        return keys, Side(self.inputs.q_positions, tile.index * self.tile_len + part * ROWS)

    def fence(self) -> None:
        """Before what this warpgroup has written to shared memory is read by a copy or a matmul."""
        if self.config.interpret:
            plgpu.commit_smem()
        else:
            fence_smem()

    def pairs(self, item: Item) -> tuple[Pairs, KeptPairs | None]:
        """Of this warpgroup's keys and tiles of queries: which may attend, and which are kept, None for all."""
        of_rows = {
            "batch": item.batch,
            "start": item.row * BLOCK + self.warpgroup * ROWS,
            "num_columns": self.tile_len,
            "rows_are_queries": False,
        }
        pairs = Pairs(self.inputs, self.config, **of_rows)
        return pairs, kept_pairs(self.inputs.words, self.config.dropout_rate, head=item.head, **of_rows)

    def write(self, item: Item, dk, dv) -> None:
        """Writes what has come of 64 keys, added to what is running."""
        at = item.batch, pl.ds(item.row * BLOCK + self.warpgroup * ROWS, ROWS), item.head
        running = self.inputs.running or (None, None)
        for target, x, before in ((self.outputs.dk, dk, running[0]), (self.outputs.dv, dv, running[1])):
            if before is not None:
                x = x + plgpu.load(before.at[at], layout=MATRIX, optimized=False)
            store_tile(target.at[at], x, interpret=bool(self.config.interpret))

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

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise import pallas_mosaic_gpu_queue as queue
from pallas_kernels.blockwise.pallas_mosaic_gpu_backward_feed import Adder, Producer
from pallas_kernels.blockwise.pallas_mosaic_gpu_backward_matmuls import PIECE
from pallas_kernels.blockwise.pallas_mosaic_gpu_backward_role import (
    BLOCK,
    NUM_CONSUMERS,
    SLOTS,
    TILES,
    Config,
    Inputs,
    Outputs,
    Role,
    Shared,
    Tile,
)
from pallas_kernels.blockwise.pallas_mosaic_gpu_bias import (
    Side,
    TileBias,
    added,
    nothing_summed,
    num_sums,
    store_sums,
    sums_type,
)
from pallas_kernels.blockwise.pallas_mosaic_gpu_bias_sums import near_zeros
from pallas_kernels.blockwise.pallas_mosaic_gpu_dropout import KeptPairs, dropped, kept_pairs
from pallas_kernels.blockwise.pallas_mosaic_gpu_fixed_point import in_units, load_early
from pallas_kernels.blockwise.pallas_mosaic_gpu_pairs import Pairs
from pallas_kernels.blockwise.pallas_mosaic_gpu_tiles import COLUMN, MATRIX, ROW, columns, store_tile
from pallas_kernels.blockwise.pallas_mosaic_gpu_turns import Plan
from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import Item
from pallas_kernels.mosaic_gpu import arrive, fence_smem
from pallas_kernels.wgmma import ROWS, TRANSFORMS, Arrival

_DQ_TRANSFORMS = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
_LOG2_E = math.log2(math.e)


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
        outputs = Outputs(dq=dq_ref, counters=counters, dk=dk, dv=dv, sums=sums, near=near)
        shared = jax.tree.unflatten(shared_tree, refs)
        of_all = config, plan, inputs, notes, outputs, shared, lax.axis_index("warpgroup")
        for role, warpgroups, registers in (
            (_Consumer, range(NUM_CONSUMERS), 232),
            (Producer, range(NUM_CONSUMERS, NUM_CONSUMERS + 1), 24),
            (Adder, range(NUM_CONSUMERS + 1, NUM_CONSUMERS + 2), 24),
        ):
            _run(role(*of_all), warpgroups, registers)

    def smem(*shape):
        return plgpu.SMEM(shape, inputs.q.dtype, transforms=TRANSFORMS)

    # With tiles of 128 queries barriers find no room beside them.
    stages_words = config.dropout_rate > 0 and tile == ROWS
    shared = Shared(
        k=smem(BLOCK, H),
        v=smem(BLOCK, H),
        q=smem(SLOTS, tile, H),
        dout=smem(SLOTS, tile, H),
        lse_and_delta=plgpu.SMEM((2, SLOTS, tile), jnp.float32),  # an array takes whole kilobytes
        words=plgpu.SMEM((SLOTS, tile), jnp.uint32) if stages_words else None,
        ds=smem(SLOTS, NUM_CONSUMERS, ROWS, tile),
        dq=plgpu.SMEM((SLOTS, NUM_CONSUMERS, PIECE, PIECE), dq.dtype, transforms=_DQ_TRANSFORMS),
        kv_full=plgpu.Barrier(num_arrivals=2),
        tile_full=plgpu.Barrier(num_arrivals=5 if stages_words else 4, num_barriers=SLOTS),
        ds_full=plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=SLOTS),
        ds_free=plgpu.Barrier(num_arrivals=NUM_CONSUMERS + config.adder_sums, num_barriers=SLOTS),
        dq_free=plgpu.Barrier(num_barriers=SLOTS),
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
        num_threads=NUM_CONSUMERS + 2,
        thread_name="warpgroup",
        scratch_types=shared_leaves,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=config.interpret,
    )(*leaves)
    if config.bias_gradient:
        gradients.append(None if near is None else jax.freeze(near))
    return jax.freeze(dq_ref), *gradients


def _run(role: Role, warpgroups: range, registers: int) -> None:
    """Runs it on these warpgroups, with so many registers a thread."""

    @pl.when((role.warpgroup >= warpgroups.start) & (role.warpgroup < warpgroups.stop))
    def _():
        plgpu.set_max_registers(registers, action="increase" if registers > 128 else "decrease")
        role.run()


class _Consumer(Role):
    """Computes 64 keys' dk and dv, and their part of dq."""

    def run(self) -> None:
        arrive(self.kv_free, self.consumers_and_one)
        for slot in range(SLOTS):
            arrive(self.tile_free + slot, self.consumers_and_one)
            plgpu.barrier_arrive(self.shared.ds_free.at[slot])
        self.queue.take(self.consume_item, jnp.int32(0))
        for slot in range(SLOTS):  # so that no barrier is left that nobody waits at
            plgpu.barrier_wait(self.shared.ds_free.at[slot])
            plgpu.barrier_wait(self.shared.dq_free.at[slot])

    def consume_item(self, item: Item, count):
        plgpu.barrier_wait(self.shared.kv_full)
        pairs, kept = self.pairs(item)
        nothing = plgpu.layout_cast(jnp.zeros((ROWS, self.head_dim), jnp.float32), MATRIX)
        no_sums = ()
        if self.config.bias_gradient and not self.config.adder_sums:
            no_sums = nothing_summed(num_sums(self.inputs.bias))

        def one_tile(tile: Tile, state):
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
        pl.when(count > begin)(lambda: self.hand_over_last(lax.rem(count - 1, SLOTS), per_unit))
        arrive(self.kv_free, self.consumers_and_one)
        return count, functools.partial(self.write, item, dk * self.config.scale, dv)

    def step(self, item: Item, tile: Tile, pairs: Pairs, kept: KeptPairs | None, is_first, state):
        """One tile of queries; dq of the tile before, if it is not the item's first.

        Args:
          state: Of tiles so far, their number, dk and dv, the sums for the bias that consumers make, and `per_unit` of
            the last.
        """
        count, dk, dv, sums, per_unit_before = state
        config, shared, slot = self.config, self.shared, lax.rem(count, SLOTS)
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
        before = SLOTS - 1 - slot
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

    def per_unit(self, item: Item, tile: Tile):
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

    def sides(self, item: Item, tile: Tile, part: int = 0) -> tuple[Side, Side]:
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

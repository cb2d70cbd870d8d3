"""The consumers of the Hopper backward kernel: what is computed of a tile, and how its dq goes to the adder.

pallas_mosaic_gpu_backward.py says how the kernel works.
"""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise.pallas_mosaic_gpu_backward_matmuls import PIECE
from pallas_kernels.blockwise.pallas_mosaic_gpu_backward_role import AT_A_TIME, BLOCK, SLOTS, Role, Tile
from pallas_kernels.blockwise.pallas_mosaic_gpu_bias import (
    Side,
    TileBias,
    added,
    nothing_summed,
    num_sums,
    store_sums,
)
from pallas_kernels.blockwise.pallas_mosaic_gpu_dropout import KeptPairs, dropped, kept_pairs
from pallas_kernels.blockwise.pallas_mosaic_gpu_fixed_point import in_units, load_early
from pallas_kernels.blockwise.pallas_mosaic_gpu_pairs import Pairs
from pallas_kernels.blockwise.pallas_mosaic_gpu_tiles import COLUMN, MATRIX, ROW, columns, store_tile
from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import Item
from pallas_kernels.mosaic_gpu import arrive, do_not_unroll, fence_smem
from pallas_kernels.wgmma import ROWS, Arrival

_LOG2_E = math.log2(math.e)


class Step(NamedTuple):
    """A tile of queries that a block of keys visits.

    Attributes:
      slot: In which it lies in shared memory.
      pairs, kept: Which pairs may attend, and which are kept, None for all.
      add_bias: Adds the bias to logits of it, if there is one.
    """

    item: Item
    tile: Tile
    slot: Any
    pairs: Pairs
    kept: KeptPairs | None
    add_bias: Any


class Consumer(Role):
    """Computes 64 keys' dk and dv, and their part of dq."""

    def run(self) -> None:
        arrive(self.kv_free, self.consumers_and_one)
        for slot in range(SLOTS):
            arrive(self.tile_free + slot, self.consumers_and_one)
            plgpu.barrier_arrive(self.shared.ds_free.at[slot])
        self.queue.take(self.consume_item, jnp.int32(0))
        for slot in range(SLOTS):  # so that no barrier is left that nobody waits at
            plgpu.barrier_wait(self.shared.ds_free.at[slot])
            self.wait_for_adder(slot)

    def wait_for_adder(self, slot: int) -> None:
        """Until it has taken what was handed over last."""
        plgpu.barrier_wait(self.shared.dq_free.at[slot])

    def consume_item(self, item: Item, count):
        plgpu.barrier_wait(self.shared.kv_full)
        pairs, kept = self.pairs(item)
        no_dk, no_dv = (
            plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), MATRIX) for dim in (self.head_dim, self.value_dim)
        )
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
        state = count, no_dk, no_dv, no_sums, per_unit
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
        slot = lax.rem(count, SLOTS)
        per_unit = None if self.inputs.per_unit is None else self.per_unit(item, tile)
        add_bias = None
        if self.inputs.bias is not None:
            add_bias = self.bias(self.tile_len).adding(tile.head, item.batch, *self.sides(item, tile))
        plgpu.barrier_wait(self.shared.tile_full.at[slot])
        p, ds, dv, sums = self.of_logits(Step(item, tile, slot, pairs, kept, add_bias), dv, sums)
        plgpu.barrier_arrive(self.shared.ds_full.at[slot])
        products = functools.partial(self.products, slot, per_unit_before, p, ds)
        dv, dk = lax.cond(is_first, products, functools.partial(products, with_dq=True), dv, dk)
        return count + 1, dk, dv, sums, per_unit

    def of_logits(self, step: Step, dv, sums):
        """p and dS, 16-bit, dS in shared memory too; dv, with that of the tile if it has two parts, and sums."""
        shared, two_parts, summed = self.shared, self.matmuls.two_parts, list(sums)
        p, dp, slope = self.probabilities(step)
        gradient = functools.partial(self.gradient_of_logits, step, summed=summed, slope=slope)
        ds = [gradient(p[:, :ROWS] if two_parts else p, dp, 0).astype(self.dtype)]
        others = p[:, ROWS:] if two_parts else None
        p = (p if step.kept is None else jnp.maximum(p, 0.0)).astype(self.dtype)
        if two_parts:
            dp, dv = self.matmuls.more(step.slot, dv, p)
            dv, second = self.matmuls.settle(dv, gradient(others, dp, 1))
            ds.append(second.astype(self.dtype))
        plgpu.barrier_wait(shared.ds_free.at[step.slot])
        for part, x in enumerate(ds):
            shared.ds.at[step.slot, self.warpgroup, :, pl.ds(part * ROWS, ROWS)][...] = x
        self.fence()
        return p, ds, dv, tuple(summed)

    def probabilities(self, step: Step, rows=None):
        """Of a tile's queries, or those that the first and the number in `rows` say: p; the gradients of the first 64
        of them; and by what a soft cap lessens those of logits, or None."""
        config, shared, slot, tile = self.config, self.shared, step.slot, step.tile
        s, dp = self.matmuls.scores(slot, rows)
        queries = () if rows is None else (pl.ds(*rows),)
        lse = plgpu.load(shared.lse_and_delta.at[0, slot, *queries], layout=COLUMN, optimized=False)
        to_base_2, slope = config.scale * _LOG2_E, None
        if config.soft_cap is not None:
            s = jnp.tanh(s * (config.scale / config.soft_cap))
            # As precise as the tanh; with float32's registers beside those of p there would be spills.
            to_base_2, slope = config.soft_cap * _LOG2_E, (1.0 - s * s).astype(jnp.float16)
        if step.add_bias is not None:
            s, of_all = step.add_bias(s)
            lse = lse if of_all is None else lse - of_all * to_base_2
        p = jnp.exp2(s * to_base_2 - columns(lse, s.shape))
        if step.kept is not None:
            # Those that are dropped are negative from here on.
            if shared.words is None:
                is_kept = step.kept.of_tile(tile.head, tile.index * self.tile_len)
            else:
                is_kept = step.kept.of_columns(plgpu.load(shared.words.at[slot], layout=COLUMN, optimized=False))
            p = jnp.where(is_kept, p, -p)
        dp, p = self.matmuls.settle(dp, p)
        if config.tests_blocks:
            start = tile.index * self.tile_len + (0 if rows is None else rows[0])
            p = lax.cond(tile.is_full, lambda p: p, lambda p: step.pairs.keep(p, tile.head, start), p)
        return p, dp, slope

    def gradient_of_logits(self, step: Step, p, dp, part, *, summed: list, slope=None):
        """Of the part-th part of a tile's queries, as many as dp has; for the bias added to what is summed."""
        num_queries = dp.shape[1]
        of_part = self.shared.lse_and_delta.at[1, step.slot, pl.ds(part * num_queries, num_queries)]
        delta = plgpu.load(of_part, layout=COLUMN, optimized=False)
        if step.kept is not None:
            p, dp = dropped(p, dp)
        ds = p * (dp - columns(delta, p.shape))
        if summed:
            sides = self.sides(step.item, step.tile, part)
            slopes = self.bias(ROWS).slopes(step.tile.head, step.item.batch, *sides)
            summed[:] = added(summed, slopes, ds)
        return ds if slope is None else ds * slope[:, part * ROWS : (part + 1) * ROWS].astype(jnp.float32)

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
        self.hand_over(slot, self.matmuls.dq(slot, self.first_piece), per_unit)

    @property
    def first_piece(self):
        """Of a tile of dq, which this warpgroup makes first."""
        return self.warpgroup

    def hand_over(self, slot, dq, per_unit) -> None:
        """This warpgroup's piece of dq, to the adder; what it was made of may be overwritten."""
        plgpu.barrier_arrive(self.shared.ds_free.at[slot])
        self.give(dq, per_unit, buffer=slot, free=slot, full=slot, num_threads=self.consumers_and_one)

    def give(self, dq, per_unit, *, buffer, free, full, num_threads: int) -> None:
        """A piece of dq to the adder, in this warpgroup's part of a buffer.

        Args:
          free: Which of the barriers that say that it is.
          full: Which of those to arrive at, with so many threads.
        """
        if per_unit is not None:
            dq = in_units(dq, per_unit, interpret=bool(self.config.interpret))
        plgpu.barrier_wait(self.shared.dq_free.at[free])
        self.shared.dq.at[buffer, self.warpgroup][...] = dq * self.config.scale if self.config.scales_dq else dq
        self.fence()
        arrive(self.dq_full + full, num_threads)

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
            "num_columns": AT_A_TIME[self.head_dim],
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


class WideConsumer(Consumer):
    """Of head dims that leave registers for 32 queries' logits at a time. dS goes to shared memory at once, and dq of
    the tile before comes last: this warpgroup's own piece, then, in turns, the one in the middle of three."""

    def wait_for_adder(self, slot: int) -> None:
        if slot == 0:  # it has one buffer
            plgpu.barrier_wait(self.shared.dq_free.at[self.warpgroup])

    def of_logits(self, step: Step, dv, sums):
        num_queries = AT_A_TIME[self.head_dim]
        plgpu.barrier_wait(self.shared.ds_free.at[step.slot])

        def one_part(part, so_far):
            # Unrolled, what both parts have in common would be kept, in registers that are not there.
            if not self.config.interpret:
                do_not_unroll()
            first = part * num_queries
            p, dp, _ = self.probabilities(step, (first, num_queries))
            ds = self.gradient_of_logits(step, p, dp, part, summed=[])
            self.matmuls.store_half(step.slot, first, ds.astype(self.dtype))
            return so_far[1], p.astype(self.dtype)

        nothing = plgpu.layout_cast(jnp.zeros((ROWS, num_queries), self.dtype), MATRIX)
        p = self.matmuls.beside(*lax.fori_loop(0, self.tile_len // num_queries, one_part, (nothing, nothing)))
        plgpu.commit_smem()  # with a barrier, as this warpgroup's dk reads it too
        return p, None, dv, sums

    def products(self, slot, per_unit, p, ds, dv, dk, *, with_dq: bool = False):
        before, free = SLOTS - 1 - slot, Arrival(self.tile_free + slot, self.consumers_and_one)
        dv, dk = self.matmuls.own_gradients(slot, dv, p, dk)
        if with_dq:
            plgpu.barrier_wait(self.shared.ds_full.at[before])
        dk, dq = self.matmuls.behind(dk, before if with_dq else None, self.first_piece, free)
        if with_dq:
            self.hand_over(before, dq, per_unit)
        return dv, dk

    def hand_over(self, slot, dq, per_unit) -> None:
        """This warpgroup's first piece of dq, and the one in the middle, if it is the slot's."""
        at = {"free": self.warpgroup, "full": self.warpgroup, "num_threads": self.consumer_and_one}
        self.give(dq, per_unit, buffer=0, **at)

        @pl.when(slot == self.warpgroup)
        def _():
            self.give(self.matmuls.dq(slot, 1), per_unit, buffer=0, **at)

        plgpu.barrier_arrive(self.shared.ds_free.at[slot])

    @property
    def first_piece(self):
        """From either end of three."""
        return self.warpgroup * 2

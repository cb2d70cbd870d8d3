"""The two warpgroups of the Hopper backward kernel beside those that compute: the producer, and the adder.

pallas_mosaic_gpu_backward.py says how the kernel works.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise import pallas_mosaic_gpu_queue as queue
from pallas_kernels.blockwise.pallas_mosaic_gpu_backward_matmuls import PIECE
from pallas_kernels.blockwise.pallas_mosaic_gpu_backward_role import BLOCK, NUM_CONSUMERS, SLOTS, Role, Tile
from pallas_kernels.blockwise.pallas_mosaic_gpu_bias import bring_distances_near
from pallas_kernels.blockwise.pallas_mosaic_gpu_bias_sums import KeySums
from pallas_kernels.blockwise.pallas_mosaic_gpu_tiles import MATRIX
from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import Item, row_of_batch
from pallas_kernels.mosaic_gpu import bring_near, end_turn, sync, take_turn


class Producer(Role):
    """Copies to shared memory what consumers read."""

    def run(self) -> None:
        inputs, shared = self.inputs, self.shared

        def one_item(item: Item, count, ahead: queue.Ahead):
            sync(self.kv_free, self.consumers_and_one)
            kv_head = lax.div(item.head, self.config.shares) if self.config.shares > 1 else item.head
            keys = item.batch, pl.ds(item.row * BLOCK, BLOCK), kv_head
            plgpu.copy_gmem_to_smem(inputs.k.at[keys], shared.k, shared.kv_full)
            plgpu.copy_gmem_to_smem(inputs.v.at[keys], shared.v, shared.kv_full)

            def load(tile: Tile, count):
                slot = lax.rem(count, SLOTS)
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

    def bring_bias_near(self, item: Item, tile: Tile) -> None:
        """What consumers will read of the table of biases."""
        if self.inputs.bias_values is None or self.config.interpret:
            return
        distance = tile.index * self.tile_len - item.row * BLOCK
        bring_distances_near([self.inputs.bias_values.at[tile.head]], distance - BLOCK, 2 * BLOCK)


class Adder(Role):
    """Adds dq to what is in device memory, and makes sums for the gradient of a bias."""

    def run(self) -> None:
        for slot in range(SLOTS):
            plgpu.barrier_arrive(self.shared.dq_free.at[slot])
            if self.config.adder_sums:
                plgpu.barrier_arrive(self.shared.ds_free.at[slot])
        counters, none = self.outputs.counters, jnp.int32(-1)
        no_sums = self.key_sums.nothing() if self.config.adder_sums else ()

        def one_item(item: Item, state):
            def one_tile(tile: Tile, state):
                count, last, sums = state
                slot = lax.rem(count, SLOTS)
                pair = item.batch * self.num_heads + tile.head
                counter = pair * self.num_tiles + tile.index
                if sums:
                    sums, last = self.with_sums_of(item, tile, slot, sums, last)
                if self.takes_turns:
                    turn = self.inputs.turns.at(item.batch, tile.which, item.row, tile.block)
                    take_turn(counters, counter, turn, last, by_copies=True)
                else:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                pl.when(count > 0)(lambda: self.free(SLOTS - 1 - slot))
                self.add(item.batch, tile, slot)
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
        pl.when(count > 0)(lambda: self.free(lax.rem(count - 1, SLOTS)))

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

    def with_sums_of(self, item: Item, tile: Tile, slot, sums, last):
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

    def free(self, slot) -> None:
        """What `add` has left of a tile has been read from its buffer."""
        plgpu.barrier_arrive(self.shared.dq_free.at[slot])

    def add(self, batch, tile: Tile, slot) -> None:
        """A tile's pieces, as they come."""
        sync(self.dq_full + slot, self.consumers_and_one)
        for piece in range(NUM_CONSUMERS):
            self.add_piece(batch, tile, piece, self.shared.dq.at[slot, piece])

    def add_piece(self, batch, tile: Tile, piece, source) -> None:
        q_start = tile.index * self.tile_len + (piece * PIECE if self.matmuls.two_parts else 0)
        column = 0 if self.matmuls.two_parts else piece * PIECE
        target = self.outputs.dq.at[batch, pl.ds(q_start, PIECE), tile.head, pl.ds(column, PIECE)]
        if not self.config.interpret:
            plgpu.copy_smem_to_gmem(source, target, reduction_op="add")
            return
        target[...] = plgpu.load(target, layout=MATRIX, optimized=False) + source[...]

    @property
    def takes_turns(self) -> bool:
        return self.inputs.turns is not None and not self.config.interpret


class WideAdder(Adder):
    """Of tiles of three pieces, each consumer's in a buffer of its own.

    First come those of the consumer that makes the one in the middle, so that it does not wait for the other.
    """

    def free(self, slot) -> None:
        plgpu.barrier_arrive(self.shared.dq_free.at[SLOTS - 1 - slot])

    def add(self, batch, tile: Tile, slot) -> None:
        other = SLOTS - 1 - slot
        for consumer, piece in ((slot, 2 * slot), (slot, 1), (other, 2 * other)):
            sync(self.dq_full + consumer, self.consumer_and_one)
            self.add_piece(batch, tile, piece, self.shared.dq.at[0, consumer])
            if consumer is slot:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(self.shared.dq_free.at[slot])

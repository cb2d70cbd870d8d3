"""How a Hopper kernel's items reach the warpgroups of a block: its producer takes one after the other and hands it on.

Items go out in one line over the whole grid, the next to whichever block asks first, so no block is idle while there
are items left, however long each takes. An item may wait for those before it in the line: they have all been taken by
blocks that are at work, whatever else the machine runs, and the first of those that are not done waits for nobody. Or
items are dealt out beforehand, and each producer hands on its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import Item, Range, Walk
from pallas_kernels.mosaic_gpu import arrive, sync, take_number

SLOTS = 2
_FIELDS = 8  # numbers that say what an item is
_NOTES = SLOTS * _FIELDS + 1  # that a producer leaves: an item in each slot, and what it has taken from the counter


def new_notes(num_blocks: int) -> Any:
    """What a kernel of so many blocks of threads is given as `notes`, a reference to write to."""
    return jax.new_ref(jnp.zeros((num_blocks + 1, _NOTES), jnp.int32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Queue:
    """The items of one block of threads; a producer walks ahead of the others by what buffers allow.

    Attributes:
      walk: What an item is.
      in_line: Whether items go out in one line, rather than dealt beforehand.
      notes: What each producer tells, and behind those how many items have been taken from the line; in device memory:
        the kernels' operands leave no shared memory for it.
      full: Barriers, one a slot.
      free: The first of SLOTS named barriers.
      num_threads: Of all warpgroups that take part, the producer's included.
      interpret: As of the kernel.
    """

    walk: Walk
    in_line: bool
    notes: Any
    full: Any
    free: int
    num_threads: int
    interpret: Any

    def hand_out(self, body: Callable, state) -> None:
        """The producer's: state, ahead = body(item, state, ahead) for each, which the others are told of before.

        Args:
          body: Is given an `Ahead` that holds nothing, and may take the next item into it (`look_ahead`) whenever the
            time that takes is not missed; if it does not, that is done after.
        """

        def one_item(loop):
            ahead, count, state = loop
            nothing = ahead._replace(is_taken=jnp.bool(False))

            def begin(state):
                count, state = state
                self._tell(count, ahead.item)
                state, following = body(ahead.item, state, nothing)
                return count + 1, state, following

            count, state, following = lax.cond(
                ahead.item.exists, begin, lambda state: (*state, nothing), (count, state)
            )
            return self.look_ahead(following), count, state

        num_numbers = self.walk.deal.num_items if self.in_line else self.walk.deal.num_rounds
        first = self.look_ahead(Ahead(jnp.bool(False), jnp.int32(-1), _nothing()))
        loop = lax.while_loop(lambda loop: loop[0].number < num_numbers, one_item, (first, jnp.int32(0), state))
        self._tell(loop[1], _nothing())

    def look_ahead(self, ahead: "Ahead") -> "Ahead":
        """Takes the next item, unless that is done."""

        def take(ahead: Ahead) -> Ahead:
            deal, number = self.walk.deal, self._next(ahead.number)
            if self.in_line:
                item = self.walk.item_in_line(number)
            else:  # behind the last is none to be looked up
                last = jnp.minimum(number, deal.num_rounds - 1)
                item = self.walk.item_of(*deal.item(lax.axis_index("block"), last))
            item = jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.int32), item)
            return Ahead(jnp.bool(True), number, item._replace(exists=item.exists != 0))

        return lax.cond(ahead.is_taken, lambda ahead: ahead, take, ahead)

    def take(self, body: Callable, state):
        """The others': state, end = body(item, state) for each item, and end() once the next one is known: what it
        waits for to be read comes while this writes."""
        for slot in range(SLOTS):
            arrive(self.free + slot, self.num_threads)

        def one_item(loop):
            count, item, state = loop
            state, end = body(item, state)
            ahead = self._read(count + 1)
            end()
            return count + 1, ahead, state

        first = jnp.int32(0), self._read(jnp.int32(0)), state
        return lax.while_loop(lambda loop: loop[1].exists, one_item, first)[2]

    def _next(self, number):
        if not self.in_line or self.interpret:
            return number + 1
        block, num_blocks = lax.axis_index("block"), self.walk.deal.num_blocks
        take_number(self.notes.at[num_blocks, pl.ds(0, 1)], self.notes.at[block, pl.ds(_NOTES - 1, 1)])
        plgpu.commit_smem()  # for its barrier
        return self.notes[block, _NOTES - 1]

    def _tell(self, count, item: Item) -> None:
        slot = lax.rem(count, SLOTS)
        sync(self.free + slot, self.num_threads)
        for i, x in enumerate(jax.tree.leaves(item)):
            self.notes[lax.axis_index("block"), slot * _FIELDS + i] = jnp.asarray(x).astype(jnp.int32)
        plgpu.barrier_arrive(self.full.at[slot])

    def _read(self, count) -> Item:
        slot = lax.rem(count, SLOTS)
        plgpu.barrier_wait(self.full.at[slot])
        block = lax.axis_index("block")
        notes = [self.notes[block, slot * _FIELDS + i] for i in range(_FIELDS)]
        item = jax.tree.unflatten(jax.tree.structure(_AN_ITEM), notes)
        arrive(self.free + slot, self.num_threads)
        return item._replace(exists=item.exists != 0)


class Ahead(NamedTuple):
    """The next item of a block of threads, if it is taken; its number, or that of the item before."""

    is_taken: Any
    number: Any
    item: Item


_AN_ITEM = Item(0, 0, 0, 0, Range(0, 0, 0, 0))


def _nothing() -> Item:
    item = jax.tree.map(jnp.int32, _AN_ITEM)
    return item._replace(exists=jnp.bool(False))

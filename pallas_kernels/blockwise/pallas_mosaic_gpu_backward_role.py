"""What the roles of the Hopper backward kernel's warpgroups have in common: what is read and written, and the tiles.

pallas_mosaic_gpu_backward.py says how the kernel works.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jax import lax
from jax.typing import ArrayLike

from pallas_kernels.blockwise import pallas_mosaic_gpu_queue as queue
from pallas_kernels.blockwise.pallas_mosaic_gpu_backward_matmuls import Matmuls, WideMatmuls
from pallas_kernels.blockwise.pallas_mosaic_gpu_bias import KernelBias
from pallas_kernels.blockwise.pallas_mosaic_gpu_dropout import Words
from pallas_kernels.blockwise.pallas_mosaic_gpu_pairs import Band, CallConfig
from pallas_kernels.blockwise.pallas_mosaic_gpu_turns import Plan, Turns
from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import Item, Visit, Walk, either_way
from pallas_kernels.mosaic_gpu import NAMED_BARRIERS, WARPGROUP
from pallas_kernels.schedule import BlockRanges

BLOCK = 128
"""Tokens of the schedule's blocks, and keys of an item."""
TILES = {64: 128, 128: 64, 192: 64}
"""Queries of a step, by head dim of q and k: what registers and shared memory have room for."""
AT_A_TIME = TILES | {192: 32}
"""Queries of a step whose logits are computed at a time."""
SLOTS = 2
"""Buffers of what goes from warpgroup to warpgroup."""
NUM_CONSUMERS = 2


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


class Outputs(NamedTuple):
    """What it writes; dq, the counters of its tiles' turns and sums by distance are read too."""

    dq: Any
    counters: Any
    dk: Any
    dv: Any
    sums: Any
    near: Any


class Shared(NamedTuple):
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


class Tile(NamedTuple):
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


def is_wide(head_dim: int) -> bool:
    """Whether a tile of dq has three pieces, of which consumers make the one in the middle in turns."""
    return head_dim > 128


class Role:
    """What each warpgroup of a block of threads has."""

    def __init__(self, config: Config, plan: Plan, inputs: Inputs, notes, outputs: Outputs, shared: Shared, warpgroup):
        self.config, self.inputs, self.outputs, self.shared = config, inputs, outputs, shared
        self.warpgroup = warpgroup
        self.heads_together, self.table = plan.heads_together, None if inputs.turns is None else inputs.turns.table
        (self.num_heads, self.head_dim), self.value_dim = inputs.q.shape[2:], inputs.v.shape[3]
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
        # Named barriers.
        self.kv_free, self.tile_free, _, self.dq_full, _, item_free, _ = NAMED_BARRIERS[:7]
        self.consumers_and_one, self.consumer_and_one = WARPGROUP * (NUM_CONSUMERS + 1), WARPGROUP * 2
        of_width = WideMatmuls if is_wide(self.head_dim) else Matmuls
        self.matmuls = of_width(shared, warpgroup=warpgroup, interpret=bool(config.interpret))
        self.queue = queue.Queue(
            walk=self.walk,
            in_line=True,
            notes=notes,
            full=shared.item_full,
            free=item_free,
            num_threads=WARPGROUP * (NUM_CONSUMERS + 2),
            interpret=config.interpret,
        )

    def run(self) -> None:
        """What it does, from the first item to the last."""
        raise NotImplementedError

    def for_each_tile(self, item: Item, body: Callable, state, *, end_of_heads: Callable | None = None):
        """state = body(a Tile, state), tile by tile, and end_of_heads(the first of some heads, state) after these.

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
                    return body(Tile(head, which, block.index, tile, block.is_full), state)

                return lax.fori_loop(0, self.heads_together * self.tiles_of_block, one_tile, state)

            state = self.walk.visit_in_order(item, which, one_block, state, ascending=ascends)
            return state if end_of_heads is None else end_of_heads(first_head, state)

        return lax.fori_loop(0, self.group // self.heads_together, some_heads, state)

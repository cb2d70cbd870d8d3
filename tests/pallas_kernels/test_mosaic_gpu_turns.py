"""The order in which items of the Hopper backward kernel add into dq: each has a turn, and nobody waits for ever."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockSizes, make_schedule
from pallas_kernels.blockwise import pallas_mosaic_gpu_turns as turns_module
from pallas_kernels.blockwise.pallas_mosaic_gpu_turns import Plan, plan
from pallas_kernels.mask import Causal, Full, Mask, PerHead, Prefix, SameDocument, Window
from pallas_kernels.mask_patterns import Table
from pallas_kernels.schedule import BlockRanges, static_schedule
from pallas_kernels.sparse.choose import lists_of
from pallas_kernels.sparse.selection import BlockSelection
from pallas_kernels.testing import packed_tokens

BLOCK = 8
SIZES = BlockSizes(block_q=BLOCK, block_kv=BLOCK)
NUM_HEADS, NUM_KV_HEADS = 4, 2
DOCUMENTS = ((70, 1, 40, 33, 16), (160,))
SCATTERED = np.random.default_rng(0).random((20, 20)) < 0.3

CONSTANT = {
    "causal": Causal(),
    "offset": Causal(offset=-30),
    "full": Full(),
    "window": Causal() & Window(left=40),
    "prefix": Causal() | Prefix(35),
    "sinks": Causal() & (Prefix(4) | Window(left=30)),
    "table": Table(SCATTERED, block_q=BLOCK, block_kv=BLOCK),
    "per_head": PerHead((Causal(), Window(left=40, right=0), Full(), Prefix(5))),
    "per_kv_head": PerHead((Causal(), Causal() & (Prefix(4) | Window(left=30)))),
}
CHOSEN = {"chosen_per_head": 4, "chosen_per_kv_head": 2, "chosen": 1}
NAMES = [*CONSTANT, "documents", *CHOSEN]


def selection(num_lists: int) -> BlockSelection:
    """Up to six blocks of keys for each block of queries."""
    chosen = np.random.default_rng(1).random((2, num_lists, 20, 20)) < 0.3
    return BlockSelection(blocks=lists_of(jnp.array(chosen), 6), q_len=160, kv_len=160, block_sizes=SIZES)


def planned(
    mask: Mask,
    *,
    documents=None,
    chosen: BlockSelection | None = None,
    num_cores: int = 7,
    deterministic: bool = True,
    length: int = 160,
    most_heads_together: int = 4,
) -> tuple[Plan, BlockRanges]:
    if chosen is not None:
        ranges = jax.jit(lambda chosen: chosen.schedule(mask=mask, block_sizes=SIZES).q_blocks)(chosen)
    elif documents is None:
        ranges = static_schedule(mask, length, length, SIZES).q_blocks
    else:
        tokens = packed_tokens(documents, length)
        ranges = make_schedule(mask, tokens, q_len=length, kv_len=length, block_sizes=SIZES).q_blocks
    found = plan(
        ranges,
        num_q_blocks=length // BLOCK,
        batch_size=2,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        pair_bytes=12 << 20,
        num_cores=num_cores,
        deterministic=deterministic,
        most_heads_together=most_heads_together,
    )
    return found, jax.tree.map(np.asarray, ranges)


type Step = tuple[tuple[int, int, int], int | None]
"""(tile, turn); a tile is of a batch row, a query head and a block of queries."""


def steps_of_items(found: Plan, ranges: BlockRanges) -> tuple[list[list[Step]], list[list[int]]]:
    """The steps of each item, and the items of each block of threads, or all in one list where they go out in line."""
    deal, turns = found.deal, jax.tree.map(np.asarray, found.turns)
    if found.in_line:
        items = [np.stack(deal.item_in_line(np.arange(deal.num_items)), axis=-1)]
    else:
        places = np.meshgrid(*(np.arange(n) for n in (deal.num_blocks, deal.num_rounds)), indexing="ij")
        items = np.stack(deal.item(*places), axis=-1)
    order = np.asarray(found.order)
    steps, of_lists = [], []
    for some_items in items:
        of_lists.append([])
        for is_item, pair, rank in some_items:
            if is_item:
                batch, kv_head = divmod(int(pair), NUM_KV_HEADS)
                row = order[batch if order.shape[0] > 1 else 0, rank, 0]
                of_lists[-1].append(len(steps))
                steps.append(list(steps_of_item(ranges, turns, batch, kv_head, row, found)))
    return steps, of_lists


def steps_of_item(ranges: BlockRanges, turns, batch, kv_head, row, found: Plan):
    group, here = NUM_HEADS // NUM_KV_HEADS, batch if ranges.start.shape[0] > 1 else 0
    for first in range(kv_head * group, (kv_head + 1) * group, found.heads_together):
        which = first * ranges.num_lists // NUM_HEADS
        if ranges.first is None:
            bounds = zip(ranges.start[here, row, which], ranges.stop[here, row, which], strict=True)
        else:
            mine = slice(*ranges.first[here, which, row : row + 2])
            bounds = zip(ranges.start[here, which, mine], ranges.stop[here, which, mine], strict=True)
        visited = [(number, tile) for number, ends in enumerate(bounds) for tile in range(*ends)]
        for number, tile in visited if found.ascends else reversed(visited):
            for head in range(first, first + found.heads_together):
                pair = batch * NUM_HEADS + head
                turn = int(turns.at(batch, pair, which, row, number, tile)) if turns else None
                yield (batch, head, tile), turn


def play(found: Plan, ranges: BlockRanges) -> tuple[int, list[int]]:
    """How many rounds it takes if every block of threads does a step a round, or waits for its turn; what each does."""
    steps, of_lists = steps_of_items(found, ranges)
    queues = [iter(x) for x in of_lists] * (found.deal.num_blocks if found.in_line else 1)
    added, done = {}, [0] * found.deal.num_blocks
    current: list = [iter(())] * found.deal.num_blocks
    ahead: list = [None] * found.deal.num_blocks
    for count in itertools.count():
        for i, queue in enumerate(queues):
            while ahead[i] is None and (item := next(queue, None)) is not None:
                current[i] = iter(steps[item])
                ahead[i] = next(current[i], None)
        ready = [i for i, step in enumerate(ahead) if step is not None and added.get(step[0], 0) == step[1]]
        if not ready:
            assert not any(ahead), "all wait for each other"
            return count, done
        for i in ready:
            added[ahead[i][0]] = added.get(ahead[i][0], 0) + 1
            done[i] += 1
            ahead[i] = next(current[i], None)


@pytest.mark.parametrize(
    ("num_cores", "rehearsed", "most_heads_together"),
    [
        pytest.param(*how, marks=() if how in ((7, True, 4), (7, False, 1), (132, True, 1)) else pytest.mark.slow)
        for how in itertools.product((1, 7, 132), (True, False), (1, 4))
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_every_turn_comes(name, rehearsed, num_cores, most_heads_together, monkeypatch):
    """Blocks of threads that do their steps in order, and wait only for turns, come to their ends."""
    if not rehearsed:
        monkeypatch.setattr(turns_module, "_MOST_REHEARSED", 0)
    found = planned_for(name, num_cores=num_cores, most_heads_together=most_heads_together)
    one_list = found[1].num_lists <= NUM_KV_HEADS
    assert found[0].heads_together == (min(most_heads_together, NUM_HEADS // NUM_KV_HEADS) if one_list else 1)
    steps, _ = steps_of_items(*found)
    turns = {}
    for tile, turn in itertools.chain(*steps):
        turns.setdefault(tile, []).append(turn)
    assert turns and all(sorted(x) == list(range(len(x))) for x in turns.values())
    _, done = play(*found)
    assert sum(done) == sum(map(len, turns.values()))


def planned_for(name: str, **options) -> tuple[Plan, BlockRanges]:
    if name == "documents":
        return planned(Causal() & SameDocument(), documents=DOCUMENTS, **options)
    if name in CHOSEN:
        return planned(Full(), chosen=selection(CHOSEN[name]), **options)
    return planned(CONSTANT[name], **options)


@pytest.mark.parametrize("name", NAMES)
def test_turns_cost_little(name):
    """Against work that is shared out evenly."""
    found = planned_for(name, num_cores=8)
    rounds, done = play(*found)
    assert rounds <= 1.4 * sum(done) / len(done)


def test_only_scattered_blocks_are_rehearsed():
    assert planned(CONSTANT["table"])[0].turns.rehearsed is not None
    assert planned(CONSTANT["causal"])[0].turns.rehearsed is None


def test_sections_of_any_order_are_of_one_size():
    found, _ = planned(Causal(), deterministic=False, num_cores=132)
    assert found.deal.num_pairs % found.deal.section == 0


def test_no_turns_where_any_order_will_do():
    assert planned(Causal(), deterministic=False)[0].turns is None


def test_constant_schedules_of_one_range_take_linear_memory(monkeypatch):
    monkeypatch.setattr(turns_module, "_MOST_REHEARSED", 0)
    assert planned(Causal() & Window(left=40))[0].turns.line is not None
    assert planned(CONSTANT["table"])[0].turns.table is not None

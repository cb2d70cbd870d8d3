"""The order in which items of the Hopper backward kernel add into dq: each has a turn, and nobody waits for ever."""

import itertools

import jax
import numpy as np
import pytest

from pallas_kernels import BlockSizes, make_schedule
from pallas_kernels.blockwise import pallas_mosaic_gpu_turns as turns_module
from pallas_kernels.blockwise.pallas_mosaic_gpu_turns import Plan, plan
from pallas_kernels.mask import Causal, Full, Mask, Prefix, SameDocument, Window
from pallas_kernels.mask_patterns import Table
from pallas_kernels.schedule import BlockRanges, static_schedule
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
}


def planned(
    mask: Mask, *, documents=None, num_cores: int = 7, deterministic: bool = True, length: int = 160
) -> tuple[Plan, BlockRanges]:
    if documents is None:
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
    )
    return found, jax.tree.map(np.asarray, ranges)


def steps_of(found: Plan, ranges: BlockRanges) -> list[list[tuple]]:
    """What each block of threads does in order: (tile, turn), where a tile is of a batch row, a head and a block."""
    deal, turns = found.deal, jax.tree.map(np.asarray, found.turns)
    group = NUM_HEADS // NUM_KV_HEADS
    block, round_ = np.meshgrid(*(np.arange(n) for n in (deal.num_blocks, deal.num_rounds)), indexing="ij")
    of_blocks = []
    for items in np.stack(deal.item(block, round_), axis=-1):
        steps = []
        for is_item, pair, rank in items:
            if not is_item:
                continue
            batch, kv_head = divmod(int(pair), NUM_KV_HEADS)
            here = batch if ranges.start.shape[0] > 1 else 0
            row = ranges.order[batch if ranges.order.shape[0] > 1 else 0, rank]
            for head in range(kv_head * group, (kv_head + 1) * group):
                for start, stop in zip(ranges.start[here, row][::-1], ranges.stop[here, row][::-1], strict=True):
                    for tile in reversed(range(start, stop)):
                        turn = int(turns.at(batch, head, NUM_HEADS, row, tile)) if turns else None
                        steps.append(((batch, head, tile), turn))
        of_blocks.append(steps)
    return of_blocks


@pytest.mark.parametrize("num_cores", [1, 7, 132])
@pytest.mark.parametrize("rehearsed", [True, False])
@pytest.mark.parametrize("name", [*CONSTANT, "documents"])
def test_every_turn_comes(name, rehearsed, num_cores, monkeypatch):
    """Blocks of threads that do their steps in order, and wait only for turns, come to their ends."""
    if not rehearsed:
        monkeypatch.setattr(turns_module, "_MOST_REHEARSED", 0)
    if name == "documents":
        found = planned(Causal() & SameDocument(), documents=DOCUMENTS, num_cores=num_cores)
    else:
        found = planned(CONSTANT[name], num_cores=num_cores)
    steps = steps_of(*found)
    turns = {}
    for tile, turn in itertools.chain(*steps):
        turns.setdefault(tile, []).append(turn)
    assert turns and all(sorted(x) == list(range(len(x))) for x in turns.values())
    added = dict.fromkeys(turns, 0)
    waiting = [iter(x) for x in steps]
    current = [next(x, None) for x in waiting]
    while any(current):
        before = sum(added.values())
        for i, step in enumerate(current):
            if step is not None and added[step[0]] == step[1]:
                added[step[0]] += 1
                current[i] = next(waiting[i], None)
        assert sum(added.values()) > before, "all wait for each other"


def rounds_taken(found: tuple[Plan, BlockRanges]) -> int:
    """How many steps it takes where each takes as long, turns included."""
    added, waiting = {}, [iter(x) for x in steps_of(*found)]
    current, count = [next(x, None) for x in waiting], 0
    while any(current):
        ready = [i for i, step in enumerate(current) if step is not None and added.get(step[0], 0) == step[1]]
        for i in ready:
            added[current[i][0]] = added.get(current[i][0], 0) + 1
            current[i] = next(waiting[i], None)
        count += 1
    return count


@pytest.mark.parametrize("name", CONSTANT)
def test_rehearsed_turns_cost_little(name):
    """Against the block of threads that has most to do."""
    found = planned(CONSTANT[name], num_cores=16)
    assert found[0].turns.rehearsed is not None
    most = max(map(len, steps_of(*found)))
    assert rounds_taken(found) <= 1.4 * most


@pytest.mark.parametrize("name", ["causal", "window", "documents"])
def test_turns_without_a_rehearsal_cost_little(name, monkeypatch):
    monkeypatch.setattr(turns_module, "_MOST_REHEARSED", 0)
    documents = DOCUMENTS if name == "documents" else None
    mask = Causal() & SameDocument() if documents else CONSTANT[name]
    found = planned(mask, documents=documents, num_cores=16)
    most = max(map(len, steps_of(*found)))
    assert rounds_taken(found) <= 1.25 * most


def test_no_turns_where_any_order_will_do():
    assert planned(Causal(), deterministic=False)[0].turns is None


def test_constant_schedules_of_one_range_take_linear_memory(monkeypatch):
    monkeypatch.setattr(turns_module, "_MOST_REHEARSED", 0)
    assert planned(Causal() & Window(left=40))[0].turns.line is not None
    assert planned(CONSTANT["table"])[0].turns.table is not None

"""The order in which items of the Hopper backward kernel add into dq: each has a turn, and nobody waits for ever."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockSizes, make_schedule
from pallas_kernels.blockwise.pallas_mosaic_gpu_turns import Plan, plan
from pallas_kernels.mask import Causal, Full, Mask, PerHead, Prefix, SameDocument, Window
from pallas_kernels.schedule import BlockRanges, static_schedule
from pallas_kernels.testing import packed_tokens

BLOCK = 8
SIZES = BlockSizes(block_q=BLOCK, block_kv=BLOCK)
NUM_HEADS, NUM_KV_HEADS = 4, 2
DOCUMENTS = ((70, 1, 40, 33, 16), (160,))

CONSTANT = {
    "causal": Causal(),
    "offset": Causal(offset=-30),
    "full": Full(),
    "window": Causal() & Window(left=40),
    "prefix": Causal() | Prefix(35),
    "per_head": PerHead((Causal(), Window(left=40, right=0), Full(), Prefix(5))),
    "per_kv_head": PerHead((Causal(), Causal() & Window(left=30))),
}
# With a head for each kv head; blocks of queries may be visited in either order there.
OF_ONE_HEAD = {"short_documents": ((10, 70, 1, 40, 33, 6), (60, 20, 50)), "long_document": ((9, 151), (160,))}
CHUNKS = {"chunks_per_head": 4, "chunks_per_kv_head": 2, "chunks": 1}
NAMES = [*CONSTANT, "documents", *OF_ONE_HEAD, *CHUNKS]


def chunks(num_lists: int) -> BlockRanges:
    """As MoBA has them: each chunk of four blocks of keys is visited by blocks of queries that stand together."""
    ends = np.sort(np.random.default_rng(1).integers(0, 21, (2, num_lists, 6)), axis=2)
    ends[..., 0] = 0
    start, stop = (
        np.repeat(ends[..., which], 4, axis=2).swapaxes(1, 2)[..., None] for which in (slice(5), slice(1, 6))
    )
    turn = np.broadcast_to((np.arange(20) % 4)[:, None, None], start.shape)
    order = np.arange(20)[None, :, None]
    ranges = BlockRanges(start=start, stop=stop, full_start=start, full_stop=stop, order=order, turn=turn)
    return jax.tree.map(jnp.asarray, ranges)


def planned(
    mask: Mask,
    *,
    documents=None,
    ranges: BlockRanges | None = None,
    num_cores: int = 7,
    in_turns: bool = True,
    length: int = 160,
    most_heads_together: int = 4,
    num_heads: int = NUM_HEADS,
) -> tuple[Plan, BlockRanges, int]:
    """The plan, its ranges, and how many query heads a kv head has."""
    if ranges is None and documents is None:
        ranges = static_schedule(mask, length, length, SIZES).q_blocks
    elif ranges is None:
        tokens = packed_tokens(documents, length)
        ranges = make_schedule(mask, tokens, q_len=length, kv_len=length, block_sizes=SIZES).q_blocks
    found = plan(
        ranges,
        num_q_blocks=length // BLOCK,
        batch_size=2,
        num_heads=num_heads,
        num_kv_heads=NUM_KV_HEADS,
        pair_bytes=48 << 20 if num_heads == NUM_KV_HEADS else 12 << 20,
        num_cores=num_cores,
        in_turns=in_turns,
        most_heads_together=most_heads_together,
    )
    return found, jax.tree.map(np.asarray, ranges), num_heads // NUM_KV_HEADS


type Step = tuple[tuple[int, int, int], int | None]
"""(tile, turn); a tile is of a batch row, a query head and a block of queries."""


def steps_of_items(found: Plan, ranges: BlockRanges, group: int) -> list[list[Step]]:
    """The steps of each item, as they go out."""
    deal, turns, order = found.deal, jax.tree.map(np.asarray, found.turns), np.asarray(found.order)
    if turns and turns.table and turns.table.section is not None:
        deal = dataclasses.replace(deal, section=int(turns.table.section[0]))
    steps = []
    for _, pair, rank in np.stack(deal.item_in_line(np.arange(deal.num_items)), axis=-1):
        batch, kv_head = divmod(int(pair), NUM_KV_HEADS)
        row = order[batch if order.shape[0] > 1 else 0, rank, 0]
        steps.append(list(steps_of_item(ranges, turns, batch, kv_head, row, group, found)))
    return steps


def steps_of_item(ranges: BlockRanges, turns, batch, kv_head, row, group: int, found: Plan):
    here = batch if ranges.start.shape[0] > 1 else 0
    ascends = bool(turns and turns.table and turns.table.ascends is not None and turns.table.ascends[0])
    for first in range(kv_head * group, (kv_head + 1) * group, found.heads_together):
        which = first * ranges.num_lists // (group * NUM_KV_HEADS)
        visited = range(ranges.start[here, row, which, 0], ranges.stop[here, row, which, 0])
        for tile in visited if ascends else reversed(visited):
            for head in range(first, first + found.heads_together):
                yield (batch, head, tile), int(turns.at(batch, which, row, tile)) if turns else None


def play(found: Plan, ranges: BlockRanges, group: int) -> tuple[int, list[int]]:
    """How many rounds it takes if every block of threads does a step a round, or waits for its turn; what each does."""
    line = map(iter, steps_of_items(found, ranges, group))
    added, done = {}, [0] * found.deal.num_blocks
    current: list = [iter(())] * found.deal.num_blocks
    ahead: list = [None] * found.deal.num_blocks
    for count in itertools.count():
        for i in range(found.deal.num_blocks):
            while ahead[i] is None and (item := next(line, None)) is not None:
                current[i] = item
                ahead[i] = next(item, None)
        ready = [i for i, step in enumerate(ahead) if step is not None and added.get(step[0], 0) == step[1]]
        if not ready:
            assert not any(ahead), "all wait for each other"
            return count, done
        for i in ready:
            added[ahead[i][0]] = added.get(ahead[i][0], 0) + 1
            done[i] += 1
            ahead[i] = next(current[i], None)


@pytest.mark.parametrize(
    ("num_cores", "most_heads_together"),
    [
        pytest.param(*how, marks=() if how in ((7, 4), (7, 1), (132, 1)) else pytest.mark.slow)
        for how in itertools.product((1, 7, 132), (1, 4))
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_every_turn_comes(name, num_cores, most_heads_together):
    """Blocks of threads that do their steps in order, and wait only for turns, come to their ends."""
    found = planned_for(name, num_cores=num_cores, most_heads_together=most_heads_together)
    one_list = found[1].num_lists <= NUM_KV_HEADS
    assert found[0].heads_together == (min(most_heads_together, found[2]) if one_list else 1)
    steps = steps_of_items(*found)
    turns = {}
    for tile, turn in itertools.chain(*steps):
        turns.setdefault(tile, []).append(turn)
    assert turns and all(sorted(x) == list(range(len(x))) for x in turns.values())
    _, done = play(*found)
    assert sum(done) == sum(map(len, turns.values()))


def planned_for(name: str, **options) -> tuple[Plan, BlockRanges, int]:
    if name == "documents":
        return planned(Causal() & SameDocument(), documents=DOCUMENTS, **options)
    if name in OF_ONE_HEAD:
        documents = OF_ONE_HEAD[name]
        return planned(Causal() & SameDocument(), documents=documents, num_heads=NUM_KV_HEADS, **options)
    if name in CHUNKS:
        return planned(Full(), ranges=chunks(CHUNKS[name]), **options)
    return planned(CONSTANT[name], **options)


@pytest.mark.parametrize("name", NAMES)
def test_turns_cost_little(name):
    """Against work that is shared out evenly."""
    found = planned_for(name, num_cores=8)
    rounds, done = play(*found)
    assert rounds <= 1.4 * sum(done) / len(done)


def test_sections_of_any_order_are_of_one_size():
    found, *_ = planned(Causal(), in_turns=False, num_cores=132)
    assert found.deal.num_pairs % found.deal.section == 0


def test_no_turns_where_any_order_will_do():
    assert planned(Causal(), in_turns=False)[0].turns is None


def test_long_documents_are_visited_from_their_last_block():
    """Where all that a document has would not fit the second-level cache beside what else is at work."""
    tables = {name: planned_for(name)[0].turns.table for name in ("documents", *OF_ONE_HEAD)}
    assert tables["documents"].ascends is None
    assert bool(tables["short_documents"].ascends) and not bool(tables["long_document"].ascends)


def test_constant_schedules_take_linear_memory():
    assert planned(Causal() & Window(left=40))[0].turns.line is not None
    assert planned(Causal() | Prefix(35))[0].turns.line is not None
    assert planned(Causal() & SameDocument(), documents=DOCUMENTS)[0].turns.table is not None

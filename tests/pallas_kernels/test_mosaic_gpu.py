"""What Mosaic GPU kernels share: the deal of work."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pallas_kernels.mosaic_gpu import Deal


def items_of(deal: Deal) -> list[list[tuple[int, int]]]:
    """For each block its (pair, rank) items, in order."""
    block, turn = np.meshgrid(
        *(np.arange(n, dtype=np.int32) for n in (deal.num_blocks, deal.num_rounds)), indexing="ij"
    )
    rounds = np.stack(deal.item(block, turn), axis=-1)
    return [[(int(pair), int(rank)) for is_item, pair, rank in of_block if is_item] for of_block in rounds]


@hypothesis.given(
    num_pairs=st.integers(1, 9),
    num_ranks=st.integers(1, 9),
    fit=st.integers(1, 4),
    group=st.sampled_from([1, 2, 3]),
    num_cores=st.integers(1, 12),
)
@hypothesis.settings(deadline=None, max_examples=20)
def test_every_item_is_dealt_once(num_pairs, num_ranks, fit, group, num_cores):
    deal = Deal.of(
        num_pairs=num_pairs,
        num_ranks=num_ranks,
        pair_bytes=(32 << 20) // fit,
        group=group,
        num_cores=num_cores,
    )
    dealt = [item for block in items_of(deal) for item in block]
    assert sorted(dealt) == [(pair, rank) for pair in range(num_pairs) for rank in range(num_ranks)]


@pytest.mark.parametrize("length", [8192, 32768])
def test_causal_work_is_dealt_evenly(length):
    """Blocks of a causal mask: no multiprocessor has 2 % more than the average."""
    num_ranks = length // 128
    deal = Deal.of(num_pairs=16, num_ranks=num_ranks, pair_bytes=length * 512, group=1, num_cores=132)
    work = [sum(num_ranks - rank for _, rank in block) for block in items_of(deal)]
    assert max(work) < 1.02 * np.mean(work)


def test_neighbouring_pairs_of_a_rank_run_side_by_side():
    """Query heads that share keys and values are at work at the same time, and no more than fit the cache."""
    deal = Deal.of(num_pairs=32, num_ranks=512, pair_bytes=32 << 20, group=4, num_cores=132)
    assert deal.section == 4
    first_round = {pair for block in items_of(deal) for pair, _ in block[:1]}
    assert first_round == {0, 1, 2, 3}

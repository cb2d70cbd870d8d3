"""What Mosaic GPU kernels share: the deal of work, the machine, and functions that a kernel can compute."""

import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.blockwise.pallas_mosaic_gpu_pairs import CallConfig, Pairs
from pallas_kernels.mask import Causal, Window
from pallas_kernels.mosaic_gpu import Deal, num_hopper_cores
from pallas_kernels.pair_tests import elementwise
from pallas_kernels.testing import tracing_for


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
    everything = [(pair, rank) for pair in range(num_pairs) for rank in range(num_ranks)]
    assert sorted(dealt) == everything
    is_item, *in_line = deal.item_in_line(np.arange(deal.num_items + 3))
    assert is_item.tolist() == [True] * deal.num_items + [False] * 3
    assert sorted(zip(*(x[is_item].tolist() for x in in_line), strict=True)) == everything


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


@pytest.mark.parametrize(
    ("device_kind", "platform", "num_cores"),
    [
        ("NVIDIA H100 80GB HBM3", "cuda", 132),
        ("NVIDIA H200", "gpu", 132),
        ("NVIDIA A100-SXM4-80GB", "cuda", None),
        ("NVIDIA B200", "cuda", None),
        ("TPU v5p", "tpu", None),
    ],
)
def test_hoppers_are_known_by_their_kind(device_kind, platform, num_cores):
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=132, platform=platform)
    with tracing_for(device):
        assert num_hopper_cores() == num_cores


def test_a_cpu_is_no_hopper():
    assert num_hopper_cores() is None


VECTOR = jax.ShapeDtypeStruct((8,), jnp.int32)


def test_elementwise_functions_are_evaluated_as_they_are():
    def function(x, y):
        return ~(jnp.clip(x, 2, 5) // 2 == y % 3) & (abs(x - y) > 1)

    x, y = np.arange(8, dtype=np.int32), np.arange(8, dtype=np.int32)[::-1].copy()
    evaluate, reads = elementwise(function, VECTOR, VECTOR)
    np.testing.assert_array_equal(evaluate(x, y), function(jnp.asarray(x), jnp.asarray(y)))
    assert reads == {0, 1}


def test_arguments_that_an_elementwise_function_does_not_read_may_be_none():
    evaluate, reads = elementwise(lambda x, y, z: jnp.where(z > 3, z, 0) > 0, *(VECTOR,) * 3)
    assert reads == {2}
    np.testing.assert_array_equal(evaluate(None, None, np.arange(8, dtype=np.int32)), np.arange(8) > 3)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jnp.asarray(np.arange(8) > 3)[x], "it uses gather"),
        (lambda x: x.sum() > x, "it uses reduce_sum"),
        (lambda x: x > jnp.asarray(np.arange(8, dtype=np.int32)), "it reads an array"),
        (lambda x: jnp.ones_like(x) > 0, "it is the same for all arguments"),
    ],
)
def test_other_functions_are_refused(function, message):
    with pytest.raises(NotImplementedError, match=message):
        elementwise(function, VECTOR)


@pytest.mark.parametrize("mask", [Causal(), Causal(offset=-40), Window(left=100, right=0), Window(left=30, right=70)])
@pytest.mark.parametrize("rows_are_queries", [True, False])
def test_tiles_that_hold_no_pair(mask, rows_are_queries):
    """By the span of these masks exactly those: 64 rows, a warpgroup's, and 64 columns."""
    tokens = np.arange(320)
    allowed = np.asarray(mask.allowed(tokens[:, None], tokens[None], None, None))
    allowed = allowed if rows_are_queries else allowed.T
    inputs = types.SimpleNamespace(band=None)
    config = CallConfig(scale=1.0, soft_cap=None, dropout_rate=0.0, kv_len=384, pair_test=None, span=mask.span)
    found = {True: 0, False: 0}
    for start in range(0, 320, 64):
        pairs = Pairs(inputs, config, batch=0, start=start, num_columns=64, rows_are_queries=rows_are_queries)
        for column in range(0, 320, 64):
            holds_none = not allowed[start : start + 64, column : column + 64].any()
            assert bool(pairs.holds_none(column)) == holds_none, (start, column)
            found[holds_none] += 1
    assert min(found.values()) > 0

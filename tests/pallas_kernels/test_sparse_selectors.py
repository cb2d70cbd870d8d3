"""Selectors of blocks: each on an example by hand that block means get wrong, and what all have in common."""

import dataclasses
import inspect

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockSizes, Tokens
from pallas_kernels.mask import Causal, Full, SameDocument, Window
from pallas_kernels.mask import PerHead as PerHeadMask
from pallas_kernels.sparse import (
    AShape,
    BlockMean,
    BlockSelection,
    PerHead,
    VerticalSlash,
    XAttention,
    attention_recall,
    best_by_head,
)
from pallas_kernels.sparse import selector as selector_module
from pallas_kernels.sparse.choose import heaviest, lists_of, most_scored
from pallas_kernels.testing import packed_tokens

FOURS = BlockSizes(block_q=4, block_kv=4)
SELECTORS = (
    BlockMean(),
    BlockMean(heads="kv", sink_blocks=1),
    XAttention(stride=2),
    XAttention(stride=4, heads="kv", local_blocks=2),
    VerticalSlash(last_queries=8, vertical=4, slash=3),
    AShape(sink_blocks=1, local_blocks=2),
)
ALL = pytest.mark.parametrize("selector", SELECTORS, ids=str)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def select(selector, q, k, **options):
    return jax.jit(lambda q, k: selector.select(q, k, **options))(q, k)


def recall_of(q, k, selection, **options):
    return jax.jit(lambda *args: attention_recall(*args, **options))(q, k, selection)


def rows_of(selection, head=0):
    """Of the first of the batch the blocks of each row."""
    return [[int(x) for x in row if x >= 0] for row in np.asarray(selection.blocks)[0, head]]


# Choosing.


def test_the_highest_scores_and_of_equal_ones_the_first():
    scores = jnp.array([[3.0, 1.0, 2.0, 2.0], [0.0, -0.0, -jnp.inf, -1.0], [jnp.inf, 5.0, 1e-30, -1e30]])
    chosen = most_scored(scores, jnp.array([2, 3, 3]))
    assert chosen.tolist() == [[True, False, True, False], [True, True, False, True], [True, True, True, False]]
    assert not most_scored(scores, jnp.int32(0)).any()
    assert most_scored(scores, jnp.int32(9)).tolist() == (scores > -jnp.inf).tolist()


@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(
    st.lists(st.sampled_from([-np.inf, -2.5, -0.0, 0.0, 1e-38, 0.3, 7.0]), min_size=6, max_size=6), st.integers(0, 7)
)
def test_as_a_stable_sort_would(scores, count):
    # XLA may take numbers next to 0 for it.
    scores = [0.0 if abs(x) < 1e-30 else x for x in scores]
    order = np.argsort(-np.array(scores), kind="stable")[:count]
    want = np.isin(np.arange(6), order) & (np.array(scores) > -np.inf)
    assert most_scored(jnp.array([scores], jnp.float32), jnp.int32(count))[0].tolist() == want.tolist()


def test_the_fewest_that_have_the_share():
    weights = jnp.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.5, 0.0]])
    scores = jnp.where(weights > 0, weights, -jnp.inf)
    assert heaviest(scores, weights, 0.65).tolist() == [[False, True, False, True], [True, True, True, False]]
    assert heaviest(scores, weights, 0.4)[0].tolist() == [False, True, False, False]
    assert heaviest(scores, weights, 1.0).tolist() == [[True] * 4, [True, True, True, False]]


def test_lists_are_ascending_and_cut_at_the_end():
    chosen = jnp.array([[False, True, True, False, True], [False] * 5])
    assert lists_of(chosen, 4).tolist() == [[1, 2, 4, -1], [-1] * 4]
    assert lists_of(chosen, 2).tolist() == [[1, 2], [-1, -1]]


# Each selector, by hand.


def test_means_choose_the_block_of_the_greatest_mean():
    """Blocks of 4 keys with means 1, 3, -2 and 2 in one dim; queries of 1 see them in that order."""
    k = jnp.repeat(jnp.array([1.0, 3.0, -2.0, 2.0]), 4).reshape(1, 16, 1, 1) + jnp.tile(
        jnp.array([0.5, -0.5]), 8
    ).reshape(1, 16, 1, 1)
    q = jnp.ones((1, 16, 1, 1))
    selection = select(BlockMean(local_blocks=0), q, k, mask=Full(), block_sizes=FOURS, budget=2)
    assert rows_of(selection) == [[1, 3]] * 4
    causal = select(BlockMean(local_blocks=1), q, k, mask=Causal(), block_sizes=FOURS, budget=2)
    assert rows_of(causal) == [[0], [0, 1], [1, 2], [1, 3]]


def test_antidiagonals_see_what_cancels_in_a_mean():
    """Figure 2's point: in block 1 keys alternate between +3 and -3, as queries do; its mean is 0, its antidiagonals of
    stride 2 are sums of -9 or of 9: with queries (+1, -1) the two of a square are q1 k0 + q0 k1 = -1 * 3 + 1 * -3 = -6,
    so keys (-3, +3) give 6. All other keys are 0.5 everywhere, whose means are 0.5 and whose antidiagonals are 0.
    """
    q = jnp.tile(jnp.array([1.0, -1.0]), 8).reshape(1, 16, 1, 1)
    k = jnp.full((1, 16, 1, 1), 0.5).at[0, 4:8, 0, 0].set(jnp.array([-3.0, 3.0, -3.0, 3.0]))
    options = dict(mask=Full(), block_sizes=FOURS, budget=1)
    by_sums = select(XAttention(stride=2, local_blocks=0), q, k, **options)
    assert rows_of(by_sums) == [[1]] * 4
    by_means = select(BlockMean(local_blocks=0), q, k, **options)
    assert rows_of(by_means) == [[0]] * 4  # all are equal: mean queries are 0
    recalls = [float(recall_of(q, k, x, mask=Full()).mean()) for x in (by_sums, by_means)]
    # In block 1 two of four keys have e^3 for every query, of the 12 others each e^0.5 or e^-0.5.
    e = np.exp
    even, odd = ((2 * e(3) + 2 * e(-3)) / (2 * e(3) + 2 * e(-3) + 12 * e(x)) for x in (0.5, -0.5))
    np.testing.assert_allclose(recalls[0], (even + odd) / 2, rtol=1e-5)
    assert recalls[0] > 3 * recalls[1]


def test_the_share_of_an_antidiagonal_score_is_what_the_threshold_counts():
    """One square a block (stride 4): sums of 4 products over stride 4 times scale 1: scores ln 1, ln 2, ln 5, ln 2 for
    each query square, so shares 0.1, 0.2, 0.5, 0.2.
    """
    q = jnp.ones((1, 16, 1, 1))
    k = jnp.repeat(jnp.log(jnp.array([1.0, 2.0, 5.0, 2.0])), 4).reshape(1, 16, 1, 1)
    selector = XAttention(stride=4, local_blocks=0)
    for threshold, want in ((0.5, [2]), (0.6, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        selection = select(selector, q, k, mask=Full(), block_sizes=FOURS, threshold=threshold)
        assert rows_of(selection) == [want] * 4
    capped = select(selector, q, k, mask=Full(), block_sizes=FOURS, threshold=0.95, budget=2)
    assert rows_of(capped) == [[1, 2]] * 4


def test_antidiagonals_as_the_paper_sums_them():
    """Algorithm 1, square by square, with ragged lengths and groups of heads."""
    T, N, K, H, stride, budget = 27, 4, 2, 8, 2, 3
    q, k = normal(1, T, N, H), normal(1, T, K, H, seed=1)
    selection = select(XAttention(stride=stride), q, k, mask=Causal(), block_sizes=FOURS, budget=budget)
    padded = [np.pad(np.asarray(x)[0], ((0, 1), (0, 0), (0, 0))) for x in (q, k)]
    for head in range(N):
        a, b = padded[0][:, head], padded[1][:, head // (N // K)]
        sums = np.zeros((14, 14))
        for i in range(14):
            for j in range(14):
                sums[i, j] = sum(a[stride * i + stride - 1 - x] @ b[stride * j + x] for x in range(stride))
        # Causal: squares up to the query's own.
        weights = np.exp(sums / (stride * np.sqrt(H))) * np.tril(np.ones((14, 14)))
        weights /= weights.sum(axis=1, keepdims=True)
        scores = weights.reshape(7, 2, 7, 2).sum(axis=(1, 3))
        for row in range(7):
            others = sorted(np.argsort(-scores[row, :row], kind="stable")[: budget - 1].tolist())
            assert rows_of(selection, head)[row] == [*others, row]


def test_a_vertical_line_is_one_key_and_a_slash_line_one_distance():
    """Key 5 draws every query, but its neighbours in block 1 push away, so that its block's mean is the least. And each
    query t draws the key at distance 8, by one-hot positions.
    """
    T = 32
    q, k = jnp.zeros((1, T, 2, T + 1)), jnp.zeros((1, T, 2, T + 1))
    q = q.at[:, :, 0, 0].set(1.0)
    k = k.at[:, 4:8, 0, 0].set(-30.0).at[:, 5, 0, 0].set(20.0)
    t = jnp.arange(T)
    q = q.at[:, t, 1, t + 1].set(1.0)
    k = k.at[:, t[:-8], 1, t[8:] + 1].set(20.0)
    options = dict(mask=Causal(), block_sizes=FOURS, scale=1.0)
    lines = select(VerticalSlash(last_queries=4, vertical=1, slash=1, local_blocks=0), q, k, **options)
    # Head 0: block 1, of key 5.
    assert all(1 in row for row in rows_of(lines, 0)[2:])
    means = select(BlockMean(local_blocks=0), q, k, budget=1, **options)
    assert all(1 not in row for row in rows_of(means, 0)[1:])
    # Head 1: at distance 8 from block i is block i - 2 alone; the vertical line is a key of the last blocks.
    for row, blocks in enumerate(rows_of(lines, 1)[2:5], start=2):
        assert blocks == [row - 2]
    recall = recall_of(q, k, lines, **{x: options[x] for x in ("mask", "scale")})
    assert float(recall[0, 0, 8:].min()) > 0.99 and float(recall[0, 1, 8:24].min()) > 0.99


def test_the_first_and_the_nearest_blocks():
    q = normal(1, 24, 1, 8)
    selection = select(AShape(sink_blocks=1, local_blocks=2), q, q, mask=Causal(), block_sizes=FOURS)
    assert rows_of(selection) == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5]]
    window = select(AShape(sink_blocks=0, local_blocks=9), q, q, mask=Causal() & Window(left=4), block_sizes=FOURS)
    assert rows_of(window) == [[0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]


# What all have in common.


@ALL
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True], ids=["row", "documents"])
def test_only_blocks_that_the_mask_allows_and_no_more_than_the_budget(selector, packed):
    T, mask = 50, Causal() & SameDocument()
    q, k = normal(2, T, 4, 8), normal(2, T, 2, 8, seed=1)
    tokens = jax.tree.map(jnp.asarray, packed_tokens(((20, 1, 29), (7, 30)), T)) if packed else None
    selection = jax.jit(lambda q, k: selector.select(q, k, mask=mask, tokens=tokens, block_sizes=FOURS, budget=3))(q, k)
    assert selection.blocks.shape == (2, 4 if selector.heads == "query" else 2, 13, 3)
    allowed = np.broadcast_to(mask.dense(tokens, T, T), (2, T, T))
    blocks = np.pad(allowed, ((0, 0), (0, 2), (0, 2))).reshape(2, 13, 4, 13, 4).any(axis=(2, 4))
    chosen = np.asarray(selection.chosen())
    assert not (chosen & ~blocks[:, None]).any()
    assert (selection.num_chosen() == chosen.sum(axis=-1)).all() and (chosen.sum(axis=-1) <= 3).all()
    has_any = blocks.any(axis=2)
    assert (chosen.any(axis=-1) == has_any[:, None]).all()
    # The last block that is allowed is always taken.
    last = 12 - blocks[:, :, ::-1].argmax(axis=2)
    taken = np.take_along_axis(chosen, last[:, None, :, None], axis=3)[..., 0]
    assert (taken | ~has_any[:, None]).all()


@pytest.mark.parametrize(
    "selector",
    [pytest.param(x, marks=() if x == XAttention(stride=2) else pytest.mark.slow) for x in SELECTORS],
    ids=str,
)
def test_groups_of_rows_equal_all_at_once(selector, monkeypatch):
    q, k = normal(1, 61, 4, 8), normal(1, 61, 2, 8, seed=1)
    options = dict(mask=Causal(), block_sizes=FOURS, budget=4)
    want = select(selector, q, k, **options).blocks
    monkeypatch.setattr(selector_module, "_MOST_SCORES_AT_ONCE", 4 * 16 * 3 * 4)
    assert (select(selector, q, k, **options).blocks == want).all()


@pytest.mark.slow
@pytest.mark.parametrize("selector", [BlockMean(), XAttention(stride=2)], ids=str)
def test_all_of_the_score_is_all_blocks_and_all_blocks_miss_nothing(selector):
    q, k = normal(2, 30, 4, 8), normal(2, 30, 2, 8, seed=1)
    mask = Causal() & Window(left=9)
    selection = select(selector, q, k, mask=mask, block_sizes=FOURS, threshold=1.0)
    np.testing.assert_allclose(recall_of(q, k, selection, mask=mask), 1.0, rtol=1e-6)
    some = select(selector, q, k, mask=mask, block_sizes=FOURS, threshold=0.5)
    assert (some.num_chosen() <= selection.num_chosen()).all()
    assert (some.num_chosen() < selection.num_chosen()).any()


SPLIT = (*(x for x in SELECTORS if x.split_refusal is None), PerHead(selectors=(SELECTORS[0], SELECTORS[2]) * 2))


@pytest.mark.parametrize(
    "selector", [pytest.param(x, marks=() if x in SPLIT[1:3] else pytest.mark.slow) for x in SPLIT], ids=str
)
def test_shards_choose_from_summaries_as_one_device_does(selector):
    """Two runs of whole blocks of keys, the last one ragged, and three of queries."""
    T, mask = 46, Causal() & SameDocument()
    q, k = normal(2, T, 4, 8), normal(2, T, 2, 8, seed=1)
    tokens = jax.tree.map(jnp.asarray, packed_tokens(((20, 1, 25), (7, 30)), T))
    options = dict(mask=mask, block_sizes=FOURS, budget=4, threshold=0.8)
    want = select(selector, q, k, tokens=tokens, **options)

    @jax.jit
    def split(q, k):
        whole = selector.summary(k, 4)
        parts = selector.summary(k[:, :20], 4), selector.summary(k[:, 20:], 4)
        joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
        chosen = []
        for start, stop in ((0, 16), (16, 32), (32, T)):
            own = dataclasses.replace(
                tokens,
                q_positions=tokens.q_positions[:, start:stop],
                q_segment_ids=tokens.q_segment_ids[:, start:stop],
            )
            chosen.append(selector.select_from(q[:, start:stop], joined, kv_len=T, tokens=own, **options).blocks)
        return whole, joined, jnp.concatenate(chosen, axis=2)

    whole, joined, blocks = split(q, k)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(joined), strict=True):
        assert one.shape[:2] == (2, 12) and one.shape[-2] == 2
        np.testing.assert_array_equal(one, other)
    assert (blocks == want.blocks).all()


def test_what_cannot_choose_from_a_summary_says_so():
    q, k = normal(1, 16, 2, 8), normal(1, 16, 2, 8, seed=1)
    options = dict(mask=Causal(), block_sizes=FOURS)
    lines = VerticalSlash()
    for selector, summary in ((lines, k), (PerHead(selectors=(AShape(), lines)), (k, k))):
        name = type(selector).__name__
        with pytest.raises(NotImplementedError, match=f"{name}.summary: VerticalSlash scores keys by the last queries"):
            selector.summary(k, 4)
        with pytest.raises(NotImplementedError, match=f"{name}.select_from: VerticalSlash scores keys"):
            selector.select_from(q, summary, kv_len=16, **options)
    with pytest.raises(ValueError, match="XAttention.summary: block_kv is 4, wanted a multiple of stride=3"):
        XAttention(stride=3).summary(k, 4)
    with pytest.raises(ValueError, match="wanted a summary of 1 rows and 4 blocks"):
        BlockMean().select_from(q, BlockMean().summary(k, 8), kv_len=16, budget=1, **options)
    with pytest.raises(ValueError, match="BlockMean.select_from: got neither budget nor threshold"):
        BlockMean().select_from(q, BlockMean().summary(k, 4), kv_len=16, **options)


@pytest.mark.parametrize("heads", [2, 4])
def test_recall_is_the_attention_on_chosen_keys(heads):
    T, S, N, K = 19, 26, 4, 2
    q, k = normal(2, T, N, 8), normal(2, S, K, 8, seed=1)
    mask = Causal(offset=5)
    chosen = np.random.default_rng(0).random((2, heads, 5, 7)) < 0.5
    selection = BlockSelection(blocks=lists_of(jnp.asarray(chosen), 7), q_len=T, kv_len=S, block_sizes=FOURS)
    assert (np.asarray(selection.chosen()) == chosen).all()
    logits = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, N // K, axis=2)) * 8**-0.5
    weights = np.where(mask.dense(None, T, S), np.exp(logits), 0.0)
    keys = np.repeat(np.repeat(np.repeat(chosen, N // heads, axis=1), 4, axis=2)[:, :, :T], 4, axis=3)[..., :S]
    want = (weights * keys).sum(axis=-1) / weights.sum(axis=-1)
    np.testing.assert_allclose(recall_of(q, k, selection, mask=mask), want, rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_misses_nothing():
    q = normal(1, 8, 1, 8)
    tokens = Tokens.self_attention(segment_ids=jnp.array([[0, 0, 0, 0, -1, -1, -1, -1]], jnp.int32))
    mask = SameDocument()
    selection = select(BlockMean(), q, q, mask=mask, tokens=tokens, block_sizes=FOURS, budget=1)
    assert rows_of(selection) == [[0], []]
    assert recall_of(q, q, selection, mask=mask, tokens=tokens).tolist() == [[[1.0] * 8]]


@pytest.mark.slow
def test_each_head_gets_the_selector_that_serves_it_best():
    """Head 0 attends to the first block and near by, head 1 to keys that cancel in their block's mean."""
    T = 64
    q, k = jnp.zeros((1, T, 2, 2)), jnp.zeros((1, T, 2, 2))
    q, k = q.at[:, :, 0, 0].set(1.0), k.at[:, :4, 0, 0].set(9.0)
    sign = jnp.tile(jnp.array([1.0, -1.0]), T // 2)
    q = q.at[:, :, 1, 1].set(sign)
    k = k.at[:, 20:24, 1, 1].set(9.0 * sign[1:5])
    candidates = (AShape(sink_blocks=1, local_blocks=1), XAttention(stride=2))
    options = dict(mask=Causal(), block_sizes=FOURS, budget=2, scale=1.0)
    found = best_by_head(q, k, candidates, **options)
    assert found == PerHead(selectors=candidates)
    selection = select(found, q, k, **options)
    for head, candidate in enumerate(candidates):
        assert (selection.blocks[:, head] == select(candidate, q, k, **options).blocks[:, head]).all()


def test_no_array_of_all_pairs():
    """At 16,384 tokens one head's logits are 1 GB in float32."""
    T = 16384
    x = jax.ShapeDtypeStruct((1, T, 1, 64), jnp.bfloat16)
    for selector in (BlockMean(), XAttention(stride=16), VerticalSlash()):
        options = dict(mask=Causal(), block_sizes=BlockSizes(block_q=128, block_kv=128), budget=16)
        program = (
            jax.jit(lambda q, k, selector=selector, options=options: selector.select(q, k, **options))
            .lower(x, x)
            .compile()
        )
        assert program.memory_analysis().temp_size_in_bytes < 400 * 2**20


@pytest.mark.slow
def test_a_choice_is_a_constant_to_gradients():
    q, k = normal(1, 16, 2, 8), normal(1, 16, 2, 8, seed=1)
    options = dict(mask=Causal(), block_sizes=FOURS, budget=2)

    def recall(q, selection):
        return attention_recall(q, k, selection or BlockMean().select(q, k, **options), mask=Causal()).sum()

    got = jax.jit(jax.grad(recall))(q, None)
    assert jnp.isfinite(got).all() and got.any()
    np.testing.assert_allclose(got, jax.jit(jax.grad(recall))(q, BlockMean().select(q, k, **options)), rtol=1e-5)


def test_wrong_arguments_are_named():
    q, k = normal(1, 16, 4, 8), normal(1, 16, 2, 8)
    options = dict(mask=Causal(), block_sizes=FOURS)
    wrong = {
        "got neither budget nor threshold": {},
        "budget: got 0, wanted at least 1: 1 blocks are always taken": dict(budget=0),
        "threshold: got 1.5, wanted a share": dict(threshold=1.5),
        "differs between heads, wanted one for all": dict(budget=1, mask=PerHeadMask((Causal(), Full()))),
        "tokens.q_positions has shape": dict(budget=1, tokens=Tokens(q_positions=jnp.zeros((1, 3), jnp.int32))),
    }
    for message, changed in wrong.items():
        with pytest.raises(ValueError, match=message):
            BlockMean().select(q, k, **(options | changed))
    with pytest.raises(ValueError, match="a multiple of k's heads in q"):
        BlockMean().select(q[:, :, :3], k, budget=1, **options)
    with pytest.raises(ValueError, match="block_q is 4, wanted a multiple of stride=3"):
        XAttention(stride=3).select(q, k, budget=1, **options)
    with pytest.raises(ValueError, match="q has 4 heads, wanted 1, one for each selector"):
        PerHead(selectors=(BlockMean(),)).select(q, k, budget=1, **options)
    for make, message in (
        (lambda: BlockMean(heads="all"), "heads: got 'all'"),
        (lambda: BlockMean(local_blocks=-1), "local_blocks: got -1"),
        (lambda: XAttention(stride=0), "stride: got 0"),
        (lambda: VerticalSlash(last_queries=0), "last_queries: got 0"),
        (lambda: PerHead(selectors=(BlockMean(heads="kv"),)), r"selectors\[0\].heads: got 'kv'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    selection = BlockMean().select(q, k, budget=1, **options)
    with pytest.raises(ValueError, match="selection is of 16 queries and 16 keys, wanted 8 and 16"):
        attention_recall(q[:, :8], k, selection, mask=Causal())
    with pytest.raises(ValueError, match="selection has 3 heads, wanted a divisor of 4"):
        attention_recall(q, k, dataclasses.replace(selection, blocks=selection.blocks[:, :3]), mask=Causal())


@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_heads_that_do_not_share_keys_evenly_are_refused(num_kv_heads):
    q, k = jnp.ones((1, 16, 3, 4)), jnp.ones((1, 16, num_kv_heads, 4))
    with pytest.raises(ValueError, match=f"PerHead.select: 3 query heads over {num_kv_heads} kv heads, wanted a mult"):
        PerHead(selectors=(BlockMean(),) * 3).select(
            q, k, mask=Causal(), block_sizes=BlockSizes(block_q=4, block_kv=4), budget=2
        )


def test_parts_of_a_selection_are_checked_as_the_whole():
    selector, sizes = BlockMean(), BlockSizes(block_q=4, block_kv=4)
    k = jnp.ones((1, 16, 2, 4))
    summary, select_from = (inspect.unwrap(getattr(BlockMean, name)) for name in ("summary", "select_from"))
    of_keys, call = selector.summary(k, 4), dict(kv_len=16, mask=Causal(), block_sizes=sizes, budget=2)
    with pytest.raises(ValueError, match="BlockMean.select_from: q is int32, wanted one of"):
        select_from(selector, k.astype(jnp.int32), of_keys, **call)
    with pytest.raises(ValueError, match=r"BlockMean.summary: k has shape \(1, 16, 2\), wanted \[batch"):
        summary(selector, k[..., 0], 4)


def test_the_recall_of_other_rows_is_refused():
    k = jnp.ones((2, 16, 2, 4))
    selection = BlockMean().select(
        k, k, mask=Causal(), block_sizes=BlockSizes(block_q=4, block_kv=4), budget=2
    )  # fmt: skip
    with pytest.raises(ValueError, match="attention_recall: selection is of 2 rows, wanted 1"):
        attention_recall(k[:1], k[:1], selection, mask=Causal())

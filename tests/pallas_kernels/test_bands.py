"""The runs of packed documents, against what the mask says of every pair."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.bands import make_bands
from pallas_kernels.mask import Causal, Full, Prefix, SameDocument, Window
from pallas_kernels.schedule import make_schedule
from pallas_kernels.testing import packed_tokens
from pallas_kernels.tokens import Tokens

MASKS = (
    Causal() & SameDocument(),
    SameDocument(),
    SameDocument() & Window(left=5, right=2),
    Causal(offset=-2) & Window(left=9) & SameDocument(),
)
LENGTH = 24


def bands_of(mask, tokens: Tokens, length: int = LENGTH):
    return make_bands(mask, tokens, q_len=length, kv_len=length)


def allowed_pairs(mask, tokens: Tokens, length: int = LENGTH) -> np.ndarray:
    q, kv = tokens.queries(length), tokens.keys(length)
    pair = q.positions[:, :, None], kv.positions[:, None], q.segment_ids[:, :, None], kv.segment_ids[:, None]
    return np.asarray(mask.allowed(*pair))


def pairs_of(bands, length: int = LENGTH) -> list[np.ndarray]:
    """By the runs of queries, and by those of keys, `[B, T, S]`."""
    token = np.arange(length)
    by_query, by_key = (
        (np.asarray(first)[..., None] <= token) & (token <= np.asarray(last)[..., None])
        for first, last in ((bands.first_key, bands.last_key), (bands.first_query, bands.last_query))
    )
    return [by_query, by_key.swapaxes(1, 2)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@settings(deadline=None, max_examples=60)
@given(
    ids=st.lists(st.integers(-1, 3), min_size=LENGTH, max_size=LENGTH),
    is_sorted=st.booleans(),
    restarts=st.sampled_from(["never", "by document", "anywhere"]),
    shift=st.integers(0, 5),
)
def test_runs_are_what_the_mask_allows_or_out_of_order(mask, ids, is_sorted, restarts, shift):
    """Never wrong in silence: whatever the ids and positions."""
    ids = sorted(ids, key=lambda x: (x < 0, x)) if is_sorted else ids
    positions, at = [], shift
    for before, now in itertools.pairwise([None, *ids]):
        if (restarts == "by document" and now != before) or (restarts == "anywhere" and now == 1):
            at = 0
        positions.append(at)
        at += 1
    tokens = Tokens.self_attention(*(jnp.asarray([x], jnp.int32) for x in (positions, ids)))
    bands = bands_of(mask, tokens)
    if is_sorted and restarts != "anywhere":
        assert bool(bands.in_order[0])
    if bool(bands.in_order[0]):
        for pairs in pairs_of(bands):
            np.testing.assert_array_equal(pairs, allowed_pairs(mask, tokens))


def test_each_row_of_a_batch_is_in_order_by_itself():
    tokens = jax.tree.map(jnp.asarray, packed_tokens(((9, 15), (4, 6), (1, 23)), LENGTH))
    ids = tokens.q_segment_ids.at[2].set(tokens.q_segment_ids[2, ::-1])
    tokens = Tokens.self_attention(tokens.q_positions, ids)
    assert bands_of(MASKS[0], tokens).in_order.tolist() == [True, True, False]


def test_other_keys_than_queries_are_out_of_order():
    tokens = jax.tree.map(jnp.asarray, packed_tokens(((9, 15), (4, 20)), LENGTH))
    other = Tokens(
        q_positions=tokens.q_positions,
        kv_positions=tokens.kv_positions.at[1].add(1),
        q_segment_ids=tokens.q_segment_ids,
        kv_segment_ids=tokens.kv_segment_ids,
    )
    assert bands_of(MASKS[0], other).in_order.tolist() == [True, False]


@pytest.mark.parametrize("mask", [Causal(), Full(), (Causal() | Prefix(3)) & SameDocument(), ~SameDocument()], ids=str)
def test_other_masks_have_none(mask):
    tokens = packed_tokens(((9, 15),), LENGTH)
    assert bands_of(mask, tokens) is None
    assert make_schedule(mask, tokens, q_len=LENGTH, kv_len=LENGTH).bands is None


def test_none_without_documents_or_of_other_lengths():
    assert bands_of(MASKS[0], Tokens()) is None
    tokens = packed_tokens(((9, 15),), LENGTH)
    assert make_bands(MASKS[0], tokens, q_len=LENGTH, kv_len=LENGTH + 1) is None


def test_a_schedule_has_them():
    tokens = packed_tokens(((9, 15),), LENGTH)
    schedule = jax.jit(lambda tokens: make_schedule(MASKS[0], tokens, q_len=LENGTH, kv_len=LENGTH))(tokens)
    for pairs in pairs_of(schedule.bands):
        np.testing.assert_array_equal(pairs, allowed_pairs(MASKS[0], tokens))


def test_positions_of_each_row_with_ids_of_all():
    ids = jnp.asarray([[0] * 10 + [1] * 14], jnp.int32)
    positions = jnp.arange(LENGTH, dtype=jnp.int32)[None] + jnp.asarray([[0], [7], [0]], jnp.int32)
    tokens = Tokens.self_attention(positions.at[2, 5].add(1), ids)
    bands = bands_of(MASKS[0], tokens)
    assert bands.in_order.tolist() == [True, True, False]
    assert {x.shape for x in jax.tree.leaves(bands)} == {(3, LENGTH)}

"""Which hops a mask's span leaves, against every pair of tokens; and what happens where tokens break the assumption."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx import AttentionSharding, MeshConfig, make_mesh, masks
from longctx.context_parallel import Layout, sharded_attention
from longctx.context_parallel.layout import permute, unpermute
from longctx.context_parallel.reach import hops_needed, slot_span
from pallas_kernels import Tokens
from pallas_kernels.mask import Span
from pallas_kernels.testing import packed_tokens

DOCUMENTS = masks.documents()
CONTIGUOUS, ZIGZAG, STRIPED = (Layout(name=name) for name in ("contiguous", "zigzag", "striped"))


def setting_of(mask, layout, *, degree=4, length=96, **fields):
    bound = fields.pop("max_document_length", None)
    sharding = AttentionSharding(layout=layout, max_document_length=bound)
    return sharding.setting(mask, **dict(degree=degree, q_len=length, kv_len=length) | fields)


BOUNDS = st.none() | st.integers(0, 60)


@settings(deadline=None, max_examples=50)
@given(BOUNDS, BOUNDS, st.sampled_from([CONTIGUOUS, ZIGZAG]), st.sampled_from([2, 3, 4]), st.integers(-60, 60))
def test_the_hops_left_are_those_that_hold_a_pair(left, right, layout, degree, offset):
    mask = masks.sliding_window(left, right) & masks.causal(offset)
    length = 48
    hops = hops_needed(setting_of(mask, layout, degree=degree, length=length, has_positions=False))
    device = np.empty(length, int)
    device[layout.order(length, degree)] = np.arange(length) // (length // degree)
    q, kv = np.nonzero(np.asarray(mask.dense(None, length, length))[0])
    needed = set(((device[q] - device[kv]) % degree).tolist())
    assert needed | {0} == set(hops)


@pytest.mark.parametrize(
    ("mask", "layout", "degree", "hops"),
    [
        (masks.causal() & DOCUMENTS, CONTIGUOUS, 8, tuple(range(8))),
        (masks.sliding_window(left=12) & DOCUMENTS, CONTIGUOUS, 8, (0, 1)),
        (masks.sliding_window(left=13) & DOCUMENTS, CONTIGUOUS, 8, (0, 1, 2)),
        (masks.sliding_window(left=6) & DOCUMENTS, ZIGZAG, 8, (0, 1, 7)),
        (masks.sliding_window(left=7) & DOCUMENTS, ZIGZAG, 8, (0, 1, 2, 6, 7)),
        (masks.sliding_window(left=6) & DOCUMENTS, STRIPED, 8, tuple(range(8))),
        (masks.sliding_window(left=6) & DOCUMENTS, None, 8, tuple(range(8))),
        (masks.sliding_window(left=0) & DOCUMENTS, CONTIGUOUS, 8, (0,)),
    ],
)
def test_hops(mask, layout, degree, hops):
    assert hops_needed(setting_of(mask, layout, degree=degree)) == hops


@pytest.mark.parametrize(
    ("mask", "fields", "span"),
    [
        (masks.sliding_window(left=7) & DOCUMENTS, {}, (7, 0)),
        (masks.sliding_window(left=7), {}, (None, None)),  # positions may start anew in each document
        (masks.sliding_window(left=7), dict(has_positions=False), (7, 0)),
        (masks.sliding_window(left=7) & DOCUMENTS, dict(kv_len=48), (None, None)),
        (masks.causal() & DOCUMENTS, dict(max_document_length=10), (9, 0)),
        (DOCUMENTS, dict(max_document_length=10), (9, 9)),
        (masks.sliding_window(left=7, right=20) & DOCUMENTS, dict(max_document_length=10), (7, 9)),
        (masks.causal(), dict(max_document_length=10, has_positions=False), (None, 0)),
        (masks.causal() & DOCUMENTS, dict(max_document_length=10, has_positions=False), (None, 0)),
    ],
)
def test_slot_span(mask, fields, span):
    assert slot_span(setting_of(mask, CONTIGUOUS, **fields)) == Span(*span)


ROWS = ((20, 1, 7, 16), (48,), (0, 5, 5, 30))
WINDOW = masks.sliding_window(left=4) & DOCUMENTS


@functools.cache
def compiled(strategy, layout, mask, bound):
    """The output and every gradient, a function of x and tokens in the order of the sequence."""
    sharding = AttentionSharding(strategy=strategy, layout=layout, max_document_length=bound)
    order = layout.order(48, 4)

    @jax.jit
    def run(x, tokens):
        x, tokens = permute(x, order), jax.tree.map(lambda t: permute(jnp.asarray(t), order), tokens)
        attend = functools.partial(sharded_attention, mask=mask, tokens=tokens, sharding=sharding)
        out, vjp = jax.vjp(attend, x, x, x)
        return tuple(unpermute(array, order) for array in (out, *vjp(x)))

    return run


def nan_rows(tokens, strategy, layout, *, mask=WINDOW, bound=None):
    """Which rows of the output and of every gradient are NaN: whole rows, and the same in all."""
    x = jax.random.normal(jax.random.key(0), (len(ROWS), 48, 4, 8))
    with jax.set_mesh(make_mesh(MeshConfig(context_inner=4), jax.devices()[:4])):
        results = [np.isnan(np.asarray(array)) for array in compiled(strategy, layout, mask, bound)(x, tokens)]
    rows = results[0].any(axis=(1, 2, 3))
    for is_nan in results:
        assert np.array_equal(is_nan.all(axis=(1, 2, 3)), rows) and np.array_equal(is_nan.any(axis=(1, 2, 3)), rows)
    return rows.tolist()


def changed(row, *, positions=None, segment_ids=None):
    tokens = packed_tokens(ROWS, 48)
    arrays = [np.array(tokens.kv_positions), np.array(tokens.kv_segment_ids)]
    for array, new in zip(arrays, (positions, segment_ids), strict=True):
        if new is not None:
            array[row] = new
    return Tokens.self_attention(*arrays)


BREACHES = {
    "none": (changed(0), [False] * 3),
    "every_other_position": (changed(1, positions=np.arange(48) * 2), [False, True, False]),
    "positions_in_another_order": (changed(1, positions=np.arange(48)[::-1]), [False, True, False]),
    "a_document_in_two_places": (
        changed(0, segment_ids=np.repeat([0, 1, 0], 16), positions=np.r_[:16, :16, 16:32]),
        [True, False, False],
    ),
    "in_two_places_around_padding": (
        changed(2, segment_ids=np.repeat([0, -1, 0], 16), positions=np.r_[:16, :16, :16]),
        [False, False, True],
    ),
    "padding_in_front": (
        changed(2, segment_ids=np.repeat([-1, -1, 0, 3], 12), positions=np.r_[:24, :12, 5:17]),
        [False] * 3,
    ),
    "a_gap_of_padding_that_positions_count": (
        changed(2, segment_ids=np.repeat([0, -1, 0], 16), positions=np.arange(48)),
        [False] * 3,
    ),
}


@pytest.mark.parametrize(
    ("strategy", "layout"),
    [("halo", ZIGZAG), ("ring", CONTIGUOUS), pytest.param("halo", CONTIGUOUS, marks=pytest.mark.slow)],
    ids=str,
)
def test_rows_that_break_the_assumption_become_nan(strategy, layout):
    for name, (tokens, is_nan) in BREACHES.items():
        assert nan_rows(tokens, strategy, layout) == is_nan, name


def test_queries_that_are_other_tokens_break_it():
    tokens = changed(0)
    tokens = Tokens(
        q_positions=tokens.q_positions + np.int32(1),
        q_segment_ids=tokens.q_segment_ids,
        kv_positions=tokens.kv_positions,
        kv_segment_ids=tokens.kv_segment_ids,
    )
    assert nan_rows(tokens, "halo", CONTIGUOUS) == [True] * 3


@pytest.mark.slow
def test_a_document_longer_than_its_bound_breaks_it():
    mask = masks.causal() & DOCUMENTS
    assert nan_rows(changed(0), "halo", CONTIGUOUS, mask=mask, bound=30) == [False, True, False]
    assert nan_rows(changed(0), "ring", CONTIGUOUS, mask=mask, bound=12) == [True] * 3

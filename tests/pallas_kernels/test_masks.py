"""Masks against literal matrices, and their verdicts on tiles against the pairs of the tile."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pallas_kernels import Tokens
from pallas_kernels.mask import Bounds, Causal, Full, Mask, Prefix, SameDocument, Window


def matrix(mask: Mask, q_len: int, kv_len: int, tokens: Tokens | None = None) -> list[str]:
    return ["".join("1" if x else "." for x in row) for row in np.asarray(mask.dense(tokens, q_len, kv_len))[0]]


def test_causal():
    assert matrix(Causal(), 4, 4) == ["1...", "11..", "111.", "1111"]
    assert matrix(Causal(offset=2), 2, 4) == ["111.", "1111"]
    assert matrix(Causal(offset=-1), 3, 3) == ["...", "1..", "11."]


def test_window():
    assert matrix(Window(left=1, right=0), 4, 4) == ["1...", "11..", ".11.", "..11"]
    assert matrix(Window(left=None, right=1), 3, 4) == ["11..", "111.", "1111"]
    assert matrix(Window(left=0, right=None), 3, 4) == ["1111", ".111", "..11"]


def test_documents():
    segments = np.array([[0, 0, 1, -1]], np.int32)
    tokens = Tokens.self_attention(None, segments)
    assert matrix(SameDocument(), 4, 4, tokens) == ["11..", "11..", "..1.", "...."]
    assert matrix(Causal() & SameDocument(), 4, 4, tokens) == ["1...", "11..", "..1.", "...."]
    assert matrix(SameDocument(), 2, 2) == ["11", "11"]


def test_prefix_and_full():
    assert matrix(Prefix(2), 3, 3) == ["11.", "11.", "11."]
    assert matrix(Causal() | Prefix(2), 3, 3) == ["11.", "11.", "111"]
    assert matrix(Full(), 2, 3) == ["111", "111"]
    assert matrix(~Full(), 2, 3) == ["...", "..."]
    assert matrix(~Causal(), 3, 3) == [".11", "..1", "..."]


def test_masks_are_values():
    assert Causal() & Window(left=3) == Causal() & Window(left=3)
    assert hash(~Prefix(2)) == hash(~Prefix(2))
    assert Causal() & Window(left=3) != Causal() & Window(left=4)
    assert (Causal() & SameDocument()).uses_segments and (~SameDocument()).uses_segments
    assert not (Causal() | Window(left=3)).uses_segments


def test_wrong_masks_are_refused():
    with pytest.raises(TypeError, match="combine masks with & | ~"):
        Causal() and Full()
    with pytest.raises(ValueError, match="Window: left=-1, wanted None or a number of tokens >= 0"):
        Window(left=-1)
    with pytest.raises(ValueError, match="Prefix: length=-2"):
        Prefix(-2)


leaves = st.one_of(
    st.just(Full()),
    st.just(SameDocument()),
    st.builds(Causal, offset=st.integers(-5, 5)),
    st.builds(Window, left=st.none() | st.integers(0, 6), right=st.none() | st.integers(0, 6)),
    st.builds(Prefix, length=st.integers(0, 9)),
)
masks = st.recursive(
    leaves,
    lambda m: st.one_of(
        st.builds(lambda a, b: a & b, m, m), st.builds(lambda a, b: a | b, m, m), st.builds(lambda a: ~a, m)
    ),
    max_leaves=4,
)
tile_tokens = st.lists(st.tuples(st.integers(0, 12), st.integers(-1, 3)), min_size=1, max_size=6)


@hypothesis.given(masks, tile_tokens, tile_tokens)
@hypothesis.settings(deadline=None, max_examples=150)
def test_verdict_on_a_tile_is_safe(mask, q, kv):
    q, kv = np.array(q, np.int32), np.array(kv, np.int32)
    allowed = np.asarray(mask.allowed(q[:, None, 0], kv[None, :, 0], q[:, None, 1], kv[None, :, 1]))
    bounds = (Bounds(x[:, 0].min(), x[:, 0].max(), x[:, 1].min(), x[:, 1].max()) for x in (q, kv))
    verdict = mask.tile(*bounds)
    assert bool(verdict.some) or not allowed.any()
    assert not bool(verdict.all) or allowed.all()

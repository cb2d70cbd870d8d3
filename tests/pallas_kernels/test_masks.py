"""Masks against literal matrices, and their verdicts on tiles against the pairs of the tile."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pallas_kernels import Tokens
from pallas_kernels.mask import Bounds, Causal, Full, Mask, PerHead, Prefix, SameDocument, Window
from pallas_kernels.mask_patterns import Chunked, GlobalQueries, Neighborhood, Predicate, Strided, Summary, Table


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


def test_global_queries():
    assert matrix(GlobalQueries(1), 3, 3) == ["111", "...", "..."]
    assert matrix(GlobalQueries(1) | Prefix(1), 3, 3) == ["111", "1..", "1.."]


def test_strided():
    assert matrix(Strided(2), 3, 5) == ["1.1.1", ".1.1.", "1.1.1"]
    assert matrix(Strided(2, block=2), 4, 7) == ["11..11.", "11..11.", "..11..1", "..11..1"]
    assert matrix(Strided(2) & Window(left=2, right=0), 4, 4) == ["1...", ".1..", "1.1.", ".1.1"]


def test_summary():
    assert matrix(Summary(3, num=2), 2, 7) == [".11.11.", ".11.11."]
    assert matrix(Causal() & (Chunked(2) | Summary(2)), 5, 5) == ["1....", "11...", ".11..", ".111.", ".1.11"]


def test_chunked():
    assert matrix(Chunked(2), 5, 5) == ["11...", "11...", "..11.", "..11.", "....1"]


def test_neighborhood():
    cut_off = Neighborhood(grid=(2, 3), radius=(1, 1), shift_at_edges=False)
    assert matrix(cut_off, 6, 7) == ["11.11..", "111111.", ".11.11.", "11.11..", "111111.", ".11.11."]
    shifted = Neighborhood(grid=(4,), radius=(1,))
    assert matrix(shifted, 5, 5) == ["111..", "111..", ".111.", ".111.", "....."]
    tiled = Neighborhood(grid=(5,), radius=(0,), tile_shape=(2,))
    assert matrix(tiled, 5, 5) == ["11...", "11...", "..11.", "..11.", "....1"]
    assert matrix(Neighborhood(grid=(2, 2, 2), radius=(0, 1, 0)), 2, 8) == ["1.1.....", ".1.1...."]


def test_table():
    blocks = np.array([[1, 0, 1], [0, 1, 0]], bool)
    mask = Table(blocks, block_q=1, block_kv=2)
    assert matrix(mask, 3, 7) == ["11..11.", "..11...", "......."]
    blocks[:] = False
    assert matrix(mask, 1, 2) == ["11"], "the table is a copy"


def near(q_positions, kv_positions, q_segment_ids, kv_segment_ids):
    return abs(q_positions - kv_positions) <= 1


def near_tile(q, kv):
    nearest = np.maximum(kv.position_min - q.position_max, q.position_min - kv.position_max)
    farthest = np.maximum(kv.position_max - q.position_min, q.position_max - kv.position_min)
    return nearest <= 1, farthest <= 1


def same_parity_of_segments(q_positions, kv_positions, q_segment_ids, kv_segment_ids):
    return q_segment_ids % 2 == kv_segment_ids % 2


def test_predicate():
    assert matrix(Predicate(near), 3, 3) == ["11.", "111", ".11"]
    assert matrix(Predicate(near, near_tile) & Causal(), 3, 3) == ["1..", "11.", ".11"]


def test_per_head():
    mask = Causal() & PerHead((Window(left=0), PerHead((Full(), Prefix(1), Strided(2))) & Window(left=1)))
    assert mask.head_groups == 6
    dense = np.asarray(mask.dense(None, 3, 3, num_heads=12))[0]
    rows = ["/".join("".join("1" if x else "." for x in row) for row in head) for head in dense]
    # The inner masks count the same 12 heads: the first six never come to use the first of them.
    diagonal, second, third = "1../.1./..1", "1../1../...", "1../.1./..1"
    assert rows == [diagonal] * 6 + ["1../1../..."] * 2 + [third] * 4
    assert second == rows[6]
    assert (~PerHead((Causal(), Full()))).dense(None, 2, 2, num_heads=2).shape == (1, 2, 2, 2)
    assert Causal().dense(None, 2, 2, num_heads=4).shape == (1, 1, 2, 2)


def test_a_mask_that_differs_between_heads_has_no_single_answer():
    mask = PerHead((Causal(), Full()))
    with pytest.raises(TypeError, match="which differs between heads; ask allowed_by_head, or dense with num_heads"):
        mask.dense(None, 4, 4)
    with pytest.raises(ValueError, match="differs between 2 groups of heads, got 3 query heads, wanted a multiple"):
        mask.by_head(3)


def test_masks_are_values():
    assert Causal() & Window(left=3) == Causal() & Window(left=3)
    assert hash(~Prefix(2)) == hash(~Prefix(2))
    assert Causal() & Window(left=3) != Causal() & Window(left=4)
    assert (Causal() & SameDocument()).uses_segments and (~SameDocument()).uses_segments
    assert not (Causal() | Window(left=3)).uses_segments
    assert Predicate(near) == Predicate(near) and not Predicate(near).uses_segments
    assert (Causal() & Predicate(same_parity_of_segments, uses_segments=True)).uses_segments
    one, same, other = (Table(np.array(x, bool), 4, 4) for x in ([[1, 0]], [[1, 0]], [[1], [0]]))
    assert one == same and hash(one) == hash(same) and one != other and one != Table(one.blocks, 4, 2)
    heads = PerHead((SameDocument(), Causal() & SameDocument()))
    assert heads.uses_segments and heads.within_documents and hash(heads) == hash(PerHead(heads.masks))
    assert not PerHead((SameDocument(), Causal())).within_documents


def test_wrong_masks_are_refused():
    with pytest.raises(TypeError, match="combine masks with & | ~"):
        Causal() and Full()
    with pytest.raises(ValueError, match="Window: left=-1, wanted None or a number of tokens >= 0"):
        Window(left=-1)
    with pytest.raises(ValueError, match="Prefix: length=-2"):
        Prefix(-2)
    with pytest.raises(ValueError, match="GlobalQueries: length=-1, wanted a number >= 0"):
        GlobalQueries(-1)
    with pytest.raises(ValueError, match="Strided: stride=0, wanted a number >= 1"):
        Strided(0)
    with pytest.raises(ValueError, match="Summary: num=4, wanted at most period=3"):
        Summary(3, num=4)
    with pytest.raises(ValueError, match="Chunked: size=0, wanted a number >= 1"):
        Chunked(0)
    with pytest.raises(
        ValueError, match=r"Neighborhood: radius=\(1,\) with grid=\(4, 4\), wanted a number >= 0 for each"
    ):
        Neighborhood((4, 4), (1,))
    with pytest.raises(
        ValueError, match=r"Table: blocks is int64\[1, 1\], wanted bool\[rows, columns\], none of them 0"
    ):
        Table(np.array([[1]]))
    with pytest.raises(ValueError, match="PerHead: masks=\\(\\), wanted at least one Mask"):
        PerHead(())


def tables(max_size: int):
    """Tables of `max_size` rows and columns at most."""
    sizes = st.integers(1, max_size)
    return st.builds(
        lambda rows, columns, seed, q, kv: Table(np.random.default_rng(seed).random((rows, columns)) < 0.5, q, kv),
        *(sizes, sizes, st.integers(0, 99), st.integers(1, 3), st.integers(1, 3)),
    )


patterns = st.one_of(
    st.builds(GlobalQueries, length=st.integers(0, 9)),
    st.builds(Strided, stride=st.integers(1, 5), block=st.integers(1, 3)),
    st.integers(1, 5).flatmap(lambda period: st.builds(Summary, st.just(period), st.integers(1, period))),
    st.builds(Chunked, size=st.integers(1, 6)),
    tables(6),
)
# Built here and not drawn: the tests' check of a tuple's type takes a random item, which hypothesis forbids.
neighborhoods = st.sampled_from(
    [
        Neighborhood(grid, tuple(radius), tile_shape and tile_shape[: len(grid)], shift_at_edges)
        for grid in ((7,), (3, 4), (4, 2), (2, 2, 3), (1, 3, 3))
        for radius in itertools.product((0, 1), repeat=len(grid))
        for tile_shape in (None, (1, 2, 2), (2, 3, 1))
        for shift_at_edges in (True, False)
    ]
)
leaves = st.one_of(
    patterns,
    neighborhoods,
    st.sampled_from(
        [Predicate(near), Predicate(near, near_tile), Predicate(same_parity_of_segments, uses_segments=True)]
    ),
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


@hypothesis.given(masks, st.none() | masks, tile_tokens, tile_tokens)
@hypothesis.settings(deadline=None, max_examples=60)
def test_verdict_on_a_tile_is_safe(mask, of_other_heads, q, kv):
    if of_other_heads is not None:
        mask = ~PerHead((mask, of_other_heads)) | Window(left=1)
    q, kv = np.array(q, np.int32), np.array(kv, np.int32)
    allowed = np.asarray(mask.allowed_by_head(2, q[:, None, 0], kv[None, :, 0], q[:, None, 1], kv[None, :, 1]))
    bounds = (Bounds(x[:, 0].min(), x[:, 0].max(), x[:, 1].min(), x[:, 1].max()) for x in (q, kv))
    verdict = mask.tile(*bounds)
    assert bool(verdict.some) or not allowed.any()
    assert not bool(verdict.all) or allowed.all()


@hypothesis.given(masks, st.none() | masks)
@hypothesis.settings(max_examples=60, deadline=None)
def test_no_allowed_pair_is_farther_apart_than_the_span(mask, of_other_heads):
    if of_other_heads is not None:
        mask = PerHead((mask, of_other_heads))
    left, right = mask.span
    segments = np.repeat([0, 1], 8).astype(np.int32)[None]
    allowed = mask.dense(Tokens.self_attention(None, segments), 16, 16, num_heads=2)
    _, _, q, kv = np.nonzero(np.asarray(allowed))
    assert left is None or (q - kv <= left).all()
    assert right is None or (kv - q <= right).all()


@pytest.mark.parametrize(
    ("mask", "span"),
    [
        (Window(7, 0) & SameDocument(), (7, 0)),
        (Causal(-3) & Window(7, 7), (7, -3)),
        (Window(7, 0) | Window(2, 4), (7, 4)),
        (Window(7, 0) | Causal(), (None, 0)),
        (~Window(7, 0), (None, None)),
        (Causal() & Chunked(8), (7, 0)),
        (PerHead((Window(7, 0), Window(3, 1))), (7, 1)),
        (Full(), (None, None)),
    ],
)
def test_span(mask, span):
    assert mask.span == span


intervals = st.tuples(st.integers(0, 12), st.integers(0, 6)).map(lambda x: np.arange(x[0], x[0] + x[1] + 1))


@hypothesis.given(patterns, intervals, intervals)
@hypothesis.settings(deadline=None, max_examples=60)
def test_verdict_on_a_tile_of_neighbouring_positions_is_exact(mask, q, kv):
    allowed = np.asarray(mask.allowed(q[:, None], kv[None], np.int32(0), np.int32(0)))
    verdict = mask.tile(*(Bounds(x.min(), x.max(), 0, 0) for x in (q, kv)))
    assert (bool(verdict.some), bool(verdict.all)) == (allowed.any(), allowed.all())


@hypothesis.given(neighborhoods, st.data())
@hypothesis.settings(deadline=None, max_examples=50)
def test_verdict_on_a_tile_within_a_line_of_the_grid_is_exact(mask, data):
    """Where no axis but the innermost takes more than one value the bounds of the coordinates are exact."""
    *outer, length = mask.grid
    sides = []
    for _ in range(2):
        line = data.draw(st.integers(0, int(np.prod(outer)) - 1)) * length
        first, last = sorted(data.draw(st.tuples(st.integers(0, length - 1), st.integers(0, length - 1))))
        sides.append(np.arange(line + first, line + last + 1))
    q, kv = sides
    allowed = np.asarray(mask.allowed(q[:, None], kv[None], np.int32(0), np.int32(0)))
    verdict = mask.tile(*(Bounds(x.min(), x.max(), 0, 0) for x in sides))
    assert (bool(verdict.some), bool(verdict.all)) == (allowed.any(), allowed.all())

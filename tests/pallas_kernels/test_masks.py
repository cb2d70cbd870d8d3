"""Masks against literal matrices, and their verdicts on tiles against the pairs of the tile."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Tokens
from pallas_kernels.mask import Bounds, Causal, Full, Mask, PerHead, Prefix, SameDocument, Window
from pallas_kernels.mask_grids import Neighborhood, StridedNeighborhood
from pallas_kernels.mask_patterns import (
    BlockWindow,
    Chunked,
    GlobalQueries,
    PowersOfTwo,
    Predicate,
    Strided,
    StridedKeys,
    Summary,
    Table,
)
from pallas_kernels.mask_segments import Contexts, Hierarchy
from pallas_kernels.pair_tests import elementwise


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


def test_strided_keys():
    assert matrix(StridedKeys(2, offset=1), 2, 5) == [".1.1.", ".1.1."]
    assert matrix(StridedKeys(3, block=2), 2, 8) == ["11....11", "11....11"]
    assert matrix(StridedKeys(3, offset=2), 3, 7) == matrix(Summary(3), 3, 7)


def test_powers_of_two():
    assert matrix(PowersOfTwo(), 7, 7) == [
        "1......", "11.....", "111....", ".111...", "1.111..", ".1.111.", "..1.111",
    ]  # fmt: skip
    assert matrix(PowersOfTwo(block=2), 8, 8)[6:] == [".." + "111111"] * 2


def test_block_window():
    assert matrix(BlockWindow(1, block=2), 5, 6) == ["11....", "11....", "1111..", "1111..", "..1111"]
    assert matrix(BlockWindow(0, 1), 3, 3) == ["11.", ".11", "..1"]


def test_strided_neighborhood():
    assert matrix(StridedNeighborhood((6,), (2,), (2,)), 6, 7) == ["11....."] * 2 + ["..11..."] * 2 + ["....11."] * 2
    assert matrix(StridedNeighborhood((5,), (3,), (2,)), 5, 5) == ["111.."] * 2 + ["..111"] * 3
    by_tiles = StridedNeighborhood((2, 4), (2, 2), (2, 2), tile_shape=(2, 2))
    assert matrix(by_tiles, 8, 8) == ["1111...."] * 4 + ["....1111"] * 4


def test_contexts():
    segments = np.array([[4, 5, 5, 7, 8, 11, -1]], np.int32)  # two prompts, of contexts 0, 1 and last, and 0 and last
    tokens = Tokens.self_attention(None, segments)
    assert matrix(Contexts(bits=2), 7, 7, tokens) == [
        "1......", ".11....", ".11....", "1111...", "....1..", "....11.", ".......",
    ]  # fmt: skip


def test_hierarchy():
    # A document of two sections of two and one sentences; anchors, then tokens; another document's anchor; padding.
    ids = [0b0_00_00_0, 0b0_01_00_0, 0b0_01_01_0, 0b0_01_01_1, 0b0_01_10_0, 0b0_01_10_1, 0b0_01_10_1,
           0b0_10_00_0, 0b0_10_01_0, 0b0_10_01_1, 0b1_00_00_0, -1]  # fmt: skip
    tokens = Tokens.self_attention(None, np.array([ids], np.int32))
    assert matrix(Hierarchy(section_bits=2, sentence_bits=2), 12, 12, tokens) == [
        "11.....1....",  # the document: itself and its sections
        "111.1..1....",  # a section: the document, sections, its sentences
        ".1111.......",  # a sentence: its section, sentences, its token
        "..11........",  # a token: its sentence
        ".11.111.....",
        "....111.....",
        "....111.....",
        "11.....11...",
        ".......111..",
        "........11..",
        "..........1.",
        "............",
    ]


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
    with pytest.raises(ValueError, match="StridedKeys: offset=2, wanted a number >= 0 and < stride=2"):
        StridedKeys(2, offset=2)
    with pytest.raises(ValueError, match="PowersOfTwo: block=0, wanted a number >= 1"):
        PowersOfTwo(0)
    with pytest.raises(ValueError, match="BlockWindow: left=-1, wanted a number >= 0"):
        BlockWindow(-1)
    for options in ({"window": (5, 1)}, {"stride": (3, 1)}, {"window": (2,)}):
        with pytest.raises(
            ValueError, match=r"StridedNeighborhood: .* with grid=\(4, 4\), wanted a number >= 1 for each"
        ):
            StridedNeighborhood(**{"grid": (4, 4), "window": (2, 2), "stride": (1, 1)} | options)
    with pytest.raises(ValueError, match=r"tile_shape=\(3, 2\) with grid=\(4, 4\), wanted a divisor"):
        StridedNeighborhood((4, 4), (2, 2), (1, 1), (3, 2))
    with pytest.raises(ValueError, match=r"Contexts: fields of \(31,\) bits, wanted >= 1 each and together < 31"):
        Contexts(31)
    with pytest.raises(ValueError, match=r"Hierarchy: fields of \(8, 0, 1\) bits"):
        Hierarchy(8, 0)
    with pytest.raises(ValueError, match="Hierarchy: sections=0, wanted a number >= 1"):
        Hierarchy(sections=0)
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
    st.integers(1, 4).flatmap(
        lambda stride: st.builds(StridedKeys, st.just(stride), st.integers(1, 3), st.integers(0, stride - 1))
    ),
    st.builds(PowersOfTwo, block=st.integers(1, 3)),
    st.builds(BlockWindow, left=st.integers(0, 3), right=st.integers(0, 3), block=st.integers(1, 3)),
    tables(6),
)
segment_masks = st.one_of(
    st.builds(Contexts, bits=st.integers(1, 2)),
    st.builds(Hierarchy, section_bits=st.integers(1, 2), sentence_bits=st.integers(1, 2)),
)
strided_neighborhoods = st.sampled_from(
    [
        StridedNeighborhood(grid, window, stride, tile_shape)
        for grid, tile in (((8,), (2,)), ((4, 3), (2, 3)), ((2, 6), (1, 3)), ((2, 2, 4), (2, 1, 2)))
        for window in itertools.product(*(range(1, min(length, 4) + 1) for length in grid))
        for stride in itertools.product(*({1, size - size // 2, size} for size in window))
        for tile_shape in (None, tile)
    ]
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
    strided_neighborhoods,
    segment_masks,
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
@hypothesis.settings(deadline=None, max_examples=25)
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
@hypothesis.settings(max_examples=25, deadline=None)
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


@hypothesis.given(strided_neighborhoods, st.data())
@hypothesis.settings(deadline=None, max_examples=50)
def test_verdict_on_whole_tiles_of_the_grid_is_exact(mask, data):
    """Where positions count tile by tile, the bounds of a tile's coordinates are exact."""
    size = int(np.prod(mask.tile_shape or 1))
    num_tiles = int(np.prod(mask.grid)) // size
    q, kv = (data.draw(st.integers(0, num_tiles - 1)) * size + np.arange(size) for _ in range(2))
    allowed = np.asarray(mask.allowed(q[:, None], kv[None], np.int32(0), np.int32(0)))
    verdict = mask.tile(*(Bounds(x.min(), x.max(), 0, 0) for x in (q, kv)))
    assert (bool(verdict.some), bool(verdict.all)) == (allowed.any(), allowed.all())


segment_ids = st.lists(st.integers(-1, 70), min_size=1, max_size=5).map(lambda ids: np.array(ids, np.int32))


@hypothesis.given(segment_masks, segment_ids, segment_ids)
@hypothesis.settings(deadline=None, max_examples=300)
def test_verdict_on_segment_ids_in_any_order_is_safe(mask, q, kv):
    allowed = np.asarray(mask.allowed(0, 0, q[:, None], kv[None]))
    verdict = mask.tile(*(Bounds(0, 0, x.min(), x.max()) for x in (q, kv)))
    assert bool(verdict.some) or not allowed.any()
    assert not bool(verdict.all) or allowed.all()


@hypothesis.given(st.lists(st.integers(1, 7), min_size=2, max_size=6), st.integers(1, 6), st.integers(0, 9))
@hypothesis.settings(deadline=None, max_examples=25)
def test_verdict_on_contexts_in_order_is_exact(lengths, block, padding):
    """Prompts of at most three contexts and a question, whose tokens are in order."""
    ids = np.repeat([i // 4 * 4 + (3 if i % 4 == 3 or i + 1 == len(lengths) else i % 4) for i in range(len(lengths))],
                    lengths)  # fmt: skip
    ids = np.concatenate([ids, np.full(padding, -1)]).astype(np.int32)
    mask = Contexts(bits=2)
    blocks = [x for x in np.split(ids, range(block, len(ids), block)) if x.min() >= 0]
    for q, kv in itertools.product(blocks, blocks):
        allowed = np.asarray(mask.allowed(0, 0, q[:, None], kv[None]))
        verdict = mask.tile(*(Bounds(0, 0, x.min(), x.max()) for x in (q, kv)))
        assert bool(verdict.some) == allowed.any()
        assert bool(verdict.all) <= allowed.all()
        if len(set(q)) == len(set(kv)) == 1:
            assert bool(verdict.all) == allowed.all()


@pytest.mark.parametrize(
    "mask",
    [
        StridedKeys(3, 128, 1),
        PowersOfTwo(128),
        BlockWindow(3, 1, 128),
        StridedNeighborhood((8, 16, 16), (4, 8, 8), (2, 4, 4)),
        StridedNeighborhood((8, 16, 16), (4, 8, 8), (2, 4, 4), (2, 8, 8)),
        Contexts(),
        Hierarchy(),
    ],
)
def test_kernels_on_gpus_can_evaluate_the_pair_test(mask):
    tile = jax.ShapeDtypeStruct((64, 128), jnp.int32)
    elementwise(mask.allowed, tile, tile, tile, tile)


def most_runs(allowed, gap):
    """The greatest number of runs of True in a row, where those less than `gap` apart count as one."""
    return max(1 + int((np.diff(np.flatnonzero(row)) - 1 >= gap).sum()) for row in allowed if row.any())


@pytest.mark.parametrize(
    ("mask", "apart", "runs"),
    [
        (StridedKeys(2, 8), 8, 8),
        (StridedKeys(2, 4), 15, 1),
        (Strided(2, block=8), 8, 8),
        (PowersOfTwo(8), 8, 3),
        (PowersOfTwo(1), 15, 3),
        (BlockWindow(3, block=8), 8, 1),
        (StridedNeighborhood((8, 16), (4, 8), (4, 8), (2, 4)), 8, 2),
        (StridedNeighborhood((4, 32), (3, 4), (1, 1)), 15, 3),
    ],
)
def test_runs_of_whole_blocks(mask, apart, runs):
    """With blocks of 8 a gap of 15 holds one wherever it is, and one of 8 does between whole blocks of the pattern."""
    allowed = np.asarray(mask.dense(None, 128, 128))[0]
    assert most_runs(allowed, apart) == runs
    assert mask.num_runs(128, 15) >= runs


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


@pytest.mark.parametrize("join", [lambda mask: mask & None, lambda mask: mask | 3, lambda mask: True & mask])
def test_masks_are_joined_with_masks_alone(join):
    with pytest.raises(TypeError, match="unsupported operand"):
        join(Causal())


def test_a_part_that_is_no_mask_is_refused():
    with pytest.raises(ValueError, match="PerHead: a part of masks=.*, wanted a Mask"):
        PerHead(((Causal(), Full()),))

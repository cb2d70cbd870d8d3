"""The mask constructors: as matrices whose rows are queries, and against the formulas of the papers they come from."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from longctx import masks
from pallas_kernels import Tokens

SEGMENTS = [0, 0, 1, -1]
CASES = {
    "full": (masks.full(), "1111 1111 1111 1111"),
    "causal": (masks.causal(), "1000 1100 1110 1111"),
    "strict past": (masks.causal(-1), "0000 1000 1100 1110"),
    "one ahead": (masks.causal(1), "1100 1110 1111 1111"),
    "window": (masks.sliding_window(1), "1000 1100 0110 0011"),
    "two-sided window": (masks.sliding_window(1, 1), "1100 1110 0111 0011"),
    "open left": (masks.sliding_window(None, 1), "1100 1110 1111 1111"),
    "documents": (masks.documents(), "1100 1100 0010 0000"),
    "causal documents": (masks.causal() & masks.documents(), "1000 1100 0010 0000"),
    "prefix": (masks.prefix(2), "1100 1100 1100 1100"),
    "prefix LM": (masks.causal() | masks.prefix(3), "1110 1110 1110 1111"),
    "not causal": (~masks.causal(), "0111 0011 0001 0000"),
    "sink tokens": (masks.sink_tokens(1), "1000 1000 1000 1000"),
    "global queries": (masks.global_queries(1), "1111 0000 0000 0000"),
    "global tokens": (masks.global_tokens(1), "1111 1000 1000 1000"),
    "dilated window": (masks.dilated_window(3, 2), "1000 0100 1010 0101"),
    "dilated both sides": (masks.dilated_window(0, 2, right=None), "1010 0101 0010 0001"),
    "strided": (masks.strided(2), "1010 0101 1010 0101"),
    "block strided": (masks.strided(2, block=2), "1100 1100 0011 0011"),
    "summary": (masks.summary(2), "0101 0101 0101 0101"),
    "block window": (masks.block_window(0, 1, block=2), "1111 1111 0011 0011"),
    "powers of two": (masks.powers_of_two(), "1000 1100 1110 0111"),
    "strided keys": (masks.strided_keys(2, offset=1), "0101 0101 0101 0101"),
    "strided neighborhood": (masks.strided_neighborhood((4,), 2, 2), "1100 1100 0011 0011"),
    "contexts": (masks.contexts(bits=1), "1100 1100 1110 0000"),
    "hierarchy": (masks.hierarchy(section_bits=1, sentence_bits=1), "1110 1110 1110 0000"),
    "chunked": (masks.chunked(3), "1110 1110 1110 0001"),
    "neighborhood": (masks.neighborhood((4,), 1), "1110 1110 0111 0111"),
    "neighborhood cut off": (masks.neighborhood((2, 2), (1, 0), shift_at_edges=False), "1010 0101 1010 0101"),
    "neighborhood of tiles": (masks.neighborhood((4,), 0, tile_shape=(2,)), "1100 1100 0011 0011"),
    "table": (masks.block_table(np.array([[True, False], [True, True]]), 2), "1100 1100 1111 1111"),
    "oblong table": (masks.block_table(np.array([[True], [False]]), (1, 3)), "1110 0000 0000 0000"),
    "predicate": (masks.predicate(lambda t, s, *_: t + s == 3), "0001 0010 0100 1000"),
}


@pytest.mark.parametrize("name", CASES)
def test_mask_is_this_matrix(name):
    mask, picture = CASES[name]
    tokens = Tokens.self_attention(segment_ids=jnp.asarray([SEGMENTS], jnp.int32))
    wanted = np.array([[digit == "1" for digit in row] for row in picture.split()])
    np.testing.assert_array_equal(mask.dense(tokens, 4, 4)[0], wanted)


def test_per_head():
    dense = masks.per_head(masks.causal(), masks.full()).dense(None, 2, 2, num_heads=4)
    np.testing.assert_array_equal(dense[0, :, 0, 1], [False, False, True, True])


def test_s2_shards():
    dense = masks.s2_shards(2, 1, block=2).dense(None, 6, 6, num_heads=4)[0].astype(int)
    pictures = ["".join(map(str, head[row])) for head in dense for row in (3, 5)]
    assert pictures == ["001100", "001111", "001100", "001111", "111100", "110011", "111100", "110011"]


def test_elastic_windows():
    mask = masks.elastic_windows([(3, 0), (0, 0.75)], 8, sinks=1, block=2)
    dense = mask.dense(None, 8, 8, num_heads=2)[0].astype(int)
    assert ["".join(map(str, head[7])) for head in dense] == ["10001111", "10111111"]
    assert ["".join(map(str, head[6])) for head in masks.elastic_windows([(3, 0.5)], 8, block=2, sinks=0).dense(
        None, 8, 8, num_heads=1)[0].astype(int)] == ["11111110"]  # fmt: skip
    with pytest.raises(ValueError, match="wanted at least one Mask"):
        masks.elastic_windows([], 8)


def test_public_names_are_the_constructors():
    constructors = {name for name, x in vars(masks).items() if getattr(x, "__module__", None) == masks.__name__}
    assert sorted(masks.__all__) == sorted(constructors)


DOCS = pathlib.Path(masks.__file__).parents[1] / "docs" / "masks.md"
LENGTH = 96
DOCUMENT = np.repeat([0, 1, 2], [40, 9, 47])
POSITION = np.concatenate([np.arange(n) for n in (40, 9, 47)])
GRID = (8, 12)


def neighborhood(t, s):
    """FlexAttention's NATTEN example: windows of 3 x 5 tokens, moved inwards at the edges."""
    (t_row, t_column), (s_row, s_column) = ((x // GRID[1], x % GRID[1]) for x in (t, s))
    near_row = abs(np.clip(t_row, 1, GRID[0] - 2) - s_row) <= 1
    return near_row & (abs(np.clip(t_column, 2, GRID[1] - 3) - s_column) <= 2)


def sliding_tiles(t, s):
    """Sliding tile attention: whole tiles of 2 x 4 tokens, the window of 3 x 1 tiles moved inwards at the edges."""
    (t_row, t_column), (s_row, s_column) = ((x // GRID[1] // 2, x % GRID[1] // 4) for x in (t, s))
    return (abs(np.clip(t_row, 1, 2) - s_row) <= 1) & (t_column == s_column)


def neighbors(grid, radius):
    """NATTEN: as many tokens as fit within the radius on both sides, the window moved inwards at the edges."""

    def formula(t, s):
        near = True
        for axis, (t_i, s_i) in enumerate(zip(np.unravel_index(t, grid), np.unravel_index(s, grid), strict=True)):
            center = np.clip(t_i, radius[axis], grid[axis] - 1 - radius[axis])
            near = near & (abs(center - s_i) <= radius[axis])
        return near

    return formula


def generalized_neighborhood(grid, window, stride, tile=None):
    """GNA: along each axis the queries of a group of `stride` share the window of the middle, or right middle, one."""

    def keys_of(length, window, stride):
        sees = np.zeros((length, length), bool)
        for query in range(length):
            group = [x for x in range(length) if x // stride == query // stride]
            leader = group[0] + stride // 2 if group[0] + stride // 2 < length else length - 1
            keys = np.arange(leader - window // 2, leader - window // 2 + window)
            keys += max(0, -keys[0])
            keys -= max(0, keys[-1] - (length - 1))
            sees[query, keys] = True
        return sees

    # Where each position is on the grid: numbers of tokens as a grid, read tile by tile.
    order = np.arange(np.prod(grid)).reshape(grid)
    if tile is not None:
        split = order.reshape([x for length, size in zip(grid, tile, strict=True) for x in (length // size, size)])
        order = split.transpose([*range(0, split.ndim, 2), *range(1, split.ndim, 2)])
    order = order.ravel()

    def formula(t, s):
        near = True
        coordinates = zip(np.unravel_index(order[t], grid), np.unravel_index(order[s], grid), strict=True)
        for axis, (t_i, s_i) in enumerate(coordinates):
            near = near & keys_of(grid[axis], window[axis], stride[axis])[t_i, s_i]
        return near

    return formula


# The masks of docs/masks.md, each beside its formula over positions t of queries and s of keys, `[T, 1]` and `[1, S]`.
OF_THE_LITERATURE = {
    "causal() & sliding_window(15)": lambda t, s: (t >= s) & (t - s <= 15),
    "causal() | prefix(20)": lambda t, s: (t >= s) | (s < 20),
    "causal() & (sink_tokens(4) | sliding_window(15))": lambda t, s: (t >= s) & ((s < 4) | (t - s <= 15)),
    "causal() & chunked(32)": lambda t, s: (t >= s) & (t // 32 == s // 32),
    "causal() | chunked(32)": lambda t, s: t // 32 >= s // 32,
    "dilated_window(24, 4)": lambda t, s: (t >= s) & (t - s <= 24) & ((t - s) % 4 == 0),
    "global_tokens(4) | sliding_window(8, 8)": lambda t, s: (abs(t - s) <= 8) | (s < 4) | (t < 4),
    "causal() & (sliding_window(15) | strided(16))": lambda t, s: (t >= s) & ((t - s <= 15) | ((t - s) % 16 == 0)),
    "causal() & (chunked(16) | summary(16, 4))": lambda t, s: (t >= s) & ((t // 16 == s // 16) | (s % 16 >= 12)),
    "causal() & strided(3, block=16)": lambda t, s: (t >= s) & ((t // 16 - s // 16) % 3 == 0),
    "causal() & (block_window(1, block=16) | strided(3, block=16))": lambda t, s: (
        (t >= s) & ((t // 16 - s // 16 <= 1) | ((t // 16 - s // 16) % 3 == 0))
    ),
    "causal() & (chunked(48) | summary(48, 16))": lambda t, s: (
        (t >= s) & ((t // 48 == s // 48) | np.isin(s // 16, (2, 5)))
    ),
    "causal() & (sink_tokens(4) | sliding_window(15) | powers_of_two(8))": lambda t, s: (
        (t >= s) & ((s < 4) | (t - s < 16) | np.isin(t // 8 - s // 8, (0, 1, 2, 4, 8, 16)))
    ),
    "neighborhood((96,), 5)": neighbors((96,), (5,)),
    "neighborhood((4, 4, 6), (1, 1, 2))": neighbors((4, 4, 6), (1, 1, 2)),
    "strided_neighborhood((8, 12), (3, 6), (2, 3))": generalized_neighborhood((8, 12), (3, 6), (2, 3)),
    "strided_neighborhood((4, 4, 6), (2, 4, 3), (2, 2, 3), tile_shape=(2, 2, 3))": generalized_neighborhood(
        (4, 4, 6), (2, 4, 3), (2, 2, 3), (2, 2, 3)
    ),
    "neighborhood((8, 12), (1, 2))": neighborhood,
    "neighborhood((8, 12), (1, 0), tile_shape=(2, 4))": sliding_tiles,
}


@pytest.mark.parametrize("expression", OF_THE_LITERATURE)
def test_masks_of_the_literature(expression):
    mask, formula = eval(expression, vars(masks)), OF_THE_LITERATURE[expression]
    t = np.arange(LENGTH)
    np.testing.assert_array_equal(mask.dense(None, LENGTH, LENGTH)[0], formula(t[:, None], t[None]))

    packed = Tokens.self_attention(jnp.asarray(POSITION[None], jnp.int32), jnp.asarray(DOCUMENT[None], jnp.int32))
    same_document = DOCUMENT[:, None] == DOCUMENT[None]
    np.testing.assert_array_equal(
        (mask & masks.documents()).dense(packed, LENGTH, LENGTH)[0],
        formula(POSITION[:, None], POSITION[None]) & same_document,
    )


def s2_blocks(t, s, head):
    """The last two blocks, and every third one: for head 0 the last of each three, for head 1 the one before it, ..."""
    q_block, kv_block = t // 8, s // 8
    return (t >= s) & ((q_block - kv_block < 2) | ((kv_block + head + 1) % 3 == 0))


# Of masks that differ between heads, the formula has the group of heads as its third argument.
PER_HEAD = {
    "s2_shards(3, 2, block=8)": (3, s2_blocks),
    "elastic_windows([(16, 0), (8, 0.25)], 96, sinks=4, block=8)": (
        2, lambda t, s, head: (t >= s) & ((s < 4) | (t // 8 - s // 8 < (2, 4)[head])),
    ),
    "per_head(sliding_window(15), causal())": (2, lambda t, s, head: (t >= s) & ((head == 1) | (t - s <= 15))),
}  # fmt: skip


@pytest.mark.parametrize("expression", PER_HEAD)
def test_masks_of_the_literature_that_differ_between_heads(expression):
    mask, (num_groups, formula) = eval(expression, vars(masks)), PER_HEAD[expression]
    t = np.arange(LENGTH)
    dense = np.asarray(mask.dense(None, LENGTH, LENGTH, num_heads=2 * num_groups))[0]
    for head in range(2 * num_groups):
        np.testing.assert_array_equal(dense[head], formula(t[:, None], t[None], head // 2))


def test_the_heads_of_s2_cover_the_context():
    dense = np.asarray(masks.s2_shards(4, 1, block=4).dense(None, LENGTH, LENGTH, num_heads=4))[0]
    np.testing.assert_array_equal(dense.any(axis=0), np.tri(LENGTH, dtype=bool))


def test_contexts_of_prompts():
    """Block-Attention, as told: each block to itself, the last one of a prompt to all, causal."""
    prompts = [[5, 9, 1, 7], [12], [3, 20, 8]]
    prompt, context, is_last = (
        np.concatenate([np.full(length, f(i, j, prompts[i])) for i in range(3) for j, length in enumerate(prompts[i])])
        for f in (lambda i, j, p: i, lambda i, j, p: j, lambda i, j, p: j + 1 == len(p))
    )
    padding = 4
    ids = masks.context_ids(
        *(np.pad(x, (0, padding), constant_values=fill) for x, fill in ((prompt, -1), (context, 0), (is_last, False))),
        bits=3,
    )
    assert ids.dtype == np.int32 and (ids[-padding:] == -1).all()
    tokens = Tokens.self_attention(segment_ids=jnp.asarray(ids[None]))
    dense = np.asarray((masks.causal() & masks.contexts(bits=3)).dense(tokens, len(ids), len(ids)))[0]
    for t, s in np.ndindex(dense.shape):
        wanted = False
        if max(t, s) < len(prompt) and t >= s and prompt[t] == prompt[s]:
            wanted = context[t] == context[s] or is_last[t]
        assert dense[t, s] == wanted, (t, s)


def test_hierarchy_of_documents():
    """HDT, as told: every node of the tree attends to itself, its siblings, its parent and its children."""
    documents = [[[3, 4], [1]], [[2, 2, 6], [5], [1, 1]], [[4]]]  # tokens of each sentence of each section
    nodes, parents = [], []  # of each token: the fields of its id, and the place of its parent

    def add(fields, parent):
        nodes.append(fields)
        parents.append(parent)
        return len(nodes) - 1

    for i, sections in enumerate(documents):
        document = add((i, 0, 0, False), None)
        for j, sentences in enumerate(sections, 1):
            section = add((i, j, 0, False), document)
            for k, num_tokens in enumerate(sentences, 1):
                sentence = add((i, j, k, False), section)
                for _ in range(num_tokens):
                    add((i, j, k, True), sentence)
    ids = masks.hierarchy_ids(*map(np.array, zip(*nodes, strict=True)))
    ids = np.append(ids, np.int32(-1))
    tokens = Tokens.self_attention(segment_ids=jnp.asarray(ids[None]))
    dense = np.asarray(masks.hierarchy().dense(tokens, len(ids), len(ids)))[0]
    for t, s in np.ndindex(dense.shape):
        wanted = False
        if max(t, s) < len(nodes):
            wanted = t == s or parents[t] == s or parents[s] == t
            wanted |= parents[t] is not None and parents[t] == parents[s]
        assert dense[t, s] == wanted, (t, s)


def test_ids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="context_ids: context is from 3 to 3, wanted from 0 to 2; take more bits"):
        masks.context_ids(0, 3, False, bits=2)
    with pytest.raises(ValueError, match="context_ids: 8388608 does not fit in 31 bits with the other fields"):
        masks.context_ids(1 << 23, 0, False)
    with pytest.raises(ValueError, match="hierarchy_ids: section is from 1 to 4, wanted from 0 to 3"):
        masks.hierarchy_ids(0, np.array([1, 4]), 1, True, section_bits=2)
    with pytest.raises(ValueError, match="hierarchy_ids: got a token with sentence=0 or a sentence with section=0"):
        masks.hierarchy_ids(0, 1, 0, True)
    assert masks.hierarchy_ids(*np.array([[0, -1], [1, 0], [1, 0], [1, 1]])).tolist() == [(1 << 13) + 3, -1]


@pytest.mark.parametrize("expression", [*OF_THE_LITERATURE, *PER_HEAD, "causal() & contexts()", "hierarchy()"])
def test_the_docs_show_these_masks(expression):
    assert f"`{expression}`" in DOCS.read_text().replace("\\|", "|")


def test_every_constructor_is_in_the_docs():
    text = DOCS.read_text()
    assert [name for name in masks.__all__ if f"{name}(" not in text] == ["full", "global_queries"]

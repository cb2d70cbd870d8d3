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


@pytest.mark.parametrize("expression", OF_THE_LITERATURE)
def test_the_docs_show_these_masks(expression):
    assert f"`{expression}`" in DOCS.read_text().replace("\\|", "|")


def test_every_constructor_is_in_the_docs():
    text = DOCS.read_text()
    assert [name for name in masks.__all__ if f"{name}(" not in text] == ["full", "global_queries"]

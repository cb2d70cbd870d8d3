"""The mask constructors, as matrices: rows are queries, columns are keys."""

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
}


@pytest.mark.parametrize("name", CASES)
def test_mask_is_this_matrix(name):
    mask, picture = CASES[name]
    tokens = Tokens.self_attention(segment_ids=jnp.asarray([SEGMENTS], jnp.int32))
    wanted = np.array([[digit == "1" for digit in row] for row in picture.split()])
    np.testing.assert_array_equal(mask.dense(tokens, 4, 4)[0], wanted)

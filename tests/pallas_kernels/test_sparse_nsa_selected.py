"""Attention to chosen blocks equals its formula over the whole matrix, and every gradient; the pairs by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.sparse import nsa_selected_reference, nsa_selected_xla
from pallas_kernels.sparse.nsa_selected import (
    options_of,
    selected_attention,
    selected_attention_backward,
    selected_attention_forward,
)
from pallas_kernels.testing import assert_close

NAMES = ("out", "lse", "dq", "dk", "dv")
LENGTH = 90


def inputs(dtype="float32", *, length=LENGTH, kv_length=LENGTH, num_heads=4, num_kv_heads=2, value_dim=8):
    shapes = (
        (2, length, num_heads, 8),
        (2, kv_length, num_kv_heads, 8),
        (2, kv_length, num_kv_heads, value_dim),
        (2, length, num_heads, value_dim),
    )
    keys = jax.random.split(jax.random.key(0), 5)
    arrays = [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=False)]
    return (*arrays, jax.random.normal(keys[4], (2, num_heads, length)))


def chosen(starts, places, num_kv_heads, num_choices):
    """Random choices among the blocks of a query's document that begin up to its place, the last of these always.

    A few queries have none.
    """
    rng = np.random.default_rng(0)
    choices = np.full((2, len(places), num_kv_heads, num_choices), -1, np.int32)
    for b, t, head in itertools.product(range(2), range(len(places)), range(num_kv_heads)):
        if t % 17 != 5:
            document = max((x for x in DOCUMENTS[b] if x <= places[t]), default=0) if len(starts) == 2 else 0
            before = np.nonzero((document <= starts[b % len(starts)]) & (starts[b % len(starts)] <= places[t]))[0]
            some = rng.permutation(before[:-1])[: num_choices - 1]
            choices[b, t, head, : len(some) + 1] = [*some, before[-1]]
    return jnp.asarray(choices)


def with_gradients(attend):
    @jax.jit
    def run(q, k, v, dout, dlse):
        results, vjp = jax.vjp(attend, q, k, v)
        return *results, *vjp((dout, dlse))

    return run


EVERY_16 = np.arange(0, LENGTH, 16)[None]
"""Blocks of 16 rows, the last of which is ragged."""
DOCUMENTS = (0, 39, 73, 89), (0, 1, 84)
RAGGED = np.array([[0, 16, 32, 39, 55, 71, 73, 89], [0, 1, 17, 33, 49, 65, 81, 84]])
"""Blocks of 16 rows of documents that begin at these rows; some reach into the next document."""
PLACES = np.arange(3, 93, 3)[:29]
CASES = {
    "groups_of_2": (EVERY_16, dict(), {}),
    "a_head_each": (EVERY_16, dict(num_kv_heads=4, value_dim=12), {}),
    "groups_of_4": (EVERY_16, dict(num_kv_heads=1), dict(scale=0.7)),
    "groups_of_16": (EVERY_16, dict(num_heads=16, num_kv_heads=1), {}),
    "packed": (RAGGED, dict(), {}),
    "some_queries": (EVERY_16, dict(length=29), dict(q_place=jnp.asarray(PLACES, jnp.int32)[None])),
}
QUICK = {("packed", "xla"), ("groups_of_4", "reference")}


def case(name):
    starts, shapes, options = CASES[name]
    q, k, *arrays = inputs(**shapes)
    choices = chosen(starts, PLACES if "q_place" in options else np.arange(LENGTH), k.shape[2], 3)
    arguments = dict(choices=choices, block_start=jnp.asarray(starts, jnp.int32), block_size=16)
    return (q, k, *arrays), arguments | options


def by_the_formula(arrays, *, choices, block_start, block_size, q_place=None, scale=None):
    def attend(q, k, v):
        return nsa_selected_reference.forward(
            q, k, v, choices, block_start, q_place, block_size=block_size, scale=scale or q.shape[3] ** -0.5
        )

    return with_gradients(attend)(*(x.astype("float32") for x in arrays))


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(CASES, ("xla", "reference"))
    ],
)
def test_equals_the_formula(name, implementation):
    arrays, arguments = case(name)
    attend = functools.partial(selected_attention, implementation=implementation, **arguments)
    with dispatch.record() as taken:
        got = with_gradients(attend)(*arrays)
    assert taken == [(f"selected_attention_{way}", implementation) for way in ("forward", "backward")]
    for what, x, y in zip(NAMES, got, by_the_formula(arrays, **arguments), strict=True):
        assert_close(what, x, y, "float32")


@pytest.mark.slow
def test_bfloat16():
    arrays, arguments = case("packed")
    *arrays, dlse = arrays
    arrays = (*(x.astype("bfloat16") for x in arrays), dlse)
    got = with_gradients(functools.partial(selected_attention, **arguments))(*arrays)
    assert [x.dtype.name for x in got] == ["bfloat16", "float32", "bfloat16", "bfloat16", "bfloat16"]
    for what, x, y in zip(NAMES, got, by_the_formula(arrays, **arguments), strict=True):
        assert_close(what, x, y, "bfloat16")


@pytest.mark.slow
def test_groups_and_tiles(monkeypatch):
    """Of 7 queries at a time, and of 5, neither of which divides what there is: the same to rounding."""
    arrays, arguments = case("packed")
    attend = functools.partial(selected_attention, **arguments)
    want = with_gradients(attend)(*arrays)
    monkeypatch.setattr(nsa_selected_xla, "_MOST_GATHERED_AT_ONCE", 7 * 4 * 3 * 16 * 16)
    monkeypatch.setattr(nsa_selected_xla, "_TILE", 5)
    for what, x, y in zip(NAMES, with_gradients(functools.partial(attend))(*arrays), want, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6, err_msg=what)


@pytest.mark.parametrize("implementation", ["xla", pytest.param("reference", marks=pytest.mark.slow)])
def test_queries_without_a_block_are_empty(implementation):
    """And the gradients of both passes apart are float32 where they are asked to be."""
    (q, k, v, dout, dlse), arguments = case("packed")
    q, k, v, dout = (x.astype("bfloat16") for x in (q, k, v, dout))
    arguments |= {"implementation": implementation}

    @jax.jit
    def run(q, k, v, dout, dlse):
        out, lse = selected_attention_forward(q, k, v, **arguments)
        backward = functools.partial(
            selected_attention_backward, q, k, v, arguments["choices"], arguments["block_start"], None, out, lse, dout,
            dlse, block_size=16, implementation=implementation,
        )  # fmt: skip
        return out, lse, backward(), backward(gradient_dtype=jnp.float32)

    out, lse, gradients, precise = run(q, k, v, dout, dlse)
    empty = np.arange(LENGTH) % 17 == 5
    assert (lse[:, :, empty] == -np.inf).all() and np.isfinite(lse[:, :, ~empty]).all()
    assert not out[:, empty].any() and not gradients[0][:, empty].any()
    for x, y in zip(gradients, precise, strict=True):
        assert (x.dtype, y.dtype) == (jnp.bfloat16, jnp.float32)
        np.testing.assert_array_equal(x, y.astype("bfloat16"))


def test_the_pairs_by_hand():
    """Blocks of 4 rows at 0, 4 and 6. Query 0 stands at row 5 and has blocks 1 and 2, of which it sees rows 4 and 5;
    query 1 stands at row 7 and has blocks 0 and 2, and sees rows 0 to 3, 6 and 7; query 2 has none."""
    choices = jnp.array([[1, 2], [2, 0], [-1, -1]], jnp.int32)[None, :, None]
    starts, place = jnp.array([[0, 4, 6]], jnp.int32), jnp.array([[5, 7, 8]], jnp.int32)
    pairs = nsa_selected_reference.allowed_pairs(choices, starts, place, kv_len=9, block_size=4)[0, 0]
    assert [np.nonzero(row)[0].tolist() for row in pairs] == [[4, 5], [0, 1, 2, 3, 6, 7], []]
    v = jnp.arange(9.0).reshape(1, 9, 1, 1)
    out, lse = jax.jit(functools.partial(selected_attention, block_size=4))(
        jnp.zeros((1, 3, 1, 2)), jnp.zeros((1, 9, 1, 2)), v, choices, starts, place
    )
    np.testing.assert_allclose(out.ravel(), [4.5, 19 / 6, 0], rtol=1e-6)
    np.testing.assert_allclose(lse.ravel(), [np.log(2), np.log(6), -np.inf], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(block_size=0), r"selected_attention: block_size: got 0, wanted a number of rows >= 1"),
        (dict(k=jnp.zeros((1, LENGTH, 2, 8))), r"q, k, v have shapes .* wanted one B, and k and v of one S and K"),
        (dict(k=jnp.zeros((2, LENGTH, 2, 4))), r"head dim of q is 8 and of k 4, wanted the same"),
        (dict(q=jnp.zeros((2, LENGTH, 3, 8))), r"3 query heads over 2 kv heads, wanted a multiple"),
        (
            dict(choices=jnp.zeros((2, LENGTH, 4, 1), jnp.int32)),
            r"choices is int32\[2, 90, 4, 1\], wanted int32 \[2, 90, 2, 1 or more\], of the queries and kv heads",
        ),
        (dict(block_start=jnp.zeros((3, 4), jnp.int32)), r"block_start is int32\[3, 4\], wanted int32 \[2 or 1"),
        (dict(q_place=jnp.zeros((1, 4), jnp.int32)), r"q_place is int32\[1, 4\], wanted int32 \[2 or 1, 90\]"),
    ],
)
def test_refuses(change, message):
    (q, k, v, *_), arguments = case("groups_of_2")
    call = dict(q=q, k=k, v=v, q_place=None, scale=None) | arguments | change
    with pytest.raises(ValueError, match=message):
        options_of("selected_attention", **call)

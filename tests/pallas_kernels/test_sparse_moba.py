"""Mixture of Block Attention equals its formula over the whole matrix, and every gradient; its choice by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Tokens, dispatch
from pallas_kernels.blockwise import api as blockwise_api
from pallas_kernels.blockwise import pallas_mosaic_gpu
from pallas_kernels.mosaic_gpu import interpreter
from pallas_kernels.sparse import moba_attention
from pallas_kernels.sparse import moba_route as route_module
from pallas_kernels.sparse.moba import check_moba_call
from pallas_kernels.sparse.moba_reference import chosen_pairs, moba_reference
from pallas_kernels.sparse.moba_route import LIST_BLOCK, Route, choose_chunks, chunk_sums, number_chunks
from pallas_kernels.testing import H100, assert_close, packed_tokens, tracing_for

NAMES = ("out", "lse", "dq", "dk", "dv")
LENGTH = 150
PACKED = ((90, 30, 1, 20), (149,))  # documents that cross chunks of 150 tokens; both rows end in padding


def inputs(dtype="float32", *, length=LENGTH, num_heads=4, num_kv_heads=2, head_dim=8, value_dim=8):
    shapes = {
        "q": (2, length, num_heads, head_dim),
        "k": (2, length, num_kv_heads, head_dim),
        "v": (2, length, num_kv_heads, value_dim),
        "dout": (2, length, num_heads, value_dim),
    }
    keys = jax.random.split(jax.random.key(0), 5)
    arrays = [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes.values(), strict=False)]
    return (*arrays, jax.random.normal(keys[4], (2, num_heads, length)))


def tokens_of(rows):
    return None if rows is None else jax.tree.map(jnp.asarray, packed_tokens(rows, LENGTH))


def with_gradients(attend):
    @jax.jit
    def run(q, k, v, dout, dlse):
        results, vjp = jax.vjp(attend, q, k, v)
        return *results, *vjp((dout, dlse))

    return run


CASES = {
    "one_document": (None, dict(chunk_size=20, top_k=3), {}),
    "packed": (PACKED, dict(chunk_size=16, top_k=4), {}),
    "own_chunk_alone": (PACKED, dict(chunk_size=16, top_k=1), {}),
    "all_chunks": (PACKED, dict(chunk_size=16, top_k=100), {}),
    "no_whole_chunk": (None, dict(chunk_size=151, top_k=3), {}),
    "one_whole_chunk": (None, dict(chunk_size=130, top_k=3), {}),
    "chunks_of_one": (PACKED, dict(chunk_size=1, top_k=3), {}),
    "a_head_each": (PACKED, dict(chunk_size=16, top_k=2), dict(num_kv_heads=4, value_dim=12)),
    "scale": (PACKED, dict(chunk_size=16, top_k=2, scale=0.7), dict(num_kv_heads=1)),
}
QUICK = {("one_document", "reference"), ("packed", "xla"), ("own_chunk_alone", "reference")}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(CASES, ("xla", "reference"))
        if case != ("chunks_of_one", "reference")  # lists of 127 rows a token, by as many keys: 18 GB
    ],
)
def test_equals_the_formula(name, implementation):
    rows, arguments, shapes = CASES[name]
    arguments = arguments | {"tokens": tokens_of(rows)}
    arrays = inputs(**shapes)
    want = with_gradients(functools.partial(moba_reference, **arguments))(*arrays)
    attend = functools.partial(moba_attention, return_lse=True, implementation=implementation, **arguments)
    with dispatch.record() as taken:
        got = with_gradients(attend)(*arrays)
    assert {used for _, used in taken} == {implementation}
    for what, x, y in zip(NAMES, got, want, strict=True):
        assert_close(what, x, y, "float32")


@pytest.mark.slow
def test_bfloat16():
    """Keys and queries in halves, so that both sides choose by the same means to the last bit."""
    arguments = dict(chunk_size=16, top_k=4, tokens=tokens_of(PACKED))
    q, k, v, dout, dlse = inputs()
    q, k, v, dout = (x.astype("bfloat16") for x in (jnp.round(4 * q) / 4, jnp.round(4 * k) / 4, v, dout))
    want = with_gradients(functools.partial(moba_reference, **arguments))(
        *(x.astype("float32") for x in (q, k, v, dout)), dlse
    )
    got = with_gradients(functools.partial(moba_attention, return_lse=True, **arguments))(q, k, v, dout, dlse)
    assert [x.dtype.name for x in got] == ["bfloat16", "float32", "bfloat16", "bfloat16", "bfloat16"]
    for what, x, y in zip(NAMES, got, want, strict=True):
        assert_close(what, x, y, "bfloat16")


def test_padding_is_empty_and_has_no_gradient():
    tokens = tokens_of(PACKED)
    padding = np.asarray(tokens.q_segment_ids) < 0
    arguments = dict(chunk_size=16, top_k=4, tokens=tokens, implementation="reference")
    attend = functools.partial(moba_attention, return_lse=True, **arguments)
    out, lse, *gradients = (np.asarray(x) for x in with_gradients(attend)(*inputs()))
    assert np.all(np.moveaxis(lse, 1, 2)[padding] == -np.inf)
    for x in (out, *gradients):
        assert not x[padding].any()


@pytest.mark.slow
def test_gradient_of_out_alone():
    """Where lse is not returned, implementations are told that it has no cotangent."""
    q, k, v, dout, dlse = inputs()
    arguments = dict(chunk_size=16, top_k=3, implementation="reference")
    got = jax.jit(lambda *qkv: jax.vjp(functools.partial(moba_attention, **arguments), *qkv)[1](dout))(q, k, v)
    with_lse = with_gradients(functools.partial(moba_attention, return_lse=True, **arguments))
    for what, x, y in zip(NAMES[2:], got, with_lse(q, k, v, dout, 0 * dlse)[2:], strict=True):
        np.testing.assert_array_equal(x, y, err_msg=what)


@pytest.mark.slow
def test_scores_in_groups(monkeypatch):
    """Of 7 queries at a time, and of 7 keys, neither of which divides what there is."""
    arguments = dict(chunk_size=20, top_k=3, return_lse=True, tokens=tokens_of(PACKED), implementation="reference")
    attend = functools.partial(moba_attention, **arguments)
    want = jax.jit(attend)(*inputs()[:3])
    monkeypatch.setattr(route_module, "_MOST_SCORES_AT_ONCE", 7 * 7 * 4)
    for what, x, y in zip(
        NAMES, jax.jit(functools.partial(moba_attention, **arguments))(*inputs()[:3]), want, strict=False
    ):
        np.testing.assert_allclose(x, y, atol=1e-6, err_msg=what)


# The choice, by hand.


def test_the_chunks_of_two_documents():
    """Documents of 5 and 4 tokens and padding, in chunks of 2: the third chunk has one token, and cannot be chosen.

    The second document starts in the middle of a pair of slots: its chunks are slots 5 and 6, 7 and 8.
    """
    tokens = packed_tokens(((5, 4),), 10)
    chunks = number_chunks(jax.tree.map(jnp.asarray, tokens.queries(10)), 2)
    assert chunks.own.tolist() == [[0, 0, 1, 1, 2, 3, 3, 4, 4, -1]]
    assert chunks.offset.tolist()[0][:9] == [0, 1, 0, 1, 0, 0, 1, 0, 1]
    assert chunks.whole.tolist() == [[0, 0, 1, 1, -1, 2, 2, 3, 3, -1]]
    assert chunks.first.tolist()[0][:9] == [0, 0, 0, 0, 0, 2, 2, 2, 2]
    assert chunks.stop.tolist()[0][:9] == [0, 0, 1, 1, 2, 2, 2, 3, 3]


def test_the_choice_of_each_query_by_hand():
    """8 tokens in chunks of 2, keys of one dim: 1 3, -5 -1, 2 2, 0 9, with means 2, -3, 2 and 4.5.

    A query of 1 in the last chunk may choose chunks 0, 1, 2 with scores 2, -3, 2: of the equal ones the first, then the
    other, then chunk 1. A query of -1 there has -2, 3, -2: chunk 1, then 0. In chunk 2 a query of 1 has 2, -3. In chunk
    0 there is nothing to choose.
    """
    k = jnp.array([1.0, 3.0, -5.0, -1.0, 2.0, 2.0, 0.0, 9.0]).reshape(1, 8, 1, 1)
    q = jnp.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0]).reshape(1, 8, 1)
    chunks = number_chunks(Tokens().queries(8), 2)
    means = chunk_sums(k, chunks.whole, 4) / 2
    assert means.ravel().tolist() == [2.0, -3.0, 2.0, 4.5]
    choices = choose_chunks(q, means[:, :, 0], chunks.first, chunks.stop, 2)[0].tolist()
    assert choices == [[-1, -1], [-1, -1], [0, -1], [0, -1], [0, 1], [0, 1], [0, 2], [1, 0]]
    allowed = chosen_pairs(q[..., None], k, chunk_size=2, top_k=2)[0, 0].astype(int).tolist()
    assert allowed[6] == [1, 1, 0, 0, 0, 0, 1, 0]
    assert allowed[7] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_heads_of_a_group_choose_each_for_itself():
    q = jnp.zeros((1, 6, 2, 1)).at[0, 4:, :, 0].set(jnp.array([1.0, -1.0]))
    k = jnp.array([1.0, 1.0, -1.0, -1.0, 0.0, 0.0]).reshape(1, 6, 1, 1)
    v = jnp.array([1.0, 1.0, -1.0, -1.0, 0.0, 0.0]).reshape(1, 6, 1, 1)
    attend = functools.partial(moba_attention, chunk_size=2, top_k=2, implementation="reference")
    out = jax.jit(attend)(q, k, v)[0, 4:, :, 0]
    assert (out[:, 0] > 0.4).all() and (out[:, 1] < -0.4).all()


def test_lists_hold_every_choice_once_and_no_block_has_two_chunks():
    choices = np.random.default_rng(0).integers(-1, 5, (2, 300, 2)).astype(np.int32)
    choices[choices == 3] = 4  # a list that is empty
    route = jax.jit(Route.of_choices, static_argnums=1)(jnp.asarray(choices), 5)
    query, chunk, row = (np.asarray(x) for x in (route.query, route.chunk, route.row))
    assert query.shape[1] % LIST_BLOCK == 0
    for f in range(2):
        blocks = chunk[f].reshape(-1, LIST_BLOCK)
        assert (blocks == blocks[:, :1]).all()
        for j in range(5):
            listed = query[f][(chunk[f] == j) & (query[f] < 300)]
            assert listed.tolist() == [t for t in range(300) for i in range(2) if choices[f, t, i] == j]
        assert (query[f][chunk[f] == -1] == 300).all()
        taken = row[f] < query.shape[1]
        assert (taken == (choices[f] >= 0)).all()
        assert (query[f][row[f][taken]] == np.nonzero(taken)[0]).all()
        assert (chunk[f][row[f][taken]] == choices[f][taken]).all()


# Kernels and errors.


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_lowers_for_cuda(packed):
    """Both calls by the Hopper kernels, forward and backward."""
    q, k = (jax.ShapeDtypeStruct((2, 1000, n, 64), jnp.bfloat16) for n in (4, 2))
    ids = jax.ShapeDtypeStruct((2, 1000), jnp.int32)

    def differentiate(q, k, v, dout, positions, segment_ids):
        tokens = Tokens.self_attention(positions, segment_ids) if packed else None
        return jax.vjp(functools.partial(moba_attention, chunk_size=200, top_k=3, tokens=tokens), q, k, v)[1](dout)

    with tracing_for(H100), dispatch.record() as taken:
        traced = jax.jit(differentiate).trace(q, k, k, q, ids, ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert [used for _, used in taken] == ["mosaic_gpu"] * 4
    assert text.count("mosaic_gpu_v2") == 4
    assert [x.shape for x in traced.out_info] == [q.shape, k.shape, k.shape]


@pytest.mark.slow
def test_equals_the_formula_by_the_hopper_kernels_in_the_interpreter(monkeypatch):
    """With lists that are filled up, blocks of rows behind all lists, padding, and a document of less than a chunk."""
    for ops, op in (
        (blockwise_api.FORWARD, pallas_mosaic_gpu.forward),
        (blockwise_api.BACKWARD, pallas_mosaic_gpu.backward),
    ):
        monkeypatch.setitem(ops, "mosaic_gpu", functools.partial(op, interpret=interpreter()))
    shapes = (1, 300, 2, 64), (1, 300, 1, 64), (1, 300, 1, 64), (1, 300, 2, 64), (1, 2, 300)
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, dout, dlse = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    q, k, v, dout = (jnp.round(4 * x).astype("bfloat16") / 4 for x in (q, k, v, dout))
    tokens = jax.tree.map(jnp.asarray, packed_tokens(((230, 60),), 300))
    arguments = dict(chunk_size=50, top_k=3, tokens=tokens)
    want = with_gradients(functools.partial(moba_reference, **arguments))(
        *(x.astype("float32") for x in (q, k, v, dout)), dlse
    )
    attend = functools.partial(moba_attention, return_lse=True, implementation="mosaic_gpu", **arguments)
    got = with_gradients(attend)(q, k, v, dout, dlse)
    for what, x, y in zip(NAMES, got, want, strict=True):
        assert_close(what, x, y, "bfloat16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(chunk_size=0), r"moba_attention: chunk_size: got 0, wanted a number of tokens >= 1"),
        (dict(top_k=0), r"moba_attention: top_k: got 0, wanted a number of chunks >= 1, the query's own among them"),
        (dict(k=jnp.zeros((2, 20, 2, 8))), r"moba_attention: q, k, v have shapes .* wanted one B and T"),
        (dict(k=jnp.zeros((2, LENGTH, 2, 4))), r"moba_attention: head dim of q is 8 and of k 4, wanted the same"),
        (dict(q=jnp.zeros((2, LENGTH, 3, 8))), r"moba_attention: 3 query heads over 2 kv heads, wanted a multiple"),
        (
            dict(v=jnp.zeros((2, LENGTH, 4, 8))),
            r"moba_attention: q, k, v have .* wanted one B and T, and k and v of one K",
        ),
        (
            dict(tokens=Tokens.self_attention(jnp.zeros((2, 9), jnp.int32))),
            r"moba_attention: tokens.q_positions has shape \(2, 9\), wanted \(2, 150\) or \(1, 150\)",
        ),
    ],
)
def test_refuses(change, message):
    q, k, v, *_ = inputs()
    with pytest.raises(ValueError, match=message):
        check_moba_call("moba_attention", **dict(q=q, k=k, v=v, chunk_size=16, top_k=2, tokens=None) | change)


def test_documents_of_keys_alone_are_refused():
    x, ids = jnp.ones((1, 8, 1, 4)), jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="moba_attention: tokens.kv_segment_ids without q_segment_ids"):
        moba_attention(x, x, x, chunk_size=4, top_k=2, tokens=Tokens(kv_segment_ids=ids))

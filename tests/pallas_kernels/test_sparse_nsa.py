"""Native Sparse Attention equals its formulas over whole matrices, and every gradient; its blocks by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.sparse import BranchKeys, NsaSizes, compressed_starts, nsa_attention, tokens_of_blocks
from pallas_kernels.sparse import nsa_choose as choose_module
from pallas_kernels.sparse.nsa import check_nsa_call
from pallas_kernels.sparse.nsa_blocks import blocks_of, cut_documents
from pallas_kernels.sparse.nsa_choose import scores_of_queries
from pallas_kernels.sparse.nsa_reference import nsa_reference
from pallas_kernels.testing import H100, assert_close, packed_tokens, tracing_for

SIZES = NsaSizes(compress_block=4, compress_stride=2, block_size=8, num_blocks=5, window=12)
LENGTH = 150
PACKED = ((90, 30, 1, 20), (149,))  # documents that end within blocks; both rows end in padding
NAMES = (
    "out", "dq", "dk compressed", "dv compressed", "dk selected", "dv selected", "dk sliding", "dv sliding", "dgates",
)  # fmt: skip


def inputs(dtype="float32", *, sizes=SIZES, length=LENGTH, num_heads=4, num_kv_heads=2, value_dim=8):
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def normal(*shape):
        return jax.random.normal(next(keys), (2, *shape)).astype(dtype)

    q, dout = normal(length, num_heads, 8), normal(length, num_heads, value_dim)
    gates = jax.nn.sigmoid(normal(length, num_heads, 3).astype("float32"))
    lengths = sizes.num_compressed(length), length, length
    branches = [BranchKeys(normal(n, num_kv_heads, 8), normal(n, num_kv_heads, value_dim)) for n in lengths]
    return q, *branches, gates, dout


def segments_of(rows, length=LENGTH):
    return None if rows is None else jnp.asarray(packed_tokens(rows, length).q_segment_ids)


def with_gradients(attend):
    """Results by name."""

    @jax.jit
    def run(*arrays):
        *arrays, dout = arrays
        out, vjp = jax.vjp(attend, *arrays)
        return out, *vjp(dout)

    return lambda *arrays: dict(zip(NAMES, jax.tree.leaves(run(*arrays)), strict=True))


CASES = {
    "one_document": (None, SIZES, {}),
    "packed": (PACKED, SIZES, {}),
    "a_head_each": (PACKED, SIZES, dict(num_kv_heads=4, value_dim=12)),
    "groups_of_4": (PACKED, SIZES, dict(num_kv_heads=1)),
    "groups_of_16": (None, SIZES, dict(num_heads=16, num_kv_heads=1)),
    "every_block": (PACKED, NsaSizes(compress_block=4, compress_stride=2, block_size=8, num_blocks=99, window=12), {}),
    "no_block_by_score": (
        None,
        NsaSizes(compress_block=4, compress_stride=4, block_size=4, num_blocks=3, window=3),
        {},
    ),
    "three_strides": (
        PACKED,
        NsaSizes(compress_block=6, compress_stride=2, block_size=6, num_blocks=4, window=500),
        {},
    ),
    "no_whole_block": (((5, 7), (13,)), NsaSizes(compress_block=6, compress_stride=2, block_size=8), dict(length=13)),
    "no_compressed_block": (None, NsaSizes(), dict(length=13)),
    "as_published": (((200, 157), (359,)), NsaSizes(window=100), dict(length=360)),
}
QUICK = {("packed", "reference"), ("no_whole_block", "xla")}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(CASES, ("xla", "reference"))
    ],
)
def test_equals_the_formulas(name, implementation):
    rows, sizes, shapes = CASES[name]
    arrays = inputs(sizes=sizes, **shapes)
    arguments = dict(sizes=sizes, segment_ids=segments_of(rows, arrays[0].shape[1]))
    attend = functools.partial(nsa_attention, implementation=implementation, **arguments)
    with dispatch.record() as taken:
        got = with_gradients(attend)(*arrays)
    assert {used for _, used in taken} == {implementation}
    ops = [op for op, _ in taken]
    assert ops.count("selected_attention_forward") == 1 and ops.count("blockwise_attention_backward") == 2
    want = with_gradients(functools.partial(nsa_reference, **arguments))(*arrays)
    for what in NAMES:
        if np.any(want[what]):
            assert_close(what, got[what], want[what], "float32")
        else:  # of a branch that sees nothing
            np.testing.assert_array_equal(got[what], want[what], err_msg=what)
        if rows is not None and "compressed" not in what:
            padding = np.asarray(arguments["segment_ids"]) < 0
            assert padding.any() and not np.asarray(got[what])[padding].any(), what


@pytest.mark.slow
def test_bfloat16():
    arrays = tuple(jax.tree.map(lambda x: x.astype("bfloat16"), inputs()))
    arguments = dict(sizes=SIZES, segment_ids=segments_of(PACKED))
    got = with_gradients(functools.partial(nsa_attention, **arguments))(*arrays)
    assert {x.dtype.name for x in got.values()} == {"bfloat16"}
    arrays = jax.tree.map(lambda x: x.astype("float32"), arrays)
    want = with_gradients(functools.partial(nsa_reference, **arguments))(*arrays)
    for what in NAMES:
        assert_close(what, got[what], want[what], "bfloat16")


@pytest.mark.slow
def test_scores_in_groups(monkeypatch):
    """Of 7 queries at a time, which do not divide what there is."""
    *arrays, _ = inputs()
    arguments = dict(sizes=SIZES, segment_ids=segments_of(PACKED), implementation="reference")
    want = jax.jit(functools.partial(nsa_attention, **arguments))(*arrays)
    monkeypatch.setattr(choose_module, "_MOST_SCORES_AT_ONCE", 7 * 4 * 2 * SIZES.num_compressed(LENGTH))
    got = jax.jit(functools.partial(nsa_attention, **arguments))(*arrays)
    np.testing.assert_allclose(got, want, atol=1e-6)


# The blocks and the choice, by hand.


def test_the_blocks_of_three_documents():
    """Documents of 9, 3 and 6 tokens and padding; blocks of 4 to compress, one every 2, and of 4 to select.

    The first has compressed blocks at 0, 2 and 4, and selected ones at 0, 4 and 8, the last of one token. The second
    has one block of 3 tokens, at 9. The third compressed ones at 12 and 14, and others at 12 and 16, the last of 2.
    """
    sizes = NsaSizes(compress_block=4, compress_stride=2, block_size=4, num_blocks=3, window=4)
    segments = segments_of(((9, 3, 6),), 19)
    tables, tokens = jax.jit(cut_documents, static_argnums=1)(segments, sizes)
    assert tables.compressed_start.tolist() == [[0, 2, 4, 12, 14, -1, -1, -1]]
    assert tables.compressed_last.tolist()[0][:5] == [3, 5, 7, 3, 5]
    assert tables.compressed_segment.tolist() == [[0, 0, 0, 2, 2, -1, -1, -1]]
    assert tables.block_start.tolist()[0][:6] == [0, 4, 8, 9, 12, 16]
    assert tables.whole_number.tolist() == [[0, 1, 4, -1]]
    assert tables.whole_compressed.tolist()[0][:3] == [0, 2, 3]
    assert tokens.own.tolist() == [[0] * 4 + [1] * 4 + [2] + [3] * 3 + [4] * 4 + [5] * 2 + [-1]]
    assert tokens.compressed_first.tolist()[0][:18] == [0] * 9 + [3] * 9
    assert tokens.compressed_stop.tolist()[0][:18] == [0] * 3 + [1] * 2 + [2] * 2 + [3] * 2 + [3] * 6 + [4] * 2 + [5]
    assert tokens.whole_first.tolist()[0][:18] == [0] * 9 + [2] * 9
    starts = jax.jit(compressed_starts, static_argnums=(1, 2))(segments, 19, sizes)
    assert starts.tolist() == tables.compressed_start.tolist()


@pytest.mark.parametrize("length", [43, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 7, 8, 40))])
def test_one_document_is_cut_as_one_of_a_packed_row(length):
    constants = blocks_of(None, length, SIZES)
    cut = jax.jit(cut_documents, static_argnums=1)(jnp.zeros((1, length), jnp.int32), SIZES)
    for name, x, y in zip(
        (*constants[0]._fields, *constants[1]._fields), jax.tree.leaves(constants), jax.tree.leaves(cut), strict=True
    ):
        there = slice(None) if name != "block_start" else slice(x.shape[1])
        if name in ("compressed_last", "compressed_start", "whole_compressed") and length < 8:
            continue  # of blocks that are not there
        np.testing.assert_array_equal(x, y[:, there], err_msg=name)


def test_the_tokens_of_blocks():
    x = jnp.arange(1.0, 11).reshape(1, 10, 1, 1)
    blocks = tokens_of_blocks(x, jnp.array([[0, 2, 6, -1]], jnp.int32), SIZES)[0, :, :, 0, 0]
    assert blocks.tolist() == [[1, 2, 3, 4], [3, 4, 5, 6], [7, 8, 9, 10], [0, 0, 0, 0]]


@pytest.mark.parametrize("start", [[0, 2, 6, -1], [[1, 4, -1], [0, 8, 12]], [[3, -1, 9]]], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_the_tokens_of_blocks_is_that_of_rows_taken_one_by_one(start, dtype):
    """Of blocks that overlap, that end behind the last row, and that are not there."""
    start = jnp.atleast_2d(jnp.asarray(start, jnp.int32))
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, 13, 2, 3), dtype)

    def by_matrix(x):
        rows = start[..., None] + jnp.arange(SIZES.compress_block)
        takes = (rows[..., None] == jnp.arange(13)) & (start[..., None, None] >= 0)
        takes = jnp.broadcast_to(takes, (2, *takes.shape[1:])).astype(jnp.float32)
        return jnp.einsum("bmis,bskh->bmikh", takes, x.astype(jnp.float32)).astype(dtype)

    want, want_vjp = jax.vjp(by_matrix, x)
    got, vjp = jax.vjp(lambda x: tokens_of_blocks(x, start, SIZES), x)
    np.testing.assert_array_equal(got, want)
    dout = jax.random.normal(keys[1], got.shape, dtype)
    (dx,), (want_dx,) = vjp(dout), want_vjp(dout)
    np.testing.assert_allclose(dx.astype(jnp.float32), want_dx.astype(jnp.float32), rtol=1e-6, atol=1e-6)
    assert jnp.any(dx != 0)


def test_the_scores_of_a_query_by_hand():
    """Blocks of 64 over compressed ones of 32 every 16, as published: of those that begin 16 before a block, with it,
    and 16, 32 and 48 behind its start, 1, 2, 2, 2 and 1 strides are in it."""
    p = jnp.array([0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09])
    q = jnp.ones((1, 1, 2, 1))
    scores = scores_of_queries(
        q, jnp.log(p)[None, :, None], jnp.zeros((1, 1, 2)), jnp.array([[0]]), jnp.array([[9]]), jnp.array([[0, 4]]),
        sizes=NsaSizes(), scale=1.0,
    )  # fmt: skip
    of_two_heads = 2 * np.array([2 * (0.01 + 0.02 + 0.03) + 0.04, 0.04 + 2 * (0.05 + 0.06 + 0.07) + 0.08])
    np.testing.assert_allclose(scores[0, 0], of_two_heads, rtol=1e-5)


@pytest.mark.slow
def test_what_a_query_selects_by_hand():
    """48 tokens in blocks of 4, as many compressed keys; 5 are selected. The last query scores blocks 3 and 7 highest,
    and has 0, 10 and 11 in any case: only the values of these reach it."""
    sizes = NsaSizes(compress_block=4, compress_stride=4, block_size=4, num_blocks=5, window=1)
    k = jnp.zeros((1, 12, 1, 2)).at[0, jnp.array([3, 7]), 0, 0].set(5.0)
    q = jnp.zeros((1, 48, 1, 2)).at[..., 0].set(1.0)
    zeros, gates = jnp.zeros((1, 48, 1, 2)), jnp.zeros((1, 48, 1, 3)).at[..., 1].set(1.0)

    def attend(values):
        compressed, others = BranchKeys(k, k), BranchKeys(zeros, zeros)
        out = nsa_attention(q, compressed, BranchKeys(zeros, values), others, gates, sizes=sizes)
        return out[0, 47, 0, 0]

    weights = jax.grad(attend)(zeros)[0, :, 0, 0]
    assert np.nonzero(weights)[0].tolist() == [
        t for block in (0, 3, 7, 10, 11) for t in range(4 * block, 4 * block + 4)
    ]
    np.testing.assert_allclose(weights[weights > 0], 1 / 20, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_lowers_for_cuda(packed):
    """The compressed and the sliding branch by the Hopper kernels, forward and backward."""
    sizes, length = NsaSizes(), 1000
    shapes = (4, length), (2, sizes.num_compressed(length)), (2, length), (2, length)
    q, *branches = (jax.ShapeDtypeStruct((2, n, heads, 64), jnp.bfloat16) for heads, n in shapes)
    branches = [BranchKeys(x, x) for x in branches]
    gates = jax.ShapeDtypeStruct((2, length, 4, 3), jnp.bfloat16)

    def differentiate(segment_ids, dout, *arrays):
        attend = functools.partial(nsa_attention, sizes=sizes, segment_ids=segment_ids if packed else None)
        return jax.vjp(attend, *arrays)[1](dout)

    with tracing_for(H100), dispatch.record() as taken:
        traced = jax.jit(differentiate).trace(jax.ShapeDtypeStruct((2, length), jnp.int32), q, q, *branches, gates)
        traced.lower(lowering_platforms=("cuda",))
    assert [used for op, used in taken if op.startswith("blockwise")] == ["mosaic_gpu"] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(compress_stride=0), r"compress_stride: got 0, wanted a number of tokens >= 1"),
        (dict(compress_block=24), r"compress_block: got 24, wanted a multiple of compress_stride=16"),
        (dict(block_size=72), r"block_size: got 72, wanted a multiple of compress_stride=16"),
        (dict(block_size=16), r"block_size: got 16, wanted at least compress_block=32"),
        (dict(num_blocks=2), r"num_blocks: got 2, wanted a number of blocks >= 3: the first, a query's own"),
    ],
)
def test_sizes_refuse(change, message):
    with pytest.raises(ValueError, match=message):
        NsaSizes(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(compressed=BranchKeys(*(jnp.zeros((2, 7, 2, 8)),) * 2)),
            r"compressed has keys \(2, 7, 2, 8\) .*\(2, 74, 2",
        ),
        (
            dict(sliding=BranchKeys(*(jnp.zeros((2, 150, 4, 8)),) * 2)),
            r"sliding has keys .* the selected branch's heads",
        ),
        (dict(q=jnp.zeros((2, LENGTH, 3, 8))), r"nsa_attention: 3 query heads over 2 kv heads, wanted a multiple"),
        (dict(gates=jnp.zeros((2, LENGTH, 4, 2))), r"gates is float32\[2, 150, 4, 2\], wanted floats \[2, 150, 4, 3\]"),
        (dict(segment_ids=jnp.zeros((2, 9), jnp.int32)), r"segment_ids is int32\[2, 9\], wanted int32 \[2 or 1, 150\]"),
    ],
)
def test_refuses(change, message):
    q, *branches, gates, _ = inputs()
    call = dict(zip(("compressed", "selected", "sliding"), branches, strict=True)) | dict(q=q, gates=gates)
    with pytest.raises(ValueError, match=message):
        check_nsa_call("nsa_attention", **call | dict(sizes=SIZES, segment_ids=None) | change)

"""Native Sparse Attention's kernels on Hopper: lists by hand, the kernels in the interpreter, what lowers, what a card
computes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.mosaic_gpu import interpreter
from pallas_kernels.sparse import nsa_selected_reference, pallas_mosaic_gpu_nsa, pallas_mosaic_gpu_nsa_parts
from pallas_kernels.sparse.nsa_blocks import NsaSizes, blocks_of
from pallas_kernels.sparse.nsa_choose import choose_blocks
from pallas_kernels.sparse.nsa_lists import ITEM_FIELDS, ITEM_TILES, TILE_ROWS, QueryLists
from pallas_kernels.sparse.nsa_selected import selected_attention
from pallas_kernels.testing import H100, assert_close, tracing_for

NAMES = ("out", "lse", "dq", "dk", "dv")


def random_choices(rng, length, num_kv_heads, num_choices, *, batch_size=1):
    """Of blocks of 64 that begin at or before each query; some queries have none."""
    choices = np.full((batch_size, length, num_kv_heads, num_choices), -1, np.int32)
    for at in np.ndindex(choices.shape[:3]):
        if at[1] % 17 != 5:
            some = rng.permutation(at[1] // 64 + 1)[:num_choices]
            choices[(*at, slice(len(some)))] = some
    return jnp.asarray(choices)


def call_of(length, num_heads, num_kv_heads, head_dim, num_choices=3, dtype="bfloat16", batch_size=1):
    """(q, k, v, choices, block_start), dout and dlse."""
    rng = np.random.default_rng(0)
    heads = num_heads, num_kv_heads, num_kv_heads, num_heads
    q, k, v, dout = (jnp.asarray(rng.standard_normal((batch_size, length, n, head_dim)), dtype) for n in heads)
    choices = random_choices(rng, length, num_kv_heads, num_choices, batch_size=batch_size)
    dlse = jnp.asarray(rng.standard_normal((batch_size, num_heads, length)), jnp.float32)
    # Of a query that sees nothing nobody asks for lse.
    dlse = jnp.where((choices[..., 0] < 0)[:, :, :1].swapaxes(1, 2), 0.0, dlse)
    return (q, k, v, choices, jnp.arange(0, length, 64, dtype=jnp.int32)[None]), dout, dlse


@pytest.mark.parametrize(
    ("group", "num_chunks"),
    [(3, 3), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((3, 2), (1, 1), (16, 1), (64, 3)))],
)
def test_every_choice_is_in_the_list_of_its_block_once(group, num_chunks):
    B, T, K, M = 2, 300, 2, 5
    rng = np.random.default_rng(0)
    choices = np.array(random_choices(rng, T, K, 2, batch_size=B))
    choices[:, 200:, :, 0] = np.where(choices[:, 200:, :, 1] == 0, -1, 0)  # one block that many chose
    starts = np.sort(rng.integers(0, T, (B, M)), axis=1).astype(np.int32)
    of = jax.jit(functools.partial(QueryLists.of, num_heads=K * group, kv_len=T, block_size=64, num_chunks=num_chunks))
    lists = of(jnp.asarray(choices), jnp.asarray(starts))
    rows, items, place, first_row = (np.asarray(x) for x in (lists.rows, lists.items, lists.place, lists.first_row))
    # Kv heads, then queries, are shared out over chunks.
    of_heads = min(num_chunks, K)
    of_queries = -(-num_chunks // of_heads)
    heads, length = K // of_heads, -(-T // of_queries)
    assert len(rows) == of_heads * of_queries >= num_chunks
    for chunk in range(len(rows)):
        mine = range(chunk // of_queries * heads, (chunk // of_queries + 1) * heads)
        part = chunk % of_queries * length
        found, turns = {}, {}
        for item in (dict(zip(ITEM_FIELDS, x, strict=True)) for x in items[chunk].tolist() if x[4] > 0):
            block = item["block"] % M
            assert item["block"] // M == item["batch"] * K + item["head"] and item["head"] in mine
            assert item["start"] == starts[item["batch"], block] and item["num_tiles"] <= ITEM_TILES
            assert item["turn"] == turns.setdefault(item["block"], 0)
            turns[item["block"]] += 1
            tiles = rows[chunk, item["first_tile"] : item["first_tile"] + item["num_tiles"]]
            found.setdefault((item["batch"], item["head"], block), []).extend(tiles[tiles >= 0].tolist())
        for b, head, block in itertools.product(range(B), mine, range(M)):
            queries = [t for t in range(part, min(T, part + length)) if block in choices[b, t, head]]
            want = [(b * T + t) * K * group + head * group + g for t in queries for g in range(group)]
            assert found.get((b, head, block), []) == want
        units = itertools.product(range(B), range(part, part + length), mine)
        for unit, (b, t, head) in enumerate(units):
            first = ((b * T + t) * K + head) * group if t < T else -1
            assert first_row[chunk, unit] == first
            for i in np.flatnonzero(choices[b, t, head] >= 0) if t < T else ():
                there = place[chunk, unit, i]
                assert rows[chunk].reshape(-1)[there : there + group].tolist() == list(range(first, first + group))
            assert t < T or (place[chunk, unit] < 0).all()
    assert rows.shape[2] == TILE_ROWS and lists.has_room.all()


@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("lengths", [(1,) * 700, (63, 65, 2) * 5 + (50,), (700,), (1, 400) + (20,) * 14 + (19,)])
def test_lists_have_room_for_packed_documents(group, lengths):
    """However short they are, for a fraction of what any choices might need; others are told that there is none."""
    T, n, num_chunks = sum(lengths), 5, 2
    starts, choices = [], np.full((1, T, 1, n), -1, np.int32)
    rng, begin = np.random.default_rng(0), 0
    for length in lengths:
        for t in range(length):
            blocks = len(starts) + rng.permutation(t // 64 + 1)[:n]
            choices[0, begin + t, 0, : len(blocks)] = blocks
        starts += range(begin, begin + length, 64)
        begin += length
    starts = jnp.asarray([starts + [0] * (T - len(starts))], jnp.int32)
    of = functools.partial(
        QueryLists.of, block_start=starts, num_heads=group, kv_len=T, block_size=64, num_chunks=num_chunks
    )
    lists = jax.jit(of)(jnp.asarray(choices))
    assert lists.has_room.all()
    rows = np.asarray(lists.rows)
    assert (rows >= 0).sum() == (choices >= 0).sum() * group
    queries_of_tile = TILE_ROWS // group
    assert rows.shape[1] <= (T // 2 * max(n, queries_of_tile) + 2 * (T // 64) * queries_of_tile) / queries_of_tile + 1
    if group < 16:
        scattered = np.argsort(rng.random((1, T, 1, T)), axis=3)[..., :n].astype(np.int32)
        assert not jax.jit(of)(jnp.asarray(scattered)).has_room.any()


# (length, heads, kv heads, head dim, choices)
SHAPES = [(40, 2, 1, 64, 1), (140, 4, 2, 64, 2), (100, 3, 1, 128, 2)]


@pytest.mark.parametrize("shape", [SHAPES[0], *(pytest.param(x, marks=pytest.mark.slow) for x in SHAPES[1:])])
def test_equals_the_formula_in_the_interpreter(shape):
    arrays, dout, dlse = call_of(*shape)
    precise = [x.astype(jnp.float32) for x in arrays[:3]]
    options = dict(block_size=64, scale=shape[3] ** -0.5)
    out, lse = pallas_mosaic_gpu_nsa.forward(*arrays, None, interpret=interpreter(), **options)
    want, vjp = jax.vjp(lambda *x: nsa_selected_reference.forward(*x, *arrays[3:], None, **options), *precise)
    gradients = pallas_mosaic_gpu_nsa.backward(*arrays, None, out, lse, dout, dlse, interpret=interpreter(), **options)
    for name, x, y in zip(NAMES, (out, lse, *gradients), (*want, *vjp((dout.astype("float32"), dlse))), strict=True):
        assert_close(name, x, y, "bfloat16")


@pytest.mark.parametrize(
    "shape", [(300, 16, 1, 128, 3), *(pytest.param((300, n, 2, 64, 4), marks=pytest.mark.slow) for n in (2, 6, 128))]
)
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_lowers_for_cuda(shape, dtype):
    arrays, dout, dlse = call_of(*shape, dtype=dtype)
    attend = functools.partial(selected_attention, implementation="mosaic_gpu")

    def differentiate(q, k, v, *rest):
        return jax.vjp(lambda *x: attend(*x, *arrays[3:]), q, k, v)[1](rest)

    with tracing_for(H100), dispatch.record() as taken:
        text = jax.jit(differentiate).trace(*arrays[:3], dout, dlse).lower(lowering_platforms=("cuda",)).as_text()
    assert taken == [(f"selected_attention_{way}", "mosaic_gpu") for way in ("forward", "backward")]
    # The kernel of each pass, and the one that puts parts together.
    assert text.count("mosaic_gpu_v2") == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype="float32"), "q is float32, it takes bfloat16 and float16"),
        (dict(head_dim=96), "head dims of keys and values are 96 and 96"),
        (dict(num_heads=65), "65 query heads share a kv head, it takes at most 64"),
        (dict(num_choices=33), "33 choices a query, it takes at most 32"),
    ],
)
def test_refuses(change, message):
    shape = dict(length=128, num_heads=2, num_kv_heads=1, head_dim=64, num_choices=2) | change
    arrays, *_ = call_of(**shape)
    with tracing_for(H100), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(selected_attention, implementation="mosaic_gpu"), *arrays)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA Hopper GPU"):
        selected_attention(*arrays, implementation="mosaic_gpu")


@pytest.mark.parametrize("group", [1, pytest.param(4, marks=pytest.mark.slow), 16])
def test_the_selection_lowers_for_cuda(group):
    sizes, length = NsaSizes(), 600
    tables, queries = blocks_of(None, length, sizes)
    q = jnp.zeros((1, length, group, 64), jnp.bfloat16)
    k = jnp.zeros((1, sizes.num_compressed(length), 1, 64), jnp.bfloat16)
    choose = functools.partial(
        choose_blocks, tables=tables, queries=queries, sizes=sizes, scale=1.0, implementation="mosaic_gpu"
    )
    lse = jnp.zeros((1, group, length))
    with tracing_for(H100):
        text = jax.jit(choose).trace(q, k, lse).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1000, 16, 1, 128, 4), (777, 8, 8, 128, 3), (600, 6, 2, 64, 3), (900, 64, 1, 64, 9)])
def test_equals_the_formula_on_a_card(shape, dtype):
    """Several chunks and rows, groups that fill tiles and that do not; the same bits twice."""
    arrays, dout, dlse = call_of(*shape, dtype=dtype, batch_size=2)

    def both(attend):
        @jax.jit
        def run(q, k, v, dout, dlse):
            results, vjp = jax.vjp(lambda *x: attend(*x, *arrays[3:]), q, k, v)
            return *results, *vjp((dout.astype(results[0].dtype), dlse))

        return run

    run = both(functools.partial(selected_attention, implementation="mosaic_gpu"))
    got, again = (run(*arrays[:3], dout, dlse) for _ in range(2))
    with jax.default_matmul_precision("highest"):
        formula = both(functools.partial(selected_attention, implementation="reference"))
        want = formula(*(x.astype(jnp.float32) for x in arrays[:3]), dout, dlse)
    for name, x, y, z in zip(NAMES, got, again, want, strict=True):
        np.testing.assert_array_equal(x, y)
        assert_close(name, x, z, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 32, 64])
def test_chooses_what_xla_chooses_on_a_card(group, head_dim):
    """But for scores that differ by rounding."""
    sizes, length = NsaSizes(), 3000
    segment_ids = jnp.asarray(np.repeat([0, 1, 2, -1], [700, 1501, 600, 199])[None], jnp.int32)
    tables, queries = blocks_of(segment_ids, length, sizes)
    keys = jax.random.split(jax.random.key(0), 2)
    q = jax.random.normal(keys[0], (1, length, 2 * group, head_dim), jnp.bfloat16)
    k = jax.random.normal(keys[1], (1, sizes.num_compressed(length), 2, head_dim), jnp.bfloat16)
    # Some numbers in place of the lse: it scales the scores of a head.
    lse = jnp.full((1, 2 * group, length), 4.0)
    choices = [
        np.sort(
            choose_blocks(q, k, lse, tables, queries, sizes=sizes, scale=head_dim**-0.5, implementation=implementation)
        )
        for implementation in ("mosaic_gpu", "xla")
    ]
    assert (choices[0] == choices[1]).all(axis=-1).mean() > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parts_are_put_together_on_a_card_as_by_the_formula(dtype, head_dim):
    rng = np.random.default_rng(0)
    group, n, U = 3, 5, 70
    parts = jnp.asarray(rng.standard_normal((1000, head_dim)), dtype)
    lses = jnp.asarray(rng.standard_normal(1000), jnp.float32)
    place = rng.integers(-200, 1000 - group, (U, n)).astype(np.int32)
    place[7] = -1
    place = jnp.asarray(np.maximum(place, -1))
    first_row = jnp.asarray(np.where(np.arange(U) == 9, -1, rng.permutation(U) * group), jnp.int32)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def put_together(weighted, interpret):
        results = pallas_mosaic_gpu_nsa_parts.Results(
            out=jax.new_ref(jnp.zeros((U * group, head_dim), dtype)),
            lse=jax.new_ref(jnp.zeros(U * group)) if weighted else None,
        )
        units = pallas_mosaic_gpu_nsa_parts.Units(place, first_row, group, 132, interpret)
        pallas_mosaic_gpu_nsa_parts.merge(parts, lses if weighted else None, units, results)
        return [jax.freeze(x) for x in results if x is not None]

    for weighted in (True, False):
        got, want = (put_together(weighted, interpret) for interpret in (None, "formula"))
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=8e-3, atol=1e-3)

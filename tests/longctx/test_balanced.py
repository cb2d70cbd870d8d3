"""The balanced layout: what it evens out, that areas are the dense mask's, and that it equals one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import AttentionConfig, AttentionSharding, MeshConfig, MobaConfig, NsaConfig, make_mesh, masks
from longctx.context_parallel import (
    Balancer,
    ContextParallelConfig,
    Layout,
    areas,
    balanced_order,
    packings,
    sharded_attention,
    sharded_schedule,
    work,
)
from longctx.context_parallel.balance import imbalance
from longctx.context_parallel.layout import permute, unpermute
from pallas_kernels import BlockSizes, Tokens, blockwise_attention
from pallas_kernels.testing import assert_close, packed_tokens
from pallas_kernels.tokens import TokenAxis

LENGTH, CHUNK = 256, 2
ROWS = ((100, 1, 60, 43), (256,))  # the first is filled up with padding
PACKED = packed_tokens(ROWS, LENGTH)
LAYOUT = Layout(name="balanced", chunk_size=CHUNK)
CAUSAL = masks.causal() & masks.documents()
ONE_RUN = {
    "causal": CAUSAL,
    "window": masks.sliding_window(left=20, right=3) & masks.documents(),
    "past": masks.causal(offset=-9) & masks.documents(),
    "documents": masks.documents(),
}
SEVERAL = {
    "strided": CAUSAL & masks.strided(3, block=8),
    "not_window": CAUSAL & ~masks.sliding_window(left=20),
    "crosses_documents": masks.causal(),  # positions start anew
    "per_head": masks.per_head(CAUSAL, masks.sliding_window(left=9) & masks.documents()),
}


def row_of(tokens, row):
    return TokenAxis(tokens.q_positions[row], tokens.q_segment_ids[row])


def dense_areas(mask, tokens, row, num_chunks):
    heads = np.asarray(mask.dense(tokens, LENGTH, LENGTH, num_heads=mask.head_groups))[row]
    return heads.astype(int).sum(axis=0).reshape(num_chunks, -1, num_chunks, LENGTH // num_chunks).sum(axis=(1, 3))


@pytest.mark.parametrize("name", [*ONE_RUN, *SEVERAL])
def test_areas_between_chunks_are_those_of_the_dense_mask(name, monkeypatch):
    if name in ONE_RUN:  # counted without looking at a tile
        monkeypatch.setattr(areas, "_chunk_areas_by_tiles", None)
    mask = (ONE_RUN | SEVERAL)[name]
    for row in range(len(ROWS) if name in ONE_RUN else 1):
        got = areas.chunk_areas(mask, row_of(PACKED, row), 16)
        np.testing.assert_array_equal(got, dense_areas(mask, PACKED, row, 16))


def test_masks_without_documents_over_a_whole_row_are_counted_at_once(monkeypatch):
    monkeypatch.setattr(areas, "_chunk_areas_by_tiles", None)
    whole = packed_tokens(((LENGTH,),), LENGTH)
    for mask in (masks.causal(), masks.full(), masks.sliding_window(left=30)):
        got = areas.chunk_areas(mask, row_of(whole, 0), 16)
        np.testing.assert_array_equal(got, dense_areas(mask, whole, 0, 16))


@pytest.mark.parametrize(
    "segment_ids", [[0] * 100 + [1] * 60 + [0] * 96, [0] * 256], ids=["a_document_in_two_places", "a_jump"]
)
def test_documents_that_are_not_slot_by_slot_are_counted_pair_by_pair(segment_ids):
    positions = np.concatenate([np.arange(100), np.arange(60), 120 + np.arange(96)])
    tokens = Tokens.self_attention(*(np.asarray(x, np.int32)[None] for x in (positions, segment_ids)))
    got = areas.chunk_areas(CAUSAL, row_of(tokens, 0), 16)
    np.testing.assert_array_equal(got, dense_areas(CAUSAL, tokens, 0, 16))


@pytest.mark.parametrize("degree", [2, 8])
def test_an_order_is_a_permutation_with_as_many_chunks_of_every_part(degree):
    orders, rows = balanced_order(CAUSAL, PACKED, LAYOUT, "ring", degree=degree)
    for order, row in zip(orders, rows, strict=True):
        assert np.array_equal(np.sort(order), np.arange(LENGTH))
        held = order.reshape(degree, -1, CHUNK)
        assert np.array_equal(held, held[:, :, :1] + np.arange(CHUNK))  # whole chunks
        assert (np.diff(held[:, :, 0], axis=1) > 0).all()  # in their order
        parts = held[:, :, 0] // (LENGTH // degree)
        assert np.array_equal(parts, np.broadcast_to(np.sort(parts[0]), parts.shape))
        assert np.array_equal(np.bincount(parts[0]), np.full(degree, LENGTH // CHUNK // degree**2))
        assert sorted(row.devices.tolist()) == sorted(np.tile(np.arange(degree), LENGTH // CHUNK // degree).tolist())
    again, _ = balanced_order(CAUSAL, PACKED, LAYOUT, "ring", degree=degree)
    np.testing.assert_array_equal(orders, again)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("ring", {}), ("all_gather", {}), ("ulysses", {}), ("usp", {"inner_degree": 2})],
)
def test_what_it_says_of_a_row_is_what_work_counts(strategy, options):
    """Devices wait for each other at every call of the op."""
    for row in range(len(ROWS)):
        tokens = jax.tree.map(lambda x, row=row: x[row : row + 1], PACKED)
        _, (found,) = balanced_order(CAUSAL, tokens, LAYOUT, strategy, degree=4, **options)
        counted = work(CAUSAL, tokens, LAYOUT, strategy, degree=4, **options)
        # Shares of heads are rounded down there.
        np.testing.assert_allclose(found.critical_path, counted.critical_path, rtol=1e-2 if options else 1e-12)
        assert found.critical_path <= found.dealt
        assert counted.areas.sum() <= areas.chunk_areas(CAUSAL, row_of(tokens, 0), 1).sum()
        if strategy == "ulysses":
            assert (found.critical_path, found.swaps) == (1, 0)


DRAWN = ["in its logarithm", pytest.param("uniformly", marks=pytest.mark.slow)]


@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize(("strategy", "most"), [("all_gather", 1.02), ("ring", 1.05)])
def test_random_packings_are_even(drawn, strategy, most):
    """20 rows of 131,072 tokens over 8 devices, of documents from 100 tokens to all."""
    figures = {"dealt": [], "found": []}
    for seed in range(packings.NUM_PACKINGS):
        tokens = packings.random_packing(seed, drawn)
        row, by_hop, _ = packings.planned(tokens, strategy)
        counted = imbalance(by_hop if strategy == "ring" else by_hop.sum(axis=1, keepdims=True))
        np.testing.assert_allclose(row.critical_path, counted, rtol=1e-12)
        figures["found"].append(counted)
        figures["dealt"].append(row.dealt)
    assert max(figures["found"]) <= most < max(figures["dealt"]) + 0.01


def test_work_counts_and_draws_a_packing():
    tokens = packings.random_packing(0, "uniformly", length=1024)
    layout = Layout(name="balanced", chunk_size=4)
    counted = work(CAUSAL, tokens, layout, "ring", degree=8)
    assert counted.areas.sum() == areas.chunk_areas(CAUSAL, row_of(tokens, 0), 1).sum()
    assert counted.critical_path < 1.05 < work(CAUSAL, tokens, Layout(name="zigzag"), "ring", degree=8).critical_path
    assert counted.plot().images[0].get_array().shape == (8, 8)


def test_layers_of_several_masks_are_evened_out_together():
    """Weighted by how many there are: nobody waits longer than each mask alone would need."""
    window = masks.sliding_window(left=15) & masks.documents()
    sharding = AttentionSharding(layout=LAYOUT)
    row = row_of(PACKED, 0)
    both = Balancer(masks={CAUSAL: 1, window: 3}, sharding=sharding, degree=4, length=LENGTH).row(*row)
    order = both.order[None]
    tokens = jax.tree.map(lambda x: permute(x[:1], order), PACKED)
    hops = [3 * areas_of(window, tokens), areas_of(CAUSAL, tokens)]
    even = sum(x.sum() for x in hops) / 4
    np.testing.assert_allclose(both.critical_path, sum(x.max(axis=0).sum() for x in hops) / even)


def areas_of(mask, tokens):
    """By device and hop of a ring of 4, of tokens in the order of the shards, from the dense mask."""
    dense = np.asarray(mask.dense(tokens, LENGTH, LENGTH))[0].astype(int)
    pairs = dense.reshape(4, LENGTH // 4, 4, LENGTH // 4).sum(axis=(1, 3))
    return np.array([[pairs[device, (device - hop) % 4] for hop in range(4)] for device in range(4)])


def test_devices_find_the_order_of_the_sequence():
    orders, _ = balanced_order(CAUSAL, PACKED, LAYOUT, "all_gather", degree=4)
    held = jax.tree.map(lambda x: jnp.asarray(permute(x, orders)), PACKED)
    chunks = LAYOUT.chunk_order(held.q_positions, held.q_segment_ids)
    for name in ("q_positions", "q_segment_ids"):
        x = getattr(held, name)
        in_sequence = LAYOUT.in_sequence(x, 4, chunks=chunks)
        np.testing.assert_array_equal(in_sequence, getattr(PACKED, name))
        np.testing.assert_array_equal(LAYOUT.in_layout(in_sequence, 4, chunks=chunks), x)
    assert Layout(name="zigzag").chunk_order(held.q_positions, held.q_segment_ids) is None


SIZES = BlockSizes(block_q=8, block_kv=8)
CASES = {
    "ring": ("ring", {"context_inner": 8}, "causal"),
    "all_gather": ("all_gather", {"context_inner": 8}, "causal"),
    "usp": ("usp", {"context_outer": 4, "context_inner": 2}, "causal"),
    "ulysses": ("ulysses", {"data": 2, "context_inner": 4}, "causal"),
    "ring_window": ("ring", {"context_outer": 2, "context_inner": 4}, "window"),
    "all_gather_strided": ("all_gather", {"context_inner": 4, "tensor": 2}, "strided"),
    "usp_documents": ("usp", {"context_outer": 2, "context_inner": 4}, "documents"),
}
QUICK = ("usp",)  # whose groups are a ring; test_hybrid.py has all_gather


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in CASES]
)  # fmt: skip
def test_it_equals_one_device(name):
    """Forward and every gradient, rows with orders of their own."""
    strategy, mesh_shape, mask = CASES[name]
    mask = (ONE_RUN | SEVERAL)[mask]
    degree = mesh_shape.get("context_outer", 1) * mesh_shape.get("context_inner", 1)
    inner = mesh_shape["context_inner"] if strategy == "usp" else None
    heads = {"q": 8, "k": 4, "v": 4, "dout": 8}
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = {
        of: jax.random.normal(key, (2, LENGTH, num, 8))
        for key, (of, num) in zip(keys, heads.items(), strict=True)
    }  # fmt: skip

    def run(attend, q, k, v, dout):
        out, vjp = jax.vjp(attend, q, k, v)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *vjp(dout)), strict=True))

    tokens = jax.tree.map(jnp.asarray, PACKED)
    want = jax.jit(lambda arrays: run(lambda *qkv: blockwise_attention(*qkv, mask=mask, tokens=tokens), **arrays))(
        arrays
    )
    order, _ = balanced_order(mask, PACKED, LAYOUT, strategy, degree=degree, inner_degree=inner)
    # All orders are even to ulysses, which keeps the one that is dealt.
    assert np.array_equal(order[0], order[1]) == (strategy == "ulysses")
    sharding = AttentionSharding(strategy=strategy, layout=LAYOUT)
    mesh = make_mesh(MeshConfig(**mesh_shape), jax.devices()[: int(np.prod(list(mesh_shape.values())))])

    def over_devices(arrays, tokens):
        schedule = sharded_schedule(
            mask, tokens, batch_size=2, q_len=LENGTH, kv_len=LENGTH, block_sizes=SIZES, sharding=sharding
        )
        options = dict(mask=mask, tokens=tokens, schedule=schedule, block_sizes=SIZES, sharding=sharding)
        return run(lambda *qkv: sharded_attention(*qkv, **options), **arrays)

    with jax.set_mesh(mesh):
        permuted = jax.tree.map(lambda x: permute(jnp.asarray(x), order), (arrays, PACKED))
        got = jax.device_get(jax.block_until_ready(jax.jit(over_devices)(*permuted)))
    for of, x in got.items():
        assert_close(of, unpermute(x, order), want[of], "float32")


def test_what_is_not_served_is_refused():
    with pytest.raises(ValueError, match="balanced has no order that all rows share.* context_parallel.balanced_order"):
        ContextParallelConfig(layout="balanced", chunk_size=CHUNK).order(LENGTH, 4)
    with pytest.raises(ValueError, match=r"balanced over 8 devices .* multiple of 32768 tokens, got 4096;.*chunk_size"):
        balanced_order(CAUSAL, Tokens(), Layout(name="balanced"), "ring", degree=8, length=4096)
    with pytest.raises(ValueError, match="chunk_size: got 64 with layout=zigzag, whose chunks follow from the devices"):
        Layout(name="zigzag", chunk_size=64)
    with pytest.raises(ValueError, match="chunk_size: got 0, wanted a number of tokens >= 1"):
        Layout(name="balanced", chunk_size=0)
    with pytest.raises(ValueError, match="Balancer: got layout=zigzag, wanted balanced"):
        balanced_order(CAUSAL, PACKED, Layout(name="zigzag"), "ring", degree=4)
    with pytest.raises(ValueError, match="balanced_order: got tokens without arrays and no length"):
        balanced_order(CAUSAL, Tokens(), LAYOUT, "ring", degree=4)
    with pytest.raises(ValueError, match="balanced evens out what softmax attention computes, and no layer attends"):
        Balancer(masks={}, sharding=AttentionSharding(layout=LAYOUT), degree=4, length=LENGTH)
    with pytest.raises(NotImplementedError, match="balanced layout: usp needs two mesh axes"):
        balanced_order(CAUSAL, PACKED, LAYOUT, "usp", degree=4)
    with pytest.raises(NotImplementedError, match="balanced layout: halo needs .* runs of neighbouring tokens"):
        balanced_order(ONE_RUN["window"], PACKED, LAYOUT, "halo", degree=4)
    with pytest.raises(NotImplementedError, match="work: got T=128 and S=256 with layout=balanced"):
        work(masks.causal(), Tokens(), LAYOUT, "ring", degree=4, q_len=128, kv_len=LENGTH)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (MobaConfig(num_heads=2, chunk_size=16, top_k=2), "chunks of MoBA need tokens whose order is known when"),
        (NsaConfig(num_heads=2), "blocks of NSA need tokens whose order is known when the program is traced"),
        (AttentionConfig(num_heads=2), None),
    ],
)
def test_mixers_say_whether_they_are_served(mixer, message):
    sizes = dict(seq_len=LENGTH, heads_split=1, ring_size=4, sharding=AttentionSharding(layout=LAYOUT))
    reason = mixer.refusal(16, **sizes)
    assert reason is None if message is None else message in reason and "\n" not in reason


@pytest.mark.parametrize(
    ("kv_len", "message"), [(LENGTH, "positions=None with layout=balanced"), (128, "T=256 and S=128")]
)
def test_calls_that_are_not_served_are_refused(kv_len, message):
    q, k = (jnp.zeros((1, n, 2, 8)) for n in (LENGTH, kv_len))
    positions = [None if kv_len == LENGTH else jnp.zeros((1, n), jnp.int32) for n in (LENGTH, kv_len)]
    tokens = Tokens(q_positions=positions[0], kv_positions=positions[1])
    mesh = make_mesh(MeshConfig(context_inner=4), jax.devices()[:4])
    with jax.set_mesh(mesh), pytest.raises((ValueError, NotImplementedError), match=re.escape(message)):
        sharded_attention(q, k, k, mask=masks.causal(), tokens=tokens, sharding=AttentionSharding(layout=LAYOUT))

"""Attention to chosen blocks on a mesh equals that on one device, forward and every gradient."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import AttentionSharding, MeshConfig, make_mesh, masks
from longctx.context_parallel import Layout, selected, sharded_selected_attention
from longctx.context_parallel import ring as ring_module
from longctx.context_parallel.layout import permute, unpermute
from pallas_kernels import BlockSizes, Tokens, blockwise_attention
from pallas_kernels.sparse import AShape, BlockMean, PerHead, VerticalSlash, XAttention
from pallas_kernels.testing import assert_close, packed_tokens

LENGTH = 128
ROWS = ((61, 1, 40), (128,))  # documents that cross shards and blocks, and padding
NAMES = ("out", "dq", "dk", "dv")
LAYOUTS = {name: Layout(name=name) for name in ("contiguous", "zigzag", "striped")}
SIZES = BlockSizes(block_q=8, block_kv=8)
CAUSAL = masks.causal() & masks.documents()
WINDOW = masks.sliding_window(left=30) & masks.documents()
SELECTORS = {
    "means": dict(selector=BlockMean(), budget=4),
    "means_of_groups": dict(selector=BlockMean(heads="kv", sink_blocks=1), budget=3),
    "antidiagonals": dict(selector=XAttention(stride=4), threshold=0.6),
    "antidiagonals_of_groups": dict(selector=XAttention(stride=4, heads="kv"), threshold=0.6, budget=6),
    "lines": dict(selector=VerticalSlash(last_queries=16, vertical=6, slash=6), budget=5),
    "nearest": dict(selector=AShape(sink_blocks=1, local_blocks=2)),
    "by_head": dict(selector=PerHead(selectors=(BlockMean(), XAttention(stride=2)) * 2), budget=4),
}
CASES = [
    ("ring", "zigzag", {"context_inner": 4}, "means", CAUSAL),
    ("all_gather", "zigzag", {"context_inner": 2}, "antidiagonals_of_groups", CAUSAL),
    ("ring", "zigzag", {"data": 2, "tensor": 2}, "means_of_groups", CAUSAL),
    ("ring", "contiguous", {"context_inner": 2}, "antidiagonals", CAUSAL),
    ("ring", "contiguous", {"context_inner": 8}, "means", CAUSAL),
    ("ring", "zigzag", {"context_inner": 8}, "antidiagonals_of_groups", CAUSAL),
    ("ring", "zigzag", {"context_inner": 8}, "means_of_groups", CAUSAL),
    ("ring", "contiguous", {"context_inner": 4}, "means", WINDOW),
    ("ring", "zigzag", {"data": 2, "context_outer": 2, "tensor": 2}, "antidiagonals", CAUSAL),
    ("ring", "contiguous", {"data": 4, "context_inner": 2}, "by_head", CAUSAL),
    ("ring", None, {"context_inner": 4}, "nearest", masks.documents()),
    ("ring", "contiguous", {"data": 2, "tensor": 2}, "lines", CAUSAL),  # where a device has all of a row
    ("all_gather", "contiguous", {"context_inner": 8}, "antidiagonals", CAUSAL),
    ("all_gather", "zigzag", {"context_inner": 8}, "means", CAUSAL),
    ("all_gather", "zigzag", {"context_inner": 4}, "by_head", WINDOW),
    ("all_gather", "contiguous", {"fsdp": 2, "context_inner": 2, "tensor": 2}, "means_of_groups", CAUSAL),
    ("all_gather", None, {"context_outer": 2, "context_inner": 2}, "nearest", CAUSAL),
]
QUICK = CASES[1:2]


def inputs(dtype="float32", length=LENGTH):
    shapes = (2, length, 4, 8), (2, LENGTH, 2, 8), (2, LENGTH, 2, 16), (2, length, 4, 16)
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def with_gradients(attend):
    @jax.jit
    def run(q, k, v, dout):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    return run


@functools.cache
def on_one_device(chosen, mask, sizes=SIZES):
    """By the ops themselves: the choice, and the float32 reference of attention to it."""
    tokens = jax.tree.map(jnp.asarray, packed_tokens(ROWS, LENGTH))
    selector, *limits = (SELECTORS[chosen].get(x) for x in ("selector", "budget", "threshold"))

    def attend(q, k, v):
        limited = dict(zip(("budget", "threshold"), limits, strict=True))
        selection = selector.select(q, k, mask=mask, tokens=tokens, block_sizes=sizes, **limited)
        schedule = selection.schedule(mask=mask, tokens=tokens)
        return blockwise_attention(q, k, v, mask=mask, tokens=tokens, schedule=schedule, implementation="reference")

    return with_gradients(attend)(*inputs())


def over_a_mesh(strategy, layout, mesh_shape, chosen, mask, sizes=SIZES):
    """Results by name in the order of the sequence."""
    degree = mesh_shape.get("context_outer", 1) * mesh_shape.get("context_inner", 1)
    layout = layout and LAYOUTS[layout]
    order = (layout or Layout()).order(LENGTH, degree)
    tokens = jax.tree.map(lambda x: jnp.asarray(permute(x, order)), packed_tokens(ROWS, LENGTH))
    sharding = AttentionSharding(strategy=strategy, layout=layout)
    attend = functools.partial(
        sharded_selected_attention, mask=mask, tokens=tokens, block_sizes=sizes, sharding=sharding, **SELECTORS[chosen]
    )
    mesh = make_mesh(MeshConfig(**mesh_shape), jax.devices()[: int(np.prod(list(mesh_shape.values())))])
    with jax.set_mesh(mesh):
        got = jax.block_until_ready(with_gradients(attend)(*(permute(x, order) for x in inputs())))
    return {name: unpermute(np.asarray(x), order) for name, x in zip(NAMES, got, strict=True)}


@pytest.mark.parametrize(
    ("strategy", "layout", "mesh_shape", "chosen", "mask"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_equals_one_device(strategy, layout, mesh_shape, chosen, mask):
    got = over_a_mesh(strategy, layout, mesh_shape, chosen, mask)
    for name, want in zip(NAMES, on_one_device(chosen, mask), strict=True):
        assert_close(name, got[name], want, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_blocks_of_queries_and_of_keys_of_other_sizes(strategy):
    sizes = BlockSizes(block_q=16, block_kv=4)
    got = over_a_mesh(strategy, "zigzag", {"context_inner": 4}, "means", CAUSAL, sizes)
    for name, want in zip(NAMES, on_one_device("means", CAUSAL, sizes), strict=True):
        assert_close(name, got[name], want, "float32")


def attend_to_means(q, k, v, sharding=None, tokens=None, **options):
    options = dict(selector=BlockMean(), budget=3, mask=masks.causal(), block_sizes=SIZES) | options
    return sharded_selected_attention(q, k, v, tokens=tokens or Tokens(), sharding=sharding, **options)


def test_without_a_mesh_it_chooses_and_attends_on_one_device():
    arrays = inputs()
    mask = masks.causal()

    def attend(q, k, v):
        selection = BlockMean().select(q, k, mask=mask, block_sizes=SIZES, budget=3)
        schedule = selection.schedule(mask=mask)
        return blockwise_attention(q, k, v, mask=mask, schedule=schedule, implementation="reference")

    want = with_gradients(attend)(*arrays)
    for name, x, y in zip(NAMES, with_gradients(attend_to_means)(*arrays), want, strict=True):
        assert_close(name, x, y, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_fewer_queries_than_keys(strategy):
    arrays = inputs(length=LENGTH // 2)
    attend = functools.partial(attend_to_means, mask=masks.full())
    want = with_gradients(attend)(*arrays)
    with jax.set_mesh(make_mesh(MeshConfig(context_inner=4), jax.devices()[:4])):
        sharding = AttentionSharding(strategy=strategy)
        got = jax.block_until_ready(with_gradients(functools.partial(attend, sharding=sharding))(*arrays))
    for name, x, y in zip(NAMES, got, want, strict=True):
        assert_close(name, x, y, "float32")


def test_a_device_holds_its_part_of_the_lists():
    """Zigzag over two devices: the first holds blocks 0, 1, 6 and 7 of the sequence."""
    setting = AttentionSharding(layout=LAYOUTS["zigzag"]).setting(CAUSAL, degree=2, q_len=64, kv_len=64)
    lists = jnp.array([[[[0, 2, 3, 7, -1], [1, 6, 7, -1, -1], [2, 4, -1, -1, -1]]]], jnp.int32)
    parts = [selected._held_by(jnp.int32(device), lists, setting, SIZES)[0, 0].tolist() for device in range(2)]
    assert parts == [
        [[0, 3, -1, -1], [1, 2, 3, -1], [-1] * 4],
        [[0, 1, -1, -1], [-1] * 4, [0, 2, -1, -1]],
    ]


def refused(sharding, *, mesh, tokens=None, **options):
    with jax.set_mesh(make_mesh(MeshConfig(**mesh), jax.devices()[: int(np.prod(list(mesh.values())))])):
        jax.eval_shape(
            functools.partial(attend_to_means, sharding=sharding, tokens=tokens, **options), *inputs()[:3]
        )  # fmt: skip


def test_refusals():
    ids = jnp.zeros((1, LENGTH), jnp.int32)
    given = Tokens.self_attention(ids, ids)
    four = {"context_inner": 4}
    for strategy in ("ulysses", "halo"):
        with pytest.raises(NotImplementedError, match=rf"got strategy={strategy}; choose one of those"):
            refused(AttentionSharding(strategy=strategy), mesh=four)
    with pytest.raises(NotImplementedError, match=r"layout=striped holds no runs .*; choose contiguous or zigzag"):
        refused(AttentionSharding(layout=LAYOUTS["striped"]), mesh=four, tokens=given)
    lines = VerticalSlash()
    for selector in (lines, PerHead(selectors=(BlockMean(), lines) * 2)):
        with pytest.raises(NotImplementedError, match=r"sharded_selected_attention: VerticalSlash scores keys by the"):
            refused(AttentionSharding(), mesh=four, selector=selector)
    with pytest.raises(NotImplementedError, match=r"PerHead names a selector for each head, .* keep the heads whole"):
        refused(AttentionSharding(), mesh={"tensor": 2}, selector=PerHead(selectors=(BlockMean(),) * 4))
    with pytest.raises(
        ValueError, match=r"T=128 in 8 runs .* whole blocks of block_q=32, wanted a multiple of 256; pad it to one"
    ):
        refused(
            AttentionSharding(layout=LAYOUTS["zigzag"]),
            mesh=four,
            tokens=given,
            block_sizes=BlockSizes(block_q=32, block_kv=8),
        )
    with pytest.raises(ValueError, match=r"S=128 in 4 runs .* blocks of block_kv=64, wanted a multiple of 256"):
        refused(AttentionSharding(), mesh=four, block_sizes=BlockSizes(block_q=8, block_kv=64))
    with pytest.raises(ValueError, match=r"got positions=None with layout=zigzag"):
        refused(AttentionSharding(layout=LAYOUTS["zigzag"]), mesh=four)
    with pytest.raises(ValueError, match=r"sharded_selected_attention: 2 kv heads do not split over the 4 devices"):
        refused(AttentionSharding(), mesh={"tensor": 4})
    with pytest.raises(ValueError, match=r"BlockMean.select_from: budget: got 0"):
        refused(AttentionSharding(), mesh=four, budget=0)
    with pytest.raises(ValueError, match=r"sharded_selected_attention: tokens.q_positions has shape \(1, 3\)"):
        refused(AttentionSharding(), mesh=four, tokens=Tokens(q_positions=jnp.zeros((1, 3), jnp.int32)))


def test_refusals_of_a_config():
    layer = dict(selector=BlockMean(), mask=CAUSAL, block_sizes=SIZES, seq_len=LENGTH, num_kv_heads=2, degree=4)
    zigzag = AttentionSharding(layout=LAYOUTS["zigzag"])
    assert selected.refusal(zigzag, **layer) is None
    assert selected.refusal(AttentionSharding(strategy="halo"), **layer | {"degree": 1}) is None
    for sharding, changed, message in (
        (AttentionSharding(strategy="halo"), {}, "got strategy=halo; choose one of those"),
        (zigzag, {"heads_split": 4}, "splits 2 kv heads over 4 devices, wanted a multiple of 4"),
        (zigzag, {"seq_len": 96}, "T=96 in 8 runs"),
        (zigzag, {"selector": VerticalSlash()}, "VerticalSlash scores keys by the last queries"),
    ):
        assert message in selected.refusal(sharding, **layer | changed)


@pytest.mark.parametrize(
    ("strategy", "layout", "chosen", "mask"),
    [
        ("ring", "zigzag", "means", CAUSAL),
        pytest.param("ring", "contiguous", "antidiagonals", WINDOW, marks=pytest.mark.slow),
        pytest.param("all_gather", "zigzag", "by_head", CAUSAL, marks=pytest.mark.slow),
        pytest.param("all_gather", "contiguous", "nearest", CAUSAL, marks=pytest.mark.slow),
    ],
)
def test_the_program_sends_what_is_stated(strategy, layout, chosen, mask, monkeypatch):
    """Of the program before it is compiled, with every hop written out."""
    monkeypatch.setattr(ring_module, "MAX_UNROLLED_HOPS", 9)
    sharding, degree = AttentionSharding(strategy=strategy, layout=LAYOUTS[layout]), 4
    q, k, _, _ = inputs("bfloat16")
    ids = jnp.zeros((2, LENGTH), jnp.int32)

    def step(q, k, v, dout, ids):
        attend = functools.partial(
            attend_to_means, tokens=Tokens.self_attention(ids, ids), sharding=sharding, mask=mask,
            **{"budget": None} | SELECTORS[chosen],
        )  # fmt: skip
        return jax.vjp(attend, q, k, v)[1](dout)

    with jax.set_mesh(make_mesh(MeshConfig(context_inner=degree), jax.devices()[:degree])):
        program = jax.jit(step).lower(q, k, k, q, ids).as_text()
    found = collections.Counter()
    kinds = "collective_permute|all_gather|reduce_scatter|all_reduce"
    for kind, dims, element in re.findall(
        rf"stablehlo\.({kinds})\"?\(.*?-> tensor<([\dx]+)x(\w+)>", program, re.DOTALL
    ):
        num_bytes = int(np.prod([int(n) for n in dims.split("x")])) * {"bf16": 2, "f32": 4, "i32": 4}[element]
        share = {"collective_permute": 1, "all_gather": 3 / 4, "reduce_scatter": 3, "all_reduce": 2 * 3 / 4}[kind]
        found[kind.replace("_", "-"), round(num_bytes * share)] += 1
    stated = collections.Counter()
    for transfer in selected.transfers(
        sharding, selector=SELECTORS[chosen]["selector"], mask=mask, block_sizes=SIZES, rows=2, seq_len=LENGTH,
        num_heads=4, num_kv_heads=2, head_dim=8, degree=degree, dtype="bfloat16",
    ):  # fmt: skip
        stated[transfer.kind, transfer.num_bytes] += transfer.count
    # Beside it what the hops that are left out rest on: two tokens of each run.
    beside = found - stated
    assert not stated - found and all(num_bytes <= 64 * degree * 2 for _, num_bytes in beside), (found, stated)

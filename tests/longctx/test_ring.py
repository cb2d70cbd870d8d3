"""Ring attention equals attention on one device, forward and every gradient, and sends what it says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import AttentionSharding, MeshConfig, make_mesh, masks
from longctx.context_parallel import ContextParallelConfig, sharded_attention, sharded_schedule
from longctx.context_parallel import ring as ring_module
from longctx.context_parallel.layout import permute, unpermute
from pallas_kernels import BlockSizes, Tokens, blockwise_attention
from pallas_kernels.testing import assert_close, packed_tokens

LENGTH = 96
ROWS = ((40, 1, 30, 20), (96,))
SIZES = BlockSizes(block_q=8, block_kv=8)
MASKS = {
    "causal": (masks.causal(), False),
    "full": (masks.full(), False),
    "window": (masks.sliding_window(left=20), False),
    "prefix": (masks.causal() | masks.prefix(30), False),
    "documents": (masks.causal() & masks.documents(), True),
    "documents_window": (masks.sliding_window(left=7) & masks.documents(), True),
    "empty_rows": (masks.causal(offset=-40), False),
    "not_window": (masks.causal() & ~masks.sliding_window(left=10), False),
}
LAYOUTS = {
    "contiguous": ContextParallelConfig(layout="contiguous"),
    "zigzag": ContextParallelConfig(layout="zigzag"),
    "striped": ContextParallelConfig(layout="striped"),
    "striped_by_4": ContextParallelConfig(layout="striped", stripe_size=4),
}
SPARSE_MASKS = {
    "sinks_window": masks.causal() & (masks.sink_tokens(4) | masks.sliding_window(left=9)),
    "neighborhood": masks.neighborhood((8, 12), (1, 2)),
    "per_head": masks.causal() & masks.per_head(masks.sliding_window(left=20), masks.strided(3, block=8)),
}
NAMES = ("out", "dq", "dk", "dv")


def inputs(q_len=LENGTH, kv_len=LENGTH, num_heads=4, num_kv_heads=2, value_dim=8, batch_size=2, dtype="float32"):
    shapes = {
        "q": (batch_size, q_len, num_heads, 8),
        "k": (batch_size, kv_len, num_kv_heads, 8),
        "v": (batch_size, kv_len, num_kv_heads, value_dim),
        "dout": (batch_size, q_len, num_heads, value_dim),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes.values(), strict=True)]


def with_gradients(attend):
    def run(q, k, v, dout):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    return jax.jit(run)


def on_one_device(mask, tokens, arrays, **options):
    return with_gradients(lambda q, k, v: blockwise_attention(q, k, v, mask=mask, tokens=tokens, **options))(*arrays)


def ring(mask, tokens, arrays, *, prebuilt=True, **options):
    """The ring over the mesh in scope, on arrays and tokens in the layout's order."""
    batch_size, q_len, kv_len = *arrays[0].shape[:2], arrays[1].shape[1]

    def attend(q, k, v):
        schedule = None
        if prebuilt:
            schedule = sharded_schedule(
                mask, tokens, batch_size=batch_size, q_len=q_len, kv_len=kv_len, block_sizes=SIZES
            )
        return sharded_attention(q, k, v, mask=mask, tokens=tokens, schedule=schedule, block_sizes=SIZES, **options)

    return with_gradients(attend)


def tokens_of(packed, q_len=LENGTH, kv_len=LENGTH):
    if packed:
        return jax.tree.map(jnp.asarray, packed_tokens(ROWS, LENGTH))
    q, kv = (jnp.arange(n, dtype=jnp.int32)[None] for n in (q_len, kv_len))
    return Tokens(q_positions=q, kv_positions=kv)


def assert_ring_equals_one_device(mask, tokens, arrays, mesh_shape, layout, *, dtype="float32", **options):
    want = on_one_device(mask, tokens, [x.astype("float32") for x in arrays], **options)
    degree = mesh_shape.get("context_outer", 1) * mesh_shape.get("context_inner", 1)
    q_order, kv_order = (layout.order(x.shape[1], degree) for x in arrays[:2])
    orders = (q_order, kv_order, kv_order, q_order)
    permuted_tokens = Tokens(
        q_positions=permute(tokens.q_positions, q_order),
        kv_positions=permute(tokens.kv_positions, kv_order),
        q_segment_ids=None if tokens.q_segment_ids is None else permute(tokens.q_segment_ids, q_order),
        kv_segment_ids=None if tokens.kv_segment_ids is None else permute(tokens.kv_segment_ids, kv_order),
    )
    mesh = make_mesh(MeshConfig(**mesh_shape), jax.devices()[: int(np.prod(list(mesh_shape.values())))])
    with jax.set_mesh(mesh):
        got = ring(mask, permuted_tokens, arrays, **options)(
            *(permute(x, order) for x, order in zip(arrays, orders, strict=True))
        )
        jax.block_until_ready(got)
    for name, x, y, order in zip(NAMES, got, want, (q_order, q_order, kv_order, kv_order), strict=True):
        assert x.dtype == dtype
        assert_close(name, unpermute(np.asarray(x, np.float32), order), y, dtype)


@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_layout_and_degree(name, layout, degree):
    """Two devices have no hop between the first and the last, four are unrolled, eight go round in a loop."""
    mask, packed = MASKS[name]
    assert_ring_equals_one_device(mask, tokens_of(packed), inputs(), {"context_inner": degree}, LAYOUTS[layout])


@pytest.mark.parametrize("name", SPARSE_MASKS)
def test_sparse_masks(name):
    """Positions are data: a pattern needs no layout of its own, and heads that differ are whole on each device."""
    mesh_shape = {"data": 2, "context_inner": 4}
    assert_ring_equals_one_device(SPARSE_MASKS[name], tokens_of(False), inputs(), mesh_shape, LAYOUTS["zigzag"])


@pytest.mark.parametrize(
    "mesh_shape",
    [
        {"data": 2, "context_inner": 2, "tensor": 2},
        {"fsdp": 2, "context_outer": 2, "context_inner": 2},
        {"context_outer": 2, "context_inner": 4},
    ],
    ids=str,
)
def test_beside_other_axes(mesh_shape):
    mask, packed = MASKS["documents"]
    assert_ring_equals_one_device(mask, tokens_of(packed), inputs(), mesh_shape, LAYOUTS["zigzag"])


@pytest.mark.parametrize(("q_len", "kv_len"), [(32, 96), (96, 32)])
@pytest.mark.parametrize("name", ["full", "window"])
def test_queries_and_keys_of_other_lengths(name, q_len, kv_len):
    mask, _ = MASKS[name]
    arrays = inputs(q_len, kv_len)
    assert_ring_equals_one_device(
        mask, tokens_of(False, q_len, kv_len), arrays, {"context_inner": 4}, LAYOUTS["zigzag"]
    )


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (dict(num_kv_heads=1), {}),
        (dict(num_kv_heads=4, value_dim=24), {}),
        ({}, dict(logits_soft_cap=2.0)),
        (dict(dtype="bfloat16"), {}),
    ],
    ids=["mqa", "value_dim", "soft_cap", "bfloat16"],
)
def test_heads_options_and_dtypes(shapes, options):
    mask, packed = MASKS["documents"]
    dtype = shapes.get("dtype", "float32")
    arrays = inputs(**shapes)
    assert_ring_equals_one_device(
        mask, tokens_of(packed), arrays, {"context_inner": 4}, LAYOUTS["zigzag"], dtype=dtype, **options
    )


def test_positions_default_to_the_whole_sequence():
    """Without positions a shard must not count from its own first token; and a schedule may be built on the way."""
    arrays = inputs()
    want = on_one_device(masks.causal(), Tokens(), arrays)
    with jax.set_mesh(make_mesh(MeshConfig(context_inner=4, data=2))):
        got = ring(masks.causal(), Tokens(), arrays, prebuilt=False)(*arrays)
        for name, x, y in zip(NAMES, got, want, strict=True):
            assert_close(name, x, y, "float32")


def test_axes_of_another_mesh():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("sp",), axis_types=auto, devices=jax.devices()[:4])
    arrays = inputs()
    want = on_one_device(masks.causal(), Tokens(), arrays)
    with jax.set_mesh(mesh):
        sharding = AttentionSharding(sequence=("sp",))
        got = with_gradients(
            lambda q, k, v: sharded_attention(q, k, v, mask=masks.causal(), tokens=Tokens(), sharding=sharding)
        )(*arrays)
        for name, x, y in zip(NAMES, got, want, strict=True):
            assert_close(name, x, y, "float32")


def test_lengths_must_split_over_the_ring():
    arrays = inputs(q_len=90)
    with (
        jax.set_mesh(make_mesh(MeshConfig(context_inner=4, data=2))),
        pytest.raises(ValueError, match="T=90 does not split over the 4 devices of mesh axes .*; pad it to a multiple"),
    ):
        sharded_attention(*arrays[:3], mask=masks.causal(), tokens=Tokens())


def test_a_wrong_hop_fails(monkeypatch):
    """The suite can fail: gradients that stay where they were computed are told apart."""
    send = ring_module._Route.send

    def never_sent(self, x, stride):
        return send(self, x, stride) if x.dtype != jnp.float32 else x

    monkeypatch.setattr(ring_module._Route, "send", never_sent)
    mask, packed = MASKS["documents"]
    with pytest.raises(AssertionError):
        assert_ring_equals_one_device(
            mask, tokens_of(packed), inputs(dtype="bfloat16"), {"context_inner": 4}, LAYOUTS["zigzag"], dtype="bfloat16"
        )


def collectives(program: str) -> list[tuple[str, str, int]]:
    """Kind, dtype and bytes a device sends or receives of every collective in a compiled program."""
    size_of = {"f32": 4, "bf16": 2, "s32": 4}
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = []
    for match in re.finditer(rf"= (\w+)\[([\d,]*)\][^ ]* ({kinds})(?:-start)?\(", program):
        dtype, shape, kind = match.groups()
        found.append((kind, dtype, size_of[dtype] * int(np.prod([int(n) for n in shape.split(",") if n]))))
    assert len(found) == len(re.findall(rf" (?:{kinds})(?:-start)?\(", program)), "a collective of several arrays"
    return found


def lowered_ring(degree: int, length: int, *, value_dim: int = 8, dtype: str = "float32") -> jax.stages.Lowered:
    """The forward and backward pass of one layer: 2 rows, 4 heads over 2 kv heads of 8 dims."""
    mesh = make_mesh(MeshConfig(context_inner=degree), jax.devices()[:degree])
    spec = jax.NamedSharding(mesh, jax.P(None, ("context_outer", "context_inner")))
    arrays = [
        jax.ShapeDtypeStruct((2, length, heads, head_dim), dtype, sharding=spec)
        for heads, head_dim in ((4, 8), (2, 8), (2, value_dim), (4, value_dim))
    ]
    with jax.set_mesh(mesh):
        return ring(masks.causal(), tokens_of(False, length, length), arrays).lower(*arrays)


def test_the_compiled_program_sends_what_the_docstring_says():
    degree, batch_size, length, kv_heads = 4, 2, 4096, 2
    program = lowered_ring(degree, length).compile().as_text()
    found = collectives(program)
    kv_bytes = batch_size * length // degree * kv_heads * (8 + 8) * 4  # float32 inputs: b = 4
    permutes = [(dtype, size) for kind, dtype, size in found if kind == "collective-permute"]
    # Forward, backward, and the gradients: P - 1, P - 1 and P.
    assert permutes == [("f32", kv_bytes)] * (3 * degree - 2)
    others = [(kind, dtype, size) for kind, dtype, size in found if kind != "collective-permute"]
    # Positions and segment ids, once: one row here.
    assert all(kind == "all-gather" and dtype == "s32" and size == 4 * length for kind, dtype, size in others)
    assert len(others) <= 2
    assert f"{length},{length}" not in program


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("degree", [2, 4, 8])
def test_transfers_are_the_permutes_of_the_program(degree, dtype, monkeypatch):
    """Of the program before it is compiled, which has the dtypes: XLA's CPU compiler widens bfloat16 permutes."""
    monkeypatch.setattr(ring_module, "MAX_UNROLLED_HOPS", degree)  # every hop is written out, none is in a loop
    program = lowered_ring(degree, 96, value_dim=24, dtype=dtype).as_text()
    size_of = {"f32": 4, "bf16": 2}
    sent = [
        int(np.prod([int(n) for n in dims.split("x")[:-1]])) * size_of[dims.split("x")[-1]]
        for dims in re.findall(r"collective_permute.*: \(tensor<([\w]+)>\)", program)
    ]
    setting = AttentionSharding().setting(masks.causal(), degree=degree, q_len=96, kv_len=96, num_kv_heads=2)
    transfers = ring_module.Ring().transfers(setting, batch_size=2, key_dim=8, value_dim=24, dtype=dtype)

    def stated(phase):
        return sorted(t.num_bytes for t in transfers if t.phase == phase for _ in range(t.count))

    assert {t.kind for t in transfers} == {"collective-permute"}
    assert sent[: degree - 1] == stated("forward")
    assert sorted(sent[degree - 1 :]) == stated("backward")
    assert sum(t.total_bytes for t in transfers) == sum(sent)

"""Each strategy equals attention on one device, forward and every gradient, for every layout and mask it serves."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import Attention, AttentionSharding, MeshConfig, make_mesh, masks
from longctx.context_parallel import Layout, sharded_attention, sharded_schedule
from longctx.context_parallel import halo as halo_module
from longctx.context_parallel import ring as ring_module
from longctx.context_parallel.config import STRATEGIES
from longctx.context_parallel.layout import permute, unpermute
from longctx.context_parallel.strategy import StrategyName
from pallas_kernels import BlockSizes, Tokens, blockwise_attention
from pallas_kernels.blockwise import api as blockwise_api
from pallas_kernels.blockwise import xla
from pallas_kernels.mask_patterns import Table
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
    "wide_window": (masks.sliding_window(left=40) & masks.documents(), True),
    "both_ways": (masks.sliding_window(left=5, right=3) & masks.documents(), True),
    "ahead": (masks.sliding_window(left=0, right=6) & masks.documents(), True),
    "empty_rows": (masks.causal(offset=-40), False),
    "not_window": (masks.causal() & ~masks.sliding_window(left=10), False),
}
LAYOUTS = {
    "contiguous": Layout(name="contiguous"),
    "zigzag": Layout(name="zigzag"),
    "striped": Layout(name="striped"),
    "striped_by_4": Layout(name="striped", stripe_size=4),
}
SPARSE_MASKS = {
    "sinks_window": masks.causal() & (masks.sink_tokens(4) | masks.sliding_window(left=9)),
    "global_tokens": masks.global_tokens(4) | masks.sliding_window(left=9, right=9),
    "neighborhood": masks.neighborhood((8, 12), (1, 2)),
    "chunked": masks.causal() & masks.chunked(16) & masks.documents(),
    "per_head": masks.causal() & masks.per_head(masks.sliding_window(left=20), masks.strided(3, block=8)),
}
NAMES = ("out", "dq", "dk", "dv")
OF_TWO_LEVELS = ("usp", "double_ring")
# On any device; ring_dma, on TPUs alone, is in test_ring_dma.py.
ONE_LEVEL = [name for name in STRATEGIES if name not in (*OF_TWO_LEVELS, "ring_dma")]
QUICK = {  # what CI runs, beside a cover of the matrix of features; the rest is slow
    ("ring", "causal", "zigzag", 4),
    ("ring", "documents_window", "zigzag", 8),
    ("all_gather", "both_ways", "zigzag", 4),
    ("ulysses", "documents_window", "striped_by_4", 2),
    ("halo", "both_ways", "zigzag", 8),
}


def every_case():
    for case in itertools.product(ONE_LEVEL, MASKS, LAYOUTS, (2, 4, 8)):
        strategy, name, layout, degree = case
        if refusal(strategy, name, layout, degree) is None:
            yield pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id="-".join(map(str, case)))


def refusal(strategy, name, layout, degree):
    setting = AttentionSharding(layout=LAYOUTS[layout]).setting(
        MASKS[name][0], degree=degree, q_len=LENGTH, kv_len=LENGTH, num_heads=8, num_kv_heads=2
    )
    return STRATEGIES[strategy].refusal(setting)


def inputs(q_len=LENGTH, kv_len=LENGTH, num_heads=8, num_kv_heads=2, value_dim=8, batch_size=2, dtype="float32"):
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


def sharded(mask, tokens, arrays, sharding, *, prebuilt=True, **options):
    """Attention over the mesh in scope, on arrays and tokens in the layout's order."""
    batch_size, q_len, kv_len = *arrays[0].shape[:2], arrays[1].shape[1]

    def attend(q, k, v):
        schedule = None
        if prebuilt:
            lengths = dict(batch_size=batch_size, q_len=q_len, kv_len=kv_len)
            schedule = sharded_schedule(mask, tokens, **lengths, block_sizes=SIZES, sharding=sharding)
        return sharded_attention(
            q, k, v, mask=mask, tokens=tokens, schedule=schedule, block_sizes=SIZES, sharding=sharding, **options
        )

    return with_gradients(attend)


def tokens_of(packed, q_len=LENGTH, kv_len=LENGTH):
    if packed:
        return jax.tree.map(jnp.asarray, packed_tokens(ROWS, LENGTH))
    q, kv = (jnp.arange(n, dtype=jnp.int32)[None] for n in (q_len, kv_len))
    return Tokens(q_positions=q, kv_positions=kv)


def assert_equals_one_device(mask, tokens, arrays, mesh_shape, sharding, *, dtype="float32", **options):
    want = on_one_device(mask, tokens, [x.astype("float32") for x in arrays], **options)
    degree = mesh_shape.get("context_outer", 1) * mesh_shape.get("context_inner", 1)
    q_order, kv_order = (sharding.layout.order(x.shape[1], degree) for x in arrays[:2])
    orders = (q_order, kv_order, kv_order, q_order)
    permuted_tokens = Tokens(
        q_positions=permute(tokens.q_positions, q_order),
        kv_positions=permute(tokens.kv_positions, kv_order),
        q_segment_ids=None if tokens.q_segment_ids is None else permute(tokens.q_segment_ids, q_order),
        kv_segment_ids=None if tokens.kv_segment_ids is None else permute(tokens.kv_segment_ids, kv_order),
    )
    mesh = make_mesh(MeshConfig(**mesh_shape), jax.devices()[: int(np.prod(list(mesh_shape.values())))])
    with jax.set_mesh(mesh):
        got = sharded(mask, permuted_tokens, arrays, sharding, **options)(
            *(permute(x, order) for x, order in zip(arrays, orders, strict=True))
        )
        jax.block_until_ready(got)
    for name, x, y, order in zip(NAMES, got, want, (q_order, q_order, kv_order, kv_order), strict=True):
        assert x.dtype == dtype
        assert_close(name, unpermute(np.asarray(x, np.float32), order), y, dtype)


def how(strategy, layout="zigzag"):
    return AttentionSharding(strategy=strategy, layout=LAYOUTS[layout])


@pytest.mark.parametrize(("strategy", "name", "layout", "degree"), list(every_case()))
def test_every_mask_layout_and_degree(strategy, name, layout, degree):
    """Two devices have no hop between the first and the last, four are unrolled, eight go round in a loop."""
    mask, packed = MASKS[name]
    assert_equals_one_device(mask, tokens_of(packed), inputs(), {"context_inner": degree}, how(strategy, layout))


def test_the_quick_cases_are_served():
    assert {case[:4] for case in QUICK} <= {param.values for param in every_case()}


def some_slow(cases, quick) -> list:
    """The cases, all but the quick ones marked slow."""
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("strategy", "name"),
    some_slow(
        [
            *itertools.product(("ring", "all_gather"), SPARSE_MASKS),
            *itertools.product(("ulysses",), [name for name in SPARSE_MASKS if name != "per_head"]),
            ("halo", "chunked"),
        ],
        {("halo", "chunked")},
    ),
)
def test_sparse_masks(strategy, name):
    """Positions are data: a pattern needs no layout of its own, and heads that differ are whole on each device."""
    layout = "contiguous" if strategy == "halo" else "zigzag"
    mesh_shape = {"data": 2, "context_inner": 4}
    assert_equals_one_device(SPARSE_MASKS[name], tokens_of(False), inputs(), mesh_shape, how(strategy, layout))


MESHES = {
    "beside_data_and_tensor": {"data": 2, "context_inner": 2, "tensor": 2},
    "two_context_axes": {"fsdp": 2, "context_outer": 2, "context_inner": 2},
    "eight": {"context_outer": 2, "context_inner": 4},
}


@pytest.mark.parametrize(
    ("strategy", "mesh"),
    some_slow(
        itertools.product(ONE_LEVEL, MESHES),
        {("ulysses", "beside_data_and_tensor"), ("halo", "two_context_axes")},
    ),
)
def test_beside_other_axes(strategy, mesh):
    mask, packed = MASKS["documents_window" if strategy == "halo" else "documents"]
    layout = "contiguous" if mesh == "eight" else "zigzag"
    assert_equals_one_device(mask, tokens_of(packed), inputs(), MESHES[mesh], how(strategy, layout))


@pytest.mark.parametrize(
    ("strategy", "name", "q_len"),
    some_slow(
        itertools.product(("ring", "all_gather", "ulysses"), ("full", "window"), (32, 96)),
        {("ring", "full", 32)},
    ),
)
def test_queries_and_keys_of_other_lengths(strategy, name, q_len):
    mask, kv_len = MASKS[name][0], {32: 96, 96: 32}[q_len]
    arrays, tokens = inputs(q_len, kv_len), tokens_of(False, q_len, kv_len)
    assert_equals_one_device(mask, tokens, arrays, {"context_inner": 4}, how(strategy))


OPTIONS = {
    "mqa": (dict(num_kv_heads=1), {}),
    "value_dim": (dict(num_kv_heads=4, value_dim=24), {}),
    "soft_cap": ({}, dict(logits_soft_cap=2.0)),
    "bfloat16": (dict(dtype="bfloat16"), {}),
}


@pytest.mark.parametrize(
    ("strategy", "name"),
    some_slow(
        itertools.product(ONE_LEVEL, OPTIONS),
        {("ulysses", "mqa")},
    ),
)
def test_heads_options_and_dtypes(strategy, name):
    shapes, options = OPTIONS[name]
    mask, packed = MASKS["documents_window" if strategy == "halo" else "documents"]
    dtype = shapes.get("dtype", "float32")
    assert_equals_one_device(
        mask, tokens_of(packed), inputs(**shapes), {"context_inner": 4}, how(strategy), dtype=dtype, **options
    )


TWO_LEVELS = {f"{o}x{i}": {"context_outer": o, "context_inner": i} for o, i in ((2, 2), (2, 4), (4, 2))}
ONE_OF_TWO = {f"{o}x{i}": {"context_outer": o, "context_inner": i} for o, i in ((1, 4), (4, 1))}


@pytest.mark.parametrize(
    ("strategy", "mesh", "name", "layout"),
    some_slow(
        [
            *itertools.product(OF_TWO_LEVELS, TWO_LEVELS, MASKS, LAYOUTS),
            *itertools.product(OF_TWO_LEVELS, ONE_OF_TWO, ("documents_window",), LAYOUTS),
        ],
        {
            ("usp", "2x4", "documents", "zigzag"),
        },
    ),
)
def test_two_levels(strategy, mesh, name, layout):
    """Of usp one group is ulysses, and groups of one device are a ring; of double_ring both are a ring."""
    mask, packed = MASKS[name]
    arrays = inputs(num_kv_heads=4, value_dim=24)
    assert_equals_one_device(mask, tokens_of(packed), arrays, (TWO_LEVELS | ONE_OF_TWO)[mesh], how(strategy, layout))


TWO_BY_TWO = TWO_LEVELS["2x2"]
BESIDE_TWO_LEVELS = {
    "tensor": ("documents", TWO_BY_TWO | {"tensor": 2}, dict(num_kv_heads=4), {}),
    "data": ("both_ways", TWO_BY_TWO | {"data": 2}, {}, {}),
    "bfloat16": ("documents", TWO_BY_TWO, dict(dtype="bfloat16"), {}),
    "soft_cap": ("causal", TWO_BY_TWO, {}, dict(logits_soft_cap=2.0)),
    "fewer_queries": ("full", TWO_BY_TWO, dict(q_len=32), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", OF_TWO_LEVELS)
@pytest.mark.parametrize("name", BESIDE_TWO_LEVELS)
def test_two_levels_beside_other_axes_and_options(strategy, name):
    mask, mesh, shapes, options = BESIDE_TWO_LEVELS[name]
    mask, packed = MASKS[mask]
    tokens = tokens_of(packed, shapes.get("q_len", LENGTH))
    dtype = shapes.get("dtype", "float32")
    assert_equals_one_device(mask, tokens, inputs(**shapes), mesh, how(strategy), dtype=dtype, **options)


@pytest.mark.slow
def test_documents_that_are_bounded_are_a_window():
    """No document of these rows is longer than 12, so a halo serves them without a window of their own."""
    tokens = jax.tree.map(jnp.asarray, packed_tokens(((12, 1, 12, 9), (3, 12, 12)), 48))
    sharding = AttentionSharding(strategy="halo", layout=LAYOUTS["contiguous"], max_document_length=12)
    mask = masks.causal() & masks.documents()
    assert_equals_one_device(mask, tokens, inputs(48, 48), {"context_inner": 4}, sharding)


@pytest.mark.parametrize(
    "strategy", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("ring", "all_gather")), "ulysses", "halo"]
)
def test_positions_default_to_the_whole_sequence(strategy):
    """Without positions a shard must not count from its own first token; and a schedule may be built on the way."""
    arrays = inputs()
    mask = masks.sliding_window(left=30, right=2)
    want = on_one_device(mask, Tokens(), arrays)
    with jax.set_mesh(make_mesh(MeshConfig(context_inner=4, data=2))):
        got = sharded(mask, Tokens(), arrays, how(strategy, "contiguous"), prebuilt=False)(*arrays)
        for name, x, y in zip(NAMES, got, want, strict=True):
            assert_close(name, x, y, "float32")


def test_ulysses_tells_the_op_that_tokens_are_in_order(monkeypatch):
    told = []

    def forward(*args, tokens, **kwargs):
        told.append(tokens)
        return xla.forward(*args, tokens=tokens, **kwargs)

    monkeypatch.setitem(blockwise_api.FORWARD, "xla", forward)
    arrays = inputs()[:3]
    mask = masks.causal() & masks.documents()
    ids = jnp.zeros((1, LENGTH), jnp.int32)
    with jax.set_mesh(make_mesh(MeshConfig(context_inner=4, data=2))):
        for tokens in (Tokens(), Tokens.self_attention(None, ids)):
            attend = lambda *qkv, tokens=tokens: sharded_attention(  # noqa: E731
                *qkv, mask=mask, tokens=tokens, sharding=how("ulysses", "contiguous")
            )
            jax.eval_shape(attend, *arrays)
    assert told[0] == Tokens() and told[1].q_segment_ids.shape == (1, LENGTH)


def test_axes_of_another_mesh():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("sp",), axis_types=auto, devices=jax.devices()[:4])
    arrays = inputs()
    want = on_one_device(masks.causal(), Tokens(), arrays)
    with jax.set_mesh(mesh):
        sharding = AttentionSharding(sequence=("sp",), strategy="ulysses")
        got = with_gradients(
            lambda q, k, v: sharded_attention(q, k, v, mask=masks.causal(), tokens=Tokens(), sharding=sharding)
        )(*arrays)
        for name, x, y in zip(NAMES, got, want, strict=True):
            assert_close(name, x, y, "float32")


def test_the_strategies_are_those_that_a_config_may_name():
    assert tuple(STRATEGIES) == StrategyName.__args__
    assert all(strategy.name == name for name, strategy in STRATEGIES.items())


@pytest.mark.parametrize("field", ["strategy", "window_strategy"])
def test_a_strategy_that_is_not_there_is_refused(field):
    unchecked = getattr(AttentionSharding.__init__, "__wrapped__", AttentionSharding.__init__)
    with pytest.raises(
        ValueError, match=f"AttentionSharding: {field}='star', wanted one of ring, ring_dma, all_gather"
    ):
        unchecked(object.__new__(AttentionSharding), **{field: "star"})


def test_a_bound_on_documents_is_a_number_of_tokens():
    with pytest.raises(ValueError, match="max_document_length=0, wanted None or a number of tokens >= 1"):
        AttentionSharding(max_document_length=0)


def test_a_window_may_have_a_strategy_of_its_own():
    sharding = AttentionSharding(strategy="all_gather", window_strategy="halo")
    window, documents = masks.sliding_window(left=7), masks.documents()
    assert sharding.strategy_for(window & documents).name == "halo"
    assert sharding.strategy_for(masks.causal() & documents).name == "all_gather"
    assert sharding.strategy_for(masks.sink_tokens(4) | window).name == "all_gather"
    assert AttentionSharding(strategy="ulysses").strategy_for(window).name == "ulysses"


REFUSALS = [
    (
        "ring_dma",
        Table(np.eye(2, dtype=bool), block_q=48, block_kv=48),
        {},
        "mask Table.* its pair test must be arithmetic.* choose strategy=ring",
    ),
    ("halo", masks.causal() & masks.documents(), {}, "sees back without bound; add a window, bound the documents"),
    ("halo", masks.sliding_window(left=3, right=None) & masks.documents(), {}, "sees ahead without bound"),
    (
        "halo",
        masks.sliding_window(left=3),
        {},
        r"positions, which may start anew .* add & documents\(\), leave positions",
    ),
    ("halo", masks.sliding_window(left=13) & masks.documents(), {}, "at most a chunk of 12 tokens far, got 13; choose"),
    ("halo", masks.sliding_window(left=3), dict(kv_len=48), "that are the same tokens, got T=96, S=48; use ring"),
    ("halo", masks.sliding_window(left=3), dict(layout=None), "which tokens a device holds; name the layout, or use"),
    ("halo", masks.sliding_window(left=3), dict(layout=LAYOUTS["striped"]), "got layout=striped; choose contiguous or"),
    (
        "halo",
        masks.predicate(lambda *pair: pair[2] <= pair[3], uses_segments=True) & masks.sliding_window(left=3),
        dict(has_positions=False),
        "masks that keep to documents or read no segment ids",
    ),
    (
        "ulysses",
        masks.causal(),
        dict(num_heads=6, num_kv_heads=2),
        "splits 6 query heads over 4 devices, wanted a mult",
    ),
    (
        "ulysses",
        masks.causal(),
        dict(num_heads=12, num_kv_heads=6),
        "6 kv heads over 4 devices, wanted a multiple or a",
    ),
    ("ulysses", masks.per_head(masks.causal(), masks.full()), {}, "splits the heads, and the mask .* differs between"),
    (
        "usp",
        masks.causal(),
        {},
        r"needs two mesh axes .* name two in AttentionSharding\(sequence=...\), or use ring or",
    ),
    ("usp", masks.causal(), dict(inner_degree=4), "splits 2 kv heads over the 4 devices of a group, wanted a multiple"),
    (
        "usp",
        masks.causal(),
        dict(inner_degree=2, num_heads=7),
        r"7 query heads over the 2 devices .* \(context_inner\) smaller, or use ring",
    ),
    (
        "usp",
        masks.per_head(masks.causal(), masks.full()),
        dict(inner_degree=2),
        "splits the heads, and the mask .* differs between",
    ),
    (
        "double_ring",
        masks.causal(),
        {},
        r"needs two mesh axes .* name two in AttentionSharding\(sequence=...\), or use ring",
    ),
]


@pytest.mark.parametrize(("strategy", "mask", "fields", "message"), REFUSALS)
def test_what_a_strategy_does_not_serve_it_refuses_in_a_sentence(strategy, mask, fields, message):
    fields = dict(degree=4, q_len=LENGTH, kv_len=LENGTH, num_heads=8, num_kv_heads=2, layout=LAYOUTS["zigzag"]) | fields
    sharding = AttentionSharding(layout=fields.pop("layout"))
    reason = STRATEGIES[strategy].refusal(sharding.setting(mask, **fields))
    assert reason is not None and reason.startswith(strategy) and "\n" not in reason
    assert re.search(message, reason), reason


def test_a_refusal_is_raised_where_the_call_is_made():
    arrays, tokens = inputs(), tokens_of(False)
    lengths = dict(batch_size=2, q_len=LENGTH, kv_len=LENGTH)
    sharding = how("halo")
    with jax.set_mesh(make_mesh(MeshConfig(context_inner=4, data=2))):
        with pytest.raises(NotImplementedError, match="sharded_attention: halo reads a window off positions"):
            sharded_attention(*arrays[:3], mask=masks.sliding_window(left=3), tokens=tokens, sharding=sharding)
        with pytest.raises(NotImplementedError, match="sharded_attention: halo reads a window off positions"):
            sharded_schedule(masks.sliding_window(left=3), tokens, **lengths, sharding=sharding)
        with pytest.raises(ValueError, match="positions=None with layout=zigzag, wanted those of the permuted tokens"):
            sharded_attention(*arrays[:3], mask=masks.causal(), tokens=Tokens(), sharding=how("ring"))


def test_lengths_must_split_over_the_ring():
    arrays = inputs(q_len=90)
    with (
        jax.set_mesh(make_mesh(MeshConfig(context_inner=4, data=2))),
        pytest.raises(
            ValueError, match="T=90 does not split over the 4 devices of mesh axes .* a multiple of 4; pad it to"
        ),
    ):
        sharded_attention(*arrays[:3], mask=masks.causal(), tokens=Tokens())


def test_lengths_must_suit_the_layout():
    arrays, ids = inputs(q_len=92), jnp.zeros((1, 96), jnp.int32)
    tokens = Tokens(q_positions=ids[:, :92], kv_positions=ids)
    with (
        jax.set_mesh(make_mesh(MeshConfig(context_inner=4, data=2))),
        pytest.raises(ValueError, match="T=92 does not split over the 4 devices .* which takes a multiple of 8; pad"),
    ):
        sharded_attention(*arrays[:3], mask=masks.causal(), tokens=tokens, sharding=how("all_gather"))


def test_a_wrong_hop_fails(monkeypatch):
    """The suite can fail: gradients that stay where they were computed are told apart."""
    send = ring_module.Route.send

    def never_sent(self, x, stride):
        return send(self, x, stride) if x.dtype != jnp.float32 else x

    monkeypatch.setattr(ring_module.Route, "send", never_sent)
    mask, packed = MASKS["documents"]
    with pytest.raises(AssertionError):
        assert_equals_one_device(
            mask, tokens_of(packed), inputs(dtype="bfloat16"), {"context_inner": 4}, how("ring"), dtype="bfloat16"
        )


def test_a_wrong_halo_fails(monkeypatch):
    """The suite can fail: one token too few is told apart."""
    span = halo_module.slot_span
    monkeypatch.setattr(halo_module, "slot_span", lambda setting: span(setting)._replace(left=6))
    mask, packed = MASKS["documents_window"]
    with pytest.raises(AssertionError):
        assert_equals_one_device(mask, tokens_of(packed), inputs(), {"context_inner": 4}, how("halo"))


@pytest.mark.parametrize(("tensor", "degree"), [(2, 4), (1, 8)])
def test_own_heads(tensor, degree):
    """What a device of ulysses is given of one entry a head are those of the heads that it attends with."""
    heads = jnp.arange(16, dtype=jnp.int32)
    with jax.set_mesh(make_mesh(MeshConfig(context_inner=degree, tensor=tensor))):
        axes = ("context_outer", "context_inner")
        setting = AttentionSharding().setting(masks.causal(), degree=degree, axes=axes, q_len=96, kv_len=96)

        def own(strategy):
            return jax.shard_map(
                lambda x: STRATEGIES[strategy].own_heads(setting, x),
                in_specs=jax.P("tensor"),
                out_specs=jax.P(("tensor", *axes) if strategy == "ulysses" else "tensor"),
                check_vma=False,
            )(heads)

        np.testing.assert_array_equal(own("ulysses"), heads)
        np.testing.assert_array_equal(own("ring"), heads)


def test_a_layer_is_told_its_strategy():
    """One layer on somebody's mesh, chosen by name: it moves what the strategy says and equals the layer alone."""
    mesh = jax.make_mesh((4,), ("sp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    window = masks.sliding_window(left=5)
    sharding = AttentionSharding(sequence=("sp",), strategy="halo", layout=Layout())
    x = jax.random.normal(jax.random.key(0), (1, 32, 16))
    layers = [Attention(16, num_heads=4, mask=window, sharding=s, rngs=nnx.Rngs(0)) for s in (None, sharding)]
    want = layers[0](x)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda layer, x: layer(x))
        assert_close("y", run(layers[1], x), want, "float32")
        program = run.lower(layers[1], x).compile().as_text()
    assert "collective-permute" in program and "all-gather" not in program

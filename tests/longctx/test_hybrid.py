"""Models of softmax and recurrent layers in one layout equal one device, and change the order of tokens as stated."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import (
    AttentionConfig,
    AttentionSharding,
    LightningConfig,
    LinearConfig,
    Mamba2Config,
    MeshConfig,
    ModelConfig,
    RetentionConfig,
    TransformerLM,
    cross_entropy,
    make_mesh,
    masks,
)
from longctx.context_parallel import Layout, Relayout, balanced_order, relayout
from longctx.context_parallel.layout import permute
from pallas_kernels.testing import packed_tokens, relative_errors

LENGTH, DIM, VOCAB = 128, 16, 19
PACKED = packed_tokens(((50, 1, 30, 40), (128,)), LENGTH)  # the first row is filled up with padding
MASK = masks.causal() & masks.documents()
LAYOUTS = {
    "contiguous": Layout(name="contiguous"),
    "zigzag": Layout(name="zigzag"),
    "striped": Layout(name="striped"),
    "striped_by_2": Layout(name="striped", stripe_size=2),
    "balanced": Layout(name="balanced", chunk_size=1),
}
MIXERS = {
    "softmax": AttentionConfig(num_heads=4, num_kv_heads=2),
    "linear": LinearConfig(num_heads=2),
    "retention": RetentionConfig(num_heads=2),
    "lightning": LightningConfig(num_heads=2, lrpe=True),
    "mamba2": Mamba2Config(num_heads=2, state_dim=8, head_dim=8),
}
EIGHT = {"context_outer": 4, "context_inner": 2}


def model_of(pattern, *, num_layers=None, **options):
    mixers = {name: MIXERS[name] for name in dict.fromkeys((*pattern, options.get("edge_mixer") or pattern[0]))}
    return ModelConfig(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=num_layers or len(pattern),
        mlp_dim=16,
        mixers=mixers,
        pattern=pattern,
        dtype="float32",
        **options,
    )


def order_of(layout, degree, strategy="ring"):
    """Of each row."""
    if layout.is_of_rows and degree > 1:
        return balanced_order(MASK, PACKED, layout, strategy, degree=degree)[0]
    return np.tile(layout.order(LENGTH, degree), (2, 1))


def batch_in(order):
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, VOCAB, (2, LENGTH)).astype(np.int32) for name in ("tokens", "targets")}
    batch |= {"positions": PACKED.q_positions, "segment_ids": PACKED.q_segment_ids}
    batch["weights"] = (rng.random((2, LENGTH)) * (PACKED.q_segment_ids >= 0)).astype(np.float32)
    return {name: jnp.asarray(permute(x, order)) for name, x in batch.items()}


def loss_and_gradients(config, batch, sharding=None):
    graphdef, params = nnx.split(TransformerLM(config, sharding=sharding, rngs=nnx.Rngs(0)))

    def loss(params, batch):
        model = nnx.merge(graphdef, params)
        logits = model(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        sums = cross_entropy(logits, batch["targets"], batch["weights"])
        return sums.nll_sum / sums.weight_sum

    return jax.jit(jax.value_and_grad(loss)), params, batch


def by_name(result):
    value, gradients = jax.device_get(result)
    named = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(gradients)}
    return {"loss": value} | named


@functools.cache
def on_one_device(config):
    step, params, batch = loss_and_gradients(config, batch_in(order_of(Layout(), 1)))
    return by_name(step(params, batch))


def over_devices(config, layout, mesh_shape, *, strategy="ring"):
    """The loss and every gradient by name, and the compiled program."""
    degree = mesh_shape.get("context_outer", 1) * mesh_shape.get("context_inner", 1)
    mesh = make_mesh(MeshConfig(**mesh_shape), jax.devices()[: int(np.prod(list(mesh_shape.values())))])
    with jax.set_mesh(mesh):
        sharding = AttentionSharding(strategy=strategy, layout=layout)
        step, params, batch = loss_and_gradients(config, batch_in(order_of(layout, degree, strategy)), sharding)
        tokens = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), ("context_outer", "context_inner")))
        batch = jax.device_put(batch, tokens)
        program = step.lower(params, batch).compile()
        return by_name(jax.block_until_ready(program(params, batch))), program.as_text()


def assert_equals_one_device(config, layout, mesh_shape, **options):
    """Returns the compiled program."""
    (got, program), want = over_devices(config, layout, mesh_shape, **options), on_one_device(config)
    assert got.keys() == want.keys()
    for name, x in got.items():
        rms, greatest = relative_errors(name, x, want[name])
        assert rms < 2e-5 and greatest < 5e-5, f"{name}: {rms:.2g}, {greatest:.2g}"
    return program


def all_to_alls(program):
    """Of a compiled program, under the relayout's name: numbers of all-to-alls by bytes that a device sends."""
    found = collections.Counter()
    for result, name in re.findall(r"= (\S.*?) all-to-all(?:-start)?\(.*?op_name=\"([^\"]*)\"", program):
        shapes = re.findall(r"f32\[([\d,]*)\]", result)
        if shapes and re.search(rf"\b{relayout.RELAYOUT_SCOPE}\b", name):
            found[sum(4 * int(np.prod([int(n) for n in dims.split(",")])) for dims in shapes) * 7 // 8] += 1
    return found


def slowly(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


EVERY = ("linear", "softmax", "retention", "lightning", "softmax", "mamba2")


@pytest.mark.parametrize(
    ("layout", "pattern", "strategy"),
    [
        slowly("zigzag", ("linear", "softmax"), "all_gather"),
        slowly("balanced", ("linear", "softmax"), "all_gather"),
        *(slowly(layout, EVERY, "ring") for layout in LAYOUTS),
        *(slowly(layout, ("softmax", "mamba2"), "ring") for layout in ("striped", "striped_by_2")),
    ],
)
def test_a_hybrid_model_over_eight_devices_equals_one(layout, pattern, strategy):
    """Loss and every gradient, with packed documents and padding; and its program changes the order as stated.

    Forward and backward, in layouts of runs never.
    """
    config, layout = model_of(pattern), LAYOUTS[layout]
    program = assert_equals_one_device(config, layout, EIGHT, strategy=strategy)
    stated = collections.Counter()
    for transfer in relayout.transfers(layout, rows=2, seq_len=LENGTH, dim=DIM, degree=8, dtype=jnp.float32):
        stated[transfer.num_bytes] += config.num_relayouts * transfer.count
    assert all_to_alls(program) == stated
    of_rows = layout.name in ("striped", "balanced")
    assert stated == ({2 * LENGTH // 8 * DIM * 4 * 7 // 8: 2 * config.num_relayouts} if of_rows else {})
    assert ("all-to-all" in program) == of_rows
    if strategy == "ring":
        assert not re.search(rf"f32\[[\d,]*\b{LENGTH},{DIM}\b", program), "tokens of the whole row"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["striped", "balanced"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_at_the_ends_and_beside_other_axes(layout, remat):
    config = model_of(("linear", "softmax", "retention"), num_layers=9, edge_layers=1, edge_mixer="mamba2", remat=remat)
    mesh_shape = {"data": 2, "context_inner": 2, "tensor": 2}
    assert_equals_one_device(config, LAYOUTS[layout], mesh_shape, strategy="all_gather")


# What is sent.


@pytest.mark.parametrize(
    ("pattern", "num_layers", "edges", "number"),
    [
        (("softmax",), 4, {}, 0),
        (("linear",), 4, {}, 2),
        (("linear", "softmax"), 4, {}, 4),
        (("linear", "linear", "softmax", "linear"), 8, {}, 1 + 2 * 2 + 1),
        (("softmax", "linear"), 5, {}, 4),  # the last repetition is cut short
        (("softmax", "linear"), 6, {"edge_layers": 1, "edge_mixer": "mamba2"}, 2 + 4 + 2),
    ],
)
def test_tokens_change_their_order_where_the_kinds_meet(pattern, num_layers, edges, number):
    assert model_of(pattern, num_layers=num_layers, **edges).num_relayouts == number


# A relayout alone.


def relayout_of(order, positions, segment_ids, layout, mesh_shape):
    degree = mesh_shape["context_inner"]
    mesh = make_mesh(MeshConfig(**mesh_shape), jax.devices()[:degree])
    x = np.random.default_rng(0).normal(size=(2, LENGTH, 3)).astype(np.float32)

    def run(x, positions, segment_ids):
        to = Relayout.of(AttentionSharding(layout=layout), batch_size=2, positions=positions, segment_ids=segment_ids)
        in_runs = to.in_runs(x)
        return in_runs, to.in_layout(in_runs), to.positions, to.segment_ids

    with jax.set_mesh(mesh):
        arrays = (jnp.asarray(permute(a, order)) for a in (x, positions, segment_ids))
        return x, *jax.device_get(jax.block_until_ready(jax.jit(run)(*arrays)))


@pytest.mark.parametrize("layout", ["balanced", "striped_by_2"])
def test_there_and_back(layout):
    layout = LAYOUTS[layout]
    order = order_of(layout, 4)
    x, in_runs, back, positions, segment_ids = relayout_of(
        order, PACKED.q_positions, PACKED.q_segment_ids, layout, {"context_inner": 4}
    )
    is_token = PACKED.q_segment_ids >= 0  # chunks of padding may change places
    np.testing.assert_array_equal(in_runs[is_token], x[is_token])
    np.testing.assert_array_equal(back, permute(x, order))
    np.testing.assert_array_equal(positions[is_token], PACKED.q_positions[is_token])
    np.testing.assert_array_equal(segment_ids, PACKED.q_segment_ids)


def test_rows_whose_documents_do_not_follow_each_other_are_nan():
    layout = LAYOUTS["balanced"]
    segment_ids = PACKED.q_segment_ids.copy()
    segment_ids[0, :50] = 7  # the first document comes after those that it stands before
    _, in_runs, *_ = relayout_of(order_of(layout, 4), PACKED.q_positions, segment_ids, layout, {"context_inner": 4})
    assert np.isnan(in_runs[0]).all() and np.isfinite(in_runs[1]).all()


def test_what_does_not_split_is_refused():
    sharding = AttentionSharding(layout=LAYOUTS["striped_by_2"])
    message = "need runs of neighbouring tokens, which 64 tokens in layout=striped over 8 .* are a multiple of 128"
    sizes = dict(heads_split=1, ring_size=8, sharding=sharding)
    assert re.search(message, MIXERS["linear"].refusal(DIM, seq_len=64, **sizes))
    assert MIXERS["linear"].refusal(DIM, seq_len=128, **sizes) is None
    with jax.set_mesh(make_mesh(MeshConfig(context_inner=8))):
        with pytest.raises(ValueError, match=f"Relayout: layers of a state {message}"):
            Relayout.of(sharding, batch_size=1, positions=jnp.zeros((1, 64), jnp.int32), segment_ids=None)
        with pytest.raises(ValueError, match="Relayout: got positions=None with layout=striped, wanted those of the"):
            Relayout.of(sharding, batch_size=1, positions=None, segment_ids=None)
        in_runs = AttentionSharding(layout=LAYOUTS["zigzag"])
        assert Relayout.of(in_runs, batch_size=1, positions=None, segment_ids=None) is None
    assert Relayout.of(sharding, batch_size=1, positions=None, segment_ids=None) is None

"""The memory formulas: exact where they say so, and what was read off programs that XLA compiled for TPU v5e."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from longctx import AttentionConfig, MeshConfig, ModelConfig, TransformerLM, make_mesh
from longctx.sharding import batch_sharding
from train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from train.planning.formulas import host_memory_by_formula, memory_by_formula, parameter_count, peak_bytes
from train.state import abstract_model, abstract_state
from train.step import TrainingConfig, make_train_step

MODEL = ModelConfig(
    vocab_size=32,
    dim=16,
    num_layers=3,
    mlp_dim=24,
    mixers={
        "local": AttentionConfig(num_heads=4, num_kv_heads=2, window=8),
        "global": AttentionConfig(num_heads=2, head_dim=24),
    },
    pattern=("local", "global"),
    remat="full",
)
LARGE = ModelConfig(
    vocab_size=32768,
    dim=1024,
    num_layers=4,
    mlp_dim=3072,
    mixers={"attention": AttentionConfig(num_heads=8, num_kv_heads=2)},
    pattern=("attention",),
)
SCHEDULE = make_schedule(OptimizerConfig(), total_steps=4)
OPTIMIZER = make_optimizer(OptimizerConfig(), schedule=SCHEDULE)
RING = MeshConfig(context_inner=8)
MIB = 2**20


def build(model):
    return lambda rngs: TransformerLM(model, rngs=rngs)


def memory(model, mesh, *, rows, seq_len, loss="plain", **options):
    mesh = make_mesh(mesh)
    state = abstract_state(build(model), OPTIMIZER, mesh)
    return memory_by_formula(model, state, mesh_sizes=mesh.shape, rows=rows, seq_len=seq_len, loss=loss, **options)


@pytest.mark.slow
def test_parameters_optimizer_and_batch_are_the_arguments_of_the_step():
    rows, length, accumulate_steps = 4, 64, 2
    axes = MeshConfig(fsdp=2, context_inner=2, tensor=2)
    sizes = memory(MODEL, axes, rows=rows, seq_len=length, accumulate_steps=accumulate_steps)
    mesh = make_mesh(axes)
    state = abstract_state(build(MODEL), OPTIMIZER, mesh)
    training = TrainingConfig(steps=4, batch_size=accumulate_steps * rows, accumulate_steps=accumulate_steps)
    step = make_train_step(abstract_model(build(MODEL))[0], state, OPTIMIZER, SCHEDULE, training, mesh)

    def struct(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, len(shape)))

    shape = (training.batch_size, length)
    batch = {
        **{name: struct(*shape, dtype=jnp.int32) for name in ("tokens", "targets", "positions", "segment_ids")},
        "loss_weights": struct(*shape, dtype=jnp.float32),
        "num_bytes": struct(training.batch_size, dtype=jnp.float32),
    }
    with jax.set_mesh(mesh):
        arguments = step.lower(state, batch, None).compile().memory_analysis().argument_size_in_bytes
    counters = sum(x.size * x.dtype.itemsize for x in (state.step, state.rng, state.skipped_steps))
    assert arguments == sizes["parameters"] + sizes["optimizer"] + sizes["batch"] + counters


def test_parameter_count():
    _, params = abstract_model(build(MODEL))
    layers = 2 * (16 * 4 * (4 + 2 + 2 + 4)) + 16 * 24 * 8 + 3 * (3 * 16 * 24 + 2 * 16)
    assert parameter_count(params) == 32 * 16 + layers + 16


def test_order_of_the_parts():
    assert list(memory(MODEL, RING, rows=1, seq_len=64)) == [
        "parameters",
        "optimizer",
        "gradients",
        "batch",
        "saved activations",
        "layer at work",
        "logits",
        "context parallelism",
    ]


@pytest.mark.parametrize(("remat", "mib"), [("full", 128), ("dots", 1216), ("none", 2368)])
def test_saved_activations_are_the_stacks_of_the_compiled_program(remat, mib):
    """Sizes of the arrays [num_periods, ...] that its loop over the layers carries, compiled for v5e:2x4.

    Of `none` 3904 MiB were compiled when four more arrays of the MLP's hidden dim were kept.
    """
    sizes = memory(dataclasses.replace(LARGE, remat=remat), RING, rows=1, seq_len=128 * 1024)
    assert sizes["saved activations"] == mib * MIB


@pytest.mark.parametrize(
    ("remat", "vocab_size", "mib"),
    [
        ("full", 32768, 3475),
        ("dots", 32768, 4564),
        ("full", 1024, 1227),
        ("dots", 1024, 2243),
    ],
)
def test_peak_is_near_the_compilers(remat, vocab_size, mib):
    """Peaks of programs that jax 0.11.2 compiled for v5e:2x4: at the logits, or with few of them at a layer."""
    model = dataclasses.replace(LARGE, remat=remat, vocab_size=vocab_size)
    assert peak_bytes(memory(model, RING, rows=1, seq_len=128 * 1024)) == pytest.approx(mib * MIB, rel=0.1)


def test_layers_without_a_loop_keep_less():
    """No float32 copies of what norms read. On one GPU a model of 24 x 2048 took 69.1 GiB, 70.3 by formula."""
    by_loop = dataclasses.replace(LARGE, remat="none")
    loop, none = (
        memory(model, RING, rows=1, seq_len=128 * 1024)["saved activations"]
        for model in (by_loop, dataclasses.replace(by_loop, scan_layers=False))
    )
    assert loop - none == 4 * 16 * 1024 * (4 * 4 * 1024 - 2 * 2 * 1024)


@pytest.mark.parametrize("mesh", [RING, MeshConfig(data=2, fsdp=2, tensor=2)], ids=["ring", "data_fsdp_tensor"])
def test_less_is_saved_the_more_is_recomputed(mesh):
    full, dots, none = (
        memory(dataclasses.replace(MODEL, remat=remat), mesh, rows=4, seq_len=64) for remat in ("full", "dots", "none")
    )
    assert full["saved activations"] < dots["saved activations"] < none["saved activations"]
    assert peak_bytes(full) < peak_bytes(dots) < peak_bytes(none)


def test_what_each_axis_splits():
    model = dataclasses.replace(LARGE, mixers={"attention": AttentionConfig(num_heads=8)}, remat="none")
    norms = 4 * 1024 * (2 * model.num_layers + 1)  # float32, whole on every device

    def of(**axes):
        return memory(model, MeshConfig(**axes), rows=8, seq_len=8 * 1024)

    data, fsdp, context, tensor = of(data=8), of(fsdp=8), of(context_inner=8), of(tensor=8)
    assert all(x["parameters"] - norms == (data["parameters"] - norms) // 8 for x in (fsdp, context, tensor))
    assert data["saved activations"] == fsdp["saved activations"] == context["saved activations"]
    assert data["logits"] == fsdp["logits"] == context["logits"] == tensor["logits"] + data_table(model) * 7 // 8
    assert [x["context parallelism"] for x in (data, fsdp, tensor)] == [0, 0, 0]
    # Per kv head and dim of a key, a device's tokens: two of bfloat16 and two of float32, and as many of a value.
    assert context["context parallelism"] == 8 * 1024 * 8 * 128 * 2 * (2 * 2 + 2 * 4) + 8 * 8 * 8 * 1024


def data_table(model):
    """Bytes of the table in the compute dtype."""
    return 2 * model.vocab_size * model.dim


def test_accumulation_holds_a_second_gradient():
    once, twice, thrice = (memory(MODEL, RING, rows=1, seq_len=64, accumulate_steps=n) for n in (1, 2, 3))
    assert 2 * once["gradients"] == twice["gradients"] == thrice["gradients"]
    assert 3 * once["batch"] == thrice["batch"]


def test_the_logits_are_gone_when_a_layer_is_at_work():
    parts = {"parameters": 5, "layer at work": 4, "logits": 6, "context parallelism": 3}
    assert peak_bytes(parts) == 5 + 4 + 3
    assert peak_bytes(parts | {"logits": 9}) == 5 + 9


def test_tensors_by_name_are_those_of_the_compiled_program():
    """24 layers of 16,384 tokens, of which a step compiled for one H100 keeps 17.25 GiB of these, and lse."""
    model = dataclasses.replace(
        LARGE, dim=2048, num_layers=24, mlp_dim=5632, mixers={"attention": AttentionConfig(num_heads=16)}
    )
    mesh, tokens = make_mesh(MeshConfig(), jax.devices()[:1]), dict(rows=4, seq_len=4096)

    def sizes(**remat):
        changed = dataclasses.replace(model, remat=remat)
        state = abstract_state(build(changed), OPTIMIZER, mesh)
        on_device = memory_by_formula(changed, state, mesh_sizes=mesh.shape, **tokens)["saved activations"]
        return on_device, host_memory_by_formula(changed, state, mesh_sizes=mesh.shape, **tokens)["activations"]

    of_value = 24 * 16384 * 2
    everything = sizes(qkv="save", attention="save", mixer_output="save", mlp_hidden="save")
    assert everything == ((2048 + 3 * 2048 + 2048 + 2048 + 2 * 5632) * of_value, 0)
    assert everything[0] == 17.25 * 2**30
    assert sizes(residual="offload", attention="offload", qkv="save") == (3 * 2048 * of_value, 2 * 2048 * of_value)
    assert sizes() == (2048 * of_value, 0)


def test_optimizer_state_is_counted_where_it_lies():
    mesh = make_mesh(MeshConfig(fsdp=8))
    sizes = dict(mesh_sizes=mesh.shape, rows=8, seq_len=64)
    here = abstract_state(build(MODEL), OPTIMIZER, mesh)
    there = abstract_state(build(MODEL), OPTIMIZER, mesh, offload_optimizer=True)
    of_host = host_memory_by_formula(MODEL, there, **sizes)["optimizer"]
    count = 4  # of updates, which stays
    assert memory_by_formula(MODEL, here, **sizes)["optimizer"] == of_host + 2 * count
    assert memory_by_formula(MODEL, there, **sizes)["optimizer"] == 2 * count
    assert host_memory_by_formula(MODEL, here, **sizes) == {"activations": 0, "optimizer": 0}


def test_the_fused_loss_is_near_the_compilers():
    """As test_peak_is_near_the_compilers, full and 32768 ids: jax 0.11.2 compiled 1131 MiB for v5e:2x4."""
    model = dataclasses.replace(LARGE, remat="full", vocab_size=32768)
    options = dict(rows=1, seq_len=128 * 1024)
    assert peak_bytes(memory(model, RING, loss="fused", **options)) == pytest.approx(1131 * MIB, rel=0.15)
    plain, fused, smaller = (
        memory(model, RING, **options, **of_loss)["logits"]
        for of_loss in (dict(loss="plain"), dict(loss="fused"), dict(loss="fused", loss_tile=1024))
    )
    assert smaller < fused < plain / 2


@pytest.mark.parametrize("remat", ["full", "dots", "none"])
def test_a_tiled_mlp_keeps_its_input_alone(remat):
    model, options = dataclasses.replace(LARGE, remat=remat), dict(rows=1, seq_len=128 * 1024)
    by_tiles = memory(dataclasses.replace(model, mlp_tile=2048), RING, **options)
    whole = memory(model, RING, **options)
    saved = {"full": 0, "dots": 2, "none": 2}[remat] * 2 * LARGE.mlp_dim * LARGE.num_layers * 16 * 1024
    assert whole["saved activations"] - by_tiles["saved activations"] == saved
    assert whole["layer at work"] - by_tiles["layer at work"] == 2 * 6 * 3072 * (16 - 2) * 1024 - 4 * 3 * 1024 * 3072

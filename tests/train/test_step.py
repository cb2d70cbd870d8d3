import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import AttentionConfig, LoraConfig, ModelConfig, TransformerLM
from longctx.sharding import MeshConfig, make_mesh
from train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from train.placement import BatchPlacement, one_a_device
from train.state import abstract_model, abstract_state, create_state, frozen, trained
from train.step import TrainingConfig, make_train_step

MESH = MeshConfig(data=2, fsdp=2)


def setup(build, *, mesh=MESH, optimizer=None, is_stochastic=False, **training):
    mesh = make_mesh(mesh, jax.devices()[: math.prod((mesh.data, mesh.fsdp))])
    optimizer_config = optimizer or OptimizerConfig(learning_rate=0.05, weight_decay=0.1, clip_norm=0.5)
    config = TrainingConfig(**{"steps": 10, "batch_size": 8} | training)
    schedule = make_schedule(optimizer_config, total_steps=config.steps)
    optimizer = make_optimizer(optimizer_config, schedule=schedule)
    with jax.set_mesh(mesh):
        state = create_state(build, optimizer, mesh, seed=3, offload_optimizer=optimizer_config.offload)
    abstract = abstract_state(build, optimizer, mesh, offload_optimizer=optimizer_config.offload)
    step = make_train_step(
        abstract_model(build)[0], abstract, optimizer, schedule, config, mesh, is_stochastic=is_stochastic
    )

    def run(state, batch, stop=None):
        rows, length = batch["tokens"].shape
        with jax.set_mesh(mesh):
            flags = None if stop is None else one_a_device(stop, mesh)
            placement = BatchPlacement(mesh, batch_size=rows, order=np.arange(length))
            state, metrics = step(state, placement.place(batch), flags)
            return state, jax.device_get(metrics)

    run.num_compilations = step._cache_size
    return run, state


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("options", [dict(loss_tile=5), dict(loss="plain")], ids=str)
def test_loss_and_gradient_are_weighted_by_tokens(stand_in, make_batch, options):
    """Against a mean over the whole batch, written out and differentiated in one piece."""
    run, state = setup(stand_in, accumulate_steps=2, z_loss=0.01, **options)
    params = jax.device_get(state.params)
    batch = make_batch(0)
    graphdef, _ = abstract_model(stand_in)

    def mean_loss(params):
        model = nnx.merge(graphdef, params)
        logits = model(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        nll = normalizer - jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        weights = batch["loss_weights"]
        z_loss = jnp.sum(weights * 0.01 * normalizer**2) / jnp.sum(weights)
        return jnp.sum(weights * nll) / jnp.sum(weights) + z_loss, (jnp.sum(weights * nll), z_loss)

    (_, (nll, z_loss)), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params)
    _, metrics = run(state, batch)
    np.testing.assert_allclose(metrics["loss"], nll / batch["loss_weights"].sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["z_loss"], z_loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["bits_per_byte"], nll / (math.log(2) * batch["num_bytes"].sum()), rtol=1e-5)
    norm = math.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["tokens"], batch["loss_weights"].sum(), rtol=1e-6)
    assert metrics["finite"] and metrics["skipped_steps"] == 0


@pytest.mark.parametrize("accumulate_steps", [2, 4])
def test_accumulation_does_not_change_the_update(stand_in, make_batch, accumulate_steps):
    mesh = MeshConfig(data=2)
    whole, state = setup(stand_in, mesh=mesh)
    parts, parts_state = setup(stand_in, mesh=mesh, accumulate_steps=accumulate_steps)
    # Adam divides by the gradient's size, so entries near zero would magnify rounding: compare after two
    # real steps.
    for seed in range(2):
        state, metrics = whole(state, make_batch(seed))
        parts_state, parts_metrics = parts(parts_state, make_batch(seed))
        close(parts_metrics, metrics, rtol=2e-5)
    close(parts_state.params, state.params, rtol=1e-4, atol=2e-5)


def test_microbatches_of_zero_weight_count_nothing(stand_in, make_batch):
    """Rows 0, 2, 4, 6 (the first of two microbatches) without weight: the update of the other four rows
    alone."""
    mesh = MeshConfig(data=2)
    batch = make_batch(1)
    batch["loss_weights"][::2] = 0
    others = {name: array[1::2] for name, array in batch.items()}
    both, state = setup(stand_in, mesh=mesh, accumulate_steps=2)
    alone, alone_state = setup(stand_in, mesh=mesh, batch_size=4)
    state, metrics = both(state, batch)
    alone_state, alone_metrics = alone(alone_state, others)
    np.testing.assert_allclose(metrics["loss"], alone_metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], alone_metrics["grad_norm"], rtol=1e-6)
    close(state.params, alone_state.params, rtol=1e-4, atol=2e-5)


def test_mesh_does_not_change_the_update(stand_in, make_batch):
    one, state = setup(stand_in, mesh=MeshConfig())
    four, four_state = setup(stand_in)
    state, metrics = one(state, make_batch(2))
    four_state, four_metrics = four(four_state, make_batch(2))
    close(four_metrics, metrics, rtol=1e-5)
    close(four_state.params, state.params, rtol=1e-4, atol=2e-5)


@pytest.fixture
def noisy(stand_in):
    """A stand-in that scales its activations by what a key for each row says."""

    class Noisy(stand_in):
        def hidden(self, tokens_BT, *, rngs, **arguments):
            scale_B = 1 + 0.5 * jax.vmap(jax.random.normal)(rngs)
            return super().hidden(tokens_BT, **arguments) * scale_B[:, None, None]

    return Noisy


@pytest.mark.parametrize(
    "changes", [pytest.param({"mesh": MESH}, marks=pytest.mark.slow), {"mesh": MESH, "accumulate_steps": 2}], ids=str
)
def test_what_is_random_depends_on_the_run_the_step_and_the_row_alone(noisy, make_batch, changes):
    """Neither the mesh nor how the batch is cut changes it."""
    one, state = setup(noisy, mesh=MeshConfig(), is_stochastic=True)
    other, other_state = setup(noisy, is_stochastic=True, **{"mesh": MeshConfig()} | changes)
    for _ in range(2):
        state, metrics = one(state, make_batch(2))
        other_state, other_metrics = other(other_state, make_batch(2))
        close(other_metrics, metrics, rtol=1e-5)
    close(other_state.params, state.params, rtol=1e-4, atol=2e-5)


def test_each_step_draws_anew(noisy, make_batch):
    run, state = setup(noisy, mesh=MeshConfig(), is_stochastic=True, optimizer=OptimizerConfig(learning_rate=1e-9))
    drawn = []
    for _ in range(2):
        state, metrics = run(state, make_batch(2))
        drawn.append(float(metrics["loss"]))
    assert abs(drawn[0] - drawn[1]) > 1e-3, "the parameters hardly move, so what is drawn differs"


def test_learning_rate_of_the_step_at_hand(stand_in, make_batch):
    run, state = setup(stand_in, optimizer=OptimizerConfig(learning_rate=0.5, warmup_steps=5))
    for wanted in (0.1, 0.2):
        state, metrics = run(state, make_batch(0))
        np.testing.assert_allclose(metrics["learning_rate"], wanted, rtol=1e-6)


def test_processes_agree_on_stopping_by_a_metric(stand_in, make_batch):
    run, state = setup(stand_in)
    for stop in (True, False):
        state, metrics = run(state, make_batch(0), stop)
        assert metrics["stop"] == stop
    assert "stop" not in run(state, make_batch(0))[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_step_is_not_applied_but_counted(stand_in, make_batch, bad):
    run, state = setup(stand_in, optimizer=OptimizerConfig(learning_rate=0.5, warmup_steps=5))
    state, _ = run(state, make_batch(0))
    before = jax.device_get((state.params, state.opt_state))
    batch = make_batch(1)
    batch["loss_weights"][3, 2] = bad
    state, metrics = run(state, batch)
    assert not metrics["finite"] and metrics["skipped_steps"] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.opt_state)), before)
    assert (int(state.step), int(state.skipped_steps)) == (2, 1)
    state, metrics = run(state, make_batch(2))
    assert metrics["finite"] and metrics["skipped_steps"] == 1
    np.testing.assert_allclose(metrics["learning_rate"], 0.2, rtol=1e-6)  # a skipped step is no update


def test_a_batch_without_weight_gives_no_gradient(stand_in, make_batch):
    run, state = setup(stand_in)
    batch = make_batch(0)
    batch["loss_weights"][:] = 0
    _, metrics = run(state, batch)
    assert metrics["finite"] and metrics["loss"] == 0 and metrics["grad_norm"] == 0


def test_bfloat16_parameters_keep_float32_moments(stand_in, make_batch):
    def build(rngs):
        return stand_in(rngs, param_dtype=jnp.bfloat16)

    run, state = setup(build)
    state, metrics = run(state, make_batch(0))
    assert state.params["embedding"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
    assert metrics["finite"]


def test_the_state_is_donated_and_keeps_its_shardings(stand_in, make_batch):
    run, state = setup(stand_in)
    new, _ = run(state, make_batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    new, _ = run(new, make_batch(1))
    assert run.num_compilations() == 1
    mesh = make_mesh(MESH, jax.devices()[:4])
    config = OptimizerConfig()
    optimizer = make_optimizer(config, schedule=make_schedule(config, total_steps=2))
    planned = abstract_state(stand_in, optimizer, mesh)
    assert planned.params["embedding"].sharding.spec == planned.opt_state[1].mu["embedding"].sharding.spec
    assert not planned.params["embedding"].sharding.is_fully_replicated
    jax.tree.map(lambda leaf, plan: leaf.sharding.is_equivalent_to(plan.sharding, leaf.ndim) or 1 / 0, new, planned)


def test_variables_that_are_no_parameters_are_refused(stand_in):
    class Counter(stand_in):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.count = nnx.Variable(jnp.zeros(()))

    with pytest.raises(ValueError, match=r"no nnx.Param \(count\)"):
        abstract_model(Counter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: got 0, wanted 1 or more"),
        ({"z_loss": -1.0}, "z_loss: got -1.0, wanted 0 or more"),
        ({"loss_tile": 0}, "loss_tile: got 0, wanted null or a number of tokens >= 1"),
        ({"loss": "plain", "loss_tile": 8}, "loss_tile: got 8 with loss=plain, which has no tiles; leave it out"),
        (
            {"batch_size": 6, "accumulate_steps": 4},
            "accumulate_steps: got 4, which does not divide batch_size=6",
        ),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{"steps": 1, "batch_size": 8} | settings)


def test_optimizer_state_on_the_host_changes_nothing(stand_in, make_batch):
    """The same bits, and the moments stay there; counts are the device's."""
    states = {}
    for offload in (False, True):
        run, state = setup(stand_in, optimizer=OptimizerConfig(learning_rate=0.05, offload=offload))
        for step in range(2):
            state, _ = run(state, make_batch(step))
        states[offload] = state
    jax.tree.map(np.testing.assert_array_equal, states[True], states[False])
    kinds = {leaf.ndim > 0: leaf.sharding.memory_kind for leaf in jax.tree.leaves(states[True].opt_state)}
    assert kinds == {True: "pinned_host", False: "device"}


@pytest.mark.slow
def test_of_a_model_with_adapters_nothing_else_changes(make_batch):
    config = ModelConfig(
        vocab_size=16,  # of the batches
        dim=8,
        num_layers=2,
        mlp_dim=8,
        mixers={"only": AttentionConfig(num_heads=2)},
        pattern=("only",),
        param_dtype="bfloat16",
        lora=LoraConfig(rank=2, alpha=4.0, targets=("q", "down")),
    )
    run, state = setup(lambda rngs: TransformerLM(config, rngs=rngs), accumulate_steps=2)
    before = jax.device_get(state.params)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    num_trained = 2 * (2 * (8 + 8) + 2 * (8 + 8))  # layers, A and B of q, of down
    assert sum(leaf.size for leaf in moments) == 2 * num_trained
    losses = []
    for _ in range(4):
        state, metrics = run(state, make_batch(0))
        losses.append(metrics["loss"])
    after = jax.device_get(state.params)
    jax.tree.map(np.testing.assert_array_equal, frozen(after), frozen(before))
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen(after))} == {jnp.dtype("bfloat16")}
    changed = jax.tree.map(lambda x, y: not np.array_equal(x, y), trained(after), trained(before))
    assert all(jax.tree.leaves(changed)) and losses[-1] < losses[0]

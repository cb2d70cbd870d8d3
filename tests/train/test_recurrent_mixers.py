"""The mixers of a recurrent state in the trainer's step: they learn, and weight decay leaves their vectors alone."""

import jax
import numpy as np
import pytest
from flax import nnx

from longctx import (
    LightningConfig,
    LinearConfig,
    Mamba2Config,
    MeshConfig,
    ModelConfig,
    RetentionConfig,
    TransformerLM,
    make_mesh,
)
from train.optimizer import OptimizerConfig, decayed, make_optimizer, make_schedule
from train.placement import BatchPlacement
from train.state import abstract_model, abstract_state, create_state
from train.step import TrainingConfig, make_train_step

MODEL = ModelConfig(
    vocab_size=16,
    dim=16,
    num_layers=4,
    mlp_dim=16,
    mixers={
        "linear": LinearConfig(num_heads=2),
        "retention": RetentionConfig(num_heads=2),
        "lightning": LightningConfig(num_heads=2, lrpe=True),
        "mamba2": Mamba2Config(num_heads=2, state_dim=8, head_dim=8),
    },
    pattern=("linear", "retention", "lightning", "mamba2"),
    dtype="float32",
)


def build(rngs):
    return TransformerLM(MODEL, rngs=rngs)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_quickly")
def test_a_model_of_every_mixer_learns_in_packed_documents(make_batch):
    mesh, config = make_mesh(MeshConfig(), jax.devices()[:1]), TrainingConfig(steps=8, batch_size=4)
    schedule = make_schedule(OptimizerConfig(learning_rate=0.02, schedule="constant"), total_steps=config.steps)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.02), schedule=schedule)
    batch = make_batch(0, rows=4, length=12)
    with jax.set_mesh(mesh):
        state = create_state(build, optimizer, mesh, seed=3)
        before = jax.device_get(state.params)
        abstract = abstract_state(build, optimizer, mesh)
        step = make_train_step(abstract_model(build)[0], abstract, optimizer, schedule, config, mesh)
        placed = BatchPlacement(mesh, batch_size=4, order=np.arange(12)).place(batch)
        losses = []
        for _ in range(config.steps):
            state, metrics = step(state, placed, None)
            assert metrics["finite"]
            losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    moved = jax.tree.map(lambda old, new: np.any(old != np.asarray(new)), before, state.params)
    stuck = [jax.tree_util.keystr(path) for path, has in jax.tree.leaves_with_path(moved) if not has]
    assert not stuck


def test_weight_decay_leaves_the_vectors_of_a_stacked_layer_alone():
    params = nnx.state(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
    names = {
        path[-1].key if not isinstance(path[-1], jax.tree_util.GetAttrKey) else path[-2].key: is_decayed
        for path, is_decayed in jax.tree.leaves_with_path(decayed(nnx.to_pure_dict(params)))
    }
    assert {name for name, is_decayed in names.items() if not is_decayed} == {
        "scale", "theta", "dt_bias", "a_log", "skip",
    }  # fmt: skip
    assert names["kernel"]

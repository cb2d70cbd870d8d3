"""The mixers of a recurrent state in the trainer's step: they learn, and weight decay leaves their vectors alone."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from longctx import (
    DeltaConfig,
    GatedDeltaConfig,
    GlaConfig,
    LightningConfig,
    LinearConfig,
    Mamba2Config,
    MeshConfig,
    ModelConfig,
    ReglaConfig,
    RetentionConfig,
    TransformerLM,
    make_mesh,
)
from train.config import load_config
from train.optimizer import OptimizerConfig, decayed, make_optimizer, make_schedule
from train.placement import BatchPlacement
from train.state import abstract_model, abstract_state, create_state
from train.step import TrainingConfig, make_train_step

MODEL = ModelConfig(
    vocab_size=16,
    dim=16,
    num_layers=8,
    mlp_dim=16,
    mixers={
        "linear": LinearConfig(num_heads=2),
        "retention": RetentionConfig(num_heads=2),
        "lightning": LightningConfig(num_heads=2, lrpe=True),
        "mamba2": Mamba2Config(num_heads=2, state_dim=8, head_dim=8),
        "gla": GlaConfig(num_heads=2, gate_rank=2),
        "regla": ReglaConfig(num_heads=2, gate_rank=2),
        "delta": DeltaConfig(num_heads=2, feature_map="dpfp", dpfp_order=1, feature_norm="sum"),
        "gated_delta": GatedDeltaConfig(num_heads=2),
    },
    pattern=("linear", "retention", "lightning", "mamba2", "gla", "regla", "delta", "gated_delta"),
    dtype="float32",
)


def build(rngs):
    return TransformerLM(MODEL, rngs=rngs)


@pytest.mark.slow
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


SHRUNK = {
    "gla_1b": ("model.mixers.gla.head_dim=4", "model.mixers.gla.value_dim=8", "model.mixers.gla.num_heads=2"),
    "hybrid_gdn_1b": (
        *("model.mixers.gated_delta.num_heads=2", "model.mixers.gated_delta.head_dim=8"),
        *("model.mixers.softmax.num_heads=2", "model.mixers.softmax.num_kv_heads=1", "model.mixers.softmax.head_dim=8"),
    ),
}
SMALL = ("model.vocab_size=16", "model.dim=16", "model.num_layers=4", "model.mlp_dim=16", "model.dtype=float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SHRUNK))
def test_configs_shrunk_learn_in_packed_documents(name, losses_of_training):
    path = Path(__file__).parents[2] / f"configs/{name}.yaml"
    full, config = load_config(path), load_config(path, [*SMALL, *SHRUNK[name]])
    assert config.model.pattern == full.model.pattern and config.model.remat == "full"
    assert 0.85e9 < num_parameters(full.model) < 1.1e9
    losses = losses_of_training(lambda rngs: TransformerLM(config.model, rngs=rngs))
    assert losses[-1] < 0.8 * losses[0]


def num_parameters(model):
    params = nnx.state(nnx.eval_shape(lambda: TransformerLM(model, rngs=nnx.Rngs(0))), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_weight_decay_leaves_the_vectors_of_a_stacked_layer_alone():
    params = nnx.state(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
    names = {
        path[-1].key if not isinstance(path[-1], jax.tree_util.GetAttrKey) else path[-2].key: is_decayed
        for path, is_decayed in jax.tree.leaves_with_path(decayed(nnx.to_pure_dict(params)))
    }
    assert {name for name, is_decayed in names.items() if not is_decayed} == {
        "scale", "theta", "dt_bias", "a_log", "skip", "bias",
    }  # fmt: skip
    assert names["kernel"]

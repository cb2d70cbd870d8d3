"""The mixer of NSA in the trainer: a config names it, and a model of it learns."""

import jax
import numpy as np
import pytest

from longctx import MeshConfig, ModelConfig, NsaConfig, TransformerLM, make_mesh
from train.config import load_config
from train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from train.placement import BatchPlacement
from train.state import abstract_model, abstract_state, create_state
from train.step import TrainingConfig, make_train_step

MIXER = NsaConfig(
    num_heads=2, num_kv_heads=1, compress_block=2, compress_stride=2, block_size=2, num_blocks=3, window=4,
    implementation="reference",
)  # fmt: skip


def build(rngs):
    config = ModelConfig(
        vocab_size=16, dim=16, num_layers=2, mlp_dim=16, mixers={"nsa": MIXER}, pattern=("nsa",), dtype="float32"
    )
    return TransformerLM(config, rngs=rngs)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_quickly")
def test_a_model_learns_in_packed_documents(make_batch):
    mesh, config = make_mesh(MeshConfig(), jax.devices()[:1]), TrainingConfig(steps=8, batch_size=4)
    schedule = make_schedule(OptimizerConfig(learning_rate=0.02, schedule="constant"), total_steps=config.steps)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.02), schedule=schedule)
    with jax.set_mesh(mesh):
        state = create_state(build, optimizer, mesh, seed=3)
        step = make_train_step(
            abstract_model(build)[0], abstract_state(build, optimizer, mesh), optimizer, schedule, config, mesh
        )
        batch = make_batch(0, rows=4, length=12)
        placed = BatchPlacement(mesh, batch_size=4, order=np.arange(12)).place(batch)
        losses = []
        for _ in range(config.steps):
            state, metrics = step(state, placed, None)
            assert metrics["finite"]
            losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


CONFIG = """
run_dir: runs/nsa
data:
  seq_len: 64
  sources: [{kind: stdlib}]
training: {steps: 1, batch_size: 2}
optimizer: {learning_rate: 0.001}
model:
  dim: 16
  num_layers: 6
  mlp_dim: 16
  mixers:
    sparse: {kind: nsa, num_heads: 2, window: 64}
    full: {kind: attention, num_heads: 2}
  pattern: [sparse]
  edge_layers: 2
  edge_mixer: full
"""


def test_a_config_names_it(tmp_path):
    path = tmp_path / "nsa.yaml"
    path.write_text(CONFIG)
    config = load_config(path, ["model.mixers.sparse.num_blocks=5"])
    assert config.model.mixers["sparse"] == NsaConfig(num_heads=2, window=64, num_blocks=5)
    assert config.model.layers == ("full", "full", "sparse", "sparse", "full", "full")
    with pytest.raises(ValueError, match=r"model.mixers.sparse.block_size: got 40, wanted a multiple of compress_stri"):
        load_config(path, ["model.mixers.sparse.block_size=40"])

"""The mixer of MoBA in the trainer: a config names it, and a model of it learns."""

import pytest

from longctx import MobaConfig, ModelConfig, TransformerLM
from train.config import load_config

MIXER = MobaConfig(num_heads=2, num_kv_heads=1, chunk_size=2, top_k=3, implementation="reference")


def build(rngs):
    config = ModelConfig(
        vocab_size=16, dim=16, num_layers=2, mlp_dim=16, mixers={"moba": MIXER}, pattern=("moba",), dtype="float32"
    )
    return TransformerLM(config, rngs=rngs)


@pytest.mark.slow
def test_a_model_learns_in_packed_documents(losses_of_training):
    losses = losses_of_training(build)
    assert losses[-1] < 0.7 * losses[0]


CONFIG = """
run_dir: runs/moba
data:
  seq_len: 64
  sources: [{kind: stdlib}]
training: {steps: 1, batch_size: 2}
optimizer: {learning_rate: 0.001}
model:
  dim: 16
  num_layers: 2
  mlp_dim: 16
  mixers:
    sparse: {kind: moba, num_heads: 2, chunk_size: 64, top_k: 3}
  pattern: [sparse]
"""


def test_a_config_names_it(tmp_path):
    path = tmp_path / "moba.yaml"
    path.write_text(CONFIG)
    config = load_config(path, ["model.mixers.sparse.top_k=5"])
    assert config.model.mixers == {"sparse": MobaConfig(num_heads=2, chunk_size=64, top_k=5)}
    with pytest.raises(ValueError, match=r"context_parallel: model.mixers.sparse: MoBA .* got strategy=ulysses"):
        load_config(path, ["mesh.context_inner=2", "context_parallel.strategy=ulysses"])

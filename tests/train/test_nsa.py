"""The mixer of NSA in the trainer: a config names it, and a model of it learns."""

import pytest

from longctx import ModelConfig, NsaConfig, TransformerLM
from train.config import load_config

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
def test_a_model_learns_in_packed_documents(losses_of_training):
    losses = losses_of_training(build)
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

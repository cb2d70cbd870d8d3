"""The mixer of MLA in the trainer: a config names it, and a model of it learns."""

from pathlib import Path

import jax
import pytest
from flax import nnx

from longctx import MlaConfig, ModelConfig, TransformerLM
from train.config import load_config

MIXER = MlaConfig(num_heads=2, kv_rank=12, q_rank=10, head_dim=8, rope_dim=4, value_dim=8)
PATH = Path(__file__).parents[2] / "configs/mla_1b.yaml"


def build(rngs):
    config = ModelConfig(
        vocab_size=16, dim=16, num_layers=2, mlp_dim=16, mixers={"mla": MIXER}, pattern=("mla",), dtype="float32"
    )
    return TransformerLM(config, rngs=rngs)


@pytest.mark.slow
def test_a_model_learns_in_packed_documents(losses_of_training):
    losses = losses_of_training(build)
    assert losses[-1] < 0.7 * losses[0]


def test_a_config_names_it():
    config = load_config(PATH, ["model.mixers.mla.q_rank=1536", "model.mixers.mla.window=4096"]).model
    assert config.mixers["mla"] == MlaConfig(num_heads=16, q_rank=1536, window=4096)
    with pytest.raises(ValueError, match=r"model.mixers.mla.rope_dim: got 5, wanted an even number"):
        load_config(PATH, ["model.mixers.mla.rope_dim=5"])


def test_its_config_has_the_parameters_that_it_says():
    model = load_config(PATH).model
    params = nnx.state(nnx.eval_shape(lambda: TransformerLM(model, rngs=nnx.Rngs(0))), nnx.Param)
    assert 0.83e9 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 0.85e9

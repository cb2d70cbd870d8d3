import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.mixers.attention import AttentionConfig
from longctx.model import ModelConfig, TransformerLM
from longctx.sharding import MeshConfig, make_mesh
from train.data import open_tokenizer
from train.sampling import SampleConfig, _read_prompt, limited, sample_text, sample_tokens

CONFIG = ModelConfig(
    vocab_size=257,
    dim=16,
    num_layers=2,
    mlp_dim=32,
    mixers={
        "local": AttentionConfig(num_heads=2, num_kv_heads=1, window=4),
        "global": AttentionConfig(num_heads=2),
    },
    pattern=("local", "global"),
    tie_embeddings=False,
    dtype="float32",
)

PROMPT_BT = np.array([[256, 7, 80, 41, 3]], np.int32)
GREEDY = SampleConfig(num_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def model():
    return TransformerLM(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def split(model):
    graphdef, params = nnx.split(model)
    return graphdef, nnx.to_pure_dict(params)


def test_greedy_sampling_equals_recomputation_without_a_cache(model, split):
    sampled = sample_tokens(*split, PROMPT_BT, jax.random.key(0), GREEDY)
    forward = jax.jit(lambda tokens: model(tokens))
    # Padded to the final length, so that one compilation serves all steps; causal attention does not see the padding.
    tokens = np.zeros((1, 13), np.int32)
    tokens[:, :5] = PROMPT_BT
    for length in range(5, 13):
        tokens[:, length] = np.argmax(forward(jnp.asarray(tokens))[:, length - 1], axis=-1)
    np.testing.assert_array_equal(sampled, tokens[:, 5:])
    assert len(np.unique(sampled)) > 3


def test_one_prompt_on_a_mesh_of_several_devices(split):
    alone = sample_tokens(*split, PROMPT_BT, jax.random.key(0), GREEDY)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        spread = sample_tokens(*split, PROMPT_BT, jax.random.key(0), GREEDY)
    np.testing.assert_array_equal(alone, spread)


@pytest.mark.parametrize("prefill", ["decode", pytest.param("context_parallel", marks=pytest.mark.slow)])
def test_a_prompt_and_its_continuation_split_over_devices(split, prefill):
    alone = sample_tokens(*split, PROMPT_BT, jax.random.key(0), GREEDY)
    with jax.set_mesh(make_mesh(MeshConfig(context_outer=2, context_inner=2), jax.devices()[:4])):
        spread = sample_tokens(
            *split, PROMPT_BT, jax.random.key(0), dataclasses.replace(GREEDY, prefill=prefill)
        ).block_until_ready()
    np.testing.assert_array_equal(alone, spread)


class Recorder:
    """Stands for a model: what it is asked to read, and how."""

    def __init__(self):
        self.calls = []

    def init_cache(self, batch_size, max_length):
        self.calls.append(("init_cache", max_length))

    def prefill(self, tokens, max_length, *, star_block):
        self.calls.append(("prefill", tokens.shape[1], max_length, star_block))

    def decode(self, tokens, cache):
        self.calls.append(("decode", tokens.shape[1]))


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({}, [("init_cache", 13), ("decode", 5)]),
        ({"prefill": "context_parallel"}, [("prefill", 4, 13, None), ("decode", 1)]),
        ({"prefill": "star"}, [("prefill", 4, 13, 2), ("decode", 1)]),
        ({"prefill": "star", "star_block": 1, "query_tokens": 2}, [("prefill", 3, 13, 1), ("decode", 2)]),
        ({"prefill": "star", "query_tokens": 5}, [("init_cache", 13), ("decode", 5)]),
    ],
    ids=str,
)
def test_how_a_prompt_is_read(settings, calls):
    model = Recorder()
    with jax.set_mesh(make_mesh(MeshConfig(context_inner=2), jax.devices()[:2])):
        _read_prompt(model, PROMPT_BT, dataclasses.replace(GREEDY, **settings))
    assert model.calls == calls


@pytest.mark.slow
def test_text_depends_on_the_seed_and_ends_with_the_document(model, split, monkeypatch):
    tokenizer = open_tokenizer("bytes")
    texts = [sample_text(*split, tokenizer, SampleConfig(num_tokens=8, seed=seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    tokens = np.array([[72, 105, tokenizer.end_id, 33]], np.int32)
    monkeypatch.setattr("train.sampling.sample_tokens", lambda *_: tokens)
    assert sample_text(*split, tokenizer, SampleConfig()) == "Hi"


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"top_k": None, "top_p": None}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": None}, [1, 3]),
        ({"top_k": 9, "top_p": None}, [0, 1, 2, 3]),
        ({"top_k": None, "top_p": 0.45}, [1]),
        ({"top_k": None, "top_p": 0.55}, [1, 3]),
        ({"top_k": None, "top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # of the two, token 1 has 5/8 of the probability
    ],
)
def test_limits(limits, kept):
    logits = jnp.log(jnp.array([0.08, 0.5, 0.12, 0.3]))
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(limited(logits, **limits))), kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: got -1.0, wanted 0 or more"),
        ({"top_k": 0}, "top_k: got 0, wanted 1 or more"),
        ({"top_p": 0.0}, "top_p: got 0.0, wanted 0 < top_p <= 1"),
        ({"prefill": "star", "star_block": 0}, "star_block: got 0, wanted 1 or more"),
        ({"star_block": 8}, "star_block: got 8 with prefill=decode, which has no blocks; leave it out or choose"),
        ({"query_tokens": 8}, "query_tokens: got 8 with prefill=decode, where all tokens see the whole prompt; leave"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SampleConfig(**settings)

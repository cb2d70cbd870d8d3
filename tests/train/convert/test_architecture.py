"""Which Hugging Face architecture a model is, and why another is none."""

import dataclasses

import pytest

from longctx import (
    AttentionConfig,
    BiasConfig,
    DeltaConfig,
    LinearRopeScaling,
    Llama3RopeScaling,
    MlaConfig,
    ModelConfig,
    YarnRopeScaling,
)
from train import schema
from train.convert.architecture import config_json
from train.convert.config_json import model_section, parse_family
from train.schema import ConfigError

PLAIN = AttentionConfig(num_heads=4, num_kv_heads=2)


def model(mixer=PLAIN, *others, **options):
    mixers = {f"m{number}": each for number, each in enumerate((mixer, *others))}
    return ModelConfig(
        **(dict(vocab_size=64, dim=32, num_layers=4, mlp_dim=40, mixers=mixers, pattern=tuple(mixers)) | options)
    )


def exported(config, model_type=None):
    return config_json(config, dtype="bfloat16", max_positions=128, special_ids={}, model_type=model_type)


def replaced(**options):
    return dataclasses.replace(PLAIN, **options)


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        (model(), "llama"),
        (
            model(replaced(rope_scaling=Llama3RopeScaling(factor=8.0, original_length=32)), tie_embeddings=False),
            "llama",
        ),
        (model(replaced(dropout=0.1, rope_scaling=LinearRopeScaling(factor=2.0))), "llama"),
        (model(replaced(window=8)), "mistral"),
        (model(dim=36, mixer=replaced(num_heads=8, head_dim=16)), "mistral"),
        (model(replaced(qkv_bias=True)), "qwen2"),
        (model(replaced(qkv_bias=True, window=8), replaced(qkv_bias=True)), "qwen2"),
        (model(replaced(qk_norm=True, rope_scaling=YarnRopeScaling(factor=2.0, original_length=64))), "qwen3"),
        (model(replaced(qk_norm=True), replaced(qk_norm=True, window=4), edge_layers=1, edge_mixer="m0"), "qwen3"),
    ],
)
def test_the_plainest_that_computes_the_same(config, model_type):
    """Read again it has the same layers."""
    content = exported(config)
    assert content["model_type"] == model_type
    family = parse_family(content, source="config.json")
    again = schema.parse(ModelConfig, model_section(family, dtype="bfloat16", source="config.json"))
    layers = [[each.mixers[name].resolved(32) for name in each.layers] for each in (config, again)]
    assert layers[0] == layers[1]
    assert (again.norm_eps, again.tie_embeddings) == (config.norm_eps, config.tie_embeddings)


LEAVE = r"no Hugging Face architecture that is known here has it; train a model without it to hand it on"
REFUSED = {
    "mla": (model(MlaConfig(num_heads=4)), rf"model.mixers.m0.kind: got mla, wanted attention; {LEAVE}"),
    "delta": (model(PLAIN, DeltaConfig(num_heads=4)), rf"model.mixers.m1.kind: got delta, wanted attention; {LEAVE}"),
    "sinks": (model(replaced(sinks=True)), rf"model.mixers.m0.sinks: got True, wanted false; {LEAVE}"),
    "chunk": (model(replaced(chunk=8)), rf"model.mixers.m0.chunk: got 8, wanted null; {LEAVE}"),
    "cap": (model(replaced(logits_soft_cap=30.0)), r"model.mixers.m0.logits_soft_cap: got 30.0, wanted null; "),
    "bias": (
        model(replaced(bias=BiasConfig(kind="alibi"), rope_theta=None)),
        r"model.mixers.m0.bias: got alibi, wanted null; .*\n?model.mixers.m0.rope_theta: got null, wanted a number",
    ),
    "final cap": (model(logits_soft_cap=30.0), r"model.logits_soft_cap: got 30.0, wanted null; "),
    "thetas": (
        model(PLAIN, replaced(rope_theta=500.0)),
        r"model.mixers.m1.rope_theta: got 500.0, wanted 10000.0 as m0 has; layers of the known architectures differ in",
    ),
    "both": (
        model(replaced(qk_norm=True, qkv_bias=True)),
        r"(?s)^model: no Hugging Face architecture that is known here computes what its layers do; train one of these\n"
        r"llama: qkv_bias: got true, wanted false.*qwen2: qk_norm: got true, wanted false, which is how this "
        r"architecture is\nqwen3: qkv_bias: got true, wanted false",
    ),
    "some windows": (
        model(PLAIN, replaced(window=8)),
        r"llama: window: got 8, wanted null: .*\nmistral: window: got layers with and without one, wanted the same",
    ),
    "two windows": (
        model(replaced(window=4, qk_norm=True), replaced(window=8, qk_norm=True)),
        r"(?s)qwen3: window: got \[4, 8\], wanted one size",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_no_architecture_computes(name):
    config, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        exported(config)


def test_an_architecture_that_was_asked_for():
    assert exported(model(), "mistral")["sliding_window"] is None
    with pytest.raises(
        ConfigError,
        match=r"^--architecture: got qwen2, which .*, wanted llama\nqwen2: qkv_bias: got false, wanted true, which is",
    ):
        exported(model(), "qwen2")
    with pytest.raises(
        ConfigError, match=r"wanted mistral\nllama: dim: got 36, wanted a multiple of num_heads=8, which Hugging Face"
    ):
        exported(model(replaced(num_heads=8, head_dim=16), dim=36), "llama")

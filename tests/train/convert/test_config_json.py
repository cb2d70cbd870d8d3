"""What config.json files of published models become, and what is refused of one."""

import pytest

from longctx import ModelConfig
from train import schema
from train.convert.__main__ import main
from train.convert.config_json import model_section, parse_family
from train.schema import ConfigError

# As the models of these names have them, written by transformers 4.
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 152064,
}  # fmt: skip
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 12288, "max_position_embeddings": 32768, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip


def section(content, **changes):
    family = parse_family(content | changes, source="config.json")
    return model_section(family, dtype="bfloat16", source="config.json")


def mixer(content, **changes):
    (only,) = section(content, **changes)["mixers"].values()
    return only


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (
            LLAMA_31_8B,
            dict(
                num_heads=32,
                num_kv_heads=8,
                rope_theta=500000.0,
                rope_scaling=dict(kind="llama3", factor=8.0, original_length=8192, low_turns=1.0, high_turns=4.0),
            ),
        ),
        (MISTRAL_7B, dict(num_heads=32, num_kv_heads=8, rope_theta=10000.0, window=4096)),
        (QWEN25_7B, dict(num_heads=28, num_kv_heads=4, rope_theta=1000000.0, qkv_bias=True)),
        (QWEN3_8B, dict(num_heads=32, num_kv_heads=8, head_dim=128, rope_theta=1000000.0, qk_norm=True)),
    ],
    ids=["llama 3.1", "mistral", "qwen 2.5", "qwen 3"],
)
def test_published_models(content, wanted):
    assert mixer(content) == {"kind": "attention"} | wanted
    model = schema.parse(ModelConfig, section(content))
    assert (model.vocab_size, model.dim, model.num_layers) == (
        content["vocab_size"], content["hidden_size"], content["num_hidden_layers"]
    )  # fmt: skip
    assert model.norm_eps == content["rms_norm_eps"] and not model.tie_embeddings and len(model.pattern) == 1


def test_layers_with_and_without_windows():
    some = section(QWEN25_7B, use_sliding_window=True, max_window_layers=20)
    assert some["pattern"] == ["attention"] * 20 + ["window"] * 8 and some["mixers"]["window"]["window"] == 131072
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 10
    turns = section(QWEN25_7B, use_sliding_window=True, layer_types=kinds[:28])
    assert turns["pattern"] == ["window", "window", "attention"]
    assert schema.parse(ModelConfig, turns).layers[-1] == "window"


def test_what_may_be_left_out():
    old = {key: value for key, value in LLAMA_31_8B.items() if key not in ("num_key_value_heads", "rope_theta")}
    assert mixer(old | {"rope_scaling": {"type": "linear", "factor": 2.0}}) == {
        "kind": "attention", "num_heads": 32, "rope_theta": 10000.0, "rope_scaling": {"kind": "linear", "factor": 2.0},
    }  # fmt: skip
    yarn = mixer(QWEN3_8B, rope_scaling={"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5})["rope_scaling"]
    assert yarn == dict(
        kind="yarn", factor=4.0, original_length=32768, low_turns=1.0, high_turns=32.0, attention_factor=1.5
    )
    assert mixer(QWEN3_8B, attention_dropout=0.1)["dropout"] == 0.1


REFUSED = [
    (dict(model_type="gemma2"), r"model_type: got 'gemma2', wanted one of llama, mistral, qwen2, qwen3; only their"),
    (dict(hidden_act="gelu"), r'hidden_act: got "gelu", wanted "silu"; `model:` cannot say another, convert a model'),
    (dict(attention_bias=True), r"attention_bias: got true, wanted false"),
    (dict(mlp_bias=True), r"mlp_bias: got true, wanted false"),
    (dict(partial_rotary_factor=0.5), r"partial_rotary_factor: got 0.5, wanted null or 1.0"),
    (dict(quantization_config={"bits": 4}), r'quantization_config: got {"bits": 4}, wanted null'),
    (dict(sliding_window=1024), r"sliding_window: got 1024: input should be None"),
    (dict(layer_types=["sliding_attention"]), r"layer_types.0: got \"sliding_attention\": input should be 'full"),
    (
        dict(logits_scaling=8.0),
        r"logits_scaling: got 8.0, a field that is not known of model_type llama; if it does not change what is "
        r"computed, take it out of the file",
    ),
    (dict(hidden_size="4096"), r'hidden_size: got "4096": input should be a valid integer'),
    (dict(rms_norm_eps=None), r"rms_norm_eps: got null: input should be a valid number"),
    (
        dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        r"rope_scaling: got rope_type 'dynamic', wanted default, linear, llama3 or yarn; `model:` cannot say another",
    ),
    (
        dict(rope_scaling={"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}),
        r'rope_scaling: got {"mscale": 0.7}, which rope_type yarn has no use for here',
    ),
    (
        dict(rope_scaling={"rope_type": "yarn", "factor": 2.0, "truncate": False}),
        r'rope_scaling: got {"truncate": false}, which rope_type yarn has no use',
    ),
    (
        dict(rope_scaling=None, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        r'rope_parameters: got {"partial_rotary_factor": 0.5}, which rope_type default has no use',
    ),
    (
        dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        r"got rope_scaling and rope_parameters, wanted one of them; leave one out",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[" ".join(changes) for changes, _ in REFUSED])
def test_fields_that_are_refused(changes, message):
    with pytest.raises(ConfigError, match=f"^config.json: {message}"):
        section(LLAMA_31_8B, **changes)


def test_windows_that_contradict_each_other():
    with pytest.raises(ConfigError, match=r"layer_types: got 1 of them, wanted one for each of num_hidden_layers=28"):
        section(QWEN25_7B, layer_types=["full_attention"])
    with pytest.raises(ConfigError, match=r"layer_types: got sliding_attention, wanted use_sliding_window and"):
        section(QWEN25_7B, layer_types=["sliding_attention"] * 28)


def test_all_problems_are_told_at_once():
    content = {key: value for key, value in QWEN25_7B.items() if key != "hidden_size"}
    with pytest.raises(ConfigError) as refusal:
        section(content, hidden_act="gelu", dual_chunk_attention_config={})
    assert [line.split(":")[1] for line in str(refusal.value).splitlines()] == [
        " hidden_act", " hidden_size", " dual_chunk_attention_config"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json: no such file; pass the folder of a Hugging Face model"),
        ("{", "config.json: not readable as JSON: "),
        ("[]", "config.json: got a list, wanted an object with keys; download it again"),
    ],
)
def test_files_that_are_no_config(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert main(["from-hf", str(tmp_path), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err

"""Hugging Face models in the trainer: their logits, their loss, and what is refused of their files."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from train import files
from train.__main__ import main as train_main
from train.checkpoint.__main__ import main as checkpoint_main
from train.convert import from_hf as from_hf_module
from train.convert.__main__ import main
from train.metrics import read_records
from train.plain_yaml import read_mapping

NAMES = ("llama", "llama3", "llama_linear", "mistral", "qwen2", "qwen2_windows", "qwen3", "qwen3_yarn")


def edit(folder, change):
    """Applies a change to the tensors of a folder with one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_hugging_face(golden, converted, logits_of, name):
    _, tokens, wanted = golden(name)
    np.testing.assert_allclose(logits_of(converted(name), tokens), wanted, rtol=1e-4, atol=2e-5)


def test_the_config_to_start_from(converted):
    folder = converted("qwen2_windows")
    run = read_mapping(folder / "run.yaml")
    assert run["init_from"] == str(folder)
    shared = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "rope_theta": 10000.0, "qkv_bias": True}
    assert run["model"] == {
        "vocab_size": 64,
        "dim": 32,
        "num_layers": 2,
        "mlp_dim": 40,
        "mixers": {"attention": shared, "window": shared | {"window": 8}},
        "pattern": ["attention", "window"],
        "tie_embeddings": False,
        "norm_eps": 1e-6,
        "dtype": "float32",
        "param_dtype": "float32",
    }
    assert "contexts of up to 128 tokens" in (folder / "run.yaml").read_text()


@pytest.mark.parametrize("name", ["llama3", pytest.param("qwen2_windows", marks=pytest.mark.slow)])
def test_a_run_starts_at_the_loss_of_hugging_face(golden, converted, tmp_path, name):
    """Over two devices; rows that one document fills, which begin with the end id, as the tokens of the logits do."""
    _, tokens, logits = golden(name)
    for number, row in enumerate(tokens):
        np.save(tmp_path / f"tokens{number}.npy", row[1:])
    overrides = {
        "run_dir": tmp_path / "run",
        "data.tokenizer": "ids:64",
        "data.seq_len": 40,
        "data.cache_dir": tmp_path / "cache",
        "data.held_out_fraction": 0,
        "data.sources": f"[{{kind: tokens, files: ['{tmp_path}/tokens?.npy']}}]",
        "training": "{steps: 1, batch_size: 2}",
        "optimizer": "{learning_rate: 0.001}",
        "mesh.context_inner": 2,
        "model.dtype": "float32",
        "distributed.virtual_cpu_devices": 2,
        "sample.num_tokens": 0,
        "metrics": "{tensorboard: false, plot: false}",
    }
    assert train_main([str(converted(name) / "run.yaml"), *(f"{key}={value}" for key, value in overrides.items())]) == 0
    targets = np.concatenate([tokens[:, 1:], np.full((2, 1), 63)], axis=1)
    log_probabilities = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
    wanted = -np.take_along_axis(log_probabilities, targets[..., None], axis=-1).mean()
    assert read_records(tmp_path / "run" / "metrics.jsonl")[-1]["loss"] == pytest.approx(wanted, rel=1e-5)


def test_the_checkpoint_is_listed_and_verified(converted, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    folder = converted("llama3")
    assert checkpoint_main(["verify", str(folder)]) == 0
    assert "whole: 11 arrays read" in capsys.readouterr().out
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    shutil.rmtree(damaged / "checkpoints" / "0" / "params")
    assert checkpoint_main(["ls", str(damaged)]) == 0
    assert "it holds no params" in capsys.readouterr().out


def test_tokenizer_files_come_along(copied, tmp_path, capsys):
    folder = copied("llama")
    (folder / "generation_config.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    assert main(["from-hf", str(folder), str(tmp_path / "out")]) == 0
    tokenizer = tmp_path / "out" / "tokenizer"
    assert read_mapping(tmp_path / "out" / "run.yaml")["data"] == {"tokenizer": str(tokenizer)}
    names = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in tokenizer.iterdir()) == names
    assert json.loads((tokenizer / names[0]).read_text()) == {"bos_token_id": 1, "eos_token_id": 63}
    assert "data.tokenizer" not in capsys.readouterr().out


def test_what_old_and_tied_checkpoints_hold_beside(copied, tmp_path):
    """Frequencies of rotary positions, and the embedding once more as the output projection."""
    folder = copied("llama3")

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    edit(folder, change)
    assert main(["from-hf", str(folder), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rope_scaling={"type": "linear"}), "but mixers.attention.rope_scaling.factor: missing; wanted float"),
        (dict(num_attention_heads=6), "but mixers.attention: head_dim: dim=32 is not a multiple of num_heads=6"),
    ],
)
def test_values_that_model_refuses(copied, tmp_path, capsys, fields, message):
    folder = copied("llama", rope_parameters=None, head_dim=None, **fields)
    assert main(["from-hf", str(folder), str(tmp_path / "out")]) == 2
    assert f"{folder / 'config.json'}: `model:` would be made of it, {message}" in capsys.readouterr().err


def renamed(tensors):
    tensors["model.layers.1.mlp.gate.weight"] = tensors.pop("model.layers.1.mlp.gate_proj.weight")


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            renamed,
            [
                "tensors that config.json asks for are missing: model.layers.1.mlp.gate_proj.weight",
                "tensors that config.json has no use for: model.layers.1.mlp.gate.weight",
            ],
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": np.ones(16, ml_dtypes.bfloat16)}),
            ["tensors of another shape than config.json says: model.norm.weight is [16], wanted [32]"],
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": np.ones(32, np.int8)}),
            ["tensors of other dtypes than BF16, F16, F32: model.norm.weight is I8"],
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": np.ones((40, 32), np.float32)}),
            ["the layers of periods.0.mlp.up.kernel (model.layers.0.mlp.up_proj.weight, ...) have several dtypes: "],
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": np.ones((64, 32), ml_dtypes.bfloat16)}),
            ["config.json says tie_word_embeddings, but lm_head.weight is not model.embed_tokens.weight; set"],
        ),
    ],
    ids=["names", "shape", "dtype", "mixed", "tied"],
)
def test_tensors_that_do_not_fit(copied, tmp_path, capsys, change, messages):
    folder = copied("llama3")
    edit(folder, change)
    assert main(["from-hf", str(folder), str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err
    assert all(message in errors for message in messages), errors
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_holds_something(tmp_path, golden, capsys):
    source, *_ = golden("llama3")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert main(["from-hf", str(source), str(tmp_path / "out")]) == 2
    assert "out, which is there and not empty, wanted a new folder; name another" in capsys.readouterr().err
    (tmp_path / "out" / "mine").unlink()
    assert main(["from-hf", str(source), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing(tmp_path, golden, monkeypatch, error):
    source, *_ = golden("llama3")

    def interrupted(*_):
        raise error

    monkeypatch.setattr(from_hf_module, "save_params", interrupted)
    assert main(["from-hf", str(source), str(tmp_path / "out")]) == (130 if error is KeyboardInterrupt else 1)
    assert not any(tmp_path.iterdir())


def test_a_new_folder_is_there_once_it_is_full(tmp_path):
    with files.new_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b", "file"]

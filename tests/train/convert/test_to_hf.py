"""Checkpoints as Hugging Face models: the tensors of those they came from, and adapters merged."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from longctx import AttentionSharding, MeshConfig, make_mesh
from train.__main__ import main as train_main
from train.assemble import model_builder
from train.checkpoint import load_params
from train.config import load_config
from train.convert.__main__ import main
from train.convert.config_json import model_section, parse_family, read_json
from train.convert.safetensors_files import open_weights
from train.state import abstract_model, abstract_params

NAMES = ("llama", "llama3", "llama_linear", "mistral", "qwen2", "qwen2_windows", "qwen3", "qwen3_yarn")


def tensors_of(folder):
    with open_weights(folder) as weights:
        return {name: weights.read(name) for name in weights.names}


def section_of(folder):
    """The `model:` section, with the head dim written out."""
    family = parse_family(read_json(folder / "config.json"), source="config.json")
    section = model_section(family, dtype="float32", source="config.json")
    for mixer in section["mixers"].values():
        mixer.setdefault("head_dim", section["dim"] // mixer["num_heads"])
    return section


def exported(source, output, *options):
    assert main(["to-hf", str(source), str(output), *options]) == 0
    return output


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_gives_the_same_bits(golden, converted, tmp_path, name):
    source, *_ = golden(name)
    back = exported(converted(name), tmp_path / "back")
    wanted, got = tensors_of(source), tensors_of(back)
    assert got.keys() == wanted.keys()
    for tensor, values in wanted.items():
        assert got[tensor].dtype == values.dtype and got[tensor].tobytes() == values.tobytes(), tensor
    before, after = read_json(source / "config.json"), read_json(back / "config.json")
    for field in ("architectures", "model_type", "max_position_embeddings", "hidden_act", "tie_word_embeddings"):
        assert after[field] == before[field]
    assert after["torch_dtype"] == before["dtype"]
    assert section_of(back) == section_of(source)


def test_files_of_a_limited_size_with_an_index(golden, converted, tmp_path, monkeypatch):
    source, *_ = golden("llama")
    monkeypatch.setattr("train.convert.__main__._GB", 20_000)
    back = exported(converted("llama"), tmp_path / "back", "--shard-gb", "1")
    files = sorted(path.name for path in back.glob("*.safetensors"))
    assert files[0] == "model-00001-of-00005.safetensors" and len(files) == 5
    assert all((back / file).stat().st_size < 20_000 + 3_000 for file in files)
    index = read_json(back / "model.safetensors.index.json")
    assert index["metadata"] == {"total_size": 72_320} and set(index["weight_map"].values()) == set(files)
    wanted, got = tensors_of(source), tensors_of(back)
    assert got.keys() == wanted.keys()
    assert all(got[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_another_dtype_architecture_and_length(converted, tmp_path, logits_of, golden):
    options = ("--dtype", "bfloat16", "--architecture", "mistral", "--max-positions", "4096")
    back = exported(converted("llama"), tmp_path / "back", *options)
    config = read_json(back / "config.json")
    assert config["architectures"] == ["MistralForCausalLM"] and config["sliding_window"] is None
    assert config["max_position_embeddings"] == 4096 and config["torch_dtype"] == "bfloat16"
    wanted = tensors_of(golden("llama")[0])
    for name, values in tensors_of(back).items():
        assert values.tobytes() == wanted[name].astype(values.dtype).tobytes() and values.dtype.name == "bfloat16"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer of 64 words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {f"w{number}": number for number in range(63)} | {"</s>": 63}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def adapted(golden, converted, tokenizer, tmp_path_factory):
    """The folder of a run of adapters that started from a converted model."""
    folder = tmp_path_factory.mktemp("adapted")
    _, tokens, _ = golden("qwen3_yarn")
    np.save(folder / "tokens.npy", tokens[:, 1:].reshape(-1))
    overrides = {
        "run_dir": folder / "run",
        "data.tokenizer": tokenizer,
        "data.seq_len": 40,
        "data.cache_dir": folder / "cache",
        "data.held_out_fraction": 0,
        "data.sources": f"[{{kind: tokens, files: ['{folder}/tokens.npy']}}]",
        "training": "{steps: 2, batch_size: 2}",
        "optimizer": "{learning_rate: 0.05, schedule: constant}",
        "model.dtype": "float32",
        "model.lora": "{rank: 2, alpha: 4}",
        "distributed.virtual_cpu_devices": 1,
        "sample.num_tokens": 0,
        "checkpoint.every": 1,
        "metrics": "{tensorboard: false, plot: false}",
    }
    config = converted("qwen3_yarn") / "run.yaml"
    assert train_main([str(config), *(f"{key}={value}" for key, value in overrides.items())]) == 0
    return folder / "run"


def test_adapters_are_merged(adapted, golden, tmp_path, logits_of):
    """The merged model, converted back, has the logits of the adapted one, which are no longer those of its base."""
    _, tokens, before = golden("qwen3_yarn")
    exported(adapted, tmp_path / "hf")
    assert main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "again")]) == 0
    got = logits_of(tmp_path / "again", tokens)
    model = dataclasses.replace(load_config(adapted / "config.yaml").model, vocab_size=64)
    build = model_builder(model, AttentionSharding())
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = load_params(adapted, abstract_params(build, mesh))
        lm = nnx.merge(abstract_model(build)[0], params)
        wanted = np.asarray(jax.jit(lambda lm, tokens: lm(tokens))(lm, jnp.asarray(tokens)))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)
    assert np.abs(got - before).max() > 0.1


def test_a_run_with_its_tokenizer(adapted, tmp_path, capsys):
    back = exported(adapted, tmp_path / "back")
    assert f"step 2 of {adapted} is in {back}: Qwen3ForCausalLM, adapters merged" in capsys.readouterr().out
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in back.iterdir()) == names
    config = read_json(back / "config.json")
    assert config["eos_token_id"] == 63 and config["bos_token_id"] is None and config["max_position_embeddings"] == 40
    assert json.loads((back / "generation_config.json").read_text()) == {"eos_token_id": 63}
    exported(adapted, tmp_path / "bytes", "--tokenizer", "bytes")
    assert "data.tokenizer=bytes has no files, so that a tokenizer is left for you" in capsys.readouterr().out
    first = exported(adapted / "checkpoints", tmp_path / "first", "--step", "1", "--tokenizer", "none")
    assert "has no files" not in capsys.readouterr().out
    assert sorted(path.name for path in first.iterdir()) == ["config.json", "model.safetensors"]
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.any(tensors_of(first)[name] != tensors_of(back)[name])


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--step", "7"], 1, r"--step: got 7, wanted a step that .*checkpoints holds: 1, 2"),
        (["--tokenizer", "nowhere"], 2, r"data.tokenizer: got nowhere, .* say where it is now with --tokenizer"),
        (["--architecture", "llama"], 2, r"llama: qk_norm: got true, wanted false, which is how this architecture is"),
    ],
)
def test_options_that_do_not_fit(adapted, tmp_path, capsys, options, code, message):
    assert main(["to-hf", str(adapted), str(tmp_path / "out"), *options]) == code
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_size_of_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["to-hf", str(tmp_path), str(tmp_path / "out"), "--shard-gb", "0"])
    assert "--shard-gb: got 0, wanted a number >= 1; leave it out" in capsys.readouterr().err


def test_a_folder_without_checkpoints(tmp_path, capsys):
    assert main(["to-hf", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "holds no complete checkpoint; pass a run's folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("d/*", r"checkpoints/0: \w[\w.]* cannot be read: .*; pass another checkpoint"),
        ("_METADATA", r"checkpoints/0: the description of its parameters cannot be read; pass another"),
    ],
)
def test_a_damaged_checkpoint(converted, tmp_path, capfd, damaged, message):
    folder = shutil.copytree(converted("llama3"), tmp_path / "in")
    found = (folder / "checkpoints" / "0" / "params").rglob(damaged)
    max(found, key=lambda path: path.stat().st_size).write_bytes(b"")
    assert main(["to-hf", str(folder), str(tmp_path / "out")]) == 1
    assert re.search(message, capfd.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_goldens_are_small():
    folder = Path(__file__).parents[1] / "huggingface"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1_000_000

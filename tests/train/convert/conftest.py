"""Tiny models that Hugging Face's own code saved, and what is asked of a converted one."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import AttentionSharding, MeshConfig, ModelConfig, make_mesh
from train import schema
from train.assemble import model_builder
from train.checkpoint import load_params
from train.convert.__main__ import main
from train.plain_yaml import read_mapping
from train.state import abstract_model, abstract_params

FOLDER = Path(__file__).parents[1] / "huggingface"  # make.py there made them


@pytest.fixture(scope="session", autouse=True)
def started():
    """JAX starts with the eight devices of tests/conftest.py before a run can ask for fewer."""
    jax.devices()


@pytest.fixture(scope="session")
def golden():
    """golden(name): the folder of a model, its tokens and Hugging Face's logits."""

    def load(name):
        with np.load(FOLDER / name / "golden.npz") as arrays:
            return FOLDER / name, arrays["tokens"], arrays["logits"]

    return load


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """converted(name): the folder that from-hf makes of a model, one for all tests of a process."""
    made = {}

    def convert(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("converted") / name
            assert main(["from-hf", str(FOLDER / name), str(made[name])]) == 0
        return made[name]

    return convert


@pytest.fixture
def copied(tmp_path):
    """copied(name, **fields): a copy of a model's folder, with fields of its config.json changed."""

    def copy(name, **fields):
        folder = shutil.copytree(FOLDER / name, tmp_path / "hf")
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


@pytest.fixture
def logits_of():
    """logits_of(folder, tokens): what the model of a converted folder computes in float32, loaded as a run loads it."""

    def compute(folder, tokens):
        model = schema.parse(ModelConfig, read_mapping(folder / "run.yaml")["model"])
        build = model_builder(dataclasses.replace(model, dtype="float32"), AttentionSharding())
        mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
        with jax.set_mesh(mesh):
            params = load_params(folder, abstract_params(build, mesh))
            run = jax.jit(lambda params, tokens: nnx.merge(abstract_model(build)[0], params)(tokens))
            return np.asarray(run(params, jnp.asarray(tokens)))

    return compute

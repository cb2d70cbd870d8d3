"""Folders of safetensors files that are not whole."""

import json
import shutil

import pytest

from train.checkpoint import CheckpointError
from train.convert.safetensors_files import INDEX, SINGLE, listing, open_weights


@pytest.fixture
def folder(golden, tmp_path):
    """A copy of a model in three files."""
    return shutil.copytree(golden("qwen2_windows")[0], tmp_path / "hf")


def test_every_tensor_of_an_index(folder):
    with open_weights(folder) as weights:
        assert weights.names == json.loads((folder / INDEX).read_text())["weight_map"].keys()
        assert weights.shape("lm_head.weight") == weights.read("lm_head.weight").shape == (64, 32)
        assert weights.dtype("lm_head.weight") == "F32"


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def cut_off(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
            r"model-00002-of-00003.safetensors: no such file, though the index names it; download it again",
        ),
        (cut_off, r"model-00002-of-00003.safetensors: cannot be read as safetensors: .*; download it again"),
        (
            lambda folder: change_index(folder, lambda index: index.update(extra="model-00001-of-00003.safetensors")),
            r"names tensors that its files do not hold: extra; download them again",
        ),
        (
            lambda folder: change_index(folder, lambda index: index.update(extra="../elsewhere.safetensors")),
            r"its weight_map names files elsewhere, wanted files beside it",
        ),
        (
            lambda folder: (folder / INDEX).write_text("{}"),
            r"model.safetensors.index.json: has no weight_map; download it again",
        ),
        (
            lambda folder: (folder / INDEX).unlink(),
            rf"holds neither {SINGLE} nor {INDEX}; pass the folder of a Hugging Face model$",
        ),
    ],
    ids=["missing", "cut off", "index", "outside", "no map", "no index"],
)
def test_files_that_are_not_whole(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        with open_weights(folder):
            pass


def test_files_of_another_format(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\(pytorch_model.bin are of another format: load and save them once"):
        with open_weights(tmp_path):
            pass


def test_long_listings_are_cut():
    assert listing([str(number) for number in range(10)], most=3) == "0, 1, 2 and 7 more"

"""Folders of safetensors files: read a tensor at a time, and written in files of a limited size with an index."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  its import makes "bfloat16" a dtype of NumPy, which safetensors goes by
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from train.checkpoint import CheckpointError
from train.convert.config_json import read_json
from train.files import storage_problem

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


class Weights:
    """Tensors of safetensors files by their names.

    Args:
      files: The open file that holds each.
    """

    def __init__(self, files: Mapping[str, Any]):
        self._files = files

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors calls it: BF16, F16, F32, ..."""
        return self._files[name].get_slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        """A tensor, in memory of its own. Raises: CheckpointError where its file is cut off."""
        try:
            return self._files[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name} cannot be read: {error}; download the files again") from error


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """The tensors of a folder: those of model.safetensors, or of the files that its index names.

    Raises: CheckpointError where a file is missing or broken, or the files do not hold what the index says.
    """
    weight_map = _weight_map(folder)
    names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    files: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            file = stack.enter_context(_opened(folder / name))
            for tensor in file.keys():
                if tensor in files:
                    raise CheckpointError(
                        f"{folder / name}: holds {tensor}, which another of the files holds too; download them again"
                    )
                files[tensor] = file
        absent = sorted((weight_map or {}).keys() - files.keys())
        if absent:
            raise CheckpointError(
                f"{folder / INDEX}: names tensors that its files do not hold: {listing(absent)}; download them again"
            )
        yield Weights(files)


def listing(names: Sequence[str], most: int = 8) -> str:
    """Names for an error, the first few of many."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _weight_map(folder: Path) -> dict[str, str] | None:
    """The file of each tensor; None where one file holds all."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX}: has no weight_map; download it again")
        inside = all(isinstance(name, str) and Path(name).name == name for name in weight_map.values())
        if not inside:
            raise CheckpointError(f"{folder / INDEX}: its weight_map names files elsewhere, wanted files beside it")
        return weight_map
    if (folder / SINGLE).is_file():
        return None
    others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf") for path in folder.glob(pattern))
    hint = f" ({listing(others)} are of another format: load and save them once with transformers)" if others else ""
    raise CheckpointError(
        f"{folder}: holds neither {SINGLE} nor {INDEX}; pass the folder of a Hugging Face model{hint}"
    )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        # Not mapped into memory, where what was read of it would count as this process's.
        opened = safe_open(path, framework="np", backend="pread")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, though the index names it; download it again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}; download it again") from error
    with opened as file:
        yield file


class ShardWriter:
    """Writes tensors, whose names and sizes are known beforehand, to one file or to several with an index.

    Memory: the tensors of one file.

    Args:
      folder: Where to.
      num_bytes: Of each tensor, in the order in which they will come.
      limit: Bytes of a file at most, unless one tensor has more.
    """

    def __init__(self, folder: Path, num_bytes: Mapping[str, int], *, limit: int):
        self._folder = folder
        self._total = sum(num_bytes.values())
        self._shards = list(_shards(num_bytes, limit))
        self._names = [SINGLE] if len(self._shards) == 1 else [
            f"model-{number:05}-of-{len(self._shards):05}.safetensors" for number in range(1, len(self._shards) + 1)
        ]  # fmt: skip
        self._held: dict[str, np.ndarray] = {}
        self._written = 0

    def add(self, name: str, values: np.ndarray) -> None:
        """Takes the next tensor; writes a file once it has all of it."""
        self._held[name] = values
        if len(self._held) == len(self._shards[self._written]):
            path = self._folder / self._names[self._written]
            try:
                save_file(self._held, path, metadata={"format": "pt"})
            except SafetensorError as error:  # in which a fault of the disk is text
                raise CheckpointError(f"{path}: cannot be written: {storage_problem(error) or error}") from error
            self._held = {}
            self._written += 1

    def finish(self) -> None:
        """Writes the index, if there are several files; all tensors have come."""
        if len(self._shards) == 1:
            return
        weight_map = {tensor: file for shard, file in zip(self._shards, self._names, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(num_bytes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    shard, size = [], 0
    for name, count in num_bytes.items():
        if shard and size + count > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += count
    yield shard

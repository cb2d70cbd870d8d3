"""A checkpoint of a run as a Hugging Face model."""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  its import makes "bfloat16" a dtype of NumPy
import numpy as np
import orbax.checkpoint as ocp

from longctx.lora import ADAPTERS, LoraConfig, is_adapter, merged
from longctx.model import FloatDType, ModelConfig
from train import schema
from train.checkpoint import CheckpointError, find_checkpoint, load_position
from train.checkpoint.inspection import array_readers, list_checkpoints
from train.checkpoint.store import brief
from train.convert.architecture import config_json
from train.convert.safetensors_files import ShardWriter, listing
from train.convert.tensors import ParamPath, Tensor, dotted, layout, shape_of
from train.convert.tokenizer_files import copy_tokenizer, special_ids, tokenizer_folder, write_generation
from train.data.progress import ByteProgress
from train.files import new_folder

NO_TOKENIZER = "none"
_EMBEDDING = "embedding"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """How a checkpoint is handed on."""

    step: int | None = None
    """Of the checkpoint; None takes the latest."""
    model_type: str | None = None
    """The architecture; None takes the plainest that computes the same."""
    dtype: FloatDType | None = None
    """Of the tensors; None leaves them as they are stored."""
    max_positions: int | None = None
    """Tokens of the longest contexts; None takes the run's data.seq_len."""
    tokenizer: str | None = None
    """As data.tokenizer, or "none"; None takes the run's."""
    shard_bytes: int = 5 * 10**9
    """Bytes of a file at most, unless one tensor has more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored:
    """An array of a checkpoint, not read yet."""

    where: str
    shape: tuple[int, ...]
    dtype: np.dtype
    restore: Callable[[], np.ndarray]

    def read(self) -> np.ndarray:
        try:
            return self.restore()
        except Exception as error:  # Orbax and tensorstore raise many types for damaged files
            raise CheckpointError(f"{self.where} cannot be read: {brief(error)}; pass another checkpoint") from error


def to_hf(source: Path, output: Path, options: Export) -> str:
    """Writes config.json, model.safetensors (or several and an index) and the tokenizer's files into a new folder.

    Args:
      source: A run's folder, its folder of checkpoints, or one checkpoint in it.
      output: The new folder.
      options: What else there is to choose.
    Returns: what was written, and what was not, in lines for the user.
    Raises: ConfigError where no Hugging Face architecture computes what the model does; CheckpointError where the
      checkpoint cannot be read.
    Memory: the largest parameter (of all layers) twice, and the tensors of one file.
    """
    directory, step = _checkpoint(source, options.step)
    config = load_position(directory, step).config
    trained = schema.parse(ModelConfig, config["model"])
    with _stored_arrays(directory / str(step)) as stored:
        model = dataclasses.replace(trained, lora=None, vocab_size=stored[_EMBEDDING].shape[0])
        tokenizer = config.get("data", {}).get("tokenizer") if options.tokenizer is None else options.tokenizer
        tokenizer = None if tokenizer == NO_TOKENIZER else tokenizer
        ids = special_ids(tokenizer, config.get("data", {}).get("end_token"))
        dtypes = {
            name: array.dtype if options.dtype is None else np.dtype(options.dtype) for name, array in stored.items()
        }
        as_json = config_json(
            model,
            dtype=dtypes[_EMBEDDING].name,
            max_positions=options.max_positions or config["data"]["seq_len"],
            special_ids=ids,
            model_type=options.model_type,
        )
        tensors = layout(model)
        _check_arrays(stored, tensors, directory / str(step))
        with new_folder(output) as folder:
            (folder / "config.json").write_text(json.dumps(as_json, indent=2) + "\n", encoding="utf-8")
            tokenizer_path = None if tokenizer is None else tokenizer_folder(tokenizer)
            if tokenizer_path is not None:
                copy_tokenizer(tokenizer_path, folder)
            write_generation(folder, ids)
            sizes = {
                tensor.name: math.prod(tensor.shape) * dtypes[dotted(path)].itemsize
                for path, parts in tensors.items()
                for tensor in parts
            }
            writer = ShardWriter(folder, sizes, limit=options.shard_bytes)
            with ByteProgress("writing tensors", sum(sizes.values())) as progress:
                for path, parts in tensors.items():
                    for tensor, values in _slices(stored, path, parts, trained.lora, dtypes[dotted(path)]):
                        writer.add(tensor.name, tensor.from_own(values))
                        progress.advance(sizes[tensor.name])
            writer.finish()
            for file in folder.glob("*.safetensors"):
                shutil.copymode(folder / "config.json", file)  # that library lets nobody else read what it writes
    merged_too = "" if trained.lora is None else ", adapters merged"
    told = f"step {step} of {directory.parent} is in {output}: {as_json['architectures'][0]}{merged_too}"
    if tokenizer is not None and tokenizer_path is None:
        told += f"\ndata.tokenizer={tokenizer} has no files, so that a tokenizer is left for you to add"
    return told


def _checkpoint(source: Path, step: int | None) -> tuple[Path, int]:
    directory, latest = find_checkpoint(source)
    if step is None:
        return directory, latest
    steps = [checkpoint.step for checkpoint in list_checkpoints(directory) if checkpoint.finished]
    if step not in steps:
        raise CheckpointError(f"--step: got {step}, wanted a step that {directory} holds: {', '.join(map(str, steps))}")
    return directory, step


@contextlib.contextmanager
def _stored_arrays(path: Path) -> Iterator[dict[str, _Stored]]:
    """The parameters of a checkpoint by their dotted names, none of them read yet."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        stored = {
            name: _Stored(where=f"{path}: {name}", shape=tuple(leaf.shape), dtype=np.dtype(leaf.dtype), restore=restore)
            for name, leaf, restore in array_readers(reader, path / "params")
        }
        if _EMBEDDING not in stored:
            raise CheckpointError(
                f"{path}: the description of its parameters cannot be read; pass another checkpoint of this trainer"
            )
        yield stored


def _check_arrays(stored: dict[str, _Stored], tensors: dict[ParamPath, list[Tensor]], path: Path) -> None:
    wanted = {dotted(param): shape_of(parts) for param, parts in tensors.items()}
    odd = sorted(
        name
        for name in wanted.keys() | {name for name in stored if not is_adapter(name.split("."))}
        if name not in stored or name not in wanted or stored[name].shape != wanted[name]
    )
    if odd:
        raise CheckpointError(
            f"{path}: its parameters are not those of the config that was saved with them: {listing(odd)}; "
            "pass another checkpoint"
        )


def _slices(
    stored: dict[str, _Stored], path: ParamPath, parts: list[Tensor], lora: LoraConfig | None, dtype: np.dtype
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """The values of each tensor of a parameter, in our layout, adapters merged."""
    values = stored[dotted(path)].read()
    beside = {name: dotted((*path[:-1], name)) for name in ADAPTERS}
    adapters: dict[str, Any] = {}
    if lora is not None and path[-1] == "kernel" and all(name in stored for name in beside.values()):
        adapters = {name: stored[array].read() for name, array in beside.items()}
    for tensor in parts:
        at = ... if tensor.index is None else tensor.index
        own = values[at].astype(dtype)
        if adapters:
            one = {name: array[at] for name, array in adapters.items()}
            own = np.asarray(jax.device_get(merged({"kernel": own} | one, lora)["kernel"]))
        yield tensor, own

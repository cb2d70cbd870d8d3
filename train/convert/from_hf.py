"""A Hugging Face model as a checkpoint that runs start from (`init_from`), and the config that it needs."""

import collections
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.nnx import traversals
from rich.console import Console

from longctx.model import ModelConfig
from train import schema
from train.checkpoint import CheckpointError, Position, save_params
from train.convert.config_json import model_section, parse_family, read_json
from train.convert.safetensors_files import DTYPES, Weights, listing, open_weights
from train.convert.tensors import ParamPath, Tensor, dotted, layout, shape_of
from train.convert.tokenizer_files import copy_tokenizer, given_ids, write_generation
from train.data.progress import ByteProgress
from train.files import new_folder
from train.plain_yaml import ConfigError, dump_yaml

RUN_CONFIG = "run.yaml"
_TIED, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_RECOMPUTED = ".rotary_emb.inv_freq"  # old checkpoints hold the frequencies of rotary positions


def from_hf(source: Path, output: Path) -> str:
    """Writes `checkpoints/`, `run.yaml` and, where there is one, `tokenizer/` into a new folder.

    Args:
      source: Folder with config.json and safetensors files.
      output: The new folder.
    Returns: what was written, in a line or more for the user.
    Raises: ConfigError where config.json says what `model:` cannot; CheckpointError where the tensors are not those of
      its model.
    Memory: the parameters once, as they are stored, and the largest of them (of all layers) once or twice more.
    """
    config_file = source / "config.json"
    content = read_json(config_file)
    family = parse_family(content, source=str(config_file))
    with open_weights(source) as weights:
        section = model_section(family, dtype=_compute_dtype(weights), source=str(config_file))
        tensors = _layout_of(section, config_file)
        _check_tensors(weights, tensors, source, tied=family.tie_word_embeddings)
        with new_folder(output) as folder:
            copied = copy_tokenizer(source, folder / "tokenizer")
            if copied:
                write_generation(folder / "tokenizer", given_ids(content))
            data = {"tokenizer": str(output.resolve() / "tokenizer")} if copied else {}
            params = _read_params(weights, tensors)
            recorded = {"model": section, "data": data | {"seq_len": family.max_position_embeddings}}
            position = Position(rows=0, data="", config=recorded, weights_only=True)
            with Console(stderr=True).status("writing the checkpoint"):
                save_params(folder / "checkpoints", params, position)
            run = {"init_from": str(output.resolve()), "model": section} | ({"data": data} if data else {})
            (folder / RUN_CONFIG).write_text(_head(source, family.max_position_embeddings) + dump_yaml(run), "utf-8")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    missing = "" if copied else f"\n{source} has no tokenizer.json, so that data.tokenizer is left for you to set"
    return f"{count:,} parameters in {output}; start a run from {output / RUN_CONFIG}{missing}"


def _layout_of(section: dict[str, Any], config_file: Path) -> dict[ParamPath, list[Tensor]]:
    try:
        return layout(schema.parse(ModelConfig, section))
    except (ValueError, NotImplementedError) as error:  # ConfigErrors, and what a layer refuses
        lines = str(error).splitlines()
        raise ConfigError(*(f"{config_file}: `model:` would be made of it, but {line}" for line in lines)) from error


def _compute_dtype(weights: Weights) -> str:
    """The dtype of most of the values."""
    counts: collections.Counter[str] = collections.Counter()
    for name in weights.names:
        counts[weights.dtype(name)] += math.prod(weights.shape(name))
    return DTYPES.get(counts.most_common(1)[0][0], "float32") if counts else "float32"


def _check_tensors(weights: Weights, tensors: dict[ParamPath, list[Tensor]], source: Path, *, tied: bool) -> None:
    """Raises CheckpointError, a line a problem, unless the tensors are those of the model."""
    wanted = {tensor.name: tensor for parts in tensors.values() for tensor in parts}
    extra = {name for name in weights.names - wanted.keys() if not name.endswith(_RECOMPUTED)}
    if tied and _TIED in extra:
        extra.remove(_TIED)
        if _EMBEDDING in weights.names and not np.array_equal(weights.read(_TIED), weights.read(_EMBEDDING)):
            raise CheckpointError(
                f"{source}: config.json says tie_word_embeddings, but {_TIED} is not {_EMBEDDING}; set "
                "tie_word_embeddings to false there if the files are right"
            )
    problems = []
    if missing := sorted(wanted.keys() - weights.names):
        problems.append(f"tensors that config.json asks for are missing: {listing(missing)}")
    if extra:
        problems.append(f"tensors that config.json has no use for: {listing(sorted(extra))}")
    shapes = [
        f"{name} is {list(weights.shape(name))}, wanted {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights.names and weights.shape(name) != tensor.shape
    ]
    if shapes:
        problems.append(f"tensors of another shape than config.json says: {listing(shapes)}")
    dtypes = [
        f"{name} is {weights.dtype(name)}"
        for name in wanted
        if name in weights.names and weights.dtype(name) not in DTYPES
    ]
    if dtypes:
        problems.append(f"tensors of other dtypes than {', '.join(DTYPES)}: {listing(dtypes)}")
    for path, parts in tensors.items():
        found = {weights.dtype(tensor.name) for tensor in parts if tensor.name in weights.names}
        if len(found) > 1 and not dtypes:
            problems.append(
                f"the layers of {dotted(path)} ({parts[0].name}, ...) have several dtypes: {', '.join(sorted(found))}, "
                "wanted one; save the model again in one dtype"
            )
    if problems:
        raise CheckpointError("\n".join(f"{source}: {problem}" for problem in problems))


def _read_params(weights: Weights, tensors: dict[ParamPath, list[Tensor]]) -> dict[str, Any]:
    """The parameters as nested dicts, a tensor at a time."""
    flat: dict[ParamPath, jax.Array] = {}
    sizes = {path: shape_of(parts) for path, parts in tensors.items()}
    dtypes = {path: np.dtype(DTYPES[weights.dtype(parts[0].name)]) for path, parts in tensors.items()}
    total = sum(math.prod(shape) * dtypes[path].itemsize for path, shape in sizes.items())
    with ByteProgress("reading tensors", total) as progress:
        for path, parts in tensors.items():
            values = np.empty(sizes[path], dtypes[path])
            for tensor in parts:
                values[... if tensor.index is None else tensor.index] = tensor.to_own(weights.read(tensor.name))
                progress.advance(values.nbytes // len(parts))
            flat[path] = jax.device_put(values)  # Orbax makes copies of NumPy's arrays, all at a time
    return traversals.unflatten_mapping(flat)


def _head(source: Path, max_positions: int) -> str:
    return (
        f"# Made of {source} by `python -m train.convert from-hf`. What a run needs beside: run_dir, data.seq_len,\n"
        f"# data.sources, training and optimizer. The model was made for contexts of up to {max_positions} tokens.\n"
    )

"""The parts of a run that training, evaluation and generation share, made from its config."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh

from longctx.context_parallel import AttentionSharding
from longctx.model import ModelConfig, TransformerLM
from longctx.remat import offloaded
from longctx.sharding import make_mesh
from train.checkpoint import CheckpointError, Checkpoints
from train.config import ConfigError, TrainConfig, config_text, load_config
from train.data import Data, DataError
from train.optimizer import make_optimizer, make_schedule
from train.placement import BatchPlacement
from train.state import ModelBuilder, TrainState, abstract_model, abstract_state
from train.step import Metrics, make_train_step


def start_mesh(config: TrainConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Arranges the run's devices.

    Raises: ConfigError when the mesh does not fit the devices, or rows or tokens of a batch do not fit the mesh.
    """
    try:
        mesh = make_mesh(config.mesh, devices)
        config.check_mesh(mesh.shape)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run computes with; nothing of it is allocated."""

    model: ModelConfig
    build: ModelBuilder
    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    abstract: TrainState
    train_step: Callable[..., tuple[TrainState, Metrics]]


def assemble(config: TrainConfig, mesh: Mesh | AbstractMesh, *, vocab_size: int) -> Parts:
    """The model, the optimizer, the state and the training step that a config describes, for a mesh.

    Raises: ConfigError when the config names a vocabulary that is too small for the tokenizer's `vocab_size`, or a
      layer refuses what it would be built of.
    """
    model = resolved_model(config, vocab_size)
    build = model_builder(model, config.attention_sharding)
    graphdef = check_model(build)
    schedule = make_schedule(config.optimizer, total_steps=config.training.steps)
    optimizer = make_optimizer(config.optimizer, schedule=schedule)
    abstract = abstract_state(build, optimizer, mesh, offload_optimizer=config.optimizer.offload)
    return Parts(
        model=model,
        build=build,
        graphdef=graphdef,
        optimizer=optimizer,
        abstract=abstract,
        train_step=make_train_step(
            graphdef,
            abstract,
            optimizer,
            schedule,
            config.training,
            mesh,
            is_stochastic=model.is_stochastic,
            deterministic=config.deterministic,
            offloads=config.optimizer.offload or bool(offloaded(model.remat)),
        ),
    )


def check_layers(config: TrainConfig) -> None:
    """Whether the layers can be built, before there is a tokenizer: in a moment, where data may take hours to read.

    Raises: ConfigError, as `assemble`.
    """
    if config.context_parallel.is_auto:  # any will do
        config = dataclasses.replace(
            config, context_parallel=dataclasses.replace(config.context_parallel, strategy="ring")
        )
    check_model(model_builder(resolved_model(config, config.model.vocab_size or 1), config.attention_sharding))


def check_model(build: ModelBuilder) -> nnx.GraphDef:
    """The static half of a model.

    Raises: ConfigError when a layer refuses what it would be built of, such as heads that do not divide dim.
    """
    try:
        return abstract_model(build)[0]
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"model: {error}") from error


@contextlib.contextmanager
def telling_refusals(config: TrainConfig) -> Iterator[None]:
    """What an op refuses while a program of the config is traced becomes an error of the config.

    Raises: ConfigError, which names the mixers whose implementation it is that refuses.
    """
    try:
        yield
    except NotImplementedError as error:
        asked_for = {name: getattr(mixer, "implementation", None) for name, mixer in config.model.mixers.items()}
        named = [
            f"model.mixers.{name}.implementation" for name, which in asked_for.items() if which and which in str(error)
        ]
        remedy = f"; leave out {', '.join(named)} to take one that serves" if named else ""
        raise ConfigError(f"model: {error}{remedy}") from error


def batch_placement(config: TrainConfig, mesh: Mesh, *, batch_size: int) -> BatchPlacement:
    """The placement of batches of this many rows, with their tokens in the layout of the run."""
    return BatchPlacement(mesh, batch_size=batch_size, order=config.row_order(mesh.shape))


def check_agreement(config: TrainConfig, data: Data, checkpoints: Checkpoints) -> None:
    """Compares what decides the course of a run between its processes.

    Raises: ConfigError, DataError or CheckpointError, on every process, where they differ.
    """
    texts = (config_text(config), data.fingerprint, str(checkpoints.latest_step))
    digests = np.stack([np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in texts])
    differ = (multihost_utils.process_allgather(digests) != digests).any(axis=(0, 2))
    if differ[0]:
        raise ConfigError("config: the processes have different settings; start all with the same file and overrides")
    if differ[1]:
        raise DataError(
            f"data.sources: the processes read different documents, {data.fingerprint} by their lengths here; give "
            "every host the same files"
        )
    if differ[2]:
        raise CheckpointError(
            f"{checkpoints.directory}: the processes see different checkpoints, step {checkpoints.latest_step} as the "
            "last one here; put run_dir and checkpoint.dir on a file system that all hosts share"
        )


def resolved_model(config: TrainConfig, vocab_size: int) -> ModelConfig:
    """The model's config with the tokenizer's vocabulary filled in.

    Raises: ConfigError when the config names a vocabulary that is too small for the tokenizer.
    """
    if config.model.vocab_size is None:
        return dataclasses.replace(config.model, vocab_size=vocab_size)
    if config.model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size: got {config.model.vocab_size}, wanted at least the tokenizer's {vocab_size}; leave it "
            "out to take the tokenizer's"
        )
    return config.model


def model_builder(config: ModelConfig, sharding: AttentionSharding) -> Callable[[nnx.Rngs], TransformerLM]:
    """A function of the random keys that builds the model."""
    return lambda rngs: TransformerLM(config, sharding=sharding, rngs=rngs)


def config_of(source: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config that a config file or a run's folder holds; a run's folder may have moved since.

    Args:
      source: Config file or folder.
      overrides: `a.b=c`, as for training.

    Raises: ConfigError when there is none.
    """
    path = Path(source)
    if not path.exists() and path.suffix != ".yaml":
        raise ConfigError(f"{source}: is not there; pass the folder of a run or a config file")
    if not path.is_dir():
        return load_config(path, overrides)
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{source}: holds no config.yaml, so it is no run's folder; pass run_dir or a config file")
    return dataclasses.replace(load_config(path / "config.yaml", overrides), run_dir=source)


def memory_in_use() -> float | None:
    """Peak bytes in use on the fullest local device, or None where the platform does not say."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s), default=None)

"""A run's training step, compiled ahead of time for devices that need not be there."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from longctx.context_parallel import AttentionSharding
from longctx.sharding import CONTEXT_AXES, batch_sharding
from pallas_kernels import dispatch
from train.assemble import Parts, assemble, telling_refusals
from train.config import ConfigError, TrainConfig
from train.data import open_tokenizer
from train.planning.target import Target

_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class DoesNotFit(RuntimeError):
    """The compiler found that the program needs more memory than the device has.

    Attributes:
      temporaries: Bytes that the program needs beside its arguments, as far as the compiler says.
    """

    def __init__(self, message: str):
        super().__init__(message)
        found = re.search(r"temporaries \(([\d.]+)([BKMGT])\)", message)
        self.temporaries = round(float(found[1]) * _UNITS[found[2]]) if found else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A config on a target: everything but the compiled program."""

    config: TrainConfig
    target: Target
    mesh: Mesh | AbstractMesh
    parts: Parts

    @property
    def ring_size(self) -> int:
        """Devices that share the tokens of a row."""
        return math.prod(self.mesh.shape[axis] for axis in CONTEXT_AXES)

    @property
    def sharding(self) -> AttentionSharding:
        """How attention is split over the mesh."""
        return self.config.planned_sharding(self.mesh.shape)

    @property
    def rows(self) -> int:
        """Rows of a microbatch on a device."""
        training, shape = self.config.training, self.mesh.shape
        return training.batch_size // training.accumulate_steps // (shape["data"] * shape["fsdp"])

    @property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        return abstract_batch(self.config, self.mesh)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled training step.

    Attributes:
      text: The scheduled program of one device.
      stats: The compiler's memory figures, jax's CompiledMemoryStats.
      implementations: Implementation by op, of the attention ops that were traced.
      seconds: What compiling took, tracing and lowering included.
      notes: What is to be said of it.
    """

    text: str
    stats: Any
    implementations: Mapping[str, str]
    seconds: float
    notes: Sequence[str] = ()


WITHOUT_TRITON = (
    "without a GPU the compiler has no settings for some of Triton's matmuls, so the plan is without those; the memory "
    "of such a plan was up to 9 % too little"
)
"""A note on a program."""


def plan_run(config: TrainConfig, target: Target) -> Run:
    """The config on the target.

    Raises: ConfigError where mesh, rows or tokens do not fit the devices; DataError where the tokenizer cannot be had.
    """
    try:
        mesh = target.mesh(config.mesh)
        config.check_mesh(mesh.shape)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    vocab_size = open_tokenizer(config.data.tokenizer, end_token=config.data.end_token).vocab_size
    return Run(config=config, target=target, mesh=mesh, parts=assemble(config, mesh, vocab_size=vocab_size))


def abstract_batch(config: TrainConfig, mesh: Mesh | AbstractMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of training rows as ShapeDtypeStructs, laid out as train.placement lays it out."""
    rows, length = config.training.batch_size, config.data.seq_len

    def struct(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, len(shape)))

    return {
        name: struct(rows, length, dtype=jnp.int32) for name in ("tokens", "targets", "positions", "segment_ids")
    } | {
        "loss_weights": struct(rows, length, dtype=jnp.float32),
        "num_bytes": struct(rows, dtype=jnp.float32),
    }


def trace_step(
    config: TrainConfig, mesh: Mesh | AbstractMesh, parts: Parts, stop: jax.ShapeDtypeStruct | None = None
) -> jax.stages.Traced:
    """The training step, traced for the mesh in scope; a call with the same arguments then need not do it again.

    Args:
      config, mesh, parts: Of the run.
      stop: What several processes agree by.
    Raises: ConfigError where an op refuses what a layer asks of it on these devices.
    """
    with telling_refusals(config):
        return parts.train_step.trace(parts.abstract, abstract_batch(config, mesh), stop, None, None)


def compile_step(run: Run) -> Program:
    """Compiles the step that training would run.

    Raises: DoesNotFit where the compiler refuses because of memory; ConfigError as `trace_step`.
    Cost: tens of seconds to minutes; about the same for 8 and for 512 devices.
    """
    mesh = run.mesh
    stop = None
    if len({device.process_index for device in mesh.devices.flat}) > 1:  # as train.loop does with several processes
        stop = jax.ShapeDtypeStruct((mesh.size,), bool, sharding=NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    started = time.monotonic()
    with jax.set_mesh(mesh), dispatch.record() as taken:
        lowered = trace_step(run.config, mesh, run.parts, stop).lower()
        try:
            compiled, notes = _compiled(lowered, mesh)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DoesNotFit(str(error)) from error
    return Program(
        text=compiled.as_text(),
        stats=compiled.memory_analysis(),
        implementations=dict(taken),
        seconds=time.monotonic() - started,
        notes=notes,
    )


def _compiled(lowered: jax.stages.Lowered, mesh: Mesh) -> tuple[jax.stages.Compiled, Sequence[str]]:
    """The program, and notes on it."""
    device = mesh.devices.flat[0]
    ahead_of_time = device.platform == "gpu" and device not in jax.local_devices(backend="cpu")
    if not ahead_of_time or _is_here(device):
        return lowered.compile(), ()
    # Without a GPU nothing can be timed, so XLA must not try to.
    options = {"xla_gpu_autotune_level": "0"}
    try:
        # Matmuls are Triton's then. On a card they are too, until others have been timed, which is after it has been
        # settled what goes with them into one kernel, and so what is held in memory.
        return lowered.compile(compiler_options=options), ()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
    return lowered.compile(compiler_options=options | {"xla_gpu_enable_triton_gemm": False}), (WITHOUT_TRITON,)


def _is_here(device: jax.Device) -> bool:
    try:
        return device in jax.local_devices(backend=device.platform)
    except RuntimeError:
        return False

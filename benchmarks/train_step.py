"""Measures one training step of a run's config, on the config's own data."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from contextlib import closing

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.measure import Ceiling, matmul_ceiling, memory_bytes, time_calls
from benchmarks.results import Row
from longctx.model_flops import forward_flops
from pallas_kernels import dispatch
from train.assemble import Parts, assemble, batch_placement, memory_in_use
from train.config import TrainConfig, load_config
from train.data import open_data
from train.devices import device_table, model_flops_utilization
from train.loop import MAX_STEPS_IN_FLIGHT
from train.planning.auto import start
from train.state import create_state
from train.step import Batch

NUM_BATCHES = 4  # taken in turn, and placed before the clock starts: packing differs from batch to batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
    """A step that is ready to be compiled, and batches for it.

    Attributes:
      name: Of the config file.
      document_lengths: Of each batch, padding left out.
    """

    name: str
    config: TrainConfig
    mesh: Mesh
    parts: Parts
    batches: Sequence[Batch]
    document_lengths: Sequence[np.ndarray]


def measure_train(
    config_path: str,
    overrides: Sequence[str] = (),
    *,
    repetitions: int = 20,
    progress: Callable[[str], None] = print,
) -> tuple[Row, Ceiling]:
    """Times the jitted step of the trainer: forward, backward and update, with neither input nor logging.

    Returns: a row, and the ceiling of one device. TFLOP/s count three times the model's forward FLOPs over the
      documents at hand, as MFU does.
    """
    return measure_prepared(
        prepare(config_path, overrides, progress=progress), repetitions=repetitions, progress=progress
    )


def prepare(config_path: str, overrides: Sequence[str] = (), *, progress: Callable[[str], None] = print) -> TrainStep:
    """Places NUM_BATCHES batches of the config's data on its mesh."""
    config = load_config(config_path, overrides)
    config, mesh, choices = start(config)
    for note in choices:
        progress(note)
    with jax.set_mesh(mesh):
        data = open_data(config.data, seed=config.seed)
        batch_size = config.training.batch_size
        placement = batch_placement(config, mesh, batch_size=batch_size)
        read = data.batches(start_step=0, batch_size=batch_size, rows=placement.rows, slots=placement.slots)
        with closing(read):
            batches = [placement.place(batch) for batch in itertools.islice(read, NUM_BATCHES)]
        return TrainStep(
            name=str(config_path),
            config=config,
            mesh=mesh,
            parts=assemble(config, mesh, vocab_size=data.tokenizer.vocab_size),
            batches=batches,
            document_lengths=[data.document_lengths(step=step, batch_size=batch_size) for step in range(NUM_BATCHES)],
        )


def measure_prepared(
    prepared: TrainStep, *, repetitions: int = 20, progress: Callable[[str], None] = print
) -> tuple[Row, Ceiling]:
    """As `measure_train`."""
    config, mesh, parts, batches = prepared.config, prepared.mesh, prepared.parts, prepared.batches
    ceiling = matmul_ceiling(repetitions=repetitions)
    progress(f"{mesh.devices.flat[0].device_kind}: {ceiling}")
    with jax.set_mesh(mesh):
        progress("compiling the training step")
        with dispatch.record() as taken:
            compiled = parts.train_step.lower(parts.abstract, batches[0], None).compile()
        state = create_state(
            parts.build, parts.optimizer, mesh, seed=config.seed, offload_optimizer=config.optimizer.offload
        )
        turn = itertools.cycle(batches)

        def step():
            nonlocal state
            state, metrics = compiled(state, next(turn), None)
            return metrics

        progress("timing it")
        timing = time_calls(step, repetitions=repetitions, max_calls=MAX_STEPS_IN_FLIGHT)
        in_use = memory_in_use()

    lengths = prepared.document_lengths
    tokens = np.mean([np.sum(of_batch) for of_batch in lengths])
    flops = float(np.mean([forward_flops(parts.model, of_batch) for of_batch in lengths]))
    device_kind = mesh.devices.flat[0].device_kind
    table = device_table(config.device_table)
    mfu = model_flops_utilization(flops, timing.median, device_kind=device_kind, num_devices=mesh.size, table=table)
    details = {"tokens/s": float(tokens / timing.median), "tokens a step": float(tokens)}
    if mfu is not None:
        details["MFU %"] = 100 * mfu
    if in_use is not None:
        details["peak GiB in use"] = in_use / 2**30
    row = Row(
        case=prepared.name,
        which="training step",
        implementation=", ".join(dict.fromkeys(f"{op.removeprefix('blockwise_')} {name}" for op, name in taken)),
        ours=True,
        devices=mesh.size,
        median_ms=1e3 * timing.median,
        low_ms=1e3 * timing.low,
        high_ms=1e3 * timing.high,
        tflops=3 * flops / timing.median / mesh.size / 1e12,
        ceiling_share=3 * flops / timing.median / (ceiling.flops * mesh.size),
        memory_bytes=memory_bytes(compiled),
        details=details,
    )
    progress(f"{row.median_ms:.1f} ms a step, {details['tokens/s']:,.0f} tokens/s")
    return row, ceiling

"""One training run, from its config to its last line."""

import dataclasses
import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from longctx.model import ModelConfig, forward_flops
from train.assemble import assemble, batch_placement, check_agreement, memory_in_use
from train.checkpoint import Checkpoints, Position, changed_settings, load_params
from train.config import ConfigError, TrainConfig, config_text
from train.data import Data, open_data
from train.devices import model_flops_utilization
from train.evaluation import evaluate, make_eval_step
from train.metrics import MetricsLog
from train.placement import one_flag_a_device
from train.planning.auto import start
from train.planning.startup import MemoryWatch
from train.progress import Display, duration
from train.sampling import sample_text
from train.schema import to_dict
from train.signals import StopSignals
from train.state import TrainState, create_state
from train.step import Metrics, NonFiniteError, TrainingConfig

MAX_STEPS_IN_FLIGHT = 2  # more gain nothing, and XLA's CPU runtime aborts when many steps with collectives are queued


def train(config: TrainConfig) -> None:
    """Trains, or resumes, the run that the config describes; says so when it is done already.

    Raises: ConfigError, DataError and CheckpointError for what the user can mend, before a file of an
      earlier run is changed; NonFiniteError, with the step, where training.on_nonfinite is "stop"; OutOfDeviceMemory,
      with what would have helped.
    """
    started = time.monotonic()
    config, mesh, choices = start(config)
    with jax.set_mesh(mesh), ExitStack() as stack:
        display = stack.enter_context(Display(config.training.steps))
        data = open_data(config.data, seed=config.seed)
        for note in (*choices, *data.notes):
            display.note(note)

        parts = assemble(config, mesh, vocab_size=data.tokenizer.vocab_size)
        abstract = parts.abstract
        memory = MemoryWatch(config, mesh, parts)
        stack.enter_context(memory.helping())
        checkpoints = stack.enter_context(
            closing(Checkpoints(config.checkpoint.directory(config.run_dir), config.checkpoint))
        )

        if jax.process_count() > 1:
            check_agreement(_recorded(config), data, checkpoints)
        fresh = checkpoints.latest_step is None
        if not fresh:
            checkpoints.check(abstract)
            if checkpoints.latest_step >= config.training.steps:
                display.note(f"{config.run_dir} is done at step {checkpoints.latest_step}. {_next_steps(config)}")
                return
            state, rows = _resume(config, checkpoints, abstract, data, display)
        else:
            weights = load_params(config.init_from, abstract.params) if config.init_from else None
            state, rows = create_state(parts.build, parts.optimizer, mesh, seed=config.seed), 0
            if weights is not None:
                state = dataclasses.replace(state, params=weights)
                display.note(f"weights from {config.init_from}")

        step = first = int(state.step)
        _write_config(config)
        log = stack.enter_context(closing(MetricsLog(config.run_dir, config.metrics, step=step)))
        in_flight = _StepsInFlight(config, parts.model, mesh, data, log, display)
        eval_step = make_eval_step(parts.graphdef, num_answer_groups=len(data.answer_groups))
        batch_size = config.training.batch_size
        eval_batch_size = batch_size // config.training.accumulate_steps
        placement = batch_placement(config, mesh, batch_size=batch_size)
        eval_placement = batch_placement(config, mesh, batch_size=eval_batch_size)
        eval_every = config.evaluation.every if len(data.held_out) else None
        held_out: dict[str, float] = {}

        def evaluate_now() -> None:
            held_out.update(
                evaluate(
                    eval_step,
                    state.params,
                    data.held_out_batches(
                        batch_size=eval_batch_size,
                        max_batches=config.evaluation.max_batches,
                        rows=eval_placement.rows,
                        slots=eval_placement.slots,
                    ),
                    eval_placement,
                    answer_groups=data.answer_groups,
                )
            )
            log.write(step, held_out)
            log.draw()
            display.note(f"step {step}: {_held_out_text(held_out)}")

        def save() -> None:
            position = Position(rows=rows, data=data.fingerprint, config=to_dict(_recorded(config)))
            checkpoints.save(state, step=step, position=position)

        parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params))
        axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "one device"
        display.note(f"{parameters:,} parameters on {mesh.size} x {mesh.devices.flat[0].device_kind} ({axes})")
        warning = memory.warning()
        if warning:
            display.note(warning)
        if eval_every is not None and fresh:
            evaluate_now()
        batches = stack.enter_context(
            closing(
                data.batches(
                    start_step=rows // batch_size, batch_size=batch_size, rows=placement.rows, slots=placement.slots
                )
            )
        )
        balance = placement.balance_of(data.train[rows])
        if balance is not None:
            display.note(f"balanced layout, the first row: {balance}")
        signals = stack.enter_context(StopSignals())
        several = jax.process_count() > 1
        display.start(step)
        compile_started = time.monotonic()
        # Several processes stop where the metrics of a step say so: at the same step, whichever got the signal.
        while step < config.training.steps and not (in_flight.stop if several else signals.received):
            batch = next(batches)
            in_flight.wait(at_most=MAX_STEPS_IN_FLIGHT - 1)
            placed = placement.place(batch)
            stop = one_flag_a_device(signals.received is not None, mesh) if several else None
            with jax.transfer_guard("disallow"):
                state, metrics = parts.train_step(state, placed, stop)
            in_flight.add(step + 1, metrics, data_step=rows // batch_size)
            step, rows = step + 1, rows + batch_size

            eval_due = eval_every is not None and (step % eval_every == 0 or step == config.training.steps)
            save_due = config.checkpoint.every is not None and step % config.checkpoint.every == 0
            if step == first + 1 or eval_due or save_due:
                in_flight.wait(at_most=0)
                if step == first + 1:
                    in_use = memory_in_use()
                    used = "" if in_use is None else f"; {in_use / 2**30:.2f} GiB of device memory at most"
                    display.note(f"first step, with compilation: {time.monotonic() - compile_started:.1f} s{used}")
                if eval_due:
                    evaluate_now()
                if save_due:
                    save()
                in_flight.restart_clock()
        in_flight.wait(at_most=0)
        save()
        checkpoints.wait()
        log.draw()
        display.stop()

        if step < config.training.steps:
            reason = signals.received or "a signal to another process"
            display.note(
                f"{reason}: saved step {step} of {config.training.steps} in {checkpoints.directory}; run the "
                "same command again to go on"
            )
            return
        if config.sample.num_tokens:
            text = sample_text(parts.graphdef, state.params, data.tokenizer, config.sample)
            display.note(f"--- sample ---\n{config.sample.prompt}{text}\n--------------")
        result = f", {_held_out_text(held_out)}" if held_out else ""
        display.note(f"done: step {step} in {duration(time.monotonic() - started)}{result}. {_next_steps(config)}")


def _resume(
    config: TrainConfig, checkpoints: Checkpoints, abstract: TrainState, data: Data, display: Display
) -> tuple[TrainState, int]:
    """The state of the latest checkpoint and the rows consumed until then."""
    state, position = checkpoints.restore(abstract)
    if position.rows % config.training.batch_size:
        raise ConfigError(
            f"training.batch_size: got {config.training.batch_size}, but the run has consumed {position.rows} rows, "
            "which is no multiple of it; choose a divisor of that, or another run_dir"
        )
    unused = "; init_from is not used" if config.init_from else ""
    display.note(f"resuming {config.run_dir} at step {int(state.step)}{unused}")
    for change in changed_settings(position.config, to_dict(_recorded(config))):
        display.note(f"  changed since then: {change}")
    if position.data != data.fingerprint:
        display.note("  changed since then: the documents; the rows from here on are not those the run would have had")
    return state, position.rows


class _StepsInFlight:
    """Steps that were dispatched and whose metrics are yet to be waited for, checked, shown and recorded."""

    stop = False
    """Whether the metrics of a finished step say that a process was asked to stop."""

    def __init__(
        self,
        config: TrainConfig,
        model_config: ModelConfig,
        mesh: Mesh,
        data: Data,
        log: MetricsLog,
        display: Display,
    ):
        self._config, self._model_config, self._mesh, self._data = config, model_config, mesh, data
        self._log, self._display = log, display
        self._steps: deque[tuple[int, Metrics, int]] = deque()
        self._timed: _Timed | None = None

    def add(self, step: int, metrics: Metrics, *, data_step: int) -> None:
        """Adds a step; `data_step` is the number of its batch in the data."""
        self._steps.append((step, metrics, data_step))

    def restart_clock(self) -> None:
        """Measures the speed from now on: what lies behind (compilation, evaluation, saving) does not count."""
        self._timed = _Timed(start=time.monotonic())

    def wait(self, *, at_most: int) -> None:
        """Waits for the oldest steps until at most so many are left."""
        while len(self._steps) > at_most:
            self._finish(*self._steps.popleft())

    def _finish(self, step: int, metrics: Metrics, data_step: int) -> None:
        values: dict[str, Any] = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self.stop |= values.pop("stop", False)
        if not math.isfinite(values["bits_per_byte"]):  # sources of bare ids have no bytes
            del values["bits_per_byte"]
        if self._timed is not None:
            # Of the whole batch, of which this process may have read a part only.
            lengths = self._data.document_lengths(step=data_step, batch_size=self._config.training.batch_size)
            self._timed.add(lengths, self._model_config)
        self._display.step(step)
        finite, total = values["finite"], self._config.training.steps
        if not finite or step % self._config.metrics.every == 0 or step == total:
            seconds_left = None
            if self._timed is not None:
                values |= self._timed.rates(self._mesh)
                seconds_left = self._timed.seconds_a_step() * (total - step)
                self.restart_clock()
            memory = memory_in_use()
            if memory is not None:
                values["memory_gib"] = memory / 2**30
            self._log.write(step, values)
            self._display.record(step, values, seconds_left=seconds_left)
        if not finite:
            _check_nonfinite(step, values, self._config.training, self._display)


@dataclasses.dataclass(kw_only=True)
class _Timed:
    """What was done since a moment without pauses."""

    start: float
    steps: int = 0
    tokens: int = 0
    forward_flops: float = 0.0

    def add(self, lengths: Int[np.ndarray, " documents"], model_config: ModelConfig) -> None:
        self.steps += 1
        self.tokens += int(lengths.sum())
        self.forward_flops += forward_flops(model_config, lengths)

    def seconds_a_step(self) -> float:
        return (time.monotonic() - self.start) / self.steps

    def rates(self, mesh: Mesh) -> dict[str, float]:
        """tokens_per_second (padding left out) and, where the peak of the device is known, mfu."""
        seconds = time.monotonic() - self.start
        device_kind = mesh.devices.flat[0].device_kind
        mfu = model_flops_utilization(self.forward_flops, seconds, device_kind=device_kind, num_devices=mesh.size)
        return {"tokens_per_second": self.tokens / seconds} | ({} if mfu is None else {"mfu": mfu})


def _check_nonfinite(step: int, values: dict[str, Any], config: TrainingConfig, display: Display) -> None:
    what = f"step {step}: loss {values['loss']} and gradient norm {values['grad_norm']} are not both finite"
    if config.on_nonfinite == "stop":
        raise NonFiniteError(
            f"{what}; stopped. Lower optimizer.learning_rate, or set training.on_nonfinite=skip to leave out such "
            "steps; running again goes on from the last checkpoint"
        )
    display.note(f"{what}; skipped, {values['skipped_steps']} so far")


def _held_out_text(values: Mapping[str, float]) -> str:
    texts = [f"held-out loss {values['eval/loss']:.4f}"]
    if "eval/bits_per_byte" in values:
        texts.append(f"{values['eval/bits_per_byte']:.4f} bits/byte")
    if "eval/accuracy" in values:
        texts.append(
            f"{values['eval/accuracy']:.1%} of answer tokens and {values['eval/exact_match']:.1%} of answers right"
        )
    return ", ".join(texts)


def _recorded(config: TrainConfig) -> TrainConfig:
    """The config without what is true of one process of one start only."""
    here = {"coordinator_address": None, "num_processes": None, "process_id": None}
    return dataclasses.replace(config, distributed=dataclasses.replace(config.distributed, **here))


def _write_config(config: TrainConfig) -> None:
    """Writes the resolved config into the run's folder, atomically."""
    if jax.process_index() == 0:
        path = Path(config.run_dir) / "config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(config_text(_recorded(config)), encoding="utf-8")
        os.replace(temporary, path)


def _next_steps(config: TrainConfig) -> str:
    # The interpreter as the user could type it: the one of a virtual environment that is not activated, say.
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else "python"
    return (
        f"Everything is in {config.run_dir}: "
        f"{python} -m train.generate {config.run_dir} --prompt TEXT samples from it; "
        f"{python} -m train {Path(config.run_dir) / 'config.yaml'} training.steps={2 * config.training.steps} goes on"
    )

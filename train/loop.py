"""One training run, from its config to its last line."""

import dataclasses
import itertools
import math
import os
import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import jax
import numpy as np

from train.assemble import assemble, batch_placement, check_agreement, check_layers, memory_in_use
from train.checkpoint import CheckpointError, Checkpoints, Position, changed_settings, find_checkpoint, load_params
from train.config import ConfigError, TrainConfig, config_text
from train.data import Data, open_data
from train.devices import device_table
from train.evaluation import evaluate, make_eval_step
from train.files import write_text
from train.in_flight import BadStep, Batches, StepsInFlight
from train.metrics import MetricsLog, read_records
from train.placement import one_a_device, same_everywhere
from train.plain_yaml import dump_yaml, read_mapping
from train.planning.auto import start
from train.planning.program import trace_step
from train.planning.startup import MemoryWatch
from train.profiling import Profiler
from train.progress import Display, duration
from train.sampling import check_sample, sample_text
from train.schema import to_dict
from train.signals import StopSignals
from train.spikes import LeftOut, LeftOutRows, RecentLosses, SpikeConfig, SpikeError
from train.state import TrainState, create_state, together, trained
from train.watch import Watch

MAX_STEPS_IN_FLIGHT = 2  # more gain nothing, and XLA's CPU runtime aborts when many steps with collectives are queued


def train(config: TrainConfig) -> None:
    """Trains, or resumes, the run that the config describes; says so when it is done already.

    Raises: ConfigError, DataError and CheckpointError for what the user can mend, before a file of an
      earlier run is changed; NonFiniteError, with the step, where training.on_nonfinite is "stop"; OutOfDeviceMemory,
      with what would have helped; SpikeError where steps go wrong more than training.max_repeats times.
    """
    config.metrics.check_installed()
    started = time.monotonic()
    config, mesh, choices = start(config)
    with jax.set_mesh(mesh), ExitStack() as stack:
        check_layers(config)
        display = stack.enter_context(Display(config.training.steps))
        data = open_data(config.data, seed=config.seed)
        for note in (*choices, *data.notes):
            display.note(note)
        if jax.config.jax_compilation_cache_dir:
            display.note(f"compiled programs are kept in {jax.config.jax_compilation_cache_dir}")

        parts = assemble(config, mesh, vocab_size=data.tokenizer.vocab_size)
        abstract = parts.abstract
        if config.sample.num_tokens:
            check_sample(parts.graphdef, abstract.params, data.tokenizer, config.sample)
        trace_step(config, mesh, parts)
        directory = config.checkpoint.directory(config.run_dir)
        if config.init_from and not _has_checkpoint(directory):
            find_checkpoint(config.init_from)
        table = device_table(config.device_table)
        memory = MemoryWatch(config, mesh, parts, table)
        stack.enter_context(memory.helping())
        checkpoints = stack.enter_context(closing(Checkpoints(directory, config.checkpoint)))
        for note in checkpoints.notes:
            display.note(note)

        if jax.process_count() > 1:
            check_agreement(_recorded(config), data, checkpoints)
        fresh = checkpoints.latest_step is None
        if not fresh:
            checkpoints.check(abstract)
            if checkpoints.latest_step >= config.training.steps:
                done = checkpoints.latest_step
                display.note(f"{config.run_dir} is done at step {done}. {_next_steps(config, step=done)}")
                return
            state, position = _resume(config, checkpoints, abstract, data, display)
        else:
            weights = (
                load_params(config.init_from, abstract.params, may_lack_adapters=True) if config.init_from else None
            )
            state = create_state(
                parts.build, parts.optimizer, mesh, seed=config.seed, offload_optimizer=config.optimizer.offload
            )
            position = Position(rows=0, data=data.fingerprint, config=to_dict(_recorded(config)))
            if weights is not None:
                state = dataclasses.replace(state, params=together(weights, state.params))
                display.note(f"weights from {config.init_from}")

        step, rows = int(state.step), position.rows
        writes = jax.process_index() == 0
        left_out = LeftOutRows(config.run_dir, fresh=fresh, writes=writes, seq_len=config.data.seq_len)
        for note in _put_aside(config, fresh=fresh) if jax.process_index() == 0 else ():
            display.note(note)
        _write_config(config)
        settings = to_dict(_recorded(config))
        log = stack.enter_context(closing(MetricsLog(config.run_dir, config.metrics, step=step, settings=settings)))
        watch = Watch(mesh, parts.model, table)
        in_flight = StepsInFlight(config.training, config.metrics, data, watch, log, display)
        in_flight.losses = RecentLosses(config.training.spikes, position.losses)
        eval_step = make_eval_step(
            parts.graphdef,
            num_answer_groups=len(data.answer_groups),
            loss_tile=config.training.loss_tile,
            deterministic=config.deterministic,
        )
        batch_size = config.training.batch_size
        eval_batch_size = batch_size // config.training.accumulate_steps
        placement = batch_placement(config, mesh, batch_size=batch_size)
        eval_placement = batch_placement(config, mesh, batch_size=eval_batch_size)
        eval_every = config.evaluation.every if len(data.held_out) else None
        if config.evaluation.every is not None and eval_every is None:
            display.note("nothing is held out (data.held_out_fraction), so nothing is evaluated")
        for note in _not_heeded(config):
            display.note(note)
        held_out: dict[str, float] = {}

        def evaluate_now() -> None:
            which = dict(batch_size=eval_batch_size, max_batches=config.evaluation.max_batches)
            batches = data.held_out_batches(**which, rows=eval_placement.rows, slots=eval_placement.slots)
            batches = display.counted(batches, data.num_held_out_batches(**which), "evaluating")
            held_out.update(
                evaluate(eval_step, state.params, batches, eval_placement, answer_groups=data.answer_groups)
            )
            log.write(step, held_out)
            log.draw()
            display.note(f"step {step}: {_held_out_text(held_out)}")

        def save() -> None:
            losses = in_flight.losses.saved() if config.training.spikes.action != "ignore" else ()
            position = Position(rows=rows, data=data.fingerprint, config=settings, losses=losses)
            checkpoints.save(state, step=step, position=position)

        parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params))
        axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "one device"
        of_adapters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained(abstract.params)))
        if of_adapters < parameters:
            display.note(f"{of_adapters:,} parameters are trained, those of the adapters")
        display.note(f"{parameters:,} parameters on {mesh.size} x {mesh.devices.flat[0].device_kind} ({axes})")
        warning = memory.warning()
        if warning:
            display.note(warning)
        if eval_every is not None and fresh:
            evaluate_now()
        batches = stack.enter_context(closing(Batches(data, batch_size=batch_size, placement=placement)))
        balance = placement.balance_of(data.train[rows])
        if balance is not None:
            display.note(f"balanced layout, the first row: {balance}")
        first, last = config.profile.start, config.training.steps
        if first is not None and not step < first <= last:
            display.note(f"profile.start: got {first}, and steps {step + 1} to {last} are to come, so none is profiled")
        profiler = stack.enter_context(Profiler(config.run_dir, config.profile, display.note))
        signals = stack.enter_context(StopSignals())

        def rewind(bad: BadStep) -> None:
            nonlocal state, step, rows
            checkpoints.wait()
            state = None  # its memory is needed for what is restored
            state, position = checkpoints.restore(abstract)
            position = _in_rows_of(config, position)
            step = int(state.step)
            if left_out.rewinds_to(step) >= config.training.max_repeats:
                raise SpikeError(
                    f"{bad.what}; the run went back to step {step} {config.training.max_repeats} times before. Lower "
                    "optimizer.learning_rate, look at the data, or raise training.max_repeats"
                )
            left_out.add(
                LeftOut(
                    start=position.rows,
                    stop=bad.rows,
                    checkpoint=step,
                    spike=bad.step,
                    seq_len=config.data.seq_len,
                )
            )
            rows = left_out.next(position.rows, batch_size)
            in_flight.losses = RecentLosses(config.training.spikes, position.losses)
            log.rewind(step)
            display.note(f"{bad.what}; back to step {step}, leaving out the rows from {position.rows} to {rows}")

        several = jax.process_count() > 1
        judged = config.training.spikes.action != "ignore"
        if fresh and config.training.rewinds:
            save()  # something to go back to
        display.start(step)
        compile_started: float | None = time.monotonic()
        while True:
            # Several processes stop where the metrics of a step say so: at the same step, whichever got the signal.
            is_last = step == config.training.steps or bool(in_flight.stop if several else signals.received)
            in_flight.wait(at_most=0 if is_last else MAX_STEPS_IN_FLIGHT - 1)
            if in_flight.bad is not None:
                rewind(in_flight.forget())
                watch.restart()
                continue
            if is_last:
                break
            rows = left_out.next(rows, batch_size)
            with watch.reading():
                placed = placement.place(batches.at(rows))
            stop = one_a_device(signals.received is not None, mesh) if several else None
            host_seconds = one_a_device(np.float32(watch.host_seconds), mesh) if several else None
            loss_limit = same_everywhere(np.float32(in_flight.losses.limit(step + 1)), mesh) if judged else None
            profiler.before(step + 1)
            with jax.transfer_guard("disallow"):
                state, metrics = parts.train_step(state, placed, stop, loss_limit, host_seconds)
            step, rows = step + 1, rows + batch_size
            in_flight.add(step, metrics, rows=rows)
            profiler.after(step, metrics)

            eval_due = eval_every is not None and (step % eval_every == 0 or step == config.training.steps)
            save_due = config.checkpoint.every is not None and step % config.checkpoint.every == 0
            if compile_started is not None or eval_due or save_due:
                in_flight.wait(at_most=0)
                if compile_started is not None:
                    in_use = memory_in_use()
                    used = "" if in_use is None else f"; {in_use / 2**30:.2f} GiB of device memory at most"
                    display.note(f"first step, with compilation: {time.monotonic() - compile_started:.1f} s{used}")
                    compile_started = None
                if in_flight.bad is None and eval_due:
                    evaluate_now()
                if in_flight.bad is None and save_due:
                    save()
                watch.restart()
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
        display.note(
            f"done: step {step} in {duration(time.monotonic() - started)}{result}. {_next_steps(config, step=step)}"
        )


def _resume(
    config: TrainConfig, checkpoints: Checkpoints, abstract: TrainState, data: Data, display: Display
) -> tuple[TrainState, Position]:
    """The state of the latest checkpoint, and its position in rows as they are now."""
    state, saved = checkpoints.restore(abstract)
    position = _in_rows_of(config, saved)
    if position.rows % config.training.batch_size:
        raise ConfigError(
            f"training.batch_size: got {config.training.batch_size}, but the run has consumed {position.rows} rows, "
            "which is no multiple of it; choose a divisor of that, or another run_dir"
        )
    unused = "; init_from is not used" if config.init_from else ""
    display.note(f"resuming {config.run_dir} at step {int(state.step)}{unused}")
    for change in changed_settings(position.config, to_dict(_recorded(config))):
        display.note(f"  changed since then: {change}")
    if position.rows != saved.rows:
        display.note(
            f"  rows are of another length: going on from row {position.rows} of these, as far in the data as "
            f"{saved.rows} of the others; some documents come again, others later"
        )
    if position.data != data.fingerprint:
        display.note("  changed since then: the documents; the rows from here on are not those the run would have had")
    return state, position


def _not_heeded(config: TrainConfig) -> list[str]:
    """What is set and has no part in the run, because of other settings."""
    notes = []
    strategy = config.context_parallel.window_strategy
    masks = (getattr(config.model.mixers[name], "mask", None) for name in set(config.model.layers))
    if strategy is not None and not any(mask is not None and mask.span.is_bounded for mask in masks):
        notes.append(f"context_parallel.window_strategy: got {strategy}, and no layer has a window, so it is not used")
    spikes, default = config.training.spikes, SpikeConfig()
    changed = [name for name in ("threshold", "window") if getattr(spikes, name) != getattr(default, name)]
    if spikes.action == "ignore" and changed:
        names = " and ".join(f"training.spikes.{name}" for name in changed)
        notes.append(f"{names}: set, and training.spikes.action=ignore, so no spike is looked for")
    return notes


def _in_rows_of(config: TrainConfig, position: Position) -> Position:
    """A checkpoint's position in rows of this config's length: after as many tokens, at the next whole batch."""
    before, now = position.config["data"]["seq_len"], config.data.seq_len
    if before == now:
        return position
    batches = math.ceil(position.rows * before / (now * config.training.batch_size))
    return dataclasses.replace(position, rows=batches * config.training.batch_size)


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


def _has_checkpoint(directory: Path) -> bool:
    try:
        return bool(find_checkpoint(directory))
    except CheckpointError:
        return False


def _put_aside(config: TrainConfig, *, fresh: bool) -> list[str]:
    """Renames what a run would overwrite in its folder and did not write itself, and says so: records of a run whose
    checkpoints are not there, and a config.yaml that somebody wrote."""
    notes, run_dir = [], Path(config.run_dir)

    def rename(path: Path, why: str) -> None:
        number = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.{n}").exists())
        kept = path.rename(path.with_name(f"{path.name}.{number}"))
        notes.append(f"{path}: {why}; it is now {kept}")

    records, written = run_dir / "metrics.jsonl", run_dir / "config.yaml"
    known = read_records(records) if fresh and records.is_file() else []
    if known and known[-1]["step"] > 0:
        rename(
            records, f"has records up to step {known[-1]['step']}, but no checkpoint is there and the run starts anew"
        )
    if written.is_file() and not _is_generated(written):
        rename(written, "not written by a run")
    return notes


def _is_generated(path: Path) -> bool:
    """Whether the file holds its settings and nothing else, as a run writes them; maybe of an earlier version, with
    other keys."""
    try:
        return path.read_text(encoding="utf-8") == dump_yaml(read_mapping(path))
    except (ConfigError, ValueError):
        return False


def _write_config(config: TrainConfig) -> None:
    """Writes the resolved config into the run's folder, atomically."""
    if jax.process_index() == 0:
        path = Path(config.run_dir) / "config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, config_text(_recorded(config)))


def _next_steps(config: TrainConfig, *, step: int) -> str:
    # The interpreter as the user could type it: the one of a virtual environment that is not activated, say.
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else "python"
    run_dir, file = (shlex.quote(str(path)) for path in (config.run_dir, Path(config.run_dir) / "config.yaml"))
    return (
        f"Everything is in {config.run_dir}: "
        f"{python} -m train.generate {run_dir} --prompt TEXT samples from it; "
        f"{python} -m train {file} training.steps={2 * max(step, config.training.steps)} goes on"
    )

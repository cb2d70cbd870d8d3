"""The two ends of a step that is on its way: the batch that it is given, and what its metrics say when it is done."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from train.assemble import memory_in_use
from train.data import Data
from train.metrics import MetricsConfig, MetricsLog
from train.placement import BatchPlacement
from train.progress import Display
from train.spikes import RecentLosses, SpikeError
from train.step import Metrics, NonFiniteError, TrainingConfig
from train.watch import Watch


class Batches:
    """This process's part of the batches of training, read ahead as long as each follows the one before.

    Args:
      data: Where the rows come from.
      batch_size: Rows of a batch.
      placement: Which of its rows and slots this process reads.
    """

    def __init__(self, data: Data, *, batch_size: int, placement: BatchPlacement):
        self._data, self._batch_size, self._placement = data, batch_size, placement
        self._iterator: Iterator[dict[str, np.ndarray]] | None = None
        self._next = 0

    def at(self, rows: int) -> dict[str, np.ndarray]:
        """The batch whose first row has this number, a multiple of the batch size."""
        if self._iterator is None or rows != self._next:
            self.close()
            self._iterator = self._data.batches(
                start_step=rows // self._batch_size,
                batch_size=self._batch_size,
                rows=self._placement.rows,
                slots=self._placement.slots,
            )
        self._next = rows + self._batch_size
        return next(self._iterator)

    def close(self) -> None:
        """Ends the threads that read ahead."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """A step for which the run goes back."""

    step: int
    rows: int
    """The row behind its batch."""
    what: str
    """What was wrong with it, to begin a line with."""


class StepsInFlight:
    """Steps that were dispatched and whose metrics are yet to be waited for, checked, shown and recorded."""

    stop = False
    """Whether the metrics of a finished step say that a process was asked to stop."""
    bad: BadStep | None = None
    """The first finished step for which the run is to go back; no later one is looked at."""
    losses: RecentLosses
    """Those that the next steps are judged by."""

    def __init__(
        self,
        config: TrainingConfig,
        metrics: MetricsConfig,
        data: Data,
        watch: Watch,
        log: MetricsLog,
        display: Display,
    ):
        self._config, self._every, self._data = config, metrics.every, data
        self._watch, self._log, self._display = watch, log, display
        self._steps: deque[tuple[int, Metrics, int]] = deque()
        self._skipped_in_a_row = 0
        self.losses = RecentLosses(config.spikes)

    def add(self, step: int, metrics: Metrics, *, rows: int) -> None:
        """Adds a step; `rows` is the row behind its batch."""
        self._steps.append((step, metrics, rows))

    def wait(self, *, at_most: int) -> None:
        """Waits for the oldest steps until at most so many are left."""
        while len(self._steps) > at_most:
            self._finish(*self._steps.popleft())

    def forget(self) -> BadStep:
        """The step for which the run goes back; it and those behind it are left."""
        self.wait(at_most=0)
        bad, self.bad = self.bad, None
        self._skipped_in_a_row = 0
        return bad

    def _finish(self, step: int, metrics: Metrics, rows: int) -> None:
        values: dict[str, Any] = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self.stop |= values.pop("stop", False)
        if self.bad is not None:
            return
        if not math.isfinite(values["bits_per_byte"]):  # sources of bare ids have no bytes
            del values["bits_per_byte"]
        # Of the whole batch, of which this process may have read a part only.
        batch_size = self._config.batch_size
        self._watch.step_ended(self._data.document_lengths(step=rows // batch_size - 1, batch_size=batch_size))
        self._display.step(step)
        is_bad = not values["finite"] or values.get("spike", False)
        host = [values.pop(name) for name in ("slowest_place", "slowest_seconds", "mean_seconds") if name in values]
        if is_bad or step % self._every == 0 or step == self._config.steps:
            seconds = self._watch.seconds_a_step()
            if host:
                slowest, line = self._watch.slowest_process(*host)
                values |= slowest
                if line is not None:
                    self._display.note(f"step {step}: {line}")
            values |= self._watch.figures()
            memory = memory_in_use()
            if memory is not None:
                values["memory_gib"] = memory / 2**30
            self._log.write(step, values)
            seconds_left = None if seconds is None else seconds * (self._config.steps - step)
            self._display.record(step, values, seconds_left=seconds_left)
            self._watch.recorded()
        if is_bad:
            self._handle_bad(step, values, rows)
        else:
            self._skipped_in_a_row = 0
        if values["finite"] and (not is_bad or self._config.spikes.action == "warn"):
            self.losses.add(step, values["loss"])

    def _handle_bad(self, step: int, values: dict[str, Any], rows: int) -> None:
        if not values["finite"]:
            action = self._config.on_nonfinite
            what = f"step {step}: loss {values['loss']} and gradient norm {values['grad_norm']} are not both finite"
        else:
            action = self._config.spikes.action
            what = f"step {step}: loss {values['loss']:.4f} is a spike, above {self.losses.limit(step):.4f}"
        match action:
            case "stop":
                raise NonFiniteError(
                    f"{what}; stopped. Lower optimizer.learning_rate, or set training.on_nonfinite=skip to leave out "
                    "such steps; running again goes on from the last checkpoint"
                )
            case "warn":
                self._display.note(f"warning: {what}")
            case "rewind":
                self.bad = BadStep(step=step, rows=rows, what=what)
            case "skip":
                self._skipped_in_a_row += 1
                if self._skipped_in_a_row > self._config.max_repeats:
                    raise SpikeError(
                        f"{what}; {self._config.max_repeats} steps in a row were skipped before. Lower "
                        "optimizer.learning_rate, look at the data, or raise training.max_repeats; running again "
                        "goes on from the last checkpoint"
                    )
                self._display.note(f"{what}; skipped, {values['skipped_steps']} so far")

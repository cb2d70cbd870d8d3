"""Losses that jump: when a loss counts as a spike, and which rows a run has gone back behind and leaves out."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.files import write_text

LAG = 2
"""A step is judged by the losses up to LAG steps before it: those that are known when it is dispatched."""
_LEAST_DEVIATION = 1e-3  # of the median, for losses that hardly differ


class SpikeError(RuntimeError):
    """Steps that go wrong time and again stopped the run, or its record of left-out rows cannot be read."""


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """When a loss is too high to be trusted, and what is done about it."""

    action: Literal["ignore", "warn", "skip", "rewind"] = "ignore"
    """What a spike does. `warn`: a line. `skip`: the step is not applied and counted, as a non-finite one. `rewind`:
    the run goes back to its last checkpoint and on behind the batch of the spike, leaving out the batches between."""
    threshold: float = 20.0
    """A loss is a spike above median + threshold x MAD of the recent ones: the median of their distances to the median,
    taken as 0.001 of the median where it is less."""
    window: int = 100
    """How many recent losses these are; half as many must be there before a loss is judged."""

    def __post_init__(self):
        if not self.threshold > 0:
            raise ValueError(f"threshold: got {self.threshold}, wanted a number above 0; 20 is the default")
        if self.window < 4:
            raise ValueError(f"window: got {self.window}, wanted 4 losses or more")


class RecentLosses:
    """The losses that the next steps are judged by: of steps that were applied, in their order.

    Args:
      config: How many, and how far above them is too far.
      losses: (step, loss) of those before, as `saved` gave them.
    """

    def __init__(self, config: SpikeConfig, losses: Iterable[tuple[int, float]] = ()):
        self._config = config
        self._losses = [(int(step), float(loss)) for step, loss in losses]

    def add(self, step: int, loss: float) -> None:
        """Adds the loss of a step that was applied."""
        self._losses = [*self._losses, (step, loss)][-(self._config.window + LAG) :]

    def limit(self, step: int) -> float:
        """The loss above which this step is a spike; inf while too few losses are known.

        It depends on the losses of steps up to step - LAG alone, however many of the others are known already.
        """
        known = [loss for number, loss in self._losses if number <= step - LAG][-self._config.window :]
        if len(known) < self._config.window // 2:
            return math.inf
        median = statistics.median(known)
        deviation = statistics.median(abs(loss - median) for loss in known)
        return median + self._config.threshold * max(deviation, _LEAST_DEVIATION * abs(median))

    def saved(self) -> list[tuple[int, float]]:
        """What a checkpoint keeps of them."""
        return list(self._losses)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Rows that a run leaves out, because a batch at their end made it go back to a checkpoint."""

    start: int
    """The first: the next that the checkpoint would have read."""
    stop: int
    """One more than the last."""
    checkpoint: int
    """The step that the run went back to."""
    spike: int
    """The step that went wrong."""
    seq_len: int | None = None
    """Of the rows. None, of earlier versions, means the length of the run's."""


class LeftOutRows:
    """The rows that a run leaves out, kept in `skipped_rows.json` of its folder, so that a resumed run does as well.

    Args:
      run_dir: The run's folder.
      fresh: Whether the run begins; what an earlier one left is then not heeded, and overwritten.
      writes: Whether this process writes the file.
      seq_len: Of the rows that are read; what is left out of rows of another length says nothing of them.
    Raises: SpikeError where the file cannot be read.
    """

    def __init__(self, run_dir: str | Path, *, fresh: bool, writes: bool, seq_len: int):
        self._path = Path(run_dir) / "skipped_rows.json"
        self._writes, self._seq_len = writes, seq_len
        self.parts: list[LeftOut] = []
        if self._path.exists():
            if fresh:
                self._write()
            else:
                self.parts = self._read()

    def next(self, rows: int, batch_size: int) -> int:
        """Where the next batch begins, of a run that has come to this row: behind what is left out."""
        moved = True
        while moved:
            moved = False
            for part in self.parts:
                if part.seq_len in (None, self._seq_len) and part.start <= rows < part.stop:
                    rows, moved = -(-part.stop // batch_size) * batch_size, True
        return rows

    def add(self, part: LeftOut) -> None:
        """Leaves out these rows too, from now on."""
        self.parts.append(part)
        self._write()

    def rewinds_to(self, checkpoint: int) -> int:
        """How often the run has gone back to this step."""
        return sum(part.checkpoint == checkpoint for part in self.parts)

    def _read(self) -> list[LeftOut]:
        try:
            return [LeftOut(**part) for part in json.loads(self._path.read_text(encoding="ascii"))]
        except (OSError, ValueError, TypeError) as error:
            raise SpikeError(
                f"{self._path}: got {' '.join(str(error).split())[:100]}, wanted the rows that the run leaves out; "
                "delete the file to read them all, or restore it"
            ) from None

    def _write(self) -> None:
        if self._writes:
            parts = [dataclasses.asdict(part) for part in self.parts]
            write_text(self._path, json.dumps(parts, indent=1) + "\n")

"""Profiles of some steps, for TensorBoard's profile plugin and xprof: asked for in the config, or by SIGUSR1."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import jax


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps are profiled. SIGUSR1 to a process profiles its next ones at any time."""

    start: int | None = None
    """The first step to profile, counted from 1. Null: only what SIGUSR1 asks for."""
    steps: int = 3
    """How many steps a profile holds."""

    def __post_init__(self):
        if self.start is not None and self.start < 1:
            raise ValueError(f"start: got {self.start}, wanted a step from 1 on, or null for none")
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, wanted 1 or more")


class Profiler:
    """Profiles steps of this process into `profile/step_N` of the run's folder, N being the first.

    As a context it takes SIGUSR1, and ends a profile that the end of the run has cut short.

    Args:
      run_dir: The run's folder.
      config: Which steps.
      note: Called with a line when a profile is complete.
    """

    def __init__(self, run_dir: str | Path, config: ProfileConfig, note: Callable[[str], None]):
        self._folder = Path(run_dir) / "profile"
        self._config, self._note = config, note
        self._asked = False
        self._last: int | None = None

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGUSR1, self._handle)
        return self

    def __exit__(self, *_) -> None:
        if self._last is not None:
            jax.profiler.stop_trace()
        signal.signal(signal.SIGUSR1, self._previous)

    def before(self, step: int) -> None:
        """Starts a profile if one is due at this step."""
        if self._last is None and (self._asked or step == self._config.start):
            self._asked = False
            self._last = step + self._config.steps - 1
            self._into = self._folder / f"step_{step}"
            if jax.process_count() > 1:  # two of one host would write the same files
                self._into /= f"rank_{jax.process_index()}"
            jax.profiler.start_trace(self._into)

    def after(self, step: int, results: Any) -> None:
        """Ends the profile if this was its last step, once the step's results are there."""
        if step == self._last:
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            self._last = None
            self._note(f"step {step}: profiled {self._config.steps} steps into {self._into}")

    def _handle(self, _: int, __: FrameType | None) -> None:
        self._asked = True
        os.write(2, b"\nSIGUSR1: profiling the next steps\n")  # print could be interrupted inside its own buffer

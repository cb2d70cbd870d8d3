"""How long steps take, what they wait for, and which process holds up the others."""

import contextlib
import dataclasses
import resource
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int

from longctx.model import ModelConfig
from longctx.model_flops import forward_flops
from train.devices import DeviceTable, model_flops_utilization

_RECENT_STEPS = 100
_HOST_NAME_BYTES = 64
_SLOW_SHARE = 0.1  # of a step, from which on a process is named that is much slower than the mean
_SLOW_TIMES = 2.0


class Watch:
    """Times of the steps of a run, as this process sees them.

    A step's duration is the time from the end of the one before to its own, pauses (compilation, evaluation, saving)
    left out. The host time of a step is what its process takes to get its part of the batch and to place it. Devices
    wait for each other in every step, so durations are the same everywhere; host times tell which process is late.
    """

    def __init__(self, mesh: Mesh, model: ModelConfig, table: DeviceTable):
        self._mesh, self._model, self._table = mesh, model, table
        self._durations: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._running: _Sums | None = None
        self._last_end = 0.0
        self._host_names = _host_names()
        self._named: int | None = None

    def restart(self) -> None:
        """Times from now on: what lies behind is a pause."""
        self._last_end = time.monotonic()
        self._running = _Sums(start=self._last_end)

    def recorded(self) -> None:
        """Sums up from the end of the last step on, unless nothing is timed yet: the first step, which is compiled."""
        if self._running is not None:
            self._running = _Sums(start=self._last_end)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around what waits for the next batch and places it."""
        began = time.monotonic()
        yield
        if self._running is not None:
            self._running.reading += time.monotonic() - began

    @property
    def host_seconds(self) -> float:
        """Host time of a step of this process: the mean since the last record or pause."""
        return 0.0 if self._running is None else self._running.reading / max(self._running.steps, 1)

    def step_ended(self, lengths: Int[np.ndarray, " documents"]) -> None:
        """Counts a step whose batch has documents of these lengths."""
        if self._running is None:
            return
        now = time.monotonic()
        self._durations.append(now - self._last_end)
        self._last_end = now
        self._running.steps += 1
        self._running.tokens += int(lengths.sum())
        self._running.forward_flops += forward_flops(self._model, lengths)

    def seconds_a_step(self) -> float | None:
        """Mean since the last record or pause."""
        if self._running is None or not self._running.steps:
            return None
        return (time.monotonic() - self._running.start) / self._running.steps

    def figures(self) -> dict[str, float]:
        """What a record says of time and memory; docs/training.md explains each."""
        found: dict[str, float] = {}
        sums = self._running
        if sums is not None and sums.steps:
            seconds = time.monotonic() - sums.start
            found["tokens_per_second"] = sums.tokens / seconds
            mfu = model_flops_utilization(
                sums.forward_flops,
                seconds,
                device_kind=self._mesh.devices.flat[0].device_kind,
                num_devices=self._mesh.size,
                table=self._table,
            )
            if mfu is not None:
                found["mfu"] = mfu
            found["data_wait_share"] = min(sums.reading / seconds, 1.0)
            median, high = np.percentile(self._durations, [50, 95])
            found |= {
                "step_seconds_p50": float(median),
                "step_seconds_p95": float(high),
                "step_seconds_max": max(self._durations),
            }
        found["host_memory_gib"] = _peak_host_memory() / 2**30
        return found

    def slowest_process(self, place: int, slowest: float, mean: float) -> tuple[dict[str, float], str | None]:
        """Which process has the longest host time.

        Args:
          place: The device whose process that is, by its number in the mesh.
          slowest: Its host time of a step, in seconds.
          mean: Over all devices.
        Returns: what a record says of it; and a line that names it where it is newly much slower than the others, by
          much of a step.
        """
        rank = self._mesh.devices.flat[place].process_index
        figures = {"slowest_process": rank, "slowest_process_seconds": slowest}
        step = self.seconds_a_step()
        is_slow = step is not None and slowest > _SLOW_SHARE * step and slowest > _SLOW_TIMES * mean
        line = None
        if is_slow and rank != self._named:
            line = (
                f"rank {rank} on {self._host_names[rank]} takes {slowest:.3f} s a step to read its rows, {mean:.3f} s "
                f"is the mean of the devices, {step:.3f} s a whole step: the others wait for it"
            )
        self._named = rank if is_slow else None
        return figures, line


@dataclasses.dataclass(kw_only=True)
class _Sums:
    """What was done since a moment without pauses."""

    start: float
    steps: int = 0
    tokens: int = 0
    forward_flops: float = 0.0
    reading: float = 0.0


def _host_names() -> Mapping[int, str]:
    """The host of each rank; asks the other processes, so all must call it at the same point."""
    if jax.process_count() == 1:
        return {}
    name = socket.gethostname().encode()[:_HOST_NAME_BYTES]
    mine = np.frombuffer(name.ljust(_HOST_NAME_BYTES, b"\0"), np.uint8)
    names = multihost_utils.process_allgather(mine)
    return {rank: bytes(row).rstrip(b"\0").decode(errors="replace") for rank, row in enumerate(names)}


def _peak_host_memory() -> int:
    """Most bytes of host memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak

"""Timing programs one by one, and what they hold in memory."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MIN_SECONDS = 0.02  # of one measurement: it then holds many calls of a short kernel, and none of their dispatch
MAX_CALLS = 1000
MIN_REPETITIONS = 5  # however long they take
# Edge of the square matmul that says what the machine can do; a CPU would take minutes for a GPU's.
CEILING_SIZE = {"gpu": 8192, "tpu": 8192, "cpu": 512}
COPY_SIZE = {"gpu": 2**30, "tpu": 2**30, "cpu": 2**24}  # bytes; far beyond any cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds a call takes: the median, and between which 80 % of the measurements lie."""

    median: float
    low: float
    high: float
    repetitions: int
    calls: int


def time_calls(
    call: Callable[[], Any],
    *,
    repetitions: int = 20,
    max_calls: int = MAX_CALLS,
    max_seconds: float | None = None,
    warm_seconds: float = 0.0,
) -> Timing:
    """Times a call that returns arrays before they are computed.

    A measurement is as many calls as take MIN_SECONDS, queued one behind the other, until the last is done.

    Args:
      max_calls: Calls that may be queued at once.
      max_seconds: Measures no more often than takes about so long, but MIN_REPETITIONS times if asked to.
      warm_seconds: Calls it for so long before it measures. A GPU that was idle runs for a moment above the clock
        that its limit of power lets it keep.
    """
    jax.block_until_ready(call())
    calls, seconds = 1, _seconds(call, 1)
    while seconds < MIN_SECONDS and calls < max_calls:
        calls = min(max_calls, max(2 * calls, math.ceil(1.2 * calls * MIN_SECONDS / seconds)))
        seconds = _seconds(call, calls)
    start = time.perf_counter()
    while time.perf_counter() - start < warm_seconds:
        _seconds(call, calls)
    if max_seconds is not None:
        repetitions = min(repetitions, max(MIN_REPETITIONS, int(max_seconds / seconds)))
    measured = [_seconds(call, calls) / calls for _ in range(repetitions)]
    low, median, high = np.percentile(measured, (10, 50, 90)).tolist()
    return Timing(median=median, low=low, high=high, repetitions=repetitions, calls=calls)


def _seconds(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        del result  # or the longest rows would need memory for the results of two calls
        result = call()
    jax.block_until_ready(result)
    return time.perf_counter() - start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceiling:
    """FLOP/s that a square bfloat16 matmul of this size reaches on one device."""

    size: int
    flops: float

    def __str__(self) -> str:
        return f"{self.size}^3 matmul {self.flops / 1e12:.3g} TFLOP/s"


def matmul_ceiling(*, repetitions: int = 20) -> Ceiling:
    """Measures it: 2 size^3 over the median time."""
    size = CEILING_SIZE.get(jax.default_backend(), CEILING_SIZE["cpu"])
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    matmul = jax.jit(jnp.matmul).lower(a, b).compile()
    timing = time_calls(lambda: matmul(a, b), repetitions=repetitions)
    return Ceiling(size=size, flops=2 * size**3 / timing.median)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """Bytes a second, read and written together, at which one device copies an array of this many bytes."""

    size: int
    bytes: float

    def __str__(self) -> str:
        return f"copy of {self.size / 2**20:,.0f} MiB {self.bytes / 1e9:,.0f} GB/s read and written"


def copy_bandwidth(*, repetitions: int = 20) -> Bandwidth:
    """Measures it: 2 size over the median time."""
    size = COPY_SIZE.get(jax.default_backend(), COPY_SIZE["cpu"])
    x = jnp.zeros(size // 2, jnp.bfloat16)
    copy = jax.jit(jnp.copy).lower(x).compile()
    timing = time_calls(lambda: copy(x), repetitions=repetitions)
    return Bandwidth(size=size, bytes=2 * size / timing.median)


def memory_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program holds on a device: arguments, results that are not arguments, and temporaries."""
    stats = compiled.memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + results + stats.temp_size_in_bytes

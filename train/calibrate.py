"""python -m train.calibrate --out FILE: how fast the devices at hand and their links are, measured in about a minute.

Writes one entry of a table of devices (train/devices.yaml explains its figures), which `strategy: auto` and
`train.plan` go by where a config's `device_table` names the file. Started as training is, one process a host, it
measures the links inside a host and those between hosts; rank 0 writes.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from longctx import masks
from pallas_kernels import Tokens, blockwise_attention, dispatch
from train.command import check_output, run_command
from train.devices import NARROW_HEAD_DIM, AttentionSpeed, DeviceSpec, DeviceTable, device_table
from train.distributed import DistributedConfig, initialize
from train.planning.cost import BACKWARD_MATMULS
from train.schema import to_yaml

_REPETITIONS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What is measured, so large that an accelerator, or a CPU, takes milliseconds for it.

    Attributes:
      matmul: Rows and columns of square matrices.
      copied: Bytes of an array that is copied.
      tokens, heads, head_dim: Of causal attention, whose heads are wide; narrow ones are measured too.
      sent: Bytes of the small and the large message.
      dtype: Of all of it.
    """

    matmul: int
    copied: int
    tokens: int
    heads: int
    head_dim: int
    sent: tuple[int, int]
    dtype: str


_ACCELERATOR = _Sizes(
    matmul=8192, copied=2**30, tokens=16384, heads=16, head_dim=128, sent=(2**16, 2**26), dtype="bfloat16"
)
_CPU = _Sizes(matmul=1024, copied=2**25, tokens=1024, heads=4, head_dim=128, sent=(2**10, 2**22), dtype="float32")


def calibrate(devices: Sequence[jax.Device], say: Callable[[str], None]) -> DeviceTable:
    """Measures and returns a table of one entry, under the name that the package's own has for these devices.

    Args:
      devices: Of all processes; those of a process share a host.
      say: Is told each figure.
    """
    device = jax.local_devices()[0]
    sizes = _CPU if device.platform == "cpu" else _ACCELERATOR
    known = device_table().of_kind(device.device_kind)
    with jax.default_device(device):
        matmul, copy = _matmul_flops(sizes), _copy_bytes(sizes)
        say(f"matmul {matmul / 1e12:.4g} TFLOP/s, memory {copy / 1e9:.4g} GB/s")
        attention: dict[str, dict[str, float]] = {}
        for head_dim in (sizes.head_dim, NARROW_HEAD_DIM):
            implementation, forward, backward = _attention_flops(sizes, head_dim)
            say(
                f"attention by {implementation}, heads of {head_dim}: {forward / 1e12:.4g} TFLOP/s forward, "
                f"{backward / 1e12:.4g} backward"
            )
            # One that serves narrow heads alone has its only speeds of them.
            suffix = "_narrow" if implementation in attention else ""
            speeds = attention.setdefault(implementation, {})
            speeds |= {f"forward{suffix}": _rounded(forward / 1e12), f"backward{suffix}": _rounded(backward / 1e12)}
    name, spec = known or (
        device.platform,
        DeviceSpec(device_kinds=(device.device_kind,), peak_tflops=_rounded(matmul / 1e12)),
    )
    measured = dict(
        matmul_tflops=_rounded(matmul / 1e12),
        memory_gb_per_s=_rounded(copy / 1e9),
        attention={implementation: AttentionSpeed(**speeds) for implementation, speeds in attention.items()},
        link=spec.link or "switch",
    )
    hosts = sorted({d.process_index for d in devices})
    grid = np.array([[d for d in devices if d.process_index == host] for host in hosts])
    if grid.shape[1] > 1:
        latency, bandwidth = _link(grid, "inner", sizes)
        say(f"links between {grid.shape[1]} devices of a host: {bandwidth / 1e9:.4g} GB/s, {1e6 * latency:.3g} us")
        measured |= dict(link_gb_per_s=_rounded(bandwidth / 1e9), latency_us=_rounded(1e6 * latency))
    if len(hosts) > 1:
        latency, bandwidth = _link(grid, "outer", sizes)
        say(f"links between {len(hosts)} hosts: {bandwidth / 1e9:.4g} GB/s, {1e6 * latency:.3g} us")
        measured |= dict(network_gb_per_s=_rounded(bandwidth / 1e9), network_latency_us=_rounded(1e6 * latency))
    return DeviceTable(devices={name: dataclasses.replace(spec, **measured)})


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _seconds(function: Callable, *arguments) -> float:
    """Of a call that is compiled already: the median of a few."""
    function(*arguments)
    taken = []
    for _ in range(_REPETITIONS):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _repeated(function: Callable, times: int) -> Callable:
    """`x -> function(function(... x))`, compiled: one call of many, beside which the launch of a program is little."""

    def run(x):
        return jax.lax.fori_loop(0, times, lambda _, x: function(x), x)

    return jax.jit(run)


def _difference(function: Callable, x: jax.Array, few: int = 2, many: int = 10) -> float:
    """Seconds of one application of `x -> function(x)`, without what a program takes to start."""
    return _of_one(lambda times: _seconds(_repeated(function, times), x), few, many)


def _seconds_queued(function: Callable, *arguments, few: int = 2, many: int = 10) -> float:
    """Of one call of a compiled program of many that follow each other on the device, as layers of a step do."""

    def calls(times):
        return [function(*arguments) for _ in range(times)][-1]

    return _of_one(lambda times: _seconds(calls, times), few, many)


def _of_one(seconds_of: Callable[[int], float], few: int, many: int) -> float:
    return max(seconds_of(many) - seconds_of(few), 1e-9) / (many - few)


def _matmul_flops(sizes: _Sizes) -> float:
    """Of random numbers: equal ones take less power, and a device at its limit of power is the faster for it."""
    size = sizes.matmul
    x = (jax.random.normal(jax.random.key(0), (size, size)) * size**-0.5).astype(sizes.dtype)
    return 2 * size**3 / _difference(lambda y: x @ y, x)


def _copy_bytes(sizes: _Sizes) -> float:
    x = jnp.zeros((sizes.copied // jnp.dtype(sizes.dtype).itemsize,), sizes.dtype)
    return 2 * sizes.copied / _difference(lambda y: y + jnp.ones((), y.dtype), x)


def _attention_flops(sizes: _Sizes, head_dim: int) -> tuple[str, float, float]:
    """The implementation, and FLOP/s forward and backward over the pairs of a causal mask."""
    shape = (1, sizes.tokens, sizes.heads, head_dim)
    q, k, v = (jax.random.normal(key, shape).astype(sizes.dtype) for key in jax.random.split(jax.random.key(0), 3))
    attend = functools.partial(blockwise_attention, mask=masks.causal(), tokens=Tokens())
    flops = 4 * sizes.tokens * (sizes.tokens + 1) / 2 * sizes.heads * head_dim

    def both(q, k, v):
        out, vjp = jax.vjp(attend, q, k, v)
        return vjp(out)

    with dispatch.record() as taken:
        forward = _seconds_queued(jax.jit(attend), q, k, v)
    backward = max(_seconds_queued(jax.jit(both), q, k, v) - forward, 1e-9)
    return dict(taken)["blockwise_attention_forward"], flops / forward, BACKWARD_MATMULS * flops / backward


def _link(grid: np.ndarray, axis: str, sizes: _Sizes) -> tuple[float, float]:
    """Latency in seconds and bandwidth in bytes per second of a permute to the neighbour along an axis.

    From a small and a large message: seconds = latency + bytes / bandwidth.
    """
    mesh = jax.sharding.Mesh(grid, ("outer", "inner"))
    size = mesh.shape[axis]
    spec = jax.P(("outer", "inner"))

    def permute(x):
        return jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])

    seconds = []
    for num_bytes, many in zip(sizes.sent, (100, 10), strict=True):  # a small one takes next to nothing
        sharded = jax.jit(
            lambda n=num_bytes: jnp.zeros((mesh.size * n,), jnp.int8), out_shardings=jax.NamedSharding(mesh, spec)
        )()
        sent = jax.shard_map(permute, mesh=mesh, in_specs=spec, out_specs=spec)
        seconds.append(_difference(sent, sharded, many=many))
    small, large = sizes.sent
    bandwidth = (large - small) / max(seconds[1] - seconds[0], 1e-9)
    return max(seconds[0] - small / bandwidth, 0.0), bandwidth


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE", required=True, help="where the table is written, such as speeds.yaml")
    parser.add_argument("--virtual-cpu-devices", metavar="N", type=int, help="measure N virtual CPU devices")
    options = parser.parse_args(arguments)
    if options.virtual_cpu_devices is not None and options.virtual_cpu_devices < 1:
        parser.error(
            f"--virtual-cpu-devices: got {options.virtual_cpu_devices}, wanted 1 or more; leave it out to measure the "
            "machine's devices"
        )

    def run() -> None:
        check_output("--out", options.out)
        devices = initialize(DistributedConfig(virtual_cpu_devices=options.virtual_cpu_devices))
        table = calibrate(devices, say=print if jax.process_index() == 0 else lambda text: None)
        if jax.process_index() == 0:
            lines = f"# Measured by python -m train.calibrate on {len(devices)} x {devices[0].device_kind}.\n"
            Path(options.out).write_text(lines + to_yaml(table), encoding="utf-8")
            print(f"wrote {options.out}: set device_table={options.out} in a config")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())

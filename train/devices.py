"""What a device of each kind does: the table behind MFU and predicted times."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from train import schema
from train.plain_yaml import ConfigError, read_mapping

ASSUMED_MATMUL_SHARE = 0.85  # of the peak, where no matmul was measured
NARROW_HEAD_DIM = 64
"""Heads up to this have as many exponentials as wide ones for half of the matmuls."""


_DIVISORS = ("peak_tflops", "matmul_tflops", "memory_gb_per_s", "host_gb_per_s", "link_gb_per_s", "network_gb_per_s")
"""Figures of a device that something is divided by."""


def _check_positive(entry: object, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(entry, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}: got {value}, wanted a number above 0; measure it by train.calibrate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpeed:
    """TFLOP/s of an implementation over the tiles that it visits; None where it has no such pass.

    Those of narrow heads, of NARROW_HEAD_DIM or less, are None where they are those of the others.
    """

    forward: float
    backward: float | None = None
    forward_narrow: float | None = None
    backward_narrow: float | None = None

    def __post_init__(self):
        _check_positive(self, ("forward", "backward", "forward_narrow", "backward_narrow"))

    def of(self, phase: Literal["forward", "backward"], head_dim: int) -> float | None:
        """TFLOP/s of a pass with heads of `head_dim`."""
        narrow = getattr(self, f"{phase}_narrow") if head_dim <= NARROW_HEAD_DIM else None
        return getattr(self, phase) if narrow is None else narrow


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One kind of device; devices.yaml explains each figure."""

    device_kinds: tuple[str, ...]
    peak_tflops: float
    matmul_tflops: float | None = None
    attention: Mapping[str, AttentionSpeed] = dataclasses.field(default_factory=dict)
    memory_gib: float | None = None
    memory_gb_per_s: float | None = None
    host_memory_gib: float | None = None
    host_gb_per_s: float | None = None
    link: Literal["torus", "switch"] | None = None
    link_gb_per_s: float | None = None
    network_gb_per_s: float | None = None
    latency_us: float = 0.0
    network_latency_us: float | None = None

    def __post_init__(self):
        _check_positive(self, _DIVISORS)

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s of the datasheet."""
        return self.peak_tflops * 1e12

    @property
    def matmul_flops(self) -> float:
        """FLOP/s that a large bfloat16 matmul reaches."""
        return 1e12 * (self.matmul_tflops or ASSUMED_MATMUL_SHARE * self.peak_tflops)

    def attention_flops(self, implementation: str, phase: Literal["forward", "backward"], head_dim: int) -> float:
        """FLOP/s over visited tiles; that of a matmul where the table has no figure."""
        measured = self.attention.get(implementation)
        speed = None if measured is None else measured.of(phase, head_dim)
        return self.matmul_flops if speed is None else 1e12 * speed

    @property
    def fastest_attention(self) -> str:
        """The implementation that is likely to run where nobody can be asked which serves the calls."""
        return max(self.attention, key=lambda name: self.attention[name].forward, default="xla")

    @property
    def has_speeds(self) -> bool:
        """Whether times can be predicted."""
        return None not in (self.memory_gb_per_s, self.link, self.link_gb_per_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceTable:
    """All kinds of devices, by the name that `train.plan --devices` takes."""

    devices: Mapping[str, DeviceSpec]

    def of_kind(self, device_kind: str) -> tuple[str, DeviceSpec] | None:
        """Name and entry of what JAX calls `device_kind`; None where the table has none (CPUs among them)."""
        for name, spec in self.devices.items():
            if any(part in device_kind for part in spec.device_kinds):
                return name, spec
        return None


def device_table(path: str | None = None) -> DeviceTable:
    """The table of a file, or the one that comes with the package.

    Raises: ConfigError with one line a problem, each of which names the file.
    """
    if path is None:
        return _own_table()
    data = read_mapping(path)
    try:
        return schema.parse(DeviceTable, data)
    except ConfigError as error:
        raise ConfigError(*(f"{path}: {problem}" for problem in error.args)) from None


@functools.cache
def _own_table() -> DeviceTable:
    return schema.load(DeviceTable, Path(__file__).with_name("devices.yaml"))


def model_flops_utilization(
    forward_flops: float, seconds: float, *, device_kind: str, num_devices: int, table: DeviceTable
) -> float | None:
    """MFU = 3 x forward FLOPs / seconds / (devices x peak); None where the table does not list the device.

    The backward pass counts twice the forward one; recomputation (remat) counts nothing.
    Reference: Chowdhery et al., PaLM, arXiv:2204.02311, Appendix B.
    """
    found = table.of_kind(device_kind)
    return None if found is None else 3 * forward_flops / seconds / (num_devices * found[1].peak_flops)

"""Devices to plan for: those at hand, or named ones that only a compiler needs to know."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh

from longctx.sharding import MeshConfig, make_mesh
from train.config import ConfigError
from train.devices import DeviceSpec, DeviceTable
from train.distributed import host_memory_bytes
from train.planning.links import Place

TPUS = ("v5e", "v5p", "v6e", "tpu7x")
GPUS = ("h100", "h200")
GPUS_A_HOST = 8
_CORES_A_CHIP = {"tpu7x": 2}
_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Devices to plan for.

    Attributes:
      name: As the user wrote it.
      num_devices: How many.
      platform: "cpu", "gpu" or "tpu".
      device_kind: What JAX calls them; the name where no compiler is at hand.
      spec: Their entry in the table of devices, if there is one.
      devices: For the compiler; None where there is none.
      missing: Why there is no compiler, with the remedy; None where there is one.
      memory_bytes: What a program may use of one device; None where nobody knows.
      memory_note: Where that figure comes from.
      host_memory_bytes: What one device may use of its host's memory; None where nobody knows.
      host_memory_note: Where that figure comes from.
    """

    name: str
    num_devices: int
    platform: str
    device_kind: str
    spec: DeviceSpec | None
    devices: Sequence[jax.Device] | None
    missing: str | None = None
    memory_bytes: int | None
    memory_note: str
    host_memory_bytes: int | None
    host_memory_note: str

    def mesh(self, config: MeshConfig) -> Mesh | AbstractMesh:
        """The mesh of a config over these devices; an abstract one where there is no compiler.

        Raises: ValueError where the mesh does not use exactly these devices.
        """
        if self.devices is not None:
            return make_mesh(config, self.devices)
        sizes = config.sizes(self.num_devices)
        return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def named_target(name: str, table: DeviceTable) -> Target:
    """The devices that a name such as v5p:8x8x8 or h100:64 describes, for compiling ahead of time.

    Must be called before JAX has started a backend: none of an accelerator is started.
    Raises: ConfigError for a name that describes nothing.
    """
    kind, _, size = name.partition(":")
    if kind not in TPUS + GPUS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise ConfigError(
            f"--devices: got {name!r}, wanted local, a TPU slice such as v5p:8x8x8 ({', '.join(TPUS)}) or a number of "
            f"GPUs such as h100:64 ({', '.join(GPUS)})"
        )
    if kind not in table.devices:
        raise ConfigError(f"--device-table: has no entry {kind}, which --devices {name} needs; add one")
    jax.config.update("jax_platforms", "cpu")
    return _tpu_target(kind, size, table) if kind in TPUS else _gpu_target(kind, size, table)


def local_target(devices: Sequence[jax.Device], table: DeviceTable) -> Target:
    """The devices at hand."""
    kind = devices[0].device_kind
    found = table.of_kind(kind)
    memory, note = _local_memory(devices)
    return Target(
        name="local",
        num_devices=len(devices),
        platform=devices[0].platform,
        device_kind=kind,
        spec=found and found[1],
        devices=devices,
        memory_bytes=memory,
        memory_note=note,
        host_memory_bytes=host_memory_bytes() // len(jax.local_devices()),
        host_memory_note="the machine's memory, shared by its devices",
    )


def places(devices: Sequence[jax.Device]) -> list[Place]:
    """Where devices are, for links.Links."""
    return [Place(d.process_index, tuple(getattr(d, "coords", None) or (d.id,))) for d in devices]


def _tpu_target(kind: str, size: str, table: DeviceTable) -> Target:
    spec = table.devices[kind]
    chips = math.prod(map(int, size.split("x")))
    common = dict(
        name=f"{kind}:{size}",
        platform="tpu",
        spec=spec,
        memory_bytes=round(spec.memory_gib * _GIB),
        memory_note="what the TPU's compiler allows",
        **_host_memory(spec),
    )
    missing = None if importlib.util.find_spec("libtpu") else "libtpu is not installed; pip install longctx-jax[plan]"
    if missing:
        devices_known = dict(device_kind=kind, devices=None, num_devices=chips * _CORES_A_CHIP.get(kind, 1))
        return Target(**common, **devices_known, missing=missing)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no metadata server, where there is no TPU
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile at the same time
    # Without these it warns that it does not find a TPU, which nobody expects here.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{size}").devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--devices: got {kind}:{size}, which is no slice that libtpu knows: {error}") from error
    return Target(**common, device_kind=devices[0].device_kind, devices=devices, num_devices=len(devices))


def _gpu_target(kind: str, size: str, table: DeviceTable) -> Target:
    if "x" in size or (int(size) > GPUS_A_HOST and int(size) % GPUS_A_HOST):
        raise ConfigError(f"--devices: got {kind}:{size}, wanted up to {GPUS_A_HOST} GPUs, or whole hosts of as many")
    count, spec = int(size), table.devices[kind]
    hosts = max(1, count // GPUS_A_HOST)
    fraction = preallocated_fraction()
    common = dict(
        name=f"{kind}:{size}",
        num_devices=count,
        platform="gpu",
        spec=spec,
        memory_bytes=round(fraction * spec.memory_gib * _GIB),
        memory_note=f"{fraction:g} of {spec.memory_gib:g} GiB: XLA_PYTHON_CLIENT_MEM_FRACTION",
        **_host_memory(spec),
    )
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    if not any(_installed(plugin) for plugin in plugins):
        missing = "JAX's CUDA plugin is not installed; pip install longctx-jax[plan-cuda]"
        return Target(**common, device_kind=kind, devices=None, missing=missing)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    description = Path(__file__).with_name("targets") / f"{kind}.txtpb"
    layout = f"1x{hosts}x{count // hosts}"
    devices = topologies.get_topology_desc(
        platform="cuda", topology_name=layout, topology=layout, target_config=description.read_text(encoding="utf-8")
    ).devices
    return Target(**common, device_kind=devices[0].device_kind, devices=devices)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def preallocated_fraction() -> float:
    """The part of a GPU's memory that JAX takes at its start; a program cannot have more."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if name in os.environ:
            return float(os.environ[name])
    return 0.75


def _host_memory(spec: DeviceSpec) -> dict[str, int | str | None]:
    gib = spec.host_memory_gib
    limit = None if gib is None else round(gib * _GIB)
    return dict(host_memory_bytes=limit, host_memory_note="host_memory_gib of the table of devices")


def _local_memory(devices: Sequence[jax.Device]) -> tuple[int | None, str]:
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"], "what JAX may use of the device"
    if devices[0].platform == "cpu":
        return host_memory_bytes() // len(devices), "the machine's memory, shared by its virtual devices"
    return None, "unknown"

"""Which processes and devices a run uses; must run before any other JAX operation."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from train.roll_call import RollCallError, roll_call

HOST_MEMORY_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
"""In the environment: how many GiB of the host's memory XLA may take for each GPU."""

_DEVICE_FILES = Path("/dev")
_label = ""


class DeviceError(RuntimeError):
    """The devices or processes that the config asks for cannot be had, on one line, with the remedy."""


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Devices and processes of a run."""

    virtual_cpu_devices: int | None = None
    """Run on this many virtual CPU devices in total, over all processes. Default: the devices that the machine has."""
    compilation_cache_dir: str | None = "~/.cache/longctx/compiled"
    """Folder in which JAX keeps compiled programs for the next start; null keeps none. JAX_COMPILATION_CACHE_DIR in the
    environment counts in its place."""
    coordinator_address: str | None = None
    """HOST:PORT at which rank 0 waits for the other processes. Default: what the environment tells (torchrun's
    variables, Open MPI, SLURM, Kubernetes jobs, TPU pods), else a single process."""
    num_processes: int | None = None
    """Processes of the run. Default: what the environment tells."""
    process_id: int | None = None
    """Rank of this process, from 0. Default: what the environment tells."""
    initialization_timeout: int = 50
    """Seconds that the processes wait for each other at the start."""
    heartbeat_timeout: int = 100
    """Seconds without a sign of life after which a process counts as dead and the others end."""

    def __post_init__(self):
        if self.virtual_cpu_devices is not None and self.virtual_cpu_devices < 1:
            raise ValueError(
                f"virtual_cpu_devices: got {self.virtual_cpu_devices}, wanted 1 or more, or null for the machine's "
                "devices"
            )
        if self.coordinator_address is not None and not re.fullmatch(r".+:\d+", self.coordinator_address):
            raise ValueError(
                f"coordinator_address: got {self.coordinator_address!r}, wanted HOST:PORT, such as 10.0.0.1:12345"
            )
        if (self.num_processes is None) != (self.process_id is None):
            raise ValueError(
                f"process_id: got {self.process_id} with num_processes={self.num_processes}, wanted both or neither; "
                "give each process its own process_id"
            )
        if self.num_processes is not None:
            if self.coordinator_address is None:
                raise ValueError(
                    f"coordinator_address: got null with num_processes={self.num_processes}, wanted HOST:PORT of rank 0"
                )
            if not 0 <= self.process_id < self.num_processes:
                raise ValueError(
                    f"process_id: got {self.process_id}, wanted 0 to num_processes - 1 = {self.num_processes - 1}"
                )
        for name in ("initialization_timeout", "heartbeat_timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted 1 or more seconds")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run, and which of them this is."""

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device: int | None = None
    """The accelerator of this process where each process of a host takes one; None: it takes all it sees."""


@dataclass(frozen=True, kw_only=True)
class _Launcher:
    """The environment variables by which a launcher tells a process its rank."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    marks: tuple[str, ...]  # set only in processes that it started


# The innermost first: SLURM may have started torchrun or mpirun, and its ranks are then those of hosts.
_LAUNCHERS = (
    _Launcher(
        name="torchrun",
        rank="RANK",
        size="WORLD_SIZE",
        local_rank="LOCAL_RANK",
        local_size="LOCAL_WORLD_SIZE",
        marks=("MASTER_ADDR", "MASTER_PORT"),
    ),
    _Launcher(
        name="Open MPI",
        rank="OMPI_COMM_WORLD_RANK",
        size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
        marks=(),
    ),
    _Launcher(
        name="SLURM",
        rank="SLURM_PROCID",
        size="SLURM_NTASKS",
        local_rank="SLURM_LOCALID",
        local_size="SLURM_STEP_TASKS_PER_NODE",
        marks=("SLURM_JOB_ID", "SLURM_STEP_NODELIST"),
    ),
)


def detect(config: DistributedConfig, environment: Mapping[str, str]) -> Processes | None:
    """The processes that the config names, else those that a launcher's environment variables name.

    Returns: None for a single process.
    Raises: DeviceError where several processes were started but where rank 0 waits is not known, or where the config
      names a coordinator and nobody names ranks.
    """
    if config.num_processes is not None:
        return _of_several(config.coordinator_address, config.num_processes, config.process_id, None)
    for launcher in _LAUNCHERS:
        if not all(name in environment for name in (launcher.rank, launcher.size, *launcher.marks)):
            continue
        rank, size = int(environment[launcher.rank]), int(environment[launcher.size])
        if size == 1:
            return None
        address = config.coordinator_address or _address(launcher, environment)
        if address is None:
            raise DeviceError(
                f"distributed.coordinator_address: got null, but {launcher.name} started rank {rank} of {size} without "
                "telling where rank 0 is; pass distributed.coordinator_address=HOST:PORT of its host, or set "
                "JAX_COORDINATOR_ADDRESS"
            )
        return _of_several(address, size, rank, _local_device(launcher, environment))
    if config.coordinator_address is not None:
        raise DeviceError(
            f"distributed.coordinator_address: got {config.coordinator_address}, but neither the config nor the "
            "environment of a launcher tells the rank of this process; pass distributed.num_processes and "
            "distributed.process_id"
        )
    return None


def _of_several(address: str, size: int, rank: int, local_device: int | None) -> Processes | None:
    if size == 1:
        return None
    return Processes(coordinator_address=address, num_processes=size, process_id=rank, local_device=local_device)


def _address(launcher: _Launcher, environment: Mapping[str, str]) -> str | None:
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return environment["JAX_COORDINATOR_ADDRESS"]
    if launcher.name == "SLURM":
        # node001, node001,node002 and node[001-008,011]: the first host of the step runs rank 0.
        prefix, first = re.match(r"([^\[,]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"]).groups(default="")
        port = 61440 + int(environment["SLURM_JOB_ID"]) % 4096  # as jax.distributed chooses it
        return f"{prefix}{first}:{environment.get('JAX_COORDINATOR_PORT', port)}"
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        port = int(environment["MASTER_PORT"])
        if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            port += 1  # torchrun itself listens at MASTER_PORT
        return f"{environment['MASTER_ADDR']}:{port}"
    return None


def _local_device(launcher: _Launcher, environment: Mapping[str, str]) -> int | None:
    """The rank on this host, where several processes share its accelerators and were not given their own already."""
    if launcher.local_rank not in environment or launcher.local_size not in environment:
        return None
    local_size = int(re.match(r"\d+", environment[launcher.local_size])[0])  # SLURM: 8 or 8(x4)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if local_size == 1 or (visible is not None and len(visible.split(",")) < local_size):
        return None
    return int(environment[launcher.local_rank])


def _cluster_known_to_jax(environment: Mapping[str, str]) -> bool:
    """Whether jax.distributed can find the processes itself: indexed Kubernetes jobs, JobSets, TPU pods."""
    kubernetes = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    tpu_hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    return kubernetes or "," in tpu_hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environment


def _has_tpu_chips() -> bool:
    return any(_DEVICE_FILES.glob("accel[0-9]*")) or (_DEVICE_FILES / "vfio/0").exists()


def initialize(config: DistributedConfig) -> list[jax.Device]:
    """Joins the processes of the run, applies the platform settings and returns the devices of all processes.

    Raises: DeviceError when a process of the run is missing, naming host, rank and address, or when JAX has already
      started on other devices than the config asks for.
    """
    if config.compilation_cache_dir is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.compilation_cache_dir).expanduser()))
    # XLA lends a GPU at most 64 GiB of the host's memory, whatever there is, unless told otherwise.
    os.environ.setdefault(HOST_MEMORY_LIMIT, str(host_memory_bytes() // _num_gpus_of_host() // 2**30))
    wanted = config.virtual_cpu_devices
    processes = detect(config, os.environ)
    num_processes = 1 if processes is None else processes.num_processes
    if wanted is not None and wanted % num_processes:
        raise DeviceError(
            f"distributed.virtual_cpu_devices: got {wanted}, wanted a multiple of the {num_processes} processes, which "
            "share them evenly; change it or the number of processes"
        )
    if wanted is not None:
        try:
            jax.config.update("jax_num_cpu_devices", wanted // num_processes)
            jax.config.update("jax_platforms", "cpu")
        except RuntimeError:
            # JAX has started already. That is fine where it started on enough CPU devices, and an error below
            # otherwise.
            pass
    if not jax.distributed.is_initialized():
        if processes is not None:
            _join(processes, config)
        else:
            _join_cluster_known_to_jax(config)
    devices = jax.devices()
    if wanted is None:
        return devices
    if devices[0].platform != "cpu" or len(devices) < wanted:
        raise DeviceError(
            f"distributed.virtual_cpu_devices: got {wanted}, but JAX has already started on {len(devices)} "
            f"{devices[0].platform} device(s); set it before the first JAX operation of the process"
        )
    return devices[:wanted]


def host_memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _num_gpus_of_host() -> int:
    """At least 1."""
    return max(1, len(list(_DEVICE_FILES.glob("nvidia[0-9]*"))))


def process_label() -> str:
    """`rank R of N on HOST` of this process, empty in a run of one process."""
    return _label


def _join(processes: Processes, config: DistributedConfig) -> None:
    _set_label(processes.process_id, processes.num_processes)
    try:
        roll_call(
            processes.coordinator_address,
            num_processes=processes.num_processes,
            process_id=processes.process_id,
            timeout=config.initialization_timeout,
        )
    except RollCallError as error:
        raise DeviceError(str(error)) from None
    _leave_signals_alone()
    jax.distributed.initialize(
        coordinator_address=processes.coordinator_address,
        num_processes=processes.num_processes,
        process_id=processes.process_id,
        local_device_ids=processes.local_device,
        cluster_detection_method="deactivate",
        initialization_timeout=config.initialization_timeout,
        heartbeat_timeout_seconds=config.heartbeat_timeout,
    )


def _join_cluster_known_to_jax(config: DistributedConfig) -> None:
    known = _cluster_known_to_jax(os.environ)
    if config.virtual_cpu_devices is not None:
        if known:
            raise DeviceError(
                f"distributed.virtual_cpu_devices: got {config.virtual_cpu_devices} in a cluster whose number of "
                "processes only JAX can find; pass distributed.coordinator_address, num_processes and process_id too"
            )
        return
    if not known and not _has_tpu_chips():
        return
    _leave_signals_alone()
    try:
        jax.distributed.initialize(
            initialization_timeout=config.initialization_timeout, heartbeat_timeout_seconds=config.heartbeat_timeout
        )
    except (RuntimeError, ValueError) as error:
        if known:
            raise DeviceError(
                f"distributed: JAX did not find the processes of this cluster on {socket.gethostname()} ({error}); "
                "pass distributed.coordinator_address, num_processes and process_id"
            ) from error
        return  # a single host with TPUs
    _set_label(jax.process_index(), jax.process_count())


def _leave_signals_alone() -> None:
    """Keeps jax.distributed from swallowing SIGTERM, by which it would announce a preemption to the other processes."""
    jax.config.update("jax_enable_preemption_service", False)


def _set_label(rank: int, size: int) -> None:
    global _label
    _label = f"rank {rank} of {size} on {socket.gethostname()}" if size > 1 else ""

import dataclasses
import os

import jax
import pytest

from train.distributed import (
    HOST_MEMORY_LIMIT,
    DeviceError,
    DistributedConfig,
    Processes,
    detect,
    initialize,
    process_label,
)


def test_a_started_process_with_enough_cpu_devices_will_do():
    devices = jax.devices()
    assert initialize(DistributedConfig(virtual_cpu_devices=2)) == devices[:2]
    assert initialize(DistributedConfig()) == devices
    assert len(jax.devices()) == 8


def test_a_started_process_with_too_few_devices_is_refused():
    jax.devices()
    with pytest.raises(DeviceError, match=r"virtual_cpu_devices: got 9, but JAX has already started on 8 cpu device"):
        initialize(DistributedConfig(virtual_cpu_devices=9))


@pytest.mark.parametrize(("num_gpus", "share"), [(0, "512"), (1, "512"), (4, "128")])
def test_gpus_of_a_host_share_its_memory(num_gpus, share, tmp_path, monkeypatch):
    for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{i}" for i in range(num_gpus))):
        (tmp_path / name).touch()
    monkeypatch.setattr("train.distributed._DEVICE_FILES", tmp_path)
    monkeypatch.setattr("train.distributed.host_memory_bytes", lambda: 512 * 2**30)
    monkeypatch.setenv(HOST_MEMORY_LIMIT, "70")
    initialize(DistributedConfig())
    assert os.environ[HOST_MEMORY_LIMIT] == "70"
    monkeypatch.delenv(HOST_MEMORY_LIMIT)
    initialize(DistributedConfig())
    assert os.environ[HOST_MEMORY_LIMIT] == share


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"virtual_cpu_devices": 0}, "virtual_cpu_devices: got 0, wanted 1 or more"),
        ({"coordinator_address": "somewhere"}, "coordinator_address: got 'somewhere', wanted HOST:PORT, such as"),
        ({"process_id": 1}, "process_id: got 1 with num_processes=None, wanted both or neither; give each"),
        (
            {"num_processes": 2, "process_id": 0},
            "coordinator_address: got null with num_processes=2, wanted HOST:PORT of rank 0",
        ),
        (
            {"num_processes": 2, "process_id": 2, "coordinator_address": "a:1"},
            "process_id: got 2, wanted 0 to num_processes - 1 = 1",
        ),
        ({"initialization_timeout": 0}, "initialization_timeout: got 0, wanted 1 or more seconds"),
        ({"heartbeat_timeout": 0}, "heartbeat_timeout: got 0, wanted 1 or more seconds"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**settings)


TORCHRUN = {"MASTER_ADDR": "a", "MASTER_PORT": "10", "RANK": "3", "WORLD_SIZE": "4"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "8"}
SLURM = {"SLURM_JOB_ID": "5000", "SLURM_STEP_NODELIST": "node[003-007,9],x", "SLURM_PROCID": "2", "SLURM_NTASKS": "6"}


@pytest.mark.parametrize(
    ("environment", "address", "rank", "size", "local_device"),
    [
        (TORCHRUN, "a:10", 3, 4, None),
        (TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, "a:11", 3, 4, None),
        (TORCHRUN | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "a:10", 3, 4, 1),
        (TORCHRUN | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "a:10", 3, 4, None),
        (TORCHRUN | SLURM, "a:10", 3, 4, None),
        (OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "b:20"}, "b:20", 1, 8, None),
        (OPEN_MPI | {"MASTER_ADDR": "a", "MASTER_PORT": "10"} | SLURM, "a:10", 1, 8, None),
        (SLURM, "node003:62344", 2, 6, None),
        (SLURM | {"SLURM_STEP_NODELIST": "node1,node2"}, "node1:62344", 2, 6, None),
        (SLURM | {"SLURM_STEP_NODELIST": "node1", "JAX_COORDINATOR_PORT": "7"}, "node1:7", 2, 6, None),
        (SLURM | {"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "3(x2)"}, "node003:62344", 2, 6, 2),
        (
            SLURM | {"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "3", "CUDA_VISIBLE_DEVICES": "5"},
            "node003:62344", 2, 6, None,
        ),
    ],
)  # fmt: skip
def test_launchers_are_known_by_their_environment(environment, address, rank, size, local_device):
    wanted = Processes(coordinator_address=address, num_processes=size, process_id=rank, local_device=local_device)
    assert detect(DistributedConfig(), environment) == wanted
    named = detect(DistributedConfig(coordinator_address="me:5"), environment)
    assert named == dataclasses.replace(wanted, coordinator_address="me:5")
    config = DistributedConfig(coordinator_address="c:1", num_processes=2, process_id=1)
    assert detect(config, environment) == Processes(coordinator_address="c:1", num_processes=2, process_id=1)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "4"},
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script, not a step of srun
        TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_everything_else_is_a_single_process(environment):
    assert detect(DistributedConfig(), environment) is None
    assert process_label() == ""


def test_ranks_without_an_address_and_an_address_without_ranks():
    with pytest.raises(DeviceError, match=r"Open MPI started rank 1 of 8 without telling where rank 0 is; pass dist"):
        detect(DistributedConfig(), OPEN_MPI)
    with pytest.raises(DeviceError, match=r"got a:1, but neither the config nor the environment of a launcher tells"):
        detect(DistributedConfig(coordinator_address="a:1"), {})


def test_virtual_devices_must_split_over_the_processes(monkeypatch):
    monkeypatch.setattr("os.environ", TORCHRUN)
    with pytest.raises(DeviceError, match=r"virtual_cpu_devices: got 6, wanted a multiple of the 4 processes"):
        initialize(DistributedConfig(virtual_cpu_devices=6))


@pytest.mark.parametrize(
    "environment",
    [
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
        {"MEGASCALE_COORDINATOR_ADDRESS": "a:1"},
    ],
)
def test_clusters_that_jax_knows_are_left_to_it(monkeypatch, environment):
    monkeypatch.setattr("os.environ", environment)
    with pytest.raises(DeviceError, match=r"virtual_cpu_devices: got 8 in a cluster whose number of processes only"):
        initialize(DistributedConfig(virtual_cpu_devices=8))
    calls = []

    def fail(**settings):
        calls.append(settings)
        raise RuntimeError("no metadata")

    monkeypatch.setattr("jax.distributed.initialize", fail)
    with pytest.raises(
        DeviceError, match=r"JAX did not find the processes of this cluster on .* \(no metadata\); pass"
    ):
        initialize(DistributedConfig())
    assert calls == [{"initialization_timeout": 50, "heartbeat_timeout_seconds": 100}]


@pytest.fixture(autouse=True)
def cache_dir():
    """Puts back where compiled programs are kept, which a test of another environment changes."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_where_compiled_programs_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    initialize(DistributedConfig(compilation_cache_dir=None))
    assert not jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    initialize(DistributedConfig())  # JAX has read the variable itself
    assert not jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    initialize(DistributedConfig())
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache/longctx/compiled")
    initialize(DistributedConfig(compilation_cache_dir="there"))
    assert jax.config.jax_compilation_cache_dir == "there"

"""Runs of real processes on this machine: two with four virtual devices each, and one with eight."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from longctx.context_parallel.config import STRATEGIES
from train.__main__ import main
from train.checkpoint import find_checkpoint
from train.metrics import read_records

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
ENVIRONMENT["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    source = {"kind": "synthetic", "min_length": 8, "max_length": 40}
    mixture = [
        source | {"num_documents": 40, "num_symbols": 32, "weight": 2.0},
        source | {"num_documents": 30, "num_symbols": 8, "weight": 1.0, "seed": 1},
    ]
    config = {
        "run_dir": "set by each test",
        "model": {
            "dim": 16,
            "num_layers": 1,
            "mlp_dim": 16,
            "mixers": {"global": {"kind": "attention", "num_heads": 2}},
            "pattern": ["global"],
            "dtype": "float32",
        },
        "data": {
            "seq_len": 32,
            "tokenizer": "ids:33",
            "cache_dir": str(folder / "cache"),
            "held_out_fraction": 0.1,
            "sources": mixture,
        },
        "training": {"steps": 12, "batch_size": 4},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2, "decay_steps": 2},
        "distributed": {"virtual_cpu_devices": 8, "initialization_timeout": 30},
        "evaluation": {"every": 4, "max_batches": 2},
        "checkpoint": {"every": 4},
        "metrics": {"every": 1, "tensorboard": False, "plot": False},
        "sample": {"num_tokens": 0},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def start_rank(rank, address, *arguments, num_processes=2):
    here = (f"coordinator_address={address}", f"num_processes={num_processes}", f"process_id={rank}")
    return start("train", *arguments, *(f"distributed.{setting}" for setting in here))


def wait_for_step(run_dir, step, *processes, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        path = run_dir / "metrics.jsonl"
        if path.exists() and any(record["step"] >= step for record in read_records(path)):
            return
        time.sleep(0.05)
    for process in processes:
        process.kill()
    pytest.fail(f"no record of step {step}: {[process.communicate() for process in processes]}")


def losses(run_dir, *, until):
    names = ("loss", "grad_norm", "tokens", "eval/loss", "eval/tokens")
    return {
        (record["step"], name): record[name]
        for record in read_records(run_dir / "metrics.jsonl")
        for name in names
        if name in record and record["step"] <= until
    }


@pytest.mark.slow
def test_two_processes_go_on_with_a_run_of_one(config_file, tmp_path):
    """On another mesh; they are ended by a signal that only one of them gets."""
    jax.devices()
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "run"
    one_process = ("mesh.data=2", "mesh.context_inner=4")
    assert main([str(config_file), f"run_dir={undisturbed}", *one_process]) == 0
    assert main([str(config_file), f"run_dir={run_dir}", *one_process, "training.steps=8"]) == 0

    tokens_over_processes = ("mesh.context_outer=2", "mesh.context_inner=2", "mesh.tensor=2")
    address = free_address()
    endless = (
        config_file,
        f"run_dir={run_dir}",
        *tokens_over_processes,
        "training.steps=1000000",
        "evaluation.every=null",
    )
    ranks = [start_rank(rank, address, *endless) for rank in range(2)]
    wait_for_step(run_dir, 12, *ranks)
    ranks[1].send_signal(signal.SIGTERM)
    (output, errors), (silence, _) = (rank.communicate(timeout=60) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert f"resuming {run_dir} at step 8" in output and "distributed" not in output
    saved = re.search(r"a signal to another process: saved step (\d+) of 1000000 in", output)
    assert saved and find_checkpoint(run_dir)[1] == int(saved[1]) >= 12
    assert "step" not in silence

    got, wanted = losses(run_dir, until=12), losses(undisturbed, until=12)
    wanted = {key: value for key, value in wanted.items() if key[0] < 12 or "eval" not in key[1]}
    assert got.keys() == wanted.keys() and len(got) == 12 * 3 + 3 * 2
    for key, value in wanted.items():
        np.testing.assert_allclose(got[key], value, rtol=2e-5, err_msg=str(key))


@pytest.mark.slow
def test_a_launched_run_samples_and_stores_no_addresses(config_file, tmp_path):
    rows_over_processes = ("mesh.data=2", "mesh.fsdp=2", "mesh.context_inner=2")
    command = ("train.launch", "local", "--num-processes", 2, config_file, f"run_dir={tmp_path}", *rows_over_processes)
    launched = start(*command, "training.steps=4", "sample.num_tokens=3")
    output, errors = launched.communicate(timeout=150)
    assert launched.returncode == 0, errors
    assert "--- sample ---" in output and "done: step 4" in output
    assert "[rank 1] " not in output and "done: step 4" not in errors
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())["distributed"]
    assert (stored["num_processes"], stored["process_id"], stored["coordinator_address"]) == (None, None, None)


# Of each pair, where a run begins and where it goes on: in how many processes, on which mesh.
ELASTIC = [
    ((1, {"data": 4, "tensor": 2}), (2, {"fsdp": 4, "context_inner": 2})),
    ((2, {"data": 2, "context_inner": 4}), (4, {"data": 4, "context_inner": 2})),
    ((4, {"fsdp": 2, "context_outer": 2, "context_inner": 2}), (1, {"data": 2, "fsdp": 2, "tensor": 2})),
    ((4, {"context_inner": 8}), (2, {"data": 2, "context_inner": 2, "tensor": 2})),
    ((2, {"context_outer": 4, "context_inner": 2}), (1, {"context_inner": 8})),
    ((1, {"context_outer": 2, "context_inner": 2, "tensor": 2}), (4, {"data": 2, "fsdp": 2, "context_inner": 2})),
    ((4, {"data": 4, "tensor": 2}), (4, {"context_outer": 2, "context_inner": 4})),
    ((2, {"fsdp": 4, "tensor": 2}), (1, {"data": 1})),
]


@pytest.fixture(scope="module")
def on_one_device(config_file, tmp_path_factory):
    """The losses of an undisturbed run."""
    jax.devices()
    run_dir = tmp_path_factory.mktemp("elastic") / "undisturbed"
    assert main([str(config_file), f"run_dir={run_dir}", "distributed.virtual_cpu_devices=1"]) == 0
    return losses(run_dir, until=12)


@pytest.mark.slow
@pytest.mark.parametrize(("begins", "goes_on"), ELASTIC)
def test_a_run_goes_on_in_other_processes_on_another_mesh(config_file, on_one_device, tmp_path, begins, goes_on):
    for (num_processes, mesh), steps in ((begins, 8), (goes_on, 12)):
        axes = [f"mesh.{axis}={size}" for axis, size in mesh.items()]
        devices = f"distributed.virtual_cpu_devices={np.prod(list(mesh.values()))}"
        command = (config_file, f"run_dir={tmp_path}", *axes, devices, f"training.steps={steps}")
        if num_processes == 1:
            assert main([str(part) for part in command]) == 0
        else:
            launched = start("train.launch", "local", "--num-processes", num_processes, *command)
            _, errors = launched.communicate(timeout=400)
            assert launched.returncode == 0, errors
    got = losses(tmp_path, until=12)
    assert got.keys() == on_one_device.keys() and len(got) == 12 * 3 + 4 * 2
    for (step, name), value in on_one_device.items():
        exact = name.endswith("tokens")  # which rows a step has
        np.testing.assert_allclose(got[step, name], value, rtol=0 if exact else 2e-5, err_msg=f"{name} of step {step}")


@pytest.mark.slow
def test_every_strategy_over_two_processes_equals_one_device():
    """A zigzag sequence over two processes of four devices: neighbours are in other processes both ways."""
    script, address = Path(__file__).with_name("every_strategy.py"), free_address()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), address, "2", str(rank)],
            cwd=ROOT,
            env=ENVIRONMENT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    results = [rank.communicate(timeout=300) for rank in ranks]
    for rank, (output, errors) in zip(ranks, results, strict=True):
        assert rank.returncode == 0, errors
        said = [line for line in output.splitlines() if " over " in line]
        anywhere = [name for name, strategy in STRATEGIES.items() if strategy.platform is None]
        assert said == [f"{name} over 8 devices of 2 processes" for name in (*anywhere, "state passing")]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in Linux's /proc")
def test_a_peer_that_dies_ends_the_run_with_its_name(config_file, tmp_path):
    endless = (f"run_dir={tmp_path}", "mesh.data=4", "mesh.tensor=2", "training.steps=1000000", "checkpoint.every=null")
    launcher = start("train.launch", "local", "--num-processes", 2, config_file, *endless, "evaluation.every=null")
    wait_for_step(tmp_path, 2, launcher)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    killed = time.monotonic()
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 1 and time.monotonic() - killed < 20
    assert f"error: rank 1 on {socket.gethostname()} ended by SIGKILL; its last lines:" in errors


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in Linux's /proc")
def test_a_run_whose_peer_dies_goes_on_from_its_last_checkpoint(config_file, tmp_path):
    settings = (f"run_dir={tmp_path}", "mesh.data=4", "mesh.tensor=2", "training.steps=160", "checkpoint.every=20")
    command = ("train.launch", "local", "--num-processes", 2, "--restarts", 1, config_file, *settings)
    launcher = start(*command, "evaluation.every=null")
    wait_for_step(tmp_path, 50, launcher)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    output, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, errors
    assert f"error: rank 1 on {socket.gethostname()} ended by SIGKILL; its last lines:" in errors
    assert "starting all 2 processes again: restart 1 of 1\n" in errors
    resumed = int(re.search(r"resuming .* at step (\d+)", output)[1])
    assert resumed >= 20 and resumed % 20 == 0
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl") if "loss" in record] == [
        *range(1, 161)
    ]
    assert find_checkpoint(tmp_path)[1] == 160


def test_a_coordinator_or_a_peer_that_never_comes_is_named_in_time(config_file, tmp_path):
    arguments = (config_file, f"run_dir={tmp_path / 'run'}", "mesh.data=4", "mesh.tensor=2")
    host, started = socket.gethostname(), time.monotonic()
    dead_peer, dead_coordinator = free_address(), free_address()
    without_peer = start_rank(0, dead_peer, *arguments, "distributed.initialization_timeout=2")
    without_coordinator = start_rank(1, dead_coordinator, *arguments, "distributed.initialization_timeout=2")
    (_, no_peer), (_, no_coordinator) = (p.communicate(timeout=60) for p in (without_peer, without_coordinator))
    assert time.monotonic() - started < 40
    assert without_peer.returncode == without_coordinator.returncode == 1
    assert no_peer.startswith(
        f"error: distributed.num_processes: rank 0 of 2 on {host} waited 2 s at {dead_peer}, but rank(s) 1 did not come"
    )
    assert no_coordinator.startswith(
        f"error: distributed.coordinator_address: rank 1 of 2 on {host} did not reach rank 0 at "
        f"{dead_coordinator} within 2 s (Connection refused); check that"
    )
    assert not (tmp_path / "run").exists()

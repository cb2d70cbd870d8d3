"""The launcher over small scripts in place of the trainer; tests/multihost has real runs."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from train.launch import __main__ as command_line
from train.launch import local

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()

PRELUDE = """
import signal, sys, time
overrides = dict(argument.split("=", 1) for argument in sys.argv[2:])
rank = int(overrides["distributed.process_id"])
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(code, n, **options) -> (exit code, seconds) of n processes that run this code."""

    def run(code, num_processes, **options):
        script = tmp_path / "child.py"
        script.write_text(PRELUDE + textwrap.dedent(code))
        monkeypatch.setattr(local, "_TRAIN", (sys.executable, str(script)))
        started = time.monotonic()
        exit_code = local.launch_local(["CONFIG", "a.b=c"], num_processes=num_processes, **options)
        return exit_code, time.monotonic() - started

    return run


def test_all_processes_get_one_address_and_their_rank(run, capfd):
    code = """
    assert sys.argv[1] == "CONFIG" and overrides["a.b"] == "c"
    print(rank, overrides["distributed.num_processes"], overrides["distributed.coordinator_address"], flush=True)
    print("warning", file=sys.stderr)
    """
    assert run(code, 3)[0] == 0
    output, errors = capfd.readouterr()
    address = re.fullmatch(r"0 3 (127\.0\.0\.1:\d+)\n", output)[1]
    lines = [f"[rank {rank}] {text}" for rank in (1, 2) for text in (f"{rank} 3 {address}", "warning")]
    assert sorted(errors.splitlines()) == sorted([*lines, "warning"])


def test_a_process_that_fails_stops_the_others_and_is_named(run, capfd):
    code = """
    if rank == 1:
        print("first"); print("something broke", file=sys.stderr)
        sys.exit(3)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as if it hung
    time.sleep(60)
    """
    exit_code, seconds = run(code, 3)
    assert exit_code == 3 and seconds < 8
    errors = capfd.readouterr().err
    assert f"error: rank 1 on {HOST} ended with exit code 3; its last lines:\n" in errors
    assert "  something broke\n" in errors and errors.endswith("error: stopped the run of 3 processes\n")


def test_a_process_that_a_signal_ends_is_named(run, capfd):
    exit_code, seconds = run("import os\nif rank == 0: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)", 2)
    assert exit_code == 1 and seconds < 8
    assert f"error: rank 0 on {HOST} ended by SIGKILL; its last lines:\n  (none)\n" in capfd.readouterr().err


def test_those_that_hang_are_killed_in_the_time_that_is_asked_for(run):
    code = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank == 0: sys.exit(3)
    time.sleep(60)
    """
    exit_code, seconds = run(code, 2, seconds_to_stop=0.2)
    assert exit_code == 3 and seconds < local.SECONDS_TO_STOP


# Each attempt of rank 1 leaves a file beside the script; `attempt` counts from 1.
ATTEMPTS = """
from pathlib import Path
if rank == 1:
    Path(__file__).with_name(f"attempt-{time.time_ns()}").write_text(overrides["distributed.coordinator_address"])
    attempt = len(list(Path(__file__).parent.glob("attempt-*")))
"""


def test_all_are_started_again_when_one_is_lost(run, tmp_path, capfd):
    code = """
    if rank == 1 and attempt < 3:
        print(f"attempt {attempt} broke")
        sys.exit(1)
    if rank == 0: print("rank 0 was here", flush=True)
    time.sleep(0.2)
    """
    exit_code, _ = run(ATTEMPTS + textwrap.dedent(code), 2, restarts=5, seconds_to_stop=2)
    assert exit_code == 0 and len(list(tmp_path.glob("attempt-*"))) == 3
    output, errors = capfd.readouterr()
    assert output.endswith("rank 0 was here\n")
    for attempt in (1, 2):
        assert f"error: rank 1 on {HOST} ended with exit code 1; its last lines:\n  attempt {attempt} broke\n" in errors
        assert f"starting all 2 processes again: restart {attempt} of 5\n" in errors
    assert "restart 3" not in errors


@pytest.mark.parametrize(("exit_code", "attempts"), [(1, 3), (2, 1)])
def test_restarts_are_counted_and_a_wrong_config_gets_none(run, tmp_path, capfd, exit_code, attempts):
    code = f"{ATTEMPTS}\nif rank == 1: sys.exit({exit_code})\ntime.sleep(60)"
    assert run(code, 2, restarts=2)[0] == exit_code
    assert len(list(tmp_path.glob("attempt-*"))) == attempts
    assert capfd.readouterr().err.count("starting all 2 processes again") == attempts - 1


def test_a_run_that_was_asked_to_stop_is_not_started_again(run, tmp_path):
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM]).start()
    assert run(f"{ATTEMPTS}\ntime.sleep(60)", 2, restarts=2)[0] == 1
    assert len(list(tmp_path.glob("attempt-*"))) <= 1  # none: the signal came first


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(run, capfd, number):
    code = """
    def stop(number, frame):
        print("saved after", signal.Signals(number).name)
        sys.exit(0)
    signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
    """
    threading.Timer(1.0, os.kill, [os.getpid(), number]).start()
    previous = signal.getsignal(number)
    exit_code, seconds = run(code, 2)
    assert exit_code == 0 and seconds < 8
    assert signal.getsignal(number) is previous
    output, errors = capfd.readouterr()
    assert output == f"saved after {number.name}\n" and f"[rank 1] saved after {number.name}\n" in errors


def test_a_signal_before_the_processes_are_ready_for_it(run, capfd):
    threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGTERM]).start()
    exit_code, seconds = run("time.sleep(60)", 2)
    assert exit_code == 1 and seconds < 8
    lines = capfd.readouterr().err.splitlines()
    assert f"error: rank 0 on {HOST} ended by SIGTERM" in lines and "last lines" not in "".join(lines)


def test_nohup_is_respected(run):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGHUP]).start()
        assert run("time.sleep(1)", 2)[0] == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_the_command_line(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(command_line, "launch_local", lambda *call, **options: calls.append((call, options)) or 0)
    config = str(ROOT / "configs/quickstart.yaml")
    for command in (
        ["local", "--num-processes", "2", "--timeout", "5", config, "training.steps=300"],
        ["local", config, "--num-processes", "2", "training.steps=300", "--timeout", "5"],
    ):
        assert command_line.main(command) == 0
    arguments = [config, "training.steps=300", "distributed.initialization_timeout=5"]
    options = {"num_processes": 2, "restarts": 0, "seconds_to_stop": 3.0}
    assert calls == [((arguments,), options)] * 2
    assert (
        command_line.main(["local", config, "--num-processes", "2", "--restarts", "4", "--seconds-to-stop", "9"]) == 0
    )
    assert calls.pop() == (([config],), {"num_processes": 2, "restarts": 4, "seconds_to_stop": 9.0})
    assert command_line.main(["local", "--num-processes", "2", config, "training.stepz=3"]) == 2
    assert "training.stepz: unknown key" in capsys.readouterr().err
    for wrong, message in (
        (["--num-processes", "0"], "--num-processes: got 0, wanted 1 or more"),
        (["--num-processes", "2", "--restarts", "-1"], "--restarts: got -1, wanted 0 or more"),
        (["--num-processes", "2", "--seconds-to-stop", "nan"], "--seconds-to-stop: got nan, wanted 0 or more seconds"),
    ):
        with pytest.raises(SystemExit, match="2"):
            command_line.main(["local", config, *wrong])
        assert message in capsys.readouterr().err
    assert len(calls) == 2


def test_help_starts_nothing():
    command = [sys.executable, "-m", "train.launch", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--num-processes N" in result.stdout

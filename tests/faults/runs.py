"""Runs in processes of their own, and what they must have come to: the losses of a run that nothing has disturbed."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.faults.harness import tiny_config
from train.checkpoint.inspection import Listed, list_checkpoints, verify
from train.checkpoint.store import CheckpointError
from train.metrics import read_records

ROOT = Path(__file__).parents[2]
_SECONDS_TO_START = 300.0  # also on a machine that does much else
# Programs are compiled once and quickly; where no other run has left them, each process compiles its own.
_ENVIRONMENT = os.environ | {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
# What a step was trained on and came to; the rest of a record is about time and memory.
_BITS = ("loss", "grad_norm", "tokens", "learning_rate", "eval/loss", "eval/tokens")
Losses = dict[tuple[int, str], float]


def train_command(file: Path, run_dir: Path, *module: str) -> list[str]:
    """What trains the run of a config file."""
    return [sys.executable, "-m", *(module or ["train"]), str(file), f"run_dir={run_dir}"]


class Stuck(RuntimeError):
    """A run that neither does what is waited for nor ends."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """A config file of small runs over two weighted sources, packed and shuffled, and how a run of it is started."""

    folder: Path
    steps: int
    save_every: int
    num_processes: int
    keep_last: int = 3

    def __post_init__(self):
        config = tiny_config(self.folder / "run", self.folder / "cache")
        source = config["data"]["sources"][0] | {"num_documents": 60}
        config["data"]["sources"] = [source | {"weight": 2.0}, source | {"weight": 1.0, "num_symbols": 4, "seed": 1}]
        config["data"]["held_out_fraction"] = 0.1
        config["training"] |= {"steps": self.steps}
        config["mesh"] = {"data": 2}
        config["distributed"] = {
            "virtual_cpu_devices": 2,
            "compilation_cache_dir": str(self.folder / "compiled"),
            "initialization_timeout": int(_SECONDS_TO_START),
        }
        config["evaluation"] = {"every": 2 * self.save_every}
        config["checkpoint"] = {"every": self.save_every, "keep_last": self.keep_last}
        config["sample"] = {"num_tokens": 0}
        self.file.write_text(json.dumps(config))

    @property
    def file(self) -> Path:
        return self.folder / "config.yaml"

    def command(self, run_dir: Path, *, restarts: int = 0) -> list[str]:
        """What trains the run: the trainer itself, or the launcher of several."""
        if self.num_processes == 1:
            return train_command(self.file, run_dir)
        several = ["local", "--num-processes", str(self.num_processes), "--restarts", str(restarts)]
        return train_command(self.file, run_dir, "train.launch", *several, "--seconds-to-stop", "1")

    def undisturbed(self) -> Losses:
        """The losses of a run from its start to its end."""
        run = Run(self.command(self.folder / "undisturbed"), self.folder / "undisturbed.log")
        if run.wait(_SECONDS_TO_START) != 0:
            raise RuntimeError(f"the run that nothing disturbs failed:\n{run.log()[-3000:]}")
        return losses_of(self.folder / "undisturbed")


class Run:
    """A command that trains, whose output goes to a file, to which later runs of the same file append."""

    def __init__(self, command: Sequence[str], log: Path):
        self._log = log
        self._start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=_ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )

    def wait(self, seconds: float) -> int:
        """The exit code; raises Stuck, with the end of what was said, where there is none in time."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise Stuck(f"no end after {seconds:.0f} s; it said: {self.log()[-600:]!r}") from None

    def wait_with_memory(self, seconds: float) -> tuple[int | None, int]:
        """The exit code, None where there is none in time, and the most bytes of memory that the process held."""
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        _, status, usage = os.wait4(self.process.pid, 0)
        is_late = timer.finished.is_set()
        timer.cancel()
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return None if is_late else self.process.returncode, 1024 * usage.ru_maxrss

    def log(self, start: int = 0) -> str:
        """What it has said so far, from a byte on."""
        with self._log.open("rb") as file:
            file.seek(self._start + start)
            return file.read().decode(errors="replace")

    def log_size(self) -> int:
        """Bytes of what it has said so far."""
        return self._log.stat().st_size - self._start

    def children(self) -> list[int]:
        """The processes that it has started, by rank."""
        number = self.process.pid
        try:
            return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
        except OSError:
            return []

    def end(self) -> None:
        """Kills what still runs."""
        for number in [*self.children(), self.process.pid]:
            send(number, signal.SIGKILL)
        self.process.wait()


def send(process: int, number: int) -> None:
    """Sends a signal to a process that may be gone."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        pass


def is_alive(process: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(
    condition: Callable[[], bool], run: Run, *, seconds: float = _SECONDS_TO_START, every: float = 0.005
) -> bool:
    """Waits until the condition holds, and tells whether it did before the run ended; raises Stuck after the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        if run.process.poll() is not None:
            return False
        time.sleep(every)
    said = run.log()[-600:]
    run.end()
    raise Stuck(f"not what was waited for within {seconds:.0f} s; it said: {said!r}")


def wait_for_end(processes: Sequence[int], run: Run) -> None:
    """Waits until these processes of a run are gone."""
    wait_until(lambda: not any(map(is_alive, processes)), run, seconds=60)


def losses_of(run_dir: Path) -> Losses:
    """What was logged of each step that tells of its bits."""
    path = run_dir / "metrics.jsonl"
    records = read_records(path) if path.exists() else []
    return {(record["step"], name): record[name] for record in records for name in _BITS if name in record}


def difference(got: Losses, wanted: Losses, *, complete: bool) -> str | None:
    """Where the losses are not those of the undisturbed run; of a run that is not done, as far as it has come."""
    if complete and got.keys() != wanted.keys():
        return f"logged other steps: {sorted(got.keys() ^ wanted.keys())[:5]}"
    for key, value in got.items():
        if value != wanted.get(key):
            return f"{key[1]} of step {key[0]} is {value!r}, undisturbed {wanted.get(key)!r}"
    return None


def last_step(run_dir: Path) -> int:
    """Of the steps that are logged; 0 where there is none."""
    return max((step for step, _ in losses_of(run_dir)), default=0)


def finished_steps(run_dir: Path) -> list[int]:
    """The steps whose checkpoints are complete."""
    folder = run_dir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def is_saving(run_dir: Path) -> bool:
    """Whether there is a checkpoint whose saving goes on, or was cut off."""
    return any((run_dir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def takes_steps(log: str) -> bool:
    """Whether a log tells of a step."""
    return re.search(r"^step \d+/\d+ ", log, re.MULTILINE) is not None


def resumed_step(log: str) -> int | None:
    """The step at which the last process of a log went on."""
    found = re.findall(r"^resuming \S+ at step (\d+)", log, re.MULTILINE)
    return int(found[-1]) if found else None


def broken_checkpoint(run_dir: Path) -> str | None:
    """What is wrong with the first complete checkpoint whose arrays cannot all be read."""
    try:
        listed: list[Listed] = list_checkpoints(run_dir)
    except CheckpointError:
        return None  # none was saved
    for checkpoint in listed:
        if checkpoint.finished and (problem := verify(checkpoint)[1]) is not None:
            return f"{checkpoint.path}: {problem}"
    return None

"""What the parts have in common: a command run in this process, what it must not do, and the report of a part."""

import contextlib
import copy
import dataclasses
import io
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

TINY = yaml.safe_load(Path(__file__).parents[1].joinpath("tiny.yaml").read_text())
"""The config of a small run, with RUN_DIR and CACHE_DIR where its folders are to be named."""


def tiny_config(run_dir: str | Path, cache_dir: str | Path) -> dict[str, Any]:
    """A copy of TINY with its folders."""
    config = copy.deepcopy(TINY)
    config["run_dir"], config["data"]["cache_dir"] = str(run_dir), str(cache_dir)
    return config


@dataclasses.dataclass
class Report:
    """What became of the cases of a part: how many by kind and outcome, and what went wrong."""

    part: str
    outcomes: dict[str, Counter] = dataclasses.field(default_factory=dict)
    faults: list[str] = dataclasses.field(default_factory=list)

    def add(self, kind: str, outcome: str, fault: str | None = None) -> None:
        self.outcomes.setdefault(kind, Counter())["fault" if fault else outcome] += 1
        if fault:
            self.faults.append(f"{kind}: {fault}")
            print(f"FAULT {self.part}, {kind}: {fault[:600]}", file=sys.__stderr__, flush=True)

    @property
    def count(self) -> int:
        return sum(sum(counter.values()) for counter in self.outcomes.values())


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (None: it raised, or took too long) and what it wrote."""

    code: int | None
    stdout: str
    stderr: str

    def refusal_fault(self, wanted: Sequence[str] = ()) -> str | None:
        """What is wrong with a command that should have refused its input with a line that names some of `wanted`."""
        if self.code is None:
            return self.stderr
        if self.code not in (1, 2):
            return f"exit code {self.code}, wanted 1 or 2; stderr: {self.stderr[-500:]!r}"
        if "Traceback" in self.stderr or not self.stderr.strip():
            return f"a traceback, or nothing, on stderr: {self.stderr[-500:]!r}"
        if wanted and not any(word in self.stderr for word in wanted):
            return f"the error names none of {list(wanted)}: {self.stderr[-500:]!r}"
        return None


class TooLong(BaseException):
    """A case took longer than it may; no Exception, so that nothing on the way takes it for an error of its own."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooLong in the block, where it takes longer."""

    def stop(*_) -> None:
        raise TooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run(main: Callable[[Sequence[str]], int], arguments: Sequence[str], *, seconds: float = 300.0) -> Ended:
    """Runs a command's main in this process; an exception that leaves it is what a traceback would be."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with time_limit(seconds):
                code = main(arguments)
        except SystemExit as stop:  # argparse
            code = stop.code
        except TooLong:
            return Ended(None, out.getvalue(), f"hangs: no end after {seconds:.0f} s")
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__} at {last.filename}:{last.lineno}: {str(error)[:300]}"
            return Ended(None, out.getvalue(), text)
    return Ended(code, out.getvalue(), err.getvalue())


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything under a folder; empty where there is none."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            stat = os.lstat(Path(root, name))
            found[os.path.join(root, name)] = (stat.st_size, stat.st_mtime_ns)
    return found


def for_each(strategy: SearchStrategy, count: int, check: Callable[..., None]) -> None:
    """Calls `check` with `count` examples, the same ones each time; `check` records faults and does not raise.

    They are drawn by hypothesis but not shrunk: all faults of a run are listed, not the least one.
    """

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def examples(case) -> None:
        check(case)

    examples()

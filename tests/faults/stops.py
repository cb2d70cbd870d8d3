"""SIGTERM to a run of two processes, at any moment once it takes steps: to its launcher, or to one rank alone.

It must save and end with exit code 0, go on from that step when the same command is given again, and come to the losses
of an undisturbed run, bit for bit.
"""

import random
import re
import signal
import time
from pathlib import Path

from tests.faults import runs
from tests.faults.harness import Report

_STEPS = 480
_LONGEST_WAIT = 0.8  # seconds after the first step of a start


def check_stops(folder: Path, count: int) -> Report:
    """Sends `count` signals."""
    report = Report("SIGTERM")
    setup = runs.Setup(folder, steps=_STEPS, save_every=20, num_processes=2)
    wanted = setup.undisturbed()
    rng = random.Random(0)
    number, saved = 1, None
    while report.count < count:
        run_dir = folder / f"run{number}"
        run = runs.Run(setup.command(run_dir), folder / "runs.log")
        try:
            receiver, is_through, fault = _stop(run, rng)
        except runs.Stuck as error:
            receiver, is_through, fault = "anybody", False, str(error)
        finally:
            run.end()
        log = run.log()
        fault = fault or runs.difference(runs.losses_of(run_dir), wanted, complete=is_through)
        if fault is None and saved is not None and runs.resumed_step(log) != saved:
            fault = f"went on from step {runs.resumed_step(log)}, not from {saved}, where it was stopped"
        if is_through:  # before the signal came
            if fault:
                report.add("end of a run", "done", fault)
            number, saved = number + 1, None
            continue
        found = re.search(rf": saved step (\d+) of {_STEPS} in", log)
        saved = int(found[1]) if found else None
        if fault is None and (saved is None or saved not in runs.finished_steps(run_dir)):
            fault = (
                f"saved step {saved}, but the complete checkpoints are {runs.finished_steps(run_dir)}; {log[-600:]!r}"
            )
        report.add(f"to {receiver}", "saved, exit code 0, same losses", fault)
    if saved is not None:  # to its end, undisturbed
        run = runs.Run(setup.command(run_dir), folder / "runs.log")
        code = run.wait(600)
        fault = runs.difference(runs.losses_of(run_dir), wanted, complete=True)
        if code or fault:
            report.add("end of a run", "done", fault or f"exit code {code}: {run.log()[-600:]!r}")
    return report


def _stop(run: runs.Run, rng: random.Random) -> tuple[str, bool, str | None]:
    """Who got a signal, whether the run was through before it came, and what is wrong with how the run ended."""
    runs.wait_until(lambda: runs.takes_steps(run.log()), run)
    time.sleep(rng.uniform(0, _LONGEST_WAIT))
    children = run.children()
    receivers = {"the launcher": run.process.pid} | {f"rank {rank}": child for rank, child in enumerate(children)}
    receiver = rng.choice(list(receivers))
    runs.send(receivers[receiver], signal.SIGTERM)
    code = run.wait(120)
    is_through = "done: step" in run.log()
    return receiver, is_through, f"exit code {code}: {run.log()[-600:]!r}" if code else None

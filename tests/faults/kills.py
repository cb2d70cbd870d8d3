"""Processes of a run of two that are killed, again and again, at any moment and inside saves.

The launcher starts the run again each time. It must go on from the last checkpoint that was complete, or a later one,
say which checkpoint was cut off, and have logged the losses of an undisturbed run, bit for bit, when it is killed next
and at its end.
"""

import random
import signal
import time
from pathlib import Path

from tests.faults import runs
from tests.faults.harness import Report

_STEPS = 480
_SAVE_EVERY = 20
_INSIDE_SAVES = 0.5  # the share of kills that are to fall into saves, as far as that can be aimed at
_LEAST_INSIDE = 0.4
_SAVE_SECONDS = 0.1
_SECONDS_OF_STEPS = 2.0
_SECONDS_OF_START = 12.0


def check_kills(folder: Path, count: int) -> Report:
    """Kills processes `count` times."""
    report = Report("kill -9")
    setup = runs.Setup(folder, steps=_STEPS, save_every=_SAVE_EVERY, num_processes=2)
    wanted = setup.undisturbed()
    rng = random.Random(0)
    number = 0
    while report.count < count:  # one run, or another where it is through before
        number += 1
        run_dir = folder / f"run{number}"
        before = report.count
        run = runs.Run(setup.command(run_dir, restarts=count), folder / f"run{number}.log")
        try:
            _kill_again_and_again(run, run_dir, report, count, wanted, rng)
            code = run.wait(600)
        except runs.Stuck as error:
            report.add("hang", "hang", str(error))
            continue
        finally:
            run.end()
        fault = f"exit code {code}: {run.log()[-600:]!r}" if code else None
        fault = fault or runs.difference(runs.losses_of(run_dir), wanted, complete=True)
        fault = fault or runs.broken_checkpoint(run_dir)
        if fault:
            report.add("end of a run", "done", fault)
        elif report.count == before:
            report.add("end of a run", "done", "was through before it could be killed once")
    inside = _count_inside(report)
    if count >= 5 and inside < _LEAST_INSIDE * count:
        report.add("inside a save", "few", f"{inside} of {count} kills fell into saves, wanted {_LEAST_INSIDE:.0%}")
    return report


def _kill_again_and_again(
    run: runs.Run, run_dir: Path, report: Report, count: int, wanted: runs.Losses, rng: random.Random
) -> None:
    """Until the run ends or all kills are done; each becomes a case of the report."""
    killed: set[int] = set()
    best: int | None = None  # the last checkpoint that was complete at a kill
    was_saving = False

    def ranks() -> list[int]:
        return [child for child in run.children() if child not in killed]

    while report.count < count:
        start = run.log_size()
        if not runs.wait_until(lambda: len(ranks()) == 2, run):
            return
        of_attempt = ranks()
        aim = _into_a_save if _count_inside(report) <= _INSIDE_SAVES * report.count else _at_any_moment
        if not aim(run, run_dir, start, rng):
            return
        finished = runs.finished_steps(run_dir)
        for rank in rng.choice([of_attempt[:1], of_attempt[1:], of_attempt]):
            runs.send(rank, signal.SIGKILL)
        runs.wait_for_end(of_attempt, run)
        log = run.log(start)
        took_steps = runs.takes_steps(log)
        fault = runs.difference(runs.losses_of(run_dir), wanted, complete=False)
        if fault is None and took_steps and best is not None:
            resumed = runs.resumed_step(log)
            if resumed is None or resumed < best:
                fault = f"went on from step {resumed}, although the checkpoint of step {best} was complete"
            elif was_saving and "a checkpoint whose saving was cut off; it is removed" not in log:
                fault = "no line tells of the checkpoint whose saving was cut off"
        if fault is None and not set(finished[-2:]) <= set(runs.finished_steps(run_dir)):
            fault = f"of the complete checkpoints {finished} there are {runs.finished_steps(run_dir)}"
        was_saving, best = runs.is_saving(run_dir), max(finished, default=best)
        kind = "inside a save" if was_saving and took_steps else "between saves" if took_steps else "before a step"
        report.add(kind, "went on, same losses", fault)
        killed.update(of_attempt)


def _count_inside(report: Report) -> int:
    return sum(report.outcomes.get("inside a save", {}).values())


def _into_a_save(run: runs.Run, run_dir: Path, start: int, rng: random.Random) -> bool:
    """Waits for one of the next saves, and into it; False where the run ends before."""
    if not runs.wait_until(lambda: runs.takes_steps(run.log(start)), run):  # what was cut off before is removed by then
        return False
    step = runs.last_step(run_dir) + rng.choice([0, 1, 2]) * _SAVE_EVERY
    if not runs.wait_until(lambda: runs.is_saving(run_dir) and runs.last_step(run_dir) >= step, run, every=0.001):
        return False
    time.sleep(rng.uniform(0, _SAVE_SECONDS))
    return run.process.poll() is None


def _at_any_moment(run: runs.Run, run_dir: Path, start: int, rng: random.Random) -> bool:
    """Waits for some time after the start, or after the first step; False where the run ends before."""
    after_a_step = rng.random() < 0.5
    if after_a_step and not runs.wait_until(lambda: runs.takes_steps(run.log(start)), run):
        return False
    time.sleep(rng.uniform(0, _SECONDS_OF_STEPS if after_a_step else _SECONDS_OF_START))
    return run.process.poll() is None

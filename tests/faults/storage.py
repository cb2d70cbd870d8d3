"""Disks that become full, and checkpoints that are cut off on the disk.

A run on a full disk must end with one line that says so, with every checkpoint that was complete still whole, and go on
from there once there is room. A run that finds a file of its last checkpoint cut off must either not need that file, or
end with one line that names the checkpoint, change nothing, and go on once that is deleted. Both must come to the
losses of an undisturbed run, bit for bit.
"""

import random
import re
import shlex
import shutil
from pathlib import Path

from tests.faults import runs
from tests.faults.harness import Report, snapshot

_STEPS = 60
_SAVE_EVERY = 10
_SECONDS = 300


def check_full_disks(folder: Path, count: int) -> Report:
    """Trains `count` times on a tmpfs that is full at another moment each time, in a mount namespace of its own."""
    report = Report("disk full")
    setup = runs.Setup(folder, steps=_STEPS, save_every=_SAVE_EVERY, num_processes=1, keep_last=_STEPS)
    wanted = setup.undisturbed()
    needed = sum(path.stat().st_size for path in (folder / "undisturbed").rglob("*") if path.is_file())
    disk = folder / "disk"
    disk.mkdir()
    for number in range(count):
        size = int(needed * (number + 0.5) / count)
        after = folder / f"after{number}"
        report.add(*_on_a_full_disk(setup, disk, size, after, wanted))
    return report


def _on_a_full_disk(
    setup: runs.Setup, disk: Path, size: int, after: Path, wanted: runs.Losses
) -> tuple[str, str, str | None]:
    """The kind of case, its outcome, and a fault; `after` is where what is on the disk is copied to."""
    command = shlex.join(setup.command(disk / "run"))
    where = shlex.quote(str(disk))
    copy = shlex.quote(str(after))
    script = f"""
        mount -t tmpfs -o size={size} tmpfs {where} || exit 99
        {command}
        echo "exit code $?"
        mkdir {copy} && cp -a {where}/. {copy}/full || exit 98
        mount -o remount,size=1g {where} || exit 97
        {command}
        echo "exit code $?"
        cp -a {where}/. {copy}/room
    """
    run = runs.Run(["unshare", "--map-root-user", "--mount", "sh", "-c", script], after.with_suffix(".log"))
    try:
        code = run.wait(_SECONDS)
    except runs.Stuck as error:
        return "full", "hang", str(error)
    log = run.log()
    said = re.split(r"^exit code (\d+)$", log, flags=re.MULTILINE)
    if code or len(said) != 5:
        needs = "wanted a tmpfs by `unshare --map-root-user --mount`"
        return "full", "not run", f"exit code {code}, {needs}: {log[-600:]!r}"
    full, full_code, room, room_code, _ = said
    errors = [line for line in full.splitlines() if line.startswith("error: ")]
    finished = runs.finished_steps(after / "full" / "run")
    kind = "before the first save" if not runs.takes_steps(full) else "later" if finished else "at the first save"
    fault = None
    if full_code != "1" or len(errors) != 1 or "No space left on device; make room there" not in errors[0]:
        fault = f"exit code {full_code}, errors {errors}; {full[-600:]!r}"
    elif "Traceback" in full or "Exception ignored" in full:
        fault = f"a traceback: {full[-1000:]!r}"
    elif room_code != "0":
        fault = f"with room again exit code {room_code}: {room[-600:]!r}"
    elif finished and runs.resumed_step(room) != max(finished):
        fault = f"went on from step {runs.resumed_step(room)}, although that of {max(finished)} was complete"
    fault = fault or runs.broken_checkpoint(after / "full" / "run")
    fault = fault or runs.difference(runs.losses_of(after / "full" / "run"), wanted, complete=False)
    fault = fault or runs.difference(runs.losses_of(after / "room" / "run"), wanted, complete=True)
    return kind, "one line, then same losses", fault and f"{size} bytes: {fault}"


def check_truncated_checkpoints(folder: Path, count: int) -> Report:
    """Cuts off a file of a run's last checkpoint, `count` times, and starts the run again."""
    report = Report("truncated checkpoint")
    setup = runs.Setup(folder, steps=_STEPS, save_every=_SAVE_EVERY, num_processes=1, keep_last=_STEPS)
    wanted = setup.undisturbed()
    half_way, last = folder / "undisturbed", _STEPS // 2
    for step in runs.finished_steps(half_way):
        if step > last:
            shutil.rmtree(half_way / "checkpoints" / str(step))
    rng = random.Random(0)
    # Files by size: each case takes one out of another part of them, so that large and small ones are met.
    files = sorted(
        (path for path in (half_way / "checkpoints" / str(last)).rglob("*") if path.is_file() and path.stat().st_size),
        key=lambda path: (-path.stat().st_size, str(path)),
    )
    for number in range(count):
        file = files[number * len(files) // count]
        run_dir = folder / f"run{number}"
        shutil.copytree(half_way, run_dir)
        cut = run_dir / file.relative_to(half_way)
        size = rng.choice([0, cut.stat().st_size // 2, cut.stat().st_size - 1])
        with cut.open("r+b") as opened:
            opened.truncate(size)
        outcome, fault = _go_on(setup, run_dir, last, wanted)
        shown = f"{file.relative_to(half_way)} cut off at {size} of {file.stat().st_size} bytes"
        report.add(file.name if file.parent.name != "d" else "data", outcome, fault and f"{shown}: {fault}")
    return report


def _go_on(setup: runs.Setup, run_dir: Path, last: int, wanted: runs.Losses) -> tuple[str, str | None]:
    """Starts a run whose last checkpoint is damaged: what became of it, and a fault."""
    before = snapshot(run_dir)
    run = runs.Run(setup.command(run_dir), run_dir.with_suffix(".log"))
    code, log = run.wait(_SECONDS), run.log()
    outcome = "did not need it"
    if code:
        outcome = "one line, then same losses"
        errors = [line for line in log.splitlines() if line.startswith("error: ")]
        broken = run_dir / "checkpoints" / str(last)
        if code != 1 or len(errors) != 1 or not errors[0].startswith(f"error: {broken}: ") or "Traceback" in log:
            return outcome, f"exit code {code}: {log[-600:]!r}"
        if snapshot(run_dir) != before:
            return outcome, "refused, but files of the run have changed"
        shutil.rmtree(broken)  # as the line says
        run = runs.Run(setup.command(run_dir), run_dir.with_suffix(".log"))
        if run.wait(_SECONDS):
            return outcome, f"without the broken checkpoint: {run.log()[-600:]!r}"
    return outcome, runs.difference(runs.losses_of(run_dir), wanted, complete=True)

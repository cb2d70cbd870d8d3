"""python -m train.checkpoint ls|verify DIR: the checkpoints of a run, and whether they are whole. Writes nothing."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from train.checkpoint.inspection import Listed, list_checkpoints, remedy, verify
from train.checkpoint.store import CheckpointError, tell_faults_once


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 1 where there is nothing to list or one is not whole."""
    parser = argparse.ArgumentParser(prog="python -m train.checkpoint", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (
        ("ls", "list the checkpoints, without reading arrays"),
        ("verify", "read every array of the newest checkpoint, of one or of all"),
    ):
        command = verbs.add_parser(verb, help=text, description=text)
        command.add_argument("dir", metavar="DIR", help="a run's folder, its folder of checkpoints, or one checkpoint")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step")
    which.add_argument("--all", action="store_true", help="all whose saving was finished")
    options = parser.parse_args(arguments)
    tell_faults_once()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of files that its other formats have
    try:
        return _run(options)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; make it readable, or pass another folder", file=sys.stderr)
    return 1


def _run(options: argparse.Namespace) -> int:
    listed = list_checkpoints(options.dir)
    if options.verb == "ls":
        _print(listed, [_state(checkpoint) for checkpoint in listed])
        for checkpoint in listed:
            if checkpoint.problem is not None:
                print(f"note: {checkpoint.path}: {remedy(checkpoint, listed)}", file=sys.stderr)
        return 0
    return _verify(listed, _chosen(listed, options.dir, options.step, every=options.all))


def _chosen(listed: list[Listed], directory: str, step: int | None, *, every: bool) -> list[Listed]:
    finished = [checkpoint for checkpoint in listed if checkpoint.finished]
    if step is not None:
        chosen = [checkpoint for checkpoint in finished if checkpoint.step == step]
        if not chosen:
            steps = ", ".join(str(checkpoint.step) for checkpoint in finished) or "none"
            raise CheckpointError(f"--step: got {step}, wanted a step that {directory} holds: {steps}")
        return chosen
    if not finished:
        raise CheckpointError(
            f"{directory}: saving its only checkpoint was cut off; start the run again, which begins at step 0"
        )
    return finished if every else finished[-1:]


def _verify(listed: list[Listed], chosen: list[Listed]) -> int:
    outcomes, broken = [], []
    console = Console(stderr=True)
    for checkpoint in chosen:
        with console.status("") as status:
            count, problem = verify(checkpoint, progress=lambda name, s=status: s.update(f"reading {name}"))
        outcomes.append(f"whole: {count} arrays read" if problem is None else f"broken: {problem}")
        if problem is not None:
            broken.append(f"error: {checkpoint.path}: {problem}; {remedy(checkpoint, listed)}")
    _print(chosen, outcomes)
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


def _state(checkpoint: Listed) -> str:
    if checkpoint.problem is None:
        return "complete"
    return f"{'broken' if checkpoint.finished else 'unfinished'}: {checkpoint.problem}"


def _print(listed: list[Listed], states: list[str]) -> None:
    table = Table("step", "saved", "size", "state", title=os.path.relpath(listed[0].path.parent))
    for checkpoint, state in zip(listed, states, strict=True):
        table.add_row(
            str(checkpoint.step), f"{checkpoint.time:%Y-%m-%d %H:%M:%S}", decimal(checkpoint.num_bytes), state
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())

"""python -m benchmarks.run: measures a family of kernels, or a training step, and writes the results."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks.blockwise import OURS, measure_blockwise
from benchmarks.cases import CASES, PASSES, SMOKE, Case, Pass
from benchmarks.measure import Ceiling, matmul_ceiling
from benchmarks.peers import PEERS, chosen_peers
from benchmarks.report import write_report
from benchmarks.results import Results, Row, with_peer_ratios
from pallas_kernels.machine import describe

FAMILIES = ("blockwise", "train")
BLOCKWISE_FLOPS = (
    "TFLOP/s count the pairs that the mask allows: forward 4 pairs D N B, 3.5 times that with backward, 2.5 times for "
    "the backward pass alone. What is timed agrees with the float32 formula on a sample of query rows, out and every "
    "gradient. Schedules, segment ids and masks are built outside the timing."
)
TRAIN_FLOPS = (
    "A step is forward, backward and update, without input and logging. TFLOP/s count three times the model's forward "
    "FLOPs over the documents at hand, as MFU does; memory is of one device."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 2 where it is wrong, 1 where an implementation of this
    project is wrong or failed."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        if options.family == "train":
            return _train(options)
        return _blockwise(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    add = parser.add_argument
    add("--family", choices=FAMILIES, default="blockwise", help="what to measure")
    add("--cases", metavar="REGEX", default="", help="cases whose name it matches; `smoke` takes tiny ones")
    add("--list", action="store_true", help="show the cases and stop")
    add("--implementations", metavar="NAMES", help=f"of this project, from {','.join(OURS)}; default all")
    add("--peers", metavar="NAMES", help=f"from {','.join(PEERS)}, or '' for none; default those installed")
    add("--passes", metavar="NAMES", help=f"from {','.join(PASSES)}; default all")
    add("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of q, k and v")
    add("--repetitions", type=int, default=20, help="measurements of each")
    add("--config", metavar="FILE", help="of the run whose training step is measured")
    add("overrides", metavar="a.b=c", nargs="*", help="config keys that differ from the file")
    add("--out", metavar="DIR", type=Path, default=Path("benchmarks/results"), help="where results go")
    add("--commit", help="what was measured, where git cannot say")
    return parser


def chosen_cases(pattern: str) -> tuple[Case, ...]:
    """The tiny cases for `smoke`, else those whose name the pattern matches anywhere.

    Raises: ValueError where there are none.
    """
    if pattern == "smoke":
        return SMOKE
    chosen = tuple(case for case in CASES if re.search(pattern, case.name))
    if not chosen:
        raise ValueError(f"--cases: {pattern!r} matches no case; --list shows them")
    return chosen


def cases_of_passes(cases: Sequence[Case], passes: Sequence[Pass]) -> tuple[Case, ...]:
    """The cases that have any of the passes: the backward pass alone is measured of hops only.

    Raises: ValueError where there are none.
    """
    chosen = tuple(case for case in cases if case.hop or set(passes) != {"backward"})
    if not chosen:
        raise ValueError("--passes: 'backward' alone is measured of hops only, and none is chosen; add --cases hop")
    return chosen


def chosen_implementations(names: str | None) -> tuple[str, ...]:
    """This project's implementations that a comma-separated list names; None means all.

    Raises: ValueError where a name is unknown.
    """
    if names is None:
        return OURS
    chosen = tuple(filter(None, names.split(",")))
    unknown = [name for name in chosen if name not in OURS]
    if unknown:
        raise ValueError(f"--implementations: got {','.join(unknown)!r}, wanted some of {','.join(OURS)}")
    return chosen


def chosen_passes(names: str | None) -> tuple[Pass, ...]:
    """The passes that a comma-separated list names; None means all.

    Raises: ValueError where a name is unknown.
    """
    if names is None:
        return PASSES
    unknown = sorted(set(names.split(",")) - set(PASSES))
    if unknown:
        raise ValueError(f"--passes: got {','.join(unknown)!r}, wanted some of {','.join(PASSES)}")
    return tuple(name for name in PASSES if name in names.split(","))


def _blockwise(options: argparse.Namespace) -> int:
    cases = chosen_cases(options.cases)
    if options.list:
        for case in cases:
            print(f"{case.name}  ({case.flops('forward') / 1e12:.3g} TFLOP forward)")
        return 0
    if options.overrides:
        raise ValueError(f"{' '.join(options.overrides)}: overrides go with --family train")
    implementations = chosen_implementations(options.implementations)
    passes = chosen_passes(options.passes)
    cases = cases_of_passes(cases, passes)
    notes: list[str] = [BLOCKWISE_FLOPS]
    peers = chosen_peers(options.peers, note=notes.append)
    for text in notes[1:]:
        _say(text)
    ceiling = matmul_ceiling(repetitions=options.repetitions)
    _say(f"{jax.devices()[0].device_kind}: {ceiling}")
    rows = measure_blockwise(
        cases,
        peers=peers,
        ceiling=ceiling,
        implementations=implementations,
        passes=passes,
        dtype=options.dtype,
        repetitions=options.repetitions,
        progress=_say,
    )
    measured = {row.case for row in rows if row.which in PASSES}
    if missing := [case.name for case in cases if case.name not in measured]:
        notes.append(f"Interrupted before: {', '.join(missing)}.")
    settings = {"dtype": options.dtype, "repetitions": options.repetitions, "cases": options.cases or "all"}
    return _finish(options, rows, ceiling, settings, notes)


def _train(options: argparse.Namespace) -> int:
    if options.config is None:
        raise ValueError("--config: got none, wanted the YAML file of a run for --family train")
    if options.list:
        print(options.config)
        return 0
    from benchmarks.train_step import measure_train  # kernels are measured without the trainer's extras

    row, ceiling = measure_train(options.config, options.overrides, repetitions=options.repetitions, progress=_say)
    settings = {"config": options.config, "repetitions": options.repetitions}
    if options.overrides:
        settings["overrides"] = " ".join(options.overrides)
    return _finish(options, [row], ceiling, settings, [TRAIN_FLOPS])


def _finish(options, rows: Sequence[Row], ceiling: Ceiling, settings: dict, notes: Sequence[str]) -> int:
    results = Results(
        family=options.family,
        machine=describe(options.commit),
        settings=settings,
        ceiling_size=ceiling.size,
        ceiling_tflops=ceiling.flops / 1e12,
        rows=with_peer_ratios(rows),
        notes=tuple(notes),
    )
    for path in write_report(results, options.out, note=_say):
        print(path)
    return int(any(row.ours and row.problem is not None and not row.problem.startswith("refused") for row in rows))


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""python -m benchmarks.run: measures kernels, attention over a mesh or a training step, and writes the results."""

import argparse
import contextlib
import functools
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from benchmarks import decode, linear, linear_cases, linear_report, sparse, sparse_cases
from benchmarks.blockwise import OURS, measure_blockwise
from benchmarks.cases import CASES, PASSES, SMOKE, WHOLE_PASSES, AttentionCase, Batch, Case, Pass
from benchmarks.linear import measure_linear
from benchmarks.measure import Bandwidth, Ceiling, copy_bandwidth, matmul_ceiling
from benchmarks.peers import LINEAR_PEERS, PEERS, chosen_peers
from benchmarks.report import write_report
from benchmarks.results import Results, Row, with_peer_ratios
from pallas_kernels.machine import describe

FAMILIES = ("blockwise", "decode", "patterns", "sparse", "linear", "loss", "context_parallel", "train")
BLOCKWISE_FLOPS = (
    "TFLOP/s count the pairs that the mask allows: forward 4 pairs D N B, 3.5 times that with backward, 2.5 times for "
    "the backward pass alone. What is timed agrees with the float32 formula on a sample of query rows, out and every "
    "gradient. Schedules, segment ids and masks are built outside the timing."
)
TRAIN_FLOPS = (
    "A step is forward, backward and update, without input and logging. TFLOP/s a device count three times the model's "
    "forward FLOPs over the documents at hand, as MFU does; memory is of one device."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 2 where it is wrong, 1 where an implementation of this
    project is wrong or failed."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        if options.devices is not None and options.family != "context_parallel":
            raise ValueError("--devices: goes with --family context_parallel")
        if options.repetitions < 1:
            raise ValueError(f"--repetitions: got {options.repetitions}, wanted 1 or more")
        if options.family == "train":
            return _train(options)
        if options.family == "context_parallel":
            return _context_parallel(options)
        if options.family == "decode":
            return _decode(options)
        if options.family == "linear":
            return _linear(options)
        if options.family == "loss":
            return _loss(options)
        if options.family == "patterns":
            return _patterns(options)
        if options.family == "sparse":
            return _sparse(options)
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
    add("--implementations", metavar="NAMES", help=f"of this project, from {_names(OURS, linear.OURS)}; default all")
    add("--peers", metavar="NAMES", help=f"from {','.join(PEERS)}, or '' for none; default those installed")
    add("--passes", metavar="NAMES", help=f"from {','.join(PASSES)}; default all")
    add("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of q, k and v")
    add("--repetitions", type=int, default=20, help="measurements of each")
    add("--devices", metavar="N", type=int, help="of --family context_parallel: up to so many; default all at hand")
    add("--config", metavar="FILE", help="of the run whose training step is measured")
    add("overrides", metavar="a.b=c", nargs="*", help="config keys that differ from the file")
    add("--out", metavar="DIR", type=Path, default=Path("benchmarks/results"), help="where results go")
    add("--commit", help="what was measured, where git cannot say")
    return parser


def _names(*of_families: tuple[str, ...]) -> str:
    return ",".join(dict.fromkeys(itertools.chain(*of_families)))


def chosen_cases[C](pattern: str, cases: tuple[C, ...] = CASES, smoke: tuple[C, ...] = SMOKE) -> tuple[C, ...]:
    """The tiny cases for `smoke`, else those whose name the pattern matches anywhere.

    Raises: ValueError where there are none.
    """
    if pattern == "smoke":
        return smoke
    chosen = tuple(case for case in cases if re.search(pattern, case.name))
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


def chosen_implementations(names: str | None, ours: tuple[str, ...] = OURS) -> tuple[str, ...]:
    """This project's implementations that a comma-separated list names; None means all.

    Raises: ValueError where a name is unknown.
    """
    if names is None:
        return ours
    chosen = tuple(filter(None, names.split(",")))
    unknown = [name for name in chosen if name not in ours]
    if unknown:
        raise ValueError(f"--implementations: got {','.join(unknown)!r}, wanted some of {','.join(ours)}")
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


def _refuse_options_of_training(options: argparse.Namespace) -> None:
    if options.config is not None:
        raise ValueError(f"--config: goes with --family train, got --family {options.family}; leave it out")
    if options.overrides:
        raise ValueError(f"{' '.join(options.overrides)}: overrides go with --family train")


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
    notes += _interrupted(cases, rows)
    settings = {"dtype": options.dtype, "repetitions": options.repetitions, "cases": options.cases or "all"}
    return _finish(options, rows, ceiling, settings, notes)


def _decode(options: argparse.Namespace) -> int:
    cases = chosen_cases(options.cases, decode.CASES, decode.SMOKE)
    if options.list:
        for case in cases:
            print(f"{case.name}  ({case.bytes(options.dtype) / 1e6:.4g} MB read)")
        return 0
    _refuse_options_of_training(options)
    if options.passes not in (None, "forward"):
        raise ValueError(f"--passes: got {options.passes!r}, wanted forward: decoding has no other")
    peers = decode.PEERS if options.peers is None else tuple(filter(None, options.peers.split(",")))
    if unknown := set(peers) - set(decode.PEERS):
        raise ValueError(f"--peers: got {','.join(sorted(unknown))!r}, wanted some of {','.join(decode.PEERS)}")
    implementations = chosen_implementations(options.implementations, decode.OURS)
    ceiling = matmul_ceiling(repetitions=options.repetitions)
    bandwidth = copy_bandwidth(repetitions=options.repetitions)
    _say(f"{jax.devices()[0].device_kind}: {ceiling}, {bandwidth}")
    rows = decode.measure_decode(
        cases,
        bandwidth=bandwidth,
        implementations=implementations,
        peers=peers,
        dtype=options.dtype,
        repetitions=options.repetitions,
        progress=_say,
    )
    settings = {"dtype": options.dtype, "repetitions": options.repetitions, "cases": options.cases or "all"}
    notes = [*decode.NOTES, *_interrupted(cases, rows)]
    return _finish(options, rows, ceiling, settings, notes, bandwidth=bandwidth)


def _linear(options: argparse.Namespace) -> int:
    cases = chosen_cases(options.cases, linear_cases.CASES, linear_cases.SMOKE)
    if options.list:
        for case in cases:
            print(f"{case.name}  ({case.bytes('forward', options.dtype) / 1e9:.3g} GB forward)")
        return 0
    _refuse_options_of_training(options)
    implementations = options.implementations
    if implementations is not None:
        implementations = chosen_implementations(implementations, linear.OURS)
    passes = WHOLE_PASSES if options.passes is None else chosen_passes(options.passes)
    if "backward" in passes:
        raise ValueError("--passes: 'backward' alone is measured of --family blockwise only; take forward+backward")
    notes = list(linear_report.NOTES)
    num_notes = len(notes)
    peers = chosen_peers(options.peers, note=notes.append, peers=LINEAR_PEERS)
    for text in notes[num_notes:]:
        _say(text)
    ceiling = matmul_ceiling(repetitions=options.repetitions)
    bandwidth = copy_bandwidth(repetitions=options.repetitions)
    _say(f"{jax.devices()[0].device_kind}: {ceiling}, {bandwidth}")
    rows = measure_linear(
        cases,
        peers=peers,
        ceiling=ceiling,
        bandwidth=bandwidth,
        implementations=implementations,
        passes=passes,
        dtype=options.dtype,
        repetitions=options.repetitions,
        progress=_say,
    )
    notes += _interrupted(cases, rows)
    bars = linear_report.bars(rows, cases)
    for text in bars:
        _say(text)
    settings = {
        "dtype": options.dtype,
        "repetitions": f"{options.repetitions}, fewer where they take more than {linear.MAX_SECONDS} s",
        "cases": options.cases or "all",
    }
    return _finish(options, rows, ceiling, settings, [*notes, *bars], bandwidth=bandwidth)


def _loss(options: argparse.Namespace) -> int:
    from benchmarks import loss  # kernels are measured without the layers' extras

    cases = chosen_cases(options.cases, loss.CASES, loss.SMOKE)
    if options.list:
        for case in cases:
            print(f"{case.name}  ({case.flops / 1e12:.3g} TFLOP)")
        return 0
    for name in ("implementations", "peers", "passes", "config"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: goes with another family, got --family loss; leave it out")
    if options.overrides:
        raise ValueError(f"{' '.join(options.overrides)}: overrides go with --family train")
    ceiling = matmul_ceiling(repetitions=options.repetitions)
    _say(f"{jax.devices()[0].device_kind}: {ceiling}")
    rows = loss.measure_loss(cases, ceiling=ceiling, repetitions=options.repetitions, progress=_say)
    settings = {"repetitions": options.repetitions, "cases": options.cases or "all"}
    return _finish(options, rows, ceiling, settings, list(loss.NOTES))


def _patterns(options: argparse.Namespace) -> int:
    from benchmarks import patterns  # kernels are measured without the layers' extras

    if options.peers is not None:
        raise ValueError("--peers: goes with another family, got --family patterns; leave it out")
    return _beside_dense(
        options,
        chosen_cases(options.cases, patterns.CASES, patterns.SMOKE),
        describe=lambda case: f"against {case.dense}",
        measure=patterns.measure_patterns,
        notes=list(patterns.NOTES),
    )


def _sparse(options: argparse.Namespace) -> int:
    notes = list(sparse.NOTES)
    peers = chosen_peers("cudnn" if options.peers is None else options.peers, note=notes.append)
    return _beside_dense(
        options,
        chosen_cases(options.cases, sparse_cases.CASES, sparse_cases.SMOKE),
        describe=lambda case: f"{100 * case.density:.3g} % of dense",
        measure=functools.partial(sparse.measure_sparse, peers=peers),
        notes=notes,
    )


def _beside_dense[C: AttentionCase](
    options: argparse.Namespace,
    cases: Sequence[C],
    *,
    describe: Callable[[C], str],
    measure: Callable[..., list[Row]],
    notes: list[str],
) -> int:
    """Of a family whose cases are compared with dense attention by the same implementation."""
    if options.list:
        for case in cases:
            print(f"{case.name}  ({describe(case)})")
        return 0
    _refuse_options_of_training(options)
    passes = WHOLE_PASSES if options.passes is None else chosen_passes(options.passes)
    if "backward" in passes:
        raise ValueError("--passes: 'backward' alone is measured of hops only; choose forward or forward+backward")
    if options.implementations is None:  # the kernels for Hopper on a GPU, elsewhere XLA
        implementations = ("mosaic_gpu",) if jax.default_backend() == "gpu" else ("xla",)
    else:
        implementations = chosen_implementations(options.implementations)
    ceiling = matmul_ceiling(repetitions=options.repetitions)
    _say(f"{jax.devices()[0].device_kind}: {ceiling}")
    rows = measure(
        cases,
        ceiling=ceiling,
        implementations=implementations,
        passes=passes,
        dtype=options.dtype,
        repetitions=options.repetitions,
        progress=_say,
    )
    notes += _interrupted(cases, rows)
    settings = {"dtype": options.dtype, "repetitions": options.repetitions, "cases": options.cases or "all"}
    return _finish(options, rows, ceiling, settings, notes)


def _interrupted(cases: Sequence[Batch | decode.DecodeCase], rows: Sequence[Row]) -> list[str]:
    """A note of the cases that have no row of a pass."""
    measured = {row.case for row in rows if row.which in PASSES}
    missing = [case.name for case in cases if case.name not in measured]
    return [f"Interrupted before: {', '.join(missing)}."] if missing else []


def _context_parallel(options: argparse.Namespace) -> int:
    from benchmarks import context_parallel  # kernels are measured without the layers' extras

    cases = chosen_cases(options.cases, context_parallel.CASES, context_parallel.SMOKE)
    if options.list:
        for case in cases:
            print(f"{case.name}  ({', '.join(way.name for way in case.ways)})")
        return 0
    for name in ("implementations", "peers", "config"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: goes with another family, got --family context_parallel; leave it out")
    if options.overrides:
        raise ValueError(f"{' '.join(options.overrides)}: overrides go with --family train")
    passes = WHOLE_PASSES if options.passes is None else chosen_passes(options.passes)
    if "backward" in passes:
        raise ValueError("--passes: 'backward' alone is measured of hops only; choose forward or forward+backward")
    num_devices = devices_at_hand(options.devices)
    degrees = context_parallel.degrees_up_to(num_devices)
    if options.cases == "smoke":
        degrees = (1, num_devices)
    notes = list(context_parallel.NOTES)
    if jax.default_backend() == "cpu":
        notes.append(context_parallel.CPU_NOTE)
        _say(context_parallel.CPU_NOTE)
    ceiling = matmul_ceiling(repetitions=options.repetitions)
    _say(f"{num_devices} x {jax.devices()[0].device_kind}: {ceiling}")
    rows = context_parallel.measure_context_parallel(
        cases,
        degrees=degrees,
        ceiling=ceiling,
        passes=passes,
        dtype=options.dtype,
        repetitions=options.repetitions,
        progress=_say,
    )
    settings = {
        "devices": num_devices,
        "dtype": options.dtype,
        "repetitions": options.repetitions,
        "cases": options.cases or "all",
    }
    return _finish(options, rows, ceiling, settings, notes)


def devices_at_hand(wanted: int | None) -> int:
    """How many devices to use; where JAX has not started yet, its CPU platform is asked for as many.

    Args:
      wanted: None means all at hand.
    Raises: ValueError where there are fewer, or one.
    """
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if wanted is not None and wanted > jax.config.jax_num_cpu_devices and not forced:
        with contextlib.suppress(RuntimeError):  # JAX has started, with what it then has
            jax.config.update("jax_num_cpu_devices", wanted)
    at_hand, platform = jax.device_count(), jax.default_backend()
    number = at_hand if wanted is None else wanted
    if number < 2:
        raise ValueError(
            f"--devices: got {number}, wanted 2 or more to split a sequence over; on a machine with one device, "
            "JAX_PLATFORMS=cpu and --devices 8 --cases smoke show that it runs"
        )
    if number > at_hand:
        raise ValueError(
            f"--devices: got {number}, wanted at most the {at_hand} {platform} devices at hand; ask for fewer, go to a "
            "machine with more, or see that it runs on the CPU's: JAX_PLATFORMS=cpu and --cases smoke"
        )
    return number


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


def _finish(
    options,
    rows: Sequence[Row],
    ceiling: Ceiling,
    settings: dict,
    notes: Sequence[str],
    *,
    bandwidth: Bandwidth | None = None,
) -> int:
    results = Results(
        family=options.family,
        machine=describe(options.commit),
        settings=settings,
        ceiling_size=ceiling.size,
        ceiling_tflops=ceiling.flops / 1e12,
        rows=with_peer_ratios(rows),
        notes=tuple(notes),
        copy_gb_per_second=None if bandwidth is None else bandwidth.bytes / 1e9,
    )
    for path in write_report(results, options.out, note=_say):
        print(path)
    return int(any(row.ours and row.problem is not None and not row.problem.startswith("refused") for row in rows))


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit ends a run as Ctrl-C does
    sys.exit(main())

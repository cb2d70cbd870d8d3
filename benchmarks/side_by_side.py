"""Checks and times the candidates of many cases one by one: what is the same for every family of kernels."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import jax

from benchmarks.cases import Batch, Pass
from benchmarks.measure import memory_bytes, time_calls
from benchmarks.peers import Candidate, Peer
from benchmarks.results import Row, problem_of
from pallas_kernels.compiling import compile_all

_CHECK = None  # in the place of a candidate's name


class AnyCandidate(Protocol):
    """One way to compute a case; see `peers.Candidate`."""

    name: str
    ours: bool
    deterministic: bool

    @property
    def passes(self) -> tuple[Pass, ...]: ...


class Family[C, X: AnyCandidate](Protocol):
    """What differs from family to family, of its cases C and its candidates X."""

    def candidates(self, case: C) -> Iterable[X | Row]:
        """The ways to compute a case, or rows that say why there is none."""

    def lower(self, candidate: X, case: C, which: Pass) -> jax.stages.Lowered:
        """The program that is timed."""

    def checks(self, case: C) -> Mapping[Pass, Callable[[], jax.stages.Lowered]]:
        """Programs that judge the results of a pass, where there are any to compile beside those that are timed."""

    def start(
        self, case: C, checks: Mapping[Pass, jax.stages.Compiled | Exception]
    ) -> Callable[[X, Pass, jax.stages.Compiled], tuple[str | None, Callable]]:
        """Draws the inputs of a case: (candidate, pass, program) -> (what is wrong with it or None, what to time)."""

    def figures(self, case: C, which: Pass, seconds: float) -> dict:
        """Fields of a row that follow from the time."""


def measure_side_by_side[C](
    family: Family,
    cases: Sequence[C],
    *,
    passes: Sequence[Pass],
    repetitions: int,
    max_seconds: float | None = None,
    progress: Callable[[str], None] = print,
) -> list[Row]:
    """Compiles every program, then for each case checks and times its candidates one by one.

    Args:
      max_seconds: As `time_calls`.
    Returns: a row for each case, pass and candidate; what is wrong is not timed. After Ctrl-C, the rows until then.
    """
    rows, candidates = [], {}
    for case in cases:
        for candidate in family.candidates(case):
            if isinstance(candidate, Row):
                rows.append(candidate)
                continue
            for which in (name for name in passes if name in candidate.passes):
                candidates[case, which, candidate.name] = candidate
    programs = {key: functools.partial(family.lower, candidate, *key[:2]) for key, candidate in candidates.items()}
    for case in dict.fromkeys(case for case, _, _ in candidates):
        checks = family.checks(case).items()
        programs |= {(case, which, _CHECK): lower for which, lower in checks if which in passes}
    compiled = compile_all(programs, progress=progress)
    number = 0
    try:
        for case in cases:
            for row in _rows_of_case(family, case, candidates, compiled, repetitions, max_seconds):
                number += 1
                progress(f"[{number}/{len(candidates)}] {_line(row)}")
                rows.append(row)
    except KeyboardInterrupt:
        progress("interrupted: what was measured until now is kept")
    return rows


def peer_candidates[C: Batch](case: C, peers: Mapping[str, Peer[C]]) -> Iterator[Candidate | Row]:
    """The peers' candidates for a case; a row for a peer that does not serve it."""
    for name, peer in peers.items():
        try:
            yield from peer.candidates(case)
        except Exception as error:  # peers raise what they like, from their import on
            problem = problem_of(error)
        else:
            continue
        yield Row(case=case.name, which="both passes", implementation=name, ours=False, problem=problem)


def _rows_of_case(
    family: Family,
    case,
    candidates: Mapping,
    compiled: Mapping,
    repetitions: int,
    max_seconds: float | None,
) -> Iterator[Row]:
    checks = {which: program for (of, which, name), program in compiled.items() if of == case and name is _CHECK}
    keys = [key for key in candidates if key[0] == case]
    run = None
    if not all(isinstance(compiled[key], Exception) for key in keys):
        try:
            run = family.start(case, checks)
        except Exception as error:  # memory may not suffice for the inputs
            run = error
    for key in keys:
        candidate, which, program = candidates[key], key[1], compiled[key]
        row = functools.partial(
            Row,
            case=case.name,
            which=which,
            implementation=candidate.name,
            ours=candidate.ours,
            deterministic=candidate.deterministic or which == "forward",
        )
        try:
            for outcome in (program, run):
                if isinstance(outcome, Exception):
                    raise outcome
            problem, call = run(candidate, which, program)
            if problem is not None:
                yield row(problem=f"wrong: {problem}")
                continue
            timing = time_calls(call, repetitions=repetitions, max_seconds=max_seconds)
        except Exception as error:  # peers raise what they like, and memory may not suffice
            yield row(problem=problem_of(error))
        else:
            yield row(
                median_ms=1e3 * timing.median,
                low_ms=1e3 * timing.low,
                high_ms=1e3 * timing.high,
                memory_bytes=memory_bytes(program),
                **family.figures(case, which, timing.median),
            )


def _line(row: Row) -> str:
    if row.problem is not None:
        outcome = row.problem
    else:
        details = (f", {value:.4g} {name}" for name, value in row.details.items())
        speed = "" if row.tflops is None else f", {row.tflops:.3g} TFLOP/s"
        outcome = f"{row.median_ms:.3f} ms{speed}{''.join(details)}"
    return f"{row.case}, {row.which}, {row.implementation}: {outcome}"

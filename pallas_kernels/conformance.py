"""python -m pallas_kernels.conformance: runs every case of a family by every implementation against the reference.

It prints an outcome a line and fails if any is not what `Family.serves` promises. With --json it puts them into the
device's file in the family's folder, as they come, where what was not chosen this time stays; --readme makes the family
README's table of those files. The tests run the same trials one by one.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, machine, markdown
from pallas_kernels.blockwise import suite as blockwise
from pallas_kernels.compiling import compile_all
from pallas_kernels.linear import suite as linear
from pallas_kernels.sparse import suite as sparse
from pallas_kernels.testing import Family, Trial, assert_close, relative_errors

_SHARES_OF_A_PROCESS = 4

FAMILIES = {family.name: family for family in (blockwise.FAMILY, linear.FAMILY, sparse.FAMILY)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a trial.

    Attributes:
      case: Its name.
      errors: By way to call the ops and by result: the error's root mean square and maximum over the reference's.
      refused: By way: the reason.
      problems: What is not as it must be; a trial without any has passed, even where everything was rightly refused.
      commit: What it is of, where that is not the report's own.
    """

    case: str
    implementation: str
    dtype: str
    errors: dict[str, dict[str, Sequence[float]]] = dataclasses.field(default_factory=dict)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    commit: str | None = None

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.problems:
            return "FAILED"
        if not self.errors:
            return "-"
        weaker = [f"no {way}" for way in self.refused]
        return f"ok ({', '.join(weaker)})" if weaker else "ok"

    def __str__(self) -> str:
        worst = max((x[0] for results in self.errors.values() for x in results.values()), default=None)
        figures = "" if worst is None else f", greatest rms error {worst:.1e}"
        reasons = "".join(f"; {reason}" for reason in self.problems or dict.fromkeys(self.refused.values()))
        return f"{self.case} {self.implementation} {self.dtype}: {self.verdict}{figures}{reasons}"


def run(
    family: Family, trials: Sequence[Trial], *, progress: Callable[[str], None] = lambda text: None
) -> list[Outcome]:
    """Compiles the programs of all trials side by side, then runs them one by one.

    The truth of a case is computed once for all implementations and ways that take the same inputs.

    Raises: ValueError where `family.serves` says nothing of an implementation.
    """
    attempts = []
    for trial in trials:
        if trial.implementation not in family.serves:
            raise ValueError(
                f"{family.name}: nothing says what {trial.implementation!r} must serve; add it to the family's `serves`"
            )
        attempts += [_Attempt(family, trial, ways) for ways in family.ways_of(trial.case)]
    programs: dict[Any, Callable[[], jax.stages.Lowered]] = {attempt: attempt.lower for attempt in attempts}
    for trial in trials:
        programs[trial.case] = functools.partial(_lower_truth, family, trial.case)
    compiled = compile_all(programs, progress=progress)

    @functools.cache
    def truth(case, dtype: str, absent: frozenset[str]) -> dict:
        return jax.device_get(_compiled(compiled[case])(_truth_inputs(case.inputs(dtype), absent)))

    outcomes = {
        trial: Outcome(case=trial.case.name, implementation=trial.implementation, dtype=trial.dtype) for trial in trials
    }
    for attempt in attempts:
        try:
            attempt.judge(compiled[attempt], truth, outcomes[attempt.trial])
        except Exception as error:  # whatever it is, the other trials go on
            outcomes[attempt.trial].problems.append(f"{attempt.way or 'all ways'}: failed with {_first_line(error)}")
    for trial, outcome in outcomes.items():
        outcome.problems.extend(_broken_promises(family, trial, outcome))
    return list(outcomes.values())


def run_in_processes(
    family: Family,
    trials: Sequence[Trial],
    num_processes: int,
    *,
    progress: Callable[[str], None] = lambda text: None,
    keep: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """`run` by several processes, since tracing and lowering, most of the work on a GPU, take one core of a process.

    They share the device: call `share_device` before JAX sees it. The trials of a case stay together, for its truth.
    One process takes its shares in turn: with all programs loaded at once it would have too many memory mappings.

    Args:
      keep: Is handed the outcomes so far whenever there are more, so that a run that is cut short loses little.

    Raises: as `run`.
    """
    cases = list(dict.fromkeys(trial.case for trial in trials))
    # Several shares a process: they take differently long, and what is done is told early.
    num_shares = _SHARES_OF_A_PROCESS * num_processes
    shares = [[trial for trial in trials if trial.case in cases[i::num_shares]] for i in range(num_shares)]
    shares = [share for share in shares if share]
    outcomes: dict[Trial, Outcome] = {}
    if num_processes == 1:
        for share in shares:
            outcomes |= dict(zip(share, run(family, share, progress=progress), strict=True))
            keep(list(outcomes.values()))
        return [outcomes[trial] for trial in trials]
    # Not forked: a child of a process that runs JAX's threads would hang.
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(_run_by_name, family.name, share): share for share in shares}
        for future in as_completed(running):
            done = dict(zip(running[future], future.result(), strict=True))
            outcomes |= done
            keep(list(outcomes.values()))
            for outcome in done.values():
                progress(f"[{len(outcomes)}/{len(trials)}] {outcome}")
    return [outcomes[trial] for trial in trials]


def share_device() -> None:
    """Lets several processes use one GPU: this one and its children take memory as they need it, where JAX would take
    most of it at once, and choose no matmuls by measuring, which on a busy GPU takes long and tells nothing."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()


def default_num_processes() -> int:
    """One on a CPU, whose cores compiling takes anyway; on a GPU as many as make sense."""
    return 1 if jax.default_backend() == "cpu" else max(1, min(6, (os.cpu_count() or 1) // 2))


def _run_by_name(family: str, trials: Sequence[Trial]) -> list[Outcome]:
    return run(FAMILIES[family], trials)


class _Attempt:
    """One trial in the first of some ways to call the ops that the implementation does not refuse."""

    def __init__(self, family: Family, trial: Trial, ways: tuple[str, ...]):
        self.family, self.trial, self.ways = family, trial, ways
        self.way: str | None = None
        self.taken: set[tuple[str, str]] = set()
        self.refused: dict[str, str] = {}

    def lower(self) -> jax.stages.Lowered:
        """Raises: NotImplementedError where all ways are refused."""
        inputs = self.trial.case.inputs(self.trial.dtype)
        for way in self.ways:
            program = jax.jit(self.family.ways[way].function(self.trial.case, self.trial.implementation))
            with dispatch.record() as taken:
                try:
                    lowered = program.lower(inputs)
                except NotImplementedError as refusal:
                    self.refused[way] = str(refusal)
                    continue
            self.way, self.taken = way, set(taken)
            return lowered
        raise NotImplementedError("; ".join(self.refused.values()))

    def judge(self, program: jax.stages.Compiled | Exception, truth: Callable[..., dict], outcome: Outcome) -> None:
        """Runs the program, and adds to the outcome what comes of it."""
        outcome.refused.update(self.refused)
        if isinstance(program, NotImplementedError) or self.way in outcome.errors:
            return
        program = _compiled(program)
        way = self.family.ways[self.way]
        dtype = self.trial.dtype
        wanted_ops = {(op, self.trial.implementation) for op in way.ops}
        if not wanted_ops <= self.taken <= wanted_ops | way.left_to_others:
            outcome.problems.append(f"{self.way}: ran {sorted(self.taken)}, wanted {sorted(wanted_ops)}")
        want = truth(self.trial.case, dtype, way.absent)
        errors = outcome.errors[self.way] = {}
        for name, got in jax.device_get(program(self.trial.case.inputs(dtype))).items():
            precision = "float16" if dtype == "bfloat16" and name in self.family.precise else dtype
            try:
                errors[name] = relative_errors(name, got, want[name])
                factor = 3.0 if name in self.family.cancelling else 1.0
                assert_close(name, got, want[name], precision, factor=factor)
            except AssertionError as error:
                outcome.problems.append(f"{self.way}: {error}")


def _compiled(program: jax.stages.Compiled | Exception) -> jax.stages.Compiled:
    """Raises what compiling it raised."""
    if isinstance(program, Exception):
        raise program
    return program


def _lower_truth(family: Family, case) -> jax.stages.Lowered:
    return jax.jit(family.truth(case)).lower(_truth_inputs(case.inputs("float32"), frozenset()))


def _truth_inputs(inputs: dict, absent: frozenset[str]) -> dict:
    """The inputs in float32, zero where a way to call the ops leaves them out."""

    def in_float32(name: str, x: jax.Array) -> jax.Array:
        return jnp.zeros(x.shape) if name in absent else x.astype(jnp.float32)

    return {name: jax.tree.map(functools.partial(in_float32, name), x) for name, x in inputs.items()}


def _broken_promises(family: Family, trial: Trial, outcome: Outcome) -> Iterator[str]:
    """What was refused or served against what the family says that the implementation must serve."""
    name, serves = trial.implementation, family.serves[trial.implementation]
    promised = serves.ways if trial.case.name in serves.cases and trial.dtype in serves.dtypes else frozenset()
    for way, reason in outcome.refused.items():
        if way in promised:
            yield f"{way}: wanted it served, got a refusal: {reason}"
        if not reason.startswith(f"{name}: ") and f"there is no {name!r} implementation" not in reason:
            yield f"{way}: wanted a refusal that begins with {name!r}, got {reason!r}"
    for way in outcome.errors:
        if way not in promised:
            yield f"{way}: wanted a refusal, it is served; if rightly so, add it to what the family says {name} serves"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else '(no message)'}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A run, as its JSON file holds it.

    Attributes:
      machine: As `machine.describe` says it, of the last run.
      cases: The text and the digest of each case, by name.
    """

    family: str
    machine: dict
    cases: dict[str, dict[str, str]]
    outcomes: tuple[Outcome, ...]

    @classmethod
    def of(cls, family: Family, outcomes: Iterable[Outcome], *, commit: str | None = None) -> "Report":
        """The outcomes on the machine at hand."""
        outcomes = tuple(outcomes)
        names = {outcome.case for outcome in outcomes}
        cases = {
            case.name: {"digest": digest(case), "case": text_of(case)} for case in family.cases if case.name in names
        }
        return cls(family=family.name, machine=machine.describe(commit), cases=cases, outcomes=outcomes)

    def over(self, earlier: "Report", family: Family) -> "Report":
        """This report, with what an earlier one of the device holds of trials that this one has not, if their cases
        are still as they were."""
        mine = {(x.case, x.implementation, x.dtype) for x in self.outcomes}
        current = {case.name for case in family.cases if digest(case) == earlier.cases.get(case.name, {}).get("digest")}
        kept = tuple(
            dataclasses.replace(x, commit=x.commit or earlier.machine["commit"])
            for x in earlier.outcomes
            if (x.case, x.implementation, x.dtype) not in mine and x.case in current
        )
        cases = {x.case: earlier.cases[x.case] for x in kept}
        return dataclasses.replace(self, cases=cases | self.cases, outcomes=kept + self.outcomes)

    def write_json(self, path: Path) -> None:
        """Writes everything, a case and an outcome a line."""

        def rounded(errors: dict) -> dict:
            return {
                way: {name: [float(f"{x:.1e}") for x in pair] for name, pair in results.items()}
                for way, results in errors.items()
            }

        outcomes = [dataclasses.asdict(x) | {"errors": rounded(x.errors)} for x in self.outcomes]
        outcomes = [{name: value for name, value in x.items() if name != "commit" or value} for x in outcomes]
        cases = ",\n".join(f"  {json.dumps(name)}: {json.dumps(case)}" for name, case in self.cases.items())
        lines = [
            f'{{"family": {json.dumps(self.family)},',
            f' "machine": {json.dumps(self.machine)},',
            f' "cases": {{\n{cases}\n }},',
            ' "outcomes": [\n' + ",\n".join(f"  {json.dumps(x)}" for x in outcomes) + "\n ]}",
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")  # the file is whole whenever the run ends
        new.write_text("\n".join(lines) + "\n", encoding="utf-8")
        new.replace(path)

    @classmethod
    def read_json(cls, path: Path) -> "Report":
        """What `write_json` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**values | {"outcomes": tuple(Outcome(**outcome) for outcome in values["outcomes"])})

    def outcome_of(self, trial: Trial) -> Outcome | None:
        """The trial's outcome; None where it was not run, or the case was another then."""
        if self.cases.get(trial.case.name, {}).get("digest") != digest(trial.case):
            return None
        wanted = trial.case.name, trial.implementation, trial.dtype
        return next((x for x in self.outcomes if (x.case, x.implementation, x.dtype) == wanted), None)


def text_of(case) -> str:
    """All that a case is, the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(case))


def digest(case) -> str:
    """Changes with the case."""
    return hashlib.sha256(text_of(case).encode()).hexdigest()[:12]


def folder_of(family: Family) -> Path:
    """Where the family's JSON files are."""
    return Path(__file__).parent / family.name / "conformance"


def readme_of(family: Family) -> Path:
    """The file with the family's table."""
    return Path(__file__).parent / family.name / "README.md"


def reports_of(family: Family) -> list[Report]:
    """What the family's JSON files hold."""
    return [Report.read_json(path) for path in sorted(folder_of(family).glob("*.json"))]


def with_table(family: Family, text: str) -> str:
    """`text` with the runs and the table of cases and implementations between its markers."""
    runs, columns = [], []
    for report in reports_of(family):
        at = report.machine
        versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
        commits = dict.fromkeys(_short(outcome.commit or at["commit"]) for outcome in reversed(report.outcomes))
        runs.append(
            f"- {at['device']}: {len(report.cases)} cases, {at['date']}, commit{'s' * (len(commits) > 1)} "
            f"{', '.join(commits)}, {versions}"
        )
        trials = family.trials(at["platform"])
        for implementation in dict.fromkeys(trial.implementation for trial in trials):
            of_it = [trial for trial in trials if trial.implementation == implementation]
            if any(report.outcome_of(trial) for trial in of_it):
                columns.append((report, of_it))
    head = ["case", *(f"`{trials[0].implementation}`, {report.machine['device']}" for report, trials in columns)]
    rows = [[f"`{case.name}`", *(_cell(report, trials, case) for report, trials in columns)] for case in family.cases]
    return markdown.between_markers(text, "conformance", [*runs, "", markdown.table([head, *rows])])


def _short(commit: str) -> str:
    return commit[:12] + (" with changes" if commit.endswith("with changes") else "")


def _cell(report: Report, trials: Iterable[Trial], case) -> str:
    """The verdicts on a case, of which dtype only where they differ; nothing where it is not meant to run there."""
    verdicts: dict[str, list[str]] = {}
    for trial in trials:
        if trial.case == case:
            outcome = report.outcome_of(trial)
            verdicts.setdefault("not run" if outcome is None else outcome.verdict, []).append(trial.dtype)
    if len(verdicts) <= 1:
        return next(iter(verdicts), "")
    return "; ".join(f"{', '.join(dtypes)}: {verdict}" for verdict, dtypes in verdicts.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 2 where it is wrong, 1 where an outcome is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.conformance", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--family", choices=tuple(FAMILIES), help="default all")
    add("--implementations", metavar="NAMES", help="comma-separated; default all of the platform")
    add("--cases", metavar="REGEX", help="cases whose name it matches anywhere; default all")
    add("--processes", type=int, metavar="N", help="that share the work; default 1 on a CPU, up to 6 on a GPU")
    add("--json", action="store_true", help="put the outcomes into the family's folder, as this machine's")
    add("--commit", help="what is run, where git cannot say")
    add("--readme", action="store_true", help="run nothing, make the READMEs' tables of what was written")
    options = parser.parse_args(arguments)
    families = [FAMILIES[options.family]] if options.family else list(FAMILIES.values())
    if options.readme:
        for family in families:
            path = readme_of(family)
            markdown.rewrite(path, functools.partial(with_table, family))
        return 0
    share_device()
    num_processes = options.processes or default_num_processes()
    at = machine.describe(options.commit)  # asked once: the first file that is written is a change of the commit
    has_problem = False
    for family in families:
        trials = [
            trial
            for trial in family.trials(dispatch.current_platform())
            if re.search(options.cases or "", trial.case.name)
            and (options.implementations is None or trial.implementation in options.implementations.split(","))
        ]
        if not trials:
            print(f"{family.name}: no case by an implementation is chosen", file=sys.stderr)
            return 2
        path = folder_of(family) / f"{machine.slug(at['device'])}.json"
        earlier = Report.read_json(path) if options.json and path.exists() else None

        def write(outcomes, family=family, path=path, earlier=earlier):
            report = Report.of(family, outcomes, commit=at["commit"])
            (report.over(earlier, family) if earlier else report).write_json(path)

        keep = write if options.json else lambda outcomes: None
        outcomes = run_in_processes(family, trials, num_processes, progress=_say, keep=keep)
        for outcome in outcomes:
            if num_processes == 1 or outcome.problems:
                _say(str(outcome))
            has_problem |= bool(outcome.problems)
        if options.json:
            _say(str(path))
    return int(has_problem)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""python -m benchmarks.learning: trains models that differ in their mixers alone on a task, and tells what they learn.

A model stops once it answers (`--stop-at`), after `--seconds` of training, or after the config's steps.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from benchmarks.learning_cases import BASELINE, TASKS, Task, mixer_overrides, task_config, with_mixers, with_seq_len
from benchmarks.learning_report import Comparison, Learned, Point, write
from benchmarks.measure import time_calls
from benchmarks.report import free_stem
from benchmarks.results import problem_of
from pallas_kernels import dispatch
from pallas_kernels.compiling import compile_all
from pallas_kernels.machine import describe, slug
from train.assemble import Parts, assemble, batch_placement
from train.config import TrainConfig
from train.data import Data, open_data
from train.evaluation import EvalSums, evaluate, make_eval_step
from train.loop import MAX_STEPS_IN_FLIGHT
from train.placement import BatchPlacement
from train.planning.auto import start
from train.schema import to_dict
from train.state import TrainState, create_state
from train.step import NonFiniteError

TIMING_SECONDS = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 2 where it is wrong, 1 where a model failed or the comparison is
    void."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        comparison = compare(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return int(comparison.void is not None or any(model.problem is not None for model in comparison.models))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    add = parser.add_argument
    add("--task", choices=TASKS, required=True, help="what is learned")
    add("--mixers", metavar="NAMES", default=BASELINE, help="kinds or names of learning_cases.MIXERS; a+b: in turn")
    add("--config", metavar="FILE", help="of the baseline's run, instead of the task's")
    add("--length", metavar="T", type=int, help="tokens of a row in training; default the config's")
    add("--lengths", metavar="T,T", help="evaluated after training too; default some beside that of training")
    add("--seconds", type=float, default=60.0, help="of training, for each model; compilation and evaluation beside it")
    add(
        "--stop-at", metavar="SHARE", type=float, default=0.99, help="of the answers right ends the training of a model"
    )
    add("--out", metavar="DIR", type=Path, default=Path("benchmarks/results"), help="where results go")
    add("--commit", help="what was measured, where git cannot say")
    add("overrides", metavar="a.b=c", nargs="*", help="config keys that differ; mixers.NAME.key=value of one mixer")
    return parser


def compare(options: argparse.Namespace) -> Comparison:
    """Trains the models in turn and writes what is known after each.

    Raises: ValueError where the command line or the config is wrong.
    """
    if not options.seconds > 0:
        raise ValueError(f"--seconds: got {options.seconds}, wanted more than 0")
    task = TASKS[options.task]
    of_mixers, overrides = mixer_overrides(options.overrides)
    base = task_config(task, config=options.config, seq_len=options.length, overrides=overrides)
    specs = tuple(dict.fromkeys(options.mixers.split(",")))
    unused = set(of_mixers) - {name for spec in specs for name in spec.split("+")}
    if unused:
        raise ValueError(
            f"mixers.{min(unused)}: got a setting of a mixer that is not compared, wanted one of --mixers "
            f"{options.mixers}; leave it out"
        )
    base, mesh, choices = start(base)
    for note in choices:
        _say(note)
    configs = {spec: with_mixers(base, spec, of_mixers) for spec in specs}
    lengths = [base.data.seq_len, *evaluated_lengths(options.lengths, base.data.seq_len, task)]
    comparison = _nothing_yet(options, base)
    stem = f"{comparison.machine['date']}_{slug(comparison.machine['device'])}_learning_{options.task}"
    stem = options.out / free_stem(stem, options.out)
    with jax.set_mesh(mesh):
        bench = Bench(base, mesh, lengths)
        for spec, programs in bench.compile(configs).items():
            if isinstance(programs, Exception):
                learned = Learned(mixers=spec, problem=problem_of(programs))
            else:
                learned = bench.learn(spec, configs[spec], programs, seconds=options.seconds, stop_at=options.stop_at)
            _say(f"{spec}: {learned.problem or _scores_text(learned)}")
            comparison.models.append(learned)
            paths = write(comparison, stem)
    _say("valid" if comparison.void is None else f"VOID: {comparison.void}")
    for path in paths:
        _say(str(path))
    return comparison


def _nothing_yet(options: argparse.Namespace, base: TrainConfig) -> Comparison:
    task = TASKS[options.task]
    return Comparison(
        task=options.task,
        machine=describe(options.commit),
        settings={
            "config": options.config or task.config,
            "rows a step": base.training.batch_size,
            "learning rate": base.optimizer.learning_rate,
            "seconds of training at most": options.seconds,
            "stopped at": options.stop_at,
            "overrides": " ".join(options.overrides) or "none",
        },
        config=to_dict(base),
        seq_len=base.data.seq_len,
        bar=task.bar,
    )


def evaluated_lengths(text: str | None, seq_len: int, task: Task) -> list[int]:
    """The lengths beside that of training, ascending; None means the task's.

    Raises: ValueError where the text is no list of numbers.
    """
    if text is None:
        return sorted(int(factor * seq_len) for factor in task.others)
    try:
        return sorted({int(length) for length in text.split(",") if length} - {seq_len})
    except ValueError:
        raise ValueError(f"--lengths: got {text!r}, wanted numbers of tokens, such as 1024,4096") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """What a model's training and evaluations run."""

    parts: Parts
    train_step: jax.stages.Compiled
    eval_steps: Mapping[int, jax.stages.Compiled]
    kernels: tuple[str, ...]


class Bench:
    """The rows that all models are trained and evaluated on.

    Args:
      base: The baseline's run.
      mesh: In scope.
      lengths: Tokens of the rows to evaluate on; the first is that of training.
    """

    def __init__(self, base: TrainConfig, mesh: Mesh, lengths: Sequence[int]):
        self._mesh = mesh
        self._batch_size, self._seq_len = base.training.batch_size, base.data.seq_len
        self.data = open_data(base.data, seed=base.seed)
        self._placement = batch_placement(base, mesh, batch_size=self._batch_size)
        self._held_out = {length: _HeldOut(base, mesh, length) for length in lengths}

    def compile(self, configs: Mapping[str, TrainConfig]) -> dict[str, Programs | Exception]:
        """The programs of each model, compiled side by side; of a model of which one fails, what it raised."""
        parts = {
            spec: assemble(config, self._mesh, vocab_size=self.data.tokenizer.vocab_size)
            for spec, config in configs.items()
        }
        batch = self._first_batch()
        taken: dict[str, tuple[str, ...]] = {}

        def train_step(spec):
            with dispatch.record() as calls:
                lowered = parts[spec].train_step.lower(parts[spec].abstract, batch, None)
            taken[spec] = tuple(dict.fromkeys(f"{op} {implementation}" for op, implementation in calls))
            return lowered

        def eval_step(spec, held_out):
            step = make_eval_step(parts[spec].graphdef, num_answer_groups=len(held_out.data.answer_groups))
            return step.lower(parts[spec].abstract.params, held_out.first_batch())

        wanted: dict[tuple[str, int | None], Callable[[], jax.stages.Lowered]] = {}
        for spec in configs:
            wanted[spec, None] = lambda spec=spec: train_step(spec)
            for length, held_out in self._held_out.items():
                wanted[spec, length] = lambda spec=spec, held_out=held_out: eval_step(spec, held_out)
        _say(f"compiling {len(wanted)} programs")
        start = time.perf_counter()
        compiled = compile_all(wanted, progress=_say)
        _say(f"compiled in {time.perf_counter() - start:.0f} s")

        def programs(spec):
            own = {length: program for (of, length), program in compiled.items() if of == spec}
            failed = [program for program in own.values() if isinstance(program, Exception)]
            if failed:
                return failed[0]
            return Programs(parts=parts[spec], train_step=own.pop(None), eval_steps=own, kernels=taken[spec])

        return {spec: programs(spec) for spec in configs}

    def _first_batch(self) -> dict[str, jax.Array]:
        with closing(self.data.batches(start_step=0, batch_size=self._batch_size)) as batches:
            return self._placement.place(next(batches))

    def learn(self, spec: str, config: TrainConfig, programs: Programs, *, seconds: float, stop_at: float) -> Learned:
        """Trains a model from its start, and evaluates it at every length."""
        learned = Learned(
            mixers=spec,
            num_parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(programs.parts.abstract.params)),
            kernels=programs.kernels,
        )
        try:
            state = self._train(learned, config, programs, seconds=seconds, stop_at=stop_at)
            learned.scores = {
                length: self._held_out[length].evaluate(program, state.params)
                for length, program in programs.eval_steps.items()
            }
            self._time(learned, programs, state)
        except (NonFiniteError, jax.errors.JaxRuntimeError) as error:  # the others can go on
            learned.problem = problem_of(error)
        return learned

    def _train(
        self, learned: Learned, config: TrainConfig, programs: Programs, *, seconds: float, stop_at: float
    ) -> TrainState:
        """Trains until it answers, the time is over or the steps are done; keeps the curve.

        Raises: NonFiniteError.
        """
        state = create_state(
            programs.parts.build,
            programs.parts.optimizer,
            self._mesh,
            seed=config.seed,
            offload_optimizer=config.optimizer.offload,
        )
        step, spent, last = 0, 0.0, config.training.steps
        with closing(self.data.batches(start_step=0, batch_size=self._batch_size)) as batches:
            while step < last and spent < seconds:
                start = time.perf_counter()
                in_flight: deque[jax.Array] = deque()
                stop = min(last, step + (config.evaluation.every or last))
                while step < stop and spent + time.perf_counter() - start < seconds:
                    if len(in_flight) == MAX_STEPS_IN_FLIGHT:
                        in_flight.popleft().block_until_ready()
                    state, metrics = programs.train_step(state, self._placement.place(next(batches)), None)
                    in_flight.append(metrics["finite"])
                    step += 1
                jax.block_until_ready(metrics)
                spent += time.perf_counter() - start
                if int(state.skipped_steps):
                    raise NonFiniteError(f"a loss or a gradient before step {step} is not finite")
                values = self._held_out[self._seq_len].evaluate(programs.eval_steps[self._seq_len], state.params)
                learned.curve.append(
                    Point(step=step, seconds=spent, loss=values["eval/loss"], exact_match=values["eval/exact_match"])
                )
                _say(
                    f"  {learned.mixers}: step {step}, {spent:.0f} s, loss {values['eval/loss']:.3f}, {_right(values)}"
                )
                if values["eval/exact_match"] >= stop_at:
                    break
        return state

    def _time(self, learned: Learned, programs: Programs, state: TrainState) -> None:
        """Times the step alone, without input; the state is lost."""
        batch = self._first_batch()

        def step():
            nonlocal state
            state, metrics = programs.train_step(state, batch, None)
            return metrics

        timing = time_calls(step, max_calls=MAX_STEPS_IN_FLIGHT, max_seconds=TIMING_SECONDS)
        learned.step_ms = (1e3 * timing.median, 1e3 * timing.low, 1e3 * timing.high)
        learned.tokens_per_second = self._batch_size * self._seq_len / timing.median


class _HeldOut:
    """The held-out rows at one length, in batches of about as many tokens as those of training."""

    def __init__(self, base: TrainConfig, mesh: Mesh, seq_len: int):
        config = with_seq_len(base, seq_len, held_out_only=True)
        row_devices = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch_size = row_devices * max(1, base.training.batch_size * base.data.seq_len // seq_len // row_devices)
        self._placement: BatchPlacement = batch_placement(config, mesh, batch_size=self._batch_size)
        self.data: Data = open_data(config.data, seed=config.seed)
        if not self.data.answer_groups:
            raise ValueError(
                "data.held_out_sources: got none that is a task, wanted one whose answers can be right or wrong, such "
                "as passkey or mqar"
            )

    def first_batch(self) -> dict[str, jax.Array]:
        return self._placement.place(next(iter(self.data.held_out_batches(batch_size=self._batch_size))))

    def evaluate(self, eval_step: Callable[..., EvalSums], params: Any) -> dict[str, float]:
        batches = self.data.held_out_batches(batch_size=self._batch_size)
        return evaluate(eval_step, params, batches, self._placement, answer_groups=self.data.answer_groups)


def _right(values: Mapping[str, float]) -> str:
    return f"{values['eval/exact_match']:.1%} of answers right"


def _scores_text(learned: Learned) -> str:
    at_lengths = ", ".join(f"{_right(values)} at {length:,}" for length, values in sorted(learned.scores.items()))
    return f"{at_lengths}; {learned.step_ms[0]:.1f} ms a step"


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""python -m longctx.context_parallel.matrix: every feature of attention, by every strategy, layout and degree.

Each case that its strategy serves is run on virtual CPU devices at a tiny size: out and the gradients of q, k, v and
the sinks, compared with the float32 reference on one device. What is refused is recorded with its sentence. It prints a
line a case, writes a dated JSON file with --json, and fails if any case does. `cover` is the part that the tests run.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx import masks
from longctx.context_parallel.api import sharded_attention
from longctx.context_parallel.config import STRATEGIES, AttentionSharding
from longctx.context_parallel.layout import Layout, permute, unpermute
from longctx.sharding import MeshConfig, make_mesh
from pallas_kernels import BlockSizes, Dropout, Mask, Tokens, blockwise_attention, machine
from pallas_kernels.compiling import compile_all
from pallas_kernels.testing import TOLERANCE, packed_tokens, relative_errors

ANYWHERE = tuple(name for name, strategy in STRATEGIES.items() if strategy.platform is None)
"""The strategies that devices of any kind can run."""
LAYOUTS = ("contiguous", "zigzag", "striped")
DEGREES = (2, 4, 8)
_INNER = 2  # devices of a group, for strategies of two levels; to the others all devices are alike
_LENGTH, _HEAD_DIM = 64, 8
_AT_ONCE = 12  # programs that are compiled side by side, before any of them is run
_DOCUMENTS = masks.documents()
_NAMES = ("out", "dq", "dk", "dv", "dsinks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Attention over a whole sequence; hashable.

    Attributes:
      masks: In order of preference: a strategy is asked for the first that it does not refuse.
      rows: Lengths of the documents of each row; what they do not fill is padding, which sees nothing.
      q_len: Queries, the first of the tokens; the keys are all of them.
      dropout_rate, logits_soft_cap: None is none.
      sinks: Whether heads have learned sinks.
      max_document_length: What the sharding promises of the documents.
    """

    masks: tuple[Mask, ...] = (
        masks.causal() & _DOCUMENTS,
        masks.sliding_window(left=20) & _DOCUMENTS,
        masks.sliding_window(left=4) & _DOCUMENTS,
    )
    rows: tuple[tuple[int, ...], ...] = ((_LENGTH,), (_LENGTH,))
    q_len: int = _LENGTH
    num_heads: int = 8
    num_kv_heads: int = 8
    logits_soft_cap: float | None = None
    sinks: bool = False
    dropout_rate: float | None = None
    max_document_length: int | None = None

    def tokens(self) -> Tokens:
        """In the order of the sequence."""
        tokens = packed_tokens(self.rows, _LENGTH)
        return dataclasses.replace(
            tokens,
            q_positions=tokens.q_positions[:, : self.q_len],
            q_segment_ids=tokens.q_segment_ids[:, : self.q_len],
        )

    def inputs(self) -> tuple[np.ndarray, ...]:
        """q, k, v, the cotangent of out, and the sinks, in the order of the sequence."""
        rng = np.random.default_rng(0)
        heads_and_lengths = [(self.num_heads, self.q_len), *[(self.num_kv_heads, _LENGTH)] * 2]
        heads_and_lengths.append(heads_and_lengths[0])
        arrays = [rng.standard_normal((len(self.rows), length, n, _HEAD_DIM)) for n, length in heads_and_lengths]
        return tuple(x.astype(np.float32) for x in (*arrays, rng.standard_normal(self.num_heads)))

    def with_gradients(self, attend: Callable, mask: Mask) -> Callable:
        """A function of q, k, v, dout, sinks and tokens that returns out and every gradient."""
        options: dict[str, Any] = {"mask": mask, "logits_soft_cap": self.logits_soft_cap}
        if self.dropout_rate is not None:
            key = jax.random.key(1)
            shape = dict(batch_size=len(self.rows), num_heads=self.num_heads)
            options["dropout"] = Dropout.of_key(self.dropout_rate, key, **shape)

        def run(q, k, v, dout, sinks, tokens):
            def call(q, k, v, sinks):
                return attend(q, k, v, tokens=tokens, sinks=sinks if self.sinks else None, **options)

            out, vjp = jax.vjp(call, q, k, v, sinks)
            return out, *vjp(dout)

        return run


FEATURES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "tokens": {
        "documents": dict(rows=((20, 1, 30, 13), (9, 40, 15))),
        "bounded_documents": dict(
            rows=((8, 1, 7) * 4, (3, 8) * 5 + (8,)), max_document_length=8, masks=(masks.causal() & _DOCUMENTS,)
        ),
        # Whatever the layout, all devices but one hold nothing but padding of the first row.
        "fully_masked_shards": dict(rows=((1,), (10, 3))),
        "cross_attention": dict(q_len=_LENGTH // 2, masks=(_DOCUMENTS,)),
    },
    "heads": {"grouped_heads": dict(num_kv_heads=2), "multi_query": dict(num_kv_heads=1)},
    "logits": {"soft_cap": dict(logits_soft_cap=2.0)},
    "sinks": {"learned_sinks": dict(sinks=True)},
    "dropout": {"dropout": dict(dropout_rate=0.3)},
    "mask": {
        "causal": dict(masks=(masks.causal() & _DOCUMENTS,)),
        "bidirectional": dict(masks=(_DOCUMENTS,)),
        "window": dict(masks=(masks.sliding_window(left=20) & _DOCUMENTS, masks.sliding_window(left=4) & _DOCUMENTS)),
        "window_both_ways": dict(masks=(masks.sliding_window(left=4, right=3) & _DOCUMENTS,)),
        "prefix": dict(masks=((masks.causal() | masks.prefix(13)) & _DOCUMENTS,)),
        "global_tokens": dict(masks=((masks.global_tokens(4) | masks.sliding_window(left=9, right=9)) & _DOCUMENTS,)),
    },
}
"""What a feature changes of a Problem, by factor: those of different factors go together, and the mask's come last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Features, at most one of a factor, in a strategy, a layout and a degree."""

    features: tuple[str, ...]
    strategy: str
    layout: str
    degree: int

    def __str__(self) -> str:
        return f"{'+'.join(self.features)}-{self.strategy}-{self.layout}-{self.degree}"

    @property
    def problem(self) -> Problem:
        return _problem(self.features)

    @property
    def sharding(self) -> AttentionSharding:
        problem, layout = self.problem, Layout(name=self.layout)
        return AttentionSharding(strategy=self.strategy, layout=layout, max_document_length=problem.max_document_length)

    def mask_or_refusal(self) -> Mask | str:
        """The mask that the strategy is asked for, or the sentence in which it refuses the last of them."""
        problem, reason = self.problem, None
        for mask in problem.masks:
            setting = self.sharding.setting(
                mask,
                degree=self.degree,
                inner_degree=_INNER,
                q_len=problem.q_len,
                kv_len=_LENGTH,
                num_heads=problem.num_heads,
                num_kv_heads=problem.num_kv_heads,
            )
            reason = STRATEGIES[self.strategy].refusal(setting)
            if reason is None:
                return mask
        return reason

    @property
    def is_served(self) -> bool:
        return not isinstance(self.mask_or_refusal(), str)

    def pairs(self) -> frozenset[tuple]:
        """What `cover` covers: feature with strategy, feature with degree, strategy with layout."""
        of_features = itertools.product(self.features, (self.strategy, self.degree))
        return frozenset((*of_features, (self.strategy, self.layout)))


@functools.cache
def _problem(features: tuple[str, ...]) -> Problem:
    changes: dict[str, Any] = {}
    for of_factor in FEATURES.values():
        for name in features:
            changes |= of_factor.get(name, {})
    return Problem(**changes)


def every_case() -> list[Case]:
    """Each feature alone in each strategy, layout and degree, refused ones too."""
    features = [name for of_factor in FEATURES.values() for name in of_factor]
    cases = itertools.product(features, ANYWHERE, LAYOUTS, DEGREES)
    return [Case(features=(name,), strategy=s, layout=layout, degree=p) for name, s, layout, p in cases]


@functools.cache
def cover() -> tuple[Case, ...]:
    """Few cases of several features each, which hold every pair (`Case.pairs`) that some case alone is served in.

    Greedy: of all strategies, layouts and degrees that which, with the most that can be asked of it at once, holds most
    of the pairs that are left.
    """
    left = set().union(*(case.pairs() for case in every_case() if case.is_served))
    chosen = []
    while left:
        fullest = [_fullest(*where, left) for where in itertools.product(ANYWHERE, LAYOUTS, DEGREES)]
        best = max((case for case in fullest if case is not None), key=lambda case: len(case.pairs() & left))
        chosen.append(best)
        left -= best.pairs()
    return tuple(chosen)


def _fullest(strategy: str, layout: str, degree: int, left: set[tuple]) -> Case | None:
    """The case there that takes, factor by factor, the feature with most of the pairs left; None if none is served."""

    def of(*features):
        return Case(features=features, strategy=strategy, layout=layout, degree=degree)

    features: tuple[str, ...] = ()
    for of_factor in reversed(FEATURES.values()):  # the mask first, which most is refused for
        held = len(of(*features).pairs() & left)
        cases = [of(*features, name) for name in of_factor]
        cases = [case for case in cases if len(case.pairs() & left) > held and case.is_served]
        if cases:
            features = max(cases, key=lambda case: len(case.pairs() & left)).features
    return of(*features) if features else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a case.

    Attributes:
      verdict: `ok`, `refused` or `FAILED`.
      mask: That which was asked for; None where it was refused.
      errors: The root mean square of each result's error, over that of the reference.
      reason: The sentence of the refusal, or what is wrong.
    """

    case: str
    verdict: str
    mask: str | None = None
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reason: str | None = None

    def __str__(self) -> str:
        errors = f", greatest rms error {max(self.errors.values()):.1e}" if self.errors else ""
        return f"{self.case}: {self.verdict}{errors}{f' ({self.reason})' if self.reason else ''}"


def run(cases: Iterable[Case]) -> Iterator[Outcome]:
    """The outcome of each case, in order; their programs are compiled side by side, a few at a time.

    Needs as many devices as the greatest degree.
    """
    for group in itertools.batched(cases, _AT_ONCE):
        compiled = compile_all(
            {case: functools.partial(_lower, case, case.mask_or_refusal()) for case in group if case.is_served},
            progress=lambda text: None,
        )
        for case in group:
            found = case.mask_or_refusal()
            if isinstance(found, str):
                yield Outcome(case=str(case), verdict="refused", reason=found)
                continue
            errors, problem = {}, None
            try:
                errors = _errors(case, compiled[case])
            except Exception as error:  # whatever it is, the other cases go on
                problem = (str(error).strip() or type(error).__name__).splitlines()[0]
            verdict = "ok" if problem is None else "FAILED"
            yield Outcome(case=str(case), verdict=verdict, mask=str(found), errors=errors, reason=problem)


def _lower(case: Case, mask: Mask) -> jax.stages.Lowered:
    with jax.set_mesh(_mesh(case.degree)):
        attend = functools.partial(
            sharded_attention, sharding=case.sharding, block_sizes=BlockSizes(block_q=8, block_kv=8)
        )
        run = case.problem.with_gradients(attend, mask)
        return jax.jit(run).lower(*_in_layout(case))


@functools.cache
def _mesh(degree: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(context_outer=degree // _INNER, context_inner=_INNER), jax.devices()[:degree])


def _orders(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Of the queries and of the keys."""
    layout = case.sharding.layout
    return layout.order(case.problem.q_len, case.degree), layout.order(_LENGTH, case.degree)


def _in_layout(case: Case) -> tuple:
    """q, k, v, dout, sinks and tokens in the order of the layout."""
    of_queries, of_keys = _orders(case)
    *arrays, sinks = case.problem.inputs()
    arrays = [permute(x, order) for x, order in zip(arrays, (of_queries, of_keys, of_keys, of_queries), strict=True)]
    tokens = case.problem.tokens()
    tokens = Tokens(
        q_positions=permute(tokens.q_positions, of_queries),
        q_segment_ids=permute(tokens.q_segment_ids, of_queries),
        kv_positions=permute(tokens.kv_positions, of_keys),
        kv_segment_ids=permute(tokens.kv_segment_ids, of_keys),
    )
    return jax.tree.map(jnp.asarray, (*arrays, sinks, tokens))


@functools.cache
def _reference(problem: Problem, mask: Mask) -> tuple[np.ndarray, ...]:
    attend = functools.partial(blockwise_attention, implementation="reference")
    arguments = jax.tree.map(jnp.asarray, (*problem.inputs(), problem.tokens()))
    return jax.device_get(jax.jit(problem.with_gradients(attend, mask))(*arguments))


@functools.cache
def _sees_nothing(problem: Problem, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """Which queries may attend to no key, and which keys no query may attend to: bool `[B, T]`, `[B, S]`."""
    tokens = jax.tree.map(jnp.asarray, problem.tokens())
    allowed = np.asarray(mask.dense(tokens, q_len=problem.q_len, kv_len=_LENGTH))
    return ~allowed.any(axis=-1), ~allowed.any(axis=-2)


def _errors(case: Case, program: jax.stages.Compiled | Exception) -> dict[str, float]:
    """Of each result.

    Raises: AssertionError where one is too large; whatever compiling raised.
    """
    if isinstance(program, Exception):
        raise program
    problem, mask = case.problem, case.mask_or_refusal()
    of_queries, of_keys = _orders(case)
    with jax.set_mesh(_mesh(case.degree)):
        # Blocked on: XLA's CPU runtime aborts when many steps with collectives are in flight.
        got = jax.device_get(jax.block_until_ready(program(*_in_layout(case))))
    want = _reference(problem, mask)
    of_tokens = [unpermute(x, order) for x, order in zip(got, (of_queries, of_queries, of_keys, of_keys), strict=False)]
    lonely_queries, lonely_keys = _sees_nothing(problem, mask)
    nothing = (lonely_queries, lonely_queries, lonely_keys, lonely_keys)
    for name, x, lonely in zip(_NAMES, of_tokens, nothing, strict=False):
        if x[lonely].any() or np.isnan(x[lonely]).any():
            raise AssertionError(f"{name}: not 0 where a token sees nothing")
    results = [*of_tokens, *(got[4:] if problem.sinks else ())]
    rms_tolerance, max_tolerance = TOLERANCE["float32"]
    errors = {}
    for name, x, y in zip(_NAMES, results, want, strict=False):
        errors[name], greatest = relative_errors(name, x, y)
        if errors[name] > rms_tolerance or greatest > max_tolerance:
            raise AssertionError(
                f"{name}: rms error {errors[name]:.2g}, max error {greatest:.2g}, wanted <= {rms_tolerance} and "
                f"{max_tolerance}"
            )
    return errors


def report(outcomes: Sequence[Outcome], *, selected: str | None, commit: str | None = None) -> str:
    """The outcomes as JSON, one a line, with what they were run on.

    Args:
      selected: The expression that chose the cases; None where all were run.
      commit: As for `machine.describe`.
    """
    counts = {verdict: sum(x.verdict == verdict for x in outcomes) for verdict in ("ok", "refused", "FAILED")}
    lines = []
    for outcome in outcomes:
        fields = {name: value for name, value in dataclasses.asdict(outcome).items() if value}
        if outcome.errors:
            fields["errors"] = {name: float(f"{x:.2g}") for name, x in outcome.errors.items()}
        lines.append(f"  {json.dumps(fields)}")
    head = {"machine": machine.describe(commit), "selected": selected, "num_cases": len(every_case()), "counts": counts}
    parts = [f'"{name}": {json.dumps(value)}' for name, value in head.items()]
    return "{" + ",\n ".join(parts) + ',\n "outcomes": [\n' + ",\n".join(lines) + "\n ]}\n"


def main() -> None:
    """Runs what the command line says; exits with 1 if any case fails."""
    parser = argparse.ArgumentParser(prog="python -m longctx.context_parallel.matrix", description=__doc__)
    add = parser.add_argument
    add("selected", nargs="?", help="a regular expression; only cases whose name it is found in are run")
    add("--json", metavar="FILE", type=Path, help="write the outcomes, with date, commit and machine")
    add("--devices", type=int, default=max(DEGREES), help="virtual CPU devices; a case of more is left out")
    add("--commit", help="what is run, where git cannot say")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    jax.config.update("jax_disable_most_optimizations", True)  # programs run for milliseconds
    cases = [case for case in every_case() if re.search(options.selected or "", str(case))]
    cases = [case for case in cases if case.degree <= options.devices]
    if not cases:
        parser.error(f"selected: no case's name has {options.selected!r} in it; {every_case()[0]} is one")
    outcomes = []
    for outcome in run(cases):
        outcomes.append(outcome)
        print(f"[{len(outcomes)}/{len(cases)}] {outcome}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = report(outcomes, selected=options.selected, commit=options.commit)
        options.json.write_text(text, encoding="utf-8")
    sys.exit(any(outcome.verdict == "FAILED" for outcome in outcomes))


if __name__ == "__main__":
    main()

"""Measures blockwise attention: every implementation of the family and every peer, on the cases of cases.py."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp

from benchmarks.cases import PASSES, AttentionCase, Case, Pass
from benchmarks.check import Check
from benchmarks.measure import Ceiling
from benchmarks.peers import Candidate, Peer
from benchmarks.results import Row
from benchmarks.side_by_side import measure_side_by_side, peer_candidates
from pallas_kernels import (
    SoftmaxCarry,
    blockwise_attention,
    blockwise_attention_backward,
    blockwise_attention_forward,
    make_schedule,
)
from pallas_kernels.blockwise import api

type AnyCandidate = Candidate | BackwardCandidate

OURS = tuple(name for name in api.FORWARD if name != "reference")
# Whether gradients must come out the same each time, as each implementation is asked; others are asked both ways.
DETERMINISTIC: Mapping[str, tuple[bool, ...]] = {"xla": (True,), "cudnn": (False,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardCandidate:
    """One way to compute the backward pass of a case alone, from the results of its forward pass.

    Attributes:
      name, ours, deterministic: As `Candidate`.
      differentiate: (q, k, v, out, lse, dout, running) -> (dq, dk, dv).
      accumulates: Whether it adds into running gradients, float32 and donated, as in the loop of a ring; else they are
        None.
    """

    name: str
    ours: bool
    deterministic: bool
    differentiate: Callable
    accumulates: bool

    @property
    def passes(self) -> tuple[Pass, ...]:
        return ("backward",)

    def running(self, case: Case, *, seed: int = 1) -> tuple[jax.Array, ...] | None:
        """Running dq, dk and dv: drawn at random, so that what forgets or misplaces them is wrong."""
        if not self.accumulates:
            return None
        *shapes, _ = case.shapes("float32")
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        return tuple(jax.random.normal(key, x.shape) for key, x in zip(keys, shapes, strict=True))


def measure_blockwise(
    cases: Sequence[AttentionCase],
    *,
    peers: Mapping[str, Peer],
    ceiling: Ceiling,
    implementations: Sequence[str] = OURS,
    passes: Sequence[Pass] = PASSES,
    dtype: str = "bfloat16",
    repetitions: int = 20,
    progress: Callable[[str], None] = print,
    candidates_of: Callable[[AttentionCase], Iterable[AnyCandidate | Row]] | None = None,
) -> list[Row]:
    """Compiles every program, then for each case checks and times its implementations one by one.

    Args:
      ceiling: What a large matmul reaches here.
      candidates_of: The ways to compute a case, or rows that say why there is none; default this project's
        implementations and the peers.
    Returns: a row for each case, pass and implementation; what does not fit the float32 formula is not timed. After
      Ctrl-C, the rows until then.
    """
    if candidates_of is None:
        candidates_of = functools.partial(all_candidates, implementations=implementations, peers=peers)
    family = Blockwise(candidates=candidates_of, ceiling=ceiling, dtype=dtype)
    return measure_side_by_side(family, cases, passes=passes, repetitions=repetitions, progress=progress)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blockwise:
    """The `Family` of side_by_side."""

    candidates: Callable[[AttentionCase], Iterable[AnyCandidate | Row]]
    ceiling: Ceiling
    dtype: str

    def lower(self, candidate: AnyCandidate, case: AttentionCase, which: Pass) -> jax.stages.Lowered:
        return _lower(candidate, case, which, self.dtype)

    def checks(self, case: AttentionCase) -> Mapping[Pass, Callable]:
        return {}  # one small program, the same for every pass

    def start(self, case: AttentionCase, checks: Mapping) -> Callable:
        q, k, v, dout = case.inputs(self.dtype)
        check = Check.of(case, q, k, v, dout)

        def run(candidate: AnyCandidate, which: Pass, program: jax.stages.Compiled) -> tuple[str | None, Callable]:
            if isinstance(candidate, BackwardCandidate):
                results, call = _backward_run(candidate, case, program, q, k, v, dout, check)
            else:
                results, call = _run(candidate, program, q, k, v, dout, check)
            return check.problem(results), call

        return run

    def figures(self, case: AttentionCase, which: Pass, seconds: float) -> dict:
        flops_per_second = case.flops(which) / seconds
        return {"tflops": flops_per_second / 1e12, "ceiling_share": flops_per_second / self.ceiling.flops}


def all_candidates(
    case: Case, *, implementations: Sequence[str], peers: Mapping[str, Peer]
) -> Iterator[AnyCandidate | Row]:
    """This project's implementations and the peers' for a case; a row for a peer that does not serve it."""
    for name in implementations:
        yield from our_candidates(case, name)
        if case.hop:
            yield hop_candidate(case, name)
            yield from hop_backward_candidates(case, name)
    if not (case.constants or case.learned):
        yield from peer_candidates(case, peers)
    else:
        problem = "peers are not called with options"
        yield from (
            Row(case=case.name, which="both passes", implementation=name, ours=False, problem=problem) for name in peers
        )


def our_candidates(case: AttentionCase, implementation: str) -> Iterator[Candidate]:
    """The public op with a named implementation; its schedule is built outside the timing, as a model builds it.

    Its forward pass, and its gradients such as come out the same each time, such as are added up in any order, or both.
    """

    def attend(q, k, v, extra, *, deterministic):
        tokens, schedule, learned = extra
        return blockwise_attention(
            q,
            k,
            v,
            mask=case.mask,
            tokens=tokens,
            schedule=schedule,
            implementation=implementation,
            deterministic=deterministic,
            **case.constants,
            **learned,
        )

    def extra():
        tokens = case.tokens
        return tokens, make_schedule(case.mask, tokens, q_len=case.length, kv_len=case.length), case.learned

    passes_by_order: dict[bool, list[Pass]] = {True: ["forward"], False: []}
    for deterministic in DETERMINISTIC.get(implementation, (True, False)):
        passes_by_order[deterministic].append("forward+backward")
    for deterministic, passes in passes_by_order.items():
        if passes:
            yield Candidate(
                name=_our_name(implementation, deterministic),
                ours=True,
                deterministic=deterministic,
                attend=functools.partial(attend, deterministic=deterministic),
                extra=extra,
                passes=tuple(passes),
            )


def _our_name(implementation: str, deterministic: bool) -> str:
    return f"longctx {implementation}{'' if deterministic else ', any order'}"


def hop_candidate(case: Case, implementation: str) -> Candidate:
    """A hop of a ring: a running softmax goes in and comes out. It holds nothing yet, but is read like any other."""

    def attend(q, k, v, carry):
        return blockwise_attention_forward(
            q, k, v, mask=case.mask, carry=carry, return_carry=True, implementation=implementation
        )

    def extra():
        return SoftmaxCarry.empty(
            batch_size=case.batch_size, q_len=case.length, num_heads=case.num_heads, value_dim=case.dim_of_values
        )

    return Candidate(
        name=f"longctx {implementation} with carry",
        ours=True,
        deterministic=True,
        attend=attend,
        extra=extra,
        passes=("forward",),
        out_of=lambda carry: carry.finalize("float32")[0],
    )


def hop_backward_candidates(case: Case, implementation: str) -> Iterator[BackwardCandidate]:
    """A hop of a ring's backward pass: alone, and adding into running gradients. Nothing depends on lse."""

    def differentiate(q, k, v, out, lse, dout, running, *, deterministic):
        return blockwise_attention_backward(
            q,
            k,
            v,
            out,
            lse,
            dout,
            None,
            mask=case.mask,
            accumulate=running,
            implementation=implementation,
            deterministic=deterministic,
        )

    for deterministic in DETERMINISTIC.get(implementation, (True, False)):
        for accumulates in (False, True):
            accumulating = f"{implementation} with accumulate" if accumulates else implementation
            yield BackwardCandidate(
                name=_our_name(accumulating, deterministic),
                ours=True,
                deterministic=deterministic,
                differentiate=functools.partial(differentiate, deterministic=deterministic),
                accumulates=accumulates,
            )


def _lower(candidate: AnyCandidate, case: AttentionCase, which: Pass, dtype: str) -> jax.stages.Lowered:
    if isinstance(candidate, BackwardCandidate):
        q, k, v, out = case.shapes(dtype)
        lse = jax.ShapeDtypeStruct((case.batch_size, case.num_heads, case.length), jnp.float32)
        running = jax.eval_shape(functools.partial(candidate.running, case))
        return jax.jit(candidate.differentiate, donate_argnums=6).lower(q, k, v, out, lse, out, running)

    def forward(q, k, v, dout, extra):
        return (candidate.attend(q, k, v, extra),)

    def forward_and_backward(q, k, v, dout, extra):
        if not case.learned:
            out, vjp = jax.vjp(lambda q, k, v: candidate.attend(q, k, v, extra), q, k, v)
        else:
            *others, learned = extra
            out, vjp = jax.vjp(lambda q, k, v, learned: candidate.attend(q, k, v, (*others, learned)), q, k, v, learned)
        return out, *vjp(dout)

    program = forward if which == "forward" else forward_and_backward
    return jax.jit(program).lower(*case.shapes(dtype), jax.eval_shape(candidate.extra))


def _run(
    candidate: Candidate, program: jax.stages.Compiled, q, k, v, dout, check: Check
) -> tuple[tuple[jax.Array, ...], Callable]:
    """What is checked, and the call that is timed."""
    extra = jax.block_until_ready(candidate.extra())
    out, *gradients = program(q, k, v, check.dout, extra)
    results = candidate.out_of(out).astype(q.dtype), *gradients
    return results, functools.partial(program, q, k, v, dout, extra)


def _backward_run(
    candidate: BackwardCandidate, case: Case, program: jax.stages.Compiled, q, k, v, dout, check: Check
) -> tuple[tuple[jax.Array, ...], Callable]:
    """As `_run`, of a forward pass by XLA; each timed call adds into what the one before it returned."""
    forward = functools.partial(blockwise_attention_forward, mask=case.mask, tokens=case.tokens, implementation="xla")
    out, lse = jax.jit(forward)(q, k, v)
    gradients = program(q, k, v, out, lse, check.dout, candidate.running(case))
    if candidate.accumulates:
        added = (new - old for new, old in zip(gradients, candidate.running(case), strict=True))
        gradients = tuple(x.astype(q.dtype) for x in added)
    state = candidate.running(case)

    def call():
        nonlocal state
        gradients = program(q, k, v, out, lse, dout, state)
        state = gradients if candidate.accumulates else None
        return gradients

    return (out, *gradients), call

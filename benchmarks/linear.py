"""Measures linear attention: every implementation of the family and every peer, on the cases of linear_cases.py."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax

from benchmarks.cases import WHOLE_PASSES, Pass
from benchmarks.linear_cases import LinearCase
from benchmarks.linear_check import LinearCheck
from benchmarks.measure import Bandwidth, Ceiling
from benchmarks.peers import Candidate, Peer
from benchmarks.results import Row
from benchmarks.side_by_side import measure_side_by_side, peer_candidates
from pallas_kernels.linear import api

OURS = tuple(name for name in api.FORWARD if name != "reference")
# Of a row longer than this XLA's loop over chunks takes seconds a call, and its float32 copies tens of GB.
XLA_LENGTH = 65536
MAX_SECONDS = 1.0  # that measuring one program may take: XLA's loop is a hundred times slower than a kernel


def measure_linear(
    cases: Sequence[LinearCase],
    *,
    peers: Mapping[str, Peer[LinearCase]],
    ceiling: Ceiling,
    bandwidth: Bandwidth,
    implementations: Sequence[str] | None = None,
    passes: Sequence[Pass] = WHOLE_PASSES,
    dtype: str = "bfloat16",
    repetitions: int = 20,
    progress: Callable[[str], None] = print,
    candidates_of: Callable[[LinearCase], Iterable[Candidate | Row]] | None = None,
) -> list[Row]:
    """Compiles every program, then for each case checks and times its implementations one by one.

    Args:
      ceiling, bandwidth: What a large matmul and a large copy reach here.
      implementations: Of this project; None takes all, but XLA's of rows up to XLA_LENGTH only.
      repetitions: Measurements of each, or as many as MAX_SECONDS allow.
      candidates_of: The ways to compute a case, or rows that say why there is none; default this project's
        implementations and the peers.
    Returns: a row for each case, pass and implementation; what does not fit the float32 truth is not timed. After
      Ctrl-C, the rows until then.
    """
    if candidates_of is None:
        candidates_of = functools.partial(all_candidates, implementations=implementations, peers=peers)
    family = _Linear(candidates=candidates_of, ceiling=ceiling, bandwidth=bandwidth, dtype=dtype)
    return measure_side_by_side(
        family, cases, passes=passes, repetitions=repetitions, max_seconds=MAX_SECONDS, progress=progress
    )


def all_candidates(
    case: LinearCase, *, implementations: Sequence[str] | None, peers: Mapping[str, Peer[LinearCase]]
) -> Iterator[Candidate | Row]:
    """This project's implementations and the peers' for a case; a row for a peer that does not serve it."""
    for name in OURS if implementations is None else implementations:
        yield our_candidate(case, name, max_length=XLA_LENGTH if implementations is None and name == "xla" else None)
    yield from peer_candidates(case, peers)


def our_candidate(case: LinearCase, implementation: str, *, max_length: int | None = None) -> Candidate:
    """The public op with a named implementation, for rows up to a length."""

    def attend(q, k, v, decay, *rest):
        *beta, segment_ids = rest
        if max_length is not None and case.length > max_length:
            raise NotImplementedError(
                f"left out of rows of more than {max_length:,} tokens; --implementations {implementation} measures it"
            )
        gates = {"decay": decay, "beta": beta[0] if beta else None}
        return api.linear_attention(q, k, v, **gates, segment_ids=segment_ids, implementation=implementation)

    return Candidate(
        name=f"longctx {implementation}",
        ours=True,
        deterministic=True,
        attend=attend,
        extra=lambda: case.segment_ids,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Linear:
    """The `Family` of side_by_side."""

    candidates: Callable[[LinearCase], Iterable[Candidate | Row]]
    ceiling: Ceiling
    bandwidth: Bandwidth
    dtype: str

    def lower(self, candidate: Candidate, case: LinearCase, which: Pass) -> jax.stages.Lowered:
        def forward(*arguments):
            *operands, _, extra = arguments
            return (candidate.attend(*operands, extra),)

        def forward_and_backward(*arguments):
            *operands, dout, extra = arguments
            given = {i: operands[i] for i in case.differentiated}

            def attend(given):
                return candidate.attend(*(given.get(i, x) for i, x in enumerate(operands)), extra)

            out, vjp = jax.vjp(attend, given)
            return out, *vjp(dout)[0].values()

        program = forward if which == "forward" else forward_and_backward
        return jax.jit(program).lower(*case.shapes(self.dtype), jax.eval_shape(candidate.extra))

    def checks(self, case: LinearCase) -> Mapping[Pass, Callable[[], jax.stages.Lowered]]:
        return {which: self._check(case, which).lower for which in WHOLE_PASSES}

    def start(self, case: LinearCase, checks: Mapping[Pass, jax.stages.Compiled | Exception]) -> Callable:
        inputs = case.inputs(self.dtype)

        def run(candidate: Candidate, which: Pass, program: jax.stages.Compiled) -> tuple[str | None, Callable]:
            if isinstance(checks[which], Exception):
                raise checks[which]
            call = functools.partial(program, *inputs, jax.block_until_ready(candidate.extra()))
            return self._check(case, which).problem(checks[which], inputs, call()), call

        return run

    def figures(self, case: LinearCase, which: Pass, seconds: float) -> dict:
        flops_per_second, bytes_per_second = case.flops(which) / seconds, case.bytes(which, self.dtype) / seconds
        return {
            "tflops": flops_per_second / 1e12,
            "ceiling_share": flops_per_second / self.ceiling.flops,
            "details": {
                "GB/s": bytes_per_second / 1e9,
                "% of copy": 100 * bytes_per_second / self.bandwidth.bytes,
                "ns a token": 1e9 * seconds / (case.batch_size * case.length),
            },
        }

    def _check(self, case: LinearCase, which: Pass) -> LinearCheck:
        return LinearCheck(case=case, which=which, dtype=self.dtype)

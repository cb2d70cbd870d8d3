"""Measures attention to chosen blocks, the choice itself, MoBA and NSA, against dense attention by the same kernels."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp

from benchmarks.blockwise import Blockwise, our_candidates
from benchmarks.cases import WHOLE_PASSES, Case, Pass
from benchmarks.measure import Ceiling
from benchmarks.peers import Candidate, Peer
from benchmarks.results import Row
from benchmarks.side_by_side import measure_side_by_side, peer_candidates
from benchmarks.sparse_cases import NSA, SELECTORS, SIZES, SparseCase, choose, draw_choices
from benchmarks.sparse_check import check_of, lower_check
from pallas_kernels import blockwise_attention
from pallas_kernels.mask import Causal
from pallas_kernels.sparse import (
    BranchKeys,
    compressed_starts,
    moba_attention,
    nsa_attention,
    selected_attention,
    tokens_of_blocks,
)
from pallas_kernels.testing import TOLERANCE

NOTES = (
    "Causal attention in order. Blocks by head: for each query head a list of its own, of blocks of 128 x 128 drawn at "
    "random; the schedule is built outside the timing. NSA's selected branch has blocks drawn for each query and kv "
    "head, the first, its own and the one before among them; NSA chooses its own, with the means of blocks, which are "
    "taken within the timing, as compressed keys and values, and gates of 1. **density**: blocks visited over dense "
    "attention's, of MoBA and NSA pairs. **x density**: the time over density times that of dense attention by the "
    "same implementation and order of gradients, **speed-up** the reverse without density. **% of dense**: of a "
    "choice, its time with the schedule over that of the dense forward pass.",
    "TFLOP/s count the pairs that attend: forward 4 pairs D N B, 3.5 times that with backward. Attention to chosen "
    "blocks and NSA agree with the float32 formula on a sample of query rows, out and every gradient; MoBA "
    "over a part of the length agrees with the reference.",
)
_BY_QUERY = "moba", "selected", "nsa"
"""Kinds whose queries choose one by one."""
_CHECKED_CHUNKS = 4
"""Of MoBA, which is held to the reference on a part of the length."""


def measure_sparse(
    cases: Sequence[SparseCase],
    *,
    peers: Mapping[str, Peer],
    ceiling: Ceiling,
    implementations: Sequence[str],
    passes: Sequence[Pass] = WHOLE_PASSES,
    dtype: str = "bfloat16",
    repetitions: int = 20,
    progress: Callable[[str], None] = print,
) -> list[Row]:
    """Measures the cases and the dense ones that they are compared with, which come first.

    Args:
      peers: Of dense attention.
      ceiling: What a large matmul reaches here.
      implementations: Of this project.
    Returns: as `measure_blockwise`, with what sparsity saves as details of the rows.
    """
    cases = tuple(dict.fromkeys((*(case.dense_case for case in cases), *cases)))
    # Of NSA the selected branch has one order; lowering its kernels once more takes longer than all that is timed.
    ordered = frozenset({"chosen", "moba"} & {case.kind for case in cases})
    family = _Sparse(
        implementations=tuple(implementations),
        peers=peers,
        ceiling=ceiling,
        dtype=dtype,
        kinds_in_any_order=ordered | ({"dense"} if ordered else set()),
        passes=tuple(passes),
    )
    rows = measure_side_by_side(family, cases, passes=passes, repetitions=repetitions, progress=progress)
    return _with_savings(rows, cases)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sparse:
    """The `Family` of side_by_side: dense attention and chosen blocks are the blockwise one's.

    Attributes:
      kinds_in_any_order: Kinds of cases whose gradients are measured in any order too.
    """

    implementations: tuple[str, ...]
    peers: Mapping[str, Peer]
    ceiling: Ceiling
    dtype: str
    kinds_in_any_order: frozenset[str] = frozenset()
    passes: Sequence[Pass] = WHOLE_PASSES

    @property
    def _blockwise(self) -> Blockwise:
        return Blockwise(candidates=self.candidates, ceiling=self.ceiling, dtype=self.dtype)

    def candidates(self, case: SparseCase) -> Iterator[Candidate | Row]:
        if case.kind == "select":
            for name in SELECTORS:
                yield Candidate(
                    name=name,
                    ours=True,
                    deterministic=True,
                    attend=functools.partial(choose, name),
                    extra=lambda: None,
                    passes=("forward",),
                )
            return
        for implementation in self.implementations:
            for candidate in our_candidates(case, implementation):
                if candidate.deterministic or case.kind in self.kinds_in_any_order:
                    yield _changed(case, implementation, candidate)
        if case.kind == "dense":
            shape = {
                name: getattr(case, name) for name in ("batch_size", "length", "num_heads", "num_kv_heads", "head_dim")
            }
            yield from peer_candidates(Case(**shape), self.peers)

    def lower(self, candidate: Candidate, case: SparseCase, which: Pass) -> jax.stages.Lowered:
        if case.kind == "select":
            q, k, *_ = case.shapes(self.dtype)
            return jax.jit(candidate.attend).lower(q, k)
        return self._blockwise.lower(candidate, case, which)

    def checks(self, case: SparseCase) -> Mapping[Pass, Callable]:
        if case.kind not in ("selected", "nsa"):
            return {}
        return {self.passes[-1]: functools.partial(lower_check, case, self.dtype)}  # one program for all passes

    def start(self, case: SparseCase, checks: Mapping) -> Callable:
        if case.kind not in ("select", *_BY_QUERY):
            return self._blockwise.start(case, checks)
        q, k, v, dout = case.inputs(self.dtype)
        for program in checks.values():
            if isinstance(program, Exception):
                raise program
            check = check_of(program, case, q, k, v, dout, _choices(case))
        problem_of_moba = functools.cache(functools.partial(_problem_of_moba, case=case, dtype=self.dtype))

        def run(candidate: Candidate, which: Pass, program: jax.stages.Compiled) -> tuple[str | None, Callable]:
            if case.kind == "select":
                return None, functools.partial(program, q, k)
            extra = candidate.extra()
            call = functools.partial(program, q, k, v, dout, extra)
            if case.kind == "moba":
                return problem_of_moba(candidate), call
            return check.problem(program(q, k, v, check.dout, extra)), call

        return run

    def figures(self, case: SparseCase, which: Pass, seconds: float) -> dict:
        return {} if case.kind == "select" else self._blockwise.figures(case, which, seconds)


def _changed(case: SparseCase, implementation: str, candidate: Candidate) -> Candidate:
    """A candidate of dense attention as one of the case."""
    options = dict(implementation=implementation, deterministic=candidate.deterministic)
    if case.kind in _BY_QUERY:
        return dataclasses.replace(
            candidate, attend=functools.partial(_by_query, case, options), extra=functools.partial(_choices, case)
        )
    if case.kind == "chosen":

        def attend(q, k, v, schedule):
            return blockwise_attention(q, k, v, mask=Causal(), schedule=schedule, **options)

        def schedule():
            make = functools.partial(type(case.selection()).schedule, mask=Causal(), block_sizes=SIZES)
            return jax.jit(make)(case.selection())

        return dataclasses.replace(candidate, attend=attend, extra=schedule)
    return candidate


def _by_query(case: SparseCase, options: dict, q, k, v, choices):
    if case.kind == "moba":
        return moba_attention(q, k, v, chunk_size=case.chunk_size, top_k=case.top_k, **options)
    if case.kind == "selected":
        start = jnp.arange(0, k.shape[1], NSA.block_size, dtype=jnp.int32)[None]
        implementation = options["implementation"]
        return selected_attention(q, k, v, choices, start, block_size=NSA.block_size, implementation=implementation)[0]
    starts = compressed_starts(None, k.shape[1], NSA)
    means = (jnp.mean(tokens_of_blocks(x, starts, NSA), axis=2, dtype=jnp.float32).astype(x.dtype) for x in (k, v))
    keys = BranchKeys(k, v)
    gates = jnp.ones((*q.shape[:3], 3), q.dtype)
    return nsa_attention(q, BranchKeys(*means), keys, keys, gates, sizes=NSA, **options)


def _choices(case: SparseCase) -> jax.Array | None:
    return draw_choices(case.length, case.num_kv_heads) if case.kind == "selected" else None


def _problem_of_moba(candidate: Candidate, *, case: SparseCase, dtype: str) -> str | None:
    """What differs from the reference's results, at a part of the length."""
    short = dataclasses.replace(case, length=_CHECKED_CHUNKS * case.chunk_size)

    def results(attend):
        @jax.jit
        def run(q, k, v, dout):
            out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, None), q, k, v)
            return out, *vjp(dout)

        return run(*short.inputs(dtype))

    plain = functools.partial(_by_query, short, dict(implementation="reference", deterministic=True))
    pairs = zip(("out", "dq", "dk", "dv"), results(candidate.attend), results(plain), strict=True)
    for name, got, want in pairs:
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        rms = float(jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2)))
        tolerance = 2 * TOLERANCE[dtype][0]  # both are rounded
        if not rms <= tolerance:
            return f"rms difference {rms:.2g} of {name} from the reference's, wanted <= {tolerance:g}"
    return None


def _with_savings(rows: Sequence[Row], cases: Sequence[SparseCase]) -> list[Row]:
    """The rows, those that were timed with what they take of dense attention's time."""
    by_name = {case.name: case for case in cases}
    times = {(row.case, row.which, row.implementation): row.median_ms for row in rows if row.median_ms is not None}

    def of_dense(row: Row) -> float | None:
        dense = by_name[row.case].dense_case.name
        if by_name[row.case].kind == "select":
            of_all = [ms for (case, which, _), ms in times.items() if (case, which) == (dense, "forward")]
            return min(of_all, default=None)
        return times.get((dense, row.which, row.implementation))

    def of_peers(row: Row) -> dict[str, float]:
        dense = by_name[row.case].dense_case.name
        peers = (x for x in rows if (x.case, x.which) == (dense, row.which) and not x.ours and x.median_ms is not None)
        return {f"speed-up over {x.implementation}": x.median_ms / row.median_ms for x in peers}

    def saved(row: Row) -> Row:
        case, dense_ms = by_name[row.case], of_dense(row)
        if case.kind == "dense" or row.median_ms is None or dense_ms is None:
            return row
        if case.kind == "select":
            return dataclasses.replace(row, details={"% of dense": 100 * row.median_ms / dense_ms})
        details = {
            "density": case.density,
            "x density": row.median_ms / (case.density * dense_ms),
            "speed-up": dense_ms / row.median_ms,
            **of_peers(row),
        }
        return dataclasses.replace(row, details=row.details | details)

    return [saved(row) for row in rows]

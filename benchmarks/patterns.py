"""Measures static sparse patterns against dense attention by the same kernels: what the pairs left out save."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from benchmarks.blockwise import measure_blockwise, our_candidates
from benchmarks.cases import BLOCK, WHOLE_PASSES, Pass
from benchmarks.measure import Ceiling
from benchmarks.pattern_cases import CASES, SMOKE, PatternCase
from benchmarks.peers import Candidate
from benchmarks.results import Row

__all__ = ["CASES", "NOTES", "SMOKE", "measure_patterns"]

NOTES = (
    "Each pattern beside dense attention of the same shape by the same implementation: `dense causal`, or `dense full` "
    "where the pattern looks ahead. **speed-up**: the time of the dense one over this one's. **% of pairs** and **% of "
    f"blocks**: the pairs that may attend, and the tiles of {BLOCK} queries x {BLOCK} keys visited, over the dense "
    "one's; where heads differ, the mean over the heads of what each one's own mask needs. **% of ideal**: the "
    "speed-up over that which the blocks left out would give if all else cost nothing, dense blocks over blocks.",
    "TFLOP/s count the pairs that the mask allows: forward 4 pairs D N B, 3.5 times that with backward; of a block "
    "that is visited all are computed. What is timed agrees with the float32 formula on a sample of query rows, out "
    "and every gradient. Schedules and segment ids are built outside the timing.",
)


def measure_patterns(
    cases: Sequence[PatternCase],
    *,
    ceiling: Ceiling,
    implementations: Sequence[str],
    passes: Sequence[Pass] = WHOLE_PASSES,
    dtype: str = "bfloat16",
    repetitions: int = 20,
    progress: Callable[[str], None] = print,
) -> list[Row]:
    """Measures the cases and the dense ones that they are compared with, which come first.

    Args:
      ceiling: What a large matmul reaches here.
      implementations: Of this project. Gradients are those that come out the same each time.
    Returns: as `measure_blockwise`, with what a pattern saves as details of its rows.
    """
    cases = tuple(dict.fromkeys((*(case.dense_case for case in cases), *cases)))

    def candidates(case: PatternCase) -> Iterator[Candidate]:
        for name in implementations:
            yield from (candidate for candidate in our_candidates(case, name) if candidate.deterministic)

    rows = measure_blockwise(
        cases,
        peers={},
        ceiling=ceiling,
        passes=passes,
        dtype=dtype,
        repetitions=repetitions,
        progress=progress,
        candidates_of=candidates,
    )
    return with_savings(rows, cases)


def with_savings(rows: Sequence[Row], cases: Sequence[PatternCase]) -> list[Row]:
    """The rows, those that were timed with the shares of pairs and blocks, and the speed-up over dense where known."""
    by_name = {case.name: case for case in cases}
    times = {(row.case, row.which, row.implementation): row.median_ms for row in rows if row.median_ms is not None}

    def saved(row: Row) -> Row:
        case = by_name[row.case]
        dense = case.dense_case
        if row.median_ms is None or case == dense:
            return row
        share_of_blocks = case.blocks / dense.blocks
        details = {"% of pairs": 100 * case.pairs / dense.pairs, "% of blocks": 100 * share_of_blocks}
        dense_ms = times.get((dense.name, row.which, row.implementation))
        if dense_ms is not None:
            speed_up = dense_ms / row.median_ms
            details |= {"speed-up": speed_up, "% of ideal": 100 * speed_up * share_of_blocks}
        return dataclasses.replace(row, details=row.details | details)

    return [saved(row) for row in rows]

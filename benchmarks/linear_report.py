"""What the report of linear attention says beside its tables: how its figures are counted, and two bars."""

import dataclasses
from collections.abc import Iterator, Sequence

from benchmarks.linear_cases import LinearCase
from benchmarks.results import Row

NOTES = (
    "Cases: kind, rows B of S tokens, heads of the values / of queries and keys, their dim (keys / values where they "
    "differ). `none` has no decay; `fixed` a constant one a head, of which no gradient is taken (Lightning Attention); "
    "`scalar` a gate a token and head, whose gradient is part of what is timed (simple GLA, Mamba-2); `vector` one for "
    "each dim of the keys too (GLA); `delta` and `gated_delta` are the delta rule without and with a gate a "
    "token (DeltaNet, Gated DeltaNet).",
    "GB/s count what must be moved, of arrays as large as q or v: forward reads q, k, v and writes out; with backward "
    "q, k, v, dout are read, out, dq, dk, dv written, and q, k, v read again: 4 and 11 arrays where all are alike; "
    "gates of each dim, float32, are 1 and 3 more. "
    "% of copy is that over the bytes a second, read and written, of the copy of the same run. TFLOP/s count the "
    "recurrence, which chunks exceed: forward 4 T N H V B, three times that with backward.",
    "What is timed agrees in full, out and every gradient, with a computation by chunks or tokens in float32 at the "
    "highest matmul precision that shares no code with the family. Segment ids are built and inputs drawn outside "
    "the timing.",
)
MAX_DOCUMENTS_OVER_DENSE = 1.05
MAX_OVER_SHORTEST = 1.05
LONG = 65536  # tokens of a row from which on the time a token shall not grow


def bars(rows: Sequence[Row], cases: Sequence[LinearCase], *, long: int = LONG) -> list[str]:
    """Markdown: documents over the dense row of the same shape, and the time a token of ever longer rows.

    Args:
      rows: Of these cases; each pair of cases that only the documents, or only the lengths from `long` on, tell apart
        is compared where both were timed.
    """
    return [
        _table(
            f"Packed documents over the dense row of the same shape, wanted <= {MAX_DOCUMENTS_OVER_DENSE:g}:",
            ("case", "pass", "implementation", "of dense", ""),
            [
                (*key, f"{ratio:.3f}", _verdict(ratio, MAX_DOCUMENTS_OVER_DENSE))
                for *key, ratio in _documents_over_dense(rows, cases)
            ],
        ),
        _table(
            f"Time a token of one row of {long:,} tokens and more, that of the slowest longer row over that of the "
            f"shortest wanted <= {MAX_OVER_SHORTEST:g}: it may fall with the length, and not grow:",
            ("case", "pass", "implementation", "ns a token, by length", "slowest longer / shortest", ""),
            [
                (*key, by_length, f"{ratio:.3f}", _verdict(ratio, MAX_OVER_SHORTEST))
                for *key, by_length, ratio in _growths(rows, cases, long)
            ],
        ),
    ]


def _documents_over_dense(rows: Sequence[Row], cases: Sequence[LinearCase]) -> Iterator[tuple[str, str, str, float]]:
    times = _times(rows)
    for case in cases:
        dense = dataclasses.replace(case, documents=None)
        for which, implementation in _measured(times, case) if case != dense else ():
            reference = times.get((dense.name, which, implementation))
            if reference is not None:
                yield case.name, which, implementation, times[case.name, which, implementation] / reference


def _growths(rows: Sequence[Row], cases: Sequence[LinearCase], long: int) -> Iterator[tuple[str, str, str, str, float]]:
    times = _times(rows)
    groups: dict[LinearCase, list[LinearCase]] = {}
    for case in sorted(cases, key=lambda case: case.length):
        if case.length >= long and case.documents is None:
            groups.setdefault(dataclasses.replace(case, length=0), []).append(case)
    for group in groups.values():
        measured = dict.fromkeys(key for case in group for key in _measured(times, case))
        for which, implementation in measured:
            by_length = {
                case.length: 1e6 * times[case.name, which, implementation] / (case.batch_size * case.length)
                for case in group
                if (case.name, which, implementation) in times
            }
            if len(by_length) > 1:
                told = ", ".join(f"{length:,}: {time:.3g}" for length, time in by_length.items())
                name = group[0].name.replace(f" S{group[0].length}", "")
                shortest, *longer = by_length.values()
                yield name, which, implementation, told, max(longer) / shortest


def _times(rows: Sequence[Row]) -> dict[tuple[str, str, str], float]:
    return {(row.case, row.which, row.implementation): row.median_ms for row in rows if row.median_ms is not None}


def _measured(times: dict[tuple[str, str, str], float], case: LinearCase) -> list[tuple[str, str]]:
    return [(which, implementation) for name, which, implementation in times if name == case.name]


def _verdict(ratio: float, greatest: float) -> str:
    return "held" if ratio <= greatest else "missed"


def _table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return f"{title} nothing to compare in this run."
    return "\n".join([title, "", _line(head), "|---" * len(head) + "|", *map(_line, lines)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

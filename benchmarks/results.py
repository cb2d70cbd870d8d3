"""What a run measured: rows, and the JSON file that holds them."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from pallas_kernels.machine import slug


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One pass of one case by one implementation, or why there is no time of it.

    Attributes:
      deterministic: Whether its results come out the same, bit by bit, each time: all forward passes' do.
      devices: How many computed it together.
      kernels: The op and implementation of each call that it makes, where that was not asked for by name.
      problem: "refused: ...", "wrong: ..." or "failed: ..."; None where it was timed.
      low_ms, high_ms: Between them lie 80 % of the measurements.
      tflops: TFLOP/s a device, over the pairs that the mask allows.
      ceiling_share: tflops over those of the matmul of the same run.
      memory_bytes: What the program holds on a device: arguments, results and temporaries.
      peer_ratio: The best peer's time over this one's: above 1 this one is faster. Of this project's rows only; a
        deterministic one is compared with deterministic peers, another with all.
      one_device_share: tflops over those of one device alone at its own length; of rows of several devices only.
      details: Other figures, by name.
    """

    case: str
    which: str
    implementation: str
    ours: bool
    deterministic: bool = True
    devices: int = 1
    kernels: tuple[str, ...] = ()
    problem: str | None = None
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    tflops: float | None = None
    ceiling_share: float | None = None
    memory_bytes: int | None = None
    peer_ratio: float | None = None
    one_device_share: float | None = None
    details: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """A run: where it ran and what it measured.

    Attributes:
      machine: As `machine.describe` says it.
      settings: What was asked for.
      notes: What a reader must know of the whole.
      ceiling_size, ceiling_tflops: Edge of the square matmul, and the TFLOP/s that it reached.
      copy_gb_per_second: GB/s, read and written, that a copy reached; only where rows are compared with it.
    """

    family: str
    machine: dict
    settings: dict
    ceiling_size: int
    ceiling_tflops: float
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    copy_gb_per_second: float | None = None

    @property
    def stem(self) -> str:
        """The name of the run's files, without an ending."""
        return f"{self.machine['date']}_{slug(self.machine['device'])}_{self.family}"

    def write_json(self, path: Path) -> None:
        """Writes everything."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read_json(cls, path: Path) -> Self:
        """What `write_json` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(Row(**row | {"kernels": tuple(row.get("kernels", ()))}) for row in values.pop("rows"))
        return cls(rows=rows, notes=tuple(values.pop("notes")), **values)


def problem_of(error: Exception) -> str:
    """What a row says of an implementation that raised: one that does not serve the case is no failure."""
    if isinstance(error, NotImplementedError):
        return f"refused: {error}"
    text = str(error).strip()
    return f"failed: {type(error).__name__}: {text.splitlines()[0][:300] if text else '(no message)'}"


def with_peer_ratios(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows, with this project's compared with the fastest peer of the same case and pass.

    Where one's results come out the same each time, so must the peer's.
    """
    rows = tuple(rows)
    peers = [row for row in rows if not row.ours and row.median_ms is not None]

    def compared(row: Row) -> Row:
        if not row.ours or row.median_ms is None:
            return row
        times = [
            peer.median_ms
            for peer in peers
            if (peer.case, peer.which) == (row.case, row.which) and (peer.deterministic or not row.deterministic)
        ]
        return dataclasses.replace(row, peer_ratio=min(times) / row.median_ms) if times else row

    return tuple(map(compared, rows))

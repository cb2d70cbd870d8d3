"""python -m tests.faults [--short] [PART ...]: whether runs survive what is done to them. Exit code 0 if all did.

Each part makes its cases, runs them and counts what became of them; tables show the counts, and what did not hold is
written to stderr as it is found.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from pallas_kernels import markdown
from tests.faults import bad_arrays, bad_configs, bad_data, kills, long_lines, stops, storage
from tests.faults.harness import Report

_TABLE = "table of faults"
_HEAD = ("part", "kind", "cases", "outcomes")

# By name: what runs it in an empty folder, and how many cases it has in full and in short.
PARTS: dict[str, tuple[Callable[[Path, int], Report], int, int]] = {
    "configs": (bad_configs.check_configs, 1000, 15),
    "data": (bad_data.check_data, 300, 3),
    "arrays": (bad_arrays.check_arrays, 1000, 6),
    "lines": (long_lines.check_long_lines, 6, 1),
    "kills": (kills.check_kills, 50, 2),
    "stops": (stops.check_stops, 20, 1),
    "full": (storage.check_full_disks, 10, 1),
    "truncated": (storage.check_truncated_checkpoints, 10, 1),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("parts", metavar="PART", nargs="*", help=f"which parts; all by default: {', '.join(PARTS)}")
    parser.add_argument("--short", action="store_true", help="a few cases of each, for every change")
    parser.add_argument("--cases", type=int, metavar="N", help="this many of each, whatever the part has in full")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the rows of these parts into FILE's table")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"PART: got {', '.join(unknown)}, wanted some of {', '.join(PARTS)}")
    _start_jax()
    num_faults = 0
    for name in options.parts or PARTS:
        check, full, short = PARTS[name]
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            report = check(Path(folder), options.cases or (short if options.short else full))
        rows = _rows(name, report, time.monotonic() - began)
        table = Table(*_HEAD)
        for row in rows:
            table.add_row(*row)
        Console(width=120).print(table)
        if options.write is not None:
            markdown.rewrite(options.write, lambda text, rows=rows: _with_rows(text, rows))
        num_faults += len(report.faults)
    return 1 if num_faults else 0


def _rows(name: str, report: Report, seconds: float) -> list[tuple[str, ...]]:
    rows = []
    for kind, outcomes in sorted(report.outcomes.items()):
        shown = ", ".join(f"{outcome} {count}" for outcome, count in sorted(outcomes.items()))
        rows.append((name, kind, str(sum(outcomes.values())), shown))
    return [*rows, (name, "all", str(report.count), f"{len(report.faults)} faults, {seconds:.0f} s")]


def _with_rows(text: str, rows: list[tuple[str, ...]]) -> str:
    """The text of a page whose table has these rows in the place of those of their part."""
    part = rows[0][0]
    _, _, behind = text.partition(f"<!-- {_TABLE}: begin -->")
    lines = behind.partition(f"<!-- {_TABLE}: end -->")[0].split("\n")
    old = [tuple(line.strip("| ").split(" | ")) for line in lines if line.startswith("| ")][2:]
    places = [row[0] for row in old]
    at = places.index(part) if part in places else len(old)
    kept = [row for row in old if row[0] != part]
    return markdown.between_markers(text, _TABLE, [markdown.table([_HEAD, *kept[:at], *rows, *kept[at:]])])


def _start_jax() -> None:
    """Before a config can ask for fewer devices; programs are small, and compiled quickly."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_traceback_filtering", "off")  # or errors would seem to come from where jax was called
    jax.config.update("jax_disable_most_optimizations", True)
    jax.devices()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of files that its other formats have


if __name__ == "__main__":
    sys.exit(main())

"""python -m tests.faults [--short] [PART ...]: whether runs survive what is done to them. Exit code 0 if all did.

Each part makes its cases, runs them and counts what became of them; a table shows the counts, and what did not hold is
written to stderr as it is found.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from tests.faults import bad_arrays, bad_configs, bad_data
from tests.faults.harness import Report

# By name: what runs it in an empty folder, and how many cases it has in full and in short.
PARTS: dict[str, tuple[Callable[[Path, int], Report], int, int]] = {
    "configs": (bad_configs.check_configs, 1000, 40),
    "data": (bad_data.check_data, 300, 8),
    "arrays": (bad_arrays.check_arrays, 1000, 12),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("parts", metavar="PART", nargs="*", help=f"which parts; all by default: {', '.join(PARTS)}")
    parser.add_argument("--short", action="store_true", help="a few cases of each, for every change")
    parser.add_argument("--cases", type=int, metavar="N", help="this many of each, whatever the part has in full")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"PART: got {', '.join(unknown)}, wanted some of {', '.join(PARTS)}")
    _start_jax()
    table = Table("part", "kind", "cases", "outcomes", title="what became of bad input")
    num_faults = 0
    for name in options.parts or PARTS:
        check, full, short = PARTS[name]
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            report = check(Path(folder), options.cases or (short if options.short else full))
        for kind, outcomes in sorted(report.outcomes.items()):
            shown = ", ".join(f"{outcome} {count}" for outcome, count in sorted(outcomes.items()))
            table.add_row(report.part, kind, str(sum(outcomes.values())), shown)
        seconds = time.monotonic() - began
        table.add_row(report.part, "all", str(report.count), f"{len(report.faults)} faults, {seconds:.0f} s")
        table.add_section()
        num_faults += len(report.faults)
    Console(width=120).print(table)
    return 1 if num_faults else 0


def _start_jax() -> None:
    """Before a config can ask for fewer devices; programs are small, and compiled quickly."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_traceback_filtering", "off")  # or errors would seem to come from where jax was called
    jax.config.update("jax_disable_most_optimizations", True)
    jax.devices()


if __name__ == "__main__":
    sys.exit(main())

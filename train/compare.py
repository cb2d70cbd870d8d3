"""python -m train.compare RUN_DIR...: the losses of several runs in one plot, and their last figures in a table."""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.command import check_output, run_command
from train.config import ConfigError
from train.metrics import draw_losses, read_records

_COLUMNS = ("step", "loss", "held-out loss", "held-out bits/byte", "tokens/s", "MFU", "memory")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.compare", description=__doc__)
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", metavar="FILE", type=Path, default=Path("losses.png"), help="default losses.png")
    options = parser.parse_args(arguments)
    return run_command(lambda: _compare(options.runs, options.output))


def _compare(directories: Sequence[Path], output: Path) -> None:
    if output.suffix != ".png":
        raise ConfigError(f"--output: got {output}, wanted a file name that ends in .png")
    check_output("--output", output)
    paths = [directory.resolve() for directory in directories]
    common = os.path.commonpath([path.parent for path in paths])
    runs = {os.path.relpath(path, common): _records(path) for path in paths}
    table = Table("run", *_COLUMNS)
    for name, records in runs.items():
        table.add_row(name, *_figures(records))
    Console().print(table)
    draw_losses(runs, output)
    print(f"the curves are in {output}")


def _records(directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"RUN_DIR: got {directory}, wanted the folder of a run, which has a metrics.jsonl")
    return read_records(path)


def _figures(records: list[dict[str, Any]]) -> list[str]:
    """As _COLUMNS: the last of each, of speeds the median."""

    def shown(key: str, form: str, of=lambda found: found[-1]) -> str:
        found = [record[key] for record in records if record.get(key) is not None]
        return form.format(of(found)) if found else "-"

    return [
        shown("step", "{}"),
        shown("loss", "{:.4f}"),
        shown("eval/loss", "{:.4f}"),
        shown("eval/bits_per_byte", "{:.4f}"),
        shown("tokens_per_second", "{:,.0f}", statistics.median),
        shown("mfu", "{:.1%}", statistics.median),
        shown("memory_gib", "{:.2f} GiB", max),
    ]


if __name__ == "__main__":
    sys.exit(main())

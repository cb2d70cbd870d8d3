"""Results for reading: a Markdown page and a picture, from what the JSON file holds.

`python -m benchmarks.report RESULTS.json` writes both anew, where the machine that measured had no matplotlib, say.
"""

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import scaling_report
from benchmarks.results import Results, Row

SCALING_FAMILIES = ("context_parallel",)  # measured by the number of devices, in place of against peers
PEERS_KEY = (
    "Memory: arguments, results and temporaries of the program. Ratio: the best peer's time over this one's; above 1 "
    "this one is faster. One whose gradients come out the same, bit by bit, each time is compared with the best peer "
    "of which that is true; one that adds them up in any order, with the best of all."
)


def write_report(
    results: Results, folder: Path, *, stem: str | None = None, note: Callable[[str], None] = print
) -> list[Path]:
    """Writes JSON, Markdown and, where matplotlib is installed, PNG; returns their paths.

    Args:
      stem: The files' name without an ending; by default one that no results have, so that a second run of a day is
        numbered and the first stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem or free_stem(results.stem, folder)}.{ending}" for ending in ("json", "md", "png")]
    results.write_json(paths[0])
    has_picture = importlib.util.find_spec("matplotlib") is not None
    paths[1].write_text(markdown(results, picture=paths[2].name if has_picture else None), encoding="utf-8")
    if has_picture:
        draw_picture = scaling_report.draw if results.family in SCALING_FAMILIES else draw
        draw_picture(results, paths[2])
        return paths
    note(f"no picture, matplotlib is not installed: `python -m benchmarks.report {paths[0]}` draws it elsewhere")
    return paths[:2]


def free_stem(stem: str, folder: Path) -> str:
    """The name, with a number behind it where the folder has results of that name."""
    stems = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
    return next(stem for stem in stems if not (folder / f"{stem}.json").exists())


def markdown(results: Results, *, picture: str | None) -> str:
    """The page: what was measured on, a table for each pass, and what was not timed."""
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    scales = results.family in SCALING_FAMILIES
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    copy = ""
    if results.copy_gb_per_second is not None:
        copy = f"Copy: {results.copy_gb_per_second:,.0f} GB/s, read and written, in the same run. "
    lines = [
        f"# {results.family}: {machine['device']}, {machine['date']}",
        "",
        f"{machine['num_devices']} x {machine['device']}{driver}; {versions}; Python {machine['python']}. "
        f"Commit {machine['commit']}.",
        "",
        f"Settings: {', '.join(f'{name} {value}' for name, value in results.settings.items())}. Times are medians; in "
        f"brackets the 10th and 90th percentile. Ceiling: a {results.ceiling_size}^3 bfloat16 matmul of the same run, "
        f"{results.ceiling_tflops:.3g} TFLOP/s a device. {copy}"
        f"{scaling_report.KEY if scales else PEERS_KEY}",
        *(f"\n{text}" for text in results.notes),
    ]
    if picture is not None:
        lines += ["", f"![{results.family}]({picture})"]
    for which in dict.fromkeys(row.which for row in results.rows if row.problem is None):
        rows = [row for row in results.rows if row.which == which]
        lines += ["", f"## {which}", *(scaling_report.tables(rows) if scales else ["", *_table(rows)])]
    untimed = [row for row in results.rows if row.problem is not None]
    if untimed:
        lines += ["", "## Not timed", "", "| case | pass | implementation | why |", "|---|---|---|---|"]
        lines += [_line(row.case, row.which, _on_devices(row), row.problem.replace("|", "\\|")) for row in untimed]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    details = list(dict.fromkeys(name for row in rows for name in row.details))
    tells_order = not all(row.deterministic for row in rows if row.problem is None)
    orders = ["gradients"] if tells_order else []
    head = ["case", "implementation", *orders, "ms", "TFLOP/s", "of ceiling", "memory", "ratio", *details]
    lines = [_line(*head), "|---" * len(head) + "|"]
    fastest: dict[str, float] = {}
    for row in rows:
        if row.median_ms is not None:
            fastest[row.case] = min(row.median_ms, fastest.get(row.case, row.median_ms))
    for row in rows:
        if row.problem is not None:
            continue
        median = f"{row.median_ms:.3g}"
        median = f"**{median}**" if row.median_ms == fastest[row.case] else median
        lines.append(
            _line(
                row.case,
                row.implementation,
                *(["same each time" if row.deterministic else "any order"] if tells_order else []),
                f"{median} ({row.low_ms:.3g} - {row.high_ms:.3g})",
                "" if row.tflops is None else f"{row.tflops:.3g}",
                "" if row.ceiling_share is None else f"{row.ceiling_share:.0%}",
                f"{row.memory_bytes / 2**20:,.1f} MiB",
                "" if row.peer_ratio is None else f"{row.peer_ratio:.2f}",
                *(f"{row.details[name]:,.4g}" if name in row.details else "" for name in details),
            )
        )
    return lines


def _on_devices(row: Row) -> str:
    return row.implementation if row.devices == 1 else f"{row.implementation}, {row.devices} devices"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def draw(results: Results, path: Path) -> None:
    """Bars of TFLOP/s, or GB/s beside a copy's; a panel a pass, a group a case, a colour an implementation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_bytes = results.copy_gb_per_second is not None
    unit = "GB/s" if by_bytes else "TFLOP/s"
    timed = [row for row in results.rows if row.problem is None and (by_bytes or row.tflops is not None)]
    passes = list(dict.fromkeys(row.which for row in timed)) or ["nothing timed"]
    implementations = list(dict.fromkeys(row.implementation for row in timed))
    cases = list(dict.fromkeys(row.case for row in timed))
    width = 0.8 / max(1, len(implementations))
    figure, axes = pyplot.subplots(
        len(passes), 1, figsize=(max(6, 1.4 * len(cases)), 4.2 * len(passes)), squeeze=False, layout="constrained"
    )
    for axis, which in zip(axes[:, 0], passes, strict=True):
        for number, implementation in enumerate(implementations):
            rows = [row for row in timed if (row.which, row.implementation) == (which, implementation)]
            places = [cases.index(row.case) + (number - (len(implementations) - 1) / 2) * width for row in rows]
            heights = [row.details[unit] if by_bytes else row.tflops for row in rows]
            axis.bar(places, heights, width, label=implementation, color=f"C{number}")
        limit = results.copy_gb_per_second if by_bytes else results.ceiling_tflops
        limit_name = "copy" if by_bytes else f"{results.ceiling_size}^3 matmul"
        axis.axhline(limit, color="gray", linestyle=":", label=limit_name)
        axis.set_xticks(
            range(len(cases)), [case.replace(" B", "\nB").replace(" D", "\nD") for case in cases], fontsize=8
        )
        axis.set_ylabel(unit)
        axis.set_title(f"{which}, {results.machine['device']}, {results.machine['date']}")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Writes page and picture anew.")
    parser.add_argument("results", metavar="RESULTS.json", type=Path, help="what a run wrote")
    options = parser.parse_args(arguments)
    for path in write_report(Results.read_json(options.results), options.results.parent, stem=options.results.stem):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

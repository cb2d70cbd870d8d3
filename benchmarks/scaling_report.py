"""Tables and pictures of what was measured over ever more devices: the implementations of a case side by side."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Results, Row

KEY = (
    "A cell is the median in ms (10th - 90th percentile), TFLOP/s a device, and % of one device; the fastest of a row "
    "is bold."
)


def tables(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown of one pass: for each case what one device reaches alone, and a table."""
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        lines += ["", f"### {case}", "", *_of_case([row for row in rows if row.case == case])]
    return lines


def _of_case(rows: Sequence[Row]) -> list[str]:
    lines = [
        f"One device alone: {row.median_ms:.3g} ms ({row.low_ms:.3g} - {row.high_ms:.3g}), {row.tflops:.3g} TFLOP/s, "
        f"{row.ceiling_share:.0%} of the ceiling."
        if row.problem is None
        else f"One device alone: {row.problem}"
        for row in rows
        if row.devices == 1
    ]
    split = [row for row in rows if row.devices > 1]
    if not split:
        return lines
    names = list(dict.fromkeys(row.implementation for row in split))
    lines += ["", f"| devices | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for devices in dict.fromkeys(row.devices for row in split):
        at_hand = {row.implementation: row for row in split if row.devices == devices}
        fastest = min((row.median_ms for row in at_hand.values() if row.problem is None), default=None)
        cells = [_cell(at_hand[name], fastest) if name in at_hand else "" for name in names]
        lines.append(f"| {devices} | {' | '.join(cells)} |")
    return [*lines, "", _kernels(rows)]


def _kernels(rows: Sequence[Row]) -> str:
    """Which implementations served the calls: all the same, or which those of whom."""
    users: dict[tuple[str, ...], dict[str, None]] = {}
    for row in rows:
        if row.problem is None:
            users.setdefault(row.kernels, {})[row.implementation] = None
    if len(users) <= 1:
        return f"Kernels: {', '.join(*users) if users else 'none'}."
    return f"Kernels: {'; '.join(f'{", ".join(names)}: {", ".join(kernels)}' for kernels, names in users.items())}."


def _cell(row: Row, fastest: float | None) -> str:
    if row.problem is not None:
        return row.problem.split(":")[0]
    median = f"**{row.median_ms:.3g}**" if row.median_ms == fastest else f"{row.median_ms:.3g}"
    share = "" if row.one_device_share is None else f", {row.one_device_share:.0%}"
    return f"{median} ({row.low_ms:.3g} - {row.high_ms:.3g}), {row.tflops:.3g}{share}"


def draw(results: Results, path: Path) -> None:
    """% of one device by the number of devices, a line an implementation, a panel a pass and case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in results.rows if row.one_device_share is not None]
    passes = list(dict.fromkeys(row.which for row in timed)) or ["nothing timed"]
    cases = list(dict.fromkeys(row.case for row in timed)) or [""]
    degrees = sorted({row.devices for row in timed})
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(row.implementation for row in timed))}
    figure, axes = pyplot.subplots(
        len(passes), len(cases), figsize=(5.2 * len(cases), 4.2 * len(passes)), squeeze=False, layout="constrained"
    )
    for line, which in zip(axes, passes, strict=True):
        for axis, case in zip(line, cases, strict=True):
            for name, colour in colours.items():
                rows = [row for row in timed if (row.which, row.case, row.implementation) == (which, case, name)]
                if rows:
                    shares = [100 * row.one_device_share for row in rows]
                    axis.plot([row.devices for row in rows], shares, marker="o", color=colour, label=name)
            axis.axhline(100, color="gray", linestyle=":")
            axis.set_xscale("log", base=2)
            axis.set_xticks(degrees, [str(degree) for degree in degrees])
            axis.set_ylim(bottom=0)
            axis.set_xlabel("devices")
            axis.set_ylabel("% of one device")
            axis.set_title(f"{which}\n{case}", fontsize=9)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=7)
    figure.suptitle(f"{results.machine['device']}, {results.machine['date']}")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

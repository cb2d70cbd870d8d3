"""python -m benchmarks.levers CONFIG --devices NAME --out PATH: what each lever of memory adds to the longest row.

Plans the config with one lever after the other, each on top of those before it, and looks for the longest data.seq_len
that fits (`train.plan --max-seq`). Writes a table PATH.md, a picture PATH.png and the figures PATH.json. Nothing runs.
"""

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from train.command import run_command
from train.config import load_config
from train.devices import device_table
from train.plan import make_plan, max_seq
from train.planning.plan import Plan
from train.planning.target import named_target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lever:
    """A row of the table.

    Attributes:
      name: What it is called.
      overrides: `a.b=c`, on top of those of the rows before.
    """

    name: str
    overrides: Sequence[str]


LEVERS = (
    Lever(name="none", overrides=["model.remat=none", "model.mlp_tile=null", "training.loss=plain"]),
    Lever(name="+ fused loss", overrides=["training.loss=fused"]),
    Lever(name="+ tiled MLP", overrides=["model.mlp_tile=8192"]),
    Lever(name="+ remat", overrides=["model.remat=full"]),
    Lever(name="+ layer inputs on the host", overrides=["model.remat={residual: offload}"]),
    Lever(name="+ optimizer state in bfloat16", overrides=["optimizer.moments_dtype=bfloat16"]),
    Lever(name="+ optimizer state on the host", overrides=["optimizer.offload=true"]),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What was found with a lever.

    Attributes:
      lever: Its name.
      overrides: All that are in force.
      longest: Tokens of the longest row that fits.
      memory, host_memory: Bytes that a device and its host hold then.
      step_seconds: What a step takes then, on paper.
    """

    lever: str
    overrides: Sequence[str]
    longest: int
    memory: int
    host_memory: int
    step_seconds: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.levers", description=__doc__.partition("\n")[2].strip())
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a run")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="config keys that differ from the file")
    parser.add_argument("--devices", metavar="NAME", required=True, help="as train.plan takes them, such as h100:1")
    parser.add_argument("--out", metavar="PATH", type=Path, required=True, help="of the results, without an ending")
    parser.add_argument("--formula", action="store_true", help="do not compile; figures by formula")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    target = named_target(options.devices, device_table())
    rows, overrides = [], list(options.overrides)
    for lever in LEVERS:
        overrides += lever.overrides
        console.rule(lever.name)
        config = load_config(options.config, overrides)

        def planned(length: int, config=config) -> Plan:
            data = dataclasses.replace(config.data, seq_len=length)
            changed = dataclasses.replace(config, data=data)
            return make_plan(changed, target, by_formula=options.formula, console=console)

        # From where the last lever ended, which is nearer than the config's own length.
        start = rows[-1].longest if rows and rows[-1].longest else config.data.seq_len // 8
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=start))
        found = max_seq(config, target, by_formula=options.formula, plan=planned(start), console=console)
        plan = planned(found or start)
        rows.append(
            Row(
                lever=lever.name,
                overrides=tuple(overrides),
                longest=found,
                memory=plan.memory_total,
                host_memory=plan.host_memory_total,
                step_seconds=plan.step_seconds,
            )
        )
    write(rows, options)


def write(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Writes the figures, the table and the picture."""
    title = f"{Path(options.config).stem} on {options.devices}"
    how = "by formula" if options.formula else "compiled ahead of time"
    facts = {"config": str(options.config), "devices": options.devices, "date": str(datetime.date.today()), "how": how}
    figures = facts | {"rows": [dataclasses.asdict(row) for row in rows]}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text("\n".join(table(rows)) + "\n", encoding="utf-8")
    _draw(rows, f"{title}, planned ({how}), {facts['date']}", options.out.with_suffix(".png"))


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| lever | longest row | device GiB | host GiB | s a step |", "|---|---|---|---|---|"]
    for row in rows:
        seconds = "-" if row.step_seconds is None else f"{row.step_seconds:.3g}"
        sizes = f"{row.memory / 2**30:.1f} | {row.host_memory / 2**30:.1f}"
        lines.append(f"| {row.lever} | {row.longest:,} | {sizes} | {seconds} |")
    return lines


def _draw(rows: Sequence[Row], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 0.6 * len(rows) + 1.4), layout="constrained")
    bars = axis.barh([row.lever for row in rows], [row.longest for row in rows], color="C0")
    axis.bar_label(bars, [f"{row.longest:,}" for row in rows], padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.set_xlabel("tokens of the longest row that fits")
    axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())

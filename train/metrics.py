"""What a run records: metrics.jsonl, TensorBoard events and loss.png."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """How often metrics are recorded, and in which forms beside metrics.jsonl."""

    every: int = 10
    """Steps between records of the training metrics."""
    tensorboard: bool = True
    """Also write TensorBoard events, under tensorboard in run_dir."""
    plot: bool = True
    """Also draw loss.png in run_dir, at every evaluation and at the end."""

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every: got {self.every}, wanted 1 or more")


class MetricsLog:
    """The records of a run; only process 0 writes.

    Opening drops what lies after `step`, so that a run resumed from an older checkpoint logs no step twice.

    Args:
      run_dir: The run's folder; made if it is not there.
      config: Which forms to write.
      step: The step the run starts or resumes from.
    """

    def __init__(self, run_dir: str | Path, config: MetricsConfig, *, step: int):
        self.path = Path(run_dir) / "metrics.jsonl"
        self._file = self._events = None
        self._plot = config.plot and jax.process_index() == 0
        if jax.process_index() != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        drop_records_after(self.path, step)
        self._file = self.path.open("a", encoding="ascii")
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one record; numbers that are not finite become null, which JSON can hold."""
        if self._file is None:
            return
        record = {"step": step} | {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._events.add_scalar(name, value, step)

    def draw(self) -> None:
        """Rewrites loss.png from metrics.jsonl."""
        if self._plot:
            draw_losses({"": read_records(self.path)}, self.path.with_name("loss.png"))

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a crash cut short is left out."""
    records = []
    for line in path.read_text(encoding="ascii").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def drop_records_after(path: Path, step: int) -> None:
    """Rewrites a metrics.jsonl, atomically, without the records after a step."""
    if not path.exists():
        return
    kept = [record for record in read_records(path) if record["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="ascii")
    os.replace(temporary, path)


def draw_losses(runs: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Training and held-out loss (nats a token) and bits per byte against the step, as a PNG; atomic.

    Args:
      runs: The records of each run by the name that the legend gives it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name, label in zip(
        figure.subplots(1, 2),
        ("loss", "bits_per_byte"),
        ("loss (nats a token)", "bits per byte"),
        strict=True,
    ):
        for i, (run, records) in enumerate(runs.items()):
            for place, (key, split, style) in enumerate(
                [(name, "training", {"linewidth": 1}), (f"eval/{name}", "held out", {"marker": "o", "markersize": 4})]
            ):
                points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
                if points:
                    # A colour for each run, or of one run for each of its splits.
                    color = f"C{i if len(runs) > 1 else place}"
                    axes.plot(*zip(*points, strict=True), color=color, label=f"{run} {split}".strip(), **style)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=100)
    os.replace(temporary, path)

"""What a run records: metrics.jsonl, TensorBoard events and loss.png."""

import contextlib
import importlib.util
import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from train.files import GoneError, naming, write_text, write_whole
from train.schema import ConfigError


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; needs the package wandb."""

    project: str
    """Name of the project that the run is shown in."""
    name: str | None = None
    """Name of the run. Default: one that Weights & Biases makes up."""
    mode: Literal["online", "offline"] = "online"
    """`online` sends each record; `offline` writes them under wandb in run_dir, for `wandb sync` to send."""

    def __post_init__(self):
        if not self.project:
            raise ValueError("project: got empty text, wanted the name of a project")


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """How often metrics are recorded, and in which forms beside metrics.jsonl."""

    every: int = 10
    """Steps between records of the training metrics."""
    tensorboard: bool = True
    """Also write TensorBoard events, under tensorboard in run_dir."""
    plot: bool = True
    """Also draw loss.png in run_dir, at every evaluation and at the end."""
    wandb: WandbConfig | None = None
    """Also log to Weights & Biases. Null: do not."""

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every: got {self.every}, wanted 1 or more")

    def check_installed(self) -> None:
        """Raises ConfigError where a form is asked for whose package is not there."""
        if self.wandb is not None and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                f"metrics.wandb: got project {self.wandb.project!r}, wanted the package wandb to be installed; run "
                "`python -m pip install wandb`, or leave metrics.wandb out"
            )


class MetricsLog:
    """The records of a run; only process 0 writes.

    Opening drops what lies after `step`, so that a run resumed from an older checkpoint logs no step twice.

    Args:
      run_dir: The run's folder; made if it is not there.
      config: Which forms to write.
      step: The step the run starts or resumes from.
      settings: The run's config as plain data, for Weights & Biases to show.
    """

    def __init__(
        self, run_dir: str | Path, config: MetricsConfig, *, step: int, settings: Mapping[str, Any] | None = None
    ):
        self.path = Path(run_dir) / "metrics.jsonl"
        self._config = config
        self._file = self._events = self._wandb = None
        self._plot = config.plot and jax.process_index() == 0
        if jax.process_index() != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if config.wandb is not None:
            self._wandb = _wandb_run(self.path.parent, config.wandb, settings or {})
        self._open(step)

    def _open(self, step: int) -> None:
        drop_records_after(self.path, step)
        self._file = self.path.open("a", encoding="ascii")
        if self._config.tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self.path.with_name("tensorboard")), purge_step=step + 1)

    def rewind(self, step: int) -> None:
        """Drops the records after a step, which the run has gone back to."""
        if self._file is not None:
            self._close_files()
            self._open(step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one record; numbers that are not finite become null, which JSON can hold."""
        if self._file is None:
            return
        record = {"step": step} | {name: _plain(value) for name, value in values.items()}
        with naming(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if not self.path.exists():  # what was deleted can be written to as long as it is open
            raise GoneError(
                f"{self.path.parent}: was moved or deleted while the run wrote to it; move it back, then run the same "
                "command again"
            )
        if self._events is not None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({name: value for name, value in record.items() if value is not None})

    def draw(self) -> None:
        """Rewrites loss.png from metrics.jsonl."""
        if self._plot:
            draw_losses({"": read_records(self.path)}, self.path.with_name("loss.png"))

    def close(self) -> None:
        """Flushes and closes the files."""
        self._close_files()
        if self._wandb is not None:
            self._wandb.finish()

    def _close_files(self) -> None:
        if self._file is not None:
            with naming(self.path):
                self._file.close()
        if self._events is not None:
            self._events.close()


def _wandb_run(run_dir: Path, config: WandbConfig, settings: Mapping[str, Any]) -> Any:
    """The run at Weights & Biases, the same one each time that this run goes on.

    Raises: ConfigError where it cannot be started, such as without a key.
    """
    import wandb

    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:12], encoding="ascii")
    try:
        run = wandb.init(
            project=config.project,
            name=config.name,
            id=id_file.read_text(encoding="ascii").strip(),
            resume="allow",
            mode=config.mode,
            dir=str(run_dir),
            config=dict(settings),
        )
    except wandb.Error as error:
        raise ConfigError(
            f"metrics.wandb: got mode={config.mode}, but Weights & Biases does not start "
            f"({' '.join(str(error).split())}); run `wandb login`, or set metrics.wandb.mode=offline"
        ) from error
    # By the step of the record: its own count could not go back, as a run does that is resumed or rewound.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; lines that are none are left out, such as the last, which a crash cut short."""
    records = []
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record:
                records.append(record)
    return records


def drop_records_after(path: Path, step: int) -> None:
    """Rewrites a metrics.jsonl, atomically, without the records after a step."""
    if not path.exists():
        return
    kept = [record for record in read_records(path) if record["step"] <= step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


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
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))

"""What models learned, for reading: a Markdown page and a picture, from what the JSON file holds."""

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.learning_cases import BASELINE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """An evaluation during training, on rows of the trained length."""

    step: int
    seconds: float
    loss: float
    exact_match: float


@dataclasses.dataclass(kw_only=True)
class Learned:
    """A model, and what it learned.

    Attributes:
      mixers: Names of the mixers, as layers have them in turn.
      num_parameters: All of them.
      kernels: The op and implementation of each call in a training step.
      problem: Why it was not trained to the end; None where it was.
      step_ms: Of a training step, median, 10th and 90th percentile.
      tokens_per_second: Of whole rows.
      curve: Evaluations during training; seconds are those of training alone.
      scores: By length of the rows, every `eval/` metric after training.
    """

    mixers: str
    num_parameters: int = 0
    kernels: tuple[str, ...] = ()
    problem: str | None = None
    step_ms: tuple[float, float, float] | None = None
    tokens_per_second: float | None = None
    curve: list[Point] = dataclasses.field(default_factory=list)
    scores: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    def reached(self, bar: float) -> Point | None:
        """The first evaluation with so many answers right."""
        return next((point for point in self.curve if point.exact_match >= bar), None)


@dataclasses.dataclass(kw_only=True)
class Comparison:
    """A run: where it ran, what was trained, and what came of it."""

    task: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    config: dict[str, Any]
    seq_len: int
    bar: float
    models: list[Learned] = dataclasses.field(default_factory=list)

    @property
    def void(self) -> str | None:
        """Why the comparison says nothing of other mixers; None where it does."""
        baseline = next((model for model in self.models if model.mixers == BASELINE), None)
        if baseline is None:
            return f"no softmax baseline ({BASELINE}) was trained beside them"
        if baseline.problem is not None:
            return f"the softmax baseline was not trained to the end: {baseline.problem}"
        reached = baseline.scores[self.seq_len]["eval/exact_match"]
        if reached < self.bar:
            return f"the softmax baseline gets {reached:.1%} of the answers right, wanted {self.bar:.0%}"
        return None


def write(comparison: Comparison, stem: Path) -> list[Path]:
    """Writes JSON, Markdown and, where matplotlib is installed, PNG, over what is there; returns their paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("json", "md", "png")]
    values = {**dataclasses.asdict(comparison), "void": comparison.void}
    paths[0].write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    has_picture = importlib.util.find_spec("matplotlib") is not None
    paths[1].write_text(markdown(comparison, picture=paths[2].name if has_picture else None), encoding="utf-8")
    if has_picture:
        draw(comparison, paths[2])
        return paths
    return paths[:2]


def read_json(path: Path) -> Comparison:
    """What `write` wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    del values["void"]
    models = [
        Learned(
            **{
                **model,
                "curve": [Point(**point) for point in model["curve"]],
                "scores": {int(length): scores for length, scores in model["scores"].items()},
            }
        )
        for model in values.pop("models")
    ]
    return Comparison(models=models, **values)


def markdown(comparison: Comparison, *, picture: str | None) -> str:
    """The page: what was trained on what, the verdict, and the tables."""
    machine = comparison.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lengths = sorted({length for model in comparison.models for length in model.scores})
    verdict = (
        "Valid: the softmax baseline is above its bar." if comparison.void is None else f"**Void**: {comparison.void}."
    )
    lines = [
        f"# Learning {comparison.task}: {machine['device']}, {machine['date']}",
        "",
        f"{machine['device']}; {versions}; Python {machine['python']}. Commit {machine['commit']}.",
        "",
        f"Settings: {', '.join(f'{name} {value}' for name, value in comparison.settings.items())}. The models differ "
        f"in their mixers alone, and see the same rows of {comparison.seq_len:,} tokens in the same order. An answer "
        "is right if each of its tokens is the one that the model scores highest: what greedy decoding would write. "
        f"Steps and seconds are those of training until {comparison.bar:.0%} of the held-out answers of the trained "
        "length are right, evaluations and compilation left out.",
        "",
        verdict,
    ]
    if picture is not None:
        lines += ["", f"![{comparison.task}]({picture})"]
    head = [
        "mixers",
        "parameters",
        "ms a step",
        "tokens/s",
        f"steps to {comparison.bar:.0%}",
        "seconds",
        "steps in all",
    ]
    head += [f"right at {length:,}" for length in lengths]
    lines += ["", _line(*head), "|---" * len(head) + "|"]
    lines += [_of_model(model, comparison.bar, lengths) for model in comparison.models if model.problem is None]
    lines += _groups([model for model in comparison.models if model.problem is None], comparison.seq_len)
    failed = [model for model in comparison.models if model.problem is not None]
    if failed:
        lines += ["", "## Not trained to the end", "", "| mixers | why |", "|---|---|"]
        lines += [_line(model.mixers, model.problem.replace("|", "\\|")) for model in failed]
    return "\n".join(lines) + "\n"


def _of_model(model: Learned, bar: float, lengths: Sequence[int]) -> str:
    reached = model.reached(bar)
    low_to_high = "" if model.step_ms is None else "{:.3g} ({:.3g} - {:.3g})".format(*model.step_ms)
    return _line(
        model.mixers,
        f"{model.num_parameters:,}",
        low_to_high,
        "" if model.tokens_per_second is None else f"{model.tokens_per_second:,.0f}",
        "never" if reached is None else f"{reached.step:,}",
        "" if reached is None else f"{reached.seconds:.1f}",
        f"{model.curve[-1].step:,}",
        *(f"{model.scores[length]['eval/exact_match']:.1%}" if length in model.scores else "" for length in lengths),
    )


def _groups(models: Sequence[Learned], seq_len: int) -> list[str]:
    """A table of the groups of answers at the trained length; nothing where there is one group."""
    prefix = "eval/exact_match/"
    groups = dict.fromkeys(key for model in models for key in model.scores.get(seq_len, {}) if key.startswith(prefix))
    if not groups:
        return []
    names = [group.removeprefix(prefix).replace("_", " ") for group in groups]
    lines = [
        "",
        f"## Right at {seq_len:,} tokens, by group",
        "",
        _line("mixers", *names),
        "|---" * (len(names) + 1) + "|",
    ]
    for model in models:
        scores = model.scores.get(seq_len, {})
        lines.append(_line(model.mixers, *(f"{scores[group]:.1%}" if group in scores else "" for group in groups)))
    return lines


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def draw(comparison: Comparison, path: Path) -> None:
    """Answers right against steps, against seconds, and by length after training; a colour a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_second, by_length = figure.subplots(1, 3, sharey=True)
    for number, model in enumerate(comparison.models):
        style = {"color": f"C{number}", "marker": "o", "markersize": 3, "label": model.mixers}
        right = [point.exact_match for point in model.curve]
        by_step.plot([point.step for point in model.curve], right, **style)
        by_second.plot([point.seconds for point in model.curve], right, **style)
        lengths = sorted(model.scores)
        by_length.plot(lengths, [model.scores[length]["eval/exact_match"] for length in lengths], **style)
    for axes, label in ((by_step, "step"), (by_second, "seconds of training"), (by_length, "tokens of a row")):
        axes.axhline(comparison.bar, color="gray", linestyle=":")
        axes.set(xlabel=label, ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    by_length.set_xscale("log", base=2)
    by_length.axvline(comparison.seq_len, color="gray", linestyle=":")
    by_step.set_ylabel("answers right")
    by_step.set_title(f"{comparison.task}, {comparison.machine['device']}, {comparison.machine['date']}")
    if comparison.models:
        by_step.legend(fontsize=8)
    figure.savefig(path, dpi=130)

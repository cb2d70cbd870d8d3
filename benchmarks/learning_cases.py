"""The tasks that models are trained on to compare their mixers, and the mixers, as data."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from longctx.mixers import MixerConfig
from train import schema
from train.config import TrainConfig, load_config
from train.plain_yaml import apply_overrides

BASELINE = "attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained for, and when a comparison says anything.

    Attributes:
      config: The run, with one mixer, of the softmax baseline.
      bar: Share of the answers at the trained length that the baseline must get right, or the comparison is void.
      others: Lengths to evaluate at too, relative to the trained one.
    """

    config: str
    bar: float
    others: tuple[float, ...]


TASKS = {
    "passkey": Task(config="configs/passkey.yaml", bar=0.90, others=(0.25, 2)),
    "mqar": Task(config="configs/mqar.yaml", bar=0.95, others=(2,)),
}

# How a mixer differs from the config's: what is not said here it has of that one, or by its own defaults. A name that
# is not here is a kind.
MIXERS: dict[str, dict[str, Any]] = {
    "attention": {},
    "window": {"kind": "attention", "window": 64},
    "moba": {"kind": "moba", "chunk_size": 256, "top_k": 4},
    "taylor": {"kind": "linear", "feature_map": "taylor2", "head_dim": 16},
}


def task_config(
    task: Task, *, config: str | None = None, seq_len: int | None = None, overrides: Sequence[str] = ()
) -> TrainConfig:
    """The baseline's run.

    Args:
      config: Another file than the task's.
      seq_len: Tokens of a row, where not the file's.
      overrides: `a.b=c`.
    Raises: ValueError where the file or an override is wrong, or the model has more than one mixer.
    """
    loaded = load_config(task.config if config is None else config, overrides)
    if len(loaded.model.mixers) != 1:
        raise ValueError(
            f"model.mixers: got {', '.join(loaded.model.mixers)}, wanted one, in whose place others are put; leave one"
        )
    return loaded if seq_len is None else with_seq_len(loaded, seq_len)


def with_seq_len(config: TrainConfig, seq_len: int, *, held_out_only: bool = False) -> TrainConfig:
    """The run with rows of another length.

    Of each source whose documents are generated, those that filled a row fill one again, and none is longer than that.

    Args:
      held_out_only: Whether to leave out what is trained on.
    """
    plain = schema.to_dict(config)
    data = plain["data"]
    if held_out_only:
        data["sources"] = data["held_out_sources"]
    most, filled = seq_len - 1, data["seq_len"] - 1
    data["seq_len"] = seq_len
    for source in (*data["sources"], *data["held_out_sources"]):
        for name in ("min_length", "max_length"):
            if name in source:
                source[name] = most if source[name] == filled else min(source[name], most)
    return schema.parse(TrainConfig, plain)


def with_mixers(
    config: TrainConfig, spec: str, overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> TrainConfig:
    """The run with other mixers in the place of its own.

    Args:
      spec: A name, or several joined by `+`, which layers have in turn.
      overrides: Of names, what differs from MIXERS.
    Raises: ValueError where a name is unknown, or a setting wrong.
    """
    (own,) = config.model.mixers.values()
    settings = {"kind": own.kind, **schema.to_dict(own)}
    plain = schema.to_dict(config)
    names = spec.split("+")
    plain["model"]["pattern"] = names
    plain["model"]["mixers"] = {
        name: _mixer(name, settings, (overrides or {}).get(name, {})) for name in dict.fromkeys(names)
    }
    return schema.parse(TrainConfig, plain)


def mixer_overrides(texts: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Of `a.b=c` those that begin with `mixers.`, by name, and the others."""
    of_mixers = [text.removeprefix("mixers.") for text in texts if text.startswith("mixers.")]
    return apply_overrides({}, of_mixers), [text for text in texts if not text.startswith("mixers.")]


def _mixer(name: str, own: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    given = {**MIXERS.get(name, {"kind": name}), **overrides}
    kinds = MixerConfig.variants()
    kind = given.get("kind", own["kind"])
    if kind not in kinds:
        known = ", ".join(dict.fromkeys((*MIXERS, *kinds)))
        raise ValueError(f"--mixers: got {name!r}, wanted some of {known}, joined by + where layers differ")
    if kind == own["kind"]:
        return {**own, **given}
    # Which implementation serves one mechanism says nothing of another, nor does what one does not have.
    of_kind = set(schema.fields_of(kinds[kind])) - {"implementation"}
    shared = {key: value for key, value in own.items() if key in of_kind and value is not None}
    return {"kind": kind, **shared, **given}

"""A Hugging Face config.json as a `model:` section: what it may say, and what it says of the layers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic

from train.schema import ConfigError

# What a config.json holds beside the model's maths.
_SAYS_NOTHING = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attn_implementation", "bos_token_id",
    "chunk_size_feed_forward", "do_sample", "dtype", "eos_token_id", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "is_llama_config", "keys_to_ignore_at_inference", "label2id", "max_length", "model_type",
    "name_or_path", "num_labels", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "problem_type", "return_dict", "temperature", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "unk_token_id", "use_bfloat16", "use_cache",
})  # fmt: skip

# Fields with the only values at which they leave the maths to what `model:` can say.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "auto_map": (None,),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
}

DEFAULT_THETA = 10_000.0  # where no field says another, in all families
_PLAIN_ROPE = (None, "default")
_SCALED_ROPE = ("linear", "llama3", "yarn")
_YARN_TURNS = {"beta_slow": 1.0, "beta_fast": 32.0}


class Family(pydantic.BaseModel):
    """The fields of a config.json that say what is computed; FAMILIES has a class, of Hugging Face's name, for each
    `model_type`."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    qkv_bias: ClassVar[bool] = False
    """Whether queries, keys and values have biases; no other projection has."""
    qk_norm: ClassVar[bool] = False
    """Whether each head of queries and keys is normalised."""

    vocab_size: pydantic.PositiveInt
    hidden_size: pydantic.PositiveInt
    intermediate_size: pydantic.PositiveInt
    num_hidden_layers: pydantic.PositiveInt
    num_attention_heads: pydantic.PositiveInt
    num_key_value_heads: pydantic.PositiveInt | None = None
    head_dim: pydantic.PositiveInt | None = None
    max_position_embeddings: pydantic.PositiveInt
    rms_norm_eps: pydantic.PositiveFloat
    tie_word_embeddings: bool = False
    attention_dropout: float | None = 0.0
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None

    @property
    def windows(self) -> list[int | None]:
        """Of each layer: how many tokens a token sees, itself included; None for all before it."""
        return [None] * self.num_hidden_layers


class Llama(Family):
    """Llama 1 to 3.2, and what has its architecture."""

    sliding_window: None = None
    layer_types: list[Literal["full_attention"]] | None = None


class Mistral(Family):
    """Mistral 7B and what has its architecture: a window of all layers, or none."""

    num_key_value_heads: pydantic.PositiveInt
    sliding_window: pydantic.PositiveInt | None = 4096

    @property
    def windows(self) -> list[int | None]:
        return [self.sliding_window] * self.num_hidden_layers


class _WindowsByLayer(Family):
    num_key_value_heads: pydantic.PositiveInt
    use_sliding_window: bool = False
    sliding_window: pydantic.PositiveInt | None = 4096
    max_window_layers: int = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None

    @pydantic.model_validator(mode="after")
    def _check_layer_types(self):
        if self.layer_types is None:
            return self
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types: got {len(self.layer_types)} of them, wanted one for each of num_hidden_layers="
                f"{self.num_hidden_layers}"
            )
        if "sliding_attention" in self.layer_types and self._window is None:
            raise ValueError("layer_types: got sliding_attention, wanted use_sliding_window and sliding_window with it")
        return self

    @property
    def _window(self) -> int | None:
        return self.sliding_window if self.use_sliding_window else None

    @property
    def windows(self) -> list[int | None]:
        if self.layer_types is not None:
            return [self._window if kind == "sliding_attention" else None for kind in self.layer_types]
        return [self._window if layer >= self.max_window_layers else None for layer in range(self.num_hidden_layers)]


class Qwen2(_WindowsByLayer):
    """Qwen 2 and 2.5."""

    qkv_bias: ClassVar[bool] = True


class Qwen3(_WindowsByLayer):
    """Qwen 3, the dense ones."""

    qk_norm: ClassVar[bool] = True

    head_dim: pydantic.PositiveInt = 128


FAMILIES: dict[str, type[Family]] = {"llama": Llama, "mistral": Mistral, "qwen2": Qwen2, "qwen3": Qwen3}
"""By `model_type`, the plainest first."""


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises: ConfigError where there is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; pass the folder of a Hugging Face model, which has one") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}; download it again") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got a {type(data).__name__}, wanted an object with keys; download it again")
    return data


def parse_family(data: Mapping[str, Any], *, source: str) -> Family:
    """What a config.json says of the maths.

    Args:
      data: Its content.
      source: What errors call it.
    Raises: ConfigError, a line a problem: fields that are not known, or say what `model:` cannot.
    """
    model_type = data.get("model_type")
    if model_type not in list(FAMILIES):
        raise ConfigError(
            f"{source}: model_type: got {model_type!r}, wanted one of {', '.join(FAMILIES)}; only their maths is what "
            "`model:` can say, convert a model of these"
        )
    problems, fields = [], {}
    for name, value in data.items():
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                wanted = " or ".join(json.dumps(neutral) for neutral in _NEUTRAL[name])
                problems.append(
                    f"{source}: {name}: got {json.dumps(value)}, wanted {wanted}; `model:` cannot say another, convert "
                    "a model without it"
                )
        elif name not in _SAYS_NOTHING:
            fields[name] = value
    family = FAMILIES[model_type]
    try:
        parsed = family.model_validate(fields)
    except pydantic.ValidationError as error:
        problems += [f"{source}: {_problem(found, model_type)}" for found in error.errors(include_url=False)]
    if problems:
        raise ConfigError(*problems)
    return parsed


def model_section(family: Family, *, dtype: str, source: str) -> dict[str, Any]:
    """The `model:` section of the same model, as plain data.

    Args:
      family: From `parse_family`.
      dtype: Compute dtype.
      source: What errors call the config.json.
    Raises: ConfigError where its rotary positions are not what `model:` can say.
    """
    theta, scaling = _rotary(family, source)
    mixer = {"kind": "attention", "num_heads": family.num_attention_heads}
    if family.num_key_value_heads is not None:
        mixer["num_kv_heads"] = family.num_key_value_heads
    if family.head_dim is not None:
        mixer["head_dim"] = family.head_dim
    mixer["rope_theta"] = theta
    if scaling is not None:
        mixer["rope_scaling"] = scaling
    if family.qkv_bias:
        mixer["qkv_bias"] = True
    if family.qk_norm:
        mixer["qk_norm"] = True
    if family.attention_dropout:
        mixer["dropout"] = family.attention_dropout
    windows = family.windows
    names = {window: "attention" if window is None else "window" for window in windows}
    return {
        "vocab_size": family.vocab_size,
        "dim": family.hidden_size,
        "num_layers": family.num_hidden_layers,
        "mlp_dim": family.intermediate_size,
        "mixers": {name: mixer | ({} if window is None else {"window": window}) for window, name in names.items()},
        "pattern": _period([names[window] for window in windows]),
        "tie_embeddings": family.tie_word_embeddings,
        "norm_eps": family.rms_norm_eps,
        "dtype": dtype,
        "param_dtype": "float32",
    }


def _rotary(family: Family, source: str) -> tuple[float, dict[str, Any] | None]:
    """Base and `rope_scaling`, written either way: as `rope_theta` and `rope_scaling`, or as `rope_parameters`."""
    if family.rope_scaling and family.rope_parameters:
        raise ConfigError(f"{source}: got rope_scaling and rope_parameters, wanted one of them; leave one out")
    name = "rope_parameters" if family.rope_parameters else "rope_scaling"
    given = dict(family.rope_parameters or family.rope_scaling or {})
    theta = given.pop("rope_theta", family.rope_theta)
    kind = given.pop("rope_type", given.pop("type", None))
    if kind not in _PLAIN_ROPE + _SCALED_ROPE:
        raise ConfigError(
            f"{source}: {name}: got rope_type {kind!r}, wanted default, linear, llama3 or yarn; `model:` cannot say "
            "another, convert a model without it"
        )
    scaling = None if kind in _PLAIN_ROPE else _scaling(kind, given, default_length=family.max_position_embeddings)
    if given.get("partial_rotary_factor") in _NEUTRAL["partial_rotary_factor"]:
        given.pop("partial_rotary_factor", None)
    if given:
        raise ConfigError(
            f"{source}: {name}: got {json.dumps(given)}, which rope_type {kind} has no use for here; `model:` cannot "
            "say it, convert a model without it"
        )
    return DEFAULT_THETA if theta is None else theta, scaling


def _scaling(kind: str, given: dict[str, Any], *, default_length: int) -> dict[str, Any]:
    """The `rope_scaling` of a kind; takes what it reads out of `given`, and leaves out what is not there."""
    section = {"kind": kind}
    if "factor" in given:
        section["factor"] = given.pop("factor")
    if kind == "linear":
        return section
    section["original_length"] = given.pop("original_max_position_embeddings", default_length)
    if kind == "llama3":
        turns = {"low_turns": "low_freq_factor", "high_turns": "high_freq_factor"}
        return section | {ours: given.pop(theirs) for ours, theirs in turns.items() if theirs in given}
    low, high = (given.pop(name, None) or default for name, default in _YARN_TURNS.items())
    section |= {"low_turns": low, "high_turns": high}
    if (factor := given.pop("attention_factor", None)) is not None:
        section["attention_factor"] = factor
    for name, neutral in (("truncate", True), ("mscale", None), ("mscale_all_dim", None)):
        if name in given and given[name] == neutral:
            del given[name]
    return section


def _period(names: Sequence[str]) -> list[str]:
    """The shortest pattern that repeated, the last time perhaps cut short, gives these names."""
    for length in range(1, len(names) + 1):
        if all(name == names[index % length] for index, name in enumerate(names)):
            return list(names[:length])
    return list(names)


def _problem(error: Mapping[str, Any], model_type: str) -> str:
    """One of pydantic's errors in our words."""
    name = ".".join(map(str, error["loc"]))
    got = json.dumps(error["input"], default=str)[:80]
    match error["type"]:
        case "extra_forbidden":
            return (
                f"{name}: got {got}, a field that is not known of model_type {model_type}; if it does not change what "
                "is computed, take it out of the file"
            )
        case "missing":
            return f"{name}: missing; wanted a value, as Hugging Face writes it"
        case "value_error":
            return str(error["ctx"]["error"])
    return f"{name}: got {got}: {error['msg'][:1].lower()}{error['msg'][1:]}"

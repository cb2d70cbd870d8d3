"""A `model:` section as a Hugging Face config.json: which architecture computes the same, or why none does."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from longctx.mixers.attention import AttentionConfig
from longctx.model import ModelConfig
from longctx.rope_scaling import LinearRopeScaling, Llama3RopeScaling, RopeScaling, YarnRopeScaling
from train.convert.config_json import FAMILIES, Family, Llama, Mistral
from train.schema import ConfigError

# Options of a mixer that no architecture has, with the only value that leaves them out.
_ABSENT = {"chunk": None, "logits_soft_cap": None, "bias": None, "sinks": False}
# Those that all layers of an architecture share.
_SHARED = ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "rope_scaling", "qk_norm", "qkv_bias", "dropout")
_LEAVE = "no Hugging Face architecture that is known here has it; train a model without it to hand it on"


def config_json(
    model: ModelConfig, *, dtype: str, max_positions: int, special_ids: dict[str, Any], model_type: str | None = None
) -> dict[str, Any]:
    """The config.json of the architecture that computes what a model does, as `transformers` 4 and 5 read it.

    Args:
      model: Its vocab_size is set. `lora` is not looked at.
      dtype: That of the weights.
      max_positions: Tokens of the longest contexts that the model is for.
      special_ids: `bos_token_id`, `eos_token_id` and `pad_token_id`, those that are known.
      model_type: The architecture; None takes the plainest that will do.
    Raises: ConfigError, a line a problem, where none computes the same.
    """
    mixer = _shared_mixer(model)
    windows = [model.mixers[name].window for name in model.layers]
    refusals = {name: list(_refusals(FAMILIES[name], model, mixer, windows)) for name in FAMILIES}
    candidates = FAMILIES if model_type is None else [model_type]
    chosen = next((name for name in candidates if not refusals[name]), None)
    if chosen is None:
        others = [name for name in FAMILIES if not refusals[name]]
        what = "model: no Hugging Face architecture that is known here computes what its layers do; train one of these"
        if others:
            what = f"--architecture: got {model_type}, which does not compute what the model does, wanted {others[0]}"
        raise ConfigError(what, *(f"{name}: {reason}" for name in candidates for reason in refusals[name]))
    family = FAMILIES[chosen]
    config = {
        "architectures": [f"{family.__name__}ForCausalLM"],
        "model_type": chosen,
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.mlp_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": mixer.dropout,
        # `rope_parameters`, which transformers 5 writes, would be passed over by 4, which would take base 10000.
        "rope_theta": mixer.rope_theta,
        "rope_scaling": _rope_scaling(mixer.rope_scaling),
        "torch_dtype": dtype,
        "use_cache": True,
        **{name: special_ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    if family is Llama:
        return config | {"attention_bias": False, "mlp_bias": False}
    if family is Mistral:
        return config | {"sliding_window": windows[0]}
    window = next((window for window in windows if window is not None), None)
    return (
        config
        | {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": next((i for i, window in enumerate(windows) if window is not None), model.num_layers),
            "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        }
        | ({"attention_bias": False} if family.qk_norm else {})
    )


def _shared_mixer(model: ModelConfig) -> AttentionConfig:
    """The mixer of all layers, but for their windows.

    Raises: ConfigError where layers have mixers, or options, that no architecture has.
    """
    problems = []
    if model.logits_soft_cap is not None:
        problems.append(f"model.logits_soft_cap: got {model.logits_soft_cap}, wanted null; {_LEAVE}")
    for name, mixer in model.mixers.items():
        if not isinstance(mixer, AttentionConfig):
            problems.append(f"model.mixers.{name}.kind: got {mixer.kind}, wanted attention; {_LEAVE}")
            continue
        for option, absent in _ABSENT.items():
            if (value := getattr(mixer, option)) != absent:
                got = getattr(value, "kind", value)
                problems.append(f"model.mixers.{name}.{option}: got {got}, wanted {json.dumps(absent)}; {_LEAVE}")
        if mixer.rope_theta is None:
            problems.append(
                f"model.mixers.{name}.rope_theta: got null, wanted a number: the known architectures have rotary "
                "positions in all layers; train a model with them to hand it on"
            )
    if problems:
        raise ConfigError(*problems)
    (first_name, first), *others = ((name, mixer.resolved(model.dim)) for name, mixer in model.mixers.items())
    for name, mixer in others:
        for option in _SHARED:
            if getattr(mixer, option) != getattr(first, option):
                problems.append(
                    f"model.mixers.{name}.{option}: got {getattr(mixer, option)}, wanted {getattr(first, option)} as "
                    f"{first_name} has; layers of the known architectures differ in their windows at most"
                )
    if problems:
        raise ConfigError(*problems)
    return first


def _refusals(
    family: type[Family], model: ModelConfig, mixer: AttentionConfig, windows: list[int | None]
) -> Iterator[str]:
    """Why this architecture does not compute what the model does."""
    for option in ("qkv_bias", "qk_norm"):
        got, wanted = getattr(mixer, option), getattr(family, option)
        if got != wanted:
            yield f"{option}: got {json.dumps(got)}, wanted {json.dumps(wanted)}, which is how this architecture is"
    distinct = set(windows)
    if family is Llama and distinct != {None}:
        yield f"window: got {max(distinct - {None})}, wanted null: this architecture has no windows"
    elif family is Mistral and len(distinct) > 1:
        yield "window: got layers with and without one, wanted the same in all, which is how this architecture is"
    elif len(distinct - {None}) > 1:
        yield f"window: got {sorted(distinct - {None})}, wanted one size: this architecture has no other"
    if family is Llama and model.dim % mixer.num_heads:
        yield f"dim: got {model.dim}, wanted a multiple of num_heads={mixer.num_heads}, which Hugging Face checks here"


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    fields = {"rope_type": scaling.kind, "factor": scaling.factor}
    match scaling:
        case LinearRopeScaling():
            return fields
        case Llama3RopeScaling():
            turns = {"low_freq_factor": scaling.low_turns, "high_freq_factor": scaling.high_turns}
        case YarnRopeScaling():
            turns = {"beta_slow": scaling.low_turns, "beta_fast": scaling.high_turns}
            if scaling.attention_factor is not None:
                turns["attention_factor"] = scaling.attention_factor
        case _:
            raise ConfigError(f"rope_scaling: got {dataclasses.asdict(scaling)}; {_LEAVE}")
    return fields | turns | {"original_max_position_embeddings": scaling.original_length}

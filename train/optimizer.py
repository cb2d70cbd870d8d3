"""AdamW with warm-up, a decay schedule and clipping."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

_FINAL_LR_RATIO = 0.1
_SLOWEST_IN_BFLOAT16 = 0.99  # half a unit in the last place is at most 2^-8 of a number

UNDECAYED_NAMES = ("bias", "slopes", "table", "r1", "r2", "scale", "sinks", "theta", "dt_bias", "a_log", "skip")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its learning-rate schedule and gradient clipping."""

    learning_rate: float = 1e-3
    """Peak learning rate, reached at the end of the warm-up."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after the warm-up: cosine decay, a stable phase followed by a linear decay (wsd), or constant."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its peak; the first one uses peak /
    warmup_steps."""
    decay_steps: int | None = None
    """Length of the decay. Default: cosine, from the warm-up to the end of the run; wsd, its last tenth."""
    final_lr_ratio: float = _FINAL_LR_RATIO
    """Learning rate after the decay, as a fraction of the peak."""
    b1: float = 0.9
    """Decay rate of the running mean of the gradients."""
    b2: float = 0.95
    """Decay rate of the running mean of the squared gradients."""
    eps: float = 1e-8
    """Added to the root of the second moment, against division by zero."""
    weight_decay: float = 0.1
    """Decoupled weight decay. The vectors of a layer and learned speeds of turning are not decayed."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; a larger one is scaled down to it. Null switches clipping off."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype that both running means are kept in between steps, which compute in float32. bfloat16 halves their memory,
    and takes b1 and b2 up to 0.99: it would round away the smaller changes of slower means."""
    offload: bool = False
    """Whether the running means are kept in the host's memory, from where they come to the device for each update."""

    def __post_init__(self):
        for name in ("learning_rate", "eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted a number above 0")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted 0 <= {name} < 1")
        for name in ("warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted 0 or more")
        for name in ("b1", "b2"):
            if self.moments_dtype == "bfloat16" and getattr(self, name) > _SLOWEST_IN_BFLOAT16:
                raise ValueError(
                    f"moments_dtype: got bfloat16 with {name}={getattr(self, name)}, wanted at most "
                    f"{_SLOWEST_IN_BFLOAT16}, since smaller changes would be rounded away; lower it, or keep float32"
                )
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"final_lr_ratio: got {self.final_lr_ratio}, wanted a fraction between 0 and 1")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm: got {self.clip_norm}, wanted a number above 0, or null for no clipping")
        if self.decay_steps is not None and self.schedule == "constant":
            raise ValueError(
                f"decay_steps: got {self.decay_steps} with schedule=constant, which does not decay; remove decay_steps "
                "or choose schedule=cosine or wsd"
            )
        if self.final_lr_ratio != _FINAL_LR_RATIO and self.schedule == "constant":
            raise ValueError(
                f"final_lr_ratio: got {self.final_lr_ratio} with schedule=constant, which does not decay; remove "
                "final_lr_ratio or choose schedule=cosine or wsd"
            )
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"decay_steps: got {self.decay_steps}, wanted 1 or more, or null for the default")


def _decay_steps(config: OptimizerConfig, total_steps: int) -> int:
    default = max(1, total_steps // 10) if config.schedule == "wsd" else total_steps - config.warmup_steps
    return default if config.decay_steps is None else config.decay_steps


def make_schedule(config: OptimizerConfig, *, total_steps: int) -> Schedule:
    """The learning rate as a function of the number of updates made so far.

    With t = updates + 1 and w = warmup_steps: peak t / w for t <= w. Then, with p the fraction of the decay done and
    r = final_lr_ratio, cosine: peak (r + (1 - r) (1 + cos(pi p)) / 2); wsd: peak until total_steps - decay_steps, then
    peak (1 - (1 - r) p). By default the last step of the run has p = 1.

    Args:
      config: Shape and values.
      total_steps: Steps of the whole run.
    Raises: ValueError when warm-up and decay do not fit into the run.
    """
    _check_phases(config, total_steps)
    peak, ratio, warmup = config.learning_rate, config.final_lr_ratio, config.warmup_steps
    length = _decay_steps(config, total_steps)
    match config.schedule:
        case "constant":
            phases, boundaries = [optax.constant_schedule(peak)], []
        case "cosine":
            phases, boundaries = [optax.cosine_decay_schedule(peak, length, alpha=ratio)], []
        case "wsd":
            phases = [optax.constant_schedule(peak), optax.linear_schedule(peak, peak * ratio, length)]
            boundaries = [total_steps - length]
    if warmup:
        phases, boundaries = [optax.linear_schedule(0.0, peak, warmup), *phases], [warmup, *boundaries]
    joined = optax.join_schedules(phases, boundaries)
    return lambda updates: joined(updates + 1)


def _check_phases(config: OptimizerConfig, total_steps: int) -> None:
    if config.warmup_steps >= total_steps:
        raise ValueError(
            f"optimizer.warmup_steps: got {config.warmup_steps}, wanted fewer than training.steps={total_steps}; "
            "shorten the warm-up"
        )
    length = _decay_steps(config, total_steps)
    if config.schedule == "wsd" and config.warmup_steps + length > total_steps:
        raise ValueError(
            f"optimizer.decay_steps: got {length} after warmup_steps={config.warmup_steps}, wanted a sum of at most "
            f"training.steps={total_steps}; shorten one of them"
        )


def decayed(params: Any) -> Any:
    """Which parameters weight decay touches: a tree of bool.

    A parameter is decayed when it has two dims or more and its own name is none of UNDECAYED_NAMES.
    The name decides for vectors that a layer scan has stacked into [num_periods, D].
    """

    def is_decayed(path, leaf):
        return leaf.ndim >= 2 and getattr(path[-1], "key", None) not in UNDECAYED_NAMES

    return jax.tree.map_with_path(is_decayed, params)


def make_optimizer(config: OptimizerConfig, *, schedule: Schedule) -> optax.GradientTransformation:
    """Clipping, Adam, decoupled weight decay and the learning rate, in this order.

    Reference: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101, Algorithm 2.
    """
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    return optax.chain(
        clip,
        adam if config.moments_dtype == "float32" else _kept_in(jnp.dtype(config.moments_dtype), adam),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule),
    )


def _kept_in(dtype: jnp.dtype, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation that computes in float32, with the floats of its state kept in a narrower dtype."""

    def cast(state, wanted):
        return jax.tree.map(lambda x: x.astype(wanted) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)

"""The `retention` mixer: the multi-scale retention of RetNet."""

import dataclasses
import math
from typing import Any

from longctx.attention import check_heads
from longctx.feature_maps import Pointwise
from longctx.linear_attention import LinearAttention, StateShape
from longctx.mixers.recurrent import RecurrentConfig, check_sizes
from longctx.mixers.registry import register
from longctx.rotary import RotaryConfig


@register("retention")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RetentionConfig(RecurrentConfig):
    """Gated multi-scale retention within documents.

    o[t] = sum_s (q[t]^T k[s] / sqrt(H)) gamma_n^(t - s) v[s],  s <= t,  gamma_n = 1 - 2^(-5 - n),  n = 0 ... N - 1
    y = (swish(x W_g) * GroupNorm(o)) W_o

    q and k are rotated, which with the decay is xPos. The paper's further normalisations, by the sums of the decays and
    of the weights, are scales of a head's result, which its GroupNorm divides out.
    Reference: Sun et al., Retentive Network, arXiv:2307.08621, equations 5 (parallel), 6 (recurrent), 8 (gated).
    """

    head_dim: int | None = None
    """Dims of a query and of a key; null means dim / num_heads."""
    value_dim: int | None = None
    """Dims of a value; null means dim / num_heads. The paper's models have twice head_dim."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary frequencies; null leaves out rotary positions."""

    def __post_init__(self):
        check_heads(self.num_heads, self.num_heads, self.head_dim, rotary=self.rope_theta is not None)
        check_sizes(self, "value_dim")
        if self.rope_theta is not None and not self.rope_theta > 1:
            raise ValueError(f"rope_theta: got {self.rope_theta}, wanted null or a number > 1; 10000 is customary")

    def state(self, dim: int) -> StateShape:
        return StateShape(
            num_qk_heads=self.num_heads,
            num_heads=self.num_heads,
            key_dim=dim // self.num_heads if self.head_dim is None else self.head_dim,
            value_dim=dim // self.num_heads if self.value_dim is None else self.value_dim,
        )

    def num_projected(self, dim: int) -> int:
        state = self.state(dim)
        return self.num_heads * (2 * state.key_dim + 3 * state.value_dim)

    def layer(self, dim: int, **common: Any) -> LinearAttention:
        return LinearAttention(
            dim,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            feature_map=Pointwise("identity"),
            rotary=None if self.rope_theta is None else RotaryConfig(theta=self.rope_theta),
            log_decay=tuple(math.log1p(-(2.0 ** (-5 - n))) for n in range(self.num_heads)),
            output_norm="group",
            gate="swish",
            **common,
        )

"""The `regla` mixer: gated linear attention with bounded features and a refined gate."""

import dataclasses
import math
from typing import Any

from longctx.feature_maps import NormalizedExponential
from longctx.gla import GatedLinearAttention, gla_state
from longctx.linear_attention import StateShape, check_qk_heads
from longctx.mixers.recurrent import RecurrentConfig, check_sizes
from longctx.mixers.registry import register


@register("regla")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReglaConfig(RecurrentConfig):
    """Refined gated linear attention within documents: `GatedLinearAttention` with a refined gate.

    phi(x) = exp(x - max_i x_i);   scale = 1 / (e sqrt((e^2 - 1) H))

    Features are between 0 and 1, and the result is normalised by its root mean square, not by the sum of the weights.
    Without the maxima the scale makes the variance of a weight 1 where the H dims of q and k are independent and
    standard normal: exp(q_i + k_i) has variance e^4 - e^2. The gate is refined in place of a temperature.
    Reference: after Lu et al., ReGLA, arXiv:2502.01578: bounded exponential features, a norm and a refined gate; the
      matrices of low rank and the gate of the result are those of `gla`.
    """

    head_dim: int | None = None
    """Dims of a query and of a key; null means dim / (2 num_heads)."""
    value_dim: int | None = None
    """Dims of a value; null means dim / num_heads."""
    gate_rank: int = 16
    """Columns of the first of the two matrices that make the gates, and of those that make their refinement."""

    def __post_init__(self):
        check_qk_heads(self.num_heads, self.num_heads)
        check_sizes(self, "head_dim", "value_dim", "gate_rank")

    def state(self, dim: int) -> StateShape:
        return gla_state(dim, num_heads=self.num_heads, head_dim=self.head_dim, value_dim=self.value_dim)

    def num_projected(self, dim: int) -> int:
        state = self.state(dim)
        return self.num_heads * (2 * state.key_dim + 3 * state.value_dim) + 2 * self.gate_rank

    def num_inner(self, dim: int) -> int:
        return 2 * self.gate_rank * self.num_heads * self.state(dim).key_dim

    def layer(self, dim: int, **common: Any) -> GatedLinearAttention:
        return GatedLinearAttention(
            dim,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            feature_map=NormalizedExponential(),
            gate_rank=self.gate_rank,
            gate_temperature=1.0,
            refined=True,
            scale=1 / (math.e * math.sqrt((math.e**2 - 1) * self.state(dim).key_dim)),
            **common,
        )

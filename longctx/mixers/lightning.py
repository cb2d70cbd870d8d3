"""The `lightning` mixer: the linear attention of TransNormerLLM and MiniMax-01, with a fixed decay for each head."""

import dataclasses
from typing import Any, Literal, get_args

from longctx.arguments import check_choice
from longctx.feature_maps import Pointwise
from longctx.linear_attention import Gate, LinearAttention, StateShape, check_gate, check_qk_heads
from longctx.mixers.recurrent import RecurrentConfig, check_sizes
from longctx.mixers.registry import register

Slopes = Literal["geometric", "linear"]


@register("lightning")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LightningConfig(RecurrentConfig):
    """Gated linear attention within documents that decays by head and by depth.

    q, k = swish(x W_q), swish(x W_k);  v = x W_v      (q and k then turned by LRPE, if lrpe)
    o[t] = sum_s (q[t]^T k[s] / sqrt(H)) exp(-slope_n (1 - l / (L - 1)) (t - s)) v[s],  s <= t,  in layer l of L
    y = (gate(x W_g) * SimpleRMSNorm(o)) W_o

    Heads of small n forget soonest with geometric slopes, and last with linear ones; the last layer does not forget.
    Reference: Qin et al., TransNormerLLM, arXiv:2307.14995, section 3.1; Qin et al., Lightning Attention-2,
      arXiv:2401.04658; MiniMax, MiniMax-01, arXiv:2501.08313, section 2.2.
    """

    num_qk_heads: int | None = None
    """Query and key heads, a divisor of num_heads; null means as many as num_heads."""
    head_dim: int | None = None
    """Dims of a head: of a query, a key and a value; null means dim / num_heads."""
    slopes: Slopes = "geometric"
    """How fast head n of N decays in the first layer, by exp(-slope) a token: `geometric` slopes 2^(-8 (n + 1) / N), as
    the released models have; `linear` 8 n / N, as TransNormerLLM's paper writes."""
    decay_by_depth: bool = True
    """Whether decays fall with depth, linearly, to none in the last layer; false has those of the first in each."""
    lrpe: bool = False
    """Whether queries and keys are turned with the position at learned speeds (LRPE), which doubles their dims.
    TransNormerLLM has it in its first layer alone."""
    gate: Gate = "sigmoid"
    """What is done to the projection of the input that multiplies the result: `identity` as in TransNormerLLM,
    `sigmoid` as in MiniMax-01, `swish`."""

    def __post_init__(self):
        check_qk_heads(self.num_heads, self.num_heads if self.num_qk_heads is None else self.num_qk_heads)
        check_sizes(self, "head_dim")
        check_choice("slopes", self.slopes, get_args(Slopes))
        check_gate(self.gate)

    @property
    def uses_depth(self) -> bool:
        return self.decay_by_depth

    @property
    def log_decay(self) -> tuple[float, ...]:
        """Log of each head's decay in the first layer."""
        heads = range(self.num_heads)
        if self.slopes == "linear":
            return tuple(-8 * n / self.num_heads for n in heads)
        return tuple(-(2.0 ** (-8 * (n + 1) / self.num_heads)) for n in heads)

    def state(self, dim: int) -> StateShape:
        head_dim = dim // self.num_heads if self.head_dim is None else self.head_dim
        return StateShape(
            num_qk_heads=self.num_heads if self.num_qk_heads is None else self.num_qk_heads,
            num_heads=self.num_heads,
            key_dim=2 * head_dim if self.lrpe else head_dim,
            value_dim=head_dim,
        )

    def num_projected(self, dim: int) -> int:
        state = self.state(dim)
        return (2 * state.num_qk_heads + 3 * self.num_heads) * state.value_dim

    def layer(self, dim: int, **common: Any) -> LinearAttention:
        return LinearAttention(
            dim,
            num_heads=self.num_heads,
            num_qk_heads=self.num_qk_heads,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            feature_map=Pointwise("swish"),
            lrpe=self.lrpe,
            log_decay=self.log_decay,
            decay_by_depth=self.decay_by_depth,
            output_norm="rms",
            gate=self.gate,
            **common,
        )

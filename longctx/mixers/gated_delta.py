"""The `gated_delta` mixer: the delta rule on a state that decays, Gated DeltaNet."""

import dataclasses
from typing import Any

from longctx.context_parallel import ConvolutionShape
from longctx.delta import DeltaNet
from longctx.linear_attention import StateShape, check_qk_heads, dims_of_head
from longctx.mixers.recurrent import RecurrentConfig, check_conv_size, check_sizes
from longctx.mixers.registry import register
from longctx.short_convolution import convolution_shape
from longctx.step_decay import check_dt_range


@register("gated_delta")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig(RecurrentConfig):
    """The gated delta rule within documents: `DeltaNet` with a decay for each head and token, and a gate of its result.

    q, k, v go through short convolutions and swish, q and k then have length 1. The paper's layers have values of twice
    head_dim, and num_heads head_dim = 3/4 dim.
    Reference: Yang et al., Gated Delta Networks, arXiv:2412.06464, section 3.4 and figure 1.
    """

    num_qk_heads: int | None = None
    """Query and key heads, a divisor of num_heads; null means as many as num_heads."""
    head_dim: int | None = None
    """Dims of a query and of a key; null means dim / num_heads."""
    value_dim: int | None = None
    """Dims of a value; null means dim / num_heads."""
    conv_size: int | None = 4
    """Tokens that a short convolution of queries, keys and values reads, itself among them; null leaves it out."""
    dt_min: float = 1e-3
    """Least step size that a head may start with; steps start uniform in their logarithm."""
    dt_max: float = 0.1
    """Greatest step size that a head may start with."""

    def __post_init__(self):
        check_qk_heads(self.num_heads, self.num_heads if self.num_qk_heads is None else self.num_qk_heads)
        check_sizes(self, "head_dim", "value_dim")
        check_conv_size(self.conv_size)
        check_dt_range(self.dt_min, self.dt_max)

    def state(self, dim: int) -> StateShape:
        return StateShape(
            num_qk_heads=self.num_heads if self.num_qk_heads is None else self.num_qk_heads,
            num_heads=self.num_heads,
            key_dim=dims_of_head("head_dim", self.head_dim, dim, self.num_heads),
            value_dim=dims_of_head("value_dim", self.value_dim, dim, self.num_heads),
            delta_rule=True,
        )

    def convolution(self, dim: int) -> ConvolutionShape | None:
        return convolution_shape(self.state(dim), self.conv_size)

    def num_projected(self, dim: int) -> int:
        state = self.state(dim)
        return 2 * state.num_qk_heads * state.key_dim + self.num_heads * (3 * state.value_dim + 2)

    def layer(self, dim: int, **common: Any) -> DeltaNet:
        return DeltaNet(
            dim,
            num_heads=self.num_heads,
            num_qk_heads=self.num_qk_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            decay=True,
            gate=True,
            conv_size=self.conv_size,
            dt_range=(self.dt_min, self.dt_max),
            **common,
        )

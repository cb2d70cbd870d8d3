"""The `gla` mixer: gated linear attention, whose state decays by a gate for each dim of the keys."""

import dataclasses
from typing import Any

from longctx.context_parallel import ConvolutionShape
from longctx.gla import GatedLinearAttention, check_gate_temperature, gla_state
from longctx.linear_attention import StateShape, check_qk_heads
from longctx.mixers.recurrent import RecurrentConfig, check_conv_size, check_sizes
from longctx.mixers.registry import register
from longctx.short_convolution import convolution_shape


@register("gla")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GlaConfig(RecurrentConfig):
    """Gated linear attention within documents: `GatedLinearAttention`.

    Reference: Yang et al., Gated Linear Attention Transformers, arXiv:2312.06635, section 4.4.
    """

    head_dim: int | None = None
    """Dims of a query and of a key; null means dim / (2 num_heads)."""
    value_dim: int | None = None
    """Dims of a value; null means dim / num_heads."""
    gate_rank: int = 16
    """Columns of the first of the two matrices that make the gates."""
    gate_temperature: float = 16.0
    """Divides the logarithm of the gates: the greater, the slower states decay at the start."""
    conv_size: int | None = None
    """Tokens that a short convolution of queries, keys and values reads, itself among them; null leaves it out, as the
    paper does."""

    def __post_init__(self):
        check_qk_heads(self.num_heads, self.num_heads)
        check_sizes(self, "head_dim", "value_dim", "gate_rank")
        check_conv_size(self.conv_size)
        check_gate_temperature(self.gate_temperature)

    def state(self, dim: int) -> StateShape:
        return gla_state(dim, num_heads=self.num_heads, head_dim=self.head_dim, value_dim=self.value_dim)

    def convolution(self, dim: int) -> ConvolutionShape | None:
        return convolution_shape(self.state(dim), self.conv_size)

    def num_projected(self, dim: int) -> int:
        state = self.state(dim)
        return self.num_heads * (2 * state.key_dim + 3 * state.value_dim) + self.gate_rank

    def num_inner(self, dim: int) -> int:
        return self.gate_rank * self.num_heads * self.state(dim).key_dim

    def layer(self, dim: int, **common: Any) -> GatedLinearAttention:
        return GatedLinearAttention(
            dim,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            gate_rank=self.gate_rank,
            gate_temperature=self.gate_temperature,
            conv_size=self.conv_size,
            **common,
        )

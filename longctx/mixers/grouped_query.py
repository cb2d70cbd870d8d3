"""What the configs of grouped-query softmax attention have in common: heads, positions, projections and their cost."""

import dataclasses
from typing import Any

from longctx.attention import check_heads
from longctx.mixers.registry import MixerConfig
from longctx.remat import ATTENTION, BLOCK_NAMES, QKV
from longctx.rope_scaling import RopeScaling
from longctx.rotary import RotaryConfig
from pallas_kernels import Implementation


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedQueryConfig(MixerConfig):
    """Configuration of a mixer whose layer is a `GroupedQueryLayer`."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads, a divisor of num_heads; null means as many as num_heads."""
    head_dim: int | None = None
    """Dims of a head; null means dim / num_heads."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary frequencies; null leaves out rotary positions."""
    rope_scaling: RopeScaling | None = None
    """How the rotary frequencies are made slower, for contexts longer than those that a model was trained on; null
    leaves them."""
    qk_norm: bool = False
    """Whether to normalise each head of the queries and keys (RMSNorm with a learned gain)."""
    implementation: Implementation | None = None
    """Implementation of the attention op; null takes the first that serves the call on the platform at hand."""
    deterministic: bool = True
    """Whether the attention op's gradients must come out the same, bit by bit, each time; false may be faster."""

    def __post_init__(self):
        num_kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        check_heads(self.num_heads, num_kv_heads, self.head_dim, rotary=self.rope_theta is not None)
        if self.rope_theta is not None and not self.rope_theta > 1:
            raise ValueError(f"rope_theta: got {self.rope_theta}, wanted null or a number > 1; 10000 is customary")
        if self.rope_scaling is not None and self.rope_theta is None:
            raise ValueError(
                f"rope_scaling: got {self.rope_scaling.kind} with rope_theta=null, which has no rotary positions; "
                "leave one of them out"
            )

    def resolved(self, dim: int) -> "GroupedQueryConfig":
        """The same with num_kv_heads and head_dim as they are for this model dim, neither None."""
        return dataclasses.replace(
            self,
            num_kv_heads=self.num_heads if self.num_kv_heads is None else self.num_kv_heads,
            head_dim=dim // self.num_heads if self.head_dim is None else self.head_dim,
        )

    @property
    def layer_options(self) -> dict[str, Any]:
        """These options as arguments of the layer."""
        theta, scaling = self.rope_theta, self.rope_scaling
        rotary = None if theta is None else RotaryConfig(theta=theta, scaling=scaling)
        return dict(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rotary=rotary,
            qk_norm=self.qk_norm,
            implementation=self.implementation,
            deterministic=self.deterministic,
        )

    @property
    def tensor_names(self) -> frozenset[str]:
        return BLOCK_NAMES | {QKV, ATTENTION}

    def projection_flops(self, dim: int, num_tokens: float) -> float:
        """2 tokens dim H (2 N + 2 K)."""
        resolved = self.resolved(dim)
        return float(2 * num_tokens * dim * resolved.head_dim * (2 * self.num_heads + 2 * resolved.num_kv_heads))

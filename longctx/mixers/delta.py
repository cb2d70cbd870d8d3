"""The `delta` mixer: linear attention by the delta rule, DeltaNet, or a fast weight programmer."""

import dataclasses
from typing import Any, Literal, get_args

from longctx.arguments import check_choice
from longctx.context_parallel import ConvolutionShape
from longctx.delta import DeltaNet, FeatureNorm, check_feature_norm
from longctx.feature_maps import DPFP, FeatureMap, Pointwise
from longctx.linear_attention import StateShape, check_qk_heads, dims_of_head
from longctx.mixers.recurrent import RecurrentConfig, check_conv_size, check_sizes
from longctx.mixers.registry import register
from longctx.short_convolution import convolution_shape

FeatureMapName = Literal["identity", "elu1", "relu", "dpfp"]


@register("delta")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaConfig(RecurrentConfig):
    """The delta rule within documents, without decay: `DeltaNet`.

    The defaults are DeltaNet's; feature_map=dpfp, feature_norm=sum and conv_size=null make the fast weight programmer.
    Reference: Schlag et al., arXiv:2102.11174, section 4; Yang et al., arXiv:2406.06484, section 3.3.
    """

    num_qk_heads: int | None = None
    """Query and key heads, a divisor of num_heads; null means as many as num_heads."""
    head_dim: int | None = None
    """Dims of a query and of a key, before the feature map; null means dim / num_heads."""
    value_dim: int | None = None
    """Dims of a value; null means dim / num_heads."""
    feature_map: FeatureMapName = "identity"
    """What queries and keys become before they are normalised: `identity` nothing else; `elu1` elu(x) + 1; `relu`
    max(x, 0); `dpfp` products of neighbouring dims of [relu(x), relu(-x)], of 2 dpfp_order times the dims."""
    dpfp_order: int | None = None
    """How far apart the dims that `dpfp` multiplies may stand, at least 1. Null for the other maps."""
    feature_norm: FeatureNorm = "l2"
    """`l2`: queries and keys have length 1; `sum`: their features, of a positive map, add up to 1."""
    conv_size: int | None = 4
    """Tokens that a short convolution of queries, keys and values reads, itself among them; null leaves it out."""
    gate: bool = False
    """Whether a projection of the input, through swish, multiplies the normalised result."""

    def __post_init__(self):
        check_qk_heads(self.num_heads, self.num_heads if self.num_qk_heads is None else self.num_qk_heads)
        check_sizes(self, "head_dim", "value_dim")
        check_conv_size(self.conv_size)
        check_choice("feature_map", self.feature_map, get_args(FeatureMapName))
        if self.feature_map == "dpfp" and (self.dpfp_order is None or self.dpfp_order < 1):
            raise ValueError(
                f"dpfp_order: got {self.dpfp_order} with feature_map=dpfp, wanted a number >= 1; 1 to 3 are the paper's"
            )
        if self.feature_map != "dpfp" and self.dpfp_order is not None:
            raise ValueError(
                f"dpfp_order: got {self.dpfp_order} with feature_map={self.feature_map}, which has none; leave it out"
            )
        check_feature_norm(self.map, self.feature_norm)

    @property
    def map(self) -> FeatureMap:
        """The feature map of that name."""
        if self.feature_map == "dpfp":
            assert self.dpfp_order is not None
            return DPFP(self.dpfp_order)
        return Pointwise(self.feature_map)

    def state(self, dim: int) -> StateShape:
        return StateShape(
            num_qk_heads=self.num_heads if self.num_qk_heads is None else self.num_qk_heads,
            num_heads=self.num_heads,
            key_dim=self.map.num_features(self._head_dim(dim)),
            value_dim=dims_of_head("value_dim", self.value_dim, dim, self.num_heads),
            delta_rule=True,
        )

    def convolution(self, dim: int) -> ConvolutionShape | None:
        return convolution_shape(
            dataclasses.replace(self.state(dim), key_dim=self._head_dim(dim)), self.conv_size
        )  # fmt: skip

    def num_projected(self, dim: int) -> int:
        state = self.state(dim)
        of_values = 3 if self.gate else 2
        of_keys = 2 * state.num_qk_heads * self._head_dim(dim)
        return of_keys + self.num_heads * (of_values * state.value_dim + 1)

    def layer(self, dim: int, **common: Any) -> DeltaNet:
        return DeltaNet(
            dim,
            num_heads=self.num_heads,
            num_qk_heads=self.num_qk_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            feature_map=self.map,
            feature_norm=self.feature_norm,
            gate=self.gate,
            conv_size=self.conv_size,
            **common,
        )

    def _head_dim(self, dim: int) -> int:
        return dims_of_head("head_dim", self.head_dim, dim, self.num_heads)

"""The `linear` mixer: attention by a feature map of queries and keys, without decay."""

import dataclasses
from typing import Any, Literal, get_args

from longctx.arguments import check_choice
from longctx.feature_maps import CosineReweighted, FeatureMap, Pointwise, Taylor2
from longctx.linear_attention import Gate, LinearAttention, StateShape, check_gate, check_qk_heads
from longctx.mixers.recurrent import RecurrentConfig, check_sizes
from longctx.mixers.registry import register

FeatureMapName = Literal["identity", "elu1", "relu", "cosine", "taylor2"]


@register("linear")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig(RecurrentConfig):
    """Causal linear attention within documents, by a feature map.

    o[t] = sum_s w[t, s] v[s] / sum_s w[t, s],  w[t, s] = phi(q[t])^T phi(k[s]),  s <= t;  not divided unless normalize
    y = (gate(x W_g) * norm(o)) W_o

    Kernels serve few sizes of features; where they refuse those of a map, XLA serves the call.
    Reference: Katharopoulos et al., Transformers are RNNs, arXiv:2006.16236; of the maps, longctx/feature_maps.py.
    """

    num_qk_heads: int | None = None
    """Query and key heads, a divisor of num_heads; null means as many as num_heads."""
    head_dim: int | None = None
    """Dims of a query and of a key, before the feature map; null means dim / num_heads."""
    value_dim: int | None = None
    """Dims of a value; null means dim / num_heads."""
    feature_map: FeatureMapName = "elu1"
    """What queries and keys become: `identity` nothing else; `elu1` elu(x) + 1; `relu` max(x, 0); `cosine` (cosFormer)
    relu with weights that fall with the distance as a cosine, of twice the dims; `taylor2` (Based) the exponential up
    to its second order, of 1 + d + d^2 dims, rounded up to 64, for a head_dim d that is to be small, such as 16."""
    horizon: int | None = None
    """Tokens over which the weights of `cosine` fall to 0: at least the tokens of a row. Null for the other maps."""
    normalize: bool | None = None
    """Whether to divide by the sum of the weights; null does where no weight can be negative: not for `identity`."""
    output_norm: bool | None = None
    """Whether to normalise the result by the root mean square over all heads; null does where normalize does not."""
    gate: Gate | None = None
    """What is done to a projection of the input that multiplies the result before the last projection; null leaves out
    the gate."""

    def __post_init__(self):
        check_qk_heads(self.num_heads, self.num_heads if self.num_qk_heads is None else self.num_qk_heads)
        check_sizes(self, "head_dim", "value_dim")
        check_gate(self.gate)
        check_choice("feature_map", self.feature_map, get_args(FeatureMapName))
        if self.feature_map == "cosine" and self.horizon is None:
            raise ValueError(
                "horizon: got null with feature_map=cosine, wanted the number of tokens over which weights fall to 0; "
                "set it to data.seq_len"
            )
        if self.feature_map != "cosine" and self.horizon is not None:
            raise ValueError(
                f"horizon: got {self.horizon} with feature_map={self.feature_map}, which has none; leave it out"
            )
        if self.horizon is not None and self.horizon < 1:
            raise ValueError(f"horizon: got {self.horizon}, wanted a number of tokens >= 1")
        if self.normalize and not self.map.is_positive:
            raise ValueError(
                f"normalize: got true with feature_map={self.feature_map}, whose weights may be negative, and so their "
                "sum near zero; leave it out, or choose elu1, relu, cosine or taylor2"
            )

    @property
    def map(self) -> FeatureMap:
        """The feature map of that name."""
        match self.feature_map:
            case "cosine":
                return CosineReweighted(self.horizon)
            case "taylor2":
                return Taylor2()
            case function:
                return Pointwise(function)

    @property
    def is_normalized(self) -> bool:
        """Whether the layer divides by the sum of the weights."""
        return self.map.is_positive if self.normalize is None else self.normalize

    def state(self, dim: int) -> StateShape:
        return StateShape(
            num_qk_heads=self.num_heads if self.num_qk_heads is None else self.num_qk_heads,
            num_heads=self.num_heads,
            key_dim=self.map.num_features(self._head_dim(dim)),
            value_dim=dim // self.num_heads if self.value_dim is None else self.value_dim,
            normalize=self.is_normalized,
        )

    def num_projected(self, dim: int) -> int:
        state = self.state(dim)
        of_values = 2 if self.gate is None else 3
        return 2 * state.num_qk_heads * self._head_dim(dim) + of_values * self.num_heads * state.value_dim

    def layer(self, dim: int, **common: Any) -> LinearAttention:
        has_norm = not self.is_normalized if self.output_norm is None else self.output_norm
        return LinearAttention(
            dim,
            num_heads=self.num_heads,
            num_qk_heads=self.num_qk_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            feature_map=self.map,
            normalize=self.is_normalized,
            output_norm="rms" if has_norm else None,
            gate=self.gate,
            **common,
        )

    def _head_dim(self, dim: int) -> int:
        return dim // self.num_heads if self.head_dim is None else self.head_dim

"""The delta rule as a layer, DeltaNet and Gated DeltaNet: a token first erases what its key reads, then writes."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from longctx.arguments import check_choice
from longctx.context_parallel import AttentionSharding
from longctx.feature_maps import FeatureMap, Pointwise
from longctx.gated_output import GatedOutput
from longctx.linear_attention import LinearInputs, RecurrentLayer, StateShape, check_qk_heads, dims_of_head
from longctx.projections import projection
from longctx.sharding import constrain
from longctx.short_convolution import QKV
from longctx.step_decay import StepDecay
from pallas_kernels import Implementation

FeatureNorm = Literal["l2", "sum"]
"""`l2`: a query or key has length 1. `sum`: its features, none of them negative, add up to 1."""

_IDENTITY = Pointwise("identity")
_EPS = 1e-6


class DeltaNet(RecurrentLayer):
    """Linear attention by the delta rule: what a key reads of the state moves towards its value, by a learned share.

    q, k, v = x W_q, x W_k, x W_v;  or swish(conv(x W_q)), ...  with short convolutions
    q, k = norm(phi(q)), norm(phi(k));   beta = sigmoid(x W_b);   a = 0, or with decay dt A as of Mamba-2 (`StepDecay`)
    S' = exp(a[t]) S[t - 1];   S[t] = S' + beta[t] k[t] (v[t] - S'^T k[t])^T;   o[t] = S[t]^T q[t]
    y = RMSNorm(o) W_o, or with gate (swish(x W_g) * RMSNorm(o)) W_o      (each head normalised by itself)

    A key of length up to 1 keeps the state from growing.

    Args:
      dim: Model dim of x and y.
      num_heads: Heads of values, N, each with a state of its own.
      num_qk_heads: Heads of queries and keys, K, a divisor of N; head n reads q and k of head n // (N / K). Default N.
      head_dim: Dims of a query and key before the map. Default dim / N.
      value_dim: Dims of a value. Default dim / N.
      feature_map: phi.
      feature_norm: Of the features.
      decay: Whether states decay too.
      gate: Whether a projection of x multiplies the result.
      conv_size: Tokens of short convolutions of q, k and v; None leaves them out.
      dt_range: As of `StepDecay`.
      dtype: Compute dtype and dtype of y; decays, write strengths and the state are float32 regardless.
      param_dtype: Dtype of the parameters.
      norm_eps: Epsilon of the norm of the result.
      out_init_scale: Multiplies the initial standard deviation of W_o.
      implementation, sharding: As of `RecurrentLayer`. Kernels serve few sizes of features: others fall to XLA.
      rngs: Source of the initial values: matrices truncated normal, standard deviation 1 / sqrt(fan_in).

    Raises: ValueError where a number is not positive, the numbers of heads and dims do not divide, or feature_norm is
      `sum` of a map with signs.
    Memory: O(B T (N V + K H)) for a call; a state is B N H V.
    Reference: Schlag et al., Linear Transformers Are Secretly Fast Weight Programmers, arXiv:2102.11174, section 4 (the
      rule, and sums); Yang et al., Parallelizing Linear Transformers with the Delta Rule, arXiv:2406.06484, section 3.3
      (the layer, and lengths); Yang et al., Gated Delta Networks, arXiv:2412.06464, section 3.4 (with decay and gate).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_qk_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        feature_map: FeatureMap = _IDENTITY,
        feature_norm: FeatureNorm = "l2",
        decay: bool = False,
        gate: bool = False,
        conv_size: int | None = 4,
        dt_range: tuple[float, float] = (1e-3, 0.1),
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        norm_eps: float = 1e-6,
        out_init_scale: float = 1.0,
        implementation: Implementation | None = None,
        sharding: AttentionSharding | None = None,
        rngs: nnx.Rngs,
    ):
        check_feature_norm(feature_map, feature_norm)
        num_qk_heads = num_heads if num_qk_heads is None else num_qk_heads
        check_qk_heads(num_heads, num_qk_heads)
        sizes = StateShape(
            num_qk_heads=num_qk_heads,
            num_heads=num_heads,
            key_dim=dims_of_head("head_dim", head_dim, dim, num_heads),
            value_dim=dims_of_head("value_dim", value_dim, dim, num_heads),
            delta_rule=True,
        )
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        qkv = QKV(dim, sizes=sizes, conv_size=conv_size, **kwargs)
        super().__init__(
            dim,
            state=dataclasses.replace(sizes, key_dim=feature_map.num_features(sizes.key_dim)),
            scale=1.0,
            convolution=qkv.shape,
            dtype=dtype,
            implementation=implementation,
            sharding=sharding,
        )
        self.qkv, self.feature_map, self.feature_norm = qkv, feature_map, feature_norm
        self.beta = projection(dim, num_heads, logical_axes=("embed", "heads"), **kwargs)
        self.decay = StepDecay(dim, num_heads, dt_range=dt_range, **kwargs) if decay else None
        self.output = GatedOutput(
            dim, num_heads=num_heads, value_dim=sizes.value_dim, gate=gate, norm_eps=norm_eps,
            out_init_scale=out_init_scale, **kwargs,
        )  # fmt: skip

    def _inputs(self, x_BTD, positions_BT, depth, convolve):
        q_BTKH, k_BTKH, v_BTNV = self.qkv(x_BTD, convolve)
        q_BTKH, k_BTKH = (self._normalized(self.feature_map(x, positions_BT)) for x in (q_BTKH, k_BTKH))
        beta_BTN = constrain(self.beta(x_BTD), "batch", "sequence", "heads")
        decay_BTN = None if self.decay is None else self.decay(x_BTD)[1]
        return LinearInputs(
            q=q_BTKH, k=k_BTKH, v=v_BTNV, decay=decay_BTN, beta=jax.nn.sigmoid(beta_BTN.astype(jnp.float32))
        )

    def _output(self, attended_BTNV, x_BTD, inputs):
        return self.output(attended_BTNV, x_BTD)

    def _normalized(self, features: jax.Array) -> jax.Array:
        x = features.astype(jnp.float32)
        match self.feature_norm:
            case "l2":
                x = x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPS)
            case "sum":
                x = x / (jnp.sum(x, axis=-1, keepdims=True) + _EPS)
        return constrain(x.astype(features.dtype), "batch", "sequence", "kv_heads", None)


def check_feature_norm(feature_map: FeatureMap, feature_norm: str) -> None:
    """Raises ValueError where it is not known, or features that may be negative are to be divided by their sum."""
    check_choice("feature_norm", feature_norm, get_args(FeatureNorm))
    if feature_norm == "sum" and not feature_map.is_positive:
        raise ValueError(
            "feature_norm: got sum with features that may be negative, and so their sum near zero; wanted l2, or a "
            "positive feature map (dpfp, elu1, relu)"
        )

"""Gated linear attention as a layer: for each dim of the keys a decay that each token chooses, by a low-rank matrix."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32

from longctx.arguments import check_positive
from longctx.context_parallel import AttentionSharding
from longctx.feature_maps import FeatureMap, Pointwise
from longctx.gated_output import GatedOutput
from longctx.linear_attention import LinearInputs, RecurrentLayer, StateShape, check_qk_heads, dims_of_head
from longctx.projections import projection
from longctx.sharding import constrain
from longctx.short_convolution import QKV
from pallas_kernels import Implementation

_IDENTITY = Pointwise("identity")


class LowRankGate(nnx.Module):
    """The logit of a gate for each dim of each head: x A B + bias, A of few columns, in float32 after the matmuls.

    Args:
      dim: Model dim of x.
      num_heads, head_dim: N and H.
      rank: Columns of A.
      bias: Its values at the start, [N, H].
      dtype, param_dtype, rngs: As of layers.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int,
        rank: int,
        bias: Float[Array, "N H"],
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.down = projection(dim, rank, logical_axes=("embed", None), **kwargs)
        self.up = projection(rank, (num_heads, head_dim), logical_axes=(None, "heads", "head_dim"), **kwargs)
        self.bias = nnx.Param(bias.astype(param_dtype), logical_axes=("heads", "head_dim"))

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float32[Array, "B T N H"]:
        logit_BTNH = constrain(self.up(self.down(x_BTD)), "batch", "sequence", "heads", None)
        return logit_BTNH.astype(jnp.float32) + self.bias[...].astype(jnp.float32)


class GatedLinearAttention(RecurrentLayer):
    """Linear attention whose every row of the state decays by a gate of its own.

    q, k, v = phi(x W_q), phi(x W_k), x W_v      (each through a short convolution and swish, if any)
    S[t] = diag(exp(a[t])) S[t - 1] + k[t] v[t]^T;   o[t] = scale S[t]^T q[t]
    a = log sigmoid(x A B + b) / temperature     or, refined, a = log f / temperature, with
        g = sigmoid(x A B + b), r = sigmoid(x C D + c), f = (1 - r) g^2 + r (1 - (1 - g)^2) = g + g (1 - g) (2 r - 1)
    y = (swish(x W_g) * RMSNorm(o)) W_o          (each head normalised by itself)

    A refined gate moves f between g^2 and 1 - (1 - g)^2, and so has a gradient where g alone is near 1 and has none.
    Decays are computed as logarithms, in float32.

    Args:
      dim: Model dim of x and y.
      num_heads: Heads, N, each with a state of its own.
      head_dim: Dims of a query and key. Default dim / (2 N).
      value_dim: Dims of a value. Default dim / N.
      feature_map: What q and k become, with as many features as dims.
      gate_rank: Columns of A, and of C.
      gate_temperature: Divides the log decays.
      refined: Whether the gate is refined.
      conv_size: Tokens of short convolutions of q, k and v; None leaves them out.
      scale: Multiplies the queries. Default head_dim^-0.5.
      dtype: Compute dtype and dtype of y; decays and the state are float32 regardless.
      param_dtype: Dtype of the parameters.
      norm_eps: Epsilon of the norm.
      out_init_scale: Multiplies the initial standard deviation of W_o.
      implementation, sharding: As of `RecurrentLayer`.
      rngs: Source of the initial values: matrices truncated normal, standard deviation 1 / sqrt(fan_in); b zero, or
        refined so that gates start uniform in (0, 1), and c = -b.

    Raises: ValueError where a number is not positive, or the numbers of heads and dims do not divide.
    Memory: O(B T N (H + V)) for a call; a state is B N H V.
    Reference: Yang et al., Gated Linear Attention Transformers, arXiv:2312.06635, section 4.4; the refined gate and its
      start: Gu et al., Improving the Gating Mechanism of Recurrent Neural Networks, arXiv:1910.09890, section 3, in
      linear attention Lu et al., ReGLA, arXiv:2502.01578.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        value_dim: int | None = None,
        feature_map: FeatureMap = _IDENTITY,
        gate_rank: int = 16,
        gate_temperature: float = 16.0,
        refined: bool = False,
        conv_size: int | None = None,
        scale: float | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        norm_eps: float = 1e-6,
        out_init_scale: float = 1.0,
        implementation: Implementation | None = None,
        sharding: AttentionSharding | None = None,
        rngs: nnx.Rngs,
    ):
        check_positive(gate_rank=gate_rank)
        check_gate_temperature(gate_temperature)
        state = gla_state(dim, num_heads=num_heads, head_dim=head_dim, value_dim=value_dim)
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        qkv = QKV(dim, sizes=state, conv_size=conv_size, **kwargs)
        super().__init__(
            dim,
            state=state,
            scale=state.key_dim**-0.5 if scale is None else scale,
            convolution=qkv.shape,
            dtype=dtype,
            implementation=implementation,
            sharding=sharding,
        )
        self.qkv, self.feature_map, self.gate_temperature = qkv, feature_map, gate_temperature
        sizes = dict(num_heads=num_heads, head_dim=state.key_dim, rank=gate_rank)
        bias = jnp.zeros((num_heads, state.key_dim))
        if refined:
            margin = 1 / (state.key_dim + 1)
            at_start = jax.random.uniform(rngs.params(), bias.shape, minval=margin, maxval=1 - margin)
            bias = jnp.log(at_start) - jnp.log1p(-at_start)
        self.decay = LowRankGate(dim, **sizes, bias=bias, **kwargs)
        self.refinement = LowRankGate(dim, **sizes, bias=-bias, **kwargs) if refined else None
        self.output = GatedOutput(
            dim, num_heads=num_heads, value_dim=state.value_dim, gate=True, norm_eps=norm_eps,
            out_init_scale=out_init_scale, **kwargs,
        )  # fmt: skip

    def _inputs(self, x_BTD, positions_BT, depth, convolve):
        q_BTNH, k_BTNH, v_BTNV = self.qkv(x_BTD, convolve)
        q_BTNH, k_BTNH = (self.feature_map(x, positions_BT) for x in (q_BTNH, k_BTNH))
        logit_BTNH = self.decay(x_BTD)
        if self.refinement is None:
            log_gate_BTNH = jax.nn.log_sigmoid(logit_BTNH)
        else:
            log_gate_BTNH = log_refined_gate(logit_BTNH, self.refinement(x_BTD))
        return LinearInputs(q=q_BTNH, k=k_BTNH, v=v_BTNV, decay=log_gate_BTNH / self.gate_temperature)

    def _output(self, attended_BTNV, x_BTD, inputs):
        return self.output(attended_BTNV, x_BTD)


def log_refined_gate(gate: Float32[Array, "..."], refinement: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """log(g + g (1 - g) (2 r - 1)) of g = sigmoid(gate), r = sigmoid(refinement): finite however small these are."""
    # The same as log g + log(g + 2 r (1 - g)), which may round to more than 0.
    log_g, log_not_g = jax.nn.log_sigmoid(gate), jax.nn.log_sigmoid(-gate)
    log_sum = jnp.logaddexp(log_g, math.log(2) + jax.nn.log_sigmoid(refinement) + log_not_g)
    return jnp.minimum(log_g + log_sum, 0.0)


def gla_state(dim: int, *, num_heads: int, head_dim: int | None, value_dim: int | None) -> StateShape:
    """The sizes of the layer's state, with the defaults filled in.

    Raises: ValueError where the numbers of heads and dims do not divide.
    """
    check_qk_heads(num_heads, num_heads)
    return StateShape(
        num_qk_heads=num_heads,
        num_heads=num_heads,
        key_dim=dims_of_head("head_dim", head_dim, dim, 2 * num_heads),
        value_dim=dims_of_head("value_dim", value_dim, dim, num_heads),
        vector_decay=True,
    )


def check_gate_temperature(gate_temperature: float) -> None:
    """Raises ValueError unless it can divide log decays."""
    if not gate_temperature > 0:
        raise ValueError(
            f"gate_temperature: got {gate_temperature}, wanted a number > 0; 16 is customary, 1 leaves gates"
        )

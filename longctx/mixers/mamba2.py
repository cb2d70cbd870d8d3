"""The `mamba2` mixer: a state space layer whose decay each token chooses, in its dual form as linear attention."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from longctx.arguments import check_positive
from longctx.context_parallel import AttentionSharding, ConvolutionShape
from longctx.linear_attention import LinearInputs, RecurrentLayer, StateShape, check_qk_heads
from longctx.mixers.recurrent import RecurrentConfig, check_conv_size, check_sizes
from longctx.mixers.registry import register
from longctx.norms import RMSNorm
from longctx.projections import projection
from longctx.short_convolution import QKV, convolution_shape
from longctx.step_decay import StepDecay, check_dt_range
from pallas_kernels import Implementation


class Mamba2(RecurrentLayer):
    """Selective state space layer with a scalar decay for each head and token.

    C, B, u, z = x W_C, x W_B, x W_u, x W_z;   dt = softplus(x W_dt + bias);   a = -exp(A_log)
    C, B, u = swish(conv(C)), swish(conv(B)), swish(conv(u))      (with short convolutions)
    S[t] = exp(dt[t] a) S[t - 1] + B[t] (dt[t] u[t])^T;   o[t] = C[t]^T S[t] + skip u[t]
    y = (scale * RMSNorm(o * silu(z))) W_o      (over the dims of all heads together)

    C and B are the queries and keys, which groups of heads share, and dt u the values.

    Args:
      dim: Model dim of x and y.
      num_heads: Heads, N, each with a state of its own.
      num_groups: Groups of heads that share C and B, K, a divisor of N.
      state_dim: Dims of C and B, H.
      head_dim: Dims of u a head, V.
      conv_size: Tokens of short convolutions of C, B and u; None leaves them out. The paper's layers have 4.
      dt_range: dt of a token of zeros at the start, drawn between these, uniformly in its logarithm.
      dtype: Compute dtype and dtype of y; dt, decays and the state are float32 regardless.
      param_dtype: Dtype of the parameters.
      norm_eps: Epsilon of the norm.
      out_init_scale: Multiplies the initial standard deviation of W_o.
      implementation, sharding: As of `RecurrentLayer`.
      rngs: Source of the initial values: matrices truncated normal, standard deviation 1 / sqrt(fan_in); -a uniform in
        1 to 16; skip and scale 1.

    Memory: O(B T (N V + K H)) for a call; a state is B N H V.
    Reference: Dao and Gu, Transformers are SSMs, arXiv:2405.21060, sections 6 (the dual form, by chunks) and 7 (the
      layer).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_groups: int = 1,
        state_dim: int = 128,
        head_dim: int = 64,
        conv_size: int | None = None,
        dt_range: tuple[float, float] = (1e-3, 0.1),
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        norm_eps: float = 1e-6,
        out_init_scale: float = 1.0,
        implementation: Implementation | None = None,
        sharding: AttentionSharding | None = None,
        rngs: nnx.Rngs,
    ):
        _check_groups(num_heads, num_groups)
        check_positive(state_dim=state_dim, head_dim=head_dim)
        state = StateShape(num_qk_heads=num_groups, num_heads=num_heads, key_dim=state_dim, value_dim=head_dim)
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        qkv = QKV(dim, sizes=state, conv_size=conv_size, **kwargs)
        super().__init__(
            dim,
            state=state,
            scale=1.0,
            convolution=qkv.shape,
            dtype=dtype,
            implementation=implementation,
            sharding=sharding,
        )
        self.qkv = qkv  # C, B and u
        self.z = projection(dim, (num_heads, head_dim), logical_axes=("embed", "heads", "head_dim"), **kwargs)
        self.decay = StepDecay(dim, num_heads, dt_range=dt_range, **kwargs)
        self.out = projection(
            (num_heads, head_dim), dim, logical_axes=("heads", "head_dim", "embed"), init_scale=out_init_scale, **kwargs
        )
        self.skip = nnx.Param(jnp.ones((num_heads,), param_dtype), logical_axes=("heads",))
        self.norm = RMSNorm(num_heads * head_dim, eps=norm_eps, param_dtype=param_dtype)

    def _inputs(self, x_BTD, positions_BT, depth, convolve):
        c_BTKH, b_BTKH, u_BTNV = self.qkv(x_BTD, convolve)
        dt_BTN, decay_BTN = self.decay(x_BTD)
        v_BTNV = (dt_BTN[..., None] * u_BTNV.astype(jnp.float32)).astype(self.dtype)
        return LinearInputs(q=c_BTKH, k=b_BTKH, v=v_BTNV, decay=decay_BTN, skipped=u_BTNV)

    def _output(self, attended_BTNV, x_BTD, inputs):
        skip = self.skip[...].astype(jnp.float32)[:, None]
        o_BTNV = attended_BTNV.astype(jnp.float32) + skip * inputs.skipped.astype(jnp.float32)
        gated_BTNV = o_BTNV * jax.nn.silu(self.z(x_BTD).astype(jnp.float32))
        normed = self.norm(gated_BTNV.reshape(*gated_BTNV.shape[:2], -1))
        return self.out(normed.reshape(gated_BTNV.shape).astype(self.dtype))


@register("mamba2")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(RecurrentConfig):
    """Selective state space layer of Mamba-2 within documents: `Mamba2`.

    The paper's layers have num_heads head_dim = 2 dim.
    Reference: Dao and Gu, Transformers are SSMs, arXiv:2405.21060, sections 6 and 7.
    """

    num_groups: int = 1
    """Groups of heads that share their queries (C) and keys (B); a divisor of num_heads."""
    state_dim: int = 128
    """Dims of a query and of a key: rows of a head's state."""
    head_dim: int = 64
    """Dims of a value: columns of a head's state."""
    conv_size: int | None = None
    """Tokens that a short convolution of C, B and u reads, itself among them: 4 in the paper's layers; null leaves it
    out."""
    dt_min: float = 1e-3
    """Least step size that a head may start with; steps start uniform in their logarithm."""
    dt_max: float = 0.1
    """Greatest step size that a head may start with."""

    def __post_init__(self):
        _check_groups(self.num_heads, self.num_groups)
        check_sizes(self, "state_dim", "head_dim")
        check_conv_size(self.conv_size)
        check_dt_range(self.dt_min, self.dt_max)

    def state(self, dim: int) -> StateShape:
        return StateShape(
            num_qk_heads=self.num_groups, num_heads=self.num_heads, key_dim=self.state_dim, value_dim=self.head_dim
        )

    def convolution(self, dim: int) -> ConvolutionShape | None:
        return convolution_shape(self.state(dim), self.conv_size)

    def num_projected(self, dim: int) -> int:
        return 2 * self.num_groups * self.state_dim + self.num_heads * (3 * self.head_dim + 1)

    def layer(self, dim: int, **common: Any) -> Mamba2:
        return Mamba2(
            dim,
            num_heads=self.num_heads,
            num_groups=self.num_groups,
            state_dim=self.state_dim,
            head_dim=self.head_dim,
            conv_size=self.conv_size,
            dt_range=(self.dt_min, self.dt_max),
            **common,
        )


def _check_groups(num_heads: int, num_groups: int) -> None:
    check_qk_heads(num_heads, num_groups, name="num_groups", reason="each group serves the same number of heads")

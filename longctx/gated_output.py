"""What layers of linear attention make of what they read: a norm of each head, a gate, and the way back."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from longctx.norms import RMSNorm
from longctx.projections import projection


class GatedOutput(nnx.Module):
    """y = (swish(x W_g) * RMSNorm(o)) W_o, each head normalised by itself, with one gain for all; W_g may be left out.

    Norm and gate are computed in float32.

    Args:
      dim: Model dim of x and y.
      num_heads: Heads of o, N.
      value_dim: Dims of a head, V.
      gate: Whether there is a W_g.
      dtype: Compute dtype and dtype of y.
      param_dtype: Dtype of the parameters.
      norm_eps: Epsilon of the norm.
      out_init_scale: Multiplies the initial standard deviation of W_o.
      rngs: Source of the initial values.

    Reference: Yang et al., Gated Linear Attention, arXiv:2312.06635, section 4.4, with a root mean square in the place
      of its LayerNorm, as Yang et al., Gated Delta Networks, arXiv:2412.06464, figure 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        value_dim: int,
        gate: bool,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        norm_eps: float,
        out_init_scale: float,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        heads = (num_heads, value_dim)
        self.gate = projection(dim, heads, logical_axes=("embed", "heads", "head_dim"), **kwargs) if gate else None
        self.norm = RMSNorm(value_dim, eps=norm_eps, param_dtype=param_dtype)
        self.out = projection(
            heads, dim, logical_axes=("heads", "head_dim", "embed"), init_scale=out_init_scale, **kwargs
        )  # fmt: skip
        self.dtype = jnp.dtype(dtype)

    def __call__(self, o_BTNV: Float[Array, "B T N V"], x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        o_BTNV = self.norm(o_BTNV.astype(jnp.float32))
        if self.gate is not None:
            o_BTNV = o_BTNV * jax.nn.silu(self.gate(x_BTD).astype(jnp.float32))
        return self.out(o_BTNV.astype(self.dtype))

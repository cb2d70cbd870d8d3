"""Normalisation layers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last dim, with a learned gain.

    y = scale * x / sqrt(mean(x^2) + eps), computed in float32 and returned in x's dtype.

    Args:
      dim: Size of the last dim.
      eps: Added to the mean square.
      param_dtype: Dtype of `scale`, which starts at one.

    Reference: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467, equation 4.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, param_dtype: DTypeLike = jnp.float32):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype), logical_axes=("norm",))

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        x_f32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + self.eps)
        return (x_f32 * inverse_rms * self.scale[...].astype(jnp.float32)).astype(x.dtype)

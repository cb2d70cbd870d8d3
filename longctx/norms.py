"""Normalisation layers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from longctx.arguments import check_features


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
        check_features("RMSNorm", x, self.scale.shape[0])
        x_f32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + self.eps)
        return (x_f32 * inverse_rms * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class SimpleRMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last dims, without a gain.

    y = x / sqrt(mean(x^2) + eps), computed in float32 and returned in x's dtype.

    Args:
      eps: Added to the mean square.
      num_dims: How many of the last dims are normalised together: 1, or 2 for all heads of a token.

    Reference: Qin et al., TransNormerLLM, arXiv:2307.14995, section 3.1.
    """

    def __init__(self, *, eps: float = 1e-6, num_dims: int = 1):
        self.eps, self.num_dims = eps, num_dims

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        if x.ndim < self.num_dims or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"x: got {x.dtype}{list(x.shape)}, wanted floats of {self.num_dims} dims or more (SimpleRMSNorm)"
            )
        x_f32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x_f32 * x_f32, axis=tuple(range(-self.num_dims, 0)), keepdims=True)
        return (x_f32 * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalisation of each head to mean zero and variance one, without a gain: a head is a group.

    y = (x - mean(x)) / sqrt(var(x) + eps) over the last dim, computed in float32 and returned in x's dtype.

    Args:
      eps: Added to the variance.

    Reference: Wu and He, Group Normalization, arXiv:1803.08494, equation 1.
    """

    def __init__(self, *, eps: float = 1e-6):
        self.eps = eps

    def __call__(self, x_BTNV: Float[Array, "B T N V"]) -> Float[Array, "B T N V"]:
        x_f32 = x_BTNV.astype(jnp.float32)
        centred = x_f32 - jnp.mean(x_f32, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps)).astype(x_BTNV.dtype)

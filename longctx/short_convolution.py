"""Projections of a layer of linear attention to queries, keys and values, with short convolutions or without."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from longctx.arguments import check_positive
from longctx.context_parallel import ConvolutionShape
from longctx.linear_attention import Convolve, StateShape
from longctx.projections import projection
from longctx.remat import QKV as QKV_NAME
from longctx.remat import named
from longctx.sharding import constrain


class ShortConvolution(nnx.Module):
    """The weights of a causal convolution along the tokens, of each dim of each head by itself.

    y[t] = sum_j kernel[W - 1 - j] x[t - j],  j = 0 ... W - 1: `longctx.context_parallel.sharded_short_convolution`

    Args:
      num_heads: Heads of x.
      head_dim: Dims of a head.
      width: Tokens that a token reads, itself among them, W.
      logical_axis: Name of the dim of heads.
      param_dtype: Dtype of the weights, which start uniform within 1 / sqrt(W).
      rngs: Source of the initial values.
    Reference: Dao and Gu, Transformers are SSMs, arXiv:2405.21060, section 7; Yang et al., arXiv:2406.06484, section 5.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        width: int,
        logical_axis: str,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        bound = 1 / math.sqrt(width)
        values = jax.random.uniform(
            rngs.params(), (width, num_heads, head_dim), jnp.float32, minval=-bound, maxval=bound
        )
        self.taps = nnx.Param(values.astype(param_dtype), logical_axes=(None, logical_axis, "head_dim"))


class QKV(nnx.Module):
    """Queries, keys and values of linear attention.

    q, k, v = x W_q, x W_k, x W_v, or with convolutions swish(conv(x W_q)), ...

    Args:
      dim: Model dim of x.
      sizes: Heads of values, N, and of queries and keys, K, and their dims before any feature map.
      conv_size: Tokens that a convolution reads; None leaves out convolutions.
      dtype, param_dtype, rngs: As of layers.
    """

    def __init__(
        self,
        dim: int,
        *,
        sizes: StateShape,
        conv_size: int | None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        check_positive(conv_size=conv_size)
        self.shape = convolution_shape(sizes, conv_size)
        parts = (
            ("q", sizes.num_qk_heads, sizes.key_dim, "kv_heads"),
            ("k", sizes.num_qk_heads, sizes.key_dim, "kv_heads"),
            ("v", sizes.num_heads, sizes.value_dim, "heads"),
        )
        self._axes = tuple(axis for *_, axis in parts)
        for name, num, size, axis in parts:
            axes = ("embed", axis, "head_dim")
            made = projection(
                dim, (num, size), logical_axes=axes, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )  # fmt: skip
            setattr(self, name, made)
            conv = None
            if conv_size is not None:
                conv = ShortConvolution(
                    num, size, width=conv_size, logical_axis=axis, param_dtype=param_dtype, rngs=rngs
                )
            setattr(self, f"{name}_conv", conv)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], convolve: Convolve
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"], Float[Array, "B T N V"]]:
        """q, k and v in the compute dtype; `convolve` as a layer's `_inputs` is given it."""
        arrays = [
            constrain(named(project(x_BTD), QKV_NAME), "batch", "sequence", axis, None)
            for project, axis in zip((self.q, self.k, self.v), self._axes, strict=True)
        ]
        if self.shape is None:
            return tuple(arrays)
        convolved = convolve(arrays, [conv.taps[...] for conv in (self.q_conv, self.k_conv, self.v_conv)])
        return tuple(jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype) for x in convolved)


def convolution_shape(state: StateShape, conv_size: int | None) -> ConvolutionShape | None:
    """The sizes of the convolutions of queries, keys and values of these sizes; None without."""
    if conv_size is None:
        return None
    of_keys = (state.num_qk_heads, state.key_dim)
    return ConvolutionShape(width=conv_size, heads=(of_keys, of_keys, (state.num_heads, state.value_dim)))

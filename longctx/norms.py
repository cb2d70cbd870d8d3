"""Normalisation layers."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, DTypeLike, Float

from longctx.arguments import check_features
from longctx.sharding import constrain, own_mesh_in_scope
from longctx.token_shards import TokenShards
from pallas_kernels import rms_norm


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
        return rms_norm.normalised(x, self.scale[...], eps=self.eps)

    def of_sum(
        self, x_BTD: Float[Array, "B T D"], delta_BTD: Float[Array, "B T D"] | None = None, *, uses: int = 1
    ) -> tuple[Float[Array, "B T D"], *tuple[Float[Array, "B T D"], ...]]:
        """x + delta, and that normalised, once for each use. Go on with all of them: gradients that meet at the sum, or
        at the norm, are then added on the way.

        On Hopper GPUs, in 16 bits, in one pass over the tokens each way (`pallas_kernels/rms_norm.py` says which shapes
        it takes); elsewhere by XLA, to the same values.

        Args:
          delta_BTD: None for zero.
          uses: How often to return the norm.
        """
        check_features("RMSNorm", x_BTD, self.scale.shape[0])
        shards = TokenShards.of(x_BTD.shape[:2])
        devices = math.prod(dict(shards.sizes)[axis] for axis in shards.axes)
        num_tokens = x_BTD.shape[0] * x_BTD.shape[1] // devices
        if _is_left_to_the_partitioner() or not rms_norm.serves(num_tokens, x_BTD.shape[2], x_BTD.dtype):
            if delta_BTD is not None:
                x_BTD = constrain(x_BTD + delta_BTD, "batch", "sequence", None)
            return x_BTD, *[self(x_BTD)] * uses
        return _in_one_pass(shards, self.eps, uses, x_BTD, delta_BTD, self.scale[...])


def _is_left_to_the_partitioner() -> bool:
    """Whether arrays may be split over devices in ways that are not known here: on a mesh of the caller's own, or in a
    shard_map over some of its axes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = {kind for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if mesh.shape[axis] > 1}
    return own_mesh_in_scope() is None and not kinds <= {AxisType.Manual}


def _by_token(arrays: Any) -> Any:
    """Arrays `[B, T, D]` as `[B T, D]`."""
    return jax.tree.map(lambda x_BTD: x_BTD.reshape(-1, x_BTD.shape[-1]), arrays)


# Differentiated outside the shard_map: the gradient of the gain is summed over devices once.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_one_pass(shards: TokenShards, eps: float, uses: int, x_BTD, delta_BTD, scale_D) -> tuple[jax.Array, ...]:
    tokens = PartitionSpec(*shards.tokens, None)

    def shard(x_BTD, delta_BTD, scale_D):
        x_TD, delta_TD = _by_token((x_BTD, delta_BTD))
        total_TD, normed_TD = rms_norm.add_and_normalise(x_TD, delta_TD, scale_D, eps=eps)
        return total_TD.reshape(x_BTD.shape), normed_TD.reshape(x_BTD.shape)

    of_delta = None if delta_BTD is None else tokens
    on_mesh = shards.map(shard, (tokens, of_delta, PartitionSpec()), (tokens, tokens), with_tensor=True)
    total_BTD, normed_BTD = on_mesh(x_BTD, delta_BTD, scale_D)
    return (x_BTD if delta_BTD is None else total_BTD), *[normed_BTD] * uses


def _in_one_pass_forward(shards: TokenShards, eps: float, uses: int, x_BTD, delta_BTD, scale_D):
    # A loop over layers keeps both: the barrier is there for what pallas_kernels/saved.py says of attention.
    values = (primal if primal is None else primal.value for primal in (x_BTD, delta_BTD, scale_D))
    total_BTD, normed_BTD = jax.lax.optimization_barrier(_in_one_pass(shards, eps, 1, *values))
    return (total_BTD, *[normed_BTD] * uses), (total_BTD, scale_D.value, delta_BTD is not None)


def _in_one_pass_backward(shards: TokenShards, eps: float, uses: int, residuals, cotangents):
    total_BTD, scale_D, adds = residuals
    dtotal_BTD, *dnormed = (None if isinstance(x, jax.custom_derivatives.SymbolicZero) else x for x in cotangents)
    dnormed = [x for x in dnormed if x is not None]
    if not dnormed:
        return dtotal_BTD, dtotal_BTD if adds else None, None
    tokens = PartitionSpec(*shards.tokens, None)

    def shard(scale_D, total_BTD, dnormed, dtotal_BTD):
        total_TD, dnormed, dtotal_TD = _by_token((total_BTD, dnormed, dtotal_BTD))
        dx_TD, dscale_D = rms_norm.gradients(total_TD, scale_D, dnormed, dtotal_TD, eps=eps)
        return dx_TD.reshape(total_BTD.shape), dscale_D[None]

    in_specs = PartitionSpec(), tokens, [tokens] * len(dnormed), None if dtotal_BTD is None else tokens
    on_mesh = shards.map(shard, in_specs, (tokens, PartitionSpec(shards.axes or None)), with_tensor=True)
    dx_BTD, dscale_PD = on_mesh(scale_D, total_BTD, dnormed, dtotal_BTD)
    dscale_D = jnp.sum(dscale_PD, axis=0).astype(scale_D.dtype)
    return dx_BTD, dx_BTD if adds else None, dscale_D


_in_one_pass.defvjp(_in_one_pass_forward, _in_one_pass_backward, symbolic_zeros=True)


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

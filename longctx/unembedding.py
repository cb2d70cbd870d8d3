"""From hidden states to logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from longctx.arguments import check_unembedding
from longctx.sharding import constrain


def logits_of(
    hidden_BTD: Float[Array, "B T D"], table_VD: Float[Array, "V D"], *, soft_cap: float | None = None
) -> Float32[Array, "B T V"]:
    """soft_cap(hidden table^T), multiplied in hidden's dtype and accumulated in float32.

    Args:
      hidden_BTD: Normalised outputs of the last layer.
      table_VD: One row a token id; cast to hidden's dtype.
      soft_cap: As of `soft_capped`.

    Raises: ValueError where shapes or dtypes do not fit, or soft_cap is not positive.
    Memory: O(B T V).
    """
    check_unembedding("logits_of", hidden_BTD, table_VD, soft_cap=soft_cap)
    logits_BTV = soft_capped(_project_float32(hidden_BTD, table_VD.astype(hidden_BTD.dtype)), soft_cap)
    return constrain(logits_BTV, "batch", "sequence", "vocab")


def soft_capped(logits: jax.Array, soft_cap: float | None) -> jax.Array:
    """cap * tanh(logits / cap); None leaves them."""
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


@jax.custom_vjp
def _project_float32(x_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
    """x table^T, accumulated and returned in float32.

    Its cotangent is rounded to the compute dtype: JAX's own transpose would multiply it in float32, at a fraction of
    the speed, and the logits' matmuls are a large part of a small model.
    """
    return jnp.einsum("btd,vd->btv", x_BTD, table_VD, preferred_element_type=jnp.float32)


def _project_float32_forward(x_BTD, table_VD):
    return _project_float32(x_BTD, table_VD), (x_BTD, table_VD)


def _project_float32_backward(residuals, dlogits_BTV):
    x_BTD, table_VD = residuals
    dlogits_BTV = dlogits_BTV.astype(x_BTD.dtype)
    dx_BTD = jnp.einsum("btv,vd->btd", dlogits_BTV, table_VD)
    dtable_VD = jnp.einsum("btv,btd->vd", dlogits_BTV, x_BTD)
    return dx_BTD, dtable_VD


_project_float32.defvjp(_project_float32_forward, _project_float32_backward)

"""Training losses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


class LossSums(NamedTuple):
    """Sums over tokens, float32; divide by `weight_sum` once all devices and microbatches are added up."""

    loss_sum: Float32[Array, ""]
    """Weighted sum of what is minimised: negative log likelihood plus z-loss, in nats."""
    nll_sum: Float32[Array, ""]
    """Weighted sum of the negative log likelihood, in nats."""
    weight_sum: Float32[Array, ""]
    """Sum of the weights."""


def cross_entropy(
    logits_BTV: Float[Array, "B T V"],
    targets_BT: Int32[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    z_loss: float = 0.0,
) -> LossSums:
    """Softmax cross-entropy with integer targets, as weighted sums.

    nll = logsumexp(logits) - logits[target];  loss = nll + z_loss * logsumexp(logits)^2

    Args:
      logits_BTV: Scores of the next token; any float dtype, computed in float32.
      targets_BT: Index of the token that came; arbitrary where the weight is zero. Elsewhere an index outside the
        vocabulary makes the loss NaN.
      weights_BT: Weight of each token; zero leaves it out.
      z_loss: Weight of the squared log normaliser, which keeps the logits from drifting.

    Memory: O(B T V), one float32 copy of the logits.
    Reference: Chowdhery et al., PaLM, arXiv:2204.02311, section 5 (z-loss).
    """
    if not (logits_BTV.ndim == 3 and logits_BTV.shape[:2] == targets_BT.shape == weights_BT.shape):
        raise ValueError(
            f"cross_entropy: logits have shape {logits_BTV.shape}, targets {targets_BT.shape}, weights "
            f"{weights_BT.shape}, wanted [B, T, V], [B, T] and [B, T]"
        )
    if 0 in logits_BTV.shape:
        raise ValueError(f"cross_entropy: logits have shape {logits_BTV.shape}, wanted no dimension of 0")
    if not jnp.issubdtype(targets_BT.dtype, jnp.integer):
        raise ValueError(f"cross_entropy: targets are {targets_BT.dtype}, wanted int32")
    for name, array in (("logits", logits_BTV), ("weights", weights_BT)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"cross_entropy: {name} are {array.dtype}, wanted floats")
    logits_BTV, weights_BT = logits_BTV.astype(jnp.float32), weights_BT.astype(jnp.float32)
    vocab_size = logits_BTV.shape[-1]
    log_normaliser_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # Compared instead of gathered: stays elementwise, so a vocabulary split over devices needs one sum and no gather.
    is_target_BTV = jnp.arange(vocab_size, dtype=jnp.int32) == targets_BT[..., None]
    target_logits_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    nll_BT = log_normaliser_BT - target_logits_BT
    outside_BT = (targets_BT < 0) | (targets_BT >= vocab_size)
    nll_BT = jnp.where(outside_BT & (weights_BT != 0), jnp.nan, nll_BT)
    nll_sum = jnp.sum(weights_BT * nll_BT)
    penalty_sum = z_loss * jnp.sum(weights_BT * jnp.square(log_normaliser_BT))
    return LossSums(loss_sum=nll_sum + penalty_sum, nll_sum=nll_sum, weight_sum=jnp.sum(weights_BT))

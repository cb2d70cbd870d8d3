"""Choosing the blocks of a row by their scores, without sorting them.

What is chosen are the blocks whose score is at least some value. That value is searched for two bits at a time: 16
passes over the scores, each three comparisons and sums, where a sort would be log^2 passes that move them.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import current_platform


def most_scored(scores: jax.Array, count: jax.Array) -> jax.Array:
    """The `count` highest of each row, bool `[..., columns]`; of equal scores the first. -inf is never chosen.

    Args:
      scores: float32 `[..., columns]`, no NaN.
      count: int32 `[...]`, or of a shape that broadcasts to it.
    """
    count = jnp.broadcast_to(count, scores.shape[:-1])[..., None]
    keys = _ordered(scores)

    def enough(threshold):
        return jnp.sum(keys[..., None, :] >= threshold[..., None], axis=-1) >= count

    threshold = _greatest(enough, keys.shape[:-1])
    above = (keys > threshold) & (scores > -jnp.inf)
    ties = (keys == threshold) & (scores > -jnp.inf)
    left = count - jnp.sum(above, axis=-1, keepdims=True)
    return above | (ties & (jnp.cumsum(ties, axis=-1) <= left) & (count > 0))


def heaviest(scores: jax.Array, weights: jax.Array, share: float) -> jax.Array:
    """The fewest of each row, highest scores first, that have `share` of all its weight, bool `[..., columns]`.

    Blocks of equal scores are chosen together; -inf is never chosen.

    Args:
      scores: float32 `[..., columns]`, no NaN.
      weights: float32, not negative, 0 where the score is -inf.
      share: From 0 to 1.
    """
    keys = _ordered(scores)
    # Less the rounding of sums in another order, without which all of a row could be missed.
    wanted = (share - 1e-6) * jnp.sum(weights, axis=-1, keepdims=True)

    def enough(threshold):
        above = keys[..., None, :] >= threshold[..., None]
        return jnp.sum(jnp.where(above, weights[..., None, :], 0.0), axis=-1) >= wanted

    return (keys >= _greatest(enough, keys.shape[:-1])) & (scores > -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 in the order of the float32."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # -0 is 0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _greatest(enough, shape: tuple[int, ...]) -> jax.Array:
    """The greatest uint32 `[..., 1]` for which `enough` holds, which holds up to it and not above; 0 if for none.

    `enough` takes several at a time, `[..., any]`.
    """

    def two_bits(i, found):
        shift = (30 - 2 * i).astype(jnp.uint32)
        digits = jnp.arange(1, 4, dtype=jnp.uint32) << shift
        return found | jnp.sum(enough(found | digits), axis=-1, keepdims=True, dtype=jnp.uint32) << shift

    # An iteration of a loop costs a GPU more than what these do; elsewhere it compiles sooner.
    unroll = current_platform() == "gpu"
    return jax.lax.fori_loop(0, 16, two_bits, jnp.zeros((*shape, 1), jnp.uint32), unroll=unroll)


def lists_of(chosen: jax.Array, most: int) -> jax.Array:
    """The columns that are chosen in each row, ascending, then -1: int32 `[..., most]`, of bool `[..., columns]`.

    Where more are chosen the last are left out.
    """
    rows = chosen.reshape(-1, chosen.shape[-1])
    place = jnp.where(rows, jnp.cumsum(rows, axis=-1) - 1, most)
    column = jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32), rows.shape)
    empty = jnp.full((rows.shape[0], most), -1, jnp.int32)
    lists = jax.vmap(lambda empty, place, column: empty.at[place].set(column, mode="drop"))(empty, place, column)
    return lists.reshape(*chosen.shape[:-1], most)

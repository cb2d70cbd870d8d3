"""Documents packed into a row: where a state is zero again."""

import jax
import jax.numpy as jnp


def boundaries(segment_ids: jax.Array | None, batch_size: int, length: int) -> tuple[jax.Array, jax.Array]:
    """For each token, bool [B, T], whether the state before it reaches it, and whether it is not padding.

    The first token of a row is reached: a state before the row belongs to its first document.
    """
    if segment_ids is None:
        return jnp.ones((batch_size, length), bool), jnp.ones((batch_size, length), bool)
    ids = jnp.broadcast_to(jnp.maximum(segment_ids, -1), (batch_size, length))
    return jnp.concatenate([jnp.ones((batch_size, 1), bool), ids[:, 1:] == ids[:, :-1]], axis=1), ids >= 0

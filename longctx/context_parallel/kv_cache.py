"""The KV cache of a softmax layer, whose slots may be split over devices.

A slot holds any token: `positions` says which. Tokens that are decoded are dealt out in turn, position p to device
p mod P, and a device puts them behind what it holds: all devices have as many keys, to within one, at any length, so
all finish their part of a step together. Contiguous slots would leave one device with all the work while the cache is
short. Tokens of a prefill stay where they were computed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import PADDING_SEGMENT_ID

EMPTY = -1  # the position of a slot that holds nothing


class KVCache(NamedTuple):
    """The keys and values of the tokens decoded so far."""

    k: jax.Array
    """Keys, rotated, `[B, S, K, H]`; S is over all devices."""
    v: jax.Array | None
    """Values, `[B, S, K, V]`; None where they are the first dims of the keys."""
    positions: jax.Array
    """Position of the token in each slot, -1 where there is none; int32 `[S]`."""
    length: jax.Array
    """Tokens held, which is also the position of the next; int32 scalar."""
    room: jax.Array
    """Length up to which every token finds a slot on its device; int32 scalar."""

    @property
    def segment_ids(self) -> jax.Array:
        """0 for slots that hold a token, negative for those that do not: int32 `[1, S]`."""
        return jnp.where(self.positions >= 0, 0, PADDING_SEGMENT_ID)[None]


def room_of(num_filled: Int[np.ndarray, " devices"], num_slots: int) -> int:
    """The length up to which every token finds a slot, where devices already hold so many, of `num_slots` each.

    The tokens held are the first of the row; the next are dealt out in turn, position p to device p mod P.
    """
    size, length = len(num_filled), int(num_filled.sum())
    first = length + (np.arange(size) - length) % size
    return int((first + (num_slots - num_filled) * size).min())


def write_own(
    k_slots: Float[Array, "B L K H"],
    v_slots: Float[Array, "B L K V"] | None,
    positions: Int[Array, " L"],
    length: Int[Array, ""],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKV: Float[Array, "B T K V"] | None,
    *,
    axes: tuple[str, ...],
) -> tuple[Float[Array, "B L K H"], Float[Array, "B L K V"] | None, Int[Array, " L"]]:
    """This device's slots with those of T new tokens that are dealt to it; per shard, nothing is sent.

    Args:
      k_slots, v_slots, positions: This device's.
      length: Tokens held so far, on all devices.
      k_BTKH, v_BTKV: Of the new tokens, all of them, on every device; T at most the slots of all devices.
      axes: The mesh axes that split the slots; () where one device has them all.
    Returns: the slots and their positions; tokens that found none are left out.
    Cost: reads and writes ceil(T / P) slots.
    """
    size, rank = (jax.lax.axis_size(axes), jax.lax.axis_index(axes)) if axes else (1, 0)
    num_new, num_slots = k_BTKH.shape[1], k_slots.shape[1]
    num_own = -(-num_new // size)  # at most
    num_filled = jnp.sum(positions >= 0, dtype=jnp.int32)
    # A window of slots is read, changed and written back, which XLA does in place. Near the end it begins early.
    start = jnp.minimum(num_filled, num_slots - num_own)
    own = (rank - length) % size + (jnp.arange(num_own, dtype=jnp.int32) - (num_filled - start)) * size
    is_new = (own >= 0) & (own < num_new)

    def write(slots, new, dim):
        window = jax.lax.dynamic_slice_in_dim(slots, start, num_own, dim)
        new = jnp.take(new, own, axis=dim, mode="clip")
        is_new_here = is_new.reshape((1,) * dim + (-1,) + (1,) * (slots.ndim - dim - 1))
        return jax.lax.dynamic_update_slice_in_dim(slots, jnp.where(is_new_here, new, window), start, dim)

    new_positions = length + jnp.arange(num_new, dtype=jnp.int32)
    v_slots = None if v_slots is None else write(v_slots, v_BTKV, 1)
    return write(k_slots, k_BTKH, 1), v_slots, write(positions, new_positions, 0)

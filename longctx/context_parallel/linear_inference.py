"""Inference with linear attention over a mesh: the state, what is decoded against it, and how a context fills it.

A state does not grow with the tokens it holds, so there is nothing to split over the context axes: each of their
devices has it in full, and does the same. Rows are split over the batch axes and heads over the heads axes, as those of
a KV cache are; those that their axes do not divide are whole on each device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from longctx.context_parallel.api import axes_size
from longctx.context_parallel.config import AttentionSharding
from longctx.context_parallel.inference import CacheSplit, PrefillPlan
from longctx.context_parallel.state_passing import sharded_linear_attention
from pallas_kernels import Implementation
from pallas_kernels.linear.api import linear_attention


class LinearCache(NamedTuple):
    """What a linear attention layer keeps of the tokens decoded so far: no more for many than for one."""

    state: jax.Array
    """float32 `[B, N, H, V]`; with normalize V + 1, the sums of the weights in the last column."""
    length: jax.Array
    """Tokens held, which is also the position of the next; int32 scalar."""
    recent: tuple[jax.Array, ...] = ()
    """Of a layer with short convolutions, what the next token's read: the last W - 1 tokens of each array,
    `[B, W - 1, heads, dims]`, zeros before the first."""


def empty_linear_cache(
    *,
    batch_size: int,
    num_heads: int,
    key_dim: int,
    state_columns: int,
    sharding: AttentionSharding | None = None,
) -> LinearCache:
    """A cache of no tokens, each device's part made where it stays.

    Args:
      batch_size, num_heads, key_dim: B, N and H, global.
      state_columns: V, or V + 1 with normalize.
      sharding: As for `sharded_linear_decode`.
    Memory: 4 B N H V bytes over the devices of the batch and heads axes, however many tokens follow.
    """

    def zeros():
        state = jnp.zeros((batch_size, num_heads, key_dim, state_columns), jnp.float32)
        return LinearCache(state=state, length=jnp.zeros((), jnp.int32))

    split = CacheSplit.of(sharding, batch_size=batch_size, num_kv_heads=num_heads)
    if split is None:
        return zeros()
    shardings = LinearCache(state=_state_spec(split), length=PartitionSpec())
    return jax.jit(zeros, out_shardings=shardings)()


def sharded_linear_decode(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N V"],
    cache: LinearCache,
    *,
    decay: Float[Array, " N"] | Float[Array, "B T N"] | Float[Array, "B T N H"] | None = None,
    beta: Float[Array, "B T N"] | None = None,
    scale: float | None = None,
    normalize: bool = False,
    sharding: AttentionSharding | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N V"], LinearCache]:
    """Linear attention of the next T tokens to what a cache holds and to each other, over the mesh in scope.

    Args:
      q, k, v, decay, beta: Of the new tokens, one document a row, global.
      cache: From `empty_linear_cache`, `sharded_linear_prefill` or the previous call.
      scale, normalize: As `linear_attention`, the same in every call.
      sharding: The mesh axes to split over; None means those of `longctx.make_mesh` where such a mesh is in scope, and
        otherwise one device.
      implementation: As `linear_attention`, for T > 1. One token is the recurrence itself: one pass over the state,
        which kernels that work by chunks could not better.
    Returns: out, and the cache with T more tokens, its `recent` as it was.
    Cost: nothing is sent, but for new tokens that come in split along T.
    """
    options = {"decay": decay, "beta": beta, "initial_state": cache.state}

    def attend(q, k, v, options):
        return linear_attention(
            q, k, v, **options, return_state=True, scale=scale, normalize=normalize,
            implementation="reference" if q.shape[1] == 1 else implementation,
        )  # fmt: skip

    split = CacheSplit.of(sharding, batch_size=q.shape[0], num_kv_heads=v.shape[2])
    if split is not None:
        if k.shape[2] % axes_size("heads", split.heads, jax.sharding.get_abstract_mesh()):
            q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
        of_tokens, of_state = split.whole_spec, _state_spec(split)
        of_head = PartitionSpec(split.heads) if decay is not None and decay.ndim == 1 else of_tokens
        specs = {"decay": of_head, "beta": of_tokens, "initial_state": of_state}
        attend = jax.shard_map(
            attend,
            in_specs=(of_tokens, of_tokens, of_tokens, specs),
            out_specs=(of_tokens, of_state),
            check_vma=False,  # as in api.py
        )
    out, state = attend(q, k, v, options)
    return out, cache._replace(state=state, length=cache.length + q.shape[1])


def sharded_linear_prefill(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N V"],
    *,
    plan: PrefillPlan,
    decay: Float[Array, " N"] | Float[Array, "B T N"] | Float[Array, "B T N H"] | None = None,
    beta: Float[Array, "B T N"] | None = None,
    scale: float | None = None,
    normalize: bool = False,
    sharding: AttentionSharding | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N V"], LinearCache]:
    """Linear attention within a context that is split over devices, and the state after it.

    Args:
      q, k, v, decay, beta: Of `plan.places`, one document a row, global.
      plan: How the context is split.
      Others: as `sharded_linear_decode`.
    Returns: out, laid out as q and of no meaning at padding, and the cache, whole on each device of the context axes.
    Raises: NotImplementedError for star attention.
    Cost: of `sharded_linear_attention`, and the last state to every device.
    """
    if plan.star_block is not None:
        raise NotImplementedError(
            "prefill: star attention cuts a context into blocks of keys, and a state of linear attention has none; "
            "leave out star_block, with which prefill is exact, and cheaper too"
        )
    is_token = plan.places >= 0
    if not np.all(is_token):
        # Padding stands behind the context, and as a document of its own would leave a state of zero there.
        real = jnp.asarray(is_token)[None, :, None]
        k = jnp.where(real[..., None], k, jnp.zeros((), k.dtype))
        if decay is not None:
            if decay.ndim == 1:
                decay = jnp.broadcast_to(decay, v.shape[:3])
            decay = jnp.where(real if decay.ndim == 3 else real[..., None], decay, jnp.zeros((), decay.dtype))
    out, state = sharded_linear_attention(
        q, k, v, decay=decay, beta=beta, return_state=True, scale=scale, normalize=normalize,
        sharding=plan.sharding(sharding), implementation=implementation,
    )  # fmt: skip
    split = CacheSplit.of(sharding, batch_size=q.shape[0], num_kv_heads=v.shape[2])
    if split is not None:
        state = jax.lax.with_sharding_constraint(state, _state_spec(split))
    return out, LinearCache(state=state, length=jnp.asarray(plan.length, jnp.int32))


def _state_spec(split: CacheSplit) -> PartitionSpec:
    return PartitionSpec(split.batch, split.heads)

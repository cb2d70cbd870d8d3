"""Decoding with MoBA over a mesh: the cache of a layer, and what is decoded against it.

A query reads few chunks, which may lie anywhere, so slots are not split over the context axes: each of their devices
has all of them, and does the same. Rows are split over the batch axes and heads over the heads axes, as those of a KV
cache are; those that their axes do not divide are whole on each device.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, DTypeLike, Float

from longctx.context_parallel.config import AttentionSharding
from longctx.context_parallel.inference import CacheSplit
from pallas_kernels.sparse.moba import check_moba_call
from pallas_kernels.sparse.moba_decode import moba_decode
from pallas_kernels.sparse.moba_route import chunk_sums


class MobaCache(NamedTuple):
    """The keys and values of the tokens decoded so far, slot s that of position s, and what chunks are scored by."""

    k: jax.Array
    """Keys, rotated, `[B, S, K, H]`; S is a multiple of the chunks' size."""
    v: jax.Array
    """Values, `[B, S, K, H]`."""
    sums: jax.Array
    """The sum of the keys that are there of each chunk, float32 `[B, S / chunk_size, K, H]`."""
    length: jax.Array
    """Tokens held, which is also the position of the next; int32 scalar."""


def empty_moba_cache(
    *,
    batch_size: int,
    max_length: int,
    num_kv_heads: int,
    head_dim: int,
    chunk_size: int,
    dtype: DTypeLike,
    sharding: AttentionSharding | None = None,
) -> MobaCache:
    """A cache of no tokens, each device's part made where it stays.

    Args:
      max_length: Tokens of a row to have room for; rounded up to whole chunks.
      sharding: As for `sharded_moba_decode`.
    Memory: 2 B S K H values and 4 B (S / chunk_size) K H bytes, over the devices of the batch and heads axes.
    """
    if chunk_size < 1:
        raise ValueError(f"empty_moba_cache: chunk_size: got {chunk_size}, wanted a number of tokens >= 1")
    num_chunks = -(-max_length // chunk_size)

    def zeros():
        keys = jnp.zeros((batch_size, num_chunks * chunk_size, num_kv_heads, head_dim), dtype)
        sums = jnp.zeros((batch_size, num_chunks, num_kv_heads, head_dim), jnp.float32)
        return MobaCache(k=keys, v=jnp.zeros_like(keys), sums=sums, length=jnp.zeros((), jnp.int32))

    split = CacheSplit.of(sharding, batch_size=batch_size, num_kv_heads=num_kv_heads)
    return zeros() if split is None else jax.jit(zeros, out_shardings=_specs(split))()


def sharded_moba_decode(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"],
    cache: MobaCache,
    *,
    top_k: int,
    scale: float | None = None,
    sharding: AttentionSharding | None = None,
) -> tuple[Float[Array, "B T N V"], MobaCache]:
    """MoBA of the next T tokens to what a cache holds and to each other, over the mesh in scope.

    Args:
      q, k, v: Of the new tokens, one document a row, global.
      cache: From `empty_moba_cache` or the previous call.
      top_k, scale: As `moba_attention`, the same in every call.
      sharding: The mesh axes to split over; None means those of `longctx.make_mesh` where such a mesh is in scope, and
        otherwise one device.
    Returns: out, and the cache with T more tokens; where they do not fit both are of no meaning.
    Raises: ValueError if T alone exceeds the room of the cache, or the call is wrong.
    Cost: as `moba_decode`; nothing is sent, but for new tokens that come in split along T.
    """
    chunk_size = cache.k.shape[1] // cache.sums.shape[1]
    check_moba_call("sharded_moba_decode", q, k, v, chunk_size=chunk_size, top_k=top_k, tokens=None)
    if q.shape[1] > cache.k.shape[1]:
        raise ValueError(
            f"sharded_moba_decode: got {q.shape[1]} tokens for a cache with room for {cache.k.shape[1]}; make it with "
            "a larger max_length, or pass fewer tokens"
        )
    decode = functools.partial(_decode, chunk_size=chunk_size, top_k=top_k, scale=scale)
    split = CacheSplit.of(sharding, batch_size=q.shape[0], num_kv_heads=k.shape[2])
    if split is not None:
        decode = jax.shard_map(
            decode,
            in_specs=(*(split.whole_spec,) * 3, _specs(split)),
            out_specs=(split.whole_spec, _specs(split)),
            check_vma=False,  # as in api.py
        )
    return decode(q, k, v, cache)


def _decode(q, k, v, cache: MobaCache, *, chunk_size: int, top_k: int, scale: float | None):
    positions = cache.length + jnp.arange(q.shape[1], dtype=jnp.int32)
    cache = MobaCache(
        k=jax.lax.dynamic_update_slice_in_dim(cache.k, k, cache.length, axis=1),
        v=jax.lax.dynamic_update_slice_in_dim(cache.v, v, cache.length, axis=1),
        sums=cache.sums + chunk_sums(k, positions[None] // chunk_size, cache.sums.shape[1]),
        length=cache.length + q.shape[1],
    )
    out = moba_decode(q, cache.k, cache.v, cache.sums, positions, chunk_size=chunk_size, top_k=top_k, scale=scale)
    return out, cache


def _specs(split: CacheSplit) -> MobaCache:
    return MobaCache(*(split.whole_spec,) * 3, length=PartitionSpec())

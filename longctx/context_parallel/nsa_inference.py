"""Decoding with Native Sparse Attention over a mesh: the cache of a layer, and what is decoded against it.

A query reads compressed keys, a few blocks and a window, so slots are not split over the context axes: each of their
devices has all of them, and does the same. Rows are split over the batch axes and heads over the heads axes, as those
of a KV cache are; those that their axes do not divide are whole on each device.

A block is compressed when its last token is decoded. Of the tokens to be compressed and of those of the sliding branch
a cache keeps no more than the next block and the next window may need.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Int32

from longctx.context_parallel.config import AttentionSharding
from longctx.context_parallel.inference import CacheSplit
from pallas_kernels import PADDING_SEGMENT_ID, Tokens, blockwise_attention
from pallas_kernels.sparse.nsa import BranchKeys, compressed_and_selected, gated_sum, sliding_mask
from pallas_kernels.sparse.nsa_blocks import NsaSizes, blocks_in_order, tokens_in_order
from pallas_kernels.sparse.nsa_compress import tokens_of_blocks


class NsaCache(NamedTuple):
    """What the branches need of the tokens decoded so far; keys and values side by side."""

    uncompressed: jax.Array
    """Of the compressed branch, of the last tokens, the last one last: `[B, compress_block - 1, K, 2 H]`."""
    compressed: jax.Array
    """Of each block that is compressed, `[B, M, K, 2 H]`."""
    selected: jax.Array
    """Of the selected branch, slot s of position s, keys rotated: `[B, S, K, 2 H]`."""
    window: jax.Array
    """Of the sliding branch, of the last tokens, the last one last: `[B, window - 1, K, 2 H]`."""
    length: jax.Array
    """Tokens held, which is also the position of the next; int32 scalar."""


class NewNsaBlocks(NamedTuple):
    """The blocks whose last token is a new one.

    Attributes:
      tokens: What is to be compressed, `[B, m, compress_block, K, 2 H]`; zeros behind the last block.
      number: Of each, int32 `[m]`; behind the last block, as many as there is room for.
      last: The position of its last token, int32 `[1, m]`.
    """

    tokens: jax.Array
    number: jax.Array
    last: jax.Array


def empty_nsa_cache(
    *,
    batch_size: int,
    max_length: int,
    num_kv_heads: int,
    head_dim: int,
    sizes: NsaSizes,
    dtype: DTypeLike,
    sharding: AttentionSharding | None = None,
) -> NsaCache:
    """A cache of no tokens, each device's part made where it stays.

    Args:
      max_length: Tokens of a row to have room for.
      sharding: As for `sharded_nsa_decode`.
    Memory: 2 B (S + S / compress_stride + window + compress_block) K H values, over the devices of the batch and heads
      axes.
    """

    def zeros():
        lengths = (sizes.compress_block - 1, sizes.num_compressed(max_length), max_length, sizes.window - 1)
        of_branches = (jnp.zeros((batch_size, length, num_kv_heads, 2 * head_dim), dtype) for length in lengths)
        return NsaCache(*of_branches, length=jnp.zeros((), jnp.int32))

    split = CacheSplit.of(sharding, batch_size=batch_size, num_kv_heads=num_kv_heads)
    return zeros() if split is None else jax.jit(zeros, out_shardings=_specs(split))()


def new_nsa_blocks(cache: NsaCache, uncompressed: Float[Array, "B T K H2"], *, sizes: NsaSizes) -> NewNsaBlocks:
    """The blocks that T new tokens complete.

    Args:
      uncompressed: Keys and values of the compressed branch, side by side.
    """
    num_new, length = uncompressed.shape[1], cache.length
    # The first block that ends at or behind the first new token, and as many as can.
    first = jnp.maximum(0, (length - sizes.compress_block + sizes.compress_stride) // sizes.compress_stride)
    number = first + jnp.arange(-(-num_new // sizes.compress_stride), dtype=jnp.int32)
    start = number * sizes.compress_stride
    last = start + sizes.compress_block - 1
    is_there = last < length + num_new
    joined = jnp.concatenate([cache.uncompressed, uncompressed], axis=1)
    row = jnp.where(is_there, start - length + sizes.compress_block - 1, -1)
    return NewNsaBlocks(
        tokens=tokens_of_blocks(joined, row[None], sizes),
        number=jnp.where(is_there, number, cache.compressed.shape[1]),
        last=last[None],
    )


def sharded_nsa_decode(
    q: Float[Array, "B T N H"],
    uncompressed: Float[Array, "B T K H2"],
    compressed: Float[Array, "B m K H2"],
    number: Int32[Array, " m"],
    selected: Float[Array, "B T K H2"],
    sliding: Float[Array, "B T K H2"],
    gates: Float[Array, "B T N 3"],
    cache: NsaCache,
    *,
    sizes: NsaSizes,
    scale: float | None = None,
    sharding: AttentionSharding | None = None,
) -> tuple[Float[Array, "B T N H"], NsaCache]:
    """NSA of the next T tokens to what a cache holds and to each other, over the mesh in scope.

    Args:
      q, gates: Of the new tokens, one document a row, global.
      uncompressed, selected, sliding: Keys and values of the new tokens, side by side.
      compressed, number: Those of the blocks that they complete, and which these are (`new_nsa_blocks`).
      cache: From `empty_nsa_cache` or the previous call.
      sizes, scale: As `nsa_attention`, the same in every call.
      sharding: The mesh axes to split over; None means those of `longctx.make_mesh` where such a mesh is in scope, and
        otherwise one device.
    Returns: out, and the cache with T more tokens; where they do not fit both are of no meaning.
    Raises: ValueError if T alone exceeds the room of the cache.
    Cost: a token at a time, attention to all compressed keys, twice their logits, and to num_blocks block_size + window
      others; nothing is sent, but for new tokens that come in split along T.
    """
    if q.shape[1] > cache.selected.shape[1]:
        raise ValueError(
            f"sharded_nsa_decode: got {q.shape[1]} tokens for a cache with room for {cache.selected.shape[1]}; make it "
            "with a larger max_length, or pass fewer tokens"
        )
    decode = functools.partial(_decode, sizes=sizes, scale=scale)
    split = CacheSplit.of(sharding, batch_size=q.shape[0], num_kv_heads=selected.shape[2])
    if split is not None:
        whole = split.whole_spec
        decode = jax.shard_map(
            decode,
            in_specs=(*(whole,) * 3, PartitionSpec(), *(whole,) * 3, _specs(split)),
            out_specs=(whole, _specs(split)),
            check_vma=False,  # as in api.py
        )
    return decode(q, uncompressed, compressed, number, selected, sliding, gates, cache)


def _decode(q, uncompressed, compressed, number, selected, sliding, gates, cache: NsaCache, *, sizes, scale):
    num_new, length = q.shape[1], cache.length
    near = jnp.concatenate([cache.window, sliding], axis=1)
    cache = NsaCache(
        uncompressed=jnp.concatenate([cache.uncompressed, uncompressed], axis=1)[:, num_new:],
        compressed=cache.compressed.at[:, number].set(compressed, mode="drop"),
        selected=jax.lax.dynamic_update_slice_in_dim(cache.selected, selected, length, axis=1),
        window=near[:, num_new:],
        length=length + num_new,
    )
    queries = tokens_in_order((length + jnp.arange(num_new, dtype=jnp.int32))[None], sizes)
    tables, _ = blocks_in_order(cache.selected.shape[1], sizes)
    # Blocks that are not compressed yet end behind all queries.
    far = (BranchKeys(*jnp.split(x, 2, axis=-1)) for x in (cache.compressed, cache.selected))
    branches = compressed_and_selected(q, *far, tables, queries, sizes=sizes, scale=scale, implementation=None)
    place = length + jnp.arange(1 - sizes.window, num_new, dtype=jnp.int32)[None]
    tokens = Tokens(
        q_positions=queries.place,
        q_segment_ids=queries.segment,
        kv_positions=place,
        kv_segment_ids=jnp.where(place >= 0, 0, PADDING_SEGMENT_ID),
    )
    of_window = blockwise_attention(
        q, *jnp.split(near, 2, axis=-1), mask=sliding_mask(sizes), tokens=tokens, scale=scale
    )
    return gated_sum((*branches, of_window), gates), cache


def _specs(split: CacheSplit) -> NsaCache:
    return NsaCache(*(split.whole_spec,) * 4, length=PartitionSpec())

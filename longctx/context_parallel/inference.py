"""Inference over a mesh: a KV cache split over the context axes, what is decoded against it, and how it is filled.

The one place that wraps these in shard_map, as api.py does for training. Rows are split over the batch axes, heads over
the heads axes, the slots of the cache over the sequence axes; rows or kv heads that their axes do not divide are worked
on by each of their devices in full, and so are heads whose masks differ.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Int

from longctx import masks
from longctx.context_parallel.api import HOP_SCOPE, AnySchedule, MeshSplit, sharded_attention, sharded_schedule
from longctx.context_parallel.config import AttentionSharding
from longctx.context_parallel.kv_cache import EMPTY, KVCache, room_of, write_own
from longctx.context_parallel.layout import Layout
from longctx.context_parallel.tree import tree_backward, tree_decode
from pallas_kernels import (
    PADDING_SEGMENT_ID,
    Bias,
    BlockSizes,
    Mask,
    Tokens,
    blockwise_attention,
    latent_attention,
    make_schedule,
)
from pallas_kernels.bias import check_bias, like_parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillPlan:
    """Where the tokens of a context are worked on, and then stay, when it is split over devices.

    Each device has a run of equal length; where the context ends early, padding stands at its end. For exact attention
    runs are those of the zigzag layout, which evens out causal masks. For star attention a run is one of whole blocks,
    and each device but the first also works on a copy of the first block, the anchor, in front of its run. So what the
    devices hold, one after the other, is [anchor, run] P times.

    Attributes:
      length: Tokens of the context, C.
      degree: Devices that it is split over, P.
      star_block: Tokens of a block of star attention; None is exact attention, without anchors.
    Raises: ValueError where a number is not positive.
    """

    length: int
    degree: int
    star_block: int | None = None

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"prefill: got a context of {self.length} tokens, wanted at least 1; decode from an "
                             "empty cache instead")  # fmt: skip
        if self.star_block is not None and self.star_block < 1:
            raise ValueError(f"prefill: star_block={self.star_block}, wanted None or a number of tokens >= 1")

    @property
    def run_len(self) -> int:
        """Tokens of a run."""
        multiple = self._layout.multiple(self.degree) if self.star_block is None else self.degree * self.star_block
        return -(-self.length // multiple) * multiple // self.degree

    @property
    def anchor_len(self) -> int:
        """Tokens of an anchor; 0 where the device that holds the first block is the only one."""
        return 0 if self.star_block is None or self.degree == 1 else self.star_block

    @property
    def num_filled(self) -> Int[np.ndarray, " devices"]:
        """Tokens of each device's run."""
        return (self.places.reshape(self.degree, -1)[:, self.anchor_len :] >= 0).sum(axis=1)

    @property
    def places(self) -> Int[np.ndarray, " tokens"]:
        """Which token of the context each device works on, one device after the other; -1 for padding.

        A device's own positions and its anchor's are those that they have in the context.
        """
        order = self._layout.order(self.degree * self.run_len, self.degree)
        anchors = np.tile(np.arange(self.anchor_len), (self.degree, 1))
        anchors[0] = EMPTY  # the first run begins with it
        places = np.concatenate([anchors, order.reshape(self.degree, -1)], axis=1).reshape(-1).astype(np.int32)
        return np.where(places < self.length, places, np.int32(EMPTY))

    @property
    def _layout(self) -> Layout:
        return Layout(name="zigzag" if self.star_block is None else "contiguous")

    def num_slots(self, max_length: int) -> int:
        """Slots of a device whose row is to have room for max_length tokens.

        Raises: ValueError where that is less than the context.
        """
        if max_length < self.length:
            raise ValueError(
                f"prefill: a context of {self.length} tokens does not fit max_length={max_length}; raise max_length"
            )
        return self.run_len + -(-(max_length - self.length) // self.degree)

    def sharding(self, sharding: AttentionSharding | None) -> AttentionSharding:
        """`sharding` for the exact prefill of a context: one document, in the plan's layout, of any length.

        Halos, which serve windows up to a part of the context alone, are left to the ring.
        """
        sharding = sharding or AttentionSharding()
        strategy = "ring" if sharding.strategy == "halo" else sharding.strategy
        return dataclasses.replace(
            sharding, strategy=strategy, window_strategy=None, layout=self._layout, max_document_length=None
        )

    def mask(self, mask: Mask) -> Mask:
        """`mask` within what a query may see in this prefill.

        For star attention that is its own block and the first: the mask by which one device would compute the same.
        """
        mask = within_documents(mask)
        if self.star_block is None:
            return mask
        return mask & (masks.chunked(self.star_block) | masks.prefix(self.star_block))


def cache_degree(sharding: AttentionSharding | None = None) -> int:
    """Devices that the slots of a cache are split over, P: 1 without a mesh in scope."""
    split = CacheSplit.of(sharding)
    return 1 if split is None else split.degree


def empty_cache(
    *,
    batch_size: int,
    max_length: int,
    num_kv_heads: int,
    head_dim: int,
    values: bool = True,
    dtype: DTypeLike,
    mask: Mask,
    sharding: AttentionSharding | None = None,
) -> KVCache:
    """A cache of no tokens, each device's part made where it stays.

    Args:
      batch_size, num_kv_heads, head_dim: Global.
      values: Whether values have slots of their own; False where they are the first dims of the keys.
      max_length: Tokens to have room for; rounded up to a multiple of P.
      dtype: Of keys and values.
      mask: The layer's.
      sharding: As for `sharded_decode`.
    Memory: O(batch_size max_length K H / P) a device.
    """
    split = CacheSplit.of(sharding, batch_size=batch_size, num_kv_heads=num_kv_heads, mask=mask)
    degree = 1 if split is None else split.degree
    num_slots = -(-max_length // degree) * degree
    shape = (batch_size, num_slots, num_kv_heads, head_dim)

    def zeros():
        return KVCache(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype) if values else None,
            positions=jnp.full((num_slots,), EMPTY, jnp.int32),
            length=jnp.zeros((), jnp.int32),
            room=jnp.asarray(num_slots, jnp.int32),
        )

    return zeros() if split is None else jax.jit(zeros, out_shardings=split.cache_spec)()


def sharded_decode(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"] | None,
    cache: KVCache,
    *,
    mask: Mask,
    value_dim: int | None = None,
    sharding: AttentionSharding | None = None,
    sinks: Float[Array, " N"] | None = None,
    bias: Bias | None = None,
    deterministic: bool = True,
    **options,
) -> tuple[Float[Array, "B T N V"], KVCache]:
    """Attention of the next T tokens to those of a cache, and to each other, by tree attention over the mesh in scope.

    Every device takes the keys and values that are dealt to it, and attends from all queries to its own slots.

    Args:
      q, k, v: Of the new tokens, global.
      cache: From `empty_cache`, `sharded_prefill` or the previous call, with the same sharding.
      mask: Which pairs may attend; one document a row.
      value_dim: If given, values are so many first dims of the keys, which have one head, and v is None; `scale` must
        be given then.
      sharding: The mesh axes to split over; None means those of `longctx.make_mesh` where such a mesh is in scope, and
        otherwise one device.
      sinks, bias, deterministic, **options: As `blockwise_attention`.
    Returns: out `[B, T, N, V]` and the cache with T more tokens. Differentiable in q, k, v, sinks, bias and the
      cache's arrays.
    Raises: ValueError where T exceeds the slots of the cache, or an axis is not of the mesh, or does not divide the
      slots, or value_dim does not go with the others.
    Cost: what tree.py states; nothing of the size of the cache moves. Where q, k and v come in split along T, they are
      gathered.
    """
    if value_dim is not None and (v is not None or sinks is not None or bias is not None or k.shape[2] != 1):
        raise ValueError(
            f"decode: value_dim={value_dim} with v, sinks, a bias or {k.shape[2]} kv heads, wanted keys of one head "
            "alone, whose first dims are the values; leave it out, or them"
        )
    if v is None and (value_dim is None or options.get("scale") is None):
        raise ValueError(
            f"decode: got v=None, value_dim={value_dim}, scale={options.get('scale')}; wanted v, or value_dim and "
            "scale in its place"
        )
    num_new, num_slots = q.shape[1], cache.k.shape[1]
    if num_new > num_slots:
        raise ValueError(
            f"decode: T={num_new} tokens do not fit a cache of {num_slots}; raise max_length in init_cache"
        )
    split = CacheSplit.of(sharding, batch_size=q.shape[0], num_kv_heads=k.shape[2], mask=mask)
    if split is not None and num_slots % split.degree:
        raise ValueError(
            f"decode: a cache of {num_slots} slots does not split over the {split.degree} devices of mesh axes "
            f"{split.sequence}; make it with init_cache inside the same jax.set_mesh"
        )
    slots, new_length = _written(split, cache, k, v), cache.length + num_new
    cache = KVCache(*slots, length=new_length, room=cache.room)
    q_positions = (new_length - num_new + jnp.arange(num_new, dtype=jnp.int32))[None]
    tokens = Tokens(
        q_positions=q_positions,
        q_segment_ids=jnp.zeros_like(q_positions),
        kv_positions=cache.positions[None],
        kv_segment_ids=cache.segment_ids,
    )
    options = options | {"mask": within_documents(mask)}
    if split is None:
        options |= {"tokens": tokens, "deterministic": deterministic}
        if value_dim is not None:
            return latent_attention(q, cache.k[:, :, 0], value_dim=value_dim, **options), cache
        return blockwise_attention(q, cache.k, cache.v, sinks=sinks, bias=bias, **options), cache
    call = _Call(
        split=split,
        value_dim=value_dim,
        uses_lse=sinks is not None,
        deterministic=deterministic,
        options=tuple(options.items()),
    )
    out, lse = _attend(call, q, cache.k, cache.v, tokens, check_bias("decode", bias, q.shape[2]))
    if sinks is not None:
        # What sum exp S is of it and exp(sink) together.
        sees_some = lse > -jnp.inf
        share = jnp.where(
            sees_some, jax.nn.sigmoid(jnp.where(sees_some, lse, 0.0) - sinks.astype(jnp.float32)[:, None]), 0.0
        )
        out = (out.astype(jnp.float32) * jnp.swapaxes(share, 1, 2)[..., None]).astype(out.dtype)
    return out, cache


def prefill_schedule(
    mask: Mask,
    plan: PrefillPlan,
    *,
    batch_size: int,
    block_sizes: BlockSizes | None = None,
    sharding: AttentionSharding | None = None,
) -> AnySchedule:
    """The schedule that `sharded_prefill` takes; to be built once per distinct mask, for all layers.

    Args: as `sharded_prefill`; batch_size is global.
    """
    tokens, mask, length = plan_tokens(plan), plan.mask(mask), len(plan.places)
    split = CacheSplit.of(sharding)
    if split is None or plan.star_block is None:
        return sharded_schedule(
            mask,
            tokens,
            batch_size=batch_size,
            q_len=length,
            kv_len=length,
            block_sizes=block_sizes,
            sharding=plan.sharding(sharding),
        )
    of_a_device = functools.partial(
        make_schedule, mask, q_len=length // plan.degree, kv_len=length // plan.degree, block_sizes=block_sizes
    )
    spec = PartitionSpec(None, split.sequence)
    return jax.shard_map(of_a_device, in_specs=spec, out_specs=spec, check_vma=False)(tokens)


def sharded_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"],
    *,
    plan: PrefillPlan,
    num_slots: int,
    mask: Mask,
    kept: tuple[jax.Array, jax.Array | None] | None = None,
    schedule: AnySchedule | None = None,
    sharding: AttentionSharding | None = None,
    sinks: Float[Array, " N"] | None = None,
    bias: Bias | None = None,
    deterministic: bool = True,
    **options,
) -> tuple[Float[Array, "B T N V"], KVCache]:
    """Attention within a context that is split over devices, and a cache that holds it; keys stay where they are.

    Args:
      q, k, v: Of `plan.places`, global.
      plan: How the context is split. Exact where it has no star_block: then `sharded_attention` does it, with its
        strategy. Else star attention, of which nothing is sent.
      num_slots: Slots of a device, from `plan.num_slots`.
      mask: Which pairs may attend, were it not for the plan; one document a row.
      kept: What the cache is to hold, `[B, T, heads, dims]` each, of values maybe None; None means k and v.
      schedule: From `prefill_schedule` with the same mask, plan and sharding; None builds it here.
      sharding: As for `sharded_decode`.
      sinks, bias, deterministic, **options: As `blockwise_attention`.
    Returns: out, laid out as q, and the cache.
    """
    split = CacheSplit.of(sharding, batch_size=q.shape[0], num_kv_heads=k.shape[2], mask=mask)
    options = options | {"mask": plan.mask(mask), "deterministic": deterministic}
    if schedule is None:
        schedule = prefill_schedule(
            mask, plan, batch_size=q.shape[0], block_sizes=options.get("block_sizes"), sharding=sharding
        )

    def attend(q, k, v, sinks, bias, tokens, schedule):
        arguments = {"tokens": tokens, "schedule": schedule, "sinks": sinks, "bias": bias, **options}
        if plan.star_block is None:
            return sharded_attention(q, k, v, sharding=plan.sharding(sharding), **arguments)
        return blockwise_attention(q, k, v, **arguments)

    if split is not None and plan.star_block is not None:
        heads, rows = PartitionSpec(split.batch, split.sequence, split.heads), PartitionSpec(None, split.sequence)
        attend = jax.shard_map(
            attend,
            in_specs=(heads, heads, heads, *(PartitionSpec(split.heads),) * 2, rows, rows),
            out_specs=heads,
            check_vma=False,  # as in api.py
        )
    out = attend(q, k, v, sinks, bias, plan_tokens(plan), schedule)

    def keep(k, v, places):
        spare = num_slots - plan.run_len

        def run(x, dim, fill=0):
            x = jax.lax.slice_in_dim(x, plan.anchor_len, None, axis=dim)
            padding = [(0, spare if d == dim else 0) for d in range(x.ndim)]
            return jnp.pad(x, padding, constant_values=jnp.asarray(fill, x.dtype))

        return run(k, 1), None if v is None else run(v, 1), run(places, 0, EMPTY)

    kept = (k, v) if kept is None else kept
    if split is not None:
        of_kept = CacheSplit.of(sharding, batch_size=q.shape[0], num_kv_heads=kept[0].shape[2], mask=mask).slots_spec
        keep = jax.shard_map(keep, in_specs=of_kept, out_specs=of_kept, check_vma=False)
    cache = KVCache(
        *keep(*kept, jnp.asarray(plan.places)),
        length=jnp.asarray(plan.length, jnp.int32),
        room=jnp.asarray(room_of(plan.num_filled, num_slots), jnp.int32),
    )
    return out, cache


def plan_tokens(plan: PrefillPlan) -> Tokens:
    """The tokens of a plan's places, one document a row."""
    places = plan.places
    return Tokens.self_attention(
        jnp.asarray(np.maximum(places, 0))[None],
        jnp.asarray(np.where(places >= 0, 0, PADDING_SEGMENT_ID).astype(np.int32))[None],
    )


def within_documents(mask: Mask) -> Mask:
    """A mask by which padding takes part in nothing."""
    return mask if mask.within_documents else mask & masks.documents()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSplit:
    """How a cache is split over the mesh in scope; hashable."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    sequence: tuple[str, ...]
    degree: int

    @classmethod
    def of(
        cls,
        sharding: AttentionSharding | None,
        *,
        batch_size: int = 1,
        num_kv_heads: int = 1,
        mask: Mask | None = None,
    ) -> "CacheSplit | None":
        """None where there is nothing to split over."""
        split = MeshSplit.of(sharding, batch_size)
        if split is None:
            return None
        whole_heads = num_kv_heads % split.heads_size or (mask is not None and mask.head_groups > 1)
        return cls(
            batch=split.batch,
            heads=() if whole_heads else split.heads,
            sequence=split.sequence,
            degree=split.degree,
        )

    @property
    def slots_spec(self) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
        """Of k, v and positions of a cache."""
        kv = PartitionSpec(self.batch, self.sequence, self.heads)
        return kv, kv, PartitionSpec(self.sequence)

    @property
    def cache_spec(self) -> KVCache:
        return KVCache(*self.slots_spec, length=PartitionSpec(), room=PartitionSpec())

    @property
    def whole_spec(self) -> PartitionSpec:
        """Of `[B, T, N, H]` arrays of tokens that every device has."""
        return PartitionSpec(self.batch, None, self.heads)

    @property
    def tokens_spec(self) -> Tokens:
        keys = PartitionSpec(None, self.sequence)
        return Tokens(
            q_positions=PartitionSpec(), q_segment_ids=PartitionSpec(), kv_positions=keys, kv_segment_ids=keys
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static of a call; hashable. `options` go to both passes, `deterministic` to the backward alone, and
    `uses_lse` says whether anything depends on lse: where nothing does, its cotangent is None."""

    split: CacheSplit
    value_dim: int | None
    uses_lse: bool
    deterministic: bool
    options: tuple[tuple[str, Any], ...]


def _written(split: CacheSplit | None, cache: KVCache, k: jax.Array, v: jax.Array | None) -> tuple:
    """k, v and positions of the cache with the new tokens in it."""
    arguments = *cache[:3], cache.length, k, v
    if split is None:
        return write_own(*arguments, axes=())
    return jax.shard_map(
        functools.partial(write_own, axes=split.sequence),
        in_specs=(*split.slots_spec, PartitionSpec(), split.whole_spec, split.whole_spec),
        out_specs=split.slots_spec,
        check_vma=False,  # as in api.py
    )(*arguments)


# As in api.py, differentiated here and not inside the shard_map.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, q, k, v, tokens, bias):
    """out and lse."""
    return _attend_fwd(call, q, k, v, tokens, bias)[0]


def _attend_fwd(call: _Call, q, k, v, tokens, bias):
    split = call.split

    def shard(q, k, v, tokens, bias):
        options = dict(call.options) | ({} if bias is None else {"bias": bias})
        with jax.named_scope(HOP_SCOPE):
            return tree_decode(q, k, v, tokens, axes=split.sequence, value_dim=call.value_dim, **options)

    kv, whole = split.slots_spec[0], split.whole_spec
    out, lse = jax.shard_map(
        shard,
        in_specs=(whole, kv, kv, split.tokens_spec, PartitionSpec(split.heads)),
        out_specs=(whole, PartitionSpec(split.batch, split.heads)),
        check_vma=False,  # as in api.py
    )(q, k, v, tokens, bias)
    return (out, lse), (q, k, v, out, lse, tokens, bias)


def _attend_bwd(call: _Call, residuals, cotangents):
    split = call.split

    def shard(q, k, v, out, lse, dout, dlse, tokens, bias):
        dlse = dlse if call.uses_lse else None
        options = dict(call.options) | {"deterministic": call.deterministic, "value_dim": call.value_dim}
        if bias is not None:
            options |= {"bias": bias, "bias_gradient": True}
        with jax.named_scope(HOP_SCOPE):
            dq, dk, dv, *dbias = tree_backward(q, k, v, out, lse, dout, dlse, tokens, axes=split.sequence, **options)
        return dq, dk, dv, like_parameters(jax.lax.psum(dbias[0], split.batch), bias) if dbias else None

    q, k, v, out, lse, tokens, bias = residuals
    kv, whole, of_lse = split.slots_spec[0], split.whole_spec, PartitionSpec(split.batch, split.heads)
    gradients = jax.shard_map(
        shard,
        in_specs=(whole, kv, kv, whole, of_lse, whole, of_lse, split.tokens_spec, PartitionSpec(split.heads)),
        out_specs=(whole, kv, kv, PartitionSpec(split.heads)),
        check_vma=False,  # as in api.py
    )(q, k, v, out, lse, *cotangents, tokens, bias)
    return *gradients[:3], None, gradients[3]


_attend.defvjp(_attend_fwd, _attend_bwd)

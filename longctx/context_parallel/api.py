"""Runs attention on each device's shard of a mesh: the one place that wraps a strategy in shard_map.

Kernels cannot be cut up by XLA's partitioner, and loops whose bounds depend on the rows of a batch should not be: each
device runs the op on its own rows and heads, which need nothing from the others, and where the sequence is split too, a
strategy says how queries meet the keys of other devices.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from longctx.context_parallel.ring import RingSchedule, ring_backward, ring_forward, ring_schedule
from longctx.sharding import ACTIVATION_AXES, own_mesh_in_scope
from pallas_kernels import (
    BlockSizes,
    Dropout,
    Mask,
    Schedule,
    Tokens,
    blockwise_attention,
    blockwise_attention_backward,
    blockwise_attention_forward,
    make_schedule,
    sinks_gradient,
)

AnySchedule = Schedule | RingSchedule
HOP_SCOPE = "context_parallel"  # names, in a compiled program, the collectives that a strategy sends for each layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSharding:
    """Names the mesh axes that attention is split over.

    Attributes:
      batch: Axes that split the rows of the batch.
      heads: Axes that split the heads; their size must divide the number of kv heads.
      sequence: Axes that split the tokens, queries and keys alike; their size must divide both lengths.
      strategy: How queries meet the keys of other devices, where `sequence` splits anything.
    """

    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    strategy: Literal["ring"] = "ring"

    def __post_init__(self):
        if self.strategy != "ring":
            raise ValueError(f"AttentionSharding: strategy={self.strategy!r}, wanted 'ring', the one there is so far")


_OWN_AXES = AttentionSharding(
    batch=ACTIVATION_AXES["batch"], heads=ACTIVATION_AXES["heads"], sequence=ACTIVATION_AXES["sequence"]
)


def sharded_schedule(
    mask: Mask,
    tokens: Tokens,
    *,
    batch_size: int,
    q_len: int,
    kv_len: int,
    block_sizes: BlockSizes | None = None,
    sharding: AttentionSharding | None = None,
) -> AnySchedule:
    """The schedule that `sharded_attention` takes; to be built once a step per distinct mask, for all layers.

    Args:
      mask, block_sizes: As `pallas_kernels.make_schedule`.
      tokens: Global, as for `sharded_attention`.
      batch_size, q_len, kv_len: Global.
      sharding: As for `sharded_attention`.
    Raises: ValueError where an axis is not of the mesh, or the sequence axes do not divide the lengths.
    """
    split = _Split.of(sharding, batch_size)
    if split is None or split.ring_size == 1:
        return make_schedule(mask, tokens, q_len=q_len, kv_len=kv_len, block_sizes=block_sizes)
    tokens = split.filled(tokens, q_len, kv_len)

    def shard(tokens):
        return ring_schedule(
            mask,
            tokens,
            q_len=q_len // split.ring_size,
            kv_len=kv_len // split.ring_size,
            block_sizes=block_sizes,
            axes=split.sequence,
        )

    return jax.shard_map(
        shard, in_specs=(split.rows(tokens),), out_specs=split.hops(tokens.q_positions), check_vma=False
    )(tokens)


def sharded_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask,
    tokens: Tokens,
    schedule: AnySchedule | None = None,
    sharding: AttentionSharding | None = None,
    sinks: jax.Array | None = None,
    dropout: Dropout | None = None,
    deterministic: bool = True,
    **options,
) -> jax.Array:
    """`blockwise_attention` over the mesh in scope.

    Args:
      q, k, v: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, V]`, global.
      mask, deterministic, **options: As `blockwise_attention`.
      tokens: Global; where the sequence is split and permuted (layout.py), its positions are those of the permuted
        tokens.
      schedule: From `sharded_schedule` with the same mask, tokens and sharding; None builds it here.
      sharding: The mesh axes to split over; None means those of `longctx.make_mesh` where such a mesh is in scope,
        and otherwise calls the op directly.
      sinks: `[N]`, global; split as the heads are.
      dropout: Global; its seeds are split as rows and heads are, and since they are drawn with by positions and segment
        ids, the result does not depend on the split.
    Returns: out `[B, T, N, V]`, split as q.
    Raises: ValueError where an axis is not of the mesh, or its size does not divide the kv heads or the lengths;
      NotImplementedError where the heads are split and the mask differs between them.
    Cost: what the strategy states (ring.py); nothing moves where the sequence is not split, but for the gradient of the
      sinks, N float32 that are summed over the devices that split rows and tokens. A batch that the batch axes
      do not divide is computed by each of their devices in full.
    """
    split = _Split.of(sharding, q.shape[0])
    if split is None:
        return blockwise_attention(
            q, k, v, mask=mask, tokens=tokens, schedule=schedule, sinks=sinks, dropout=dropout,
            deterministic=deterministic, **options,
        )  # fmt: skip
    split.check_heads(mask, k.shape[2])
    if split.ring_size > 1:
        tokens = split.filled(tokens, q.shape[1], k.shape[1])
        if schedule is None:
            schedule = sharded_schedule(
                mask,
                tokens,
                batch_size=q.shape[0],
                q_len=q.shape[1],
                kv_len=k.shape[1],
                block_sizes=options.get("block_sizes"),
                sharding=sharding,
            )
    call = _Call(split=split, deterministic=deterministic, options=(("mask", mask), *options.items()))
    return _attention(call, q, k, v, tokens, schedule, sinks, dropout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Split:
    """How one call is split over the mesh in scope; hashable."""

    batch_size: int
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    heads_size: int
    sequence: tuple[str, ...]
    ring_size: int

    @classmethod
    def of(cls, sharding: AttentionSharding | None, batch_size: int) -> "_Split | None":
        """None where there is nothing to split over."""
        if sharding is None:
            if own_mesh_in_scope() is None:
                return None
            sharding = _OWN_AXES
        mesh = jax.sharding.get_abstract_mesh()
        divides = batch_size % _axes_size("batch", sharding.batch, mesh) == 0
        ring_size = _axes_size("sequence", sharding.sequence, mesh)
        return cls(
            batch_size=batch_size,
            batch=sharding.batch if divides else (),
            heads=sharding.heads,
            heads_size=_axes_size("heads", sharding.heads, mesh),
            sequence=sharding.sequence if ring_size > 1 else (),
            ring_size=ring_size,
        )

    def check_heads(self, mask: Mask, num_kv_heads: int) -> None:
        if self.heads_size > 1 and mask.head_groups > 1:
            # Every device runs one program, and which of the masks are its heads' would have to be known when that is
            # compiled.
            raise NotImplementedError(
                f"sharded_attention: the mask {mask} differs between heads, and the heads are split over the "
                f"{self.heads_size} devices of mesh axes {self.heads}; keep the heads whole (tensor=1), or use one "
                "mask for all heads"
            )
        if num_kv_heads % self.heads_size:
            raise ValueError(
                f"sharded_attention: {num_kv_heads} kv heads do not split over the {self.heads_size} devices of mesh "
                f"axes {self.heads}; make those axes smaller or num_kv_heads a multiple"
            )

    def filled(self, tokens: Tokens, q_len: int, kv_len: int) -> Tokens:
        """The tokens with nothing None and one number of rows: a shard cannot know its place in the sequence."""
        for name, length in (("T", q_len), ("S", kv_len)):
            if length % self.ring_size:
                raise ValueError(
                    f"sharded_attention: {name}={length} does not split over the {self.ring_size} devices of mesh axes "
                    f"{self.sequence}; pad it to a multiple"
                )
        sides = (*tokens.queries(q_len), *tokens.keys(kv_len))
        num_rows = max(x.shape[0] for x in sides)
        q_positions, q_segment_ids, kv_positions, kv_segment_ids = (
            jnp.broadcast_to(x, (num_rows, x.shape[1])) for x in sides
        )
        return Tokens(
            q_positions=q_positions,
            q_segment_ids=q_segment_ids,
            kv_positions=kv_positions,
            kv_segment_ids=kv_segment_ids,
        )

    @property
    def heads_spec(self) -> PartitionSpec:
        """Of `[B, T, N, H]` arrays."""
        return PartitionSpec(self.batch, self.sequence, self.heads)

    @property
    def lse_spec(self) -> PartitionSpec:
        """Of `[B, N, T]` arrays."""
        return PartitionSpec(self.batch, self.heads, self.sequence)

    def rows(self, tree: Any) -> Any:
        """Of a tree of tokens, or of schedules where the sequence is whole: `[B or 1, ...]`."""
        return jax.tree.map(lambda x: PartitionSpec(self._batch_of(x.shape[0]), self.sequence), tree)

    def hops(self, positions: jax.Array) -> PartitionSpec:
        """Of every array of a ring's schedule, `[hops, B or 1, ...]`, made of tokens with these positions."""
        return PartitionSpec(None, self._batch_of(positions.shape[0]), self.sequence)

    def sinks_spec(self, sinks: jax.Array | None) -> PartitionSpec | None:
        """Of `[N]` arrays."""
        return None if sinks is None else PartitionSpec(self.heads)

    def dropout_spec(self, dropout: Dropout | None) -> Any:
        """Of its seeds, `[B or 1, N]`."""
        return jax.tree.map(lambda seeds: PartitionSpec(self._batch_of(seeds.shape[0]), self.heads), dropout)

    def schedule_spec(self, schedule: AnySchedule | None) -> Any:
        if isinstance(schedule, RingSchedule):
            return self.hops(schedule.kv_positions[0])
        return self.rows(schedule)

    def _batch_of(self, num_rows: int) -> tuple[str, ...]:
        return self.batch if num_rows == self.batch_size else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static of a call; hashable. `options` go to both passes, `deterministic` to the backward alone."""

    split: _Split
    deterministic: bool
    options: tuple[tuple[str, Any], ...]


# Differentiated here and not inside the shard_map, whose transpose would add a reduction over every axis that its
# inputs are not split over; and a ring's backward is not the derivative of its hops.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, q, k, v, tokens, schedule, sinks, dropout):
    return _attention_fwd(call, q, k, v, tokens, schedule, sinks, dropout)[0]


def _attention_fwd(call: _Call, q, k, v, tokens, schedule, sinks, dropout):
    split, options = call.split, dict(call.options)

    def shard(q, k, v, tokens, schedule, sinks, dropout):
        extras = {"sinks": sinks, "dropout": dropout}
        if split.sequence:
            with jax.named_scope(HOP_SCOPE):
                return ring_forward(q, k, v, tokens, schedule, axes=split.sequence, **extras, **options)
        return blockwise_attention_forward(q, k, v, tokens=tokens, schedule=schedule, **extras, **options)

    heads = split.heads_spec
    out, lse = jax.shard_map(
        shard,
        in_specs=(
            *(heads, heads, heads, split.rows(tokens), split.schedule_spec(schedule)),
            *(split.sinks_spec(sinks), split.dropout_spec(dropout)),
        ),
        out_specs=(heads, split.lse_spec),
        check_vma=False,  # the op's loops start from constants, which that check would have to be told of
    )(q, k, v, tokens, schedule, sinks, dropout)
    return out, (q, k, v, out, lse, tokens, schedule, sinks, dropout)


def _attention_bwd(call: _Call, residuals, dout):
    split = call.split

    def shard(q, k, v, out, lse, dout, tokens, schedule, sinks, dropout):
        options = dict(call.options) | {"deterministic": call.deterministic, "dropout": dropout}
        dlse = jnp.zeros_like(lse)
        if split.sequence:
            with jax.named_scope(HOP_SCOPE):
                gradients = ring_backward(
                    q, k, v, out, lse, dout, dlse, tokens, schedule, axes=split.sequence, **options
                )
        else:
            gradients = blockwise_attention_backward(
                q, k, v, out, lse, dout, dlse, tokens=tokens, schedule=schedule, **options
            )
        if sinks is None:
            return *gradients, None
        dsinks = jax.lax.psum(sinks_gradient(sinks, out, lse, dout, None), (*split.batch, *split.sequence))
        return *gradients, dsinks.astype(sinks.dtype)

    q, k, v, out, lse, tokens, schedule, sinks, dropout = residuals
    heads = split.heads_spec
    dq, dk, dv, dsinks = jax.shard_map(
        shard,
        in_specs=(
            *(heads, heads, heads, heads, split.lse_spec, heads),
            split.rows(tokens),
            split.schedule_spec(schedule),
            *(split.sinks_spec(sinks), split.dropout_spec(dropout)),
        ),
        out_specs=(heads, heads, heads, split.sinks_spec(sinks)),
        check_vma=False,  # as in the forward
    )(q, k, v, out, lse, dout, tokens, schedule, sinks, dropout)
    return dq, dk, dv, None, None, dsinks, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _axes_size(name: str, axes: tuple[str, ...], mesh: AbstractMesh) -> int:
    for axis in axes:
        if axis not in mesh.shape:
            raise ValueError(
                f"AttentionSharding: {name} axis {axis!r} is not of the mesh in scope, whose axes are "
                f"{mesh.axis_names}; name one of those, inside jax.set_mesh"
            )
    return math.prod(mesh.shape[axis] for axis in axes)

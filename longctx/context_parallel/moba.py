"""Mixture of Block Attention over a mesh: chunks are chosen from all of a row, and both attentions go by a strategy.

Chunks are numbered on the whole row, in the order of the sequence, from its positions and segment ids alone. Of keys
what is needed for the choice are sums, one a whole chunk: each device sums its own, and all add them up. Then each
device routes its own queries, and attends by the strategy of softmax attention twice: to its queries' own chunks, and
with the queries in the lists of their chunks, wherever the keys of these are. To the strategy the latter is attention
of other queries to the same keys; their order is the lists', and nothing asks for it.

Traffic, per device and layer, in bytes, beside that of the strategy, once for each of the two attentions (a ring leaves
out the hops that chunks do not reach across, where the layout is known and has runs):
  forward   two all-gathers of int32 positions and segment ids, of which a device sends (P - 1) B (T / P) 4 each
            two more for the schedule of the attention within chunks, and two of K times that for the other's
            one all-reduce of B M K H float32, M = T // chunk_size, of which a device sends twice (P - 1) / P
`transfers` says the same in numbers, of the B rows of a device. With top_k = 1 there is the one attention alone.
Nothing of it is shared between layers.

Preconditions: ring or all_gather; P divides T, as the layout asks; tokens of a document stand together in the sequence,
positions ascending. Where no layout is named, the order of the shards is that of the sequence.

Reference: Lu et al. 2025, MoBA, arXiv:2502.13189.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import DTypeLike

from longctx.context_parallel.api import HOP_SCOPE, AttentionSplit
from longctx.context_parallel.config import AttentionSharding
from longctx.context_parallel.layout import not_of_rows
from longctx.context_parallel.one_call import Whole
from longctx.context_parallel.strategy import Residuals, Setting, ShardedSchedule, Strategy, num_bytes
from longctx.context_parallel.traffic import Transfer
from pallas_kernels import Implementation, Tokens
from pallas_kernels.mask import SameDocument
from pallas_kernels.saved import as_attention
from pallas_kernels.sparse.moba import (
    LOCAL_MASK,
    check_moba_call,
    moba_attention,
    num_choices,
)
from pallas_kernels.sparse.moba_route import (
    Chunks,
    Route,
    chunk_sums,
    fold_keys,
    number_chunks,
    route_queries,
    unfold_keys,
)
from pallas_kernels.tokens import TokenAxis

_STRATEGIES = ("ring", "all_gather")
_OP = "sharded_moba"
_ROUTED_MASK = SameDocument()
"""The mask of the routed attention: rows of the lists and keys have the numbers of their chunks for segment ids."""


def sharded_moba(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    chunk_size: int,
    top_k: int,
    tokens: Tokens,
    sharding: AttentionSharding | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
    deterministic: bool = True,
) -> jax.Array:
    """`moba_attention` over the mesh in scope.

    Args:
      q, k, v: `[B, T, N, H]`, `[B, T, K, H]`, `[B, T, K, V]`, global.
      chunk_size, top_k, scale, implementation, deterministic: As `moba_attention`.
      tokens: Global, of self-attention; in the order of the sharding's layout.
      sharding: The mesh axes to split over, the strategy and the layout, None for contiguous. None means those of
        `longctx.make_mesh` where such a mesh is in scope, and otherwise calls the op directly.
    Returns: out `[B, T, N, V]`, split as q.
    Raises: as `moba_attention`; ValueError where an axis is not of the mesh, or its size does not divide the kv heads
      or the tokens, or the layout is another than that of the tokens; NotImplementedError where the strategy is
      neither ring nor all_gather.
    Cost: what the head of this file states. A row that breaks what it says of tokens may be NaN.
    """
    check_moba_call(_OP, q, k, v, chunk_size=chunk_size, top_k=top_k, tokens=tokens)
    split = AttentionSplit.of(sharding, q.shape[0])
    options = dict(scale=scale, implementation=implementation)
    if split is None:
        return moba_attention(
            q, k, v, chunk_size=chunk_size, top_k=top_k, tokens=tokens, deterministic=deterministic, **options
        )
    T, N, K = *q.shape[1:3], k.shape[2]
    split.check_heads(LOCAL_MASK, K, op=_OP)
    if split.sequence:
        reason = _not_served(split.sharding)
        if reason is not None:
            raise NotImplementedError(f"{_OP}: {reason}")
        setting = split.setting(LOCAL_MASK, tokens, q_len=T, kv_len=T, num_heads=N, num_kv_heads=K, op=_OP)
        strategy = split.strategy(LOCAL_MASK)
    else:
        setting, strategy = Setting(mask=LOCAL_MASK, degree=1, q_len=T, kv_len=T), Whole()
    call = _Call(
        split=split,
        setting=setting,
        strategy=strategy,
        chunk_size=chunk_size,
        num_choices=num_choices(T, chunk_size, top_k),
        deterministic=deterministic,
        options=tuple(options.items()),
    )
    return _attention(call, q, k, v, split.filled(tokens, T, T))


def refusal(sharding: AttentionSharding, *, num_kv_heads: int, degree: int, heads_split: int = 1) -> str | None:
    """Why MoBA cannot be split this way, in one sentence with a remedy; None if it can.

    Args:
      sharding: Names the strategy.
      num_kv_heads: Of the layer.
      degree: Devices that share the tokens of a row.
      heads_split: Devices that share the heads of a row.
    """
    if num_kv_heads % heads_split:
        return (
            f"MoBA splits {num_kv_heads} kv heads over {heads_split} devices, wanted a multiple of {heads_split}; "
            "change the heads or the mesh"
        )
    return _not_served(sharding) if degree > 1 else None


def transfers(
    sharding: AttentionSharding,
    *,
    rows: int,
    seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    chunk_size: int,
    top_k: int,
    degree: int,
    dtype: DTypeLike,
) -> tuple[Transfer, ...]:
    """What one device sends for one layer, as the head of this file states it.

    Args:
      sharding, degree: As `refusal`, which has let them pass.
      rows: Rows of a device, B.
      seq_len: Tokens of a whole row.
      num_heads, num_kv_heads: Of the devices that share one sequence, N and K.
      head_dim: Dims of a head.
      dtype: Compute dtype.
    """
    if degree == 1:
        return ()
    lengths = dict(q_len=seq_len, kv_len=seq_len)
    setting = sharding.setting(LOCAL_MASK, degree=degree, num_heads=num_heads, num_kv_heads=num_kv_heads, **lengths)
    of_strategy = functools.partial(
        sharding.strategy_for(LOCAL_MASK).transfers, key_dim=head_dim, value_dim=head_dim, dtype=dtype
    )

    def gathers(count, num_rows):
        sent = num_bytes(jnp.int32, degree - 1, num_rows, seq_len // degree)
        return Transfer(kind="all-gather", phase="forward", count=count, num_bytes=sent)

    local = (gathers(4, rows), *of_strategy(_local_setting(setting, chunk_size), batch_size=rows))
    if not num_choices(seq_len, chunk_size, top_k):
        return local
    sums = num_bytes(jnp.float32, rows, seq_len // chunk_size, num_kv_heads, head_dim)
    return (
        *local,
        Transfer(kind="all-reduce", phase="forward", count=1, num_bytes=2 * sums * (degree - 1) // degree),
        gathers(2, rows * num_kv_heads),
        *of_strategy(_routed_setting(setting, 0), batch_size=rows * num_kv_heads),
    )


def _not_served(sharding: AttentionSharding) -> str | None:
    reason = not_of_rows(sharding.layout, "chunks of MoBA")
    if reason is not None:
        return reason
    strategy = sharding.strategy_for(LOCAL_MASK).name
    if strategy in _STRATEGIES:
        return None
    return (
        f"MoBA attends to chunks anywhere in the sequence, with other queries than tokens, which "
        f"{' and '.join(_STRATEGIES)} serve, got strategy={strategy}; choose one of those"
    )


def _local_setting(setting: Setting, chunk_size: int) -> Setting:
    """Of the attention within chunks: to it a chunk is a document, whose length is bounded."""
    return dataclasses.replace(
        setting, mask=LOCAL_MASK, max_document_length=chunk_size, has_positions=True, has_segments=True
    )


def _routed_setting(setting: Setting, num_rows: int) -> Setting:
    """Of the attention of lists, `num_rows` of a device; kv heads are rows of the batch."""
    return dataclasses.replace(
        setting,
        mask=_ROUTED_MASK,
        q_len=setting.degree * num_rows,
        num_heads=1,
        num_kv_heads=1,
        max_document_length=None,
        has_positions=True,
        has_segments=True,
    )


def _routed_tokens(route: Route, whole: jax.Array) -> Tokens:
    """The tokens of the routed attention.

    Args:
      whole: The number of the whole chunk of each key, -1 for none, int32 `[B or 1, S]`.
    """
    whole = jnp.repeat(whole, route.chunk.shape[0] // whole.shape[0], axis=0)
    # The mask does not ask for positions, but a Hopper kernel that has to count them for nobody does not lower.
    return Tokens(
        q_positions=jnp.zeros_like(route.chunk),
        q_segment_ids=route.chunk,
        kv_positions=jnp.zeros_like(whole),
        kv_segment_ids=whole,
    )


class _Part(NamedTuple):
    """What one of the two attentions is over, on one device."""

    tokens: Tokens
    schedule: ShardedSchedule


class _Saved(NamedTuple):
    """What the backward pass needs of the forward pass; the last two None where nothing is routed."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    out: jax.Array
    lse: jax.Array
    local: _Part
    route: Route | None
    routed: _Part | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static of a call; hashable. `options` go to both passes, `deterministic` to the backward alone."""

    split: AttentionSplit
    setting: Setting
    strategy: Strategy
    chunk_size: int
    num_choices: int
    deterministic: bool
    options: tuple[tuple[str, Any], ...]

    @property
    def local(self) -> Setting:
        return _local_setting(self.setting, self.chunk_size)

    def routed(self, route: Route) -> Setting:
        return _routed_setting(self.setting, route.query.shape[1])

    def saved_specs(self, num_rows: int) -> _Saved:
        """How what is saved is split; what is of tokens has that many rows."""
        split = self.split

        def part(rows):
            before = (None,) * self.strategy.schedule_dims
            return _Part(PartitionSpec(rows, split.sequence), PartitionSpec(*before, rows, split.sequence))

        folded = (*split.batch, *split.heads)
        return _Saved(
            *(split.heads_spec,) * 4,
            split.lse_spec,
            local=part(split.batch_of(num_rows)),
            route=PartitionSpec(folded, split.sequence) if self.num_choices else None,
            routed=part(folded) if self.num_choices else None,
        )

    def chunks(self, tokens: Tokens) -> Chunks:
        """Of this device's tokens, numbered in the whole row; per shard."""
        setting, own_length = self.setting, tokens.q_positions.shape[1]
        if setting.degree == 1:
            return number_chunks(tokens.queries(own_length), self.chunk_size)

        def whole(x):
            return setting.in_sequence(jax.lax.all_gather(x, setting.axes, axis=1, tiled=True))

        def own(x):
            start = jax.lax.axis_index(setting.axes) * own_length
            return jax.lax.dynamic_slice_in_dim(setting.in_layout(x), start, own_length, axis=1)

        of_row = TokenAxis(whole(tokens.q_positions), whole(tokens.q_segment_ids))
        return Chunks(*map(own, number_chunks(of_row, self.chunk_size)))

    def means(self, k: jax.Array, chunks: Chunks) -> jax.Array:
        """The mean keys of all whole chunks of the row, from those of this device's that are of them; per shard."""
        sums = chunk_sums(k, chunks.whole, self.setting.kv_len // self.chunk_size)
        if self.setting.degree > 1:
            sums = jax.lax.psum(sums, self.setting.axes)
        return sums / self.chunk_size

    def part(self, setting: Setting, tokens: Tokens) -> _Part:
        return _Part(tokens, self.strategy.schedule(setting, tokens, block_sizes=None))

    def forward(self, setting: Setting, q, k, v, part: _Part) -> tuple[jax.Array, jax.Array]:
        """`(out, lse)`; per shard."""
        out, residuals = self.strategy.forward(setting, q, k, v, *part, mask=setting.mask, **dict(self.options))
        return out, residuals.lse

    def backward(self, setting: Setting, residuals: Residuals, dout, part: _Part):
        return self.strategy.backward(
            setting, residuals, dout, *part, mask=setting.mask, deterministic=self.deterministic, **dict(self.options)
        )


# Differentiated here and not inside the shard_map, as softmax attention is (api.py).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, q, k, v, tokens):
    return _forward(call, q, k, v, tokens)[0]


def _forward(call: _Call, q, k, v, tokens):
    @jax.named_scope(HOP_SCOPE)
    def shard(q, k, v, tokens):
        chunks = call.chunks(tokens)
        local, route, routed = call.part(call.local, Tokens.self_attention(chunks.offset, chunks.own)), None, None
        out, lse = call.forward(call.local, q, k, v, local)
        if call.num_choices:
            route = route_queries(q, call.means(k, chunks), chunks, call.num_choices)
            routed = call.part(call.routed(route), _routed_tokens(route, chunks.whole))
            folded = (fold_keys(x) for x in (route.of_queries(q), k, v))
            rows, lse_of_rows = call.forward(call.routed(route), *folded, routed)
            B, K = k.shape[0], k.shape[2]
            out, lse = route.merge((out, lse), (unfold_keys(rows, K), lse_of_rows.reshape(B, K, -1)))
        return out, _Saved(q, k, v, out, lse, local, route, routed)

    split = call.split
    num_rows = tokens.q_positions.shape[0]
    out, saved = jax.shard_map(
        shard,
        in_specs=(*(split.heads_spec,) * 3, split.rows(tokens)),
        out_specs=(split.heads_spec, call.saved_specs(num_rows)),
        check_vma=False,  # as in api.py
    )(q, k, v, tokens)
    out = as_attention(out)
    return out, saved._replace(q=q, k=k, v=v, out=out, lse=as_attention(saved.lse))


def _backward(call: _Call, saved: _Saved, dout):
    @jax.named_scope(HOP_SCOPE)
    def shard(saved, dout):
        q, k, v, out, lse, local, route, routed = saved
        dq, dk, dv = call.backward(call.local, Residuals(q, k, v, out, lse), dout, local)
        if route is None:
            return dq, dk, dv
        residuals = Residuals(
            *(fold_keys(x) for x in (route.of_queries(q), k, v, route.of_queries(out))),
            # Where lists are filled up nothing attends.
            route.of_lse(lse, fill=-jnp.inf).reshape(-1, 1, route.query.shape[1]),
        )
        of_lists = call.backward(call.routed(route), residuals, fold_keys(route.of_queries(dout)), routed)
        dq_of_lists, dk_routed, dv_routed = (x.astype(jnp.float32) for x in of_lists)
        N, K = q.shape[2], k.shape[2]
        routed_gradients = (
            route.sum_of_choices(unfold_keys(dq_of_lists, K), N),
            unfold_keys(dk_routed, K),
            unfold_keys(dv_routed, K),
        )
        gradients = zip((dq, dk, dv), routed_gradients, strict=True)
        return tuple((x.astype(jnp.float32) + y).astype(x.dtype) for x, y in gradients)

    split = call.split
    num_rows = jax.tree.leaves(saved.local.tokens)[0].shape[0]
    gradients = jax.shard_map(
        shard,
        in_specs=(call.saved_specs(num_rows), split.heads_spec),
        out_specs=(split.heads_spec,) * 3,
        check_vma=False,  # as in the forward
    )(saved, dout)
    return *gradients, None


_attention.defvjp(_forward, _backward)

"""Native Sparse Attention over a mesh: keys are gathered for the two branches that see the whole document.

Blocks are cut on the whole row, in the order of the sequence, from its segment ids alone. Compressed blocks are dealt
out to the devices in order: each gathers the keys that they are made of, and takes the tokens of its own (`blocks`);
the compression, learned, is the layer's, on each device's own blocks. Then every device gathers the compressed keys of
all, attends to them with its own queries, chooses blocks, and attends to these among the gathered keys of the selected
branch. The sliding branch is softmax attention with a window, by its strategy.

Traffic, per device and layer, in bytes, beside that of the sliding branch, b the size of q's dtype, M the compressed
blocks of a row, rounded up to a multiple of P; of each a device sends P - 1 times as much:
  forward   two all-gathers of B (S / P) K (H + V) b, of the keys that are compressed and of those that are selected,
            one of B (M / P) K (H + V) b, of the compressed
            three of B (S / P) 4, of positions and, twice, segment ids
  backward  the latter two of keys again, and reduce-scatters of all three, in float32
            two of B (S / P) 4, of segment ids
`transfers` says the same in numbers. Nothing of it is shared between layers, nor are the tokens that the sliding branch
gathers for its schedule.

Preconditions: P divides T, as the layout asks; tokens of a document stand together in the sequence. Where no layout is
named, the order of the shards is that of the sequence.

Reference: Yuan et al. 2025, Native Sparse Attention, arXiv:2502.11089.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import DTypeLike

from longctx.context_parallel.api import HOP_SCOPE, AttentionSplit, sharded_attention
from longctx.context_parallel.config import AttentionSharding
from longctx.context_parallel.layout import not_of_rows
from longctx.context_parallel.strategy import Setting, float32_zeros, num_bytes
from longctx.context_parallel.traffic import Transfer
from pallas_kernels import (
    Implementation,
    Tokens,
    blockwise_attention_backward,
    blockwise_attention_forward,
)
from pallas_kernels.saved import as_attention
from pallas_kernels.sparse.nsa import (
    COMPRESSED_MASK,
    BranchKeys,
    check_nsa_call,
    gated_sum,
    nsa_attention,
    sliding_mask,
)
from pallas_kernels.sparse.nsa_blocks import BlockTables, NsaSizes, TokenBlocks, blocks_of, compressed_tokens
from pallas_kernels.sparse.nsa_choose import choose_blocks
from pallas_kernels.sparse.nsa_compress import tokens_of_blocks
from pallas_kernels.sparse.nsa_selected import selected_attention_backward, selected_attention_forward

_OP = "sharded_nsa"


def sharded_nsa_blocks(
    x: jax.Array,
    *,
    sizes: NsaSizes,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    sharding: AttentionSharding | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The tokens of the blocks that are to be compressed, over the mesh in scope.

    Args:
      x: `[B, T, K, H]`, global: keys and values to be compressed, side by side if you like.
      sizes: Of blocks.
      segment_ids, positions: `[B or 1, T]`, global; in the order of the sharding's layout.
      sharding: As for `sharded_nsa`.
    Returns: `[B, M, compress_block, K, H]`, dealt out along M over the devices that share a sequence, and the position
      of the last token of each, int32 `[B or 1, M]`. M is `num_blocks_of`; zeros where there is no block.
    """
    B, T, K, _ = x.shape
    row = _Row.of(sharding, batch_size=B, length=T, num_kv_heads=K, sizes=sizes, positions=positions)
    num_rows = max(1 if given is None else len(given) for given in (segment_ids, positions))
    positions = jnp.arange(T, dtype=jnp.int32)[None] if positions is None else positions
    positions = jnp.broadcast_to(positions, (num_rows, T))
    if segment_ids is not None:
        segment_ids = jnp.broadcast_to(segment_ids, (num_rows, T))
    return _blocks(row, x, segment_ids, positions)


def num_blocks_of(length: int, *, sizes: NsaSizes, sharding: AttentionSharding | None = None) -> int:
    """Compressed blocks that `sharded_nsa` takes for a row: those of one device, up to a multiple of the devices."""
    split = AttentionSplit.of(sharding, 1)
    return _rounded(sizes.num_compressed(length), split.degree if split is not None and split.sequence else 1)


def sharded_nsa(
    q: jax.Array,
    compressed: BranchKeys,
    selected: BranchKeys,
    sliding: BranchKeys,
    gates: jax.Array,
    *,
    sizes: NsaSizes,
    tokens: Tokens,
    sharding: AttentionSharding | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
    deterministic: bool = True,
) -> jax.Array:
    """`nsa_attention` over the mesh in scope.

    Args:
      q: `[B, T, N, H]`, global.
      compressed: `[B, M, K, H or V]`, global: of the blocks that `sharded_nsa_blocks` returns, in their order.
      selected, sliding: `[B, T, K, H or V]`, global.
      gates: `[B, T, N, 3]`, global.
      sizes, scale, implementation, deterministic: As `nsa_attention`.
      tokens: Global, of self-attention; in the order of the sharding's layout. Positions count up by one in each
        document.
      sharding: The mesh axes to split over, the strategy of the sliding branch, and the layout, None for contiguous.
        None means those of `longctx.make_mesh` where such a mesh is in scope, and otherwise calls the op directly.
    Returns: out `[B, T, N, V]`, split as q.
    Raises: as `nsa_attention`; ValueError where an axis is not of the mesh, or its size does not divide the kv heads
      or the tokens, or the layout is another than that of the tokens; NotImplementedError where the strategy does not
      serve the sliding branch.
    Cost: what the head of this file states.
    """
    segment_ids, (B, T) = tokens.q_segment_ids, q.shape[:2]
    num_compressed = num_blocks_of(T, sizes=sizes, sharding=sharding)
    check_nsa_call(
        _OP, q, compressed, selected, sliding, gates, sizes=sizes, segment_ids=segment_ids,
        num_compressed=num_compressed,
    )  # fmt: skip
    options = dict(scale=scale, implementation=implementation, deterministic=deterministic)
    if AttentionSplit.of(sharding, B) is None:
        return nsa_attention(q, compressed, selected, sliding, gates, sizes=sizes, segment_ids=segment_ids, **options)
    row = _Row.of(
        sharding, batch_size=B, length=T, num_kv_heads=selected.k.shape[2], sizes=sizes, positions=tokens.q_positions
    )
    call = _Call(
        row=row,
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        implementation=implementation,
        deterministic=deterministic,
    )
    of_window = sharded_attention(q, *sliding, mask=sliding_mask(sizes), tokens=tokens, sharding=sharding, **options)
    return gated_sum((*_attention(call, q, *compressed, *selected, segment_ids), of_window), gates)


def refusal(
    sharding: AttentionSharding, *, sizes: NsaSizes, setting_fields: dict[str, Any], num_kv_heads: int, heads_split: int
) -> str | None:
    """Why it cannot be split this way, in one sentence with a remedy; None if it can.

    Args:
      setting_fields: As of `AttentionSharding.setting`.
      num_kv_heads: Of the layer.
      heads_split: Devices that share the heads of a row.
    """
    if num_kv_heads % heads_split:
        return (
            f"NSA splits {num_kv_heads} kv heads over {heads_split} devices, wanted a multiple of {heads_split}; "
            "change the heads or the mesh"
        )
    mask = sliding_mask(sizes)
    if setting_fields["degree"] == 1:
        return None
    reason = not_of_rows(sharding.layout, "blocks of NSA")
    return reason or sharding.strategy_for(mask).refusal(sharding.setting(mask, **setting_fields))


def transfers(
    sharding: AttentionSharding,
    *,
    sizes: NsaSizes,
    rows: int,
    head_dim: int,
    setting_fields: dict[str, Any],
    dtype: DTypeLike,
) -> tuple[Transfer, ...]:
    """What one device sends for one layer, as the head of this file states it.

    Args:
      rows: Rows of a device, B.
      head_dim: Dims of a head.
      setting_fields: As of `AttentionSharding.setting`, numbers of heads those of a device.
      dtype: Compute dtype.
    """
    degree, length, K = (setting_fields[name] for name in ("degree", "kv_len", "num_kv_heads"))
    if degree == 1:
        return ()
    num_compressed = _rounded(sizes.num_compressed(length), degree)

    def keys(kind, phase, length, dtype, **others):
        sent = num_bytes(dtype, degree - 1, rows, length // degree, K, 2 * head_dim)
        return Transfer(kind=kind, phase=phase, num_bytes=sent, **{"count": 1, **others})

    mask = sliding_mask(sizes)
    of_window = sharding.strategy_for(mask).transfers(
        sharding.setting(mask, **setting_fields), batch_size=rows, key_dim=head_dim, value_dim=head_dim, dtype=dtype
    )
    of_tokens = num_bytes(jnp.int32, degree - 1, rows, length // degree)
    return (
        Transfer(kind="all-gather", phase="forward", count=2, num_bytes=of_tokens, before_attention=True),
        Transfer(kind="all-gather", phase="forward", count=1, num_bytes=of_tokens),
        Transfer(kind="all-gather", phase="backward", count=2, num_bytes=of_tokens),
        keys("all-gather", "forward", length, dtype, before_attention=True),
        keys("all-gather", "forward", length, dtype),
        keys("all-gather", "forward", num_compressed, dtype),
        keys("all-gather", "backward", length, dtype),
        keys("all-gather", "backward", num_compressed, dtype),
        keys("reduce-scatter", "backward", length, jnp.float32, count=2),
        keys("reduce-scatter", "backward", num_compressed, jnp.float32),
        *of_window,
    )


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    """What is static of rows that are split: over which axes, and in which order; hashable.

    `split` is None where there is no mesh, and `setting` where a device has all of a row.
    """

    split: AttentionSplit | None
    setting: Setting | None
    length: int
    sizes: NsaSizes

    @classmethod
    def of(cls, sharding, *, batch_size: int, length: int, num_kv_heads: int, sizes: NsaSizes, positions) -> "_Row":
        split, setting, mask = AttentionSplit.of(sharding, batch_size), None, sliding_mask(sizes)
        if split is not None:
            split.check_heads(mask, num_kv_heads, op=_OP)
            if split.sequence:
                reason = not_of_rows(split.sharding.layout, "blocks of NSA")
                if reason is not None:
                    raise NotImplementedError(f"{_OP}: {reason}")
                tokens = Tokens.self_attention(positions)
                setting = split.setting(mask, tokens, q_len=length, kv_len=length, op=_OP)
        return cls(split=split, setting=setting, length=length, sizes=sizes)

    @property
    def degree(self) -> int:
        return 1 if self.setting is None else self.setting.degree

    def gathered(self, x: jax.Array) -> jax.Array:
        """Of all devices, `[B, T / P, ...]` as `[B, T, ...]` in the order of the sequence; per shard."""
        if self.setting is None:
            return x
        return self.setting.in_sequence(jax.lax.all_gather(x, self.setting.axes, axis=1, tiled=True))

    def sent_home(self, x: jax.Array) -> jax.Array:
        """The transpose of `gathered`: sums, of this device's tokens; per shard."""
        if self.setting is None:
            return x
        x = self.setting.in_layout(x)
        return jax.lax.psum_scatter(x, self.setting.axes, scatter_dimension=1, tiled=True)

    def gathered_blocks(self, x: jax.Array) -> jax.Array:
        """The same of compressed blocks, which are dealt out in order, without those that fill up; per shard."""
        if self.setting is None:
            return x
        x = jax.lax.all_gather(x, self.setting.axes, axis=1, tiled=True)
        return x[:, : self.sizes.num_compressed(self.length)]

    def blocks_sent_home(self, x: jax.Array) -> jax.Array:
        """The transpose of `gathered_blocks`; per shard."""
        if self.setting is None:
            return x
        x = self.filled_up(x)
        return jax.lax.psum_scatter(x, self.setting.axes, scatter_dimension=1, tiled=True)

    def filled_up(self, x: jax.Array, fill: int = 0) -> jax.Array:
        padding = [(0, 0), (0, _rounded(x.shape[1], self.degree) - x.shape[1]), *((0, 0),) * (x.ndim - 2)]
        return jnp.pad(x, padding, constant_values=jnp.asarray(fill, x.dtype))

    def own_blocks(self, x: jax.Array, fill: int) -> jax.Array:
        """This device's, of all compressed blocks' `[b, M]`; per shard."""
        if self.setting is None:
            return x
        x = self.filled_up(x, fill)
        own = x.shape[1] // self.degree
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.setting.axes) * own, own, axis=1)

    def cut(self, segment_ids: jax.Array | None) -> tuple[BlockTables, TokenBlocks]:
        """The blocks of the whole row, and where this device's tokens stand among them; per shard."""
        whole = None if segment_ids is None else self.gathered(segment_ids)
        tables, tokens = blocks_of(whole, self.length, self.sizes)
        if self.setting is None:
            return tables, tokens
        rows = self.setting.in_layout(jnp.arange(self.length, dtype=jnp.int32)[None])[0]
        own = self.length // self.degree
        return tables, tokens.of_rows(
            jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(self.setting.axes) * own, own)
        )

    def shard_map(self, function, in_specs, out_specs):
        """The function on each device's shard, or as it is where there is no mesh."""
        if self.split is None:
            return function
        named = jax.named_scope(HOP_SCOPE)(function)
        return jax.shard_map(named, in_specs=in_specs, out_specs=out_specs, check_vma=False)  # as in api.py

    @property
    def heads_spec(self) -> PartitionSpec | None:
        return None if self.split is None else self.split.heads_spec

    def rows_spec(self, x: jax.Array | None) -> PartitionSpec | None:
        """Of segment ids and positions."""
        return None if self.split is None or x is None else self.split.rows(x)

    @property
    def blocks_spec(self) -> PartitionSpec | None:
        """Of `[B, M, compress_block, K, H]`."""
        return self.split and PartitionSpec(self.split.batch, self.split.sequence, None, self.split.heads)


# Differentiated here and not inside the shard_map, as softmax attention is (api.py).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(row: _Row, x, segment_ids, positions):
    return _blocks_fwd(row, x, segment_ids, positions)[0]


def _blocks_fwd(row: _Row, x, segment_ids, positions):
    def shard(x, segment_ids, positions):
        tables, _ = row.cut(segment_ids)
        starts, positions = row.own_blocks(tables.compressed_start, -1), row.gathered(positions)
        last = jnp.maximum(starts, 0) + row.sizes.compress_block - 1
        starts_of_rows, last = (jnp.broadcast_to(y, (len(positions), y.shape[1])) for y in (starts, last))
        last = jnp.where(
            starts_of_rows >= 0, jnp.take_along_axis(positions, jnp.minimum(last, row.length - 1), axis=1), 0
        )
        return tokens_of_blocks(row.gathered(x), starts, row.sizes), last

    results = row.shard_map(
        shard,
        (row.heads_spec, row.rows_spec(segment_ids), row.rows_spec(positions)),
        (row.blocks_spec, row.rows_spec(positions)),
    )(x, segment_ids, positions)
    return results, segment_ids


def _blocks_bwd(row: _Row, segment_ids, cotangents):
    def shard(d_blocks, segment_ids):
        tables, _ = row.cut(segment_ids)
        starts = row.own_blocks(tables.compressed_start, -1)
        B, _, _, K, H = d_blocks.shape
        like = jnp.zeros((B, row.length, K, H), jnp.float32)
        _, transpose = jax.vjp(lambda x: tokens_of_blocks(x, starts, row.sizes), like)
        (dx,) = transpose(d_blocks.astype(jnp.float32))
        return row.sent_home(dx).astype(d_blocks.dtype)

    d_blocks, _ = cotangents
    dx = row.shard_map(shard, (row.blocks_spec, row.rows_spec(segment_ids)), row.heads_spec)(d_blocks, segment_ids)
    return dx, None, None


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


class _Saved(NamedTuple):
    """What the backward pass needs of the forward pass, each device's own."""

    q: jax.Array
    compressed: jax.Array
    selected: jax.Array
    of_compressed: jax.Array
    of_selected: jax.Array
    lse_of_compressed: jax.Array
    lse_of_selected: jax.Array
    choices: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static of a call; hashable."""

    row: _Row
    scale: float
    implementation: Implementation | None
    deterministic: bool

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "implementation": self.implementation}

    @property
    def saved_specs(self) -> _Saved:
        split = self.row.split
        heads, lse = split.heads_spec, split.lse_spec
        return _Saved(*(heads,) * 5, lse, lse, choices=heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, q, compressed_k, compressed_v, k, v, segment_ids):
    return _forward(call, q, compressed_k, compressed_v, k, v, segment_ids)[0]


def _forward(call: _Call, q, compressed_k, compressed_v, k, v, segment_ids):
    row, H = call.row, q.shape[3]

    def shard(q, compressed_k, compressed_v, k, v, segment_ids):
        tables, queries = row.cut(segment_ids)
        compressed, selected = (jnp.concatenate(x, axis=-1) for x in ((compressed_k, compressed_v), (k, v)))
        keys, values = _parted(row.gathered_blocks(compressed), H)
        of_compressed, lse_of_compressed = blockwise_attention_forward(
            q, keys, values, mask=COMPRESSED_MASK, tokens=compressed_tokens(tables, queries), **call.options
        )
        choices = choose_blocks(q, keys, lse_of_compressed, tables, queries, sizes=row.sizes, **call.options)
        of_selected, lse_of_selected = selected_attention_forward(
            q, *_parted(row.gathered(selected), H), choices, tables.block_start, queries.row,
            block_size=row.sizes.block_size, **call.options,
        )  # fmt: skip
        results = of_compressed, of_selected
        return results, _Saved(q, compressed, selected, *results, lse_of_compressed, lse_of_selected, choices)

    heads = row.heads_spec
    results, saved = row.shard_map(
        shard, (*(heads,) * 5, row.rows_spec(segment_ids)), ((heads, heads), call.saved_specs)
    )(q, compressed_k, compressed_v, k, v, segment_ids)
    results = as_attention(results)
    of_branches = dict(zip(("of_compressed", "of_selected"), results, strict=True))
    named = {name: as_attention(getattr(saved, name)) for name in ("lse_of_compressed", "lse_of_selected", "choices")}
    return results, (saved._replace(q=q, **of_branches, **named), segment_ids)


def _backward(call: _Call, residuals, cotangents):
    row = call.row

    def shard(saved, segment_ids, d_of_compressed, d_of_selected):
        q, H = saved.q, saved.q.shape[3]
        tables, queries = row.cut(segment_ids)
        # Without the barrier XLA takes these collectives for the forward pass's and keeps their results until now.
        compressed, selected = jax.lax.optimization_barrier((saved.compressed, saved.selected))
        dq, *dkv = selected_attention_backward(
            q, *_parted(row.gathered(selected), H), saved.choices, tables.block_start, queries.row,
            saved.of_selected, saved.lse_of_selected, d_of_selected, None,
            block_size=row.sizes.block_size, gradient_dtype=jnp.float32, **call.options,
        )  # fmt: skip
        d_selected = row.sent_home(jnp.concatenate(dkv, axis=-1)).astype(selected.dtype)
        keys, values = _parted(row.gathered_blocks(compressed), H)
        dq, *dkv = blockwise_attention_backward(
            q, keys, values, saved.of_compressed, saved.lse_of_compressed, d_of_compressed, None,
            mask=COMPRESSED_MASK, tokens=compressed_tokens(tables, queries), deterministic=call.deterministic,
            accumulate=(dq, *float32_zeros(keys, values)), **call.options,
        )  # fmt: skip
        d_compressed = row.blocks_sent_home(jnp.concatenate(dkv, axis=-1)).astype(compressed.dtype)
        return dq.astype(q.dtype), *_parted(d_compressed, H), *_parted(d_selected, H)

    (saved, segment_ids), heads = residuals, row.heads_spec
    gradients = row.shard_map(shard, (call.saved_specs, row.rows_spec(segment_ids), heads, heads), (heads,) * 5)(
        saved, segment_ids, *cotangents
    )
    return *gradients, None


_attention.defvjp(_forward, _backward)


def _parted(x: jax.Array, key_dim: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values, which travel side by side."""
    return x[..., :key_dim], x[..., key_dim:]

"""Attention to chosen blocks over a mesh: they are chosen among all, and what is sent for it are summaries of keys.

A selector (`pallas_kernels.sparse`) needs of the keys a summary, block by block: their means, or nothing. Each device
makes that of its own keys, and all gather all of them, and the positions and segment ids; then each chooses for its own
queries, as one device would for all. The chosen blocks are attended to by the strategy: `all_gather` brings all keys
into the order of the sequence, in which the lists are; a ring visits at each hop those blocks of the lists that the
device whose keys have come holds. The lists are what is kept for the backward pass, int32, and schedules are made of
them again.

Traffic, per device and layer, in bytes, beside that of the strategy, which sends all keys whatever is chosen (a ring
leaves out the hops that the mask does not reach across, where the layout is known):
  forward   two all-gathers of int32 positions and segment ids, of which a device sends (P - 1) B (S / P) 4 each
            one all-gather of the summary, (P - 1) / P of it: of block means B (S / block_kv) K H 4 (float32); of
            XAttention, which needs every key, B S K H b; of AShape none
  backward  the two of int32 again
`transfers` says the same in numbers, of the B rows of a device. Nothing of it is shared between layers.
Memory: lists of B L (T / P / block_q) M int32 of each layer, L lists of heads and M blocks at most in each: the budget,
or all S / block_kv where there is a threshold alone. While a layer is worked on, schedules of 36 bytes for each entry
of a list; a ring has one for each hop, of min(M, S / P / block_kv) entries a row.

Preconditions: ring or all_gather; layouts whose devices hold runs of neighbouring tokens, contiguous or zigzag, each
whole blocks of queries and of keys; selectors that choose from a summary. Any mask that is one for all heads, T != S.
Where no layout is named, the order of the shards is that of the sequence.
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
from longctx.context_parallel.layout import Layout
from longctx.context_parallel.one_call import Whole
from longctx.context_parallel.ring import Ring, keys_of_all
from longctx.context_parallel.strategy import (
    CallSchedule,
    Residuals,
    SavedResults,
    Setting,
    ShardedSchedule,
    Strategy,
    num_bytes,
)
from longctx.context_parallel.traffic import Transfer
from pallas_kernels import BlockSizes, Implementation, Mask, Tokens, blockwise_attention
from pallas_kernels.saved import as_attention
from pallas_kernels.sparse import BlockSelection, PerHead, Selector
from pallas_kernels.tokens import TokenAxis, validate_tokens

_STRATEGIES = ("ring", "all_gather")
_OP = "sharded_selected_attention"


def sharded_selected_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    selector: Selector | PerHead,
    mask: Mask,
    tokens: Tokens,
    block_sizes: BlockSizes,
    budget: int | None = None,
    threshold: float | None = None,
    sharding: AttentionSharding | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
    deterministic: bool = True,
) -> jax.Array:
    """Attention to the blocks that a selector chooses, over the mesh in scope; nothing is differentiated through the
    choice.

    Args:
      q, k, v: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, V]`, global.
      selector: Chooses the blocks.
      mask: Which pairs may attend, one for all heads.
      tokens: Global; in the order of the sharding's layout.
      block_sizes: Tokens a block that is chosen holds.
      budget, threshold: As `Selector.select`.
      sharding: The mesh axes to split over, the strategy and the layout, None for contiguous. None means those of
        `longctx.make_mesh` where such a mesh is in scope, and otherwise chooses and attends on one device.
      scale, implementation, deterministic: As `blockwise_attention`.
    Returns: out `[B, T, N, V]`, split as q: what one device makes of the whole, in the order of the sequence, but for
      choices between blocks whose scores are equal to float32 rounding.
    Raises: as `Selector.select` and `blockwise_attention`; ValueError where an axis is not of the mesh, or its size
      does not divide the kv heads or the tokens, or the runs of tokens that a device holds are not whole blocks, or the
      layout is another than that of the tokens; NotImplementedError where the strategy, the layout or the selector is
      one that the head of this file leaves out.
    Cost: what the head of this file states.
    """
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    validate_tokens(_OP, tokens, B, T, S)
    split = AttentionSplit.of(sharding, B)
    limits = dict(block_sizes=block_sizes, budget=budget, threshold=threshold)
    options = dict(scale=scale, implementation=implementation)
    if split is None:
        selection = selector.select(q, k, mask=mask, tokens=tokens, scale=scale, **limits)
        schedule = selection.schedule(mask=mask, tokens=tokens)
        return blockwise_attention(
            q, k, v, mask=mask, tokens=tokens, schedule=schedule, deterministic=deterministic, **options
        )
    split.check_heads(mask, K, op=_OP)
    reason = _not_served(split.sharding, selector, mask, degree=split.degree, heads_split=split.heads_size)
    if reason is not None:
        raise NotImplementedError(f"{_OP}: {reason}")
    setting, strategy = Setting(mask=mask, degree=1, q_len=T, kv_len=S), Whole()
    if split.sequence:
        setting = split.setting(mask, tokens, q_len=T, kv_len=S, num_heads=N, num_kv_heads=K, op=_OP)
        strategy = split.strategy(mask)
        reason = _not_whole_blocks(split.sharding, block_sizes, T, S, split.degree)
        if reason is not None:
            raise ValueError(f"{_OP}: {reason}")
    call = _Call(
        split=split,
        setting=setting,
        strategy=strategy,
        selector=selector,
        block_sizes=block_sizes.fit(T, S),
        limits=(("budget", budget), ("threshold", threshold), ("scale", scale)),
        deterministic=deterministic,
        options=tuple(options.items()),
    )
    return _attention(call, q, k, v, split.filled(tokens, T, S))


def refusal(
    sharding: AttentionSharding,
    *,
    selector: Selector | PerHead,
    mask: Mask,
    block_sizes: BlockSizes,
    seq_len: int,
    num_kv_heads: int,
    degree: int,
    heads_split: int = 1,
) -> str | None:
    """Why attention to chosen blocks cannot be split this way, in one sentence with a remedy; None if it can.

    Args:
      sharding: Names the strategy and the layout.
      selector, mask, block_sizes: Of the layer.
      seq_len: Tokens of a whole row.
      num_kv_heads: Of the layer.
      degree: Devices that share the tokens of a row.
      heads_split: Devices that share the heads of a row.
    """
    if num_kv_heads % heads_split:
        return (
            f"attention to chosen blocks splits {num_kv_heads} kv heads over {heads_split} devices, wanted a multiple "
            f"of {heads_split}; change the heads or the mesh"
        )
    reason = _not_served(sharding, selector, mask, degree=degree, heads_split=heads_split)
    return reason or _not_whole_blocks(sharding, block_sizes, seq_len, seq_len, degree)


def transfers(
    sharding: AttentionSharding,
    *,
    selector: Selector | PerHead,
    mask: Mask,
    block_sizes: BlockSizes,
    rows: int,
    seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    degree: int,
    dtype: DTypeLike,
) -> tuple[Transfer, ...]:
    """What one device sends for one layer, as the head of this file states it.

    Args:
      sharding, selector, mask, block_sizes, degree: As `refusal`, which has let them pass.
      rows: Rows of a device, B.
      seq_len: Tokens of a whole row.
      num_heads, num_kv_heads: Of the devices that share one sequence, N and K.
      head_dim: Dims of a head.
      dtype: Compute dtype.
    """
    if degree == 1:
        return ()
    setting = sharding.setting(
        mask, degree=degree, q_len=seq_len, kv_len=seq_len, num_heads=num_heads, num_kv_heads=num_kv_heads
    )
    own_keys = jax.ShapeDtypeStruct((rows, seq_len // degree, num_kv_heads, head_dim), dtype)
    summary = jax.eval_shape(lambda k: selector.summary(k, block_sizes.block_kv), own_keys)

    def gathered(phase, dtype, *shape):
        return Transfer(kind="all-gather", phase=phase, count=1, num_bytes=(degree - 1) * num_bytes(dtype, *shape))

    return (
        *(gathered(phase, jnp.int32, rows, seq_len // degree) for phase in ("forward", "backward") for _ in range(2)),
        *(gathered("forward", x.dtype, *x.shape) for x in jax.tree.leaves(summary) if x.size),
        *sharding.strategy_for(mask).transfers(
            setting, batch_size=rows, key_dim=head_dim, value_dim=head_dim, dtype=dtype
        ),
    )


def _not_served(
    sharding: AttentionSharding, selector: Selector | PerHead, mask: Mask, *, degree: int, heads_split: int
) -> str | None:
    if heads_split > 1 and isinstance(selector, PerHead):
        return (
            f"PerHead names a selector for each head, and the heads are split over {heads_split} devices, which run "
            "one program; keep the heads whole (tensor=1), or use one selector for all heads"
        )
    if degree == 1:
        return None
    strategy = sharding.strategy_for(mask).name
    if strategy not in _STRATEGIES:
        return (
            f"chosen blocks lie anywhere in the sequence, which {' and '.join(_STRATEGIES)} serve, got "
            f"strategy={strategy}; choose one of those"
        )
    layout = sharding.layout or Layout()
    if layout.runs(degree) is None:
        return (
            f"a device of layout={layout.name} holds no runs of neighbouring tokens, so no blocks of them; choose "
            "contiguous or zigzag"
        )
    return selector.split_refusal


def _not_whole_blocks(
    sharding: AttentionSharding, block_sizes: BlockSizes, q_len: int, kv_len: int, degree: int
) -> str | None:
    if degree == 1:
        return None
    num_runs = (sharding.layout or Layout()).multiple(degree)
    sides = (("T", "block_q", q_len, block_sizes.block_q), ("S", "block_kv", kv_len, block_sizes.block_kv))
    for length_name, name, length, block in sides:
        if length % (num_runs * block):
            return (
                f"{length_name}={length} in {num_runs} runs of neighbouring tokens over {degree} devices is not whole "
                f"blocks of {name}={block}, wanted a multiple of {num_runs * block}; pad it to one, or make the blocks "
                "smaller"
            )
    return None


class _Saved(NamedTuple):
    """What the backward pass needs of the forward pass."""

    attention: Residuals
    tokens: Tokens
    lists: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static of a call; hashable. `options` go to both passes, `deterministic` to the backward alone."""

    split: AttentionSplit
    setting: Setting
    strategy: Strategy
    selector: Selector | PerHead
    block_sizes: BlockSizes
    limits: tuple[tuple[str, Any], ...]
    deterministic: bool
    options: tuple[tuple[str, Any], ...]

    @property
    def is_split(self) -> bool:
        return self.setting.degree > 1

    def saved_specs(self, tokens: Tokens) -> _Saved:
        split = self.split
        return _Saved(
            attention=Residuals(*self.strategy.residual_specs(split.batch, split.sequence, split.heads)),
            tokens=split.rows(tokens),
            lists=PartitionSpec(split.batch, split.heads, split.sequence),
        )

    def keys(self, tokens: Tokens) -> TokenAxis | None:
        """Of all devices, `[P, B or 1, S / P]`; None where a device has all; per shard."""
        return keys_of_all(self.setting, tokens) if self.is_split else None

    def lists(self, q, k, tokens: Tokens, keys: TokenAxis | None) -> jax.Array:
        """The blocks, numbered in the sequence, that this device's queries attend to; per shard."""
        options = dict(mask=self.setting.mask, block_sizes=self.block_sizes, **dict(self.limits))
        if keys is None:
            return self.selector.select(q, k, tokens=tokens, **options).blocks
        summary = jax.tree.map(self._of_all, self.selector.summary(k, self.block_sizes.block_kv))
        tokens = self._over_sequence(tokens, keys)
        return self.selector.select_from(q, summary, kv_len=self.setting.kv_len, tokens=tokens, **options).blocks

    def schedule(self, lists: jax.Array, tokens: Tokens, keys: TokenAxis | None) -> ShardedSchedule:
        """What the strategy takes to attend to these blocks; per shard."""
        setting = self.setting
        q_len, kv_len = setting.q_len // setting.degree, setting.kv_len

        def blocks_of(lists, tokens, kv_len):
            selection = BlockSelection(blocks=lists, q_len=q_len, kv_len=kv_len, block_sizes=self.block_sizes)
            return selection.schedule(mask=setting.mask, tokens=tokens)

        def of_hop(source, tokens):
            return blocks_of(_held_by(source, lists, setting, self.block_sizes), tokens, kv_len // setting.degree)

        if isinstance(self.strategy, Ring):
            return self.strategy.schedule_of_hops(setting, tokens, keys, of_hop)
        if keys is not None:
            tokens = self._over_sequence(tokens, keys)
        return CallSchedule(blocks=blocks_of(lists, tokens, kv_len), tokens=tokens)

    def forward(self, q, k, v, tokens: Tokens) -> tuple[jax.Array, _Saved]:
        """Per shard."""
        keys = self.keys(tokens)
        lists = self.lists(q, k, tokens, keys)
        schedule = self.schedule(lists, tokens, keys)
        out, residuals = self.strategy.forward(
            self.setting, q, k, v, tokens, schedule, mask=self.setting.mask, **dict(self.options)
        )
        return out, _Saved(residuals, tokens, lists)

    def backward(self, saved: _Saved, dout: jax.Array):
        """Per shard."""
        residuals, tokens, lists = saved
        schedule = self.schedule(lists, tokens, self.keys(tokens))
        return self.strategy.backward(
            self.setting, residuals, dout, tokens, schedule, mask=self.setting.mask,
            deterministic=self.deterministic, **dict(self.options),
        )  # fmt: skip

    def _of_all(self, x: jax.Array) -> jax.Array:
        """`[B, blocks / P, ...]` of every device as `[B, blocks, ...]`, in the order of the sequence."""
        if x.size == 0:
            return jnp.zeros((x.shape[0], self.setting.degree * x.shape[1], *x.shape[2:]), x.dtype)
        return self.setting.in_sequence(jax.lax.all_gather(x, self.setting.axes, axis=1, tiled=True))

    def _over_sequence(self, tokens: Tokens, keys: TokenAxis) -> Tokens:
        """The tokens of this device's queries and of all keys, in the order of the sequence."""
        positions, segment_ids = (
            self.setting.in_sequence(x.swapaxes(0, 1).reshape(x.shape[1], self.setting.kv_len)) for x in keys
        )
        return dataclasses.replace(tokens, kv_positions=positions, kv_segment_ids=segment_ids)


def _held_by(device: jax.Array, lists: jax.Array, setting: Setting, sizes: BlockSizes) -> jax.Array:
    """Of lists of blocks of the sequence those that a device holds, as it numbers them: ascending, then -1."""
    num_columns = setting.kv_len // sizes.block_kv
    num_own = num_columns // setting.degree
    # Of each block of the sequence its place in the layout, where a device's blocks are in the sequence's order too.
    place = setting.in_sequence(jnp.arange(num_columns, dtype=jnp.int32), axis=0)
    place = place[jnp.maximum(lists, 0)]
    held = (lists >= 0) & (place // num_own == device)
    own = jnp.sort(jnp.where(held, place % num_own, num_own), axis=-1)[..., :num_own]
    return jnp.where(own < num_own, own, -1)


# Differentiated here and not inside the shard_map, as softmax attention is (api.py).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, q, k, v, tokens):
    return _forward(call, q, k, v, tokens)[0]


def _forward(call: _Call, q, k, v, tokens):
    split, results = call.split, SavedResults()

    @jax.named_scope(HOP_SCOPE)
    def shard(q, k, v, tokens):
        out, saved = call.forward(q, k, v, tokens)
        return out, saved._replace(attention=results.inside((q, k, v, out), saved.attention))

    out, saved = jax.shard_map(
        shard,
        in_specs=(*(split.heads_spec,) * 3, split.rows(tokens)),
        out_specs=(split.heads_spec, call.saved_specs(tokens)),
        check_vma=False,  # as in api.py
    )(q, k, v, tokens)
    out = as_attention(out)
    attention = results.outside((q, k, v, out), saved.attention)
    return out, saved._replace(attention=attention, lists=as_attention(saved.lists))


def _backward(call: _Call, saved: _Saved, dout):
    split = call.split
    gradients = jax.shard_map(
        jax.named_scope(HOP_SCOPE)(call.backward),
        in_specs=(call.saved_specs(saved.tokens), split.heads_spec),
        out_specs=(split.heads_spec,) * 3,
        check_vma=False,  # as in the forward
    )(saved, dout)
    return *gradients, None


_attention.defvjp(_forward, _backward)

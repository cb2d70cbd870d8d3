"""Ulysses: from tokens split over the devices to heads split over them, and back.

An all-to-all brings each device all tokens of N / P query heads and of the kv heads that they read; it attends in one
call, and another all-to-all takes the output back to its tokens. What the backward pass needs is kept as the call had
it, split by heads, so that there only the cotangent of the output, the gradients of the queries and those of the keys
and values travel. Where there are more devices than kv heads, each kv head is repeated P / K times before it is sent,
so that every device is sent the one head it reads and nothing else; the gradients of the copies travel in float32 and
are summed at home. Otherwise a gradient is whole where it is computed, and travels in its own dtype. A layout that is
known is undone after the all-to-all, a copy, so that tokens are in order; where neither positions nor segment ids were
passed, the op is told so, and may take a schedule that is a constant.

Traffic, per device and layer, in bytes, b the size of q's dtype, R = max(K, P):
  forward   all-to-alls of (P - 1) / P times B (T / P) N H b, B (S / P) R (H + V) b and B (T / P) N V b
  backward  all-to-alls of (P - 1) / P times B (T / P) N V b, B (T / P) N H b and B (S / P) R (H + V) b
            (4 in place of b where P > K)
Once a step and distinct mask, positions and segment ids of queries and keys are gathered: 8 B (T + S) bytes; none
where tokens are in order.

Preconditions: P divides T, S and N; P divides K or K divides P; a mask that all heads share. Any order of tokens.

Reference: Jacobs et al., DeepSpeed Ulysses, arXiv:2309.14509.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from longctx.context_parallel.strategy import CallSchedule, Residuals, Setting, Strategy, float32_zeros, num_bytes
from longctx.context_parallel.traffic import Transfer
from pallas_kernels import Tokens, blockwise_attention_backward, blockwise_attention_forward, make_schedule


class Ulysses(Strategy):
    name = "ulysses"

    def refusal(self, setting):
        degree = setting.degree
        if setting.mask.head_groups > 1:
            return f"ulysses splits the heads, and the mask {setting.mask} differs between them; use ring or all_gather"
        if setting.num_heads is None:
            return None
        if setting.num_heads % degree:
            return (
                f"ulysses splits {setting.num_heads} query heads over {degree} devices, wanted a multiple of {degree}; "
                "change the heads or the mesh, or use ring or all_gather"
            )
        if setting.num_kv_heads % degree and degree % setting.num_kv_heads:
            return (
                f"ulysses splits {setting.num_kv_heads} kv heads over {degree} devices, wanted a multiple or a divisor "
                f"of {degree}; change the kv heads or the mesh, or use ring or all_gather"
            )
        return None

    def schedule(self, setting, tokens, *, block_sizes):
        chunks = None
        if setting.in_order:
            tokens = Tokens()
        else:
            tokens, chunks = all_tokens(setting, tokens)
        blocks = make_schedule(
            setting.mask, tokens, q_len=setting.q_len, kv_len=setting.kv_len, block_sizes=block_sizes
        )
        return CallSchedule(blocks=blocks, tokens=tokens, chunks=chunks)

    def forward(self, setting, q, k, v, tokens, schedule, **options):
        kv = jnp.repeat(jnp.concatenate([k, v], axis=-1), _copies(setting), axis=2)
        q, kv = (by_heads(setting, x, schedule.chunks) for x in (q, kv))
        keys, values = kv[..., : k.shape[3]], kv[..., k.shape[3] :]
        out, lse = blockwise_attention_forward(
            q, keys, values, tokens=schedule.tokens, schedule=schedule.blocks, **options
        )
        return by_tokens(setting, out, schedule.chunks), Residuals(q, keys, values, out, lse)

    def backward(self, setting, residuals, dout, tokens, schedule, **options):
        q, k, v, out, lse = residuals
        copies = _copies(setting)
        dq, dk, dv, *dbias = blockwise_attention_backward(
            q, k, v, out, lse, dout, None, tokens=schedule.tokens, schedule=schedule.blocks,
            accumulate=float32_zeros(q, k, v) if copies > 1 else None, **options,
        )  # fmt: skip
        dq, dkv = (
            by_tokens(setting, x, schedule.chunks) for x in (dq.astype(q.dtype), jnp.concatenate([dk, dv], axis=-1))
        )
        if copies > 1:
            dkv = dkv.reshape(*dkv.shape[:2], -1, copies, dkv.shape[3]).sum(axis=3).astype(k.dtype)
        return dq, dkv[..., : k.shape[3]], dkv[..., k.shape[3] :], *dbias

    def transfers(self, setting, *, batch_size, key_dim, value_dim, dtype):
        degree, copies = setting.degree, _copies(setting)
        queries = batch_size, setting.q_len // degree, setting.num_heads
        keys = batch_size, setting.kv_len // degree, setting.num_kv_heads * copies, key_dim + value_dim
        of_gradients = jnp.float32 if copies > 1 else dtype

        def all_to_all(phase, dtype, *dims):
            sent = num_bytes(dtype, *dims) * (degree - 1) // degree
            return Transfer(kind="all-to-all", phase=phase, count=1, num_bytes=sent)

        return (
            all_to_all("forward", dtype, *queries, key_dim),
            all_to_all("forward", dtype, *keys),
            all_to_all("forward", dtype, *queries, value_dim),
            all_to_all("backward", dtype, *queries, value_dim),
            all_to_all("backward", dtype, *queries, key_dim),
            all_to_all("backward", of_gradients, *keys),
        )

    def tiles_of_calls(self, setting, tiles):
        # Every device has the same work: a P-th of the heads, of all tokens.
        return tiles.sum(keepdims=True) // setting.degree

    def residual_specs(self, batch, sequence, heads):
        of_heads = PartitionSpec(batch, None, (*heads, *sequence))
        return (*(of_heads,) * 4, PartitionSpec(batch, (*heads, *sequence)))

    def like_residuals(self, setting, dout, schedule):
        return by_heads(setting, dout, schedule.chunks)

    def own_heads(self, setting, per_head):
        size = per_head.shape[0] // setting.degree
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(per_head), jax.lax.axis_index(setting.axes) * size, size)

    def in_all_heads(self, setting, own, num_heads):
        start = jax.lax.axis_index(setting.axes) * len(own)
        zeros = jnp.zeros((num_heads, *own.shape[1:]), own.dtype)
        return jax.lax.dynamic_update_slice_in_dim(zeros, own, start, 0)


def _copies(setting: Setting) -> int:
    """How often each kv head is sent."""
    return max(1, setting.degree // setting.num_kv_heads)


def all_tokens(setting: Setting, tokens: Tokens) -> tuple[Tokens, jax.Array | None]:
    """Those of all devices, in the order of the sequence where the layout is known, and the `chunks` that bring other
    arrays into it; per shard."""
    tokens = jax.tree.map(lambda x: jax.lax.all_gather(x, setting.axes, axis=1, tiled=True), tokens)
    chunks = setting.chunk_order(tokens.kv_positions, tokens.kv_segment_ids)
    return jax.tree.map(lambda x: setting.in_sequence(x, chunks=chunks), tokens), chunks


def by_heads(setting: Setting, x: jax.Array, chunks: jax.Array | None) -> jax.Array:
    """`[B, T / P, N, H]` to `[B, T, N / P, H]`; per shard."""
    x = jax.lax.all_to_all(x, setting.axes, split_axis=2, concat_axis=1, tiled=True)
    return setting.in_sequence(x, chunks=chunks)


def by_tokens(setting: Setting, x: jax.Array, chunks: jax.Array | None) -> jax.Array:
    """`[B, T, N / P, H]` to `[B, T / P, N, H]`; per shard."""
    x = setting.in_layout(x, chunks=chunks)
    return jax.lax.all_to_all(x, setting.axes, split_axis=1, concat_axis=2, tiled=True)

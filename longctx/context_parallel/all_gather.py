"""All-gather attention: every device gathers the keys and values of all, and attends to them in one call.

Forward: one all-gather of keys and values, one call of the op for the T / P queries of this device over all S keys.
Backward: they are gathered again, behind an optimization barrier, so that no layer keeps them; the gradients of all S
keys, float32, are summed over the devices and scattered to their owners, who round them. A layout that is known is
undone in what was gathered, a copy, so that the keys of a query lie together.

Traffic, per device and layer, in bytes, b the size of q's dtype:
  forward   one all-gather, of which a device sends (P - 1) B (S / P) K (H + V) b
  backward  the same, and one reduce-scatter, (P - 1) B (S / P) K (H + V) 4 (float32)
As many bytes as a ring's, less the way home, in few large messages; but no compute of the layer runs beside them, and a
device holds all keys and values while it works on a layer: B S K (H + V) (2 b + 4) bytes in the backward pass.
Once a step and distinct mask, positions and segment ids of the keys are gathered: 8 B S bytes.

Preconditions: P divides T and S. Any mask, any order of tokens, T != S.

Reference: Llama 3, arXiv:2407.21783, section 3.3.2.
"""

import dataclasses

import jax
import jax.numpy as jnp

from longctx.context_parallel.strategy import CallSchedule, Residuals, Setting, Strategy, float32_zeros, num_bytes
from longctx.context_parallel.traffic import Transfer
from pallas_kernels import blockwise_attention_backward, blockwise_attention_forward, make_schedule


class AllGather(Strategy):
    name = "all_gather"

    def refusal(self, setting):
        return None

    def schedule(self, setting, tokens, *, block_sizes):
        tokens = dataclasses.replace(
            tokens,
            kv_positions=_gathered(setting, tokens.kv_positions),
            kv_segment_ids=_gathered(setting, tokens.kv_segment_ids),
        )
        q_len = setting.q_len // setting.degree
        blocks = make_schedule(setting.mask, tokens, q_len=q_len, kv_len=setting.kv_len, block_sizes=block_sizes)
        return CallSchedule(blocks=blocks, tokens=tokens)

    def forward(self, setting, q, k, v, tokens, schedule, **options):
        kv = _gathered(setting, jnp.concatenate([k, v], axis=-1))
        key_dim = k.shape[3]
        out, lse = blockwise_attention_forward(
            q, kv[..., :key_dim], kv[..., key_dim:], tokens=schedule.tokens, schedule=schedule.blocks, **options
        )
        return out, Residuals(q, k, v, out, lse)

    def backward(self, setting, residuals, dout, tokens, schedule, **options):
        q, k, v, out, lse = residuals
        # Without the barrier XLA takes this gather for the forward pass's and keeps its result until now.
        kv = _gathered(setting, jax.lax.optimization_barrier(jnp.concatenate([k, v], axis=-1)))
        keys, values = kv[..., : k.shape[3]], kv[..., k.shape[3] :]
        dq, dk, dv = blockwise_attention_backward(
            q, keys, values, out, lse, dout, None, tokens=schedule.tokens, schedule=schedule.blocks,
            accumulate=float32_zeros(q, keys, values), **options,
        )  # fmt: skip
        dkv = setting.in_layout(jnp.concatenate([dk, dv], axis=-1))
        dkv = jax.lax.psum_scatter(dkv, setting.axes, scatter_dimension=1, tiled=True).astype(k.dtype)
        return dq.astype(q.dtype), dkv[..., : k.shape[3]], dkv[..., k.shape[3] :]

    def transfers(self, setting, *, batch_size, key_dim, value_dim, dtype):
        kv = batch_size, setting.kv_len // setting.degree, setting.num_kv_heads, key_dim + value_dim
        of_keys, of_gradients = ((setting.degree - 1) * num_bytes(x, *kv) for x in (dtype, jnp.float32))
        return (
            Transfer(kind="all-gather", phase="forward", count=1, num_bytes=of_keys),
            Transfer(kind="all-gather", phase="backward", count=1, num_bytes=of_keys),
            Transfer(kind="reduce-scatter", phase="backward", count=1, num_bytes=of_gradients),
        )

    def tiles_of_calls(self, setting, tiles):
        return tiles.sum(axis=1, keepdims=True)


def _gathered(setting: Setting, x: jax.Array) -> jax.Array:
    """`[B, S / P, ...]` of every device as `[B, S, ...]`."""
    return setting.in_sequence(jax.lax.all_gather(x, setting.axes, axis=1, tiled=True))

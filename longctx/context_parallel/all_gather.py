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

from longctx.context_parallel.one_call import OneCallStrategy
from longctx.context_parallel.strategy import CallSchedule, Setting, num_bytes
from longctx.context_parallel.traffic import Transfer
from pallas_kernels import make_schedule


class AllGather(OneCallStrategy):
    name = "all_gather"

    def refusal(self, setting):
        return None

    def schedule(self, setting, tokens, *, block_sizes):
        keys = [_gathered(setting, x) for x in (tokens.kv_positions, tokens.kv_segment_ids)]
        chunks = setting.chunk_order(*keys)
        kv_positions, kv_segment_ids = (setting.in_sequence(x, chunks=chunks) for x in keys)
        tokens = dataclasses.replace(tokens, kv_positions=kv_positions, kv_segment_ids=kv_segment_ids)
        q_len = setting.q_len // setting.degree
        blocks = make_schedule(setting.mask, tokens, q_len=q_len, kv_len=setting.kv_len, block_sizes=block_sizes)
        return CallSchedule(blocks=blocks, tokens=tokens, chunks=chunks)

    def bring(self, setting, x, schedule):
        return setting.in_sequence(_gathered(setting, x), chunks=schedule.chunks)

    def send_home(self, setting, x, schedule):
        x = setting.in_layout(x, chunks=schedule.chunks)
        return jax.lax.psum_scatter(x, setting.axes, scatter_dimension=1, tiled=True)

    def transfers(self, setting, *, batch_size, key_dim, value_dim, dtype):
        kv = batch_size, setting.kv_len // setting.degree, setting.num_kv_heads, key_dim + value_dim
        of_keys, of_gradients = ((setting.degree - 1) * num_bytes(x, *kv) for x in (dtype, jnp.float32))
        return (
            Transfer(kind="all-gather", phase="forward", count=1, num_bytes=of_keys),
            Transfer(kind="all-gather", phase="backward", count=1, num_bytes=of_keys),
            Transfer(kind="reduce-scatter", phase="backward", count=1, num_bytes=of_gradients),
        )


def _gathered(setting: Setting, x: jax.Array) -> jax.Array:
    """`[B, S / P, ...]` of every device as `[B, S, ...]`."""
    return jax.lax.all_gather(x, setting.axes, axis=1, tiled=True)

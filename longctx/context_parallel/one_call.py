"""Strategies that bring the keys a device needs to it, attend in one call, and send their gradients home.

Which keys those are, and how they travel, is each strategy's own. In the backward pass they are brought again, so that
no layer keeps them; gradients travel in float32 and are rounded at home.
"""

import abc

import jax
import jax.numpy as jnp

from longctx.context_parallel.reach import where_it_holds
from longctx.context_parallel.strategy import CallSchedule, Residuals, Setting, Strategy, float32_zeros
from pallas_kernels import Mask, blockwise_attention_backward, blockwise_attention_forward, make_schedule


class OneCallStrategy(Strategy):
    """A strategy whose schedule is a CallSchedule over the keys that it brings."""

    @abc.abstractmethod
    def bring(self, setting: Setting, x: jax.Array, schedule: CallSchedule) -> jax.Array:
        """What the call is over, `[B, keys, ...]`, of what devices hold of the keys, `[B, S / P, ...]`; per shard."""

    @abc.abstractmethod
    def send_home(self, setting: Setting, x: jax.Array, schedule: CallSchedule) -> jax.Array:
        """The transpose of `bring`: the sum of what all devices have for this device's keys; per shard."""

    def call_mask(self, setting: Setting) -> Mask:
        """The mask of the call."""
        return setting.mask

    def forward(self, setting, q, k, v, tokens, schedule, **options):
        kv = self.bring(setting, jnp.concatenate([k, v], axis=-1), schedule)
        out, lse = blockwise_attention_forward(
            q, kv[..., : k.shape[3]], kv[..., k.shape[3] :], tokens=schedule.tokens, schedule=schedule.blocks,
            **options | {"mask": self.call_mask(setting)},
        )  # fmt: skip
        return where_it_holds(schedule.holds, out), Residuals(q, k, v, out, lse)

    def backward(self, setting, residuals, dout, tokens, schedule, **options):
        q, k, v, out, lse = residuals
        # Without the barrier XLA takes these collectives for the forward pass's and keeps their results until now.
        kv = self.bring(setting, jax.lax.optimization_barrier(jnp.concatenate([k, v], axis=-1)), schedule)
        keys, values = kv[..., : k.shape[3]], kv[..., k.shape[3] :]
        dq, dk, dv, *dbias = blockwise_attention_backward(
            q, keys, values, out, lse, dout, None, tokens=schedule.tokens, schedule=schedule.blocks,
            accumulate=float32_zeros(q, keys, values), **options | {"mask": self.call_mask(setting)},
        )  # fmt: skip
        dkv = self.send_home(setting, jnp.concatenate([dk, dv], axis=-1), schedule).astype(k.dtype)
        gradients = dq.astype(q.dtype), dkv[..., : k.shape[3]], dkv[..., k.shape[3] :]
        return *(where_it_holds(schedule.holds, x) for x in gradients), *dbias

    def tiles_of_calls(self, setting, tiles):
        return tiles.sum(axis=1, keepdims=True)


class Whole(OneCallStrategy):
    """What a strategy is where a device has all of a row: nothing is sent."""

    name = "whole"

    def refusal(self, setting):
        return None

    def schedule(self, setting, tokens, *, block_sizes):
        lengths = dict(q_len=setting.q_len, kv_len=setting.kv_len)
        blocks = make_schedule(setting.mask, tokens, **lengths, block_sizes=block_sizes)
        return CallSchedule(blocks=blocks, tokens=tokens)

    def bring(self, setting, x, schedule):
        return x

    def send_home(self, setting, x, schedule):
        return x

    def transfers(self, setting, *, batch_size, key_dim, value_dim, dtype):
        return ()

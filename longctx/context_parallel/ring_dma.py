"""A ring whose attention kernels send keys, values and their gradients themselves: TPU only.

Hops, what is carried from hop to hop, what is left out and what is added to what are those of ring.py. A ring leaves it
to XLA to run a permute beside a hop's attention; here the kernel of a hop starts the copy to the device ahead with its
first tile and waits for that from the device behind after its last (pallas_mosaic_tpu_send.py). Nothing but the kernel
is needed for a transfer to be hidden, queries, keys and running results stay in the kernels' layout from hop to hop,
and the gradients of keys are added to in the kernel. A hop without work sends too, so its kernel is not left out.

Traffic, per device and layer, in bytes, b the size of q's dtype, with M hops left as in ring.py:
  forward   M - 1 copies by kernels of B (S / P) K (H + V) b
  backward  M - 1 copies by kernels of B (S / P) K (H + V) b, and M - 1 of B (S / P) K (H + V) 4 (float32); a permute of
            B (S / P) K (H + V) b; none where M = 1
S / P is rounded up to whole blocks of keys, and H and V to multiples of 128; the permute's are not.
Once a step and distinct mask, positions and segment ids of the keys are gathered: 8 B S bytes.

Preconditions: those of the kernels `mosaic_tpu`: bfloat16 or float32, head dims 64, 128, 192 or 256, no dropout, a mask
whose pair test is arithmetic; P divides T and S. Any order of tokens, T != S.

Reference: Liu, Zaharia and Abbeel, Ring Attention with Blockwise Transformers, arXiv:2310.01889.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from longctx.context_parallel.reach import hops_needed, where_it_holds
from longctx.context_parallel.ring import MAX_UNROLLED_HOPS, Ring, Route, alike, empty_carry
from longctx.context_parallel.strategy import Residuals, Setting, num_bytes
from longctx.context_parallel.traffic import Transfer
from pallas_kernels import ring_kernels
from pallas_kernels.block_sizes import BLOCKWISE_ATTENTION
from pallas_kernels.blockwise.pallas_mosaic_tpu_send import Send
from pallas_kernels.dispatch import current_platform
from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.pair_tests import tests_of

_INSTEAD = "choose strategy=ring, which any implementation of attention serves"


class RingDma(Ring):
    name = "ring_dma"
    platform = "tpu"
    has_dropout = False
    has_bias = False

    def refusal(self, setting):
        # A plan may be made anywhere; calls name the mesh axes that they run on.
        if setting.axes and current_platform() != self.platform:
            return f"ring_dma runs on {self.platform}, got {current_platform()}; {_INSTEAD}"
        try:
            tests_of(setting.mask, (LANES, LANES))
        except NotImplementedError as reason:
            return f"ring_dma: {reason}; {_INSTEAD}"
        return None

    def forward(self, setting, q, k, v, tokens, schedule, *, sinks=None, **options):
        route = Route.of(setting)
        ring = _ring_kernels(q, k, v, schedule, options)

        def attend_and_send(send, state, hop):
            return ring.attend(*state, *schedule.at(hop, tokens), send), None

        state = ring.keys(k, v), ring.carry(empty_carry(q, v, sinks))
        for hops, stride in alike(route.strides):
            body = functools.partial(attend_and_send, _send(setting, stride))
            state, _ = jax.lax.scan(body, state, jnp.array(hops), unroll=_unroll(hops))
        out, lse = ring.finish(*state, *schedule.at(len(route.strides), tokens))
        return where_it_holds(schedule.holds, out), Residuals(q, k, v, out, lse)

    def backward(self, setting, residuals, dout, tokens, schedule, **options):
        q, k, v, out, lse = residuals
        route = Route.of(setting)
        ring = _ring_kernels(q, k, v, schedule, options)
        gradients = ring.gradients(out, lse, dout)

        def differentiate(state, hop, *, behind: int | None, ahead: int | None):
            return gradients.differentiate(
                *state,
                *schedule.at(hop, tokens),
                send_gathered=None if behind is None else _send(setting, behind),
                send_keys=None if ahead is None else _send(setting, ahead),
            )

        keys = ring.keys(k, v)
        state = keys, *gradients.zeros(keys)
        strides = route.strides
        state = differentiate(state, 0, behind=None, ahead=strides[0] if strides else None)
        for hops, (behind, ahead) in alike(tuple(itertools.pairwise(strides)), first=1):

            def body(state, hop, behind=behind, ahead=ahead):
                return differentiate(state, hop, behind=behind, ahead=ahead), None

            state, _ = jax.lax.scan(body, state, jnp.array(hops), unroll=_unroll(hops))
        if strides:
            state = differentiate(state, len(strides), behind=strides[-1], ahead=None)
        _, dq, gathered = state
        # As in a ring: nothing is added any more.
        dkv = jnp.concatenate(gradients.of_keys(gathered), axis=-1).astype(k.dtype)
        if strides:
            dkv = route.send(dkv, route.home)
        key_dim = k.shape[3]
        results = gradients.of_queries(dq).astype(q.dtype), dkv[..., :key_dim], dkv[..., key_dim:]
        return tuple(where_it_holds(schedule.holds, x) for x in results)

    def transfers(self, setting, *, batch_size, key_dim, value_dim, dtype):
        num_sent = len(hops_needed(setting)) - 1
        if num_sent == 0:
            return ()
        length = setting.kv_len // setting.degree
        rows = batch_size, length, setting.num_kv_heads
        block = min(BLOCKWISE_ATTENTION[self.platform].block_kv, -(-length // LANES) * LANES)
        padded = batch_size, -(-length // block) * block, setting.num_kv_heads
        lanes = sum(-(-dim // LANES) * LANES for dim in (key_dim, value_dim))
        by_kernel = functools.partial(Transfer, kind="remote-dma", count=num_sent, beside_calls=1)
        return (
            by_kernel(phase="forward", num_bytes=num_bytes(dtype, *padded, lanes)),
            by_kernel(phase="backward", num_bytes=num_bytes(dtype, *padded, lanes)),
            by_kernel(phase="backward", num_bytes=num_bytes(jnp.float32, *padded, lanes)),
            Transfer(
                kind="collective-permute",
                phase="backward",
                count=1,
                num_bytes=num_bytes(dtype, *rows, key_dim + value_dim),
            ),
        )


def _ring_kernels(q, k, v, schedule, options):
    try:
        return ring_kernels(q, k, v, schedule=jax.tree.map(lambda x: x[0], schedule.hops), **options)
    except NotImplementedError as reason:
        raise NotImplementedError(f"ring_dma: {reason}; {_INSTEAD}") from reason


def _send(setting: Setting, stride: int) -> Send:
    """To the device so many ahead; inside shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    which = sum(1 << mesh.axis_names.index(axis) for axis in setting.axes)
    return Send(
        axes=setting.axes,
        sizes=tuple(mesh.shape[axis] for axis in setting.axes),
        stride=stride,
        collective_id=which * mesh.size + stride,
    )


def _unroll(hops: list[int]) -> int:
    """Two hops an iteration, so that two buffers of keys change places and none is copied into the other."""
    return len(hops) if len(hops) < MAX_UNROLLED_HOPS else 2

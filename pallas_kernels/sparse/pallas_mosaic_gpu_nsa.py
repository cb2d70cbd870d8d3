"""Attention to blocks chosen query by query on Hopper GPUs: `selected_attention` by pallas_mosaic_gpu_nsa_kernels.py.

Two passes forward, one backward. Peak memory beyond arguments and results: one integer of 32 bits for each number of
out or of dq, which is twice the size of out, and one float32 for each choice of a query head.
"""

import math
from typing import NoReturn

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import num_hopper_cores
from pallas_kernels.online_softmax import delta_of, finite_max
from pallas_kernels.sparse import pallas_mosaic_gpu_nsa_kernels as kernels
from pallas_kernels.sparse.nsa_lists import TILE_ROWS, QueryLists

HEAD_DIMS = (64, 128)
_LOG2_E = math.log2(math.e)
_ONE = 2.0**30
"""Units of what no sum exceeds: half of what an int32 has room for."""


def forward(q, k, v, choices, block_start, q_place, *, block_size, scale, interpret=None):
    """`selected_attention_forward` on a Hopper GPU; with `interpret` on a CPU, for tests."""
    (B, T, N, H), K = q.shape, k.shape[2]
    call = _Call(q, k, v, choices, block_start, q_place, block_size, scale, interpret)
    partial = kernels.partial_lse(call.inputs, call.config)
    lse = call.merge(partial)  # base 2
    # No weighted mean of values exceeds the greatest of them.
    greatest = jnp.max(jnp.abs(v), axis=(1, 3)).astype(jnp.float32)
    unit = jnp.where(greatest > 0, _ONE / greatest, 0.0).reshape(-1)
    inputs = call.inputs._replace(lse=_nothing_is_infinite(lse).reshape(-1), unit=unit)
    total = kernels.weighted_sum(inputs, call.config).reshape(B, T, K, -1, H)
    out = total.astype(jnp.float32) * (greatest * (1 / _ONE))[:, None, :, None, None]
    lse = lse.reshape(B, T, N).swapaxes(1, 2) * (1 / _LOG2_E)
    return out.reshape(B, T, N, H).astype(q.dtype), lse


def backward(
    q, k, v, choices, block_start, q_place, out, lse, dout, dlse, *, block_size, scale, interpret=None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`selected_attention_backward` on a Hopper GPU; with `interpret` on a CPU, for tests."""
    B, T, N, H = q.shape
    call = _Call(q, k, v, choices, block_start, q_place, block_size, scale, interpret)
    delta = _by_row(delta_of(out, dout, dlse))
    # |dq| = scale |sum_s P (dP - delta) k| <= scale (|dout| |v| + |delta|) max |k|, since the P of a row are at most 1
    # together. Loose by thousands, and still finer by thousands than 16 bits.
    longest = jnp.sqrt(jnp.max(jnp.sum(v.astype(jnp.float32) ** 2, axis=3)))
    lengths = jnp.sqrt(jnp.sum(dout.astype(jnp.float32) ** 2, axis=3)).reshape(-1)
    bound = (lengths * longest + jnp.abs(delta)) * jnp.max(jnp.abs(k)).astype(jnp.float32)
    inputs = call.inputs._replace(
        dout=dout.astype(q.dtype).reshape(-1, H),
        lse=_nothing_is_infinite(_by_row(lse) * _LOG2_E),
        delta=delta,
        unit=jnp.where(bound > 0, _ONE / bound, 0.0),
    )
    dq, dk, dv = kernels.gradients(inputs, B * k.shape[2] * block_start.shape[1], call.config)
    dq = dq.astype(jnp.float32) * (bound * (scale / _ONE))[:, None]
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


class _Call:
    """What both passes have in common."""

    def __init__(self, q, k, v, choices, block_start, q_place, block_size: int, scale: float, interpret):
        num_cores = num_hopper_cores() if interpret is None else 1
        if num_cores is None:
            _refuse("it needs an NVIDIA Hopper GPU (H100, H200)")
        (B, T, N, H), (_, S, K, _) = q.shape, k.shape
        _check(q, v, block_size, scale, N // K)
        if q_place is None:
            q_place = jnp.arange(T, dtype=jnp.int32)[None]
        self.lists = QueryLists.of(choices, block_start, N)
        self.config = kernels.Config(scale=scale, kv_shape=(B, S, K), num_cores=num_cores, interpret=interpret)
        self.inputs = kernels.Inputs(
            q=q.reshape(-1, H),
            k=k.reshape(-1, H),
            v=v.reshape(-1, H),
            dout=None,
            place=jnp.broadcast_to(q_place[..., None], (B, T, N)).reshape(-1),
            lse=None,
            delta=None,
            unit=None,
            rows=self.lists.rows,
            items=self.lists.items,
        )
        self.shape = B, T, K, N // K

    def merge(self, partial: jax.Array) -> jax.Array:
        """The lse of each row over all of its choices, `[B, T, K, G]`, base 2, of the lse of the rows of the lists."""
        B, T, K, group = self.shape
        place = self.lists.place.reshape(B, K, T, -1).swapaxes(1, 2)
        heads = jnp.arange(group, dtype=jnp.int32)
        parts = partial.reshape(-1).at[jnp.maximum(place, 0)[..., None] + heads].get(mode="promise_in_bounds")
        parts = jnp.where(place[..., None] >= 0, parts, -jnp.inf)  # [B, T, K, n, G]
        greatest = finite_max(jnp.max(parts, axis=3))
        return greatest + jnp.log2(jnp.sum(jnp.exp2(parts - greatest[..., None, :]), axis=3))


def _by_row(x: jax.Array) -> jax.Array:
    """`[B, N, T]` as `[B T N]`."""
    return x.swapaxes(1, 2).reshape(-1)


def _nothing_is_infinite(lse: jax.Array) -> jax.Array:
    """Of queries that see nothing, inf: 2^(logit - inf) = 0."""
    return jnp.where(lse == -jnp.inf, jnp.inf, lse)


def _check(q, v, block_size: int, scale: float, group: int) -> None:
    """Raises NotImplementedError with the reason where the kernels do not serve the call."""
    H = q.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        _refuse(f"q is {q.dtype}, it takes bfloat16 and float16")
    if H not in HEAD_DIMS or v.shape[3] != H:
        _refuse(f"head dims of keys and values are {H} and {v.shape[3]}, it takes one of {HEAD_DIMS} for both")
    if block_size != kernels.BLOCK:
        _refuse(f"block_size={block_size}, it takes {kernels.BLOCK}")
    if group > TILE_ROWS:
        _refuse(f"{group} query heads share a kv head, it takes at most {TILE_ROWS}")
    if not scale > 0:
        _refuse(f"scale={scale}, it takes positive ones")


def _refuse(reason: str) -> NoReturn:
    raise NotImplementedError(f"mosaic_gpu: {reason}")

"""Tree attention: queries that every device has, over keys that are split over the devices.

Each device attends to its own keys; the running softmaxes (max, sum, acc) of all devices are then merged, in float32:

  m = max_p m_p;  sum = sum_p exp(m_p - m) sum_p;  acc = sum_p exp(m_p - m) acc_p;  out = acc / sum

Few queries meet many keys here, as in decoding, so it is the results that travel and not the keys: bytes do not depend
on the number of keys. With A = B T N V + B T N numbers of acc and sum, per device and layer, in bytes:
  forward   where all P (A + B T N) 4 bytes of partial results are at most GATHER_UP_TO: one all-gather of
            (A + B T N) 4, of which a device sends its own to P - 1 others
            beyond: an all-reduce (max) of B T N 4 and one (sum) of A 4, of which a device sends twice (P - 1) / P
  backward  an all-reduce (sum) of dq, B T N H 4; dk and dv stay where the keys are
One collective has half the latency of two, which is all that counts for a token or two; reductions move less and need
no memory for the results of others, which counts for many. `tree_transfers` says the same in numbers.

Preconditions: none. Any mask, any order of the keys, any number of them on a device, none among them.

Reference: Shyam et al., Tree Attention, arXiv:2408.04093, Algorithm 3, which reduces max, numerator and denominator.
"""

import functools
import math

import jax
import jax.numpy as jnp

from longctx.context_parallel.traffic import Transfer
from pallas_kernels import (
    SoftmaxCarry,
    Tokens,
    blockwise_attention_backward,
    blockwise_attention_forward,
    latent_attention_forward,
)
from pallas_kernels.online_softmax import finite_max

GATHER_UP_TO = 1 << 20
"""Bytes of partial results of all devices up to which they are gathered: some 10 us of a fast link, which is about what
starting another collective costs."""


def tree_decode(q, k, v, tokens: Tokens, *, axes: tuple[str, ...], value_dim: int | None = None, **options):
    """`(out, lse)` of queries that every device has over the keys of all devices; per shard.

    Args:
      q: `[B, T, N, H]`, the same on every device.
      k, v: `[B, L, K, H]`, `[B, L, K, V]`, this device's keys and values.
      tokens: Of the queries and of this device's keys, nothing None: a shard cannot know its place in the sequence.
      axes: The mesh axes that split the keys; () where they are whole.
      value_dim: If given, v is None, K is 1, and values are so many first dims of the keys.
      **options: As `blockwise_attention_forward`, or `latent_attention_forward` with value_dim.
    Returns: out `[B, T, N, V]` in q's dtype, lse `[B, N, T]`, the same on every device; out = 0 and lse = -inf for
      queries that may attend to nothing on any device.
    """
    if value_dim is None:
        attend = functools.partial(blockwise_attention_forward, q, k, v, tokens=tokens, **options)
    else:
        attend = functools.partial(
            latent_attention_forward, q, k[:, :, 0], value_dim=value_dim, tokens=tokens, **options
        )
    if not axes:
        return attend()
    carry = attend(return_carry=True)
    return _merged(carry, axes).finalize(q.dtype)


def tree_backward(
    q,
    k,
    v,
    out,
    lse,
    dout,
    dlse,
    tokens: Tokens,
    *,
    axes: tuple[str, ...],
    value_dim: int | None = None,
    **options,
):
    """`(dq, dk, dv)` in their dtypes, dq the same on every device, dk and dv of this device's keys; per shard.

    With value_dim v and dv are None. With `bias_gradient` among the options also that of the bias, the same on every
    device.
    """
    if value_dim is not None:
        values = k[..., :value_dim]
        dq, dk, dv = tree_backward(q, k, values, out, lse, dout, dlse, tokens, axes=axes, **options)
        return dq, dk.at[..., :value_dim].add(dv), None
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    dq, dk, dv, *dbias = blockwise_attention_backward(
        q, k, v, out, lse, dout, dlse, tokens=tokens, accumulate=zeros, **options
    )  # fmt: skip
    dq, *dbias = jax.lax.psum((dq, *dbias), axes) if axes else (dq, *dbias)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), *dbias


def tree_transfers(
    *, batch_size: int, q_len: int, num_heads: int, key_dim: int, value_dim: int, size: int
) -> tuple[Transfer, ...]:
    """What one device sends for one layer, as the head of this file states it; nothing where it is alone.

    Args:
      batch_size: Rows of this device, B.
      q_len: Queries of a row, T.
      num_heads: Query heads of this device, N.
      key_dim, value_dim: Dims of a head, H and V.
      size: Devices that the keys are split over, P.
    """
    if size == 1:
        return ()
    float32 = jnp.dtype(jnp.float32).itemsize
    num_rows = batch_size * q_len * num_heads

    def reduce(phase, num_values):
        num_bytes = 2 * num_values * float32 * (size - 1) // size
        return Transfer(kind="all-reduce", phase=phase, count=1, num_bytes=num_bytes)

    if _gathers(num_rows, value_dim, size):
        part = num_rows * (value_dim + 2) * float32
        forward = (Transfer(kind="all-gather", phase="forward", count=1, num_bytes=part * (size - 1)),)
    else:
        forward = (reduce("forward", num_rows), reduce("forward", num_rows * (value_dim + 1)))
    return (*forward, reduce("backward", num_rows * key_dim))


def _gathers(num_rows: int, value_dim: int, size: int) -> bool:
    return size * num_rows * (value_dim + 2) * jnp.dtype(jnp.float32).itemsize <= GATHER_UP_TO


def _merged(carry: SoftmaxCarry, axes: tuple[str, ...]) -> SoftmaxCarry:
    """The running softmax over the keys of all devices."""
    value_dim = carry.acc.shape[-1]
    if _gathers(math.prod(carry.max.shape), value_dim, jax.lax.axis_size(axes)):
        parts = jax.lax.all_gather(_packed(carry.acc, carry.sum, carry.max), axes)
        part_max = _heads_first(parts[..., -1])
        top = jnp.max(part_max, axis=0)
        total = jnp.sum(parts[..., :-1] * _rows(_weight(part_max, top)), axis=0)
    else:
        top = jax.lax.pmax(carry.max, axes)
        total = jax.lax.psum(_packed(carry.acc, carry.sum) * _rows(_weight(carry.max, top)), axes)
    return SoftmaxCarry(max=top, sum=_heads_first(total[..., value_dim]), acc=total[..., :value_dim])


def _packed(acc: jax.Array, *rows: jax.Array) -> jax.Array:
    """One buffer `[B, T, N, V + ...]` of what is kept of each query and head."""
    return jnp.concatenate([acc, *map(_rows, rows)], axis=-1)


def _weight(part_max: jax.Array, top: jax.Array) -> jax.Array:
    # 0 for a part that has seen nothing, also where no other has.
    return jnp.exp(part_max - finite_max(top))


def _rows(x_BNT: jax.Array) -> jax.Array:
    """`[..., B, N, T]` to `[..., B, T, N, 1]`."""
    return jnp.swapaxes(x_BNT, -1, -2)[..., None]


def _heads_first(x_BTN: jax.Array) -> jax.Array:
    """`[..., B, T, N]` to `[..., B, N, T]`."""
    return jnp.swapaxes(x_BTN, -1, -2)

"""Ring attention: keys and values go round the devices, and each adds what its queries make of them.

With P devices on the ring, each holds T / P queries and S / P keys. At hop h device r works on the keys of device
r - h, while those of the next hop are on their way. The running softmax is carried from hop to hop in float32, so
nothing is rounded and nothing merged in between. In the backward pass the gradients of the keys travel after them, one
hop behind: a device adds to what the devices before it have gathered, and the last sends it home. A hop whose keys no
query here may see computes nothing.

Traffic, per device and layer, in bytes, b the size of q's dtype:
  forward   P - 1 permutes of B (S / P) K (H + V) b
  backward  P permutes of B (S / P) K (H + V) b, and P - 1 of B (S / P) K (H + V) 4 (float32)
Each permute holds one dtype, keys and values in one buffer, kv heads only; `ring_transfers` says the same in numbers.
Once a step and distinct mask, positions and segment ids of the keys are gathered: 8 B S bytes.

Preconditions: P divides T and S. Any mask, any order of tokens, T != S.

Reference: Liu, Zaharia and Abbeel, Ring Attention with Blockwise Transformers, arXiv:2310.01889; the balanced orders
are in layout.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from longctx.context_parallel.traffic import Transfer
from pallas_kernels import (
    BlockSizes,
    Mask,
    Schedule,
    SoftmaxCarry,
    Tokens,
    blockwise_attention_backward,
    blockwise_attention_forward,
    make_schedule,
)
from pallas_kernels.tokens import Leaf

MAX_UNROLLED_HOPS = 4  # up to here the compiler may overlap across hops; beyond, compile time would grow with P


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RingSchedule:
    """What each hop visits.

    Attributes:
      hops: Schedules of this device's queries against the keys of each hop; every array has a leading dim of P hops.
      kv_positions, kv_segment_ids: Of the keys of each hop, int32 `[P, B or 1, S / P]`.
    """

    hops: Schedule
    kv_positions: Leaf
    kv_segment_ids: Leaf

    def at(self, hop: jax.typing.ArrayLike, tokens: Tokens) -> tuple[Schedule, Tokens]:
        """The schedule and the tokens of one hop; `tokens` are this device's."""
        return jax.tree.map(lambda x: x[hop], self.hops), Tokens(
            q_positions=tokens.q_positions,
            q_segment_ids=tokens.q_segment_ids,
            kv_positions=self.kv_positions[hop],
            kv_segment_ids=self.kv_segment_ids[hop],
        )


def ring_schedule(
    mask: Mask, tokens: Tokens, *, q_len: int, kv_len: int, block_sizes: BlockSizes | None, axes: tuple[str, ...]
) -> RingSchedule:
    """The schedules of all hops; per shard, once a step per distinct mask.

    Args:
      mask, block_sizes: As `make_schedule`.
      tokens: This device's, nothing None.
      q_len, kv_len: Of this device.
      axes: The mesh axes of the ring.
    """
    size, rank = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    sources = (rank - jnp.arange(size)) % size

    def of_each_hop(x):
        return jnp.take(jax.lax.all_gather(x, axes), sources, axis=0)

    kv_positions, kv_segment_ids = of_each_hop(tokens.kv_positions), of_each_hop(tokens.kv_segment_ids)

    def schedule_of_hop(kv_tokens):
        positions, segment_ids = kv_tokens
        hop_tokens = dataclasses.replace(tokens, kv_positions=positions, kv_segment_ids=segment_ids)
        return make_schedule(mask, hop_tokens, q_len=q_len, kv_len=kv_len, block_sizes=block_sizes)

    hops = jax.lax.map(schedule_of_hop, (kv_positions, kv_segment_ids))
    return RingSchedule(hops=hops, kv_positions=kv_positions, kv_segment_ids=kv_segment_ids)


def ring_forward(
    q, k, v, tokens: Tokens, schedule: RingSchedule, *, axes: tuple[str, ...], sinks: jax.Array | None = None, **options
):
    """`(out, lse)` of this device's queries over the keys of all devices, and the sinks if any; per shard."""
    size = jax.lax.axis_size(axes)
    key_dim = k.shape[3]

    def attend(hop, kv, carry):
        hop_schedule, hop_tokens = schedule.at(hop, tokens)

        def visit(carry):
            return blockwise_attention_forward(
                q, kv[..., :key_dim], kv[..., key_dim:], tokens=hop_tokens, schedule=hop_schedule, carry=carry,
                return_carry=True, **options,
            )  # fmt: skip

        return jax.lax.cond(_visits(hop_schedule), visit, lambda carry: carry, carry)

    def hop_and_pass_on(state, hop):
        kv, carry = state
        next_kv = _to_next(kv, axes)
        return (next_kv, attend(hop, kv, carry)), None

    shape = {"batch_size": q.shape[0], "q_len": q.shape[1], "value_dim": v.shape[3]}
    if sinks is None:
        carry = SoftmaxCarry.empty(num_heads=q.shape[2], **shape)
    else:
        carry = SoftmaxCarry.of_sinks(sinks, **shape)
    kv = jnp.concatenate([k, v], axis=-1)
    (kv, carry), _ = jax.lax.scan(hop_and_pass_on, (kv, carry), jnp.arange(size - 1), unroll=_unroll(size))
    return attend(size - 1, kv, carry).finalize(q.dtype)


def ring_backward(q, k, v, out, lse, dout, dlse, tokens: Tokens, schedule: RingSchedule, *, axes, **options):
    """`(dq, dk, dv)` of this device's queries and keys, in their dtypes; per shard."""
    size = jax.lax.axis_size(axes)
    key_dim = k.shape[3]

    def attend(hop, kv, dq):
        """dq with this hop's part added, and this hop's part of the gradient of kv, float32."""
        hop_schedule, hop_tokens = schedule.at(hop, tokens)
        zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)

        def visit(dq):
            return blockwise_attention_backward(
                q, kv[..., :key_dim], kv[..., key_dim:], out, lse, dout, dlse, tokens=hop_tokens,
                schedule=hop_schedule, accumulate=(dq, *zeros), **options,
            )  # fmt: skip

        dq, dk, dv = jax.lax.cond(_visits(hop_schedule), visit, lambda dq: (dq, *zeros), dq)
        return dq, jnp.concatenate([dk, dv], axis=-1)

    def hop_and_pass_on(state, hop):
        kv, dq, gathered = state
        # What the devices before this one gathered for these keys arrives while this one computes its part.
        next_kv, gathered = _to_next(kv, axes), _to_next(gathered, axes)
        dq, dkv = attend(hop, kv, dq)
        return (next_kv, dq, gathered + dkv), None

    # Without the barrier XLA takes these permutes for the forward pass's and keeps all of their results until now: the
    # memory of an all-gather.
    kv = jax.lax.optimization_barrier(jnp.concatenate([k, v], axis=-1))
    next_kv = _to_next(kv, axes)
    dq, gathered = attend(0, kv, jnp.zeros(q.shape, jnp.float32))
    (kv, dq, gathered), _ = jax.lax.scan(
        hop_and_pass_on, (next_kv, dq, gathered), jnp.arange(1, size - 1), unroll=_unroll(size)
    )
    gathered = _to_next(gathered, axes)
    dq, dkv = attend(size - 1, kv, dq)
    # Nothing is added any more: rounding here rather than at home is the same, and this hop has little to hide behind.
    dkv = _to_next((gathered + dkv).astype(kv.dtype), axes)
    return dq.astype(q.dtype), dkv[..., :key_dim], dkv[..., key_dim:]


def ring_transfers(
    *, batch_size: int, kv_len: int, num_kv_heads: int, key_dim: int, value_dim: int, dtype: DTypeLike, size: int
) -> tuple[Transfer, ...]:
    """What one device sends for one layer, as the head of this file states it; nothing where it is alone.

    Args:
      batch_size: Rows of this device, B.
      kv_len: Keys of the whole sequence, S.
      num_kv_heads: Kv heads of this device, K.
      key_dim, value_dim: Dims of a head, H and V.
      dtype: Of q, k and v.
      size: Devices on the ring, P.
    """
    if size == 1:
        return ()
    num_values = batch_size * (kv_len // size) * num_kv_heads * (key_dim + value_dim)
    of_keys = num_values * jnp.dtype(dtype).itemsize
    of_gradients = num_values * jnp.dtype(jnp.float32).itemsize
    permute = functools.partial(Transfer, kind="collective-permute")
    return (
        permute(phase="forward", count=size - 1, num_bytes=of_keys),
        permute(phase="backward", count=size, num_bytes=of_keys),
        permute(phase="backward", count=size - 1, num_bytes=of_gradients),
    )


def _to_next(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    size = jax.lax.axis_size(axes)
    return jax.lax.ppermute(x, axes, [(rank, (rank + 1) % size) for rank in range(size)])


def _visits(schedule: Schedule) -> jax.Array:
    return jnp.any(schedule.kv_blocks.start < schedule.kv_blocks.stop)


def _unroll(size: int) -> bool | int:
    return size <= MAX_UNROLLED_HOPS or 1

"""Ring attention: keys and values go round the devices, and each adds what its queries make of them.

With P devices on the ring, each holds T / P queries and S / P keys. At hop h device r works on the keys of device
r - h, while those of the next hop are on their way. The running softmax is carried from hop to hop in float32, so
nothing is rounded and nothing merged in between. In the backward pass the gradients of the keys travel after them, one
hop behind: a device adds to what the devices before it have gathered, and the last sends it home. A hop whose keys no
query here may see computes nothing.

Hops that no device can need are left out when the program is traced: keys then travel from one hop that is needed
straight to the next, and their gradients from the last straight home. Which those are follows from the mask's window,
the greatest length of a document and the layout (reach.py). With M hops left, hop 0, a device's own keys, included
(M = P where nothing is known):

Traffic, per device and layer, in bytes, b the size of q's dtype:
  forward   M - 1 permutes of B (S / P) K (H + V) b
  backward  M permutes of B (S / P) K (H + V) b, and M - 1 of B (S / P) K (H + V) 4 (float32); none where M = 1
Each permute holds one dtype, keys and values in one buffer, kv heads only; `transfers` says the same in numbers.
Once a step and distinct mask, positions and segment ids of the keys are gathered: 8 B S bytes.

Preconditions: P divides T and S. Any mask, any order of tokens, T != S.

Reference: Liu, Zaharia and Abbeel, Ring Attention with Blockwise Transformers, arXiv:2310.01889; the balanced orders
are in layout.py.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx.context_parallel.reach import holds, hops_needed, where_it_holds
from longctx.context_parallel.strategy import (
    Residuals,
    Setting,
    ShardedSchedule,
    Strategy,
    float32_zeros,
    num_bytes,
    zeros_like_bias,
)
from longctx.context_parallel.traffic import Transfer
from pallas_kernels import (
    Schedule,
    SoftmaxCarry,
    Tokens,
    blockwise_attention_backward,
    blockwise_attention_forward,
    make_schedule,
)
from pallas_kernels.tokens import Leaf, TokenAxis

MAX_UNROLLED_HOPS = 4  # up to here the compiler may overlap across hops; beyond, compile time would grow with P


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RingSchedule(ShardedSchedule):
    """What each of the M hops visits.

    Attributes:
      hops: Schedules of this device's queries against the keys of each hop; every array has a leading dim of M hops.
      kv_positions, kv_segment_ids: Of the keys of each hop, int32 `[M, B or 1, S / P]`.
      holds: Whether that on which hops were left out is true of each row, bool `[1, B or 1, 1]`; None where none were.
    """

    hops: Schedule
    kv_positions: Leaf
    kv_segment_ids: Leaf
    holds: Leaf = None

    def at(self, hop: jax.typing.ArrayLike, tokens: Tokens) -> tuple[Schedule, Tokens]:
        """The schedule and the tokens of one hop, counted among those that are there; `tokens` are this device's."""
        return jax.tree.map(lambda x: x[hop], self.hops), Tokens(
            q_positions=tokens.q_positions,
            q_segment_ids=tokens.q_segment_ids,
            kv_positions=self.kv_positions[hop],
            kv_segment_ids=self.kv_segment_ids[hop],
        )


class Ring(Strategy):
    name = "ring"
    schedule_dims = 1

    def refusal(self, setting):
        return None

    def schedule(self, setting, tokens, *, block_sizes):
        q_len, kv_len = setting.q_len // setting.degree, setting.kv_len // setting.degree

        def blocks_of(_source, hop_tokens):
            return make_schedule(setting.mask, hop_tokens, q_len=q_len, kv_len=kv_len, block_sizes=block_sizes)

        return self.schedule_of_hops(setting, tokens, keys_of_all(setting, tokens), blocks_of)

    def sources(self, setting: Setting) -> jax.Array:
        """The devices whose keys are here at each hop, int32 `[M]`; per shard."""
        return (jax.lax.axis_index(setting.axes) - jnp.array(hops_needed(setting))) % setting.degree

    def schedule_of_hops(
        self,
        setting: Setting,
        tokens: Tokens,
        keys: TokenAxis,
        blocks_of: Callable[[jax.Array, Tokens], Schedule],
    ) -> RingSchedule:
        """The schedule of a ring whose hops visit what they are told to; per shard.

        Args:
          setting, tokens: As `schedule`.
          keys: From `keys_of_all`.
          blocks_of: Of the device whose keys are here at a hop, and of the tokens of that hop: what is visited.
        """
        sources = self.sources(setting)
        kv_positions, kv_segment_ids = (jnp.take(x, sources, axis=0) for x in keys)

        def schedule_of_hop(hop):
            source, positions, segment_ids = hop
            hop_tokens = dataclasses.replace(tokens, kv_positions=positions, kv_segment_ids=segment_ids)
            return blocks_of(source, hop_tokens)

        hops = jax.lax.map(schedule_of_hop, (sources, kv_positions, kv_segment_ids))
        found = holds(setting, tokens) if len(sources) < setting.degree else None
        return RingSchedule(
            hops=hops,
            kv_positions=kv_positions,
            kv_segment_ids=kv_segment_ids,
            holds=None if found is None else found[None],
        )

    def forward(self, setting, q, k, v, tokens, schedule, *, sinks=None, **options):
        attend = forward_of_hop(q, k.shape[3], tokens, schedule, options)
        carry = forward_hops(Route.of(setting), attend, jnp.concatenate([k, v], axis=-1), empty_carry(q, v, sinks))
        out, lse = carry.finalize(q.dtype)
        return where_it_holds(schedule.holds, out), Residuals(q, k, v, out, lse)

    def backward(self, setting, residuals, dout, tokens, schedule, **options):
        q, k, v, *_ = residuals
        route = Route.of(setting)
        # Without the barrier XLA takes these permutes for the forward pass's and keeps all of their results until now:
        # the memory of an all-gather.
        kv = jax.lax.optimization_barrier(jnp.concatenate([k, v], axis=-1))
        attend = backward_of_hop(residuals, dout, tokens, schedule, options)
        (dq, *dbias), gathered = backward_hops(route, attend, kv, zeros_of_own(q, options))
        # Nothing is added any more: rounding here rather than at home is the same, and this hop has little to hide
        # behind.
        dkv = gathered.astype(kv.dtype)
        if route.strides:
            dkv = route.send(dkv, route.home)
        gradients = dq.astype(q.dtype), dkv[..., : k.shape[3]], dkv[..., k.shape[3] :]
        return *(where_it_holds(schedule.holds, x) for x in gradients), *dbias

    def transfers(self, setting, *, batch_size, key_dim, value_dim, dtype):
        num_sent = len(hops_needed(setting)) - 1
        if num_sent == 0:
            return ()
        kv = batch_size, setting.kv_len // setting.degree, setting.num_kv_heads, key_dim + value_dim
        permute = functools.partial(Transfer, kind="collective-permute", beside_calls=1)
        return (
            permute(phase="forward", count=num_sent, num_bytes=num_bytes(dtype, *kv)),
            permute(phase="backward", count=num_sent + 1, num_bytes=num_bytes(dtype, *kv)),
            permute(phase="backward", count=num_sent, num_bytes=num_bytes(jnp.float32, *kv)),
        )

    def tiles_of_calls(self, setting, tiles):
        return tiles[:, list(hops_needed(setting))]


@dataclasses.dataclass(frozen=True)
class Route:
    """How keys travel from hop to hop.

    Attributes:
      axes: The mesh axes of the ring.
      size: Devices on it.
      strides: How many devices further each next hop is.
      home: And how many from the last to where they came from.
    """

    axes: tuple[str, ...]
    size: int
    strides: tuple[int, ...]
    home: int

    @classmethod
    def of(cls, setting: Setting) -> "Route":
        hops = hops_needed(setting)
        strides = tuple(int(stride) for stride in np.diff(hops))
        return cls(setting.axes, setting.degree, strides, setting.degree - hops[-1])

    @property
    def unroll(self) -> bool | int:
        return len(self.strides) < MAX_UNROLLED_HOPS or 1

    def send(self, x: jax.Array, stride: int) -> jax.Array:
        return jax.lax.ppermute(x, self.axes, [(rank, (rank + stride) % self.size) for rank in range(self.size)])


def empty_carry(q: jax.Array, v: jax.Array, sinks: jax.Array | None) -> SoftmaxCarry:
    """What the softmax of this device's queries starts from; per shard."""
    shape = {"batch_size": q.shape[0], "q_len": q.shape[1], "value_dim": v.shape[3]}
    if sinks is None:
        return SoftmaxCarry.empty(num_heads=q.shape[2], **shape)
    return SoftmaxCarry.of_sinks(sinks, **shape)


def forward_of_hop(
    q: jax.Array, key_dim: int, tokens: Tokens, schedule: RingSchedule, options: Mapping[str, Any]
) -> Callable[[jax.typing.ArrayLike, jax.Array, SoftmaxCarry], SoftmaxCarry]:
    """A function of a hop, the keys and values that are here in one buffer, and the carry: the carry after it."""

    def attend(hop, kv, carry):
        hop_schedule, hop_tokens = schedule.at(hop, tokens)

        def visit(carry):
            return blockwise_attention_forward(
                q, kv[..., :key_dim], kv[..., key_dim:], tokens=hop_tokens, schedule=hop_schedule, carry=carry,
                return_carry=True, **options,
            )  # fmt: skip

        return jax.lax.cond(_visits(hop_schedule), visit, lambda carry: carry, carry)

    return attend


def backward_of_hop(
    residuals: Residuals, dout: jax.Array, tokens: Tokens, schedule: RingSchedule, options: Mapping[str, Any]
) -> Callable[[jax.typing.ArrayLike, jax.Array, tuple], tuple[tuple, jax.Array]]:
    """A function of a hop, the keys and values that are here, and dq, float32.

    What stands for dq here and in `backward_hops` is a tuple, of dq and, where it is asked for, of the gradient of the
    bias: all that stays on the device (`zeros_of_own`). It returns that with this hop's part added, and this hop's part
    of the gradient of keys and values, float32.
    """
    q, k, v, out, lse = residuals
    key_dim = k.shape[3]

    def attend(hop, kv, own):
        hop_schedule, hop_tokens = schedule.at(hop, tokens)
        zeros = float32_zeros(k, v)

        def visit(own):
            dq, *dbias_before = own
            dq, dk, dv, *dbias = blockwise_attention_backward(
                q, kv[..., :key_dim], kv[..., key_dim:], out, lse, dout, None, tokens=hop_tokens,
                schedule=hop_schedule, accumulate=(dq, *zeros), **options,
            )  # fmt: skip
            return (dq, *jax.tree.map(jnp.add, dbias_before, dbias)), dk, dv

        own, dk, dv = jax.lax.cond(_visits(hop_schedule), visit, lambda own: (own, *zeros), own)
        return own, jnp.concatenate([dk, dv], axis=-1)

    return attend


def zeros_of_own(q: jax.Array, options: Mapping[str, Any]) -> tuple:
    """What `backward_of_hop` starts from: dq, and the gradient of the bias if `options` ask for it, float32."""
    return *float32_zeros(q), *((zeros_like_bias(options["bias"]),) if options.get("bias_gradient") else ())


def forward_hops(
    route: Route, attend: Callable, kv: jax.Array, carry: SoftmaxCarry, *, first: jax.typing.ArrayLike = 0
) -> SoftmaxCarry:
    """The carry after all hops of a route, from the keys and values of its first; per shard.

    Args:
      attend: From `forward_of_hop`.
      first: The number of the first hop in the schedule.
    """

    def hop_and_pass_on(stride, state, hop):
        kv, carry = state
        next_kv = route.send(kv, stride)
        return (next_kv, attend(hop, kv, carry)), None

    state = kv, carry
    for hops, stride in alike(route.strides):
        body = functools.partial(hop_and_pass_on, stride)
        state, _ = jax.lax.scan(body, state, first + jnp.array(hops), unroll=route.unroll)
    return attend(first + len(route.strides), *state)


def backward_hops(
    route: Route, attend: Callable, kv: jax.Array, dq: tuple, *, first: jax.typing.ArrayLike = 0
) -> tuple[tuple, jax.Array]:
    """dq after all hops of a route, and the gradient of the keys and values that are here at the last; per shard.

    Args:
      attend: From `backward_of_hop`, which says what dq is.
      first: As for `forward_hops`.
    """

    def hop_and_pass_on(strides, state, hop):
        kv, dq, gathered = state
        stride_before, stride = strides
        # What the devices before this one gathered for these keys arrives while this one computes its part.
        next_kv, gathered = route.send(kv, stride), route.send(gathered, stride_before)
        dq, dkv = attend(hop, kv, dq)
        return (next_kv, dq, gathered + dkv), None

    next_kv = route.send(kv, route.strides[0]) if route.strides else kv
    dq, gathered = attend(first, kv, dq)
    if not route.strides:
        return dq, gathered
    state = next_kv, dq, gathered
    for hops, strides in alike(tuple(itertools.pairwise(route.strides)), first=1):
        body = functools.partial(hop_and_pass_on, strides)
        state, _ = jax.lax.scan(body, state, first + jnp.array(hops), unroll=route.unroll)
    kv, dq, gathered = state
    gathered = route.send(gathered, route.strides[-1])
    dq, dkv = attend(first + len(route.strides), kv, dq)
    return dq, gathered + dkv


def keys_of_all(setting: Setting, tokens: Tokens) -> TokenAxis:
    """Positions and segment ids of the keys of every device, `[P, B or 1, S / P]`; per shard."""
    return TokenAxis(*(jax.lax.all_gather(x, setting.axes) for x in (tokens.kv_positions, tokens.kv_segment_ids)))


def alike(items: Sequence, *, first: int = 0) -> list[tuple[list[int], object]]:
    """Runs of neighbouring equal items, each with the numbers of the hops that they belong to."""
    runs = itertools.groupby(enumerate(items, first), key=lambda numbered: numbered[1])
    return [([number for number, _ in run], item) for item, run in runs]


def _visits(schedule: Schedule) -> jax.Array:
    return jnp.any(schedule.kv_blocks.start < schedule.kv_blocks.stop)

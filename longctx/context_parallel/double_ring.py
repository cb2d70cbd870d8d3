"""Double ring: keys go round the I devices of a group, hop by hop, and from group to group once a round; P = O I.

A ring over all devices is as fast as its slowest link, and every hop waits for that. Here the devices of a group, the
last of the mesh axes that split the sequence, `context_inner`, have a ring of their own on the faster links. Keys go
round it once, a round of I hops; meanwhile those that a device started the round with travel to the device of the next
group that starts its next round with them. So each of the O - 1 hops between groups has the compute of a whole round to
hide behind, I times that of a hop. Any device then works, over O rounds, on the keys of all; the running softmax is
carried through.

In the backward pass the gradients of keys gather in a group as in a ring, one hop behind, and end where the round ends.
What earlier groups have gathered for the same keys travels to that device during the round, and is added there; after
the last round a permute across both levels takes the sum home.

Rounds and hops that no device can need are left out when the program is traced, as a ring leaves out hops; permutes
between groups then go straight to where the next round begins or ends. With M hops left in R rounds (M = P, R = O where
nothing is known):

Traffic, per device and layer, in bytes, b the size of q's dtype, each permute B (S / P) K (H + V) b, or 4 for b:
  inside   forward   M - R permutes
           backward  M - R permutes, and M - R of float32
  between  forward   R - 1 permutes
           backward  R permutes, and R - 1 of float32; the last of the former goes home; none where M = 1
As many as a ring sends, but no more than these go over the slower links. A device holds three shards of keys, two in a
ring, and one more of gradients. Once a step and distinct mask, positions and segment ids of the keys are gathered:
8 B S bytes.

Preconditions: P divides T and S; two mesh axes or more. Any mask, any order of tokens, T != S.

Reference: Gu et al., LoongTrain: Efficient Training of Long-Sequence LLMs with Head-Context Parallelism,
arXiv:2406.18485, section 4.3.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from longctx.context_parallel.reach import hops_needed, where_it_holds
from longctx.context_parallel.ring import (
    Ring,
    Route,
    alike,
    backward_hops,
    backward_of_hop,
    empty_carry,
    forward_hops,
    forward_of_hop,
    zeros_of_own,
)
from longctx.context_parallel.strategy import Residuals, Setting, num_bytes
from longctx.context_parallel.traffic import Transfer


class DoubleRing(Ring):
    name = "double_ring"

    def refusal(self, setting):
        if setting.inner_degree is None:
            return (
                "double_ring needs two mesh axes for the tokens, groups and the devices of a group, got one or axes of "
                "unknown sizes; name two in AttentionSharding(sequence=...), or use ring"
            )
        return None

    def sources(self, setting):
        hops = jnp.array([(r.outer, inner) for r in _rounds(setting) for inner in r.inners])
        group, place = jnp.divmod(jax.lax.axis_index(setting.axes), setting.inner_degree)
        num_groups = setting.degree // setting.inner_degree
        return (group - hops[:, 0]) % num_groups * setting.inner_degree + (place - hops[:, 1]) % setting.inner_degree

    def forward(self, setting, q, k, v, tokens, schedule, *, sinks=None, **options):
        plan = _Plan.of(setting)
        attend = forward_of_hop(q, k.shape[3], tokens, schedule, options)

        def round_and_pass_on(step, state, first):
            strides, move = step
            kv, carry = state
            next_kv = plan.send(kv, move)  # needed after all hops of this round
            return (next_kv, forward_hops(plan.route(strides), attend, kv, carry, first=first)), None

        state = jnp.concatenate([k, v], axis=-1), empty_carry(q, v, sinks)
        for numbers, step in alike(tuple(zip(plan.strides, plan.moves_of_firsts, strict=False))):
            body = functools.partial(round_and_pass_on, step)
            state, _ = jax.lax.scan(body, state, plan.firsts[np.array(numbers)], unroll=plan.unroll)
        kv, carry = state
        carry = forward_hops(plan.route(plan.strides[-1]), attend, kv, carry, first=plan.firsts[-1])
        out, lse = carry.finalize(q.dtype)
        return where_it_holds(schedule.holds, out), Residuals(q, k, v, out, lse)

    def backward(self, setting, residuals, dout, tokens, schedule, **options):
        q, k, v, *_ = residuals
        plan = _Plan.of(setting)
        attend = backward_of_hop(residuals, dout, tokens, schedule, options)

        def round_and_pass_on(step, state, first):
            strides, move, move_before = step
            kv, dq, gathered = state
            # What the groups before this one gathered for the keys of this round arrives while they go round here.
            next_kv, gathered = plan.send(kv, move), plan.send(gathered, move_before)
            dq, own = backward_hops(plan.route(strides), attend, kv, dq, first=first)
            return (next_kv, dq, gathered + own), None

        # The barrier is that of the ring.
        kv = jax.lax.optimization_barrier(jnp.concatenate([k, v], axis=-1))
        next_kv = plan.send(kv, plan.moves_of_firsts[0]) if plan.moves_of_firsts else kv
        dq, gathered = backward_hops(plan.route(plan.strides[0]), attend, kv, zeros_of_own(q, options))
        if plan.moves_of_firsts:
            state = next_kv, dq, gathered
            between = zip(plan.strides[1:], plan.moves_of_firsts[1:], plan.moves_of_lasts, strict=False)
            for numbers, step in alike(tuple(between), first=1):
                body = functools.partial(round_and_pass_on, step)
                state, _ = jax.lax.scan(body, state, plan.firsts[np.array(numbers)], unroll=plan.unroll)
            kv, dq, gathered = state
            gathered = plan.send(gathered, plan.moves_of_lasts[-1])
            dq, own = backward_hops(plan.route(plan.strides[-1]), attend, kv, dq, first=plan.firsts[-1])
            gathered += own
        dkv = gathered.astype(kv.dtype)  # where nothing is added any more
        if len(schedule.kv_positions) > 1:
            dkv = plan.send(dkv, plan.home)
        dq, *dbias = dq
        gradients = dq.astype(q.dtype), dkv[..., : k.shape[3]], dkv[..., k.shape[3] :]
        return *(where_it_holds(schedule.holds, x) for x in gradients), *dbias

    def transfers(self, setting, *, batch_size, key_dim, value_dim, dtype):
        rounds = _rounds(setting)
        between, inside = len(rounds) - 1, sum(len(r.inners) - 1 for r in rounds)
        if between + inside == 0:
            return ()
        kv = batch_size, setting.kv_len // setting.degree, setting.num_kv_heads, key_dim + value_dim
        permute = functools.partial(Transfer, kind="collective-permute")
        inner = functools.partial(permute, level="inner", beside_calls=1)
        outer = functools.partial(permute, level="outer", beside_calls=len(rounds[0].inners))
        stated = (
            inner(phase="forward", count=inside, num_bytes=num_bytes(dtype, *kv)),
            inner(phase="backward", count=inside, num_bytes=num_bytes(dtype, *kv)),
            inner(phase="backward", count=inside, num_bytes=num_bytes(jnp.float32, *kv)),
            outer(phase="forward", count=between, num_bytes=num_bytes(dtype, *kv)),
            outer(phase="backward", count=between + 1, num_bytes=num_bytes(dtype, *kv)),
            outer(phase="backward", count=between, num_bytes=num_bytes(jnp.float32, *kv)),
        )
        return tuple(transfer for transfer in stated if transfer.count)

    def tiles_of_calls(self, setting, tiles):
        inner, devices = setting.inner_degree, np.arange(setting.degree)
        calls = []
        for r in _rounds(setting):
            for hop in r.inners:
                group = (devices // inner - r.outer) % (setting.degree // inner)
                source = group * inner + (devices - hop) % inner
                calls.append(tiles[devices, (devices - source) % setting.degree])
        return np.stack(calls, axis=1)


@dataclasses.dataclass(frozen=True)
class _Round:
    """The hops of one round: how far keys have travelled, in groups, and at each hop in devices of a group."""

    outer: int
    inners: tuple[int, ...]


def _rounds(setting: Setting) -> tuple[_Round, ...]:
    """The rounds, and their hops, at which some device may have work."""
    inner, degree = setting.inner_degree, setting.degree
    needed = set(hops_needed(setting))
    rounds = []
    for outer in range(degree // inner):
        # Keys that came over the end of the group are those of a device I places further up.
        hops = [(outer * inner + hop, (outer - 1) * inner + hop) for hop in range(inner)]
        inners = [h for h, (ahead, over) in enumerate(hops) if ahead in needed or (h and over % degree in needed)]
        if inners:
            rounds.append(_Round(outer, tuple(inners)))
    return tuple(rounds)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How keys and their gradients travel.

    Attributes:
      axes: The mesh axes of the tokens, that of a group last.
      num_groups, size: Groups, and devices of one.
      rounds: Those that are there.
    """

    axes: tuple[str, ...]
    num_groups: int
    size: int
    rounds: tuple[_Round, ...]

    @classmethod
    def of(cls, setting: Setting) -> "_Plan":
        inner = setting.inner_degree
        return cls(setting.axes, setting.degree // inner, inner, _rounds(setting))

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        """Of each round, as of a Route in the group."""
        return tuple(tuple(b - a for a, b in itertools.pairwise(r.inners)) for r in self.rounds)

    @property
    def firsts(self) -> np.ndarray:
        """The number of each round's first hop in the schedule."""
        return np.cumsum([0, *(len(r.inners) for r in self.rounds[:-1])])

    @property
    def moves_of_firsts(self) -> tuple[tuple[int, int], ...]:
        """Groups and places between the first hop of each round and that of the next."""
        return tuple((b.outer - a.outer, b.inners[0] - a.inners[0]) for a, b in itertools.pairwise(self.rounds))

    @property
    def moves_of_lasts(self) -> tuple[tuple[int, int], ...]:
        """The same of last hops."""
        return tuple((b.outer - a.outer, b.inners[-1] - a.inners[-1]) for a, b in itertools.pairwise(self.rounds))

    @property
    def home(self) -> tuple[int, int]:
        """From the last hop of all to where the keys came from."""
        return -self.rounds[-1].outer, -self.rounds[-1].inners[-1]

    @property
    def unroll(self) -> bool | int:
        return len(self.rounds) <= MAX_UNROLLED_ROUNDS or 1

    def route(self, strides: tuple[int, ...]) -> Route:
        """Of one round, in the group; its gradients stay where it ends."""
        return Route(self.axes[-1:], self.size, strides, home=0)

    def send(self, x: jax.Array, move: tuple[int, int]) -> jax.Array:
        """To the device so many groups and places in the group further."""
        pairs = []
        for group, place in itertools.product(range(self.num_groups), range(self.size)):
            to = (group + move[0]) % self.num_groups * self.size + (place + move[1]) % self.size
            pairs.append((group * self.size + place, to))
        return jax.lax.ppermute(x, self.axes, pairs)


MAX_UNROLLED_ROUNDS = 2  # beyond, compile time would grow with the number of groups

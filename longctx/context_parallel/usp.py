"""Two levels: all-to-alls among the I devices of a group, and a ring of the O groups; P = O I.

The last of the mesh axes that split the sequence, `context_inner`, is the group's, of the faster links. An all-to-all
inside the group (ulysses.py) brings each device all tokens of its group, T / O, of N / I query and K / I kv heads. Keys
then go round the groups (ring.py), each device's to the device of the next group that has the same heads; they
travel under the compute of T / O queries, I times as many as a ring over all devices has to hide a hop behind. So P may
be greater than the number of heads, and only O - 1 hops go over the slower links. What the backward pass needs is kept
by heads, as ulysses does. A layout of P devices is one of O groups too, of I times wider stripes: the ring leaves out
hops by it, and each group's tokens are put into their order.

Traffic, per device and layer, in bytes, b the size of q's dtype, with M of the O hops left
(M = O where nothing is known):
  inside   forward   all-to-alls of (I - 1) / I times B (T / P) N H b, B (S / P) K (H + V) b and B (T / P) N V b
           backward  the same three
  between  forward   M - 1 permutes of B (S / P) K (H + V) b
           backward  M permutes of B (S / P) K (H + V) b, and M - 1 of B (S / P) K (H + V) 4 (float32); none where M = 1
Once a step and distinct mask, positions and segment ids of queries and keys are gathered in the group, those of keys
between the groups too: 8 B (T + S) / O and 8 B S bytes.

Preconditions: P divides T and S; I divides N and K; two mesh axes or more; a mask that all heads share. Any order of
tokens.

Reference: Fang and Zhao, USP: A Unified Sequence Parallelism Approach for Long Context Generative AI, arXiv:2405.07719.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from longctx.context_parallel.layout import Layout
from longctx.context_parallel.ring import Ring, RingSchedule
from longctx.context_parallel.strategy import Setting, ShardedSchedule, Strategy
from longctx.context_parallel.ulysses import Ulysses, all_tokens, by_heads, by_tokens
from pallas_kernels import Tokens
from pallas_kernels.tokens import Leaf

_INSIDE, _BETWEEN = Ulysses(), Ring()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class UspSchedule(ShardedSchedule):
    """What is built once a step.

    Attributes:
      ring: Of the ring of groups.
      q_positions, q_segment_ids: Of the queries of this device's group, int32 `[1, B or 1, T / O]`.
      chunks: As of CallSchedule, of the tokens of the group, `[1, B or 1, chunks]`.
    """

    ring: RingSchedule
    q_positions: Leaf
    q_segment_ids: Leaf
    chunks: Leaf = None

    @property
    def queries(self) -> Tokens:
        """Of the group, as the ring takes them: the keys of each hop are in its schedule."""
        return Tokens(q_positions=self.q_positions[0], q_segment_ids=self.q_segment_ids[0])

    @property
    def chunks_of_group(self) -> jax.Array | None:
        return None if self.chunks is None else self.chunks[0]


class Usp(Strategy):
    name = "usp"
    schedule_dims = Ring.schedule_dims

    def refusal(self, setting):
        inner = setting.inner_degree
        if inner is None:
            return (
                "usp needs two mesh axes for the tokens, groups and the devices of a group, got one or axes of unknown "
                "sizes; name two in AttentionSharding(sequence=...), or use ring or ulysses"
            )
        if setting.mask.head_groups > 1:
            return f"usp splits the heads, and the mask {setting.mask} differs between them; use ring or all_gather"
        for name, num_heads in (("query", setting.num_heads), ("kv", setting.num_kv_heads)):
            if num_heads is not None and num_heads % inner:
                return (
                    f"usp splits {num_heads} {name} heads over the {inner} devices of a group, wanted a multiple of "
                    f"{inner}; make the last axis of the tokens (context_inner) smaller, or use ring or all_gather"
                )
        return None

    def schedule(self, setting, tokens, *, block_sizes):
        inside = _inside(setting)
        tokens, chunks = all_tokens(inside, tokens)
        return UspSchedule(
            ring=_BETWEEN.schedule(_between(setting), tokens, block_sizes=block_sizes),
            q_positions=tokens.q_positions[None],
            q_segment_ids=tokens.q_segment_ids[None],
            chunks=None if chunks is None else chunks[None],
        )

    def forward(self, setting, q, k, v, tokens, schedule, **options):
        inside, chunks = _inside(setting), schedule.chunks_of_group
        q, kv = (by_heads(inside, x, chunks) for x in (q, jnp.concatenate([k, v], axis=-1)))
        out, residuals = _BETWEEN.forward(
            _between(setting),
            q,
            kv[..., : k.shape[3]],
            kv[..., k.shape[3] :],
            schedule.queries,
            schedule.ring,
            **options,
        )
        return by_tokens(inside, out, chunks), residuals

    def backward(self, setting, residuals, dout, tokens, schedule, **options):
        inside, chunks = _inside(setting), schedule.chunks_of_group
        dq, dk, dv, *dbias = _BETWEEN.backward(
            _between(setting), residuals, dout, schedule.queries, schedule.ring, **options
        )
        dq, dkv = (by_tokens(inside, x, chunks) for x in (dq, jnp.concatenate([dk, dv], axis=-1)))
        return dq, dkv[..., : dk.shape[3]], dkv[..., dk.shape[3] :], *dbias

    def transfers(self, setting, **sizes):
        inner, outer = _INSIDE.transfers(_inside(setting), **sizes), _BETWEEN.transfers(_between(setting), **sizes)
        return (
            *(dataclasses.replace(transfer, level="inner") for transfer in inner),
            *(dataclasses.replace(transfer, level="outer") for transfer in outer),
        )

    def tiles_of_calls(self, setting, tiles):
        degree, inner = setting.degree, setting.inner_degree
        devices = np.arange(degree)
        of_sources = np.take_along_axis(tiles, (devices[:, None] - devices) % degree, axis=1)
        groups = np.arange(degree // inner)
        of_groups = of_sources.reshape(len(groups), inner, len(groups), inner).sum(axis=(1, 3))
        of_hops = np.take_along_axis(of_groups, (groups[:, None] - groups) % len(groups), axis=1)
        # A device of a group has an I-th of the heads, of all tokens of the group.
        return _BETWEEN.tiles_of_calls(_between(setting), of_hops.repeat(inner, axis=0) // inner)

    def residual_specs(self, batch, sequence, heads):
        *outer, inner = sequence
        of_heads = PartitionSpec(batch, tuple(outer), (*heads, inner))
        return (*(of_heads,) * 4, PartitionSpec(batch, (*heads, inner), tuple(outer)))

    def like_residuals(self, setting, dout, schedule):
        return by_heads(_inside(setting), dout, schedule.chunks_of_group)

    def own_heads(self, setting, per_head):
        return _INSIDE.own_heads(_inside(setting), per_head)

    def in_all_heads(self, setting, own, num_heads):
        return _INSIDE.in_all_heads(_inside(setting), own, num_heads)


def _inside(setting: Setting) -> Setting:
    """Of the devices of one group, which share its tokens."""
    num_groups = setting.degree // setting.inner_degree
    return dataclasses.replace(
        setting,
        degree=setting.inner_degree,
        axes=setting.axes[-1:],
        inner_degree=None,
        q_len=setting.q_len // num_groups,
        kv_len=setting.kv_len // num_groups,
    )


def _between(setting: Setting) -> Setting:
    """Of the groups, a device of each: those that have the same heads."""
    inner = setting.inner_degree
    return dataclasses.replace(
        setting,
        degree=setting.degree // inner,
        axes=setting.axes[:-1],
        inner_degree=None,
        layout=setting.layout and _of_groups(setting.layout, inner),
        num_heads=setting.num_heads and setting.num_heads // inner,
        num_kv_heads=setting.num_kv_heads and setting.num_kv_heads // inner,
    )


def _of_groups(layout: Layout, inner: int) -> Layout:
    """Which tokens a group of so many neighbouring devices holds, once they are in order.

    The early and the late runs of neighbours in zigzag are next to each other, and so are stripes.
    """
    if layout.name != "striped":
        return layout
    return dataclasses.replace(layout, stripe_size=layout.stripe_size * inner)

"""What a context-parallel strategy is: how queries meet the keys of other devices, one file each.

A strategy is choreography over public ops, three functions of one device's shard: what is built once a step, the
forward pass and the backward pass of a layer. It says in one sentence what it does not serve, and in numbers what it
sends.
"""

import abc
import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import DTypeLike, Int

from longctx.context_parallel.layout import Layout
from longctx.context_parallel.traffic import Transfer
from pallas_kernels import Bias, BlockSizes, Mask, Schedule, Tokens
from pallas_kernels.saved import as_attention
from pallas_kernels.tokens import Leaf

StrategyName = Literal["ring", "ring_dma", "all_gather", "ulysses", "halo", "usp", "double_ring"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is static of attention over a split sequence; hashable.

    Attributes:
      mask: Which pairs may attend.
      degree: Devices that share the sequence, P.
      axes: The mesh axes that they are on; () where nothing is run, but planned.
      inner_degree: Devices along the last of several axes; None where there is one axis, or its size is not known.
      layout: Which tokens a device holds; None where that is not known.
      q_len, kv_len: Of the whole sequence, T and S.
      num_heads, num_kv_heads: Of the devices that share one sequence, N and K; None where no heads are at hand.
      max_document_length: Most tokens of a document, where that is bounded.
      has_positions: Whether positions are passed; otherwise they are 0, 1, 2, ... in the order of the shards.
      has_segments: Whether segment ids are passed; otherwise a row is one document.
    """

    mask: Mask
    degree: int
    axes: tuple[str, ...] = ()
    inner_degree: int | None = None
    layout: Layout | None = None
    q_len: int
    kv_len: int
    num_heads: int | None = None
    num_kv_heads: int | None = None
    max_document_length: int | None = None
    has_positions: bool = True
    has_segments: bool = True

    @property
    def in_order(self) -> bool:
        """Whether the tokens of the whole sequence are in order, as ops with `tokens=None` have them."""
        return not (self.has_positions or self.has_segments)

    def chunk_order(self, positions: jax.Array, segment_ids: jax.Array) -> jax.Array | None:
        """What `in_sequence` takes as `chunks`, `[B or 1, chunks]`; None unless each row has an order of its own.

        Args:
          positions, segment_ids: Of the whole sequence, its shards one after the other, `[B or 1, length]`.
        """
        return None if self.layout is None else self.layout.chunk_order(positions, segment_ids)

    def in_sequence(self, x: jax.Array, *, axis: int = 1, chunks: jax.Array | None = None) -> jax.Array:
        """An array of the whole sequence, its shards one after the other, in the order of the tokens if that is known.

        Work on blocks of it then depends on the mask alone: in the order of the shards the keys of a query may lie far
        apart.
        """
        return x if self.layout is None else self.layout.in_sequence(x, self.degree, axis=axis, chunks=chunks)

    def in_layout(self, x: jax.Array, *, axis: int = 1, chunks: jax.Array | None = None) -> jax.Array:
        """The inverse of `in_sequence`."""
        return x if self.layout is None else self.layout.in_layout(x, self.degree, axis=axis, chunks=chunks)


class Residuals(NamedTuple):
    """What the backward pass needs of the forward pass, split as the strategy's `residual_specs` say."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    out: jax.Array
    lse: jax.Array


class SavedResults:
    """Names, outside a shard_map, what a forward pass inside it leaves for the backward pass (pallas_kernels/saved.py).

    What a strategy saves may be what it was given, or what it returns: that must not be kept twice.
    """

    def __init__(self):
        self._same: list[int | None] = []

    def inside(self, given: tuple, residuals: Residuals) -> Residuals:
        """The residuals; called inside the shard_map, with q, k, v and out."""
        self._same = [next((i for i, y in enumerate(given) if x is y), None) for x in residuals]
        return residuals

    def outside(self, given: tuple, residuals: Residuals) -> Residuals:
        """The residuals, named; called outside with the same, whose out has its name already."""
        return Residuals(
            *(as_attention(x) if i is None else given[i] for x, i in zip(residuals, self._same, strict=True))
        )


class ShardedSchedule:
    """What all layers of a mask share, built once a step; each strategy has its own, a pytree."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CallSchedule(ShardedSchedule):
    """What is built once a step where a device makes one call of the op a layer.

    Attributes:
      blocks: What the call visits.
      tokens: Of its queries and keys.
      holds: Whether what the strategy assumes of the tokens is true of each row (reach.py), bool `[B or 1, 1]`; None
        where it assumes nothing.
      chunks: Of a layout with an order for each row, what brings it into that of the sequence (`Setting.chunk_order`).
    """

    blocks: Schedule
    tokens: Tokens
    holds: Leaf = None
    chunks: Leaf = None


class Strategy(abc.ABC):
    """One way for queries to meet the keys of other devices."""

    name: ClassVar[str]
    platform: ClassVar[str | None] = None
    """The only platform whose devices it runs on; None where it runs on any."""
    has_dropout: ClassVar[bool] = True
    """Whether it serves dropout, which no Setting tells of; refused by the call where it does not."""
    has_bias: ClassVar[bool] = True
    """The same of an additive bias."""
    schedule_dims: ClassVar[int] = 0
    """Dims that arrays of its schedule have before the rows of the batch."""

    @abc.abstractmethod
    def refusal(self, setting: Setting) -> str | None:
        """Why it cannot serve this, in one sentence with a remedy; None if it can."""

    @abc.abstractmethod
    def schedule(self, setting: Setting, tokens: Tokens, *, block_sizes: BlockSizes | None) -> ShardedSchedule:
        """What all layers of a mask share; per shard, once a step per distinct mask.

        Args:
          setting: Not refused.
          tokens: This device's, nothing None.
          block_sizes: As `make_schedule`.
        """

    @abc.abstractmethod
    def forward(self, setting: Setting, q, k, v, tokens: Tokens, schedule, **options) -> tuple[jax.Array, Residuals]:
        """out of this device's queries over the keys of all devices, and residuals; per shard.

        Args:
          tokens: This device's, nothing None.
          schedule: From `schedule`.
          **options: As `blockwise_attention_forward`, the mask among them; sinks, dropout and bias are of the heads
            that this device is given (`own_heads`).
        """

    @abc.abstractmethod
    def backward(self, setting: Setting, residuals: Residuals, dout, tokens: Tokens, schedule, **options):
        """`(dq, dk, dv)` of this device's queries and keys, in their dtypes; per shard.

        Where `options` say `bias_gradient`, also that of the bias, float32, of the heads of the residuals: to be summed
        over the devices.

        Args:
          dout: Split as the residuals (`like_residuals`).
        """

    @abc.abstractmethod
    def transfers(
        self, setting: Setting, *, batch_size: int, key_dim: int, value_dim: int, dtype: DTypeLike
    ) -> tuple[Transfer, ...]:
        """What one device sends for one layer, as the head of the strategy's file states it.

        Args:
          setting: With its heads.
          batch_size: Rows of this device, B.
          key_dim, value_dim: Dims of a head, H and V.
          dtype: Of q, k and v.
        """

    @abc.abstractmethod
    def tiles_of_calls(
        self, setting: Setting, tiles: Int[np.ndarray, "devices hops"]
    ) -> Int[np.ndarray, "devices calls"]:
        """Tiles that each device visits in each call of the op that a layer makes, from those of a ring (balance.py).

        In tiles of all heads that share a sequence.
        """

    def residual_specs(
        self, batch: tuple[str, ...], sequence: tuple[str, ...], heads: tuple[str, ...]
    ) -> tuple[PartitionSpec, ...]:
        """How the Residuals are split over the mesh axes of the rows, the tokens and the heads."""
        of_heads = PartitionSpec(batch, sequence, heads)
        return (*(of_heads,) * 4, PartitionSpec(batch, heads, sequence))

    def like_residuals(self, setting: Setting, dout: jax.Array, schedule) -> jax.Array:
        """The cotangent of this device's out, split as the out of the residuals; per shard."""
        del setting, schedule
        return dout

    def own_heads(self, setting: Setting, per_head: jax.Array) -> jax.Array:
        """Of `[N, ...]`, one entry for each query head that this device is given, those of the call; per shard.

        What ops take one of a head (and no token has) goes through here.
        """
        del setting
        return per_head

    def in_all_heads(self, setting: Setting, own: jax.Array, num_heads: int) -> jax.Array:
        """The transpose of `own_heads`, to be summed over devices: `[N, ...]` with zeros for other heads; per shard."""
        del setting, num_heads
        return own


def num_bytes(dtype: DTypeLike, *dims: int) -> int:
    """Bytes of an array."""
    return int(np.prod(dims)) * jnp.dtype(dtype).itemsize


def zeros_like_bias(bias: Bias) -> Bias:
    """What the gradient of a bias is added up from, float32."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), bias)


def float32_zeros(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """What `accumulate` starts from where gradients are wanted in float32."""
    return tuple(jnp.zeros(x.shape, jnp.float32) for x in arrays)

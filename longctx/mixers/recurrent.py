"""What the mixers of a state have in common: their cost, and how they are split over devices."""

import abc
import dataclasses
from typing import Any

import numpy as np
from jaxtyping import DTypeLike, Int

from longctx.context_parallel import AttentionSharding, ConvolutionShape, convolution, relayout, state_passing
from longctx.context_parallel.traffic import Transfer
from longctx.linear_attention import RecurrentLayer, StateShape
from longctx.mixers.registry import MixerConfig
from longctx.remat import ATTENTION, BLOCK_NAMES, QKV
from pallas_kernels import Implementation


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentConfig(MixerConfig):
    """Configuration of a mixer whose layer is a `RecurrentLayer`: linear in the tokens, and decoded from a state."""

    num_heads: int
    """Heads of values, each with a state of its own."""
    implementation: Implementation | None = None
    """Implementation of the linear attention op; null takes the first that serves the call on the platform at hand."""

    @abc.abstractmethod
    def state(self, dim: int) -> StateShape:
        """The sizes of the layer's state for this model dim."""

    @abc.abstractmethod
    def num_projected(self, dim: int) -> int:
        """Values a token that the matrices from the model dim put out, and those back to it take in."""

    def convolution(self, dim: int) -> ConvolutionShape | None:
        """The sizes of the layer's short convolutions, if it has any."""
        return None

    def num_inner(self, dim: int) -> int:
        """Numbers of the matrices between others, neither from the model dim nor back to it."""
        return 0

    @abc.abstractmethod
    def layer(self, dim: int, **common: Any) -> RecurrentLayer:
        """The layer; `common` are the arguments of `MixerConfig.build`, with its defaults, and implementation."""

    @property
    def tensor_names(self) -> frozenset[str]:
        return BLOCK_NAMES | {QKV, ATTENTION}

    @property
    def needs_runs(self) -> bool:
        return True

    def build(self, dim: int, **common: Any) -> RecurrentLayer:
        return self.layer(dim, implementation=self.implementation, **common)

    def flops_by_part(self, dim: int, document_lengths: Int[np.ndarray, " documents"]) -> dict[str, float]:
        """Projections 2 tokens a number of their matrices; attention as `StateShape.flops` counts it, in chunks of 64
        tokens; convolutions 2 W a token and channel."""
        tokens = float(document_lengths.sum(dtype=np.float64))
        projections = 2 * tokens * (dim * self.num_projected(dim) + self.num_inner(dim))
        parts = {"projections": projections, "attention": self.state(dim).flops(document_lengths)}
        shape = self.convolution(dim)
        return parts if shape is None else parts | {"convolutions": tokens * shape.flops}

    def refusal(
        self, dim: int, *, seq_len: int, heads_split: int, ring_size: int, sharding: AttentionSharding
    ) -> str | None:
        state, shape = self.state(dim), self.convolution(dim)
        reason = relayout.refusal(sharding.layout, seq_len=seq_len, degree=ring_size)
        sharding = relayout.sharding_of_runs(sharding)
        reason = reason or state_passing.refusal(
            sharding,
            num_heads=state.num_heads,
            num_key_heads=state.num_qk_heads,
            seq_len=seq_len,
            degree=ring_size,
            heads_split=heads_split,
        )
        if reason is None and shape is not None:
            reason = convolution.refusal(sharding, width=shape.width, seq_len=seq_len, degree=ring_size)
        return reason

    def transfers(
        self,
        dim: int,
        *,
        rows: int,
        seq_len: int,
        heads_split: int,
        ring_size: int,
        sharding: AttentionSharding,
        dtype: DTypeLike,
    ) -> tuple[Transfer, ...]:
        sharding = relayout.sharding_of_runs(sharding)
        state, shape = self.state(dim), self.convolution(dim)
        split = dict(rows=rows, degree=ring_size, heads_split=heads_split, segment_ids=True)  # the trainer packs rows
        of_states = state_passing.transfers(
            sharding,
            num_heads=state.num_heads,
            key_dim=state.key_dim,
            value_dim=state.value_dim,
            vector_decay=state.vector_decay,
            delta_rule=state.delta_rule,
            normalize=state.normalize,
            **split,
        )
        if shape is None:
            return of_states
        return (*convolution.transfers(sharding, shape=shape, dtype=dtype, **split), *of_states)


def check_sizes(config: RecurrentConfig, *names: str) -> None:
    """Raises ValueError, naming the option, unless each of these is None or a number of dims."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, wanted null or a number of dims >= 1")


def check_conv_size(conv_size: int | None) -> None:
    """Raises ValueError unless it is None or a number of tokens that makes a convolution."""
    if conv_size is not None and conv_size < 2:
        raise ValueError(
            f"conv_size: got {conv_size}, wanted null or a number of tokens >= 2; 4 is customary, null leaves it out"
        )

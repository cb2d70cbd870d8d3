"""What the mixers of a state have in common: their cost, and how they are split over devices."""

import abc
import dataclasses
from typing import Any

import numpy as np
from jaxtyping import DTypeLike, Int

from longctx.context_parallel import AttentionSharding, relayout, state_passing
from longctx.context_parallel.traffic import Transfer
from longctx.linear_attention import RecurrentLayer, StateShape
from longctx.mixers.registry import MixerConfig
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

    @abc.abstractmethod
    def layer(self, dim: int, **common: Any) -> RecurrentLayer:
        """The layer; `common` are the arguments of `MixerConfig.build`, with its defaults, and implementation."""

    @property
    def needs_runs(self) -> bool:
        return True

    def build(self, dim: int, **common: Any) -> RecurrentLayer:
        return self.layer(dim, implementation=self.implementation, **common)

    def flops_by_part(self, dim: int, document_lengths: Int[np.ndarray, " documents"]) -> dict[str, float]:
        """Projections 2 tokens dim a value; attention as `StateShape.flops` counts it, in chunks of 64 tokens."""
        tokens = float(document_lengths.sum(dtype=np.float64))
        projections = 2 * tokens * dim * self.num_projected(dim)
        return {"projections": projections, "attention": self.state(dim).flops(document_lengths)}

    def refusal(
        self, dim: int, *, seq_len: int, heads_split: int, ring_size: int, sharding: AttentionSharding
    ) -> str | None:
        state = self.state(dim)
        reason = relayout.refusal(sharding.layout, seq_len=seq_len, degree=ring_size)
        return reason or state_passing.refusal(
            relayout.sharding_of_runs(sharding),
            num_heads=state.num_heads,
            num_key_heads=state.num_qk_heads,
            seq_len=seq_len,
            degree=ring_size,
            heads_split=heads_split,
        )

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
        state = self.state(dim)
        return state_passing.transfers(
            relayout.sharding_of_runs(sharding),
            rows=rows,
            num_heads=state.num_heads,
            key_dim=state.key_dim,
            value_dim=state.value_dim,
            degree=ring_size,
            heads_split=heads_split,
            normalize=state.normalize,
            segment_ids=True,  # the trainer's rows are packed
        )


def check_sizes(config: RecurrentConfig, *names: str) -> None:
    """Raises ValueError, naming the option, unless each of these is None or a number of dims."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, wanted null or a number of dims >= 1")

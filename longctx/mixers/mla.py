"""The `mla` mixer: multi-head latent attention."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import DTypeLike, Int

from longctx import masks
from longctx.attention import window_pairs
from longctx.context_parallel import AttentionSharding
from longctx.context_parallel.strategy import Setting
from longctx.context_parallel.traffic import Transfer
from longctx.mixers.registry import MixerConfig, register
from longctx.mla import MlaAttention, check_dims
from longctx.remat import ATTENTION, BLOCK_NAMES, QKV
from longctx.rotary import RotaryConfig
from pallas_kernels import Implementation, Mask


@register("mla")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaConfig(MixerConfig):
    """Causal multi-head latent attention within documents: keys and values of all heads from one latent a token.

    Reference: DeepSeek-AI 2024, DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """

    num_heads: int
    """Heads."""
    kv_rank: int = 512
    """Dims of the latent that keys and values are projected from; what a cache holds of a token beside rope_dim."""
    q_rank: int | None = None
    """Dims of the latent that queries are projected from; null projects them from the model dim."""
    head_dim: int = 128
    """Dims of a head's queries and keys without position."""
    rope_dim: int = 64
    """Dims of a head's queries and keys that are rotated; even. All heads share the keys'."""
    value_dim: int = 128
    """Dims of a head's values."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    window: int | None = None
    """Tokens that a token sees, itself included; null means all before it."""
    implementation: Implementation | None = None
    """Implementation of the attention op; null takes the first that serves the call on the platform at hand."""
    deterministic: bool = True
    """Whether the attention op's gradients must come out the same, bit by bit, each time; false may be faster."""

    def __post_init__(self):
        check_dims(self.num_heads, self.kv_rank, self.q_rank, self.head_dim, self.rope_dim, self.value_dim)
        if not self.rope_theta > 1:
            raise ValueError(f"rope_theta: got {self.rope_theta}, wanted a number > 1; 10000 is customary")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window: got {self.window}, wanted null or a number of tokens >= 1")

    @property
    def mask(self) -> Mask:
        within = masks.causal() if self.window is None else masks.sliding_window(left=self.window - 1)
        return within & masks.documents()

    @property
    def tensor_names(self) -> frozenset[str]:
        return BLOCK_NAMES | {QKV, ATTENTION}

    def build(self, dim: int, **common: Any) -> MlaAttention:
        return MlaAttention(
            dim,
            num_heads=self.num_heads,
            kv_rank=self.kv_rank,
            q_rank=self.q_rank,
            head_dim=self.head_dim,
            rope_dim=self.rope_dim,
            value_dim=self.value_dim,
            mask=self.mask,
            rotary=RotaryConfig(theta=self.rope_theta),
            implementation=self.implementation,
            deterministic=self.deterministic,
            **common,
        )

    def flops_by_part(self, dim: int, document_lengths: Int[np.ndarray, " documents"]) -> dict[str, float]:
        """Projections 2 tokens (those of x, of the latents and of the result), attention 2 N (H + R + V) for each
        (query, key) pair that the mask allows, of H + R dims of queries and keys and V of values."""
        lengths = document_lengths.astype(np.float64)
        N, key_dim = self.num_heads, self.head_dim + self.rope_dim
        of_q = dim * N * key_dim if self.q_rank is None else self.q_rank * (dim + N * key_dim)
        of_kv = dim * (self.kv_rank + self.rope_dim) + self.kv_rank * N * (self.head_dim + self.value_dim)
        of_out = N * self.value_dim * dim
        return {
            "projections": float(2 * lengths.sum() * (of_q + of_kv + of_out)),
            "attention": float(2 * window_pairs(lengths, self.window) * N * (key_dim + self.value_dim)),
        }

    def refusal(
        self, dim: int, *, seq_len: int, heads_split: int, ring_size: int, sharding: AttentionSharding
    ) -> str | None:
        return sharding.strategy_for(self.mask).refusal(self._setting(seq_len, heads_split, ring_size, sharding))

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
        if ring_size == 1:
            return ()
        return sharding.strategy_for(self.mask).transfers(
            self._setting(seq_len, heads_split, ring_size, sharding),
            batch_size=rows,
            key_dim=self.head_dim + self.rope_dim,
            value_dim=self.value_dim,
            dtype=dtype,
        )

    def _setting(self, seq_len: int, heads_split: int, ring_size: int, sharding: AttentionSharding) -> Setting:
        return sharding.setting(
            self.mask,
            degree=ring_size,
            q_len=seq_len,
            kv_len=seq_len,
            num_heads=self.num_heads // heads_split,
            num_kv_heads=self.num_heads // heads_split,
        )

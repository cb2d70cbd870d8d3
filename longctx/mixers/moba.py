"""The `moba` mixer: softmax attention to a query's own chunk of tokens and to the chunks that it scores highest."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import DTypeLike, Int

from longctx.attention import causal_pairs, earlier_chunks
from longctx.context_parallel import AttentionSharding, moba
from longctx.context_parallel.traffic import Transfer
from longctx.mixers.grouped_query import GroupedQueryConfig
from longctx.mixers.registry import register
from longctx.moba import MobaAttention, check_chunks


@register("moba")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MobaConfig(GroupedQueryConfig):
    """Mixture of Block Attention within documents: causal, with rotary positions, to chunks that each query chooses.

    Reference: Lu et al. 2025, MoBA, arXiv:2502.13189.
    """

    chunk_size: int = 512
    """Tokens of the chunks that each document is cut into, by position."""
    top_k: int = 4
    """Chunks that a token sees at most: its own, causally, and of those before it the ones whose mean keys it scores
    highest."""

    def __post_init__(self):
        super().__post_init__()
        check_chunks(self.chunk_size, self.top_k)

    def build(self, dim: int, **common: Any) -> MobaAttention:
        return MobaAttention(dim, **self.layer_options, chunk_size=self.chunk_size, top_k=self.top_k, **common)

    def flops_by_part(self, dim: int, document_lengths: Int[np.ndarray, " documents"]) -> dict[str, float]:
        """Projections 2 tokens dim H (2 N + 2 K), scores 2 H N for each query and whole chunk before its own, attention
        4 H N for each (query, key) pair of its own chunk and the chosen ones."""
        lengths = document_lengths.astype(np.float64)
        of_a_pair = self.num_heads * self.resolved(dim).head_dim
        chosen = earlier_chunks(lengths, self.chunk_size, float(self.top_k - 1))
        pairs = causal_pairs(lengths, self.chunk_size) + self.chunk_size * chosen
        scored = earlier_chunks(lengths, self.chunk_size, lengths // self.chunk_size) if self.top_k > 1 else 0.0
        return {
            "projections": self.projection_flops(dim, lengths.sum()),
            "scores": 2 * scored * of_a_pair,
            "attention": 4 * pairs * of_a_pair,
        }

    def refusal(
        self, dim: int, *, seq_len: int, heads_split: int, ring_size: int, sharding: AttentionSharding
    ) -> str | None:
        num_kv_heads = self.resolved(dim).num_kv_heads
        return moba.refusal(sharding, num_kv_heads=num_kv_heads, degree=ring_size, heads_split=heads_split)

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
        resolved = self.resolved(dim)
        return moba.transfers(
            sharding,
            rows=rows,
            seq_len=seq_len,
            num_heads=self.num_heads // heads_split,
            num_kv_heads=resolved.num_kv_heads // heads_split,
            head_dim=resolved.head_dim,
            chunk_size=self.chunk_size,
            top_k=self.top_k,
            degree=ring_size,
            dtype=dtype,
        )

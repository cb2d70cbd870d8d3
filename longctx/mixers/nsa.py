"""The `nsa` mixer: softmax attention to compressed blocks, to blocks that are selected by them, and to a window."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import DTypeLike, Int

from longctx.attention import causal_pairs, earlier_chunks, window_pairs
from longctx.context_parallel import AttentionSharding, nsa
from longctx.context_parallel.traffic import Transfer
from longctx.mixers.grouped_query import GroupedQueryConfig
from longctx.mixers.registry import register
from longctx.nsa import NUM_BRANCHES, NsaAttention, compress_hidden_dim
from pallas_kernels.sparse.nsa_blocks import NsaSizes


@register("nsa")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NsaConfig(GroupedQueryConfig):
    """Native Sparse Attention within documents: causal, with rotary positions, three branches and a gate for each.

    Reference: Yuan et al. 2025, Native Sparse Attention, arXiv:2502.11089.
    """

    compress_block: int = 32
    """Tokens that are compressed to one key and value."""
    compress_stride: int = 16
    """Tokens from the start of one such block to the next; divides compress_block and block_size."""
    compress_dim: int | None = None
    """Hidden dim of the MLPs that compress; null means 4 head_dim."""
    block_size: int = 64
    """Tokens of the blocks that are selected, which each document is cut into; at least compress_block."""
    num_blocks: int = 16
    """Blocks that a token selects at most, the same for all heads of a kv head: the first of its document, its own and
    the one before, and of the others those that it attends to most in their compressed form."""
    window: int = 512
    """Tokens that the third branch sees, a token itself included."""

    def __post_init__(self):
        super().__post_init__()
        _ = self.sizes  # refuses what does not fit together
        if self.compress_dim is not None and self.compress_dim < 1:
            raise ValueError(f"compress_dim: got {self.compress_dim}, wanted null or a number >= 1")

    @property
    def sizes(self) -> NsaSizes:
        """How much each branch sees."""
        return NsaSizes(**{field.name: getattr(self, field.name) for field in dataclasses.fields(NsaSizes)})

    def build(self, dim: int, **common: Any) -> NsaAttention:
        return NsaAttention(dim, **self.layer_options, sizes=self.sizes, compress_dim=self.compress_dim, **common)

    def flops_by_part(self, dim: int, document_lengths: Int[np.ndarray, " documents"]) -> dict[str, float]:
        """Projections 2 tokens dim H (2 N + 6 K), gates 2 tokens dim 3 N, compression 4 K (l H F + F H) a block, scores
        2 H N for each query and compressed key that it sees, attention 4 H N for each pair of a branch."""
        resolved, lengths = self.resolved(dim), document_lengths.astype(np.float64)
        H, N, K = resolved.head_dim, self.num_heads, resolved.num_kv_heads
        hidden = compress_hidden_dim(H) if self.compress_dim is None else self.compress_dim
        num_compressed = np.maximum(0, (lengths - self.compress_block) // self.compress_stride + 1)
        seen = num_compressed * (lengths - self.compress_block + 1)
        seen = float((seen - self.compress_stride * num_compressed * (num_compressed - 1) / 2).sum())
        selected = causal_pairs(lengths, self.block_size)
        selected += self.block_size * earlier_chunks(lengths, self.block_size, float(self.num_blocks - 1))
        pairs = seen + selected + window_pairs(lengths, self.window)
        return {
            "projections": self.projection_flops(dim, lengths.sum()) + float(8 * lengths.sum() * dim * H * K),
            "gates": float(2 * lengths.sum() * dim * NUM_BRANCHES * N),
            "compression": float(4 * K * num_compressed.sum() * (self.compress_block + 1) * H * hidden),
            "scores": 2 * seen * H * N,
            "attention": 4 * pairs * H * N,
        }

    def refusal(
        self, dim: int, *, seq_len: int, heads_split: int, ring_size: int, sharding: AttentionSharding
    ) -> str | None:
        return nsa.refusal(
            sharding,
            sizes=self.sizes,
            setting_fields=self._setting_fields(dim, seq_len, heads_split, ring_size),
            num_kv_heads=self.resolved(dim).num_kv_heads,
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
        return nsa.transfers(
            sharding,
            sizes=self.sizes,
            rows=rows,
            head_dim=self.resolved(dim).head_dim,
            setting_fields=self._setting_fields(dim, seq_len, heads_split, ring_size),
            dtype=dtype,
        )

    def _setting_fields(self, dim: int, seq_len: int, heads_split: int, ring_size: int) -> dict[str, Any]:
        return dict(
            degree=ring_size,
            q_len=seq_len,
            kv_len=seq_len,
            num_heads=self.num_heads // heads_split,
            num_kv_heads=self.resolved(dim).num_kv_heads // heads_split,
        )

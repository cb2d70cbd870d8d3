"""The `attention` mixer: causal softmax attention, over everything before, a sliding window or a block."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike, Int

from longctx import masks
from longctx.arguments import check_soft_cap
from longctx.attention import Attention, causal_pairs, window_pairs
from longctx.context_parallel import AttentionSharding
from longctx.context_parallel.strategy import Setting
from longctx.context_parallel.traffic import Transfer
from longctx.mixers.grouped_query import GroupedQueryConfig
from longctx.mixers.registry import register
from longctx.position_bias import BiasConfig
from pallas_kernels import BlockSizes, Mask


@register("attention")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(GroupedQueryConfig):
    """Causal grouped-query softmax attention within documents, with rotary positions."""

    window: int | None = None
    """Tokens that a token sees, itself included; null means all before it."""
    chunk: int | None = None
    """Tokens of the blocks that each document is cut into, by position: a token sees those before it in its own block
    alone (the diagonal attention of TransNormer, the chunked of Llama 4); null cuts nothing. Not with window."""
    qkv_bias: bool = False
    """Whether learned vectors are added to queries, keys and values."""
    logits_soft_cap: float | None = None
    """Attention logits become cap * tanh(logits / cap); null leaves them."""
    bias: BiasConfig | None = None
    """What is added to the logits for the distance of a pair; null adds nothing. Models that have one set rope_theta to
    null."""
    sinks: bool = False
    """Whether each query head has a learned logit that takes part in the softmax and has no value."""
    dropout: float = 0.0
    """The share of attention probabilities that is dropped in training; 0 drops nothing."""
    block_q: int | None = None
    """Queries in a tile of the attention op; null, with block_kv null too, takes the platform's table."""
    block_kv: int | None = None
    """Keys in a tile of the attention op; null, with block_q null too, takes the platform's table."""

    def __post_init__(self):
        super().__post_init__()
        if self.window is not None and self.window < 1:
            raise ValueError(f"window: got {self.window}, wanted null or a number of tokens >= 1")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk: got {self.chunk}, wanted null or a number of tokens >= 1")
        if self.chunk is not None and self.window is not None:
            raise ValueError(f"chunk: got {self.chunk} with window={self.window}, wanted one of them; leave one out")
        check_soft_cap("logits_soft_cap", self.logits_soft_cap)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}, wanted 0 <= dropout < 1; 0 drops nothing")
        if (self.block_q is None) != (self.block_kv is None):
            missing, given = ("block_kv", "block_q") if self.block_kv is None else ("block_q", "block_kv")
            raise ValueError(f"{missing}: got null although {given} is set, wanted both or neither; set {missing}")
        for name in ("block_q", "block_kv"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, wanted null or a number of tokens >= 1")

    @property
    def mask(self) -> Mask:
        within = masks.causal() if self.window is None else masks.sliding_window(left=self.window - 1)
        if self.chunk is not None:
            within = within & masks.chunked(self.chunk)
        return within & masks.documents()

    @property
    def is_stochastic(self) -> bool:
        return self.dropout > 0

    @property
    def block_sizes(self) -> BlockSizes | None:
        if self.block_q is None:
            return None
        return BlockSizes(block_q=self.block_q, block_kv=self.block_kv)

    def build(
        self,
        dim: int,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        norm_eps: float = 1e-6,
        out_init_scale: float = 1.0,
        sharding: AttentionSharding | None = None,
        rngs: nnx.Rngs,
    ) -> Attention:
        return Attention(
            dim,
            **self.layer_options,
            mask=self.mask,
            qkv_bias=self.qkv_bias,
            logits_soft_cap=self.logits_soft_cap,
            bias=self.bias,
            sinks=self.sinks,
            dropout_rate=self.dropout,
            dtype=dtype,
            param_dtype=param_dtype,
            norm_eps=norm_eps,
            out_init_scale=out_init_scale,
            block_sizes=self.block_sizes,
            sharding=sharding,
            rngs=rngs,
        )

    def flops_by_part(self, dim: int, document_lengths: Int[np.ndarray, " documents"]) -> dict[str, float]:
        """Projections 2 tokens dim H (2 N + 2 K), attention 4 H N for each (query, key) pair that the mask allows."""
        lengths = document_lengths.astype(np.float64)
        head_dim = self.resolved(dim).head_dim
        if self.chunk is None:
            pairs = window_pairs(lengths, self.window)
        else:
            pairs = causal_pairs(lengths, self.chunk)
        attention = float(4 * pairs * self.num_heads * head_dim)
        return {"projections": self.projection_flops(dim, lengths.sum()), "attention": attention}

    def refusal(
        self, dim: int, *, seq_len: int, heads_split: int, ring_size: int, sharding: AttentionSharding
    ) -> str | None:
        return sharding.strategy_for(self.mask).refusal(self._setting(dim, seq_len, heads_split, ring_size, sharding))

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
        head_dim = self.resolved(dim).head_dim
        return sharding.strategy_for(self.mask).transfers(
            self._setting(dim, seq_len, heads_split, ring_size, sharding),
            batch_size=rows,
            key_dim=head_dim,
            value_dim=head_dim,
            dtype=dtype,
        )

    def _setting(
        self, dim: int, seq_len: int, heads_split: int, ring_size: int, sharding: AttentionSharding
    ) -> Setting:
        return sharding.setting(
            self.mask,
            degree=ring_size,
            q_len=seq_len,
            kv_len=seq_len,
            num_heads=self.num_heads // heads_split,
            num_kv_heads=self.resolved(dim).num_kv_heads // heads_split,
        )

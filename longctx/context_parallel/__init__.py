"""Attention over a mesh."""

from longctx.context_parallel.api import AnySchedule, sharded_attention, sharded_schedule
from longctx.context_parallel.balance import Work, work
from longctx.context_parallel.balanced import BalancedRow, Balancer, balanced_order
from longctx.context_parallel.config import AttentionSharding, ContextParallelConfig
from longctx.context_parallel.convolution import (
    ConvolutionShape,
    continued_convolution,
    convolution_of_context,
    empty_recent,
    sharded_short_convolution,
)
from longctx.context_parallel.inference import (
    PrefillPlan,
    cache_degree,
    empty_cache,
    prefill_schedule,
    sharded_decode,
    sharded_prefill,
)
from longctx.context_parallel.kv_cache import KVCache
from longctx.context_parallel.layout import Layout
from longctx.context_parallel.linear_inference import (
    LinearCache,
    empty_linear_cache,
    sharded_linear_decode,
    sharded_linear_prefill,
)
from longctx.context_parallel.moba import sharded_moba
from longctx.context_parallel.moba_inference import MobaCache, empty_moba_cache, sharded_moba_decode
from longctx.context_parallel.nsa import sharded_nsa, sharded_nsa_blocks
from longctx.context_parallel.nsa_inference import (
    NewNsaBlocks,
    NsaCache,
    empty_nsa_cache,
    new_nsa_blocks,
    sharded_nsa_decode,
)
from longctx.context_parallel.relayout import Relayout
from longctx.context_parallel.selected import sharded_selected_attention
from longctx.context_parallel.state_passing import sharded_linear_attention

__all__ = [
    "AnySchedule",
    "AttentionSharding",
    "BalancedRow",
    "Balancer",
    "ContextParallelConfig",
    "ConvolutionShape",
    "KVCache",
    "Layout",
    "LinearCache",
    "MobaCache",
    "NewNsaBlocks",
    "NsaCache",
    "PrefillPlan",
    "Relayout",
    "Work",
    "balanced_order",
    "cache_degree",
    "continued_convolution",
    "convolution_of_context",
    "empty_cache",
    "empty_linear_cache",
    "empty_moba_cache",
    "empty_nsa_cache",
    "empty_recent",
    "new_nsa_blocks",
    "prefill_schedule",
    "sharded_attention",
    "sharded_nsa_blocks",
    "sharded_decode",
    "sharded_linear_attention",
    "sharded_linear_decode",
    "sharded_linear_prefill",
    "sharded_moba",
    "sharded_moba_decode",
    "sharded_nsa",
    "sharded_nsa_decode",
    "sharded_prefill",
    "sharded_schedule",
    "sharded_selected_attention",
    "sharded_short_convolution",
    "work",
]

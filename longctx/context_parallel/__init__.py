"""Attention over a mesh."""

from longctx.context_parallel.api import AnySchedule, AttentionSharding, sharded_attention, sharded_schedule
from longctx.context_parallel.inference import (
    PrefillPlan,
    cache_degree,
    empty_cache,
    prefill_schedule,
    sharded_decode,
    sharded_prefill,
)
from longctx.context_parallel.kv_cache import KVCache
from longctx.context_parallel.layout import ContextParallelConfig

__all__ = [
    "AnySchedule",
    "AttentionSharding",
    "ContextParallelConfig",
    "KVCache",
    "PrefillPlan",
    "cache_degree",
    "empty_cache",
    "prefill_schedule",
    "sharded_attention",
    "sharded_decode",
    "sharded_prefill",
    "sharded_schedule",
]

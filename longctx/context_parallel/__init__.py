"""Attention over a mesh."""

from longctx.context_parallel.api import AnySchedule, AttentionSharding, sharded_attention, sharded_schedule
from longctx.context_parallel.layout import ContextParallelConfig

__all__ = ["AnySchedule", "AttentionSharding", "ContextParallelConfig", "sharded_attention", "sharded_schedule"]

"""Attention over a mesh."""

from longctx.context_parallel.api import AnySchedule, sharded_attention, sharded_schedule
from longctx.context_parallel.config import AttentionSharding, ContextParallelConfig
from longctx.context_parallel.layout import Layout

__all__ = [
    "AnySchedule",
    "AttentionSharding",
    "ContextParallelConfig",
    "Layout",
    "sharded_attention",
    "sharded_schedule",
]

"""Attention over a mesh."""

from longctx.context_parallel.api import AttentionSharding, sharded_attention
from longctx.context_parallel.layout import ContextParallelConfig

__all__ = ["AttentionSharding", "ContextParallelConfig", "sharded_attention"]

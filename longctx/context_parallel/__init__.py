"""Attention over a mesh."""

from longctx.context_parallel.api import AttentionSharding, sharded_attention

__all__ = ["AttentionSharding", "sharded_attention"]

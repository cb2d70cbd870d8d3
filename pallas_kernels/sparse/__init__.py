"""Sparse attention: which blocks of keys to attend to, chosen from the queries and keys at hand.

    out = moba_attention(q, k, v, chunk_size=512, top_k=4)   # Mixture of Block Attention

    selection = XAttention(stride=16).select(q, k, mask=mask, block_sizes=block_sizes, threshold=0.9)
    attention_recall(q, k, selection, mask=mask)   # how much of the exact attention that is, for each query

README.md has the definitions and their sources.
"""

from pallas_kernels.sparse.moba import moba_attention
from pallas_kernels.sparse.selection import BlockSelection, attention_recall
from pallas_kernels.sparse.selectors import (
    AShape,
    BlockMean,
    PerHead,
    Selector,
    VerticalSlash,
    XAttention,
    best_by_head,
)

__all__ = [
    "AShape",
    "BlockMean",
    "BlockSelection",
    "PerHead",
    "Selector",
    "VerticalSlash",
    "XAttention",
    "attention_recall",
    "best_by_head",
    "moba_attention",
]

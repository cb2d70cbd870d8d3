"""Sparse attention: which blocks of keys to attend to, chosen from the queries and keys at hand.

    out = moba_attention(q, k, v, chunk_size=512, top_k=4)   # Mixture of Block Attention
    out = nsa_attention(q, compressed, selected, sliding, gates)   # Native Sparse Attention

    selection = XAttention(stride=16).select(q, k, mask=mask, block_sizes=block_sizes, threshold=0.9)
    attention_recall(q, k, selection, mask=mask)   # how much of the exact attention that is, for each query

README.md has the definitions and their sources.
"""

from pallas_kernels.sparse.moba import moba_attention
from pallas_kernels.sparse.nsa import BranchKeys, compressed_starts, nsa_attention
from pallas_kernels.sparse.nsa_blocks import NsaSizes
from pallas_kernels.sparse.nsa_compress import tokens_of_blocks
from pallas_kernels.sparse.nsa_selected import (
    selected_attention,
    selected_attention_backward,
    selected_attention_forward,
)
from pallas_kernels.sparse.selection import BlockSelection, attention_recall
from pallas_kernels.sparse.selector import Selector
from pallas_kernels.sparse.selectors import AShape, BlockMean, PerHead, VerticalSlash, best_by_head
from pallas_kernels.sparse.xattention import XAttention

__all__ = [
    "AShape",
    "BlockMean",
    "BlockSelection",
    "BranchKeys",
    "NsaSizes",
    "PerHead",
    "Selector",
    "VerticalSlash",
    "XAttention",
    "attention_recall",
    "best_by_head",
    "compressed_starts",
    "moba_attention",
    "nsa_attention",
    "selected_attention",
    "selected_attention_backward",
    "selected_attention_forward",
    "tokens_of_blocks",
]

"""Attention kernels for long sequences: ops on arrays, with no notion of layers or meshes.

Shapes: B batch, T query length, S key length, N query heads, K kv heads, G = N / K, H query and key head dim, V value
head dim, D model dim, C chunk, W window. Public layout `[B, T, N, H]`.
"""

from pallas_kernels.bias import Alibi, Bias, DistanceBias, KerpleLog, KerplePower, T5Buckets
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.blockwise.api import (
    blockwise_attention,
    blockwise_attention_backward,
    blockwise_attention_forward,
    ring_kernels,
    sinks_gradient,
)
from pallas_kernels.blockwise.latent import latent_attention, latent_attention_forward
from pallas_kernels.dispatch import IMPLEMENTATIONS, Implementation
from pallas_kernels.dropout import Dropout
from pallas_kernels.linear.api import (
    linear_attention,
    linear_attention_backward,
    linear_attention_forward,
    linear_attention_state_cotangents,
    linear_attention_states,
)
from pallas_kernels.linear.state import LinearState
from pallas_kernels.mask import Mask
from pallas_kernels.online_softmax import SoftmaxCarry, merge_partials
from pallas_kernels.schedule import Schedule, make_schedule
from pallas_kernels.tokens import PADDING_SEGMENT_ID, Tokens

__all__ = [
    "IMPLEMENTATIONS",
    "PADDING_SEGMENT_ID",
    "Alibi",
    "Bias",
    "BlockSizes",
    "DistanceBias",
    "Dropout",
    "Implementation",
    "KerpleLog",
    "KerplePower",
    "LinearState",
    "Mask",
    "Schedule",
    "SoftmaxCarry",
    "T5Buckets",
    "Tokens",
    "blockwise_attention",
    "blockwise_attention_backward",
    "blockwise_attention_forward",
    "latent_attention",
    "latent_attention_forward",
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_forward",
    "linear_attention_state_cotangents",
    "linear_attention_states",
    "make_schedule",
    "merge_partials",
    "ring_kernels",
    "sinks_gradient",
]

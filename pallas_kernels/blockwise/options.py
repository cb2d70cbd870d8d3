"""What a blockwise attention call fixes beside its arrays: the static options every implementation is handed."""

import dataclasses

from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.mask import Mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Static options of a call, validated by api.py.

    Attributes:
      mask: Which pairs may attend.
      scale: Multiplies q.k.
      logits_soft_cap: If given, logits become cap * tanh(logits / cap) before the mask.
      block_sizes: Tokens a block holds; None lets the implementation choose.
      deterministic: Whether gradients must come out the same, bit by bit, each time.
      bias_gradient: Whether a backward pass also returns the gradient of the bias' parameters, float32.
    """

    mask: Mask
    scale: float
    logits_soft_cap: float | None
    block_sizes: BlockSizes | None
    deterministic: bool
    bias_gradient: bool = False

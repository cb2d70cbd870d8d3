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
      skip_softmax_threshold: Tiles may be left out of which no probability is as much as this, before it is divided by
        the sum; 0 for none.
      block_maxima: Tokens of the blocks whose greatest logits are returned beside the result; None for none.
      bias_gradient: Whether a backward pass also returns the gradient of the bias' parameters, float32.
    """

    mask: Mask
    scale: float
    logits_soft_cap: float | None
    block_sizes: BlockSizes | None
    deterministic: bool
    skip_softmax_threshold: float = 0.0
    block_maxima: BlockSizes | None = None
    bias_gradient: bool = False

    def refusal_of_skipping_and_maxima(self) -> str | None:
        """Why an implementation that has neither cannot serve the call; None where it is asked for neither."""
        if self.skip_softmax_threshold:
            return "it leaves out no tiles (skip_softmax_threshold)"
        return None if self.block_maxima is None else "it returns no maxima of blocks (block_maxima)"

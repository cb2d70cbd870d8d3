"""Linear attention by chunks, in XLA. For now token by token."""

from pallas_kernels.linear.reference import backward, forward, state_cotangents, states

__all__ = ["backward", "forward", "state_cotangents", "states"]

"""What a linear attention call fixes beside its arrays, and the names of its forms."""

import dataclasses
from typing import Literal

import jax

DecayKind = Literal["none", "fixed", "scalar", "vector"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Static options of a call, validated by api.py.

    Attributes:
      scale: Multiplies q; not 0.
      decay_gradient: Whether the backward pass is to give the gradient of a decay.
    """

    scale: float
    decay_gradient: bool = True


def kind_of(decay: jax.Array | None) -> DecayKind:
    """Which form a log decay is, by its number of dims: None, [N], [B, T, N] or [B, T, N, H]."""
    if decay is None:
        return "none"
    kinds: dict[int, DecayKind] = {1: "fixed", 3: "scalar", 4: "vector"}
    return kinds[decay.ndim]

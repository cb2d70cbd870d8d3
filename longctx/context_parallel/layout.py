"""Layouts: which tokens of a sequence each device of the context axes holds.

A layout is a permutation of the sequence, applied once, in the data, to tokens, targets, positions and segment ids.
Device d then holds the d-th equal part of the permuted sequence. Positions travel with the tokens, so masks and rotary
embeddings need to know nothing of it. Under a causal mask later tokens have more keys than earlier ones: contiguous
leaves the last of P devices with 2 P - 1 times the work of the first, zigzag and striped even it out.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int

LayoutName = Literal["contiguous", "striped", "zigzag"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextParallelConfig:
    """How attention works when the tokens of a sequence are split over the context axes of the mesh."""

    strategy: Literal["ring"] = "ring"
    """How a query meets keys of other devices: `ring` passes keys and values from device to device."""
    layout: LayoutName = "zigzag"
    """Which tokens a device holds: `contiguous` one run; `zigzag` an early and a late run, which evens out causal
    masks; `striped` every P-th stripe, which evens out packed documents too."""
    stripe_size: int = 1
    """Tokens of a stripe, for `layout: striped`."""

    def __post_init__(self):
        if self.stripe_size < 1:
            raise ValueError(f"stripe_size: got {self.stripe_size}, wanted a number of tokens >= 1")
        if self.stripe_size > 1 and self.layout != "striped":
            raise ValueError(
                f"stripe_size: got {self.stripe_size} with layout={self.layout}, which has no stripes; "
                "leave it out or choose layout=striped"
            )

    def multiple(self, degree: int) -> int:
        """What the length of a sequence over `degree` devices must be a multiple of."""
        if degree == 1:
            return 1
        return {"contiguous": degree, "zigzag": 2 * degree, "striped": degree * self.stripe_size}[self.layout]

    def order(self, length: int, degree: int) -> Int[np.ndarray, " length"]:
        """The permutation: entry i is the place in the sequence of the token that stands at i in the layout.

        With P = degree: contiguous is the identity. Zigzag cuts the sequence into 2 P chunks and gives device d chunks
        d and 2 P - 1 - d. Striped deals stripes out in turn: device d holds stripes d, d + P, d + 2 P, ...

        Args:
          length: Tokens of the sequence.
          degree: Devices it is split over.
        Raises: ValueError where the length does not split into equal parts, naming the multiple it must be.
        Reference: Brandon et al., Striped Attention, arXiv:2311.09431 (striped); the zigzag order is that of Llama 3,
          arXiv:2407.21783, section 3.3.2.
        """
        places = np.arange(length)
        if degree == 1:
            return places
        multiple = self.multiple(degree)
        if length % multiple:
            raise ValueError(
                f"context_parallel.layout: {self.layout} over {degree} devices splits a sequence into parts of a "
                f"multiple of {multiple} tokens, got {length}; change seq_len, the mesh or the layout"
            )
        match self.layout:
            case "contiguous":
                return places
            case "zigzag":
                chunks = places.reshape(2 * degree, -1)
                return np.stack([chunks[:degree], chunks[: degree - 1 : -1]], axis=1).reshape(-1)
            case "striped":
                return places.reshape(-1, degree, self.stripe_size).swapaxes(0, 1).reshape(-1)


def permute[A](x: A, order: Int[np.ndarray, " length"], *, axis: int = 1) -> A:
    """`x`, an array of NumPy's or JAX's, with its sequence in the layout's order."""
    return x.take(order, axis=axis)


def unpermute[A](x: A, order: Int[np.ndarray, " length"], *, axis: int = 1) -> A:
    """The inverse of permute."""
    return x.take(np.argsort(order), axis=axis)

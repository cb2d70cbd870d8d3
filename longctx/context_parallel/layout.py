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
class Layout:
    """Which tokens of a sequence each of P devices holds.

    Attributes:
      name: `contiguous`, `zigzag` or `striped`.
      stripe_size: Tokens of a stripe, for `striped`.
    """

    name: LayoutName = "contiguous"
    stripe_size: int = 1

    def __post_init__(self):
        if self.stripe_size < 1:
            raise ValueError(f"stripe_size: got {self.stripe_size}, wanted a number of tokens >= 1")
        if self.stripe_size > 1 and self.name != "striped":
            raise ValueError(
                f"stripe_size: got {self.stripe_size} with layout={self.name}, which has no stripes; "
                "leave it out or choose layout=striped"
            )

    def multiple(self, degree: int) -> int:
        """What the length of a sequence over `degree` devices must be a multiple of."""
        if degree == 1:
            return 1
        return {"contiguous": degree, "zigzag": 2 * degree, "striped": degree * self.stripe_size}[self.name]

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
                f"context_parallel.layout: {self.name} over {degree} devices splits a sequence into parts of a "
                f"multiple of {multiple} tokens, got {length}; change seq_len, the mesh or the layout"
            )
        match self.name:
            case "contiguous":
                return places
            case "zigzag":
                chunks = places.reshape(2 * degree, -1)
                return np.stack([chunks[:degree], chunks[: degree - 1 : -1]], axis=1).reshape(-1)
            case "striped":
                return places.reshape(-1, degree, self.stripe_size).swapaxes(0, 1).reshape(-1)

    def runs(self, degree: int) -> Int[np.ndarray, "devices runs"] | None:
        """The runs of neighbouring tokens that each device holds, as numbers of equal chunks of the sequence.

        None where a device holds many short ones: striped.
        """
        devices = np.arange(degree)[:, None]
        match self.name:
            case "contiguous":
                return devices
            case "zigzag":
                return np.concatenate([devices, 2 * degree - 1 - devices], axis=1)
            case "striped":
                return None

    def in_sequence[A](self, x: A, degree: int, *, axis: int = 1) -> A:
        """`x`, an array of NumPy's or JAX's that holds a whole sequence in the layout's order, in the sequence's own.

        The same as `unpermute`, by copying chunks in place of tokens.
        """
        match self.name:
            case "contiguous":
                return x
            case "zigzag":
                chunks = _split_dim(x, axis, (2 * degree, -1))
                runs = np.argsort(self.runs(degree).reshape(-1))
                return chunks.take(runs, axis=axis).reshape(x.shape)
            case "striped":
                stripes = _split_dim(x, axis, (degree, -1, self.stripe_size))
                return stripes.swapaxes(axis, axis + 1).reshape(x.shape)

    def in_layout[A](self, x: A, degree: int, *, axis: int = 1) -> A:
        """The inverse of `in_sequence`."""
        match self.name:
            case "contiguous":
                return x
            case "zigzag":
                chunks = _split_dim(x, axis, (2 * degree, -1))
                return chunks.take(self.runs(degree).reshape(-1), axis=axis).reshape(x.shape)
            case "striped":
                stripes = _split_dim(x, axis, (-1, degree, self.stripe_size))
                return stripes.swapaxes(axis, axis + 1).reshape(x.shape)


def permute[A](x: A, order: Int[np.ndarray, " length"], *, axis: int = 1) -> A:
    """`x`, an array of NumPy's or JAX's, with its sequence in the layout's order."""
    return x.take(order, axis=axis)


def unpermute[A](x: A, order: Int[np.ndarray, " length"], *, axis: int = 1) -> A:
    """The inverse of permute."""
    return x.take(np.argsort(order), axis=axis)


def _split_dim[A](x: A, axis: int, sizes: tuple[int, ...]) -> A:
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])

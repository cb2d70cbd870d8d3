"""Layouts: which tokens of a sequence each device of the context axes holds.

A layout is a permutation of the sequence, applied once, in the data, to tokens, targets, positions and segment ids.
Device d then holds the d-th equal part of the permuted sequence. Positions travel with the tokens, so masks and rotary
embeddings need to know nothing of it. Under a causal mask later tokens have more keys than earlier ones: contiguous
leaves the last of P devices with 2 P - 1 times the work of the first, zigzag and striped even it out.

`balanced` has no order of its own: which chunks a device holds is decided for each row from its documents
(balanced.py). What is fixed is their size and that a device holds as many of each P-th of the sequence, in their order.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

LayoutName = Literal["contiguous", "striped", "zigzag", "balanced"]
_CHUNK_SIZE = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Which tokens of a sequence each of P devices holds.

    Attributes:
      name: `contiguous`, `zigzag`, `striped` or `balanced`.
      stripe_size: Tokens of a stripe, for `striped`.
      chunk_size: Tokens of a chunk, for `balanced`. Small ones are evened out more finely, and are better multiples of
        what a kernel takes as a block.
    """

    name: LayoutName = "contiguous"
    stripe_size: int = 1
    chunk_size: int = _CHUNK_SIZE

    def __post_init__(self):
        if self.stripe_size < 1:
            raise ValueError(f"stripe_size: got {self.stripe_size}, wanted a number of tokens >= 1")
        if self.stripe_size > 1 and self.name != "striped":
            raise ValueError(
                f"stripe_size: got {self.stripe_size} with layout={self.name}, which has no stripes; "
                "leave it out or choose layout=striped"
            )
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size: got {self.chunk_size}, wanted a number of tokens >= 1")
        if self.chunk_size != _CHUNK_SIZE and self.name != "balanced":
            raise ValueError(
                f"chunk_size: got {self.chunk_size} with layout={self.name}, whose chunks follow from the devices; "
                "leave it out or choose layout=balanced"
            )

    @property
    def is_of_rows(self) -> bool:
        """Whether each row has an order of its own, made from its documents."""
        return self.name == "balanced"

    def multiple(self, degree: int) -> int:
        """What the length of a sequence over `degree` devices must be a multiple of."""
        if degree == 1:
            return 1
        return {
            "contiguous": degree,
            "zigzag": 2 * degree,
            "striped": degree * self.stripe_size,
            "balanced": degree**2 * self.chunk_size,
        }[self.name]

    def check(self, length: int, degree: int) -> None:
        """Raises: ValueError where the length does not split into equal parts, naming the multiple it must be."""
        multiple = self.multiple(degree)
        if length % multiple:
            raise ValueError(
                f"context_parallel.layout: {self.name} over {degree} devices splits a sequence into parts of a "
                f"multiple of {multiple} tokens, got {length}; change seq_len, the mesh or the layout"
                + (" (or its chunk_size)" if self.is_of_rows else "")
            )

    def order(self, length: int, degree: int) -> Int[np.ndarray, " length"]:
        """The permutation: entry i is the place in the sequence of the token that stands at i in the layout.

        With P = degree: contiguous is the identity. Zigzag cuts the sequence into 2 P chunks and gives device d chunks
        d and 2 P - 1 - d. Striped deals stripes out in turn: device d holds stripes d, d + P, d + 2 P, ...

        Args:
          length: Tokens of the sequence.
          degree: Devices it is split over.
        Raises: ValueError where the length does not split into equal parts, naming the multiple it must be, and for
          balanced, which has an order for each row: `balanced_order`.
        Reference: Brandon et al., Striped Attention, arXiv:2311.09431 (striped); the zigzag order is that of Llama 3,
          arXiv:2407.21783, section 3.3.2.
        """
        places = np.arange(length)
        if degree == 1:
            return places
        self.check(length, degree)
        match self.name:
            case "balanced":
                raise ValueError(
                    "layout: balanced has no order that all rows share, wanted one that has; make that of your rows "
                    "with context_parallel.balanced_order, or choose another layout"
                )
            case "contiguous":
                return places
            case "zigzag":
                chunks = places.reshape(2 * degree, -1)
                return np.stack([chunks[:degree], chunks[: degree - 1 : -1]], axis=1).reshape(-1)
            case "striped":
                return places.reshape(-1, degree, self.stripe_size).swapaxes(0, 1).reshape(-1)

    def runs(self, degree: int) -> Int[np.ndarray, "devices runs"] | None:
        """The runs of neighbouring tokens that each device holds, as numbers of equal chunks of the sequence.

        None where a device holds many short ones: striped, balanced.
        """
        devices = np.arange(degree)[:, None]
        match self.name:
            case "contiguous":
                return devices
            case "zigzag":
                return np.concatenate([devices, 2 * degree - 1 - devices], axis=1)
            case "striped" | "balanced":
                return None

    def chunk_order(self, positions: jax.Array, segment_ids: jax.Array) -> jax.Array | None:
        """Of rows in the order of a balanced layout, int32 `[B, chunks]`: the places of their chunks in the sequence's
        order; None for layouts whose order all rows share.

        Chunks are ordered by the segment and the position of their first token, those of padding alone at the end.

        Args:
          positions, segment_ids: `[B, length]`, whole chunks of a row, such as those of one device or of all.
        Cost: O(B length), and a sort of the chunks.
        """
        if not self.is_of_rows:
            return None
        segments = segment_ids.reshape(len(segment_ids), -1, self.chunk_size)
        first = jnp.argmax(segments >= 0, axis=2, keepdims=True)
        segment, position = (
            jnp.take_along_axis(x, first, axis=2)[:, :, 0] for x in (segments, positions.reshape(segments.shape))
        )
        segment = jnp.where(segment < 0, jnp.iinfo(segment.dtype).max, segment)
        places = jax.lax.broadcasted_iota(jnp.int32, segment.shape, 1)
        return jax.lax.sort((segment, position, places), dimension=1, num_keys=2)[2]

    def in_sequence[A](self, x: A, degree: int, *, axis: int = 1, chunks: jax.Array | None = None) -> A:
        """`x`, an array of NumPy's or JAX's that holds a whole sequence in the layout's order, in the sequence's own.

        The same as `unpermute`, by copying chunks in place of tokens.

        Args:
          x: The array.
          degree: Devices that hold it.
          axis: The dim of the sequence.
          chunks: From `chunk_order`, of the rows of x or one for all; axis is then 1.
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
            case "balanced":
                return _take_chunks(x, chunks)

    def in_layout[A](self, x: A, degree: int, *, axis: int = 1, chunks: jax.Array | None = None) -> A:
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
            case "balanced":
                return _take_chunks(x, jnp.argsort(chunks, axis=1))


def permute[A](x: A, order: Int[np.ndarray, "*rows length"], *, axis: int = 1) -> A:
    """`x`, an array of NumPy's or JAX's, with its sequence in the layout's order.

    An order `[rows, length]` has one for each row of x, whose sequence is then its second dim.
    """
    if order.ndim == 1:
        return x.take(order, axis=axis)
    return x[np.arange(len(x))[:, None], order]


def unpermute[A](x: A, order: Int[np.ndarray, "*rows length"], *, axis: int = 1) -> A:
    """The inverse of permute."""
    return permute(x, np.argsort(order, axis=-1), axis=axis)


def not_of_rows(layout: Layout | None, what: str) -> str | None:
    """Why `what` does not serve a layout that has an order for each row, in one sentence; None if this has not."""
    if layout is None or not layout.is_of_rows:
        return None
    return (
        f"{what} need tokens whose order is known when the program is traced, got layout={layout.name}, which orders "
        "each row by its documents; choose another layout"
    )


def _take_chunks(x: jax.Array, chunks: jax.Array) -> jax.Array:
    """`[B, length, ...]` with its chunks in the order of each row, `[B or 1, chunks]`."""
    cut = x.reshape(x.shape[0], chunks.shape[1], -1, *x.shape[2:])
    chunks = jnp.broadcast_to(chunks, (x.shape[0], chunks.shape[1]))
    take = jax.vmap(lambda row, places: row.at[places].get(mode="promise_in_bounds", unique_indices=True))
    return take(cut, chunks).reshape(x.shape)


def _split_dim[A](x: A, axis: int, sizes: tuple[int, ...]) -> A:
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])

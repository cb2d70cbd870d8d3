"""Masks as users write them: constructors combined with `&`, `|` and `~`.

    causal() & documents()                       # packed documents, decoder
    sliding_window(left=511) & documents()       # the same, each token sees itself and the 511 before it
    (causal() | prefix(64)) & documents()        # bidirectional over the first 64 positions of each document

A mask is static and hashable; the positions and segment ids it reads come with the data. Positions are those passed to
the layer (0, 1, 2, ... when none are passed), so in packed rows they count from the start of each document.
"""

from pallas_kernels import Mask
from pallas_kernels.mask import Causal, Full, Prefix, SameDocument, Window


def full() -> Mask:
    """Every token attends to every token."""
    return Full()


def causal(offset: int = 0) -> Mask:
    """A token at position t attends to positions <= t + offset.

    Args:
      offset: In tokens; negative excludes the nearest ones (-1: strictly the past), positive looks ahead.
    """
    return Causal(offset)


def sliding_window(left: int | None, right: int | None = 0) -> Mask:
    """A token at position t attends to positions t - left to t + right, both included.

    With `right=0` this is already causal, and each token sees `left + 1` tokens, itself included.

    Args:
      left: Tokens before; None leaves that side open.
      right: Tokens after; None leaves that side open.
    """
    return Window(left, right)


def documents() -> Mask:
    """A token attends within its own document: to tokens with the same segment id.

    Padding (a negative id) attends to nothing and is attended by nothing. Without segment ids a row is one document.
    """
    return SameDocument()


def prefix(length: int) -> Mask:
    """Every token attends to positions < length; use it as `causal() | prefix(length)`."""
    return Prefix(length)

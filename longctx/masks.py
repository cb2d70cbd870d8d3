"""Masks as users write them: constructors combined with `&`, `|` and `~`.

    causal() & documents()                                   # packed documents, decoder
    sliding_window(left=511) & documents()                   # the same, each token sees itself and the 511 before it
    (causal() | prefix(64)) & documents()                    # bidirectional over the first 64 tokens of each document
    causal() & (sink_tokens(4) | sliding_window(left=1023))  # StreamingLLM

A mask is static and hashable; the positions and segment ids it reads come with the data. Positions are those passed to
the layer (0, 1, 2, ... when none are passed), so in packed rows they count from the start of each document: "the first
4 positions" are those of each document, and `& documents()` keeps a token to its own. docs/masks.md lists the patterns
of the literature; `mask.plot()` draws any of them.
"""

from collections.abc import Callable

import numpy as np
from jax.typing import ArrayLike

from pallas_kernels import Mask
from pallas_kernels.mask import Bounds, Causal, Full, PerHead, Prefix, SameDocument, Window
from pallas_kernels.mask_patterns import Chunked, GlobalQueries, Neighborhood, Predicate, Strided, Summary, Table

__all__ = [
    "block_table",
    "causal",
    "chunked",
    "dilated_window",
    "documents",
    "full",
    "global_queries",
    "global_tokens",
    "neighborhood",
    "per_head",
    "predicate",
    "prefix",
    "sink_tokens",
    "sliding_window",
    "strided",
    "summary",
]


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


def dilated_window(left: int | None, dilation: int, right: int | None = 0) -> Mask:
    """A token at position t attends to every dilation-th of the positions t - left to t + right, counted from t.

    Args:
      left, right: As `sliding_window`, in tokens, not in steps of the dilation.
      dilation: Tokens from one key to the next.

    Reference: Beltagy, Peters and Cohan, Longformer, arXiv:2004.05150, section 3.1.
    """
    return Strided(dilation) & Window(left, right)


def strided(stride: int, block: int = 1) -> Mask:
    """A token attends to tokens a multiple of `stride` blocks of `block` positions away, on both sides.

    (t // block - s // block) % stride == 0

    Args:
      stride: In blocks.
      block: In tokens; where it is a multiple of the op's block sizes, the blocks in between are never visited.

    Reference: Child et al., Sparse Transformers, arXiv:1904.10509, section 4.3.
    """
    return Strided(stride, block)


def summary(period: int, num: int = 1) -> Mask:
    """Every token attends to the last `num` positions of every `period`; use it as `causal() & (chunked | summary)`.

    Reference: Child et al., Sparse Transformers, arXiv:1904.10509, section 4.3, the fixed pattern.
    """
    return Summary(period, num)


def chunked(size: int) -> Mask:
    """A token attends within its own chunk of `size` positions; use it as `causal() & chunked(8192)`, as in Llama 4."""
    return Chunked(size)


def documents() -> Mask:
    """A token attends within its own document: to tokens with the same segment id.

    Padding (a negative id) attends to nothing and is attended by nothing. Without segment ids a row is one document.
    """
    return SameDocument()


def prefix(length: int) -> Mask:
    """Every token attends to positions < length; use it as `causal() | prefix(length)`."""
    return Prefix(length)


def sink_tokens(num: int) -> Mask:
    """Every token attends to the first `num` positions; use it as `causal() & (sink_tokens(4) | sliding_window(1023))`.

    The same mask as `prefix`, under the name it has beside a window.

    Reference: Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453, section 3.2.
    """
    return Prefix(num)


def global_queries(num: int) -> Mask:
    """The first `num` positions attend to every token."""
    return GlobalQueries(num)


def global_tokens(num: int) -> Mask:
    """The first `num` positions attend to every token, and every token to them; use it as `| sliding_window(w, w)`.

    Reference: Beltagy, Peters and Cohan, Longformer, arXiv:2004.05150, section 3.1; Zaheer et al., Big Bird,
    arXiv:2007.14062, section 2.
    """
    return Prefix(num) | GlobalQueries(num)


def neighborhood(
    grid: tuple[int, ...],
    radius: int | tuple[int, ...],
    *,
    tile_shape: tuple[int, ...] | None = None,
    shift_at_edges: bool = True,
) -> Mask:
    """A token of a grid attends to its neighborhood: to tokens within `radius` of it along every axis.

    Positions count the grid in row-major order; those beyond it take part in no pair.

    Args:
      grid: Tokens along each axis, outermost first: (H, W) or (frames, H, W).
      radius: Reach along each axis, or one number for all; the window has 2 radius + 1 tokens along an axis.
      tile_shape: If given, a token attends to whole tiles of this many tokens along each axis, and radius counts tiles.
      shift_at_edges: Whether windows move inwards at the edges and keep their size; otherwise they are cut off.

    Reference: Hassani et al., Neighborhood Attention Transformer, arXiv:2204.07143, section 3.1; Zhang et al., Fast
    Video Generation with Sliding Tile Attention, arXiv:2502.04507, section 3.
    """
    radius = (radius,) * len(grid) if isinstance(radius, int) else radius
    return Neighborhood(grid, radius, tile_shape, shift_at_edges)


def block_table(blocks: np.ndarray, block_size: int | tuple[int, int] = 1) -> Mask:
    """A token at position t attends to position s where `blocks[t // block_size, s // block_size]`.

    The table is copied and becomes part of the compiled program. Positions beyond it take part in no pair.

    Args:
      blocks: Bool numpy array `[rows, columns]`.
      block_size: Positions that an entry stands for: of queries and of keys, or one number for both. Best a multiple of
        the op's block sizes; with 1 the table is the pattern itself.
    """
    block_q, block_kv = (block_size, block_size) if isinstance(block_size, int) else block_size
    return Table(blocks, block_q, block_kv)


def per_head(*masks: Mask) -> Mask:
    """Query head n of N follows `masks[n * len(masks) // N]`: each mask serves an equal group of neighbouring heads.

    The number of heads must be a multiple of the number of masks. The blocks visited are those that any head needs.
    Heads that a mesh splits over devices are refused.
    """
    return PerHead(masks)


def predicate(
    pair: Callable[[ArrayLike, ArrayLike, ArrayLike, ArrayLike], ArrayLike],
    tile: Callable[[Bounds, Bounds], tuple[ArrayLike, ArrayLike]] | None = None,
    *,
    uses_segments: bool = False,
) -> Mask:
    """A rule of your own.

    Define the functions once, at module level: a mask is compared by them, and a new one compiles anew.

    Args:
      pair: `pair(q_positions, kv_positions, q_segment_ids, kv_segment_ids)`, int32 arrays that broadcast; returns bool.
      tile: `tile(q, kv)` of two `Bounds` (position_min, position_max, segment_min, segment_max, inclusive); returns
        `(some, all)`: some may be False only if no pair within the bounds may attend, all True only if every one may.
        None visits every block and tests every pair: right, and as slow as no mask.
      uses_segments: Whether `pair` reads the segment ids.
    """
    return Predicate(pair, tile, uses_segments)

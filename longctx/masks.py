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

import math
from collections.abc import Callable, Sequence

import numpy as np
from jax.typing import ArrayLike

from pallas_kernels import Mask
from pallas_kernels.mask import Bounds, Causal, Full, PerHead, Prefix, SameDocument, Window
from pallas_kernels.mask_grids import Neighborhood, StridedNeighborhood
from pallas_kernels.mask_patterns import (
    BlockWindow,
    Chunked,
    GlobalQueries,
    PowersOfTwo,
    Predicate,
    Strided,
    StridedKeys,
    Summary,
    Table,
)
from pallas_kernels.mask_segments import Contexts, Hierarchy, check_field, pack_ids

__all__ = [
    "block_table",
    "block_window",
    "causal",
    "chunked",
    "context_ids",
    "contexts",
    "dilated_window",
    "documents",
    "elastic_windows",
    "full",
    "global_queries",
    "global_tokens",
    "hierarchy",
    "hierarchy_ids",
    "neighborhood",
    "per_head",
    "powers_of_two",
    "predicate",
    "prefix",
    "s2_shards",
    "sink_tokens",
    "sliding_window",
    "strided",
    "strided_keys",
    "strided_neighborhood",
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


def block_window(left: int, right: int = 0, *, block: int) -> Mask:
    """A token attends to whole blocks of `block` positions, from `left` blocks before its own to `right` after it.

    With `right=0` tokens still see those after them in their own block; `causal() & block_window(...)` sees none.

    Args:
      left, right: In blocks.
      block: In tokens; where it is a multiple of the op's block sizes, no pair at the window's edges needs testing.
    """
    return BlockWindow(left, right, block)


def powers_of_two(block: int = 1) -> Mask:
    """A token attends to its own block of `block` positions and to those 1, 2, 4, 8, ... blocks before it.

    Use it as `causal() & (sink_tokens(4) | sliding_window(w) | powers_of_two(128))`: in d such layers a token hears of
    all those up to 2^d blocks before it.

    Args:
      block: In tokens; where it is a multiple of the op's block sizes, the blocks in between are never visited.

    Reference: Chen et al., PowerAttention, arXiv:2503.03588.
    """
    return PowersOfTwo(block)


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


def strided_keys(stride: int, block: int = 1, offset: int = 0) -> Mask:
    """Every token attends to every stride-th block of `block` positions, counted from block number `offset`.

    (s // block) % stride == offset. `summary(period, num)` has the last positions of every period.

    Args:
      stride: In blocks.
      block: In tokens; where it is a multiple of the op's block sizes, the blocks in between are never visited.
      offset: In blocks, less than the stride.
    """
    return StridedKeys(stride, block, offset)


def s2_shards(num_shards: int, local: int, *, block: int) -> Mask:
    """Heads in `num_shards` groups: each attends to nearby blocks and to its own share of all before them. Causal.

    Beside the last `local` blocks, its own included, group h attends to every num_shards-th block, from block
    num_shards - 1 - h on: together the heads cover the whole context. As in `per_head`, a group is of neighbouring
    heads, so that those that share keys and values under grouped queries share the blocks too.

    Args:
      num_shards: Groups of heads; the number of query heads must be a multiple.
      local: In blocks, at least 1.
      block: In tokens, best a multiple of the op's block sizes.

    Reference: Lin et al., S2-Attention, arXiv:2407.17678.
    """
    local_blocks = block_window(local - 1, block=block)
    offsets = reversed(range(num_shards))
    return per_head(*(causal() & (local_blocks | strided_keys(num_shards, block, offset)) for offset in offsets))


def elastic_windows(
    rules: Sequence[tuple[float | int, float | int]], length: int, *, sinks: int = 64, block: int = 64
) -> Mask:
    """A causal window of its own for each group of heads, as long as its rule says for this length, beside sinks.

    Args:
      rules: (alpha, beta) of each group of neighbouring heads; its window is alpha + beta length tokens, rounded up to
        whole blocks, and at least one.
      length: Of the sequence.
      sinks: Tokens at the start that every token sees.
      block: In tokens, best a multiple of the op's block sizes.
    Raises: ValueError where there is no rule.

    Reference: Fu et al., MoA: Mixture of Sparse Attention, arXiv:2406.14909.
    """
    windows = (max(1, math.ceil((alpha + beta * length) / block)) for alpha, beta in rules)
    return per_head(*(causal() & (sink_tokens(sinks) | block_window(num - 1, block=block)) for num in windows))


def chunked(size: int) -> Mask:
    """A token attends within its own chunk of `size` positions; use it as `causal() & chunked(8192)`, as in Llama 4."""
    return Chunked(size)


def documents() -> Mask:
    """A token attends within its own document: to tokens with the same segment id.

    Padding (a negative id) attends to nothing and is attended by nothing. Without segment ids a row is one document.
    """
    return SameDocument()


def contexts(bits: int = 8) -> Mask:
    """A token attends within its own context, and those of a prompt's last one, the question, to all of the prompt.

    Use it as `causal() & contexts()`. It reads which context a token is of from the segment ids, as `context_ids` packs
    them, so lengths are data, and a row may hold many prompts.

    Args:
      bits: Of the number of the context in a segment id, as `context_ids` has it.

    Reference: Ma et al., Block-Attention for Efficient RAG, arXiv:2409.15355.
    """
    return Contexts(bits)


def context_ids(prompt: ArrayLike, context: ArrayLike, is_last: ArrayLike, *, bits: int = 8) -> np.ndarray:
    """Segment ids for `contexts`: `prompt << bits | context`, with all bits set in a prompt's last context.

    Args:
      prompt: Number of each token's prompt, int; negative is padding.
      context: Number of its context in the prompt, from 0; any number in the last one.
      is_last: Whether it is of the last context, the question.
      bits: Of the number of the context.
    Returns: int32, of the arguments' broadcast shape.
    Raises: ValueError where a number does not fit.
    """
    last = (1 << bits) - 1
    contexts_below = np.where(is_last, 0, context)
    check_field("context_ids", "context", contexts_below, last - 1)  # the last one's number is taken
    return pack_ids("context_ids", prompt, context=(np.where(is_last, last, contexts_below), bits))


def hierarchy(*, section_bits: int = 8, sentence_bits: int = 12, sections: int = 16) -> Mask:
    """Documents of sections of sentences: a token attends to what is beside, right above and right below it.

    Each document, section and sentence begins with an anchor token. A token attends to its sentence and the sentence's
    anchor; that one to its tokens, to the anchors of the section's other sentences and of the section; that one to its
    sentences' anchors, to those of the document's other sections and of the document; and that one to its sections'.
    The levels are read from the segment ids, as `hierarchy_ids` packs them.

    Args:
      section_bits, sentence_bits: Of the numbers in a segment id, as `hierarchy_ids` has them.
      sections: About how many a document has; with too low a number more blocks are visited than need be.

    Reference: He et al., HDT: Hierarchical Document Transformer, arXiv:2407.08330.
    """
    return Hierarchy(section_bits, sentence_bits, sections)


def hierarchy_ids(
    document: ArrayLike,
    section: ArrayLike,
    sentence: ArrayLike,
    is_token: ArrayLike,
    *,
    section_bits: int = 8,
    sentence_bits: int = 12,
) -> np.ndarray:
    """Segment ids for `hierarchy`: the fields document, section, sentence and is_token, from the highest bits down.

    Args:
      document: Number of each token's document, int; negative is padding.
      section: Number of its section in the document, from 1; 0 for the document's anchor.
      sentence: Number of its sentence in the section, from 1; 0 for anchors of sections and documents.
      is_token: False for anchors.
      section_bits, sentence_bits: Of these numbers.
    Returns: int32, of the arguments' broadcast shape.
    Raises: ValueError where a number does not fit, or a token is in no sentence or a sentence in no section.
    """
    section, sentence, is_token = np.asarray(section), np.asarray(sentence), np.asarray(is_token, bool)
    orphan = (np.asarray(document) >= 0) & ((is_token & (sentence == 0)) | ((sentence > 0) & (section == 0)))
    if orphan.any():
        raise ValueError(
            "hierarchy_ids: got a token with sentence=0 or a sentence with section=0, wanted every token in a sentence "
            "and every sentence in a section; count both from 1"
        )
    return pack_ids(
        "hierarchy_ids",
        document,
        section=(section, section_bits),
        sentence=(sentence, sentence_bits),
        is_token=(is_token, 1),
    )


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


def strided_neighborhood(
    grid: tuple[int, ...],
    window: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    *,
    tile_shape: tuple[int, ...] | None = None,
) -> Mask:
    """Generalized neighborhood attention: groups of `stride` queries along each axis of a grid share a window of keys.

    The window is that of the group's middle query (of an even number the one after the middle), moved inwards at the
    edges. Positions beyond the grid take part in no pair.

    Args:
      grid: Tokens along each axis, outermost first: (L,), (H, W) or (frames, H, W).
      window: Keys that a query sees along each axis, or one number for all.
      stride: Queries that share a window, at most its size: 1 is neighborhood attention, the window's is blocked.
      tile_shape: If given, positions count the grid tile by tile, each of so many tokens along each axis. With tiles of
        the op's block sizes that divide window and stride, whole blocks are left out: so order the tokens by tiles.

    Reference: Hassani et al., Generalized Neighborhood Attention, arXiv:2504.16922.
    """
    window, stride = ((x,) * len(grid) if isinstance(x, int) else x for x in (window, stride))
    return StridedNeighborhood(grid, window, stride, tile_shape)


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

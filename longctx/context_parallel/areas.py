"""Pairs that a mask allows, counted exactly on the host and without an array of all pairs: areas.

Between devices (`hop_areas`), and between equal chunks of one row (`chunk_areas`). In general tiles are judged by their
bounds, and only those that the mask cuts through are looked into. Where the keys of every query are one run of slots,
as under causal masks and windows within packed documents, two counts of where these runs begin and end say it all.
"""

import jax
import numpy as np
from jaxtyping import Int

from pallas_kernels import Mask
from pallas_kernels.mask import And, Bounds, Causal, Full, SameDocument, Window
from pallas_kernels.tokens import TokenAxis

MAX_TILES_AT_ONCE = 1 << 22
"""Tiles, or pairs, judged at a time. One costs up to 30 bytes of temporaries, so this bounds the peak near 130 MB."""
_BLOCK = 64  # tokens of a block whose pairs are counted at once where the mask allows all or none


def hop_areas(mask: Mask, queries: TokenAxis, keys: TokenAxis) -> Int[np.ndarray, "devices hops"]:
    """Pairs that the mask allows between the queries of each device and the keys that a ring brings it at each hop.

    Args:
      mask: As for `work`.
      queries, keys: Positions and segment ids by device, `[P, B, T / P]` and `[P, B, S / P]`.
    """
    degree = len(queries.positions)
    masks = [mask.of_head(group, mask.head_groups) for group in range(mask.head_groups)]
    areas = np.zeros((degree, degree), np.int64)
    for device in range(degree):
        for hop in range(degree):
            q = TokenAxis(*(x[device] for x in queries))
            kv = TokenAxis(*(x[(device - hop) % degree] for x in keys))
            areas[device, hop] = sum(_areas_of_rows(of_head, q, kv).sum() for of_head in masks)
    return areas


def chunk_areas(mask: Mask, tokens: TokenAxis, num_chunks: int) -> Int[np.ndarray, "chunks chunks"]:
    """Pairs that the mask allows between the queries of each chunk of one row and the keys of each.

    Of a mask that differs between heads, the pairs of one head of each group are summed.

    Args:
      mask: Which pairs may attend.
      tokens: Positions and segment ids of the row in its order, NumPy's, `[T]` each; queries and keys alike.
      num_chunks: Equal parts that the row is cut into; divides T.
    Cost: O(T + num_chunks^2) time and memory for causal masks, windows and documents, where segments are documents
      whose positions count up slot by slot; otherwise O((T / 64)^2) time, and that of the tiles that are cut through.
    """
    masks = [mask.of_head(group, mask.head_groups) for group in range(mask.head_groups)]
    return sum(_chunk_areas(of_head, tokens, num_chunks) for of_head in masks)


def bounds(tokens: TokenAxis, block: int) -> Bounds:
    """Bounds of blocks of `[..., length]` arrays, each `[..., blocks]`."""
    starts = np.arange(0, tokens.positions.shape[-1], block)
    return Bounds(*(bound.reduceat(x, starts, axis=-1) for x in tokens for bound in (np.minimum, np.maximum)))


def _chunk_areas(mask: Mask, tokens: TokenAxis, num_chunks: int) -> Int[np.ndarray, "chunks chunks"]:
    runs = _runs_of_keys(mask, tokens)
    if runs is None:
        return _chunk_areas_by_tiles(mask, tokens, num_chunks)
    chunk = len(tokens.positions) // num_chunks
    row_of_query = np.arange(len(tokens.positions)) // chunk * num_chunks
    ends = np.arange(1, num_chunks + 1, dtype=np.float64) * chunk

    def slots_after(starts):
        """Of the queries of each chunk, summed: the slots from `starts` on that lie before the end of each chunk."""
        place = row_of_query + np.minimum(starts // chunk, num_chunks - 1)
        shape = num_chunks, num_chunks
        count = np.bincount(place, minlength=num_chunks**2).reshape(shape).cumsum(axis=1)
        total = np.bincount(place, weights=starts, minlength=num_chunks**2).reshape(shape).cumsum(axis=1)
        return count * ends - total  # below 2^53, so exact

    first, stop = runs
    before_ends = slots_after(first) - slots_after(stop)
    return np.diff(before_ends, axis=1, prepend=0.0).astype(np.int64)


def _runs_of_keys(mask: Mask, tokens: TokenAxis) -> tuple[np.ndarray, np.ndarray] | None:
    """The first slot that each query may attend to and the slot after the last; None where there may be gaps."""
    if not _is_one_run(mask):
        return None
    positions, segment_ids = (np.asarray(x, np.int64) for x in tokens)
    slots = np.arange(len(positions))
    is_first = slots == 0
    if mask.within_documents:
        is_first[1:] |= segment_ids[1:] != segment_ids[:-1]
    starts = np.flatnonzero(is_first)
    run = np.cumsum(is_first) - 1
    start, stop = starts[run], np.append(starts[1:], len(slots))[run]
    is_read = segment_ids >= 0 if mask.within_documents else np.ones(len(slots), bool)
    follows = positions - slots == (positions - slots)[start]
    documents = segment_ids[starts][is_read[starts]]
    if not np.all(follows | ~is_read) or (mask.within_documents and len(np.unique(documents)) < len(documents)):
        return None
    left, right = mask.span
    first = start if left is None else np.maximum(start, slots - left)
    stop = stop if right is None else np.minimum(stop, slots + right + 1)
    return first, np.where(is_read, np.maximum(stop, first), first)


def _is_one_run(mask: Mask) -> bool:
    """Whether its span and its documents are all that there is to a mask."""
    if isinstance(mask, And):
        return _is_one_run(mask.left) and _is_one_run(mask.right)
    return isinstance(mask, Causal | Window | SameDocument | Full)


def _chunk_areas_by_tiles(mask: Mask, tokens: TokenAxis, num_chunks: int) -> Int[np.ndarray, "chunks chunks"]:
    chunk = len(tokens.positions) // num_chunks
    cut = TokenAxis(*(np.asarray(x).reshape(num_chunks, chunk) for x in tokens))
    areas = np.zeros((num_chunks, num_chunks), np.int64)
    # Masks compute with JAX, and a loader's thread has nothing to do on an accelerator.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for row in range(num_chunks):
            queries = TokenAxis(*(x[row : row + 1] for x in cut))
            areas[row] = _areas_of_rows(mask, queries, cut)
    return areas


def _areas_of_rows(mask: Mask, q: TokenAxis, kv: TokenAxis) -> Int[np.ndarray, " rows"]:
    """Allowed pairs of each row of queries and keys, `[B or 1, length]` each.

    Only tiles that the mask cuts through are looked into.
    """
    sizes_q, sizes_kv = (np.diff([*range(0, x.positions.shape[1], _BLOCK), x.positions.shape[1]]) for x in (q, kv))
    rows, columns = bounds(q, _BLOCK), bounds(kv, _BLOCK)
    verdict = mask.tile(Bounds(*(x[:, :, None] for x in rows)), Bounds(*(x[:, None, :] for x in columns)))
    shape = (max(len(q.positions), len(kv.positions)), len(sizes_q), len(sizes_kv))
    some, full = (np.broadcast_to(np.asarray(x), shape) for x in verdict)
    full = full & some
    areas = (full * np.multiply.outer(sizes_q, sizes_kv)).sum(axis=(1, 2))
    row, i, j = np.nonzero(some & ~full)
    group = max(1, MAX_TILES_AT_ONCE // _BLOCK**2)
    for first in range(0, len(row), group):
        part = slice(first, first + group)
        pairs = _pairs(mask, _tokens_of_blocks(q, row[part], i[part]), _tokens_of_blocks(kv, row[part], j[part]))
        np.add.at(areas, row[part], pairs)
    return areas


def _tokens_of_blocks(side: TokenAxis, rows: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Positions, segment ids and whether a token is there, `[blocks, _BLOCK]` each."""
    length = side.positions.shape[1]
    places = blocks[:, None] * _BLOCK + np.arange(_BLOCK)
    inside = np.minimum(places, length - 1)
    rows = np.broadcast_to(rows[:, None], places.shape)
    return *(np.broadcast_to(x, (max(len(x), rows.max() + 1), length))[rows, inside] for x in side), places < length


def _pairs(mask: Mask, q: tuple[np.ndarray, ...], kv: tuple[np.ndarray, ...]) -> Int[np.ndarray, " blocks"]:
    """Allowed pairs of each block of queries with its block of keys."""
    (q_positions, q_segments, q_there), (kv_positions, kv_segments, kv_there) = q, kv
    allowed = mask.allowed(
        q_positions[:, :, None], kv_positions[:, None, :], q_segments[:, :, None], kv_segments[:, None, :]
    )
    return (np.asarray(allowed) & q_there[:, :, None] & kv_there[:, None, :]).sum(axis=(1, 2))

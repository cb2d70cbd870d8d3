"""Packing documents into rows of a fixed length: a pure function of (seed, epoch, lengths).

A document of n tokens fills n + 1 slots of a row (see rows.py). One that is longer than a row, or than documents
may be, is cut into pieces. Within an epoch every piece lies in exactly one row. The rows of epoch 0, 1, 2, ... one
after the other are an infinite stream whose row i can be asked for directly.
"""

import threading
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from train.data.errors import DataError

_WORD_BITS = 1024
_CACHED_EPOCHS = 2  # the one being read, and the one that prefetching has already begun

LongDocuments = Literal["split", "drop"]


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Runs of consecutive slots of documents, none longer than a row.

    Attributes:
      document: Index of the document.
      start: First slot of the run within the document.
      length: Number of slots.
    """

    document: Int[np.ndarray, " pieces"]
    start: Int[np.ndarray, " pieces"]
    length: Int[np.ndarray, " pieces"]

    def __len__(self) -> int:
        return len(self.document)


def cut_documents(
    slots: Int[np.ndarray, " documents"],
    longest: int,
    long_documents: LongDocuments,
    *,
    documents: Int[np.ndarray, " documents"],
    name: str,
) -> tuple[Pieces, int]:
    """Cuts documents into pieces of at most `longest` slots, in document order.

    Args:
      slots: Number of slots of each document.
      longest: Most slots of a piece, at most those of a row.
      long_documents: "split" cuts a document that is longer; "drop" leaves it out.
      documents: Index of each document in its corpus.
      name: What the documents are, for the error.
    Returns: the pieces, and the number of documents left out.
    Raises: DataError when every document is left out.
    Cost: O(documents + pieces).
    """
    num_dropped = 0
    if long_documents == "drop":
        keep = slots <= longest
        num_dropped = int(len(slots) - keep.sum())
        if num_dropped == len(slots):
            raise DataError(
                f"{name}: data.long_documents='drop' leaves none of {len(slots)} documents, of which the shortest "
                f"fills {slots.min()} slots, of {longest} that it may; raise data.seq_len or data.max_document_length, "
                "or use long_documents='split'"
            )
        slots, documents = slots[keep], documents[keep]
    counts = -(-slots // longest)
    first_piece = np.cumsum(counts) - counts
    start = (np.arange(counts.sum()) - np.repeat(first_piece, counts)) * longest
    length = np.minimum(np.repeat(slots, counts) - start, longest)
    return Pieces(document=np.repeat(documents, counts), start=start, length=length), num_dropped


class _OpenRows:
    """Rows that still have room, by room; finds the smallest room that is large enough.

    The rooms in use are a bit set in two levels, so that a query costs three integer operations whatever the
    number of open rows.
    """

    def __init__(self, seq_len: int):
        self._rows: dict[int, list[int]] = {}
        self._words = [0] * (seq_len // _WORD_BITS + 1)
        self._summary = 0

    def add(self, room: int, row: int) -> None:
        rows = self._rows.get(room)
        if rows:
            rows.append(row)
            return
        self._rows[room] = [row]
        word = room // _WORD_BITS
        self._words[word] |= 1 << (room % _WORD_BITS)
        self._summary |= 1 << word

    def take_best_fit(self, length: int) -> tuple[int, int] | None:
        """Removes and returns (room, row) of the least room >= length, or None."""
        word = length // _WORD_BITS
        in_word = self._words[word] >> (length % _WORD_BITS)
        if in_word:
            room = length + _lowest_bit(in_word)
        else:
            later = self._summary >> (word + 1)
            if not later:
                return None
            word += 1 + _lowest_bit(later)
            room = word * _WORD_BITS + _lowest_bit(self._words[word])
        rows = self._rows[room]
        row = rows.pop()
        if not rows:
            self._words[word] ^= 1 << (room % _WORD_BITS)
            if not self._words[word]:
                self._summary ^= 1 << word
        return room, row


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def best_fit(lengths: Int[np.ndarray, " pieces"], seq_len: int) -> Int[np.ndarray, " pieces"]:
    """Puts pieces, in the order given, each into the fullest row that has room for it, else into a new row.

    Args:
      lengths: Slots of each piece, each between 1 and `seq_len`.
      seq_len: Slots of a row.
    Returns: the row of each piece; rows are numbered 0, 1, ... without a gap.
    Cost: O(log) a piece; pieces that fill a row are placed without a search.
    """
    rows = np.empty(len(lengths), np.int64)
    full = lengths == seq_len
    num_rows = int(full.sum())
    rows[full] = np.arange(num_rows)
    open_rows = _OpenRows(seq_len)
    placed = []
    for length in lengths[~full].tolist():
        fit = open_rows.take_best_fit(length)
        if fit is None:
            room, row = seq_len, num_rows
            num_rows += 1
        else:
            room, row = fit
        placed.append(row)
        if room > length:
            open_rows.add(room - length, row)
    rows[~full] = placed
    return rows


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Which pieces lie in which row: row r holds pieces[row_starts[r] : row_starts[r + 1]], in that order."""

    pieces: Int[np.ndarray, " pieces"]
    row_starts: Int[np.ndarray, " row_bounds"]

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def row(self, index: int) -> Int[np.ndarray, " pieces_in_row"]:
        return self.pieces[self.row_starts[index] : self.row_starts[index + 1]]


def pack(lengths: Int[np.ndarray, " pieces"], seq_len: int, *, seed: int, epoch: int) -> Packing:
    """Packs one epoch: pieces in an order shuffled by (seed, epoch), best fit, rows shuffled.

    Args:
      lengths: Slots of each piece, each between 1 and `seq_len`.
      seq_len: Slots of a row.
      seed: Seed of the run, >= 0.
      epoch: Number of the pass over the pieces, >= 0.
    Returns: the packing; a function of the arguments alone.
    Cost: O(log) a piece: about 2 s for a million pieces.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    rows = best_fit(lengths[order], seq_len)
    counts = np.bincount(rows)
    shuffled = rng.permutation(len(counts))
    new_row = np.empty_like(shuffled)
    new_row[shuffled] = np.arange(len(counts))
    by_row = np.argsort(new_row[rows], kind="stable")
    row_starts = np.concatenate([[0], np.cumsum(counts[shuffled])])
    return Packing(pieces=order[by_row], row_starts=row_starts)


class PackedStream:
    """The rows of every epoch, one epoch after the other, without end.

    An epoch is packed when a row of it is first asked for, and every epoch before it then too, because the
    number of rows differs a little from epoch to epoch; the numbers are kept, the last few packings as well.
    """

    def __init__(self, lengths: Int[np.ndarray, " pieces"], seq_len: int, *, seed: int):
        self._lengths = lengths
        self._seq_len = seq_len
        self._seed = seed
        self._epoch_starts = [0]
        self._packings: dict[int, Packing] = {}
        self._lock = threading.Lock()

    def row(self, index: int) -> Int[np.ndarray, " pieces_in_row"]:
        """Indices of the pieces in row `index` of the stream, in their order."""
        with self._lock:
            while self._epoch_starts[-1] <= index:
                epoch = len(self._epoch_starts) - 1
                self._epoch_starts.append(self._epoch_starts[-1] + len(self._packing(epoch)))
            epoch = bisect_right(self._epoch_starts, index) - 1
            return self._packing(epoch).row(index - self._epoch_starts[epoch])

    def _packing(self, epoch: int) -> Packing:
        if epoch not in self._packings:
            if len(self._packings) == _CACHED_EPOCHS:
                del self._packings[next(iter(self._packings))]
            self._packings[epoch] = pack(self._lengths, self._seq_len, seed=self._seed, epoch=epoch)
        return self._packings[epoch]

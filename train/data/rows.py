"""Rows: what a model reads, assembled from pieces of documents.

A document t1..tn stands in a row as the inputs end_id, t1..tn with the targets t1..tn, end_id: n + 1 slots.
A piece is a run of those slots and a segment of its row; positions start at 0 in each. Slots after the last
piece are padding: segment -1, and 0 in everything else.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from train.data.corpus import Corpus
from train.data.packing import Pieces

Row = dict[str, np.ndarray]


def empty_row(seq_len: int) -> Row:
    """A row of padding."""
    row = {name: np.zeros(seq_len, np.int32) for name in ("tokens", "targets", "positions")}
    row["segment_ids"] = np.full(seq_len, -1, np.int32)
    row["loss_weights"] = np.zeros(seq_len, np.float32)
    row["num_bytes"] = np.zeros((), np.float32)
    return row


def build_row(
    corpus: Corpus, pieces: Pieces, indices: Int[np.ndarray, "pieces_in_row"], *, seq_len: int, end_id: int
) -> Row:
    """Assembles one row.

    Args:
      corpus: The documents.
      pieces: All pieces; `indices` picks those of this row, in their order.
      seq_len: Slots of the row.
      end_id: Id that stands between documents.
    Returns: tokens, targets, positions, segment_ids int32 [seq_len]; loss_weights float32 [seq_len];
    num_bytes
      float32 [], the source bytes that the targets with loss stand for: of a document cut into pieces, each
      has the share of its tokens.
    Cost: O(seq_len).
    """
    row = empty_row(seq_len)
    table = corpus.documents
    num_bytes = 0.0
    place = 0
    for segment, index in enumerate(indices):
        document = int(pieces.document[index])
        first = int(pieces.start[index])
        count = int(pieces.length[index])
        length, prompt_length = int(table.lengths[document]), int(table.prompt_lengths[document])
        stop = first + count
        slots = slice(place, place + count)
        begin = max(first - 1, 0)  # the input of slot j is token j - 1
        tokens = corpus.read(document, begin, min(stop, length))
        inputs, targets = row["tokens"][slots], row["targets"][slots]
        if first == 0:
            inputs[0] = end_id
            inputs[1:] = tokens[: count - 1]
            targets[: len(tokens)] = tokens
        else:
            inputs[:] = tokens[:count]
            targets[: len(tokens) - 1] = tokens[1:]
        if stop > length:
            targets[-1] = end_id
        row["positions"][slots] = np.arange(count)
        row["segment_ids"][slots] = segment
        row["loss_weights"][slots][max(prompt_length - first, 0) :] = 1.0
        if length > prompt_length:
            weighted = max(min(stop, length) - max(first, prompt_length), 0)
            num_bytes += int(table.num_bytes[document]) * weighted / (length - prompt_length)
        place += count
    row["num_bytes"] = np.array(num_bytes, np.float32)
    return row


def stack_rows(rows: Sequence[Row]) -> Row:
    """A batch: each array of the rows with a leading dimension of their number."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

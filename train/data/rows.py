"""Rows: what a model reads, assembled from pieces of documents.

A document t1..tn stands in a row as the inputs end_id, t1..tn with the targets t1..tn, end_id: n + 1 slots.
A piece is a run of those slots and a segment of its row; positions start at 0 in each. Slots after the last
piece are padding: segment -1, and 0 in everything else.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from train.data.corpus import Corpus, DocumentTable, TaskCorpus, TaskDocument
from train.data.packing import Pieces

Row = dict[str, np.ndarray]
Slots = Int[np.ndarray, "slots"] | Callable[[Row], Int[np.ndarray, " slots"]] | None


def empty_row(seq_len: int, *, with_answers: bool = False) -> Row:
    """A row of padding."""
    row = {name: np.zeros(seq_len, np.int32) for name in ("tokens", "targets", "positions")}
    row["segment_ids"] = np.full(seq_len, -1, np.int32)
    row["loss_weights"] = np.zeros(seq_len, np.float32)
    row["num_bytes"] = np.zeros((), np.float32)
    if with_answers:
        row["answers"] = np.full(seq_len, -1, np.int32)
        row["answer_groups"] = np.zeros(seq_len, np.int32)
    return row


def build_row(
    corpus: Corpus,
    pieces: Pieces,
    indices: Int[np.ndarray, " pieces_in_row"],
    *,
    seq_len: int,
    end_id: int,
    bytes_per_token: int = 0,
    groups: Int[np.ndarray, " groups"] | None = None,
) -> Row:
    """Assembles one row.

    Args:
      corpus: The documents.
      pieces: All pieces; `indices` picks those of this row, in their order.
      seq_len: Slots of the row.
      end_id: Id that stands between documents.
      bytes_per_token: Source bytes of a token, for documents that are a task.
      groups: The number in the row of each of the corpus's answer groups; None leaves answers out of the row.
    Returns: tokens, targets, positions, segment_ids int32 [seq_len]; loss_weights float32 [seq_len];
    num_bytes
      float32 [], the source bytes that the targets with loss stand for: of a document cut into pieces, each
      has the share of its tokens. With groups also answers and answer_groups, int32 [seq_len]: the number in the row of
      the answer that a target belongs to, -1 for none, and its group.
    Cost: O(seq_len).
    """
    row = empty_row(seq_len, with_answers=groups is not None)
    num_bytes, num_answers = 0.0, 0
    place = 0
    for segment, index in enumerate(indices):
        document = int(pieces.document[index])
        first, count = int(pieces.start[index]), int(pieces.length[index])
        slots = {name: array[place : place + count] for name, array in row.items() if array.ndim}
        slots["positions"][:] = np.arange(count)
        slots["segment_ids"][:] = segment
        length = int(corpus.documents.lengths[document])
        begin = max(first - 1, 0)  # the input of slot j is token j - 1
        if isinstance(corpus, TaskCorpus):
            task = corpus.document(document)
            _put_tokens(slots, task.tokens, first=first, length=length, end_id=end_id)
            num_bytes += bytes_per_token * _put_task_weights(slots, task, loss=corpus.loss)
            if groups is not None:
                num_answers = _put_answers(slots, task, group=int(groups[task.group]), num_before=num_answers)
        else:
            tokens = corpus.read(document, begin, min(first + count, length))
            _put_tokens(slots, tokens, first=first, length=length, end_id=end_id)
            num_bytes += _put_weights(slots, corpus.documents, document, first=first)
        place += count
    row["num_bytes"] = np.array(num_bytes, np.float32)
    return row


def _put_tokens(slots: Row, tokens: np.ndarray, *, first: int, length: int, end_id: int) -> None:
    """Inputs and targets of the piece that starts at slot `first`, from its tokens and the one before."""
    inputs, targets = slots["tokens"], slots["targets"]
    count = len(inputs)
    if first == 0:
        inputs[0] = end_id
        inputs[1:] = tokens[: count - 1]
        targets[: len(tokens)] = tokens
    else:
        inputs[:] = tokens[:count]
        targets[: len(tokens) - 1] = tokens[1:]
    if first + count > length:
        targets[-1] = end_id


def _put_weights(slots: Row, table: DocumentTable, document: int, *, first: int) -> float:
    """Loss on all but the prompt; returns the source bytes that it stands for."""
    length, prompt_length = int(table.lengths[document]), int(table.prompt_lengths[document])
    weights = slots["loss_weights"]
    weights[max(prompt_length - first, 0) :] = 1.0
    if length == prompt_length:
        return 0.0
    weighted = max(min(first + len(weights), length) - max(first, prompt_length), 0)
    return int(table.num_bytes[document]) * weighted / (length - prompt_length)


def _put_task_weights(slots: Row, task: TaskDocument, *, loss: str) -> int:
    """Loss on the answers, or on all; returns the number of tokens with loss."""
    if loss == "all":
        slots["loss_weights"][:] = 1.0
        return len(task.tokens)
    is_answer = task.answers >= 0
    slots["loss_weights"][: len(is_answer)] = is_answer
    return int(is_answer.sum())


def _put_answers(slots: Row, task: TaskDocument, *, group: int, num_before: int) -> int:
    """Numbers of the answers; returns how many the row then has."""
    is_answer = task.answers >= 0
    slots["answers"][: len(is_answer)] = np.where(is_answer, task.answers + num_before, -1)
    slots["answer_groups"][:] = group
    return num_before + int(task.answers.max(initial=-1)) + 1


def stack_rows(rows: Sequence[Row]) -> Row:
    """A batch: each array of the rows with a leading dimension of their number."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

"""Corpora: documents as token ids, read piece by piece, and what is known of each without reading it."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Integer


@dataclass(frozen=True, kw_only=True)
class DocumentTable:
    """What is known of each document without reading its tokens.

    Attributes:
      lengths: Number of tokens, at least 1.
      prompt_lengths: Number of leading tokens that carry no loss.
      num_bytes: Source bytes that the tokens with loss stand for; 0 where the source has no text.
    """

    lengths: Int[np.ndarray, " documents"]
    prompt_lengths: Int[np.ndarray, " documents"]
    num_bytes: Int[np.ndarray, " documents"]

    def __len__(self) -> int:
        return len(self.lengths)


@runtime_checkable
class Corpus(Protocol):
    """Documents in a fixed order.

    Attributes:
      documents: The table of the documents.
      notes: Lines about the corpus that the user should see once.
    """

    documents: DocumentTable
    notes: Sequence[str]

    def read(self, document: int, start: int, stop: int) -> Integer[np.ndarray, " tokens"]:
        """Tokens [start, stop) of a document; 0 <= start <= stop <= its length."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskDocument:
    """A question and its context, or several, with the answers marked.

    Attributes:
      tokens: The ids.
      answers: The number of the answer that each token belongs to, from 0 on; -1 elsewhere.
      group: Which of the corpus's `answer_groups` the answers count in.
    """

    tokens: Integer[np.ndarray, " tokens"]
    answers: Integer[np.ndarray, " tokens"]
    group: int


class TaskCorpus(abc.ABC):
    """Generated documents whose answers can be right or wrong: a `Corpus` that knows which of its tokens are answers.

    A document never stands in a row in pieces: its answer would lose its context.

    Attributes:
      documents: Their lengths; where loss is follows from `loss`, and source bytes from the tokens with loss.
      answer_groups: Names of the parts that accuracy is told of apart.
      loss: Whether loss is on the tokens of the answers alone, or on all.
    """

    documents: DocumentTable
    notes: Sequence[str] = ()
    answer_groups: tuple[str, ...]
    loss: Literal["answers", "all"]

    @abc.abstractmethod
    def document(self, document: int) -> TaskDocument:
        """A whole document; a pure function of the corpus's settings and the number."""

    def read(self, document: int, start: int, stop: int) -> Integer[np.ndarray, " tokens"]:
        return self.document(document).tokens[start:stop]


class StoredCorpus:
    """Documents that lie one after the other in arrays of tokens, normally memory-mapped files."""

    def __init__(
        self,
        arrays: Sequence[np.ndarray],
        *,
        files: Int[np.ndarray, " documents"],
        starts: Int[np.ndarray, " documents"],
        documents: DocumentTable,
        notes: Sequence[str] = (),
    ):
        self.documents = documents
        self.notes = notes
        self._arrays = [np.asarray(array) for array in arrays]  # a plain view of a map is quicker to index
        self._files = files
        self._starts = starts

    def read(self, document: int, start: int, stop: int) -> Integer[np.ndarray, " tokens"]:
        first = self._starts[document]
        return self._arrays[self._files[document]][first + start : first + stop]


class RepeatCorpus:
    """Generated documents: a random pattern of ids, repeated; a pure function of the arguments.

    A model that looks back by the length of the pattern predicts all of a document but its first repetition.
    """

    notes: Sequence[str] = ()

    def __init__(
        self,
        *,
        lengths: np.ndarray,
        symbols: np.ndarray,
        min_period: int,
        max_period: int,
        seed: int,
        num_bytes: int,
    ):
        zeros = np.zeros_like(lengths)
        self.documents = DocumentTable(lengths=lengths, prompt_lengths=zeros, num_bytes=lengths * num_bytes)
        self._symbols = symbols
        self._min_period = min_period
        self._max_period = max_period
        self._seed = seed

    def read(self, document: int, start: int, stop: int) -> Integer[np.ndarray, " tokens"]:
        rng = np.random.default_rng([self._seed, int(document)])
        period = rng.integers(self._min_period, self._max_period, endpoint=True)
        pattern = self._symbols[rng.integers(len(self._symbols), size=period)]
        return pattern[np.arange(start, stop) % period]

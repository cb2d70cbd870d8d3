"""The data pipeline: from a config to batches, any of which can be asked for by its number."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Int

from train.data.config import DataConfig
from train.data.corpus import Corpus, TaskCorpus
from train.data.errors import DataError
from train.data.packing import PackedStream, cut_documents, pack
from train.data.rows import Row, Slots, build_row, empty_row, stack_rows
from train.data.sources import SourceConfig
from train.data.tokenizers import Tokenizer, open_tokenizer

_SPLIT_STREAM = (0, 1)  # apart from the random numbers of the packing, whose seeds are (seed, epoch)
_HELD_OUT_SEED = 0  # every run with the same held-out documents sees the same rows


def open_data(config: DataConfig, *, seed: int) -> "Data":
    """Opens the tokenizer and every source, and packs the held-out rows.

    Args:
      config: The settings.
      seed: Seed of the split and of the order of the training rows, >= 0.
    Returns: the data; row i of `train` is a pure function of (config, files, seed, i), and so is every batch.
    Raises: DataError, on one line with the remedy, for whatever is wrong with the data; ValueError for a
    seed < 0.
    Cost: tokenises sources that the cache does not hold; O(documents) otherwise.
    """
    if seed < 0:
        raise ValueError(f"open_data: {seed=}, wanted >= 0")
    tokenizer = open_tokenizer(config.tokenizer, end_token=config.end_token)
    cache_dir = Path(config.cache_dir).expanduser()
    notes: list[str] = []
    train, held_out = [], []
    fingerprint = hashlib.sha256()
    for name, source in _named("sources", config.sources):
        corpus = source.open(tokenizer, cache_dir)
        fraction = 0.0 if config.held_out_sources else config.held_out_fraction
        ours, theirs = split_documents(len(corpus.documents), fraction, seed=seed, name=name)
        notes += [*corpus.notes, _summary(name, corpus, ours, theirs)]
        fingerprint.update(np.ascontiguousarray(corpus.documents.lengths[ours]))
        train.append(_PackedDocuments(corpus, ours, config, tokenizer, f"the training part of {name}", notes))
        if len(theirs):
            held_out.append(_PackedDocuments(corpus, theirs, config, tokenizer, f"the held-out part of {name}", notes))
    for name, source in _named("held_out_sources", config.held_out_sources):
        corpus = source.open(tokenizer, cache_dir)
        every = np.arange(len(corpus.documents))
        notes += [*corpus.notes, _summary(name, corpus, every[:0], every)]
        held_out.append(_PackedDocuments(corpus, every, config, tokenizer, name, notes))
    streams = [_TrainRows(documents, seed) for documents in train]
    weights = [source.weight for source in config.sources]
    return Data(
        config,
        tokenizer=tokenizer,
        train=_mixed(streams, weights),
        train_lengths=_mixed([_TrainLengths(stream) for stream in streams], weights),
        held_out=HeldOutRows(held_out),
        notes=notes,
        fingerprint=fingerprint.hexdigest()[:16],
    )


def split_documents(num_documents: int, fraction: float, *, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Splits the documents of a source into training and held-out ones, by the seed.

    Returns: sorted indices of the two parts; each has at least one document, unless `fraction` is 0.
    Raises: DataError when there are too few documents for that.
    """
    if fraction == 0:
        return np.arange(num_documents), np.arange(0)
    if num_documents < 2:
        raise DataError(
            f"{name}: {num_documents} document cannot be split into training and held-out; set "
            "data.held_out_fraction=0, or name data.held_out_sources"
        )
    num_held_out = min(max(round(num_documents * fraction), 1), num_documents - 1)
    order = np.random.default_rng([seed, *_SPLIT_STREAM]).permutation(num_documents)
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


class Data:
    """Rows and batches to train and to evaluate on.

    Attributes:
      tokenizer: Turns text into ids and back.
      train: The training rows, a random-access sequence without end; row i is `train[i]`.
      held_out: The held-out rows, a finite sequence; empty when nothing is held out.
      answer_groups: Names of the groups of answers in the held-out rows; none where no source there is a task. Where
        there are any, held-out rows have `answers` and `answer_groups` (`build_row`).
      notes: Lines that the user should see once: what was read, replaced and left out.
      fingerprint: Changes when documents of the training sources come, go or change in length.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        tokenizer: Tokenizer,
        train: grain.MapDataset,
        train_lengths: grain.MapDataset,
        held_out: "HeldOutRows",
        notes: Sequence[str],
        fingerprint: str,
    ):
        self.tokenizer = tokenizer
        self.train = train
        self._train_lengths = train_lengths
        self.held_out = held_out
        self.answer_groups = held_out.answer_groups
        self.notes = tuple(notes)
        self.fingerprint = fingerprint
        self._config = config

    def batches(
        self,
        *,
        start_step: int,
        batch_size: int,
        rows: Sequence[int] | None = None,
        slots: Slots = None,
    ) -> grain.DatasetIterator:
        """The batches of steps start_step, start_step + 1, ... of training.

        The batch of step s holds the rows s * batch_size to (s + 1) * batch_size - 1.

        Args:
          start_step: First step; the batches are those that an uninterrupted run would have from there on.
          batch_size: Rows of a batch.
          rows: Which rows of each batch to read, by their number in it. Default: all.
          slots: Which slots of each row to give, in this order, or a function of a whole row that says them, which the
            threads call. Default: all, in their own.
        Returns: an endless iterator that prepares batches ahead; its `close()` ends the threads.
        """
        rows = _checked_rows(rows, batch_size)
        if start_step < 0:
            raise ValueError(f"Data.batches: {start_step=}, wanted >= 0")

        def fetch(step: int) -> Row:
            return stack_rows([_cut(self.train[step * batch_size + int(row)], slots) for row in rows])

        return iter(self._prefetched(range(start_step, sys.maxsize // batch_size), fetch))

    def document_lengths(self, *, step: int, batch_size: int) -> Int[np.ndarray, " documents"]:
        """Slots of every piece in the whole batch of a step, padding left out, without reading a token."""
        _check_batch_size(batch_size)
        return np.concatenate([self._train_lengths[step * batch_size + row] for row in range(batch_size)])

    def held_out_batches(
        self,
        *,
        batch_size: int,
        max_batches: int | None = None,
        rows: Sequence[int] | None = None,
        slots: Slots = None,
    ) -> Iterable[Row]:
        """The held-out rows, each once; the last batch is filled up with empty rows.

        Args:
          batch_size: Rows of a batch.
          max_batches: Stop after so many. The rows of all sources are shuffled together, so that the first
            ones are a sample of all.
          rows, slots: As for `batches`.
        Returns: batches, which can be gone through again and again.
        Raises: DataError when nothing is held out.
        """
        rows = _checked_rows(rows, batch_size)
        if max_batches is not None and max_batches < 1:
            raise ValueError(f"Data.held_out_batches: {max_batches=}, wanted >= 1 or None for all")
        if not len(self.held_out):
            raise DataError(
                "no document is held out; set data.held_out_fraction above 0 or name data.held_out_sources to evaluate"
            )

        def fetch(batch: int) -> Row:
            numbers = [batch * batch_size + int(row) for row in rows]
            return stack_rows([_cut(self._held_out_row(number), slots) for number in numbers])

        return self._prefetched(range(self.num_held_out_batches(batch_size, max_batches)), fetch)

    def num_held_out_batches(self, batch_size: int, max_batches: int | None = None) -> int:
        """How many batches `held_out_batches` has."""
        num_batches = -(-len(self.held_out) // batch_size)
        return num_batches if max_batches is None else min(num_batches, max_batches)

    def _held_out_row(self, number: int) -> Row:
        if number < len(self.held_out):
            return self.held_out[number]
        return empty_row(self._config.seq_len, with_answers=bool(self.answer_groups))

    def _prefetched(self, steps: range, fetch: Callable[[int], Row]) -> grain.IterDataset:
        threads = self._config.num_threads
        options = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=self._config.prefetch_batches if threads else 0
        )
        return grain.MapDataset.range(steps.start, steps.stop).map(fetch).to_iter_dataset(options)


class _PackedDocuments:
    """Some documents of a corpus, cut into pieces; gives the row of any set of pieces."""

    def __init__(
        self,
        corpus: Corpus,
        documents: np.ndarray,
        config: DataConfig,
        tokenizer: Tokenizer,
        name: str,
        notes: list[str],
    ):
        slots = corpus.documents.lengths[documents] + 1
        longest = config.max_document_length or config.seq_len
        self.seq_len = config.seq_len
        self.pieces, num_dropped = cut_documents(slots, longest, config.long_documents, documents=documents, name=name)
        if num_dropped:
            notes.append(
                f"{name}: dropped {num_dropped} of {len(documents)} documents, which do not fit into "
                f"{longest} slots (data.long_documents='drop')"
            )
        if isinstance(corpus, TaskCorpus) and slots.max() > longest:
            raise DataError(
                f"{name}: a document fills {slots.max()} slots, wanted at most {longest}; in pieces it would lose its "
                f"answers; lower the source's max_length to {longest - 1}, or raise data.seq_len or "
                "data.max_document_length"
            )
        self.answer_groups = corpus.answer_groups if isinstance(corpus, TaskCorpus) else ()
        self._corpus = corpus
        self._end_id = tokenizer.end_id
        self._bytes_per_token = tokenizer.bytes_per_token or 0

    def row(self, indices: np.ndarray, *, groups: np.ndarray | None = None) -> Row:
        return build_row(
            self._corpus,
            self.pieces,
            indices,
            seq_len=self.seq_len,
            end_id=self._end_id,
            bytes_per_token=self._bytes_per_token,
            groups=groups,
        )


class _TrainRows:
    """The endless rows of one source, as a source of Grain's; its length stands for no end."""

    def __init__(self, documents: _PackedDocuments, seed: int):
        self._documents = documents
        self._stream = PackedStream(documents.pieces.length, documents.seq_len, seed=seed)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Row:
        return self._documents.row(self._stream.row(index))

    def lengths(self, index: int) -> np.ndarray:
        return self._documents.pieces.length[self._stream.row(index)]


class _TrainLengths:
    """The lengths of the pieces in each of the rows, as a source of Grain's, so that they are mixed as the rows are."""

    def __init__(self, rows: _TrainRows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._rows.lengths(index)


class HeldOutRows(Sequence):
    """The held-out rows of all sources, shuffled together; the same in every run with the same documents."""

    def __init__(self, parts: Sequence[_PackedDocuments]):
        self._parts = parts
        self._packings = [pack(p.pieces.length, p.seq_len, seed=_HELD_OUT_SEED, epoch=0) for p in parts]
        self._part_starts = np.cumsum([0, *map(len, self._packings)])
        self._order = np.random.default_rng(_HELD_OUT_SEED).permutation(self._part_starts[-1])
        self.answer_groups = tuple(dict.fromkeys(group for part in parts for group in part.answer_groups))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Row:
        place = int(self._order[index])
        part = int(np.searchsorted(self._part_starts, place, side="right")) - 1
        groups = None
        if self.answer_groups:
            groups = np.array([self.answer_groups.index(group) for group in self._parts[part].answer_groups], np.int64)
        return self._parts[part].row(self._packings[part].row(place - int(self._part_starts[part])), groups=groups)


def _mixed(streams: Sequence[Sequence], weights: Sequence[float]) -> grain.MapDataset:
    datasets = [grain.MapDataset.source(stream) for stream in streams]
    return grain.MapDataset.mix(datasets, weights) if len(datasets) > 1 else datasets[0]


def _named(field: str, sources: Sequence[SourceConfig]) -> Iterable[tuple[str, SourceConfig]]:
    for number, source in enumerate(sources):
        yield f"data.{field}[{number}] ({source.kind})", source


def _summary(name: str, corpus: Corpus, train: np.ndarray, held_out: np.ndarray) -> str:
    lengths = corpus.documents.lengths
    return (
        f"{name}: {len(lengths):,} documents, {int(lengths.sum()):,} tokens; "
        f"train {len(train):,} documents, {int(lengths[train].sum()):,} tokens; "
        f"held out {len(held_out):,} documents, {int(lengths[held_out].sum()):,} tokens"
    )


def _cut(row: Row, slots: Slots) -> Row:
    if slots is None:
        return row
    held = slots(row) if callable(slots) else slots
    return {name: array[held] if array.ndim else array for name, array in row.items()}


def _checked_rows(rows: Sequence[int] | None, batch_size: int) -> Sequence[int]:
    _check_batch_size(batch_size)
    if rows is None:
        return range(batch_size)
    if not len(rows) or min(rows) < 0 or max(rows) >= batch_size:
        raise ValueError(f"rows: got {list(rows)}, wanted one or more numbers from 0 to {batch_size=} - 1")
    return rows


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"{batch_size=}, wanted >= 1")

"""Packing: every piece once an epoch, no row too full, the same rows from the same numbers."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.corpus import DocumentTable, StoredCorpus
from train.data.errors import DataError
from train.data.packing import PackedStream, best_fit, cut_documents, pack
from train.data.rows import build_row

END = 0


def numbered_corpus(lengths, prompt_lengths=None):
    """Documents whose tokens are all different, and the end id 0."""
    lengths = np.asarray(lengths, np.int64)
    starts = np.cumsum(lengths) - lengths
    prompts = np.zeros_like(lengths) if prompt_lengths is None else np.asarray(prompt_lengths, np.int64)
    table = DocumentTable(lengths=lengths, prompt_lengths=prompts, num_bytes=3 * (lengths - prompts))
    tokens = np.arange(1, lengths.sum() + 1)
    return StoredCorpus([tokens], files=np.zeros_like(lengths), starts=starts, documents=table)


def cut(slots, seq_len, long_documents="split"):
    slots = np.asarray(slots)
    return cut_documents(slots, seq_len, long_documents, documents=np.arange(len(slots)), name="test")


def reference_best_fit(lengths, seq_len):
    rooms, rows = [], []
    for length in lengths:
        fits = [(room, row) for row, room in enumerate(rooms) if room >= length]
        row = min(fits)[1] if fits else len(rooms)
        if not fits:
            rooms.append(seq_len)
        rooms[row] -= length
        rows.append(row)
    return rooms, rows


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    seq_len=st.integers(2, 24),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    data=st.data(),
)
@settings(deadline=None, max_examples=150)
def test_every_target_of_every_document_is_in_one_epoch_exactly_once(lengths, seq_len, seed, epoch, data):
    prompts = [data.draw(st.integers(0, length)) for length in lengths]
    corpus = numbered_corpus(lengths, prompts)
    pieces, num_dropped = cut(corpus.documents.lengths + 1, seq_len)
    assert num_dropped == 0
    packing = pack(pieces.length, seq_len, seed=seed, epoch=epoch)
    seen = []
    for index in range(len(packing)):
        row = build_row(corpus, pieces, packing.row(index), seq_len=seq_len, end_id=END)
        segments = row["segment_ids"]
        used = segments >= 0
        assert np.all(np.diff(used.astype(int)) <= 0), "padding comes last"
        assert sorted(set(segments[used])) == list(range(segments.max() + 1))
        for name in ("tokens", "targets", "positions", "loss_weights"):
            assert not row[name][~used].any()
        for segment in range(segments.max() + 1):
            here = segments == segment
            inputs, targets, weights = (row[name][here] for name in ("tokens", "targets", "loss_weights"))
            assert list(row["positions"][here]) == list(range(here.sum()))
            assert list(inputs[1:]) == list(targets[:-1]), "one document, without a gap"
            seen += list(zip(inputs.tolist(), targets.tolist(), weights.tolist(), strict=True))
    expected = []
    for document, length in enumerate(lengths):
        tokens = corpus.read(document, 0, length).tolist()
        weights = [0.0] * prompts[document] + [1.0] * (length - prompts[document] + 1)
        expected += list(zip([END, *tokens], [*tokens, END], weights, strict=True))
    assert sorted(seen) == sorted(expected)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    seq_len=st.integers(2, 24),
    data=st.data(),
)
@settings(deadline=None, max_examples=50)
def test_the_bytes_of_the_rows_add_up_to_those_of_the_documents(lengths, seq_len, data):
    corpus = numbered_corpus(lengths, [data.draw(st.integers(0, length)) for length in lengths])
    pieces, _ = cut(corpus.documents.lengths + 1, seq_len)
    packing = pack(pieces.length, seq_len, seed=0, epoch=0)
    total = 0.0
    for index in range(len(packing)):
        row = build_row(corpus, pieces, packing.row(index), seq_len=seq_len, end_id=END)
        weighted = (row["loss_weights"] > 0) & (row["targets"] != END)
        np.testing.assert_allclose(row["num_bytes"], 3 * weighted.sum(), rtol=1e-6)  # three bytes a token
        total += float(row["num_bytes"])
    np.testing.assert_allclose(total, corpus.documents.num_bytes.sum(), rtol=1e-5)


@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    seq_len=st.integers(3000, 5000),
)
@settings(deadline=None, max_examples=60)
def test_best_fit_is_the_textbook_algorithm(lengths, seq_len):
    rows = best_fit(np.array(lengths), seq_len)
    rooms, expected = reference_best_fit(lengths, seq_len)
    # Rows of equal room may be taken in another order, so compare how full the rows become.
    filled = np.bincount(rows, weights=lengths).astype(int)
    assert filled.max() <= seq_len
    assert sorted(seq_len - filled) == sorted(rooms)
    assert len(expected) == len(rows)


def test_packing_is_a_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    one, same = pack(lengths, 128, seed=1, epoch=2), pack(lengths, 128, seed=1, epoch=2)
    np.testing.assert_array_equal(one.pieces, same.pieces)
    np.testing.assert_array_equal(one.row_starts, same.row_starts)
    for other in (pack(lengths, 128, seed=2, epoch=2), pack(lengths, 128, seed=1, epoch=3)):
        assert not np.array_equal(one.pieces, other.pieces)


def test_rows_are_shuffled_after_packing():
    lengths = np.concatenate([np.full(50, 64), np.random.default_rng(0).integers(1, 64, 400)])
    packing = pack(lengths, 64, seed=0, epoch=0)
    full = [i for i in range(len(packing)) if len(packing.row(i)) == 1 and packing.row(i)[0] < 50]
    assert min(full) < len(packing) // 4 and max(full) > 3 * len(packing) // 4


def test_rows_are_nearly_full():
    lengths = np.exp(np.random.default_rng(0).uniform(0, np.log(2000), 5000)).astype(int)
    pieces, _ = cut(lengths, 512)
    packing = pack(pieces.length, 512, seed=0, epoch=0)
    assert lengths.sum() / (512 * len(packing)) > 0.99


@pytest.mark.parametrize("index_order", ["forward", "backward"])
def test_row_i_of_the_stream_does_not_depend_on_what_was_asked_before(index_order):
    lengths = np.random.default_rng(0).integers(1, 60, 100)
    packings = [pack(lengths, 64, seed=7, epoch=epoch) for epoch in range(5)]
    expected = [packing.row(i) for packing in packings for i in range(len(packing))]
    stream = PackedStream(lengths, 64, seed=7)
    order = range(len(expected)) if index_order == "forward" else reversed(range(len(expected)))
    for i in order:
        np.testing.assert_array_equal(stream.row(i), expected[i])
    assert len({len(packing) for packing in packings}) > 1, "epochs of different lengths are what makes this hard"


def test_long_documents_are_cut_into_rows_and_a_rest():
    pieces, num_dropped = cut([3, 25, 10], 10)
    assert num_dropped == 0
    assert pieces.document.tolist() == [0, 1, 1, 1, 2]
    assert pieces.start.tolist() == [0, 0, 10, 20, 0]
    assert pieces.length.tolist() == [3, 10, 10, 5, 10]


def test_long_documents_are_dropped_and_counted():
    pieces, num_dropped = cut([3, 25, 10, 11], 10, "drop")
    assert num_dropped == 2
    assert pieces.document.tolist() == [0, 2]


def test_no_piece_is_longer_than_documents_may_be():
    """What context parallelism relies on: `longest` is the least of the row and of data.max_document_length."""
    pieces, _ = cut([3, 25, 10], 7)
    assert pieces.length.tolist() == [3, 7, 7, 7, 4, 7, 3]


def test_dropping_every_document_is_an_error():
    with pytest.raises(
        DataError,
        match=r"test: data.long_documents='drop' leaves none of 2 documents, of which the "
        r"shortest fills 11 slots, of 10 that it may; raise data.seq_len or data.max_document_length, or use "
        r"long_documents='split'",
    ):
        cut([11, 25], 10, "drop")


def test_a_million_documents_take_seconds():
    lengths = np.exp(np.random.default_rng(0).uniform(0, np.log(20000), 1_000_000)).astype(int)
    begin = time.monotonic()
    pieces, _ = cut(lengths, 8192)
    pack(pieces.length, 8192, seed=0, epoch=0)
    assert time.monotonic() - begin < 10

"""The pipeline: splits, mixtures and batches, each a pure function of its numbers."""

import itertools
import json

import numpy as np
import pytest

from train.data import DataConfig, DataError, StdlibSource, SyntheticSource, TextSource
from train.data.pipeline import split_documents

SHORT = SyntheticSource(min_length=3, max_length=40, num_documents=60)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def take(data, number, *, start_step=0, batch_size=4):
    batches = data.batches(start_step=start_step, batch_size=batch_size)
    taken = list(itertools.islice(batches, number))
    batches.close()
    return taken


def source_of(row):
    """Which of the sources below a row is from: they use different ids."""
    return int(row["targets"][0] >= 10)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def two_text_sources(tmp_path):
    for name, letter in (("a", "\x01"), ("b", "z")):
        write_jsonl(tmp_path / f"{name}.jsonl", [letter * (5 + i) for i in range(20)])
    return tmp_path


@pytest.mark.parametrize("num_threads", [0, 3])
def test_batches_from_any_step_are_those_of_an_uninterrupted_run(open_sources, num_threads):
    sources = SHORT, SyntheticSource(min_length=1, max_length=9, num_documents=7, weight=0.3, seed=5)
    settings = {"num_threads": num_threads, "prefetch_batches": 5}
    whole = take(open_sources(*sources, **settings), 40)
    for start in (0, 1, 17, 39):
        rest = take(open_sources(*sources, **settings), 40 - start, start_step=start)
        for step, batch in enumerate(rest, start):
            assert_same(batch, whole[step])


def test_a_batch_holds_its_rows_in_order(open_sources):
    data = open_sources(SHORT)
    for step, batch in enumerate(take(data, 5, batch_size=3)):
        for place in range(3):
            assert_same({name: array[place] for name, array in batch.items()}, data.train[3 * step + place])


def test_chosen_rows_and_slots_are_those_of_the_whole_batch(open_sources):
    data = open_sources(SHORT, held_out_fraction=0.4)
    rows, slots = np.array([1, 3]), np.array([5, 4, 31, 0])

    def assert_part(part, whole):
        assert_same(
            part, {name: array[rows][:, slots] if array.ndim == 2 else array[rows] for name, array in whole.items()}
        )

    batches = data.batches(start_step=3, batch_size=4, rows=rows, slots=slots)
    for part, whole in zip(itertools.islice(batches, 4), take(data, 4, start_step=3), strict=True):
        assert_part(part, whole)
    batches.close()
    wholes = data.held_out_batches(batch_size=4)
    for part, whole in zip(data.held_out_batches(batch_size=4, rows=rows, slots=slots), wholes, strict=True):
        assert_part(part, whole)


def test_slots_may_follow_from_the_row(open_sources):
    data = open_sources(SHORT)
    batches = data.batches(start_step=2, batch_size=3, slots=lambda row: np.argsort(row["tokens"], kind="stable"))
    for part, whole in zip(itertools.islice(batches, 3), take(data, 3, start_step=2, batch_size=3), strict=True):
        order = np.argsort(whole["tokens"], axis=1, kind="stable")
        for name, array in part.items():
            want = np.take_along_axis(whole[name], order, axis=1) if array.ndim == 2 else whole[name]
            np.testing.assert_array_equal(array, want, err_msg=name)
    batches.close()


def test_document_lengths_are_those_of_the_batch(open_sources):
    data = open_sources(SHORT, SyntheticSource(min_length=1, max_length=9, num_documents=7, weight=0.3, seed=5))
    for step, batch in enumerate(take(data, 30)):
        counts = [np.bincount(ids[ids >= 0]) for ids in batch["segment_ids"]]
        np.testing.assert_array_equal(data.document_lengths(step=step, batch_size=4), np.concatenate(counts))


def test_shapes_and_types(open_sources):
    (batch,) = take(open_sources(SHORT), 1)
    for name in ("tokens", "targets", "positions", "segment_ids"):
        assert batch[name].dtype == np.int32 and batch[name].shape == (4, 32)
    assert batch["loss_weights"].dtype == np.float32 and batch["loss_weights"].shape == (4, 32)
    assert batch["num_bytes"].dtype == np.float32 and batch["num_bytes"].shape == (4,)


def test_the_seed_changes_the_order(open_sources):
    one, other = (take(open_sources(SHORT, seed=seed), 1)[0] for seed in (0, 1))
    assert not np.array_equal(one["tokens"], other["tokens"])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.05, 1.0)])
def test_rows_are_mixed_by_weight_and_sources_repeat(two_text_sources, open_sources, weights):
    data = open_sources(
        *(
            TextSource(files=(str(two_text_sources / f"{name}.jsonl"),), weight=weight)
            for name, weight in zip("ab", weights, strict=True)
        )
    )
    num_rows = 2000
    share = np.mean([source_of(data.train[i]) == 0 for i in range(num_rows)])
    np.testing.assert_allclose(share, weights[0] / sum(weights), atol=2 / num_rows)
    forwards = [data.train[i]["tokens"].tobytes() for i in range(100)]
    assert forwards == [data.train[i]["tokens"].tobytes() for i in reversed(range(100))][::-1]


def test_a_source_gives_its_own_rows_whatever_it_is_mixed_with(two_text_sources, open_sources):
    first, second = (TextSource(files=(str(two_text_sources / f"{name}.jsonl"),)) for name in "ab")
    alone, mixed = open_sources(first), open_sources(first, second)
    ours = [row for row in map(mixed.train.__getitem__, range(40)) if source_of(row) == 0]
    assert len(ours) == 20
    for index, row in enumerate(ours):
        assert_same(row, alone.train[index])


def test_the_split_is_by_document_and_seed():
    train, held_out = split_documents(100, 0.1, seed=0, name="x")
    assert len(held_out) == 10 and sorted([*train, *held_out]) == list(range(100))
    again = split_documents(100, 0.1, seed=0, name="x")
    np.testing.assert_array_equal(held_out, again[1])
    assert not np.array_equal(held_out, split_documents(100, 0.1, seed=1, name="x")[1])


@pytest.mark.parametrize(("num_documents", "fraction", "expected"), [(2, 0.001, 1), (2, 0.99, 1), (10, 0.99, 9)])
def test_each_side_of_the_split_has_a_document(num_documents, fraction, expected):
    train, held_out = split_documents(num_documents, fraction, seed=0, name="x")
    assert len(held_out) == expected and len(train) == num_documents - expected


def test_one_document_cannot_be_split(tmp_path, open_sources):
    (tmp_path / "a.txt").write_text("alone")
    with pytest.raises(
        DataError,
        match=r"data.sources\[0\] \(text\): 1 document cannot be split .* set "
        r"data.held_out_fraction=0, or name data.held_out_sources",
    ):
        open_sources(TextSource(files=(str(tmp_path / "a.txt"),)), held_out_fraction=0.5)


def test_held_out_documents_are_never_trained_on(tmp_path, open_sources, documents):
    texts = [f"document {i}" for i in range(30)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    data = open_sources(TextSource(files=(str(tmp_path / "a.jsonl"),)), held_out_fraction=0.2, seq_len=12)
    trained = documents(data, 24 * 2)  # a document a row, two epochs
    held_out = [data.tokenizer.decode(row["targets"]) for row in (data.held_out[i] for i in range(len(data.held_out)))]
    held_out = [text.rstrip("\0") for text in held_out]
    assert len(set(trained)) == 24 and len(held_out) == 6
    assert sorted({*trained, *held_out}) == sorted(texts)


def test_held_out_batches_hold_every_row_once_and_end_in_empty_rows(open_sources):
    data = open_sources(SHORT, held_out_fraction=0.4)
    batches = data.held_out_batches(batch_size=8)
    rows = [{name: array[i] for name, array in batch.items()} for batch in batches for i in range(8)]
    assert len(rows) % 8 == 0 and 0 < len(rows) - len(data.held_out) < 8
    for index, row in enumerate(rows):
        if index < len(data.held_out):
            assert_same(row, data.held_out[index])
        else:
            assert (row["segment_ids"] == -1).all() and not row["loss_weights"].any() and not row["num_bytes"]
    for one, other in zip(
        batches, open_sources(SHORT, held_out_fraction=0.4).held_out_batches(batch_size=8), strict=True
    ):
        assert_same(one, other)
    assert len(list(data.held_out_batches(batch_size=2, max_batches=3))) == 3 == data.num_held_out_batches(2, 3)
    assert len(list(data.held_out_batches(batch_size=1000, max_batches=3))) == 1


def test_held_out_sources_are_evaluated_whole_and_sources_trained_whole(open_sources):
    other = SyntheticSource(min_length=31, max_length=31, num_documents=5, seed=9)
    same = SyntheticSource(min_length=31, max_length=31, num_documents=3)
    data = open_sources(same, held_out_sources=(other, same), held_out_fraction=0.5)
    held_out = {row["tokens"].tobytes() for row in data.held_out}
    assert len(data.held_out) == len(held_out) == 8
    trained = {data.train[i]["tokens"].tobytes() for i in range(3)}
    assert len(trained) == 3 and trained < held_out


def test_nothing_held_out_says_so_when_evaluated(open_sources):
    data = open_sources(SHORT)
    assert len(data.held_out) == 0
    with pytest.raises(DataError, match="no document is held out; set data.held_out_fraction above 0"):
        data.held_out_batches(batch_size=2)


def test_dropped_documents_are_reported(open_sources):
    data = open_sources(SHORT, long_documents="drop", held_out_fraction=0.1)
    assert any("the training part of data.sources[0] (synthetic): dropped" in note for note in data.notes)
    assert all((data.train[i]["positions"][data.train[i]["segment_ids"] >= 0] < 32).all() for i in range(20))


def test_no_document_of_a_row_is_longer_than_the_bound(open_sources):
    data = open_sources(SHORT, max_document_length=9, held_out_fraction=0.1)
    batches = data.held_out_batches(batch_size=2)
    rows = [*(data.train[i] for i in range(20)), next(iter(batches))]
    positions = [row["positions"][row["segment_ids"] >= 0] for row in rows]
    assert max(p.max() for p in positions) == 8, "documents are cut, and to no less than the bound"


def test_dropping_every_document_names_the_source(open_sources):
    with pytest.raises(
        DataError, match=r"the training part of data.sources\[0\] \(synthetic\): .* leaves none of 1024"
    ):
        open_sources(SyntheticSource(min_length=32, max_length=40), long_documents="drop")


def test_the_notes_say_what_was_read(open_sources):
    (note,) = open_sources(SyntheticSource(min_length=5, max_length=5, num_documents=10), held_out_fraction=0.2).notes
    assert note == (
        "data.sources[0] (synthetic): 10 documents, 50 tokens; train 8 documents, 40 tokens; "
        "held out 2 documents, 10 tokens"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 1}, "seq_len: got 1, wanted >= 2"),
        ({"sources": ()}, "sources: got none, wanted at least one"),
        ({"held_out_fraction": 1.0}, "held_out_fraction: got 1.0, wanted 0 <= fraction < 1"),
        (
            {"held_out_sources": (StdlibSource(weight=2.0),)},
            r"held_out_sources: got weight=2.0 \(stdlib\), wanted none",
        ),
        ({"held_out_fraction": float("nan")}, "held_out_fraction: got nan, wanted"),
        ({"tokenizer": "ids:many"}, "tokenizer: got 'ids:many', wanted 'ids:N' with 2 <= N <= 2.31"),
        (
            {"end_token": "<eos>"},
            "end_token: got '<eos>' with tokenizer='bytes', wanted none .*; leave end_token out",
        ),
        ({"num_threads": -1}, "num_threads: got -1, wanted >= 0"),
        ({"num_threads": 8}, "prefetch_batches: got 4, wanted >= 1 and >= num_threads=8; raise it or lower"),
        ({"num_threads": 0, "prefetch_batches": 0}, "prefetch_batches: got 0, wanted >= 1"),
    ],
)
def test_settings_out_of_range_say_so(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"seq_len": 32, "sources": (SHORT,), **settings})


def test_calls_out_of_range_say_so(open_sources):
    with pytest.raises(ValueError, match="open_data: seed=-1, wanted >= 0"):
        open_sources(SHORT, seed=-1)
    data = open_sources(SHORT, held_out_fraction=0.1)
    with pytest.raises(ValueError, match=r"start_step=-1, wanted >= 0"):
        data.batches(start_step=-1, batch_size=1)
    with pytest.raises(ValueError, match=r"batch_size=0, wanted >= 1"):
        data.batches(start_step=0, batch_size=0)
    with pytest.raises(ValueError, match=r"rows: got \[0, 4\], wanted one or more numbers from 0 to batch_size=4 - 1"):
        data.batches(start_step=0, batch_size=4, rows=[0, 4])
    with pytest.raises(ValueError, match=r"batch_size=0, wanted >= 1"):
        data.held_out_batches(batch_size=0)
    with pytest.raises(ValueError, match=r"max_batches=0, wanted >= 1 or None"):
        data.held_out_batches(batch_size=1, max_batches=0)

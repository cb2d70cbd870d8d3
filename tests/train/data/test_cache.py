"""The cache: built once, complete or not there, rebuilt when something it depends on changes."""

import os
import shutil
import threading
import time

import numpy as np
import pytest

from train.data import DataError, StdlibSource, TextSource, sources
from train.data.cache import build_once


def folders(cache_dir):
    return sorted(path.name for path in cache_dir.iterdir())


@pytest.fixture
def count_builds(monkeypatch):
    builds = []
    real = sources._tokenise

    def tokenise(*args):
        builds.append(1)
        return real(*args)

    monkeypatch.setattr(sources, "_tokenise", tokenise)
    return builds


def test_a_source_is_tokenised_once_and_read_through_a_map(tmp_path, open_sources, count_builds):
    (tmp_path / "a.txt").write_text("some text")
    source = TextSource(files=(str(tmp_path / "a.txt"),))
    first = open_sources(source).train[0]
    again = open_sources(source, seed=3, seq_len=32).train[0]
    assert len(count_builds) == 1
    np.testing.assert_array_equal(first["tokens"], again["tokens"])
    (folder,) = (tmp_path / "cache").iterdir()
    assert folders(folder) == ["documents.npy", "index.json", "tokens.npy"]
    stored = np.load(folder / "tokens.npy", mmap_mode="r")
    assert stored.dtype == np.uint16 and bytes(stored.astype(np.uint8)) == b"some text"


@pytest.mark.parametrize("name", ["documents.npy", "index.json", "tokens.npy"])
@pytest.mark.parametrize("size", [None, 0, 130])
def test_a_folder_that_was_damaged_is_told_and_made_anew_when_deleted(tmp_path, open_sources, documents, name, size):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    source = TextSource(files=(str(path),))
    open_sources(source)
    (folder,) = (tmp_path / "cache").iterdir()
    damaged = folder / name
    if size is None and name != "index.json":  # without its index a folder is not complete, and is made anew
        damaged.unlink()
    else:
        os.truncate(damaged, min(size or 0, damaged.stat().st_size - 1))
    with pytest.raises(DataError, match=rf"{folder}: damaged in data.cache_dir \(.+\); delete that folder to make it"):
        open_sources(source)
    shutil.rmtree(folder)
    assert documents(open_sources(source), 1) == ["some text"]


def test_a_changed_file_is_tokenised_again(tmp_path, open_sources, documents):
    path = tmp_path / "a.txt"
    source = TextSource(files=(str(path),))
    for written, text in enumerate(["one", "two"]):
        path.write_text(text)
        os.utime(path, ns=(0, written))
        assert documents(open_sources(source), 1) == [text]
    assert len(folders(tmp_path / "cache")) == 2


def test_another_field_is_another_folder(tmp_path, open_sources, documents):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "first", "b": "second"}\n')
    for field, text in (("a", "first"), ("b", "second"), ("a", "first")):
        assert documents(open_sources(TextSource(files=(str(path),), field=field)), 1) == [text]
    assert len(folders(tmp_path / "cache")) == 2


def test_large_vocabularies_take_four_bytes(tmp_path):
    from train.data.cache import TokenFile, open_corpus

    with TokenFile(tmp_path, vocab_size=1 << 17) as out:
        for first in (100_000, 7):
            out.add(np.array([first, 2]), prompt_length=1, num_bytes=5)
        assert out.finish() == 2
    (tmp_path / "index.json").write_text('{"notes": []}')
    corpus = open_corpus(tmp_path)
    assert corpus.read(0, 0, 2).tolist() == [100_000, 2] and corpus.read(1, 0, 1).tolist() == [7]
    assert corpus.documents.prompt_lengths.tolist() == [1, 1] and corpus.documents.num_bytes.tolist() == [
        5,
        5,
    ]


def test_many_documents_keep_their_table(tmp_path):
    from train.data.cache import TokenFile, open_corpus

    with TokenFile(tmp_path, vocab_size=257) as out:
        for i in range(70_000):
            out.add(np.array([i % 256]), prompt_length=0, num_bytes=1)
        out.finish()
    (tmp_path / "index.json").write_text('{"notes": []}')
    corpus = open_corpus(tmp_path)
    assert len(corpus.documents) == 70_000
    assert [int(corpus.read(i, 0, 1)[0]) for i in (0, 65_535, 65_536, 69_999)] == [
        i % 256 for i in (0, 65_535, 65_536, 69_999)
    ]


def test_builders_at_the_same_time_leave_one_folder(tmp_path):
    barrier = threading.Barrier(3)
    results = []

    def build(number):
        def write(folder):
            (folder / "who").write_text(str(number))
            barrier.wait(timeout=10)
            return {"notes": []}

        results.append(build_once(tmp_path, "x", {"k": 1}, write))

    threads = [threading.Thread(target=build, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1 and folders(tmp_path) == [results[0].name]


def test_a_half_written_folder_is_not_used(tmp_path):
    def write(folder):
        (folder / "content").write_text("whole")
        return {"notes": []}

    folder = build_once(tmp_path, "x", {"k": 1}, write)
    (folder / "index.json").unlink()
    (folder / "content").write_text("ha")
    (tmp_path / ".building-x-killed").mkdir()
    assert build_once(tmp_path, "x", {"k": 1}, write) == folder
    assert (folder / "content").read_text() == "whole"


def test_what_a_killed_builder_left_is_removed_a_week_later(tmp_path):
    for name, days in (("old", 8), ("new", 6)):
        folder = tmp_path / f".building-{name}"
        folder.mkdir()
        (folder / "tokens.npy").write_bytes(b"0")
        for path in (folder / "tokens.npy", folder):
            os.utime(path, times=(time.time() - days * 24 * 3600,) * 2)
    build_once(tmp_path, "any", {}, lambda folder: {"notes": []})
    assert [path.name for path in tmp_path.glob(".building-*")] == [".building-new"]


def test_a_failed_build_leaves_nothing(tmp_path):
    def write(folder):
        (folder / "content").write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path, "x", {}, write)
    assert not folders(tmp_path)


def test_a_cache_that_cannot_be_written_says_so(tmp_path, open_sources):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir='.*' cannot be written: .*; name another folder"):
        open_sources(StdlibSource(), cache_dir=str(tmp_path / "file" / "cache"))

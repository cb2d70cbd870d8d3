"""Sources: what they read, what they pass over, and how they refuse."""

import io
import json
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from train.data import (
    DataError,
    MqarSource,
    PasskeySource,
    SourceConfig,
    StdlibSource,
    SyntheticSource,
    TextSource,
    TokensSource,
    open_tokenizer,
    progress,
)

BYTES = open_tokenizer("bytes")


def texts(corpus, tokenizer=BYTES):
    lengths = corpus.documents.lengths
    return [tokenizer.decode(corpus.read(i, 0, int(lengths[i]))) for i in range(len(lengths))]


def open_text(tmp_path, *names, **fields):
    return TextSource(files=tuple(str(tmp_path / name) for name in names), **fields).open(BYTES, tmp_path / "cache")


def open_tokens(tmp_path, name, tokenizer=BYTES, **fields):
    return TokensSource(files=(str(tmp_path / name),), **fields).open(tokenizer, tmp_path / "cache")


def ids(corpus):
    return [corpus.read(i, 0, int(n)).tolist() for i, n in enumerate(corpus.documents.lengths)]


def test_every_kind_is_a_variant():
    assert SourceConfig.variants() == {
        "stdlib": StdlibSource,
        "text": TextSource,
        "tokens": TokensSource,
        "synthetic": SyntheticSource,
        "passkey": PasskeySource,
        "mqar": MqarSource,
    }


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_positive(weight):
    with pytest.raises(ValueError, match=f"weight: got {weight}, wanted a finite number above 0"):
        StdlibSource(weight=weight)


# stdlib


def test_the_standard_library_is_read_in_the_order_of_its_paths(tmp_path, monkeypatch):
    root = tmp_path / "lib"
    for name in (
        "b.py",
        "a/z.py",
        "a.py",
        "site-packages/c.py",
        "a/__pycache__/d.py",
        "dist-packages/e.py",
        "f.txt",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (root / "empty.py").write_text("")
    (root / "latin.py").write_bytes(b"caf\xe9")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(root)}[name])
    corpus = StdlibSource().open(BYTES, tmp_path / "cache")
    assert texts(corpus) == ["a.py", "a/z.py", "b.py", "caf\ufffd"]
    assert list(corpus.notes) == [
        f"stdlib: replaced what is not UTF-8 in 1 documents, first in {root / 'latin.py'}",
        "stdlib: left out 1 empty documents",
    ]


def test_a_standard_library_without_files_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(
        DataError, match="stdlib source: no .py file in .*; use an interpreter that has its library as files"
    ):
        StdlibSource().open(BYTES, tmp_path / "cache")


def test_the_running_interpreter_has_a_standard_library(tmp_path):
    corpus = StdlibSource().open(BYTES, tmp_path / "cache")
    assert len(corpus.documents) > 500
    os_py = (Path(sysconfig.get_path("stdlib")) / "os.py").read_bytes()
    same_size = np.flatnonzero(corpus.documents.lengths == len(os_py)).tolist()
    assert os_py in [bytes(corpus.read(i, 0, len(os_py)).astype(np.uint8)) for i in same_size]
    assert corpus.documents.num_bytes.sum() == corpus.documents.lengths.sum()


# text


def test_text_files_are_documents_as_they_are(tmp_path):
    contents = {
        "a": b"one\r\ntwo\r\n",
        "b": b"nul\0byte",
        "c": b"",
        "d": b"x",
        "e": b"bad\xff\xfe",
        "f": b"\xef\xbb\xbfbom",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    corpus = open_text(tmp_path, "*.txt")
    assert texts(corpus) == ["one\r\ntwo\r\n", "nul\0byte", "x", "bad\ufffd\ufffd", "bom"]
    assert corpus.documents.num_bytes.tolist() == [len(text.encode()) for text in texts(corpus)]
    assert len(corpus.notes) == 2


def test_jsonl_lines_are_documents(tmp_path):
    lines = [
        b'{"text": "one", "n": 1}\r\n',
        b"\n",
        b'{"text": ""}\n',
        b'{"text": null}\n',
        b'{"text": "\xff"}\n',
    ]
    lines += [b'{"text": "half \\ud800"}\n', b'{"text": "\\u00e9\\u0000"}']
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    corpus = open_text(tmp_path, "a.jsonl")
    assert texts(corpus) == ["one", "\ufffd", "half ?", "\u00e9\0"]
    assert list(corpus.notes) == [
        f"text: replaced what is not UTF-8 in 2 documents, first in {tmp_path / 'a.jsonl'}:5",
        "text: left out 2 empty documents",
    ]


def test_globs_are_sorted_and_files_taken_once(tmp_path):
    for name in ("b/1.txt", "a/2.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(open_text(tmp_path, "c.txt", "./a/../c.txt", "**/*.txt")) == ["c.txt", "a/2.txt", "b/1.txt"]


def test_prompts_carry_no_loss(tmp_path, open_sources):
    (tmp_path / "a.jsonl").write_text('{"q": "ask", "a": "answer"}\n{"q": "", "a": "x"}\n{"q": "only", "a": ""}\n')
    corpus = open_text(tmp_path, "a.jsonl", prompt_field="q", completion_field="a")
    assert texts(corpus) == ["askanswer", "x", "only"]
    assert corpus.documents.prompt_lengths.tolist() == [3, 0, 4]
    assert corpus.documents.num_bytes.tolist() == [6, 1, 0]
    source = TextSource(files=(str(tmp_path / "a.jsonl"),), prompt_field="q", completion_field="a")
    row = open_sources(source, seq_len=17).train[0]
    weighted = bytes(int(t) for t in row["targets"][row["loss_weights"] > 0] if t < 256)
    assert sorted(weighted) == sorted(b"answerx") and row["loss_weights"].sum() == 7 + 3


def test_parquet_rows_are_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", None, "", "two"], "n": [1, 2, 3, 4], "q": ["a", "b", "c", "d"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(open_text(tmp_path, "a.parquet")) == ["one", "two"]
    both = open_text(tmp_path, "a.parquet", prompt_field="q", completion_field="text")
    assert texts(both) == ["aone", "b", "c", "dtwo"]
    with pytest.raises(
        DataError, match=r"a.parquet: no field 'body', the file has 'text', 'n', 'q'; set the source's field"
    ):
        open_text(tmp_path, "a.parquet", field="body")
    with pytest.raises(DataError, match=r"a.parquet: field 'n' is a int64, wanted a string"):
        open_text(tmp_path, "a.parquet", field="n")
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"b.parquet: not a parquet file \(.*\); write it again"):
        open_text(tmp_path, "b.parquet")


def test_parquet_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match=r"need the pyarrow package; install 'longctx-jax\[data\]'"):
        open_text(tmp_path, "a.parquet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "a"}\n{"text": }\n',
            r"a.jsonl:2: broken JSON \(Expecting value at column 10\); mend or remove",
        ),
        (
            '\n{"body": "a", "n": 1}\n',
            r"a.jsonl:2: no field 'text', the line has 'body', 'n'; set the source's field",
        ),
        ("{}\n", r"a.jsonl:1: no field 'text', the line has none"),
        ('{"text": 3}\n', r"a.jsonl:1: field 'text' is a int, wanted a string"),
        ('["text"]\n', r"a.jsonl:1: got a JSON list, wanted an object"),
        ("", r"text source: no document with text in .*a.jsonl; check the files and the field"),
        ('{"text": ""}\n', r"text source: no document with text in .*a.jsonl; check the files and the field"),
    ],
)
def test_broken_lines_say_where(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        open_text(tmp_path, "a.jsonl")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").iterdir())


def test_missing_files_say_so(tmp_path):
    (tmp_path / "a.md").write_text("text")
    (tmp_path / "a.txt").write_text("text")
    for name, message in (
        ("none.txt", "files: got '.*none.txt', no such file; name a file or a glob that matches"),
        ("*.jsonl", r"files: got '.*\*.jsonl', the glob matches no file; name a file or a glob"),
        (".", "files: got '.*', this is a folder; name a file or a glob"),
        ("a.md", r"a.md: got suffix '.md', wanted .txt, .jsonl, .parquet; rename or convert the file"),
    ):
        with pytest.raises(DataError, match=message):
            open_text(tmp_path, name)
    with pytest.raises(DataError, match="a.txt: a .txt file has no field 'q'; use .jsonl or .parquet"):
        open_text(tmp_path, "a.txt", prompt_field="q", completion_field="a")


def test_a_file_that_cannot_be_read_says_so(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match="a.txt: cannot be read: Permission denied; make it readable or leave it out"):
        open_text(tmp_path, "a.txt")


def test_text_settings_out_of_range_say_so():
    with pytest.raises(ValueError, match="files: got no path, wanted at least one"):
        TextSource(files=())
    with pytest.raises(ValueError, match="completion_field: got nothing, wanted a field name; set both"):
        TextSource(files=("a",), prompt_field="q")
    with pytest.raises(ValueError, match="prompt_field: got nothing, wanted a field name; set both"):
        TextSource(files=("a",), completion_field="a")
    with pytest.raises(
        ValueError, match="field: got 'body' with prompt_field and completion_field, which take its pla"
    ):
        TextSource(files=("a",), field="body", prompt_field="q", completion_field="a")


def test_a_hugging_face_tokenizer_counts_the_bytes_of_the_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<eos>": 0, "[UNK]": 1, "cat": 2, "dog": 3}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("cat dog cat", "\u00e9")))
    source = TextSource(files=(str(tmp_path / "a.jsonl"),))
    corpus = source.open(open_tokenizer(str(tmp_path / "tokenizer.json")), tmp_path / "cache")
    assert ids(corpus) == [[2, 3, 2], [1]] and corpus.documents.num_bytes.tolist() == [11, 2]


# tokens


@pytest.mark.parametrize("suffix", ["npy", "bin"])
def test_token_files_are_split_at_the_end_id(tmp_path, suffix):
    tokens = np.array([5, 6, 256, 256, 7, 256, 8, 9], np.uint16)
    if suffix == "npy":
        np.save(tmp_path / "a.npy", tokens)
        corpus = open_tokens(tmp_path, "a.npy")
    else:
        tokens.tofile(tmp_path / "a.bin")
        corpus = open_tokens(tmp_path, "a.bin", dtype="uint16")
    assert ids(corpus) == [[5, 6], [7], [8, 9]]
    assert corpus.documents.num_bytes.tolist() == [2, 1, 2]


def test_documents_do_not_cross_token_files(tmp_path):
    for name, tokens in (("a", [1, 2, 0, 3]), ("b", [0, 4]), ("c", [0, 0])):
        np.save(tmp_path / f"{name}.npy", np.array(tokens, np.int32))
    corpus = open_tokens(tmp_path, "*.npy", open_tokenizer("ids:10"), end_id=0)
    assert ids(corpus) == [[1, 2], [3], [4]]
    assert corpus.documents.num_bytes.tolist() == [0, 0, 0]
    assert corpus.read(0, 1, 2).tolist() == [2]


def test_documents_cross_the_chunks_of_the_scan(tmp_path, monkeypatch):
    from train.data import sources

    monkeypatch.setattr(sources, "_SCAN_TOKENS", 3)
    tokens = [1, 2, 9, 3, 4, 5, 6, 9, 9, 7]
    np.save(tmp_path / "a.npy", np.array(tokens))
    assert ids(open_tokens(tmp_path, "a.npy", end_id=9)) == [[1, 2], [3, 4, 5, 6], [7]]


@pytest.mark.parametrize(("bad", "vocab_size", "last"), [(300, None, 256), (-1, None, 256), (60, 50, 49)])
def test_ids_out_of_the_vocabulary_say_where(tmp_path, monkeypatch, bad, vocab_size, last):
    from train.data import sources

    monkeypatch.setattr(sources, "_SCAN_TOKENS", 3)
    np.save(tmp_path / "a.npy", np.array([1, 2, 256, 4, bad]))
    with pytest.raises(DataError, match=f"a.npy: id {bad} at position 4, wanted 0 to {last}; use the tokenizer"):
        open_tokens(tmp_path, "a.npy", vocab_size=vocab_size)


def test_broken_token_files_say_so(tmp_path):
    np.save(tmp_path / "floats.npy", np.ones(3))
    np.save(tmp_path / "square.npy", np.ones((2, 2), np.int32))
    np.save(tmp_path / "none.npy", np.ones(0, np.int32))
    np.save(tmp_path / "ends.npy", np.full(3, 256))
    np.save(tmp_path / "good.npy", np.ones(3, np.int32))
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "a.txt").write_text("1 2")
    for name, fields, message in (
        ("floats.npy", {}, r"got float64 \(3,\), wanted integers in one dimension; save it again"),
        ("square.npy", {}, r"got int32 \(2, 2\), wanted integers in one dimension"),
        ("none.npy", {}, "the array is empty; write its ids or leave it out"),
        ("ends.npy", {}, "tokens source: no documents in .*ends.npy; every id is the end id 256"),
        ("good.npy", {"dtype": "uint16"}, "the array is int32, dtype says uint16; leave dtype out"),
        (
            "good.npy",
            {"vocab_size": 1000},
            "vocab_size=1000 exceeds the 257 ids of data.tokenizer; use tokenizer='ids:1000'",
        ),
        ("text.npy", {}, r"not a .npy file \(.*\); save it with numpy.save"),
        ("odd.bin", {"dtype": "uint16"}, "3 bytes are not whole uint16 ids; set the dtype of the file"),
        ("odd.bin", {}, "a .bin file does not say its type; set the source's dtype"),
        ("empty.bin", {"dtype": "uint16"}, "the file is empty; write its ids or leave it out"),
        ("a.txt", {}, "got suffix '.txt', wanted .npy, .bin; rename or convert"),
        ("missing.npy", {}, "no such file"),
    ):
        with pytest.raises(DataError, match=message) as error:
            open_tokens(tmp_path, name, **fields)
        assert "\n" not in str(error.value)


def test_token_settings_out_of_range_say_so():
    with pytest.raises(ValueError, match="files: got no path"):
        TokensSource(files=())
    with pytest.raises(ValueError, match="end_id: got -1, wanted an id >= 0"):
        TokensSource(files=("a",), end_id=-1)
    with pytest.raises(ValueError, match="vocab_size: got 0, wanted >= 1"):
        TokensSource(files=("a",), vocab_size=0)


# synthetic


@pytest.mark.parametrize("distribution", ["uniform", "log_uniform"])
def test_synthetic_documents_repeat_a_pattern(tmp_path, distribution):
    source = SyntheticSource(
        min_length=20,
        max_length=90,
        length_distribution=distribution,
        num_documents=400,
        min_period=3,
        max_period=5,
    )
    corpus = source.open(BYTES, tmp_path)
    lengths = corpus.documents.lengths
    assert lengths.min() == 20 and lengths.max() > 80 and lengths.max() <= 90
    assert (np.median(lengths) < 50) == (distribution == "log_uniform")
    periods = set()
    for document, tokens in enumerate(ids(corpus)):
        periods.add(min(p for p in range(1, 6) if tokens[p:] == tokens[:-p]))
        assert tokens[7:19] == corpus.read(document, 7, 19).tolist()
        assert max(tokens) < 64
    assert periods >= {3, 4, 5}
    assert ids(source.open(BYTES, tmp_path)) == ids(corpus)


def test_synthetic_documents_leave_out_the_end_id(tmp_path):
    tokenizer = open_tokenizer("ids:4")
    tokenizer.end_id = 1
    source = SyntheticSource(min_length=50, max_length=50, num_symbols=3, num_documents=20)
    assert {token for document in ids(source.open(tokenizer, tmp_path)) for token in document} == {0, 2, 3}


def test_a_synthetic_document_can_fill_a_row_exactly(open_sources):
    data = open_sources(SyntheticSource(min_length=31, max_length=31), seq_len=32)
    for index in range(5):
        row = data.train[index]
        assert (row["segment_ids"] == 0).all() and (row["loss_weights"] == 1).all()


def test_synthetic_settings_out_of_range_say_so(tmp_path):
    for fields, message in (
        ({"min_length": 0}, "min_length: got 0, wanted >= 1; raise it"),
        ({"max_length": 4}, "max_length: got 4, wanted >= min_length=5; raise it or lower min_length"),
        ({"max_period": 2}, "max_period: got 2, wanted >= min_period=4"),
        ({"num_documents": 0}, "num_documents: got 0, wanted >= 1"),
        ({"seed": -1}, "seed: got -1, wanted >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SyntheticSource(**{"min_length": 5, "max_length": 9, **fields})
    source = SyntheticSource(min_length=5, max_length=9, num_symbols=257)
    with pytest.raises(DataError, match="num_symbols=257 exceeds the 256 ids .* lower it or use tokenizer='ids:258'"):
        source.open(BYTES, tmp_path)


# progress


@pytest.mark.parametrize(
    ("terminal", "patience", "shown"), [(True, 0.0, True), (True, 60.0, False), (False, 0.0, False)]
)
def test_a_bar_is_shown_to_people_who_wait(monkeypatch, terminal, patience, shown):
    monkeypatch.setattr(progress, "_PATIENCE_SECONDS", patience)
    output = io.StringIO()
    with progress.ByteProgress("tokenising x", 100, console=Console(file=output, force_terminal=terminal)) as bar:
        bar.advance(40)
        bar.advance(60)
    assert ("tokenising x" in output.getvalue()) == shown

"""Generated bad data: each is refused with a line that says which file and why, and nothing of the run is written; or,
where the bad part can be passed over, the run reads what is left and its losses are finite.
"""

import dataclasses
import io
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

from tests.faults.harness import Report, for_each, run, snapshot, tiny_config
from train.__main__ import main
from train.config import ConfigError, load_config
from train.data import DataError, open_data
from train.metrics import read_records

_LINES = (
    b"",
    b"   ",
    b"\x00",
    b"{",
    b"[]",
    b"3",
    b"null",
    b'"text"',
    b"{}",
    b'{"text": 5}',
    b'{"text": null}',
    b'{"text": ""}',
    b'{"text": "a"}',
    b'{"text": ["a"]}',
    b'{"Text": "a"}',
    b'{"text": "a"',
    b'{"text": "\\ud800"}',
    b'{"text": "a\x00b"}',
    b'{"text": "\xff\xfe"}',
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf" + b'{"text": "bom"}',
    b'{"text": "a", "text": 5}',
    b"NaN",
    b'{"text": NaN}',
    b'{"text": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"text": "\\u0000\\uffff"}',
    b'{"text": "a"} {"text": "b"}',
    b"{'text': 'a'}",
    b'{"text": "' + b"long " * 20_000 + b'"}',
    b'{"text": 1e999}',
    b"\r",
    b'{"text": {"text": "a"}}',
    b'{"text": true}',
    b"\x1b[2J",
    b'{"text": "\xed\xa0\x80"}',
)
_TEXTS = (
    b"",
    b" \n\t ",
    b"\x00" * 50,
    b"\xff" * 50,
    b"a",
    b"\xef\xbb\xbf",
    "wide".encode("utf-16"),
    b"\xc3",
    b"\xf5\x80\x80\x80",
    b"x" * 1_000_000,
    b"\n" * 1000,
    "\u202e\U0010ffff".encode(),
    b"\xed\xa0\x80\xed\xb0\x80",
    b"%PDF-1.7\n%\xe2\xe3",
    bytes(range(256)),
)
_TRAIN_ONE_IN = 5  # of the sets that can be read; the batches of the others are looked at alone
_GOOD_LINES = b"".join(b'{"text": "%s"}\n' % (b"word " * n) for n in range(1, 12))


@dataclasses.dataclass(frozen=True)
class BadData:
    """Files by name, and the section `data` that reads them; every name of a file is one that an error may name."""

    kind: str
    files: dict[str, bytes]
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    prepare: Callable[[Path], None] | None = None


def _npy(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def _parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def _damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Cut off, with bytes changed, with bytes left out, or with more behind."""
    place = st.integers(0, len(content) - 1)
    cut = place.map(lambda at: content[:at])
    flipped = st.builds(
        lambda at, by: content[:at] + by + content[at + len(by) :], place, st.binary(min_size=1, max_size=8)
    )
    left_out = st.builds(lambda at, size: content[:at] + content[at + size :], place, st.integers(1, 64))
    longer = st.binary(min_size=1, max_size=64).map(lambda more: content + more)
    return st.one_of(cut, flipped, left_out, longer)


def _tokenizer_json() -> bytes:
    import tokenizers

    vocabulary = {"<unk>": 0, "</s>": 1, "word": 2, "long": 3}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer.to_str().encode()


def _text_source(pattern: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "text", "files": [f"FOLDER/{pattern}"], **fields}


def _tokens_source(pattern: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "tokens", "files": [f"FOLDER/{pattern}"], **fields}


def bad_data() -> st.SearchStrategy[BadData]:
    """Sets of files, most of them wrong in one way."""
    good = {"good.jsonl": _GOOD_LINES}
    text = st.one_of(st.sampled_from(_TEXTS), st.binary(max_size=300)).map(
        lambda content: BadData("text", {"one.txt": content, "two.txt": content[:50]}, _text_source("*.txt"))
    )
    lines = st.lists(st.one_of(st.sampled_from(_LINES), st.binary(max_size=60)), min_size=1, max_size=4)
    jsonl = st.builds(
        lambda bad, first: BadData(
            "jsonl",
            {"a.jsonl": (b"" if first is None else first) + b"\n".join(bad), **good},
            _text_source("*.jsonl"),
        ),
        lines,
        st.sampled_from([None, _GOOD_LINES]),
    )
    jsonl_damaged = _damaged(_GOOD_LINES).map(
        lambda content: BadData("jsonl, damaged", {"a.jsonl": content}, _text_source("*.jsonl"))
    )
    prompts = st.sampled_from(_LINES).map(
        lambda line: BadData(
            "prompt and completion",
            {"a.jsonl": b'{"p": "a", "c": "bcd"}\n' * 5 + line.replace(b"text", b"p") + b"\n"},
            _text_source("*.jsonl", prompt_field="p", completion_field="c"),
        )
    )
    words = ["word " * n for n in range(1, 30)]
    parquet = _damaged(_parquet(text=words)).map(
        lambda content: BadData("parquet, damaged", {"a.parquet": content}, _text_source("a.parquet"))
    )
    invalid = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(np.array([0, 2, 4], np.int32)), pyarrow.py_buffer(b"\xff\xfeab")]
    )
    columns = st.sampled_from(
        [
            _parquet(text=[1, 2]),
            _parquet(text=[b"a", b"b"]),
            _parquet(other=words),
            _parquet(text=[None, None]),
            _parquet(text=[None, *words]),
            _parquet(text=["", ""]),
            _parquet(text=[["a"], ["b"]]),
            _parquet(text=invalid),
            _parquet(text=pyarrow.array(words).dictionary_encode()),
            _parquet(text=pyarrow.array([], pyarrow.string())),
            _parquet(text=["\x00", "a\x00"]),
            _parquet(text=[{"text": "a"}] * 2),
            b"",
            b"PAR1",
            b"PAR1" * 3,
            _GOOD_LINES,
        ]
    ).map(lambda content: BadData("parquet", {"a.parquet": content}, _text_source("a.parquet")))
    ids = np.tile(np.arange(9, dtype=np.uint16), 20)
    npy = st.one_of(
        _damaged(_npy(ids)),
        st.sampled_from(
            [
                _npy(ids + 1),
                _npy(ids.astype(np.int64) - 1),
                _npy(ids.astype(np.float32)),
                _npy(ids.reshape(2, -1)),
                _npy(ids.astype(">u2")),
                _npy(ids[:0]),
                _npy(np.array([{"a": 1}, None]), allow_pickle=True),
                _npy(ids == 1),
                _npy(ids.astype("S3")),
                _npy(np.array(3)),
                _npy(ids.astype(np.uint64) + 2**63),
                _npy(ids.astype(np.int8)),
                _npy(np.array([(1, 2)], dtype=[("a", "i4"), ("b", "i4")])),
                _npy(np.full(50, 8, np.uint16)),
                b"",
                b"\x93NUMPY",
                b"\x93NUMPY\x01\x00\x76\x00{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999,), }"
                + b" " * 42
                + b"\n",
                b"\x93NUMPY\x01\x00\x76\x00{'descr': '|O', 'fortran_order': False, 'shape': (__import__('os'),), }"
                + b" " * 40
                + b"\n",
                _npy(np.asarray([1, 8, 2, 8, 3, 8], np.uint16)),
                _npy(np.asarray([1], np.uint16)),
            ]
        ),
    ).map(lambda content: BadData("npy", {"a.npy": content}, _tokens_source("a.npy"), {"tokenizer": "ids:9"}))
    bin_ = st.builds(
        lambda content, dtype: BadData(
            "bin",
            {"a.bin": content},
            _tokens_source("a.bin", **({"dtype": dtype} if dtype else {})),
            {"tokenizer": "ids:9"},
        ),
        st.one_of(st.binary(max_size=64), st.sampled_from([b"", b"\x01", ids.tobytes(), ids.tobytes()[:-1]])),
        st.sampled_from([None, "uint16", "uint32", "int32", "int64"]),
    )
    tokenizer = st.one_of(
        _damaged(_tokenizer_json()),
        st.sampled_from(
            [
                b"",
                b"{}",
                b"[]",
                b"null",
                b"\xff",
                _tokenizer_json().replace(b"</s>", b"<end>"),
                b"[" * 100_000,
                b"9" * 5000,
                _tokenizer_json().replace(b'"</s>":1', b'"</s>":4294967295'),
                _tokenizer_json().replace(b'"word":2', b'"word":-2'),
                _tokenizer_json().replace(b'"<unk>":0,"</s>":1,"word":2,"long":3', b""),
                _tokenizer_json().replace(b":2", b":9999999"),
                _tokenizer_json().replace(b"WordLevel", b"Nonsense"),
                _tokenizer_json().replace(b'"</s>":1', b'"</s>":0'),
            ]
        ),
    ).map(
        lambda content: BadData(
            "tokenizer.json", {"t.json": content, **good}, _text_source("*.jsonl"), {"tokenizer": "FOLDER/t.json"}
        )
    )
    short = st.sampled_from(
        [
            BadData("documents", {"a.jsonl": b'{"text": "a"}\n'}, _text_source("*.jsonl")),
            BadData("documents", {"a.jsonl": b'{"text": "a"}\n' * 2}, _text_source("*.jsonl")),
            BadData("documents", {"a.jsonl": b'{"text": "a"}\n' * 500}, _text_source("*.jsonl")),
            BadData("documents", {"a.txt": b"a"}, _text_source("*.txt"), {"held_out_fraction": 0.0}),
            BadData("documents", good, _text_source("*.jsonl"), {"long_documents": "drop", "max_document_length": 2}),
            BadData("documents", good, _text_source("*.jsonl"), {"held_out_fraction": 0.999}),
            BadData("documents", good, _text_source("*.jsonl", weight=1e-300)),
            BadData("documents", good, _text_source("*.jsonl"), {"end_token": "x"}),
            BadData("documents", {"a.txt": b"1 2 9"}, _text_source("*.txt"), {"tokenizer": "ids:9"}),
            BadData("documents", {"a.txt": b"1 2 " + b"7" * 5000}, _text_source("*.txt"), {"tokenizer": "ids:9"}),
        ]
    )

    def special(name: str, make: Callable[[Path], None], pattern: str = "*") -> BadData:
        return BadData("files", {}, _text_source(pattern), prepare=make)

    files = st.sampled_from(
        [
            special("nothing", lambda folder: None),
            special("folder", lambda folder: (folder / "a.txt").mkdir(), "a.txt"),
            special("dangling link", lambda folder: (folder / "a.txt").symlink_to("nowhere")),
            special("link to itself", lambda folder: (folder / "a.txt").symlink_to("a.txt")),
            special("pipe", lambda folder: os.mkfifo(folder / "a.txt")),
            special("pipe by name", lambda folder: os.mkfifo(folder / "a.txt"), "a.txt"),
            special("suffix", lambda folder: (folder / "a.doc").write_bytes(b"text")),
            special("no suffix", lambda folder: (folder / "a").write_bytes(b"text")),
            special("name", lambda folder: Path(os.fsdecode(bytes(folder) + b"/\xff.txt")).write_bytes(b"text\n" * 9)),
            special("device", lambda folder: (folder / "a.txt").symlink_to("/dev/zero")),
            special("nul", lambda folder: None, "a\x00.txt"),
            special("long", lambda folder: None, "a" * 5000),
            special("bracket", lambda folder: None, "["),
        ]
    )
    return st.one_of(
        text,
        jsonl,
        jsonl_damaged,
        prompts,
        parquet,
        parquet,
        columns,
        npy,
        npy,
        bin_,
        tokenizer,
        tokenizer,
        short,
        files,
    )


def _read(file: Path) -> tuple[bool, str | None]:
    """Whether the data of a config can be read, and what is wrong with its first batches."""
    try:
        config = load_config(file)
        data = open_data(config.data, seed=config.seed)
    except (ConfigError, DataError):
        return False, None
    except Exception as error:
        return False, f"{type(error).__name__}: {str(error)[:200]}"
    held_out = data.held_out_batches(batch_size=2, max_batches=2) if len(data.held_out) else ()
    for batch in (*itertools.islice(data.batches(start_step=0, batch_size=2), 2), *held_out):
        for name in ("tokens", "targets"):
            if not (0 <= batch[name].min() and batch[name].max() < data.tokenizer.vocab_size):
                return True, f"{name} out of the vocabulary: {batch[name].min()} to {batch[name].max()}"
        is_padding = batch["segment_ids"] < 0
        if not np.isfinite(batch["loss_weights"]).all() or (batch["loss_weights"][is_padding] != 0).any():
            return True, "weights that are not finite, or of padding"
    return True, None


def check_data(folder: Path, count: int) -> Report:
    """Reads `count` generated data sets and trains a step on some; every second run finds files of an earlier one."""
    report = Report("bad data")

    def check(case: BadData) -> None:
        number = report.count
        here, run_dir, cache = (folder / f"{name}{number}" for name in ("data", "run", "cache"))
        here.mkdir()
        if number % 2:
            run_dir.mkdir()
            (run_dir / "notes.txt").write_text("of the user")
        for name, content in case.files.items():
            (here / name).write_bytes(content)
        if case.prepare is not None:
            case.prepare(here)
        config = tiny_config(run_dir, cache)
        filled = json.loads(json.dumps(case.source).replace("FOLDER", str(here)))
        rest = json.loads(json.dumps(case.data).replace("FOLDER", str(here)))
        config["data"] |= {"tokenizer": "bytes", "sources": [filled], "num_threads": 0} | rest
        config["training"]["steps"] = 1
        config["distributed"]["compilation_cache_dir"] = str(folder / "compiled")
        file = folder / "config.yaml"
        file.write_text(json.dumps(config))
        before = snapshot(run_dir)
        is_read, fault = _read(file)
        if is_read and fault is None and number % _TRAIN_ONE_IN:
            report.add(case.kind, "read")
            return
        ended = run(main, [str(file)])
        if ended.code == 0:
            outcome = "trained"
            losses = [
                record[name] for record in read_records(run_dir / "metrics.jsonl") for name in record if "loss" in name
            ]
            fault = fault or (None if losses and None not in losses else f"losses {losses}; {ended.stdout[-300:]}")
        else:
            outcome = "refused"
            fault = fault or ended.refusal_fault((str(here), *case.data, "source"))
            if fault is None and snapshot(run_dir) != before:
                fault = "refused, but files of the run have changed"
            if fault is None and cache.exists() and any(cache.glob(".building-*")):
                fault = "refused, but a half-built folder is left in the cache"
        shown = {name: content[:200] for name, content in case.files.items() if name != "good.jsonl"}
        report.add(case.kind, outcome, f"{fault}\n    {shown} {case.source} {case.data}" if fault else None)

    for_each(bad_data(), count, check)
    return report

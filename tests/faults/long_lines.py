"""Files of one line of 100 MB: trained on, or refused with a line, in memory of at most a multiple of it."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from tests.faults import runs
from tests.faults.harness import Report, tiny_config

_LINE_BYTES = 100_000_000
_MOST_BYTES = 45 * _LINE_BYTES  # of memory, most of which are the ids of the line's bytes or words
_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class LongLine:
    """A file of one line, of a text that is repeated between its two ends; `error` is what a refusal must say."""

    name: str
    file: str
    text: bytes
    ends: tuple[bytes, bytes] = (b"", b"")
    tokenizer: str = "bytes"
    error: str | None = None

    def pieces(self) -> Iterator[bytes]:
        piece = self.text * (1_000_000 // len(self.text))
        return itertools.chain(self.ends[:1], itertools.repeat(piece, _LINE_BYTES // len(piece)), self.ends[1:])


_JSON = (b'{"text": "', b'"}\n')
_LINES = (
    LongLine("jsonl cut off", "a.jsonl", b"word ", (_JSON[0], b""), error="a.jsonl:1: broken JSON"),
    LongLine("text", "a.txt", b"word "),
    LongLine("jsonl", "a.jsonl", b"word ", _JSON),
    LongLine("jsonl that is not UTF-8", "a.jsonl", b"wor\xff ", _JSON),
    LongLine("ids", "a.txt", b"1 2 3 4 5 ", tokenizer="ids:9"),
    LongLine("ids, the last wrong", "a.txt", b"1 2 3 4 5 ", (b"", b"9"), "ids:9", "got text '9', wanted ids"),
)


def check_long_lines(folder: Path, count: int) -> Report:
    """Trains a step on each of the first `count` files."""
    report = Report("100 MB lines")
    for line in _LINES[:count]:
        file = folder / line.file
        with file.open("wb") as opened:
            opened.writelines(line.pieces())
        outcome, fault = _train(folder, file, line)
        report.add(line.name, outcome, fault)
        file.unlink()
    return report


def _train(folder: Path, file: Path, line: LongLine) -> tuple[str, str | None]:
    config = tiny_config(folder / "run", folder / "cache")
    source = {"kind": "text", "files": [str(file)]}
    config["data"] |= {"tokenizer": line.tokenizer, "sources": [source], "held_out_fraction": 0.0, "seq_len": 4096}
    config["training"] |= {"steps": 1}
    config_file = folder / "config.yaml"
    config_file.write_text(json.dumps(config))
    run = runs.Run(runs.train_command(config_file, folder / f"{line.name}.run"), folder / f"{line.name}.log")
    code, most_bytes = run.wait_with_memory(_SECONDS)
    log = run.log()
    if code is None:
        return "hang", f"no end after {_SECONDS} s"
    if most_bytes > _MOST_BYTES:
        return "too much memory", f"{most_bytes / 1e9:.1f} GB for a line of {_LINE_BYTES / 1e9} GB"
    if line.error is None:
        return "trained", None if code == 0 else f"exit code {code}: {log[-600:]!r}"
    is_line = code == 1 and line.error in log and "Traceback" not in log
    return "refused", None if is_line else f"exit code {code}, wanted {line.error!r}: {log[-600:]!r}"

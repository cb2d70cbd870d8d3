"""Reading text documents out of files: forgiving about single bytes, strict about the form."""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from train.data.errors import DataError
from train.data.progress import ByteProgress

SUFFIXES = (".txt", ".jsonl", ".parquet")
_PARQUET_BATCH = 256  # rows at a time: documents can be long


@dataclass(frozen=True, kw_only=True)
class TextDocument:
    """A document; the prompt, if any, comes first and carries no loss."""

    text: str
    prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Which fields of a record hold the document: `text` alone, or `prompt` and `completion`."""

    text: str = "text"
    prompt: str | None = None
    completion: str | None = None

    def names(self) -> tuple[str, ...]:
        if self.prompt is not None and self.completion is not None:
            return (self.prompt, self.completion)
        return (self.text,)

    def document(self, values: list[str]) -> TextDocument:
        if len(values) == 2:
            return TextDocument(prompt=values[0], text=values[1])
        return TextDocument(text=values[0])


@dataclass(kw_only=True)
class ReadReport:
    """What a reader passed over in silence, to be said once at the end."""

    num_empty: int = 0
    undecodable: list[str] = field(default_factory=list)

    def notes(self, name: str) -> list[str]:
        notes = []
        if self.undecodable:
            example = self.undecodable[0]
            notes.append(f"{name}: replaced what is not UTF-8 in {len(self.undecodable)} documents, first in {example}")
        if self.num_empty:
            notes.append(f"{name}: left out {self.num_empty} empty documents")
        return notes


def read_documents(path: Path, fields: Fields, report: ReadReport, progress: ByteProgress) -> Iterator[TextDocument]:
    """Yields the documents of one file: of its lines or rows by its suffix, else the whole file as one."""
    try:
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path, fields, report, progress)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, fields, report, progress)
        else:
            yield from _read_whole(path, report, progress)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read: {reason}; make it readable or leave it out") from None


def _read_whole(path: Path, report: ReadReport, progress: ByteProgress) -> Iterator[TextDocument]:
    content = path.read_bytes()
    progress.advance(len(content))
    yield TextDocument(text=_decode(content, str(path), report))


def _read_jsonl(path: Path, fields: Fields, report: ReadReport, progress: ByteProgress) -> Iterator[TextDocument]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            progress.advance(len(line))
            place = f"{path}:{number}"
            line = _decode(line, place, report).strip()
            if not line:
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # also integers and nesting beyond Python's limits
                reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise DataError(f"{place}: broken JSON ({reason}); mend or remove the line") from None
            if not isinstance(record, dict):
                raise DataError(
                    f"{place}: got a JSON {type(record).__name__}, wanted an object; mend or remove the line"
                )
            yield fields.document([_field(record, name, place, report) for name in fields.names()])


def _field(record: dict, name: str, place: str, report: ReadReport) -> str:
    if name not in record:
        raise DataError(
            f"{place}: no field {name!r}, the line has {', '.join(map(repr, record)) or 'none'}; set the "
            "source's field, or prompt_field and completion_field"
        )
    value = record[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{place}: field {name!r} is a {type(value).__name__}, wanted a string; mend or remove the line"
        )
    return _without_surrogates(value, place, report)


def _read_parquet(path: Path, fields: Fields, report: ReadReport, progress: ByteProgress) -> Iterator[TextDocument]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: .parquet files need the pyarrow package; install 'longctx-jax[data]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise _not_parquet(path, error) from None
    with file:
        for name in fields.names():
            if name not in file.schema_arrow.names:
                raise DataError(
                    f"{path}: no field {name!r}, the file has {', '.join(map(repr, file.schema_arrow.names))}; set "
                    "the source's field, or prompt_field and completion_field"
                )
            kind = file.schema_arrow.field(name).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f"{path}: field {name!r} is a {kind}, wanted a string; write it as text")
        bytes_per_row = path.stat().st_size / max(file.metadata.num_rows, 1)
        batches = file.iter_batches(batch_size=_PARQUET_BATCH, columns=list(fields.names()))
        first_row = 0
        while True:
            try:
                batch = next(batches, None)
                if batch is None:
                    break
                # As bytes, for a writer may have put there what is not UTF-8.
                columns = [batch.column(name).cast(pyarrow.large_binary()).to_pylist() for name in fields.names()]
            except (pyarrow.ArrowException, OSError) as error:
                raise _not_parquet(path, error) from None
            progress.advance(round(bytes_per_row * batch.num_rows))
            for number, values in enumerate(zip(*columns, strict=True), start=first_row):
                yield fields.document([_utf8(value or b"", f"{path} row {number}", report) for value in values])
            first_row += batch.num_rows


def _not_parquet(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a parquet file ({' '.join(str(error).split())[:300]}); write it again")


def _decode(content: bytes, place: str, report: ReadReport) -> str:
    return _utf8(content.removeprefix(codecs.BOM_UTF8), place, report)


def _utf8(content: bytes, place: str, report: ReadReport) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        report.undecodable.append(place)
        return content.decode("utf-8", errors="replace")


def _without_surrogates(text: str, place: str, report: ReadReport) -> str:
    """JSON can spell half of a surrogate pair, which is no character and cannot be encoded."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        report.undecodable.append(place)
        return text.encode("utf-8", errors="replace").decode("utf-8")

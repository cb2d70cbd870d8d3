"""Where documents come from: one frozen config a kind, each of which opens its corpus.

A source is tokenised once into a folder of the cache, which is keyed by the source's own fields, the
identity of its files (path, size, time of change) and the tokenizer.
"""

import glob
import hashlib
import json
import math
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from train.data.cache import TokenFile, build_once, open_corpus, save_documents
from train.data.corpus import Corpus, DocumentTable, RepeatCorpus
from train.data.errors import DataError
from train.data.progress import ByteProgress
from train.data.text_files import SUFFIXES, Fields, ReadReport, TextDocument, read_documents
from train.data.tokenizers import Tokenizer

_BATCH_CHARACTERS = 1 << 20  # enough for a parallel tokenizer, little beside a corpus
_SCAN_TOKENS = 1 << 22
_FIELD = "text"
_NOT_STANDARD_LIBRARY = ("site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What every kind of source has; `kind` in the config file picks the subclass."""

    kind: ClassVar[str]

    weight: float = 1.0
    """Share of the training rows from this source, relative to the other sources (kept to within 1%)."""

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight: got {self.weight}, wanted a finite number above 0; remove an unused source")

    @classmethod
    def variants(cls) -> dict[str, type["SourceConfig"]]:
        """The config class of each kind."""
        found, kinds = list(SourceConfig.__subclasses__()), {}
        while found:
            source = found.pop(0)
            found += source.__subclasses__()
            if hasattr(source, "kind"):  # others are what several kinds share
                kinds[source.kind] = source
        return kinds

    def open(self, tokenizer: Tokenizer, cache_dir: Path) -> Corpus:
        """Opens the documents, tokenising them first if the cache does not hold them.

        Raises: DataError, on one line with the remedy, for whatever is wrong with the data.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class StdlibSource(SourceConfig):
    """The Python files of the running interpreter's standard library: real text that every machine has."""

    kind: ClassVar[str] = "stdlib"

    def open(self, tokenizer: Tokenizer, cache_dir: Path) -> Corpus:
        root = Path(sysconfig.get_path("stdlib"))
        files = _standard_library_files(root)
        if not files:
            raise DataError(
                f"stdlib source: no .py file in {root}; use an interpreter that has its library as files, or "
                "a text source"
            )
        names = [file.relative_to(root).as_posix() for file in files]
        return _open_text("stdlib", {}, files, names, Fields(), tokenizer, cache_dir)


def _standard_library_files(root: Path) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STANDARD_LIBRARY]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted((file for file in files if file.is_file()), key=lambda file: file.relative_to(root).as_posix())


@dataclass(frozen=True, kw_only=True)
class TextSource(SourceConfig):
    """Text files: .txt (a file is a document), .jsonl (a line is) or .parquet (a row is)."""

    kind: ClassVar[str] = "text"

    files: tuple[str, ...]
    """Paths or globs of the files, read in this order and sorted within a glob; `**` crosses folders."""

    field: str = _FIELD
    """Field of a .jsonl line or .parquet row that holds the document."""

    prompt_field: str | None = None
    """Field that holds a prompt, which carries no loss. Goes with `completion_field`; the two take the place
    of `field`."""

    completion_field: str | None = None
    """Field that holds what follows the prompt and carries loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.files:
            raise ValueError("files: got no path, wanted at least one path or glob; name the files of the source")
        if (self.prompt_field is None) != (self.completion_field is None):
            missing = "prompt_field" if self.prompt_field is None else "completion_field"
            raise ValueError(
                f"{missing}: got nothing, wanted a field name; set both prompt_field and completion_field or neither"
            )
        if self.prompt_field is not None and self.field != _FIELD:
            raise ValueError(
                f"field: got {self.field!r} with prompt_field and completion_field, which take its place; leave it or "
                "these out"
            )

    def open(self, tokenizer: Tokenizer, cache_dir: Path) -> Corpus:
        files = expand_globs(self.files)
        for file in files:
            if file.suffix not in SUFFIXES:
                raise DataError(
                    f"{file}: got suffix {file.suffix!r}, wanted {', '.join(SUFFIXES)}; rename or convert the file"
                )
            if file.suffix == ".txt" and self.prompt_field is not None:
                raise DataError(f"{file}: a .txt file has no field {self.prompt_field!r}; use .jsonl or .parquet")
        fields = Fields(text=self.field, prompt=self.prompt_field, completion=self.completion_field)
        key = {"fields": fields.names()}
        names = [str(file.resolve()) for file in files]
        return _open_text("text", key, files, names, fields, tokenizer, cache_dir)


@dataclass(frozen=True, kw_only=True)
class TokensSource(SourceConfig):
    """Ids that somebody has tokenised before: .npy or raw .bin files, read through memory maps."""

    kind: ClassVar[str] = "tokens"

    files: tuple[str, ...]
    """Paths or globs of the files, read in this order and sorted within a glob."""

    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = None
    """Type of the ids of a .bin file, little-endian. A .npy file says its own, so leave it out there."""

    end_id: int | None = None
    """Id that ends a document in the files, as the end of a file does. Default: the tokenizer's end id."""

    vocab_size: int | None = None
    """Ids must be below this. Default: the tokenizer's vocabulary, which it may not exceed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.files:
            raise ValueError("files: got no path, wanted at least one path or glob; name the files of the source")
        if self.end_id is not None and self.end_id < 0:
            raise ValueError(f"end_id: got {self.end_id}, wanted an id >= 0; leave it out for the tokenizer's")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size: got {self.vocab_size}, wanted >= 1; leave it out for the tokenizer's")

    def open(self, tokenizer: Tokenizer, cache_dir: Path) -> Corpus:
        vocab_size = tokenizer.vocab_size if self.vocab_size is None else self.vocab_size
        if vocab_size > tokenizer.vocab_size:
            raise DataError(
                f"tokens source: vocab_size={vocab_size} exceeds the {tokenizer.vocab_size} ids of "
                f"data.tokenizer; use tokenizer='ids:{vocab_size}' or the tokenizer that made the files"
            )
        end_id = tokenizer.end_id if self.end_id is None else self.end_id
        files = expand_globs(self.files)
        arrays = [self._map(file) for file in files]
        key = {"end_id": end_id, "vocab_size": vocab_size, "dtypes": [array.dtype.str for array in arrays]}
        names = [str(file.resolve()) for file in files]
        key |= {"files": _identity(files, names), "tokenizer": tokenizer.fingerprint}

        def write(folder: Path) -> dict:
            counts, starts, lengths = [], [], []
            with ByteProgress("reading tokens", sum(array.nbytes for array in arrays)) as progress:
                for file, array in zip(files, arrays, strict=True):
                    file_starts, file_lengths = _find_documents(file, array, end_id, vocab_size, progress)
                    counts.append(len(file_starts))
                    starts.append(file_starts)
                    lengths.append(file_lengths)
            if not sum(counts):
                raise DataError(f"tokens source: no documents in {_listing(files)}; every id is the end id {end_id}")
            lengths = np.concatenate(lengths)
            zeros = np.zeros_like(lengths)
            num_bytes = lengths * (tokenizer.bytes_per_token or 0)
            table = DocumentTable(lengths=lengths, prompt_lengths=zeros, num_bytes=num_bytes)
            numbers = np.repeat(np.arange(len(files)), counts)
            save_documents(folder, files=numbers, starts=np.concatenate(starts), documents=table)
            return {"num_documents": len(lengths), "notes": []}

        return open_corpus(build_once(cache_dir, "tokens", key, write), arrays)

    def _map(self, file: Path) -> np.ndarray:
        if file.stat().st_size == 0:
            raise DataError(f"{file}: the file is empty; write its ids or leave it out")
        if file.suffix == ".bin":
            if self.dtype is None:
                raise DataError(f"{file}: a .bin file does not say its type; set the source's dtype, such as 'uint16'")
            dtype = np.dtype(self.dtype).newbyteorder("<")
            if file.stat().st_size % dtype.itemsize:
                raise DataError(
                    f"{file}: {file.stat().st_size} bytes are not whole {self.dtype} ids; set the dtype of the file"
                )
            return np.memmap(file, dtype, mode="r")
        if file.suffix != ".npy":
            raise DataError(f"{file}: got suffix {file.suffix!r}, wanted .npy, .bin; rename or convert the file")
        try:
            array = np.load(file, mmap_mode="r")
        except Exception as error:  # the header is parsed as Python, which raises many types for damaged ones
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{file}: not a .npy file ({reason}); save it with numpy.save") from None
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(f"{file}: got {array.dtype} {array.shape}, wanted integers in one dimension; save it again")
        if not len(array):
            raise DataError(f"{file}: the array is empty; write its ids or leave it out")
        if self.dtype is not None and array.dtype != self.dtype:
            raise DataError(
                f"{file}: the array is {array.dtype}, dtype says {self.dtype}; leave dtype out for .npy files"
            )
        return array


@dataclass(frozen=True, kw_only=True)
class GeneratedSource(SourceConfig):
    """What every kind of source has whose documents are computed when they are read."""

    min_length: int
    """Fewest tokens of a document. A document of n tokens fills n + 1 slots of a row."""

    max_length: int
    """Most tokens of a document. Set both to `seq_len - 1` for rows that one document fills exactly."""

    length_distribution: Literal["uniform", "log_uniform"] = "uniform"
    """How lengths spread between the two: evenly, or evenly in their logarithm (many short, few long)."""

    num_documents: int = 1024
    """Number of different documents."""

    seed: int = 0
    """Seed of the documents themselves, apart from the run's seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(min_length=1, num_documents=1, seed=0)
        self._check_range("min_length", "max_length")

    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        rng = np.random.default_rng(self.seed)
        if self.length_distribution == "uniform":
            return rng.integers(self.min_length, self.max_length, size=self.num_documents, endpoint=True)
        logs = rng.uniform(np.log(self.min_length), np.log(self.max_length + 1), self.num_documents)
        return np.clip(np.exp(logs).astype(np.int64), self.min_length, self.max_length)

    def _check_least(self, **least: int) -> None:
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted >= {value}; raise it")

    def _check_range(self, low: str, high: str) -> None:
        if getattr(self, high) < getattr(self, low):
            raise ValueError(
                f"{high}: got {getattr(self, high)}, wanted >= {low}={getattr(self, low)}; raise it or lower {low}"
            )


@dataclass(frozen=True, kw_only=True)
class SyntheticSource(GeneratedSource):
    """Generated documents, each a random pattern repeated: learnable, of any length, and free of files."""

    kind: ClassVar[str] = "synthetic"

    num_symbols: int = 64
    """Number of different ids in use, at most the tokenizer's ids without its end id."""

    min_period: int = 4
    """Fewest tokens of a pattern."""

    max_period: int = 16
    """Most tokens of a pattern. Longer patterns ask for attention over a longer way."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(num_symbols=1, min_period=1)
        self._check_range("min_period", "max_period")

    def open(self, tokenizer: Tokenizer, cache_dir: Path) -> Corpus:
        if self.num_symbols > tokenizer.vocab_size - 1:
            raise DataError(
                f"synthetic source: num_symbols={self.num_symbols} exceeds the {tokenizer.vocab_size - 1} ids of "
                f"data.tokenizer but the end id; lower it or use tokenizer='ids:{self.num_symbols + 1}'"
            )
        symbols = np.delete(np.arange(self.num_symbols + 1), min(tokenizer.end_id, self.num_symbols))
        return RepeatCorpus(
            lengths=self.lengths(),
            symbols=symbols,
            min_period=self.min_period,
            max_period=self.max_period,
            seed=self.seed,
            num_bytes=tokenizer.bytes_per_token or 0,
        )


def expand_globs(patterns: Iterable[str]) -> list[Path]:
    """Files of the patterns in their order, sorted within a pattern, each once.

    Raises: DataError for a path that is not there, or a glob that matches no file.
    """
    files: dict[str, Path] = {}
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        found = [path for path in found if os.path.isfile(path)]
        if not found:
            problem = "the glob matches no file" if glob.has_magic(pattern) else "no such file"
            if os.path.isdir(pattern):
                problem = "this is a folder"
            raise DataError(
                f"files: got {pattern!r}, {problem}; name a file or a glob that matches some, from the "
                f"folder {os.getcwd()} or in full"
            )
        for path in found:
            files.setdefault(os.path.realpath(path), Path(path))
    return list(files.values())


def _open_text(
    name: str,
    key: dict,
    files: list[Path],
    names: list[str],
    fields: Fields,
    tokenizer: Tokenizer,
    cache_dir: Path,
) -> Corpus:
    key = {"tokenizer": tokenizer.fingerprint, "files": _identity(files, names), **key}
    total_bytes = sum(file.stat().st_size for file in files)

    def write(folder: Path) -> dict:
        report = ReadReport()
        with (
            ByteProgress(f"tokenising {name}", total_bytes) as progress,
            TokenFile(folder, tokenizer.vocab_size) as out,
        ):
            documents = (d for file in files for d in read_documents(file, fields, report, progress))
            for batch in _batches(documents):
                _tokenise(batch, tokenizer, out, report)
            num_documents = out.finish()
        if not num_documents:
            raise DataError(f"{name} source: no document with text in {_listing(files)}; check the files and the field")
        return {"num_documents": num_documents, "notes": report.notes(name)}

    return open_corpus(build_once(cache_dir, name, key, write))


def _batches(documents: Iterator[TextDocument]) -> Iterator[list[TextDocument]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.prompt) + len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenise(batch: list[TextDocument], tokenizer: Tokenizer, out: TokenFile, report: ReadReport) -> None:
    # Apart, so that no token straddles the border between what carries loss and what does not.
    prompts = tokenizer.encode_batch([document.prompt for document in batch])
    texts = tokenizer.encode_batch([document.text for document in batch])
    for document, prompt, text in zip(batch, prompts, texts, strict=True):
        if not len(prompt) + len(text):
            report.num_empty += 1
            continue
        num_bytes = len(document.text.encode("utf-8"))
        out.add(np.concatenate([prompt, text]), prompt_length=len(prompt), num_bytes=num_bytes)


def _find_documents(
    file: Path, tokens: np.ndarray, end_id: int, vocab_size: int, progress: ByteProgress
) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the documents in a file; refuses ids out of the vocabulary."""
    ends = []
    for start in range(0, len(tokens), _SCAN_TOKENS):
        chunk = tokens[start : start + _SCAN_TOKENS]
        progress.advance(chunk.nbytes)
        outside = ((chunk < 0) | (chunk >= vocab_size)) & (chunk != end_id)
        if outside.any():
            place = int(np.argmax(outside))
            raise DataError(
                f"{file}: id {chunk[place]} at position {start + place}, wanted 0 to {vocab_size - 1}; use "
                "the tokenizer that made the file, or tokenizer='ids:N' with N above every id"
            )
        ends.append(np.flatnonzero(chunk == end_id) + start)
    ends = np.concatenate([*ends, [len(tokens)]])
    starts = np.concatenate([[0], ends[:-1] + 1])
    keep = ends > starts
    return starts[keep], (ends - starts)[keep]


def _identity(files: list[Path], names: list[str]) -> str:
    """Digest of the name, size and time of change of each file."""
    stats = [file.stat() for file in files]
    rows = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(names, stats, strict=True)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _listing(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{len(files)} files, such as {files[0]}"

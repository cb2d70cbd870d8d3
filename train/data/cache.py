"""A folder on disk that is built once per key, and the token file and document table that corpora keep there.

A folder is built under another name and renamed, so that one of the final name is complete, and any number of
processes may build the same one at the same time: the first to finish wins. What a killed builder leaves
behind is never opened, and removed by a builder a week later. The folders may be deleted whenever no run uses them.
"""

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from train.data.corpus import DocumentTable, StoredCorpus
from train.data.errors import DataError

FORMAT_VERSION = 1
_BUILDING = ".building-"
_ABANDONED_SECONDS = 7 * 24 * 3600
_INDEX = "index.json"
_TOKENS = "tokens.npy"
_DOCUMENTS = "documents.npy"  # int64 [5, documents]: file, start, length, prompt length, bytes


def build_once(cache_dir: Path, name: str, key: Mapping[str, Any], write: Callable[[Path], Mapping[str, Any]]) -> Path:
    """Returns the complete folder for `key`, building it if it is not there.

    Args:
      cache_dir: Where the folders lie; made if missing.
      name: Start of the folder's name, for people.
      key: Everything that the content depends on, as JSON values.
      write: Fills an empty folder and returns what to add to its index.
    Returns: the folder.
    Raises: DataError when `cache_dir` cannot be written; whatever `write` raises, with nothing left behind.
    """
    key = {"format_version": FORMAT_VERSION, **key}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir / f"{name}-{digest}"
    if (folder / _INDEX).exists():
        return folder
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache_dir)
        building = cache_dir / f"{_BUILDING}{folder.name}-{uuid.uuid4().hex}"
        building.mkdir()
    except OSError as error:
        raise DataError(
            f"data.cache_dir={str(cache_dir)!r} cannot be written: {error.strerror}; name another folder"
        ) from None
    try:
        index = {"key": key, **write(building)}
        (building / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        _publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _remove_abandoned(cache_dir: Path) -> None:
    """What builders that were killed have left: nothing in it was written for a week."""
    for folder in cache_dir.glob(f"{_BUILDING}*"):
        try:
            written = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except FileNotFoundError:  # just published, or removed by another
            continue
        if written < time.time() - _ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _publish(building: Path, folder: Path) -> None:
    try:
        building.rename(folder)
    except OSError:
        if (folder / _INDEX).exists():
            return  # somebody else has built the same in the meantime
        if not folder.exists():
            raise
        shutil.rmtree(folder)
        building.rename(folder)


def read_notes(folder: Path) -> list[str]:
    """Lines about the corpus that the user should see once, as its builder left them."""
    return json.loads((folder / _INDEX).read_text(encoding="utf-8"))["notes"]


class TokenFile:
    """Appends documents to a .npy file of tokens and keeps their table.

    The tokens go straight to the disk; uint16 where the vocabulary allows, else uint32.
    """

    def __init__(self, folder: Path, vocab_size: int):
        self._folder = folder
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._num_tokens = 0
        self._chunks: list[np.ndarray] = []
        self._recent: list[tuple[int, int, int, int, int]] = []

    def __enter__(self) -> "TokenFile":
        self._file: BinaryIO = open(self._folder / _TOKENS, "wb")
        self._header_size = self._write_header()
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, tokens: np.ndarray, *, prompt_length: int, num_bytes: int) -> None:
        self._file.write(tokens.astype(self._dtype).tobytes())
        self._recent.append((0, self._num_tokens, len(tokens), prompt_length, num_bytes))
        self._num_tokens += len(tokens)
        if len(self._recent) == 1 << 16:  # as Python integers the table would take ten times the memory
            self._chunks.append(np.array(self._recent, np.int64))
            self._recent = []

    def finish(self) -> int:
        """Writes the table and the final header; returns the number of documents."""
        self._file.seek(0)
        assert self._write_header() == self._header_size, "a .npy header keeps its size as the array grows"
        table = np.concatenate([*self._chunks, np.array(self._recent, np.int64).reshape(-1, 5)])
        np.save(self._folder / _DOCUMENTS, np.ascontiguousarray(table.T))
        return len(table)

    def _write_header(self) -> int:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._num_tokens,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()


def save_documents(folder: Path, *, files: np.ndarray, starts: np.ndarray, documents: DocumentTable) -> None:
    """Writes the table of documents whose tokens lie in the user's own files."""
    columns = (files, starts, documents.lengths, documents.prompt_lengths, documents.num_bytes)
    np.save(folder / _DOCUMENTS, np.stack(columns).astype(np.int64))


def open_corpus(folder: Path, arrays: list[np.ndarray] | None = None) -> StoredCorpus:
    """Opens a complete folder through memory maps; `arrays` are the user's own token files if it has none.

    Raises: DataError when what lies in it is damaged, or some of it was deleted.
    """
    try:
        if arrays is None:
            arrays = [np.load(folder / _TOKENS, mmap_mode="r")]
        table = np.asarray(np.load(folder / _DOCUMENTS, mmap_mode="r"))  # a plain view is quicker to index
        files, starts, lengths, prompt_lengths, num_bytes = table
        notes = read_notes(folder)
    except Exception as error:  # a damaged header is parsed as Python, which raises many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{folder}: damaged in data.cache_dir ({reason}); delete that folder to make it anew") from None
    documents = DocumentTable(lengths=lengths, prompt_lengths=prompt_lengths, num_bytes=num_bytes)
    return StoredCorpus(arrays, files=files, starts=starts, documents=documents, notes=notes)

"""Tokenizers: bytes, a Hugging Face tokenizer.json, or bare ids.

A tokenizer turns text into ids below `vocab_size`, none of which is the end id, which the packing puts
between documents.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from train.data.errors import DataError

# Names of the end-of-document token in published tokenizers; the first that the vocabulary holds is used.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|endofdocument|>", "[SEP]")
NUM_BYTE_VALUES = 256
_MOST_IDS_A_TOKEN = 16  # more of them in a tokenizer.json is damage, not a gap for tokens to come
_IDS_TO_SPARE = 1024
_PART = 1 << 20
_BLANK = re.compile(r"\s")


@runtime_checkable
class Tokenizer(Protocol):
    """What the data pipeline and the sampler need of a tokenizer.

    Attributes:
      vocab_size: One more than the largest id.
      end_id: Id that stands between documents.
      fingerprint: Two tokenizers with the same fingerprint give the same ids; part of the cache key.
      bytes_per_token: Source bytes of every token where that is a constant, else None.
    """

    vocab_size: int
    end_id: int
    fingerprint: str
    bytes_per_token: int | None

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """Ids of the text, without any special token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """Ids of each text; the same as `encode` on each, in parallel where the tokenizer can."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; ids that stand for no text are left out, broken UTF-8 is replaced."""
        ...


class ByteTokenizer:
    """The 256 byte values of UTF-8 text, and the end id 256."""

    vocab_size = NUM_BYTE_VALUES + 1
    end_id = NUM_BYTE_VALUES
    fingerprint = "bytes"
    bytes_per_token: int | None = 1

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        values = ids[(ids >= 0) & (ids < NUM_BYTE_VALUES)]
        return values.astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class IdTokenizer:
    """Bare ids below `vocab_size`, the last of which is the end id: for `tokens` and `synthetic` sources.

    Its text form is the ids in decimal, separated by blanks.
    """

    bytes_per_token: int | None = None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.end_id = vocab_size - 1
        self.fingerprint = f"ids-{vocab_size}"

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        return np.concatenate([np.array([], np.int32), *(self._ids(part.split()) for part in _parts(text))])

    def _ids(self, words: list[str]) -> Int32[np.ndarray, " tokens"]:
        for word in words:
            if not (word.isascii() and word.isdigit() and len(word) < 20 and int(word) < self.end_id):
                raise DataError(
                    f"data.tokenizer='ids:{self.vocab_size}': got text {word[:40]!r}, wanted ids from 0 to "
                    f"{self.end_id - 1} separated by blanks; use 'bytes' or a tokenizer.json for text"
                )
        return np.array([int(word) for word in words], np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return " ".join(str(int(i)) for i in ids)


def _parts(text: str) -> Iterator[str]:
    """A text in parts of some length that end where a word does: as objects its words take many times its memory."""
    start = 0
    while start < len(text):
        blank = _BLANK.search(text, start + _PART)
        end = len(text) if blank is None else blank.start()
        yield text[start:end]
        start = end


class HuggingFaceTokenizer:
    """A tokenizer.json file of the `tokenizers` library, which takes some 70 bytes of memory a byte of a document."""

    bytes_per_token: int | None = None

    def __init__(self, path: Path, *, end_token: str | None = None):
        try:
            import tokenizers
        except ImportError:
            raise DataError(
                f"data.tokenizer={str(path)!r} needs the tokenizers package; install 'longctx-jax[hf]'"
            ) from None
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"data.tokenizer={str(path)!r} cannot be read: {error.strerror}; wanted 'bytes', 'ids:N' or "
                "the path of a tokenizer.json; name one that is there"
            ) from None
        try:
            json.loads(content)
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception for whatever is wrong with a file
            raise DataError(
                f"data.tokenizer={str(path)!r} is not a tokenizer.json ({' '.join(str(error).split())}); "
                "save it again with tokenizer.save(...) or tokenizer.save_pretrained(...)"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > _MOST_IDS_A_TOKEN * len(vocabulary) + _IDS_TO_SPARE:
            raise DataError(
                f"data.tokenizer={str(path)!r}: its greatest id is {self.vocab_size - 1} for {len(vocabulary)} tokens, "
                "wanted ids that follow each other, since the model has a row for each; number its tokens anew"
            )
        candidates = END_TOKENS if end_token is None else (end_token,)
        found = [token for token in candidates if token in vocabulary]
        if not found:
            wanted = "one of " + ", ".join(END_TOKENS) if end_token is None else repr(end_token)
            raise DataError(
                f"data.tokenizer={str(path)!r} holds no end-of-document token: wanted {wanted}; name a token "
                "of its vocabulary in data.end_token"
            )
        self.end_id = vocabulary[found[0]]
        self.fingerprint = f"hf-{hashlib.sha256(content).hexdigest()[:16]}-{self.end_id}"

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        arrays = [np.asarray(encoding.ids, np.int32) for encoding in encodings]
        # A text that spells out the end token would otherwise end the document in the middle.
        return [ids[ids != self.end_id] for ids in arrays]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        inside = [int(i) for i in ids if 0 <= int(i) < self.vocab_size]
        return self._tokenizer.decode(inside, skip_special_tokens=True)


def open_tokenizer(name: str, *, end_token: str | None = None) -> Tokenizer:
    """Opens the tokenizer that `data.tokenizer` names.

    Args:
      name: "bytes", "ids:N" or the path of a tokenizer.json (or of the folder that holds one).
      end_token: Token of a tokenizer.json that stands between documents; None looks for a common one.
    Returns: the tokenizer.
    Raises: DataError when the file is missing or broken, has no end token, or `tokenizers` is not installed.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name.startswith("ids:"):
        return IdTokenizer(int(name.removeprefix("ids:")))
    path = Path(name)
    return HuggingFaceTokenizer(path / "tokenizer.json" if path.is_dir() else path, end_token=end_token)

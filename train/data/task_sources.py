"""Sources of tasks: what a config says of the documents that tasks.py makes."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from train.data.corpus import Corpus
from train.data.errors import DataError
from train.data.sources import GeneratedSource
from train.data.tasks import Filler, Loss, MqarCorpus, PasskeyCorpus, passkey_parts
from train.data.tokenizers import Tokenizer

_NUM_DOCUMENTS = 1 << 17  # enough that a short run sees none twice


@dataclass(frozen=True, kw_only=True)
class PasskeySource(GeneratedSource):
    """Generated documents that hide a key in filler and ask for it at the end (passkey retrieval, arXiv:2305.16300).

    The text is the paper's; with `tokenizer: ids:N`, ids that stand for it. Evaluation tells how often the whole key is
    right, by the depth at which it is hidden.
    """

    kind: ClassVar[str] = "passkey"

    num_documents: int = _NUM_DOCUMENTS
    """Number of different documents."""

    key_length: int = 5
    """Digits of the key."""

    filler: Filler = "cycle"
    """What hides the key: `cycle` the paper's five sentences in turn, `shuffled` the same at random, `noise` the ids of
    these sentences at random, which no two blocks of tokens have in common."""

    loss: Loss = "answers"
    """Where loss is: on the key's digits after the question (`answers`), or on all tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(key_length=1)

    def open(self, tokenizer: Tokenizer, cache_dir: Path) -> Corpus:
        parts = passkey_parts(tokenizer)
        least = parts.num_fixed(self.key_length)
        if self.min_length < least:
            raise DataError(
                f"passkey source: got min_length={self.min_length}, wanted at least {least}, the tokens of the key, of "
                "what stands around it and of the question; raise it or lower key_length"
            )
        return PasskeyCorpus(
            lengths=self.lengths(),
            parts=parts,
            key_length=self.key_length,
            filler=self.filler,
            loss=self.loss,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class MqarSource(GeneratedSource):
    """Generated documents of pairs of a key and a value, in which every key comes again and its value is asked for
    (multi-query associative recall, arXiv:2312.04927)."""

    kind: ClassVar[str] = "mqar"

    num_documents: int = _NUM_DOCUMENTS
    """Number of different documents."""

    min_pairs: int = 64
    """Fewest pairs of a document."""

    max_pairs: int = 64
    """Most pairs of a document, each of which takes four tokens of min_length, and two ids."""

    power: float = 0.01
    """Of the power law of the gaps between pairs and queries: 1 spreads queries evenly, near 0 most come soon."""

    loss: Loss = "answers"
    """Where loss is: on the values that are asked for (`answers`), or on all tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(min_pairs=1)
        self._check_range("min_pairs", "max_pairs")
        if not 0 <= self.power <= 1:
            raise ValueError(f"power: got {self.power}, wanted 0 <= power <= 1; 0.01 is customary")
        if self.min_length < 4 * self.max_pairs:
            raise ValueError(
                f"min_length: got {self.min_length}, wanted >= {4 * self.max_pairs}, four tokens for each of "
                f"max_pairs={self.max_pairs}; raise it or lower max_pairs"
            )

    def open(self, tokenizer: Tokenizer, cache_dir: Path) -> Corpus:
        symbols = np.delete(np.arange(tokenizer.vocab_size), tokenizer.end_id)
        if len(symbols) < 2 * self.max_pairs:
            raise DataError(
                f"mqar source: got max_pairs={self.max_pairs} with the {len(symbols)} ids of data.tokenizer but the "
                f"end id, wanted two ids a pair; lower it or use tokenizer='ids:{2 * self.max_pairs + 1}' or more"
            )
        rng = np.random.default_rng([self.seed, self.num_documents])
        return MqarCorpus(
            lengths=self.lengths(),
            num_pairs=rng.integers(self.min_pairs, self.max_pairs, size=self.num_documents, endpoint=True),
            symbols=symbols,
            power=self.power,
            loss=self.loss,
            seed=self.seed,
        )

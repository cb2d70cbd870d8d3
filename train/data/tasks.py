"""Tasks whose answers stand in their own context: what attention must find, and what a state must remember."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int, Integer

from train.data.corpus import DocumentTable, TaskCorpus, TaskDocument
from train.data.errors import DataError
from train.data.tokenizers import IdTokenizer, Tokenizer

Loss = Literal["answers", "all"]
Filler = Literal["cycle", "shuffled", "noise"]
Ids = Integer[np.ndarray, "tokens"]

NUM_DEPTHS = 5

# The text of Mohtashami and Jaggi; the question is the beginning of its answer.
_PREAMBLE = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there. "
)
_SENTENCES = (
    "The grass is green. ",
    "The sky is blue. ",
    "The sun is yellow. ",
    "Here we go. ",
    "There and back again. ",
)
_BEFORE_KEY, _BETWEEN_KEYS, _AFTER_KEYS = "The pass key is ", ". Remember it. ", " is the pass key. "
_QUESTION = "What is the pass key? The pass key is "
_DIGITS = "0123456789"

_NUM_MARKS = 5  # ids that stand for what the text says around the key and in the question
_SENTENCE_LENGTH = 8  # ids of a sentence, where the tokenizer has no text


@dataclass(frozen=True, kw_only=True)
class PasskeyParts:
    """What a passkey document is put together from, as ids; `sentences` are the filler."""

    digits: Ids
    preamble: Ids
    sentences: tuple[Ids, ...]
    before_key: Ids
    between_keys: Ids
    after_keys: Ids
    question: Ids

    def num_fixed(self, key_length: int) -> int:
        """Tokens of a document without its filler."""
        fixed = (self.preamble, self.before_key, self.between_keys, self.after_keys, self.question)
        return sum(map(len, fixed)) + 3 * key_length


def passkey_parts(tokenizer: Tokenizer) -> PasskeyParts:
    """The paper's text in the tokenizer's ids or, of bare ids, some that stand for it.

    Raises: DataError where the tokenizer has too few ids, or no id of its own for each digit.
    """
    if isinstance(tokenizer, IdTokenizer):
        return _parts_of_ids(tokenizer)
    digits = np.array([tokenizer.encode(digit)[-1] for digit in _DIGITS])
    if len(np.unique(digits)) < len(digits):
        raise DataError(
            "passkey source: data.tokenizer has ids for fewer than ten digits, wanted one for each; use 'bytes', "
            "'ids:N' or another tokenizer.json"
        )
    return PasskeyParts(
        digits=digits,
        preamble=tokenizer.encode(_PREAMBLE),
        sentences=tuple(tokenizer.encode(sentence) for sentence in _SENTENCES),
        before_key=tokenizer.encode(_BEFORE_KEY),
        between_keys=tokenizer.encode(_BETWEEN_KEYS),
        after_keys=tokenizer.encode(_AFTER_KEYS),
        question=tokenizer.encode(_QUESTION),
    )


def _parts_of_ids(tokenizer: IdTokenizer) -> PasskeyParts:
    """Ids 0 to 9 are the digits, the next mark the key and the question, and the others fill sentences."""
    num_reserved = len(_DIGITS) + _NUM_MARKS
    num_words = tokenizer.end_id - num_reserved
    if num_words < 1:
        raise DataError(
            f"passkey source: got data.tokenizer='ids:{tokenizer.vocab_size}', wanted 'ids:{num_reserved + 2}' or "
            f"more, for ten digits, {_NUM_MARKS} marks, the filler and the end id; raise N"
        )
    before, is_key, between, after, asked = np.arange(len(_DIGITS), num_reserved)
    words = np.random.default_rng(0).integers(num_words, size=(len(_SENTENCES), _SENTENCE_LENGTH))
    return PasskeyParts(
        digits=np.arange(len(_DIGITS)),
        preamble=np.arange(0),
        sentences=tuple(num_reserved + words),
        before_key=np.array([before, is_key]),
        between_keys=np.array([between]),
        after_keys=np.array([after]),
        question=np.array([asked, before, is_key]),
    )


def _table(lengths: Int[np.ndarray, " documents"]) -> DocumentTable:
    zeros = np.zeros_like(lengths)
    return DocumentTable(lengths=lengths, prompt_lengths=zeros, num_bytes=zeros)


class PasskeyCorpus(TaskCorpus):
    """Filler that hides a key at a random depth, and a question for the key at the end.

    preamble, filler, "The pass key is KEY. Remember it. KEY is the pass key.", filler, "... The pass key is KEY"

    The answer is the last KEY; its group, the depth at which the first stands in the filler. A document has exactly its
    length: the filler begins in the middle of a sentence where it must.

    Args:
      lengths: Tokens of each document, at least `parts.num_fixed(key_length)`.
      parts: What documents are made of.
      key_length: Digits of the key.
      filler: Sentences in turn, at random, or the ids of all sentences at random.
      loss: On the answer, or on all tokens.
      seed: Of the documents.

    Reference: Mohtashami and Jaggi, Landmark Attention, arXiv:2305.16300, section 4.2.
    """

    def __init__(
        self,
        *,
        lengths: Int[np.ndarray, " documents"],
        parts: PasskeyParts,
        key_length: int,
        filler: Filler,
        loss: Loss,
        seed: int,
    ):
        self.documents = _table(lengths)
        bounds = np.linspace(0, 100, NUM_DEPTHS + 1, dtype=int)
        self.answer_groups = tuple(
            f"passkey_depth_{low}_{high}" for low, high in zip(bounds[:-1], bounds[1:], strict=True)
        )
        self.loss = loss
        self._parts, self._key_length, self._seed = parts, key_length, seed
        self._filler = filler
        self._words = np.concatenate(parts.sentences)
        self._ends = np.cumsum([len(sentence) for sentence in parts.sentences])

    def document(self, document: int) -> TaskDocument:
        rng = np.random.default_rng([self._seed, int(document)])
        parts = self._parts
        key = parts.digits[rng.integers(len(parts.digits), size=self._key_length)]
        length = int(self.documents.lengths[document])
        filler, borders = self._fill(length - parts.num_fixed(self._key_length), rng)
        wanted = rng.random() * len(filler)
        place = borders[np.searchsorted(borders, wanted, side="right") - 1]
        info = (parts.before_key, key, parts.between_keys, key, parts.after_keys)
        tokens = np.concatenate([parts.preamble, filler[:place], *info, filler[place:], parts.question, key])
        answers = np.full(length, -1)
        answers[-self._key_length :] = 0
        group = int(place / max(len(filler), 1) * NUM_DEPTHS)
        return TaskDocument(tokens=tokens, answers=answers, group=min(group, NUM_DEPTHS - 1))

    def _fill(self, length: int, rng: np.random.Generator) -> tuple[Ids, Int[np.ndarray, " borders"]]:
        """So many ids of filler, and where a key may stand among them: 0, borders of sentences, the end."""
        if self._filler == "noise":
            return self._words[rng.integers(len(self._words), size=length)], np.arange(length + 1)
        sizes = np.diff(self._ends, prepend=0)
        num_sentences = length // int(sizes.min()) + 1
        if self._filler == "cycle":
            order = (rng.integers(len(sizes)) + np.arange(num_sentences)) % len(sizes)
        else:
            order = rng.integers(len(sizes), size=num_sentences)
        # From the end, so that the last sentence is whole: of each id, its sentence, and its place in that.
        lengths = sizes[order]
        stops = np.cumsum(lengths)
        slots = np.arange(stops[-1] - length, stops[-1])
        sentence = np.searchsorted(stops, slots, side="right")
        filler = self._words[self._ends[order[sentence]] - (stops[sentence] - slots)]
        borders = stops - (stops[-1] - length)
        return filler, np.concatenate([[0], borders[borders > 0]])


class MqarCorpus(TaskCorpus):
    """Multi-query associative recall: keys with their values, and later each key again, whose value must follow.

    k1 v1 k2 v2 ... kN vN, then slots of two tokens, of which N hold a key and its value and the others values at random

    The gap between the pairs and a key's query follows a power law, p(gap) ~ gap^(power - 1), without two in one slot.
    Keys are ids of the lower half, values of the upper; the values of a document are distinct, and no key stands
    anywhere else. Each queried value is an answer; its group, how many pairs its document has.

    Args:
      lengths: Tokens of each document, at least 4 num_pairs.
      num_pairs: Pairs of each document.
      symbols: Ids to draw from, each half of them at least as many as pairs.
      power: Of the power law; 1 spreads queries evenly, near 0 most come soon.
      loss: On the queried values, or on all tokens.
      seed: Of the documents.

    Reference: Arora et al., Zoology, arXiv:2312.04927, section 4 and appendix E. There the value does not follow the
      query as a token; and what fills the other slots may be any id.
    """

    def __init__(
        self,
        *,
        lengths: Int[np.ndarray, " documents"],
        num_pairs: Int[np.ndarray, " documents"],
        symbols: Ids,
        power: float,
        loss: Loss,
        seed: int,
    ):
        self.documents = _table(lengths)
        self.loss = loss
        self._least_bits = int(num_pairs.min()).bit_length()
        sizes = range(self._least_bits, int(num_pairs.max()).bit_length() + 1)
        self.answer_groups = tuple(f"mqar_pairs_{2 ** (bits - 1)}_{2**bits - 1}" for bits in sizes)
        self._num_pairs, self._power, self._seed = num_pairs, power, seed
        self._keys, self._values = symbols[: len(symbols) // 2], symbols[len(symbols) // 2 :]

    def document(self, document: int) -> TaskDocument:
        rng = np.random.default_rng([self._seed, int(document)])
        length, num_pairs = int(self.documents.lengths[document]), int(self._num_pairs[document])
        pairs = np.stack([rng.permutation(ids)[:num_pairs] for ids in (self._keys, self._values)], axis=1)
        queried = 2 * num_pairs + 2 * self._gaps((length - 2 * num_pairs) // 2, num_pairs, rng)
        tokens = self._values[rng.integers(len(self._values), size=length)]
        tokens[: 2 * num_pairs] = pairs.ravel()
        tokens[queried], tokens[queried + 1] = pairs.T
        answers = np.full(length, -1)
        answers[queried + 1] = np.arange(num_pairs)
        return TaskDocument(tokens=tokens, answers=answers, group=num_pairs.bit_length() - self._least_bits)

    def _gaps(self, num_slots: int, num_pairs: int, rng: np.random.Generator) -> Int[np.ndarray, " pairs"]:
        """Different slots, drawn one after the other in proportion to p: the largest of log p + Gumbel noise."""
        scores = (self._power - 1) * np.log(np.arange(1, num_slots + 1)) + rng.gumbel(size=num_slots)
        return np.argsort(-scores, kind="stable")[:num_pairs]

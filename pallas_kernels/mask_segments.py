"""Masks over segment ids that hold more than a document: the contexts of a prompt, and the levels of a document.

An id is an int32 of bit fields, the document (or prompt) above, so that ids of another document are never mixed up with
it, and negative ids are padding, which takes part in no pair. Ids never fall along a row whose tokens are in order;
then verdicts on tiles are tight, and in any other order they are on the safe side.
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pallas_kernels.mask import Bounds, Mask, TileVerdict

_ID_BITS = 31


@dataclasses.dataclass(frozen=True)
class Contexts(Mask):
    """The prompts of a row are made of contexts: a query may attend within its own, and in the last one to all of them.

    Segment ids are `prompt << bits | context`; the last context of a prompt has all of these bits set. Not causal: `&`
    it with Causal().

    Attributes:
      bits: Of the number of the context: a prompt has up to 2^bits, its last one included.

    Reference: Ma et al., Block-Attention for Efficient RAG, arXiv:2409.15355.
    """

    bits: int = 8

    def __post_init__(self):
        _check_bits("Contexts", self.bits)

    @property
    def uses_segments(self):
        return True

    def num_runs(self, length, gap):
        return 2  # the queries of a key: its own context, and the last

    def allowed(self, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        last = (1 << self.bits) - 1
        sees = (q_segment_ids == kv_segment_ids) | (q_segment_ids == (kv_segment_ids | last))
        return sees & (q_segment_ids >= 0) & (kv_segment_ids >= 0)

    def tile(self, q, kv):
        # Prompts whose last context may be among the queries, from this one to that.
        last = (1 << self.bits) - 1
        first_asked, last_asked = q.segment_min >> self.bits, (q.segment_max - last) >> self.bits
        first_told, last_told = kv.segment_min >> self.bits, kv.segment_max >> self.bits
        asks = jnp.maximum(jnp.maximum(first_asked, first_told), 0) <= jnp.minimum(last_asked, last_told)
        one_query_id, one_kv_id = q.segment_min == q.segment_max, kv.segment_min == kv.segment_max
        one_prompt = (first_told == last_told) & (q.segment_min == (kv.segment_min | last))
        within_one = (one_kv_id & (q.segment_min == kv.segment_min)) | one_prompt
        return TileVerdict(
            some=_overlap(q, kv) | asks,
            all=one_query_id & within_one & (q.segment_min >= 0) & (kv.segment_min >= 0),
        )


@dataclasses.dataclass(frozen=True)
class Hierarchy(Mask):
    """Documents of sections of sentences, each begun by an anchor token: a token attends along the tree that they make.

    A query may attend to its siblings (itself included), to its parent and to its children. So a token attends to those
    of its sentence and to the sentence's anchor; that to its tokens, to the anchors of the section's other sentences
    and to that of the section; and so on.

    Segment ids are `((document << section_bits | section) << sentence_bits | sentence) << 1 | is_token`. Sections and
    sentences count from 1; an anchor has zeros in the fields of what is below it, a document's in all three.

    Attributes:
      section_bits, sentence_bits: Of the number of a section in its document, and of a sentence in its section.
      sections: About how many sections a document has. A hint: an anchor of a section attends to as many scattered
        blocks, and with too low a number what lies between the last of them is visited too.

    Reference: He et al., HDT: Hierarchical Document Transformer, arXiv:2407.08330.
    """

    section_bits: int = 8
    sentence_bits: int = 12
    sections: int = 16

    def __post_init__(self):
        _check_bits("Hierarchy", self.section_bits, self.sentence_bits, 1)
        if self.sections < 1:
            raise ValueError(f"Hierarchy: sections={self.sections}, wanted a number >= 1")

    @property
    def uses_segments(self):
        return True

    def num_runs(self, length, gap):
        return self.sections

    def allowed(self, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        # Relatives are an anchor and what it is the anchor of: ids that differ in no field of a level and above, and
        # have zeros in those that are two levels lower.
        differs, either = q_segment_ids ^ kv_segment_ids, q_segment_ids | kv_segment_ids
        related = differs & -(1 << self._levels[0]) == 0
        for below, level in itertools.pairwise(self._levels):
            related |= (differs & -(1 << level) == 0) & (either & ((1 << below) - 1) == 0)
        return related & (either >= 0)

    def tile(self, q, kv):
        sentence = self._levels[0]
        some = _overlap(q, kv, sentence)
        for below, level in itertools.pairwise(self._levels):
            some |= _overlap(q, kv, level) & _may_have_zeros(q, below) & _may_have_zeros(kv, below)
        one_sentence = (q.segment_min >> sentence == kv.segment_min >> sentence) & (q.segment_min >= 0)
        for bounds in (q, kv):
            one_sentence &= bounds.segment_min >> sentence == bounds.segment_max >> sentence
        return TileVerdict(some=some, all=one_sentence & (kv.segment_min >= 0))

    @property
    def _levels(self) -> tuple[int, ...]:
        """Bits of an id that are below a sentence, a section, and a document."""
        return 1, 1 + self.sentence_bits, 1 + self.sentence_bits + self.section_bits


def _overlap(q: Bounds, kv: Bounds, shift: int = 0) -> ArrayLike:
    """Whether the ids of a tile's queries and keys, less the lowest bits, may have one in common that is no padding."""
    first = jnp.maximum(jnp.maximum(q.segment_min, kv.segment_min) >> shift, 0)
    return first <= jnp.minimum(q.segment_max, kv.segment_max) >> shift


def _may_have_zeros(bounds: Bounds, bits: int) -> ArrayLike:
    """Whether an id within the bounds that is no padding may have zeros in so many of the lowest bits."""
    return (jnp.maximum(bounds.segment_min, 0) - 1) >> bits < bounds.segment_max >> bits


def pack_ids(helper: str, row: ArrayLike, **fields: tuple[ArrayLike, int]) -> np.ndarray:
    """Segment ids of fields, the number of the row's document or prompt above them; -1 where that is negative.

    Args:
      helper: The function that users called, for the message.
      row: int.
      fields: Numbers and how many bits they have, the highest first.
    Returns: int32, of the arguments' broadcast shape.
    Raises: ValueError where a number does not fit.
    """
    row = np.asarray(row)
    ids = row.astype(np.int64)
    for name, (field, bits) in fields.items():
        check_field(helper, name, field, (1 << bits) - 1)
        ids = ids << bits | np.asarray(field).astype(np.int64)
    if ids.size and ids.max() >= 1 << _ID_BITS:
        raise ValueError(
            f"{helper}: {row.max()} does not fit in {_ID_BITS} bits with the other fields; take fewer bits for them"
        )
    return np.where(row < 0, -1, ids).astype(np.int32)


def check_field(helper: str, name: str, field: ArrayLike, most: int) -> None:
    """Raises ValueError unless the numbers of a field are from 0 to `most`."""
    field = np.asarray(field)
    if field.size and not (0 <= field.min() and field.max() <= most):
        raise ValueError(
            f"{helper}: {name} is from {field.min()} to {field.max()}, wanted from 0 to {most}; take more bits for it"
        )


def _check_bits(mask: str, *bits: int) -> None:
    if min(bits) < 1 or sum(bits) >= _ID_BITS:
        raise ValueError(f"{mask}: fields of {bits} bits, wanted >= 1 each and together < {_ID_BITS}")

"""The static sparse patterns that are measured, as data: each a mask as users write it, beside dense attention."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import BLOCK, DOCUMENTS, AttentionCase
from longctx import masks
from pallas_kernels import BlockSizes, Mask, Tokens, make_schedule

type Dense = Literal["dense causal", "dense full"]
DENSE: dict[Dense, Mask] = {"dense causal": masks.causal(), "dense full": masks.full()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatternCase(AttentionCase):
    """Self-attention of one shape under a sparse pattern, or the dense attention that it is compared with.

    Attributes:
      pattern: What it is called; of dense attention a key of DENSE.
      mask: The pattern. Where it differs between heads, figures are means over the heads.
      dense: The attention that it leaves pairs out of.
      segment_ids_of: Given the length, the segment ids, int32 `[length]`; None for masks that read none.
    """

    pattern: str
    mask: Mask
    dense: Dense
    segment_ids_of: Callable[[int], np.ndarray] | None = None

    @property
    def name(self) -> str:
        return f"{self.pattern} {self.shape_name}"

    @property
    def tokens(self) -> Tokens | None:
        if self.segment_ids_of is None:
            return None
        # With positions, as packed batches have them: a kernel does not compile a mask that reads none without them.
        positions = jnp.arange(self.length, dtype=jnp.int32)[None]
        return Tokens.self_attention(positions, jnp.asarray(self.segment_ids_of(self.length)[None], jnp.int32))

    @property
    def dense_case(self) -> "PatternCase":
        """Dense attention of the same shape."""
        return dataclasses.replace(self, pattern=self.dense, mask=DENSE[self.dense], segment_ids_of=None)

    @functools.cached_property
    def pairs(self) -> float:
        """(query, key) pairs of one row that the mask allows."""
        return self._mean_over_heads(_num_pairs)

    @functools.cached_property
    def blocks(self) -> float:
        """Tiles of BLOCK queries and BLOCK keys of one row that a schedule visits, of each head's own mask."""
        return self._mean_over_heads(_num_blocks)

    def _mean_over_heads(self, number: Callable[[Mask, Tokens, int], int]) -> float:
        by_head, tokens = self.mask.by_head(self.num_heads), self.tokens or Tokens()
        numbers = {mask: number(mask, tokens, self.length) for mask in set(by_head)}
        return sum(numbers[mask] for mask in by_head) / self.num_heads


def _num_pairs(mask: Mask, tokens: Tokens, length: int) -> int:
    """Counted by rows, with all keys of some at a time."""

    @jax.jit
    def of_rows(tokens):
        q, kv = tokens.queries(length), tokens.keys(length)

        def of_row(row):
            position, segment = row
            return jnp.sum(mask.allowed(position, kv.positions[0], segment, kv.segment_ids[0]), dtype=jnp.int32)

        return jax.lax.map(of_row, (q.positions[0], q.segment_ids[0]), batch_size=BLOCK)

    return int(np.asarray(of_rows(tokens)).sum(dtype=np.int64))


def _num_blocks(mask: Mask, tokens: Tokens, length: int) -> int:
    @jax.jit
    def visited(tokens):
        sizes = BlockSizes(block_q=BLOCK, block_kv=BLOCK)
        blocks = make_schedule(mask, tokens, q_len=length, kv_len=length, block_sizes=sizes).kv_blocks
        return jnp.sum(blocks.stop - blocks.start)

    return int(visited(tokens))


def packed_contexts(length: int) -> np.ndarray:
    """One prompt of 16 contexts as long as the documents of the blockwise family, the last of them the question."""
    lengths = np.diff(np.cumsum((0, *DOCUMENTS)) * length // sum(DOCUMENTS))
    context = np.repeat(np.arange(len(lengths)), lengths)
    return masks.context_ids(np.zeros(length, int), context, context == len(lengths) - 1)


def sections_of_sentences(length: int, *, section: int = 1024, sentence: int = 32) -> np.ndarray:
    """One document: its anchor, then sections and in them sentences of so many tokens, anchors included."""
    place = np.arange(length)
    section_number, in_section = np.divmod(np.maximum(place - 1, 0), section)
    sentence_number, in_sentence = np.divmod(np.maximum(in_section - 1, 0), sentence)
    is_document, is_section = place == 0, in_section == 0
    return masks.hierarchy_ids(
        np.zeros(length, int),
        np.where(is_document, 0, section_number + 1),
        np.where(is_section, 0, sentence_number + 1),
        ~is_section & (in_sentence > 0),
    )


def big_bird(length: int) -> Mask:
    """2 global blocks, a window of 3 blocks, and 3 blocks at random for each block of queries."""
    num, rng = length // BLOCK, np.random.default_rng(0)
    random_blocks = np.zeros((num, num), bool)
    for row in random_blocks:
        row[rng.choice(num, min(3, num), replace=False)] = True
    return (
        masks.global_tokens(2 * BLOCK) | masks.block_window(1, 1, block=BLOCK) | masks.block_table(random_blocks, BLOCK)
    )


def _case(pattern: str, mask: Mask, dense: Dense, length: int = 32768, heads: int = 16, head_dim: int = 128, **options):
    return PatternCase(
        pattern=pattern,
        mask=mask,
        dense=dense,
        batch_size=1,
        length=length,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        **options,
    )


_causal = functools.partial(_case, dense="dense causal")
_full = functools.partial(_case, dense="dense full")
_CUBE = (32, 32, 32)  # 32,768 tokens of a video

CASES = (
    _causal("window 4096 (Mistral)", masks.sliding_window(4095)),
    _causal(
        "4 sinks, window 4096 (StreamingLLM)", masks.causal() & (masks.sink_tokens(4) | masks.sliding_window(4095))
    ),
    _causal("chunks of 8192 (Llama 4)", masks.causal() & masks.chunked(8192)),
    _causal(
        "strided 128, tokens (Sparse Transformers)",
        masks.causal() & (masks.sliding_window(127) | masks.strided(128)),
    ),
    _causal(
        "strided 16, blocks (Sparse Transformers)",
        masks.causal() & (masks.block_window(15, block=BLOCK) | masks.strided(16, block=BLOCK)),
    ),
    _causal(
        "fixed 128 and 8, tokens (Sparse Transformers)", masks.causal() & (masks.chunked(128) | masks.summary(128, 8))
    ),
    _causal(
        "fixed 16 and 1, blocks (Sparse Transformers)",
        masks.causal() & (masks.chunked(16 * BLOCK) | masks.summary(16 * BLOCK, BLOCK)),
    ),
    # As Phi-3-small has it: the last 1024 tokens, and one block in 8.
    _causal("8 shards, 8 local blocks (S2-Attention)", masks.s2_shards(8, 8, block=BLOCK)),
    _causal(
        "window 1024, powers of two (PowerAttention)",
        masks.causal() & (masks.sink_tokens(BLOCK) | masks.block_window(7, block=BLOCK) | masks.powers_of_two(BLOCK)),
    ),
    _causal(
        "windows 1024 to 8192 (MoA)",
        masks.elastic_windows([(1024, 0), (2048, 0), (0, 1 / 8), (0, 1 / 4)], 32768, sinks=BLOCK, block=BLOCK),
    ),
    _causal("16 contexts (Block-Attention)", masks.causal() & masks.contexts(), segment_ids_of=packed_contexts),
    _full("global 128, window 512 (Longformer)", masks.global_tokens(128) | masks.sliding_window(256, 256)),
    _full("2 global, 3 local, 3 random blocks (Big Bird)", big_bird(32768)),
    _full("dilated window 2048, 1 in 4 (Longformer)", masks.dilated_window(1024, 4, right=1024)),
    _full("sections of sentences (HDT)", masks.hierarchy(sections=32), segment_ids_of=sections_of_sentences),
    _full("1-D, 2049 (NATTEN)", masks.neighborhood((32768,), 1024)),
    _full("2-D, 13 x 13 of 128 x 256 (NATTEN)", masks.neighborhood((128, 256), 6)),
    _full("3-D, 13 x 13 x 13 (NATTEN)", masks.neighborhood(_CUBE, 6)),
    _full("3-D, 16 x 16 x 24, stride 8 (GNA)", masks.strided_neighborhood(_CUBE, (16, 16, 24), 8)),
    _full(
        "3-D, 16 x 16 x 24, stride 8, by tiles (GNA)",
        masks.strided_neighborhood(_CUBE, (16, 16, 24), 8, tile_shape=(4, 4, 8)),
    ),
    _full(
        "3-D, blocks of 16 x 16 x 16, by tiles (GNA)",
        masks.strided_neighborhood(_CUBE, 16, 16, tile_shape=(4, 4, 8)),
    ),
    _full(
        "3-D, 3 x 3 x 3 tiles of 8 x 8 x 8, by tiles (sliding tile attention)",
        masks.strided_neighborhood(_CUBE, 24, 8, tile_shape=(8, 8, 8)),
    ),
)

SMOKE = (
    _causal("shards", masks.s2_shards(2, 1, block=BLOCK), length=512, heads=2, head_dim=16),
    _causal(
        "contexts", masks.causal() & masks.contexts(), length=512, heads=2, head_dim=16, segment_ids_of=packed_contexts
    ),
    _full("cube", masks.strided_neighborhood((8, 8, 8), 4, 2), length=512, heads=2, head_dim=16),
)

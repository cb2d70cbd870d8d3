"""How documents are cut into the blocks of Native Sparse Attention, and what each query may see of them.

Every document is cut from its own start: into blocks of `compress_block` tokens, one every `compress_stride`, which are
compressed to one key each, of them only those that are whole; and into blocks of `block_size`, which are selected, the
last of a document as long as it comes out. Both kinds are numbered along the row.

Shapes: b is B or 1; M_c compressed blocks, M selected ones, W of them whole. All int32.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from pallas_kernels.sparse.choose import lists_of
from pallas_kernels.tokens import PADDING_SEGMENT_ID, Tokens

ALWAYS_CHOSEN = 3
"""Blocks of a document that a query always attends to: the first, the one before its own, and its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NsaSizes:
    """How much each branch sees.

    Attributes:
      compress_block: Tokens that are compressed to one key, l.
      compress_stride: Tokens from the start of one such block to the next, d; divides compress_block and block_size.
      block_size: Tokens of a block that is selected, l', at least compress_block.
      num_blocks: Blocks that are selected at most, n, the three that always are among them.
      window: Tokens of the sliding window, a query's own among them.
    """

    compress_block: int = 32
    compress_stride: int = 16
    block_size: int = 64
    num_blocks: int = 16
    window: int = 512

    def __post_init__(self):
        for name in ("compress_block", "compress_stride", "block_size", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted a number of tokens >= 1")
        for name in ("compress_block", "block_size"):
            if getattr(self, name) % self.compress_stride:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, wanted a multiple of compress_stride={self.compress_stride}, "
                    "so that blocks begin together"
                )
        if self.block_size < self.compress_block:
            raise ValueError(
                f"block_size: got {self.block_size}, wanted at least compress_block={self.compress_block}, whose "
                "scores a block adds up"
            )
        if self.num_blocks < ALWAYS_CHOSEN:
            raise ValueError(
                f"num_blocks: got {self.num_blocks}, wanted a number of blocks >= {ALWAYS_CHOSEN}: the first, a "
                "query's own and the one before are always among them"
            )

    def num_compressed(self, length: int) -> int:
        """Compressed blocks that a row of this length has at most; 1, which is none, for a short one."""
        return max(1, (length - self.compress_block) // self.compress_stride + 1)

    def num_whole(self, length: int) -> int:
        """Whole blocks to select from that it has at most; 1, which is none, for a short one."""
        return max(1, length // self.block_size)


class BlockTables(NamedTuple):
    """The blocks of a row.

    Attributes:
      compressed_start: The row of k at which each compressed block begins, -1 where there is none, `[b, M_c]`.
      compressed_last: The place of its last token in its document.
      compressed_segment: Its document, negative where there is none.
      block_start: The row at which each block to select begins, `[b, M]`; 0 where there is none.
      whole_number: The number among these of each whole one, -1 where there is none, `[b, W]`.
      whole_compressed: The number of the compressed block that begins where it does.
    """

    compressed_start: jax.Array
    compressed_last: jax.Array
    compressed_segment: jax.Array
    block_start: jax.Array
    whole_number: jax.Array
    whole_compressed: jax.Array


class TokenBlocks(NamedTuple):
    """Where tokens stand, and which blocks they may see, each `[b, T]`.

    Attributes:
      place: The place of a token in its document.
      segment: Its document, negative for padding.
      row: Its place in the row.
      compressed_first, compressed_stop: The compressed blocks whose tokens it sees all: first <= number < stop.
      own: The number of the block to select that it is in; negative for padding.
      whole_first: The number among whole blocks of its document's first, if it has one.
    """

    place: jax.Array
    segment: jax.Array
    row: jax.Array
    compressed_first: jax.Array
    compressed_stop: jax.Array
    own: jax.Array
    whole_first: jax.Array

    def of_rows(self, rows: jax.Array) -> "TokenBlocks":
        """Of the tokens that stand in some rows, `[t]`."""
        return TokenBlocks(*(x[:, rows] for x in self))


def blocks_in_order(length: int, sizes: NsaSizes) -> tuple[BlockTables, TokenBlocks]:
    """`cut_documents` of one document: constants, so that the compiler need not fold any."""
    row = np.arange(length, dtype=np.int32)
    num_compressed, num_whole = sizes.num_compressed(length), sizes.num_whole(length)
    starts = np.arange(num_compressed, dtype=np.int32) * sizes.compress_stride
    is_block, is_whole = length >= sizes.compress_block, length >= sizes.block_size
    whole = np.arange(num_whole, dtype=np.int32)
    tables = BlockTables(
        compressed_start=starts if is_block else starts - 1,
        compressed_last=starts + sizes.compress_block - 1,
        compressed_segment=np.full_like(starts, 0 if is_block else PADDING_SEGMENT_ID),
        block_start=np.arange(0, length, sizes.block_size, dtype=np.int32),
        whole_number=whole if is_whole else whole - 1,
        whole_compressed=whole * (sizes.block_size // sizes.compress_stride),
    )
    tables, tokens = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.int32),
        (BlockTables(*(x[None] for x in tables)), tokens_in_order(row[None], sizes)),
    )
    return tables, tokens


def tokens_in_order(row: jax.Array | np.ndarray, sizes: NsaSizes) -> TokenBlocks:
    """The tokens at these places, `[1, T]`, of rows of one document each."""
    zeros = row * 0
    return TokenBlocks(
        place=row,
        segment=zeros,
        row=row,
        compressed_first=zeros,
        compressed_stop=_num_seen(row, sizes),
        own=row // sizes.block_size,
        whole_first=zeros,
    )


def cut_documents(segment_ids: Int32[Array, "b T"], sizes: NsaSizes) -> tuple[BlockTables, TokenBlocks]:
    """Cuts each document of a row into blocks.

    Args:
      segment_ids: In the order of the sequence, the tokens of a document together; negative for padding.
    Returns: of M the tables have T: a row may be of as many documents.
    Cost: O(T) elementwise and a few prefix sums.
    """
    length = segment_ids.shape[1]
    row = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segment_ids.shape)
    is_token = segment_ids >= 0
    begins_document = jnp.concatenate(
        [jnp.ones_like(is_token[:, :1]), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    start = jax.lax.cummax(jnp.where(begins_document, row, 0), axis=1)
    place = row - start
    # Where the next document begins, from the right.
    ends = jnp.concatenate([begins_document[:, 1:], jnp.ones_like(is_token[:, :1])], axis=1)
    stop = jax.lax.cummin(jnp.where(ends, row + 1, length), axis=1, reverse=True)

    def begin(every: int, whole: int) -> jax.Array:
        """Whether a block begins at a token: one every so many, of which so many tokens are there."""
        return is_token & (place % every == 0) & (row + whole <= stop)

    def at_start(x: jax.Array) -> jax.Array:
        """What the first token of a token's document has, of what never decreases."""
        return jax.lax.cummax(jnp.where(begins_document, x, 0), axis=1)

    def before(is_block: jax.Array) -> jax.Array:
        return jnp.cumsum(is_block, axis=1, dtype=jnp.int32) - is_block.astype(jnp.int32)

    begins_compressed = begin(sizes.compress_stride, sizes.compress_block)
    begins, begins_whole = begin(sizes.block_size, 1), begin(sizes.block_size, sizes.block_size)
    number = before(begins) + begins.astype(jnp.int32) - 1

    compressed_start = lists_of(begins_compressed, sizes.num_compressed(length))
    whole_start = lists_of(begins_whole, sizes.num_whole(length))

    def at(x: jax.Array, rows: jax.Array, fill: int) -> jax.Array:
        return jnp.where(rows >= 0, jnp.take_along_axis(x, jnp.maximum(rows, 0), axis=1), fill)

    first = at_start(before(begins_compressed))
    tables = BlockTables(
        compressed_start=compressed_start,
        compressed_last=at(place, compressed_start, 0) + sizes.compress_block - 1,
        compressed_segment=at(segment_ids, compressed_start, PADDING_SEGMENT_ID),
        block_start=jnp.maximum(lists_of(begins, length), 0),
        whole_number=at(number, whole_start, -1),
        whole_compressed=at(before(begins_compressed), whole_start, 0),
    )
    tokens = TokenBlocks(
        place=place,
        segment=segment_ids,
        row=row,
        compressed_first=first,
        compressed_stop=first + jnp.where(is_token, _num_seen(place, sizes), 0),
        own=jnp.where(is_token, number, -1),
        whole_first=at_start(before(begins_whole)),
    )
    return tables, tokens


def blocks_of(segment_ids: Int32[Array, "b T"] | None, length: int, sizes: NsaSizes) -> tuple[BlockTables, TokenBlocks]:
    """The blocks of rows of packed documents, or where None of rows of one document each."""
    return blocks_in_order(length, sizes) if segment_ids is None else cut_documents(segment_ids, sizes)


def compressed_tokens(tables: BlockTables, queries: TokenBlocks) -> Tokens:
    """The tokens of the attention to compressed keys: a key stands where the last token of its block does."""
    return Tokens(
        q_positions=queries.place,
        q_segment_ids=queries.segment,
        kv_positions=tables.compressed_last,
        kv_segment_ids=tables.compressed_segment,
    )


def _num_seen(place, sizes: NsaSizes):
    """Compressed blocks of a document that end at or before a place in it."""
    return ((place + 1 - sizes.compress_block + sizes.compress_stride) // sizes.compress_stride).clip(0)

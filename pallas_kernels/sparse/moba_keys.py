"""The keys of whole chunks, in blocks that have one chunk each, and the schedule of lists of queries over them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.mask import Full, Mask, SameDocument
from pallas_kernels.schedule import BlockRanges, Schedule, longest_first
from pallas_kernels.sparse.moba_route import LIST_BLOCK, Chunks, Route
from pallas_kernels.tokens import Leaf, Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkKeys:
    """How the keys of whole chunks are laid out: chunk by chunk, each filled up to whole blocks of LIST_BLOCK keys.

    Attributes:
      num_chunks: How many there is room for, M.
      chunk_size: Keys of a chunk, C.
      token: The token in each place, int32 `[B or 1, M padded C]`, any where there is none; None where tokens already
        stand like that.
      place: The place of each token, int32 `[B or 1, T]`; M padded C where it is of no whole chunk.
    """

    num_chunks: int = dataclasses.field(metadata={"static": True})
    chunk_size: int = dataclasses.field(metadata={"static": True})
    token: Leaf = None
    place: Leaf = None

    @classmethod
    def of(cls, chunks: Chunks, chunk_size: int, *, in_order: bool) -> "ChunkKeys":
        """Those of these tokens; `in_order` says that they are one document from position 0 on."""
        length = chunks.whole.shape[1]
        keys = cls(num_chunks=length // chunk_size, chunk_size=chunk_size)
        if in_order and chunk_size % LIST_BLOCK == 0:
            return keys
        place = jnp.where(chunks.whole >= 0, chunks.whole * keys.padded_size + chunks.offset, keys.num_places)
        tokens = jnp.arange(length, dtype=jnp.int32)
        empty = jnp.zeros((keys.num_places,), jnp.int32)
        token = jax.vmap(lambda place: empty.at[place].set(tokens, mode="drop"))(place)
        return dataclasses.replace(keys, token=token, place=place)

    @property
    def padded_size(self) -> int:
        return -(-self.chunk_size // LIST_BLOCK) * LIST_BLOCK

    @property
    def num_places(self) -> int:
        return self.num_chunks * self.padded_size

    def of_tokens(self, x: Float[Array, "B T K H"]) -> Float[Array, "B P K H"]:
        """The keys, or values, in their places P."""
        if self.token is None:
            return x[:, : self.num_places]
        return _taken(x, self.token)

    def to_tokens(self, x: Float[Array, "B P K H"], length: int) -> Float[Array, "B T K H"]:
        """The transpose of `of_tokens`."""
        if self.token is None:
            return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
        is_there = (self.place < self.num_places)[..., None, None]
        return jnp.where(is_there, _taken(x, jnp.minimum(self.place, self.num_places - 1)), jnp.zeros((), x.dtype))

    @property
    def mask(self) -> Mask:
        """Which places a row of a list of their chunk may attend to."""
        return Full() if self.padded_size == self.chunk_size else SameDocument()

    def tokens(self, num_rows: int) -> Tokens | None:
        """Of the call: what fills chunks up is of no document."""
        if self.padded_size == self.chunk_size:
            return None
        is_key = np.arange(self.num_places) % self.padded_size < self.chunk_size
        zeros = jnp.zeros((1, num_rows), jnp.int32)
        return Tokens(
            q_positions=zeros,
            q_segment_ids=zeros,
            kv_positions=jnp.zeros((1, self.num_places), jnp.int32),
            kv_segment_ids=jnp.asarray(np.where(is_key, 0, -1)[None], jnp.int32),
        )

    def schedule(self, route: Route, batch_size: int) -> Schedule:
        """Each block of rows of a list visits the blocks of its chunk; of each kv head its own lists.

        Cost: O(B K (L + P) / 128), L rows.
        """
        blocks_of_chunk = self.padded_size // LIST_BLOCK
        chunk = route.chunk[:, ::LIST_BLOCK].reshape(batch_size, -1, route.chunk.shape[1] // LIST_BLOCK)
        num_rows = chunk.shape[2]

        def by_row(x):
            """`[B, K, rows]` to `[B, rows, K, one range]`."""
            return x.swapaxes(1, 2)[..., None].astype(jnp.int32)

        start = by_row(jnp.where(chunk >= 0, chunk, 0) * blocks_of_chunk)
        stop = jnp.where(by_row(chunk) >= 0, start + blocks_of_chunk, start)
        full = by_row(jnp.where(chunk >= 0, self.chunk_size // LIST_BLOCK, 0))
        rows_order = jnp.arange(num_rows, dtype=jnp.int32)[None, :, None]
        kv_blocks = BlockRanges(start=start, stop=stop, full_start=start, full_stop=start + full, order=rows_order)

        # The blocks of rows of each chunk stand together, and behind them those of none.
        number = jnp.where(chunk >= 0, chunk, self.num_chunks)
        bounds = jnp.sum(number[..., None, :] < jnp.arange(self.num_chunks + 1)[:, None], axis=-1)
        of_block = np.arange(self.num_chunks * blocks_of_chunk) // blocks_of_chunk
        first, last = by_row(bounds[..., of_block]), by_row(bounds[..., of_block + 1])
        block = np.arange(self.num_chunks * blocks_of_chunk) % blocks_of_chunk
        is_full = jnp.asarray((block + 1) * LIST_BLOCK <= self.chunk_size)[:, None, None]
        q_blocks = BlockRanges(
            start=first,
            stop=last,
            full_start=first,
            full_stop=jnp.where(is_full, last, first),
            order=longest_first(jnp.sum(last - first, axis=(2, 3))[..., None]),
            turn=jnp.broadcast_to(jnp.asarray(block, jnp.int32)[:, None, None], first.shape),
        )
        return Schedule(
            kv_blocks=kv_blocks,
            q_blocks=q_blocks,
            mask=self.mask,
            q_len=num_rows * LIST_BLOCK,
            kv_len=self.num_places,
            block_sizes=BlockSizes(block_q=LIST_BLOCK, block_kv=LIST_BLOCK),
            is_selection=True,
        )


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[b, index[b]]`, of one index for all rows or one for each."""
    if index.shape[0] == 1:
        return jnp.take(x, index[0], axis=1)
    return jax.vmap(lambda x, index: x[index])(x, index)

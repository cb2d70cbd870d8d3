"""Who chose which block: what a kernel walks that takes one block of keys after the other, for those who chose it.

The queries of a block stand one behind the other in its list, each with all heads of its group, in tiles of 64 rows:
as many whole queries as there is room for. A list is cut into items of at most ITEM_TILES tiles, so that a block that
all queries chose, as the first one of a sequence is, is shared out.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.sparse.moba_route import Route, most_rows, search
from pallas_kernels.tokens import Leaf

TILE_ROWS = 64
ITEM_TILES = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryLists:
    """The lists of all blocks of all rows, of some of the kv heads and queries after the other: C chunks of them.

    A chunk has K' kv heads and t queries. The fewer heads, the longer the lists of their blocks: the less often a block
    of keys is read, and its gradients added to.

    Every array is int32.

    Attributes:
      rows: The rows of each tile among the B T N of the queries, `[C, tiles, 64]`, -1 for none.
      items: `[C, items, len(ITEM_FIELDS)]`, in the order in which they are worked on. Those of a block come in
        the order of its list.
      num_items: How many there are, `[C]`; the others have no tiles.
      place: Where in the tiles of its chunk, row by row, the first head of each choice's query is, `[C, B t K', n]`;
        -1 for none.
      first_row: The first row of each query and kv head of a chunk among the B T N, `[C, B t K']`; -1 for none.
      has_room: Whether all choices are there, bool `[C]`.
    """

    rows: Leaf
    items: Leaf
    num_items: Leaf
    place: Leaf
    first_row: Leaf
    has_room: Leaf

    @classmethod
    def of(
        cls,
        choices: Int32[Array, "B T K n"],
        block_start: Int32[Array, "#B M"],
        num_heads: int,
        *,
        kv_len: int,
        block_size: int,
        num_chunks: int = 1,
    ) -> "QueryLists":
        """The lists of these choices, each in the order of the queries.

        There is room for any choices among few blocks, and for those of packed documents, however many: where each
        document is cut into blocks from its start, all but the last of block_size rows, and queries choose among those
        of their own.

        Args:
          kv_len: Number of keys.
          num_chunks: Chunks at least, of as few kv heads as go into so many.
        Cost: a sort of the T n choices of each kv head, and a few passes over all rows of the lists.
        """
        (B, T, K, n), M = choices.shape, block_start.shape[1]
        of_heads = max(x for x in range(1, num_chunks + 1) if K % x == 0)
        of_queries = -(-num_chunks // of_heads)
        C, heads, length = of_heads * of_queries, K // of_heads, -(-T // of_queries)
        group = num_heads // K
        queries_of_tile = TILE_ROWS // group
        choices = jnp.pad(choices, ((0, 0), (0, of_queries * length - T), (0, 0), (0, 0)), constant_values=-1)
        choices = choices.reshape(B, of_queries, length, of_heads, heads, n).transpose(3, 1, 0, 4, 2, 5)
        of_any = most_rows(length * n, M, queries_of_tile)
        num_rows = min(of_any, _most_rows_of_documents(length, n, kv_len // block_size, queries_of_tile))
        route = Route.of_choices(choices.reshape(C * B * heads, length, n), M, queries_of_tile, num_rows)
        numbers = _Numbering(B=B, T=T, K=K, group=group, of_heads=of_heads, of_queries=of_queries)
        query = route.query.reshape(of_heads, of_queries, B, heads, -1)
        rows = _with_heads(numbers.first_row(query), group)
        tiles = rows.shape[4]
        first_tile = jnp.arange(B * heads, dtype=jnp.int32).reshape(B, heads, 1, 1) * tiles
        block = route.chunk[:, ::queries_of_tile].reshape(C, B * heads, tiles)
        row = route.row.reshape(C, B, heads, length, n)
        place = (first_tile + row // queries_of_tile) * TILE_ROWS + row % queries_of_tile * group
        place = jnp.where(row < num_rows, place, -1)
        num_lists = min(M, length * n, length + 2 * (kv_len // block_size))
        starts = jnp.broadcast_to(block_start, (B, M))
        first_head = jnp.arange(of_heads, dtype=jnp.int32).repeat(of_queries) * heads
        items = jax.vmap(lambda block, head: _items_of(block, starts, head, K, num_lists))(block, first_head)
        # A constant where it cannot be otherwise, so that nobody has to look.
        is_there = (row < num_rows) | (choices.reshape(row.shape) < 0) if num_rows < of_any else jnp.ones((C, 1), bool)
        unit = jnp.arange(length, dtype=jnp.int32)
        first_row = numbers.first_row(jnp.broadcast_to(unit, (*query.shape[:4], length)))
        return cls(
            rows=rows.reshape(C, -1, TILE_ROWS),
            items=items,
            num_items=jnp.sum(items[..., ITEM_FIELDS.index("num_tiles")] > 0, axis=1, dtype=jnp.int32),
            place=place.swapaxes(2, 3).reshape(C, -1, n),
            first_row=first_row.swapaxes(3, 4).reshape(C, -1),
            has_room=jnp.all(is_there, axis=tuple(range(1, is_there.ndim))),
        )


ITEM_FIELDS = ("batch", "head", "start", "first_tile", "num_tiles", "block", "turn")
"""What an item is: its row and kv head, the first key of its block, its tiles, the number of its block among all of all
rows and kv heads, and its own number among the items of that block."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Numbering:
    """How queries are numbered in chunks and in all: B T N rows, of N = K group heads."""

    B: int
    T: int
    K: int
    group: int
    of_heads: int
    of_queries: int

    def first_row(self, query: jax.Array) -> jax.Array:
        """The first row of queries of chunks `[of_heads, of_queries, B, K', ...]`; -1 of those that are none."""
        length, heads = -(-self.T // self.of_queries), self.K // self.of_heads

        def along(size: int, axis: int) -> jax.Array:
            return jnp.arange(size, dtype=jnp.int32).reshape(tuple(size if i == axis else 1 for i in range(query.ndim)))

        token = along(self.of_queries, 1) * length + query
        head = along(self.of_heads, 0) * heads + along(heads, 3)
        row = ((along(self.B, 2) * self.T + token) * self.K + head) * self.group
        return jnp.where((query < length) & (token < self.T), row, -1)


def _with_heads(first_row: jax.Array, group: int) -> jax.Array:
    """Row numbers `[..., tiles, 64]` of lists of queries' first rows `[..., L]`, of which -1 is none."""
    *lists, L = first_row.shape
    queries_of_tile = TILE_ROWS // group
    heads = jnp.arange(group, dtype=jnp.int32)
    rows = jnp.where(first_row[..., None] >= 0, first_row[..., None] + heads, -1)
    rows = rows.reshape(*lists, L // queries_of_tile, queries_of_tile * group)
    idle = TILE_ROWS - queries_of_tile * group
    return jnp.pad(rows, ((0, 0),) * (rows.ndim - 1) + ((0, idle),), constant_values=-1)


def _most_rows_of_documents(num_queries: int, n: int, num_whole: int, queries_of_tile: int) -> int:
    """Rows of the lists of so many queries of packed documents at most, in which there are so many whole blocks.

    A document of one block has one list, of its queries: queries_of_tile rows for each at most. Another's queries have
    n choices each, and its blocks are at most twice the whole ones, each filled up by less than a tile.
    """
    rows = num_queries * max(n, queries_of_tile) + 2 * num_whole * (queries_of_tile - 1)
    return -(-rows // queries_of_tile) * queries_of_tile


def _items_of(chunk: jax.Array, block_start: jax.Array, first_head: jax.Array, K: int, num_lists: int) -> jax.Array:
    """The items of tiles of these blocks, `[B K', tiles]`, ascending, then -1; whose keys begin at `[B, M]`.

    Args:
      first_head: Of the K' kv heads.
      num_lists: How many blocks have tiles at most.
    """
    (F, num_tiles), (B, M) = chunk.shape, block_start.shape
    keys = jnp.where(chunk < 0, M, chunk)
    bounds = jax.vmap(lambda keys: search(keys, jnp.arange(M + 1, dtype=jnp.int32)))(keys)
    tiles_of_block = jnp.diff(bounds, axis=1)
    items_of_block = -(-tiles_of_block // ITEM_TILES)
    stop = jnp.cumsum(items_of_block, axis=1, dtype=jnp.int32)
    item = jnp.arange(num_tiles // ITEM_TILES + num_lists, dtype=jnp.int32)
    block = jax.vmap(lambda stop: search(stop, item, side="right"))(stop)
    is_item = block < M
    block = jnp.minimum(block, M - 1)

    def of_block(x):
        return jnp.take_along_axis(x, block, axis=1)

    turn, num_turns = item - of_block(stop - items_of_block), jnp.maximum(of_block(items_of_block), 1)
    # Of one length, but for a tile.
    tiles = of_block(tiles_of_block)
    begin, end = (x * (tiles // num_turns) + jnp.minimum(x, tiles % num_turns) for x in (turn, turn + 1))
    f = jnp.broadcast_to(jnp.arange(F, dtype=jnp.int32)[:, None], block.shape)
    batch, head = f // (F // B), f % (F // B) + first_head
    fields = {
        "batch": batch,
        "head": head,
        "start": jnp.take_along_axis(block_start, block.reshape(B, -1), axis=1),
        "first_tile": f * num_tiles + of_block(bounds[:, :-1]) + begin,
        "num_tiles": jnp.where(is_item, end - begin, 0),
        "block": (batch * K + head) * M + block,
        "turn": turn,
    }
    items = jnp.stack([fields[name].reshape(-1) for name in ITEM_FIELDS], axis=-1)
    # Those of one block, which take turns, are spread evenly over the line, in order.
    place = jnp.where(is_item, (turn.astype(jnp.float32) + 0.5) / num_turns.astype(jnp.float32), jnp.inf).reshape(-1)
    return items[jnp.argsort(place, stable=True)]

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
    """The lists of all blocks of all rows and kv heads, of some of the queries after the other: C chunks of queries.

    Every array is int32.

    Attributes:
      rows: The rows of each tile among the B T N of the queries, `[C, tiles, 64]`, -1 for none.
      items: `[C, items, len(ITEM_FIELDS)]`, in the order in which they are worked on. Those of a block come in
        the order of its list.
      num_items: How many there are, `[C]`; the others have no tiles.
      place: Where in the tiles of its chunk, row by row, the first head of each choice's query is, `[C, B, t, K, n]`,
        of t queries a chunk; -1 for none.
      has_room: Whether all choices are there, bool `[C]`.
    """

    rows: Leaf
    items: Leaf
    num_items: Leaf
    place: Leaf
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
        Cost: a sort of the T n choices of each kv head, and a few passes over all rows of the lists.
        """
        (B, T, K, n), M, C = choices.shape, block_start.shape[1], num_chunks
        group, length = num_heads // K, -(-T // C)
        queries_of_tile = TILE_ROWS // group
        choices = jnp.pad(choices, ((0, 0), (0, C * length - T), (0, 0), (0, 0)), constant_values=-1)
        choices = choices.reshape(B, C, length, K, n).transpose(1, 0, 3, 2, 4)
        of_any = most_rows(length * n, M, queries_of_tile)
        num_rows = min(of_any, _most_rows_of_documents(length, n, kv_len // block_size, queries_of_tile))
        route = Route.of_choices(choices.reshape(C * B * K, length, n), M, queries_of_tile, num_rows)
        query = route.query.reshape(C, B, K, -1)
        first_query = jnp.arange(C, dtype=jnp.int32)[:, None] * length + jnp.arange(B, dtype=jnp.int32) * T
        rows = jnp.where(query < length, first_query[..., None, None] + query, -1)
        rows = _with_heads(rows, num_heads)
        tiles = rows.shape[3]
        first_tile = jnp.arange(B * K, dtype=jnp.int32).reshape(B, K) * tiles
        block = route.chunk[:, ::queries_of_tile].reshape(C, B * K, tiles)
        starts = jnp.broadcast_to(block_start, (B, M))
        row = route.row.reshape(C, B, K, length, n)
        place = row // queries_of_tile * TILE_ROWS + row % queries_of_tile * group
        place += first_tile[:, :, None, None] * TILE_ROWS
        place = jnp.where(row < query.shape[3], place, -1)
        num_lists = min(M, length * n, length + 2 * (kv_len // block_size))
        items = jax.vmap(lambda block: _items_of(block, starts, first_tile.reshape(-1), K, num_lists))(block)
        # A constant where it cannot be otherwise, so that nobody has to look.
        is_there = (row < num_rows) | (choices < 0) if num_rows < of_any else jnp.ones((C, 1, 1, 1, 1), bool)
        has_room = jnp.all(is_there, axis=(1, 2, 3, 4))
        return cls(
            rows=rows.reshape(C, -1, TILE_ROWS),
            items=items,
            num_items=jnp.sum(items[..., ITEM_FIELDS.index("num_tiles")] > 0, axis=1, dtype=jnp.int32),
            place=place.swapaxes(2, 3),
            has_room=has_room,
        )


ITEM_FIELDS = ("batch", "head", "start", "first_tile", "num_tiles", "block", "turn")
"""What an item is: its row and kv head, the first key of its block, its tiles, the number of its block among all of all
rows and kv heads, and its own number among the items of that block."""


def _with_heads(query: jax.Array, num_heads: int) -> jax.Array:
    """Row numbers `[C, B, K, tiles, 64]` of lists of queries `[C, B, K, L]`, of which -1 is none."""
    K, L = query.shape[2:]
    group = num_heads // K
    queries_of_tile = TILE_ROWS // group
    heads = jnp.arange(num_heads, dtype=jnp.int32).reshape(K, 1, group)
    rows = jnp.where(query[..., None] >= 0, query[..., None] * num_heads + heads, -1)
    rows = rows.reshape(*query.shape[:3], L // queries_of_tile, queries_of_tile * group)
    idle = TILE_ROWS - queries_of_tile * group
    return jnp.pad(rows, ((0, 0),) * 4 + ((0, idle),), constant_values=-1)


def _most_rows_of_documents(num_queries: int, n: int, num_whole: int, queries_of_tile: int) -> int:
    """Rows of the lists of so many queries of packed documents at most, in which there are so many whole blocks.

    A document of one block has one list, of its queries: queries_of_tile rows for each at most. Another's queries have
    n choices each, and its blocks are at most twice the whole ones, each filled up by less than a tile.
    """
    rows = num_queries * max(n, queries_of_tile) + 2 * num_whole * (queries_of_tile - 1)
    return -(-rows // queries_of_tile) * queries_of_tile


def _items_of(chunk: jax.Array, block_start: jax.Array, first_tile: jax.Array, K: int, num_lists: int) -> jax.Array:
    """The items of tiles of these blocks, `[F, tiles]`, ascending, then -1; whose keys begin at `[B, M]`.

    `num_lists` is how many blocks have tiles at most.
    """
    (F, num_tiles), (B, M) = chunk.shape, block_start.shape
    keys = jnp.where(chunk < 0, M, chunk)
    bounds = jax.vmap(lambda keys: search(keys, jnp.arange(M + 1, dtype=jnp.int32)))(keys)
    items_of_block = -(-jnp.diff(bounds, axis=1) // ITEM_TILES)
    stop = jnp.cumsum(items_of_block, axis=1, dtype=jnp.int32)
    item = jnp.arange(num_tiles // ITEM_TILES + num_lists, dtype=jnp.int32)
    block = jax.vmap(lambda stop: search(stop, item, side="right"))(stop)
    is_item = block < M
    block = jnp.minimum(block, M - 1)

    def of_block(x):
        return jnp.take_along_axis(x, block, axis=1)

    turn = item - of_block(stop - items_of_block)
    begin = of_block(bounds[:, :-1]) + turn * ITEM_TILES
    f = jnp.broadcast_to(jnp.arange(F, dtype=jnp.int32)[:, None], block.shape)
    fields = {
        "batch": f // K,
        "head": f % K,
        "start": jnp.take_along_axis(block_start, block.reshape(B, -1), axis=1),
        "first_tile": begin + first_tile[:, None],
        "num_tiles": jnp.where(is_item, jnp.minimum(ITEM_TILES, of_block(bounds[:, 1:]) - begin), 0),
        "block": f * M + block,
        "turn": turn,
    }
    items = jnp.stack([fields[name].reshape(-1) for name in ITEM_FIELDS], axis=-1)
    # Those of one block, which take turns, are spread evenly over the line, in order.
    turn_of, num_turns = (x.astype(jnp.float32) for x in (turn, of_block(items_of_block)))
    place = jnp.where(is_item, (turn_of + 0.5) / num_turns, jnp.inf).reshape(-1)
    return items[jnp.argsort(place, stable=True)]

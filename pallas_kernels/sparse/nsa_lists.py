"""Who chose which block: what a kernel walks that takes one block of keys after the other, for those who chose it.

The queries of a block stand one behind the other in its list, each with all heads of its group, in tiles of 64 rows:
as many whole queries as there is room for. A list is cut into items of at most ITEM_TILES tiles, so that a block that
all queries chose, as the first one of a sequence is, is shared out.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.sparse.moba_route import Route, search
from pallas_kernels.tokens import Leaf

TILE_ROWS = 64
ITEM_TILES = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryLists:
    """The lists of all blocks of all rows and kv heads. Every array is int32.

    Attributes:
      rows: The rows of each tile among the B T N of the queries, `[tiles, 64]`, -1 for none.
      items: `[items, len(ITEM_FIELDS)]`; what has no tiles is none. Those of a block follow each other.
      place: Where in `rows`, counted through, the first head of each choice's query is, `[B K, T, n]`; negative for
        none.
    """

    rows: Leaf
    items: Leaf
    place: Leaf

    @classmethod
    def of(cls, choices: Int32[Array, "B T K n"], block_start: Int32[Array, "#B M"], num_heads: int) -> "QueryLists":
        """The lists of these choices, each in the order of the queries.

        Cost: a sort of the T n choices of each kv head, and a few passes over all rows of the lists.
        """
        B, T, K, n = choices.shape
        group, M = num_heads // K, block_start.shape[1]
        queries_of_tile = TILE_ROWS // group
        route = Route.of_choices(choices.swapaxes(1, 2).reshape(B * K, T, n), M, queries_of_tile)
        rows = _rows_of(route.query, T, K, num_heads)
        tiles_of_head = rows.shape[1]
        first_tile = jnp.arange(B * K, dtype=jnp.int32) * tiles_of_head
        chunk = route.chunk[:, ::queries_of_tile]
        items = _items_of(chunk, jnp.broadcast_to(block_start, (B, M)), first_tile, K)
        place = route.row // queries_of_tile * TILE_ROWS + route.row % queries_of_tile * group
        place += first_tile[:, None, None] * TILE_ROWS
        return cls(
            rows=rows.reshape(-1, TILE_ROWS),
            items=items,
            place=jnp.where(route.row < route.query.shape[1], place, -1),
        )


ITEM_FIELDS = ("batch", "head", "start", "first_tile", "num_tiles", "block", "turn")
"""What an item is: its row and kv head, the first key of its block, its tiles, the number of its block among all of all
rows and kv heads, and its own number among the items of that block."""


def _rows_of(query: jax.Array, T: int, K: int, num_heads: int) -> jax.Array:
    """Row numbers `[F, tiles, 64]` of lists of queries `[F, L]`, of which T is none."""
    F, group = len(query), num_heads // K
    queries_of_tile = TILE_ROWS // group
    batch, head = jnp.divmod(jnp.arange(F, dtype=jnp.int32), K)
    first = (batch[:, None] * T + query) * num_heads + head[:, None] * group
    rows = first[..., None] + jnp.arange(group, dtype=jnp.int32)
    rows = jnp.where(query[..., None] < T, rows, -1).reshape(F, -1, queries_of_tile * group)
    idle = TILE_ROWS - queries_of_tile * group
    return jnp.pad(rows, ((0, 0), (0, 0), (0, idle)), constant_values=-1)


def _items_of(chunk: jax.Array, block_start: jax.Array, first_tile: jax.Array, K: int) -> jax.Array:
    """The items of tiles of these blocks, `[F, tiles]`, ascending, then -1; whose keys begin at `[B, M]`."""
    (F, num_tiles), (B, M) = chunk.shape, block_start.shape
    keys = jnp.where(chunk < 0, M, chunk)
    bounds = jax.vmap(lambda keys: search(keys, jnp.arange(M + 1, dtype=jnp.int32)))(keys)
    items_of_block = -(-jnp.diff(bounds, axis=1) // ITEM_TILES)
    stop = jnp.cumsum(items_of_block, axis=1, dtype=jnp.int32)
    item = jnp.arange(num_tiles // ITEM_TILES + M, dtype=jnp.int32)
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
    return jnp.stack([fields[name].reshape(-1) for name in ITEM_FIELDS], axis=-1)

"""Attention to chosen blocks in plain XLA: memory linear in T and S, on any platform.

Forward: queries in groups, for each of which the keys of its blocks are gathered. Backward: the choices are sorted by
block, so that the queries of a block stand together, and are walked in tiles of one block each; a tile adds to its
block's dk and dv, and to its queries' dq, each of which it has once. So no sum depends on the order in which a device
adds, and what is gathered is queries.

Shapes here: f rows and kv heads folded, t queries, g query heads of a kv head, n choices, s rows of blocks, h and v
head dims; e entries of a tile: choices of one block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.online_softmax import MASK_VALUE, delta_of, finite_max
from pallas_kernels.sparse.moba_route import fold_keys, fold_queries, in_groups, unfold_keys, unfold_queries

_MOST_GATHERED_AT_ONCE = 1 << 24
"""Numbers of keys and values that are gathered at a time: 32 MB in bfloat16."""

_TILE = 128
"""Queries of a block that are worked on at a time in the backward pass."""


def forward(q, k, v, choices, block_start, q_place, *, block_size, scale):
    """`selected_attention_forward` on any platform."""
    call = _Call(q, k, v, choices, block_start, q_place, block_size)
    (F, T, n), width = call.choices.shape, k.shape[3] + v.shape[3]
    group = max(1, min(T, _MOST_GATHERED_AT_ONCE // (F * n * block_size * width)))

    def attend(queries):
        q, place, choices = queries
        rows, is_there = call.rows_of(choices)
        keys, values = (_take(x, jnp.minimum(rows, k.shape[1] - 1)) for x in (call.k, call.v))
        s = scale * call.matmul("ftgh,ftsh->ftgs", q, keys)
        s = jnp.where((is_there & (rows <= place[..., None]))[:, :, None], s, MASK_VALUE)
        row_max = jnp.max(s, axis=-1)
        p = jnp.exp(s - finite_max(row_max)[..., None])
        total = jnp.sum(p, axis=-1)
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        out = call.matmul("ftgs,ftsv->ftgv", p.astype(v.dtype), values) / total[..., None]
        return out.astype(q.dtype), jnp.where(empty, -jnp.inf, row_max + jnp.log(total))

    results = jax.lax.map(attend, tuple(in_groups(x, group) for x in (call.q, call.place, call.choices)))
    out, lse = (jnp.moveaxis(x, 0, 1).reshape(F, -1, *x.shape[3:])[:, :T] for x in results)
    return call.unfold_queries(out), call.unfold_rows(lse)


def backward(q, k, v, choices, block_start, q_place, out, lse, dout, dlse, *, block_size, scale):
    """`selected_attention_backward` on any platform, float32."""
    call = _Call(q, k, v, choices, block_start, q_place, block_size)
    lists = _Lists.of(call.choices, block_start.shape[1])
    dout_f, lse_f, delta_f = call.fold_queries(dout), call.fold_rows(lse), call.fold_rows(delta_of(out, dout, dlse))
    T = q.shape[1]
    # Blocks at the end of k may reach beyond it.
    keys, values = (jnp.pad(x, ((0, 0), (0, block_size), (0, 0))) for x in (call.k, call.v))

    def of_row(gradients, number, q, place, dout, lse, delta, keys, values, block_start, lists):
        dq, dk, dv = gradients
        block, query = lists.tile(number)
        there = jnp.minimum(query, T - 1)
        first = block_start[block]
        q, dout, lse, delta = (x[there] for x in (q, dout, lse, delta))
        keys, values = (jax.lax.dynamic_slice_in_dim(x, first, block_size) for x in (keys, values))
        allowed = (query < T)[:, None] & (first + jnp.arange(block_size) <= place[there][:, None])
        s = jnp.where(allowed[:, None], scale * call.matmul("egh,sh->egs", q, keys), MASK_VALUE)
        p = jnp.exp(s - jnp.where(lse == -jnp.inf, jnp.inf, lse)[..., None])
        ds = p * (call.matmul("egv,sv->egs", dout, values) - delta[..., None]) * scale
        ds = ds.astype(q.dtype)
        dq = dq.at[query].add(call.matmul("egs,sh->egh", ds, keys), mode="drop")
        dk = _add_rows(dk, first, call.matmul("egs,egh->sh", ds, q))
        dv = _add_rows(dv, first, call.matmul("egs,egv->sv", p.astype(dout.dtype), dout))
        return dq, dk, dv

    def add_tile(number, gradients):
        per_row = call.q, call.place, dout_f, lse_f, delta_f, keys, values, call.block_start, lists
        return jax.vmap(of_row, in_axes=(0, None, *(0,) * 9))(gradients, number, *per_row)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (call.q, keys, values))
    dq, dk, dv = jax.lax.fori_loop(0, jnp.max(lists.num_tiles), add_tile, zeros)
    return call.unfold_queries(dq), *(call.unfold_keys(x[:, : k.shape[1]]) for x in (dk, dv))


class _Call:
    """The arrays of a call with rows and kv heads folded."""

    def __init__(self, q, k, v, choices, block_start, q_place, block_size: int):
        (self.B, T), self.K, self.block_size = q.shape[:2], k.shape[2], block_size
        place = jnp.arange(T, dtype=jnp.int32)[None] if q_place is None else q_place
        self.q, self.k, self.v = self.fold_queries(q), fold_keys(k)[:, :, 0], fold_keys(v)[:, :, 0]
        self.choices = choices.swapaxes(1, 2).reshape(self.B * self.K, T, -1)
        self.place, self.block_start = (self.per_kv_head(x) for x in (place, block_start))
        precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        self.matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)

    def rows_of(self, choices: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The rows of k of chosen blocks `[F, t, n]`, and whether there is a choice: both `[F, t, n block_size]`."""
        first = _take(self.block_start, jnp.maximum(choices, 0))
        rows = first[..., None] + jnp.arange(self.block_size, dtype=jnp.int32)
        is_there = jnp.broadcast_to((choices >= 0)[..., None], rows.shape)
        return rows.reshape(*choices.shape[:2], -1), is_there.reshape(*choices.shape[:2], -1)

    def per_kv_head(self, x: jax.Array) -> jax.Array:
        """`[B or 1, ...]` to `[F, ...]`."""
        return jnp.repeat(jnp.broadcast_to(x, (self.B, *x.shape[1:])), self.K, axis=0)

    def fold_queries(self, x: jax.Array) -> jax.Array:
        """`[B, T, N, h]` to `[F, T, G, h]`."""
        return fold_queries(x, self.K).reshape(-1, x.shape[1], x.shape[2] // self.K, x.shape[3])

    def unfold_queries(self, x: jax.Array) -> jax.Array:
        """The inverse of `fold_queries`."""
        return unfold_queries(x.reshape(len(x), -1, x.shape[3]), self.K, self.K * x.shape[2])

    def fold_rows(self, x: jax.Array) -> jax.Array:
        """`[B, N, T]` to `[F, T, G]`."""
        return self.fold_queries(x.swapaxes(1, 2)[..., None])[..., 0]

    def unfold_rows(self, x: jax.Array) -> jax.Array:
        """The inverse of `fold_rows`."""
        return self.unfold_queries(x[..., None])[..., 0].swapaxes(1, 2)

    def unfold_keys(self, x: jax.Array) -> jax.Array:
        """`[F, S, h]` to `[B, S, K, h]`."""
        return unfold_keys(x[:, :, None], self.K)


class _Lists(NamedTuple):
    """The queries of each block, and the tiles that they are worked on in; `[F, ...]`, or of one row.

    Attributes:
      query: The query of each choice, sorted by block, with a tile of T behind them.
      bounds: Where each block's queries begin, and behind the last block, where they end.
      stop: The tiles of the blocks up to each.
    """

    query: jax.Array
    bounds: jax.Array
    stop: jax.Array

    @classmethod
    def of(cls, choices: jax.Array, num_blocks: int) -> "_Lists":
        F, T, n = choices.shape
        block = jnp.where(choices >= 0, choices, num_blocks).reshape(F, -1)
        query = jnp.broadcast_to(jnp.repeat(jnp.arange(T, dtype=jnp.int32), n), block.shape)
        block, query = jax.lax.sort((block, query), dimension=1, num_keys=1, is_stable=True)
        number = jnp.arange(num_blocks + 1, dtype=jnp.int32)
        bounds = jax.vmap(lambda block: jnp.searchsorted(block, number).astype(jnp.int32))(block)
        return cls(
            query=jnp.pad(query, ((0, 0), (0, _TILE)), constant_values=T),
            bounds=bounds,
            stop=jnp.cumsum(-(-jnp.diff(bounds, axis=1) // _TILE), axis=1, dtype=jnp.int32),
        )

    @property
    def num_tiles(self) -> jax.Array:
        return self.stop[..., -1]

    def tile(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The block of a tile and its queries `[_TILE]`, T for none; of one row. Behind the last it has none."""
        block = jnp.searchsorted(self.stop, number, side="right").astype(jnp.int32)
        is_tile = block < len(self.stop)
        block = jnp.minimum(block, len(self.stop) - 1)
        first, end = self.bounds[block], jnp.where(is_tile, self.bounds[block + 1], 0)
        first += (number - self.stop[block] - (first - end) // _TILE) * _TILE
        query = jax.lax.dynamic_slice_in_dim(self.query, first, _TILE)
        none = self.query[-1]
        return block, jnp.where(first + jnp.arange(_TILE, dtype=jnp.int32) < end, query, none)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of each `[F, S, ...]` by `[F, ...]` numbers, all of which are there."""
    return jax.vmap(lambda x, index: x.at[index].get(mode="promise_in_bounds"))(x, index)


def _add_rows(x: jax.Array, first: jax.Array, rows: jax.Array) -> jax.Array:
    there = jax.lax.dynamic_slice_in_dim(x, first, len(rows))
    return jax.lax.dynamic_update_slice_in_dim(x, there + rows, first, 0)

"""Which chunks of keys each query of MoBA attends to, and how queries get to their keys and results back.

Queries choose one by one, and attention computes blocks of queries against blocks of keys. So the queries of a chunk of
keys are brought together: every choice is an entry of its chunk's list, lists are filled up to whole blocks of rows,
and no block of rows has entries of two chunks. All shapes are known when the program is traced: the lists of a kv head
stand one behind the other in an array that has room for all.

Shapes: F = B K, rows and kv heads folded, and Q = T G, the queries of a kv head, token by token; C a chunk's tokens, M
whole chunks, L rows of the lists.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.online_softmax import finite_max
from pallas_kernels.tokens import Leaf, TokenAxis

LIST_BLOCK = 128
"""Rows of a list come in blocks of so many, which have one chunk: the queries of a tile of the attention ops."""

_MOST_SCORES_AT_ONCE = 1 << 24
"""float32 scores of queries and chunks that are held at a time: 64 MB, and a few times that in temporaries."""


class Chunks(NamedTuple):
    """The chunks of a sequence of packed documents, all int32 `[B or 1, T]`.

    Attributes:
      own: The number of the chunk that a token is in, counted along the row; negative for padding.
      offset: The token's place in its chunk.
      whole: The same number, counted among whole chunks; -1 for tokens of others.
      first, stop: The whole chunks before a token's own, of its document: first <= number < stop.
    """

    own: jax.Array
    offset: jax.Array
    whole: jax.Array
    first: jax.Array
    stop: jax.Array


def number_chunks(tokens: TokenAxis, chunk_size: int) -> Chunks:
    """Cuts each document into chunks of `chunk_size` positions; of at most T // chunk_size all tokens are there.

    Args:
      tokens: In the order of the sequence: those of a document together, positions ascending.
    Cost: O(T) elementwise and a few prefix sums.
    """
    positions, segment_ids = jnp.broadcast_arrays(*tokens)
    length = positions.shape[1]
    place = jnp.arange(length, dtype=jnp.int32)
    is_token = segment_ids >= 0
    begins_document = _differs(segment_ids)
    begins = begins_document | _differs(positions // chunk_size)
    number = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
    start = jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    last = start + chunk_size - 1
    same_at_last = jnp.take_along_axis(number, jnp.minimum(last, length - 1), axis=1) == number
    is_whole = is_token & (last < length) & same_at_last
    upto = jnp.cumsum(begins & is_whole, axis=1, dtype=jnp.int32)
    before = upto - is_whole.astype(jnp.int32)
    first = jax.lax.cummax(jnp.where(begins_document, before, 0), axis=1)
    return Chunks(
        own=jnp.where(is_token, number, -1),
        offset=place - start,
        whole=jnp.where(is_whole, upto - 1, -1),
        first=first,
        stop=jnp.where(is_token, before, first),
    )


def _differs(x: jax.Array) -> jax.Array:
    """Whether a token differs from the one before it; the first does."""
    return jnp.concatenate([jnp.ones_like(x[:, :1], bool), x[:, 1:] != x[:, :-1]], axis=1)


def chunk_sums(
    k: Float[Array, "B T K H"], chunk: Int32[Array, "#B T"], num_chunks: int
) -> Float32[Array, "B {num_chunks} K H"]:
    """The sum of the keys of each chunk, float32, the same bit by bit each time.

    Args:
      chunk: Of each key; negative for none.
    Cost: 2 B T num_chunks K H FLOPs, less than the gate by N / K; in groups of tokens.
    """
    B, T, K, H = k.shape
    group = max(1, min(T, _MOST_SCORES_AT_ONCE // (B * num_chunks)))
    precision = jax.lax.Precision.HIGHEST if k.dtype == jnp.float32 else None

    def add(sums, tokens):
        k, chunk = tokens
        # A scatter would add in any order, and choices could differ from run to run.
        is_of = (chunk[:, None] == jnp.arange(num_chunks)[:, None]).astype(k.dtype)
        return sums + jnp.matmul(is_of, k, precision=precision, preferred_element_type=jnp.float32), None

    tokens = k.reshape(B, T, K * H), jnp.broadcast_to(chunk, (B, T))
    groups = _groups(tokens[0], group), _groups(tokens[1], group, fill=-1)
    sums, _ = jax.lax.scan(add, jnp.zeros((B, num_chunks, K * H), jnp.float32), groups)
    return sums.reshape(B, num_chunks, K, H)


def choose_chunks(
    q: Float[Array, "F Q H"],
    means: Float32[Array, "F M H"],
    first: Int32[Array, "F Q"],
    stop: Int32[Array, "F Q"],
    num_choices: int,
) -> Int32[Array, "F Q {num_choices}"]:
    """The chunks whose mean key has the highest products with each query, the highest first; of equal ones the earlier.

    Args:
      q: Queries; their products with the means are float32, of half precision by the device's default for float32.
      first, stop: The chunks that a query may choose: first <= chunk < stop.
    Returns: Numbers of chunks, then -1 where there are fewer.
    Cost: 2 F Q M H FLOPs and num_choices passes over the scores; in groups of queries.
    Reference: Lu et al. 2025, MoBA, arXiv:2502.13189, equations 5 and 6.
    """
    (F, Q, _), M = q.shape, means.shape[1]
    group = max(1, min(Q, _MOST_SCORES_AT_ONCE // (F * M)))
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def of_group(queries):
        q, first, stop = queries
        scores = jnp.einsum("fqh,fmh->fqm", q.astype(jnp.float32), means, precision=precision)
        column = jnp.arange(M, dtype=jnp.int32)
        scores = jnp.where((first[..., None] <= column) & (column < stop[..., None]), scores, -jnp.inf)
        chosen = []
        for _ in range(num_choices):
            best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
            chosen.append(jnp.where(jnp.max(scores, axis=-1) > -jnp.inf, best, -1))
            scores = jnp.where(column == best[..., None], -jnp.inf, scores)
        return jnp.stack(chosen, axis=-1)

    chosen = jax.lax.map(of_group, tuple(_groups(x, group) for x in (q, first, stop)))
    return jnp.moveaxis(chosen, 0, 1).reshape(F, -1, num_choices)[:, :Q]


def _groups(x: jax.Array, size: int, fill: int = 0) -> jax.Array:
    """`[B, T, ...]` in groups of `size` along T, the last filled up: `[groups, B, size, ...]`."""
    padding = [(0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)]
    x = jnp.pad(x, padding, constant_values=jnp.asarray(fill, x.dtype))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """The way of queries to the lists of the chunks that they chose, and back. Every array is int32.

    Attributes:
      query: The query in each row of the lists, `[F, L]`; Q, one more than there are, where a list is filled up.
      chunk: The chunk of each row, ascending, `[F, L]`, filled-up rows included; -1 behind all lists.
      row: The row that each choice of a query went to, `[F, Q, choices]`; L where there was none.
    """

    query: Leaf
    chunk: Leaf
    row: Leaf

    @classmethod
    def of_choices(cls, choices: Int32[Array, "F Q choices"], num_chunks: int) -> "Route":
        """The route of these choices, each chunk's list in the order of the queries.

        Args:
          choices: Numbers of chunks below num_chunks, or -1.
        Cost: a sort of the Q choices of each kv head.
        """
        F, Q, num_choices = choices.shape
        num_entries = Q * num_choices
        # Every list may have a block that is all but one row filled up.
        num_rows = (num_entries + num_chunks * (LIST_BLOCK - 1)) // LIST_BLOCK * LIST_BLOCK
        none = jnp.int32(num_chunks)
        keys = jnp.where(choices >= 0, choices, none).reshape(F, num_entries)
        entries = jnp.broadcast_to(jnp.arange(num_entries, dtype=jnp.int32), keys.shape)
        keys, entries = jax.lax.sort((keys, entries), dimension=1, num_keys=1, is_stable=True)

        def of_kv_head(keys, entries):
            bounds = jnp.searchsorted(keys, jnp.arange(num_chunks + 1, dtype=jnp.int32)).astype(jnp.int32)
            first, count = bounds[:-1], jnp.diff(bounds)
            padded = -(-count // LIST_BLOCK) * LIST_BLOCK
            stop_row = jnp.cumsum(padded, dtype=jnp.int32)
            shift = stop_row - padded - first  # from an entry's place in the sorted order to its row
            block = jnp.arange(0, num_rows, LIST_BLOCK, dtype=jnp.int32)
            chunk = jnp.searchsorted(stop_row, block, side="right").astype(jnp.int32)
            chunk = jnp.repeat(chunk, LIST_BLOCK, total_repeat_length=num_rows)
            there = jnp.minimum(chunk, num_chunks - 1)
            place = jnp.arange(num_rows, dtype=jnp.int32) - shift[there]
            is_entry = (chunk < none) & (place < bounds[there + 1])
            query = jnp.where(is_entry, entries.at[place].get(mode="clip") // num_choices, Q)
            row = jnp.arange(num_entries, dtype=jnp.int32) + shift[jnp.minimum(keys, num_chunks - 1)]
            row = jnp.where(keys < none, row, num_rows)
            row = jnp.zeros_like(row).at[entries].set(row, unique_indices=True)
            return cls(query=query, chunk=jnp.where(chunk < none, chunk, -1), row=row.reshape(Q, num_choices))

        return jax.vmap(of_kv_head)(keys, entries)

    def of_queries(self, x: Float[Array, "B T N H"]) -> Float[Array, "F L 1 H"]:
        """What the queries in the rows of the lists have, 0 where a list is filled up."""
        return _taken(fold_queries(x, len(self.query) // len(x)), self.query, 0.0)[:, :, None]

    def of_lse(self, lse: Float32[Array, "B N T"], fill: float) -> Float32[Array, "F 1 L"]:
        """The same of one number a query, `fill` where a list is filled up."""
        return _taken(fold_lse(lse, len(self.query) // len(lse)), self.query, fill)[:, None]

    def sum_of_choices(
        self, x: Float32[Array, "F L 1 H"], *, num_kv_heads: int, num_heads: int
    ) -> Float32[Array, "B T N H"]:
        """The sum over each query's choices: the transpose of `of_queries`, without a scatter."""
        rows = x[:, :, 0]
        return unfold_queries(sum(_taken(rows, row, 0.0) for row in self._row_of_each_choice), num_kv_heads, num_heads)

    def merge(
        self,
        local: tuple[Float[Array, "B T N V"], Float32[Array, "B N T"]],
        routed: tuple[Float[Array, "F L 1 V"], Float32[Array, "F 1 L"]],
    ) -> tuple[Float[Array, "B T N V"], Float32[Array, "B N T"]]:
        """Merges each query's attention to its own chunk with that to each chunk that it chose.

        lse = log(sum_i exp(lse_i));  out = sum_i exp(lse_i - lse) out_i

        Args:
          local, routed: `(out, lse)` of the queries, and of the rows of the lists.
        Returns: `(out, lse)`, the sums in float32 and out in the dtype of the parts.
        """
        (out_BTNV, lse_BNT), (rows, lse_of_rows) = local, (routed[0][:, :, 0], routed[1][:, 0])
        N, K = out_BTNV.shape[2], len(rows) // len(out_BTNV)
        of_choices = [_taken(lse_of_rows, row, -jnp.inf) for row in self._row_of_each_choice]
        parts = jnp.stack([fold_lse(lse_BNT, K), *of_choices])
        lse = jax.nn.logsumexp(parts, axis=0)
        weights = jnp.exp(parts - finite_max(lse))[..., None]
        out = weights[0] * fold_queries(out_BTNV, K).astype(jnp.float32)
        for weight, row in zip(weights[1:], self._row_of_each_choice, strict=True):
            out += weight * _taken(rows, row, 0.0).astype(jnp.float32)
        return unfold_queries(out.astype(out_BTNV.dtype), K, N), unfold_lse(lse, K, N)

    @property
    def _row_of_each_choice(self) -> list[jax.Array]:
        """int32 `[F, Q]` each."""
        return [self.row[..., choice] for choice in range(self.row.shape[-1])]


def _taken(x: jax.Array, index: jax.Array, fill: float) -> jax.Array:
    """Entries along dim 1, `fill` for an index behind the last."""
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=fill)


def route_queries(
    q: Float[Array, "B T N H"], means: Float32[Array, "B M K H"], chunks: Chunks, num_choices: int
) -> Route:
    """The route of queries to the chunks whose mean keys they score highest.

    Args:
      means: Mean keys of the whole chunks.
      chunks: Of the queries' tokens.
    """
    B, _, N, _ = q.shape
    K = means.shape[2]

    def of_folded(x):
        return jnp.repeat(jnp.repeat(x, B * K // len(x), axis=0), N // K, axis=1)

    choices = choose_chunks(
        fold_queries(q, K),
        fold_keys(means)[:, :, 0],
        of_folded(chunks.first),
        of_folded(chunks.stop),
        num_choices,
    )
    return Route.of_choices(choices, means.shape[1])


def fold_queries(x: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "F Q H"]:
    """The queries of each kv head, token by token."""
    B, T, N, H = x.shape
    x = x.reshape(B, T, num_kv_heads, -1, H).transpose(0, 2, 1, 3, 4)
    return x.reshape(B * num_kv_heads, -1, H)


def unfold_queries(x: Float[Array, "F Q H"], num_kv_heads: int, num_heads: int) -> Float[Array, "B T N H"]:
    """The inverse of `fold_queries`."""
    F, _, H = x.shape
    x = x.reshape(F // num_kv_heads, num_kv_heads, -1, num_heads // num_kv_heads, H).transpose(0, 2, 1, 3, 4)
    return x.reshape(*x.shape[:2], num_heads, H)


def fold_lse(lse: Float32[Array, "B N T"], num_kv_heads: int) -> Float32[Array, "F Q"]:
    """As `fold_queries`, of one number a query."""
    return fold_queries(lse.swapaxes(1, 2)[..., None], num_kv_heads)[..., 0]


def unfold_lse(lse: Float32[Array, "F Q"], num_kv_heads: int, num_heads: int) -> Float32[Array, "B N T"]:
    """The inverse of `fold_lse`."""
    return unfold_queries(lse[..., None], num_kv_heads, num_heads)[..., 0].swapaxes(1, 2)


def fold_keys(x: Float[Array, "B S K H"]) -> Float[Array, "F S 1 H"]:
    """Each kv head as a row of its own, with one head."""
    B, S, K, H = x.shape
    return x.swapaxes(1, 2).reshape(B * K, S, 1, H)


def unfold_keys(x: Float[Array, "F S 1 H"], num_kv_heads: int) -> Float[Array, "B S K H"]:
    """The inverse of `fold_keys`."""
    F, S, _, H = x.shape
    return x.reshape(F // num_kv_heads, num_kv_heads, S, H).swapaxes(1, 2)

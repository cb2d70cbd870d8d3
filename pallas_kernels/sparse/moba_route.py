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
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.dispatch import current_platform, search_method
from pallas_kernels.online_softmax import finite_max
from pallas_kernels.tokens import Leaf, TokenAxis

LIST_BLOCK = 128
"""Rows of a list come in blocks of so many, which have one chunk: the queries of a tile of the attention ops."""

_MOST_SCORES_AT_ONCE = 1 << 25
"""float32 scores of queries and chunks that are held at a time: 128 MB, and as much in temporaries."""


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


def chunks_in_order(length: int, chunk_size: int) -> Chunks:
    """`number_chunks` of one document at positions 0, 1, 2, ...: constants, so that the compiler need not fold any."""
    place = np.arange(length, dtype=np.int32)[None]
    number = place // chunk_size
    num_whole = length // chunk_size
    chunks = number, place % chunk_size, np.where(number < num_whole, number, -1), np.zeros_like(number), number
    return Chunks(*map(jnp.asarray, chunks))


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
    groups = in_groups(tokens[0], group), in_groups(tokens[1], group, fill=-1)
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
      q: Queries; their products with the means are float32.
      first, stop: The chunks that a query may choose: first <= chunk < stop.
    Returns: Numbers of chunks, then -1 where there are fewer.
    Cost: 2 F Q M H FLOPs in float32 and num_choices passes over the scores; in groups of queries.
    Reference: Lu et al. 2025, MoBA, arXiv:2502.13189, equations 5 and 6.
    """
    (F, Q, _), M = q.shape, means.shape[1]
    group = max(1, min(Q, _MOST_SCORES_AT_ONCE // (F * M)))
    precision = jax.lax.Precision.HIGHEST
    if q.dtype == jnp.bfloat16 and current_platform() == "gpu":
        # As precise, in three parts of each number, by the tensor cores.
        precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6

    def of_group(queries):
        q, first, stop = queries
        scores = jnp.einsum("fqh,fmh->fqm", q.astype(jnp.float32), means, precision=precision)
        column = jnp.arange(M, dtype=jnp.int32)
        scores = jnp.where((first[..., None] <= column) & (column < stop[..., None]), scores, -jnp.inf)
        chosen = []
        for number in range(num_choices):
            best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
            chosen.append(jnp.where(number < stop - first, best, -1))
            scores = jnp.where(column == best[..., None], -jnp.inf, scores)
        return jnp.stack(chosen, axis=-1)

    chosen = jax.lax.map(of_group, tuple(in_groups(x, group) for x in (q, first, stop)))
    return jnp.moveaxis(chosen, 0, 1).reshape(F, -1, num_choices)[:, :Q]


def in_groups(x: jax.Array, size: int, fill: int = 0) -> jax.Array:
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
    def of_choices(
        cls,
        choices: Int32[Array, "F Q choices"],
        num_chunks: int,
        list_block: int = LIST_BLOCK,
        num_rows: int | None = None,
    ) -> "Route":
        """The route of these choices, each chunk's list in the order of the queries.

        Args:
          choices: Numbers of chunks below num_chunks, or -1.
          list_block: Rows that a list is filled up to a multiple of.
          num_rows: Rows that there are for all lists of a kv head, a multiple of list_block; None makes room for any
            choices. What finds no room goes to a row beyond them.
        Cost: a sort of the Q choices of each kv head.
        """
        F, Q, num_choices = choices.shape
        num_entries = Q * num_choices
        if num_rows is None:
            num_rows = most_rows(num_entries, num_chunks, list_block)
        none = jnp.int32(num_chunks)
        keys = jnp.where(choices >= 0, choices, none).reshape(F, num_entries)
        keys, entries = _sorted(keys, num_chunks + 1)

        def of_kv_head(keys, entries):
            bounds = search(keys, jnp.arange(num_chunks + 1, dtype=jnp.int32))
            first, count = bounds[:-1], jnp.diff(bounds)
            padded = -(-count // list_block) * list_block
            stop_row = jnp.cumsum(padded, dtype=jnp.int32)
            shift = stop_row - padded - first  # from an entry's place in the sorted order to its row
            block = jnp.arange(0, num_rows, list_block, dtype=jnp.int32)
            chunk = search(stop_row, block, side="right")
            chunk = jnp.broadcast_to(chunk[:, None], (len(block), list_block)).reshape(num_rows)
            there = jnp.minimum(chunk, num_chunks - 1)
            place = jnp.arange(num_rows, dtype=jnp.int32) - shift[there]
            is_entry = (chunk < none) & (place < bounds[there + 1])
            query = jnp.where(is_entry, entries.at[place].get(mode="clip") // num_choices, Q)
            row = jnp.arange(num_entries, dtype=jnp.int32) + shift[jnp.minimum(keys, num_chunks - 1)]
            row = jnp.where(keys < none, row, num_rows)
            row = jnp.zeros_like(row).at[entries].set(row, unique_indices=True)
            return cls(query=query, chunk=jnp.where(chunk < none, chunk, -1), row=row.reshape(Q, num_choices))

        return jax.vmap(of_kv_head)(keys, entries)

    def of_queries(self, x: Float[Array, "B T N H"]) -> Float[Array, "B L K H"]:
        """What the queries in the rows of the lists have, and where a list is filled up, some query."""
        B, _, N, _ = x.shape
        K = len(self.query) // B
        query = jnp.minimum(self.query, self.row.shape[1] - 1).reshape(B, K, -1)
        head = jnp.arange(K, dtype=jnp.int32)[:, None] * (N // K) + query % (N // K)
        rows = query // (N // K) * N + head
        return _rows(x, rows.swapaxes(1, 2))

    def of_lse(self, lse: Float32[Array, "B N T"], fill: float) -> Float32[Array, "B K L"]:
        """The same of one number a query, `fill` where a list is filled up."""
        B = len(lse)
        folded = fold_lse(lse, len(self.query) // B)
        taken = jnp.take_along_axis(folded, self.query, axis=1, mode="fill", fill_value=fill)
        return taken.reshape(B, -1, self.query.shape[1])

    def sum_of_choices(self, x: Float[Array, "B L K H"], num_heads: int) -> Float32[Array, "B T N H"]:
        """The sum over each query's choices, in float32: the transpose of `of_queries`, without a scatter."""

        def of_choice(row, is_there):
            return jnp.where(is_there[..., None], _rows(x, row).astype(jnp.float32), 0.0)

        return sum(map(of_choice, *self._rows_of_choices(x.shape, num_heads)))

    def merge(
        self,
        local: tuple[Float[Array, "B T N V"], Float32[Array, "B N T"]],
        routed: tuple[Float[Array, "B L K V"], Float32[Array, "B K L"]],
    ) -> tuple[Float[Array, "B T N V"], Float32[Array, "B N T"]]:
        """Merges each query's attention to its own chunk with that to each chunk that it chose.

        lse = log(sum_i exp(lse_i));  out = sum_i exp(lse_i - lse) out_i

        Args:
          local, routed: `(out, lse)` of the queries, and of the rows of the lists.
        Returns: `(out, lse)`, the sums in float32 and out in the dtype of the parts.
        """
        (out_BTNV, lse_BNT), (rows, lse_of_rows) = local, routed
        index, is_there = self._rows_of_choices(rows.shape, out_BTNV.shape[2])
        lse_BLK = lse_of_rows.swapaxes(1, 2)[..., None]
        of_choices = jnp.where(is_there, jnp.stack([_rows(lse_BLK, row)[..., 0] for row in index]), -jnp.inf)
        parts = jnp.concatenate([lse_BNT.swapaxes(1, 2)[None], of_choices])
        lse = jax.nn.logsumexp(parts, axis=0)
        weights = jnp.exp(parts - finite_max(lse))[..., None]
        out = weights[0] * out_BTNV.astype(jnp.float32)
        for weight, row in zip(weights[1:], index, strict=True):
            # Where there is no choice a row of another query is read, which may hold anything but nan.
            out += weight * _rows(rows, row).astype(jnp.float32)
        return out.astype(out_BTNV.dtype), lse.swapaxes(1, 2)

    def _rows_of_choices(self, shape: tuple[int, ...], num_heads: int) -> tuple[jax.Array, jax.Array]:
        """Where each choice of a query is in `[B, L, K, ...]`, its rows and heads one dim, and whether there is one.

        Both are `[choices, B, T, N]`.
        """
        B, L, K = shape[:3]
        row = self.row.reshape(B, K, -1, num_heads // K, self.row.shape[2])
        row = jnp.moveaxis(row, (4, 2), (0, 2))  # [choices, B, T, K, G]
        index = jnp.minimum(row, L - 1) * K + jnp.arange(K, dtype=jnp.int32)[:, None]
        return tuple(x.reshape(*x.shape[:3], num_heads) for x in (index, row < L))


def most_rows(num_entries: int, num_lists: int, list_block: int) -> int:
    """Rows of so many lists with so many entries at most, each filled up to whole blocks."""
    # Every list that has an entry may have a block that is all but one row filled up.
    return (num_entries + min(num_entries, num_lists) * (list_block - 1)) // list_block * list_block


def search(sorted_numbers: Int32[Array, " length"], x: Int32[Array, " n"], side: str = "left") -> Int32[Array, " n"]:
    """`jnp.searchsorted`: how many of the numbers are less than each x, or at most that where side is right."""
    return jnp.searchsorted(sorted_numbers, x, side=side, method=search_method()).astype(jnp.int32)


def _sorted(keys: jax.Array, bound: int) -> tuple[jax.Array, jax.Array]:
    """Keys below the bound in order, `[F, entries]`, and where each was, of equal ones the first first."""
    num_entries = keys.shape[1]
    entries = jnp.broadcast_to(jnp.arange(num_entries, dtype=jnp.int32), keys.shape)
    if bound * num_entries > jnp.iinfo(jnp.uint32).max:
        return tuple(jax.lax.sort((keys, entries), dimension=1, num_keys=1, is_stable=True))
    # One number for both, which is fewer passes over memory.
    keys, entries = keys.astype(jnp.uint32), entries.astype(jnp.uint32)
    both = jax.lax.sort(keys * num_entries + entries, dimension=1, is_stable=False)
    return tuple(x.astype(jnp.int32) for x in (both // num_entries, both % num_entries))


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Vectors `[B, ..., H]` out of `[B, T, N, H]`, by their numbers among the T N of a batch row."""
    x = x.reshape(x.shape[0], -1, x.shape[3])
    taken = jax.vmap(lambda x, index: x.at[index].get(mode="promise_in_bounds"))(x, index.reshape(len(index), -1))
    return taken.reshape(*index.shape, x.shape[2])


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


def fold_keys(x: Float[Array, "B S K H"]) -> Float[Array, "F S 1 H"]:
    """Each kv head as a row of its own, with one head."""
    B, S, K, H = x.shape
    return x.swapaxes(1, 2).reshape(B * K, S, 1, H)


def unfold_keys(x: Float[Array, "F S 1 H"], num_kv_heads: int) -> Float[Array, "B S K H"]:
    """The inverse of `fold_keys`."""
    F, S, _, H = x.shape
    return x.reshape(F // num_kv_heads, num_kv_heads, S, H).swapaxes(1, 2)

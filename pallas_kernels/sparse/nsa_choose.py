"""Which blocks each query of Native Sparse Attention selects: the scores of blocks, and the best of them.

A query's probabilities over compressed keys are summed over its group of heads and folded onto the blocks to select.
Queries are taken in groups, so that there is never a score for every query and compressed key. Nothing of it is
differentiated.

Shapes: F = B K, rows and kv heads folded; Q queries of a group, G heads of a kv head.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.sparse import pallas_mosaic_gpu_nsa_choose
from pallas_kernels.sparse.moba_route import fold_keys, fold_lse, fold_queries, in_groups
from pallas_kernels.sparse.nsa_blocks import ALWAYS_CHOSEN, BlockTables, NsaSizes, TokenBlocks

_MOST_SCORES_AT_ONCE = 1 << 25
"""float32 scores of queries and compressed keys that are held at a time: 128 MB, and as much in temporaries."""


def scores_of_queries(
    q: Float[Array, "F Q G H"],
    k: Float[Array, "F M_c H"],
    lse: Float32[Array, "F Q G"],
    first: Int32[Array, "F Q"],
    stop: Int32[Array, "F Q"],
    whole_compressed: Int32[Array, "F W"],
    *,
    sizes: NsaSizes,
    scale: float,
) -> Float32[Array, "F Q W"]:
    """The score of each whole block for some queries.

    p[t, i] = sum over the group's heads of exp(scale q[t].k[i] - lse[t]),  first[t] <= i < stop[t]
    score[t, w] = sum_{m < l' / d} sum_{n < l / d} p[t, c[w] + m - n],  c[w] the compressed block that begins with w

    which is p of each compressed block times how many strides of it are in the block. (The paper counts from 1.)

    Args:
      q: Queries of a chunk.
      k: Compressed keys.
      lse: Of the attention to them.
      first, stop: The compressed keys that a query sees.
      whole_compressed: c.
    Reference: Yuan et al. 2025, Native Sparse Attention, arXiv:2502.11089, equations 8 to 10.
    """
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    s = scale * jnp.einsum("fqgh,fmh->fqgm", q, k, precision=precision, preferred_element_type=jnp.float32)
    number = jnp.arange(k.shape[1], dtype=jnp.int32)
    is_seen = (first[..., None] <= number) & (number < stop[..., None])
    # A query that sees none has lse = -inf.
    logits = jnp.where(is_seen[:, :, None], s - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None], -jnp.inf)
    p = jnp.sum(jnp.exp(logits), axis=2)
    of_block, of_compressed = (x // sizes.compress_stride for x in (sizes.block_size, sizes.compress_block))
    p = jnp.pad(p, ((0, 0), (0, 0), (of_compressed - 1, of_block)))
    take = jax.vmap(lambda p, column: p[:, column])
    return sum(times * take(p, whole_compressed + i) for i, times in enumerate(_times(sizes)))


def choose_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B M_c K H"],
    lse: Float32[Array, "B N T"],
    tables: BlockTables,
    queries: TokenBlocks,
    *,
    sizes: NsaSizes,
    scale: float,
    implementation: Implementation | None = None,
) -> Int32[Array, "B T K n"]:
    """The blocks of each query and kv head: the first, the one before its own, its own, and those of highest scores.

    Args:
      q: Queries.
      k: Compressed keys.
      lse: Of the attention to them.
      tables: The blocks of the row.
      queries: Where the queries stand.
      implementation: As `selected_attention`.
    Returns: Numbers of blocks, and -1 where a query has fewer; of equal scores the earlier block's.
    Cost: 2 B N T M_c H FLOPs and a partial sort of K T W scores; in groups of queries.
    Reference: as `scores_of_queries`, equation 11.
    """
    q, k, lse = (jax.lax.stop_gradient(x) for x in (q, k, lse))
    return dispatch.run("choose_blocks", _CHOOSE, implementation, q, k, lse, tables, queries, sizes=sizes, scale=scale)


class Problem(NamedTuple):
    """Some queries, and the whole blocks that they choose from besides those that they always have.

    Attributes:
      begin: The number of the first query of a row, int32; some of the last Q may be beyond the row.
      lse, first, stop, k, whole_compressed: As of `scores_of_queries`.
      after, end: Blocks strictly between these numbers among whole ones may be chosen, `[F, Q]`.
    """

    begin: jax.Array
    lse: jax.Array
    first: jax.Array
    stop: jax.Array
    after: jax.Array
    end: jax.Array
    k: jax.Array
    whole_compressed: jax.Array


def _by_xla(q, k, lse, tables, queries, *, sizes: NsaSizes, scale: float):
    """`choose_blocks` on any platform."""

    (B, T, N, H), K = q.shape, k.shape[2]
    group = _group_of(T, _MOST_SCORES_AT_ONCE // (B * N * k.shape[1]))
    folded = fold_queries(q, K).reshape(B * K, T, N // K, H)
    folded = jnp.pad(folded, ((0, 0), (0, -T % group), (0, 0), (0, 0)))

    def best(problem: Problem, count: int) -> jax.Array:
        of_group = jax.lax.dynamic_slice_in_dim(folded, problem.begin, group, axis=1)
        arrays = of_group, problem.k, problem.lse, problem.first, problem.stop, problem.whole_compressed
        scores = scores_of_queries(*arrays, sizes=sizes, scale=scale)
        column = jnp.arange(scores.shape[2], dtype=jnp.int32)
        is_free = (problem.after[..., None] < column) & (column < problem.end[..., None])
        score, chosen = jax.lax.top_k(jnp.where(is_free, scores, -jnp.inf), count)
        return jnp.where(score > -jnp.inf, chosen, -1)

    return _choose(best, group, q, k, lse, tables, queries, sizes)


def _by_mosaic_gpu(q, k, lse, tables, queries, *, sizes: NsaSizes, scale: float):
    """`choose_blocks` on a Hopper GPU: scores are summed over the heads of a group before they are in memory."""
    B, T, N, _ = q.shape
    K, W = k.shape[2], tables.whole_number.shape[1]
    pallas_mosaic_gpu_nsa_choose.check(q, N // K, W, sizes.num_blocks - ALWAYS_CHOSEN)
    fold = pallas_mosaic_gpu_nsa_choose.Fold(1 - sizes.compress_block // sizes.compress_stride, _times(sizes))

    def best(problem: Problem, count: int) -> jax.Array:
        # Of q as it is: no part of it is copied.
        queries = problem.begin, problem.lse, problem.first, problem.stop
        p = pallas_mosaic_gpu_nsa_choose.probabilities(q, problem.k, *queries, scale=scale)
        bounds = problem.whole_compressed, problem.after, problem.end
        return pallas_mosaic_gpu_nsa_choose.choose(p, *bounds, count, fold)

    group = _group_of(T, _MOST_SCORES_AT_ONCE // (B * K * k.shape[1]))
    return _choose(best, group, q, k, lse, tables, queries, sizes)


_CHOOSE: Mapping = {"mosaic_gpu": _by_mosaic_gpu, "xla": _by_xla, "reference": _by_xla}


def _times(sizes: NsaSizes) -> tuple[int, ...]:
    """How often a block's score counts each compressed block, from the first that reaches into it on."""
    of_block, of_compressed = (x // sizes.compress_stride for x in (sizes.block_size, sizes.compress_block))
    shifts = range(1 - of_compressed, of_block)  # m - n
    return tuple(sum(0 <= shift + n < of_block for n in range(of_compressed)) for shift in shifts)


def _group_of(length: int, most: int) -> int:
    """How many queries of a row are taken at a time."""
    return max(1, min(length, most))


def _choose(best: Callable, group: int, q, k, lse, tables: BlockTables, queries: TokenBlocks, sizes: NsaSizes):
    """`choose_blocks`, `group` queries at a time, of which `best(problem, count)` are the best whole blocks."""
    (B, T, N, _), K = q.shape, k.shape[2]
    F, W = B * K, tables.whole_number.shape[1]
    num_scored = min(sizes.num_blocks - ALWAYS_CHOSEN, W)

    def folded(x):
        """`[b, ...]` for each row and kv head."""
        return jnp.repeat(jnp.broadcast_to(x, (B, *x.shape[1:])), K, axis=0)

    whole_number, whole_compressed = folded(tables.whole_number), folded(tables.whole_compressed)
    keys = fold_keys(k)[:, :, 0]

    def of_group(args):
        begin, lse, first, stop, place, own, whole_first = args
        own_in_document = place // sizes.block_size
        # Behind the first, and before the two that are always there.
        end = jnp.where(own >= 0, whole_first + own_in_document - 1, 0)
        chosen = best(Problem(begin, lse, first, stop, whole_first, end, keys, whole_compressed), num_scored)
        number = jax.vmap(lambda number, chosen: number[chosen])(whole_number, jnp.maximum(chosen, 0))
        always = [
            jnp.where((own >= 0) & is_another, own - back, -1)
            for back, is_another in (
                (own_in_document, own_in_document > 1),
                (1, own_in_document > 0),
                (0, own_in_document >= 0),
            )
        ]
        return jnp.concatenate([jnp.stack(always, axis=-1), jnp.where(chosen >= 0, number, -1)], axis=-1)

    per_query = (
        fold_lse(lse, K).reshape(F, T, N // K),
        *map(
            folded,
            (queries.compressed_first, queries.compressed_stop, queries.place, queries.own, queries.whole_first),
        ),
    )
    begins = jnp.arange(0, T, group, dtype=jnp.int32)
    chosen = jax.lax.map(of_group, (begins, *(in_groups(x, group) for x in per_query)))
    chosen = jnp.moveaxis(chosen, 0, 1).reshape(B, K, -1, ALWAYS_CHOSEN + num_scored)
    return chosen[:, :, :T].swapaxes(1, 2)

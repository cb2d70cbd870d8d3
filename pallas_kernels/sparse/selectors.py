"""Selectors: from queries and keys to the blocks worth attending to.

Each scores pairs of blocks, and takes the best of those that the mask allows: so many of each block of queries
(`budget`), or as few as have a share of what it scores (`threshold`). No `[T, S]` array is made: rows of blocks are
scored in groups.

Choosing is two steps, which a device that holds a part of the keys can do apart: `summary`, what the scores need of the
keys, block by block, and `select_from`, the choice of some queries from the summary of all keys.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_heads
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.dispatch import Implementation
from pallas_kernels.mask import Mask
from pallas_kernels.online_softmax import finite_max
from pallas_kernels.schedule import make_schedule
from pallas_kernels.sparse import pallas_mosaic_gpu_antidiagonals as antidiagonals
from pallas_kernels.sparse.choose import heaviest, lists_of, most_scored
from pallas_kernels.sparse.selection import BlockSelection, attention_recall
from pallas_kernels.tokens import Tokens, validate_tokens

_MOST_SCORES_AT_ONCE = 1 << 24
"""float32 scores that are held at a time, about: 64 MB, and a few times that in temporaries."""

_SECTIONS = 8
"""Parts of the rows that are scored only up to where a mask lets them see: a causal one leaves 7/16 of all out."""


class _Call(NamedTuple):
    """What is to be scored: q in its own dtype, what there is of the keys, lengths cut into blocks, and which pairs may
    attend."""

    q: jax.Array
    summary: jax.Array
    num_kv_heads: int
    kv_len: int
    sizes: BlockSizes
    scale: float
    mask: Mask
    tokens: Tokens

    def multiply(self, spec: str, q: jax.Array, k: jax.Array) -> jax.Array:
        """einsum of the two times the scale, float32."""
        precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        return self.scale * jnp.einsum(spec, q, k, precision=precision, preferred_element_type=jnp.float32)

    def grouped(self, x: jax.Array, axis: int) -> jax.Array:
        """The query heads of an axis as kv heads, and the heads of a group."""
        K = self.num_kv_heads
        return x.reshape(*x.shape[:axis], K, x.shape[axis] // K, *x.shape[axis + 1 :])


class _Scorer(NamedTuple):
    """How rows of blocks are scored.

    Attributes:
      of_rows: A function of some _Rows and of which of their blocks are possible, bool `[B or 1, 1, rows, columns]`. It
        gives the scores of these blocks, float32 `[B, N, rows, columns]`: the logarithm, but for a constant of the row,
        of what the block is thought to have of the row's attention.
      numbers: How many are held at a time for the score of a pair of blocks.
      leaves_out: Whether blocks that are not possible cost it nothing.
    """

    of_rows: Callable[["_Rows", jax.Array], jax.Array]
    numbers: int = 1
    leaves_out: bool = False


class _Rows(NamedTuple):
    """Neighbouring blocks of queries, and how many blocks of keys, from the first on, they may see."""

    first: int | jax.Array
    num: int
    columns: int

    @property
    def numbers(self) -> jax.Array:
        return self.first + jnp.arange(self.num)

    def of(self, x: jax.Array, axis: int) -> jax.Array:
        """Theirs, of an array that has blocks of queries on this axis."""
        return jax.lax.dynamic_slice_in_dim(x, self.first, self.num, axis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selector(abc.ABC):
    """A way to choose blocks. Each query head has its own choice, or those of a kv head share one.

    Attributes:
      heads: Whose lists: "query", of each query head, or "kv", of each kv head, by the mean of its group's shares.
      sink_blocks: Blocks of keys from the start that are always taken, where the mask allows them.
      local_blocks: The last so many blocks that the mask allows to a block of queries, always taken: under a causal
        mask its own, and those before.
    """

    heads: str = "query"
    sink_blocks: int = 0
    local_blocks: int = 1

    def __post_init__(self):
        if self.heads not in ("query", "kv"):
            raise ValueError(f"heads: got {self.heads!r}, wanted 'query' or 'kv'")
        for name in ("sink_blocks", "local_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted 0 or more")

    def select(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        *,
        mask: Mask,
        block_sizes: BlockSizes,
        tokens: Tokens | None = None,
        budget: int | None = None,
        threshold: float | None = None,
        scale: float | None = None,
    ) -> BlockSelection:
        """Chooses blocks of keys for each block of queries; traceable, and nothing of it is differentiable.

        Args:
          q, k: Queries and keys, as the attention gets them.
          mask: Which pairs may attend, the same for all heads; blocks of which none may are never chosen.
          block_sizes: Tokens a block holds.
          tokens: Positions and segment ids; None means arange and one document.
          budget: Blocks a block of queries gets at most, those always taken among them.
          threshold: The share of a row's scores, in (0, 1], that its blocks must have: as few as do, the highest first.
            With a budget too, that is the most of them.
          scale: Multiplies q.k; default H ** -0.5.
        Raises: ValueError where an argument is wrong; it names it.
        """
        check_heads(f"{type(self).__name__}.select", {"q": q, "k": k})
        B, T, N, H = q.shape
        S, K = k.shape[1:3]
        if k.shape[0] != B or k.shape[3] != H or N % K:
            self._wrong(
                "select", f"q and k have shapes {q.shape} and {k.shape}, wanted one B and H, and a multiple of k's "
                "heads in q",
            )  # fmt: skip
        sizes = block_sizes.fit(T, S)
        self._check("select", q, S, sizes, mask, tokens, budget, threshold)
        summary = self._summary(jax.lax.stop_gradient(k), sizes.block_kv)
        return self._select(q, summary, S, K, sizes, mask, tokens, budget, threshold, scale)

    def summary(self, k: Float[Array, "B S K H"], block_kv: int) -> jax.Array:
        """What the choice needs of keys, block by block: `[B, blocks of keys, ..., K, any]`.

        Of parts of a sequence that are whole blocks the summaries, one after the other, are that of the whole.

        Args:
          block_kv: Tokens a block holds.
        Raises: NotImplementedError where the choice needs more (`split_refusal`).
        """
        self._refuse_to_split("summary")
        block_kv = min(block_kv, k.shape[1])
        self._check_sizes("summary", block_kv=block_kv)
        return self._summary(jax.lax.stop_gradient(k), block_kv)

    def select_from(
        self,
        q: Float[Array, "B T N H"],
        summary: jax.Array,
        *,
        kv_len: int,
        mask: Mask,
        block_sizes: BlockSizes,
        tokens: Tokens | None = None,
        budget: int | None = None,
        threshold: float | None = None,
        scale: float | None = None,
    ) -> BlockSelection:
        """`select` of some of the queries, from the summary of all keys.

        Args:
          q: Queries; each block of them is one of the whole sequence's.
          summary: Of all keys, in the order of the sequence.
          kv_len: How many keys there are, S.
          tokens: Of these queries and all keys.
          mask, block_sizes, budget, threshold, scale: As `select`.
        Raises: as `select`; NotImplementedError where the choice needs more than a summary (`split_refusal`).
        """
        self._refuse_to_split("select_from")
        sizes = block_sizes.fit(q.shape[1], kv_len)
        num_columns = -(-kv_len // sizes.block_kv)
        if summary.shape[:2] != (q.shape[0], num_columns) or q.shape[2] % summary.shape[-2]:
            self._wrong(
                "select_from", f"q and summary have shapes {q.shape} and {summary.shape}, wanted a summary of "
                f"{q.shape[0]} rows and {num_columns} blocks, and a multiple of its heads in q",
            )  # fmt: skip
        self._check("select_from", q, kv_len, sizes, mask, tokens, budget, threshold)
        summary = jax.lax.stop_gradient(summary)
        return self._select(q, summary, kv_len, summary.shape[-2], sizes, mask, tokens, budget, threshold, scale)

    @property
    def split_refusal(self) -> str | None:
        """Why it cannot choose from a summary of keys, in one sentence with a remedy; None if it can."""
        return None

    def _select(self, q, summary, S, K, sizes, mask, tokens, budget, threshold, scale) -> BlockSelection:
        B, T, N, H = q.shape
        call = _Call(
            jax.lax.stop_gradient(q), summary, K, S, sizes, H**-0.5 if scale is None else scale, mask,
            tokens or Tokens(),
        )  # fmt: skip
        num_rows, num_columns = -(-T // sizes.block_q), -(-S // sizes.block_kv)
        most = num_columns if budget is None else min(budget, num_columns)
        ranges = make_schedule(mask, tokens, q_len=T, kv_len=S, block_sizes=sizes).kv_blocks
        scorer = self._scorer(call)

        def possible_of(rows: _Rows) -> jax.Array:
            start, stop = (
                jnp.broadcast_to(x, (B, *x.shape[1:])) for x in (ranges.start[:, :, 0], ranges.stop[:, :, 0])
            )
            start, stop = (rows.of(x, 1)[..., None] for x in (start, stop))
            column = jnp.arange(rows.columns)
            return ((start <= column) & (column < stop)).any(axis=2)[:, None]

        def shares_of(rows: _Rows) -> jax.Array:
            possible = possible_of(rows)
            shares = _softmax(jnp.where(possible, scorer.of_rows(rows, possible), -jnp.inf))
            if self.heads == "kv":
                shares = jnp.mean(shares.reshape(B, K, N // K, *shares.shape[2:]), axis=2)
            # What a section of the rows does not see.
            return jnp.pad(shares, ((0, 0), (0, 0), (0, 0), (0, num_columns - rows.columns)))

        def lists(shares: jax.Array, rows: _Rows) -> jax.Array:
            return lists_of(self._choose(shares, possible_of(rows), most, threshold), most)

        scores_of_row = B * N * num_columns
        most_rows = max(1, _MOST_SCORES_AT_ONCE // (scores_of_row * scorer.numbers))
        everything = _Rows(0, num_rows, num_columns)
        if scores_of_row * num_rows <= _MOST_SCORES_AT_ONCE:
            sections = [everything] if scorer.leaves_out else _sections(call, num_rows, num_columns)
            shares = jnp.concatenate([_in_groups(shares_of, section, most_rows) for section in sections], axis=2)
            blocks = lists(shares, everything)
        else:
            blocks = _in_groups(lambda rows: lists(shares_of(rows), rows), everything, most_rows)
        return BlockSelection(blocks=blocks, q_len=T, kv_len=S, block_sizes=sizes)

    @abc.abstractmethod
    def _summary(self, k: jax.Array, block_kv: int) -> jax.Array:
        """What `_scores` needs of the keys; as `summary`, unless `split_refusal` says that it is not."""

    @abc.abstractmethod
    def _scorer(self, call: _Call) -> _Scorer:
        """Scores its blocks."""

    def _choose(self, shares, possible, most: int, threshold: float | None) -> jax.Array:
        always = self._always(possible)
        scores = jnp.where(possible, shares, -jnp.inf)
        scores = jnp.where(always, jnp.inf, scores)
        if threshold is not None:
            kept = heaviest(scores, shares, threshold)
            scores = jnp.where(kept | always, scores, -jnp.inf)
        return most_scored(scores, jnp.int32(most))

    def _always(self, possible: jax.Array) -> jax.Array:
        after = jnp.cumsum(possible[..., ::-1], axis=-1)[..., ::-1]
        is_sink = jnp.arange(possible.shape[-1]) < self.sink_blocks
        return possible & (is_sink | (after <= self.local_blocks))

    def _check(self, op: str, q, kv_len: int, sizes: BlockSizes, mask: Mask, tokens, budget, threshold) -> None:
        wrong = functools.partial(self._wrong, op)
        if mask.head_groups > 1:
            wrong(f"mask {mask} differs between heads, wanted one for all")
        if budget is None and threshold is None and self.needs_a_limit:
            wrong("got neither budget nor threshold, wanted one of them")
        always = self.sink_blocks + self.local_blocks
        if budget is not None and budget < max(1, always):
            wrong(f"budget: got {budget}, wanted at least {max(1, always)}: {always} blocks are always taken")
        if threshold is not None and not 0 < threshold <= 1:
            wrong(f"threshold: got {threshold}, wanted a share in (0, 1]")
        if tokens is not None:
            validate_tokens(f"{type(self).__name__}.{op}", tokens, *q.shape[:2], kv_len)
        self._check_sizes(op, block_q=sizes.block_q, block_kv=sizes.block_kv)

    def _check_sizes(self, op: str, **sizes: int) -> None:
        """Raises ValueError where blocks of such sizes cannot be scored."""
        del op, sizes

    def _wrong(self, op: str, message: str):
        raise ValueError(f"{type(self).__name__}.{op}: {message}")

    def _refuse_to_split(self, op: str) -> None:
        if self.split_refusal is not None:
            raise NotImplementedError(f"{type(self).__name__}.{op}: {self.split_refusal}")

    @property
    def needs_a_limit(self) -> bool:
        """Whether it takes all blocks unless it is told how many."""
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMean(Selector):
    """The product of the mean query and the mean key of two blocks: MoBA's gate for blocks of queries, and what
    MInference calls block-sparse. What cancels in a mean is not seen.

    Cost: 2 B N (T / block_q) (S / block_kv) H FLOPs.
    Reference: Lu et al. 2025, MoBA, arXiv:2502.13189, equation 6; Jiang et al. 2024, MInference, arXiv:2407.02490,
      Algorithm 3.
    """

    def _summary(self, k, block_kv):
        return _means(k, block_kv)

    def _scorer(self, call):
        mean_q = call.grouped(_means(call.q, call.sizes.block_q), 2)

        def scores_of(rows, _possible):
            scores = call.multiply("brkgh,bckh->bkgrc", rows.of(mean_q, 1), call.summary[:, : rows.columns])
            return scores.reshape(scores.shape[0], -1, *scores.shape[3:])

        return _Scorer(scores_of)


@dataclasses.dataclass(frozen=True, kw_only=True)
class XAttention(Selector):
    """Sums along antidiagonals: in every `stride` x `stride` square of logits, those of one antidiagonal, which meets
    each of its queries and each of its keys once, and every vertical and slash line through the square.

    Attributes:
      stride: S of the paper. Divides block_q and block_kv.
      implementation: Of the sums, "mosaic_gpu" or "xla"; None takes the former on a Hopper GPU where it serves the call
        (bfloat16, head dims 64 and 128, block_kv a multiple of 8 strides). NotImplementedError where the one that
        is named does not.

    Its summary of keys is all of them: nothing of an antidiagonal is left out.

    Cost: 2 B N T S H / stride FLOPs.
    Reference: Xu et al. 2025, XAttention, arXiv:2503.16428, section 2.1 and Algorithm 1.
    """

    stride: int = 16
    implementation: Implementation | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.stride < 1:
            raise ValueError(f"stride: got {self.stride}, wanted 1 or more")

    def _check_sizes(self, op, **sizes):
        for name, size in sizes.items():
            if size % self.stride:
                self._wrong(op, f"{name} is {size}, wanted a multiple of stride={self.stride}")

    def _summary(self, k, block_kv):
        return _squares(k, block_kv, self.stride)

    def _scorer(self, call):
        implementations = {"mosaic_gpu": self._by_mosaic_gpu, "xla": self._by_xla}
        return dispatch.run("XAttention.select", implementations, self.implementation, call)

    def _by_xla(self, call: _Call) -> _Scorer:
        stride, sizes = self.stride, call.sizes
        # Queries against the order of keys: the products of these long vectors are sums along antidiagonals. By head
        # and then by square, so that neither they nor the products are moved again.
        q = jnp.moveaxis(_squares(call.grouped(call.q, 2), sizes.block_q, stride)[:, :, :, ::-1], (4, 5), (1, 2))
        k = jnp.moveaxis(call.summary, 4, 1)
        q, k = q.reshape(*q.shape[:5], -1), k.reshape(*k.shape[:4], -1)
        seen_by = self._seen_by(call)

        def scores_of(rows, possible):
            sums = call.multiply("bkgrix,bkcjx->bkgricj", rows.of(q, 3), k[:, :, : rows.columns]) / stride
            sums = sums.reshape(sums.shape[0], -1, *sums.shape[3:])
            return _log_of_mean_share(jnp.where(seen_by(rows, possible)[:, None], sums, -jnp.inf))

        return _Scorer(scores_of, numbers=(sizes.block_q // stride) * (sizes.block_kv // stride))

    def _by_mosaic_gpu(self, call: _Call) -> _Scorer:
        stride, sizes = self.stride, call.sizes
        antidiagonals.check(call.q, stride=stride, block_kv=sizes.block_kv)
        q, k = _squares(call.q, sizes.block_q, stride), call.summary
        seen_by = self._seen_by(call)

        def scores_of(rows, possible):
            seen = seen_by(rows, possible)
            rows_q = rows.of(q, 1)
            sums = antidiagonals.group_logsumexp(
                rows_q.reshape(len(q), -1, *q.shape[3:]),
                k.reshape(len(k), -1, *k.shape[3:]),
                seen.reshape(len(seen), seen.shape[1] * seen.shape[2], -1),
                scale=call.scale / stride,
            )
            return _log_of_mean_share(sums.reshape(*sums.shape[:2], *seen.shape[1:4], -1))

        numbers = (sizes.block_q // stride) * (sizes.block_kv // stride // antidiagonals.GROUP)
        return _Scorer(scores_of, numbers=numbers, leaves_out=True)

    def _seen_by(self, call: _Call) -> Callable[[_Rows, jax.Array], jax.Array]:
        """A function of rows and their possible blocks: which squares count, `[B or 1, rows, squares, columns,
        squares]`."""
        q_ends = self._ends(*call.tokens.queries(call.q.shape[1]), call.sizes.block_q)
        kv_ends = self._ends(*call.tokens.keys(call.kv_len), call.sizes.block_kv)

        def seen_by(rows, possible):
            columns = _Ends(*(x[:, : rows.columns] for x in kv_ends))
            seen = self._seen(call.mask, _Ends(*(rows.of(x, 1) for x in q_ends)), columns)
            return seen & possible[:, 0, :, None, :, None]

        return seen_by

    def _ends(self, positions, segment_ids, block) -> "_Ends":
        def of_squares(x):
            x = _split(x, block, axis=1, mode="edge")
            x = x.reshape(*x.shape[:2], -1, self.stride)
            return jnp.stack([x[..., 0], x[..., -1]], axis=-1)

        length = positions.shape[1]
        start = _split(jnp.arange(length), block, axis=0, mode="constant", constant_values=length)
        return _Ends(of_squares(positions), of_squares(segment_ids), (start[:, :: self.stride] < length)[None])

    @staticmethod
    def _seen(mask: Mask, q: "_Ends", kv: "_Ends") -> jax.Array:
        """Whether a square has a corner that may attend, `[B or 1, rows, squares, columns, squares]`. More than that is
        not asked: of a square that the mask cuts all of the antidiagonal is taken.
        """
        q = jax.tree.map(lambda x: x[:, :, :, None, None], q)
        kv = jax.tree.map(lambda x: x[:, None, None], kv)
        corners = [
            mask.allowed(q.positions[..., i], kv.positions[..., j], q.segment_ids[..., i], kv.segment_ids[..., j])
            for i in range(2)
            for j in range(2)
        ]
        return functools.reduce(jnp.logical_or, corners) & q.is_there & kv.is_there


class _Ends(NamedTuple):
    """Of squares `[B or 1, blocks, squares]`: positions and segment ids of their first and last token, `[..., 2]`, and
    whether the first is not behind the end.
    """

    positions: jax.Array
    segment_ids: jax.Array
    is_there: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerticalSlash(Selector):
    """Columns and diagonals: the keys that the last queries attend to most, and the distances at which they do, hold
    for all queries. For tokens in order.

    Attributes:
      last_queries: How many queries tell.
      vertical, slash: How many keys, and how many distances, are taken.

    With a budget, blocks with more of the last queries' attention on their lines come first.

    Cost: 2 B N last_queries S H FLOPs.
    Reference: Jiang et al. 2024, MInference, arXiv:2407.02490, Algorithm 2.
    """

    last_queries: int = 64
    vertical: int = 64
    slash: int = 64

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("last_queries", 1), ("vertical", 0), ("slash", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted {least} or more")

    @property
    def needs_a_limit(self) -> bool:
        return False

    @property
    def split_refusal(self):
        return (
            "VerticalSlash scores keys by the last queries of the sequence, which only the device that holds these "
            "has; choose BlockMean, XAttention or AShape, or keep the sequence whole"
        )

    def _summary(self, k, block_kv):
        del block_kv
        return k

    def _scorer(self, call):
        (B, T, N, _), S, k, sizes = call.q.shape, call.kv_len, call.summary, call.sizes
        num = min(self.last_queries, T)
        first = T - num
        logits = call.multiply("btkgh,bskh->bkgts", call.grouped(call.q[:, first:], 2), k).reshape(B, N, num, S)
        (q_positions, q_segments), kv = call.tokens.queries(T), call.tokens.keys(S)
        allowed = call.mask.allowed(
            q_positions[:, first:, None], kv.positions[:, None], q_segments[:, first:, None], kv.segment_ids[:, None]
        )
        weights = _softmax(jnp.where(allowed[:, None], logits, -jnp.inf))
        of_key = jnp.sum(weights, axis=2)
        # By distance: T of them, 0 first; a key that comes later has none.
        distance = (first + jnp.arange(num))[:, None] - jnp.arange(S)
        place = jnp.where(distance >= 0, distance, T)
        of_distance = jnp.zeros((B, N, T)).at[:, :, place].add(weights, mode="drop")
        of_key = jnp.where(most_scored(of_key, jnp.int32(min(self.vertical, S))), of_key, 0.0)
        of_distance = jnp.where(most_scored(of_distance, jnp.int32(min(self.slash, T))), of_distance, 0.0)
        columns = jnp.sum(_split(of_key, sizes.block_kv, axis=2), axis=3)
        upto = jnp.pad(jnp.cumsum(of_distance, axis=2), ((0, 0), (0, 0), (1, 0)))
        block_q, block_kv = sizes.block_q, sizes.block_kv

        def scores_of(rows, _possible):
            row, column = rows.numbers[:, None], jnp.arange(rows.columns)
            farthest = (row + 1) * block_q - 1 - column * block_kv
            nearest = row * block_q - (column + 1) * block_kv + 1
            of_lines = upto[:, :, jnp.clip(farthest + 1, 0, T)] - upto[:, :, jnp.clip(nearest, 0, T)]
            return jnp.log(columns[:, :, None, : rows.columns] + jnp.maximum(of_lines, 0.0))

        return _Scorer(scores_of)

    def _choose(self, shares, possible, most, threshold):
        # A block without a line is not taken, however many may be.
        return super()._choose(shares, possible, most, threshold) & ((shares > 0) | self._always(possible))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AShape(Selector):
    """The first blocks and the nearest, whatever is in them: `sink_blocks` and `local_blocks`.

    Reference: Jiang et al. 2024, MInference, arXiv:2407.02490; Xiao et al. 2023, StreamingLLM, arXiv:2309.17453.
    """

    sink_blocks: int = 1
    local_blocks: int = 8

    @property
    def needs_a_limit(self) -> bool:
        return False

    def _summary(self, k, block_kv):
        B, S, K, _ = k.shape
        return jnp.zeros((B, -(-S // block_kv), K, 0))

    def _scorer(self, call):
        def scores_of(_rows, possible):
            return jnp.zeros((*call.q.shape[::2], *possible.shape[2:]))

        return _Scorer(scores_of)

    def _choose(self, shares, possible, most, threshold):
        chosen = super()._choose(shares, possible, most, threshold)
        return chosen & jnp.broadcast_to(self._always(possible), chosen.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerHead:
    """A selector for each query head, chosen beforehand: what `best_by_head` finds.

    Attributes:
      selectors: One for each query head, each with lists of query heads.
    """

    selectors: tuple[Selector, ...]

    def __post_init__(self):
        for i, selector in enumerate(self.selectors):
            if selector.heads != "query":
                raise ValueError(f"selectors[{i}].heads: got {selector.heads!r}, wanted 'query'")

    def select(self, q, k, **options) -> BlockSelection:
        """As `Selector.select`."""
        check_heads("PerHead.select", {"q": q, "k": k})
        return self._select("select", q, k.shape[2], [k] * len(self._distinct), 2, **options)

    def summary(self, k: Float[Array, "B S K H"], block_kv: int) -> tuple[jax.Array, ...]:
        """As `Selector.summary`, one for each distinct selector."""
        self._refuse_to_split("summary")
        return tuple(selector.summary(k, block_kv) for selector in self._distinct)

    def select_from(self, q, summary: tuple[jax.Array, ...], **options) -> BlockSelection:
        """As `Selector.select_from`."""
        self._refuse_to_split("select_from")
        return self._select("select_from", q, summary[0].shape[-2], summary, -2, **options)

    @property
    def split_refusal(self) -> str | None:
        """As `Selector.split_refusal`."""
        return next((x.split_refusal for x in self._distinct if x.split_refusal is not None), None)

    @property
    def _distinct(self) -> tuple[Selector, ...]:
        return tuple(dict.fromkeys(self.selectors))

    def _refuse_to_split(self, op: str) -> None:
        if self.split_refusal is not None:
            raise NotImplementedError(f"PerHead.{op}: {self.split_refusal}")

    def _select(self, op: str, q, num_kv_heads: int, of_keys, axis: int, **options) -> BlockSelection:
        """By the method `op` of each selector, from what it takes of keys, whose kv heads are on this axis."""
        N, group = q.shape[2], q.shape[2] // num_kv_heads
        if len(self.selectors) != N:
            raise ValueError(f"PerHead.{op}: q has {N} heads, wanted {len(self.selectors)}, one for each selector")
        found = {}
        for selector, keys in zip(self._distinct, of_keys, strict=True):
            heads = [head for head in range(N) if self.selectors[head] == selector]
            # Each with the keys of its own kv head.
            keys = jnp.take(keys, jnp.array([x // group for x in heads]), axis=axis, mode="clip")
            part = getattr(selector, op)(q[:, :, jnp.array(heads)], keys, **options)
            found |= {head: part.blocks[:, i] for i, head in enumerate(heads)}
        return dataclasses.replace(part, blocks=jnp.stack([found[head] for head in range(N)], axis=1))


def best_by_head(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    candidates: tuple[Selector, ...],
    *,
    mask: Mask,
    block_sizes: BlockSizes,
    tokens: Tokens | None = None,
    budget: int,
    scale: float | None = None,
) -> PerHead:
    """The candidate of the highest recall for each query head, on given queries and keys; of equals the first.

    To be called once, outside of jit, on activations of a model; the result is static.

    Reference: Jiang et al. 2024, MInference, arXiv:2407.02490, Algorithm 1, with blocks in the place of FLOPs.
    """
    options = dict(mask=mask, tokens=tokens, scale=scale)

    @functools.partial(jax.jit, static_argnums=2)
    def recall_of(q, k, candidate):
        selection = candidate.select(q, k, block_sizes=block_sizes, budget=budget, **options)
        return jnp.mean(attention_recall(q, k, selection, **options), axis=(0, 2))

    recalls = jnp.stack([recall_of(q, k, candidate) for candidate in candidates])
    return PerHead(selectors=tuple(candidates[int(i)] for i in jnp.argmax(recalls, axis=0)))


def _log_of_mean_share(sums: jax.Array) -> jax.Array:
    """Of sums `[B, N, rows, squares, columns, squares]` a softmax for each row of squares; what a block has of those of
    its rows, `[B, N, rows, columns]`, but for a factor, as a logarithm. Only sums over squares of a block are held.
    """
    greatest = finite_max(jnp.max(sums, axis=(4, 5), keepdims=True))
    of_blocks = jnp.sum(jnp.exp(sums - greatest), axis=5)
    total = jnp.sum(of_blocks, axis=4, keepdims=True)
    return jnp.log(jnp.sum(of_blocks / jnp.where(total > 0, total, 1.0), axis=3))


def _softmax(x: jax.Array) -> jax.Array:
    """Over the last dim; 0 where all of it is -inf."""
    weights = jnp.exp(x - finite_max(jnp.max(x, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def _split(x: jax.Array, size: int, *, axis: int, **pad) -> jax.Array:
    """The axis in blocks, the last one filled up, with zeros by default; `pad` as of jnp.pad."""
    x = jnp.pad(x, [(0, -x.shape[i] % size) if i == axis else (0, 0) for i in range(x.ndim)], **pad)
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _means(x: jax.Array, block: int) -> jax.Array:
    """The mean of each block, `[B, blocks, heads, H]`; of a ragged one, of what it has."""
    blocks = _split(x, block, axis=1)
    counts = jnp.minimum(block, x.shape[1] - block * jnp.arange(blocks.shape[1])).astype(jnp.float32)
    return jnp.sum(blocks, axis=2, dtype=jnp.float32) / counts[:, None, None]


def _squares(x: jax.Array, block: int, stride: int) -> jax.Array:
    """`[B, T, ...]` to `[B, blocks, block / stride, stride, ...]`."""
    blocks = _split(x, block, axis=1)
    return blocks.reshape(*blocks.shape[:2], -1, stride, *blocks.shape[3:])


def _sections(call: _Call, num_rows: int, num_columns: int) -> list[_Rows]:
    """All rows, in parts that each have the columns up to where the mask lets them see."""
    after = call.mask.span.right
    if after is None or call.tokens.q_positions is not None or call.tokens.kv_positions is not None:
        return [_Rows(0, num_rows, num_columns)]
    size = -(-num_rows // _SECTIONS)
    sections = []
    for first in range(0, num_rows, size):
        stop = min(first + size, num_rows)
        seen = -(-(stop * call.sizes.block_q + max(0, after)) // call.sizes.block_kv)
        sections.append(_Rows(first, stop - first, min(seen, num_columns)))
    return sections


def _in_groups(function, rows: _Rows, most_rows: int) -> jax.Array:
    """`function` of all rows, `[B, heads, rows, any]`, at most so many at a time."""
    if rows.num <= most_rows:
        return function(rows)
    # The last group begins earlier, where it would end behind the last row.
    starts = np.minimum(np.arange(0, rows.num, most_rows), rows.num - most_rows)
    groups = jax.lax.map(
        lambda start: function(_Rows(start, most_rows, rows.columns)), jnp.asarray(rows.first + starts)
    )  # fmt: skip
    row = np.arange(rows.num)
    group = row // most_rows
    return jnp.moveaxis(groups, 0, 2)[:, :, group, row - starts[group]]

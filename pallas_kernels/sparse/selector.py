"""What selectors have in common: from queries and keys to the blocks worth attending to.

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

from pallas_kernels.arguments import check_heads, check_kind
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.mask import Mask
from pallas_kernels.online_softmax import finite_max
from pallas_kernels.schedule import make_schedule
from pallas_kernels.sparse.choose import heaviest, lists_of, most_scored
from pallas_kernels.sparse.selection import BlockSelection
from pallas_kernels.tokens import Tokens, validate_tokens

_MOST_SCORES_AT_ONCE = 1 << 24
"""float32 scores that are held at a time, about: 64 MB, and a few times that in temporaries."""

_SECTIONS = 8
"""Parts of the rows that are scored only up to where a mask lets them see: a causal one leaves 7/16 of all out."""


class Call(NamedTuple):
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


class Scorer(NamedTuple):
    """How rows of blocks are scored.

    Attributes:
      of_rows: A function of some Rows and of which of their blocks are possible, bool `[B or 1, 1, rows, columns]`. It
        gives the scores of these blocks, float32 `[B, N, rows, columns]`: the logarithm, but for a constant of the row,
        of what the block is thought to have of the row's attention.
      numbers: How many are held at a time for the score of a pair of blocks.
      leaves_out: Whether blocks that are not possible cost it nothing.
    """

    of_rows: Callable[["Rows", jax.Array], jax.Array]
    numbers: int = 1
    leaves_out: bool = False


class Rows(NamedTuple):
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
        check_heads(f"{type(self).__name__}.summary", {"k": k})
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
        check_heads(f"{type(self).__name__}.select_from", {"q": q})
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
        call = Call(
            jax.lax.stop_gradient(q), summary, K, S, sizes, H**-0.5 if scale is None else scale, mask,
            tokens or Tokens(),
        )  # fmt: skip
        num_rows, num_columns = -(-T // sizes.block_q), -(-S // sizes.block_kv)
        most = num_columns if budget is None else min(budget, num_columns)
        ranges = make_schedule(mask, tokens, q_len=T, kv_len=S, block_sizes=sizes).kv_blocks
        scorer = self._scorer(call)

        def possible_of(rows: Rows) -> jax.Array:
            start, stop = (
                jnp.broadcast_to(x, (B, *x.shape[1:])) for x in (ranges.start[:, :, 0], ranges.stop[:, :, 0])
            )
            start, stop = (rows.of(x, 1)[..., None] for x in (start, stop))
            column = jnp.arange(rows.columns)
            return ((start <= column) & (column < stop)).any(axis=2)[:, None]

        def shares_of(rows: Rows) -> jax.Array:
            possible = possible_of(rows)
            shares = softmax_or_zero(jnp.where(possible, scorer.of_rows(rows, possible), -jnp.inf))
            if self.heads == "kv":
                shares = jnp.mean(shares.reshape(B, K, N // K, *shares.shape[2:]), axis=2)
            # What a section of the rows does not see.
            return jnp.pad(shares, ((0, 0), (0, 0), (0, 0), (0, num_columns - rows.columns)))

        def lists(shares: jax.Array, rows: Rows) -> jax.Array:
            return lists_of(self._choose(shares, possible_of(rows), most, threshold), most)

        scores_of_row = B * N * num_columns
        most_rows = max(1, _MOST_SCORES_AT_ONCE // (scores_of_row * scorer.numbers))
        everything = Rows(0, num_rows, num_columns)
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
    def _scorer(self, call: Call) -> Scorer:
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
        check_kind(f"{type(self).__name__}.{op}", "mask", mask, Mask, optional=False)
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


def softmax_or_zero(x: jax.Array) -> jax.Array:
    """Over the last dim; 0 where all of it is -inf."""
    weights = jnp.exp(x - finite_max(jnp.max(x, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def in_blocks(x: jax.Array, size: int, *, axis: int, **pad) -> jax.Array:
    """The axis in blocks, the last one filled up, with zeros by default; `pad` as of jnp.pad."""
    x = jnp.pad(x, [(0, -x.shape[i] % size) if i == axis else (0, 0) for i in range(x.ndim)], **pad)
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _sections(call: Call, num_rows: int, num_columns: int) -> list[Rows]:
    """All rows, in parts that each have the columns up to where the mask lets them see."""
    after = call.mask.span.right
    if after is None or call.tokens.q_positions is not None or call.tokens.kv_positions is not None:
        return [Rows(0, num_rows, num_columns)]
    size = -(-num_rows // _SECTIONS)
    sections = []
    for first in range(0, num_rows, size):
        stop = min(first + size, num_rows)
        seen = -(-(stop * call.sizes.block_q + max(0, after)) // call.sizes.block_kv)
        sections.append(Rows(first, stop - first, min(seen, num_columns)))
    return sections


def _in_groups(function, rows: Rows, most_rows: int) -> jax.Array:
    """`function` of all rows, `[B, heads, rows, any]`, at most so many at a time."""
    if rows.num <= most_rows:
        return function(rows)
    # The last group begins earlier, where it would end behind the last row.
    starts = np.minimum(np.arange(0, rows.num, most_rows), rows.num - most_rows)
    groups = jax.lax.map(
        lambda start: function(Rows(start, most_rows, rows.columns)), jnp.asarray(rows.first + starts)
    )  # fmt: skip
    row = np.arange(rows.num)
    group = row // most_rows
    return jnp.moveaxis(groups, 0, 2)[:, :, group, row - starts[group]]

"""Mask: which (query, key) pairs may attend, as static, hashable, composable predicates.

A mask answers two questions from one set of rules: `allowed` for a pair of tokens, and `tile` for a whole tile of
pairs from the tile's bounds. References, schedules and kernels call the same methods, so they cannot disagree. Here are
the masks that most models need, and the ways to combine masks; mask_patterns.py and mask_grids.py have the sparse
patterns.
"""

import abc
import dataclasses
import functools
import math
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pallas_kernels.arguments import check_kind
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.tokens import Tokens

_BLOCKS_OF_A_PLOT = BlockSizes(block_q=16, block_kv=16)


class Bounds(NamedTuple):
    """The least and greatest position and segment id among the tokens of a block (inclusive)."""

    position_min: ArrayLike
    position_max: ArrayLike
    segment_min: ArrayLike
    segment_max: ArrayLike


class TileVerdict(NamedTuple):
    """What is known of a tile: `some` False means no pair may attend, `all` True means every pair may.

    Both err on the safe side: `some` may be True of an empty tile and `all` False of a full one.
    """

    some: ArrayLike
    all: ArrayLike


class Span(NamedTuple):
    """How far a mask can see at most: from t - left to t + right, in positions. None is no bound.

    Both may be negative: a mask that sees only the past, 40 positions away or more, has right = -40.
    """

    left: int | None
    right: int | None

    @property
    def is_bounded(self) -> bool:
        """Whether it is a window: bounded on both sides."""
        return None not in self


@dataclasses.dataclass(frozen=True)
class Mask(abc.ABC):
    """A predicate over (query, key) pairs; combine masks with `&`, `|` and `~`.

    Masks are static: they hash, compare by value, and are passed to jitted functions as static arguments. Everything
    that changes from batch to batch (positions, segment ids) is in `Tokens`.
    """

    @property
    def uses_segments(self) -> bool:
        """Whether the answer depends on segment ids."""
        return False

    @property
    def within_documents(self) -> bool:
        """Whether every allowed pair is of one document, so that padding takes part in none."""
        return False

    @property
    def head_groups(self) -> int:
        """1 where all heads share the mask; otherwise the number of query heads must be a multiple of this."""
        return 1

    @property
    def span(self) -> Span:
        """Bounds on the distance between the positions of a query and of a key that it may attend to.

        On the safe side: no allowed pair is farther apart, and a bound may be None although there is one.
        """
        return Span(None, None)

    def of_head(self, head: int, num_heads: int) -> "Mask":
        """The mask of one query head of `num_heads`: the same for all heads, unless a PerHead is part of it."""
        del head, num_heads
        return self

    def num_runs(self, length: int, gap: int) -> int:
        """In how many runs of neighbouring positions the keys of a query lie, or the queries of a key.

        A hint, from which a schedule takes how many ranges to hold: where it is too low, ranges take in blocks that
        hold nothing.

        Args:
          length: Number of positions.
          gap: Runs that are less than this many positions apart count as one.
        """
        del length, gap
        return 1

    @abc.abstractmethod
    def allowed(
        self,
        q_positions: ArrayLike,
        kv_positions: ArrayLike,
        q_segment_ids: ArrayLike,
        kv_segment_ids: ArrayLike,
    ) -> ArrayLike:
        """Whether each query may attend to each key; bool, of the arguments' broadcast shape."""

    @abc.abstractmethod
    def tile(self, q: Bounds, kv: Bounds) -> TileVerdict:
        """None, some or all of the pairs of a tile, from the bounds of its queries and keys."""

    def allowed_by_head(self, num_heads: int, *pair: ArrayLike) -> jax.Array:
        """`allowed` with the query heads as a dim: `[..., num_heads or 1, T, S]` for a pair of `[..., T, S]`.

        The dim is 1 where all heads share the mask. A mask that several heads share is computed once.

        Raises: ValueError unless num_heads is a multiple of `head_groups`.
        """
        masks = self.by_head(num_heads)
        distinct = tuple(dict.fromkeys(masks))
        allowed = jnp.stack(jnp.broadcast_arrays(*(mask.allowed(*pair) for mask in distinct)), axis=-3)
        if len(distinct) == 1:
            return allowed
        return jnp.take(allowed, np.array([distinct.index(mask) for mask in masks]), axis=-3)

    def by_head(self, num_heads: int) -> "tuple[Mask, ...]":
        """The mask of each query head. Raises ValueError unless num_heads is a multiple of `head_groups`."""
        if num_heads % self.head_groups:
            raise ValueError(
                f"mask: it differs between {self.head_groups} groups of heads, got {num_heads} query heads, wanted a "
                "multiple; give PerHead a number of masks that divides the number of heads"
            )
        return tuple(self.of_head(head, num_heads) for head in range(num_heads))

    def dense(self, tokens: Tokens | None, q_len: int, kv_len: int, *, num_heads: int | None = None) -> ArrayLike:
        """The mask as `[B or 1, T, S]` bool, or given num_heads as `[B or 1, num_heads or 1, T, S]`.

        Memory O(T S): for references, tests and pictures only.
        """
        tokens = tokens or Tokens()
        q, kv = tokens.queries(q_len), tokens.keys(kv_len)
        pair = (
            q.positions[:, :, None],
            kv.positions[:, None, :],
            q.segment_ids[:, :, None],
            kv.segment_ids[:, None, :],
        )
        return self.allowed(*pair) if num_heads is None else self.allowed_by_head(num_heads, *pair)

    def plot(
        self,
        tokens: Tokens | None = None,
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
        block_sizes: BlockSizes = _BLOCKS_OF_A_PLOT,
        row: int = 0,
        num_heads: int | None = None,
        ax: Any = None,
    ) -> Any:
        """Draws which pairs may attend, and over it the blocks that a schedule of this mask visits.

        A visited block is outlined: in green and hatched where no pair needs testing, in red where no pair may attend,
        so that visiting it is for nothing. Where heads differ, the darker a pair the more heads allow it.

        Args:
          tokens: Positions and segment ids; None means arange and one document.
          q_len, kv_len: Tokens to draw, at most 4M pairs; default those of `tokens`, else 128, and as many keys.
          block_sizes: Tokens a block. The op's own show only where the sequence is long enough to have many of them.
          row: Which row of the batch to draw.
          num_heads: Query heads, where the mask differs between them; default one a group.
          ax: Matplotlib axes to draw into; None makes a figure.
        Returns: The matplotlib Axes; `.figure.savefig("mask.png")` works without a display.
        Raises: ImportError without matplotlib, which the extra `plot` installs; ValueError where there is too much to
          draw.
        """
        from pallas_kernels import mask_plot  # the schedule stands above masks

        return mask_plot.plot(
            self,
            tokens,
            q_len=q_len,
            kv_len=kv_len,
            block_sizes=block_sizes,
            row=row,
            num_heads=num_heads,
            ax=ax,
        )

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> "Mask":
        return Not(self)

    def __bool__(self):
        raise TypeError("a Mask has no truth value: combine masks with & | ~, not with and, or, not")


def _broadcast_true(*arrays) -> jax.Array:
    return jnp.ones(jnp.broadcast_shapes(*(jnp.shape(a) for a in arrays)), bool)


def _least(bounds: Iterable[int | None]) -> int | None:
    return min((bound for bound in bounds if bound is not None), default=None)


def _widest(spans: Iterable[Span]) -> Span:
    return Span(*(None if None in bounds else max(bounds) for bounds in zip(*spans, strict=True)))


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query may attend to every key."""

    def allowed(self, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        return _broadcast_true(q_positions, kv_positions, q_segment_ids, kv_segment_ids)

    def tile(self, q, kv):
        true = _broadcast_true(q.position_min, kv.position_min)
        return TileVerdict(true, true)


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """A query at position t may attend to keys at positions <= t + offset."""

    offset: int = 0

    @property
    def span(self):
        return Span(None, self.offset)

    def allowed(self, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        return kv_positions <= q_positions + self.offset

    def tile(self, q, kv):
        return TileVerdict(
            some=kv.position_min <= q.position_max + self.offset,
            all=kv.position_max <= q.position_min + self.offset,
        )


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """A query at position t may attend to keys at positions t - left to t + right, both included.

    None leaves that side open. The causal window of W tokens, the query's own included, is `Window(W - 1, 0)`.
    """

    left: int | None = None
    right: int | None = None

    def __post_init__(self):
        for name in ("left", "right"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"Window: {name}={value}, wanted None or a number of tokens >= 0")

    @property
    def span(self):
        return Span(self.left, self.right)

    def allowed(self, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        distance = kv_positions - q_positions
        inside = _broadcast_true(distance)
        if self.left is not None:
            inside &= distance >= -self.left
        if self.right is not None:
            inside &= distance <= self.right
        return inside

    def tile(self, q, kv):
        nearest_left, farthest_right = kv.position_min - q.position_max, kv.position_max - q.position_min
        some = every = _broadcast_true(nearest_left, farthest_right)
        if self.left is not None:
            some &= farthest_right >= -self.left
            every &= nearest_left >= -self.left
        if self.right is not None:
            some &= nearest_left <= self.right
            every &= farthest_right <= self.right
        return TileVerdict(some, every)


@dataclasses.dataclass(frozen=True)
class SameDocument(Mask):
    """A query may attend to keys of its own document (equal segment ids); padding (negative ids) to nothing."""

    @property
    def uses_segments(self):
        return True

    @property
    def within_documents(self):
        return True

    def allowed(self, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        return (q_segment_ids == kv_segment_ids) & (q_segment_ids >= 0)

    def tile(self, q, kv):
        first_shared = jnp.maximum(jnp.maximum(q.segment_min, kv.segment_min), 0)
        one_document = (q.segment_min == q.segment_max) & (kv.segment_min == kv.segment_max)
        return TileVerdict(
            some=first_shared <= jnp.minimum(q.segment_max, kv.segment_max),
            all=one_document & (q.segment_min == kv.segment_min) & (q.segment_min >= 0),
        )


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """Any query may attend to keys at positions < length."""

    length: int

    def __post_init__(self):
        if self.length < 0:
            raise ValueError(f"Prefix: length={self.length}, wanted a number of tokens >= 0")

    def allowed(self, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        return (kv_positions < self.length) & _broadcast_true(q_positions)

    def tile(self, q, kv):
        queries = _broadcast_true(q.position_min)
        return TileVerdict(
            some=(kv.position_min < self.length) & queries,
            all=(kv.position_max < self.length) & queries,
        )


@dataclasses.dataclass(frozen=True)
class _Pair(Mask):
    left: Mask
    right: Mask

    @property
    def uses_segments(self):
        return self.left.uses_segments or self.right.uses_segments

    @property
    def head_groups(self):
        return math.lcm(self.left.head_groups, self.right.head_groups)

    def of_head(self, head, num_heads):
        return type(self)(self.left.of_head(head, num_heads), self.right.of_head(head, num_heads))


@dataclasses.dataclass(frozen=True)
class And(_Pair):
    """Pairs that both masks allow."""

    @property
    def within_documents(self):
        return self.left.within_documents or self.right.within_documents

    @property
    def span(self):
        return Span(*(_least(bounds) for bounds in zip(self.left.span, self.right.span, strict=True)))

    def num_runs(self, length, gap):
        return self.left.num_runs(length, gap) + self.right.num_runs(length, gap) - 1

    def allowed(self, *pair):
        return self.left.allowed(*pair) & self.right.allowed(*pair)

    def tile(self, q, kv):
        left, right = self.left.tile(q, kv), self.right.tile(q, kv)
        return TileVerdict(left.some & right.some, left.all & right.all)


@dataclasses.dataclass(frozen=True)
class Or(_Pair):
    """Pairs that at least one of the masks allows."""

    @property
    def within_documents(self):
        return self.left.within_documents and self.right.within_documents

    @property
    def span(self):
        return _widest((self.left.span, self.right.span))

    def num_runs(self, length, gap):
        return self.left.num_runs(length, gap) + self.right.num_runs(length, gap)

    def allowed(self, *pair):
        return self.left.allowed(*pair) | self.right.allowed(*pair)

    def tile(self, q, kv):
        left, right = self.left.tile(q, kv), self.right.tile(q, kv)
        return TileVerdict(left.some | right.some, left.all | right.all)


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """Pairs that the mask does not allow."""

    mask: Mask

    @property
    def uses_segments(self):
        return self.mask.uses_segments

    @property
    def head_groups(self):
        return self.mask.head_groups

    def of_head(self, head, num_heads):
        return Not(self.mask.of_head(head, num_heads))

    def num_runs(self, length, gap):
        return self.mask.num_runs(length, gap) + 1

    def allowed(self, *pair):
        return ~self.mask.allowed(*pair)

    def tile(self, q, kv):
        verdict = self.mask.tile(q, kv)
        return TileVerdict(some=~verdict.all, all=~verdict.some)


@dataclasses.dataclass(frozen=True)
class PerHead(Mask):
    """Query head n of N follows `masks[n * len(masks) // N]`: one mask for each equal group of neighbouring heads.

    Such a mask has no `allowed` of its own: implementations ask `allowed_by_head`, and those that cannot serve
    `head_groups > 1` refuse it. A schedule has the blocks of each group of heads (`by_head`); `tile` answers for all of
    them at once. Under grouped queries a head is a query head.
    """

    masks: tuple[Mask, ...]

    def __post_init__(self):
        if not self.masks:
            raise ValueError("PerHead: masks=(), wanted at least one Mask")
        for mask in self.masks:
            check_kind("PerHead", "a part of masks", mask, Mask, optional=False)

    @property
    def uses_segments(self):
        return any(mask.uses_segments for mask in self.masks)

    @property
    def within_documents(self):
        return all(mask.within_documents for mask in self.masks)

    @property
    def span(self):
        return _widest(mask.span for mask in self.masks)

    @property
    def head_groups(self):
        return math.lcm(len(self.masks), *(mask.head_groups for mask in self.masks))

    def of_head(self, head, num_heads):
        return self.masks[head * len(self.masks) // num_heads].of_head(head, num_heads)

    def num_runs(self, length, gap):
        return sum(mask.num_runs(length, gap) for mask in set(self.masks))

    def allowed(self, *pair):
        raise TypeError(
            f"PerHead: allowed() of {self}, which differs between heads; ask allowed_by_head, or dense with num_heads"
        )

    def tile(self, q, kv):
        verdicts = [mask.tile(q, kv) for mask in self.masks]
        return TileVerdict(
            some=functools.reduce(operator.or_, (verdict.some for verdict in verdicts)),
            all=functools.reduce(operator.and_, (verdict.all for verdict in verdicts)),
        )


def gap_between_blocks(gap: int, block: int) -> int:
    """How many positions apart are two runs, of a pattern of whole blocks, if they do not count as one.

    A gap anywhere holds a block where it is almost as long as two; one between whole blocks of the pattern begins where
    a block does.
    """
    one_block = (gap + 1) // 2
    return one_block if block >= one_block else gap

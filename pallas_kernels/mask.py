"""Mask: which (query, key) pairs may attend, as static, hashable, composable predicates.

A mask answers two questions from one set of rules: `allowed` for a pair of tokens, and `tile` for a whole tile of
pairs from the tile's bounds. References, schedules and kernels call the same methods, so they cannot disagree.
"""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.tokens import Tokens


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

    def dense(self, tokens: Tokens | None, q_len: int, kv_len: int) -> ArrayLike:
        """The mask as `[B or 1, T, S]` bool. Memory O(T S): for references, tests and pictures only."""
        tokens = tokens or Tokens()
        q, kv = tokens.queries(q_len), tokens.keys(kv_len)
        return self.allowed(
            q.positions[:, :, None],
            kv.positions[:, None, :],
            q.segment_ids[:, :, None],
            kv.segment_ids[:, None, :],
        )

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)

    def __bool__(self):
        raise TypeError("a Mask has no truth value: combine masks with & | ~, not with and, or, not")


def _broadcast_true(*arrays) -> jax.Array:
    return jnp.ones(jnp.broadcast_shapes(*(jnp.shape(a) for a in arrays)), bool)


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


@dataclasses.dataclass(frozen=True)
class And(_Pair):
    """Pairs that both masks allow."""

    @property
    def within_documents(self):
        return self.left.within_documents or self.right.within_documents

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

    def allowed(self, *pair):
        return ~self.mask.allowed(*pair)

    def tile(self, q, kv):
        verdict = self.mask.tile(q, kv)
        return TileVerdict(some=~verdict.all, all=~verdict.some)

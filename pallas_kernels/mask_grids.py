"""Neighborhoods on grids as masks: positions count the tokens of an image, a video or a sequence row by row.

As the patterns of mask_patterns.py they read positions, which restart in every document of a packed row.
"""

import abc
import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pallas_kernels.mask import Bounds, Mask, TileVerdict, gap_between_blocks


class _Grid(Mask):
    """Positions count a grid: a query may attend to a key on it where every axis lets it.

    What an axis says of a pair, `sees`, and of a tile, `verdict`, holds of positions on the grid.
    """

    grid: tuple[int, ...]

    def allowed(self, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        near = self._on_grid(q_positions) & self._on_grid(kv_positions)
        for axis in self._axes():
            near &= axis.sees(q_positions, kv_positions)
        return near

    def tile(self, q, kv):
        size = math.prod(self.grid)
        some = (q.position_min < size) & (q.position_max >= 0) & (kv.position_min < size) & (kv.position_max >= 0)
        every = self._on_grid(q.position_min) & self._on_grid(q.position_max)
        every &= self._on_grid(kv.position_min) & self._on_grid(kv.position_max)
        for axis in self._axes():
            verdict = axis.verdict(q, kv)
            some &= verdict.some
            every &= verdict.all
        return TileVerdict(some, every)

    def _on_grid(self, positions: ArrayLike) -> ArrayLike:
        return (positions >= 0) & (positions < math.prod(self.grid))

    @abc.abstractmethod
    def _axes(self) -> "Iterator[_GridAxis | _StridedAxis]":
        """Outermost first."""


@dataclasses.dataclass(frozen=True)
class Neighborhood(_Grid):
    """Positions count a grid in row-major order: a query may attend to keys near it along every axis of the grid.

    |center(t)[a] - s[a]| <= radius[a] for each axis a, where t[a] and s[a] are the coordinates. Positions that are not
    on the grid take part in no pair.

    Attributes:
      grid: Tokens along each axis, outermost first: (H, W), or (frames, H, W).
      radius: Reach along each axis, in tokens, or in tiles where there are any.
      tile_shape: If given, coordinates and radius count tiles of that many tokens along each axis: sliding tile
        attention.
      shift_at_edges: Whether the center is moved inwards at the edges of the grid, so that every query sees as many
        keys, as in neighborhood attention. Otherwise the center is the query itself, and the window is cut off.

    Reference: Hassani et al., Neighborhood Attention Transformer, arXiv:2204.07143, section 3.1; Zhang et al., Fast
    Video Generation with Sliding Tile Attention, arXiv:2502.04507, section 3.
    """

    grid: tuple[int, ...]
    radius: tuple[int, ...]
    tile_shape: tuple[int, ...] | None = None
    shift_at_edges: bool = True

    def __post_init__(self):
        num_axes = len(self.grid)
        for name, least in (("grid", 1), ("radius", 0), ("tile_shape", 1)):
            value = getattr(self, name)
            if value is not None and (not value or len(value) != num_axes or min(value) < least):
                raise ValueError(
                    f"Neighborhood: {name}={value} with grid={self.grid}, wanted a number >= {least} for each axis of "
                    "the grid"
                )

    def num_runs(self, length, gap):
        runs, extent = 1, 1  # of a window that is one token along the axes so far, innermost first
        for axis in reversed(list(self._axes())):
            if axis.step - extent >= gap:
                # A key near an edge is also seen from the edge, by queries whose window was moved inwards.
                reach = axis.radius * (3 if self.shift_at_edges else 2) + 1
                runs *= min(reach * axis.tile, axis.length)
            extent += (min((2 * axis.radius + 1) * axis.tile, axis.length) - 1) * axis.step
        return runs

    def _axes(self) -> "Iterator[_GridAxis]":
        tile_shape = self.tile_shape or (1,) * len(self.grid)
        for i, (length, radius, tile) in enumerate(zip(self.grid, self.radius, tile_shape, strict=True)):
            yield _GridAxis(length, math.prod(self.grid[i + 1 :]), radius, tile, self.shift_at_edges)


class _GridAxis(NamedTuple):
    """One axis of a grid.

    Attributes:
      length: Tokens along it.
      step: Positions from one token to the next along it.
      radius: Reach, in tiles.
      tile: Tokens along it that make a tile.
      shift_at_edges: As in Neighborhood.
    """

    length: int
    step: int
    radius: int
    tile: int
    shift_at_edges: bool

    def tile_of(self, positions: ArrayLike) -> ArrayLike:
        """The tile's number along this axis, from 0."""
        return positions // self.step % self.length // self.tile

    def tiles_of(self, bounds: Bounds) -> tuple[ArrayLike, ArrayLike]:
        """The first and the last tile that positions within the bounds may be in."""
        first, last = _coordinate_bounds(bounds.position_min, bounds.position_max, self.step, self.length)
        return first // self.tile, last // self.tile

    def sees(self, q_positions: ArrayLike, kv_positions: ArrayLike) -> ArrayLike:
        return jnp.abs(self.center(self.tile_of(q_positions)) - self.tile_of(kv_positions)) <= self.radius

    def verdict(self, q: Bounds, kv: Bounds) -> TileVerdict:
        q_first, q_last = (self.center(x) for x in self.tiles_of(q))
        kv_first, kv_last = self.tiles_of(kv)
        return TileVerdict(
            some=(kv_first <= q_last + self.radius) & (kv_last >= q_first - self.radius),
            all=(kv_last <= q_first + self.radius) & (kv_first >= q_last - self.radius),
        )

    def center(self, tile: ArrayLike) -> ArrayLike:
        """The middle of the window of queries in this tile; grows with the tile."""
        if not self.shift_at_edges:
            return tile
        num_tiles = -(-self.length // self.tile)
        # A window wider than the axis sees all of it.
        return jnp.clip(tile, self.radius, max(self.radius, num_tiles - 1 - self.radius))


@dataclasses.dataclass(frozen=True)
class StridedNeighborhood(_Grid):
    """Tokens of a grid in groups of `stride` along each axis: all queries of a group may attend to one window of keys.

    It is the window of the group's middle query, or the one after the middle, moved inwards at the edges of the grid. A
    stride of 1 is neighborhood attention; one as large as the window is blocked attention. Positions that are not on
    the grid take part in no pair.

    Attributes:
      grid: Tokens along each axis, outermost first: (L,), (H, W), or (frames, H, W).
      window: Keys along each axis that a query sees; of an even number there is one more before the query than after.
      stride: Queries along each axis that share a window.
      tile_shape: If given, positions count the grid tile by tile, each of that many tokens along each axis, in
        row-major order of the tiles and within them. Otherwise they count it in row-major order.

    Reference: Hassani et al., Generalized Neighborhood Attention, arXiv:2504.16922.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    tile_shape: tuple[int, ...] | None = None

    def __post_init__(self):
        for name, most in (("grid", self.grid), ("window", self.grid), ("stride", self.window)):
            value = getattr(self, name)
            fits = value and len(value) == len(self.grid) and all(1 <= x <= y for x, y in zip(value, most, strict=True))
            if not fits:
                raise ValueError(
                    f"StridedNeighborhood: {name}={value} with grid={self.grid}, wanted a number >= 1 for each axis, "
                    "of the window at most the grid's and of the stride at most the window's"
                )
        tile = self.tile_shape
        if tile is not None and (
            len(tile) != len(self.grid) or min(tile) < 1 or any(x % y for x, y in zip(self.grid, tile, strict=True))
        ):
            raise ValueError(
                f"StridedNeighborhood: tile_shape={tile} with grid={self.grid}, wanted a divisor for each axis of it"
            )

    def num_runs(self, length, gap):
        runs, extent = 1, 0  # of a window along the axes so far, innermost first
        for axis in reversed(list(self._axes())):
            step, (keys, queries) = axis.tile_step * axis.tile_size, axis.most_tiles()
            extent = extent or axis.tile_size
            if step - extent >= gap_between_blocks(gap, axis.tile_size):
                runs *= max(keys, queries)
            extent += (keys - 1) * step
        return runs

    def _axes(self) -> "Iterator[_StridedAxis]":
        tile_shape = self.tile_shape or (1,) * len(self.grid)
        num_tiles = tuple(length // tile for length, tile in zip(self.grid, tile_shape, strict=True))
        for i, (length, window, stride, tile) in enumerate(
            zip(self.grid, self.window, self.stride, tile_shape, strict=True)
        ):
            yield _StridedAxis(
                length=length,
                window=window,
                stride=stride,
                tile=tile,
                tile_size=math.prod(tile_shape),
                tile_step=math.prod(num_tiles[i + 1 :]),
                step=math.prod(tile_shape[i + 1 :]),
            )


class _StridedAxis(NamedTuple):
    """One axis of a grid whose positions are counted tile by tile.

    Attributes:
      length: Tokens along it.
      window, stride: As in StridedNeighborhood.
      tile: Tokens along it that make a tile.
      tile_size: Tokens of a whole tile.
      tile_step: Tiles from one to the next along it.
      step: Positions from one token to the next along it, within a tile.
    """

    length: int
    window: int
    stride: int
    tile: int
    tile_size: int
    tile_step: int
    step: int

    def coordinate(self, positions: ArrayLike) -> ArrayLike:
        """The token's number along this axis, from 0."""
        if self.tile_size == 1:
            return positions // self.tile_step % self.length
        tile = positions // self.tile_size // self.tile_step % (self.length // self.tile)
        return tile * self.tile + positions % self.tile_size // self.step % self.tile

    def coordinates(self, bounds: Bounds) -> tuple[ArrayLike, ArrayLike]:
        """The first and the last token that positions within the bounds may be at."""
        first_tile, last_tile = bounds.position_min // self.tile_size, bounds.position_max // self.tile_size
        one_tile = first_tile == last_tile
        first, last = _coordinate_bounds(
            bounds.position_min % self.tile_size, bounds.position_max % self.tile_size, self.step, self.tile
        )
        first, last = jnp.where(one_tile, first, 0), jnp.where(one_tile, last, self.tile - 1)
        first_tile, last_tile = _coordinate_bounds(first_tile, last_tile, self.tile_step, self.length // self.tile)
        return first_tile * self.tile + first, last_tile * self.tile + last

    def sees(self, q_positions: ArrayLike, kv_positions: ArrayLike) -> ArrayLike:
        start, key = self.window_start(self.coordinate(q_positions)), self.coordinate(kv_positions)
        return (key >= start) & (key < start + self.window)

    def verdict(self, q: Bounds, kv: Bounds) -> TileVerdict:
        first_start, last_start = (self.window_start(x) for x in self.coordinates(q))
        kv_first, kv_last = self.coordinates(kv)
        return TileVerdict(
            some=(kv_first < last_start + self.window) & (kv_last >= first_start),
            all=(kv_last < first_start + self.window) & (kv_first >= last_start),
        )

    def window_start(self, coordinate: ArrayLike, xp=jnp) -> ArrayLike:
        """The first key that a query sees, by this array library; grows with the query."""
        leader = xp.minimum(coordinate // self.stride * self.stride + self.stride // 2, self.length - 1)
        return xp.clip(leader - self.window // 2, 0, self.length - self.window)

    def most_tiles(self) -> tuple[int, int]:
        """How many tiles along this axis the keys of a query may be in, and the queries of a key."""
        tokens = np.arange(self.length)
        start = self.window_start(tokens, np)  # not JAX's: a schedule may be made while a program is traced
        first, last = np.searchsorted(start, tokens - self.window, "right"), np.searchsorted(start, tokens, "right") - 1
        spans = (start, start + self.window - 1), (first, last)
        return tuple(int((last // self.tile - first // self.tile).max()) + 1 for first, last in spans)


def _coordinate_bounds(first: ArrayLike, last: ArrayLike, step: int, length: int) -> tuple[ArrayLike, ArrayLike]:
    """The first and the last of `x // step % length` for x from `first` to `last`."""
    first, last = first // step, last // step
    wraps = first // length != last // length
    return jnp.where(wraps, 0, first % length), jnp.where(wraps, length - 1, last % length)

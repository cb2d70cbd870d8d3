"""The layout `balanced`: which equal chunks of a row each device holds, decided on the host from its documents.

A row is cut into n = T / chunk_size chunks, and the pairs that the mask allows between any two are counted exactly
(areas.py). Chunks are dealt to the devices, then pairs of chunks change places for as long as that shortens what
devices wait for: the sum over the calls of the op that a layer makes of the busiest device in each. For all_gather that
is the busiest device in total, for a ring the slowest of every hop, for any strategy what its `tiles_of_calls` says; so
all of the [device, hop] matrix is evened out and not its sums alone. Two deals are tried: in turn, as stripes of
whole chunks, and back and forth.

Chunks change places within one P-th of the sequence, so each device holds n / P^2 of every P-th, in their order. Then
bringing tokens into the order of the sequence and back (relayout.py) is an all-to-all of equal parts.

The search is a number of rounds, whatever time they take, with fixed random numbers, so every process that reads a row
makes the same order of it, and an order is a function of the row alone: nothing of it is saved with a checkpoint.

Measured, 20 random packings of 131,072 tokens, 8 devices: `python -m longctx.context_parallel.packings`, whose table
is in docs/context_parallel.md.
"""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from longctx.context_parallel.areas import chunk_areas
from longctx.context_parallel.config import AttentionSharding
from longctx.context_parallel.layout import Layout
from longctx.context_parallel.strategy import Setting, StrategyName
from pallas_kernels import Mask, Tokens
from pallas_kernels.tokens import TokenAxis

_ROUNDS = 300
_SWAPS_A_ROUND = 128
_OF_SQUARES = 0.1  # so that of two devices that are equally busy one at a time can be relieved
_EVEN_ENOUGH = 1.01  # a ring that waits a hundredth of its time is as good as one that does not


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalancedRow:
    """Which chunks of a row the devices hold, and how even that is.

    Attributes:
      devices: The device of each chunk of the row.
      chunk_size: Tokens of a chunk.
      deal: What the search started from: `striped`, chunks dealt in turn, or `back_and_forth`.
      swaps: Chunks that changed places, in pairs.
      dealt, critical_path: What devices take over what even work would, before any swap and after all; 1 is even. With
        several masks, of all layers together.
    """

    devices: Int[np.ndarray, " chunks"]
    chunk_size: int
    deal: str
    swaps: int
    dealt: float
    critical_path: float

    @property
    def order(self) -> Int[np.ndarray, " length"]:
        """As `Layout.order`, of this row."""
        chunks = np.argsort(self.devices, kind="stable")
        return (chunks[:, None] * self.chunk_size + np.arange(self.chunk_size)).reshape(-1)

    def __str__(self) -> str:
        swapped = f", {self.swaps} pairs of chunks swapped" if self.swaps else ""
        return f"{self.deal}{swapped}: {self.critical_path:.3f} of even work, {self.dealt:.3f} as dealt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balancer:
    """Makes the order of rows of one length; a loader keeps one.

    Attributes:
      masks: Layers of the model by their mask, those that attend by softmax.
      sharding: Their strategies, and the layout, which is balanced.
      degree: Devices that share a row, P.
      length: Tokens of a row, T.
    """

    masks: Mapping[Mask, int]
    sharding: AttentionSharding
    degree: int
    length: int

    def __post_init__(self):
        layout = self.sharding.layout
        if layout is None or not layout.is_of_rows:
            raise ValueError(
                f"Balancer: got layout={layout and layout.name}, wanted balanced; other layouts have one order for all "
                "rows, that of Layout.order"
            )
        layout.check(self.length, self.degree)
        if not self.masks:
            raise ValueError(
                "context_parallel.layout: balanced evens out what softmax attention computes, and no layer attends; "
                "choose layout=contiguous"
            )
        for mask in self.masks if self.degree > 1 else ():
            reason = self.sharding.strategy_for(mask).refusal(_setting(self.sharding, mask, self.degree, self.length))
            if reason is not None:
                raise NotImplementedError(f"balanced layout: {reason}")

    def __len__(self) -> int:
        return self.length

    def row(self, positions: Int[np.ndarray, " length"], segment_ids: Int[np.ndarray, " length"]) -> BalancedRow:
        """Decides for one row.

        Args:
          positions, segment_ids: Of its tokens, in the order of the sequence.
        Cost: that of `chunk_areas` for each mask, and of each round O(128 P^2) for each mask.
        """
        layout, degree = self.sharding.layout, self.degree
        num_chunks = self.length // layout.chunk_size if degree > 1 else 1
        chunk_size = self.length // num_chunks
        tokens = TokenAxis(positions, segment_ids)
        parts = [
            _Part.of(
                layers * chunk_areas(mask, tokens, num_chunks),
                _calls(self.sharding, mask, degree, self.length),
            )
            for mask, layers in self.masks.items()
        ]
        even = sum(part.areas.sum() for part in parts) / degree
        turns, places = np.divmod(np.arange(num_chunks), degree)
        deals = {"striped": places, "back_and_forth": np.where(turns % 2 == 0, places, degree - 1 - places)}
        searches = {name: _Search(parts, devices, degree, even) for name, devices in deals.items()}
        deal = min(searches, key=lambda name: searches[name].cost)
        search = searches[deal]
        dealt = search.cost
        swaps = search.run()
        return BalancedRow(
            devices=search.devices,
            chunk_size=chunk_size,
            deal=deal,
            swaps=swaps,
            dealt=dealt,
            critical_path=search.cost,
        )


def balanced_order(
    mask: Mask,
    tokens: Tokens,
    layout: Layout,
    strategy: StrategyName,
    *,
    degree: int,
    inner_degree: int | None = None,
    length: int | None = None,
) -> tuple[Int[np.ndarray, "rows length"], tuple[BalancedRow, ...]]:
    """The order of each row in a balanced layout.

    Args:
      mask: Which pairs may attend.
      tokens: Of whole rows, in the order of the sequence, NumPy's or JAX's; those of the queries, which are the keys.
      layout: Balanced.
      strategy: How queries meet the keys of other devices: what is evened out.
      degree: Devices that share a row, P.
      inner_degree: As of `AttentionSharding`.
      length: T, where the tokens do not tell.
    Returns: the orders, for `layout.permute` of the tokens and all that goes with them, and how each row was decided.
    Raises: ValueError where the length is not known, does not split, or the layout is another; NotImplementedError
      where the strategy does not serve mask or layout.
    Cost: that of `Balancer.row` for each row.
    """
    given = [x for x in (tokens.q_positions, tokens.q_segment_ids) if x is not None]
    length = length or (given[0].shape[1] if given else None)
    if length is None:
        raise ValueError("balanced_order: got tokens without arrays and no length, wanted the length; pass length")
    sharding = AttentionSharding(strategy=strategy, layout=layout, inner_degree=inner_degree)
    balancer = Balancer(masks={mask: 1}, sharding=sharding, degree=degree, length=length)
    arrays = np.broadcast_arrays(*(np.asarray(x) for x in tokens.queries(length)))
    rows = tuple(balancer.row(*row) for row in zip(*arrays, strict=True))
    return np.stack([row.order for row in rows]), rows


@dataclasses.dataclass(frozen=True)
class _Calls:
    """How a strategy adds up the areas from device to device to those of a device in a call of the op.

    Attributes:
      entries: Numbers of the (device, source) pairs, those of one device's call next to each other.
      starts: Where each device's call starts in them.
      first_of_call: Where each call starts in these.
      scale: The share of the pairs that a device computes: of the heads.
    """

    entries: Int[np.ndarray, " entries"]
    starts: Int[np.ndarray, " device_calls"]
    first_of_call: Int[np.ndarray, " calls"]
    scale: float

    def cost(
        self, areas: Float[np.ndarray, "... pairs"]
    ) -> tuple[Float[np.ndarray, " ..."], Float[np.ndarray, " ..."]]:
        """The busiest device of every call, summed over the calls, and how uneven all are.

        The latter is the sum of the squares, times the number of calls. Areas are by (device, source).
        """
        of_devices = self.scale * np.add.reduceat(areas[..., self.entries], self.starts, axis=-1)
        busiest = np.maximum.reduceat(of_devices, self.first_of_call, axis=-1).sum(axis=-1)
        return busiest, len(self.first_of_call) * np.square(of_devices).sum(axis=-1)


@functools.lru_cache(maxsize=16)
def _calls(sharding: AttentionSharding, mask: Mask, degree: int, length: int) -> _Calls:
    """Found out by asking the strategy where the work of each pair of devices goes."""
    strategy, setting = sharding.strategy_for(mask), _setting(sharding, mask, degree, length)
    places, scale = [], 0.0
    for device in range(degree):
        for source in range(degree):
            tiles = np.zeros((degree, degree), np.int64)
            tiles[device, (device - source) % degree] = degree  # a device may have a P-th of the heads
            of_calls = strategy.tiles_of_calls(setting, tiles)
            row, call = np.argwhere(of_calls)[0]  # those that share a call's work have equal rows
            places.append((call, row))
            scale = of_calls[row, call] / degree
    calls, rows = np.array(places).T
    entries = np.lexsort((rows, calls))
    calls, rows = calls[entries], rows[entries]
    is_new_call = np.diff(calls, prepend=-1) != 0
    starts = np.flatnonzero(is_new_call | (np.diff(rows, prepend=-1) != 0))
    return _Calls(entries=entries, starts=starts, first_of_call=np.flatnonzero(is_new_call[starts]), scale=scale)


def _setting(sharding: AttentionSharding, mask: Mask, degree: int, length: int) -> Setting:
    return sharding.setting(mask, degree=degree, q_len=length, kv_len=length)


@dataclasses.dataclass(frozen=True)
class _Part:
    """The areas between chunks under one mask, and how its strategy adds them up."""

    areas: Float[np.ndarray, "chunks chunks"]
    calls: _Calls

    @classmethod
    def of(cls, areas: Int[np.ndarray, "chunks chunks"], calls: _Calls) -> "_Part":
        return cls(areas.astype(np.float64), calls)  # whole numbers, added up exactly


class _Search:
    """Chunks on devices, and what swaps would change."""

    def __init__(self, parts: list[_Part], devices: Int[np.ndarray, " chunks"], degree: int, even: float):
        self.devices = devices.copy()
        self._parts, self._degree, self._even = parts, degree, even
        on_devices = np.eye(degree)[devices]
        # Of each chunk's queries with the keys of each device, of its keys with their queries, and between devices.
        self._to_sources = [part.areas @ on_devices for part in parts]
        self._from_queries = [part.areas.T @ on_devices for part in parts]
        self._between = [on_devices.T @ to_sources for to_sources in self._to_sources]
        self.cost, self._score = (float(x[0]) for x in self._costs([between[None] for between in self._between]))

    def run(self) -> int:
        """Swaps chunks until work is even enough or the rounds are over; returns how many pairs."""
        num_chunks, degree = len(self.devices), self._degree
        if num_chunks == 1:
            return 0
        rng = np.random.default_rng(0)
        size = num_chunks // degree
        swaps = 0
        for _ in range(_ROUNDS):
            if self.cost <= _EVEN_ENOUGH:
                break
            first = rng.integers(num_chunks, size=_SWAPS_A_ROUND)
            second = first // size * size + rng.integers(size, size=_SWAPS_A_ROUND)
            apart = self.devices[first] != self.devices[second]
            swaps += self._take_best(first[apart], second[apart])
        return swaps

    def _take_best(self, first: np.ndarray, second: np.ndarray) -> bool:
        """Swaps the pair of chunks that helps most, if any does."""
        if not len(first):
            return False
        changed = [between + self._change(index, first, second) for index, between in enumerate(self._between)]
        costs, scores = self._costs(changed)
        best = int(np.argmin(scores))
        if not scores[best] < self._score:
            return False
        a, b = first[best], second[best]
        device_a, device_b = self.devices[a], self.devices[b]
        for index, part in enumerate(self._parts):
            self._between[index] = changed[index][best]
            for sums, areas in ((self._to_sources[index], part.areas.T), (self._from_queries[index], part.areas)):
                moved = areas[a] - areas[b]
                sums[:, device_a] -= moved
                sums[:, device_b] += moved
        self.devices[a], self.devices[b] = device_b, device_a
        self.cost, self._score = float(costs[best]), float(scores[best])
        return True

    def _change(self, index: int, a: np.ndarray, b: np.ndarray) -> Float[np.ndarray, "swaps devices sources"]:
        """What areas between devices become more if chunks a and b change places."""
        areas, swaps = self._parts[index].areas, np.arange(len(a))
        device_a, device_b = self.devices[a], self.devices[b]
        change = np.zeros((len(a), self._degree, self._degree))
        queries = self._to_sources[index][a] - self._to_sources[index][b]
        keys = self._from_queries[index][a] - self._from_queries[index][b]
        change[swaps, device_a] -= queries
        change[swaps, device_b] += queries
        change[swaps, :, device_a] -= keys
        change[swaps, :, device_b] += keys
        # Pairs of the two chunks themselves move on both sides.
        both = areas[a, a] + areas[b, b] - areas[a, b] - areas[b, a]
        for query, key, sign in (
            (device_a, device_a, 1), (device_b, device_b, 1), (device_a, device_b, -1), (device_b, device_a, -1)
        ):  # fmt: skip
            change[swaps, query, key] += sign * both
        return change

    def _costs(self, between: list[np.ndarray]) -> tuple[Float[np.ndarray, " swaps"], Float[np.ndarray, " swaps"]]:
        """Over even work, and what the search goes by; of areas `[swaps, devices, sources]` of each part."""
        if not self._even:
            return (np.ones(len(between[0])),) * 2
        flat = (x.reshape(len(x), -1) / self._even for x in between)
        parts = [part.calls.cost(x) for part, x in zip(self._parts, flat, strict=True)]
        busiest, squares = (sum(x) for x in zip(*parts, strict=True))
        # Rounded, so that what a processor does with last bits decides nothing.
        return busiest, np.round(busiest + _OF_SQUARES * squares, 9)

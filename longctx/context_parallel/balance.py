"""How evenly a layout spreads a mask's work over the devices and hops of a ring, in numbers, without running it.

`hop_tiles` counts what kernels visit, of a row that is one document: for plans. `work` counts the pairs that the mask
allows, of the tokens at hand, by any strategy.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from longctx.context_parallel.areas import MAX_TILES_AT_ONCE, bounds, hop_areas
from longctx.context_parallel.balanced import balanced_order
from longctx.context_parallel.config import STRATEGIES, AttentionSharding
from longctx.context_parallel.layout import Layout, permute
from longctx.context_parallel.strategy import StrategyName
from pallas_kernels import BlockSizes, Mask, Tokens
from pallas_kernels.mask import Bounds
from pallas_kernels.schedule import num_ranges
from pallas_kernels.tokens import TokenAxis


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The pairs that devices compute.

    Attributes:
      areas: Allowed pairs of each device in each call of the op that a layer makes, the hops of a ring in order.
    """

    areas: Int[np.ndarray, "devices hops"]

    @property
    def imbalance(self) -> float:
        """Pairs of the busiest device over the mean of all: 1 is even. What devices with nothing to wait for take."""
        of_devices = self.areas.sum(axis=1)
        return float(of_devices.max() / of_devices.mean()) if of_devices.any() else 1.0

    @property
    def critical_path(self) -> float:
        """Of a ring, whose devices wait for each other at every hop: `imbalance` of the areas."""
        return imbalance(self.areas)

    def plot(self, *, ax: Any = None) -> Any:
        """Draws the areas as a picture, a row a device and a column a hop.

        Args:
          ax: The matplotlib Axes to draw in; None makes new ones.
        Returns: The Axes.
        Raises: ImportError without matplotlib, which the extra `plot` installs.
        """
        from longctx.context_parallel import balance_plot

        return balance_plot.plot(self, ax=ax)


def work(
    mask: Mask,
    tokens: Tokens,
    layout: Layout,
    strategy: StrategyName,
    *,
    degree: int,
    inner_degree: int | None = None,
    q_len: int | None = None,
    kv_len: int | None = None,
    max_document_length: int | None = None,
) -> Work:
    """What each device computes of attention in each hop, in pairs that the mask allows, summed over the rows.

    A strategy that splits the heads has a share of the heads of all pairs: pairs over that number, rounded down. Of a
    mask that differs between heads, the pairs of one head of each group are summed.

    Args:
      mask: Which pairs may attend.
      tokens: Of the whole sequence, in its order, NumPy's or JAX's.
      layout: Which tokens a device holds; for balanced each row is put into the order that `balanced_order` makes.
      strategy: How queries meet the keys of other devices.
      degree: Devices that share the sequence, P.
      inner_degree: As of `AttentionSharding`.
      q_len, kv_len: T and S, where the tokens do not tell; kv_len is q_len where it is not given.
      max_document_length: As of `AttentionSharding`.
    Raises: ValueError where a length is not known or does not split in the layout; NotImplementedError where the
      strategy does not serve the mask, and for keys that are not the queries in a balanced layout.
    Cost: O(B T S / 4096) time, and O(1) for each pair of the tiles of 64 x 64 that the mask cuts through; memory about
      130 MB, and 30 bytes for each tile of a device and hop.
    """
    q_len = q_len or _length(tokens.q_positions, tokens.q_segment_ids)
    kv_len = kv_len or _length(tokens.kv_positions, tokens.kv_segment_ids) or q_len
    if q_len is None:
        raise ValueError("work: got tokens without arrays and no q_len, wanted the length; pass q_len")
    sharding = AttentionSharding(
        strategy=strategy, layout=layout, max_document_length=max_document_length, inner_degree=inner_degree
    )
    if layout.is_of_rows and q_len != kv_len:
        raise NotImplementedError(
            f"work: got T={q_len} and S={kv_len} with layout=balanced, which orders queries and keys alike, wanted one "
            "length; choose another layout"
        )
    given = (tokens.q_positions, tokens.kv_positions, tokens.q_segment_ids, tokens.kv_segment_ids)
    setting = sharding.setting(
        mask,
        degree=degree,
        q_len=q_len,
        kv_len=kv_len,
        has_positions=layout.name != "contiguous" or any(x is not None for x in given[:2]),
        has_segments=any(x is not None for x in given[2:]),
    )
    reason = STRATEGIES[strategy].refusal(setting)
    if reason is not None:
        raise NotImplementedError(f"work: {reason}")
    queries, keys = tokens.queries(q_len), tokens.keys(kv_len)
    if layout.is_of_rows:
        order, _ = balanced_order(
            mask, tokens, layout, strategy, degree=degree, inner_degree=inner_degree, length=q_len
        )
        orders = order, order
    else:
        orders = layout.order(q_len, degree), layout.order(kv_len, degree)
    queries, keys = (_of_devices(*of_side, degree) for of_side in zip((queries, keys), orders, strict=True))
    areas = STRATEGIES[strategy].tiles_of_calls(setting, hop_areas(mask, queries, keys))
    return Work(areas=np.broadcast_to(areas, (degree, areas.shape[1])))  # one row may stand for all devices


def hop_tiles(
    mask: Mask, order: Int[np.ndarray, " length"], degree: int, block_sizes: BlockSizes
) -> Int[np.ndarray, "devices hops"]:
    """Tiles, (query block, kv block) pairs, that each device visits at each hop of a ring, for one layer and row.

    Entry [r, h] is of device r at hop h, where it works on the keys of device (r - h) % P. The row is one document that
    fills the sequence. As in a schedule, a query block visits the ranges of blocks that the mask lets it see.

    Args:
      mask: Which pairs may attend.
      order: The layout, from `ContextParallelConfig.order`: the positions of the tokens in the order they are held in.
      degree: Devices of the ring, P.
      block_sizes: Tokens a block; each device cuts its own tokens into blocks, the last of which may be ragged.
    Raises: ValueError where the tokens do not split evenly over the devices.
    Cost: O((length / block_q) (length / block_kv)) time; memory about 130 MB beside the order and the result.
    """
    if len(order) % degree:
        raise ValueError(
            f"hop_tiles: order has {len(order)} tokens, which do not split over degree={degree} devices; pass the "
            "order of a length that is a multiple"
        )
    positions = order.astype(np.int32).reshape(degree, -1)
    tokens = TokenAxis(positions, np.zeros_like(positions))
    q, kv = (bounds(tokens, block) for block in (block_sizes.block_q, block_sizes.block_kv))
    num_kv_blocks = kv.position_min.shape[1]
    columns = Bounds(*(x.reshape(1, -1) for x in kv))
    group = max(1, MAX_TILES_AT_ONCE // columns.position_min.size)
    length = len(order) // degree
    ranges, _ = num_ranges(mask, length, length, block_sizes.fit(length, length))

    tiles = np.zeros((degree, degree), np.int64)
    for device in range(degree):
        sources = (device - np.arange(degree)) % degree
        for first in range(0, q.position_min.shape[1], group):
            rows = Bounds(*(x[device, first : first + group, None] for x in q))
            some = np.asarray(mask.tile(rows, columns).some)
            tiles[device] += _visited(some.reshape(-1, degree, num_kv_blocks), ranges).sum(axis=0)[sources]
    return tiles


def imbalance(tiles: Int[np.ndarray, "devices hops"]) -> float:
    """Time of the ring over what the same tiles would take if every hop spread them evenly: 1 is even, P the worst.

    (sum over hops of the greatest of the devices) / (mean over devices of the sum over hops)

    The greatest, because devices wait for each other at every hop: the keys of the next come from a neighbour, and it
    from its own. A device that has much to do at one hop and little at another makes the others wait once more.

    Args:
      tiles: From `hop_tiles`, or a sum of such, of several layers.
    Returns: 1 where there are no tiles at all.
    """
    even = tiles.sum(axis=1).mean()
    return float(tiles.max(axis=0).sum() / even) if even else 1.0


def _length(*arrays: Any) -> int | None:
    return next((x.shape[1] for x in arrays if x is not None), None)


def _of_devices(side: TokenAxis, order: np.ndarray, degree: int) -> TokenAxis:
    """Arrays of whole rows, `[B or 1, T]`, as devices hold them, `[P, B, T / P]`."""
    arrays = np.broadcast_arrays(*(np.asarray(x) for x in side))
    return TokenAxis(*(permute(x, order).reshape(len(x), degree, -1).swapaxes(0, 1) for x in arrays))


def _visited(some: np.ndarray, num_ranges: int) -> np.ndarray:
    """How many columns of a bool array's last dim that many ranges hold: its runs, those left over in the last."""
    stop = some.shape[-1] - np.argmax(some[..., ::-1], axis=-1)
    num_before, from_last = 0, some
    if num_ranges > 1:
        starts = some.copy()
        starts[..., 1:] &= ~some[..., :-1]
        from_last = np.cumsum(starts, axis=-1, dtype=np.int32) >= num_ranges
        num_before = (some & ~from_last).sum(axis=-1)
    return num_before + np.where(from_last.any(axis=-1), stop - np.argmax(from_last, axis=-1), 0)

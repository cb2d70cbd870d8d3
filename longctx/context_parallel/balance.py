"""How evenly a layout spreads a mask's work over the devices and hops of a ring, in numbers, without running it."""

import numpy as np
from jaxtyping import Int

from pallas_kernels import BlockSizes, Mask
from pallas_kernels.mask import Bounds
from pallas_kernels.schedule import num_ranges

_MAX_TILES_AT_ONCE = 1 << 22
"""Tiles judged at a time. A tile costs up to about 30 bytes of temporaries, so this bounds the peak near 130 MB."""


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
    q, kv = (_bounds(positions, block) for block in (block_sizes.block_q, block_sizes.block_kv))
    num_kv_blocks = kv.position_min.shape[1]
    columns = Bounds(*(x.reshape(1, -1) for x in kv))
    group = max(1, _MAX_TILES_AT_ONCE // columns.position_min.size)
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


def _bounds(positions: Int[np.ndarray, "devices length"], block: int) -> Bounds:
    """Bounds of the blocks of every device, each `[devices, blocks]`."""
    starts = np.arange(0, positions.shape[1], block)
    segment_ids = np.zeros((len(positions), len(starts)), np.int32)
    return Bounds(
        position_min=np.minimum.reduceat(positions, starts, axis=1),
        position_max=np.maximum.reduceat(positions, starts, axis=1),
        segment_min=segment_ids,
        segment_max=segment_ids,
    )


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

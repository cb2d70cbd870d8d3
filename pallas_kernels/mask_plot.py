"""A picture of a mask, with the blocks that its schedule visits drawn over it. Needs matplotlib."""

from typing import Any

import numpy as np

from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.mask import Mask
from pallas_kernels.schedule import BlockRanges, make_schedule
from pallas_kernels.tokens import Tokens

_DEFAULT_LENGTH = 128
_MAX_PAIRS = 1 << 22


def plot(
    mask: Mask,
    tokens: Tokens | None,
    *,
    q_len: int | None,
    kv_len: int | None,
    block_sizes: BlockSizes,
    row: int,
    num_heads: int | None,
    ax: Any,
) -> Any:
    """`Mask.plot`, which documents the arguments."""
    tokens = tokens or Tokens()
    q_len = q_len or _length(tokens.q_positions, tokens.q_segment_ids) or _DEFAULT_LENGTH
    kv_len = kv_len or _length(tokens.kv_positions, tokens.kv_segment_ids) or q_len
    if q_len * kv_len > _MAX_PAIRS:
        raise ValueError(
            f"Mask.plot: q_len={q_len} and kv_len={kv_len}, wanted at most {_MAX_PAIRS} pairs; draw a shorter sequence"
        )
    heads = np.asarray(mask.dense(tokens, q_len, kv_len, num_heads=num_heads or mask.head_groups))
    schedule = make_schedule(mask, tokens, q_len=q_len, kv_len=kv_len, block_sizes=block_sizes)
    visited, full = _visited_and_full(schedule.kv_blocks, row, num_columns=schedule.q_blocks.num_rows)
    return _draw(_of_row(heads, row).mean(axis=0), visited, full, schedule.block_sizes, ax)


def _length(*arrays: Any) -> int | None:
    return next((x.shape[1] for x in arrays if x is not None), None)


def _of_row(x: Any, row: int) -> np.ndarray:
    """Row `row` of an array of `[B or 1, ...]`."""
    x = np.asarray(x)
    return x[row if len(x) > 1 else 0]


def _visited_and_full(ranges: BlockRanges, row: int, *, num_columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks are visited, and which of them without a pair test: bool `[query blocks, kv blocks]` each."""

    def blocks_within(start, stop) -> np.ndarray:
        start, stop = (_of_row(x, row)[..., None] for x in (start, stop))
        column = np.arange(num_columns)
        return ((start <= column) & (column < stop)).any(axis=2)  # `[query blocks, lists, kv blocks]`

    visited, full = blocks_within(ranges.start, ranges.stop), blocks_within(ranges.full_start, ranges.full_stop)
    return visited.any(axis=1), full.all(axis=1)


def _draw(allowed: np.ndarray, visited: np.ndarray, full: np.ndarray, sizes: BlockSizes, ax: Any) -> Any:
    """Draws the share of heads that allow each pair, `[T, S]`, under the blocks."""
    try:
        from matplotlib import pyplot
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError(
            "Mask.plot: matplotlib is not installed, wanted for drawing; pip install 'longctx-jax[plot]'"
        ) from error
    if ax is None:
        _, ax = pyplot.subplots(figsize=(6, 6), layout="constrained")
    q_len, kv_len = allowed.shape
    ax.imshow(allowed, cmap="Blues", vmin=0, vmax=1.5, extent=(0, kv_len, q_len, 0), interpolation="nearest")
    num_empty = 0
    for i, j in np.argwhere(visited):
        top, left = i * sizes.block_q, j * sizes.block_kv
        bottom, right = min(top + sizes.block_q, q_len), min(left + sizes.block_kv, kv_len)
        empty = not allowed[top:bottom, left:right].any()
        num_empty += empty
        color = "tab:red" if empty else "tab:green" if full[i, j] else "black"
        ax.add_patch(
            Rectangle(
                (left, top), right - left, bottom - top, fill=False, edgecolor=color, hatch="//" if full[i, j] else None
            )
        )
    ax.set(xlabel="key", ylabel="query", xlim=(0, kv_len), ylim=(q_len, 0))
    ax.set_title(
        f"{visited.sum()} of {visited.size} blocks visited: {full.sum()} need no pair test (hatched), "
        f"{num_empty} hold no pair (red)",
        fontsize="small",
    )
    return ax

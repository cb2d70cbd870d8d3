"""python -m longctx.context_parallel.packings: how even layouts are over random rows of packed documents.

20 rows of 131,072 tokens over 8 devices, whose documents have lengths from 100 to that of the row, drawn uniformly in
their logarithm or uniformly, under a causal mask. `python -m longctx.context_parallel.packings
docs/context_parallel.md` writes the table between the markers of the file.
"""

import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int

from longctx import masks
from longctx.context_parallel.areas import chunk_areas
from longctx.context_parallel.balance import imbalance
from longctx.context_parallel.balanced import BalancedRow, balanced_order
from longctx.context_parallel.layout import Layout
from longctx.context_parallel.strategy import StrategyName
from pallas_kernels import Tokens, markdown
from pallas_kernels.tokens import TokenAxis

NUM_PACKINGS, LENGTH, DEGREE = 20, 131_072, 8
MASK = masks.causal() & masks.documents()
BALANCED = Layout(name="balanced")
Drawn = Literal["in its logarithm", "uniformly"]
_STRIPED = Layout(name="striped", stripe_size=BALANCED.chunk_size)


def random_packing(seed: int, drawn: Drawn, *, length: int = LENGTH, shortest: int = 100) -> Tokens:
    """One row of documents whose lengths are drawn from `shortest` to `length`; the last is cut to fit."""
    rng = np.random.default_rng(seed)
    lengths, left = [], length
    while left:
        bounds = np.array([shortest, length])
        document = np.exp(rng.uniform(*np.log(bounds))) if drawn == "in its logarithm" else rng.uniform(*bounds)
        lengths.append(min(int(document), left))
        left -= lengths[-1]
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    documents = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return Tokens.self_attention(positions[None], documents[None])


def by_hop(tokens: Tokens, order: Int[np.ndarray, " length"]) -> Int[np.ndarray, "devices hops"]:
    """Pairs of each device at each hop of a ring, whose devices hold tokens in this order, in whole chunks."""
    chunks = order[:: BALANCED.chunk_size] // BALANCED.chunk_size
    row = TokenAxis(tokens.q_positions[0], tokens.q_segment_ids[0])
    areas = chunk_areas(MASK, row, len(chunks))[np.ix_(chunks, chunks)]
    of_sources = areas.reshape(DEGREE, len(chunks) // DEGREE, DEGREE, -1).sum(axis=(1, 3))
    devices = np.arange(DEGREE)
    return np.take_along_axis(of_sources, (devices[:, None] - devices) % DEGREE, axis=1)


def planned(tokens: Tokens, strategy: StrategyName) -> tuple[BalancedRow, Int[np.ndarray, "devices hops"], float]:
    """What was decided, the areas of a ring by it, and the seconds of CPU time that deciding took."""
    started = time.process_time()
    order, (row,) = balanced_order(MASK, tokens, BALANCED, strategy, degree=DEGREE)
    seconds = time.process_time() - started
    return row, by_hop(tokens, order[0]), seconds


def table() -> str:
    """The layouts over all packings, as Markdown."""
    head = ["lengths drawn", "layout", "total: mean", "worst", "ring: mean", "worst", "CPU, a row"]
    return markdown.table([head, *(row for drawn in ("in its logarithm", "uniformly") for row in _rows(drawn))])


def _rows(drawn: Drawn) -> list[list[str]]:
    packings = [random_packing(seed, drawn) for seed in range(NUM_PACKINGS)]
    rows = []
    for layout in (Layout(name="contiguous"), Layout(name="zigzag"), _STRIPED):
        areas = [by_hop(tokens, layout.order(LENGTH, DEGREE)) for tokens in packings]
        name = f"`striped` by {layout.stripe_size}" if layout.name == "striped" else f"`{layout.name}`"
        rows.append([drawn, name, *_mean_and_worst(areas, total=True), *_mean_and_worst(areas), ""])
    for strategy, what in (("all_gather", "its total"), ("ring", "its hops")):
        _, areas, seconds = zip(*(planned(tokens, strategy) for tokens in packings), strict=True)
        took = f"{1e3 * np.mean(seconds):.0f} ms, at most {1e3 * max(seconds):.0f}"
        name = f"`balanced` for `{strategy}`, by {what}"
        rows.append([drawn, name, *_mean_and_worst(areas, total=True), *_mean_and_worst(areas), took])
    return rows


def _mean_and_worst(areas: list[np.ndarray], *, total: bool = False) -> list[str]:
    found = [imbalance(x.sum(axis=1, keepdims=True) if total else x) for x in areas]
    return [f"{np.mean(found):.3f}", f"{max(found):.3f}"]


def with_table(text: str) -> str:
    """`text` with the table between its markers."""
    return markdown.between_markers(text, "packings", [table()])


def main() -> None:
    """Prints the table, or rewrites it in the file named on the command line."""
    if len(sys.argv) > 1:
        markdown.rewrite(Path(sys.argv[1]), with_table)
    else:
        print(table())


if __name__ == "__main__":
    main()

"""python -m train.planning.crossover DOC PNG: which strategy is cheapest, by devices and tokens, drawn and as a table.

By the cost model (cost.py), for causal attention of one layer with 32 query and 8 kv heads of 128 on H100s, eight to a
host, forward and backward. Draws how much longer than its compute alone each strategy takes, in its best layout and
groups, and writes the cheapest between the markers of the document.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np

from longctx import masks
from longctx.context_parallel.layout import Layout
from pallas_kernels import markdown
from train.devices import device_table
from train.planning.auto import Kind, Option, choose, group_sizes
from train.planning.cost import Layer, RowLinks, Speeds, layer_cost
from train.planning.links import Links, Place
from train.planning.target import GPUS_A_HOST

STRATEGIES_DRAWN = ("ring", "all_gather", "ulysses", "usp", "double_ring")
_LENGTHS = (32_768, 131_072, 1_048_576)
_DEGREES = (2, 4, 8, 16, 32, 64, 128)
_DEVICE, _IMPLEMENTATION = "h100", "mosaic_gpu"
_ZIGZAG = Layout(name="zigzag")


def problem(seq_len: int, degree: int) -> Layer:
    """The layer that is drawn."""
    mask = masks.causal() & masks.documents()
    return Layer(mask=mask, seq_len=seq_len, degree=degree, num_heads=32, num_kv_heads=8, head_dim=128)


def speeds(degree: int) -> Speeds:
    """Of so many GPUs, of whole hosts or of one."""
    spec = device_table().devices[_DEVICE]
    links = Links(spec, [Place(i // GPUS_A_HOST, (i,)) for i in range(degree)])

    def of_groups(inner: int) -> RowLinks:
        return RowLinks(links=links, devices=np.arange(degree).reshape(1, -1, inner))

    return Speeds(spec=spec, implementation=_IMPLEMENTATION, links=of_groups)


def overheads(seq_len: int, degree: int) -> Iterator[tuple[Option, float]]:
    """The best option of each strategy that serves the layer, and what it takes beyond even compute, as a share."""
    layer, of_devices = problem(seq_len, degree), speeds(degree)
    kind = Kind(name="", layers=[(layer, {"forward": 1, "backward": 1})])
    # Every allowed pair once, shared evenly.
    even = layer_cost(layer, "all_gather", _ZIGZAG, degree, of_devices)
    compute = sum(cost.compute for cost in even.values())
    for strategy in STRATEGIES_DRAWN:
        try:
            found = choose(
                [kind],
                strategies={"": (strategy,)},
                layouts=[_ZIGZAG],
                groups=group_sizes(degree, GPUS_A_HOST),
                speeds=of_devices,
            )
        except ValueError:  # it serves no such split
            continue
        choice = found[""]
        yield choice.option, choice.costs[choice.option].seconds / compute - 1


def table(found: dict[tuple[int, int], list[tuple[Option, float]]]) -> str:
    """The cheapest by tokens and devices, with its overhead."""
    rows = [["tokens", *(f"{degree} GPUs" for degree in _DEGREES)]]
    for seq_len in _LENGTHS:
        cells = []
        for degree in _DEGREES:
            option, overhead = min(found[seq_len, degree], key=lambda item: item[1])
            groups = f" of {option.inner}" if option.strategy in ("usp", "double_ring") else ""
            cells.append(f"`{option.strategy}`{groups}, {overhead:.1%}")
        rows.append([f"{seq_len:,}", *cells])
    return markdown.table(rows)


def draw(found: dict[tuple[int, int], list[tuple[Option, float]]], path: Path) -> None:
    """One panel for each length, a line for each strategy."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(_LENGTHS), figsize=(12, 4), sharex=True)
    for seq_len, panel in zip(_LENGTHS, panels, strict=True):
        for strategy in STRATEGIES_DRAWN:
            points = [
                (degree, 100 * overhead)
                for degree in _DEGREES
                for option, overhead in found[seq_len, degree]
                if option.strategy == strategy
            ]
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=strategy)
        panel.set(xscale="log", yscale="log", title=f"{seq_len:,} tokens", xlabel="GPUs, 8 to a host")
        panel.set_xticks(_DEGREES, [str(degree) for degree in _DEGREES], minor=False)
        panel.minorticks_off()
    panels[0].set_ylabel("beyond even compute, %")
    panels[-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Writes the table into the document and the picture beside it, both named on the command line."""
    document, picture = map(Path, sys.argv[1:])
    found = {(s, p): list(overheads(s, p)) for s in _LENGTHS for p in _DEGREES}
    draw(found, picture)
    markdown.rewrite(document, lambda text: markdown.between_markers(text, "crossover table", [table(found)]))


if __name__ == "__main__":
    main()

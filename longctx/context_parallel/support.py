"""What each strategy serves, found out by asking it: the table in docs/context_parallel.md.

`python -m longctx.context_parallel.support docs/context_parallel.md` writes the table between the markers of the file.
A cell is the answer of `Strategy.refusal`, which the config check and every call go by, for each layout.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from longctx import masks
from longctx.context_parallel.config import STRATEGIES, AttentionSharding
from longctx.context_parallel.layout import Layout
from pallas_kernels import markdown

_DEGREE, _INNER, _LENGTH = 8, 2, 8192
_CHUNK = _LENGTH // _DEGREE // 2
_DOCUMENTS = masks.documents()
_LAYOUTS = ("contiguous", "zigzag", "striped")


def _case(mask, **fields) -> dict[str, Any]:
    return dict(mask=mask, q_len=_LENGTH, kv_len=_LENGTH, num_heads=32, num_kv_heads=8) | fields


_CAUSAL = masks.causal() & _DOCUMENTS
_WINDOW = masks.sliding_window(left=_CHUNK) & _DOCUMENTS
FEATURES = {
    "causal": _case(_CAUSAL),
    "bidirectional": _case(_DOCUMENTS),
    "window of at most a chunk, T / (2 P)": _case(_WINDOW),
    "window of more": _case(masks.sliding_window(left=4 * _CHUNK) & _DOCUMENTS),
    "window both ways": _case(masks.sliding_window(left=_CHUNK, right=_CHUNK) & _DOCUMENTS),
    "window over tokens in order, without `documents()`": _case(
        masks.sliding_window(left=_CHUNK), has_positions=False, layouts=("contiguous",)
    ),
    "window without `documents()`, positions passed": _case(masks.sliding_window(left=_CHUNK)),
    "packed documents whose length is bounded by a chunk": _case(_CAUSAL, max_document_length=_CHUNK),
    "prefix LM": _case((masks.causal() | masks.prefix(64)) & _DOCUMENTS),
    "global tokens, sink tokens": _case((masks.global_tokens(4) | masks.sliding_window(64, 64)) & _DOCUMENTS),
    "chunked": _case(masks.causal() & masks.chunked(_CHUNK) & _DOCUMENTS),
    "strided, neighborhood, your own": _case(masks.causal() & masks.strided(8) & _DOCUMENTS),
    "a table of blocks, a mask that reads arrays": _case(
        masks.causal() & masks.block_table(np.eye(2, dtype=bool), 4096)
    ),
    "masks that differ between heads": _case(masks.per_head(masks.causal(), masks.full())),
    "cross-attention, T != S": _case(masks.full(), q_len=_LENGTH // 2),
    "fewer kv heads than devices (K divides P)": _case(_CAUSAL, num_kv_heads=2),
    "multi-query heads": _case(_CAUSAL, num_kv_heads=1),
    "P does not divide N": _case(_CAUSAL, num_heads=12, num_kv_heads=4),
    "a window, P does not divide N": _case(_WINDOW, num_heads=12, num_kv_heads=4),
    **{f"{name}, here with a window": _case(_WINDOW) for name in ("soft cap", "learned sinks", "fully masked shards")},
    "dropout, here with a window": _case(_WINDOW, dropout=True),
    "additive bias, here with a window": _case(_WINDOW, bias=True),
}
"""Attention over P = 8 devices in groups of 2: the fields of a Setting, and the layouts that make sense if not all do.

No Setting tells of soft caps, sinks or what the arrays mask: they go with every mask that a strategy serves, and so
do dropout and biases where they are served at all (`Strategy.has_dropout`, `has_bias`). matrix.py runs all but
biases."""


def table() -> str:
    """The support table of the strategies, as Markdown."""
    rows = [["", *(f"`{name}`" for name in STRATEGIES)]]
    for feature, case in FEATURES.items():
        rows.append([feature, *(_cell(name, **case) for name in STRATEGIES)])
    return markdown.table(rows)


def _cell(
    strategy: str, *, layouts=_LAYOUTS, max_document_length=None, dropout: bool = False, bias: bool = False, **fields
) -> str:
    if dropout and not STRATEGIES[strategy].has_dropout or bias and not STRATEGIES[strategy].has_bias:
        return "-"
    served = []
    for name in layouts:
        sharding = AttentionSharding(layout=Layout(name=name), max_document_length=max_document_length)
        if STRATEGIES[strategy].refusal(sharding.setting(degree=_DEGREE, inner_degree=_INNER, **fields)) is None:
            served.append(name)
    if len(served) == len(layouts):
        return "yes"
    return ", ".join(served) or "-"


def with_table(text: str) -> str:
    """`text` with the table between its markers."""
    return markdown.between_markers(text, "support table", [table()])


def main() -> None:
    """Rewrites the table in the file named on the command line."""
    markdown.rewrite(Path(sys.argv[1]), with_table)


if __name__ == "__main__":
    main()

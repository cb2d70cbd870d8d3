"""The family's cases, as data: what its conformance suite runs. Attention to chosen blocks is among blockwise's."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.testing import packed_tokens
from pallas_kernels.tokens import Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of `moba_attention` or of `selected_attention`, self-attention.

    Attributes:
      documents: Document lengths of each row of the batch, the rest of which is padding; None for one document. MoBA's.
      chunk_size, top_k: MoBA's. Chunks of a power of two have means without rounding, so everybody chooses the same.
      block_size, num_choices: Of selected attention. Blocks are drawn for each query and kv head, fewer at the start of
        the row, and none for some queries.
      all_ways: Whether the conformance suite also calls it without a cotangent of lse, and with gradients in any order.
    """

    name: str
    op: Literal["moba_attention", "selected_attention"]
    length: int
    batch_size: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    value_dim: int | None = None
    scale: float | None = None
    documents: tuple[tuple[int, ...], ...] | None = None
    chunk_size: int = 16
    top_k: int = 3
    block_size: int = 16
    num_choices: int = 3
    all_ways: bool = False

    def tokens(self) -> Tokens | None:
        """The case's documents."""
        return None if self.documents is None else jax.tree.map(jnp.asarray, packed_tokens(self.documents, self.length))

    def arguments(self) -> dict[str, Any]:
        """Those of the op but for q, k, v and what says how it is to be run."""
        if self.op == "moba_attention":
            choice = {"chunk_size": self.chunk_size, "top_k": self.top_k, "tokens": self.tokens()}
        else:
            starts = jnp.arange(0, self.length, self.block_size, dtype=jnp.int32)[None]
            choice = {
                "choices": jnp.asarray(self._choices()), "block_start": starts, "block_size": self.block_size
            }  # fmt: skip
        return choice | {"scale": self.scale}

    def _choices(self) -> np.ndarray:
        random = np.random.default_rng(1)
        choices = np.full((self.batch_size, self.length, self.num_kv_heads, self.num_choices), -1, np.int32)
        for at in np.ndindex(choices.shape[:3]):
            if at[1] % 17 != 5:
                some = random.permutation(at[1] // self.block_size + 1)[: self.num_choices]
                choices[(*at, slice(len(some)))] = some
        return choices

    def inputs(self, dtype: str, seed: int = 0) -> dict[str, jax.Array]:
        """q, k, v and the cotangent dout, rounded to `dtype`, and the cotangent dlse, float32; normal, q and k in
        quarters."""
        B, T, N, K, H = self.batch_size, self.length, self.num_heads, self.num_kv_heads, self.head_dim
        V = self.value_dim or H
        random = np.random.default_rng(seed)
        shapes = {"q": (B, T, N, H), "k": (B, T, K, H), "v": (B, T, K, V), "dout": (B, T, N, V)}
        arrays = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        arrays |= {name: np.round(4 * arrays[name]) / 4 for name in ("q", "k")}
        arrays = {name: x.astype(jnp.dtype(dtype)) for name, x in arrays.items()}
        dlse = random.standard_normal((B, N, T), np.float32)
        if self.op == "selected_attention":
            # Of a query that sees nothing nobody asks for lse.
            sees = np.repeat((self._choices()[..., 0] >= 0).swapaxes(1, 2), N // K, axis=1)
            dlse = np.where(sees, dlse, 0)
        return arrays | {"dlse": dlse}


def _moba(name: str, length: int = 150, **options) -> Case:
    return Case(name=f"moba_{name}", op="moba_attention", length=length, **options)


def _selected(name: str, length: int = 100, **options) -> Case:
    return Case(name=f"selected_{name}", op="selected_attention", length=length, **options)


_PACKED = (90, 30, 1, 20), (149,)  # documents that cross chunks, both rows end in padding

CASES = (
    _moba("one_document", all_ways=True),
    _moba("packed", documents=_PACKED, top_k=4, all_ways=True),
    _moba("own_chunk_alone", documents=_PACKED, top_k=1),
    _moba("all_chunks", documents=_PACKED, top_k=100),
    _moba("no_whole_chunk", chunk_size=256),
    _moba("one_whole_chunk", chunk_size=128),
    _moba("chunks_of_one", documents=_PACKED, chunk_size=1),
    _moba("a_head_each", documents=_PACKED, top_k=2, num_kv_heads=4, value_dim=12),
    _moba("scale_mqa", documents=_PACKED, top_k=2, num_kv_heads=1, scale=0.7),
    _selected("gqa", all_ways=True),
    _selected("a_head_each", num_kv_heads=4),
    _selected("mqa_scale", num_kv_heads=1, scale=0.7),
    _selected("values_of_12", value_dim=12),
    _selected("one_block", length=9),
    _selected("blocks_of_64", length=300, block_size=64, num_choices=4),
    _selected("more_choices_than_blocks", length=60, num_choices=7),
)

KERNEL_CASES = (
    _moba("D64", length=1000, head_dim=64, chunk_size=128, all_ways=True),
    _moba("D128", length=1030, head_dim=128, chunk_size=256, num_kv_heads=4),
    _moba("packed_D64", length=700, head_dim=64, chunk_size=128, documents=((400, 260), (1, 699)), all_ways=True),
    _moba("packed_mqa_D128", length=700, head_dim=128, chunk_size=64, num_kv_heads=1, documents=((400, 260), (1, 699))),
    _moba("small_chunks_D64", length=300, head_dim=64, chunk_size=32, top_k=5),
    _selected("D64", length=500, head_dim=64, block_size=64, all_ways=True),
    _selected("D128", length=500, head_dim=128, block_size=64),
    _selected("a_head_each_D64", length=300, head_dim=64, block_size=64, num_kv_heads=4),
    _selected("mqa_16_D128", length=300, head_dim=128, block_size=64, num_heads=16, num_kv_heads=1),
    _selected("T1000_D128", length=1000, head_dim=128, block_size=64, num_choices=16, batch_size=1),
)

"""The cases of sparse attention that are measured, as data: chosen blocks, selectors, MoBA, NSA, beside dense ones."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import BLOCK, AttentionCase
from pallas_kernels import BlockSizes, Mask
from pallas_kernels.mask import Causal, PerHead
from pallas_kernels.mask_patterns import Table
from pallas_kernels.sparse import BlockMean, BlockSelection, NsaSizes, VerticalSlash, XAttention

type Kind = Literal["dense", "chosen", "select", "moba", "selected", "nsa"]
SIZES = BlockSizes(block_q=BLOCK, block_kv=BLOCK)
NSA = NsaSizes()

SELECTORS = {
    "BlockMean, 64 blocks": (BlockMean(), dict(budget=64)),
    "BlockMean, 0.9, 64 blocks at most": (BlockMean(), dict(threshold=0.9, budget=64)),
    "XAttention stride 16, 64 blocks": (XAttention(stride=16), dict(budget=64)),
    "XAttention stride 16, 0.9, 64 blocks at most": (XAttention(stride=16), dict(threshold=0.9, budget=64)),
    "VerticalSlash, 64 blocks": (VerticalSlash(), dict(budget=64)),
}
"""By name, each with what `select` takes: schedules are of the lists that it gives."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseCase(AttentionCase):
    """Causal self-attention of one shape, or the choice of its blocks.

    Attributes:
      kind: Dense attention, attention to chosen blocks, the choice alone, MoBA, NSA's selected branch over blocks that
        are drawn for each query, or NSA.
      one_in: Of chosen blocks, one in so many of those that the mask allows, drawn at random for each query head,
        the block's own among them.
      chunk_size, top_k: Of MoBA.
    """

    kind: Kind
    one_in: int = 1
    chunk_size: int = 512
    top_k: int = 4

    @property
    def name(self) -> str:
        kinds = {
            "chosen": f"blocks by head 1/{self.one_in}",
            "moba": f"MoBA, chunks of {self.chunk_size}, top {self.top_k}",
            "selected": f"NSA's selected branch, {NSA.num_blocks} blocks of {NSA.block_size}",
            "nsa": "NSA, published sizes",
        }
        return f"{kinds.get(self.kind, self.kind)} {self.shape_name}"

    @property
    def dense_case(self) -> "SparseCase":
        return dataclasses.replace(self, kind="dense", one_in=1, chunk_size=512, top_k=4)

    @property
    def tokens(self) -> None:
        """In order."""
        return None

    @property
    def mask(self) -> Mask:
        """Which pairs attend, where that does not depend on data."""
        if self.kind != "chosen":
            return Causal()
        tables = (Table(blocks, block_q=BLOCK, block_kv=BLOCK) for blocks in _chosen(self))
        return Causal() & PerHead(tuple(tables))

    def selection(self) -> BlockSelection:
        """The chosen blocks, drawn anew for each query head."""
        chosen = _chosen(self)
        lists = np.full((1, *chosen.shape[:2], chosen.sum(axis=2).max()), -1, np.int32)
        for at in np.ndindex(chosen.shape[:2]):
            blocks = np.flatnonzero(chosen[at])
            lists[0][at][: len(blocks)] = blocks
        return BlockSelection(
            blocks=jnp.asarray(lists), q_len=self.length, kv_len=self.length, block_sizes=SIZES
        )  # fmt: skip

    @property
    def density(self) -> float:
        """Blocks that are visited over those of dense causal attention; pairs where queries choose one by one."""
        if self.kind in ("moba", "selected", "nsa"):
            return self.pairs / self.dense_case.pairs
        num = self.length // BLOCK
        return float(_counts(num, self.one_in).sum() / (num * (num + 1) / 2))

    @property
    def pairs(self) -> int:
        """(query, key) pairs of one row and head."""
        if self.kind == "moba":
            chunk, num = self.chunk_size, self.length // self.chunk_size
            whole = np.minimum(np.arange(num), self.top_k - 1).sum()
            return int(whole * chunk**2 + num * chunk * (chunk + 1) // 2)
        if self.kind in ("selected", "nsa"):
            return _pairs_of_nsa(self.length, with_all_branches=self.kind == "nsa")
        num = self.length // BLOCK
        off_diagonal = _counts(num, self.one_in).sum() - num
        return int(off_diagonal * BLOCK**2 + num * BLOCK * (BLOCK + 1) // 2)


def _pairs_of_nsa(length: int, *, with_all_branches: bool) -> int:
    place = np.arange(length)
    blocks = np.minimum(place // NSA.block_size, NSA.num_blocks - 1)  # but the query's own
    pairs = blocks * NSA.block_size + place % NSA.block_size + 1
    if with_all_branches:
        pairs += np.maximum(0, (place + 1 - NSA.compress_block) // NSA.compress_stride + 1)
        pairs += np.minimum(place + 1, NSA.window)
    return int(pairs.sum())


def _counts(num: int, one_in: int) -> np.ndarray:
    """Blocks of keys that each of `num` blocks of queries attends to."""
    return np.maximum(1, np.round((np.arange(num) + 1) / one_in)).astype(int)


@functools.lru_cache(maxsize=8)
def _chosen(case: SparseCase) -> np.ndarray:
    """Bool `[N, blocks of queries, blocks of keys]`."""
    generator, num = np.random.default_rng(0), case.length // BLOCK
    counts = _counts(num, case.one_in)
    chosen = np.zeros((case.num_heads, num, num), bool)
    for head, row in np.ndindex(case.num_heads, num):
        chosen[head, row, row] = True
        chosen[head, row, generator.permutation(row)[: counts[row] - 1]] = True
    return chosen


def _case(kind: Kind, length: int, heads: str, head_dim: int = 128, **options) -> SparseCase:
    num_heads, num_kv_heads = map(int, heads.split("/"))
    return SparseCase(
        kind=kind,
        batch_size=1,
        length=length,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        **options,
    )


CASES = (
    *(_case("chosen", 32768, heads, one_in=one_in) for heads in ("16/16", "16/4") for one_in in (4, 8, 16)),
    *(_case("chosen", 131072, "16/16", one_in=one_in) for one_in in (4, 8, 16)),
    _case("select", 32768, "16/16"),
    _case("select", 32768, "16/4"),
    _case("moba", 32768, "16/16"),
    _case("moba", 32768, "16/4"),
    _case("selected", 8192, "64/4"),
    *(_case("selected", 32768, heads) for heads in ("16/16", "16/8", "16/4", "16/2", "16/1")),
    *(_case("nsa", length, heads) for length in (32768, 65536) for heads in ("64/4", "16/4")),
)

SMOKE = (
    _case("chosen", 512, "4/2", 16, one_in=2),
    _case("select", 512, "4/2", 16),
    _case("moba", 512, "4/2", 16, chunk_size=128, top_k=2),
    _case("selected", 512, "4/2", 16),
    _case("nsa", 512, "4/2", 16),
)


def choose(name: str, q: jax.Array, k: jax.Array):
    """The schedule of the blocks that a selector chooses."""
    selector, limits = SELECTORS[name]
    selection = selector.select(q, k, mask=Causal(), block_sizes=SIZES, **limits)
    return selection.schedule(mask=Causal(), block_sizes=SIZES)


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw_choices(length: int, num_kv_heads: int) -> jax.Array:
    """For each query and kv head NSA's three blocks that always are, and others before them drawn at random.

    Returns: int32 `[1, T, K, NSA.num_blocks]`, -1 where there are fewer.
    """
    num_blocks = -(-length // NSA.block_size)
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    always = 2.0

    def of_block(own):
        scores = jax.random.uniform(jax.random.key(own), (NSA.block_size, num_kv_heads, num_blocks))
        scores = jnp.where((block == 0) | (block == own) | (block == own - 1), always, scores)
        best, chosen = jax.lax.top_k(jnp.where(block <= own, scores, -1.0), min(NSA.num_blocks, num_blocks))
        return jnp.where(best >= 0, chosen, -1).astype(jnp.int32)

    choices = jax.lax.map(of_block, block)
    return choices.reshape(1, -1, *choices.shape[2:])[:, :length]

"""Selectors by means of blocks, by what the last queries attend to, by place alone, and one for each head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.arguments import check_heads
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.mask import Mask
from pallas_kernels.sparse.choose import most_scored
from pallas_kernels.sparse.selection import BlockSelection, attention_recall
from pallas_kernels.sparse.selector import Scorer, Selector, in_blocks, softmax_or_zero
from pallas_kernels.tokens import Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMean(Selector):
    """The product of the mean query and the mean key of two blocks: MoBA's gate for blocks of queries, and what
    MInference calls block-sparse. What cancels in a mean is not seen.

    Cost: 2 B N (T / block_q) (S / block_kv) H FLOPs.
    Reference: Lu et al. 2025, MoBA, arXiv:2502.13189, equation 6; Jiang et al. 2024, MInference, arXiv:2407.02490,
      Algorithm 3.
    """

    def _summary(self, k, block_kv):
        return _means(k, block_kv)

    def _scorer(self, call):
        mean_q = call.grouped(_means(call.q, call.sizes.block_q), 2)

        def scores_of(rows, _possible):
            scores = call.multiply("brkgh,bckh->bkgrc", rows.of(mean_q, 1), call.summary[:, : rows.columns])
            return scores.reshape(scores.shape[0], -1, *scores.shape[3:])

        return Scorer(scores_of)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerticalSlash(Selector):
    """Columns and diagonals: the keys that the last queries attend to most, and the distances at which they do, hold
    for all queries. For tokens in order.

    Attributes:
      last_queries: How many queries tell.
      vertical, slash: How many keys, and how many distances, are taken.

    With a budget, blocks with more of the last queries' attention on their lines come first.

    Cost: 2 B N last_queries S H FLOPs.
    Reference: Jiang et al. 2024, MInference, arXiv:2407.02490, Algorithm 2.
    """

    last_queries: int = 64
    vertical: int = 64
    slash: int = 64

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("last_queries", 1), ("vertical", 0), ("slash", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted {least} or more")

    @property
    def needs_a_limit(self) -> bool:
        return False

    @property
    def split_refusal(self):
        return (
            "VerticalSlash scores keys by the last queries of the sequence, which only the device that holds these "
            "has; choose BlockMean, XAttention or AShape, or keep the sequence whole"
        )

    def _summary(self, k, block_kv):
        del block_kv
        return k

    def _scorer(self, call):
        (B, T, N, _), S, k, sizes = call.q.shape, call.kv_len, call.summary, call.sizes
        num = min(self.last_queries, T)
        first = T - num
        logits = call.multiply("btkgh,bskh->bkgts", call.grouped(call.q[:, first:], 2), k).reshape(B, N, num, S)
        (q_positions, q_segments), kv = call.tokens.queries(T), call.tokens.keys(S)
        allowed = call.mask.allowed(
            q_positions[:, first:, None], kv.positions[:, None], q_segments[:, first:, None], kv.segment_ids[:, None]
        )
        weights = softmax_or_zero(jnp.where(allowed[:, None], logits, -jnp.inf))
        of_key = jnp.sum(weights, axis=2)
        # By distance: T of them, 0 first; a key that comes later has none.
        distance = (first + jnp.arange(num))[:, None] - jnp.arange(S)
        place = jnp.where(distance >= 0, distance, T)
        of_distance = jnp.zeros((B, N, T)).at[:, :, place].add(weights, mode="drop")
        of_key = jnp.where(most_scored(of_key, jnp.int32(min(self.vertical, S))), of_key, 0.0)
        of_distance = jnp.where(most_scored(of_distance, jnp.int32(min(self.slash, T))), of_distance, 0.0)
        columns = jnp.sum(in_blocks(of_key, sizes.block_kv, axis=2), axis=3)
        upto = jnp.pad(jnp.cumsum(of_distance, axis=2), ((0, 0), (0, 0), (1, 0)))
        block_q, block_kv = sizes.block_q, sizes.block_kv

        def scores_of(rows, _possible):
            row, column = rows.numbers[:, None], jnp.arange(rows.columns)
            farthest = (row + 1) * block_q - 1 - column * block_kv
            nearest = row * block_q - (column + 1) * block_kv + 1
            of_lines = upto[:, :, jnp.clip(farthest + 1, 0, T)] - upto[:, :, jnp.clip(nearest, 0, T)]
            return jnp.log(columns[:, :, None, : rows.columns] + jnp.maximum(of_lines, 0.0))

        return Scorer(scores_of)

    def _choose(self, shares, possible, most, threshold):
        # A block without a line is not taken, however many may be.
        return super()._choose(shares, possible, most, threshold) & ((shares > 0) | self._always(possible))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AShape(Selector):
    """The first blocks and the nearest, whatever is in them: `sink_blocks` and `local_blocks`.

    Reference: Jiang et al. 2024, MInference, arXiv:2407.02490; Xiao et al. 2023, StreamingLLM, arXiv:2309.17453.
    """

    sink_blocks: int = 1
    local_blocks: int = 8

    @property
    def needs_a_limit(self) -> bool:
        return False

    def _summary(self, k, block_kv):
        B, S, K, _ = k.shape
        return jnp.zeros((B, -(-S // block_kv), K, 0))

    def _scorer(self, call):
        def scores_of(_rows, possible):
            return jnp.zeros((*call.q.shape[::2], *possible.shape[2:]))

        return Scorer(scores_of)

    def _choose(self, shares, possible, most, threshold):
        chosen = super()._choose(shares, possible, most, threshold)
        return chosen & jnp.broadcast_to(self._always(possible), chosen.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerHead:
    """A selector for each query head, chosen beforehand: what `best_by_head` finds.

    Attributes:
      selectors: One for each query head, each with lists of query heads.
    """

    selectors: tuple[Selector, ...]

    def __post_init__(self):
        for i, selector in enumerate(self.selectors):
            if selector.heads != "query":
                raise ValueError(f"selectors[{i}].heads: got {selector.heads!r}, wanted 'query'")

    def select(self, q, k, **options) -> BlockSelection:
        """As `Selector.select`."""
        check_heads("PerHead.select", {"q": q, "k": k})
        return self._select("select", q, k.shape[2], [k] * len(self._distinct), 2, **options)

    def summary(self, k: Float[Array, "B S K H"], block_kv: int) -> tuple[jax.Array, ...]:
        """As `Selector.summary`, one for each distinct selector."""
        self._refuse_to_split("summary")
        return tuple(selector.summary(k, block_kv) for selector in self._distinct)

    def select_from(self, q, summary: tuple[jax.Array, ...], **options) -> BlockSelection:
        """As `Selector.select_from`."""
        self._refuse_to_split("select_from")
        return self._select("select_from", q, summary[0].shape[-2], summary, -2, **options)

    @property
    def split_refusal(self) -> str | None:
        """As `Selector.split_refusal`."""
        return next((x.split_refusal for x in self._distinct if x.split_refusal is not None), None)

    @property
    def _distinct(self) -> tuple[Selector, ...]:
        return tuple(dict.fromkeys(self.selectors))

    def _refuse_to_split(self, op: str) -> None:
        if self.split_refusal is not None:
            raise NotImplementedError(f"PerHead.{op}: {self.split_refusal}")

    def _select(self, op: str, q, num_kv_heads: int, of_keys, axis: int, **options) -> BlockSelection:
        """By the method `op` of each selector, from what it takes of keys, whose kv heads are on this axis."""
        N, group = q.shape[2], q.shape[2] // num_kv_heads
        if len(self.selectors) != N:
            raise ValueError(f"PerHead.{op}: q has {N} heads, wanted {len(self.selectors)}, one for each selector")
        if N % num_kv_heads:
            raise ValueError(f"PerHead.{op}: {N} query heads over {num_kv_heads} kv heads, wanted a multiple")
        found = {}
        for selector, keys in zip(self._distinct, of_keys, strict=True):
            heads = [head for head in range(N) if self.selectors[head] == selector]
            # Each with the keys of its own kv head.
            keys = jnp.take(keys, jnp.array([x // group for x in heads]), axis=axis, mode="clip")
            part = getattr(selector, op)(q[:, :, jnp.array(heads)], keys, **options)
            found |= {head: part.blocks[:, i] for i, head in enumerate(heads)}
        return dataclasses.replace(part, blocks=jnp.stack([found[head] for head in range(N)], axis=1))


def best_by_head(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    candidates: tuple[Selector, ...],
    *,
    mask: Mask,
    block_sizes: BlockSizes,
    tokens: Tokens | None = None,
    budget: int,
    scale: float | None = None,
) -> PerHead:
    """The candidate of the highest recall for each query head, on given queries and keys; of equals the first.

    To be called once, outside of jit, on activations of a model; the result is static.

    Reference: Jiang et al. 2024, MInference, arXiv:2407.02490, Algorithm 1, with blocks in the place of FLOPs.
    """
    options = dict(mask=mask, tokens=tokens, scale=scale)

    @functools.partial(jax.jit, static_argnums=2)
    def recall_of(q, k, candidate):
        selection = candidate.select(q, k, block_sizes=block_sizes, budget=budget, **options)
        return jnp.mean(attention_recall(q, k, selection, **options), axis=(0, 2))

    recalls = jnp.stack([recall_of(q, k, candidate) for candidate in candidates])
    return PerHead(selectors=tuple(candidates[int(i)] for i in jnp.argmax(recalls, axis=0)))


def _means(x: jax.Array, block: int) -> jax.Array:
    """The mean of each block, `[B, blocks, heads, H]`; of a ragged one, of what it has."""
    blocks = in_blocks(x, block, axis=1)
    counts = jnp.minimum(block, x.shape[1] - block * jnp.arange(blocks.shape[1])).astype(jnp.float32)
    return jnp.sum(blocks, axis=2, dtype=jnp.float32) / counts[:, None, None]

"""XAttention: blocks chosen by sums of logits along antidiagonals."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.mask import Mask
from pallas_kernels.online_softmax import finite_max
from pallas_kernels.sparse import pallas_mosaic_gpu_antidiagonals as antidiagonals
from pallas_kernels.sparse.selector import Call, Rows, Scorer, Selector, in_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class XAttention(Selector):
    """Sums along antidiagonals: in every `stride` x `stride` square of logits, those of one antidiagonal, which meets
    each of its queries and each of its keys once, and every vertical and slash line through the square.

    Attributes:
      stride: S of the paper. Divides block_q and block_kv.
      implementation: Of the sums, "mosaic_gpu" or "xla"; None takes the former on a Hopper GPU where it serves the call
        (bfloat16, head dims 64 and 128, block_kv a multiple of 8 strides). NotImplementedError where the one that
        is named does not.

    Its summary of keys is all of them: nothing of an antidiagonal is left out.

    Cost: 2 B N T S H / stride FLOPs.
    Reference: Xu et al. 2025, XAttention, arXiv:2503.16428, section 2.1 and Algorithm 1.
    """

    stride: int = 16
    implementation: Implementation | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.stride < 1:
            raise ValueError(f"stride: got {self.stride}, wanted 1 or more")

    def _check_sizes(self, op, **sizes):
        for name, size in sizes.items():
            if size % self.stride:
                self._wrong(op, f"{name} is {size}, wanted a multiple of stride={self.stride}")

    def _summary(self, k, block_kv):
        return _squares(k, block_kv, self.stride)

    def _scorer(self, call):
        implementations = {"mosaic_gpu": self._by_mosaic_gpu, "xla": self._by_xla}
        return dispatch.run("XAttention.select", implementations, self.implementation, call)

    def _by_xla(self, call: Call) -> Scorer:
        stride, sizes = self.stride, call.sizes
        # Queries against the order of keys: the products of these long vectors are sums along antidiagonals. By head
        # and then by square, so that neither they nor the products are moved again.
        q = jnp.moveaxis(_squares(call.grouped(call.q, 2), sizes.block_q, stride)[:, :, :, ::-1], (4, 5), (1, 2))
        k = jnp.moveaxis(call.summary, 4, 1)
        q, k = q.reshape(*q.shape[:5], -1), k.reshape(*k.shape[:4], -1)
        seen_by = self._seen_by(call)

        def scores_of(rows, possible):
            sums = call.multiply("bkgrix,bkcjx->bkgricj", rows.of(q, 3), k[:, :, : rows.columns]) / stride
            sums = sums.reshape(sums.shape[0], -1, *sums.shape[3:])
            return _log_of_mean_share(jnp.where(seen_by(rows, possible)[:, None], sums, -jnp.inf))

        return Scorer(scores_of, numbers=(sizes.block_q // stride) * (sizes.block_kv // stride))

    def _by_mosaic_gpu(self, call: Call) -> Scorer:
        stride, sizes = self.stride, call.sizes
        antidiagonals.check(call.q, stride=stride, block_kv=sizes.block_kv)
        q, k = _squares(call.q, sizes.block_q, stride), call.summary
        seen_by = self._seen_by(call)

        def scores_of(rows, possible):
            seen = seen_by(rows, possible)
            rows_q = rows.of(q, 1)
            sums = antidiagonals.group_logsumexp(
                rows_q.reshape(len(q), -1, *q.shape[3:]),
                k.reshape(len(k), -1, *k.shape[3:]),
                seen.reshape(len(seen), seen.shape[1] * seen.shape[2], -1),
                scale=call.scale / stride,
            )
            return _log_of_mean_share(sums.reshape(*sums.shape[:2], *seen.shape[1:4], -1))

        numbers = (sizes.block_q // stride) * (sizes.block_kv // stride // antidiagonals.GROUP)
        return Scorer(scores_of, numbers=numbers, leaves_out=True)

    def _seen_by(self, call: Call) -> Callable[[Rows, jax.Array], jax.Array]:
        """A function of rows and their possible blocks: which squares count, `[B or 1, rows, squares, columns,
        squares]`."""
        q_ends = self._ends(*call.tokens.queries(call.q.shape[1]), call.sizes.block_q)
        kv_ends = self._ends(*call.tokens.keys(call.kv_len), call.sizes.block_kv)

        def seen_by(rows, possible):
            columns = _Ends(*(x[:, : rows.columns] for x in kv_ends))
            seen = self._seen(call.mask, _Ends(*(rows.of(x, 1) for x in q_ends)), columns)
            return seen & possible[:, 0, :, None, :, None]

        return seen_by

    def _ends(self, positions, segment_ids, block) -> "_Ends":
        def of_squares(x):
            x = in_blocks(x, block, axis=1, mode="edge")
            x = x.reshape(*x.shape[:2], -1, self.stride)
            return jnp.stack([x[..., 0], x[..., -1]], axis=-1)

        length = positions.shape[1]
        start = in_blocks(jnp.arange(length), block, axis=0, mode="constant", constant_values=length)
        return _Ends(of_squares(positions), of_squares(segment_ids), (start[:, :: self.stride] < length)[None])

    @staticmethod
    def _seen(mask: Mask, q: "_Ends", kv: "_Ends") -> jax.Array:
        """Whether a square has a corner that may attend, `[B or 1, rows, squares, columns, squares]`. More than that is
        not asked: of a square that the mask cuts all of the antidiagonal is taken.
        """
        q = jax.tree.map(lambda x: x[:, :, :, None, None], q)
        kv = jax.tree.map(lambda x: x[:, None, None], kv)
        corners = [
            mask.allowed(q.positions[..., i], kv.positions[..., j], q.segment_ids[..., i], kv.segment_ids[..., j])
            for i in range(2)
            for j in range(2)
        ]
        return functools.reduce(jnp.logical_or, corners) & q.is_there & kv.is_there


class _Ends(NamedTuple):
    """Of squares `[B or 1, blocks, squares]`: positions and segment ids of their first and last token, `[..., 2]`, and
    whether the first is not behind the end.
    """

    positions: jax.Array
    segment_ids: jax.Array
    is_there: jax.Array


def _log_of_mean_share(sums: jax.Array) -> jax.Array:
    """Of sums `[B, N, rows, squares, columns, squares]` a softmax for each row of squares; what a block has of those of
    its rows, `[B, N, rows, columns]`, but for a factor, as a logarithm. Only sums over squares of a block are held.
    """
    greatest = finite_max(jnp.max(sums, axis=(4, 5), keepdims=True))
    of_blocks = jnp.sum(jnp.exp(sums - greatest), axis=5)
    total = jnp.sum(of_blocks, axis=4, keepdims=True)
    return jnp.log(jnp.sum(of_blocks / jnp.where(total > 0, total, 1.0), axis=3))


def _squares(x: jax.Array, block: int, stride: int) -> jax.Array:
    """`[B, T, ...]` to `[B, blocks, block / stride, stride, ...]`."""
    blocks = in_blocks(x, block, axis=1)
    return blocks.reshape(*blocks.shape[:2], -1, stride, *blocks.shape[3:])

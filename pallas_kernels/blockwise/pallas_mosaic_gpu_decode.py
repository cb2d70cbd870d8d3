"""Attention of few queries to many keys on Hopper GPUs: which calls it serves, and the line of blocks to read.

Which blocks of keys any query may attend to is computed in XLA, pair by pair, which for few queries costs little beside
reading the keys: so it is exact for any mask and tokens, and nothing else is read.

Reference: see pallas_mosaic_gpu_decode_kernels.py.
"""

import functools
import operator

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise import pallas_mosaic_gpu_decode_kernels as kernels
from pallas_kernels.blockwise.options import Options
from pallas_kernels.blockwise.pallas_mosaic_gpu_pairs import PairTest
from pallas_kernels.mask import Full
from pallas_kernels.online_softmax import SoftmaxCarry
from pallas_kernels.pair_tests import tests_of
from pallas_kernels.schedule import Schedule
from pallas_kernels.tokens import Tokens, repeat_last
from pallas_kernels.wgmma import ROWS, TILE_ROWS

MOST_QUERIES = 16
"""Queries of a row up to which the keys are split. More fill the tiles of the kernel made for many, which reads the
keys once for each query head; and pairs are judged one query at a time."""

BLOCK = {64: 128, 128: 64, 576: 64}
"""Keys of a block, by their dims; 576 are those of latent attention."""


def serves(q_len: int, schedule: Schedule | None, options: Options) -> bool:
    """Whether a call that the kernels for Hopper serve, without dropout, is one for this one.

    Not where blocks were chosen, which may differ between heads, as masks may; nor with a soft cap.
    """
    return (
        q_len <= MOST_QUERIES
        and options.logits_soft_cap is None
        and not (schedule is not None and schedule.is_selection)
        and options.mask.head_groups == 1
        and options.block_sizes is None
        and (isinstance(options.mask, Full) or _has_pair_test(options))
    )


def forward(
    q,
    k,
    v,
    *,
    tokens: Tokens,
    carry,
    return_carry,
    options: Options,
    num_cores: int,
    value_dim: int | None = None,
    interpret=None,
) -> tuple[jax.Array, jax.Array] | SoftmaxCarry:
    """`blockwise_attention_forward` of few queries; of a call that it `serves`.

    Args:
      v: None where values are the first `value_dim` dims of the keys.
    """
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    block, group = BLOCK[H], N // K
    num_rows = -(-T * group // ROWS) * ROWS

    def rows_of(x, dim: int):
        """Tokens to rows of tiles: each for the heads of a group, then the last once more."""
        x = jnp.repeat(x, group, axis=dim)
        return jnp.pad(x, [(0, num_rows - T * group if d == dim else 0) for d in range(x.ndim)], mode="edge")

    queries = q.reshape(B, T, K, group, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * group, H)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, num_rows - T * group), (0, 0)))
    q_axis = tokens.queries(T)
    padding = -S % block
    pair_test = _pair_test(options, S, block)
    # Not those of queries that the test does not read: each would be a kernel of its own.
    reads = frozenset() if pair_test is None else pair_test.reads
    inputs = kernels.Inputs(
        q=queries,
        k=_whole_tiles(k),
        v=None if v is None else _whole_tiles(v),
        line=_line(tokens, options, B, T, S, block, K * (num_rows // ROWS), num_cores),
        q_positions=rows_of(q_axis.positions, 1) if 0 in reads else None,
        q_segment_ids=rows_of(q_axis.segment_ids, 1) if 2 in reads else None,
        kv_positions=repeat_last(tokens.kv_positions, padding),
        kv_segment_ids=repeat_last(tokens.kv_segment_ids, padding),
    )
    config = kernels.Config(
        scale=options.scale,
        block=block,
        value_dim=value_dim if v is None else v.shape[3],
        kv_len=S,
        q_len=T,
        num_heads=N,
        pair_test=pair_test,
        num_runs=num_cores,
        return_carry=return_carry or carry is not None,
        interpret=interpret,
    )
    result = kernels.attend(inputs, config)
    if carry is None:
        return result
    after = carry.merge(result)
    return after if return_carry else after.finalize(q.dtype)


def _line(
    tokens: Tokens, options: Options, batch_size: int, q_len: int, kv_len: int, block: int, pairs_of_row: int, runs: int
) -> kernels.Line:
    """The blocks of keys that any query may attend to, and where each run begins."""
    q, kv = tokens.queries(q_len), tokens.keys(kv_len)
    num_blocks = -(-kv_len // block)
    positions, segment_ids = (repeat_last(x, -kv_len % block) for x in kv)
    is_key = jnp.arange(num_blocks * block) < kv_len

    def judge(t: int) -> jax.Array:
        """Which keys a query may attend to."""
        of_q = (x[:, t : t + 1] for x in q)
        return options.mask.allowed(next(of_q), positions, next(of_q), segment_ids) & is_key

    # Query by query, so that what is summed are rows of keys.
    num_allowed = functools.reduce(operator.add, (judge(t).astype(jnp.int32) for t in range(q_len)))
    num_allowed = num_allowed.reshape(-1, num_blocks, block).sum(axis=2)
    number, some = jnp.arange(num_blocks, dtype=jnp.int32), num_allowed > 0
    entry = 2 * number + (num_allowed != q_len * block).astype(jnp.int32)
    if options.mask.num_runs(kv_len, q_len + block - 1) == 1:
        # A run of blocks: what may be empty in it, in a cache out of order, is read for nothing.
        blocks = entry
        offset = jnp.min(jnp.where(some, number, num_blocks), axis=1)
        count = jnp.maximum(jnp.max(jnp.where(some, number + 1, 0), axis=1) - offset, 0)
    else:
        place = jnp.cumsum(some, axis=1, dtype=jnp.int32)
        count, offset = place[:, -1], jnp.zeros((len(some),), jnp.int32)
        at = jnp.arange(len(some))[:, None], jnp.where(some, place - 1, num_blocks)
        blocks = jnp.zeros_like(entry).at[at].set(entry, mode="drop")
    counts, offsets = (jnp.broadcast_to(x, (batch_size,)) for x in (count, offset))
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(counts * pairs_of_row, dtype=jnp.int32)])
    start = kernels.start_of_run(starts[-1], jnp.arange(runs, dtype=jnp.int32), runs)
    batch = jnp.sum(starts[1:] <= start[:, None], axis=1, dtype=jnp.int32)
    # Runs without a block begin behind the last row.
    count = jnp.maximum(jnp.take(counts, batch, mode="clip"), 1)
    before = start - starts[batch]
    return kernels.Line(
        blocks=blocks,
        offsets=offsets,
        counts=counts,
        starts=starts,
        first_pair=batch * pairs_of_row + before // count,
        first_block=before % count,
    )


def _has_pair_test(options: Options) -> bool:
    try:
        tests_of(options.mask, (ROWS, ROWS))
    except NotImplementedError:
        return False
    return True


def _pair_test(options: Options, kv_len: int, block: int) -> PairTest | None:
    if not isinstance(options.mask, Full):
        tests, _, reads = tests_of(options.mask, (ROWS, block))
        return PairTest(tests[0], reads)
    if kv_len % block == 0:
        return None
    # What is behind the last key is left out.
    return PairTest(lambda *pair: jnp.ones((ROWS, block), jnp.bool), frozenset())


def _whole_tiles(x_BLNH):
    """The same, its length padded with zeros to what shared memory is tiled by; costs a copy."""
    padding = -x_BLNH.shape[1] % TILE_ROWS
    return jnp.pad(x_BLNH, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else x_BLNH

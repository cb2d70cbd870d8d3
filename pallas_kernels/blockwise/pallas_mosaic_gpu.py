"""Blockwise attention by Mosaic GPU kernels on NVIDIA Hopper: which calls they serve, and how a call reaches them.

The kernels walk schedules. Where tokens are in order (none are given), the schedule is static: it is computed once,
while the program is being traced, and is part of it. Then its tiles are those that suit the head dim best, and whether
any visited block needs the pair test is known too, so that full attention and masks of whole blocks have no such code.
Where tokens are given, or blocks were chosen, the
schedule is the caller's, or is built here, in blocks of 128 x 128. Few queries, as in decoding, have kernels of their
own (pallas_mosaic_gpu_decode.py), which split the keys over the multiprocessors.

Reference: see pallas_mosaic_gpu_forward.py.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sizes import MOSAIC_GPU_ATTENTION, BlockSizes
from pallas_kernels.blockwise import pallas_mosaic_gpu_backward as backward_kernel
from pallas_kernels.blockwise import pallas_mosaic_gpu_decode as decode
from pallas_kernels.blockwise import pallas_mosaic_gpu_forward as forward_kernel
from pallas_kernels.blockwise.options import Options
from pallas_kernels.blockwise.pallas_mosaic_gpu_tiles import PairTest
from pallas_kernels.blockwise.pallas_mosaic_gpu_turns import plan as make_plan
from pallas_kernels.dropout import Dropout
from pallas_kernels.mask import Full, Mask
from pallas_kernels.mosaic_gpu import hopper_cores, refuse
from pallas_kernels.online_softmax import SoftmaxCarry, delta_of
from pallas_kernels.pair_tests import all_full, tests_of
from pallas_kernels.schedule import BlockRanges, Schedule, make_schedule, static_schedule
from pallas_kernels.tokens import Tokens
from pallas_kernels.wgmma import ROWS, TILE_ROWS

HEAD_DIMS = (64, 128)
_LEAST_ITEMS_A_CORE = 1.5
"""Of the backward pass. Items of a causal mask differ in length: fewer leave some without work in the end."""


def forward(
    q, k, v, *, tokens, schedule, carry, return_carry, options: Options, dropout: Dropout | None = None, interpret=None
) -> tuple[jax.Array, jax.Array] | SoftmaxCarry:
    """`blockwise_attention_forward` on a Hopper GPU; with `interpret` on a CPU, for tests."""
    num_cores = hopper_cores(interpret, interpreted=4)
    _check_call(q, v, dropout, options)
    tokens = tokens or Tokens()
    q_len, kv_len = q.shape[1], k.shape[1]
    if decode.serves(q_len, schedule, options):
        arguments = {"tokens": tokens, "carry": carry, "return_carry": return_carry, "options": options}
        return decode.forward(q, k, v, **arguments, num_cores=num_cores, interpret=interpret)
    sizes = _block_sizes(q.shape[3], tokens, schedule, options)
    ranges = _schedule(q_len, kv_len, tokens, schedule, sizes, options).kv_blocks
    if kv_len < sizes.block_kv:
        # The schedule's one block of keys is shorter than the kernel's, which reads on behind the last key.
        ranges = _without_full_blocks(ranges)
    padding_q, padding_kv = -q_len % sizes.block_q, -kv_len % sizes.block_kv
    inputs = forward_kernel.Inputs(
        q=_whole_tiles(q),
        k=_whole_tiles(k),
        v=_whole_tiles(v),
        ranges=jax.tree.map(jnp.asarray, ranges),
        **_padded_tokens(tokens, options.mask, padding_q, padding_kv),
        carry=None if carry is None else _padded_carry(carry, padding_q),
    )
    outputs = forward_kernel.attend(
        inputs,
        forward_kernel.Config(
            pair_test=_pair_test(
                q_len, kv_len, tokens, schedule, sizes, options, num_heads=q.shape[2], columns=sizes.block_kv
            ),
            scale=options.scale,
            block_q=sizes.block_q,
            block_kv=sizes.block_kv,
            kv_len=kv_len,
            num_cores=num_cores,
            return_carry=return_carry,
            interpret=interpret,
        ),
    )
    if not return_carry:
        return outputs.out[:, :q_len], outputs.lse[..., :q_len]
    after = outputs.carry
    return SoftmaxCarry(max=after.max[..., :q_len], sum=after.sum[..., :q_len], acc=after.acc[:, :q_len])


def backward(
    q,
    k,
    v,
    out,
    lse,
    dout,
    dlse,
    *,
    tokens,
    schedule,
    accumulate,
    options: Options,
    dropout: Dropout | None = None,
    interpret=None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`blockwise_attention_backward` on a Hopper GPU; with `interpret` on a CPU, for tests."""
    # By one block of threads where it is interpreted: more would have to take turns there too.
    num_cores = hopper_cores(interpret)
    _check_call(q, v, dropout, options)
    tokens = tokens or Tokens()
    q_len, kv_len, head_dim = q.shape[1], k.shape[1], q.shape[3]
    sizes = _block_sizes("schedule", tokens, schedule, options)
    blocks = _schedule(q_len, kv_len, tokens, schedule, sizes, options)
    ranges = blocks.q_blocks
    if kv_len < sizes.block_kv:
        ranges = _without_full_blocks(ranges)
    batch_size, _, num_heads, _ = q.shape
    num_kv_heads = k.shape[2]
    num_items = batch_size * num_kv_heads * ranges.num_rows
    shares = num_shares(num_heads // num_kv_heads, num_items=num_items, num_cores=num_cores)
    num_pairs_of_row = num_kv_heads * shares
    # Of a query head: q and dout, and dq in float32.
    pair_bytes = num_heads // num_pairs_of_row * q_len * head_dim * (2 * q.dtype.itemsize + 4)
    plan = make_plan(
        ranges,
        num_q_blocks=-(-q_len // sizes.block_q),
        batch_size=batch_size,
        num_heads=num_heads,
        num_kv_heads=num_pairs_of_row,
        pair_bytes=pair_bytes,
        num_cores=num_cores,
        deterministic=options.deterministic,
        most_heads_together=_most_heads_together(options.mask, head_dim, max(q_len, kv_len)),
    )
    padding_q, padding_kv = -q_len % sizes.block_q, -kv_len % sizes.block_kv
    delta = delta_of(out, dout, dlse)
    rows = (0, 0), (0, 0), (0, padding_q)
    # Queries that see nothing, and those that are not there: 2^(logit - inf) = 0.
    lse = jnp.pad(jnp.where(lse == -jnp.inf, jnp.inf, lse * math.log2(math.e)), rows, constant_values=jnp.inf)
    running_dq, *running = accumulate
    running = None if running[0] is None else tuple(_padded_length(x, padding_kv) for x in running)
    in_kernel = running if shares == 1 else None
    dq = jnp.zeros(q.shape, jnp.float32) if running_dq is None else running_dq
    inputs = backward_kernel.Inputs(
        q=_whole_tiles(q),
        k=_whole_tiles(k),
        v=_whole_tiles(v),
        dout=_whole_tiles(dout.astype(q.dtype)),
        lse=lse,
        delta=jnp.pad(delta, rows),
        ranges=jax.tree.map(jnp.asarray, dataclasses.replace(ranges, order=plan.order)),
        **_padded_tokens(tokens, options.mask, padding_q, padding_kv),
        turns=jax.tree.map(jnp.asarray, plan.turns),
        running=in_kernel,
    )
    dq, dk, dv = backward_kernel.differentiate(
        inputs,
        # The interpreter, unlike a copy, does not leave out what lies behind the end.
        _whole_tiles(dq) if interpret is None else _padded_length(dq, padding_q),
        plan,
        backward_kernel.Config(
            pair_test=_pair_test(
                q_len,
                kv_len,
                tokens,
                schedule,
                sizes,
                options,
                num_heads=num_heads,
                columns=backward_kernel.TILES[head_dim],
            ),
            scale=options.scale,
            kv_len=kv_len,
            scales_dq=running_dq is not None,
            shares=shares,
            interpret=interpret,
        ),
    )
    if shares > 1:
        dk, dv = (
            _sum_of_shares(x, shares, before, k.dtype)
            for x, before in zip((dk, dv), running or (None, None), strict=True)
        )
    dq, dk, dv = dq[:, :q_len], dk[:, :kv_len], dv[:, :kv_len]
    if running_dq is None:
        dq = (dq * options.scale).astype(q.dtype)
    return dq, dk, dv


def num_shares(group: int, *, num_items: int, num_cores: int) -> int:
    """Into how many parts to share out the query heads of a kv head, each with items and dk and dv of its own.

    One, unless keys are so few that their blocks leave multiprocessors without work, as where queries attend to
    compressed keys; then the fewest that do not.

    Args:
      group: Query heads of a kv head.
      num_items: Blocks of keys, of all rows and kv heads.
    """
    divisors = [n for n in range(1, group + 1) if group % n == 0]
    return next((n for n in divisors if num_items * n >= _LEAST_ITEMS_A_CORE * num_cores), group)


def _sum_of_shares(x_BSCH, shares: int, before, dtype) -> jax.Array:
    """dk or dv of kv heads, in float32 where it is added to what was before."""
    *shape, C, H = x_BSCH.shape
    total = jnp.sum(x_BSCH.reshape(*shape, C // shares, shares, H), axis=3)
    return total.astype(dtype) if before is None else total + before


def _most_heads_together(mask: Mask, head_dim: int, length: int) -> int:
    """Of how many heads of a group to visit a block of queries before the next block.

    More of them wait less for each other where all items begin with the same block, as under a causal mask, and in a
    window never; but the tiles of dq in between, 132 blocks of threads times these heads, should be in the L2 cache
    when the next item comes to them.
    """
    left, right = mask.span
    if left is None or right is None or left + right + 1 >= length:
        return 4
    return 1 if head_dim > 64 else 2


def _check_call(q, v, dropout: Dropout | None, options: Options) -> None:
    """Raises NotImplementedError with the reason where the kernels do not serve the call."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        refuse(f"q is {q.dtype}, it takes bfloat16 and float16")
    if q.shape[3] not in HEAD_DIMS:
        refuse(f"head dim {q.shape[3]}, it takes {' and '.join(map(str, HEAD_DIMS))}")
    if v.shape[3] != q.shape[3]:
        refuse(f"values have head dim {v.shape[3]} and keys {q.shape[3]}, it takes one head dim")
    if options.logits_soft_cap is not None:
        refuse("it has no soft cap of logits")
    if dropout is not None:
        refuse("it has no dropout")
    if not options.scale > 0:
        refuse(f"scale={options.scale}, it takes positive ones")


def _in_order(tokens: Tokens) -> bool:
    return not jax.tree.leaves(tokens)


def _is_selection(schedule: Schedule | None) -> bool:
    return schedule is not None and schedule.is_selection


def _block_sizes(key: int | str, tokens: Tokens, schedule: Schedule | None, options: Options) -> BlockSizes:
    """Those of MOSAIC_GPU_ATTENTION[key] where the schedule is made here, else those that every schedule has."""
    given = MOSAIC_GPU_ATTENTION["schedule"]
    if options.block_sizes is not None and options.block_sizes != given:
        refuse(f"block_sizes={options.block_sizes}, it takes {given}")
    if _in_order(tokens) and options.block_sizes is None and not _is_selection(schedule):
        return MOSAIC_GPU_ATTENTION[key]
    return given


def _schedule(
    q_len: int, kv_len: int, tokens: Tokens, schedule: Schedule | None, sizes: BlockSizes, options: Options
) -> Schedule:
    """A constant one where tokens are in order and no blocks were chosen, else the caller's, or one made here."""
    fitted = sizes.fit(q_len, kv_len)
    if _in_order(tokens) and not _is_selection(schedule):
        return static_schedule(options.mask, q_len, kv_len, sizes)
    if schedule is None:
        return make_schedule(options.mask, tokens, q_len=q_len, kv_len=kv_len, block_sizes=sizes)
    if schedule.block_sizes != fitted:
        refuse(f"the schedule has {schedule.block_sizes}, it takes {fitted}; build it with those")
    return schedule


def _pair_test(
    q_len: int,
    kv_len: int,
    tokens: Tokens,
    schedule: Schedule | None,
    sizes: BlockSizes,
    options: Options,
    *,
    num_heads: int,
    columns: int,
) -> PairTest | None:
    """Whether pairs of a query head may attend, as a kernel computes it of a tile; None where all may, of those that
    are visited.

    Raises: NotImplementedError where it cannot.
    """
    mask = options.mask
    if isinstance(mask, Full):
        return None
    if _in_order(tokens) and not _is_selection(schedule) and all_full(mask, q_len, kv_len, sizes):
        return None
    try:
        tests, test_of_group, reads = tests_of(mask, (ROWS, columns))
    except NotImplementedError as reason:
        refuse(str(reason))

    def pair_test(head, *pair):
        if len(tests) == 1:
            return tests[0](*pair)
        group, number = jax.lax.div(head * len(test_of_group), num_heads), jnp.int32(0)
        for i, test in enumerate(test_of_group):
            number = jnp.where(group == i, test, number)
        return jax.lax.switch(number, tests, *pair)

    return PairTest(pair_test, reads)


def _without_full_blocks(ranges: BlockRanges) -> BlockRanges:
    return dataclasses.replace(ranges, full_start=ranges.start, full_stop=ranges.start)


def _whole_tiles(x_BLNH):
    """The same, its length padded with zeros to what shared memory is tiled by."""
    return _padded_length(x_BLNH, -x_BLNH.shape[1] % TILE_ROWS)


def _padded_length(x_BLNH, padding: int):
    return jnp.pad(x_BLNH, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else x_BLNH


def _padded_tokens(tokens: Tokens, mask: Mask, padding_q: int, padding_kv: int) -> dict[str, Any]:
    """What the kernels' inputs say of tokens; no segment ids where the mask does not ask for them."""
    uses_segments = mask.uses_segments
    return {
        "q_positions": _padded(tokens.q_positions, padding_q),
        "kv_positions": _padded(tokens.kv_positions, padding_kv),
        "q_segment_ids": _padded(tokens.q_segment_ids, padding_q) if uses_segments else None,
        "kv_segment_ids": _padded(tokens.kv_segment_ids, padding_kv) if uses_segments else None,
    }


def _padded(x, padding: int):
    """`[B or 1, length]`, its last token repeated."""
    return x if x is None or not padding else jnp.pad(x, ((0, 0), (0, padding)), mode="edge")


def _padded_carry(carry: SoftmaxCarry, padding: int) -> SoftmaxCarry:
    if not padding:
        return carry
    rows = (0, 0), (0, 0), (0, padding)
    return SoftmaxCarry(
        max=jnp.pad(carry.max, rows, constant_values=-jnp.inf),
        sum=jnp.pad(carry.sum, rows),
        acc=jnp.pad(carry.acc, ((0, 0), (0, padding), (0, 0), (0, 0))),
    )

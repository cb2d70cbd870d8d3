"""Blockwise attention by Mosaic TPU kernels: which calls they serve, and how a call reaches them.

The kernels walk schedules. Where tokens are in order (none are given), the schedule is static, in the tiles that suit
the TPU at hand; where tokens are given it is the caller's, or is built here in the same tiles.

Reference: see pallas_mosaic_tpu_forward.py.
"""

import dataclasses
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.bias import Bias
from pallas_kernels.block_sizes import BLOCKWISE_ATTENTION, MOSAIC_TPU_ATTENTION, BlockSizes
from pallas_kernels.blockwise import pallas_mosaic_tpu_backward as backward_kernel
from pallas_kernels.blockwise import pallas_mosaic_tpu_forward as forward_kernel
from pallas_kernels.blockwise.options import Options
from pallas_kernels.blockwise.pallas_mosaic_tpu_tiles import (
    Config,
    by_head,
    by_token,
    held_bytes,
    rows_of,
    token_rows,
)
from pallas_kernels.blockwise.pallas_mosaic_tpu_walk import words_of
from pallas_kernels.dropout import Dropout
from pallas_kernels.mask import Full, Mask
from pallas_kernels.mosaic_tpu import LANES, generation, vmem_bytes
from pallas_kernels.online_softmax import SoftmaxCarry, delta_of
from pallas_kernels.pair_tests import all_full, tests_of
from pallas_kernels.schedule import BlockRanges, Schedule, make_schedule, static_schedule
from pallas_kernels.tokens import Tokens

HEAD_DIMS = (64, 128, 192, 256)

_SCOPED_VMEM_BYTES = 16 * 2**20
"""What XLA leaves to a kernel by default on every generation."""


def forward(
    q,
    k,
    v,
    *,
    tokens,
    schedule,
    carry,
    return_carry,
    options: Options,
    dropout: Dropout | None = None,
    bias: Bias | None = None,
) -> tuple[jax.Array, jax.Array] | SoftmaxCarry:
    """`blockwise_attention_forward` on a TPU."""
    check_call(q, v, dropout, schedule, bias)
    if (refusal := options.refusal_of_skipping_and_maxima()) is not None:
        _refuse(refusal)
    call = Call(q, k, v, tokens or Tokens(), schedule, options)
    block_q, block_kv = call.config.block_q, call.config.block_kv
    inputs = forward_kernel.Inputs(
        q=by_head(q, block_q),
        k=by_head(k, block_kv),
        v=by_head(v, block_kv),
        words=call.words_of_queries(),
        **call.token_rows(),
        carry=None if carry is None else carry_by_head(carry.whole(v.shape[3]), block_q),
    )
    config = call.config_of(block_q, block_kv)
    result = forward_kernel.kernel(inputs, config, return_carry=return_carry)(inputs, config)
    T, V = q.shape[1], v.shape[3]
    if not return_carry:
        return by_token(result["out"], T, V), result["lse"][:, :, 0, :T]
    return SoftmaxCarry(
        max=result["max"][:, :, 0, :T], sum=result["sum"][:, :, 0, :T], acc=by_token(result["acc"], T, V)
    )


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
    bias: Bias | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`blockwise_attention_backward` on a TPU."""
    check_call(q, v, dropout, schedule, bias)
    call = Call(q, k, v, tokens or Tokens(), schedule, options)
    block_q, block_kv = call.config.block_q, call.config.block_kv
    (_, T, _, H), (_, S, _, V) = q.shape, v.shape
    inputs = backward_kernel.Inputs(
        q=by_head(q, block_q),
        k=by_head(k, block_kv),
        v=by_head(v, block_kv),
        dout=by_head(dout.astype(q.dtype), block_q),
        rows=rows_of_backward(out, lse, dout, dlse, block_q),
        words=call.words_of_queries(),
        **call.token_rows(),
        running=None if accumulate[0] is None else (by_head(accumulate[0], block_q),),
    )
    config = call.config_of(block_q, block_kv)
    dq = backward_kernel.kernel_of_queries(inputs, config)(inputs, config)
    inputs = dataclasses.replace(
        inputs,
        words=call.words_of_keys(),
        running=None if accumulate[1] is None else tuple(by_head(x, block_kv) for x in accumulate[1:]),
    )
    config = call.config_of(block_kv, block_q)
    dk, dv = backward_kernel.kernel_of_keys(inputs, config)(inputs, config)
    return by_token(dq, T, H), by_token(dk, S, H), by_token(dv, S, V)


class Call:
    """One call's schedule, tokens and sizes; of q, k and v the shapes and dtypes alone are read."""

    def __init__(self, q, k, v, tokens: Tokens, schedule: Schedule | None, options: Options):
        self.tokens, self.mask = tokens, options.mask
        self.q_len, self.kv_len = q.shape[1], k.shape[1]
        # A TPU's memory holds whole lanes.
        self.dims = sum(-(-x.shape[3] // LANES) * LANES for x in (k, v))
        self.itemsize = k.dtype.itemsize
        self.in_order = not jax.tree.leaves(tokens)
        self.schedule = self._schedule(schedule, options)
        sizes = self.schedule.block_sizes
        block_q, block_kv = whole_blocks(sizes, self.q_len, self.kv_len)
        self.config = Config(
            block_q=block_q,
            block_kv=block_kv,
            chunk=LANES,
            kv_len=self.kv_len,
            num_heads=q.shape[2],
            num_kv_heads=k.shape[2],
            scale=options.scale,
            soft_cap=options.logits_soft_cap,
            tested=self._tested(sizes),
            vmem_bytes=vmem_bytes(),
            num_pairs=self._num_pairs(),
        )

    def config_of(self, row: int, visited: int) -> Config:
        """The configuration of a kernel whose rows and visited blocks hold so many tokens: a visited block is computed
        in the largest parts for which there is room.

        Raises: NotImplementedError where there is none for the smallest.
        """
        for parts in range(1, visited // LANES + 1):
            chunk = visited // parts
            held = held_bytes(row, visited, chunk, self.dims, self.itemsize)
            if visited % parts == 0 and chunk % LANES == 0 and held <= self.config.vmem_bytes:
                return dataclasses.replace(self.config, chunk=chunk, vmem_bytes=max(held, _SCOPED_VMEM_BYTES))
        sizes = self.schedule.block_sizes
        _refuse(f"blocks of {sizes} do not fit its memory, it takes smaller ones")

    def words_of_queries(self) -> jax.Array:
        """What blocks of queries visit, as the forward pass and dq go through it."""
        return words_of(self._ranges(self.schedule.kv_blocks), num_heads=self.config.num_heads, num_members=1)

    def words_of_keys(self) -> jax.Array:
        """What blocks of keys visit, as dk and dv go through it."""
        num_heads = self.config.num_heads
        num_members = num_heads // self.config.num_kv_heads
        return words_of(self._ranges(self.schedule.q_blocks), num_heads=num_heads, num_members=num_members)

    def _ranges(self, ranges: BlockRanges) -> BlockRanges:
        """Of one side of the schedule, without full blocks where its one block of keys is shorter than the kernel's."""
        if self.kv_len % self.config.block_kv and self.schedule.block_sizes.block_kv == self.kv_len:
            return dataclasses.replace(ranges, full_start=ranges.start, full_stop=ranges.start)
        return ranges

    def token_rows(self) -> dict[str, jax.Array | None]:
        if self.in_order:
            return {"q_tokens": None, "kv_tokens": None}
        axes = {
            "q_tokens": (self.tokens.queries(self.q_len), self.config.block_q),
            "kv_tokens": (self.tokens.keys(self.kv_len), self.config.block_kv),
        }
        return {name: token_rows(*x, with_segments=self.mask.uses_segments) for name, x in axes.items()}

    def _schedule(self, schedule: Schedule | None, options: Options) -> Schedule:
        """A constant one where tokens are in order, else the caller's, or one made here."""
        sizes = options.block_sizes or MOSAIC_TPU_ATTENTION.get(generation() or "", BLOCKWISE_ATTENTION["tpu"])
        if self.in_order:
            return static_schedule(self.mask, self.q_len, self.kv_len, sizes)
        if schedule is not None:
            return schedule
        return make_schedule(self.mask, self.tokens, q_len=self.q_len, kv_len=self.kv_len, block_sizes=sizes)

    def _num_pairs(self) -> int:
        blocks, sizes = self.schedule.kv_blocks, self.schedule.block_sizes
        if not isinstance(blocks.start, np.ndarray):
            return self.q_len * self.kv_len
        return int(np.sum(blocks.stop - blocks.start)) * sizes.block_q * sizes.block_kv // blocks.num_lists

    def _tested(self, sizes: BlockSizes) -> Mask | None:
        """The mask, or None where all pairs of what is visited may attend."""
        if self.mask == Full() or (self.in_order and all_full(self.mask, self.q_len, self.kv_len, sizes)):
            return None
        try:
            tests_of(self.mask, (LANES, LANES))
        except NotImplementedError as reason:
            _refuse(str(reason))
        return self.mask


def carry_by_head(carry: SoftmaxCarry, block: int) -> SoftmaxCarry:
    """As the kernel takes it, in blocks of so many queries."""
    return SoftmaxCarry(
        max=rows_of(carry.max, block, -jnp.inf), sum=rows_of(carry.sum, block), acc=by_head(carry.acc, block)
    )


def rows_of_backward(out, lse, dout, dlse, block: int) -> jax.Array:
    """What the backward kernels know of each query, `[B, N, 2, T]`, in blocks of so many."""
    # Queries that see nothing, and those that are not there: exp(logit - inf) = 0.
    lse = rows_of(jnp.where(lse == -jnp.inf, jnp.inf, lse), block, jnp.inf)
    return jnp.concatenate([lse, rows_of(delta_of(out, dout, dlse), block)], axis=2)


def check_call(q, v, dropout: Dropout | None, schedule: Schedule | None, bias: Bias | None) -> None:
    """Raises NotImplementedError with the reason where the kernels do not serve the call."""
    platform = dispatch.current_platform()
    if platform != "tpu":
        _refuse(f"the platform is {platform}, wanted tpu")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        _refuse(f"q is {q.dtype}, it takes bfloat16 and float32")
    for name, x in (("q and k", q), ("v", v)):
        if x.shape[3] not in HEAD_DIMS:
            _refuse(f"the head dim of {name} is {x.shape[3]}, it takes one of {HEAD_DIMS}")
    if dropout is not None:
        _refuse("it has no dropout")
    if bias is not None:
        _refuse("it adds no bias to the logits (bias)")
    if schedule is not None and schedule.is_selection:
        _refuse("it takes no blocks that were chosen")


def whole_blocks(sizes: BlockSizes, q_len: int, kv_len: int) -> tuple[int, int]:
    """Queries and keys that the kernels' blocks hold, for a schedule in blocks of these sizes."""
    return _whole_lanes("block_q", sizes.block_q, q_len), _whole_lanes("block_kv", sizes.block_kv, kv_len)


def _whole_lanes(name: str, block: int, length: int) -> int:
    """The tokens that a block of the kernel holds; of a schedule with one block, more than there are."""
    if block % LANES and block < length:
        _refuse(f"the schedule's {name} is {block}, it takes multiples of {LANES}, or one block for all")
    return -(-block // LANES) * LANES


def _refuse(reason: str) -> NoReturn:
    raise NotImplementedError(f"mosaic_tpu: {reason}")

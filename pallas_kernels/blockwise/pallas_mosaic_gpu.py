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
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bias import Bias
from pallas_kernels.block_sizes import MOSAIC_GPU_ATTENTION, BlockSizes
from pallas_kernels.blockwise import near_bias
from pallas_kernels.blockwise import pallas_mosaic_gpu_backward as backward_kernel
from pallas_kernels.blockwise import pallas_mosaic_gpu_bias as kernel_bias
from pallas_kernels.blockwise import pallas_mosaic_gpu_decode as decode
from pallas_kernels.blockwise import pallas_mosaic_gpu_forward as forward_kernel
from pallas_kernels.blockwise import pallas_mosaic_gpu_split as split_kernel
from pallas_kernels.blockwise.options import Options
from pallas_kernels.blockwise.pallas_mosaic_gpu_bias_sums import makes_sums, slope_table
from pallas_kernels.blockwise.pallas_mosaic_gpu_dropout import Words
from pallas_kernels.blockwise.pallas_mosaic_gpu_fixed_point import of_units, units_of
from pallas_kernels.blockwise.pallas_mosaic_gpu_pairs import PairTest, band_of
from pallas_kernels.blockwise.pallas_mosaic_gpu_turns import plan as make_plan
from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import Range
from pallas_kernels.dropout import Dropout, key_words
from pallas_kernels.mask import Full, Mask, Span
from pallas_kernels.mosaic_gpu import hopper_cores, refuse
from pallas_kernels.online_softmax import SoftmaxCarry, delta_of
from pallas_kernels.pair_tests import all_full, tests_of
from pallas_kernels.schedule import BlockRanges, Schedule, make_schedule, static_schedule
from pallas_kernels.tokens import Tokens, repeat_last
from pallas_kernels.wgmma import ROWS, TILE_ROWS

DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
"""Head dims of q and k, and of v, that there are kernels for; others are filled up with zeros."""
_MOST_KEYS = {256: 64}
"""Of a block of the forward pass, by head dim of q and k, where its shared memory cannot hold those of a schedule."""
_WIDE = 128
"""The forward pass keeps two tiles of q up to this head dim, and one of wider ones."""
_LEAST_ITEMS_A_CORE = 1.5
"""Of the backward pass. Items of a causal mask differ in length: fewer leave some without work in the end."""


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
    interpret=None,
) -> tuple[jax.Array, jax.Array] | SoftmaxCarry:
    """`blockwise_attention_forward` on a Hopper GPU; with `interpret` on a CPU, for tests."""
    num_cores = hopper_cores(interpret, interpreted=4)
    _check_call(q, v, options)
    if (refusal := options.refusal_of_skipping_and_maxima()) is not None:
        refuse(refusal)
    tokens = tokens or Tokens()
    # A head dim that has to be filled up would have the keys copied.
    is_whole = q.shape[3] == v.shape[3] and q.shape[3] in decode.BLOCK
    if is_whole and dropout is None and bias is None and decode.serves(q.shape[1], schedule, options):
        arguments = {"tokens": tokens, "carry": carry, "return_carry": return_carry, "options": options}
        return decode.forward(q, k, v, **arguments, num_cores=num_cores, interpret=interpret)
    given_dim, (head_dim, value_dim) = v.shape[3], dims_of(q, v)
    q, k, v = _filled(q, head_dim), _filled(k, head_dim), _filled(v, value_dim)
    q_len, kv_len = q.shape[1], k.shape[1]
    sizes = _block_sizes(head_dim, tokens, schedule, options)
    blocks = _schedule(q_len, kv_len, tokens, schedule, sizes, options)
    ranges = blocks.kv_blocks
    if kv_len < sizes.block_kv:
        # The schedule's one block of keys is shorter than the kernel's, which reads on behind the last key.
        ranges = _without_full_blocks(ranges)
    block_kv = min(sizes.block_kv, _MOST_KEYS.get(head_dim, sizes.block_kv))
    ranges = _in_parts(ranges, sizes.block_kv // block_kv, num_blocks=-(-kv_len // block_kv))
    padding_q, padding_kv = -q_len % sizes.block_q, -kv_len % block_kv
    inputs = forward_kernel.Inputs(
        q=_whole_tiles(q),
        k=_whole_tiles(k),
        v=_whole_tiles(v),
        ranges=jax.tree.map(jnp.asarray, ranges),
        **_padded_tokens(tokens, options.mask, padding_q, padding_kv),
        words=_words(dropout, tokens, q_len, kv_len, padding_q, padding_kv),
        **_bias_operands(bias, tokens, q_len, kv_len, options),
        band=band_of(blocks.bands, of_queries=True, padding=padding_q),
        carry=None if carry is None else _padded_carry(carry, padding_q, value_dim),
    )
    outputs = forward_kernel.attend(
        inputs,
        forward_kernel.Config(
            pair_test=_pair_test(
                q_len, kv_len, tokens, schedule, sizes, options, num_heads=q.shape[2], columns=block_kv
            ),
            scale=options.scale,
            soft_cap=options.logits_soft_cap,
            dropout_rate=0.0 if dropout is None else dropout.rate,
            block_q=sizes.block_q,
            block_kv=block_kv,
            kv_len=kv_len,
            num_cores=num_cores,
            q_slots=2 if head_dim <= _WIDE else 1,
            return_carry=return_carry,
            interpret=interpret,
        ),
    )
    if not return_carry:
        return outputs.out[:, :q_len, :, :given_dim], outputs.lse[..., :q_len]
    after = outputs.carry
    return SoftmaxCarry(max=after.max[..., :q_len], sum=after.sum[..., :q_len], acc=after.acc[:, :q_len, :, :given_dim])


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
    interpret=None,
) -> tuple[Any, ...]:
    """`blockwise_attention_backward` on a Hopper GPU; with `interpret` on a CPU, for tests."""
    # Interpreted, by one block of threads: more would have to take turns there too.
    num_cores = hopper_cores(interpret)
    _check_call(q, v, options)
    tokens = tokens or Tokens()
    q_len, kv_len = q.shape[1], k.shape[1]
    sizes = _block_sizes("schedule", tokens, schedule, options)
    blocks = _schedule(q_len, kv_len, tokens, schedule, sizes, options)
    padding_q, padding_kv = -q_len % sizes.block_q, -kv_len % sizes.block_kv
    rows, given_lse = ((0, 0), (0, 0), (0, padding_q)), lse
    dropout_rate = 0.0 if dropout is None else dropout.rate
    # Kernels compute p / (1 - rate), and for what multiplies it (1 - rate) delta: no multiplication a pair.
    base_2 = lse * math.log2(math.e) + math.log2(1 - dropout_rate)
    # Queries that see nothing, and those that are not there: 2^(logit - inf) = 0.
    lse = jnp.pad(jnp.where(lse == -jnp.inf, jnp.inf, base_2), rows, constant_values=jnp.inf)
    head_dim, value_dim = dims_of(q, v)
    dims = head_dim, head_dim, value_dim
    call = _Backward(
        operands={
            "q": _whole_tiles(_filled(q, head_dim)),
            "k": _whole_tiles(_filled(k, head_dim)),
            "v": _whole_tiles(_filled(v, value_dim)),
            "dout": _whole_tiles(_filled(dout.astype(q.dtype), value_dim)),
            "lse": lse,
            **_padded_tokens(tokens, options.mask, padding_q, padding_kv),
            "words": _words(dropout, tokens, q_len, kv_len, padding_q, padding_kv),
            **_bias_operands(bias, tokens, q_len, kv_len, options),
        },
        out=out,
        dout=dout,
        dlse=dlse,
        accumulate=tuple(None if x is None else _filled(x, dim) for x, dim in zip(accumulate, dims, strict=True)),
        q_len=q_len,
        kv_len=kv_len,
        options=options,
        dropout_rate=dropout_rate,
        pair_test=functools.partial(_pair_test, q_len, kv_len, tokens, schedule, sizes, options, num_heads=q.shape[2]),
        interpret=interpret,
    )
    # Of wide heads registers hold no more of a pair than the softmax asks for.
    if head_dim not in backward_kernel.TILES or (head_dim > _WIDE and call.has_options):
        *gradients, sums = _differentiate_split(call, blocks)
        near = None
    else:
        *gradients, sums, near = _differentiate(call, blocks, num_cores)
    gradients = zip(gradients, (q, k, v), strict=True)
    gradients = tuple(gradient[:, : x.shape[1], :, : x.shape[3]] for gradient, x in gradients)
    if sums is None:
        return gradients
    dbias = kernel_bias.gradient_of_sums(bias, sums[:, :, :, :kv_len], near, _unit(options))
    if bias.reach is not None and near is None:
        within = near_bias.gradient(
            bias, q, k, v, lse=given_lse, delta=delta_of(out, dout, dlse), dout=dout, tokens=tokens, schedule=schedule,
            options=options, dropout=dropout,
        )  # fmt: skip
        dbias = jax.tree.map(jnp.add, dbias, within)
    return *gradients, dbias


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Backward:
    """A call of the backward pass, its head dims filled up.

    Attributes:
      operands: Of the kernels' inputs those that are not made of the schedule, but for delta.
      out, dout, dlse: As they were given, of which delta is made.
      accumulate: Running dq, dk and dv, not padded; None for none.
      pair_test: `_pair_test` of a number of columns.
    """

    operands: dict[str, Any]
    out: jax.Array | None
    dout: jax.Array
    dlse: jax.Array | None
    accumulate: tuple[Any, Any, Any]
    q_len: int
    kv_len: int
    options: Options
    dropout_rate: float
    pair_test: Callable[..., PairTest | None]
    interpret: Any

    def delta(self) -> jax.Array:
        """rowsum(dout out) - dlse, of whole blocks of queries."""
        return self.in_whole_blocks(delta_of(self.out, self.dout, self.dlse))

    @property
    def config(self) -> dict[str, Any]:
        """What the configs of all kernels have of it."""
        return {
            "scale": self.options.scale,
            "soft_cap": self.options.logits_soft_cap,
            "dropout_rate": self.dropout_rate,
            "kv_len": self.kv_len,
            "interpret": self.interpret,
        }

    @property
    def has_options(self) -> bool:
        """Whether more than a softmax is made of logits."""
        return self.options.logits_soft_cap is not None or self.dropout_rate > 0 or self.operands["bias"] is not None

    @property
    def is_in_order(self) -> bool:
        return self.operands["q_positions"] is None and self.operands["kv_positions"] is None

    @property
    def span(self) -> Span | None:
        """The mask's, where tokens are in order and it has bounds."""
        span = self.options.mask.span
        return span if self.is_in_order and span != (None, None) else None

    def in_whole_blocks(self, x_BNT: jax.Array) -> jax.Array:
        return jnp.pad(x_BNT, ((0, 0), (0, 0), (0, -self.q_len % backward_kernel.BLOCK)))


def _is_scattered(blocks: Schedule) -> bool:
    """Whether blocks of keys may be visited by blocks of queries that are not neighbours."""
    return blocks.q_blocks.first is not None or blocks.q_blocks.start.shape[3] > 1


def _differentiate(call: _Backward, blocks: Schedule, num_cores: int) -> tuple[jax.Array | None, ...]:
    """dq, dk and dv, padded, and the sums for the bias and those by distance, or None, by the fused kernel."""
    options, sizes, q, k = call.options, blocks.block_sizes, call.operands["q"], call.operands["k"]
    batch_size, _, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    ranges = blocks.q_blocks if call.kv_len >= backward_kernel.BLOCK else _without_full_blocks(blocks.q_blocks)
    num_items = batch_size * num_kv_heads * ranges.num_rows
    shares = num_shares(num_heads // num_kv_heads, num_items=num_items, num_cores=num_cores)
    num_pairs_of_row = num_kv_heads * shares
    # Of a query head: q and dout, and dq in float32.
    dims = head_dim + call.operands["v"].shape[3]
    pair_bytes = num_heads // num_pairs_of_row * call.q_len * (dims * q.dtype.itemsize + head_dim * 4)
    # Items that visit scattered blocks would wait for their turns longer than it takes to find units, to read k and v.
    delta, units = call.delta(), None
    if options.deterministic and _is_scattered(blocks):
        of_call = (call.operands[name] for name in ("k", "v", "dout"))
        units = units_of(*of_call, delta, dropout_rate=call.dropout_rate)
    plan = make_plan(
        ranges,
        num_q_blocks=-(-call.q_len // sizes.block_q),
        batch_size=batch_size,
        num_heads=num_heads,
        num_kv_heads=num_pairs_of_row,
        pair_bytes=pair_bytes,
        num_cores=num_cores,
        in_turns=options.deterministic and units is None,
        # Sums for a bias are of one head, and written when the next begins.
        most_heads_together=1
        if options.bias_gradient
        else _most_heads_together(options.mask, head_dim, max(call.q_len, call.kv_len)),
    )
    running_dq, *running = call.accumulate
    running = None if running[0] is None else tuple(_whole_blocks(x) for x in running)
    adds_to_running = running_dq is not None and units is None
    dq = running_dq
    if not adds_to_running:
        # Zeros of each call's own: XLA would make those of all layers once and copy them, which takes twice the time.
        zero, _ = jax.lax.optimization_barrier((jnp.float32(0) if units is None else jnp.int32(0), delta))
        dq = jnp.full((batch_size, call.q_len, num_heads, head_dim), zero)
    slopes, bias = None, call.operands["bias"]
    adder_sums = options.bias_gradient and call.is_in_order and makes_sums(bias, head_dim, options.logits_soft_cap)
    if adder_sums and kernel_bias.has_tables(bias):
        slopes = slope_table(bias, call.q_len, call.kv_len)
    inputs = backward_kernel.Inputs(
        **call.operands,
        slopes=None if slopes is None else slopes.words,
        delta=delta * (1 - call.dropout_rate),
        band=band_of(blocks.bands, of_queries=False, padding=-call.kv_len % backward_kernel.BLOCK),
        ranges=jax.tree.map(jnp.asarray, dataclasses.replace(ranges, order=plan.order)),
        turns=jax.tree.map(jnp.asarray, plan.turns),
        per_unit=None if units is None else (1 / units).reshape(-1),
        running=running if shares == 1 else None,
    )
    dq, dk, dv, *sums = backward_kernel.differentiate(
        inputs,
        # The interpreter, unlike a copy, does not leave out what lies behind the end.
        _whole_tiles(dq) if call.interpret is None else _whole_blocks(dq),
        plan,
        backward_kernel.Config(
            pair_test=call.pair_test(columns=backward_kernel.AT_A_TIME[head_dim]),
            **call.config,
            scales_dq=adds_to_running,
            bias_gradient=options.bias_gradient,
            adder_sums=adder_sums,
            shares=shares,
        ),
    )
    if slopes is not None:
        sums[0] = sums[0] * slopes.units[None, :, :, None, None]
    if shares > 1:
        dk, dv = (
            _sum_of_shares(x, shares, before, k.dtype)
            for x, before in zip((dk, dv), running or (None, None), strict=True)
        )
    if units is not None:
        dq = of_units(dq, units)
    if not adds_to_running:
        dq = dq * options.scale
        dq = dq.astype(q.dtype) if running_dq is None else dq[:, : call.q_len] + running_dq
    return dq, dk, dv, *(sums or (None, None))


def _differentiate_split(call: _Backward, blocks: Schedule) -> tuple[jax.Array | None, ...]:
    """dq, dk and dv, padded, and the sums for the bias or None, by kernels that each add up their own."""
    num_cores = hopper_cores(call.interpret, interpreted=4)
    delta = call.delta() * (1 - call.dropout_rate)

    def gradient(name: str, ranges: BlockRanges, running) -> tuple[jax.Array, ...]:
        if call.kv_len < split_kernel.BLOCK:
            ranges = _without_full_blocks(ranges)
        of_queries = name == "dq"
        padding = -(call.q_len if of_queries else call.kv_len) % split_kernel.BLOCK
        inputs = split_kernel.Inputs(
            **call.operands,
            delta=delta,
            band=band_of(blocks.bands, of_queries=of_queries, padding=padding),
            ranges=jax.tree.map(jnp.asarray, ranges),
            running=None if running is None else _whole_blocks(running),
        )
        config = split_kernel.Config(
            gradient=name,
            **call.config,
            pair_test=call.pair_test(columns=split_kernel.TILE),
            span=call.span,
            num_cores=num_cores,
            in_line=_is_scattered(blocks),
            bias_gradient=call.options.bias_gradient and name == "dk",
        )
        return split_kernel.differentiate(inputs, config)

    running_dq, running_dk, running_dv = call.accumulate
    (dq,) = gradient("dq", blocks.kv_blocks, running_dq)
    dk, *sums = gradient("dk", blocks.q_blocks, running_dk)
    (dv,) = gradient("dv", blocks.q_blocks, running_dv)
    return dq, dk, dv, sums[0] if sums else None


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


def _check_call(q, v, options: Options) -> None:
    """Raises NotImplementedError with the reason where the kernels do not serve the call."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        refuse(f"q is {q.dtype}, it takes bfloat16 and float16")
    most = DIMS[-1]
    if q.shape[3] > most[0] or v.shape[3] > most[1]:
        refuse(f"the head dim of q and k is {q.shape[3]} and of v {v.shape[3]}, it takes those up to {most[0]}")
    if not options.scale > 0:
        refuse(f"scale={options.scale}, it takes positive ones")


def dims_of(q, v) -> tuple[int, int]:
    """Of DIMS, the first that q and k, and v, fit into."""
    return next(dims for dims in DIMS if q.shape[3] <= dims[0] and v.shape[3] <= dims[1])


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


def _in_parts(ranges: BlockRanges, parts: int, num_blocks: int) -> BlockRanges:
    """Ranges over blocks as ranges over their parts, of which there are `num_blocks`: the last block may have fewer."""
    if parts == 1:
        return ranges
    return dataclasses.replace(ranges, **{x: (getattr(ranges, x) * parts).clip(0, num_blocks) for x in Range._fields})


def _without_full_blocks(ranges: BlockRanges) -> BlockRanges:
    return dataclasses.replace(ranges, full_start=ranges.start, full_stop=ranges.start)


def _whole_blocks(x_BLNH):
    """The same, its length padded with zeros to whole blocks of a schedule."""
    return _padded_length(x_BLNH, -x_BLNH.shape[1] % backward_kernel.BLOCK)


def _whole_tiles(x_BLNH):
    """The same, its length padded with zeros to what shared memory is tiled by."""
    return _padded_length(x_BLNH, -x_BLNH.shape[1] % TILE_ROWS)


def _filled(x_BLNH, dim: int):
    """The same, its head dim filled up with zeros."""
    missing = dim - x_BLNH.shape[3]
    return jnp.pad(x_BLNH, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else x_BLNH


def _padded_length(x_BLNH, padding: int):
    return jnp.pad(x_BLNH, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else x_BLNH


def _padded_tokens(tokens: Tokens, mask: Mask, padding_q: int, padding_kv: int) -> dict[str, Any]:
    """What the kernels' inputs say of tokens; no segment ids where the mask does not ask for them."""
    uses_segments = mask.uses_segments
    return {
        "q_positions": repeat_last(tokens.q_positions, padding_q),
        "kv_positions": repeat_last(tokens.kv_positions, padding_kv),
        "q_segment_ids": repeat_last(tokens.q_segment_ids, padding_q) if uses_segments else None,
        "kv_segment_ids": repeat_last(tokens.kv_segment_ids, padding_kv) if uses_segments else None,
    }


def _bias_operands(
    bias: Bias | None, tokens: Tokens, q_len: int, kv_len: int, options: Options
) -> dict[str, kernel_bias.KernelBias | jax.Array | None]:
    """What kernels read of a bias; by distance where tokens are in order."""
    of_call = kernel_bias.of_call(bias, _unit(options))
    has_no_positions = tokens.q_positions is None and tokens.kv_positions is None
    values = kernel_bias.value_table(of_call, q_len, kv_len) if has_no_positions else None
    return {"bias": of_call, "bias_values": values}


def _unit(options: Options) -> float:
    """By what kernels multiply q.k, or what a soft cap makes of it, to have logits."""
    return options.scale if options.logits_soft_cap is None else options.logits_soft_cap


def _words(
    dropout: Dropout | None, tokens: Tokens, q_len: int, kv_len: int, padding_q: int, padding_kv: int
) -> Words | None:
    """Dropout's words of tokens, as kernels take them; whatever pairs of tokens that are not there come to."""
    if dropout is None:
        return None
    queries = jnp.pad(dropout.query_words(tokens.queries(q_len)), ((0, 0), (0, 0), (0, padding_q)))
    return Words(queries, jnp.pad(key_words(tokens.keys(kv_len)), ((0, 0), (0, padding_kv))))


def _padded_carry(carry: SoftmaxCarry, padding: int, value_dim: int) -> SoftmaxCarry:
    """Of whole tiles of queries, and of the kernel's values."""
    acc = None if carry.acc is None else _filled(carry.acc, value_dim)
    rows = (0, 0), (0, 0), (0, padding)
    return SoftmaxCarry(
        max=jnp.pad(carry.max, rows, constant_values=-jnp.inf),
        sum=jnp.pad(carry.sum, rows),
        acc=None if acc is None else _padded_length(acc, padding),
    )

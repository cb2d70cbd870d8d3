"""Softmax attention written down plainly, in float32, with the whole [T, S] matrix: the truth the rest is held to.

  S = scale q k^T;  S = cap tanh(S / cap) if capped;  S += bias if any;  S = -inf where the mask forbids
  lse = log sum_s exp(S);  P = exp(S - lse);  out = P v
  dV = P^T dO;  dS = P (dO v^T - rowsum(dO out) + dlse);  dQ = scale dS k;  dK = scale dS^T q
  with dropout:  out = (P Z) v;  dV = (P Z)^T dO;  dS = P ((dO v^T) Z - rowsum(dO out) + dlse)
  with blocks that were chosen:  S = -inf in all others
  with a bias of parameters theta:  dtheta = sum dS dbias/dtheta
  with sinks, one for each query head:  lse = log(exp(sink) + sum_s exp(S))
  with a threshold (skip_softmax_threshold), tile by tile, blocks of keys in ascending order:  S = -inf in a tile where
    max of the tile's S - max of S in the tiles before < log threshold  for each of its queries

Reference: Dao 2023, FlashAttention-2, arXiv:2307.08691, section 3.1; the dlse term follows from d lse / d S = P,
and the rowsum with dropout from out being (P Z) v. Sinks: Agarwal et al. 2025, gpt-oss, arXiv:2508.10925. Threshold:
Yuan et al. 2025, BLASST, arXiv:2512.12087, Algorithm 1.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.bias import Bias, gradient_of_tile
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.blockwise.options import Options
from pallas_kernels.dropout import Dropout
from pallas_kernels.online_softmax import MASK_VALUE, SoftmaxCarry, delta_of, finite_max, pooled_max
from pallas_kernels.schedule import Schedule
from pallas_kernels.tokens import Tokens

# GPUs and TPUs would otherwise multiply float32 in TF32 and bfloat16.
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

SKIPPED_TILE = BlockSizes(block_q=64, block_kv=128)
"""What a threshold leaves out at a time, unless block sizes are asked for."""


def forward(
    q, k, v, *, tokens, schedule, carry, return_carry, options: Options, dropout: Dropout | None = None,
    bias: Bias | None = None,
):  # fmt: skip
    """The reference of `blockwise_attention_forward`; needs no schedule, but one of chosen blocks is a mask too."""
    s, _ = _logits(q, k, tokens, options, schedule, bias)
    maxima = None if options.block_maxima is None else _block_maxima(s, options.block_maxima)
    if options.skip_softmax_threshold:
        s = _without_negligible_tiles(s, options)
    # JAX would divide a maximum's gradient by the count of logits that equal it, which is 0 where XLA computes the
    # logits again and they round otherwise: a bias is added with an FMA in one place only. With no gradient at all less
    # would cancel in that of a row's logits, which of one token is then 5 times as far off.
    row_max = jnp.take_along_axis(s, jnp.argmax(s, axis=-1, keepdims=True), axis=-1)[..., 0]
    if carry is not None:
        row_max = jnp.maximum(row_max, carry.max)
    p = jnp.exp(s - finite_max(row_max)[..., None])
    row_sum = jnp.sum(p, axis=-1)
    acc = einsum("BNTS,BSNV->BTNV", _dropped(p, tokens, dropout), per_query_head(v, q))
    if carry is not None:
        carry = carry.whole(v.shape[3])
        rescale = jnp.exp(carry.max - finite_max(row_max))
        row_sum += rescale * carry.sum
        acc += rescale.transpose(0, 2, 1)[..., None] * carry.acc
    result = SoftmaxCarry(max=row_max, sum=row_sum, acc=acc)
    result = result if return_carry else result.finalize(q.dtype)
    return result if maxima is None else (result, maxima)


def forward_with_sinks(
    q, k, v, sinks, *, tokens, schedule, options: Options, dropout: Dropout | None = None, bias: Bias | None = None
):
    """`(out, lse)` by one softmax over the logits and a column of sinks, whose probability meets no value.

    `forward` knows sinks only as a carry to start from; this is what that is held to.
    """
    s, _ = _logits(q, k, tokens, options, schedule, bias)
    column = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None, None], (*s.shape[:3], 1))
    s = jnp.concatenate([s, column], axis=-1)
    p = jax.nn.softmax(s, axis=-1)[..., :-1]
    out = einsum("BNTS,BSNV->BTNV", _dropped(p, tokens, dropout), per_query_head(v, q))
    return out.astype(q.dtype), jax.nn.logsumexp(s, axis=-1)


def backward(
    q, k, v, out, lse, dout, dlse, *, tokens, schedule, accumulate, options: Options, dropout: Dropout | None = None,
    bias: Bias | None = None,
):  # fmt: skip
    """The reference of `blockwise_attention_backward`; the schedule as in `forward`."""
    s, cap_slope = _logits(q, k, tokens, options, schedule, bias)
    dout = dout.astype(jnp.float32)
    delta = delta_of(out, dout, dlse)
    p = jnp.exp(s - jnp.where(lse == -jnp.inf, jnp.inf, lse)[..., None])
    dp = _dropped(einsum("BTNV,BSNV->BNTS", dout, per_query_head(v, q)), tokens, dropout)
    dlogits = p * (dp - delta[..., None])
    ds = options.scale * cap_slope * dlogits
    dq = einsum("BNTS,BSNH->BTNH", ds, per_query_head(k, q))
    dk = per_kv_head(einsum("BNTS,BTNH->BSNH", ds, q.astype(jnp.float32)), k)
    dv = per_kv_head(einsum("BNTS,BTNV->BSNV", _dropped(p, tokens, dropout), dout), v)
    gradients = zip(accumulate, (dq, dk, dv), (q, k, v), strict=True)
    gradients = tuple(g.astype(x.dtype) if running is None else running + g for running, g, x in gradients)
    if not options.bias_gradient:
        return gradients
    tokens = tokens or Tokens()
    q_positions, kv_positions = tokens.queries(q.shape[1]).positions, tokens.keys(k.shape[1]).positions
    return *gradients, gradient_of_tile(bias, q_positions[:, :, None], kv_positions[:, None, :], dlogits)


def _logits(
    q, k, tokens, options: Options, schedule: Schedule | None, bias: Bias | None
) -> tuple[jax.Array, jax.Array]:
    """Masked logits `[B, N, T, S]`, and the derivative of the soft cap at each."""
    s = options.scale * einsum("BTNH,BSNH->BNTS", q.astype(jnp.float32), per_query_head(k, q))
    slope = jnp.ones_like(s)
    if options.logits_soft_cap is not None:
        squashed = jnp.tanh(s / options.logits_soft_cap)
        s, slope = options.logits_soft_cap * squashed, 1 - squashed**2
    (_, T, N, _), S = q.shape, k.shape[1]
    if bias is not None:
        s += bias.in_float32().dense(tokens, T, S)
    allowed = options.mask.dense(tokens, T, S, num_heads=N)
    if schedule is not None and schedule.is_selection:
        rows, columns = jnp.arange(T) // schedule.block_sizes.block_q, jnp.arange(S) // schedule.block_sizes.block_kv
        chosen = jnp.repeat(schedule.visited(), N // schedule.num_lists, axis=1)
        allowed &= chosen[:, :, rows[:, None], columns]
    return jnp.where(allowed, s, MASK_VALUE), slope


def _block_maxima(s_BNTS, sizes: BlockSizes) -> jax.Array:
    return pooled_max(s_BNTS, *dataclasses.astuple(sizes.fit(*s_BNTS.shape[2:])))


def _without_negligible_tiles(s_BNTS, options: Options) -> jax.Array:
    """The logits, -inf in tiles that the threshold leaves out."""
    block_q, block_kv = dataclasses.astuple((options.block_sizes or SKIPPED_TILE).fit(*s_BNTS.shape[2:]))
    greatest = pooled_max(s_BNTS, 1, block_kv)
    seen = jax.lax.cummax(greatest, axis=3)
    seen = jnp.concatenate([jnp.full_like(seen[..., :1], -jnp.inf), seen[..., :-1]], axis=3)
    is_negligible = (greatest == -jnp.inf) | (greatest < seen + jnp.log(options.skip_softmax_threshold))
    counts = pooled_max(jnp.where(is_negligible, 0.0, 1.0), block_q, 1) > 0
    rows, columns = (jnp.arange(n) // block for n, block in zip(s_BNTS.shape[2:], (block_q, block_kv), strict=True))
    return jnp.where(counts[:, :, rows[:, None], columns], s_BNTS, MASK_VALUE)


def _dropped(x_BNTS, tokens, dropout: Dropout | None):
    """x Z."""
    return x_BNTS if dropout is None else x_BNTS * dropout.dense(tokens, *x_BNTS.shape[2:])


def per_query_head(x_BSKH, q):
    """What kv heads hold, in float32, for each head of q that reads them: `[B, S, N, H]`."""
    return jnp.repeat(x_BSKH.astype(jnp.float32), q.shape[2] // x_BSKH.shape[2], axis=2)


def per_kv_head(dx_BSNH, x_BSKH):
    """The sum over the heads of q that read each kv head of x."""
    batch_size, kv_len, num_kv_heads, head_dim = x_BSKH.shape
    return dx_BSNH.reshape(batch_size, kv_len, num_kv_heads, -1, head_dim).sum(axis=3)

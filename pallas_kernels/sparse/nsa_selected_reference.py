"""Attention to chosen blocks written down plainly, in float32, with the whole [T, S] matrix: the truth of the op.

  S[t, s] = scale q[t] . k[s] where s is a row of a chosen block of t, and s <= place[t];  otherwise -inf
  lse = log sum_s exp(S);  P = exp(S - lse);  out = P v
  dV = P^T dO;  dS = P (dO v^T - rowsum(dO out) + dlse);  dQ = scale dS k;  dK = scale dS^T q

Reference: Yuan et al. 2025, Native Sparse Attention, arXiv:2502.11089, equations 11 and 12.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise.reference import per_kv_head, per_query_head
from pallas_kernels.online_softmax import MASK_VALUE, delta_of, finite_max

# GPUs and TPUs would otherwise multiply float32 in TF32 and bfloat16.
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def forward(q, k, v, choices, block_start, q_place, *, block_size, scale):
    """The reference of `selected_attention_forward`, to be differentiated by JAX too."""
    s = _logits(q, k, choices, block_start, q_place, block_size, scale)
    row_max = finite_max(jax.lax.stop_gradient(jnp.max(s, axis=-1)))
    p = jnp.exp(s - row_max[..., None])
    total = jnp.sum(p, axis=-1)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out = einsum("bnts,bsnv->btnv", p / total[..., None], per_query_head(v, q))
    return out.astype(q.dtype), jnp.where(empty, -jnp.inf, row_max + jnp.log(total))


def backward(q, k, v, choices, block_start, q_place, out, lse, dout, dlse, *, block_size, scale):
    """The reference of `selected_attention_backward`, float32."""
    s = _logits(q, k, choices, block_start, q_place, block_size, scale)
    dout = dout.astype(jnp.float32)
    p = jnp.exp(s - jnp.where(lse == -jnp.inf, jnp.inf, lse)[..., None])
    dp = einsum("btnv,bsnv->bnts", dout, per_query_head(v, q))
    ds = scale * p * (dp - delta_of(out, dout, dlse)[..., None])
    dq = einsum("bnts,bsnh->btnh", ds, per_query_head(k, q))
    dk = per_kv_head(einsum("bnts,btnh->bsnh", ds, q.astype(jnp.float32)), k)
    dv = per_kv_head(einsum("bnts,btnv->bsnv", p, dout), v)
    return dq, dk, dv


def allowed_pairs(choices, block_start, q_place, *, kv_len, block_size):
    """Whether each query attends to each key, bool `[B, K, T, S]`."""
    B, T = choices.shape[:2]
    place = (jnp.arange(T)[None] if q_place is None else q_place)[:, None, :, None]
    row = jnp.arange(kv_len)
    first = jnp.broadcast_to(block_start, (B, block_start.shape[1]))[..., None]
    of_block = (first <= row) & (row < first + block_size)  # [B, M, S]
    chosen = (choices[..., None] == jnp.arange(block_start.shape[1])).any(axis=3)  # [B, T, K, M]
    is_chosen = einsum("btkm,bms->bkts", chosen.astype(jnp.float32), of_block.astype(jnp.float32)) > 0
    return is_chosen & (row <= place)


def _logits(q, k, choices, block_start, q_place, block_size, scale):
    """Masked logits `[B, N, T, S]`."""
    s = scale * einsum("btnh,bsnh->bnts", q.astype(jnp.float32), per_query_head(k, q))
    allowed = allowed_pairs(choices, block_start, q_place, kv_len=k.shape[1], block_size=block_size)
    return jnp.where(jnp.repeat(allowed, q.shape[2] // k.shape[2], axis=1), s, MASK_VALUE)

"""MoBA written down plainly, in float32, with the whole [T, S] matrix: the truth the op is held to.

  mu[j] = mean of the keys of chunk j;  a chunk is the C tokens of a document with one position // C
  chosen[t] = t's own chunk, and of the whole chunks before it in its document the top_k - 1 of greatest q[t] . mu[j]
  out[t] = sum_s softmax_s(scale q[t] . k[s]) v[s]  over s <= t in the chosen chunks

Reference: Lu et al. 2025, MoBA, arXiv:2502.13189, equations 2 to 6, and the causal choice of section 2.2.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.online_softmax import finite_max
from pallas_kernels.tokens import Tokens

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def moba_reference(q, k, v, *, chunk_size, top_k, tokens: Tokens | None = None, scale=None):
    """`(out, lse)` of `moba_attention`, to be differentiated by JAX."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    allowed = chosen_pairs(q, k, chunk_size=chunk_size, top_k=top_k, tokens=tokens)
    logits = (q.shape[3] ** -0.5 if scale is None else scale) * einsum("btnh,bsnh->bnts", q, k)
    logits = jnp.where(allowed, logits, -jnp.inf)
    row_max = finite_max(jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
    p = jnp.exp(logits - row_max[..., None])
    total = jnp.sum(p, axis=-1)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out = einsum("bnts,bsnv->btnv", p / total[..., None], v)
    return out, jnp.where(empty, -jnp.inf, row_max + jnp.log(total))


def chosen_pairs(q, k, *, chunk_size, top_k, tokens: Tokens | None = None):
    """Whether each query attends to each key, bool `[B, N, T, T]`; k has as many heads as q."""
    positions, segments = (jnp.broadcast_to(x, q.shape[:2]) for x in (tokens or Tokens()).queries(q.shape[1]))
    chunks = positions // chunk_size
    same_document = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, None, :]
    same_chunk = same_document & (chunks[:, :, None] == chunks[:, None, :])
    size = jnp.sum(same_chunk, axis=-1)
    mean_of_own = einsum("bsr,brnh->bsnh", same_chunk.astype(jnp.float32), k) / chunk_size  # where it is whole
    # The first token of a whole chunk stands for it.
    stands = (size == chunk_size) & (positions % chunk_size == 0)
    may_choose = same_document & (chunks[:, None, :] < chunks[:, :, None]) & stands[:, None, :]
    scores = jnp.where(may_choose[:, None], einsum("btnh,bsnh->bnts", q, mean_of_own), -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
    chosen = may_choose[:, None] & (rank < top_k - 1)
    of_chosen = einsum("bntr,brs->bnts", chosen.astype(jnp.float32), same_chunk.astype(jnp.float32)) > 0
    causal = positions[:, None, :] <= positions[:, :, None]
    return (same_chunk & causal)[:, None] | of_chosen

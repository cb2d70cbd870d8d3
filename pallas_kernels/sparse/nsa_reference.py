"""Native Sparse Attention written down plainly, in float32, with whole matrices: the truth the op is held to.

  compressed block i of a document: its tokens d i to d i + l - 1, if all are there; t sees it from its last token on
  p_cmp[t, i] = softmax_i(scale q[t] . K_cmp[i])                                            (equation 8)
  p_slc[t, j] = sum_i p_cmp[t, i] (tokens that compressed block i and block j have in common) / d   (equation 9)
  p_slc of a group = sum over its heads                                                       (equation 10)
  selected[t] = blocks 0, j - 1, j of t's document, j its own, and of the others before those of highest p_slc, n in all
  out[t] = sum_c gate_c[t] sum_s softmax_s(scale q[t] . K_c[s]) V_c[s],  s <= t      (equations 5, 11 and 12)
    over all compressed blocks; over the tokens of selected blocks; over the last `window` tokens

Reference: Yuan et al. 2025, Native Sparse Attention, arXiv:2502.11089, section 3.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.online_softmax import finite_max
from pallas_kernels.sparse.nsa_blocks import NsaSizes

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def nsa_reference(q, compressed, selected, sliding, gates, *, sizes: NsaSizes, segment_ids=None, scale=None):
    """`nsa_attention`, to be differentiated by JAX."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    place, same = documents(segment_ids, *q.shape[:2])
    visible = same & (place[:, None, :] <= place[:, :, None])
    of_compressed, p = attend(q, *compressed, compressed_pairs(place, same, sizes)[:, None], scale)
    allowed = selected_pairs(p, place, same, sizes, num_kv_heads=selected[0].shape[2])
    of_selected, _ = attend(q, *selected, allowed & visible[:, None], scale)
    near = visible & (place[:, :, None] - place[:, None, :] < sizes.window)
    of_sliding, _ = attend(q, *sliding, near[:, None], scale)
    branches = jnp.stack([of_compressed, of_selected, of_sliding], axis=-1)
    return einsum("btnvc,btnc->btnv", branches, gates.astype(jnp.float32))


def documents(segment_ids, B, T):
    """The place of each token in its document `[B, T]`, and which tokens are of one, `[B, T, T]`."""
    segments = jnp.zeros((B, T), jnp.int32) if segment_ids is None else jnp.broadcast_to(segment_ids, (B, T))
    same = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, None, :]
    before = jnp.arange(T)[None, :] < jnp.arange(T)[:, None]
    return jnp.sum(same & before, axis=-1), same


def compressed_at(place, same, sizes: NsaSizes):
    """The tokens at which compressed blocks begin, `[B, M]`, T where there are no more."""
    T = place.shape[1]
    length = jnp.sum(same, axis=-1)
    begins = (place % sizes.compress_stride == 0) & (place + sizes.compress_block <= length)
    return jnp.sort(jnp.where(begins, jnp.arange(T), T), axis=1)[:, : sizes.num_compressed(T)]


def compressed_pairs(place, same, sizes: NsaSizes):
    """Whether each query attends to each compressed key, bool `[B, T, M]`."""
    start, T = compressed_at(place, same, sizes), place.shape[1]
    last = jnp.minimum(start, T - 1) + sizes.compress_block - 1
    last = jnp.where(start < T, last, T)
    same_document = jnp.take_along_axis(same, jnp.minimum(start, T - 1)[:, None, :], axis=2)
    return same_document & (last[:, None, :] <= jnp.arange(T)[:, None])


def selected_pairs(p, place, same, sizes: NsaSizes, *, num_kv_heads):
    """Whether each query selects each token's block, bool `[B, N, T, T]`; p are the compressed branch's `[B, N, T, M]`.

    The first token of a block stands for it.
    """
    (B, N, T, _), size = p.shape, sizes.block_size
    start, row = compressed_at(place, same, sizes), jnp.arange(T)
    of_block = jnp.minimum(row + size, start[..., None] + sizes.compress_block) - jnp.maximum(row, start[..., None])
    shares = jnp.maximum(of_block, 0) / sizes.compress_stride  # [B, M, T]
    scores = einsum("bntm,bms->bnts", p, shares).reshape(B, num_kv_heads, -1, T, T).sum(axis=2)
    block, own = (place // size)[:, None, :], (place // size)[:, :, None]
    stands = same & (place % size == 0)[:, None, :] & (block <= own)
    always = stands & ((block == 0) | (block >= own - 1))
    scores = jnp.where((stands & ~always)[:, None], scores, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
    chosen = always[:, None] | ((scores > -jnp.inf) & (rank < sizes.num_blocks - 3))
    first = row - place % size  # of each token's block
    chosen = jnp.take_along_axis(chosen, jnp.broadcast_to(first[:, None, None], chosen.shape), axis=-1)
    return jnp.repeat(chosen, N // num_kv_heads, axis=1)


def attend(q, k, v, allowed, scale):
    """`(out, p)` of softmax attention to the allowed pairs; zero where there is none."""
    k, v = (jnp.repeat(x.astype(jnp.float32), q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.where(allowed, scale * einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k), -jnp.inf)
    p = jnp.exp(logits - finite_max(jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))))
    total = jnp.sum(p, axis=-1, keepdims=True)
    p = p / jnp.where(total == 0, 1.0, total)
    return einsum("bnts,bsnv->btnv", p, v), p

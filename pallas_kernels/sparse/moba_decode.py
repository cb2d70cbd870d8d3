"""MoBA of new tokens against a cache: scores of the chunks of the past, and attention to the chosen ones alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.sparse.moba_route import choose_chunks, fold_keys, fold_queries, unfold_queries


def moba_decode(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    sums: Float32[Array, "B M K H"],
    positions: Int32[Array, " T"],
    *,
    chunk_size: int,
    top_k: int,
    scale: float | None = None,
) -> Float[Array, "B T N V"]:
    """`moba_attention` of some tokens of one document a row to all before them, which a cache holds in order.

    Args:
      q: Queries of the tokens at `positions`.
      k, v: Keys and values of position 0, 1, 2, ..., those of the queries' tokens too; S is a multiple of chunk_size,
        and what stands behind a query is not read.
      sums: Of the keys of each chunk; M = S / chunk_size.
      chunk_size, top_k, scale: As `moba_attention`.
    Returns: out in q's dtype. Logits and sums are float32.
    Cost: a token at a time, 2 B N M H FLOPs for the scores and 2 B N top_k chunk_size (H + V) for the attention, of
      keys that are gathered for each query head: O(B N top_k chunk_size (H + V)) memory.
    """
    (B, _, N, H), (S, K) = q.shape, k.shape[1:3]
    M = S // chunk_size
    num_choices = min(top_k - 1, M)
    scale = H**-0.5 if scale is None else scale
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    means = fold_keys(sums)[:, :, 0] / chunk_size
    by_chunk = tuple(fold_keys(x).reshape(B * K, M, chunk_size, x.shape[3]) for x in (k, v))
    take = jax.vmap(lambda x, index: x[index])

    def attend(token):
        q_BNH, position = token
        q_FGH = fold_queries(q_BNH[:, None], K)
        own = position // chunk_size
        bounds = (jnp.broadcast_to(x, q_FGH.shape[:2]) for x in (jnp.int32(0), own))
        choices = choose_chunks(q_FGH, means, *bounds, num_choices) if num_choices else None
        listed = jnp.broadcast_to(own, (*q_FGH.shape[:2], 1))
        if choices is not None:
            listed = jnp.concatenate([listed, choices], axis=-1)
        keys, values = (take(x, jnp.maximum(listed, 0)) for x in by_chunk)
        logits = scale * jnp.einsum(
            "fgh,fgich->fgic", q_FGH, keys, precision=precision, preferred_element_type=jnp.float32
        )
        place = listed[..., None] * chunk_size + jnp.arange(chunk_size, dtype=jnp.int32)
        logits = jnp.where((listed[..., None] >= 0) & (place <= position), logits, -jnp.inf)
        p = jax.nn.softmax(logits, axis=(-2, -1))
        out = jnp.einsum(
            "fgic,fgicv->fgv", p.astype(v.dtype), values, precision=precision, preferred_element_type=jnp.float32
        )
        return unfold_queries(out.astype(q.dtype), K, N)[:, 0]

    return jnp.moveaxis(jax.lax.map(attend, (jnp.moveaxis(q, 1, 0), positions)), 0, 1)

"""Decays and documents of a row cut into chunks: what kernels are handed beside q, k and v.

None of it is large: a float or two for each token and head, of which q, k and v have hundreds.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.linear.documents import boundaries
from pallas_kernels.tokens import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunks:
    """Factors between the tokens of a chunk and the states before and after it, for decays of a head or of a token.

    T' is T rounded up to whole chunks; tokens past T read and write nothing and decay nothing.

    Attributes:
      log: Log decay of a token, float32 [B, N, T'].
      cumulative: Log decay from the chunk's start to a token, its own included, float32 [B, N, T']: a token reads what
        another of its document and chunk wrote with the factor exp(cumulative[reader] - cumulative[writer]) <= 1. Such
        a difference has the rounding of the sums, which strong decays make large; float32 inputs want sums of `log`.
      reads: The factor with which a token reads the state before its chunk, float32 [B, N, T']: exp(cumulative), zero
        where a document began in between, and for padding.
      writes: The factor with which what a token writes is in the state after its chunk, float32 [B, N, T'].
      keeps: The factor with which the state before a chunk is in that after it, float32 [B, N, T' / C].
      run: How many documents began at or before a token, int32 [B, T']; the first of a row does not count, and padding
        counts as one. None where the row is one document that fills all chunks.
      document: The same, -1 for padding and past T: tokens read each other where this is one number, not negative.
    """

    log: Leaf
    cumulative: Leaf
    reads: Leaf
    writes: Leaf
    keeps: Leaf
    run: Leaf
    document: Leaf


def chunks_of(
    decay: jax.Array | None, segment_ids: jax.Array | None, *, batch_size: int, length: int, num_heads: int, chunk: int,
    precise: bool = True,
) -> Chunks:  # fmt: skip
    """The factors of a row in chunks of `chunk` tokens; decay None, [N] or [B, T, N].

    Unless `precise`, `writes` have the rounding of the sums, as differences of `cumulative` do: less work, and enough
    for 16 bits.
    """
    num = -(-length // chunk)
    padding = num * chunk - length
    if decay is None or decay.ndim == 1:
        # Products, not sums: XLA would add up a constant decay when it compiles, token by token.
        of_head = jnp.zeros(num_heads) if decay is None else decay.astype(jnp.float32)
        of_head = jnp.broadcast_to(of_head[None, :, None, None], (batch_size, num_heads, 1, 1))
        in_chunk = jnp.clip(length - chunk * jnp.arange(num)[:, None], 0, chunk)
        upto = jnp.minimum(1 + jnp.arange(chunk), in_chunk)
        log = jnp.where(jnp.arange(chunk) < in_chunk, of_head, 0.0)
        cumulative, after = of_head * upto.astype(jnp.float32), of_head * (in_chunk - upto).astype(jnp.float32)
    else:
        log = jnp.moveaxis(decay.astype(jnp.float32), 2, 1)
        log = jnp.pad(log, ((0, 0), (0, 0), (0, padding))).reshape(batch_size, num_heads, num, chunk)
        cumulative = jnp.cumsum(log, axis=3)
        if precise:
            later = jnp.tril(jnp.ones((chunk, chunk), jnp.float32), -1)
            after = jnp.einsum("bnms,st->bnmt", log, later, precision=jax.lax.Precision.HIGHEST)
        else:
            after = cumulative[..., -1:] - cumulative
    reads, writes, keeps = jnp.exp(cumulative), jnp.exp(after), jnp.exp(cumulative[..., -1])
    run = document = None
    if segment_ids is not None or padding:
        reached, real = (x[:, None] for x in boundaries(segment_ids, batch_size, length))
        # Padding to whole chunks is not a boundary: the state goes past it.
        reached = jnp.pad(reached, ((0, 0), (0, 0), (0, padding)), constant_values=True)
        real = jnp.pad(real, ((0, 0), (0, 0), (0, padding)))
        begins = (~reached).astype(jnp.int32).reshape(batch_size, 1, num, chunk)
        begun = jnp.cumsum(begins.reshape(batch_size, 1, -1), axis=2).reshape(begins.shape)
        before = begun[..., :1] - begins[..., :1]
        real_in_chunks = real.reshape(batch_size, 1, num, chunk)
        reads = jnp.where((begun == before) & real_in_chunks, reads, 0.0)
        writes = jnp.where((begun == begun[..., -1:]) & real_in_chunks, writes, 0.0)
        keeps = jnp.where(begun[..., -1] == before[..., 0], keeps, 0.0)
        run = begun.reshape(batch_size, -1)
        document = jnp.where(real[:, 0], run, -1)
    return Chunks(
        log=log.reshape(batch_size, num_heads, -1),
        cumulative=cumulative.reshape(batch_size, num_heads, -1),
        reads=reads.reshape(batch_size, num_heads, -1),
        writes=writes.reshape(batch_size, num_heads, -1),
        keeps=keeps,
        run=run,
        document=document,
    )


def sum_groups(gradient: jax.Array, num_heads: int) -> jax.Array:
    """The gradient of queries or keys, `[B, T, N, H]`, summed over the value heads that share one of `num_heads`."""
    B, T, N, H = gradient.shape
    if N == num_heads:
        return gradient
    grouped = gradient.reshape(B, T, num_heads, N // num_heads, H)
    return jnp.sum(grouped, axis=3, dtype=jnp.float32).astype(gradient.dtype)

"""What a chunk's tokens make of each other before a state goes through the row, for decays of each dim of the keys and
for the delta rule; and the gradients from there back to the inputs. All of it is of one chunk at a time.

With the state S before a chunk, and of what the tokens write the matrix U, one row a token,

  delta rule  U = solve (V - reads K S)         plain  U = V
  out = scale reads Q S + scores U              S' = keeps S + (writes K)^T U

`scores` are scale q[i]^T G[i, j] k[j] of j <= i, with G[i, j] the decay in between, and `solve = (1 + tril(beta[i]
k[i]^T G[i, j] k[j], -1))^-1 diag(beta)`. reads, writes and keeps are those of chunks.py. Where each dim decays by
itself, q and k have reads, writes and scale in them. On the way back, with the cotangents dS' and dout, row by row,

  dU = scores^T dout + writes K dS'     dV = solve^T dU     dS = keeps dS' + (scale reads Q)^T dout - (reads K)^T dV

The gradient of solve needs no inverse: with L = tril(k[i]^T G[i, j] k[j], -1), U = diag(beta) (V - reads K S - L U), so
that dL = -dV U^T, and dbeta is the row sums of (dU - L^T dV) * (V - reads K S - L U).

**Levels.** With decays of each dim G stands inside the product. A chunk is cut in halves, these in halves, down to
single tokens: at each of 6 levels a token of an earlier half has the decay from itself to that half's end, one of a
later half the decay from that half's start to itself: E, never above 1. With Z = E k in earlier halves and E q in later
ones, the products Z Z^T between the two halves of one pair are what those write and read, exactly, by one matmul a
level. Back, with the cotangent dscores of the pair and its transpose as one matrix, R = dscores Z: dq is the sum over
levels of E R in later halves, dk that in earlier ones, and Z R are the derivatives by the log decays up to a token:
what one token has of them the other has too, with the other sign, to the last bit."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.linear.chunks import Chunks, chunks_of
from pallas_kernels.linear.documents import boundaries
from pallas_kernels.tokens import Leaf

CHUNK = 64
LEVELS = (32, 16, 8, 4, 2, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A row's chunks, ready for the states. n chunks of C tokens, T' = n C.

    Attributes:
      q, k: As the state is multiplied with, 16 bits [B, T, heads, H] or, with the factors of each dim, [B, T', N, H].
      scores: What tokens read of what is written, 16 bits [B, N, n, C, C].
      solve: Of the delta rule, 16 bits [B, N, n, C, C]; None without.
      reads, writes: float32 [B, N, T'] factors of tokens that are not in q and k; None where they are 1.
      keeps: The factor of each row of the state over a chunk, float32 [B, N, n, H]; None where it is 1.
    """

    q: Leaf
    k: Leaf
    scores: Leaf
    solve: Leaf
    reads: Leaf
    writes: Leaf
    keeps: Leaf


def factors_of(v: jax.Array, decay, segment_ids) -> Chunks:
    """The factors of a row's chunks: those of documents alone where the decay is of each dim."""
    B, T, N, _ = v.shape
    of_tokens = None if decay is not None and decay.ndim == 4 else decay
    return chunks_of(
        of_tokens, segment_ids, batch_size=B, length=T, num_heads=N, chunk=CHUNK, precise=False
    )  # fmt: skip


def tiles(x: jax.Array, num_heads: int) -> jax.Array:
    """`[B, T, K, H]` as chunks of each head, `[B, N, n, C, H]`, padded with zeros."""
    B, T, K, H = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % CHUNK), (0, 0), (0, 0))).reshape(B, -1, CHUNK, K, H)
    return jnp.repeat(jnp.moveaxis(x, 3, 1), num_heads // K, axis=1)


def untile(x: jax.Array) -> jax.Array:
    """The inverse: `[B, T', N, H]`."""
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def to_states(chunks: Chunks, log: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """reads and writes `[B, N, n, C, H]` and keeps `[B, N, n, H]` of decays of each dim."""
    reads, writes = (x.reshape(*x.shape[:2], -1, CHUNK, 1) for x in (chunks.reads, chunks.writes))
    upto, after = jnp.cumsum(log, axis=3), jax.lax.cumsum(log, axis=3, reverse=True) - log
    return reads * jnp.exp(upto), writes * jnp.exp(after), chunks.keeps[..., None] * jnp.exp(upto[..., -1, :])


def without_starts(ddecay: jax.Array, segment_ids, with_initial_state: bool) -> jax.Array:
    """The decay of a document's first token comes to nothing, and so does that of a row without a state before it."""
    B, T = ddecay.shape[:2]
    reached, _ = boundaries(segment_ids, B, T)
    if not with_initial_state:
        reached = reached & (jnp.arange(T) > 0)
    return jnp.where(reached.reshape(B, T, *(1,) * (ddecay.ndim - 2)), ddecay, 0.0)

"""What a chunk's tokens make of each other before a state goes through the row, for decays of each dim of the keys and
for the delta rule; and the gradients from there back to the inputs. All of it is of one chunk at a time.

With the state S before a chunk, and of what the tokens write the matrix U, one row a token,

  delta rule  U = solve (V - reads K S)         plain  U = V
  out = scale reads Q S + scores U              S' = keeps S + (writes K)^T U

`scores` are scale q[i]^T G[i, j] k[j] of j <= i, with G[i, j] the decay in between, and
`solve = (1 + tril(beta[i] k[i]^T G[i, j] k[j], -1))^-1 diag(beta)`. reads, writes and keeps are those of chunks.py. Where
each dim decays by itself, q and k have reads, writes and scale in them. On the way back, with the cotangents dS' and
dout, row by row,

  dU = scores^T dout + writes K dS'     dV = solve^T dU     dS = keeps dS' + (scale reads Q)^T dout - (reads K)^T dV

The gradient of solve needs no inverse: with L = tril(k[i]^T G[i, j] k[j], -1), U = diag(beta) (V - reads K S - L U), so
that dL = -dV U^T, and dbeta is the row sums of (dU - L^T dV) * (V - reads K S - L U).

**Levels.** With decays of each dim G stands inside the product. A chunk is cut in halves, these in halves, down to single
tokens: at each of 6 levels a token of an earlier half has the decay from itself to that half's end, one of a later half
the decay from that half's start to itself: E, never above 1. With Z = E k in earlier halves and E q in later ones, the
products Z Z^T between the two halves of one pair are what those write and read, exactly, by one matmul a level. Back,
with the cotangent dscores of the pair and its transpose as one matrix, R = dscores Z: dq is the sum over levels of
E R in later halves, dk that in earlier ones, and Z R are the derivatives by the log decays up to a token: what one token
has of them the other has too, with the other sign, to the last bit.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.linear.chunks import Chunks, chunks_of
from pallas_kernels.linear.documents import boundaries
from pallas_kernels.linear.xla_chunks import multiply
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


def prepare(q, k, v, chunks: Chunks, *, decay, beta, scale: float) -> Prepared:
    """The chunks of a row."""
    if decay is not None and decay.ndim == 4:
        return _prepare_vector(q, k, v, chunks, decay=decay, scale=scale)
    N = v.shape[2]
    queries, keys = (tiles(x, N) for x in (q, k))
    between = _between(chunks)
    scores = scale * _product(queries, keys) * between
    among = tiles(beta.astype(jnp.float32)[..., None], N) * _product(keys, keys) * jnp.tril(between, -1)
    inverse = jax.lax.linalg.triangular_solve(
        among, jnp.broadcast_to(jnp.eye(CHUNK), among.shape), left_side=True, lower=True, unit_diagonal=True
    )  # fmt: skip
    solve = inverse * tiles(beta.astype(jnp.float32)[..., None], N)[..., 0][..., None, :]
    is_scaled = decay is not None or chunks.document is not None
    H = q.shape[3]
    return Prepared(
        q=q,
        k=k,
        scores=scores.astype(q.dtype),
        solve=solve.astype(q.dtype),
        reads=chunks.reads if is_scaled else None,
        writes=chunks.writes if is_scaled else None,
        keeps=jnp.broadcast_to(chunks.keeps[..., None], (*chunks.keeps.shape, H)) if is_scaled else None,
    )


def _prepare_vector(q, k, v, chunks: Chunks, *, decay, scale: float) -> Prepared:
    N = v.shape[2]
    queries, keys = (tiles(x, N).astype(jnp.float32) for x in (q, k))
    log = tiles(decay.astype(jnp.float32), N)
    scores = jnp.eye(CHUNK) * jnp.sum(queries * keys, axis=-1)[..., None]
    for size in LEVELS:
        _, operand = _level(queries, keys, log, size)
        scores += jnp.where(_pairs(size), _product(operand, operand), 0.0)
    scores = scale * scores * _between(chunks)
    reads, writes, keeps = to_states(chunks, log)
    return Prepared(
        q=untile(scale * reads * queries).astype(q.dtype),
        k=untile(writes * keys).astype(k.dtype),
        scores=scores.astype(q.dtype),
        solve=None,
        reads=None,
        writes=None,
        keeps=keeps,
    )


def vector_gradients(
    q, k, v, dout, prepared: Prepared, states, dstates, chunks: Chunks, *, decay, segment_ids, scale: float,
    with_initial_state: bool,
):  # fmt: skip
    """dq, dk `[B, T, N, H]` float32 and ddecay, given the state before and the cotangent of the state after each chunk,
    transposed, `[B, N, n, V, H]`."""
    (B, T, N, _), H = v.shape, q.shape[3]
    queries, keys = (tiles(x, N).astype(jnp.float32) for x in (q, k))
    values, douts = tiles(v, N), tiles(dout, N)
    log = tiles(decay.astype(jnp.float32), N)
    dscores = scale * _product(douts, values) * _between(chunks)
    reads, writes, keeps = to_states(chunks, log)
    by_state = scale * reads * multiply("bnciv,bncvh->bncih", "bfloat16", douts, states)
    to_state = writes * multiply("bnciv,bncvh->bncih", "bfloat16", values, dstates)
    itself = jnp.diagonal(dscores, axis1=-2, axis2=-1)[..., None]
    dq, dk = by_state + itself * keys, to_state + itself * queries
    dlog = queries * by_state - keys * to_state
    at_end = jnp.sum(keys * to_state, axis=3) + keeps * jnp.sum(
        states.astype(jnp.float32) * dstates.astype(jnp.float32), axis=3
    )
    for size in LEVELS:
        factors, operand = _level(queries, keys, log, size)
        pairs = jnp.where(_pairs(size), dscores, 0.0)
        back = multiply("bncij,bncjh->bncih", "bfloat16", pairs + pairs.mT, operand)
        later = _is_later(size)[:, None]
        dq += jnp.where(later, factors * back, 0.0)
        dk += jnp.where(later, 0.0, factors * back)
        dlog += jnp.where(later, 1.0, -1.0) * operand.astype(q.dtype).astype(jnp.float32) * back
    ddecay = untile(jax.lax.cumsum(dlog, axis=3, reverse=True) + at_end[..., None, :])[:, :T]
    return untile(dq)[:, :T], untile(dk)[:, :T], without_starts(ddecay, segment_ids, with_initial_state)


def delta_gradients(
    q, k, v, dout, dv, written, states, dstates, chunks: Chunks, *, decay, segment_ids, scale: float,
    with_initial_state: bool,
):  # fmt: skip
    """dq, dk `[B, T, N, H]` float32, ddecay `[B, T, N]` and dbeta, given also what is written, transposed, `[B, N, n, V,
    C]`."""
    (B, T, N, _), H = v.shape, q.shape[3]
    queries, keys, values, douts, dvs = (tiles(x, N) for x in (q, k, v, dout, dv))
    written, between = written.mT, _between(chunks)
    reads, writes = (x.reshape(*x.shape[:2], -1, CHUNK, 1) for x in (chunks.reads, chunks.writes))
    among = _product(keys, keys) * jnp.tril(between, -1)
    scores = scale * _product(queries, keys) * between
    dscores = scale * _product(douts, written) * between
    damong = -_product(dvs, written) * jnp.tril(between, -1)
    by_state = scale * reads * multiply("bnciv,bncvh->bncih", "bfloat16", douts, states)
    said = -reads * multiply("bnciv,bncvh->bncih", "bfloat16", dvs, states)
    to_state = writes * multiply("bnciv,bncvh->bncih", "bfloat16", written, dstates)

    def times(matrix, x):
        return multiply("bncij,bncjh->bncih", "bfloat16", matrix, x)

    dq = by_state + times(dscores, keys)
    dk = said + to_state + times(dscores.mT, queries) + times(damong + damong.mT, keys)
    dwritten = times(scores.mT, douts) + writes * multiply("bncih,bncvh->bnciv", "bfloat16", keys, dstates)
    dwritten -= times(among.mT, dvs)
    error = values.astype(jnp.float32) - times(among, written)
    error -= reads * multiply("bncih,bncvh->bnciv", "bfloat16", keys, states)
    dbeta = _tokens_last(jnp.sum(dwritten * error, axis=-1))[:, :T]
    ddecay = None
    if decay is not None:
        queries, keys = queries.astype(jnp.float32), keys.astype(jnp.float32)
        products = jnp.tril(dscores, -1) * _product(queries, keys) + damong * _product(keys, keys)
        dlog = jnp.sum(products, axis=-1) - jnp.sum(products, axis=-2)
        written_dot = jnp.sum(keys * to_state, axis=-1)
        dlog += jnp.sum(queries * by_state + keys * said, axis=-1) - written_dot
        at_end = jnp.sum(written_dot, axis=-1) + chunks.keeps * jnp.sum(
            states.astype(jnp.float32) * dstates.astype(jnp.float32), axis=(-1, -2)
        )
        ddecay = _tokens_last(jax.lax.cumsum(dlog, axis=3, reverse=True) + at_end[..., None])[:, :T]
        ddecay = without_starts(ddecay, segment_ids, with_initial_state)
    return untile(dq)[:, :T], untile(dk)[:, :T], ddecay, dbeta


def tiles(x: jax.Array, num_heads: int) -> jax.Array:
    """`[B, T, K, H]` as chunks of each head, `[B, N, n, C, H]`, padded with zeros."""
    B, T, K, H = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % CHUNK), (0, 0), (0, 0))).reshape(B, -1, CHUNK, K, H)
    return jnp.repeat(jnp.moveaxis(x, 3, 1), num_heads // K, axis=1)


def untile(x: jax.Array) -> jax.Array:
    """The inverse: `[B, T', N, H]`."""
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _tokens_last(x: jax.Array) -> jax.Array:
    """`[B, N, n, C]` as `[B, T', N]`."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1), 1, 2)


def _product(x, y) -> jax.Array:
    """x y^T of chunks."""
    return multiply("bncih,bncjh->bncij", "bfloat16", x, y)


def _between(chunks: Chunks) -> jax.Array:
    """The decay between two tokens of a chunk that are in order and of one document, else 0: `[B, N, n, C, C]`."""
    cumulative = chunks.cumulative.reshape(*chunks.cumulative.shape[:2], -1, CHUNK)
    seen = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))
    if chunks.document is not None:
        document = chunks.document.reshape(chunks.document.shape[0], 1, -1, CHUNK)
        seen = seen & (document[..., :, None] == document[..., None, :]) & (document >= 0)[..., None]
    between = jnp.where(seen, cumulative[..., :, None] - cumulative[..., None, :], -jnp.inf)
    return jnp.exp(between)


def to_states(chunks: Chunks, log: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """reads and writes `[B, N, n, C, H]` and keeps `[B, N, n, H]` of decays of each dim."""
    reads, writes = (x.reshape(*x.shape[:2], -1, CHUNK, 1) for x in (chunks.reads, chunks.writes))
    upto, after = jnp.cumsum(log, axis=3), jax.lax.cumsum(log, axis=3, reverse=True) - log
    return reads * jnp.exp(upto), writes * jnp.exp(after), chunks.keeps[..., None] * jnp.exp(upto[..., -1, :])


def _is_later(size: int) -> jax.Array:
    """Whether a token is in the later half of a pair of halves of `size` tokens."""
    return jnp.arange(CHUNK) // size % 2 == 1


def _pairs(size: int) -> jax.Array:
    """Whether token i is in the later half of the pair in whose earlier half is j: bool `[i, j]`."""
    pair, later = jnp.arange(CHUNK) // (2 * size), _is_later(size)
    return (pair[:, None] == pair) & later[:, None] & ~later


def _level(queries, keys, log, size: int) -> tuple[jax.Array, jax.Array]:
    """E and Z of a level."""
    halves = log.reshape(*log.shape[:3], -1, 2, size, log.shape[4])
    earlier = jax.lax.cumsum(halves[:, :, :, :, 0], axis=4, reverse=True) - halves[:, :, :, :, 0]
    later = jnp.cumsum(halves[:, :, :, :, 1], axis=4)
    factors = jnp.exp(jnp.stack([earlier, later], axis=4)).reshape(log.shape)
    return factors, factors * jnp.where(_is_later(size)[:, None], queries, keys)


def without_starts(ddecay: jax.Array, segment_ids, with_initial_state: bool) -> jax.Array:
    """The decay of a document's first token comes to nothing, and so does that of a row without a state before it."""
    B, T = ddecay.shape[:2]
    reached, _ = boundaries(segment_ids, B, T)
    if not with_initial_state:
        reached = reached & (jnp.arange(T) > 0)
    return jnp.where(reached.reshape(B, T, *(1,) * (ddecay.ndim - 2)), ddecay, 0.0)

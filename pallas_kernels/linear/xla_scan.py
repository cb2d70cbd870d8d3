"""Decays for each dim of the keys, and the delta rule with any decay, in XLA: a scan over chunks.

In a chunk with the state S before it, with G[i, j] the decay between token j and token i, a diagonal matrix, and with
a[i] that from the chunk's start:

  u[i]   = beta[i] (v[i] - k[i]^T a[i] S - sum_{j < i} (k[i]^T G[i, j] k[j]) u[j])      without beta u = v
  out[i] = scale (q[i]^T a[i] S + sum_{j <= i} (q[i]^T G[i, j] k[j]) u[j])

The first is a unit triangular system for all u at once: the UT form. No factor is ever above 1, and none is a quotient,
so that decays may be as strong as they like: each exponent is a sum of log decays, not a difference of such sums, whose
rounding would be that of all that came before in the chunk. For a decay for each dim the pairs of a sub-chunk of 16
are summed dim by dim; between sub-chunks G[i, j] is split at the start of the later one into two factors, each put on
its side of a matmul.

The backward pass differentiates the scan, and keeps a state a chunk: what is in a chunk is computed again.

Reference: Yang et al. 2024, Gated Linear Attention, arXiv:2312.06635, section 4.3; Yang et al. 2024, Parallelizing
Linear Transformers with the Delta Rule over Sequence Length, arXiv:2406.06484, section 3.2; Yang et al. 2024, Gated
Delta Networks, arXiv:2412.06464, section 3.3.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.linear.chunks import chunks_of
from pallas_kernels.linear.options import Options
from pallas_kernels.linear.state import LinearState, Passed
from pallas_kernels.linear.xla_chunks import (
    CHUNK,
    in_order,
    join,
    multiply,
    per_value_head,
    split,
    split_factors,
    sums_after,
    sums_between,
    sums_up_to,
)

_SUB_CHUNK = 16


def forward(q, k, v, *, decay, beta, initial_state, segment_ids, options: Options):
    """As `api.linear_attention_forward`."""
    B, T, N, V = v.shape
    dtype = v.dtype.name

    def step(state, chunk):
        q, k, v, log, beta, reads, writes, keeps, document = chunk
        q, k = (per_value_head(x, N) for x in (q, k))
        decays, value = _Decays(log, dtype), v.astype(jnp.float32)
        reads = reads[..., None] * decays.from_start
        if beta is not None:
            among = jnp.where(in_order(document, strict=True), decays.between(k, k), 0.0)
            value -= multiply("bnch,bnhv->bncv", dtype, k * reads, state)
            # The diagonal is taken to be 1.
            value = jax.lax.linalg.triangular_solve(
                beta[..., None] * among, beta[..., None] * value, left_side=True, lower=True, unit_diagonal=True
            )
        weights = jnp.where(in_order(document), decays.between(q, k), 0.0)
        out = multiply("bnch,bnhv->bncv", dtype, q * reads, state) + multiply("bncd,bndv->bncv", dtype, weights, value)
        written = multiply("bnch,bncv->bnhv", dtype, k * writes[..., None] * decays.to_end, value)
        after = keeps[..., None, None] * decays.whole[..., None] * state + written
        return after, (options.scale * out).astype(v.dtype)

    along = (*(split(x) for x in (q, k, v)), *_split_gates(v, decay, beta), *_documents(segment_ids, B, T))
    first = jnp.zeros((B, N, q.shape[3], V), jnp.float32) if initial_state is None else initial_state
    final, out = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), first, along)
    return Passed(join(out, T), final, first[:, None])


def backward(q, k, v, dout, dstate, *, decay, beta, initial_state, segment_ids, options: Options):
    """As `api.linear_attention_backward`."""
    decay, beta = (None if x is None else x.astype(jnp.float32) for x in (decay, beta))
    shape = q.shape[0], v.shape[2], q.shape[3], v.shape[3]
    first, dstate = (jnp.zeros(shape, jnp.float32) if x is None else x for x in (initial_state, dstate))

    given = {"q": q, "k": k, "v": v, "beta": beta, "initial_state": first, "decay": decay}
    constant = {} if options.decay_gradient else {"decay": given.pop("decay")}

    def run(given):
        passed = forward(**given, **constant, segment_ids=segment_ids, options=options)
        return passed.out, passed.state

    _, vjp = jax.vjp(run, given)
    (gradients,) = vjp((dout, dstate))
    return tuple(gradients.get(name) for name in ("q", "k", "v", "decay", "beta", "initial_state"))


def states(k, v, *, decay, segment_ids) -> LinearState:
    """As `api.linear_attention_states`."""
    return _map(k, v, decay, segment_ids, reverse=False)


def state_cotangents(q, dout, *, decay, segment_ids, options: Options) -> LinearState:
    """As `api.linear_attention_state_cotangents`."""
    row = _map(q, dout, decay, segment_ids, reverse=True)
    return LinearState(value=options.scale * row.value, decay=row.decay)


def _map(k, v, decay, segment_ids, *, reverse: bool) -> LinearState:
    """The map of the row, which is one part: what its tokens leave in the state after it or, in reverse, in the
    cotangent of the state before it."""
    B, T, N, V = v.shape
    product = functools.partial(multiply, "bnch,bncv->bnhv", v.dtype.name)

    def step(row, chunk):
        k, v, log, reads, writes, keeps, _ = chunk
        decays = _Decays(log, v.dtype.name)
        reaches = reads[..., None] * decays.from_start if reverse else writes[..., None] * decays.to_end
        written = product(per_value_head(k, N) * reaches, v.astype(jnp.float32))
        here = LinearState(value=written, decay=keeps[..., None] * decays.whole)
        return row.combine(here), None

    empty = LinearState(value=jnp.zeros((B, N, k.shape[3], V)), decay=jnp.ones((B, N, k.shape[3])))
    log, _ = _split_gates(v, decay, None)
    along = split(k), split(v), log, *_documents(segment_ids, B, T)
    row, _ = jax.lax.scan(step, empty, along, reverse=reverse)
    return LinearState(value=row.value[:, None], decay=row.decay[:, None])


def _split_gates(v, decay, beta) -> tuple[jax.Array | None, jax.Array | None]:
    """Log decays `[n, B, N, C, 1 or H]` and write strengths `[n, B, N, C]`, float32."""
    if decay is not None:
        decay = decay.astype(jnp.float32)
        decay = jnp.broadcast_to(decay, v.shape[:3]) if decay.ndim == 1 else decay
        decay = split(decay if decay.ndim == 4 else decay[..., None])
    return decay, None if beta is None else split(beta.astype(jnp.float32))


def _documents(segment_ids, batch_size: int, length: int):
    """`split_factors` of documents alone, which are 0 or 1."""
    chunks = chunks_of(None, segment_ids, batch_size=batch_size, length=length, num_heads=1, chunk=CHUNK)
    return split_factors(chunks)


class _Decays:
    """Factors of the decays in a chunk, given their logs `[B, N, C, 1 or H]`; None decays nothing.

    Attributes:
      from_start: From the chunk's start to each token, its own decay included, `[B, N, C, 1 or H]`.
      to_end: From each token, its own decay left out, to the chunk's end.
      whole: From start to end, `[B, N, 1 or H]`.
    """

    def __init__(self, log: jax.Array | None, dtype: str):
        log = jnp.zeros((1, 1, CHUNK, 1)) if log is None else log
        self.log, self.dtype = log, dtype
        self.from_start = jnp.exp(sums_up_to(log))
        self.to_end = jnp.exp(sums_after(log))
        self.whole = jnp.exp(jnp.sum(log, axis=2))

    def between(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """x[i]^T G[i, j] y[j] of all j <= i, of `[B, N, C, H]`; for other j something finite."""
        if self.log.shape[3] == 1:
            return multiply("bnch,bndh->bncd", self.dtype, x, y) * jnp.exp(sums_between(self.log)[..., 0])
        x, y, log = (a.reshape(*a.shape[:2], -1, _SUB_CHUNK, a.shape[3]) for a in (x, y, self.log))
        within = jnp.sum(x[..., :, None, :] * y[..., None, :, :] * jnp.exp(sums_between(log)), axis=-1)
        # From a token of sub-chunk s to the start of a later one, r: the rest of s, and the sub-chunks in between.
        totals = jnp.sum(log, axis=3)
        skipped = jnp.pad(sums_between(totals)[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))
        to_start = jnp.exp(sums_after(log)[:, :, None] + skipped[:, :, :, :, None])
        left = x * jnp.exp(sums_up_to(log))
        across = multiply("bnrih,bnrsjh->bnrisj", self.dtype, left, y[:, :, None] * to_start)
        same = jnp.eye(across.shape[2], dtype=bool)[:, None, :, None]
        pairs = jnp.where(same, within[:, :, :, :, None, :], across)
        return pairs.reshape(*pairs.shape[:2], CHUNK, CHUNK)

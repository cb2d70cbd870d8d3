"""Linear attention by chunks, in XLA: on any backend, in memory linear in T."""

import jax
import jax.numpy as jnp

from pallas_kernels.linear.chunks import Chunks
from pallas_kernels.linear.state import LinearState
from pallas_kernels.linear.sweeps import Primitives, Swept

CHUNK = 64
SNAPSHOT_CHUNKS = 1


def _maps(
    k, v, chunks: Chunks, *, num_heads: int, num_parts: int, wanted: slice, reverse: bool
) -> LinearState:  # fmt: skip
    """The map of the row, which is one part."""
    del num_parts, wanted
    writes = chunks.reads if reverse else chunks.writes

    def step(state, chunk):
        k, v, writes, keeps = chunk
        written = jnp.einsum("btnh,btnv,bnt->bnhv", k, v, writes)
        return keeps[..., None, None] * state + written, None

    k, v = (_by_chunk(x, num_heads, chunks) for x in (k, v))
    first = jnp.zeros((k.shape[1], num_heads, k.shape[4], v.shape[4]), jnp.float32)
    along = k, v, _rows_by_chunk(writes), jnp.moveaxis(chunks.keeps, 2, 0)
    value, _ = jax.lax.scan(step, first, along, reverse=reverse)
    return LinearState(value=value[:, None], decay=jnp.prod(chunks.keeps, axis=2)[:, None])


def _sweep(
    q, k, v, chunks: Chunks, before, *, scale: float, reverse: bool, dot_with, snapshots: bool
) -> Swept:  # fmt: skip
    T, num_heads = v.shape[1], chunks.reads.shape[1]
    reads, writes = (chunks.writes, chunks.reads) if reverse else (chunks.reads, chunks.writes)
    order = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))
    order = order.T if reverse else order

    def step(state, chunk):
        q, k, v, dot_with, cumulative, reads, writes, keeps, document = chunk
        apart = cumulative[..., :, None] - cumulative[..., None, :]
        seen = order
        if document is not None:
            seen &= ((document[:, :, None] == document[:, None, :]) & (document >= 0)[:, :, None])[:, None]
        weights = jnp.where(seen, jnp.exp(jnp.where(seen, -apart if reverse else apart, 0.0)), 0.0)
        weights *= jnp.einsum("btnh,bsnh->bnts", q, k)
        out = jnp.einsum("bnts,bsnv->btnv", weights, v)
        out += jnp.einsum("btnh,bnhv,bnt->btnv", q, state, reads)
        after = keeps[..., None, None] * state + jnp.einsum("btnh,btnv,bnt->bnhv", k, v, writes)
        out = scale * out
        dots = None if dot_with is None else jnp.einsum("btnv,btnv->bnt", out, dot_with)
        return after, (out, dots, (state if reverse else after) if snapshots else None)

    with_dots = None if dot_with is None else _by_chunk(dot_with, num_heads, chunks)
    arrays = *(_by_chunk(x, num_heads, chunks) for x in (q, k, v)), with_dots
    rows = *(_rows_by_chunk(x) for x in (chunks.cumulative, reads, writes)), jnp.moveaxis(chunks.keeps, 2, 0)
    document = None if chunks.document is None else _rows_by_chunk(chunks.document)
    end, (out, dots, shots) = jax.lax.scan(step, before[:, 0], (*arrays, *rows, document), reverse=reverse)
    out = jnp.moveaxis(out, 0, 1).reshape(v.shape[0], -1, num_heads, v.shape[3])[:, :T].astype(v.dtype)
    return Swept(
        out=out,
        end=end,
        dots=None if dots is None else jnp.moveaxis(dots, 0, 2).reshape(*chunks.reads.shape),
        snapshots=None if shots is None else jnp.moveaxis(shots, 0, 2),
    )


def _by_chunk(x: jax.Array, num_heads: int, chunks: Chunks) -> jax.Array:
    """float32 [T' / C, B, C, N, H] of [B, T, K, H]."""
    B, T, K, H = x.shape
    x = jnp.repeat(x.astype(jnp.float32), num_heads // K, axis=2)
    x = jnp.pad(x, ((0, 0), (0, chunks.reads.shape[2] - T), (0, 0), (0, 0)))
    return jnp.moveaxis(x.reshape(B, -1, CHUNK, num_heads, H), 1, 0)


def _rows_by_chunk(x: jax.Array) -> jax.Array:
    """[T' / C, ..., C] of [..., T']."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, CHUNK), -2, 0)


_PRIMITIVES = Primitives(
    chunk=CHUNK, snapshot_chunks=SNAPSHOT_CHUNKS, num_parts=lambda B, N, T: 1, maps=_maps, sweep=_sweep
)


def forward(q, k, v, *, decay, beta, initial_state, segment_ids, parts, options):
    _refuse(decay, beta)
    return _PRIMITIVES.forward(
        q, k, v, decay=decay, initial_state=initial_state, segment_ids=segment_ids, parts=parts, options=options
    )


def backward(q, k, v, dout, dstate, *, decay, beta, initial_state, segment_ids, starts, parts, options):
    _refuse(decay, beta)
    return _PRIMITIVES.backward(
        q, k, v, dout, dstate, decay=decay, initial_state=initial_state, segment_ids=segment_ids, starts=starts,
        parts=parts, options=options,
    )  # fmt: skip


def states(k, v, *, decay, segment_ids, options) -> LinearState:
    _refuse(decay, None)
    return _PRIMITIVES.states(k, v, decay=decay, segment_ids=segment_ids)


def state_cotangents(q, dout, *, decay, segment_ids, options) -> LinearState:
    _refuse(decay, None)
    return _PRIMITIVES.state_cotangents(q, dout, decay=decay, segment_ids=segment_ids, options=options)


def _refuse(decay, beta) -> None:
    if beta is not None or (decay is not None and decay.ndim == 4):
        raise NotImplementedError("xla: no beta and no decay for each dim yet")

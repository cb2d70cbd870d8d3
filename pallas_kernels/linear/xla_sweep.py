"""The primitives of sweeps.py in XLA, a chunk at a time: decays of a head or of a token, or none."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.linear.chunks import Chunks
from pallas_kernels.linear.state import LinearState
from pallas_kernels.linear.sweeps import Primitives, Swept
from pallas_kernels.linear.xla_chunks import (
    CHUNK,
    in_order,
    join,
    multiply,
    per_value_head,
    split,
    split_factors,
    split_rows,
    sums_between,
)


def _maps(
    k, v, chunks: Chunks, *, num_heads: int, num_parts: int, wanted: slice, reverse: bool
) -> LinearState:  # fmt: skip
    """The map of the row, which is one part."""
    del num_parts, wanted
    product = functools.partial(multiply, "bnch,bncv->bnhv", v.dtype.name)
    reads, writes, keeps, _ = split_factors(chunks)

    def step(state, chunk):
        k, v, writes, keeps = chunk
        k = per_value_head(k, num_heads) * writes[..., None]
        return keeps[..., None, None] * state + product(k, per_value_head(v, num_heads)), None

    first = jnp.zeros((k.shape[0], num_heads, k.shape[3], v.shape[3]), jnp.float32)
    along = split(k), split(v), reads if reverse else writes, keeps
    value, _ = jax.lax.scan(step, first, along, reverse=reverse)
    return LinearState(value=value[:, None], decay=jnp.prod(chunks.keeps, axis=2)[:, None])


def _sweep(
    q, k, v, chunks: Chunks, before, *, scale: float, reverse: bool, dot_with, snapshots: bool
) -> Swept:  # fmt: skip
    num_heads, dtype = chunks.reads.shape[1], v.dtype
    reads, writes, keeps, document = split_factors(chunks)
    if reverse:
        reads, writes = writes, reads

    def step(state, chunk):
        q, k, v, dot_with, log, reads, writes, keeps, document = chunk
        q, k, v = (per_value_head(x, num_heads) for x in (q, k, v))
        between = sums_between(log[..., None])[..., 0]
        factors = jnp.exp(between.mT if reverse else between)
        weights = jnp.where(in_order(document, reverse=reverse, strict=True), factors, 0.0)
        weights *= multiply("bnch,bndh->bncd", dtype.name, q, k)
        others = multiply("bncd,bndv->bncv", dtype.name, weights, v)
        others += multiply("bnch,bnhv->bncv", dtype.name, q * reads[..., None], state)
        # A token reads itself undecayed, which the gradient of a decay, where decays are strong, must not drown in.
        # Behind a barrier: XLA:CPU of jaxlib 0.11.2 fuses the sum with the matmuls, and then reads what is not written.
        itself = jax.lax.optimization_barrier(jnp.sum(q * k, axis=3))
        if document is not None:
            itself = jnp.where((document >= 0)[:, None], itself, 0.0)
        out = others + itself[..., None] * v
        written = multiply("bnch,bncv->bnhv", dtype.name, k * writes[..., None], v)
        after = keeps[..., None, None] * state + written
        dots = None if dot_with is None else scale * jnp.sum(others * per_value_head(dot_with, num_heads), axis=3)
        shot = (state if reverse else after) if snapshots else None
        if snapshots and dtype == jnp.bfloat16:  # float16 has not the range
            shot = shot.astype(dtype)
        return after, ((scale * out).astype(dtype), dots, shot)

    arrays = *(split(x) for x in (q, k, v)), None if dot_with is None else split(dot_with)
    along = *arrays, split_rows(chunks.log), reads, writes, keeps, document
    end, (out, dots, shots) = jax.lax.scan(step, before[:, 0], along, reverse=reverse)
    return Swept(
        out=join(out, v.shape[1]),
        end=end,
        dots=None if dots is None else jnp.moveaxis(dots, 0, 2).reshape(*chunks.reads.shape),
        snapshots=None if shots is None else jnp.moveaxis(shots, 0, 2),
    )


PRIMITIVES = Primitives(chunk=CHUNK, snapshot_chunks=1, num_parts=lambda B, N, T: 1, maps=_maps, sweep=_sweep)

"""Attention to blocks chosen query by query on Hopper GPUs: `selected_attention` by pallas_mosaic_gpu_nsa_kernels.py.

Queries are taken in chunks, so that their parts, one a block that they chose, in 16 bits, are never more than twice the
size of out. Gradients of keys and values are added to chunk by chunk, in float32.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import hopper_cores, refuse
from pallas_kernels.sparse import pallas_mosaic_gpu_nsa_kernels as kernels
from pallas_kernels.sparse import pallas_mosaic_gpu_nsa_parts as parts
from pallas_kernels.sparse.nsa_lists import TILE_ROWS, QueryLists

HEAD_DIMS = (64, 128)
_LOG2_E = math.log2(math.e)
_LEAST_CHUNK = 256  # queries, where there are as many: fewer leave multiprocessors without work


def forward(q, k, v, choices, block_start, q_place, *, block_size, scale, interpret=None):
    """`selected_attention_forward` on a Hopper GPU; with `interpret` on a CPU, for tests."""
    call = _Call(q, k, v, choices, block_start, q_place, block_size, scale, interpret)
    rows = math.prod(q.shape[:3])
    # References made of nothing that is differentiated JAX would make beforehand, where a loop over layers within
    # shard_map is split in what is known and what is not, and could not hand them over.
    empty = jax.lax.empty((rows, v.shape[3]), q.dtype), jax.lax.empty((rows,), jnp.float32)
    out, lse, _ = jax.lax.optimization_barrier((*empty, q))
    results = parts.Results(out=jax.new_ref(out), lse=jax.new_ref(lse))

    def of_chunk(lists: QueryLists) -> None:
        out, lse = kernels.attend(call.inputs_of(lists), call.config)
        parts.merge(_rows(out), lse.reshape(-1), call.units(lists), results)

    jax.lax.map(of_chunk, call.lists)
    out, lse = (jax.freeze(x) for x in results)
    lse = lse.reshape(q.shape[:3]).swapaxes(1, 2) * (1 / _LOG2_E)
    return call.or_nan(out.reshape(q.shape)), call.or_nan(lse)


def backward(
    q, k, v, choices, block_start, q_place, out, lse, dout, dlse, *, block_size, scale, interpret=None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`selected_attention_backward` on a Hopper GPU; with `interpret` on a CPU, for tests."""
    call = _Call(q, k, v, choices, block_start, q_place, block_size, scale, interpret)
    of_queries = {
        "dout": _rows(dout.astype(q.dtype)),
        # Of queries that see nothing, inf: 2^(logit - inf) = 0.
        "lse": _by_row(jnp.where(lse == -jnp.inf, jnp.inf, lse * _LOG2_E)),
        "delta": _delta_by_row(out, dout, dlse),
    }
    gradients = kernels.KeyGradients(*(jax.new_ref(jnp.zeros(call.inputs.k.shape, jnp.float32)) for _ in range(2)))
    results = parts.Results(out=jax.new_ref(jax.lax.empty(call.inputs.q.shape, q.dtype)), lse=None)

    def of_chunk(lists: QueryLists) -> None:
        inputs = call.inputs_of(lists)._replace(**of_queries)
        dq = kernels.differentiate(inputs, gradients, call.num_blocks, call.config)
        parts.merge(_rows(dq), None, call.units(lists), results)

    jax.lax.map(of_chunk, call.lists)
    dq = jax.freeze(results.out).reshape(q.shape)
    dk, dv = (jax.freeze(x).reshape(k.shape) for x in gradients)
    return tuple(map(call.or_nan, (dq, dk, dv)))


class _Call:
    """What both passes have in common."""

    def __init__(self, q, k, v, choices, block_start, q_place, block_size: int, scale: float, interpret):
        num_cores = hopper_cores(interpret)
        (B, T, N, _), (_, S, K, _), n = q.shape, k.shape, choices.shape[3]
        _check(q, v, block_size, scale, N // K, n)
        if q_place is None:
            q_place = jnp.arange(T, dtype=jnp.int32)[None]
        self.group = N // K
        # A chunk's parts are n times the size of its out.
        num_chunks = max(1, min(-(-n // 2), T // _LEAST_CHUNK))
        self.lists = QueryLists.of(choices, block_start, N, kv_len=S, block_size=block_size, num_chunks=num_chunks)
        self.num_blocks = B * K * block_start.shape[1]
        self.config = kernels.Config(scale=scale, kv_shape=(B, S, K), num_cores=num_cores, interpret=interpret)
        self.inputs = kernels.Inputs(
            q=_rows(q),
            k=_rows(k),
            v=_rows(v),
            dout=None,
            seen=jnp.broadcast_to(q_place[..., None] + 1, (B, T, N)).reshape(-1),
            lse=None,
            delta=None,
            rows=None,
            items=None,
            num_items=None,
        )

    def inputs_of(self, lists: QueryLists) -> kernels.Inputs:
        """Of a chunk of queries."""
        return self.inputs._replace(rows=lists.rows, items=lists.items, num_items=lists.num_items[None])

    def units(self, lists: QueryLists) -> parts.Units:
        """Whose parts a chunk has."""
        return parts.Units(lists.place, lists.first_row, self.group, self.config.num_cores, self.config.interpret)

    def or_nan(self, x: jax.Array) -> jax.Array:
        """NaN where the lists had no room for all choices."""
        return jnp.where(jnp.all(self.lists.has_room), x, jnp.asarray(jnp.nan, x.dtype))


def _rows(x: jax.Array) -> jax.Array:
    """All but the last dim as one."""
    return x.reshape(-1, x.shape[-1])


def _by_row(x: jax.Array) -> jax.Array:
    """`[B, N, T]` as `[B T N]`."""
    return x.swapaxes(1, 2).reshape(-1)


def _delta_by_row(out, dout, dlse) -> jax.Array:
    """`delta_of`, `[B T N]`, without a transposition of what is as long as out."""
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).reshape(-1)
    return delta if dlse is None else delta - _by_row(dlse)


def _check(q, v, block_size: int, scale: float, group: int, num_choices: int) -> None:
    """Raises NotImplementedError with the reason where the kernels do not serve the call."""
    H = q.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        refuse(f"q is {q.dtype}, it takes bfloat16 and float16")
    if H not in HEAD_DIMS or v.shape[3] != H:
        refuse(f"head dims of keys and values are {H} and {v.shape[3]}, it takes one of {HEAD_DIMS} for both")
    if block_size != kernels.BLOCK:
        refuse(f"block_size={block_size}, it takes {kernels.BLOCK}")
    if group > TILE_ROWS:
        refuse(f"{group} query heads share a kv head, it takes at most {TILE_ROWS}")
    if num_choices > parts.MOST_PARTS:
        refuse(f"{num_choices} choices a query, it takes at most {parts.MOST_PARTS}")
    if not scale > 0:
        refuse(f"scale={scale}, it takes positive ones")

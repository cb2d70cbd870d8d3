"""The forward pass of blockwise attention on TPU: one kernel, an online softmax over the blocks that a row visits.

Grid: (rows of the batch, query heads, blocks of queries). The queries of a step, its results and a carry come and go by
the grid's own pipeline; keys and values by the walk over the schedule (pallas_mosaic_tpu_walk.py). Queries lie along
sublanes, so the row's maximum, its sum and the accumulator are scaled without a transposition, and what is known of a
query, its position for one, is turned once a row. Only blocks that may hold a pair that may not attend are tested.

Reference: Dao 2023, FlashAttention-2, arXiv:2307.08691, Algorithm 1; the walk over compressed masks is that of JAX's
splash attention, whose grid steps are here the iterations of a loop.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blockwise.pallas_mosaic_tpu_send import Kernel
from pallas_kernels.blockwise.pallas_mosaic_tpu_tiles import (
    Config,
    Side,
    block_at,
    copies_into,
    row_of_batch,
    words_spec,
)
from pallas_kernels.blockwise.pallas_mosaic_tpu_walk import walk
from pallas_kernels.mosaic_tpu import LANES, column, dot, lanes
from pallas_kernels.online_softmax import SoftmaxCarry, finite_max
from pallas_kernels.tokens import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Arrays of whole blocks; dims as in pallas_mosaic_tpu_tiles.py.

    Attributes:
      q, k, v: `[B, heads, L, H or V]`.
      words: Of `kv_blocks`.
      q_tokens, kv_tokens: `[B or 1, 1 or 2, L]`; None where positions are slots and there is one document.
      carry: max and sum `[B, N, 1, T]`, acc `[B, N, T, V]`, float32; None starts afresh.
    """

    q: Leaf
    k: Leaf
    v: Leaf
    words: Leaf
    q_tokens: Leaf
    kv_tokens: Leaf
    carry: Leaf


def kernel(inputs: Inputs, config: Config, *, return_carry: bool) -> Kernel:
    """Of "out" `[B, N, T, V]` and "lse" `[B, N, 1, T]`, or of the carry's "max", "sum" and "acc" in the same form."""
    (B, N, T, H), V, dtype = inputs.q.shape, inputs.v.shape[3], inputs.q.dtype
    block_q, block_kv = config.block_q, config.block_kv

    def of_row(width):
        return pl.BlockSpec((1, 1, block_q, width), lambda b, n, i, m: (b, n, i, 0))

    row = pl.BlockSpec((1, 1, 1, block_q), lambda b, n, i, m: (b, n, 0, i))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    tokens = inputs.q_tokens
    in_specs = Inputs(
        q=of_row(H),
        k=anywhere,
        v=anywhere,
        words=words_spec(inputs.words, N),
        q_tokens=None if tokens is None else pl.BlockSpec(
            (1, tokens.shape[1], block_q), lambda b, n, i, m: (row_of_batch(tokens, b), 0, i)
        ),
        kv_tokens=None if tokens is None else anywhere,
        carry=None if inputs.carry is None else SoftmaxCarry(max=row, sum=row, acc=of_row(V)),
    )  # fmt: skip
    rows = jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32)
    acc = jax.ShapeDtypeStruct((B, N, T, V), jnp.float32)
    if return_carry:
        out_shape = {"max": rows, "sum": rows, "acc": acc}
    else:
        out_shape = {"out": jax.ShapeDtypeStruct(acc.shape, dtype), "lse": rows}
    scratch = {
        "k": pltpu.VMEM((2, block_kv, H), dtype),
        "v": pltpu.VMEM((2, block_kv, V), dtype),
        "arrived": pltpu.SemaphoreType.DMA((2, 3)),
        "max": pltpu.VMEM((block_q, LANES), jnp.float32),
        "sum": pltpu.VMEM((block_q, LANES), jnp.float32),
        "acc": pltpu.VMEM((block_q, V), jnp.float32),
    }
    if tokens is not None:
        scratch["kv_tokens"] = pltpu.VMEM((2, tokens.shape[1], block_kv), jnp.int32)
        scratch["q_tokens"] = pltpu.VMEM((tokens.shape[1], block_q, LANES), jnp.int32)
    return Kernel(
        body=functools.partial(_body, config),
        grid=(B, N, T // block_q, 1),
        in_specs=in_specs,
        out_specs={name: of_row(V) if name in ("out", "acc") else row for name in out_shape},
        out_shape=out_shape,
        scratch=scratch,
        dims=H + V,
        name="blockwise_attention_forward",
    )


def _body(config: Config, step, inputs: Inputs, outputs, scratch):
    b, head, row, own = step
    kv_head = jax.lax.div(head, config.num_heads // config.num_kv_heads)
    carry, acc = inputs.carry, scratch["acc"]
    if carry is None:
        scratch["max"][...] = jnp.full_like(scratch["max"], -jnp.inf)
        scratch["sum"][...] = jnp.zeros_like(scratch["sum"])
        acc[...] = jnp.zeros_like(acc)
    else:
        scratch["max"][...] = column(carry.max[0, 0])
        scratch["sum"][...] = column(carry.sum[0, 0])
        acc[...] = carry.acc[0, 0]
    if inputs.q_tokens is not None:
        for i in range(inputs.q_tokens.shape[1]):
            scratch["q_tokens"][i] = column(inputs.q_tokens[0, i : i + 1])

    def copies(buffer, member, at):
        del member
        keys = block_at(at, config.block_kv)
        sources = {"k": inputs.k.at[b, kv_head, keys], "v": inputs.v.at[b, kv_head, keys]}
        if inputs.kv_tokens is not None:
            sources["kv_tokens"] = inputs.kv_tokens.at[row_of_batch(inputs.kv_tokens, b), :, keys]
        return copies_into(scratch, buffer, sources)

    one_tile = functools.partial(_one_tile, inputs, scratch, config, head, row)
    walk(inputs.words, own, copies, config.visiting(config.block_kv, one_tile))
    row_max, row_sum = scratch["max"][...], scratch["sum"][...]
    if "acc" in outputs:
        outputs["max"][0, 0] = _row(row_max)
        outputs["sum"][0, 0] = _row(row_sum)
        outputs["acc"][0, 0] = acc[...]
        return
    is_empty = row_sum == 0
    row_sum = jnp.where(is_empty, 1.0, row_sum)
    inverse = jnp.where(is_empty, 0.0, 1.0 / row_sum)
    outputs["out"][0, 0] = (acc[...] * lanes(inverse, acc.shape[1])).astype(outputs["out"].dtype)
    outputs["lse"][0, 0] = _row(jnp.where(is_empty, -jnp.inf, finite_max(row_max) + jnp.log(row_sum)))


def _one_tile(inputs: Inputs, scratch, config: Config, head, row, buffer, at, start, masked: bool) -> None:
    """Adds what the queries of a row make of `chunk` keys of a block, those from `start` on, [block_q, chunk]."""
    keys = pl.ds(start, config.chunk)
    q, k, v = inputs.q[0, 0], scratch["k"][buffer, keys], scratch["v"][buffer, keys]
    s, _ = config.logits(q, k, functools.partial(dot, contracted=(1, 1)))
    if masked:
        q_known, kv_known = None, None
        if inputs.q_tokens is not None:
            num = inputs.q_tokens.shape[1]
            q_known = tuple(scratch["q_tokens"][i] for i in range(num))
            kv_known = tuple(scratch["kv_tokens"][buffer, i : i + 1, keys] for i in range(num))
        s = config.mask(
            s,
            head,
            Side(dim=0, first=row * config.block_q, known=q_known),
            Side(dim=1, first=at * config.block_kv + start, known=kv_known),
        )
    before = scratch["max"][...]
    after = jnp.maximum(before, jnp.max(s, axis=1, keepdims=True))
    against = finite_max(after)
    p = jnp.exp(s - lanes(against, config.chunk))
    rescale = jnp.exp(before - against)
    scratch["max"][...] = after
    scratch["sum"][...] = rescale * scratch["sum"][...] + jnp.sum(p, axis=1, keepdims=True)
    acc = scratch["acc"]
    acc[...] = lanes(rescale, acc.shape[1]) * acc[...] + dot(p.astype(v.dtype), v, (1, 0))


def _row(x: jax.Array) -> jax.Array:
    """The inverse of `mosaic_tpu.column`: [L, 128] to [1, L]."""
    return x.T[:1]

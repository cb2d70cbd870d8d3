"""The backward pass of blockwise attention on TPU: a kernel for dq, and one for dk and dv.

dq goes row by row of queries as the forward pass does, with three matmuls a tile. dk and dv go by blocks of keys: a
step of the grid takes one block of keys and one of the query heads that share it, and the heads of a group follow one
another while dk and dv stay in VMEM; four matmuls a tile, which is turned, keys along sublanes, so that no operand of a
matmul must be. Each sum has one order, so gradients are the same, bit by bit, each time.

Reference: Dao 2023, FlashAttention-2, arXiv:2307.08691, Algorithm 2, taken apart as in JAX's splash attention: a TPU
core has no atomic sums, and dq would go to memory and back once a tile.
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
from pallas_kernels.tokens import Leaf

_LSE, _DELTA = 0, 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Arrays of whole blocks; dims as in pallas_mosaic_tpu_tiles.py.

    Attributes:
      q, k, v, dout: `[B, heads, L, H or V]`.
      rows: lse, infinite for queries that see nothing, and delta, float32 `[B, N, 2, T]`.
      words: Of `kv_blocks` for dq, of `q_blocks` for dk and dv.
      q_tokens, kv_tokens: `[B or 1, 1 or 2, L]`; None where positions are slots and there is one document.
      running: What gradients are added to, float32 `[B, heads, L, H or V]`: dq, or dk and dv; None is zero.
    """

    q: Leaf
    k: Leaf
    v: Leaf
    dout: Leaf
    rows: Leaf
    words: Leaf
    q_tokens: Leaf
    kv_tokens: Leaf
    running: Leaf


def kernel_of_queries(inputs: Inputs, config: Config) -> Kernel:
    """Of dq, `[B, N, T, H]`: float32 where something was running, else in q's dtype."""
    (B, N, T, H), V = inputs.q.shape, inputs.v.shape[3]
    block_q, block_kv, tokens = config.block_q, config.block_kv, inputs.q_tokens

    def of_row(dim):
        return pl.BlockSpec((1, 1, block_q, dim), lambda b, n, i, m: (b, n, i, 0))

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    in_specs = Inputs(
        q=of_row(H),
        k=anywhere,
        v=anywhere,
        dout=of_row(V),
        rows=pl.BlockSpec((1, 1, 2, block_q), lambda b, n, i, m: (b, n, 0, i)),
        words=words_spec(inputs.words, N),
        q_tokens=None if tokens is None else pl.BlockSpec(
            (1, tokens.shape[1], block_q), lambda b, n, i, m: (row_of_batch(tokens, b), 0, i)
        ),
        kv_tokens=None if tokens is None else anywhere,
        running=None if inputs.running is None else (of_row(H),),
    )  # fmt: skip
    scratch = {
        "k": pltpu.VMEM((2, block_kv, H), inputs.k.dtype),
        "v": pltpu.VMEM((2, block_kv, V), inputs.v.dtype),
        "arrived": pltpu.SemaphoreType.DMA((2, 3)),
        "rows": pltpu.VMEM((2, block_q, LANES), jnp.float32),
        "dq": pltpu.VMEM((block_q, H), jnp.float32),
    }
    if tokens is not None:
        scratch["kv_tokens"] = pltpu.VMEM((2, tokens.shape[1], block_kv), jnp.int32)
        scratch["q_tokens"] = pltpu.VMEM((tokens.shape[1], block_q, LANES), jnp.int32)
    dtype = inputs.q.dtype if inputs.running is None else jnp.float32
    out_shape = jax.ShapeDtypeStruct(inputs.q.shape, dtype)
    return Kernel(
        body=functools.partial(_body_of_queries, config),
        grid=(B, N, T // block_q, 1),
        in_specs=in_specs,
        out_specs=of_row(H),
        out_shape=out_shape,
        scratch=scratch,
        dims=2 * H + V,
        name="blockwise_attention_backward_dq",
    )


def _body_of_queries(config: Config, step, inputs: Inputs, dq_out, scratch):
    b, head, row, own = step
    kv_head = jax.lax.div(head, config.num_heads // config.num_kv_heads)
    scratch["dq"][...] = jnp.zeros_like(scratch["dq"])
    for i in (_LSE, _DELTA):
        scratch["rows"][i] = column(inputs.rows[0, 0, i : i + 1])
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

    def one_tile(buffer, at, start, masked: bool):
        """[block_q, chunk]"""
        keys = pl.ds(start, config.chunk)
        q, k, v = inputs.q[0, 0], scratch["k"][buffer, keys], scratch["v"][buffer, keys]
        s, slope = config.logits(q, k, functools.partial(dot, contracted=(1, 1)))
        if masked:
            q_known, kv_known = None, None
            if inputs.q_tokens is not None:
                q_known = tuple(scratch["q_tokens"][i] for i in range(inputs.q_tokens.shape[1]))
                kv_known = tuple(scratch["kv_tokens"][buffer, i : i + 1, keys] for i in range(len(q_known)))
            q_side = Side(dim=0, first=row * config.block_q, known=q_known)
            kv_side = Side(dim=1, first=at * config.block_kv + start, known=kv_known)
            s = config.mask(s, head, q_side, kv_side)
        p = jnp.exp(s - lanes(scratch["rows"][_LSE], config.chunk))
        dp = dot(inputs.dout[0, 0], v, (1, 1))
        ds = p * (dp - lanes(scratch["rows"][_DELTA], config.chunk))
        ds = ds if slope is None else ds * slope
        scratch["dq"][...] += dot(ds.astype(k.dtype), k, (1, 0))

    walk(inputs.words, own, copies, config.visiting(config.block_kv, one_tile))
    dq = scratch["dq"][...] * config.scale
    if inputs.running is not None:
        dq += inputs.running[0][0, 0]
    dq_out[0, 0] = dq.astype(dq_out.dtype)


def kernel_of_keys(inputs: Inputs, config: Config) -> Kernel:
    """Of dk and dv, `[B, K, S, H or V]`: float32 where something was running, else in the dtypes of k and v."""
    (B, K, S, H), V, N = inputs.k.shape, inputs.v.shape[3], inputs.q.shape[1]
    block_q, block_kv, tokens = config.block_q, config.block_kv, inputs.q_tokens

    def of_row(dim):
        return pl.BlockSpec((1, 1, block_kv, dim), lambda b, n, i, m: (b, n, i, 0))

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    keys = inputs.kv_tokens
    in_specs = Inputs(
        q=anywhere,
        k=of_row(H),
        v=of_row(V),
        dout=anywhere,
        rows=anywhere,
        words=words_spec(inputs.words, K),
        q_tokens=None if tokens is None else anywhere,
        kv_tokens=None if tokens is None else pl.BlockSpec(
            (1, keys.shape[1], block_kv), lambda b, n, i, m: (row_of_batch(keys, b), 0, i)
        ),
        running=None if inputs.running is None else (of_row(H), of_row(V)),
    )  # fmt: skip
    scratch = {
        "q": pltpu.VMEM((2, block_q, H), inputs.q.dtype),
        "dout": pltpu.VMEM((2, block_q, V), inputs.dout.dtype),
        "rows": pltpu.VMEM((2, 2, block_q), jnp.float32),
        "arrived": pltpu.SemaphoreType.DMA((2, 4)),
        "dk": pltpu.VMEM((block_kv, H), jnp.float32),
        "dv": pltpu.VMEM((block_kv, V), jnp.float32),
    }
    if tokens is not None:
        scratch["q_tokens"] = pltpu.VMEM((2, tokens.shape[1], block_q), jnp.int32)
        scratch["kv_tokens"] = pltpu.VMEM((tokens.shape[1], block_kv, LANES), jnp.int32)
    operands = inputs.k, inputs.v
    out_shape = tuple(
        jax.ShapeDtypeStruct(x.shape, x.dtype if inputs.running is None else jnp.float32) for x in operands
    )
    return Kernel(
        body=functools.partial(_body_of_keys, config),
        grid=(B, K, S // block_kv, N // K),
        in_specs=in_specs,
        out_specs=(of_row(H), of_row(V)),
        out_shape=out_shape,
        scratch=scratch,
        dims=2 * (H + V),
        name="blockwise_attention_backward_dkdv",
    )


def _body_of_keys(config: Config, step, inputs: Inputs, outputs, scratch):
    b, kv_head, row, own = step
    dk_out, dv_out = outputs
    members = config.num_heads // config.num_kv_heads

    @pl.when(own == 0)
    def _():
        for name in ("dk", "dv"):
            scratch[name][...] = jnp.zeros_like(scratch[name])
        if inputs.kv_tokens is not None:
            for i in range(inputs.kv_tokens.shape[1]):
                scratch["kv_tokens"][i] = column(inputs.kv_tokens[0, i : i + 1])

    def copies(buffer, member, at):
        queries, head = block_at(at, config.block_q), kv_head * members + member
        sources = {name: getattr(inputs, name).at[b, head, queries] for name in ("q", "dout")}
        sources["rows"] = inputs.rows.at[b, head, :, queries]
        if inputs.q_tokens is not None:
            sources["q_tokens"] = inputs.q_tokens.at[row_of_batch(inputs.q_tokens, b), :, queries]
        return copies_into(scratch, buffer, sources)

    def one_tile(buffer, at, start, masked: bool):
        """[block_kv, chunk]"""
        queries = pl.ds(start, config.chunk)
        k, v, q, dout = inputs.k[0, 0], inputs.v[0, 0], scratch["q"][buffer, queries], scratch["dout"][buffer, queries]
        s, slope = config.logits(q, k, lambda q, k: dot(k, q, (1, 1)))
        if masked:
            q_known, kv_known = None, None
            if inputs.q_tokens is not None:
                kv_known = tuple(scratch["kv_tokens"][i] for i in range(inputs.q_tokens.shape[1]))
                q_known = tuple(scratch["q_tokens"][buffer, i : i + 1, queries] for i in range(len(kv_known)))
            q_side = Side(dim=1, first=at * config.block_q + start, known=q_known)
            kv_side = Side(dim=0, first=row * config.block_kv, known=kv_known)
            s = config.mask(s, kv_head * members + own, q_side, kv_side)
        p = jnp.exp(s - scratch["rows"][buffer, _LSE : _LSE + 1, queries])
        scratch["dv"][...] += dot(p.astype(dout.dtype), dout, (1, 0))
        dp = dot(v, dout, (1, 1))
        ds = p * (dp - scratch["rows"][buffer, _DELTA : _DELTA + 1, queries])
        ds = ds if slope is None else ds * slope
        scratch["dk"][...] += dot(ds.astype(q.dtype), q, (1, 0))

    walk(inputs.words, own, copies, config.visiting(config.block_q, one_tile))

    @pl.when(own == members - 1)
    def _():
        dk, dv = scratch["dk"][...] * config.scale, scratch["dv"][...]
        if inputs.running is not None:
            dk, dv = dk + inputs.running[0][0, 0], dv + inputs.running[1][0, 0]
        dk_out[0, 0] = dk.astype(dk_out.dtype)
        dv_out[0, 0] = dv.astype(dv_out.dtype)

"""The gradient of a bias that has a reach, of the pairs within it: a pass over the band of short distances, in XLA.

Where a kernel makes the gradients of q, k and v and has no sums of a parameter that is read by distance, this computes
the gradients of logits of the blocks that hold pairs within the reach once more, and no others: O(T reach) work, which
is little beside attention to long sequences. Many blocks of queries are computed at once, each with the blocks of keys
that the band's schedule names for it, so that few programs of a GPU do it.

Shapes here: n blocks, b batch, k kv heads, g query heads of a kv head, q and s tokens of a block.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.bias import DistanceBias, gradient_of_tile
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.blockwise.options import Options
from pallas_kernels.dropout import Dropout, key_words
from pallas_kernels.mask import Window
from pallas_kernels.schedule import Schedule, make_schedule, merged_walk
from pallas_kernels.tokens import TokenAxis, Tokens

_BLOCK = 128
_MOST_LOGITS = 2**26
"""Of the tiles that are computed at once, float32."""


def gradient(
    bias: DistanceBias,
    q,
    k,
    v,
    *,
    lse,
    delta,
    dout,
    tokens: Tokens,
    schedule: Schedule | None,
    options: Options,
    dropout: Dropout | None,
) -> DistanceBias:
    """The gradient of the bias' parameters, float32, of pairs whose distance is less than the bias' reach.

    Args:
      lse: Of all keys, `[B, N, T]`.
      delta: rowsum(dout out) - dlse, `[B, N, T]`.
      schedule: Of the call; one of chosen blocks is a mask too.
      Others: As `blockwise_attention_backward`.
    Memory: O(N (T + S)), and some tiles of logits.
    """
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    bias = bias.in_float32()
    mask = options.mask & Window(left=bias.reach - 1, right=bias.reach - 1)
    sizes = BlockSizes(block_q=_BLOCK, block_kv=_BLOCK).fit(T, S)
    band = make_schedule(mask, tokens, q_len=T, kv_len=S, block_sizes=sizes)
    _, start, stop = merged_walk(band)
    block_q, block_kv = sizes.block_q, sizes.block_kv

    def blocks(x, block: int, axis: int, fill=0):
        """`[n, ...]`, its `axis` cut into blocks."""
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % block)
        x = jnp.pad(x, widths, constant_values=jnp.asarray(fill, x.dtype))
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)

    def of_queries(x):
        n, b, q, _, h = (x := blocks(x, block_q, 1)).shape
        return x.reshape(n, b, q, K, N // K, h)

    def of_rows(x, fill):
        n, b, _, q = (x := blocks(x, block_q, 2, fill)).shape
        return x.reshape(n, b, K, N // K, q)

    q_tokens = TokenAxis(*(blocks(x, block_q, 1) for x in tokens.queries(T)))
    kv_tokens = TokenAxis(*(blocks(x, block_kv, 1) for x in tokens.keys(S)))
    k_blocks, v_blocks = blocks(k, block_kv, 1), blocks(v, block_kv, 1)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    chosen = _chosen(schedule, num_heads=N)

    def one_q_block(xs):
        i, q_i, dout_i, lse_i, delta_i, start_i, stop_i, tokens_i = xs

        def visit(j, total):
            k_j, v_j, tokens_j = (jax.tree.map(lambda x: x[j], x) for x in (k_blocks, v_blocks, kv_tokens))
            s = options.scale * _product("bqkgh,bskh->bkgqs", q_i, k_j)
            if options.logits_soft_cap is not None:
                s = options.logits_soft_cap * jnp.tanh(s / options.logits_soft_cap)
            positions = tokens_i.positions[:, :, None], tokens_j.positions[:, None, :]
            segment_ids = tokens_i.segment_ids[:, :, None], tokens_j.segment_ids[:, None, :]
            s += bias.of_heads(*positions).reshape(-1, *s.shape[1:])
            allowed = mask.allowed_by_head(N, *positions, *segment_ids)
            allowed &= j * block_kv + jnp.arange(block_kv) < S
            if chosen is not None:
                allowed &= chosen(i * block_q + jnp.arange(block_q), j * block_kv + jnp.arange(block_kv))
            dp = _product("bqkgv,bskv->bkgqs", dout_i, v_j)
            if dropout is not None:
                words = dropout.query_words(tokens_i)[..., None]
                dp *= dropout.multipliers(words, key_words(tokens_j)[:, None, None, :]).reshape(-1, *s.shape[1:])
            dlogits = (jnp.exp(s - lse_i[..., None]) * (dp - delta_i[..., None])).reshape(B, N, *s.shape[3:])
            dlogits = jnp.where(allowed, dlogits, 0.0)
            return jax.tree.map(jnp.add, total, gradient_of_tile(bias, *positions, dlogits))

        def one_range(r, total):
            return jax.lax.fori_loop(start_i[r], stop_i[r], visit, total)

        return jax.lax.fori_loop(0, start_i.shape[0], one_range, jax.tree.map(jnp.zeros_like, bias))

    num_blocks = start.shape[0]
    xs = (
        jnp.arange(num_blocks),
        *(of_queries(q), of_queries(dout.astype(q.dtype)), of_rows(lse, jnp.inf), of_rows(delta, 0.0)),
        *(start, stop, q_tokens),
    )
    at_once = max(1, min(num_blocks, _MOST_LOGITS // (B * N * block_q * block_kv)))
    parts = jax.lax.map(one_q_block, xs, batch_size=at_once)
    return jax.tree.map(lambda x: x.sum(axis=0), parts)


def _chosen(schedule: Schedule | None, *, num_heads: int):
    """Of indices of queries and keys, whether the blocks that they are in were chosen, `[B or 1, N, q, s]`."""
    if schedule is None or not schedule.is_selection:
        return None
    visited, sizes = schedule.visited(), schedule.block_sizes
    visited = jnp.repeat(visited, num_heads // schedule.num_lists, axis=1)
    num_rows, num_columns = visited.shape[2:]

    def chosen(queries, keys):
        # Of tokens that are not there, any.
        of_q, of_kv = (
            jnp.minimum(x, last)
            for x, last in ((queries // sizes.block_q, num_rows - 1), (keys // sizes.block_kv, num_columns - 1))
        )
        return visited[:, :, of_q[:, None], of_kv]

    return chosen


def _product(subscripts: str, *operands) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if operands[0].dtype == jnp.float32 else None
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32, precision=precision)

"""Blockwise softmax attention in plain XLA: memory linear in T and S, on any platform.

One tile of logits lives at a time. Blocks of queries are walked in order, and for each the blocks of keys that its
schedule names, so work is proportional to the blocks visited. Query heads stay grouped by the kv head they share;
K and V are never expanded. The backward recomputes a tile from lse and adds into dq, dk and dv in one walk: five
matmuls a tile. Dropout is drawn anew for each tile, and a bias computed, in both passes.

Reference: Rabe and Staats 2021, Self-attention does not need O(n^2) memory, arXiv:2112.05682; Dao 2023,
FlashAttention-2, arXiv:2307.08691, Algorithms 1 and 2.

Shapes here: n blocks, b batch, k kv heads, g query heads of a kv head, q and s tokens of a block, h and v head dims.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.bias import Bias, gradient_of_tile
from pallas_kernels.block_sizes import XLA_TILES, BlockSizes
from pallas_kernels.blockwise.options import Options
from pallas_kernels.blockwise.xla_lists import Lists, OneList
from pallas_kernels.dropout import Dropout, key_words
from pallas_kernels.online_softmax import MASK_VALUE, SoftmaxCarry, delta_of, finite_max, pooled_max
from pallas_kernels.schedule import Schedule, make_schedule, merged_walk
from pallas_kernels.tokens import TokenAxis, Tokens


def forward(
    q, k, v, *, tokens, schedule, carry, return_carry, options: Options, dropout: Dropout | None = None,
    bias: Bias | None = None,
):  # fmt: skip
    """`blockwise_attention_forward` on any platform."""
    carry = None if carry is None else carry.whole(v.shape[3])
    if schedule is not None and schedule.is_selection:
        return _forward_by_lists(q, k, v, tokens, Lists(q, k, schedule), carry, return_carry, options, dropout, bias)
    schedule = _schedule(q, k, tokens, schedule, options)
    tiles = _Tiles(q, k, tokens, schedule, options, dropout, bias)
    k_blocks, v_blocks = tiles.split_kv(k), tiles.split_kv(v)
    if carry is None:
        carry = SoftmaxCarry.empty(batch_size=q.shape[0], q_len=q.shape[1], num_heads=q.shape[2], value_dim=v.shape[3])
    state = (tiles.split_rows(carry.max, -jnp.inf), tiles.split_rows(carry.sum), tiles.split_q(carry.acc))
    maxima = _Maxima.of(tiles, options)

    def one_q_block(xs):
        i, q_i, state = xs
        dropped = tiles.dropping(i)

        def visit(j, state):
            (row_max, row_sum, acc), (top, of_blocks) = state
            s, _ = tiles.logits(i, j, q_i, k_blocks[j])
            if maxima is not None:
                of_blocks = maxima.noted(of_blocks, i, j, s)
            if options.skip_softmax_threshold:
                s, top = tiles.without_negligible(i, s, top)
            new_max = jnp.maximum(row_max, jnp.max(s, axis=-1))
            p = jnp.exp(s - finite_max(new_max)[..., None])
            rescale = jnp.exp(row_max - finite_max(new_max))
            pv = tiles.matmul("bkgqs,bksv->bkgqv", dropped(j, p).astype(v.dtype), v_blocks[j])
            carry = new_max, rescale * row_sum + jnp.sum(p, axis=-1), rescale[..., None] * acc + pv
            return carry, (top, of_blocks)

        top = jnp.full_like(state[0], -jnp.inf) if options.skip_softmax_threshold else None
        carry, (_, of_blocks) = tiles.walk(i, visit, (state, (top, None if maxima is None else maxima.nothing())))
        return carry, of_blocks

    q_blocks = tiles.split_q(q)
    (row_max, row_sum, acc), of_blocks = jax.lax.map(one_q_block, (jnp.arange(len(q_blocks)), q_blocks, state))
    result = SoftmaxCarry(max=tiles.join_rows(row_max), sum=tiles.join_rows(row_sum), acc=tiles.join_q(acc))
    result = result if return_carry else result.finalize(q.dtype)
    return result if maxima is None else (result, maxima.joined(of_blocks))


def backward(
    q, k, v, out, lse, dout, dlse, *, tokens, schedule, accumulate, options: Options, dropout: Dropout | None = None,
    bias: Bias | None = None,
):  # fmt: skip
    """`blockwise_attention_backward` on any platform."""
    if schedule is not None and schedule.is_selection:
        arrays = q, k, v, out, lse, dout, dlse
        return _backward_by_lists(arrays, tokens, Lists(q, k, schedule), accumulate, options, dropout, bias)
    schedule = _schedule(q, k, tokens, schedule, options)
    tiles = _Tiles(q, k, tokens, schedule, options, dropout, bias)
    k_blocks, v_blocks = tiles.split_kv(k), tiles.split_kv(v)
    delta = delta_of(out, dout, dlse)
    running = zip(accumulate, (q, k, v), strict=True)
    dtypes, (dq, dk, dv) = zip(*(_started(x, like) for x, like in running), strict=True)
    dbias = jax.tree.map(jnp.zeros_like, tiles.bias) if options.bias_gradient else None

    def one_q_block(running, xs):
        i, q_i, dout_i, lse_i, delta_i, dq_i = xs
        # Rows that may attend to nothing, missing rows of a ragged block among them: exp(-inf - inf) = 0.
        lse_i = jnp.where(lse_i == -jnp.inf, jnp.inf, lse_i)
        dropped = tiles.dropping(i)

        def visit(j, state):
            dq_i, dk, dv, dbias = state
            s, cap_slope = tiles.logits(i, j, q_i, k_blocks[j])
            p = jnp.exp(s - lse_i[..., None])
            dp = dropped(j, tiles.matmul("bkgqv,bksv->bkgqs", dout_i, v_blocks[j]))
            dlogits = p * (dp - delta_i[..., None])
            if dbias is not None:
                dbias = jax.tree.map(jnp.add, dbias, tiles.bias_gradient(i, j, dlogits))
            ds = dlogits * options.scale
            if cap_slope is not None:
                ds *= cap_slope
            ds = ds.astype(q.dtype)
            dq_i += tiles.matmul("bkgqs,bksh->bkgqh", ds, k_blocks[j])
            dk = dk.at[j].add(tiles.matmul("bkgqs,bkgqh->bksh", ds, q_i))
            dv = dv.at[j].add(tiles.matmul("bkgqs,bkgqv->bksv", dropped(j, p).astype(dout.dtype), dout_i))
            return dq_i, dk, dv, dbias

        dq_i, *running = tiles.walk(i, visit, (dq_i, *running))
        return tuple(running), dq_i

    q_blocks = tiles.split_q(q)
    xs = (
        jnp.arange(len(q_blocks)),
        q_blocks,
        tiles.split_q(dout),
        tiles.split_rows(lse, -jnp.inf),
        tiles.split_rows(delta),
        tiles.split_q(dq),
    )
    (dk, dv, dbias), dq = jax.lax.scan(one_q_block, (tiles.split_kv(dk), tiles.split_kv(dv), dbias), xs)
    gradients = tiles.join_q(dq), tiles.join_kv(dk), tiles.join_kv(dv)
    gradients = tuple(g.astype(dtype) for g, dtype in zip(gradients, dtypes, strict=True))
    return gradients if dbias is None else (*gradients, dbias)


def _started(running: jax.Array | None, like: jax.Array) -> tuple[jnp.dtype, jax.Array]:
    """The dtype of a gradient, and what it is added to, float32."""
    if running is None:
        return like.dtype, jnp.zeros(like.shape, jnp.float32)
    return running.dtype, running


def _forward_by_lists(q, k, v, tokens, lists: Lists, carry, return_carry, options: Options, dropout, bias):
    """`forward`, one list of chosen blocks after the other."""

    def attend(one: OneList):
        return forward(
            *(one.heads(x, 2) for x in (q, k, v)), tokens=one.tokens(tokens), schedule=one.schedule(),
            carry=None if carry is None else one.carry(carry), return_carry=return_carry,
            options=one.options(options), dropout=one.dropout(dropout), bias=one.bias(bias),
        )  # fmt: skip

    results, maxima = lists.map(attend), None
    if options.block_maxima is not None:
        results, maxima = results
    if return_carry:
        result = SoftmaxCarry(
            max=lists.joined(results.max, 1), sum=lists.joined(results.sum, 1), acc=lists.joined(results.acc, 2)
        )
    else:
        result = lists.joined(results[0], 2), lists.joined(results[1], 1)
    return result if maxima is None else (result, lists.joined(maxima, 1))


def _backward_by_lists(arrays, tokens, lists: Lists, accumulate, options: Options, dropout, bias):
    """`backward`, one list of chosen blocks after the other."""
    q, k, v, out, lse, dout, dlse = arrays

    def differentiate(one: OneList):
        q_i, k_i, v_i, dout_i = (one.heads(x, 2) for x in (q, k, v, dout))
        out_i = None if out is None else one.heads(out, 2)
        lse_i, dlse_i = (None if x is None else one.heads(x, 1) for x in (lse, dlse))
        return backward(
            q_i, k_i, v_i, out_i, lse_i, dout_i, dlse_i, tokens=one.tokens(tokens), schedule=one.schedule(),
            accumulate=tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_i, k_i, v_i)),
            options=one.options(options), dropout=one.dropout(dropout), bias=one.bias(bias),
        )  # fmt: skip

    dq, dk, dv, *dbias = lists.map(differentiate)
    gradients = zip(accumulate, (lists.joined(dq, 2), lists.summed(dk), lists.summed(dv)), (q, k, v), strict=True)
    gradients = tuple(g.astype(x.dtype) if running is None else running + g for running, g, x in gradients)
    return *gradients, *(jax.tree.map(lists.over_rows, x) for x in dbias)


def _schedule(q, k, tokens, schedule, options: Options) -> Schedule:
    if schedule is not None:
        return schedule
    sizes = options.block_sizes or XLA_TILES.get(dispatch.current_platform())
    return make_schedule(options.mask, tokens, q_len=q.shape[1], kv_len=k.shape[1], block_sizes=sizes)


def _merges(schedule: Schedule, options: Options) -> dict[str, int]:
    """How many blocks of the schedule a tile is made of: of several where the schedule is one for smaller tiles than
    XLA wants, and the caller did not ask for any."""
    wanted = XLA_TILES.get(dispatch.current_platform())
    if wanted is None or options.block_sizes is not None:
        return {}

    def merge(block: int, tile: int) -> int:
        return tile // block if tile % block == 0 else 1

    blocks = schedule.block_sizes
    return {"merge_q": merge(blocks.block_q, wanted.block_q), "merge_kv": merge(blocks.block_kv, wanted.block_kv)}


class _Tiles:
    """The blocks of one call: how arrays split into them, which are visited, and the logits of a tile."""

    def __init__(
        self,
        q,
        k,
        tokens: Tokens | None,
        schedule: Schedule,
        options: Options,
        dropout: Dropout | None,
        bias: Bias | None,
    ):
        tokens = tokens or Tokens()
        self.options, self.dropout, self.bias = options, dropout, None if bias is None else bias.in_float32()
        self.q_len, self.kv_len = q.shape[1], k.shape[1]
        self.num_heads, self.num_kv_heads = q.shape[2], k.shape[2]
        self.batch_size = q.shape[0]
        tiles, self.start, self.stop = merged_walk(schedule, **_merges(schedule, options))
        self.block_q, self.block_kv = tiles.block_q, tiles.block_kv
        self.q_tokens = _split_tokens(tokens.queries(self.q_len), self.block_q)
        self.kv_tokens = _split_tokens(tokens.keys(self.kv_len), self.block_kv)
        # XLA computes float32 matmuls in TF32 on a GPU unless told otherwise.
        precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        self.matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)

    def walk(self, i, visit: Callable, state):
        """`state = visit(j, state)` for each block j of keys that block i of queries visits, in order."""

        def walk_range(r, state):
            return jax.lax.fori_loop(self.start[i, r], self.stop[i, r], visit, state)

        return jax.lax.fori_loop(0, self.start.shape[1], walk_range, state)

    def logits(self, i, j, q_i, k_j) -> tuple[jax.Array, jax.Array | None]:
        """Masked logits `[b, k, g, q, s]` of a tile, and the slope of the soft cap where there is one."""
        s, slope = self.options.scale * self.matmul("bkgqh,bksh->bkgqs", q_i, k_j), None
        cap = self.options.logits_soft_cap
        if cap is not None:
            squashed = jnp.tanh(s / cap)
            s, slope = cap * squashed, 1 - squashed**2
        if self.bias is not None:
            s += self.bias.of_heads(*self._positions(i, j)).reshape(-1, *s.shape[1:])
        return jnp.where(self._allowed(i, j), s, MASK_VALUE), slope

    def bias_gradient(self, i, j, dlogits) -> Bias:
        """A tile's part of the gradient of the bias, given that of its logits `[b, k, g, q, s]`."""
        b, *_, q, s = dlogits.shape
        return gradient_of_tile(self.bias, *self._positions(i, j), dlogits.reshape(b, self.num_heads, q, s))

    def _positions(self, i, j) -> tuple[jax.Array, jax.Array]:
        """Of a tile, `[b or 1, q, 1]` and `[b or 1, 1, s]`."""
        return self.q_tokens.positions[i][:, :, None], self.kv_tokens.positions[j][:, None, :]

    def _allowed(self, i, j) -> jax.Array:
        """Which pairs of a tile may attend, `[b or 1, k or 1, g or 1, q, s]`."""
        q, kv = (TokenAxis(*(x[at] for x in axis)) for axis, at in ((self.q_tokens, i), (self.kv_tokens, j)))
        allowed = self.options.mask.allowed_by_head(
            self.num_heads,
            q.positions[:, :, None],
            kv.positions[:, None, :],
            q.segment_ids[:, :, None],
            kv.segment_ids[:, None, :],
        )
        if self.kv_len % self.block_kv:
            allowed &= j * self.block_kv + jnp.arange(self.block_kv) < self.kv_len
        b, n, *tile = allowed.shape
        return allowed.reshape(b, *((self.num_kv_heads, -1) if n > 1 else (1, 1)), *tile)

    def without_negligible(self, i, s, top) -> tuple[jax.Array, jax.Array]:
        """The logits of a tile, -inf for heads of which it is left out, and the greatest of each row now.

        Args:
          top: The greatest of each row in the tiles before.
        """
        greatest = jnp.where(self.are_queries(i), jnp.max(s, axis=-1), -jnp.inf)
        below = greatest < top + jnp.log(self.options.skip_softmax_threshold)
        counts = ~jnp.all((greatest == -jnp.inf) | below, axis=-1)
        return jnp.where(counts[..., None, None], s, MASK_VALUE), jnp.maximum(top, greatest)

    def are_queries(self, i) -> jax.Array:
        """Which rows of a block of queries are there, `[q]`: the last block may be filled up."""
        return i * self.block_q + jnp.arange(self.block_q) < self.q_len

    def dropping(self, i) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """A function of j and of a tile x of queries i and keys j, `[b, k, g, q, s]`, that returns x Z."""
        if self.dropout is None:
            return lambda j, x: x
        query_words = self.dropout.query_words(TokenAxis(*(x[i] for x in self.q_tokens)))
        query_words = query_words.reshape(query_words.shape[0], self.num_kv_heads, -1, self.block_q, 1)

        def dropped(j, x):
            kv_words = key_words(TokenAxis(*(x[j] for x in self.kv_tokens)))
            return x * self.dropout.multipliers(query_words, kv_words[:, None, None, None, :])

        return dropped

    def split_q(self, x_BTNH) -> jax.Array:
        """`[B, T, N, H]` to `[n, b, k, g, q, h]`, zero-padded."""
        blocks = _split(x_BTNH, self.block_q, axis=1)
        n, b, q, _, h = blocks.shape
        return blocks.reshape(n, b, q, self.num_kv_heads, -1, h).transpose(0, 1, 3, 4, 2, 5)

    def join_q(self, blocks) -> jax.Array:
        """The inverse of split_q."""
        n, b, k, g, q, h = blocks.shape
        joined = blocks.transpose(1, 0, 4, 2, 3, 5).reshape(b, n * q, k * g, h)
        return joined[:, : self.q_len]

    def split_rows(self, x_BNT, fill: float = 0.0) -> jax.Array:
        """`[B, N, T]` to `[n, b, k, g, q]`, padded with `fill`."""
        blocks = _split(x_BNT, self.block_q, axis=2, fill=fill)
        n, b, _, q = blocks.shape
        return blocks.reshape(n, b, self.num_kv_heads, -1, q)

    def join_rows(self, blocks) -> jax.Array:
        """The inverse of split_rows."""
        n, b, k, g, q = blocks.shape
        return blocks.transpose(1, 2, 3, 0, 4).reshape(b, k * g, n * q)[..., : self.q_len]

    def split_kv(self, x_BSKH) -> jax.Array:
        """`[B, S, K, H]` to `[n, b, k, s, h]`, zero-padded."""
        return _split(x_BSKH, self.block_kv, axis=1).swapaxes(2, 3)

    def join_kv(self, blocks) -> jax.Array:
        """The inverse of split_kv."""
        n, b, k, s, h = blocks.shape
        return blocks.transpose(1, 0, 3, 2, 4).reshape(b, n * s, k, h)[:, : self.kv_len]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Maxima:
    """The greatest logits of blocks: noted in parts of which tiles and blocks both are made, and pooled in the end.

    Attributes:
      sizes: Tokens of a block.
      part_q, part_kv: Tokens of a part.
    """

    tiles: _Tiles
    sizes: BlockSizes
    part_q: int
    part_kv: int

    @classmethod
    def of(cls, tiles: _Tiles, options: Options) -> "_Maxima | None":
        if options.block_maxima is None:
            return None
        sizes = options.block_maxima.fit(tiles.q_len, tiles.kv_len)
        part_q, part_kv = math.gcd(tiles.block_q, sizes.block_q), math.gcd(tiles.block_kv, sizes.block_kv)
        return cls(tiles=tiles, sizes=sizes, part_q=part_q, part_kv=part_kv)

    def nothing(self) -> jax.Array:
        """Of a block of queries before any key: `[b, k, g, parts of queries, parts of keys]`."""
        tiles = self.tiles
        heads = tiles.batch_size, tiles.num_kv_heads, tiles.num_heads // tiles.num_kv_heads
        num_columns = -(-tiles.kv_len // tiles.block_kv) * (tiles.block_kv // self.part_kv)
        return jnp.full((*heads, tiles.block_q // self.part_q, num_columns), -jnp.inf, jnp.float32)

    def noted(self, of_blocks, i, j, s) -> jax.Array:
        """With the logits of a tile."""
        s = jnp.where(self.tiles.are_queries(i)[:, None], s, -jnp.inf)
        parts = pooled_max(s, self.part_q, self.part_kv)
        return jax.lax.dynamic_update_slice_in_dim(of_blocks, parts, j * parts.shape[-1], axis=-1)

    def joined(self, of_blocks) -> jax.Array:
        """Of all blocks of queries, `[n, b, k, g, parts, parts]`, as `[B, N, T / block_q, S / block_kv]`."""
        n, b, k, g, rows, columns = of_blocks.shape
        x = of_blocks.transpose(1, 2, 3, 0, 4, 5).reshape(b, k * g, n * rows, columns)
        x = x[:, :, : -(-self.tiles.q_len // self.part_q), : -(-self.tiles.kv_len // self.part_kv)]
        return pooled_max(x, self.sizes.block_q // self.part_q, self.sizes.block_kv // self.part_kv)


def _split(x, block: int, *, axis: int, fill: float = 0.0) -> jax.Array:
    """Splits `axis` into blocks, padding the last, and moves the block number to the front."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % block)
    x = jnp.pad(x, padding, constant_values=jnp.asarray(fill, x.dtype))
    shape = x.shape[:axis] + (-1, block) + x.shape[axis + 1 :]
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _split_tokens(tokens: TokenAxis, block: int) -> TokenAxis:
    return TokenAxis(*(_split(x, block, axis=1) for x in tokens))

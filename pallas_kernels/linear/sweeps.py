"""Linear attention with decays of a head or a token, forward and backward, out of two primitives.

A sweep reads a row once, in either direction of time: it carries a state from chunk to chunk, adds to it what tokens
write and gives what they read. The forward pass is one sweep. So is each gradient, because

  out[i] = scale sum_{j <= i} w[i, j] (q[i].k[j]) v[j]            w[i, j] = exp(decay between j and i)
  dq[i]  = scale sum_{j <= i} w[i, j] (dout[i].v[j]) k[j]         forward in time, over the transposed states
  dk[j]  = scale sum_{i >= j} w[i, j] (v[j].dout[i]) q[i]         backward in time
  dv[j]  = scale sum_{i >= j} w[i, j] (k[j].q[i]) dout[i]         backward in time

To keep a device busy with few rows and heads a row is swept in P parts at once, each from the state before it. A pass
over what is written finds those: it makes the map of every part (`state.LinearState`), except that nobody needs that of
the last one, whose sweep gives the state after it.

The gradient of the decays needs no further sweep. With c[i] the sum of log decays up to i,

  d/dc[i] = q[i].dq[i] - k[i].dk[i]          ddecay[t] = sum_{i >= t} d/dc[i]

and such a sum from t to the end of a row would add up the rounding of all of it. It is taken from t to the next of some
boundaries, and completed by the product of what is known there: the state, and the cotangent of the state. What is left
is the rounding of a difference: a decay so strong that its true gradient is below the rounding of q.dq gets that, or 0
where it leaves less than the rounding of float32.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.linear.chunks import Chunks, chunks_of, sum_groups
from pallas_kernels.linear.options import Options
from pallas_kernels.linear.state import LinearState, Passed, before_each
from pallas_kernels.tokens import Leaf

_NOTHING = -24 * math.log(2)
"""A log decay that leaves less of a state than the rounding of float32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Swept:
    """What a sweep gives.

    Attributes:
      out: What the tokens read, [B, T, N, V] in the dtype of v.
      end: The state that the sweep ends with, float32 [B, N, H, V].
      dots: out . dot_with of each token, of out before it is rounded, float32 [B, N, T']. What a token reads of itself
        is the same in both directions, so that an implementation may leave it out of all its dots.
      snapshots: The state after each interval of `Primitives.snapshot_chunks` chunks, in the order of time in both
        directions, in v's dtype or float32 [B, N, T' / interval, H, V]: sweeping backward, what came from later tokens.
    """

    out: Leaf
    end: Leaf
    dots: Leaf = None
    snapshots: Leaf = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Primitives:
    """What an implementation has to bring. N heads, of which q, k, v and dot_with may share: head n reads n // (N / K).

    Attributes:
      chunk: Tokens of a chunk.
      snapshot_chunks: Chunks of an interval between two snapshots; a part is a whole number of intervals, but the last.
      num_parts: Given B, N and T, in how many parts to sweep a row; none may be empty.
      maps: (k, v, chunks, *, num_heads, num_parts, wanted, reverse) -> LinearState of the parts in the slice `wanted`,
        of num_parts. Forward value = sum_j writes[j] k[j] v[j]^T within a chunk; in reverse `reads` in the place of
        `writes`, and later chunks come first. value float32 [B, P, N, H, V], decay [B, P, N].
      sweep: (q, k, v, chunks, before, *, scale, reverse, dot_with, snapshots) -> Swept. `before` is the state before
        each part or, in reverse, after it, float32 [B, P, N, H, V]. In a chunk a token reads itself and those before it
        of its document by scale exp(cumulative[reader] - cumulative[writer]) (q.k) v, and the state by scale reads q^T
        S; in reverse those after it by exp(cumulative[writer] - cumulative[reader]), and the state by `writes`.
    """

    chunk: int
    snapshot_chunks: int
    num_parts: Callable[[int, int, int], int]
    maps: Callable[..., LinearState]
    sweep: Callable[..., Swept]

    def forward(self, q, k, v, *, decay, initial_state, segment_ids, parts: LinearState | None, options: Options):
        """As `api.linear_attention_forward`."""
        chunks = self._chunks(v, decay, segment_ids)
        before = self._before(k, v, chunks, initial_state, parts, reverse=False)
        swept = self.sweep(
            q, k, v, chunks, before, scale=options.scale, reverse=False, dot_with=None, snapshots=False
        )  # fmt: skip
        return Passed(swept.out, swept.end, before)

    def backward(
        self, q, k, v, dout, dstate, *, decay, initial_state, segment_ids, starts, parts: LinearState | None,
        options: Options,
    ):  # fmt: skip
        """As `api.linear_attention_backward`."""
        chunks = self._chunks(v, decay, segment_ids)
        scale, with_decay = options.scale, decay is not None and options.decay_gradient
        if starts is None or starts.shape[1] != self._num_parts(v):
            starts = self._before(k, v, chunks, initial_state, None, reverse=False)
        # Inside, cotangents of states are without the scale, which a sweep puts on what is read.
        if parts is not None:
            parts = LinearState(value=parts.value / scale, decay=parts.decay)
        ends = self._before(q, dout, chunks, None if dstate is None else dstate / scale, parts, reverse=True)
        by_q = self.sweep(
            dout, v, k, chunks, starts.mT, scale=scale, reverse=False, dot_with=q if with_decay else None,
            snapshots=with_decay,
        )  # fmt: skip
        by_k = self.sweep(
            v, dout, q, chunks, ends.mT, scale=scale, reverse=True, dot_with=k if with_decay else None,
            snapshots=with_decay,
        )  # fmt: skip
        by_v = self.sweep(k, q, dout, chunks, ends, scale=scale, reverse=True, dot_with=None, snapshots=False)
        ddecay = None
        if with_decay:
            products = scale * jnp.einsum(
                "bnihv,bnihv->bni", by_q.snapshots, by_k.snapshots, preferred_element_type=jnp.float32
            )
            first = jnp.zeros_like(products[..., 0])
            if initial_state is not None:
                first = scale * jnp.sum(initial_state * by_v.end, axis=(2, 3))
            interval = self.snapshot_chunks * self.chunk
            ddecay = _decay_gradient(
                by_q.dots - by_k.dots, first, products, chunks, interval, precise=v.dtype == jnp.float32
            )[..., : v.shape[1]]
            if initial_state is None:
                ddecay = jnp.where(jnp.arange(ddecay.shape[2]) == 0, 0.0, ddecay)  # it is the decay of nothing
            ddecay = jnp.sum(ddecay, axis=(0, 2)) if decay.ndim == 1 else jnp.moveaxis(ddecay, 1, 2)
        dq, dk = (sum_groups(x.out, q.shape[2]) for x in (by_q, by_k))
        return dq, dk, by_v.out, ddecay, None, scale * by_v.end

    def states(self, k, v, *, decay, segment_ids) -> LinearState:
        """As `api.linear_attention_states`."""
        return self._all_maps(k, v, self._chunks(v, decay, segment_ids), reverse=False)

    def state_cotangents(self, q, dout, *, decay, segment_ids, options: Options) -> LinearState:
        """As `api.linear_attention_state_cotangents`."""
        parts = self._all_maps(q, dout, self._chunks(dout, decay, segment_ids), reverse=True)
        return LinearState(value=options.scale * parts.value, decay=parts.decay)

    def _chunks(self, v, decay, segment_ids) -> Chunks:
        B, T, N, _ = v.shape
        return chunks_of(
            decay, segment_ids, batch_size=B, length=T, num_heads=N, chunk=self.chunk, precise=v.dtype == jnp.float32
        )

    def _num_parts(self, v) -> int:
        B, T, N, _ = v.shape
        return self.num_parts(B, N, T)

    def _all_maps(self, k, v, chunks: Chunks, *, reverse: bool) -> LinearState:
        num = self._num_parts(v)
        return self.maps(
            k, v, chunks, num_heads=v.shape[2], num_parts=num, wanted=slice(0, num), reverse=reverse
        )  # fmt: skip

    def _before(self, k, v, chunks: Chunks, first, parts: LinearState | None, *, reverse: bool) -> jax.Array:
        """The state before each part in the direction of the sweep, [B, P, N, H, V], given that before the first."""
        num, N = self._num_parts(v), v.shape[2]
        if first is None:
            first = jnp.zeros((k.shape[0], N, k.shape[3], v.shape[3]), jnp.float32)
        if num == 1:
            return first[:, None]
        wanted = slice(1, num) if reverse else slice(0, num - 1)
        if parts is None or parts.value.shape[1] != num:
            maps = self.maps(k, v, chunks, num_heads=N, num_parts=num, wanted=wanted, reverse=reverse)
        else:
            maps = jax.tree.map(lambda x: x[:, wanted], parts)
        before, last = before_each(maps, first, reverse=reverse)
        return jnp.concatenate([last[:, None], before] if reverse else [before, last[:, None]], axis=1)


def part_chunks(num_chunks: int, num_parts: int, snapshot_chunks: int) -> int:
    """Chunks of each part but the last, which may have fewer: a whole number of intervals.

    Raises: ValueError if the last part then had none, as kernels write nothing for it.
    """
    intervals = -(-num_chunks // snapshot_chunks)
    of_part = -(-intervals // num_parts) * snapshot_chunks
    if (num_parts - 1) * of_part >= num_chunks:
        raise ValueError(
            f"num_parts: {num_chunks} chunks in {num_parts} parts of {of_part} leave none for the last, want at most "
            f"{-(-num_chunks // of_part)} parts"
        )
    return of_part


def _decay_gradient(
    by_token: jax.Array, first: jax.Array, products: jax.Array, chunks: Chunks, interval: int, *, precise: bool
) -> jax.Array:
    """Sums d/dc from each token to the end of its interval or document, float32 [B, N, T'].

    What a whole interval's sum misses of the difference between the products at its ends is rounding, and taken back:
    all of it at the interval's start, none at its end. With `precise` a sum also ends before a decay that leaves
    nothing, past which there is but rounding; which tokens are summed then differs between heads, at `interval` float32
    a token and head.

    Args:
      by_token: d/dc, [B, N, T'].
      first: State times cotangent of the state before the row, [B, N].
      products: The same after each interval, [B, N, T' / interval].
    """
    B, N, length = by_token.shape
    padding = products.shape[2] * interval - length
    by_token = jnp.pad(by_token, ((0, 0), (0, 0), (0, padding))).reshape(B, N, -1, interval)
    run = jnp.zeros((1, 1, length), jnp.int32) if chunks.run is None else chunks.run[:, None]
    is_nothing = chunks.log < _NOTHING
    is_first = _begins(run)
    if precise:
        run = run + jnp.cumsum(is_nothing, axis=2, dtype=jnp.int32)
    begins = _begins(run)[..., ::interval, None]
    run = jnp.pad(run, ((0, 0), (0, 0), (0, padding)), mode="edge").reshape(*run.shape[:2], -1, interval)
    later = jnp.tril(jnp.ones((interval, interval), bool))
    seen = (run[..., :, None] == run[..., None, :]) & later
    sums = jnp.einsum("bnij,bnijt->bnit", by_token, seen.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    before = jnp.concatenate([first[..., None], products[..., :-1]], axis=2)
    missed = (before - products)[..., None] - sums[..., :1]
    is_whole = (run[..., :1] == run[..., -1:]) & ~begins
    share = 1 - jnp.arange(interval, dtype=jnp.float32) / interval
    sums = sums + jnp.where(run == run[..., -1:], products[..., None], 0.0) + jnp.where(is_whole, missed * share, 0.0)
    # The decay of a document's first token comes to nothing, and so does one that leaves nothing.
    return jnp.where(is_first | is_nothing, 0.0, sums.reshape(B, N, -1)[..., :length])


def _begins(run: jax.Array) -> jax.Array:
    """Where a run other than that of the token before begins; not at the first token."""
    return jnp.concatenate([jnp.zeros_like(run[..., :1], bool), run[..., 1:] != run[..., :-1]], axis=-1)

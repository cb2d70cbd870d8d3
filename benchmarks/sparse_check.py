"""What queries that choose their blocks one by one must give: NSA and its selected branch, on a sample of their rows.

Written down anew, in float32 over whole rows of keys, so that what is timed is what is checked, at any length. Blocks
whose scores differ by less than rounding may be chosen either way: of many rows those are taken whose choice is clear.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.check import Check
from benchmarks.sparse_cases import NSA, SparseCase, draw_choices
from pallas_kernels.online_softmax import finite_max

NUM_ROWS = 64
_DRAWN = 4 * NUM_ROWS
_ALWAYS = 3  # blocks: the first, the one before a query's own, and its own

# Products of float32 are tuned for seconds each, and these run once.
_jit = functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0})
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def lower_check(case: SparseCase, dtype: str) -> jax.stages.Lowered:
    """The program of `check_of`, to be compiled beside others.

    Memory: O(N / K NUM_ROWS T), the few that a gradient takes.
    """
    rows = jax.ShapeDtypeStruct(_drawn(case).shape, jnp.int32)
    choices = None
    if case.kind == "selected":
        choices = jax.eval_shape(lambda: draw_choices(case.length, case.num_kv_heads))
    return _sampled.lower(*case.shapes(dtype), rows, choices)


def check_of(program: jax.stages.Compiled, case: SparseCase, q, k, v, dout, choices: jax.Array | None) -> Check:
    """What some rows must give, drawn at random.

    Args:
      program: Of `lower_check`.
      choices: Of the selected branch, `[1, T, K, n]`; None for NSA, which makes its own.
    """
    rows, want = program(q, k, v, dout, jnp.asarray(_drawn(case)), choices)
    sampled = jnp.zeros((1, case.length, 1, 1), dout.dtype).at[:, rows].set(1)
    return Check(rows=rows, dout=dout * sampled, want=want)


def _drawn(case: SparseCase) -> np.ndarray:
    """The first and the last row, and others at random."""
    drawn = np.random.default_rng(0).choice(case.length, min(_DRAWN, case.length), replace=False)
    return np.unique([0, case.length - 1, *drawn]).astype(np.int32)


@_jit
def _sampled(q, k, v, dout, rows, choices) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Some of the rows, in order, and float32 out, dq, dk and dv of them alone."""
    num_rows = min(NUM_ROWS, len(rows))
    if choices is None:
        clearest = jnp.argsort(-_margins(q[:, rows], k, rows))
        rows = jnp.sort(rows[clearest[:num_rows]])
    else:
        rows = rows[np.linspace(0, len(rows) - 1, num_rows).astype(int)]
    return rows, _results(q[:, rows], k, v, dout[:, rows], rows, None if choices is None else choices[0, rows])


def _margins(q, k, rows) -> jax.Array:
    """By how much of its score the last block that a row chooses is ahead of the next, least over kv heads: `[R]`."""

    def of_kv_head(q_RGH, k_SH):
        scores, is_free = _scores(_compressed(q_RGH, _means(k_SH), rows), rows, len(k_SH))
        num_scored = min(NSA.num_blocks - _ALWAYS, scores.shape[1])
        best, _ = jax.lax.top_k(jnp.where(is_free, scores, 0.0), min(num_scored + 1, scores.shape[1]))
        last, following = best[:, num_scored - 1], best[:, -1]
        return jnp.where(following > 0, (last - following) / jnp.where(last > 0, last, 1.0), jnp.inf)

    return jnp.min(_over_kv_heads(of_kv_head, q, k), axis=0)


def _results(q, k, v, dout, rows, choices) -> tuple[jax.Array, ...]:
    """Float32 out, dq, dk and dv."""

    def of_kv_head(q_RGH, dout_RGH, k_SH, v_SH, choices_Rn):
        attend = functools.partial(_selected, choices=choices_Rn) if choices is not None else _all_branches
        out, vjp = jax.vjp(functools.partial(attend, rows=rows), *(x.astype(jnp.float32) for x in (q_RGH, k_SH, v_SH)))
        return out, *vjp(dout_RGH.astype(jnp.float32))

    no_choices = jnp.zeros((len(rows), k.shape[2], 1), jnp.int32)
    folded = (q, dout), (k, v), no_choices if choices is None else choices
    out, dq, dk, dv = _over_kv_heads(of_kv_head, *folded)
    out, dq = (x.swapaxes(0, 1).reshape(1, len(rows), -1, x.shape[-1]) for x in (out, dq))
    return out, dq, *(x.swapaxes(0, 1)[None] for x in (dk, dv))


def _over_kv_heads(of_kv_head, of_queries, of_keys, *of_rows):
    """of_kv_head(`[R, G, H]`, ..., `[S, H]`, ..., `[R, n]`, ...) for one kv head after the other."""
    K = jax.tree.leaves(of_keys)[0].shape[2]
    queries = jax.tree.map(lambda x: x[0].reshape(x.shape[1], K, -1, x.shape[3]).swapaxes(0, 1), of_queries)
    keys = jax.tree.map(lambda x: x[0].swapaxes(0, 1), of_keys)
    arrays = jax.tree.leaves((queries, keys, [x.swapaxes(0, 1) for x in of_rows]))
    return jax.lax.map(lambda arrays: of_kv_head(*arrays), tuple(arrays))


def _all_branches(q, k, v, *, rows) -> jax.Array:
    """NSA with means of blocks for compressed keys and values, and gates of 1."""
    compressed, values = _means(k), _means(v)
    p = _compressed(q, compressed, rows)
    scores, is_free = _scores(jax.lax.stop_gradient(p), rows, len(k))
    best, chosen = jax.lax.top_k(
        jnp.where(is_free, scores, -1.0), min(NSA.num_blocks - _ALWAYS, scores.shape[1])
    )  # fmt: skip
    own = rows[:, None] // NSA.block_size
    always = jnp.concatenate([jnp.zeros_like(own), own - 1, own], axis=1)
    choices = jnp.concatenate([always, jnp.where(best >= 0, chosen, -1)], axis=1)
    place = jnp.arange(len(k))
    near = (place <= rows[:, None]) & (place > rows[:, None] - NSA.window)
    of_window = _einsum("GRS,SH->RGH", _softmax(q, k, near), v)
    return _einsum("GRS,SH->RGH", p, values) + _selected(q, k, v, rows=rows, choices=choices) + of_window


def _selected(q, k, v, *, rows, choices) -> jax.Array:
    place = jnp.arange(len(k))
    is_chosen = (choices[..., None] == jnp.arange(-(-len(k) // NSA.block_size))).any(axis=1)
    allowed = is_chosen[:, place // NSA.block_size] & (place <= rows[:, None])
    return _einsum("GRS,SH->RGH", _softmax(q, k, allowed), v)


def _means(x: jax.Array) -> jax.Array:
    """Of each whole block to compress, rounded as the keys that an implementation is given."""
    starts = np.arange(0, len(x) - NSA.compress_block + 1, NSA.compress_stride)
    blocks = x[starts[:, None] + np.arange(NSA.compress_block)].astype(jnp.float32)
    means = jnp.mean(blocks, axis=1)
    rounded = means.astype(jnp.bfloat16).astype(jnp.float32)
    return means + jax.lax.stop_gradient(rounded - means)


def _compressed(q, means, rows) -> jax.Array:
    last = jnp.arange(len(means)) * NSA.compress_stride + NSA.compress_block - 1
    return _softmax(q, means, last <= rows[:, None])


def _scores(p, rows, length: int) -> tuple[jax.Array, jax.Array]:
    """Of the whole blocks, over a group's heads, and which are there to be chosen: `[R, W]` each."""
    block = jnp.arange(max(1, length // NSA.block_size))
    starts = jnp.arange(p.shape[2]) * NSA.compress_stride
    begin = block * NSA.block_size
    common = jnp.minimum(starts[:, None] + NSA.compress_block, begin + NSA.block_size) - jnp.maximum(
        starts[:, None], begin
    )
    times = jnp.maximum(common, 0).astype(jnp.float32) / NSA.compress_stride
    own = rows[:, None] // NSA.block_size
    return _einsum("RM,MW->RW", jnp.sum(p, axis=0), times), (0 < block) & (block < own - 1)


def _softmax(q_RGH, k_SH, allowed_RS) -> jax.Array:
    """`[G, R, S]`; zero where a row is allowed nothing."""
    logits = q_RGH.shape[-1] ** -0.5 * _einsum("RGH,SH->GRS", q_RGH.astype(jnp.float32), k_SH.astype(jnp.float32))
    logits = jnp.where(allowed_RS, logits, -jnp.inf)
    p = jnp.exp(logits - finite_max(jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))))
    total = jnp.sum(p, axis=-1, keepdims=True)
    return p / jnp.where(total == 0, 1.0, total)

"""The kernel of sums along antidiagonals on Hopper: what it is told to compute, what it lowers and refuses, and what a
card computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockSizes, dispatch
from pallas_kernels.mask import Causal, Full, SameDocument
from pallas_kernels.sparse import XAttention
from pallas_kernels.sparse import pallas_mosaic_gpu_antidiagonals as antidiagonals
from pallas_kernels.testing import H100, packed_tokens, tracing_for

SIZES = BlockSizes(block_q=128, block_kv=128)

# Squares of queries and keys, stride, heads, kv heads, head dim; rows of the batch with a pattern of their own.
SHAPES = {
    "gqa": (1, 300, 320, 16, 4, 2, 128, 1),
    "rows_of_their_own": (2, 130, 264, 8, 2, 2, 64, 2),
    "less_than_a_tile": (2, 20, 16, 16, 4, 4, 128, 1),
    "one_kv_head": (1, 520, 520, 16, 2, 1, 64, 1),
}


def shapes(name):
    B, R, C, stride, N, K, H, rows = SHAPES[name]
    of = jax.ShapeDtypeStruct
    return of((B, R, stride, N, H), jnp.bfloat16), of((B, C, stride, K, H), jnp.bfloat16), of((rows, R, C), bool)


def test_tiles_are_those_with_a_pair_and_words_their_bits():
    """3 rows of tiles by 2: none of the second row counts, all of the first tile does."""
    seen = np.zeros((1, 300, 512), bool)
    seen[0, :128, :256] = True
    seen[0, 5, 256 + 33] = True
    seen[0, 299, 511] = True
    words, items, count = (np.asarray(x) for x in antidiagonals._tiles(jnp.asarray(seen)))
    assert words.shape == (1, 384, 16) and count.tolist() == [3]
    assert items[:3].tolist() == [2 * 0 + 1, 2 * 1, 2 * 5]
    bits = (words.view(np.uint32)[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    np.testing.assert_array_equal(bits.reshape(384, 512)[:300], seen[0])
    assert not bits.reshape(384, 512)[300:].any()


@pytest.mark.parametrize("name", [pytest.param(x, marks=[] if x == "gqa" else pytest.mark.slow) for x in SHAPES])
def test_lowers_for_cuda(name):
    with tracing_for(H100):
        traced = jax.jit(functools.partial(antidiagonals.group_logsumexp, scale=0.1)).trace(*shapes(name))
        lowered = traced.lower(lowering_platforms=("cuda",))
    (out,) = jax.tree.leaves(lowered.out_info)
    B, R, C, _, N, *_ = SHAPES[name]
    assert out.shape == (B, N, R, C // 8) and out.dtype == jnp.float32
    assert lowered.as_text().count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
    ("shape", "dtype", "selector", "taken"),
    [
        ((1, 1024, 2, 128), "bfloat16", XAttention(), "mosaic_gpu"),
        ((1, 1024, 2, 64), "bfloat16", XAttention(stride=8), "mosaic_gpu"),
        ((1, 1024, 2, 128), "float16", XAttention(), "xla"),
        ((1, 1024, 2, 128), "float32", XAttention(), "xla"),
        ((1, 1024, 2, 96), "bfloat16", XAttention(), "xla"),
        ((1, 1024, 2, 128), "bfloat16", XAttention(stride=32), "xla"),
        ((1, 1024, 2, 128), "bfloat16", XAttention(implementation="xla"), "xla"),
    ],
    ids=str,
)
def test_what_a_hopper_takes(shape, dtype, selector, taken):
    x = jax.ShapeDtypeStruct(shape, dtype)
    with tracing_for(H100), dispatch.record() as used:
        jax.eval_shape(functools.partial(selector.select, mask=Causal(), block_sizes=SIZES, budget=2), x, x)
    assert used == [("XAttention.select", taken)]


def test_a_named_implementation_refuses():
    x = jax.ShapeDtypeStruct((1, 1024, 2, 128), "float32")
    select = functools.partial(
        XAttention(implementation="mosaic_gpu").select, mask=Causal(), block_sizes=SIZES, budget=2
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="mosaic_gpu: it needs an NVIDIA Hopper GPU"):
        jax.eval_shape(select, x, x)
    with tracing_for(H100), pytest.raises(NotImplementedError, match="mosaic_gpu: q is float32 of head dim 128"):
        jax.eval_shape(select, x, x)


def formula(q, k, seen, scale):
    k = jnp.repeat(k.astype(jnp.float32), q.shape[3] // k.shape[3], axis=3)
    highest = jax.lax.Precision.HIGHEST
    sums = scale * jnp.einsum("brinh,bcinh->bnrc", q[:, :, ::-1].astype(jnp.float32), k, precision=highest)
    sums = jnp.where(seen[:, None], sums, -jnp.inf)
    return jax.nn.logsumexp(sums.reshape(*sums.shape[:3], -1, antidiagonals.GROUP), axis=-1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_formula_on_a_gpu(name):
    rng = np.random.default_rng(0)
    q, k, seen = shapes(name)
    q, k = (jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in (q, k))
    seen = np.tril(np.ones(seen.shape, bool)) if seen.shape[0] == 1 else rng.random(seen.shape) < 0.3
    seen = jnp.asarray(seen & (rng.random((*seen.shape[:2], 1)) < 0.95))  # some rows see nothing
    got = jax.jit(functools.partial(antidiagonals.group_logsumexp, scale=0.1))(q, k, seen)
    want = jax.jit(functools.partial(formula, scale=0.1))(q, k, seen)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("mask", "documents"), [(Causal(), None), (Full(), None), (Causal() & SameDocument(), True)])
def test_chooses_as_xla_does_on_a_gpu(mask, documents):
    length = 2000
    tokens = None
    if documents:
        rows = packed_tokens(((900, 1, 700), (1999,)), length)
        tokens = jax.tree.map(jnp.asarray, rows)
    q, k = (jax.random.normal(jax.random.key(i), (2, length, n, 128), jnp.bfloat16) for i, n in enumerate((4, 2)))

    def choose(implementation):
        selector = XAttention(stride=8, implementation=implementation)
        options = dict(mask=mask, tokens=tokens, block_sizes=SIZES, budget=5)
        return jax.jit(functools.partial(selector.select, **options))(q, k).blocks

    np.testing.assert_array_equal(choose("mosaic_gpu"), choose("xla"))

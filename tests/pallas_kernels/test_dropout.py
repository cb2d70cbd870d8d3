"""Dropout: how its draws are spread, that nothing but tokens and seeds decides them, and what it refuses."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockSizes, Dropout, Tokens, blockwise_attention, blockwise_attention_forward
from pallas_kernels.dropout import key_words
from pallas_kernels.mask import Causal, Full, SameDocument
from pallas_kernels.testing import assert_close, packed_tokens
from pallas_kernels.tokens import TokenAxis

RATES = (0.02, 0.1, 0.5)
LENGTH = 512


def dropout(rate=0.3, batch_size=2, num_heads=4, seed=0):
    return Dropout.of_key(rate, jax.random.key(seed), batch_size=batch_size, num_heads=num_heads)


def standardised(rate, tokens=None):
    """Of each pair whether it is kept, less the mean and over the deviation that this should have, `[B, N, T, S]`."""
    kept = np.asarray(dropout(rate).dense(tokens, LENGTH, LENGTH)) > 0
    return (kept - (1 - rate)) / np.sqrt(rate * (1 - rate))


def assert_mean_is_zero(name, x):
    """Within 5 deviations of the mean of as many independent draws; a wrong draw is out by hundreds."""
    deviations = x.mean() * np.sqrt(x.size)
    assert abs(deviations) < 5, f"{name}: {deviations:.1f} deviations"


@pytest.mark.parametrize("rate", RATES)
def test_pairs_are_dropped_at_the_rate_and_independently(rate):
    z = standardised(rate)
    assert_mean_is_zero("rate", z)
    shifted = {
        "heads": (z[:, :-1], z[:, 1:]),
        "rows": (z[:1], z[1:]),
        "neighbouring queries": (z[:, :, :-1], z[:, :, 1:]),
        "neighbouring keys": (z[..., :-1], z[..., 1:]),
        "diagonals": (z[:, :, :-1, :-1], z[:, :, 1:, 1:]),
        "queries half the length apart": (z[:, :, : LENGTH // 2], z[:, :, LENGTH // 2 :]),
        "keys half the length apart": (z[..., : LENGTH // 2], z[..., LENGTH // 2 :]),
        "pairs and the same the other way round": (np.triu(z, 1), np.tril(z, -1).swapaxes(2, 3)),
    }
    for name, (x, y) in shifted.items():
        assert_mean_is_zero(name, x * y)
    # A sum of a word of the query and one of the key would pass all of the above, and fail this.
    for dq, dk in itertools.product((1, 2, 64), (1, 3, 128)):
        corners = z[:, :, dq:, dk:], z[:, :, :-dq, :-dk], z[:, :, dq:, :-dk], z[:, :, :-dq, dk:]
        assert_mean_is_zero(f"four corners of {dq} by {dk}", np.prod(corners, axis=0))


@pytest.mark.parametrize("rate", RATES)
def test_sums_over_queries_and_over_keys_vary_as_those_of_independent_draws(rate):
    z = standardised(rate)
    for axis in (2, 3):
        sums = z.sum(axis) / np.sqrt(LENGTH)
        assert_mean_is_zero("variance of sums", (sums**2 - 1) / np.sqrt(2))


def test_no_queries_and_no_keys_draw_more_alike_than_those_of_independent_draws():
    """Of all pairs of queries, and of keys: the greatest correlation, and the greatest singular value."""
    z = standardised(0.3)[0, 0]
    for correlations in (z @ z.T, z.T @ z):
        others = np.abs(correlations[~np.eye(LENGTH, dtype=bool)]) / np.sqrt(LENGTH)
        assert others.max() < 6, f"{others.max():.1f} deviations"
    assert np.linalg.svd(z, compute_uv=False)[0] < 1.1 * 2 * np.sqrt(LENGTH)


def test_documents_at_the_same_positions_draw_their_own():
    segment_ids = jnp.repeat(jnp.arange(2, dtype=jnp.int32), LENGTH // 2)[None]
    positions = jnp.tile(jnp.arange(LENGTH // 2, dtype=jnp.int32), 2)[None]
    z = standardised(0.5, Tokens.self_attention(positions, segment_ids))
    half = slice(0, LENGTH // 2), slice(LENGTH // 2, LENGTH)
    blocks = [z[:, :, q, k] for q, k in itertools.product(half, half)]
    for x, y in itertools.combinations(blocks, 2):
        assert_mean_is_zero("documents", x * y)


def test_no_more_than_two_keys_of_a_document_have_the_same_word():
    """Words are a permutation of 2^32, of which the last bit is lost."""
    positions = jnp.arange(2**20, dtype=jnp.int32)[None]
    words = np.asarray(key_words(TokenAxis(positions, jnp.full_like(positions, 7))))
    counts = np.unique(words, return_counts=True)[1]
    assert counts.max() == 2 and (counts == 2).sum() < 300  # 128 are expected
    assert np.all(words % 2 == 1)


def lowbias32(x):
    """Written down once more, in Python's integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def is_kept(rate, seed, q_position, q_segment, kv_position, kv_segment):
    key = lowbias32((lowbias32(kv_segment % 2**32) + kv_position) % 2**32)
    first, second = (
        lowbias32((lowbias32((x + lowbias32(q_segment % 2**32)) % 2**32) + q_position) % 2**32)
        for x in (seed, 2**32 - 1 - seed)
    )
    return (first ^ second | 1) * (key | 1) % 2**32 >= rate * 2**32


@pytest.mark.parametrize("rate", RATES)
def test_the_draws_follow_the_formula(rate):
    """Whoever changes it changes the draws of runs that go on with another version, and says so in the changelog."""
    seeds = [[1, 2**32 - 1, 12345], [0, 2**31, 7]]
    q, kv = ([0, 5, 2**31 - 1], [0, 3, -1]), ([0, 1, 2**31 - 1, 9], [3, 0, 0, -1])
    names = ("q_positions", "q_segment_ids", "kv_positions", "kv_segment_ids")
    tokens = Tokens(**{name: jnp.asarray([x], jnp.int32) for name, x in zip(names, (*q, *kv), strict=True)})
    z = Dropout(rate=rate, seeds=jnp.asarray(seeds, jnp.uint32)).dense(tokens, 3, 4)
    want = [
        [[[is_kept(rate, seed, *t, *s) for s in zip(*kv, strict=True)] for t in zip(*q, strict=True)] for seed in row]
        for row in seeds
    ]
    np.testing.assert_array_equal(z, np.where(want, np.float32(1 / (1 - rate)), 0))


def qkv(length=48, num_heads=4):
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = ((2, length, num_heads, 8), (2, length, 2, 8), (2, length, 2, 8), (2, length, num_heads, 8))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def with_gradients(tokens, arrays, **options):
    @jax.jit
    def run(q, k, v, dout):
        mask = Causal() & SameDocument()
        out, vjp = jax.vjp(lambda *x: blockwise_attention(*x, mask=mask, tokens=tokens, **options), q, k, v)
        return out, *vjp(dout)

    return dict(zip(("out", "dq", "dk", "dv"), run(*arrays), strict=True))


TOKENS = jax.tree.map(jnp.asarray, packed_tokens(((20, 1, 20), (48,)), 48))


@pytest.mark.parametrize("blocks", [(8, 16), (48, 5)])
def test_the_order_of_tokens_and_block_sizes_do_not_matter(blocks):
    arrays = qkv()
    want = with_gradients(TOKENS, arrays, dropout=dropout(), implementation="reference")
    order = np.random.default_rng(0).permutation(48)
    got = with_gradients(
        jax.tree.map(lambda x: x[:, order], TOKENS),
        [x[:, order] for x in arrays],
        dropout=dropout(),
        block_sizes=BlockSizes(block_q=blocks[0], block_kv=blocks[1]),
        implementation="xla",
    )
    for name in want:
        assert_close(name, got[name], want[name][:, order], "float32")


causal = jax.jit(functools.partial(blockwise_attention, mask=Causal()), static_argnames=("return_lse",))


def test_a_row_and_a_group_of_heads_alone_draw_what_they_draw_among_others():
    q, k, v, _ = qkv()
    want = causal(q, k, v, dropout=dropout())
    part = Dropout(rate=0.3, seeds=dropout().seeds[1:, 2:])
    got = causal(q[1:, :, 2:], k[1:, :, 1:], v[1:, :, 1:], dropout=part)
    np.testing.assert_allclose(got, want[1:, :, 2:], atol=1e-6)


def test_lse_is_without_dropout_and_rate_0_is_none():
    q, k, v, _ = qkv()
    out, lse = causal(q, k, v, return_lse=True)
    dropped, same_lse = causal(q, k, v, dropout=dropout(), return_lse=True)
    np.testing.assert_array_equal(lse, same_lse)
    assert not np.allclose(out, dropped, atol=0.1)
    np.testing.assert_array_equal(out, causal(q, k, v, dropout=dropout(0.0)))


def test_the_mean_over_seeds_is_the_result_without_dropout():
    q, k, v, _ = qkv(length=8)

    @jax.jit
    def mean(keys):
        def attend(key):
            drop = Dropout.of_key(0.2, key, batch_size=2, num_heads=4)
            return blockwise_attention(q, k, v, mask=Full(), dropout=drop, implementation="reference")

        return jnp.mean(jax.lax.map(attend, keys, batch_size=100), axis=0)

    want = blockwise_attention(q, k, v, mask=Full(), implementation="reference")
    np.testing.assert_allclose(mean(jax.random.split(jax.random.key(2), 3000)), want, atol=0.05)


def test_a_key_for_each_row_makes_rows_independent_of_each_other():
    keys = jax.random.split(jax.random.key(3), 4)
    seeds = Dropout.of_key(0.1, keys, batch_size=4, num_heads=3).seeds
    assert seeds.shape == (4, 3) and np.unique(seeds).size == 12
    some = Dropout.of_key(0.1, keys[jnp.asarray([2, 0])], batch_size=2, num_heads=3).seeds
    np.testing.assert_array_equal(some, seeds[jnp.asarray([2, 0])])


def unchecked(function):
    return getattr(function, "__wrapped__", function)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(ValueError, match=f"Dropout: rate={rate}, wanted 0 <= rate < 1; 0 drops nothing"):
        dropout(rate)


@pytest.mark.parametrize("key", [jax.random.PRNGKey(0), jax.random.split(jax.random.key(0), 3)], ids=["raw", "rows"])
def test_keys_of_another_form_are_refused(key):
    with pytest.raises(ValueError, match=r"Dropout.of_key: key is .*, wanted a typed key of shape \[\] or \[2\]; make"):
        Dropout.of_key(0.1, key, batch_size=2, num_heads=4)


@pytest.mark.parametrize("op", [blockwise_attention, blockwise_attention_forward])
def test_seeds_of_another_shape_and_other_things_are_refused(op):
    q, k, v, _ = qkv()
    with pytest.raises(ValueError, match=r"dropout.seeds is uint32\[3, 4\], wanted uint32 \[2 or 1, 4\], one for each"):
        op(q, k, v, mask=Causal(), dropout=dropout(batch_size=3))
    with pytest.raises(ValueError, match=r"dropout=0.1, wanted None or a Dropout, such as Dropout.of_key"):
        unchecked(op)(q, k, v, mask=Causal(), dropout=0.1)

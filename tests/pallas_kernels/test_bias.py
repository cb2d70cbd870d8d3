"""Biases against what their papers say, and what asks for their gradients."""

import dataclasses
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Alibi, Bias, BlockSizes, KerpleLog, KerplePower, T5Buckets, Tokens, blockwise_attention
from pallas_kernels.blockwise import api, near_bias
from pallas_kernels.blockwise import pallas_mosaic_gpu_bias as kernel_bias
from pallas_kernels.blockwise import pallas_mosaic_gpu_bias_sums as bias_sums
from pallas_kernels.blockwise.options import Options
from pallas_kernels.mask import Causal, Full
from pallas_kernels.online_softmax import delta_of
from pallas_kernels.sparse import BlockSelection
from pallas_kernels.testing import assert_close

DISTANCES = np.arange(-300, 301)


def test_slopes_of_alibi():
    np.testing.assert_allclose(Alibi.geometric(8).slopes, [2.0**-n for n in range(1, 9)])
    np.testing.assert_allclose(Alibi.geometric(16).slopes, [2.0 ** (-n / 2) for n in range(1, 17)], rtol=1e-6)
    # In between, those of the power below and every other one of twice as many heads.
    np.testing.assert_allclose(Alibi.geometric(3).slopes, [2.0**-4, 2.0**-8, 2.0**-2], rtol=1e-6)


def bucket_of(distance: int, *, buckets: int, max_distance: int, bidirectional: bool) -> int:
    """T5's bucket of one distance, query less key."""
    first = 0
    if bidirectional:
        buckets //= 2
        first, distance = (buckets, -distance) if distance < 0 else (0, distance)
    distance = max(distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return first + min(buckets - 1, exact + int(share * (buckets - exact)))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 50), (8, 20)])
def test_buckets_of_t5(buckets, max_distance, bidirectional):
    bias = T5Buckets(table=np.zeros((1, buckets)), max_distance=max_distance, bidirectional=bidirectional)
    options = {"buckets": buckets, "max_distance": max_distance, "bidirectional": bidirectional}
    want = [bucket_of(int(d), **options) for d in DISTANCES]
    np.testing.assert_array_equal(bias.buckets(jnp.asarray(DISTANCES, jnp.float32)), want)


@pytest.mark.parametrize(("buckets", "max_distance", "message"), [(7, 128, "7 buckets"), (32, 16, "max_distance=16")])
def test_buckets_that_cannot_be_are_refused(buckets, max_distance, message):
    with pytest.raises(ValueError, match=message):
        T5Buckets(table=np.zeros((1, buckets)), max_distance=max_distance)


def test_kernels_of_kerple():
    r1, r2 = np.array([0.5, 2.0], np.float32), np.array([0.3, 1.5], np.float32)
    tokens = Tokens(q_positions=jnp.asarray([[7]]), kv_positions=jnp.asarray([[7, 6, 2, 9]]))
    distance = np.array([0.0, 1.0, 5.0, 2.0])
    log, power = (kind(r1=r1, r2=r2).dense(tokens, 1, 4)[0, :, 0] for kind in (KerpleLog, KerplePower))
    np.testing.assert_allclose(log, -r1[:, None] * np.log(1 + r2[:, None] * distance), rtol=1e-5)
    np.testing.assert_allclose(power, -r1[:, None] * distance ** r2[:, None], rtol=1e-5)


@pytest.mark.parametrize("differentiated", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_gradient_of_a_bias_is_made_where_it_is_asked_for(differentiated, monkeypatch):
    told = []

    def backward(*arguments, options, **others):
        told.append(options.bias_gradient)
        return api.xla.backward(*arguments, options=options, **others)

    monkeypatch.setitem(api.BACKWARD, "xla", backward)
    q = jax.random.normal(jax.random.key(0), (1, 8, 4, 16))
    bias = Alibi.geometric(4)

    def loss(q, slopes):
        given = Alibi(slopes=slopes) if differentiated else bias
        return blockwise_attention(q, q, q, mask=Causal(), bias=given, implementation="xla").sum()

    dslopes = jax.grad(loss, argnums=1)(q, jnp.asarray(bias.slopes))
    jax.grad(loss)(q, jnp.asarray(bias.slopes))
    assert told == ([True, False] if differentiated else [False])
    assert np.any(dslopes != 0) == differentiated


@pytest.mark.slow
def test_a_kind_of_ones_own():
    """One class is all that the ops in XLA need: here a bias of the positions themselves, not of their distance."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class OfKeys(Bias):
        weights: jax.Array

        def pair(self, q_positions, kv_positions):
            return self.weights * jnp.cos(kv_positions.astype(jnp.float32)) + jnp.zeros(q_positions.shape)

    q = jax.random.normal(jax.random.key(0), (1, 9, 2, 16))

    def loss(implementation, weights):
        attend = {"mask": Causal(), "bias": OfKeys(weights), "implementation": implementation}
        return (blockwise_attention(q, q, q, **attend) ** 2).sum()

    got, want = (jax.grad(loss, argnums=1)(name, jnp.ones(2)) for name in ("xla", "reference"))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert np.all(np.asarray(want) != 0)


@pytest.mark.slow
def test_gradients_of_near_pairs_are_of_the_chosen_blocks():
    """Here all pairs are near, so that they are the whole gradient; lengths leave both last blocks ragged."""
    T, S, N, sizes = 300, 420, 2, BlockSizes(block_q=128, block_kv=128)
    keys = jax.random.split(jax.random.key(0), 5)
    q, dout = (jax.random.normal(key, (1, T, N, 16)) for key in keys[:2])
    k, v = (jax.random.normal(key, (1, S, N, 16)) for key in keys[2:4])
    bias = T5Buckets(table=jax.random.normal(keys[4], (N, 32)), max_distance=512, bidirectional=True)
    blocks = jnp.asarray([[[0, 2, -1], [1, -1, -1], [0, 1, 3]], [[3, -1, -1], [0, 1, 2], [2, -1, -1]]], jnp.int32)
    selection = BlockSelection(blocks=blocks[None], q_len=T, kv_len=S, block_sizes=sizes)
    schedule = selection.schedule(mask=Full(), block_sizes=sizes)

    def attend(bias):
        return blockwise_attention(
            q, k, v, mask=Full(), bias=bias, schedule=schedule, implementation="xla", return_lse=True
        )  # fmt: skip

    (out, lse), vjp = jax.vjp(attend, bias)
    (want,) = vjp((dout, jnp.zeros_like(lse)))
    got = near_bias.gradient(
        bias, q, k, v, lse=lse, delta=delta_of(out, dout, None), dout=dout, tokens=Tokens(), schedule=schedule,
        options=Options(mask=Full(), scale=16**-0.5, logits_soft_cap=None, block_sizes=None, deterministic=True),
        dropout=None,
    )  # fmt: skip
    assert_close("dtable", got.table, want.table, "float32")


@pytest.mark.parametrize("kind", [KerpleLog, KerplePower])
def test_tables_by_distance_are_values_and_derivatives(kind):
    """Of what a Hopper kernel reads: in its unit, for whole blocks and two more."""
    r1, r2 = jnp.array([0.3, 0.7]), jnp.array([0.5, 1.2])
    of_kernel = kernel_bias.of_call(kind(r1=r1, r2=r2), unit=0.25)
    words, units = bias_sums.slope_table(of_kernel, 130, 300)
    assert words.shape == (2, 1, 2 * 640)
    table = np.moveaxis(np.asarray(words).view(np.float16).reshape(2, 1280, 2), 2, 1) * np.asarray(units)[:, :, None]
    distances = jnp.arange(-640.0, 640.0)
    values = kernel_bias.value_table(of_kernel, 130, 300)

    def slope(name, head, distance):
        def of_parameter(x):
            return dataclasses.replace(jax.tree.map(lambda y: y[head], of_kernel), **{name: x}).of_distance(distance)

        return jax.grad(of_parameter)(getattr(of_kernel, name)[head])

    for head in range(2):
        want = [jax.vmap(lambda d, at=(name, head): slope(*at, d))(distances) for name in ("r1", "r2")]
        np.testing.assert_allclose(table[head], want, rtol=1e-3, atol=1e-6)
        of_head = jax.tree.map(operator.itemgetter(head), of_kernel)
        np.testing.assert_allclose(values[head], of_head.of_distance(distances), rtol=1e-5)


def test_slopes_in_16_bits_reach_from_the_next_token_to_the_farthest():
    """The steepest that KERPLE allows: near keys, which have the attention, are not lost beside far ones."""
    bias = KerplePower(r1=jnp.array([1.0]), r2=jnp.array([2.0]))
    words, units = bias_sums.slope_table(bias, 32_768, 32_768)
    middle = words.shape[2] // 2
    of_r1 = np.asarray(words[0, 0, middle + 1 :]).view(np.float16)[::2].astype(np.float64) * float(units[0, 0])
    np.testing.assert_allclose(of_r1, -(np.arange(1.0, middle) ** 2), rtol=2e-3)


def test_sums_by_distance_give_the_whole_gradient_of_a_table():
    """Whatever a tile within the reach has beyond it counts as beyond."""
    rng, N, S = np.random.default_rng(0), 2, 300
    bias = T5Buckets(table=jnp.zeros((N, 32)), bidirectional=True)
    shape = bias_sums.near_zeros(kernel_bias.of_call(bias, unit=0.25), (1, N, S)).shape
    assert shape == (1, N, 3, 2 * 384)
    near = rng.standard_normal(shape).astype(np.float32)
    far = rng.standard_normal((1, N, 2, S, 1)).astype(np.float32)
    got = kernel_bias.gradient_of_sums(bias, jnp.asarray(far), jnp.asarray(near), unit=0.25).table
    want = np.zeros((N, 32))
    for head in range(N):
        for place, x in enumerate(near[0, head].sum(axis=0)):
            want[head, bucket_of(place - 384, buckets=32, max_distance=128, bidirectional=True)] += x
        for distance, x in zip((1000, -1000), far[0, head, :, :, 0].sum(axis=1), strict=True):
            want[head, bucket_of(distance, buckets=32, max_distance=128, bidirectional=True)] += x
    np.testing.assert_allclose(got, want, atol=1e-3)

"""What linear attention is put together from: maps of states, factors of chunks, sums of decays, products."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import LinearState, linear_attention
from pallas_kernels.linear import xla_chunks
from pallas_kernels.linear.chunks import chunks_of
from pallas_kernels.linear.options import Options
from pallas_kernels.linear.state import before_each, total
from pallas_kernels.linear.suite import FAMILY, truth
from pallas_kernels.linear.xla_sweep import PRIMITIVES
from pallas_kernels.testing import relative_errors


def random_map(random, shape, decay_dims: int, *, cut: bool) -> LinearState:
    """A map of states `[*shape, 3, 2]`, whose decay is a number, a vector or a matrix; a document begins in it where
    `cut`."""
    value = random.standard_normal((*shape, 3, 2), np.float32)
    decay = random.random((*shape, *(3,) * decay_dims), np.float32)
    return LinearState(value=jnp.asarray(value), decay=jnp.asarray(0 * decay if cut else decay))


@hypothesis.given(st.integers(0, 2**31), st.integers(0, 2), st.tuples(st.booleans(), st.booleans(), st.booleans()))
@hypothesis.settings(deadline=None, max_examples=30)
def test_maps_of_runs_combine_associatively_and_as_they_apply(seed, decay_dims, cuts):
    random = np.random.default_rng(seed)
    a, b, c = (random_map(random, (2,), decay_dims, cut=cut) for cut in cuts)
    before = jnp.asarray(random.standard_normal((2, 3, 2), np.float32))
    left, right = a.combine(b).combine(c), a.combine(b.combine(c))
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(left.apply(before), c.apply(b.apply(a.apply(before))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("decay_dims", "reverse"), [(0, True), (1, False), (2, False), (2, True)])
def test_the_states_before_parts_are_those_of_the_parts_so_far(decay_dims, reverse):
    random = np.random.default_rng(0)
    parts = random_map(random, (2, 4, 5), decay_dims, cut=False)
    first = jnp.asarray(random.standard_normal((2, 5, 3, 2), np.float32))
    before, last = before_each(parts, first, reverse=reverse)
    state = first
    for part in reversed(range(4)) if reverse else range(4):
        np.testing.assert_allclose(before[:, part], state, rtol=1e-5, atol=1e-6)
        state = jax.tree.map(lambda x, part=part: x[:, part], parts).apply(state)
    np.testing.assert_allclose(last, state, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total(parts, reverse=reverse).apply(first), state, rtol=1e-5, atol=1e-6)


def test_factors_of_chunks_stop_at_documents_and_padding():
    ids = jnp.asarray([[0, 0, 1, -1, -1, 2, 2, 2, 2, 2]], jnp.int32)
    chunks = chunks_of(jnp.log(jnp.asarray([0.5])), ids, batch_size=1, length=10, num_heads=1, chunk=4)
    np.testing.assert_allclose(chunks.reads[0, 0], [0.5, 0.25, 0, 0, 0, 0, 0, 0, 0.5, 0.25, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(chunks.writes[0, 0], [0, 0, 0, 0, 0, 0.25, 0.5, 1, 0.5, 1, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(chunks.keeps[0, 0], [0, 0, 0.25], rtol=1e-6)
    assert chunks.document[0].tolist() == [0, 0, 1, -1, -1, 3, 3, 3, 3, 3, -1, -1]


def test_a_weak_decay_after_strong_ones_is_exact():
    log = np.full((64, 1), -20.0, np.float32)
    log[50:, 0] = -0.01 * np.arange(1, 15)
    exact = log.astype(np.float64)[:, 0]
    between = np.asarray(xla_chunks.sums_between(jnp.asarray(log)))[..., 0]
    want = np.asarray([[exact[j + 1 : i + 1].sum() for j in range(64)] for i in range(64)])
    np.testing.assert_allclose(between, want, rtol=1e-6)
    chunks = chunks_of(jnp.asarray(log)[None], None, batch_size=1, length=64, num_heads=1, chunk=64)
    np.testing.assert_allclose(chunks.writes[0, 0, 49:], np.exp(want[63, 49:]), rtol=1e-6)
    rounded = chunks_of(
        jnp.asarray(log)[None], None, batch_size=1, length=64, num_heads=1, chunk=64, precise=False
    )  # fmt: skip
    np.testing.assert_allclose(rounded.writes[0, 0, 49:], np.exp(want[63, 49:]), rtol=2e-4)


def test_chunks_join_again():
    x = jnp.arange(2 * 130 * 3 * 2, dtype=jnp.float32).reshape(2, 130, 3, 2)
    chunks = xla_chunks.split(x)
    assert chunks.shape == (3, 2, 3, 64, 2) and not chunks[2, :, :, 2:].any()
    assert (xla_chunks.join(chunks, 130) == x).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_products_and_their_derivatives_are_as_precise_as_their_dtype(dtype):
    random = np.random.default_rng(0)
    x, y, g = (jnp.asarray(random.standard_normal(shape, np.float32)) for shape in ((2, 9, 8), (2, 8, 7), (2, 9, 7)))
    spec = "bij,bjk->bik"

    def rounded(*arrays):
        return arrays if dtype != "bfloat16" else [a.astype(dtype).astype(jnp.float32) for a in arrays]

    got, vjp = jax.vjp(functools.partial(xla_chunks.multiply, spec, dtype), x, y)
    want, want_vjp = jax.vjp(functools.partial(jnp.einsum, spec, precision=jax.lax.Precision.HIGHEST), *rounded(x, y))
    for a, b in zip((got, *vjp(g)), (want, *want_vjp(*rounded(g))), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["documents_scalar", pytest.param("strong_scalar", marks=pytest.mark.slow)])
def test_the_gradient_of_a_decay_by_sweeps(name):
    """In float32, which `xla` leaves to the scan, so that all that is left is rounding."""
    case = next(case for case in FAMILY.cases if case.name == name)
    inputs = case.inputs("float32")

    @jax.jit
    def backward(q, k, v, dout, dstate, decay, initial_state):
        return PRIMITIVES.backward(
            q, k, v, dout, dstate, decay=decay, initial_state=initial_state, segment_ids=case.segment_ids(),
            starts=None, parts=None, options=Options(scale=case.head_dim**-0.5),
        )  # fmt: skip

    got, want = backward(**inputs)[3], jax.jit(truth(case))(inputs)["ddecay"]
    assert relative_errors("ddecay", got, want)[0] < 2e-6


@pytest.mark.parametrize(
    ("per_dim", "beta"),
    [
        (False, False),
        pytest.param(True, True, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
def test_the_strongest_decays_give_finite_values_and_gradients(per_dim, beta):
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((1, 130, 1, 16), np.float32)) for _ in range(3))
    decay = jnp.full((1, 130, 1, 16) if per_dim else (1, 130, 1), -20.0)
    beta = jnp.full((1, 130, 1), 0.5) if beta else None

    def attend(q, k, v, decay, beta):
        return linear_attention(q, k, v, decay=decay, beta=beta, return_state=True, implementation="xla")

    @jax.jit
    def run(*arguments):
        results, vjp = jax.vjp(attend, *arguments)
        return results, vjp(jax.tree.map(jnp.ones_like, results))

    results, gradients = run(q, k, v, decay, beta)
    assert all(np.isfinite(x).all() for x in jax.device_get(jax.tree.leaves((results, gradients))))
    # Nothing is left of a token at the next one: only its own value is read.
    itself = jnp.sum(q * k, axis=3, keepdims=True) * (1.0 if beta is None else beta[..., None])
    np.testing.assert_allclose(results[0], 0.25 * itself * v, rtol=1e-3, atol=1e-5)

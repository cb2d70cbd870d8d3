"""Maxima of blocks of logits, and tiles that a softmax threshold leaves out: by every implementation that has them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    Alibi,
    BlockSizes,
    SoftmaxCarry,
    blockwise_attention,
    blockwise_attention_forward,
    make_schedule,
)
from pallas_kernels.blockwise import api, reference, suite
from pallas_kernels.blockwise.options import Options
from pallas_kernels.mask import Causal, Full
from pallas_kernels.testing import H100, V5P, tracing_for

CASES = {case.name: case for case in suite.FAMILY.cases}
SIZES = {"rows": (1, 5), "warps": (16, 8), "all": (4096, 4096)}
slow = pytest.mark.slow


def attention(q, k, v, *, implementation, **options):
    return jax.jit(functools.partial(blockwise_attention_forward, implementation=implementation, **options))(q, k, v)


def brute_force(s_BNTS: np.ndarray, block_q: int, block_kv: int) -> np.ndarray:
    B, N, T, S = s_BNTS.shape
    want = np.full((B, N, -(-T // block_q), -(-S // block_kv)), -np.inf, np.float32)
    for i, j in np.ndindex(*want.shape[2:]):
        block = s_BNTS[:, :, i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
        want[:, :, i, j] = block.max(axis=(2, 3))
    return want


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    "sizes", [pytest.param(x, marks=() if name == "warps" else slow) for name, x in SIZES.items()], ids=SIZES
)
@pytest.mark.parametrize(
    "name",
    [
        "documents_window_gqa",
        pytest.param("soft_cap_empty_rows_gqa", marks=slow),
        pytest.param("cross", marks=slow),
        pytest.param("chosen_by_head_documents", marks=slow),
        pytest.param("per_head_gqa", marks=slow),
        pytest.param("learned_sinks_empty_rows", marks=slow),
        pytest.param("table", marks=slow),
    ],
)
def test_are_the_greatest_logits(name, sizes, implementation):
    case = CASES[name]
    inputs, arguments = case.inputs("float32"), case.arguments()
    q, k, v = (inputs[x] for x in "qkv")
    sizes = BlockSizes(block_q=sizes[0], block_kv=sizes[1])
    arguments |= {"sinks": inputs.get("sinks"), "implementation": implementation}
    out, lse, maxima = attention(q, k, v, block_maxima=sizes, **arguments)
    options = Options(
        mask=case.mask, scale=case.scale or case.head_dim**-0.5, logits_soft_cap=case.logits_soft_cap,
        block_sizes=None, deterministic=True,
    )  # fmt: skip
    logits, _ = jax.jit(functools.partial(reference._logits, options=options))(
        q, k, arguments["tokens"], schedule=arguments["schedule"], bias=None
    )
    fitted = sizes.fit(*logits.shape[2:])
    want = brute_force(np.asarray(logits), fitted.block_q, fitted.block_kv)
    np.testing.assert_array_equal(np.isneginf(maxima), np.isneginf(want))
    np.testing.assert_allclose(maxima, want, rtol=1e-5, atol=1e-5)
    for got, plain in zip((out, lse), attention(q, k, v, **arguments), strict=True):
        np.testing.assert_array_equal(got, plain)


@slow
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_are_of_logits_with_their_bias(implementation):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 70, 2, 16)), jnp.float32) for _ in range(3))
    sizes, bias = BlockSizes(block_q=32, block_kv=16), Alibi.geometric(2)
    _, maxima = blockwise_attention(
        q, k, v, mask=Causal(), bias=bias, block_maxima=sizes, implementation=implementation
    )
    logits = 0.25 * np.einsum("btnh,bsnh->bnts", q, k) + bias.dense(None, 70, 70)
    logits = np.where(np.tri(70, dtype=bool), logits, -np.inf)
    np.testing.assert_allclose(maxima, brute_force(logits, 32, 16), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("xla", marks=slow)])
def test_come_beside_a_carry_of_which_they_know_nothing(implementation):
    case = CASES["causal_T63"]
    q, k, v, *_ = case.inputs("float32").values()
    options = {"mask": Causal(), "block_maxima": BlockSizes(block_q=16, block_kv=16), "implementation": implementation}
    carry, maxima = attention(q, k, v, return_carry=True, **options)
    assert isinstance(carry, SoftmaxCarry)
    *_, again = attention(q, k, v, carry=carry, **options)
    np.testing.assert_array_equal(again, maxima)


def test_gradients_are_those_without_maxima_which_are_constants():
    case = CASES["gqa"]
    q, k, v, dout, _ = case.inputs("float32").values()
    sizes = BlockSizes(block_q=16, block_kv=16)

    def gradients(uses_maxima: bool):
        def loss(q, k, v):
            attend = functools.partial(blockwise_attention, q, k, v, mask=Causal(), implementation="reference")
            if not uses_maxima:
                return jnp.vdot(attend(), dout)
            out, maxima = attend(block_maxima=sizes)
            return jnp.vdot(out, dout) + jnp.sum(jnp.where(maxima == -jnp.inf, 0.0, maxima))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for got, want in zip(gradients(True), gradients(False), strict=True):
        np.testing.assert_array_equal(got, want)


# A softmax threshold.


def uneven(head_dim: int, q_len: int, kv_len: int, dtype="float32", num_heads: int = 2):
    """q, k and v whose blocks of 128 keys differ in how much all queries are drawn to them."""
    rng = np.random.default_rng(0)
    to = rng.standard_normal(head_dim)
    to *= head_dim**0.5 / np.linalg.norm(to)
    strengths = np.repeat(np.resize([3.0, 0.5, 4.5, 0.0, 1.0], -(-kv_len // 128)), 128)[:kv_len] / head_dim**0.5
    q = to + 0.3 * rng.standard_normal((2, q_len, num_heads, head_dim))
    k = strengths[:, None, None] * to + 0.3 * rng.standard_normal((2, kv_len, 1, head_dim))
    v = rng.standard_normal((2, kv_len, 1, head_dim))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


@slow
@pytest.mark.parametrize("threshold", [0.5, 0.05])
def test_xla_leaves_out_the_same_tiles_as_the_reference(threshold):
    q, k, v = uneven(16, 150, 640)
    options = {"block_sizes": BlockSizes(block_q=64, block_kv=128), "mask": Full()}
    skipping = options | {"skip_softmax_threshold": threshold}
    want = attention(q, k, v, implementation="reference", **skipping)
    got = attention(q, k, v, implementation="xla", **skipping)
    exact = attention(q, k, v, implementation="xla", **options)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    lost = 1 - np.exp(np.asarray(got[1] - exact[1]))
    assert 1e-3 < lost.max() <= threshold * 640 and lost.min() > -1e-5


@pytest.mark.parametrize("implementation", ["reference", pytest.param("xla", marks=slow)])
@pytest.mark.parametrize(
    "case",
    ["documents_window_gqa", *(pytest.param(x, marks=slow) for x in ("chosen_by_head_documents",
                                                                     "learned_sinks_empty_rows"))],
)  # fmt: skip
def test_error_is_bounded_by_the_threshold_times_the_number_of_keys(case, implementation):
    case = CASES[case]
    inputs, threshold = case.inputs("float32"), 0.3 / (case.kv_len or case.q_len)
    q, k, v = 12 * inputs["q"], inputs["k"], inputs["v"]
    options = case.arguments() | {"sinks": inputs.get("sinks"), "implementation": implementation}
    exact_out, exact_lse = attention(q, k, v, **options)
    if options["schedule"] is None:
        options["block_sizes"] = BlockSizes(block_q=2, block_kv=2)
    out, lse = attention(q, k, v, skip_softmax_threshold=threshold, **options)
    some = np.asarray(exact_lse) > -np.inf
    lost = 1 - np.exp(np.where(some, lse, 0.0) - np.where(some, exact_lse, 0.0))
    np.testing.assert_array_equal(np.isneginf(lse), ~some)
    assert lost.max() <= threshold * k.shape[1] and lost.min() > -1e-5
    error = np.abs(out - exact_out).max(axis=-1).swapaxes(1, 2)
    assert (error <= 2 * np.maximum(lost, 0) * np.abs(v).max() + 1e-5).all()


@pytest.mark.parametrize("implementation", ["reference", pytest.param("xla", marks=slow)])
def test_a_threshold_that_no_tile_is_below_changes_no_bit(implementation):
    q, k, v = uneven(16, 150, 640)
    options = {"mask": Causal(offset=500), "implementation": implementation}
    results = (attention(q, k, v, skip_softmax_threshold=x, **options) for x in (0.0, 1e-30))
    for got, want in zip(*results, strict=True):
        np.testing.assert_array_equal(got, want)


# Refusals.


def shapes(q_len=256, head_dim=128):
    return (jax.ShapeDtypeStruct((1, q_len, 2, head_dim), jnp.bfloat16),) * 3


ASKS = {
    "skip_softmax_threshold": {"skip_softmax_threshold": 1e-3},
    "block_maxima": {"block_maxima": BlockSizes(block_q=128, block_kv=128)},
}


@pytest.mark.parametrize(("name", "options"), ASKS.items(), ids=ASKS)
@pytest.mark.parametrize(("implementation", "device"), [("mosaic_gpu", H100), ("cudnn", H100), ("mosaic_tpu", V5P)])
def test_are_refused_where_there_are_none(implementation, device, name, options):
    attend = functools.partial(
        blockwise_attention_forward, mask=Causal(), implementation=implementation, **options
    )  # fmt: skip
    with tracing_for(device), pytest.raises(NotImplementedError, match=rf"{implementation}: .*\({name}\)"):
        jax.eval_shape(attend, *shapes())


def test_a_threshold_is_not_differentiated():
    q, k, v = uneven(16, 32, 32)
    attend = functools.partial(
        blockwise_attention, mask=Causal(), skip_softmax_threshold=1e-3, implementation="reference"
    )
    assert jnp.isfinite(attend(q, k, v)).all()
    with pytest.raises(NotImplementedError, match=r"skip_softmax_threshold=0.001 is differentiated.*pass 0"):
        jax.grad(lambda q: attend(q, k, v).sum())(q)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_thresholds_are_shares(threshold):
    with pytest.raises(ValueError, match=r"skip_softmax_threshold=.*wanted a share .* in \[0, 1\)"):
        blockwise_attention(*uneven(16, 32, 32), mask=Causal(), skip_softmax_threshold=threshold)


def test_block_maxima_are_asked_for_by_sizes():
    options = Options(mask=Causal(), scale=1.0, logits_soft_cap=None, block_sizes=None, deterministic=True)
    with pytest.raises(ValueError, match="block_maxima=128, wanted None or tokens of a block"):
        api._with_forward_options("op", options, 0.0, 128)


@slow
def test_parts_of_tiles_of_xla():
    """Parts of tiles, where neither divides the other."""
    q, k, v = uneven(16, 150, 640)
    blocks = BlockSizes(block_q=24, block_kv=40)
    schedule = make_schedule(Causal(), None, q_len=150, kv_len=640, block_sizes=BlockSizes(block_q=36, block_kv=100))
    options = {"mask": Causal(), "block_maxima": blocks}
    *_, got = attention(q, k, v, implementation="xla", schedule=schedule, **options)
    *_, want = attention(q, k, v, implementation="reference", **options)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

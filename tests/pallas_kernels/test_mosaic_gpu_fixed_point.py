"""dq in fixed point: no sum overflows, and what is added up in the interpreter is what float32 adds up to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockSizes, blockwise_attention
from pallas_kernels.blockwise import pallas_mosaic_gpu, reference
from pallas_kernels.blockwise.options import Options
from pallas_kernels.blockwise.pallas_mosaic_gpu_fixed_point import of_units, units_of
from pallas_kernels.mask import Causal, Prefix, Window
from pallas_kernels.mask_patterns import Table
from pallas_kernels.mosaic_gpu import interpreter
from pallas_kernels.sparse import BlockSelection
from pallas_kernels.testing import H100, tracing_for

T, S, N, K, D = 64, 384, 4, 2, 64


def drawn(kind: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, L, n, D)) for L, n in ((T, N), (S, K), (S, K), (T, N)))
    if kind == "outliers":
        k[:, ::37] *= 30
        v[:, ::41] *= 20
        k[..., 5] *= 100
    if kind == "aligned":  # each query attends to two keys alike, whose values are opposite and as dout is
        q, k = 0 * q, np.ones_like(k)
        v[:, 1::2], dout[:] = -v[:, :1], np.repeat(v[:, :1], N // K, axis=2)
        v[:, 2::2] = v[:, :1]
        k[:, 1::2] *= -1
    return dict(q=q, k=k, v=v, dout=dout)


@pytest.mark.parametrize("kind", ["normal", "outliers", "aligned"])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_no_sum_overflows(kind, rate):
    """The sum of what is added, without signs, of every element; where all is aligned it comes near the bound."""
    x = drawn(kind)
    k, v = (np.repeat(x[name], N // K, axis=2) for name in "kv")
    kept = np.random.default_rng(1).random((1, N, T, S)) >= rate
    logits = np.einsum("btnh,bsnh->bnts", x["q"], k) / 8
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    dp = np.einsum("btnh,bsnh->bnts", x["dout"], v) * kept / (1 - rate)
    delta = np.sum(p * dp, axis=-1)
    ds = p * (dp - delta[..., None])
    sums = np.einsum("bnts,bsnh->btnh", np.abs(ds), np.abs(k))
    units = np.asarray(
        units_of(*(jnp.float32(x[name]) for name in ("k", "v", "dout")), jnp.float32(delta), dropout_rate=rate)
    )
    in_units = sums / units.swapaxes(1, 2)[..., None]
    assert in_units.max() <= 2.0**31 * 7 / 8 * (1 + 1e-5)
    assert kind != "aligned" or in_units.max() >= 2.0**29


def test_what_is_not_a_number_stays_so():
    x = {name: jnp.float32(value) for name, value in drawn("normal").items()}
    delta, zeros = jnp.zeros((1, N, T)), jnp.zeros((1, T, N, D), jnp.int32)
    of_call = functools.partial(units_of, dropout_rate=0.0)
    dq = of_units(zeros, of_call(x["k"], x["v"].at[0, 3, 1].set(jnp.nan), x["dout"], delta))
    assert np.isnan(dq[:, :, 2:]).all() and not np.isnan(dq[:, :, :2]).any()
    dq = of_units(zeros, of_call(x["k"], x["v"], x["dout"].at[0, 5, 0].set(jnp.inf), delta))
    assert np.isnan(dq[:, 5, 0]).all() and np.isnan(dq).sum() == D
    # Nor does a cotangent of zeros become one.
    assert np.isfinite(1 / of_call(x["k"], x["v"], 0 * x["dout"], delta)).all()


@functools.cache
def gradients(deterministic: bool) -> tuple[np.ndarray, ...]:
    """Of a mask of scattered blocks in the interpreter, added to what is running."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(rng.standard_normal((1, S, n, D)), jnp.bfloat16) for n in (2, 1, 1, 2))
    blocks = np.array([[1, 0, 1], [1, 1, 0], [1, 0, 0]], bool)
    options = Options(
        mask=Table(blocks, block_q=128, block_kv=128), scale=0.125, logits_soft_cap=None, block_sizes=None,
        deterministic=deterministic,
    )  # fmt: skip
    call = {"tokens": None, "schedule": None, "options": options}
    out, lse = reference.forward(q, k, v, carry=None, return_carry=False, **call)
    running = tuple(jnp.full(x.shape, 0.125, jnp.float32) for x in (q, k, v))
    run = functools.partial(pallas_mosaic_gpu.backward, interpret=interpreter(), **call)
    dlse = jnp.asarray(rng.standard_normal(lse.shape), jnp.float32)
    return jax.device_get(jax.jit(run)(q, k, v, out, lse, dout, dlse, accumulate=running))


def test_sums_are_those_of_float32():
    dq, *others = gradients(True)
    want, *others_wanted = gradients(False)
    difference = np.sqrt(np.mean((dq - want) ** 2) / np.mean((want - 0.125) ** 2))
    assert 0 < difference < 1e-5
    for x, y in zip(others, others_wanted, strict=True):
        np.testing.assert_array_equal(x, y)


def sums_in_units(mask, *, one_in=None, head_dim=128, num_kv_heads=8, **options) -> bool:
    """Whether the backward pass of a call adds up int32."""
    length = 4096

    def loss(q, k, v):
        given = {"mask": mask, "implementation": "mosaic_gpu"} | options
        if one_in is not None:
            sizes = BlockSizes(block_q=128, block_kv=128)
            blocks = jnp.zeros((1, 8, length // 128, length // 128 // one_in), jnp.int32)
            selection = BlockSelection(blocks=blocks, q_len=length, kv_len=length, block_sizes=sizes)
            given["schedule"] = selection.schedule(mask=mask, block_sizes=sizes)
        return jnp.sum(blockwise_attention(q, k, v, **given).astype(jnp.float32))

    shapes = (jax.ShapeDtypeStruct((1, length, n, head_dim), "bfloat16") for n in (8, num_kv_heads, num_kv_heads))
    with tracing_for(H100):
        text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*shapes))
    assert text.count("mpmd_map[") == (2 if head_dim <= 128 else 4)  # kernels, in a jaxpr
    return f"i32[1,{length},8,{head_dim}]" in text


def test_which_calls_add_up_in_units():
    """Scattered blocks, where gradients are to be the same each time, and heads are narrow."""
    scattered = Table(np.random.default_rng(0).random((32, 32)) < 0.5, block_q=128, block_kv=128)
    assert sums_in_units(Causal(), one_in=4)
    assert sums_in_units(Causal(), one_in=4, head_dim=64, num_kv_heads=2)
    assert sums_in_units(scattered, logits_soft_cap=30.0)
    assert sums_in_units(Causal() & (Prefix(200) | Window(left=300)))
    assert not sums_in_units(Causal(), one_in=4, deterministic=False)
    assert not sums_in_units(Causal()) and not sums_in_units(Window(left=300, right=0))
    assert not sums_in_units(Causal(), one_in=4, head_dim=256)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_on_a_card_sums_are_those_of_float32(head_dim):
    """With all multiprocessors adding; the rest of what is rounded is the same in both."""
    heads, keys = (8, 4, 4, 8), jax.random.split(jax.random.key(0), 4)
    shapes = ((1, 4096, n, head_dim) for n in heads)
    q, k, v, dout = (jax.random.normal(*of, jnp.bfloat16) for of in zip(keys, shapes, strict=True))
    scattered = Table(np.random.default_rng(0).random((32, 32)) < 0.5, block_q=128, block_kv=128)

    def gradients(deterministic: bool):
        options = {"mask": scattered, "deterministic": deterministic, "implementation": "mosaic_gpu"}
        options["block_sizes"] = BlockSizes(block_q=128, block_kv=128)
        attend = functools.partial(blockwise_attention, **options)
        run = jax.jit(lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout))
        return [x.astype(np.float32) for x in jax.device_get(run(q, k, v, dout))]

    (dq, _, dv), (want, _, dv_wanted) = gradients(True), gradients(False)
    assert np.sqrt(np.mean((dq - want) ** 2) / np.mean(want**2)) < 5e-4
    np.testing.assert_array_equal(dv, dv_wanted)

"""The Hopper kernels of decays of each dim and of delta rules without a GPU: they lower for CUDA, compute what they
should in JAX's interpreter, and refuse. The interpreter does not know inline PTX, in whose place the kernels have the
same in JAX: what that PTX computes is in the conformance suite, on a card."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.linear import pallas_mosaic_gpu, pallas_mosaic_gpu_prepared, reference
from pallas_kernels.linear.api import (
    linear_attention,
    linear_attention_backward,
    linear_attention_forward,
    linear_attention_states,
)
from pallas_kernels.linear.options import Options
from pallas_kernels.mosaic_gpu import interpreter
from pallas_kernels.testing import H100, assert_close, tracing_for

NAMES = "dq", "dk", "dv", "ddecay", "dbeta", "dinitial_state"


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def shapes(dims: tuple[int, int], kind: str, beta: bool, *, length=333, num_heads=4, num_key_heads=2):
    """The operands of a call by name."""
    H, V = dims
    of_token = jax.ShapeDtypeStruct((2, length, num_heads), jnp.float32)
    decays = {
        "fixed": jax.ShapeDtypeStruct((num_heads,), jnp.float32),
        "scalar": of_token,
        "vector": jax.ShapeDtypeStruct((2, length, num_heads, H), jnp.float32),
    }
    q = jax.ShapeDtypeStruct((2, length, num_key_heads, H), jnp.bfloat16)
    operands = {"q": q, "k": q, "v": jax.ShapeDtypeStruct((2, length, num_heads, V), jnp.bfloat16)}
    operands |= {"decay": decays[kind]} if kind in decays else {}
    return operands | ({"beta": of_token} if beta else {})


@pytest.mark.parametrize(
    ("dims", "kind", "beta", "documents"),
    [
        ((64, 64), "vector", False, True),
        ((64, 64), "scalar", True, True),
        *(
            slow(dims, kind, beta, documents)
            for dims in ((64, 128), (128, 64), (128, 128))
            for kind, beta in (("vector", False), ("none", True), ("fixed", True), ("scalar", True))
            for documents in (False, True)
        ),
    ],
)
def test_lowers_for_cuda(dims, kind, beta, documents):
    """Forward: what tokens are to each other, the chain; backward: the chain again, the chain back, and the gradients.
    Where decays are of each dim, what tokens are to each other too, and either way a pass for states before parts."""
    operands = shapes(dims, kind, beta)
    segment_ids = jax.ShapeDtypeStruct((2, 333), jnp.int32) if documents else None

    def differentiate(operands, segment_ids, dout):
        out, vjp = jax.vjp(lambda operands: linear_attention(**operands, segment_ids=segment_ids), operands)
        return out, vjp(dout)[0]

    with tracing_for(H100), dispatch.record() as taken:
        traced = jax.jit(differentiate).trace(operands, segment_ids, operands["v"])
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert taken == [("linear_attention_forward", "mosaic_gpu"), ("linear_attention_backward", "mosaic_gpu")]
    assert text.count("mosaic_gpu_v2") == (5 if beta else 8)
    like = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert like(traced.out_info) == like((operands["v"], operands))


def case(dims, kind, beta, *, length, documents=False, strength=0.1, with_state=True):
    """Inputs, cotangents and the call, of 2 heads over one of keys."""
    (H, V), rng = dims, np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    q, k = normal(1, length, 1, H), normal(1, length, 1, H)
    if beta:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in (q, k, normal(1, length, 2, V), normal(1, length, 2, V)))
    shape = {"none": None, "fixed": (2,), "scalar": (1, length, 2), "vector": (1, length, 2, H)}[kind]
    decay = None
    if shape is not None:
        sizes = np.abs(normal(*shape)) * strength
        decay = jnp.asarray(-np.where(rng.random(shape) < 0.25, 0.01 * sizes, sizes), jnp.float32)
    segment_ids = None
    if documents:
        # Within a chunk, at a chunk's end, of one token, and padding.
        ids = np.searchsorted([40, 64, 65, 70, length - 10], np.arange(length), side="right")
        segment_ids = jnp.asarray(np.where(ids == 3, -1, ids)[None], jnp.int32)
    before, dstate = (jnp.asarray(normal(1, 2, H, V)) for _ in range(2))
    call = {
        "decay": decay,
        "beta": jnp.asarray(rng.random((1, length, 2), np.float32)) if beta else None,
        "initial_state": before if with_state else None,
        "segment_ids": segment_ids,
        "parts": None,
        "options": Options(scale=H**-0.5),
    }
    return arrays, dstate if with_state else None, call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dims", "kind", "beta", "options"),
    [
        ((64, 64), "vector", False, {"length": 130, "documents": True, "strength": 20.0}),
        ((64, 64), "vector", False, {"length": 64, "strength": 1e-3, "with_state": False}),
        ((128, 64), "vector", False, {"length": 100}),
        ((64, 64), "none", True, {"length": 130}),
        ((64, 128), "fixed", True, {"length": 65, "with_state": False}),
        ((64, 64), "scalar", True, {"length": 130, "documents": True}),
        ((128, 64), "scalar", True, {"length": 100, "strength": 20.0}),
        ((64, 64), "none", True, {"length": 130, "documents": True}),
        # Whole chunks of one document: what a chunk keeps is what its last token reads.
        ((64, 64), "scalar", True, {"length": 192}),
        ((64, 64), "fixed", True, {"length": 128, "with_state": False}),
    ],
)
def test_equals_reference_in_the_interpreter(dims, kind, beta, options):
    (q, k, v, dout), dstate, call = case(dims, kind, beta, **options)
    out, state, starts, among = pallas_mosaic_gpu.forward(q, k, v, **call, interpret=interpreter())
    precise = tuple(x.astype(jnp.float32) for x in (q, k, v, dout))
    want, want_state, *_ = reference.forward(*precise[:3], **call)
    assert_close("out", out, want, "bfloat16")
    assert_close("state", state, want_state, "bfloat16")
    gradients = pallas_mosaic_gpu.backward(
        q, k, v, dout, dstate, starts=starts, among=among, **call, interpret=interpreter()
    )
    wanted = reference.backward(*precise, dstate, starts=None, among=None, **call)
    for name, got, want in zip(NAMES, gradients, wanted, strict=True):
        assert (got is None) == (want is None), name
        if got is not None:
            assert_close(name, got, want, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dims", "options"),
    [
        ((64, 64), {"length": 300, "documents": True}),
        ((64, 128), {"length": 300, "documents": True}),
        ((128, 64), {"length": 300, "documents": True}),
        ((64, 64), {"length": 320}),
        ((64, 64), {"length": 320, "with_state": False}),
    ],
)
def test_parts_of_a_delta_rule_side_by_side_in_the_interpreter(dims, options, monkeypatch):
    """Two chunks each but the last: their maps, both ways, and the states before them."""
    monkeypatch.setattr(pallas_mosaic_gpu_prepared, "parts_of", lambda *_: (2, True))
    (q, k, v, dout), dstate, call = case(dims, "scalar", True, **options)
    out, state, starts, among = pallas_mosaic_gpu.forward(q, k, v, **call, interpret=interpreter())
    assert starts.shape[1] == 3
    precise = tuple(x.astype(jnp.float32) for x in (q, k, v, dout))
    want, want_state, *_ = reference.forward(*precise[:3], **call)
    assert_close("out", out, want, "bfloat16")
    assert_close("state", state, want_state, "bfloat16")
    gradients = pallas_mosaic_gpu.backward(
        q, k, v, dout, dstate, starts=starts, among=among, **call, interpret=interpreter()
    )
    wanted = reference.backward(*precise, dstate, starts=None, among=None, **call)
    for name, got, want in zip(NAMES, gradients, wanted, strict=True):
        assert_close(name, got, want, "bfloat16")


@pytest.mark.parametrize(
    ("shape", "of_part", "in_parts"),
    [((1, 32768, 16, 128), 128, True), ((2, 8192, 16, 128), 64, False), ((1, 32768, 1, 128), 43, True)],
)
def test_rows_of_few_heads_are_swept_in_parts(shape, of_part, in_parts):
    """On 132 multiprocessors one row of 16 heads in four parts, one of one head in twelve, two rows from end to end."""
    v = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    assert pallas_mosaic_gpu_prepared.parts_of(v, v, 132) == (of_part, in_parts)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_states_in_the_interpreter(reverse):
    (q, k, v, dout), _, call = case((64, 64), "vector", False, length=100, documents=True)
    call = {name: call[name] for name in ("decay", "segment_ids", "options")}
    function, operands = ("state_cotangents", (q, dout)) if reverse else ("states", (k, v))
    got = getattr(pallas_mosaic_gpu, function)(*operands, **call, interpret=interpreter())
    want = getattr(reference, function)(*(x.astype(jnp.float32) for x in operands), **call)
    assert_close("value", got.value, want.value, "bfloat16")
    assert_close("decay", got.decay, want.decay, "float16")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "beta"), [("vector", False), ("scalar", True)])
def test_no_race_between_copies_and_matmuls(kind, beta, capfd):
    (q, k, v, dout), dstate, call = case((64, 64), kind, beta, length=130, documents=True)
    call |= {"interpret": interpreter(detect_races=True)}
    out, _, starts, among = pallas_mosaic_gpu.forward(q, k, v, **call)
    gradients = pallas_mosaic_gpu.backward(q, k, v, dout, dstate, starts=starts, among=among, **call)
    jax.block_until_ready((out, gradients))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_states_of_decays_of_each_dim_lower_for_cuda():
    operands = shapes((64, 128), "vector", False)
    states = jax.jit(lambda k, v, decay: linear_attention_states(k, v, decay=decay, implementation="mosaic_gpu"))
    with tracing_for(H100):
        traced = states.trace(*(operands[name] for name in ("k", "v", "decay")))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1
    assert traced.out_info.value.shape == (2, 1, 4, 64, 128)
    assert traced.out_info.decay.shape == (2, 1, 4, 64)


@pytest.mark.parametrize("function", [linear_attention_forward, linear_attention_backward])
@pytest.mark.parametrize(
    ("message", "dims", "kind"),
    [
        ("it has no delta rule with a decay for each dim of the keys", (64, 64), "vector"),
        ("keys have head dim 256, it takes 64 and 128", (256, 128), "scalar"),
    ],
)
def test_refuses(function, message, dims, kind):
    operands = shapes(dims, kind, True)
    cotangents = {"dout": operands["v"], "dstate": None} if function is linear_attention_backward else {}
    call = functools.partial(function, implementation="mosaic_gpu")
    with tracing_for(H100), pytest.raises(NotImplementedError, match=re.escape(f"mosaic_gpu: {message}")):
        jax.eval_shape(lambda operands: call(**operands), operands | cotangents)

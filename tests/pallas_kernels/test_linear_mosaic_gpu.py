"""The Hopper kernel of linear attention without a GPU: it lowers for CUDA, computes what it should in JAX's
interpreter, and refuses. Its numbers on a card are in the conformance suite.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.linear import pallas_mosaic_gpu, reference
from pallas_kernels.linear.api import (
    linear_attention,
    linear_attention_backward,
    linear_attention_forward,
    linear_attention_state_cotangents,
    linear_attention_states,
)
from pallas_kernels.linear.options import Options
from pallas_kernels.linear.sweeps import part_chunks
from pallas_kernels.mosaic_gpu import interpreter
from pallas_kernels.testing import H100, assert_close, tracing_for

A100 = jax.sharding.AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="cuda")
LENGTHS = {1: 200, 2: 260}
"""Tokens, by number of parts: all but the last are whole intervals from snapshot to snapshot, and none may be empty."""
DIMS = [(64, 64), (64, 128), (128, 64), (128, 128)]
BOTH = [("linear_attention_forward", "mosaic_gpu"), ("linear_attention_backward", "mosaic_gpu")]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def shapes(head_dim: int, value_dim: int, kind: str, *, dtype="bfloat16", documents=False, length=1100):
    """q, v, decay and segment ids of a batch of 2, 4 heads over 2 of queries and keys."""
    decays = {
        "none": None,
        "fixed": jax.ShapeDtypeStruct((4,), jnp.float32),
        "scalar": jax.ShapeDtypeStruct((2, length, 4), jnp.float32),
        "vector": jax.ShapeDtypeStruct((2, length, 4, head_dim), jnp.float32),
    }
    q = jax.ShapeDtypeStruct((2, length, 2, head_dim), dtype)
    v = jax.ShapeDtypeStruct((2, length, 4, value_dim), dtype)
    return q, v, decays[kind], jax.ShapeDtypeStruct((2, length), jnp.int32) if documents else None


def like(x) -> tuple:
    return x.shape, x.dtype


@pytest.mark.parametrize(
    ("dims", "kind", "documents", "parts"),
    [
        (DIMS[0], "scalar", True, 2),
        slow(DIMS[3], "none", False, 1),
        *(slow(dims, kind, documents, 2) for dims in DIMS for kind in ("none", "fixed", "scalar")
          for documents in (False, True)),
    ],
)  # fmt: skip
def test_lowers_for_cuda(dims, kind, documents, parts, monkeypatch):
    """Forward and every gradient: the states of parts both ways, and four sweeps."""
    force_parts(monkeypatch, parts)
    q, v, decay, segment_ids = shapes(*dims, kind, documents=documents)

    def differentiate(q, k, v, decay, segment_ids, dout):
        attend = functools.partial(linear_attention, segment_ids=segment_ids)
        out, vjp = jax.vjp(lambda q, k, v, decay: attend(q, k, v, decay=decay), q, k, v, decay)
        return out, vjp(dout)

    with tracing_for(H100), dispatch.record() as taken:
        traced = jax.jit(differentiate).trace(q, q, v, decay, segment_ids, v)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert taken == BOTH
    assert text.count("mosaic_gpu_v2") == (4 if parts == 1 else 6)
    assert jax.tree.map(like, traced.out_info) == jax.tree.map(like, (v, (q, q, v, decay)))


def case(dims, kind, *, documents=False, length=200, batch_size=1, num_heads=2, num_key_heads=1, seed=0):
    """Inputs and cotangents, and what they should give."""
    (H, V), rng = dims, np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    q, k = (normal(batch_size, length, num_key_heads, H) for _ in range(2))
    v, dout = (normal(batch_size, length, num_heads, V) for _ in range(2))
    before, dstate = (jnp.asarray(rng.standard_normal((batch_size, num_heads, H, V)), jnp.float32) for _ in range(2))
    decay = {
        "none": None,
        "fixed": jnp.asarray(-0.1 * rng.random(num_heads), jnp.float32),
        "scalar": jnp.asarray(-0.1 * rng.random((batch_size, length, num_heads)), jnp.float32),
    }[kind]
    segment_ids = None
    if documents:
        # One within a chunk, padding, one that ends with a chunk, one over the boundary of two parts.
        ends = np.asarray([140, 150, 152, 192])
        ids = np.searchsorted(ends, np.arange(length), side="right")
        segment_ids = jnp.asarray(np.where(ids == 2, -1, ids)[None], jnp.int32)
    call = {
        "decay": decay, "beta": None, "initial_state": before, "segment_ids": segment_ids, "parts": None,
        "options": Options(scale=H**-0.5),
    }  # fmt: skip
    return (q, k, v), dout, dstate, call


def as_float32(arrays):
    return tuple(x.astype(jnp.float32) for x in arrays)


def force_parts(monkeypatch, parts: int) -> None:
    monkeypatch.setattr(pallas_mosaic_gpu, "num_parts", lambda *_, **__: parts)


INTERPRETED = [
    slow((64, 64), "scalar", True, 2),
    slow((128, 128), "none", False, 2),
    slow((64, 128), "fixed", True, 1),
    slow((128, 64), "scalar", False, 2),
    slow((128, 128), "scalar", True, 2),
    slow((128, 128), "fixed", False, 1),
]


@pytest.mark.parametrize(("dims", "kind", "documents", "parts"), INTERPRETED)
def test_equals_reference_in_the_interpreter(dims, kind, documents, parts, monkeypatch):
    force_parts(monkeypatch, parts)
    inputs, _, _, call = case(dims, kind, documents=documents, length=LENGTHS[parts])
    out, state, starts, _ = pallas_mosaic_gpu.forward(*inputs, **call, interpret=interpreter())
    want, want_state, *_ = reference.forward(*as_float32(inputs), **call)
    assert starts.shape[1] == parts
    assert_close("out", out, want, "bfloat16")
    assert_close("state", state, want_state, "bfloat16")


@pytest.mark.parametrize(("dims", "kind", "documents", "parts"), INTERPRETED)
def test_gradients_equal_the_reference_in_the_interpreter(dims, kind, documents, parts, monkeypatch):
    force_parts(monkeypatch, parts)
    inputs, dout, dstate, call = case(dims, kind, documents=documents, length=LENGTHS[parts])
    call |= {"starts": None, "among": None}
    gradients = pallas_mosaic_gpu.backward(*inputs, dout, dstate, **call, interpret=interpreter())
    want = reference.backward(*as_float32((*inputs, dout)), dstate, **call)
    for name, got, wanted in zip(("dq", "dk", "dv", "ddecay", "dbeta", "dinitial_state"), gradients, want, strict=True):
        assert (got is None) == (wanted is None), name
        if got is not None:
            # One decay for all tokens of a head: the terms of its gradient cancel.
            factor = 3.0 if name == "ddecay" and kind == "fixed" else 1.0
            assert_close(name, got, wanted, "bfloat16", factor=factor)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_states_of_parts_in_the_interpreter(reverse, monkeypatch):
    """Three heads, so that a block of threads has one for the two of which it has room."""
    force_parts(monkeypatch, 2)
    (q, k, v), dout, _, call = case((64, 64), "scalar", num_heads=3, num_key_heads=3, length=LENGTHS[2])
    call = {name: call[name] for name in ("decay", "segment_ids", "options")}
    function, operands = ("state_cotangents", (q, dout)) if reverse else ("states", (k, v))
    parts = getattr(pallas_mosaic_gpu, function)(*operands, **call, interpret=interpreter())
    chunk = pallas_mosaic_gpu.CHUNK
    boundary = chunk * part_chunks(-(-k.shape[1] // chunk), 2, pallas_mosaic_gpu.SNAPSHOT_CHUNKS)
    for part, tokens in enumerate((slice(0, boundary), slice(boundary, None))):
        of_part = call | {"decay": call["decay"][:, tokens]}
        want = getattr(reference, function)(*(x[:, tokens].astype(jnp.float32) for x in operands), **of_part)
        assert_close("value", parts.value[:, part], want.value[:, 0], "bfloat16")
        assert_close("decay", parts.decay[:, part], want.decay[:, 0], "float16")


@pytest.mark.parametrize("dims", [(64, 64), slow((128, 128))])
def test_no_race_between_copies_and_matmuls(dims, monkeypatch, capfd):
    """No buffer is filled before all that it held was read, and none is read before it is full; out is right."""
    force_parts(monkeypatch, 1)
    inputs, _, _, call = case(dims, "scalar", documents=True, num_heads=1)
    out, state, _, _ = pallas_mosaic_gpu.forward(*inputs, **call, interpret=interpreter(detect_races=True))
    jax.block_until_ready(out)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
    want, want_state, *_ = reference.forward(*as_float32(inputs), **call)
    assert_close("out", out, want, "bfloat16")
    assert_close("state", state, want_state, "bfloat16")


@pytest.mark.slow
def test_no_race_in_the_backward_pass(monkeypatch, capfd):
    force_parts(monkeypatch, 2)
    inputs, dout, dstate, call = case((128, 64), "scalar", documents=True, num_heads=1, length=LENGTHS[2])
    gradients = pallas_mosaic_gpu.backward(
        *inputs, dout, dstate, starts=None, among=None, **call, interpret=interpreter(detect_races=True)
    )
    jax.block_until_ready(gradients)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("num_blocks", [132, 264])
@pytest.mark.parametrize(
    ("batch_size", "num_heads", "length"), [(1, 16, 32768), (2, 16, 8192), (1, 16, 1 << 20), (8, 32, 2048), (1, 1, 1)]
)
def test_parts_fill_the_card_and_none_is_empty(batch_size, num_heads, length, num_blocks):
    parts = pallas_mosaic_gpu.num_parts(batch_size, num_heads, length, num_blocks=num_blocks)
    chunks = -(-length // pallas_mosaic_gpu.CHUNK)
    of_part = part_chunks(chunks, parts, pallas_mosaic_gpu.SNAPSHOT_CHUNKS)
    assert (parts - 1) * of_part < chunks <= parts * of_part
    items = batch_size * num_heads * parts
    if length > 1:
        assert items / (-(-items // num_blocks) * num_blocks) > 0.9


OPS = {
    "forward": lambda q, v, **options: linear_attention_forward(q, q, v, **options),
    "backward": lambda q, v, **options: linear_attention_backward(q, q, v, v, None, **options),
    "states": lambda q, v, **options: linear_attention_states(q, v, **options),
    "state_cotangents": lambda q, v, **options: linear_attention_state_cotangents(q, v, **options),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("message", "device", "changes"),
    [
        ("it needs an NVIDIA Hopper GPU (H100, H200)", A100, {}),
        ("v is float32, it takes bfloat16", H100, {"dtype": "float32"}),
        ("v is float16, it takes bfloat16: states of sums that do not decay overflow", H100, {"dtype": "float16"}),
        ("keys have head dim 96, it takes 64 and 128", H100, {"head_dim": 96}),
        ("values have head dim 256, it takes 64 and 128", H100, {"value_dim": 256}),
    ],
)
def test_refuses(op, message, device, changes):
    q, v, decay, _ = shapes(**{"head_dim": 64, "value_dim": 64, "kind": "scalar"} | changes)
    call = functools.partial(OPS[op], implementation="mosaic_gpu")
    with tracing_for(device), pytest.raises(NotImplementedError, match=re.escape(f"mosaic_gpu: {message}")):
        jax.eval_shape(lambda q, v, decay: call(q, v, decay=decay), q, v, decay)

"""cuDNN's implementation without a GPU: what it refuses and why, and that the rest lowers to the calls JAX makes.

Its numbers are in the conformance suite, on a GPU.
"""

import functools
import re
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import (
    Dropout,
    SoftmaxCarry,
    Tokens,
    blockwise_attention,
    blockwise_attention_backward,
    blockwise_attention_forward,
    dispatch,
)
from pallas_kernels.blockwise import cudnn, suite
from pallas_kernels.mask import Causal, Full, Prefix, SameDocument, Window


@pytest.fixture
def on_gpu(monkeypatch):
    for module in (dispatch, cudnn):
        monkeypatch.setattr(module, "current_platform", lambda: "gpu")


def qkv(q_len=128, kv_len=None, *, num_heads=4, num_kv_heads=2, head_dim=64, value_dim=None, dtype="bfloat16"):
    shapes = (
        (2, q_len, num_heads, head_dim),
        (2, kv_len or q_len, num_kv_heads, head_dim),
        (2, kv_len or q_len, num_kv_heads, value_dim or head_dim),
    )
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)


def attend(**options):
    options = {"mask": Causal(), "implementation": "cudnn", "deterministic": False} | options
    return lambda q, k, v: blockwise_attention(q, k, v, **options)


def gradient(**options):
    def run(q, k, v):
        results, vjp = jax.vjp(attend(**options), q, k, v)
        return results, *vjp(results)

    return run


IDS = jnp.zeros((1, 128), jnp.int32)

REFUSALS = {
    "q is float32, it takes bfloat16 and float16": (qkv(dtype="float32"), {}),
    "it has no soft cap of logits": (qkv(), {"logits_soft_cap": 30.0}),
    "values have head dim 32 and keys 64, it takes one head dim": (qkv(value_dim=32), {}),
    "head dim 36, it takes multiples of 8 up to 128": (qkv(head_dim=36), {}),
    "head dim 256, it takes multiples of 8 up to 128": (qkv(head_dim=256), {}),
    "T=62, it takes even lengths from 64": (qkv(62), {}),
    "S=129, it takes even lengths from 64": (qkv(128, 129), {"mask": Full()}),
    r"shapes \(2, 1048578, 16, 128\) .* its gradients are wrong beyond 2\^31 elements": (
        qkv(2**19 * 2 + 2, num_heads=16, head_dim=128),
        {},
    ),
    "T=128 and S=256, it takes causal attention of as many queries as keys": (qkv(128, 256), {}),
    "tokens carry positions, it takes tokens in order": (qkv(), {"tokens": Tokens.self_attention(IDS)}),
    "tokens carry segment ids: it would need a dense": (
        qkv(),
        {"mask": Causal() & SameDocument(), "tokens": Tokens.self_attention(None, IDS)},
    ),
    "offset=1.*: it takes full and causal attention": (qkv(), {"mask": Causal(offset=1)}),
    "right=5.*: it takes full and causal attention": (qkv(), {"mask": Window(left=10, right=5)}),
    "right=None.*: it takes full and causal attention": (qkv(), {"mask": Window(left=10)}),
    "length=9.*: it takes full and causal attention": (qkv(), {"mask": Causal() | Prefix(9)}),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_it_would_get_wrong_is_refused(reason, on_gpu):
    shapes, options = REFUSALS[reason]
    with pytest.raises(NotImplementedError, match=f"cudnn: .*{reason}"):
        jax.eval_shape(attend(**options), *shapes)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_refuses_all_that_the_conformance_suite_does_not_promise(dtype, on_gpu):
    serves = suite.SERVES["cudnn"]
    for case in suite.FAMILY.cases:
        for name in ("gradient in any order", "gradient", "gradient of lse"):
            promised = case.name in serves.cases and dtype in serves.dtypes and name in serves.ways
            run = functools.partial(jax.eval_shape, suite.WAYS[name].function(case, "cudnn"), case.inputs(dtype))
            with nullcontext() if promised else pytest.raises(NotImplementedError, match="^cudnn: "):
                run()


def test_it_is_refused_without_a_gpu():
    with pytest.raises(NotImplementedError, match="cudnn: it needs an NVIDIA GPU, the platform is cpu"):
        jax.eval_shape(attend(), *qkv())


def test_a_carry_is_refused(on_gpu):
    carry = jax.eval_shape(lambda: SoftmaxCarry.empty(batch_size=2, q_len=128, num_heads=4, value_dim=64))

    def forward(q, k, v, carry, return_carry):
        return blockwise_attention_forward(
            q, k, v, mask=Causal(), carry=carry, return_carry=return_carry, implementation="cudnn"
        )

    for arguments in ((carry, False), (None, True)):
        with pytest.raises(NotImplementedError, match="cudnn: it takes and returns no running softmax"):
            jax.eval_shape(lambda *x, arguments=arguments: forward(*x, *arguments), *qkv())


def test_sinks_and_dropout_are_refused(on_gpu):
    with pytest.raises(NotImplementedError, match=r"cudnn: it takes and returns no running softmax \(.*, sinks\)"):
        jax.eval_shape(attend(sinks=jnp.zeros(4)), *qkv())
    dropout = Dropout(rate=0.1, seeds=jnp.zeros((2, 4), jnp.uint32))
    with pytest.raises(NotImplementedError, match="cudnn: it draws dropout by where a pair lies in the arrays"):
        jax.eval_shape(attend(dropout=dropout), *qkv())
    with pytest.raises(NotImplementedError, match="cudnn: it draws dropout by where a pair lies in the arrays"):
        backward(dlse=False, dropout=dropout)


def backward(dlse, accumulate=None, **options):
    q, k, v = qkv()
    lse = jax.ShapeDtypeStruct((2, 4, 128), jnp.float32)

    def run(q, k, v, lse, dlse, accumulate):
        return blockwise_attention_backward(
            q, k, v, q, lse, q, dlse, accumulate=accumulate, implementation="cudnn",
            **{"mask": Causal(), "deterministic": False} | options,
        )  # fmt: skip

    return jax.eval_shape(run, q, k, v, lse, lse if dlse else None, accumulate)


def test_a_cotangent_of_lse_and_running_gradients_are_refused(on_gpu):
    with pytest.raises(NotImplementedError, match=r"cudnn: .* leaves out the cotangent of lse \(dlse\)"):
        backward(dlse=True)
    running = tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in qkv())
    with pytest.raises(NotImplementedError, match="cudnn: it adds into no running gradients"):
        backward(dlse=False, accumulate=running)
    assert [x.dtype for x in backward(dlse=False)] == [jnp.bfloat16] * 3


def test_gradients_that_must_come_out_the_same_each_time_are_refused(on_gpu):
    reason = r"cudnn: its dq is added up in no fixed order \(deterministic=True\); pass deterministic=False to allow"
    for options in ({}, {"deterministic": True}):
        attend_by_default = functools.partial(blockwise_attention, mask=Causal(), implementation="cudnn", **options)
        jax.eval_shape(attend_by_default, *qkv())
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(lambda *x, attend=attend_by_default: jax.vjp(attend, *x)[1](x[0]), *qkv())
    with pytest.raises(NotImplementedError, match=reason):
        backward(dlse=False, deterministic=True)
    with pytest.raises(NotImplementedError, match="length=9.*: it takes full and causal attention"):
        backward(dlse=False, deterministic=True, mask=Causal() | Prefix(9))
    with dispatch.record() as taken:
        jax.eval_shape(gradient(implementation=None, deterministic=True), *qkv())
    assert taken == [("blockwise_attention_forward", "cudnn"), ("blockwise_attention_backward", "xla")]


def test_an_lse_that_is_returned_takes_its_gradient_elsewhere(on_gpu):
    with dispatch.record() as taken:
        jax.eval_shape(gradient(implementation=None), *qkv())
    assert taken == [("blockwise_attention_forward", "cudnn"), ("blockwise_attention_backward", "cudnn")]
    with dispatch.record() as taken:
        jax.eval_shape(gradient(implementation=None, return_lse=True), *qkv())
    assert taken == [("blockwise_attention_forward", "cudnn"), ("blockwise_attention_backward", "xla")]
    with pytest.raises(NotImplementedError, match="leaves out the cotangent of lse"):
        jax.eval_shape(gradient(return_lse=True), *qkv())


def test_packed_documents_go_to_another_implementation(on_gpu):
    with dispatch.record() as taken:
        options = {"mask": Causal() & SameDocument(), "tokens": Tokens.self_attention(IDS, IDS)}
        jax.eval_shape(gradient(implementation=None, **options), *qkv())
    assert taken == [("blockwise_attention_forward", "xla"), ("blockwise_attention_backward", "xla")]


def custom_calls(function, shapes):
    """The calls of cuDNN in the program for CUDA, with their settings, names of values left out."""
    text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    return [re.sub(r"%\w+(:\d+|#\d+)?", "%", line.strip()) for line in text.splitlines() if "__cudnn$fmha" in line]


SAME_AS_JAX = {
    "causal": (Causal(), {"is_causal": True}, {}),
    "causal of one document": (Causal() & SameDocument(), {"is_causal": True}, {}),
    "full": (Full(), {}, {"kv_len": 192}),
    "window": (Causal() & Window(left=31), {"is_causal": True, "local_window_size": (31, 0)}, {}),
    "window alone": (Window(left=31, right=0), {"is_causal": True, "local_window_size": (31, 0)}, {}),
    "two windows": (Window(9, 5) & Window(31, 0), {"is_causal": True, "local_window_size": (9, 0)}, {}),
    "float16, head dim 128": (
        Causal(),
        {"is_causal": True, "scale": 128**-0.5},
        {"dtype": "float16", "head_dim": 128},
    ),
}


@pytest.mark.parametrize("name", SAME_AS_JAX)
def test_it_lowers_to_the_calls_that_jax_makes(name, on_gpu, monkeypatch):
    mask, jax_options, shape = SAME_AS_JAX[name]
    # JAX asks for cuDNN's version while tracing; there is none here.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91900)

    def peer(q, k, v):
        def attend(q, k, v):
            return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **jax_options)

        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(out)

    got = custom_calls(gradient(mask=mask), qkv(**shape))
    assert len(got) == 2
    assert got == custom_calls(peer, qkv(**shape))


def test_lse_keeps_its_precision(on_gpu):
    out, lse = jax.eval_shape(attend(return_lse=True), *qkv())
    assert (out.dtype, lse.dtype, lse.shape) == (jnp.bfloat16, jnp.float32, (2, 4, 128))


def test_a_jax_without_the_functions_is_a_refusal(on_gpu, monkeypatch):
    monkeypatch.delattr("jax._src.cudnn.fused_attention_stablehlo._dot_product_attention_fwd")
    with pytest.raises(NotImplementedError, match="this version of JAX has no _dot_product_attention_fwd"):
        jax.eval_shape(attend(), *qkv())

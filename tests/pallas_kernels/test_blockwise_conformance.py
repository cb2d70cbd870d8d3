"""Every implementation of the blockwise family, in every case, against the float32 reference.

The truth is the reference's forward and its derivative by JAX, with random cotangents of both out and lse; so the
hand-written backward of the reference is under test like any other.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import (
    SoftmaxCarry,
    Tokens,
    blockwise_attention,
    blockwise_attention_backward,
    blockwise_attention_forward,
    dispatch,
    merge_partials,
)
from pallas_kernels.blockwise import api, reference
from pallas_kernels.blockwise.cases import CASES
from pallas_kernels.blockwise.options import Options
from pallas_kernels.testing import assert_close

CASES_BY_NAME = {case.name: case for case in CASES}
IMPLEMENTATIONS = tuple(name for name in api.FORWARD if name != "cudnn")
GRADIENTS = ("dq", "dk", "dv")


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


def truth(case, inputs):
    """out, lse, dq, dk, dv in float32, the gradients by differentiating the reference's forward."""
    q, k, v, dout = (inputs[name].astype(jnp.float32) for name in ("q", "k", "v", "dout"))
    options = Options(
        mask=case.mask,
        scale=case.scale or case.head_dim**-0.5,
        logits_soft_cap=case.logits_soft_cap,
        block_sizes=None,
    )

    def attend(q, k, v):
        return reference.forward(
            q, k, v, tokens=case.tokens(), schedule=None, carry=None, return_carry=False, options=options
        )

    @jax.jit
    def run(q, k, v, cotangents):
        results, vjp = jax.vjp(attend, q, k, v)
        return *results, *vjp(cotangents)

    return dict(zip(("out", "lse", *GRADIENTS), run(q, k, v, (dout, inputs["dlse"])), strict=True))


def run_op(case, inputs, implementation):
    """The same five through the public op."""

    @jax.jit
    def run(q, k, v, cotangents):
        def attend(q, k, v):
            return blockwise_attention(q, k, v, implementation=implementation, return_lse=True, **case.arguments())

        results, vjp = jax.vjp(attend, q, k, v)
        return *results, *vjp(cotangents)

    cotangents = inputs["dout"], inputs["dlse"]
    results = run(inputs["q"], inputs["k"], inputs["v"], cotangents)
    return dict(zip(("out", "lse", *GRADIENTS), results, strict=True))


def assert_all_close(got, want, dtype):
    for name in want:
        assert_close(name, got[name], want[name], dtype)


def test_equals_reference(case, implementation):
    inputs = case.inputs("float32")
    with dispatch.record() as taken:
        got = run_op(case, inputs, implementation)
    assert ("blockwise_attention_forward", implementation) in taken
    assert ("blockwise_attention_backward", implementation) in taken
    assert_all_close(got, truth(case, inputs), "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["causal", "gqa", "documents", "empty_rows", "soft_cap"])
def test_equals_reference_in_low_precision(name, dtype):
    case = CASES_BY_NAME[name]
    inputs = case.inputs(dtype)
    got = run_op(case, inputs, "xla")
    assert got["out"].dtype == got["dq"].dtype == dtype and got["lse"].dtype == jnp.float32
    assert_all_close(got, truth(case, inputs), dtype)


CUDNN_CASES = {
    *("causal", "full", "causal_T1000", "window"),
    *("head_dim_64_gqa_scale", "head_dim_128_cross_mqa", "head_dim_128_window_gqa"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cudnn_equals_reference_or_refuses(case, dtype):
    inputs = case.inputs(dtype)

    def run(q, k, v, dout):
        attend = functools.partial(blockwise_attention, implementation="cudnn", **case.arguments())
        out, vjp = jax.vjp(attend, q, k, v)
        forward = blockwise_attention_forward(q, k, v, implementation="cudnn", **case.arguments())
        return out, forward[1], *vjp(dout)

    arguments = inputs["q"], inputs["k"], inputs["v"], inputs["dout"]
    if case.name not in CUDNN_CASES:
        with pytest.raises(NotImplementedError, match="cudnn: "):
            jax.eval_shape(run, *arguments)
        return
    got = dict(zip(("out", "lse", *GRADIENTS), jax.jit(run)(*arguments), strict=True))
    want = truth(case, inputs | {"dlse": jnp.zeros_like(inputs["dlse"])})
    # The products of a logit are exact in float32, so lse is nearer than the dtype of the inputs.
    assert_close("lse", got["lse"], want["lse"], "float16")
    assert_all_close(got, want, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [8, 40, 96])
def test_cudnn_takes_multiples_of_8(head_dim):
    case = dataclasses.replace(CASES_BY_NAME["head_dim_64_gqa_scale"], head_dim=head_dim)
    test_cudnn_equals_reference_or_refuses(case, "bfloat16")


@pytest.mark.gpu
def test_the_gradient_of_an_lse_is_taken_by_another_implementation():
    case = CASES_BY_NAME["head_dim_128_window_gqa"]
    inputs = case.inputs("bfloat16")
    with dispatch.record() as taken:
        got = run_op(case, inputs, None)
    assert taken == [("blockwise_attention_forward", "cudnn"), ("blockwise_attention_backward", "xla")]
    assert_all_close(got, truth(case, inputs), "bfloat16")


@pytest.mark.parametrize("name", ["causal", "gqa", "documents_window_gqa"])
def test_no_cotangent_of_lse_is_a_cotangent_of_zero(name, implementation):
    case = CASES_BY_NAME[name]
    inputs = case.inputs("float32")
    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
    options = case.arguments() | {"implementation": implementation}

    @jax.jit
    def run(dlse):
        out, lse = blockwise_attention_forward(q, k, v, **options)
        return blockwise_attention_backward(q, k, v, out, lse, dout, dlse, **options)

    @jax.jit
    def of_out_alone():
        return jax.vjp(functools.partial(blockwise_attention, **options), q, k, v)[1](dout)

    zero = jnp.zeros_like(inputs["dlse"])
    for got in (run(None), of_out_alone()):
        assert_all_close(
            dict(zip(GRADIENTS, got, strict=True)), dict(zip(GRADIENTS, run(zero), strict=True)), "float32"
        )


@pytest.mark.parametrize("name", ["causal", "cross", "documents", "empty_rows", "soft_cap_empty_rows_gqa", "striped"])
def test_hops_with_carry_and_accumulate_equal_one_call(name, implementation):
    """Keys taken in two parts, as a ring takes them: the carry goes forward, the gradients accumulate."""
    case = CASES_BY_NAME[name]
    inputs, arguments = case.inputs("float32"), case.arguments()
    tokens = arguments.pop("tokens")
    want = truth(case, inputs)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    kv_len = k.shape[1]

    @jax.jit
    def run():
        carry, gradients_kv = None, []
        parts = [slice(0, kv_len // 3), slice(kv_len // 3, kv_len)]
        for part in parts:
            carry = blockwise_attention_forward(
                q, k[:, part], v[:, part], tokens=keys_of(tokens, part, q.shape[1], kv_len), carry=carry,
                return_carry=True, implementation=implementation, **arguments,
            )  # fmt: skip
        out, lse = carry.finalize(q.dtype)
        dq = jnp.zeros(q.shape, jnp.float32)
        for part in parts:
            dq, dk, dv = blockwise_attention_backward(
                q, k[:, part], v[:, part], out, lse, inputs["dout"], inputs["dlse"],
                tokens=keys_of(tokens, part, q.shape[1], kv_len), implementation=implementation,
                accumulate=(dq, jnp.ones(k[:, part].shape), jnp.ones(v[:, part].shape)), **arguments,
            )  # fmt: skip
            gradients_kv.append((dk - 1, dv - 1))
        dk, dv = (jnp.concatenate(parts, axis=1) for parts in zip(*gradients_kv, strict=True))
        return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}

    assert_all_close(run(), want, "float32")


def keys_of(tokens, part, q_len, kv_len):
    """The tokens of all queries and of one part of the keys; positions are then data."""
    q = (tokens or Tokens()).queries(q_len)
    kv = (tokens or Tokens()).keys(kv_len)
    return Tokens(
        q_positions=q.positions,
        q_segment_ids=q.segment_ids,
        kv_positions=kv.positions[:, part],
        kv_segment_ids=kv.segment_ids[:, part],
    )


def test_merge_of_partials_equals_one_call():
    """The public op over two sets of keys, merged, differentiates to the gradients of one call: lse's cotangent."""
    case = CASES_BY_NAME["empty_rows"]
    inputs, arguments = case.inputs("float32"), case.arguments()
    arguments.pop("tokens")
    half = case.q_len // 2

    def attend(q, k, v):
        partials = [
            blockwise_attention(
                q, k[:, part], v[:, part], tokens=keys_of(None, part, case.q_len, case.q_len), return_lse=True,
                **arguments,
            )
            for part in (slice(0, half), slice(half, None))
        ]  # fmt: skip
        return merge_partials(*partials)

    @jax.jit
    def run(q, k, v, cotangents):
        results, vjp = jax.vjp(attend, q, k, v)
        return *results, *vjp(cotangents)

    results = run(inputs["q"], inputs["k"], inputs["v"], (inputs["dout"], inputs["dlse"]))
    got = dict(zip(("out", "lse", *GRADIENTS), results, strict=True))
    assert_all_close(got, truth(case, inputs), "float32")


def test_empty_carry_is_an_empty_row():
    out, lse = SoftmaxCarry.empty(batch_size=1, q_len=3, num_heads=2, value_dim=4).finalize(jnp.float32)
    assert not out.any() and (lse == -jnp.inf).all()


MUTATIONS = {
    "zero": jnp.zeros_like,
    "swapped_heads": lambda x: x[:, :, ::-1],
    "reversed_time": lambda x: x[:, ::-1],
    "one_percent_off": lambda x: 1.01 * x,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_a_wrong_gradient_fails(name, mutation):
    """The suite can fail: each mutated gradient is told apart from the true one."""
    case = CASES_BY_NAME["gqa"]
    want = truth(case, case.inputs("float32"))
    with pytest.raises(AssertionError, match=name):
        assert_close(name, MUTATIONS[mutation](want[name]), want[name], "float32")


@pytest.mark.parametrize("mutation", ["zero", "swapped_heads", "reversed_time"])
def test_a_wrong_gradient_fails_in_low_precision(mutation):
    case = CASES_BY_NAME["gqa"]
    want = truth(case, case.inputs("bfloat16"))
    for name in GRADIENTS:
        with pytest.raises(AssertionError, match=name):
            assert_close(name, MUTATIONS[mutation](want[name]), want[name], "bfloat16")

"""The contract of the linear ops beside their numbers: what they refuse and how, what they leave out, and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import (
    linear_attention,
    linear_attention_backward,
    linear_attention_forward,
    linear_attention_state_cotangents,
    linear_attention_states,
)
from pallas_kernels.linear import api, xla

B, T, N, K, H, V = 2, 8, 4, 2, 16, 24


def qkv(dtype="float32", **shapes):
    wanted = {"q": (B, T, K, H), "k": (B, T, K, H), "v": (B, T, N, V)} | shapes
    return tuple(jnp.zeros(wanted[name], dtype) for name in "qkv")


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


WRONG_CALLS = {
    r"q has shape \(2, 8, 16\), wanted \[batch, length, heads, head dim\]": (qkv(q=(B, T, H)), {}),
    "q is int32, wanted one of": (qkv(dtype="int32"), {}),
    r"v has shape \(2, 0, 4, 24\), wanted no dimension of 0": (qkv(v=(B, 0, N, V)), {}),
    "wanted q and k of one shape, and v of their B and T": (qkv(k=(B, T, K, 8)), {}),
    "4 value heads over 3 query and key heads, wanted a multiple": (qkv(q=(B, T, 3, H), k=(B, T, 3, H)), {}),
    r"decay is float32\[3\], wanted floats of shape \[N\], \[B, T, N\] or \[B, T, N, H\]: \[4\], \[2, 8, 4\], ": (
        qkv(),
        {"decay": zeros(3)},
    ),
    r"decay is int32\[4\], wanted floats": (qkv(), {"decay": zeros(N, dtype="int32")}),
    r"beta is float32\[2, 8\], wanted floats of shape \[B, T, N\]: \[2, 8, 4\]": (qkv(), {"beta": zeros(B, T)}),
    "normalize=True with beta: the weights of a delta rule do not add up to a normaliser; leave one out": (
        qkv(),
        {"beta": zeros(B, T, N), "normalize": True},
    ),
    r"initial_state is float32\[2, 4, 16, 16\], wanted float32\[2, 4, 16, 24\]": (
        qkv(),
        {"initial_state": zeros(B, N, H, H)},
    ),
    r"wanted float32\[2, 4, 16, 25\], the sums of the weights in its last column": (
        qkv(),
        {"initial_state": zeros(B, N, H, V), "normalize": True},
    ),
    r"segment_ids is float32\[2, 8\], wanted int32 \[2, 8\] or \[1, 8\]; cast with .astype\('int32'\)": (
        qkv(),
        {"segment_ids": zeros(B, T)},
    ),
    "scale=0.0, wanted a finite number that is not 0; for an output of 0 leave the call out": (qkv(), {"scale": 0.0}),
    "scale=inf, wanted a finite number": (qkv(), {"scale": float("inf")}),
    "bidirectional=True takes no beta, initial_state or return_state, which belong to one direction; leave them out": (
        qkv(),
        {"bidirectional": True, "return_state": True},
    ),
    "implementation='triton', wanted None or one of": (qkv(), {"implementation": "triton"}),
}


def unchecked(op):
    """The op without the shape annotations' check, which only tests have and which would catch some of these first."""
    return getattr(op, "__wrapped__", op)


@pytest.mark.parametrize("message", WRONG_CALLS)
def test_wrong_calls_are_refused(message):
    arrays, arguments = WRONG_CALLS[message]
    with pytest.raises(ValueError, match=f"linear_attention: .*{message}|{message}"):
        unchecked(linear_attention)(*arrays, **arguments)


def test_mixed_dtypes_are_refused():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="q, k, v are float32, bfloat16, float32, wanted one dtype; cast two of them"):
        linear_attention(q, k.astype(jnp.bfloat16), v)


def test_each_op_names_itself():
    q, k, v = qkv()
    wrong = {"decay": zeros(3)}
    calls = {
        "linear_attention_forward": lambda op: op(q, k, v, **wrong),
        "linear_attention_backward": lambda op: op(q, k, v, v, None, **wrong),
        "linear_attention_states": lambda op: op(k, v, **wrong),
        "linear_attention_state_cotangents": lambda op: op(q, v, **wrong),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name}: decay is float32"):
            call(unchecked(getattr(pallas_kernels, name)))


def test_an_implementation_that_is_not_there_is_refused():
    with pytest.raises(NotImplementedError, match="there is no 'cudnn' implementation; there are"):
        linear_attention(*qkv(), implementation="cudnn")


@pytest.fixture
def told(monkeypatch):
    """What each backward pass was asked for."""
    calls = []

    def backward(q, k, v, dout, dstate, *, options, **arguments):
        calls.append({"decay_gradient": options.decay_gradient, "dstate": dstate is not None})
        return xla.backward(q, k, v, dout, dstate, options=options, **arguments)

    monkeypatch.setitem(api.BACKWARD, "xla", backward)
    return calls


@pytest.mark.parametrize("use_state", [False, True])
@pytest.mark.parametrize("differentiate_decay", [False, True])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"])
def test_the_backward_pass_is_asked_only_for_what_is_used(wrap, differentiate_decay, use_state, told):
    decay = jnp.full(N, -0.1)

    def loss(v, decay):
        out, state = linear_attention(*qkv()[:2], v, decay=decay, return_state=True, implementation="xla")
        return jnp.sum(out) + (jnp.sum(state) if use_state else 0.0)

    if differentiate_decay:
        gradients = jax.eval_shape(jax.grad(wrap(loss), argnums=(0, 1)), qkv()[2], decay)
        assert gradients[1].shape == (N,)
    else:
        jax.eval_shape(jax.grad(lambda v: wrap(loss)(v, decay)), qkv()[2])
    assert told == [{"decay_gradient": differentiate_decay, "dstate": use_state}]


def test_nothing_but_the_state_may_be_used(told):
    q, k, v = qkv()
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(linear_attention(q, k + 1, v, return_state=True)[1])))(v)
    assert told == [{"decay_gradient": False, "dstate": True}]
    np.testing.assert_allclose(gradient, H)


@pytest.mark.parametrize("decay_gradient", [False, True])
def test_a_constant_decay_keeps_no_snapshots(decay_gradient):
    """The states after each chunk are there only for the gradient of the decay."""
    length, num_chunks = 448, 7
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def backward(q, dout, decay):
        return linear_attention_backward(
            q, q, q, dout, None, decay=decay, decay_gradient=decay_gradient, implementation="xla"
        )

    lowered = jax.jit(backward).lower(x, x, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert (f"tensor<{num_chunks}x1x2x16x16xf32>" in lowered.as_text()) == decay_gradient
    assert (lowered.out_info.ddecay is not None) == decay_gradient


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("beta", [False, True])
def test_the_gradient_of_a_decay_can_be_left_out(implementation, beta):
    call = {"decay": zeros(B, T, N, H), "beta": zeros(B, T, N) if beta else None, "decay_gradient": False}
    q, k, v = qkv()
    gradients = jax.eval_shape(
        lambda: linear_attention_backward(q, k, v, v, None, implementation=implementation, **call)
    )
    assert gradients.ddecay is None and gradients.dq.shape == q.shape and (gradients.dbeta is not None) == beta


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_gradients_of_gates_have_the_dtypes_of_the_contract(implementation):
    """float32 by the backward pass itself, the gate's own by differentiation."""
    q, k, v = qkv()
    gates = {"decay": zeros(B, T, N, dtype="bfloat16"), "beta": zeros(B, T, N, dtype="bfloat16")}
    gradients = jax.eval_shape(
        lambda: linear_attention_backward(q, k, v, v, None, implementation=implementation, **gates)
    )
    assert gradients.ddecay.dtype == gradients.dbeta.dtype == jnp.float32
    differentiated = jax.eval_shape(
        jax.grad(lambda gates: jnp.sum(linear_attention(q, k, v, implementation=implementation, **gates))), gates
    )
    assert {x.dtype for x in differentiated.values()} == {jnp.dtype("bfloat16")}


def test_states_of_decays_for_each_dim_decay_for_each_dim():
    q, k, v = qkv()
    decay = jnp.full((B, T, N, H), -0.5)
    for op, x in ((linear_attention_states, k), (linear_attention_state_cotangents, q)):
        state = jax.eval_shape(lambda op=op, x=x: op(x, v, decay=decay, implementation="xla"))
        assert state.value.shape == (B, 1, N, H, V) and state.decay.shape == (B, 1, N, H)


def test_maps_of_the_delta_rule_are_matrices_and_want_the_keys():
    q, k, v = qkv()
    beta = jnp.full((B, T, N), 0.5)
    states = jax.eval_shape(lambda: linear_attention_states(k, v, beta=beta))
    cotangents = jax.eval_shape(lambda: linear_attention_state_cotangents(q, v, k=k, beta=beta))
    for maps in (states, cotangents):
        assert maps.value.shape == (B, 1, N, H, V) and maps.decay.shape == (B, 1, N, H, H)
        assert maps.value.dtype == maps.decay.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"got beta without k, wanted the keys by which the delta rule erases; pass k"):
        linear_attention_state_cotangents(q, v, beta=beta)


def compiled_backward(length: int, decay: bool):
    """Forward and backward of one kind at this length, compiled: a decay for each token by sweeps, or the delta rule
    with a decay for each dim by the scan."""

    def loss(q, k, v, decay, beta):
        return jnp.sum(linear_attention(q, k, v, decay=decay, beta=beta, implementation="xla") * v)

    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    beta = jax.ShapeDtypeStruct((1, length, 2), jnp.float32)
    arguments = (x, x, x, beta, None) if decay else (x, x, x, x, beta)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*arguments).compile()


@pytest.mark.parametrize("decay", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["sweep", "scan"])
def test_memory_is_linear_in_length(decay):
    short, long = (compiled_backward(length, decay) for length in (4096, 8192))
    used = [program.memory_analysis().temp_size_in_bytes for program in (short, long)]
    assert 1.5 * used[0] < used[1] < 2.2 * used[0]
    assert used[1] < 8192 * 8192, "there is room for a [T, T] array"
    assert "8192,8192" not in long.as_text()


def test_a_row_is_read_after_padding_as_without_it():
    """Padding before a document neither writes nor decays, and what it holds does not matter."""
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((1, 12, 2, 4)), jnp.float32) for _ in range(3))
    ids = jnp.asarray([[-1] * 5 + [3] * 7], jnp.int32)
    decay = -jnp.abs(q[..., 0])

    @jax.jit
    def forward(q, k, v, decay, segment_ids=None):
        call = {"decay": decay, "segment_ids": segment_ids, "implementation": "xla"}
        return linear_attention_forward(q, k, v, **call)[:2]

    out, state = forward(q, k, v, decay, ids)
    want, want_state = forward(q[:, 5:], k[:, 5:], v[:, 5:], decay[:, 5:])
    assert not out[:, :5].any()
    np.testing.assert_allclose(out[:, 5:], want, atol=1e-5)
    np.testing.assert_allclose(state, want_state, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_sums_of_weights_may_leave_the_range_of_float16(implementation):
    """4,096 x 64 of them at the last of 1,024 tokens; what they are divided to is 1."""
    q = jnp.full((1, 1024, 1, 64), 2.0, jnp.float16)
    v = jnp.ones((1, 1024, 1, 64), jnp.float16)
    out, state = linear_attention(
        q, q, v, scale=1.0, normalize=True, return_state=True, implementation=implementation
    )  # fmt: skip
    assert out.dtype == jnp.float16 and state.dtype == jnp.float32
    np.testing.assert_array_equal(out, v)
    gradient = jax.grad(
        lambda v: jnp.sum(
            linear_attention(q, q, v, scale=1.0, normalize=True, implementation=implementation)[:, -1].astype("float32")
        )
    )(v)
    np.testing.assert_allclose(gradient, 1 / 1024, rtol=1e-3)

"""The contract of the ops beside their numbers: what they refuse and how, how much memory they take."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    Alibi,
    BlockSizes,
    SoftmaxCarry,
    Tokens,
    blockwise_attention,
    blockwise_attention_backward,
    blockwise_attention_forward,
    make_schedule,
)
from pallas_kernels.blockwise import api, xla
from pallas_kernels.mask import Causal, Full, PerHead, SameDocument, Window


def qkv(q=(1, 8, 4, 16), k=(1, 8, 2, 16), v=None, dtype="float32"):
    return tuple(jnp.zeros(shape, dtype) for shape in (q, k, v or k))


CAUSAL_8 = make_schedule(Causal(), q_len=8, kv_len=8, block_sizes=BlockSizes(block_q=4, block_kv=4))

WRONG_CALLS = {
    "q has shape \\(1, 8, 16\\), wanted \\[batch, length, heads, head dim\\]": (qkv(q=(1, 8, 16)), {}),
    "q is int32, wanted one of": (qkv(dtype="int32"), {}),
    "k has shape \\(1, 0, 2, 16\\), wanted no dimension of 0": (qkv(k=(1, 0, 2, 16)), {}),
    "head dim of q is 16 and of k 8, wanted the same": (qkv(k=(1, 8, 2, 8)), {}),
    "k and v of one S and K": (qkv(v=(1, 9, 2, 16)), {}),
    "4 query heads over 3 kv heads, wanted a multiple": (qkv(k=(1, 8, 3, 16)), {}),
    "mask='causal', wanted a Mask": (qkv(), {"mask": "causal"}),
    "it differs between 3 groups of heads, got 4 query heads, wanted a multiple": (
        qkv(),
        {"mask": PerHead((Causal(), Full(), Full()))},
    ),
    "logits_soft_cap=-1.0, wanted None or a finite number > 0": (qkv(), {"logits_soft_cap": -1.0}),
    "tokens.q_segment_ids has shape \\(1, 7\\), wanted \\(1, 8\\)": (
        qkv(),
        {"tokens": Tokens(q_segment_ids=jnp.zeros((1, 7), jnp.int32))},
    ),
    "tokens.kv_positions is float32, wanted int32": (qkv(), {"tokens": Tokens(kv_positions=jnp.zeros((1, 8)))}),
    "the schedule was built from Causal\\(offset=0\\), the call's mask is Full": (
        qkv(),
        {"mask": Full(), "schedule": CAUSAL_8},
    ),
    "the schedule was built for T=8, S=8, the call has T=9, S=8": (qkv(q=(1, 9, 4, 16)), {"schedule": CAUSAL_8}),
    "the schedule has BlockSizes\\(block_q=4, block_kv=4\\); pass one of the two": (
        qkv(),
        {"schedule": CAUSAL_8, "block_sizes": BlockSizes(block_q=8, block_kv=8)},
    ),
    "implementation='triton', wanted None or one of": (qkv(), {"implementation": "triton"}),
}


def unchecked(op):
    """The op without the shape annotations' check, which only tests have and which would catch some of these first."""
    return getattr(op, "__wrapped__", op)


@pytest.mark.parametrize("message", WRONG_CALLS)
def test_wrong_calls_are_refused(message):
    (q, k, v), arguments = WRONG_CALLS[message]
    with pytest.raises(ValueError, match=message):
        unchecked(blockwise_attention)(q, k, v, **{"mask": Causal()} | arguments)


def test_mixed_dtypes_are_refused():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="q, k, v are float32, bfloat16, float32, wanted one dtype"):
        blockwise_attention(q, k.astype(jnp.bfloat16), v, mask=Causal())


@pytest.mark.parametrize("op", [blockwise_attention, blockwise_attention_forward, blockwise_attention_backward])
@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (jnp.zeros((4, 8, 8)), "wanted None or a Bias, such as Alibi.geometric"),
        (Alibi.geometric(2), r"bias.slopes is float32\[2\], wanted floats \[4, ...\], of each query head"),
        (Alibi(slopes=np.ones(4, np.int32)), "bias.slopes is int32"),
        (Alibi(slopes=[0.1] * 4), r"bias.slopes\[0\] is 0.1, wanted an array of floats \[4, ...\]; make it with jnp"),
        (Alibi(slopes=None), "bias.slopes is None, wanted an array"),
    ],
)
def test_wrong_biases_are_refused(op, bias, message):
    q, k, v = qkv()
    rest = (q, jnp.zeros((1, 4, 8)), q, jnp.zeros((1, 4, 8))) if op is blockwise_attention_backward else ()
    with pytest.raises(ValueError, match=message):
        unchecked(op)(q, k, v, *rest, mask=Causal(), bias=bias)


def test_a_gradient_of_no_bias_is_refused():
    q, k, v = qkv()
    rows = jnp.zeros((1, 4, 8))
    with pytest.raises(ValueError, match="got bias_gradient=True and no bias, wanted one"):
        blockwise_attention_backward(q, k, v, q, rows, q, rows, mask=Causal(), bias_gradient=True)


def test_a_carry_of_the_wrong_shape_is_refused():
    q, k, v = qkv()
    carry = SoftmaxCarry.empty(batch_size=1, q_len=8, num_heads=2, value_dim=16)
    with pytest.raises(ValueError, match=r"carry.max is float32\[1, 2, 8\], wanted float32\[1, 4, 8\]"):
        blockwise_attention_forward(q, k, v, mask=Causal(), carry=carry)


def test_an_accumulator_of_the_wrong_dtype_is_refused():
    q, k, v = qkv(dtype="bfloat16")
    rows = jnp.zeros((1, 4, 8))
    with pytest.raises(ValueError, match="accumulate's dq is bfloat16"):
        unchecked(blockwise_attention_backward)(q, k, v, q, rows, q, rows, mask=Causal(), accumulate=(q, k, v))


@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"deterministic": False}])
def test_both_gradients_are_told_whether_they_must_come_out_the_same(options, monkeypatch):
    told = []

    def backward(*args, options, **kwargs):
        told.append(options.deterministic)
        return xla.backward(*args, options=options, **kwargs)

    monkeypatch.setitem(api.BACKWARD, "xla", backward)
    q, k, v = qkv(k=(1, 8, 4, 16))
    rows = jnp.zeros((1, 4, 8))

    def both(q, k, v):
        arguments = {"mask": Causal(), "implementation": "xla"} | options
        _, vjp = jax.vjp(lambda *x: blockwise_attention(*x, **arguments), q, k, v)
        return vjp(q), blockwise_attention_backward(q, k, v, q, rows, q, None, **arguments)

    jax.eval_shape(both, q, k, v)
    assert told == [options.get("deterministic", True)] * 2


def compiled(length: int, mask=None, tokens=None):
    """Forward and backward at this length, compiled."""

    def loss(q, k, v):
        out = blockwise_attention(
            q, k, v, mask=mask or Causal(), tokens=tokens, block_sizes=BlockSizes(block_q=128, block_kv=128)
        )
        return jnp.sum(out * q)

    x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()


def test_memory_is_linear_in_length():
    short, long = compiled(4096), compiled(16384)
    used = [program.memory_analysis().temp_size_in_bytes for program in (short, long)]
    assert used[1] < 4.5 * used[0]
    assert used[1] < 16384 * 16384, "there is room for a [T, S] array"
    assert "16384,16384" not in long.as_text()


def test_kv_heads_are_never_expanded():
    """Beside q and out no array of the program has the size of keys for every query head."""

    def attend(q, k, v):
        return blockwise_attention(q, k, v, mask=Causal(), block_sizes=BlockSizes(block_q=64, block_kv=64))

    q = jax.ShapeDtypeStruct((1, 64, 16, 8), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, 8192, 2, 8), jnp.float32)
    memory = jax.jit(attend).lower(q, kv, kv).compile().memory_analysis()
    expanded = 8192 * 16 * 8 * 4
    assert memory.temp_size_in_bytes < expanded


def test_work_follows_the_schedule():
    """Blocks outside the window are not visited: poisoned keys there do no harm."""
    length, window = 512, 32
    key = jax.random.key(0)
    q, k, v = (jax.random.normal(key, (1, length, 1, 8)) for key in jax.random.split(key, 3))
    arguments = {"mask": Causal() & Window(left=window - 1), "block_sizes": BlockSizes(block_q=32, block_kv=32)}
    clean = blockwise_attention(q, k, v, **arguments)
    # nan times the zero probability of a masked pair would still be nan.
    poisoned = blockwise_attention(q, k.at[:, :256].set(jnp.nan), v.at[:, :256].set(jnp.nan), **arguments)
    assert jnp.array_equal(clean[:, 320:], poisoned[:, 320:])
    assert jnp.isnan(poisoned[:, :256]).all()


def test_one_schedule_serves_many_calls_under_jit():
    key = jax.random.key(1)
    q, k, v = (jax.random.normal(key, (2, 48, 2, 8)) for key in jax.random.split(key, 3))
    segments = jnp.repeat(jnp.arange(4, dtype=jnp.int32), 12)[None]
    tokens, mask = Tokens.self_attention(None, segments), Causal() & SameDocument()

    @jax.jit
    def twice(q, k, v, tokens):
        sizes = BlockSizes(block_q=16, block_kv=16)
        schedule = make_schedule(mask, tokens, q_len=48, kv_len=48, block_sizes=sizes)
        once = blockwise_attention(q, k, v, mask=mask, tokens=tokens, schedule=schedule)
        return blockwise_attention(once, k, v, mask=mask, tokens=tokens, schedule=schedule)

    want = blockwise_attention(q, k, v, mask=mask, tokens=tokens, implementation="reference")
    want = blockwise_attention(want, k, v, mask=mask, tokens=tokens, implementation="reference")
    assert jnp.allclose(twice(q, k, v, tokens), want, atol=1e-5)


@pytest.mark.slow
def test_vmap_adds_a_batch():
    key = jax.random.key(2)
    q, k, v = (jax.random.normal(key, (3, 2, 40, 2, 8)) for key in jax.random.split(key, 3))

    def attend(q, k, v):
        return blockwise_attention(q, k, v, mask=Causal(), block_sizes=BlockSizes(block_q=16, block_kv=16))

    want = jnp.stack([attend(*x) for x in zip(q, k, v, strict=True)])
    assert jnp.allclose(jax.vmap(attend)(q, k, v), want, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"logits_soft_cap": float("inf")}, "logits_soft_cap=inf, wanted None or a finite number > 0"),
        ({"scale": float("nan")}, "scale=nan, wanted a finite number"),
        ({"tokens": {}}, "tokens={}, wanted None or a Tokens"),
        ({"schedule": 5}, "schedule=5, wanted None or a Schedule"),
        ({"block_sizes": (4, 4)}, r"block_sizes=\(4, 4\), wanted None or a BlockSizes"),
    ],
)
def test_options_of_another_kind_are_refused(option, message):
    x = jnp.ones((1, 8, 2, 4))
    without_type_checks = inspect.unwrap(blockwise_attention)
    with pytest.raises(ValueError, match=f"blockwise_attention: {message}"):
        without_type_checks(x, x, x, mask=Causal(), **option)

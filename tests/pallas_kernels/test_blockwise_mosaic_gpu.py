"""The Hopper kernels without a GPU: they lower for CUDA, compute what they should in JAX's interpreter, and refuse.

Their numbers on a card are in the conformance suite.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    BlockSizes,
    Dropout,
    SoftmaxCarry,
    Tokens,
    blockwise_attention,
    blockwise_attention_backward,
    blockwise_attention_forward,
    dispatch,
    make_schedule,
)
from pallas_kernels.blockwise import (
    pallas_mosaic_gpu,
    pallas_mosaic_gpu_decode,
    pallas_mosaic_gpu_turns,
    reference,
    suite,
)
from pallas_kernels.blockwise.cases import KERNEL_CASES
from pallas_kernels.blockwise.options import Options
from pallas_kernels.mask import Causal, SameDocument, Window
from pallas_kernels.mask_patterns import Predicate, Table
from pallas_kernels.mosaic_gpu import interpreter
from pallas_kernels.sparse import BlockSelection
from pallas_kernels.sparse.choose import lists_of
from pallas_kernels.testing import H100, assert_close, packed_tokens, tracing_for

A100 = jax.sharding.AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="cuda")
SERVED = [case for case in KERNEL_CASES if case.name in suite.SERVES["mosaic_gpu"].cases]
WITH_SINKS = [case for case in SERVED if case.sinks]
CASES_BY_NAME = {case.name: case for case in KERNEL_CASES}


def lowered(function, *arguments):
    """What it returns (shapes), and its text for CUDA."""
    traced = jax.jit(function).trace(*arguments)
    return traced.out_info, traced.lower(lowering_platforms=("cuda",)).as_text()


BOTH = [("blockwise_attention_forward", "mosaic_gpu"), ("blockwise_attention_backward", "mosaic_gpu")]


def some_slow(cases, quick) -> list:
    """The cases, all but the quick ones marked slow: on a card the conformance suite runs them all."""
    return [pytest.param(case, marks=() if case in quick else pytest.mark.slow) for case in cases]


LOWERED_QUICK = [
    CASES_BY_NAME[name]
    for name in ("bias_kerple_log_sinks_dropout_D128", "chosen_by_head_D128", "gqa_D128", "decode_sinks_window_D64")
]


@pytest.mark.parametrize("case", some_slow(SERVED, LOWERED_QUICK), ids=lambda case: case.name)
def test_lowers_for_cuda(case):
    """Out and lse, and their gradients."""
    inputs, arguments = case.inputs("bfloat16"), case.arguments()

    def differentiate(inputs):
        def attend(q, k, v, bias):
            return blockwise_attention(q, k, v, bias=bias, sinks=inputs.get("sinks"), return_lse=True, **arguments)

        operands = *(inputs[name] for name in "qkv"), inputs.get("bias")
        return jax.vjp(attend, *operands)[1]((inputs["dout"], inputs["dlse"]))

    with tracing_for(H100), dispatch.record() as taken:
        gradients, text = lowered(differentiate, inputs)
    assert taken == BOTH
    # Few queries have two kernels for the forward pass, wide heads four in all, unless one will do for their gradients.
    is_few = (
        case.q_len <= pallas_mosaic_gpu_decode.MOST_QUERIES
        and not case.dropout_rate
        and not case.logits_soft_cap
        and not case.bias
        and case.head_dim in pallas_mosaic_gpu_decode.BLOCK
    )
    is_fused = case.head_dim <= 128 or (case.value_dim == 128 and not case.logits_soft_cap)
    assert text.count("mosaic_gpu_v2") == (2 if is_fused else 4) + is_few
    want = *(inputs[name] for name in "qkv"), inputs.get("bias")
    assert jax.tree.map(like, gradients) == jax.tree.map(like, want)


def test_a_mask_of_segment_ids_alone_lowers_without_positions():
    """What the pair test does not read is no part of the kernel: the compiler would look for its layout for minutes."""
    ids = jnp.zeros((1, 300), jnp.int32)
    tokens = Tokens(q_segment_ids=ids, kv_segment_ids=ids)
    q, k, _ = shapes(64, "bfloat16")
    attend = functools.partial(
        blockwise_attention, mask=SameDocument(), tokens=tokens, return_lse=True, implementation="mosaic_gpu"
    )
    with tracing_for(H100):
        cotangents = jax.eval_shape(attend, q, k, k)
        _, text = lowered(lambda q, k, v, cotangents: jax.vjp(attend, q, k, v)[1](cotangents), q, k, k, cotangents)
    assert text.count("mosaic_gpu_v2") == 2


HOPS = [
    (*dims, dtype, in_order)
    for dims in ((64, 64), (128, 128), (192, 128), (256, 256))
    for dtype in ("bfloat16", "float16")
    for in_order in (True, False)
]
HOPS_QUICK = [(64, 64, "bfloat16", False)]


@pytest.mark.parametrize("configuration", some_slow(HOPS, HOPS_QUICK), ids=lambda given: "-".join(map(str, given)))
def test_every_configuration_lowers_as_a_hop(configuration):
    """With a carry and with running gradients; gradients in any order too."""
    head_dim, value_dim, dtype, in_order = configuration
    q, k, _ = shapes(head_dim, dtype)
    out, v, carry = shapes(value_dim, dtype)
    running = tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, k, v))
    tokens = None if in_order else Tokens.self_attention(*(jnp.zeros((1, 300), jnp.int32),) * 2)
    options = {"mask": Causal() & SameDocument(), "tokens": tokens, "implementation": "mosaic_gpu"}

    def hop(q, k, v, carry, running):
        after = blockwise_attention_forward(q, k, v, carry=carry, return_carry=True, **options)
        out, lse = blockwise_attention_forward(q, k, v, carry=carry, **options)
        backward = functools.partial(blockwise_attention_backward, q, k, v, out, lse, out, lse, **options)
        return after, (out, lse), backward(accumulate=running), backward(deterministic=False)

    with tracing_for(H100):
        (after, (got, lse), added, gradients), text = lowered(hop, q, k, v, carry, running)
    # Of wide heads dq, dk and dv have a kernel each, but for one of both.
    is_fused = head_dim <= 128 or (head_dim, value_dim) == (192, 128)
    assert text.count("mosaic_gpu_v2") == (4 if is_fused else 8)
    assert jax.tree.map(like, after) == jax.tree.map(like, carry)
    assert like(got) == like(out) and like(lse) == ((2, 4, 300), jnp.float32)
    assert [like(x) for x in added] == [like(x) for x in running]
    assert [like(x) for x in gradients] == [like(x) for x in (q, k, v)]


def like(x) -> tuple:
    return x.shape, x.dtype


def shapes(head_dim: int, dtype: str, q_len: int = 300):
    q, k = (jax.ShapeDtypeStruct((2, q_len, n, head_dim), dtype) for n in (4, 2))
    carry = jax.eval_shape(lambda: SoftmaxCarry.empty(batch_size=2, q_len=q_len, num_heads=4, value_dim=head_dim))
    return q, k, carry


INTERPRETED = ("causal_D64", "cross_fewer_keys_D128", "gqa_heads_of_3_rows_D64", "documents_D128", "empty_rows_D64",
               "all_empty_D128", "sinks_window_D64", "striped_documents_window_D64", "one_token_D64", "table_D128",
               "cross_one_key_D64", "documents_padding_row_D64", "per_head_blocks_D64", "chosen_by_head_D64",
               "chosen_by_head_D128", "chosen_large_blocks_D64", "soft_cap_D64", "soft_cap_empty_rows_gqa_D128",
               "gqa_T129_D256", "documents_D256", "cross_mqa_D256", "values_of_128_gqa_documents_D192",
               "causal_gqa_D80", "values_of_64_D128", "dropout_D64", "dropout_documents_gqa_D256",
               "bias_alibi_gqa_D128", "bias_alibi_documents_D64", "bias_t5_bidirectional_soft_cap_D128",
               "bias_kerple_power_gqa_D256")  # fmt: skip
INTERPRETED_QUICK = ("empty_rows_D64", "documents_D128", "chosen_by_head_D64")


# And whether gradients are added to running ones.
INTERPRETED_BACKWARD = {
    "cross_one_key_D64": False,
    "empty_rows_D64": True,
    "gqa_heads_of_3_rows_D64": False,
    "sinks_window_D64": True,
    "causal_T63_D128": False,
    "documents_padding_row_D64": True,
    "documents_window_gqa_D128": False,
    "table_D128": True,
    "per_head_blocks_D64": False,
    "chosen_by_head_D128": True,
    "chosen_by_kv_head_documents_D128": False,
    "chosen_large_blocks_D64": False,
    "soft_cap_D64": False,
    "soft_cap_empty_rows_gqa_D128": True,
    "gqa_T129_D256": False,
    "documents_D256": True,
    "cross_mqa_D256": False,
    "window_soft_cap_D256": True,
    "chosen_by_head_D256": False,
    "values_of_128_D192": False,
    "values_of_128_gqa_documents_D192": True,
    "values_of_128_window_cross_sinks_D192": True,
    "values_of_128_chosen_by_head_D192": False,
    "values_of_128_cross_sinks_soft_cap_D192": False,
    "causal_gqa_D80": True,
    "values_of_128_D64": False,
    "dropout_D64": True,
    "dropout_D128": False,
    "dropout_documents_gqa_D256": True,
    "bias_alibi_gqa_D128": True,
    "bias_alibi_documents_D64": False,
    "bias_t5_gqa_D64": False,
    "bias_t5_bidirectional_documents_D128": False,
    "bias_t5_bidirectional_cross_D128": True,
    "bias_t5_bidirectional_soft_cap_D128": False,
    "bias_kerple_log_D64": True,
    "bias_kerple_log_sinks_dropout_D128": False,
    "bias_kerple_power_gqa_D256": False,
}


# And whether gradients are added to running ones.
SHARED_OUT = {
    "gqa_heads_of_3_rows_D64": True,
    "documents_window_gqa_D128": False,
    "chosen_by_kv_head_documents_D128": False,
}


def in_interpreter(case, inputs, *, detect_races=False, **options):
    """The op on a CPU, by the very kernel but for its matmuls, which the interpreter cannot read in PTX."""
    run = functools.partial(
        pallas_mosaic_gpu.forward,
        **fixed(case, detect_races),
        **{"carry": None, "return_carry": False, "bias": inputs.get("bias")} | options,
    )
    return jax.jit(run)(*(inputs[name] for name in "qkv"))


def backward_in_interpreter(case, inputs, out, lse, *, detect_races=False, accumulate=(None,) * 3):
    """Its gradients in the same way; by one block of threads."""
    bias = inputs.get("bias")
    call = fixed(case, detect_races)
    call["options"] = dataclasses.replace(call["options"], bias_gradient=bias is not None)
    run = functools.partial(pallas_mosaic_gpu.backward, bias=bias, **call)
    q, k, v, dout, dlse = (inputs[name] for name in ("q", "k", "v", "dout", "dlse"))
    return jax.jit(run)(q, k, v, out.astype(q.dtype), lse, dout, dlse, accumulate=accumulate)


def fixed(case, detect_races: bool) -> dict:
    arguments = case.arguments()
    options = Options(
        mask=case.mask,
        scale=case.scale or case.head_dim**-0.5,
        logits_soft_cap=case.logits_soft_cap,
        block_sizes=arguments["block_sizes"],
        deterministic=True,
    )
    interpret = interpreter(detect_races=detect_races)
    return {
        "tokens": arguments["tokens"],
        "schedule": arguments["schedule"],
        "options": options,
        "dropout": arguments["dropout"],
        "interpret": interpret,
    }


@functools.cache
def truth(name: str) -> dict:
    case = CASES_BY_NAME[name]
    return suite.truth(case)(jax.tree.map(lambda x: x.astype(jnp.float32), case.inputs("bfloat16")))


@pytest.mark.parametrize("name", some_slow(INTERPRETED, INTERPRETED_QUICK))
def test_equals_reference_in_the_interpreter(name):
    case, want = CASES_BY_NAME[name], truth(name)
    out, lse = in_interpreter(case, case.inputs("bfloat16"))
    assert_close("out", out, want["out"], "bfloat16")
    assert_close("lse", lse, want["lse"], "float16")


@pytest.mark.parametrize("name", some_slow(INTERPRETED_BACKWARD, ("cross_one_key_D64", "empty_rows_D64")))
def test_gradients_equal_the_reference_in_the_interpreter(name):
    accumulates = INTERPRETED_BACKWARD[name]
    case, want = CASES_BY_NAME[name], truth(name)
    inputs = case.inputs("bfloat16")
    running = tuple(jnp.full(inputs[name].shape, 0.125, jnp.float32) for name in "qkv") if accumulates else (None,) * 3
    *gradients, dbias = (*backward_in_interpreter(case, inputs, want["out"], want["lse"], accumulate=running), None)[:4]
    for name, gradient in zip(suite.GRADIENTS, gradients, strict=True):
        assert_close(name, gradient - 0.125 if accumulates else gradient, want[name], "bfloat16")
    for path, gradient in jax.tree.leaves_with_path(dbias):
        assert_close(f"d{path[0].name}", gradient, want[f"d{path[0].name}"], "bfloat16")


@pytest.mark.parametrize("name", some_slow(SHARED_OUT, []))
def test_heads_that_are_shared_out_in_the_interpreter(name, monkeypatch):
    """Each query head of a kv head in an item of its own, added to what is running or not."""
    monkeypatch.setattr(pallas_mosaic_gpu, "num_shares", lambda group, **_: group)
    case, want = CASES_BY_NAME[name], truth(name)
    assert case.num_heads > case.num_kv_heads
    inputs = case.inputs("bfloat16")
    accumulates = SHARED_OUT[name]
    running = tuple(jnp.full(inputs[name].shape, 0.125, jnp.float32) for name in "qkv") if accumulates else (None,) * 3
    gradients = backward_in_interpreter(case, inputs, want["out"], want["lse"], accumulate=running)
    for name, gradient in zip(suite.GRADIENTS, gradients, strict=True):
        assert gradient.dtype == (jnp.float32 if accumulates else jnp.bfloat16)
        assert_close(name, gradient - 0.125 if accumulates else gradient, want[name], "bfloat16")


@pytest.mark.parametrize("from_last", [pytest.param(False, marks=pytest.mark.slow), True])
def test_documents_of_single_heads_in_the_interpreter(from_last, monkeypatch):
    """Whose tokens say at run time in which order blocks of queries are visited."""
    if from_last:
        monkeypatch.setattr(pallas_mosaic_gpu_turns, "L2_BYTES", 1)
    length, rng = 2304, np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(rng.standard_normal((1, length, 2, 64)), jnp.bfloat16) for _ in range(4))
    tokens = jax.tree.map(jnp.asarray, packed_tokens(((900, 1, 700, 500),), length))
    options = Options(
        mask=Causal() & SameDocument(), scale=0.125, logits_soft_cap=None, block_sizes=None, deterministic=True
    )  # fmt: skip
    call = {"tokens": tokens, "schedule": None, "options": options}
    out, lse = reference.forward(q, k, v, carry=None, return_carry=False, **call)
    backward = {"dlse": jnp.zeros_like(lse), "accumulate": (None,) * 3}
    want = reference.backward(q, k, v, out, lse, dout, **backward, **call)
    run = functools.partial(pallas_mosaic_gpu.backward, interpret=interpreter(), **call)
    gradients = jax.jit(run)(q, k, v, out.astype(q.dtype), lse, dout, **backward)
    for name, *pair in zip(suite.GRADIENTS, gradients, want, strict=True):
        assert_close(name, *pair, "bfloat16")


def test_heads_are_shared_out_where_blocks_of_keys_are_few():
    shares = functools.partial(pallas_mosaic_gpu.num_shares, num_cores=132)
    assert [shares(4, num_items=n) for n in (1024, 198, 197, 64, 8)] == [1, 1, 2, 4, 4]
    assert shares(6, num_items=70) == 3 and shares(1, num_items=1) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gqa_heads_of_3_rows_D64", "documents_D128", "empty_rows_D64"])
def test_no_race_between_copies_and_matmuls(name, capfd):
    """No buffer is filled before all that it held was read, and none is read before it is full."""
    case = CASES_BY_NAME[name]
    jax.block_until_ready(in_interpreter(case, case.inputs("bfloat16"), detect_races=True))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("name", some_slow(["causal_D64", "causal_D128"], ["causal_D64"]))
def test_no_race_in_the_backward_pass(name, capfd):
    case = dataclasses.replace(CASES_BY_NAME[name], q_len=260, batch_size=1, num_kv_heads=1)
    inputs = case.inputs("bfloat16")
    out, lse = inputs["dout"], inputs["dlse"]  # any will do
    jax.block_until_ready(backward_in_interpreter(case, inputs, out, lse, detect_races=True))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cross_D64", "empty_rows_D64", "striped_D128"])
def test_carry_in_the_interpreter(name):
    """Keys once more after a carry over all of them: each weighs twice, so out stays and lse grows by log 2."""
    case = CASES_BY_NAME[name]
    inputs, want = case.inputs("bfloat16"), truth(name)
    carry = in_interpreter(case, inputs, return_carry=True)
    out, lse = carry.finalize(jnp.bfloat16)
    assert_close("out", out, want["out"], "bfloat16")
    assert_close("lse", lse, want["lse"], "float16")
    out, lse = in_interpreter(case, inputs, carry=carry)
    assert_close("out", out, want["out"], "bfloat16")
    assert_close("lse", lse, want["lse"] + np.log(2), "float16")


@pytest.mark.parametrize("name", some_slow([case.name for case in WITH_SINKS], []))
def test_sinks_in_the_interpreter(name):
    """A carry to start from, no keys seen, and no values; rows that see no key end with it."""
    case, want = CASES_BY_NAME[name], truth(name)
    inputs = case.inputs("bfloat16")
    batch_size, q_len, _, _ = inputs["q"].shape
    carry = SoftmaxCarry.of_sinks(inputs["sinks"], batch_size=batch_size, q_len=q_len)
    out, lse = in_interpreter(case, inputs, carry=carry)
    assert_close("out", out, want["out"], "bfloat16")
    assert_close("lse", lse, want["lse"], "float16")
    whole = in_interpreter(case, inputs, carry=carry.whole(inputs["v"].shape[3]))
    np.testing.assert_array_equal(out, whole[0])
    np.testing.assert_array_equal(lse, whole[1])


@pytest.mark.slow
def test_large_logits_that_grow_from_block_to_block():
    """Rescaling, which is left out where a maximum grows by little, is not left out where it must not be."""
    case = dataclasses.replace(CASES_BY_NAME["causal_D64"], q_len=640, batch_size=1, num_heads=1, num_kv_heads=1)
    inputs = case.inputs("bfloat16")
    growth = jnp.repeat(jnp.arange(1, 6), 128)[None, :, None, None]
    inputs["k"] = (inputs["k"] * growth.astype(jnp.bfloat16)).astype(jnp.bfloat16)
    inputs["q"] = inputs["q"] * jnp.bfloat16(4)
    out, lse = in_interpreter(case, inputs)
    want = suite.truth(case)({name: x.astype(jnp.float32) for name, x in inputs.items()})
    assert_close("out", out, want["out"], "bfloat16")
    assert_close("lse", lse, want["lse"], "float16")


def refusal(message: str, device=H100, **changes):
    options = {"mask": Causal(), "head_dim": 64, "dtype": "bfloat16", "q_len": 300} | changes
    return pytest.param(device, message, options, id=message[:40])


def forward_alone(q, k, v, **options):
    return blockwise_attention_forward(q, k, v, implementation="mosaic_gpu", **options)


def backward_alone(q, k, v, **options):
    lse = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))
    out = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    return blockwise_attention_backward(q, k, v, out, lse, out, None, implementation="mosaic_gpu", **options)


ALONE = pytest.mark.parametrize("op", [forward_alone, backward_alone])


@ALONE
@pytest.mark.parametrize(
    ("device", "message", "options"),
    [
        refusal("it needs an NVIDIA Hopper GPU", device=A100),
        refusal("q is float32, it takes bfloat16 and float16", dtype="float32"),
        refusal("the head dim of q and k is 320 and of v 320, it takes those up to 256", head_dim=320),
        refusal("scale=-1.0, it takes positive ones", scale=-1.0),
        refusal("it uses concatenate", mask=Table(np.eye(5, dtype=bool), block_q=64, block_kv=64)),
        refusal(
            "it is the same for all arguments, its pair test must",
            mask=Window(),
            tokens=Tokens.self_attention(np.zeros((1, 300), np.int32)),
        ),
        refusal(
            "block_sizes=BlockSizes(block_q=64, block_kv=64), it takes BlockSizes(block_q=128, block_kv=128)",
            block_sizes=BlockSizes(block_q=64, block_kv=64),
        ),
        refusal(
            "the schedule has BlockSizes(block_q=256, block_kv=128), it takes BlockSizes(block_q=128, block_kv=128)",
            tokens=Tokens.self_attention(np.zeros((1, 300), np.int32)),
            schedule=make_schedule(Causal(), q_len=300, kv_len=300, block_sizes=BlockSizes(block_q=256, block_kv=128)),
        ),
    ],
)
def test_refuses(device, message, options, op):
    options = dict(options)
    q, k, _ = shapes(options.pop("head_dim"), options.pop("dtype"), options.pop("q_len"))
    with tracing_for(device), pytest.raises(NotImplementedError, match=re.escape(message)):
        jax.eval_shape(functools.partial(op, **options), q, k, k)


@pytest.mark.parametrize(
    ("given", "taken"),
    [((8, 8), (64, 64)), ((64, 65), (128, 128)), ((96, 96), (128, 128)), ((192, 128), (192, 128)),
     ((129, 64), (192, 128)), ((192, 192), (256, 256)), ((64, 256), (256, 256))],
)  # fmt: skip
def test_head_dims_are_filled_up_to_those_of_a_kernel(given, taken):
    q, v = (jnp.zeros((1, 1, 1, dim)) for dim in given)
    assert pallas_mosaic_gpu.dims_of(q, v) == taken


@pytest.mark.parametrize(
    ("dtype", "options", "taken"),
    [
        ("bfloat16", {}, "mosaic_gpu"),
        ("float16", {"logits_soft_cap": 30.0}, "mosaic_gpu"),
        ("bfloat16", {"dropout": Dropout(rate=0.1, seeds=np.zeros((2, 4), np.uint32))}, "mosaic_gpu"),
        ("float32", {}, "xla"),
    ],
    ids=["plain", "soft_cap", "dropout", "float32"],
)
def test_what_a_hopper_takes_first(dtype, options, taken):
    q, k, _ = shapes(128, dtype)

    def differentiate(q, k, v):
        out, vjp = jax.vjp(functools.partial(blockwise_attention, mask=Causal(), **options), q, k, v)
        return vjp(out)

    with tracing_for(H100), dispatch.record() as record:
        jax.eval_shape(differentiate, q, k, k)
    assert record == [(op, taken) for op, _ in BOTH]


def _is_odd(q_positions, kv_positions, q_segment_ids, kv_segment_ids):
    return ~((q_positions + kv_positions) % 2 == 0)


@pytest.mark.slow
def test_a_predicate_of_your_own_may_negate():
    case = dataclasses.replace(CASES_BY_NAME["predicate_D128"], mask=Predicate(_is_odd), q_len=130)
    inputs = case.inputs("bfloat16")
    out, _ = in_interpreter(case, inputs)
    want = suite.truth(case)({name: x.astype(jnp.float32) for name, x in inputs.items()})
    assert_close("out", out, want["out"], "bfloat16")


@pytest.mark.slow
def test_a_schedule_from_outside_serves_every_head_dim():
    """A schedule over tokens is of 128 x 128, also where the kernel would choose tiles of 192 queries."""
    tokens = packed_tokens(((100, 200, 84),), 384)
    mask = Causal() & SameDocument()
    schedule = make_schedule(mask, tokens, q_len=384, kv_len=384, block_sizes=BlockSizes(block_q=128, block_kv=128))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 384, 1, 64)), jnp.bfloat16) for _ in range(3))
    options = Options(mask=mask, scale=0.125, logits_soft_cap=None, block_sizes=None, deterministic=True)
    call = {"tokens": tokens, "schedule": schedule, "carry": None, "return_carry": False, "options": options}
    out, lse = pallas_mosaic_gpu.forward(q, k, v, interpret=interpreter(), **call)
    want, want_lse = reference.forward(*(x.astype(jnp.float32) for x in (q, k, v)), **call)
    assert_close("out", out, want, "bfloat16")
    assert_close("lse", lse, want_lse, "float16")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind", ["causal", "documents", "documents of single heads", "long document", "table", "few keys", "chosen"]
)
def test_gradients_are_the_same_each_time(kind):
    """Bit by bit, with all multiprocessors at work, which come to the tiles of dq in another order each time."""
    length = 65536 if kind == "long document" else 4096
    documents = ((65536,),) if kind == "long document" else ((1000, 1, 700, 2000, 395),)
    tokens = jax.tree.map(jnp.asarray, packed_tokens(documents, length)) if "document" in kind else None
    blocks = np.random.default_rng(0).random((32, 32)) < 0.3
    masks = {
        "causal": Causal(),
        "documents": Causal() & SameDocument(),
        "documents of single heads": Causal() & SameDocument(),
        "long document": Causal() & SameDocument(),
        "table": Table(blocks, block_q=128, block_kv=128),
        "few keys": Causal(),
        "chosen": Causal(),
    }
    schedule = None
    if kind == "chosen":
        chosen = np.random.default_rng(1).random((1, 8, 32, 32)) < 0.3
        selection = BlockSelection(
            blocks=lists_of(jnp.asarray(chosen | np.eye(32, dtype=bool)), 32), q_len=length, kv_len=length,
            block_sizes=BlockSizes(block_q=128, block_kv=128),
        )  # fmt: skip
        schedule = jax.jit(functools.partial(BlockSelection.schedule, mask=Causal()))(selection)
    kv_len, num_kv_heads = (
        1024 if kind == "few keys" else length,
        4 if kind in ("causal", "documents", "table", "few keys") else 8,
    )
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (
        jax.random.normal(key, (1, of, n, 128), jnp.bfloat16)
        for key, of, n in zip(keys, (length, kv_len, kv_len, length), (8, num_kv_heads, num_kv_heads, 8), strict=True)
    )

    @jax.jit
    def gradients(q, k, v, dout):
        options = {"mask": masks[kind], "tokens": tokens, "schedule": schedule, "implementation": "mosaic_gpu"}
        return jax.vjp(functools.partial(blockwise_attention, **options), q, k, v)[1](dout)

    first = jax.device_get(gradients(q, k, v, dout))
    assert all(np.isfinite(x.astype(np.float32)).all() and x.any() for x in first)
    for _ in range(5):
        for name, x, y in zip(suite.GRADIENTS, first, jax.device_get(gradients(q, k, v, dout)), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)

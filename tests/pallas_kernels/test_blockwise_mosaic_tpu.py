"""The TPU kernels of blockwise attention without a TPU: in JAX's TPU interpreter, next to the float32 reference.

What the compiler makes of them is in tests/aot.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import BlockSizes, Dropout, Tokens, blockwise_attention, conformance, dispatch
from pallas_kernels.blockwise import pallas_mosaic_tpu, suite
from pallas_kernels.blockwise.cases import KERNEL_CASES, Case
from pallas_kernels.blockwise.pallas_mosaic_tpu_walk import words_of
from pallas_kernels.blockwise.suite import FAMILY
from pallas_kernels.mask import Causal, PerHead, Prefix, Window
from pallas_kernels.mask_patterns import Table
from pallas_kernels.mosaic_tpu import generation, vmem_bytes
from pallas_kernels.schedule import make_schedule
from pallas_kernels.testing import V5P, Trial, assert_close, tracing_for

PARAMS = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="uninitialized")
CASES_BY_NAME = {case.name: case for case in KERNEL_CASES}
SERVED = [case for case in KERNEL_CASES if case.name in suite.SERVES["mosaic_tpu"].cases]

# With one key a row's dP and delta are one number in exact arithmetic; what float32 leaves of their difference depends
# on the order of a sum over the head dim.
ONE_KEY = {"one_token_D64", "one_token_D128", "cross_one_key_D64"}

# Of float32 logits of many units dq's rounding is 0.3 of the tolerance, but 1.2 in programs that XLA does not optimise.
OPTIMIZED = {("soft_cap_large_logits_D128", "float32")}

# Every way to call the ops, over rows that share words of the schedule and rows that do not; heads of several masks.
QUICK = {("per_head_gqa_D64", "bfloat16")}


@pytest.fixture
def interpreter(monkeypatch):
    """A TPU that is JAX's interpreter of its kernels, whose memory holds nan until it is written."""
    monkeypatch.setattr(dispatch, "current_platform", lambda: "tpu")
    with pltpu.force_tpu_interpret_mode(PARAMS):
        yield


def in_small_blocks(case: Case) -> Case:
    """The same in blocks of which there are several, of fewer heads and rows where none of them matter."""
    sizes = BlockSizes(block_q=256, block_kv=128) if case.head_dim == 64 else BlockSizes(block_q=128, block_kv=256)
    case = dataclasses.replace(case, block_sizes=sizes)
    if (
        case.documents is None
        and case.cached is None
        and case.num_heads == case.num_kv_heads == 2
        and case.batch_size == 2
    ):
        return dataclasses.replace(case, batch_size=1)
    return case


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            case, dtype, id=f"{case.name}-{dtype}", marks=[pytest.mark.slow] * ((case.name, dtype) not in QUICK)
        )
        for dtype in ("float32", "bfloat16")
        for case in SERVED
        if dtype == "bfloat16" or case.name not in ONE_KEY
    ],
)
def test_equals_reference(case, dtype):
    """In every way to call the ops that the case asks for, hops with a carry and running gradients among them."""
    trial = Trial(case=in_small_blocks(case), implementation="mosaic_tpu", dtype=dtype)
    if (case.name, dtype) in OPTIMIZED:
        jax.config.update("jax_disable_most_optimizations", False)  # `compile_quickly` sets it back
    (outcome,) = conformance.run(FAMILY, [trial])
    assert outcome.verdict == "ok", outcome


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "value_dim"), [(192, 128), (256, 64), (64, 256)])
@pytest.mark.usefixtures("interpreter")
def test_other_head_dims(head_dim, value_dim):
    case = dataclasses.replace(
        CASES_BY_NAME["documents_D64"], head_dim=head_dim, value_dim=value_dim, batch_size=1,
        documents=((300, 1, 129),), block_sizes=BlockSizes(block_q=128, block_kv=256),
    )  # fmt: skip
    # By hand, since it is no case of the suite.
    inputs = case.inputs("float32")
    got = jax.jit(suite.WAYS["hops"].function(case, "mosaic_tpu"))(inputs)
    want = jax.jit(suite.truth(case))(inputs)
    for name, x in want.items():
        assert_close(name, got[name], x, "float32")


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_a_block_computed_in_parts(monkeypatch):
    """As where memory has no room for the logits of a whole block."""
    monkeypatch.setattr(pallas_mosaic_tpu, "held_bytes", lambda row, visited, chunk, *_: 2**40 * (chunk > 128))
    case = dataclasses.replace(CASES_BY_NAME["documents_D64"], block_sizes=BlockSizes(block_q=256, block_kv=256))
    (outcome,) = conformance.run(FAMILY, [Trial(case=case, implementation="mosaic_tpu", dtype="bfloat16")])
    assert outcome.verdict == "ok", outcome


@pytest.mark.slow
def test_no_race(monkeypatch, capfd):
    """No buffer is read while a copy fills it, with the parallel dims of the grid split over two cores."""
    monkeypatch.setattr(dispatch, "current_platform", lambda: "tpu")
    case = in_small_blocks(CASES_BY_NAME["documents_D64"])
    params = dataclasses.replace(PARAMS, detect_races=True, num_cores_or_threads=2)
    with pltpu.force_tpu_interpret_mode(params):
        program = jax.jit(suite.WAYS["gradient of lse"].function(case, "mosaic_tpu"))
        jax.block_until_ready(program(case.inputs("float32")))
    assert "RACE" not in capfd.readouterr().out.upper()


def visits_of(words: np.ndarray) -> list[list[int]]:
    """What the items of a group visit, in order, as the kernels read it."""
    num_ranges = (words.shape[-1] - 4) // 4
    rows = words.reshape(-1, words.shape[-1])
    return [
        [column for r in range(num_ranges) for column in range(row[4 + r], row[4 + num_ranges + r])] for row in rows
    ]


@pytest.mark.parametrize("num_members", [1, 2])
@pytest.mark.parametrize("mask", [Causal(offset=-300), Causal() & Window(left=0) | Prefix(100)], ids=str)
def test_each_visit_knows_the_next(mask, num_members):
    """The words lead from the first visit of a group to its last, over rows and heads that visit nothing."""
    sizes = BlockSizes(block_q=128, block_kv=128)
    both = PerHead((mask, Causal() & Window(left=0)))
    schedule = make_schedule(both, q_len=600, kv_len=600, block_sizes=sizes)
    words = np.asarray(words_of(schedule.q_blocks, num_heads=4, num_members=num_members))
    assert words.shape[:4] == (1, 4 // num_members if num_members > 1 else 2, 5, num_members)
    for group in words[0]:
        items = group.reshape(-1, group.shape[-1])
        visits = visits_of(items)
        assert [len(x) for x in visits] == items[:, 0].tolist()
        assert np.array_equal(items[:, 1], np.cumsum(items[:, 0]) - items[:, 0])
        for i, item in enumerate(items):
            following = next((j for j in range(i + 1, len(items)) if visits[j]), None)
            assert item[2] == (-1 if following is None else visits[following][0])
            assert following is None or item[3] == following % num_members


def test_refusals():
    def call(*, mask=None, dtype="bfloat16", H=64, V=64, T=300, tokens=None, **options):
        q, v = (jax.ShapeDtypeStruct((1, T, 2, dim), dtype) for dim in (H, V))
        attend = functools.partial(
            blockwise_attention,
            mask=Causal() if mask is None else mask,
            tokens=tokens,
            implementation="mosaic_tpu",
            **options,
        )
        jax.eval_shape(attend, q, q, v)

    with pytest.raises(NotImplementedError, match=r"^mosaic_tpu: the platform is cpu, wanted tpu"):
        call()
    table = Table(np.eye(2, dtype=bool), block_q=150, block_kv=150)
    dropout = Dropout(rate=0.1, seeds=jnp.zeros((1, 2), jnp.uint32))
    tokens = Tokens.self_attention(jnp.arange(300, dtype=jnp.int32)[None])
    huge = BlockSizes(block_q=2**15, block_kv=2**15)
    refused = {
        r"^mosaic_tpu: q is float16, it takes bfloat16 and float32": {"dtype": "float16"},
        r"^mosaic_tpu: the head dim of q and k is 48, it takes one of \(64, ": {"H": 48},
        r"^mosaic_tpu: the head dim of v is 1, it takes one of \(64, ": {"V": 1},
        r"^mosaic_tpu: it has no dropout": {"dropout": dropout},
        r"^mosaic_tpu: mask Table.* its pair test must be arithmetic": {"mask": table},
        r"^mosaic_tpu: the schedule's block_q is 100, it takes multiples of 128": {
            "block_sizes": BlockSizes(block_q=100, block_kv=128), "tokens": tokens,
        },
        r"^mosaic_tpu: blocks of .*32768.* do not fit its memory": {"T": 2**15, "block_sizes": huge},
    }  # fmt: skip
    for message, arguments in refused.items():
        with tracing_for(V5P), pytest.raises(NotImplementedError, match=message):
            call(**arguments)


@pytest.mark.parametrize(
    ("kind", "wanted"), [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x")]
)
def test_generations_are_known_by_their_kind(kind, wanted):
    with tracing_for(jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")):
        assert generation() == wanted
        assert vmem_bytes() >= 48 * 2**20


def test_a_cpu_has_no_generation():
    assert generation() is None

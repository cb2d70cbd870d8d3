"""Few queries on Hopper without a GPU: the line of blocks, kernels in JAX's interpreter, and which calls are theirs.

That they lower for CUDA is in test_blockwise_mosaic_gpu.py, their numbers on a card in the conformance suite.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockSizes, Tokens, blockwise_attention_forward, make_schedule
from pallas_kernels.blockwise import pallas_mosaic_gpu, pallas_mosaic_gpu_decode, reference, suite
from pallas_kernels.blockwise import pallas_mosaic_gpu_decode_kernels as kernels
from pallas_kernels.blockwise.cases import KERNEL_CASES
from pallas_kernels.blockwise.options import Options
from pallas_kernels.mask import Causal, Full, PerHead, Prefix, SameDocument, Window
from pallas_kernels.mask_patterns import Strided, Table
from pallas_kernels.mosaic_gpu import interpreter
from pallas_kernels.online_softmax import SoftmaxCarry
from pallas_kernels.testing import H100, assert_close, tracing_for

CASES = {case.name: case for case in KERNEL_CASES if case.q_len <= pallas_mosaic_gpu_decode.MOST_QUERIES}
QUICK = ("decode_sinks_window_D64",)


def options(mask, head_dim=128, block_sizes=None) -> Options:
    return Options(mask=mask, scale=head_dim**-0.5, logits_soft_cap=None, block_sizes=block_sizes, deterministic=True)


def in_interpreter(case, inputs, *, detect_races=False, **changes):
    call = {"tokens": case.tokens(), "schedule": None, "carry": None, "return_carry": False} | changes
    run = functools.partial(
        pallas_mosaic_gpu.forward,
        options=options(case.mask, case.head_dim),
        interpret=interpreter(detect_races=detect_races),
        **call,
    )
    return jax.jit(run)(*(inputs[name] for name in "qkv"))


@functools.cache
def truth(name: str) -> dict:
    case = CASES[name]
    return suite.truth(case)({name: x.astype(jnp.float32) for name, x in case.inputs("bfloat16").items()})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_equals_reference_in_the_interpreter(name):
    case, want = CASES[name], truth(name)
    inputs = case.inputs("bfloat16")
    carry = None
    if case.sinks:
        batch_size, q_len, _, head_dim = inputs["q"].shape
        carry = SoftmaxCarry.of_sinks(inputs["sinks"], batch_size=batch_size, q_len=q_len, value_dim=head_dim)
    out, lse = in_interpreter(case, inputs, carry=carry)
    assert_close("out", out, want["out"], "bfloat16")
    assert_close("lse", lse, want["lse"], "float16")


@pytest.mark.slow
def test_a_carry_goes_on():
    """Keys once more after a carry over all of them: each weighs twice, so out stays and lse grows by log 2."""
    case, want = CASES["decode_D64"], truth("decode_D64")
    inputs = case.inputs("bfloat16")
    carry = in_interpreter(case, inputs, return_carry=True)
    out, lse = in_interpreter(case, inputs, carry=carry)
    assert_close("out", out, want["out"], "bfloat16")
    assert_close("lse", lse, want["lse"] + np.log(2), "float16")


@pytest.mark.slow
def test_large_logits_and_empty_slots_that_hold_anything():
    """Logits far beyond what exp() can take; what a cache holds behind its last token is never read."""
    case = CASES["decode_D64"]
    inputs = case.inputs("bfloat16")
    inputs["q"] = inputs["q"] * jnp.bfloat16(64)
    want = suite.truth(case)({name: x.astype(jnp.float32) for name, x in inputs.items()})
    slots = np.arange(700)[None, :, None, None]
    # Blocks of 128: all of those that have no token of the row.
    behind = slots >= -(-np.array(case.cached)[:, None, None, None] // 128) * 128
    for name in "kv":
        inputs[name] = jnp.where(behind, jnp.nan, inputs[name]).astype(jnp.bfloat16)
    out, lse = in_interpreter(case, inputs)
    assert_close("out", out, want["out"], "bfloat16")
    assert_close("lse", lse, want["lse"], "float16")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decode_D64", "decode_some_tokens_gqa_D128"])
def test_no_race_between_copies_and_matmuls(name, capfd):
    case = CASES[name]
    jax.block_until_ready(in_interpreter(case, case.inputs("bfloat16"), detect_races=True))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def ragged(lengths, q_len: int, kv_len: int) -> Tokens:
    last = jnp.asarray(lengths, jnp.int32)[:, None]
    slots = jnp.arange(kv_len, dtype=jnp.int32)[None]
    q_positions = last - q_len + jnp.arange(q_len, dtype=jnp.int32)
    return Tokens(
        q_positions=q_positions,
        q_segment_ids=jnp.zeros_like(q_positions),
        kv_positions=slots,
        kv_segment_ids=jnp.where(slots < last, 0, -1),
    )


@pytest.mark.parametrize("num_runs", [1, 7, 132])
@pytest.mark.parametrize(
    ("mask", "tokens", "q_len", "kv_len"),
    [
        (Causal() & SameDocument(), ragged([0, 300, 64, 0, 1, 1000, 0], 2, 1000), 2, 1000),
        (Causal() & SameDocument(), ragged([0], 2, 100), 2, 100),
        (Full(), Tokens(), 3, 200),
        ((Prefix(4) | Window(left=70)) & Causal(), ragged([900, 90], 1, 1000), 1, 1000),
        (Strided(128), ragged([900], 1, 1000), 1, 1000),
    ],
    ids=["lengths", "nothing", "full", "two_ranges", "strided"],
)
def test_the_line_of_blocks(mask, tokens, q_len, kv_len, num_runs):
    """Every block that any query may attend to stands in it once for each pair, and the runs share it evenly."""
    block, pairs_of_row = 64, 3
    batch_size = 1 if tokens.q_positions is None else len(tokens.q_positions)
    line = pallas_mosaic_gpu_decode._line(
        tokens, options(mask), batch_size, q_len, kv_len, block, pairs_of_row, num_runs
    )
    dense = np.asarray(mask.dense(tokens, q_len, kv_len))
    dense = np.broadcast_to(dense.reshape(-1, q_len, kv_len), (batch_size, q_len, kv_len))
    num_blocks = -(-kv_len // block)
    padded = np.pad(dense, ((0, 0), (0, 0), (0, num_blocks * block - kv_len)))
    tiles = padded.reshape(batch_size, q_len, num_blocks, block)
    some, every = tiles.any(axis=(1, 3)), tiles.all(axis=(1, 3))
    want_line = []
    for row in range(batch_size):
        blocks = np.flatnonzero(some[row])
        count = int(line.counts[row])
        assert count == len(blocks)
        listed = np.asarray(line.blocks[row if len(line.blocks) > 1 else 0, line.offsets[row] :][:count])
        np.testing.assert_array_equal(listed, 2 * blocks + ~every[row, blocks])
        assert int(line.starts[row]) == len(want_line)
        want_line += [(row * pairs_of_row + pair, i) for pair in range(pairs_of_row) for i in range(count)]
    assert int(line.starts[-1]) == len(want_line)
    starts = [int(kernels.start_of_run(len(want_line), run, num_runs)) for run in range(num_runs)] + [len(want_line)]
    lengths = np.diff(starts)
    assert starts[0] == 0 and lengths.max() - lengths.min() <= 1
    for run in range(num_runs):
        for place in range(starts[run], starts[run + 1]):
            assert int(kernels._run_at(jnp.int32(len(want_line)), jnp.int32(place), num_runs)) == run
        if lengths[run]:
            begins = int(line.first_pair[run]), int(line.first_block[run])
            assert begins == want_line[starts[run]]


def test_which_calls_are_theirs():
    def serves(mask, q_len=1, schedule=None, block_sizes=None):
        return pallas_mosaic_gpu_decode.serves(q_len, schedule, options(mask, block_sizes=block_sizes))

    schedule = make_schedule(Causal(), q_len=1, kv_len=300)
    assert serves(Causal()) and serves(Full(), 16) and serves(Causal(), schedule=schedule)
    assert not serves(Causal(), 17)
    assert not serves(PerHead((Causal(), Full())))
    assert not serves(Table(np.eye(5, dtype=bool), block_q=64, block_kv=64))
    assert not serves(Causal(), block_sizes=BlockSizes(block_q=128, block_kv=128))


def test_others_are_the_kernel_for_many_queries():
    q, k = (jax.ShapeDtypeStruct((1, 17, 4, 64), jnp.bfloat16) for _ in range(2))
    run = functools.partial(blockwise_attention_forward, mask=Causal(), implementation="mosaic_gpu")
    with tracing_for(H100):
        text = jax.jit(run).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("batch_size", [1, 33])
def test_a_long_cache_on_a_gpu(head_dim, batch_size):
    """Ragged lengths, all multiprocessors at work; the same bits each time."""
    kv_len, q_len = 65536 if batch_size == 1 else 4096, 2
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (batch_size, q_len, 16, head_dim), jnp.bfloat16)
    k, v = (jax.random.normal(key, (batch_size, kv_len, 4, head_dim), jnp.bfloat16) for key in keys[1:])
    lengths = np.random.default_rng(0).integers(2, kv_len, batch_size)
    lengths[0] = kv_len - 3
    call = {"mask": Causal() & SameDocument(), "tokens": ragged(lengths, q_len, kv_len)}
    run = jax.jit(functools.partial(blockwise_attention_forward, implementation="mosaic_gpu", **call))
    out, lse = run(q, k, v)
    want = reference.forward(
        *(x.astype(jnp.float32) for x in (q, k, v)),
        tokens=call["tokens"], schedule=None, carry=None, return_carry=False, options=options(call["mask"], head_dim),
    )  # fmt: skip
    assert_close("out", out, want[0], "bfloat16")
    assert_close("lse", lse, want[1], "float16")
    for again, first in zip(run(q, k, v), (out, lse), strict=True):
        np.testing.assert_array_equal(again, first)

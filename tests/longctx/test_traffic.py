"""Compiled programs hold exactly the collectives and bytes that each strategy states, and nothing of size [T, S]."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import AttentionSharding, MeshConfig, make_mesh, masks
from longctx.context_parallel import Layout, sharded_attention, sharded_schedule
from longctx.context_parallel import double_ring as double_ring_module
from longctx.context_parallel import ring as ring_module
from longctx.context_parallel.config import STRATEGIES
from pallas_kernels import BlockSizes, Tokens

SIZES = BlockSizes(block_q=8, block_kv=8)
DEGREE, ROWS, HEADS, KV_HEADS, KEY_DIM, VALUE_DIM = 4, 2, 8, 2, 8, 24
CAUSAL = masks.causal() & masks.documents()
WINDOW = masks.sliding_window(left=20) & masks.documents()
SIZE_OF = {"f32": 4, "bf16": 2, "s32": 4, "i32": 4}
LAYOUTS = {name: Layout(name=name) for name in ("contiguous", "zigzag", "striped")}


def lowered(sharding, mask, *, degree=DEGREE, length, dtype="float32") -> jax.stages.Lowered:
    """The forward and backward pass of one layer, and the schedule of its mask."""
    inner = sharding.inner_degree or degree
    mesh = make_mesh(MeshConfig(context_outer=degree // inner, context_inner=inner), jax.devices()[:degree])
    spec = jax.NamedSharding(mesh, jax.P(None, ("context_outer", "context_inner")))
    q, k, v, dout = (
        jax.ShapeDtypeStruct((ROWS, length, heads, head_dim), dtype, sharding=spec)
        for heads, head_dim in ((HEADS, KEY_DIM), (KV_HEADS, KEY_DIM), (KV_HEADS, VALUE_DIM), (HEADS, VALUE_DIM))
    )
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=spec)

    def step(q, k, v, dout, positions, segment_ids):
        tokens = Tokens.self_attention(positions, segment_ids)
        lengths = dict(batch_size=ROWS, q_len=length, kv_len=length)
        schedule = sharded_schedule(mask, tokens, **lengths, block_sizes=SIZES, sharding=sharding)
        options = dict(mask=mask, tokens=tokens, schedule=schedule, block_sizes=SIZES, sharding=sharding)
        out, vjp = jax.vjp(lambda *qkv: sharded_attention(*qkv, **options), q, k, v)
        return out, *vjp(dout)

    with jax.set_mesh(mesh):
        return jax.jit(step).lower(q, k, v, dout, ids, ids)


def sent(kind: str, num_bytes: int, degree: int) -> int:
    """What one device sends in a collective whose result has so many bytes."""
    match kind:
        case "collective-permute":
            return num_bytes
        case "reduce-scatter":
            return num_bytes * (degree - 1)
        case _:
            return num_bytes * (degree - 1) // degree


def collectives(program: str, degree: int = DEGREE) -> dict[str, collections.Counter]:
    """Numbers of a compiled program's collectives by kind and bytes that a device sends, of floats and of integers."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = {"floats": collections.Counter(), "integers": collections.Counter()}
    for result, kind in re.findall(rf"= (\S.*?) ({kinds})(?:-start)?\(", program):
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
        num_bytes = sum(SIZE_OF[t] * int(np.prod([int(n) for n in dims.split(",") if n])) for t, dims in shapes)
        numbers = "integers" if shapes[0][0] == "s32" else "floats"
        found[numbers][kind, sent(kind, num_bytes, degree)] += 1
    return found


def stated(sharding, mask, *, degree=DEGREE, length, dtype="float32", phases=("forward", "backward")):
    setting = sharding.setting(mask, degree=degree, q_len=length, kv_len=length, num_heads=HEADS, num_kv_heads=KV_HEADS)
    transfers = sharding.strategy_for(mask).transfers(
        setting, batch_size=ROWS, key_dim=KEY_DIM, value_dim=VALUE_DIM, dtype=dtype
    )
    total = collections.Counter()
    for transfer in transfers:
        if transfer.phase in phases:
            total[transfer.kind, transfer.num_bytes] += transfer.count
    return total


KV_BYTES = ROWS * KV_HEADS * (KEY_DIM + VALUE_DIM) * 4  # of a token, float32
Q_BYTES, OUT_BYTES = ROWS * HEADS * KEY_DIM * 4, ROWS * HEADS * VALUE_DIM * 4


@pytest.mark.parametrize(
    ("strategy", "layout", "mask", "formula"),
    [
        # Forward and backward P - 1 hops of keys, and P of their gradients; float32 inputs, so all are of one size.
        ("ring", "zigzag", CAUSAL, lambda own: {("collective-permute", own * KV_BYTES): 3 * DEGREE - 2}),
        # The hops that a window of less than a chunk leaves: one, or one each way.
        ("ring", "contiguous", WINDOW, lambda own: {("collective-permute", own * KV_BYTES): 1 + 2 + 1}),
        (
            "all_gather",
            "zigzag",
            CAUSAL,
            lambda own: {
                ("all-gather", (DEGREE - 1) * own * KV_BYTES): 2,
                ("reduce-scatter", (DEGREE - 1) * own * KV_BYTES): 1,
            },
        ),
        # Four devices share two kv heads, so each head is sent twice.
        (
            "ulysses",
            "zigzag",
            CAUSAL,
            lambda own: {
                ("all-to-all", own * Q_BYTES * 3 // 4): 2,
                ("all-to-all", own * OUT_BYTES * 3 // 4): 2,
                ("all-to-all", own * 2 * KV_BYTES * 3 // 4): 2,
            },
        ),
        # Two groups of two: keys, as many bytes a token as queries here, go round once and back.
        (
            "usp",
            "zigzag",
            CAUSAL,
            lambda own: {
                ("all-to-all", own * Q_BYTES // 2): 2 + 2,
                ("all-to-all", own * OUT_BYTES // 2): 2,
                ("collective-permute", own * KV_BYTES): 1 + 2 + 1,
            },
        ),
        # As many as of a ring of four.
        ("double_ring", "zigzag", CAUSAL, lambda own: {("collective-permute", own * KV_BYTES): 3 * DEGREE - 2}),
        # Contiguous, one device back is one place back or, over the end of a group, one group and one place.
        *(
            pytest.param(
                *how, WINDOW, lambda own: {("collective-permute", own * KV_BYTES): 2 + 3 + 2}, marks=pytest.mark.slow
            )
            for how in (("ring", "zigzag"), ("double_ring", "contiguous"))
        ),
        ("halo", "contiguous", WINDOW, lambda own: {("collective-permute", 20 * KV_BYTES): 3}),
        ("halo", "zigzag", WINDOW, lambda own: {("collective-permute", 20 * KV_BYTES): 6}),
    ],
)
def test_the_compiled_program_sends_what_the_formula_says(strategy, layout, mask, formula):
    length = 1024
    inner = 2 if strategy in ("usp", "double_ring") else None
    sharding = AttentionSharding(strategy=strategy, layout=LAYOUTS[layout], inner_degree=inner)
    program = lowered(sharding, mask, length=length).compile().as_text()
    found = collectives(program, inner if strategy == "usp" else DEGREE)  # of permutes it needs no number
    assert found["floats"] == formula(length // DEGREE) == stated(sharding, mask, length=length)
    # Positions and segment ids of the keys, once: of all, or of those that travel. One row here.
    integers = found["integers"]
    if strategy == "halo":
        messages = {"contiguous": 1, "zigzag": 2}[layout]
        assert integers.pop(("collective-permute", 20 * 2 * 4)) == messages
    elif strategy == "usp":
        # Of a group's tokens inside it, and of the keys of all groups between them.
        assert integers.pop(("all-gather", 4 * length // 4)) <= 4
        assert integers.pop(("all-gather", 4 * length // 2)) == 2
    elif integers:
        assert integers.pop(("all-gather", 4 * length * 3 // 4)) <= (4 if strategy == "ulysses" else 2)
    # What the hops that are left out rest on: two tokens of each run.
    assert sum(num_bytes * count for (_, num_bytes), count in integers.items()) <= 64 * DEGREE
    assert f"{length},{length}" not in program
    if strategy in ("ring", "double_ring", "halo"):
        assert not re.search(rf"f32\[[\d,]*\b{length}\b", program), "floats that hold the whole sequence"


@pytest.mark.slow
def test_a_halo_is_as_large_as_the_window_whatever_the_sequence():
    sharding = AttentionSharding(strategy="halo", layout=LAYOUTS["zigzag"])
    programs = [lowered(sharding, WINDOW, length=length).compile().as_text() for length in (512, 2048)]
    assert collectives(programs[0]) == collectives(programs[1])


@pytest.mark.parametrize(
    ("strategy", "layout", "mask", "degree"),
    [
        ("usp", "zigzag", CAUSAL, 8),
        ("usp", "contiguous", WINDOW, 8),
        ("double_ring", "zigzag", CAUSAL, 8),
        ("double_ring", "contiguous", WINDOW, 8),
        ("ring", "contiguous", CAUSAL, 2),
        ("ring", "striped", WINDOW, 8),
        ("ring", "zigzag", WINDOW, 8),
        ("all_gather", "striped", CAUSAL, 8),
        ("ulysses", "contiguous", CAUSAL, 2),
        ("ulysses", "zigzag", CAUSAL, 8),
        ("halo", "contiguous", masks.sliding_window(left=20, right=15) & masks.documents(), 8),
        ("halo", "zigzag", masks.sliding_window(left=6, right=3) & masks.documents(), 8),
    ],
)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_transfers_are_the_collectives_of_the_program(strategy, layout, mask, degree, dtype, monkeypatch):
    """Of the program before it is compiled, which has the dtypes: XLA's CPU compiler widens bfloat16 permutes."""
    # Every hop is written out, none is in a loop.
    monkeypatch.setattr(ring_module, "MAX_UNROLLED_HOPS", degree)
    monkeypatch.setattr(double_ring_module, "MAX_UNROLLED_ROUNDS", degree)
    inner = 2 if strategy in ("usp", "double_ring") else None
    sharding = AttentionSharding(strategy=strategy, layout=LAYOUTS[layout], inner_degree=inner)
    program = lowered(sharding, mask, degree=degree, length=96, dtype=dtype).as_text()
    kinds = "collective_permute|all_gather|all_to_all|reduce_scatter"
    found = collections.Counter()
    for kind, body in re.findall(rf"stablehlo\.({kinds})\"?\(.*?-> tensor<([\w]+)>", program, flags=re.DOTALL):
        *dims, element = body.split("x")
        if element != "i32":
            kind = kind.replace("_", "-")
            num_bytes = SIZE_OF[element] * int(np.prod([int(n) for n in dims]))
            found[kind, sent(kind, num_bytes, inner or degree)] += 1
    assert found == stated(sharding, mask, degree=degree, length=96, dtype=dtype)


def test_a_ring_of_one_needed_hop_sends_nothing():
    documents_of_a_chunk = masks.chunked(24) & masks.documents()
    sharding = AttentionSharding(layout=LAYOUTS["contiguous"])
    assert (
        sum(
            stated(
                sharding, masks.causal(offset=0) & masks.sliding_window(left=0) & masks.documents(), length=96
            ).values()
        )
        == 0
    )
    assert sum(stated(sharding, documents_of_a_chunk, length=96).values()) > 0  # it may start anywhere in a row


def test_every_strategy_states_both_passes():
    for name in STRATEGIES:
        sharding = AttentionSharding(strategy=name, layout=LAYOUTS["contiguous"], inner_degree=2)
        for phase in ("forward", "backward"):
            assert sum(stated(sharding, WINDOW, length=96, phases=(phase,)).values()) > 0

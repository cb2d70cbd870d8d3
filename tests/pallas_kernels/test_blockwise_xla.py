"""XLA's tiles: merged of a schedule's blocks where a platform wants larger ones, and then still right."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import BlockSizes, blockwise_attention, dispatch, make_schedule
from pallas_kernels.block_sizes import BLOCKWISE_ATTENTION, XLA_TILES
from pallas_kernels.blockwise import suite, xla
from pallas_kernels.mask import Causal
from pallas_kernels.testing import assert_close

CASES = {case.name: case for case in suite.FAMILY.cases}
SMALL, LARGE = BlockSizes(block_q=8, block_kv=12), BlockSizes(block_q=32, block_kv=48)


@pytest.fixture
def tiles(monkeypatch):
    """The tiles of each walk."""
    walks = []

    def merged_walk(*args, **kwargs):
        walks.append(schedule_walk(*args, **kwargs))
        return walks[-1]

    schedule_walk = xla.merged_walk
    monkeypatch.setattr(xla, "merged_walk", merged_walk)
    return lambda: [walk.block_sizes for walk in walks]


@pytest.mark.parametrize(
    "name",
    [
        *("causal_T63", "one_token", "empty_rows", "all_empty", "documents_window_gqa", "striped_documents_window"),
        *("sinks_window_D64", "neighborhood_3d_tiles", "table", "per_head_gqa"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                *("causal", "cross", "chunked_prefill", "not_window", "window", "window_both_sides", "documents"),
                *("documents_bidirectional", "soft_cap_empty_rows_gqa", "global_dilated", "sparse_fixed_documents"),
            )
        ),
    ],
)
def test_merged_blocks_equal_the_reference(name, monkeypatch, tiles):
    """Forward and every gradient, with batches whose rows hold different documents among them."""
    monkeypatch.setitem(XLA_TILES, "cpu", LARGE)
    case = dataclasses.replace(CASES[name], block_sizes=None)
    q_len, kv_len = case.q_len, case.kv_len or case.q_len

    @jax.jit
    def run(inputs):
        schedule = make_schedule(case.mask, case.tokens(), q_len=q_len, kv_len=kv_len, block_sizes=SMALL)

        def attend(q, k, v):
            arguments = case.arguments() | {"schedule": schedule, "implementation": "xla"}
            return blockwise_attention(q, k, v, return_lse=True, **arguments)

        (out, lse), vjp = jax.vjp(attend, *(inputs[name] for name in "qkv"))
        gradients = vjp((inputs["dout"], inputs["dlse"]))
        return {"out": out, "lse": lse} | dict(zip(suite.GRADIENTS, gradients, strict=True))

    inputs = case.inputs("float32")
    got, want = run(inputs), jax.jit(suite.truth(case))(inputs)
    for result in want:
        assert_close(result, got[result], want[result], "float32")
    if name != "one_token":
        assert tiles() == [LARGE.fit(q_len, kv_len)] * 2


def trace(length: int, schedule_sizes: BlockSizes | None, **arguments):
    """Traces the op, with a schedule of these blocks or with none."""

    def attend(q):
        schedule = None
        if schedule_sizes is not None:
            schedule = make_schedule(Causal(), q_len=length, kv_len=length, block_sizes=schedule_sizes)
        return blockwise_attention(q, q, q, mask=Causal(), implementation="xla", schedule=schedule, **arguments)

    jax.eval_shape(attend, jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_tiles_are_the_platforms(platform, monkeypatch, tiles):
    """Whether XLA builds the schedule or takes the one that all implementations share."""
    monkeypatch.setattr(dispatch, "current_platform", lambda: platform)
    want = XLA_TILES.get(platform, BLOCKWISE_ATTENTION[platform])
    trace(4096, None)
    trace(4096, BLOCKWISE_ATTENTION[platform])
    assert tiles() == [want, want]


@pytest.mark.parametrize(
    ("length", "sizes", "want"),
    [
        (4096, BlockSizes(block_q=128, block_kv=128), BlockSizes(block_q=1024, block_kv=1024)),
        (4096, BlockSizes(block_q=256, block_kv=2048), BlockSizes(block_q=1024, block_kv=2048)),
        (4096, BlockSizes(block_q=384, block_kv=512), BlockSizes(block_q=384, block_kv=1024)),
        (700, BlockSizes(block_q=128, block_kv=128), BlockSizes(block_q=700, block_kv=700)),
        (100, BlockSizes(block_q=128, block_kv=128), BlockSizes(block_q=100, block_kv=100)),
        (64, BlockSizes(block_q=128, block_kv=128), BlockSizes(block_q=64, block_kv=64)),
    ],
)
def test_blocks_of_a_schedule_are_merged_on_a_gpu(length, sizes, want, monkeypatch, tiles):
    monkeypatch.setattr(dispatch, "current_platform", lambda: "gpu")
    trace(length, sizes)
    assert tiles() == [want]


def test_block_sizes_of_the_call_are_kept(monkeypatch, tiles):
    monkeypatch.setattr(dispatch, "current_platform", lambda: "gpu")
    sizes = BlockSizes(block_q=64, block_kv=128)
    trace(512, None, block_sizes=sizes)
    trace(512, sizes, block_sizes=sizes)
    assert tiles() == [sizes, sizes]

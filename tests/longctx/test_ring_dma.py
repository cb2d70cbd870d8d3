"""A ring whose kernels send for themselves, in JAX's TPU interpreter on virtual devices that share no memory.

What the compiler makes of it is in tests/aot.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from longctx import masks
from longctx.context_parallel import AttentionSharding, Layout, ring_dma, sharded_attention
from longctx.context_parallel.layout import permute
from longctx.sharding import MeshConfig, make_mesh
from pallas_kernels import BlockSizes, dispatch
from pallas_kernels.testing import assert_close, packed_tokens

DEGREE = 4
SIZES = BlockSizes(block_q=128, block_kv=128)
PARAMS = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="uninitialized")
CAUSAL = masks.causal() & masks.documents()
NAMES = ("out", "dq", "dk", "dv", "dsinks")


@pytest.fixture
def interpreter(monkeypatch):
    """TPUs that are JAX's interpreter of their kernels: buffers hold nan until they are written, races are found."""
    monkeypatch.setattr(dispatch, "current_platform", lambda: "tpu")
    monkeypatch.setattr(ring_dma, "current_platform", lambda: "tpu")
    pltpu.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(PARAMS):
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Attention over a few packed rows, split over four devices."""

    mask: object = CAUSAL
    layout: str = "zigzag"
    rows: tuple[tuple[int, ...], ...] = ((300, 1, 180),)
    length: int = 512
    q_len: int | None = None
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 64
    dtype: str = "float32"
    sinks: bool = False
    logits_soft_cap: float | None = None
    max_document_length: int | None = None
    mesh: tuple[int, int] = (1, 4)

    def gradients(self, strategy: str, **options) -> dict[str, np.ndarray]:
        """out and every gradient, with a random cotangent."""
        rng, q_len = np.random.default_rng(0), self.q_len or self.length
        B, H, heads = len(self.rows), self.head_dim, (self.num_heads, self.num_kv_heads)
        shapes = [(B, q_len, heads[0], H), (B, self.length, heads[1], H), (B, self.length, heads[1], 64)]
        shapes.append((B, q_len, heads[0], 64))
        *arrays, dout = (jnp.asarray(rng.standard_normal(shape), self.dtype) for shape in shapes)
        sinks = jnp.asarray(rng.standard_normal(heads[0]), jnp.float32)
        layout = Layout(name=self.layout)
        order = layout.order(self.length, DEGREE)
        tokens = jax.tree.map(lambda x: jnp.asarray(permute(x, order)), packed_tokens(self.rows, self.length))
        if self.q_len is not None:
            tokens = dataclasses.replace(tokens, q_positions=None, q_segment_ids=tokens.q_segment_ids[:, :q_len])
            tokens = dataclasses.replace(tokens, q_positions=jnp.zeros_like(tokens.q_segment_ids))
        sharding = AttentionSharding(
            strategy=strategy, layout=layout, max_document_length=self.max_document_length
        )  # fmt: skip

        def run(q, k, v, sinks, tokens, dout):
            def attend(q, k, v, sinks):
                return sharded_attention(
                    q, k, v, mask=self.mask, tokens=tokens, sharding=sharding, block_sizes=SIZES,
                    sinks=sinks if self.sinks else None, logits_soft_cap=self.logits_soft_cap, **options,
                )  # fmt: skip

            out, vjp = jax.vjp(attend, q, k, v, sinks)
            return out, *vjp(dout)

        outer, inner = self.mesh
        config = MeshConfig(context_outer=outer, context_inner=inner)
        with jax.set_mesh(make_mesh(config, jax.devices()[:DEGREE])):
            results = jax.block_until_ready(jax.jit(run)(*arrays, sinks, tokens, dout))
        return dict(zip(NAMES, jax.device_get(results), strict=True))


def check(problem: Problem, capfd) -> None:
    with dispatch.record() as taken:
        got = problem.gradients("ring_dma")
    assert {name for op, name in taken} == {"mosaic_tpu"}
    want = problem.gradients("ring", implementation="xla")
    for name, x in want.items():
        assert_close(name, got[name], x, problem.dtype)
    assert "RACE" not in capfd.readouterr().out.upper()


@pytest.mark.usefixtures("interpreter")
def test_equals_a_ring(capfd):
    check(Problem(), capfd)

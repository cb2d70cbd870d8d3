"""A ring whose kernels send for themselves, in JAX's TPU interpreter on virtual devices that share no memory.

What the compiler makes of it is in tests/aot.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from longctx import masks
from longctx.context_parallel import AttentionSharding, Layout, ring_dma, sharded_attention
from longctx.context_parallel.layout import permute
from longctx.sharding import MeshConfig, make_mesh
from pallas_kernels import BlockSizes, Dropout, Tokens, dispatch
from pallas_kernels.blockwise import pallas_mosaic_tpu_send
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
    q_rows: tuple[tuple[int, ...], ...] | None = None
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
        of_keys, of_queries = layout.order(self.length, DEGREE), layout.order(q_len, DEGREE)
        keys, queries = packed_tokens(self.rows, self.length), packed_tokens(self.q_rows or self.rows, q_len)
        tokens = Tokens(
            q_positions=jnp.asarray(permute(queries.q_positions, of_queries)),
            q_segment_ids=jnp.asarray(permute(queries.q_segment_ids, of_queries)),
            kv_positions=jnp.asarray(permute(keys.kv_positions, of_keys)),
            kv_segment_ids=jnp.asarray(permute(keys.kv_segment_ids, of_keys)),
        )
        sharding = AttentionSharding(strategy=strategy, layout=layout, max_document_length=self.max_document_length)

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


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_equals_a_ring(capfd):
    """Documents and padding, grouped heads, learned sinks: every hop has work for some device."""
    check(Problem(sinks=True), capfd)


PROBLEMS = {
    "bidirectional": Problem(mask=masks.documents(), layout="striped"),
    # Of four hops, 0, 1 and 3 are left: strides of 1 and 2, each with credits of its own.
    "window": Problem(mask=masks.sliding_window(left=60) & masks.documents()),
    "window_of_a_hop": Problem(mask=masks.sliding_window(left=100) & masks.documents(), layout="contiguous"),
    "documents_of_a_hop": Problem(rows=((64,) * 8,), max_document_length=64, layout="contiguous"),
    "several_blocks_and_rows": Problem(length=1024, rows=((1000,), (30, 700))),
    "per_head": Problem(mask=masks.per_head(masks.causal(), masks.prefix(100) | masks.sliding_window(left=30))),
    "soft_cap_bfloat16": Problem(logits_soft_cap=2.0, dtype="bfloat16", num_heads=4, num_kv_heads=2),
    "keys_of_192": Problem(head_dim=192),
    "cross_attention": Problem(mask=masks.documents(), q_len=256, q_rows=((100, 1, 120),)),
    "fully_masked_shards": Problem(rows=((1,),), layout="contiguous"),
    "a_ring_of_two_axes": Problem(mesh=(2, 2)),
}


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", PROBLEMS)
def test_whatever_it_serves_equals_a_ring(name, capfd):
    check(PROBLEMS[name], capfd)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_heads_dealt_out_to_two_cores(monkeypatch, capfd):
    """As on a v5p, here one core after the other; three heads are left to one."""
    monkeypatch.setattr(pallas_mosaic_tpu_send, "num_cores", lambda: 2)
    check(Problem(num_heads=4, num_kv_heads=2), capfd)
    check(Problem(num_heads=3, num_kv_heads=3), capfd)


def test_refusals(monkeypatch):
    def call(**options):
        with jax.set_mesh(make_mesh(MeshConfig(context_inner=DEGREE), jax.devices()[:DEGREE])):
            x = jax.ShapeDtypeStruct((1, 512, 2, 64), options.pop("dtype", jnp.float32))
            sharding = AttentionSharding(strategy="ring_dma")
            attend = functools.partial(sharded_attention, mask=masks.causal(), tokens=Tokens(), sharding=sharding)
            return jax.eval_shape(functools.partial(attend, **options), x, x, x)

    with pytest.raises(NotImplementedError, match="ring_dma runs on tpu, got cpu; choose strategy=ring"):
        call()
    monkeypatch.setattr(dispatch, "current_platform", lambda: "tpu")
    monkeypatch.setattr(ring_dma, "current_platform", lambda: "tpu")
    dropout = Dropout.of_key(0.1, jax.random.key(0), batch_size=1, num_heads=2)
    for message, options in {
        "ring_dma: mosaic_tpu: it has no dropout; choose strategy=ring": {"dropout": dropout},
        "ring_dma: mosaic_tpu: q is float16, .*; choose strategy=ring": {"dtype": jnp.float16},
        "ring_dma: ring_kernels: kernels of 'xla' do not send, .*; choose strategy=ring": {"implementation": "xla"},
    }.items():
        with pytest.raises(NotImplementedError, match=message):
            call(**options)

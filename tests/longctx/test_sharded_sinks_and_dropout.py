"""Learned sinks and dropout over a mesh give what one device gives: out, and the gradients of q, k, v and the sinks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import MeshConfig, make_mesh, masks
from longctx.context_parallel import ContextParallelConfig, sharded_attention
from longctx.context_parallel.layout import permute, unpermute
from pallas_kernels import BlockSizes, Dropout, blockwise_attention
from pallas_kernels.testing import assert_close, packed_tokens

LENGTH, NUM_HEADS = 64, 4
MASK = masks.causal() & masks.documents()
WINDOW = masks.sliding_window(left=6) & masks.documents()
# Padding in the second row: tokens that may attend to nothing but the sink.
ROWS = ((20, 1, 30, 13), (9, 40), (64,), (32, 32))
SHAPES = {"q": NUM_HEADS, "k": 2, "v": 2, "dout": NUM_HEADS}
NAMES = ("out", "dq", "dk", "dv", "dsinks")
SIZES = BlockSizes(block_q=8, block_kv=8)


@functools.cache
def inputs(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), len(SHAPES) + 1)
    arrays = [
        jax.random.normal(key, (len(ROWS), LENGTH, heads, 8), dtype)
        for key, heads in zip(keys, SHAPES.values(), strict=False)
    ]
    return *arrays, jax.random.normal(keys[-1], (NUM_HEADS,))


def dropout(rate=0.3, batch_size=4):
    return Dropout.of_key(rate, jax.random.key(1), batch_size=batch_size, num_heads=NUM_HEADS)


def run(attend, tokens, arrays, *, mask=MASK, **options):
    @jax.jit
    def with_gradients(q, k, v, dout, sinks, tokens, dropout):
        def call(q, k, v, sinks):
            return attend(q, k, v, mask=mask, tokens=tokens, sinks=sinks, dropout=dropout, block_sizes=SIZES)

        out, vjp = jax.vjp(call, q, k, v, sinks)
        return out, *vjp(dout)

    return jax.block_until_ready(with_gradients(*arrays, tokens, options.get("dropout")))


TOKENS = jax.tree.map(jnp.asarray, packed_tokens(ROWS, LENGTH))


@functools.cache
def on_one_device(with_dropout: bool, mask=MASK):
    options = {"dropout": dropout()} if with_dropout else {}
    attend = functools.partial(blockwise_attention, implementation="reference")
    return run(attend, TOKENS, inputs(), mask=mask, **options)


MESHES = [
    pytest.param({"data": 4, "tensor": 2}, "contiguous", "ring", marks=pytest.mark.slow),
    pytest.param({"context_inner": 8}, "zigzag", "ring", marks=pytest.mark.slow),
    ({"data": 2, "context_inner": 2, "tensor": 2}, "zigzag", "ring"),
    pytest.param({"fsdp": 2, "context_outer": 2, "context_inner": 2}, "striped", "ring", marks=pytest.mark.slow),
    pytest.param({"data": 2, "context_inner": 4}, "zigzag", "all_gather", marks=pytest.mark.slow),
    pytest.param({"data": 2, "context_inner": 4}, "zigzag", "ulysses", marks=pytest.mark.slow),
    ({"data": 2, "context_inner": 2, "tensor": 2}, "contiguous", "ulysses"),
    ({"data": 2, "context_inner": 4}, "contiguous", "halo"),
]


@pytest.mark.parametrize(("shape", "layout", "strategy"), MESHES, ids=str)
@pytest.mark.parametrize(
    "with_dropout", [pytest.param(False, marks=pytest.mark.slow), True], ids=["sinks", "sinks_and_dropout"]
)
def test_equals_one_device(shape, layout, strategy, with_dropout):
    degree = shape.get("context_outer", 1) * shape.get("context_inner", 1)
    config = ContextParallelConfig(layout=layout, strategy=strategy)
    order, mask = config.order(LENGTH, degree), WINDOW if strategy == "halo" else MASK
    *arrays, sinks = inputs()
    options = {"dropout": dropout()} if with_dropout else {}
    with jax.set_mesh(make_mesh(MeshConfig(**shape))):
        arrays = [jnp.asarray(permute(np.asarray(x), order)) for x in arrays]
        tokens = jax.tree.map(lambda x: jnp.asarray(permute(np.asarray(x), order)), TOKENS)
        attend = functools.partial(sharded_attention, sharding=config.sharding())
        *got, dsinks = run(attend, tokens, (*arrays, sinks), mask=mask, **options)
    *want, dsinks_wanted = on_one_device(with_dropout, mask)
    for name, x, y in zip(NAMES[:-1], got, want, strict=True):
        assert_close(name, unpermute(np.asarray(x), order), y, "float32")
    assert_close("dsinks", dsinks, dsinks_wanted, "float32")


@pytest.mark.slow
def test_rows_that_the_mesh_does_not_divide_and_seeds_that_rows_share():
    """Then every device of the batch axes has all rows, and counts the sinks' gradient once."""
    *arrays, sinks = inputs()
    arrays, tokens = [x[:3] for x in arrays], jax.tree.map(lambda x: x[:3], TOKENS)
    options = {"dropout": dropout(batch_size=1)}
    want = run(blockwise_attention, tokens, (*arrays, sinks), **options)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context_inner=2, tensor=2))):
        got = run(sharded_attention, tokens, (*arrays, sinks), **options)
    for name, x, y in zip(NAMES, got, want, strict=True):
        assert_close(name, x, y, "float32")


def test_a_gradient_of_the_sinks_that_is_not_summed_fails(monkeypatch):
    """The comparison can fail."""
    psum = jax.lax.psum
    monkeypatch.setattr(jax.lax, "psum", lambda x, axes: psum(x, axes[:-1]))
    with pytest.raises(AssertionError, match="dsinks"):
        test_equals_one_device(*MESHES[2], False)

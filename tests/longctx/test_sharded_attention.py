"""Attention on a mesh equals attention on one device, forward and every gradient, and moves nothing."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import Attention, AttentionSharding, MeshConfig, make_mesh, masks
from longctx.context_parallel import sharded_attention
from pallas_kernels import BlockSizes, Tokens, blockwise_attention, make_schedule
from pallas_kernels.blockwise import api, xla
from pallas_kernels.testing import assert_close, packed_tokens

MASK = masks.causal() & masks.documents()
SIZES = BlockSizes(block_q=16, block_kv=16)
ROWS = ((20, 28), (48,), (1, 1, 30), (5, 5, 5), (40, 8), (16, 16, 16), (47,), (24, 24))
SHAPES = {"q": (8, 48, 4, 8), "k": (8, 48, 2, 8), "v": (8, 48, 2, 8), "dout": (8, 48, 4, 8)}


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)}


def run(inputs, tokens, attend):
    @jax.jit
    def forward_and_gradients(q, k, v, dout):
        schedule = make_schedule(MASK, tokens, q_len=48, kv_len=48, block_sizes=SIZES)
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask=MASK, tokens=tokens, schedule=schedule), q, k, v)
        return out, *vjp(dout)

    arguments = tuple(inputs.values())
    return dict(zip(("out", "dq", "dk", "dv"), forward_and_gradients(*arguments), strict=True)), (
        forward_and_gradients.lower(*arguments).compile().as_text()
    )


@pytest.mark.parametrize(
    "shape",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in ({"data": 8}, {"fsdp": 4, "tensor": 2})),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole_rows"])
def test_equals_one_device(inputs, shape, packed):
    tokens = jax.tree.map(jnp.asarray, packed_tokens(ROWS, 48)) if packed else Tokens()
    want, _ = run(inputs, tokens, blockwise_attention)
    mesh = make_mesh(MeshConfig(**shape))
    with jax.set_mesh(mesh):
        spec = jax.P(("data", "fsdp"), None, "tensor")
        placed = {name: jax.device_put(x, jax.NamedSharding(mesh, spec)) for name, x in inputs.items()}

        def attend(*args, **kwargs):
            return sharded_attention(*args, sharding=None, **kwargs)

        got, program = run(placed, tokens, attend)
        assert got["dq"].sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 4)
    for name in want:
        assert_close(name, got[name], want[name], "float32")
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in program


@pytest.mark.parametrize("shape", [None, {"data": 8}, {"context_inner": 4, "data": 2}], ids=str)
@pytest.mark.parametrize("options", [{}, {"deterministic": False}], ids=str)
def test_the_layers_gradient_is_told_whether_it_must_come_out_the_same(shape, options, monkeypatch):
    told = set()

    def backward(*args, options, **kwargs):
        told.add(options.deterministic)
        return xla.backward(*args, options=options, **kwargs)

    monkeypatch.setitem(api.BACKWARD, "xla", backward)
    layer = Attention(16, num_heads=2, block_sizes=SIZES, rngs=nnx.Rngs(0), **options)
    x = jax.ShapeDtypeStruct((8, 64, 16), jnp.float32)
    with nullcontext() if shape is None else jax.set_mesh(make_mesh(MeshConfig(**shape))):
        jax.eval_shape(jax.grad(lambda x: layer(x).sum()), x)
        jax.eval_shape(jax.grad(lambda x: layer.decode(x, layer.init_cache(8, 64))[0].sum()), x)
    assert told == {options.get("deterministic", True)}


def test_axes_of_another_mesh(inputs):
    mesh = jax.make_mesh(
        (2, 2), ("rows", "cores"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    sharding = AttentionSharding(batch=("rows",), heads=("cores",))

    def attend(*args, **kwargs):
        return sharded_attention(*args, sharding=sharding, **kwargs)

    want, _ = run(inputs, Tokens(), blockwise_attention)
    with jax.set_mesh(mesh):
        got, _ = run(inputs, Tokens(), attend)
    np.testing.assert_allclose(got["out"], want["out"], atol=1e-6)

    with pytest.raises(ValueError, match="batch axis 'rows' is not of the mesh in scope, whose axes are \\(\\)"):
        attend(inputs["q"], inputs["k"], inputs["v"], mask=MASK, tokens=Tokens(), schedule=None)


def test_kv_heads_must_split_over_the_heads_axes(inputs):
    with (
        jax.set_mesh(make_mesh(MeshConfig(tensor=4, data=2))),
        pytest.raises(ValueError, match="2 kv heads do not split over the 4 devices of mesh axes \\('tensor',\\)"),
    ):
        sharded_attention(
            inputs["q"], inputs["k"], inputs["v"], mask=MASK, tokens=Tokens(), schedule=None, sharding=None
        )


def test_heads_that_differ_must_stay_whole(inputs):
    mask = masks.per_head(masks.causal(), masks.full())
    with (
        jax.set_mesh(make_mesh(MeshConfig(tensor=2, data=4))),
        pytest.raises(NotImplementedError, match=r"differs between heads, and the heads are split over the 2 devices"),
    ):
        sharded_attention(inputs["q"], inputs["k"], inputs["v"], mask=mask, tokens=Tokens())


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"return_lse": True}, NotImplementedError, "return_lse is not served where a mesh splits the call"),
        ({"skip_softmax_threshold": 0.1}, NotImplementedError, "skip_softmax_threshold is not served"),
        ({"block_maxima": BlockSizes(block_q=4, block_kv=4)}, NotImplementedError, "block_maxima is not served"),
        ({"sinks": jnp.zeros(3)}, ValueError, r"sinks is float32\[3\], wanted floats of shape \[2\]"),
        ({"dropout": 0.1}, ValueError, "dropout=0.1, wanted None or a Dropout"),
        ({"tokens": Tokens.self_attention(jnp.zeros((1, 8), jnp.int32))}, ValueError, "tokens.q_positions has shape"),
        ({"logits_soft_cap": -1.0}, ValueError, "logits_soft_cap=-1.0, wanted"),
    ],
)
def test_a_wrong_call_is_refused_before_it_is_split(option, error, message):
    x = jnp.ones((1, 16, 2, 4))
    with jax.set_mesh(make_mesh(MeshConfig(context_inner=4), jax.devices()[:4])):
        with pytest.raises(error, match=f"sharded_attention: {message}"):
            sharded_attention(x, x, x, **{"mask": masks.causal(), "tokens": Tokens()} | option)

"""A bias over a mesh gives what one device gives: the loss, and the gradients of q, k, v and of its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import Attention, BiasConfig, MeshConfig, make_mesh, masks
from longctx.context_parallel import ContextParallelConfig, sharded_attention
from longctx.testing import assert_context_parallel_equal
from pallas_kernels import Alibi, BlockSizes, KerpleLog, T5Buckets, Tokens, blockwise_attention
from pallas_kernels.testing import packed_tokens

LENGTH, NUM_HEADS = 64, 4
MASK = masks.causal() & masks.documents()
WINDOW = masks.sliding_window(left=6) & masks.documents()
ROWS = ((20, 1, 30, 13), (9, 40))


def parameters(kind: str) -> dict:
    rng = np.random.default_rng(0)

    def floats(*shape):
        return jnp.asarray(rng.uniform(0.1, 1.0, shape), jnp.float32)

    biases = {
        "alibi": Alibi(slopes=floats(NUM_HEADS)),
        "t5": T5Buckets(table=floats(NUM_HEADS, 8), max_distance=20),
        "kerple": KerpleLog(r1=floats(NUM_HEADS), r2=floats(NUM_HEADS)),
    }
    scales = {name: floats(heads, 8) for name, heads in (("q", NUM_HEADS), ("k", 2), ("v", 2))}
    return {"bias": biases[kind], **scales}


def batch() -> dict:
    rng, tokens = np.random.default_rng(1), packed_tokens(ROWS, LENGTH)
    arrays = {name: (NUM_HEADS if name in ("q", "dout") else 2) for name in ("q", "k", "v", "dout")}
    arrays = {name: rng.standard_normal((len(ROWS), LENGTH, heads, 8)) for name, heads in arrays.items()}
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    return arrays | {"positions": tokens.q_positions, "segment_ids": tokens.q_segment_ids}


def loss_of(attend, mask):
    def loss(params, batch):
        q, k, v = (batch[name] * params[name] for name in "qkv")
        tokens = Tokens.self_attention(batch["positions"], batch["segment_ids"])
        options = {"mask": mask, "tokens": tokens, "block_sizes": BlockSizes(block_q=8, block_kv=8)}
        return jnp.sum(attend(q, k, v, bias=params["bias"], **options) * batch["dout"])

    return loss


@pytest.mark.parametrize(
    ("kind", "strategy", "layout"),
    [
        ("t5", "ring", "zigzag"),
        pytest.param("alibi", "all_gather", "striped", marks=pytest.mark.slow),
        pytest.param("kerple", "ulysses", "zigzag", marks=pytest.mark.slow),
        pytest.param("t5", "ulysses", "contiguous", marks=pytest.mark.slow),
        pytest.param("kerple", "halo", "contiguous", marks=pytest.mark.slow),
    ],
)
def test_context_parallel_equals_one_device(kind, strategy, layout):
    """Parameters of the heads that a device is given, and gradients that all devices add to."""
    sharding = ContextParallelConfig(layout=layout, strategy=strategy).sharding()

    def attend(q, k, v, **options):
        return sharded_attention(q, k, v, sharding=sharding, **options)

    loss = loss_of(attend, WINDOW if strategy == "halo" else MASK)
    degrees = (1, 2) if strategy == "ring" else (1, 2, 4)
    assert_context_parallel_equal(loss, parameters(kind), batch(), sharding=sharding, degrees=degrees)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "strategy"),
    [
        ({"data": 2, "context_inner": 2, "tensor": 2}, "ring"),
        ({"data": 2, "context_inner": 2, "tensor": 2}, "ulysses"),
        ({"data": 2, "context_outer": 2, "context_inner": 2}, "usp"),
        ({"data": 2, "context_outer": 2, "context_inner": 2}, "double_ring"),
    ],
)
def test_rows_and_heads_that_are_split_too(shape, strategy):
    sharding = ContextParallelConfig(strategy=strategy).sharding()

    def attend(q, k, v, **options):
        return sharded_attention(q, k, v, sharding=sharding, **options)

    def gradients(attend, params, batch):
        return jax.block_until_ready(jax.jit(jax.value_and_grad(loss_of(attend, MASK)))(params, batch))

    params, arrays = parameters("t5"), jax.tree.map(jnp.asarray, batch())
    want = gradients(blockwise_attention, params, arrays)
    with jax.set_mesh(make_mesh(MeshConfig(**shape))):
        got = gradients(attend, params, arrays)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4), got, want)


@pytest.mark.slow
def test_constants_have_no_gradient_to_sum():
    """Slopes that nobody differentiates cost nothing in the backward pass: nothing of theirs is summed over devices."""
    params = parameters("alibi")
    bias = params.pop("bias")

    def count(with_bias: bool) -> int:
        def loss(params, batch):
            constant = params.get("bias", bias)
            return loss_of(sharded_attention, MASK)(params | {"bias": constant}, batch)

        differentiated = params | ({"bias": bias} if with_bias else {})
        with jax.set_mesh(make_mesh(MeshConfig(context_inner=2), jax.devices()[:2])):
            return str(jax.make_jaxpr(jax.grad(loss))(differentiated, batch())).count("psum")

    assert count(True) > count(False)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"context_inner": 2, "tensor": 2, "data": 2}, {"context_inner": 8}], ids=str)
def test_decoding_over_a_split_cache_equals_a_call(shape):
    """Each device adds the bias of its own slots and heads; the gradient of the parameters is that of the call."""
    layer = Attention(16, num_heads=4, num_kv_heads=2, rotary=None, bias=BiasConfig(kind="t5"), rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (2, 8, 16))

    def called(state):
        return nnx.merge(graph, state)(x)

    def decoded(state):
        layer = nnx.merge(graph, state)
        first, cache = layer.decode(x[:, :5], layer.init_cache(2, 16))
        return jnp.concatenate([first, layer.decode(x[:, 5:], cache)[0]], axis=1)

    def run(function):
        def loss(state):
            y = function(state)
            return (y**2).sum(), y

        return jax.block_until_ready(jax.jit(jax.grad(loss, has_aux=True))(state))

    want = run(called)
    with jax.set_mesh(make_mesh(MeshConfig(**shape))):
        got = run(decoded)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), got, want)

"""The MLP over tiles of tokens is the MLP, on any mesh, and holds its hidden dim for a tile alone."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from longctx import (
    AttentionConfig,
    AttentionSharding,
    MeshConfig,
    ModelConfig,
    RMSNorm,
    SwiGLU,
    TransformerLM,
    batch_sharding,
    make_mesh,
    param_shardings,
)
from longctx.context_parallel import Layout
from longctx.tiled import over_tiles

CONFIG = ModelConfig(
    vocab_size=30,
    dim=16,
    num_layers=3,
    mlp_dim=24,
    mixers={
        "local": AttentionConfig(num_heads=4, num_kv_heads=2, window=6, block_q=4, block_kv=4),
        "global": AttentionConfig(num_heads=4, num_kv_heads=2, block_q=4, block_kv=4),
    },
    pattern=("local", "global"),
    dtype="float32",
)
MESHES = {
    "fsdp x context x tensor": MeshConfig(fsdp=2, context_inner=2, tensor=2),
    "data x both context": MeshConfig(data=2, context_outer=2, context_inner=2),
}


def with_mlp(modules, x_BTD):
    norm, mlp = modules
    return x_BTD + mlp(norm(x_BTD))


def modules_of(dim, hidden_dim, dtype=jnp.float32):
    mlp = SwiGLU(dim, hidden_dim, dtype=dtype, rngs=nnx.Rngs(0))
    norm = RMSNorm(dim)
    norm.scale[...] = 1 + 0.1 * jax.random.normal(jax.random.key(1), (dim,))
    return norm, mlp


def results(apply, modules, x, cotangent):
    """y and every gradient by name."""
    y, vjp = jax.vjp(apply, modules, x)
    dmodules, dx = vjp(cotangent)
    gradients = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(dmodules)}
    return {"y": y, "dx": dx} | gradients


def tiled_with_mlp(tile):
    return functools.partial(over_tiles, with_mlp, tile=tile)


@pytest.mark.parametrize("tile", [5, 13, 26, 99])
def test_equals_the_layer(tile):
    modules = modules_of(10, 14)
    x, cotangent = jax.random.normal(jax.random.key(2), (2, 2, 13, 10))
    got, want = (results(apply, modules, x, cotangent) for apply in (tiled_with_mlp(tile), with_mlp))
    assert got.keys() == want.keys() and len(got) == 6
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_low_precision_gradients_are_no_worse():
    """Parts rounded to bfloat16 and added up in float32, against one rounding of the whole."""
    modules = modules_of(32, 64, jnp.bfloat16)
    x, cotangent = jax.random.normal(jax.random.key(2), (2, 1, 512, 32)).astype(jnp.bfloat16)
    exact = results(with_mlp, modules_of(32, 64), x.astype(jnp.float32), cotangent.astype(jnp.float32))
    got, low = (results(apply, modules, x, cotangent) for apply in (tiled_with_mlp(32), with_mlp))
    for name, want in exact.items():
        want = np.asarray(want, np.float64)
        errors = [np.linalg.norm(np.asarray(found[name], np.float64) - want) for found in (got, low)]
        assert got[name].dtype == low[name].dtype
        assert errors[0] <= 1.7 * errors[1], name


def loss_of(model, batch):
    logits = model(batch["tokens"], positions=batch["positions"])
    return jnp.sum(batch["weights"][..., None] * jnp.square(logits))


def batch_of(rows, length):
    keys = jax.random.split(jax.random.key(3), 2)
    return {
        "tokens": jax.random.randint(keys[0], (rows, length), 0, CONFIG.vocab_size, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length)),
        "weights": jax.random.normal(keys[1], (rows, length)),
    }


def of_model(config, batch, sharding=None):
    """The loss and its gradients, by name."""
    model = TransformerLM(config, sharding=sharding, rngs=nnx.Rngs(0))
    loss, gradients = jax.jit(jax.value_and_grad(loss_of))(model, batch)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    return {"loss": loss} | named


@functools.cache
def whole():
    return jax.tree.map(np.asarray, of_model(CONFIG, batch_of(4, 24)))


def assert_same(got, want):
    assert got.keys() == want.keys()
    total = np.sqrt(sum(np.sum(np.square(x)) for name, x in want.items() if name != "loss"))
    for name in want:
        error = np.linalg.norm(np.asarray(got[name]) - want[name])
        assert error <= 1e-5 * np.linalg.norm(want[name]) + 1e-6 * total, name


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "dots"))])
def test_a_model(remat):
    assert_same(of_model(dataclasses.replace(CONFIG, mlp_tile=7, remat=remat), batch_of(4, 24)), whole())


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_model_over_a_mesh(name):
    mesh = make_mesh(MESHES[name])
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch_of(4, 24), batch_sharding(mesh))
        assert_same(of_model(dataclasses.replace(CONFIG, mlp_tile=5), batch), whole())


def on_mesh(modules, x, mesh):
    """As in training."""
    spec = (("data", "fsdp"), ("context_outer", "context_inner"))
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    return jax.tree.map(jax.device_put, modules, param_shardings(modules, mesh)), x


@pytest.mark.parametrize("shape", [(4, 12), (3, 7)], ids=str)
@pytest.mark.parametrize("name", MESHES)
def test_over_a_mesh(name, shape):
    """Also where neither rows nor tokens nor dims divide."""
    modules = modules_of(*((16, 24) if shape == (4, 12) else (10, 14)))
    x, cotangent = jax.random.normal(jax.random.key(2), (2, *shape, modules[1].dim))
    want = results(with_mlp, modules, x, cotangent)
    with jax.set_mesh(mesh := make_mesh(MESHES[name])):
        given = on_mesh(modules, x, mesh) if shape == (4, 12) else (modules, x)
        got = jax.jit(functools.partial(results, tiled_with_mlp(5)))(*given, cotangent)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_matrices_are_gathered_and_their_gradients_summed_once():
    modules = modules_of(16, 24)
    x, cotangent = jax.random.normal(jax.random.key(2), (2, 4, 12, 16))
    with jax.set_mesh(mesh := make_mesh(MESHES["fsdp x context x tensor"])):
        program = jax.jit(functools.partial(results, tiled_with_mlp(3))).lower(*on_mesh(modules, x, mesh), cotangent)
        compiled = program.compile()
    # What tensor needs, each tile: the sum of y, and of the gradients of what gate and up read.
    assert collectives(compiled, inside=True) == {("all-reduce", "f32[1,3,16]"): 3}
    # A CPU's compiler leaves the scatter of a gradient as a sum and a slice.
    assert collectives(compiled) - collectives(compiled, inside=True) == {
        ("all-gather", "f32[16,12]"): 2,
        ("all-gather", "f32[12,16]"): 1,
        ("all-reduce", "f32[16,12]"): 2,
        ("all-reduce", "f32[12,16]"): 1,
        ("all-reduce", "f32[16]"): 1,
    }


def lowered(config, mesh, *, rows, length, sharding=None):
    """The gradients of a model on a mesh, its parameters and tokens placed as in training."""
    abstract = nnx.eval_shape(lambda: TransformerLM(config, sharding=sharding, rngs=nnx.Rngs(0)))
    model = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        param_shardings(abstract, mesh),
    )
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)), batch_of(rows, length)
    )
    return jax.jit(jax.grad(loss_of)).lower(model, batch).compile()


def collectives(compiled, *, inside=False):
    """Kind and shapes of the program's collectives, or of those alone that loops over tiles hold."""
    found = collections.Counter()
    for line in compiled.as_text().splitlines():
        kind = re.search(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", line)
        if kind and (not inside or "shard_map/while/body" in line):
            found.update((kind[2], shape) for shape in re.findall(r"\w+\[[\d,]*\]", kind[1]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_no_collectives_are_added_on_a_context_mesh(layout):
    sharding = AttentionSharding(strategy="ring", layout=Layout(name=layout))
    config = dataclasses.replace(CONFIG, num_layers=2, pattern=("global",), mixers={"global": CONFIG.mixers["global"]})
    with jax.set_mesh(mesh := make_mesh(MeshConfig(context_inner=4), jax.devices()[:4])):
        options = dict(rows=2, length=64, sharding=sharding)
        without, compiled = (lowered(dataclasses.replace(config, mlp_tile=tile), mesh, **options) for tile in (None, 8))
    assert collectives(compiled, inside=True) == {}

    def moved(compiled):
        """A gradient may be summed as it is or transposed."""
        counts = collections.Counter()
        for (kind, shape), count in collectives(compiled).items():
            counts[kind, *sorted(re.findall(r"\d+", shape))] += count
        return counts

    assert moved(compiled) == moved(without)


def test_memory_does_not_grow_with_tokens_times_hidden_dim():
    modules = modules_of(64, 2048)

    def temporaries(length, tile):
        x = jax.ShapeDtypeStruct((1, length, 64), jnp.float32)
        apply = with_mlp if tile is None else tiled_with_mlp(tile)
        program = jax.jit(functools.partial(results, apply)).lower(modules, x, x).compile()
        return program.memory_analysis().temp_size_in_bytes

    hidden = 4 * (8192 - 2048) * 2048
    assert temporaries(8192, None) - temporaries(2048, None) > 2 * hidden
    assert temporaries(8192, 512) - temporaries(2048, 512) < 0.15 * hidden


def test_refused():
    with pytest.raises(ValueError, match="mlp_tile: got 0, wanted null or a number of tokens >= 1"):
        dataclasses.replace(CONFIG, mlp_tile=0)
    with pytest.raises(ValueError, match="remat: got mlp_hidden=save with mlp_tile=4, which never holds it"):
        dataclasses.replace(CONFIG, mlp_tile=4, remat={"mlp_hidden": "save"})
    norm, _ = modules_of(4, 4)
    norm.offset = nnx.Variable(jnp.zeros(4))
    with pytest.raises(ValueError, match="wanted modules that hold nothing but parameters"):
        over_tiles(lambda norm, x: norm(x), norm, jnp.ones((1, 3, 4)), tile=2)

"""Meshes, the map from logical dims to mesh axes, and that no result depends on the mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longctx import (
    AttentionConfig,
    MeshConfig,
    ModelConfig,
    TransformerLM,
    batch_sharding,
    constrain,
    cross_entropy,
    make_mesh,
    param_shardings,
)

CONFIG = ModelConfig(
    vocab_size=30,
    dim=16,
    num_layers=2,
    mlp_dim=24,
    mixers={"attention": AttentionConfig(num_heads=8, num_kv_heads=4, window=6, block_q=4, block_kv=4)},
    pattern=("attention",),
    dtype="float32",
)
FSDP_AXES = ("fsdp", "context_outer", "context_inner")


def mesh_of(**sizes):
    num_devices = int(np.prod(list(sizes.values())))
    return make_mesh(MeshConfig(**sizes), jax.devices()[:num_devices])


def abstract_model():
    return nnx.eval_shape(lambda: TransformerLM(CONFIG, rngs=nnx.Rngs(0)))


@functools.cache
def random_model():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.float32(0.3 * rng.standard_normal(leaf.shape)), abstract_model())


def batch():
    tokens = jax.random.randint(jax.random.key(0), (8, 13), 0, CONFIG.vocab_size)
    segment_ids = jnp.asarray([[0] * 5 + [1] * 4 + [-1] * 3] * 7 + [[0] * 12], jnp.int32)
    return tokens[:, :-1], tokens[:, 1:], segment_ids


def loss_and_gradient(model, inputs, targets, segment_ids):
    def loss(model):
        weights = (segment_ids >= 0).astype(jnp.float32)
        return cross_entropy(model(inputs, segment_ids=segment_ids), targets, weights, z_loss=1e-2).loss_sum

    return jax.value_and_grad(loss)(model)


@functools.cache
def on_one_device():
    return jax.tree.map(np.asarray, jax.jit(loss_and_gradient)(random_model(), *batch()))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(dict(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
        pytest.param(dict(data=8), marks=pytest.mark.slow),
        pytest.param(dict(fsdp=8), marks=pytest.mark.slow),
        pytest.param(dict(tensor=4), marks=pytest.mark.slow),
        dict(fsdp=2, context_outer=2, context_inner=2),
    ],
    ids=lambda sizes: " ".join(f"{name}={size}" for name, size in sizes.items()),
)
def test_loss_and_gradient_do_not_depend_on_the_mesh(sizes):
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        shardings = param_shardings(abstract_model(), mesh)
        model = jax.device_put(random_model(), shardings)
        arrays = jax.device_put(batch(), batch_sharding(mesh))
        step = jax.jit(loss_and_gradient, out_shardings=(None, shardings))
        loss, gradient = jax.block_until_ready(step(model, *arrays))

    wanted_loss, wanted_gradient = on_one_device()
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.max(np.abs(w))), gradient, wanted_gradient
    )

    sharded_over = int(np.prod([size for axis, size in sizes.items() if axis != "data"]))
    gate = model.periods[0].mlp.gate.kernel[...]
    assert gate.addressable_shards[0].data.size * sharded_over == gate.size
    assert (
        arrays[0].addressable_shards[0].data.size * np.prod([size for axis, size in sizes.items() if axis != "tensor"])
        == arrays[0].size
    )


def test_each_parameter_and_its_moments_take_the_specs_of_the_table():
    mesh = mesh_of(data=1, fsdp=2, context_inner=2, tensor=2)
    state = nnx.state(abstract_model(), nnx.Param)
    specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings(state, mesh))
    mixer, mlp = specs["periods"][0]["mixer"], specs["periods"][0]["mlp"]
    assert specs["embedding"].get_value() == P(("tensor",), FSDP_AXES)
    assert mixer["q"]["kernel"].get_value() == P(None, FSDP_AXES, ("tensor",), None)
    assert mixer["k"]["kernel"].get_value() == P(None, FSDP_AXES, ("tensor",), None)
    assert mixer["out"]["kernel"].get_value() == P(None, ("tensor",), None, FSDP_AXES)
    assert mlp["gate"]["kernel"].get_value() == P(None, FSDP_AXES, ("tensor",))
    assert mlp["down"]["kernel"].get_value() == P(None, ("tensor",), FSDP_AXES)
    assert specs["final_norm"]["scale"].get_value() == P(None)

    moments = param_shardings(jax.eval_shape(optax.scale_by_adam().init, state), mesh)
    for moment in (moments.mu, moments.nu):
        assert jax.tree.map(lambda sharding: sharding.spec, moment) == specs
    assert moments.count.spec == P()


def test_a_dim_that_does_not_divide_takes_fewer_axes_or_none():
    mesh = mesh_of(fsdp=2, context_outer=2, tensor=2)

    def spec(shape, logical_axes):
        param = nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), logical_axes=logical_axes)
        return param_shardings({"w": param}, mesh)["w"].get_value().spec

    assert spec((8, 6), ("embed", "mlp")) == P(FSDP_AXES, ("tensor",))
    assert spec((6, 8), ("embed", "mlp")) == P(("fsdp",), ("tensor",))
    assert spec((7, 7), ("embed", "mlp")) == P(None, None)
    assert spec((8,), ("embed", "mlp")) == P()
    with pytest.raises(ValueError, match=r"logical_axes: got 'wings', wanted None or one of embed, vocab, mlp, heads"):
        spec((8,), ("wings",))


def test_arrays_without_names_are_replicated():
    mesh = mesh_of(fsdp=2)
    tree = {"a": jax.ShapeDtypeStruct((4, 4), jnp.float32), "b": nnx.Param(jnp.ones((4,)))}
    assert all(sharding.spec == P() for sharding in jax.tree.leaves(param_shardings(tree, mesh)))


def test_batch_sharding():
    mesh = mesh_of(data=2, context_inner=2)
    assert batch_sharding(mesh).spec == P(("data", "fsdp"), ("context_outer", "context_inner"))
    assert batch_sharding(mesh, ndim=1).spec == P(("data", "fsdp"))


def test_constrain_lays_out_by_name_under_our_mesh_only():
    @jax.jit
    def double(x):
        return constrain(2 * x, "batch", None, "mlp")

    x = jnp.ones((4, 3, 6))
    constraints = lambda: str(jax.make_jaxpr(double)(x)).count("sharding_constraint[")  # noqa: E731
    assert constraints() == 0
    mesh = mesh_of(data=2, tensor=2)
    with jax.set_mesh(mesh):
        assert constraints() == 1
        assert double(x).sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "tensor")), 3)
        jax.jit(jax.shard_map(double, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))(x)
    with jax.set_mesh(Mesh(np.array(jax.devices()[:2]), ("theirs",), axis_types=(AxisType.Auto,))):
        assert constraints() == 0


def test_mesh_has_all_five_auto_axes():
    mesh = make_mesh(MeshConfig(data=-1, tensor=2))
    assert dict(mesh.shape) == dict(data=4, fsdp=1, context_outer=1, context_inner=1, tensor=2)
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(data=0), r"data: got 0, wanted a number of devices >= 1, or -1 for the rest"),
        (dict(tensor=-2), r"tensor: got -2, wanted a number of devices >= 1, or -1 for the rest"),
        (dict(data=-1, fsdp=-1), r"fsdp: got -1 although data is -1 too, wanted at most one -1; give one a number"),
        (dict(data=4), r"mesh: data=4 x fsdp=1 x .* does not use exactly the 8 devices at hand; set one axis to -1"),
        (dict(data=-1, tensor=3), r"mesh: data=-1 x .* x tensor=3 does not use exactly the 8 devices at hand"),
        (dict(data=-1, tensor=16), r"mesh: data=-1 x .* x tensor=16 does not use exactly the 8 devices at hand"),
    ],
)
def test_mesh_refuses(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**sizes))

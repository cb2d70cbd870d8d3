"""The state of a run: parameters, optimizer state, step, random key, skipped steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx import traversals
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from longctx.lora import is_adapter
from longctx.sharding import param_shardings

HOST_MEMORY = "pinned_host"
"""The kind of memory of the host that a device reads and writes by itself."""

ModelBuilder = Callable[[nnx.Rngs], nnx.Module]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a step changes; a pytree, donated to each step."""

    step: jax.Array
    """Steps taken, skipped ones included; int32."""
    params: Any
    """The model's nnx.Param values as nested dicts; nnx.merge(graphdef, params) gives the model."""
    opt_state: Any
    """The optimizer's state, of the parameters that are trained."""
    rng: jax.Array
    """Raw key data (uint32) for what is random in a step; the parameters were drawn from its sibling."""
    skipped_steps: jax.Array
    """Steps whose update was not applied because the loss or the gradient was not finite; int32."""


def float32(tree: Any) -> Any:
    """The tree with every leaf cast to float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def trained(params: Any) -> Any:
    """Of nested dicts, in the shape of the parameters, the part that a step changes: adapters if there are any, or all.

    What it leaves out, `frozen` has; `together` puts both back.
    """
    return _part(params, True)


def frozen(params: Any) -> Any:
    """The rest of `trained`."""
    return _part(params, False)


def together(trained: Any, frozen: Any) -> Any:
    """What `trained` and `frozen` are parts of."""
    if not frozen:
        return trained
    return traversals.unflatten_mapping(traversals.flatten_mapping(frozen) | traversals.flatten_mapping(trained))


def _part(params: Any, is_trained: bool) -> Any:
    if not isinstance(params, Mapping):  # a model of one array, say
        return params if is_trained else {}
    flat = traversals.flatten_mapping(params)
    if not any(map(is_adapter, flat)):
        return params if is_trained else {}
    return traversals.unflatten_mapping({path: leaf for path, leaf in flat.items() if is_adapter(path) == is_trained})


def is_on_host(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether an array of a state lies in the host's memory, not the device's."""
    return leaf.sharding.memory_kind == HOST_MEMORY


def abstract_model(build: ModelBuilder) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's static graph and its abstract parameters, without allocating anything.

    Raises: ValueError when the model holds variables other than nnx.Param, which a step would not carry on.
    """
    graphdef, params, rest = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param, ...)
    if jax.tree.leaves(rest):
        names = ", ".join(".".join(map(str, path)) for path, _ in nnx.to_flat_state(rest))
        raise ValueError(f"model: holds variables that are no nnx.Param ({names}); the trainer keeps only nnx.Param")
    return graphdef, params


def abstract_params(build: ModelBuilder, mesh: Mesh | AbstractMesh) -> Any:
    """The parameters as ShapeDtypeStructs with the shardings of longctx.sharding.param_shardings."""
    _, params = abstract_model(build)
    pure = nnx.to_pure_dict(params)
    shardings = jax.tree.unflatten(jax.tree.structure(pure), jax.tree.leaves(param_shardings(params, mesh)))
    return jax.tree.map(_struct, pure, shardings)


def _struct(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def abstract_state(
    build: ModelBuilder,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    *,
    offload_optimizer: bool = False,
) -> TrainState:
    """The state as ShapeDtypeStructs that carry the mesh's shardings: for restoring and for planning.

    Parameters follow longctx.sharding.param_shardings; whatever in the optimizer state mirrors a parameter
    follows that parameter, with `offload_optimizer` in the host's memory; everything else is replicated.
    """
    params = abstract_params(build, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

    def mirror(leaf, param):
        kind = HOST_MEMORY if offload_optimizer else None
        return _struct(leaf, param.sharding.with_memory_kind(kind) if kind else param.sharding)

    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
        params=params,
        opt_state=optax.tree_utils.tree_map_params(
            optimizer,
            mirror,
            jax.eval_shape(lambda params: optimizer.init(float32(params)), trained(params)),
            trained(params),
            transform_non_params=lambda leaf: _struct(leaf, replicated),
        ),
        rng=jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=replicated),
        skipped_steps=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
    )


def create_state(
    build: ModelBuilder,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    offload_optimizer: bool = False,
) -> TrainState:
    """A fresh state, every leaf drawn directly into its sharding: no device ever holds the whole of it."""
    abstract = abstract_state(build, optimizer, mesh, offload_optimizer=offload_optimizer)

    def init(key):
        params_key, step_key = jax.random.split(key)
        params = nnx.to_pure_dict(nnx.split(build(nnx.Rngs(params_key)), nnx.Param)[1])
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(float32(trained(params))),
            rng=jax.random.key_data(step_key),
            skipped_steps=jnp.zeros((), jnp.int32),
        )

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))

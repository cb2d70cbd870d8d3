"""Mesh axes, and how logical dims map to them.

Every parameter carries a logical name for each of its dims (`nnx.Param(..., logical_axes=("embed", "mlp"))`, plain
metadata that Flax does not interpret); activations are named where `constrain` is called. The tables below map both to
mesh axes. A dim takes the longest prefix of its mesh axes whose product divides it, so a dim that does not divide
stays replicated.

The mesh has Auto axes: XLA's partitioner inserts the collectives, and no result depends on the mesh.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

AXIS_NAMES = ("data", "fsdp", "context_outer", "context_inner", "tensor")
CONTEXT_AXES = ("context_outer", "context_inner")

PARAMETER_AXES: Mapping[str, tuple[str, ...]] = {
    "embed": ("fsdp", *CONTEXT_AXES),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "norm": (),
    "layers": (),
}
ACTIVATION_AXES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": CONTEXT_AXES,
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each mesh axis spans; their product is the number of devices used."""

    data: int = 1
    """Devices that take different rows of the batch and keep the same parameters; -1 takes the rest."""
    fsdp: int = 1
    """Devices that take different rows of the batch and keep different parts of the parameters; -1 takes the rest."""
    context_outer: int = 1
    """Groups of devices between which a sequence is split, across slower links; -1 takes the rest."""
    context_inner: int = 1
    """Devices inside a group between which a sequence is split, across faster links; -1 takes the rest."""
    tensor: int = 1
    """Devices between which heads, MLP hidden dims and the vocabulary are split; -1 takes the rest."""

    def __post_init__(self):
        for name in AXIS_NAMES:
            size = getattr(self, name)
            if size != -1 and size < 1:
                raise ValueError(f"{name}: got {size}, wanted a number of devices >= 1, or -1 for the rest")
        open_axes = [name for name in AXIS_NAMES if getattr(self, name) == -1]
        if len(open_axes) > 1:
            raise ValueError(
                f"{open_axes[1]}: got -1 although {open_axes[0]} is -1 too, wanted at most one -1; give one a number"
            )

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Devices on each axis, the -1 filled in.

        Raises: ValueError where the axes cannot use exactly `num_devices` devices.
        """
        sizes = {name: getattr(self, name) for name in AXIS_NAMES}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        for name, size in sizes.items():
            if size == -1 and num_devices % fixed == 0:
                sizes[name] = num_devices // fixed
        if -1 in sizes.values() or math.prod(sizes.values()) != num_devices:
            written = " x ".join(f"{name}={getattr(self, name)}" for name in AXIS_NAMES)
            raise ValueError(
                f"mesh: {written} does not use exactly the {num_devices} devices at hand; "
                "set one axis to -1 to take the rest, or pass fewer devices"
            )
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all five axes, of Auto type, over `devices` (default: all of them).

    Use it with `jax.set_mesh`. Raises: ValueError where the axes cannot use exactly these devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    # Splits an axis of a TPU's torus where no other way leads to these sizes: better than to refuse them.
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def param_shardings(abstract_state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of every array of a state.

    Works on any pytree of nnx Variables and arrays or ShapeDtypeStructs: model states, and optimizer states too, since
    optax keeps the Variables, with their metadata, of the parameters it was initialised with. An array without
    `logical_axes`, or whose rank is another than theirs (a factored second moment), is replicated.

    Args:
      abstract_state: For example `jax.eval_shape` of a function that returns an `nnx.State`.
      mesh: From `make_mesh`.

    Returns: a pytree of the same structure with a NamedSharding for each array: use it as jit's `out_shardings`, with
      `jax.device_put`, or map over both trees.
    """

    def of_node(node):
        logical_axes = node.get_metadata("logical_axes", None) if isinstance(node, nnx.Variable) else None

        def of_array(array):
            if logical_axes is None or len(logical_axes) != len(array.shape):
                return NamedSharding(mesh, PartitionSpec())
            return NamedSharding(mesh, partition_spec(logical_axes, array.shape, PARAMETER_AXES, mesh))

        return jax.tree.map(of_array, node)

    return jax.tree.map(of_node, abstract_state, is_leaf=lambda node: isinstance(node, nnx.Variable))


def batch_sharding(mesh: Mesh | AbstractMesh, ndim: int = 2) -> NamedSharding:
    """The sharding of an array of a batch: rows over (data, fsdp), tokens over the context axes.

    Args:
      mesh: From `make_mesh`.
      ndim: 2 for `[B, T]` arrays, 1 for `[B]`.
    """
    spec = (ACTIVATION_AXES["batch"], ACTIVATION_AXES["sequence"])
    return NamedSharding(mesh, PartitionSpec(*spec[:ndim]))


def constrain(x: Array, *logical_axes: str | None) -> Array:
    """Asks the partitioner to lay x out over the mesh in scope by the logical names of its dims (None: replicated).

    Does nothing unless the mesh in scope has the five axes of `make_mesh`, of Auto type: not without a mesh, not under
    somebody else's, and not inside a shard_map over all of them. Inside one over some, x is laid out over the others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.axis_names != AXIS_NAMES:
        return x
    left = {name for name, kind in zip(AXIS_NAMES, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if not left or not set(mesh.axis_types) <= {AxisType.Auto, AxisType.Manual}:
        return x
    table = {name: tuple(axis for axis in axes if axis in left) for name, axes in ACTIVATION_AXES.items()}
    return jax.lax.with_sharding_constraint(x, partition_spec(logical_axes, x.shape, table, mesh))


def own_mesh_in_scope() -> AbstractMesh | None:
    """The mesh in scope if it has the five axes of `make_mesh`, of Auto type, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    own = not mesh.empty and mesh.axis_names == AXIS_NAMES and set(mesh.axis_types) == {AxisType.Auto}
    return mesh if own else None


def partition_spec(
    logical_axes: Sequence[str | None],
    shape: Sequence[int],
    table: Mapping[str, tuple[str, ...]],
    mesh: Mesh | AbstractMesh,
) -> PartitionSpec:
    """The mesh axes of each dim, by one of the tables above; None for a dim that stays whole."""
    spec = []
    for name, size in zip(logical_axes, shape, strict=True):
        if name is not None and name not in table:
            raise ValueError(f"logical_axes: got {name!r}, wanted None or one of {', '.join(table)}")
        axes = table[name] if name is not None else ()
        while size % math.prod(mesh.shape[axis] for axis in axes):
            axes = axes[:-1]
        spec.append(axes or None)
    return PartitionSpec(*spec)

"""Checks that a function, anybody's, computes the same however many devices share a sequence.

    assert_context_parallel_equal(loss, params, {"tokens": tokens, "positions": positions})

runs `loss(params, batch)` over 1, 2, 4 and 8 devices and compares the loss, the norm of the gradients and every
gradient. On a machine without accelerators `jax.config.update("jax_num_cpu_devices", 8)` makes eight devices of its
CPU, if it stands before anything else asks JAX for devices.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from longctx.context_parallel import AttentionSharding, Layout
from longctx.context_parallel.layout import permute
from longctx.sharding import CONTEXT_AXES, MeshConfig, make_mesh

_MAX_NAMED = 8  # results that a message names


def assert_context_parallel_equal(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    batch: Any,
    *,
    degrees: Sequence[int] = (1, 2, 4, 8),
    sharding: AttentionSharding | None = None,
    mesh_of: Callable[[int], Mesh] | None = None,
    sequence_dims: Any = 1,
    evaluate: Callable[[Any, Any], Any] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    devices: Sequence[jax.Device] | None = None,
) -> dict[int, dict[str, float]]:
    """Asserts that a loss and its gradients are those of one device over each number of devices that share a sequence.

    With P devices and g_i the gradient of parameter i, `g` that of all of them, for each i

      ||g_i(P) - g_i(1)|| <= rtol ||g_i(1)|| + atol ||g(1)||

    and |x(P) - x(1)| <= rtol |x(1)| for the loss and the norm ||g||, and `||x(P) - x(1)|| <= rtol ||x(1)||` for each
    result of `evaluate`. nan and infinity never pass.

    Args:
      loss_fn: `(params, batch) -> loss`, a scalar; compiled and run under `jax.set_mesh`. It is the whole loss, of all
        devices: what it draws or counts may not depend on how many there are.
      params: A pytree, a Flax NNX module or its state among them; on every device in full. Leaves that are not floating
        point get no gradient.
      batch: A pytree of arrays that hold whole sequences, in their order. They are put into the order of the layout
        and split over the devices.
      degrees: Devices that share a sequence; 1 is what the others are compared with, whether it is named or not.
      sharding: Names the mesh axes of the sequence and the layout, as for `Attention`; None means the context axes of
        `longctx.make_mesh`, and a contiguous layout.
      mesh_of: The mesh for a degree, for functions that need other axes too. None takes `make_mesh`, or where
        `sharding` names other axes of the sequence, a mesh of those alone.
      sequence_dims: The dim of the tokens: for all leaves of the batch, or a pytree whose leaves are ints and None, of
        the batch's structure or a prefix of it; None is for what has no tokens, such as a key.
      evaluate: `(params, batch) -> results`, a pytree of results of which none has a dim of tokens.
      rtol, atol: As above. The defaults are for float32.
      devices: Those to use; None means `jax.devices()`.
    Returns: for each degree but 1 the error of each result, over the norm of the one wanted.
    Raises: AssertionError that names the degree, the results, their errors and where to look. ValueError where there
      are fewer devices than a degree, no degree is above 1, a mesh has another degree, a layout does not divide the
      sequence, or the loss of one device is not finite.
    Cost: compiles `loss_fn` and `evaluate` once a degree. One degree runs at a time.
    """
    sharding = sharding or AttentionSharding()
    setup = _Setup(
        axes=sharding.sequence or CONTEXT_AXES,
        layout=sharding.layout or Layout(),
        mesh_of=mesh_of,
        devices=tuple(jax.devices() if devices is None else devices),
    )
    if all(degree == 1 for degree in degrees):
        raise ValueError(
            f"degrees: got {tuple(degrees)}, wanted one above 1; there is nothing to compare one device with"
        )
    degrees = [degree for degree in degrees if degree != 1]
    meshes = {degree: setup.mesh(degree) for degree in (1, *degrees)}  # refuses before anything is compiled
    dims = _leaf_dims(batch, sequence_dims)
    want = _results(loss_fn, evaluate, params, setup.on_mesh(batch, dims, meshes[1], 1), meshes[1])
    if not np.isfinite(want["loss"]) or not np.isfinite(want["gradient norm"]):
        raise ValueError(
            f"loss_fn: got loss {float(want['loss'])} and gradient norm {float(want['gradient norm'])} on one device, "
            "wanted finite numbers; nothing can be compared with them"
        )
    errors = {}
    for degree in degrees:
        got = _results(loss_fn, evaluate, params, setup.on_mesh(batch, dims, meshes[degree], degree), meshes[degree])
        comparisons = [_Comparison.of(name, got[name], want[name], want["gradient norm"], rtol, atol) for name in want]
        wrong = [comparison for comparison in comparisons if not comparison.passes]
        if wrong:
            raise AssertionError(_message(degree, wrong, len(comparisons), setup.layout))
        errors[degree] = {comparison.name: comparison.error for comparison in comparisons}
    return errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Setup:
    """How sequences are split."""

    axes: tuple[str, ...]
    layout: Layout
    mesh_of: Callable[[int], Mesh] | None
    devices: tuple[jax.Device, ...]

    def mesh(self, degree: int) -> Mesh:
        if degree < 1:
            raise ValueError(f"degrees: got {degree}, wanted numbers of devices >= 1")
        if degree > len(self.devices):
            raise ValueError(
                f"degrees: got {degree} with {len(self.devices)} devices, wanted no more than there are; for virtual "
                f'ones call jax.config.update("jax_num_cpu_devices", {degree}) and ("jax_platforms", "cpu") before '
                "anything else uses JAX, or leave the degree out"
            )
        devices = self.devices[:degree]
        if self.mesh_of is not None:
            mesh = self.mesh_of(degree)
        elif self.axes == CONTEXT_AXES:
            mesh = make_mesh(MeshConfig(context_inner=degree), devices)
        else:
            grid = np.array(devices).reshape((1,) * (len(self.axes) - 1) + (degree,))
            mesh = Mesh(grid, self.axes, axis_types=(AxisType.Auto,) * len(self.axes))
        sizes = [mesh.shape.get(axis, 0) for axis in self.axes]
        if np.prod(sizes) != degree:
            raise ValueError(
                f"mesh_of: got a mesh {dict(mesh.shape)} for degree {degree}, wanted {degree} devices along the axes "
                f"{self.axes}; build it of the degree, or name the axes of the sequence in "
                "sharding=AttentionSharding(sequence=...)"
            )
        return mesh

    def on_mesh(self, batch: Any, dims: Sequence[int | None], mesh: Mesh, degree: int) -> Any:
        """The batch in the order of the layout, split over the axes of the sequence."""

        def placed(x, dim):
            if dim is None:
                return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
            if not 0 <= dim < np.ndim(x):
                raise ValueError(
                    f"sequence_dims: got {dim} for a leaf of shape {np.shape(x)}, wanted one of its dims, or None if "
                    "it has no tokens; pass a tree of them of the batch's structure"
                )
            order = self.layout.order(np.shape(x)[dim], degree)
            return jax.device_put(
                permute(x, order, axis=dim), NamedSharding(mesh, PartitionSpec(*(None,) * dim, self.axes))
            )

        leaves, structure = jax.tree.flatten(batch)
        return structure.unflatten([placed(x, dim) for x, dim in zip(leaves, dims, strict=True)])


def _leaf_dims(batch: Any, sequence_dims: Any) -> list[int | None]:
    """The dim of the tokens of each leaf of the batch."""
    dims: list[int | None] = []

    def spread(dim, part):
        dims.extend([dim] * len(jax.tree.leaves(part)))

    jax.tree.map(spread, sequence_dims, batch, is_leaf=lambda dim: dim is None)
    return dims


def _results(loss_fn, evaluate, params, batch, mesh: Mesh) -> dict[str, np.ndarray]:
    """All that is compared, by name, in float64."""
    leaves, structure = jax.tree.flatten(params)
    leaves = jax.device_put(leaves, NamedSharding(mesh, PartitionSpec()))
    trained = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]
    if not trained:
        raise ValueError("params: got no floating point leaf, wanted at least one; there is no gradient to compare")

    def loss_of(some, rest, batch):
        merged = list(rest)
        for i, x in zip(trained, some, strict=True):
            merged[i] = x
        return loss_fn(structure.unflatten(merged), batch)

    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss_of))
        # Blocked on: XLA's CPU runtime aborts when many steps with collectives are in flight.
        loss, gradients = jax.block_until_ready(step([leaves[i] for i in trained], leaves, batch))
        results = {}
        if evaluate is not None:
            results = jax.block_until_ready(jax.jit(evaluate)(structure.unflatten(leaves), batch))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    named = {f"gradient of {_name(paths[i])}": _float64(x) for i, x in zip(trained, gradients, strict=True)}
    norm = np.asarray(np.sqrt(sum(np.sum(x**2) for x in named.values())))
    evaluated = {
        f"evaluation {_name(path)}".rstrip(): _float64(x) for path, x in jax.tree_util.tree_leaves_with_path(results)
    }
    return {"loss": _float64(loss), "gradient norm": norm, **named, **evaluated}


def _float64(x) -> np.ndarray:
    return np.asarray(jax.device_get(x), np.float64)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Comparison:
    """One result, over P devices and on one.

    Attributes:
      error, tolerance: Norms, over that of the result wanted.
      scale: What the wanted one would best be multiplied with.
    """

    name: str
    error: float
    tolerance: float
    scale: float

    @classmethod
    def of(cls, name: str, got: np.ndarray, want: np.ndarray, gradient_norm, rtol: float, atol: float) -> "_Comparison":
        if got.shape != want.shape:
            raise AssertionError(
                f"{name}: got shape {got.shape}, wanted {want.shape}, that of one device; return results of which none "
                "has a dim of tokens or devices"
            )
        norm = float(np.linalg.norm(want))
        error, tolerance = float(np.linalg.norm(got - want)), rtol * norm
        if name.startswith("gradient of "):
            tolerance += atol * float(gradient_norm)
        if norm == 0.0:
            return cls(name=name, error=error, tolerance=tolerance, scale=np.nan)
        scale = float(np.vdot(want, got)) / norm**2
        return cls(name=name, error=error / norm, tolerance=tolerance / norm, scale=scale)

    @property
    def passes(self) -> bool:
        return self.error <= self.tolerance  # False for nan

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.3g} of its norm, wanted <= {self.tolerance:.3g}"


def _message(degree: int, wrong: Sequence[_Comparison], num_compared: int, layout: Layout) -> str:
    worst_first = sorted(wrong, key=lambda x: -np.nan_to_num(x.error, nan=np.inf))
    lines = [f"  {comparison}" for comparison in worst_first[:_MAX_NAMED]]
    if len(wrong) > _MAX_NAMED:
        lines.append(f"  and {len(wrong) - _MAX_NAMED} more")
    hints = "".join(f"\n  - {hint}" for hint in _hints(degree, {x.name: x for x in wrong}, layout))
    return (
        f"context parallel degree {degree}: {len(wrong)} of {num_compared} results are not those of one device; worst "
        f"first:\n" + "\n".join(lines) + f"\nLook at:{hints}"
    )


def _hints(degree: int, wrong: Mapping[str, _Comparison], layout: Layout) -> list[str]:
    hints = []
    scaled = {n: [x.name for x in wrong.values() if abs(x.scale / n - 1) < 1e-2] for n in (degree, 1 / degree)}
    if scaled[degree]:
        hints.append(
            f"{scaled[degree][0]} is {degree} times too large: what is whole on each device is summed over them"
        )
    if scaled[1 / degree]:
        hints.append(f"{scaled[1 / degree][0]} is 1/{degree} of the right one: a psum that is not there, or a pmean")
    if any(not np.isfinite(x.error) for x in wrong.values()):
        hints.append("nan: a shard whose queries see no key (0 / 0), or tokens that break what the sharding promises")
    if "loss" in wrong:
        hints.append(
            "the loss itself: each device's mean, averaged over devices with different numbers of targets (sum losses "
            "and weights over the devices, then divide); a psum that is not there; an out_spec that is not true"
        )
        hints.append(
            f"positions, targets and segment ids: with layout={layout.name} they are in the batch, with the tokens, "
            "not made by arange inside, which on a shard starts at its own first token"
        )
    else:
        hints.append(
            "the backward pass alone: a custom_vjp whose gradients are not summed over the devices, or a shard_map "
            "with check_vma=False, whose transpose sums what is already whole"
        )
    return hints

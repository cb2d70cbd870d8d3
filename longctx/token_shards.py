"""Loops over tiles of tokens on each device's own tokens, with parameters gathered and their gradients summed once.

XLA's partitioner would do both in every turn of the loop: it cannot know that a sum over devices may wait for the last
turn. So these loops run inside a shard_map over the axes that split tokens, and the collectives stand outside the loop.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from longctx.sharding import ACTIVATION_AXES, AXIS_NAMES, PARAMETER_AXES, own_mesh_in_scope, partition_spec

_TOKEN_AXES = (*ACTIVATION_AXES["batch"], *ACTIVATION_AXES["sequence"])
_TENSOR_AXES = tuple(name for name in AXIS_NAMES if name not in _TOKEN_AXES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenShards:
    """How the tokens of one call, `[B, T]`, are split over the mesh in scope; hashable. Without a mesh all is whole.

    Attributes:
      tokens: Of an array `[B, T]`.
      axes: Over which tokens are split; only those of more than one device.
      sizes: Devices of each axis of the mesh; none without a mesh.
    """

    tokens: PartitionSpec = PartitionSpec()
    axes: tuple[str, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, shape: Sequence[int]) -> "TokenShards":
        """Of tokens `[B, T]` on the mesh of `longctx.make_mesh`, where it is in scope."""
        mesh = own_mesh_in_scope()
        if mesh is None:
            return cls()
        tokens = partition_spec(("batch", "sequence"), shape, ACTIVATION_AXES, mesh)
        sizes = tuple((name, mesh.shape[name]) for name in AXIS_NAMES)
        return cls(tokens=tokens, axes=_split_axes(tokens, sizes), sizes=sizes)

    def of_parameter(self, logical_axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """How a parameter lies on the mesh."""
        mesh = own_mesh_in_scope()
        return PartitionSpec() if mesh is None else partition_spec(logical_axes, shape, PARAMETER_AXES, mesh)

    def map(self, shard: Callable, in_specs: Any, out_specs: Any, *, with_tensor: bool) -> Callable:
        """`shard` on each device. Where not with_tensor, the tensor axis is left to XLA's partitioner."""
        if not self.sizes:
            return shard
        names = AXIS_NAMES
        if not with_tensor:
            names = _TOKEN_AXES
            in_specs, out_specs = (_without_tensor(specs) for specs in (in_specs, out_specs))
        return jax.shard_map(shard, in_specs=in_specs, out_specs=out_specs, axis_names=set(names), check_vma=False)

    def gathered(self, parameter: jax.Array, spec: PartitionSpec) -> jax.Array:
        """A device's shard of a parameter made whole, but over tensor; to be called inside `map`."""
        for dim, axes in enumerate(spec):
            axes = self._gathered_axes(axes)
            if axes:
                parameter = jax.lax.all_gather(parameter, axes, axis=dim, tiled=True)
        return parameter

    def placed(self, parameter: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Asks the partitioner to lay a parameter, or its gradient, out as its spec says; outside `map`."""
        return jax.lax.with_sharding_constraint(parameter, spec) if self.sizes else parameter

    def scattered(self, gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
        """The gradient of a device's shard of a parameter, from each device's sum over its own tokens."""
        summed = set()
        for dim, axes in enumerate(spec):
            axes = self._gathered_axes(axes)
            if axes and set(axes) <= set(self.axes):
                gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=dim, tiled=True)
                summed |= set(axes)
            elif axes:  # some of them have the same tokens, and so the same gradient
                size = gradient.shape[dim] // math.prod(dict(self.sizes)[name] for name in axes)
                start = jax.lax.axis_index(axes) * size
                # Summed before, since devices with the same tokens take different parts.
                together = tuple(name for name in axes if name in self.axes)
                gradient = jax.lax.psum(gradient, together) if together else gradient
                gradient = jax.lax.dynamic_slice_in_dim(gradient, start, size, axis=dim)
                summed |= set(together)
        return psum(gradient, tuple(name for name in self.axes if name not in summed))

    def tensor_axes(self, axes: Any) -> tuple[str, ...]:
        """Those of one entry of a spec, of more than one device, that are not gathered."""
        return tuple(name for name in _split_axes((axes,), self.sizes) if name in _TENSOR_AXES)

    def _gathered_axes(self, axes: Any) -> tuple[str, ...]:
        return tuple(name for name in _split_axes((axes,), self.sizes) if name in _TOKEN_AXES)


def in_tiles(num_tokens: int, tile: int) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """Two functions: `[B, T, ...]` with so many tokens into tiles `[tiles, C, ...]` in order, and back to `[B T, ...]`.

    Tiles are alike, of `tile` tokens or fewer, so that little is added to fill the last one: zeros.
    """
    num_tiles = -(-num_tokens // tile)
    size = -(-num_tokens // num_tiles)

    def tiled(x: jax.Array) -> jax.Array:
        x = x.reshape(num_tokens, *x.shape[2:])
        if num_tiles * size > num_tokens:
            x = jnp.pad(x, ((0, num_tiles * size - num_tokens), *[(0, 0)] * (x.ndim - 1)))
        return x.reshape(num_tiles, size, *x.shape[1:])

    def untiled(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])[:num_tokens]

    return tiled, untiled


def psum(x: Any, axes: tuple[str, ...]) -> Any:
    """The sum over devices, and x itself where there are no axes."""
    return jax.lax.psum(x, axes) if axes else x


def _split_axes(dims: Iterable[Any], sizes: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    # A PartitionSpec keeps the name of a single axis as it is.
    names = itertools.chain.from_iterable((dim,) if isinstance(dim, str) else dim or () for dim in dims)
    return tuple(name for name in names if dict(sizes)[name] > 1)


def _without_tensor(specs: Any) -> Any:
    def without(spec: PartitionSpec) -> PartitionSpec:
        dims = [(dim,) if isinstance(dim, str) else dim or () for dim in spec]
        return PartitionSpec(*(tuple(name for name in dim if name not in _TENSOR_AXES) or None for dim in dims))

    return jax.tree.map(without, specs, is_leaf=lambda spec: isinstance(spec, PartitionSpec))

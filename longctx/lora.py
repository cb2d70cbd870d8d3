"""Low-rank adapters of projections: what fine-tuning trains in the place of the matrices themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.arguments import check_names
from longctx.projections import Projection

ADAPTERS = ("lora_a", "lora_b")
"""Names of their parameters, which stand beside the `kernel` that they adapt."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters beside projections: y = x W + (alpha / rank) (x A) B, of which only A and B are trained."""

    rank: int
    """Columns of A and rows of B."""
    alpha: float
    """The adapters' part of the result is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q", "k", "v", "out", "gate", "up", "down")
    """Names of the projections that have adapters: q, k, v, out of the mixers, gate, up, down of the MLP."""

    def __post_init__(self):
        check_names("targets", self.targets)
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ValueError(f"rank: got {self.rank}, wanted a number >= 1; 16 is customary")
        if not self.alpha > 0:
            raise ValueError(f"alpha: got {self.alpha}, wanted a number > 0; the rank, or twice that, is customary")
        if not self.targets:
            raise ValueError("targets: got no names, wanted at least one; name a projection, or leave lora out")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def add_adapters(module: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> set[str]:
    """Gives the projections of a module that the config names adapters, in place; the names that it found.

    A starts truncated normal with standard deviation 1 / sqrt(fan_in), B at zero, so that the module computes what it
    did before. Both are float32. Nothing else of what `rngs` is to draw changes.
    """
    # Not drawn from the stream, which would shift what comes behind it.
    stream = rngs.params
    key = jax.random.fold_in(stream.key[...], stream.count[...])
    found = set()
    for number, (path, node) in enumerate(nnx.iter_graph(module)):
        if isinstance(node, Projection) and path[-1] in config.targets:
            node.adapt(rank=config.rank, scale=config.scale, key=jax.random.fold_in(key, number))
            found.add(path[-1])
    return found


def check_targets(config: LoraConfig, module: nnx.Module) -> None:
    """Raises ValueError where a target names no projection of a module."""
    known = sorted({path[-1] for path, node in nnx.iter_graph(module) if isinstance(node, Projection)})
    for name in config.targets:
        if name not in known:
            raise ValueError(f"lora.targets: got {name!r}, wanted names of projections ({', '.join(known)}); remove it")


def is_adapter(path: Sequence[Any]) -> bool:
    """Whether the parameter at this path is one of an adapter."""
    return path[-1] in ADAPTERS


def merged(params: Mapping[Any, Any], config: LoraConfig) -> dict[Any, Any]:
    """The parameters of the model without adapters that computes the same: W + (alpha / rank) A B in the place of W.

    Args:
      params: Nested dicts of arrays, as `nnx.to_pure_dict` gives them.
    """
    if all(name in params for name in ADAPTERS):
        a, b, kernel = (jnp.asarray(params[name]) for name in (*ADAPTERS, "kernel"))
        is_stacked = a.ndim + b.ndim - 2 > kernel.ndim  # over layers, first
        product = jax.vmap(_product) if is_stacked else _product
        merged_kernel = kernel.astype(jnp.float32) + config.scale * product(a, b)
        others = {name: value for name, value in params.items() if name not in ADAPTERS}
        return others | {"kernel": merged_kernel.astype(kernel.dtype)}
    return {name: merged(value, config) if isinstance(value, Mapping) else value for name, value in params.items()}


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), axes=1)

"""Runs the attention op on each device's shard of a mesh: the one place that wraps it in shard_map.

Kernels cannot be cut up by XLA's partitioner, and loops whose bounds depend on the rows of a batch should not be: each
device runs the op on its own rows and its own heads, which need nothing from the others.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from longctx.sharding import ACTIVATION_AXES, own_mesh_in_scope
from pallas_kernels import (
    Mask,
    Schedule,
    Tokens,
    blockwise_attention,
    blockwise_attention_backward,
    blockwise_attention_forward,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSharding:
    """Names the mesh axes that attention is split over.

    Attributes:
      batch: Axes that split the rows of the batch.
      heads: Axes that split the heads; their size must divide the number of kv heads.
    """

    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


_OWN_AXES = AttentionSharding(batch=ACTIVATION_AXES["batch"], heads=ACTIVATION_AXES["heads"])


def sharded_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask,
    tokens: Tokens,
    schedule: Schedule | None,
    sharding: AttentionSharding | None,
    **options,
) -> jax.Array:
    """`blockwise_attention` over the mesh in scope; it moves nothing between devices.

    Args:
      q, k, v: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, V]`, global.
      mask, tokens, schedule, **options: As `blockwise_attention`; tokens and schedule are global too.
      sharding: The mesh axes to split over; None means those of `longctx.make_mesh` where such a mesh is in scope,
        and otherwise calls the op directly.
    Returns: out `[B, T, N, V]`, split as q.
    Raises: ValueError where an axis is not of the mesh, or its size does not divide the kv heads.
    Cost: no communication. A batch that the batch axes do not divide is computed by each of their devices in full.
    """
    if sharding is None and own_mesh_in_scope() is not None:
        sharding = _OWN_AXES
    if sharding is None:
        return blockwise_attention(q, k, v, mask=mask, tokens=tokens, schedule=schedule, **options)
    call = _Call(mask=mask, sharding=sharding, options=tuple(options.items()))
    return _attention(call, q, k, v, tokens, schedule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static of a call; hashable."""

    mask: Mask
    sharding: AttentionSharding
    options: tuple[tuple[str, Any], ...]

    def arguments(self) -> dict[str, Any]:
        return {"mask": self.mask, **dict(self.options)}


# Differentiated here and not inside the shard_map, whose transpose would add a reduction over every axis that its
# inputs are not split over.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, q, k, v, tokens, schedule):
    return _attention_fwd(call, q, k, v, tokens, schedule)[0]


def _attention_fwd(call: _Call, q, k, v, tokens, schedule):
    heads, lse, rows = _specs(call.sharding, q, k)

    def shard(q, k, v, tokens, schedule):
        return blockwise_attention_forward(q, k, v, tokens=tokens, schedule=schedule, **call.arguments())

    out, lse = jax.shard_map(
        shard,
        in_specs=(heads, heads, heads, rows(tokens), rows(schedule)),
        out_specs=(heads, lse),
        check_vma=False,  # the op's loops start from constants, which that check would have to be told of
    )(q, k, v, tokens, schedule)
    return out, (q, k, v, out, lse, tokens, schedule)


def _attention_bwd(call: _Call, residuals, dout):
    q, k, v, out, lse, tokens, schedule = residuals
    heads, lse_spec, rows = _specs(call.sharding, q, k)

    def shard(q, k, v, out, lse, dout, tokens, schedule):
        return blockwise_attention_backward(
            q, k, v, out, lse, dout, jnp.zeros_like(lse), tokens=tokens, schedule=schedule, **call.arguments()
        )

    gradients = jax.shard_map(
        shard,
        in_specs=(heads, heads, heads, heads, lse_spec, heads, rows(tokens), rows(schedule)),
        out_specs=(heads, heads, heads),
        check_vma=False,  # as in the forward
    )(q, k, v, out, lse, dout, tokens, schedule)
    return *gradients, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _specs(sharding: AttentionSharding, q: jax.Array, k: jax.Array) -> tuple[PartitionSpec, PartitionSpec, Callable]:
    """Specs of `[B, T, N, H]` arrays, of lse, and of a tree of tokens or schedules over the mesh in scope."""
    mesh = jax.sharding.get_abstract_mesh()
    heads_size = _axes_size("heads", sharding.heads, mesh)
    if k.shape[2] % heads_size:
        raise ValueError(
            f"sharded_attention: {k.shape[2]} kv heads do not split over the {heads_size} devices of mesh axes "
            f"{sharding.heads}; make those axes smaller or num_kv_heads a multiple"
        )
    batch = sharding.batch if q.shape[0] % _axes_size("batch", sharding.batch, mesh) == 0 else ()

    def rows(tree: Any) -> Any:
        # The first dim of tokens and schedules is the batch, or 1 for what all rows share.
        return jax.tree.map(lambda x: PartitionSpec(batch if x.shape[0] == q.shape[0] else ()), tree)

    return PartitionSpec(batch, None, sharding.heads), PartitionSpec(batch, sharding.heads), rows


def _axes_size(name: str, axes: tuple[str, ...], mesh: AbstractMesh) -> int:
    for axis in axes:
        if axis not in mesh.shape:
            raise ValueError(
                f"AttentionSharding: {name} axis {axis!r} is not of the mesh in scope, whose axes are "
                f"{mesh.axis_names}; name one of those, inside jax.set_mesh"
            )
    return math.prod(mesh.shape[axis] for axis in axes)

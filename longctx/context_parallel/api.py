"""Runs the attention op on each device's shard of a mesh: the one place that wraps it in shard_map.

Kernels cannot be cut up by XLA's partitioner, and loops whose bounds depend on the rows of a batch should not be: each
device runs the op on its own rows and its own heads, which need nothing from the others.
"""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from pallas_kernels import Mask, Schedule, Tokens, blockwise_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSharding:
    """Names the mesh axes that attention is split over.

    Attributes:
      batch: Axes that split the rows of the batch.
      heads: Axes that split the heads; their size must divide the number of kv heads.
    """

    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


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
      sharding: The mesh axes to split over; None, or no mesh in scope, calls the op directly.
    Returns: out `[B, T, N, V]`, split as q.
    Raises: ValueError where an axis is not of the mesh, or its size does not divide the kv heads.
    Cost: no communication. A batch that the batch axes do not divide is computed by each of their devices in full.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if sharding is None or mesh.empty:
        return blockwise_attention(q, k, v, mask=mask, tokens=tokens, schedule=schedule, **options)
    heads_size = _axes_size("heads", sharding.heads, mesh)
    if k.shape[2] % heads_size:
        raise ValueError(
            f"sharded_attention: {k.shape[2]} kv heads do not split over the {heads_size} devices of mesh axes "
            f"{sharding.heads}; make those axes smaller or num_kv_heads a multiple"
        )
    batch = sharding.batch if q.shape[0] % _axes_size("batch", sharding.batch, mesh) == 0 else ()
    heads_spec = PartitionSpec(batch, None, sharding.heads)

    def rows_spec(x: jax.Array) -> PartitionSpec:
        """Of tokens and schedules, whose first dim is the batch, or 1 for one that all rows share."""
        return PartitionSpec(batch if x.shape[0] == q.shape[0] else ())

    def shard(q, k, v, tokens, schedule):
        return blockwise_attention(q, k, v, mask=mask, tokens=tokens, schedule=schedule, **options)

    return jax.shard_map(
        shard,
        in_specs=(heads_spec,) * 3 + (jax.tree.map(rows_spec, tokens), jax.tree.map(rows_spec, schedule)),
        out_specs=heads_spec,
        check_vma=False,  # the op's loops start from constants, which that check would have to be told of
    )(q, k, v, tokens, schedule)


def _axes_size(name: str, axes: tuple[str, ...], mesh: AbstractMesh) -> int:
    for axis in axes:
        if axis not in mesh.shape:
            raise ValueError(f"AttentionSharding: {name} axis {axis!r} is not of the mesh, which has {mesh.axis_names}")
    return math.prod(mesh.shape[axis] for axis in axes)

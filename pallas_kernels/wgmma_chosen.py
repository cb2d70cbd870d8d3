"""The matmuls of attention between 64 queries and 64 keys on Hopper's tensor cores, one warpgroup by itself.

Nothing is in flight between two of these: two warpgroups, each with queries of its own, fill each other's gaps.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.wgmma import (
    IN_FLIGHT,
    MATRIX,
    PTX_DTYPES,
    ROWS,
    SCALAR,
    TILE_BYTES,
    TRANSFORMS,
    Ptx,
    array_type,
    as_int32,
    descriptor,
    fragmented,
    int32s,
    row_of_tiles,
)

_SMEM = plgpu.RefType(TRANSFORMS)


def logits(
    a_smem, b_smem, *, slot: jax.typing.ArrayLike, part: jax.typing.ArrayLike = 0, b_slot: jax.typing.ArrayLike = 0
) -> jax.Array:
    """a[slot] b[b_slot]^T of the part-th 64 rows of a[slot]: float32 `[64, C]`, of slots of `[R, H]` and `[C, H]`."""
    (rows, head_dim), num_columns = a_smem.shape[1:], b_smem.shape[1]
    dtype = PTX_DTYPES[a_smem.dtype.name]

    @plgpu.inline_mgpu(
        arg_types=(_SMEM, _SMEM, SCALAR, SCALAR, SCALAR), return_type=array_type((ROWS, num_columns), MATRIX)
    )
    def emit(_, a_smem, b_smem, slot, part, b_slot):
        row_bytes = row_of_tiles(head_dim)
        ptx = Ptx()
        s = ptx.write(num_columns // 2)
        at = (slot, rows * head_dim * 2), (part, ROWS * head_dim * 2)
        a, b = ptx.read(
            "l",
            (
                descriptor(a_smem, *at, leading=0, stride=row_bytes),
                descriptor(b_smem, (b_slot, num_columns * head_dim * 2), leading=0, stride=row_bytes),
            ),
        )
        ptx.begin()
        ptx.matmul(s, a, b, contracted=head_dim, dtype=dtype, fresh=True)
        ptx.commit()
        ptx.wait(0)
        return fragmented(ptx.emit(), (ROWS, num_columns)).to_layout(MATRIX.to_mgpu())

    return emit(a_smem, b_smem, *int32s((slot, part, b_slot)))


def weighted(p: jax.Array, v_smem) -> jax.Array:
    """p v, float32 `[64, H]`, of p `[64, 64]` in registers, 16 bits, and v `[64, H]`."""
    head_dim = v_smem.shape[-1]
    dtype = PTX_DTYPES[v_smem.dtype.name]

    @plgpu.inline_mgpu(arg_types=(MATRIX, _SMEM), return_type=array_type((ROWS, head_dim), MATRIX))
    def emit(_, p, v_smem):
        row_bytes = row_of_tiles(head_dim)
        ptx = Ptx()
        out = ptx.write(head_dim // 2)
        p_registers = ptx.read("r", map(as_int32, p.registers.flat))
        (v,) = ptx.read("l", (descriptor(v_smem, leading=TILE_BYTES, stride=row_bytes),))
        ptx.begin()
        ptx.matmul(out, p_registers, v, contracted=ROWS, dtype=dtype, fresh=True, b_rows=row_bytes)
        ptx.commit()
        ptx.wait(0)
        return fragmented(ptx.emit(), (ROWS, head_dim)).to_layout(MATRIX.to_mgpu())

    return emit(p, v_smem)


def accumulate(acc: jax.Array, weights: jax.Array, of_queries_smem, *, slot: jax.typing.ArrayLike) -> jax.Array:
    """acc + weights of_queries[slot]; see `accumulate_and_dq`."""
    head_dim = of_queries_smem.shape[-1]
    dtype = PTX_DTYPES[of_queries_smem.dtype.name]

    @plgpu.inline_mgpu(arg_types=(MATRIX, MATRIX, _SMEM, SCALAR), return_type=array_type((ROWS, head_dim), MATRIX))
    def emit(_, acc, weights, of_queries_smem, slot):
        row_bytes = row_of_tiles(head_dim)
        ptx = Ptx()
        acc = ptx.update(acc.to_layout(IN_FLIGHT.to_mgpu()).registers.flat)
        weights = ptx.read("r", map(as_int32, weights.registers.flat))
        queries = slot, ROWS * head_dim * 2
        (of_queries,) = ptx.read("l", (descriptor(of_queries_smem, queries, leading=TILE_BYTES, stride=row_bytes),))
        ptx.begin()
        ptx.matmul(acc, weights, of_queries, contracted=ROWS, dtype=dtype, b_rows=row_bytes)
        ptx.commit()
        ptx.wait(0)
        return fragmented(ptx.emit(), (ROWS, head_dim)).to_layout(MATRIX.to_mgpu())

    return emit(acc, weights, of_queries_smem, *int32s((slot,)))


def accumulate_and_dq(
    acc: jax.Array,
    weights: jax.Array,
    of_queries_smem,
    ds_smem,
    k_smem,
    *,
    slot: jax.typing.ArrayLike,
    warpgroup: jax.typing.ArrayLike,
    column: int,
) -> tuple[jax.Array, jax.Array]:
    """acc += weights of_queries[slot], and 64 columns of dq = ds^T k.

    Args:
      acc: float32 `[64, H]`: dk or dv.
      weights: `[64, 64]` of keys and queries in registers, 16 bits: ds or p.
      of_queries_smem: `[slots, 64, H]`: q or dout.
      ds_smem: `[2, 64, 64]`, keys and queries, of which this warpgroup reads its own.
      k_smem: `[64, H]`.
      column: Where the columns of dq begin.
    Returns: acc, and float32 `[64, 64]`.
    """
    head_dim = k_smem.shape[-1]
    dtype = PTX_DTYPES[k_smem.dtype.name]

    @plgpu.inline_mgpu(
        arg_types=(MATRIX, MATRIX, _SMEM, _SMEM, _SMEM, SCALAR, SCALAR),
        return_type=(array_type((ROWS, head_dim), MATRIX), array_type((ROWS, ROWS), MATRIX)),
    )
    def emit(_, acc, weights, of_queries_smem, ds_smem, k_smem, slot, warpgroup):
        row_bytes = row_of_tiles(head_dim)
        ptx = Ptx()
        dq = ptx.write(ROWS // 2)
        acc = ptx.update(acc.to_layout(IN_FLIGHT.to_mgpu()).registers.flat)
        weights = ptx.read("r", map(as_int32, weights.registers.flat))
        rows = {"leading": TILE_BYTES, "stride": row_bytes}
        of_queries, k, ds = ptx.read(
            "l",
            (
                descriptor(of_queries_smem, (slot, ROWS * head_dim * 2), **rows),
                descriptor(k_smem, (column // 64, TILE_BYTES), **rows),
                descriptor(ds_smem, (warpgroup, ROWS * ROWS * 2), leading=TILE_BYTES, stride=TILE_BYTES),
            ),
        )
        ptx.begin()
        ptx.matmul(dq, ds, k, contracted=ROWS, dtype=dtype, fresh=True, a_rows=TILE_BYTES, b_rows=row_bytes)
        ptx.commit()
        ptx.matmul(acc, weights, of_queries, contracted=ROWS, dtype=dtype, b_rows=row_bytes)
        ptx.commit()
        ptx.wait(0)
        values = ptx.emit()
        parts = (values[len(dq) :], head_dim), (values[: len(dq)], ROWS)
        return tuple(fragmented(x, (ROWS, width)).to_layout(MATRIX.to_mgpu()) for x, width in parts)

    return emit(acc, weights, of_queries_smem, ds_smem, k_smem, *int32s((slot, warpgroup)))


def product(x, y) -> jax.Array:
    """What the interpreter computes in their place."""
    return jnp.dot(x, y, preferred_element_type=jnp.float32)

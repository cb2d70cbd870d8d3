"""Biases of logits on Hopper: of a tile of 64 rows in registers, and the sums that gradients of parameters are made of.

A tile of tokens in order has as few distances as it has diagonals: 8 columns further is the same as 8 rows up, and a
thread holds rows that are 8 apart. So of a tile of 128 columns a thread computes 36 biases and not 64: those of every
other group of 8 columns, which the groups between them share (`_shared_out`). Where positions are given, each pair's.

A bias whose parameters are a number a head is computed as its class says. One that has a `reach` is read from a table
of short distances. Where blocks of tokens in order are further apart than that, it is one number, which is taken from
what logits are measured against and is not added to each pair. Any other that takes the unit for exponentials is read
from a table of all distances (`value_table`) where tokens are in order.

Kernels have biases in the unit of what they multiply to make logits: of q.k, or of what a soft cap makes of it.

Backward, each key adds up over its queries `dlogit dbias/dparameter` of each parameter, in registers, until the query
head changes; then they are written, `[B, N, parameters, S, parts]`, and XLA adds them up in a fixed order. Of a table
these are the sums of both sides beyond the reach; the pairs within it are a pass of their own (near_bias.py). Where
tokens are in order, another warpgroup of the fused kernel makes the sums, of a table those within the reach too
(pallas_mosaic_gpu_bias_sums.py): those who compute gradients of logits have not the registers.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels.bias import Bias, DistanceBias
from pallas_kernels.blockwise.pallas_mosaic_gpu_tiles import (
    COLUMN,
    MATRIX,
    ROW,
    columns,
    indices,
    rows,
)
from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import row_of_batch
from pallas_kernels.mosaic_gpu import WARPGROUP, bring_near, refuse, store_registers
from pallas_kernels.tokens import Leaf
from pallas_kernels.wgmma import IN_FLIGHT, ROWS, SCALAR, array_type, as_int32, fragmented

_GROUP = 8
"""Columns of which a thread holds two, in each of two rows that are as many apart."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NearTable:
    """A bias by distance: float32 `[N, 2 reach + 1]`, of the distances -reach ... reach."""

    by_distance: Leaf

    @property
    def reach(self) -> int:
        return self.by_distance.shape[1] // 2


type KernelBias = DistanceBias | NearTable
"""What kernels read of a bias, in their unit; in a kernel its leaves are references."""


def of_call(bias: Bias | None, unit: float) -> KernelBias | None:
    """What kernels read of a bias, whose unit this is.

    Raises: NotImplementedError with the reason where they cannot compute it.
    """
    if bias is None:
        return None
    name = type(bias).__name__
    if not isinstance(bias, DistanceBias):
        refuse(f"the bias {name} is not of the distance alone; it computes those that are")
    bias = bias.in_float32()
    if bias.reach is not None:
        return NearTable(_by_distance(bias) / unit)
    if any(x.ndim != 1 for x in jax.tree.leaves(bias)):
        refuse(f"the bias {name} has more than a number a head, and no reach; it reads no such parameters")
    return bias.scaled(1 / unit)


def num_sums(bias: KernelBias) -> int:
    """Sums that the backward pass makes of each key and query head."""
    return 2 if isinstance(bias, NearTable) else len(jax.tree.leaves(bias))


def sums_type(bias: KernelBias, shape: tuple[int, int, int], *, parts: int = _GROUP) -> jax.ShapeDtypeStruct:
    """Of the sums of `[B, N, S]`, in 8 parts each where they are `added` up: to add these up takes shared memory, of
    which there is none left."""
    batch_size, num_heads, kv_len = shape
    return jax.ShapeDtypeStruct((batch_size, num_heads, num_sums(bias), kv_len, parts), jnp.float32)


def store_sums(target, x: jax.Array, *, interpret: bool) -> None:
    """Those of 64 keys."""
    if interpret:
        target[...] = x
    else:
        store_registers(target, x)


def gradient_of_sums(
    bias: DistanceBias, sums_BNPS8: jax.Array, near_BNCD: jax.Array | None, unit: float
) -> DistanceBias:
    """The gradient of a bias' parameters, float32, given the sums of the backward pass.

    Args:
      near_BNCD: Of a bias that has a reach, the sums by distance of each block of keys, of all that the others do not
        have; without them it is the gradient of the pairs beyond the reach.
      unit: The kernels'.
    """
    bias = bias.in_float32()
    sums = jnp.sum(sums_BNPS8, axis=(0, 3, 4))
    if bias.reach is not None:
        by_distance, vjp = jax.vjp(_by_distance, bias)
        cotangent = jnp.zeros_like(by_distance).at[:, -1].set(sums[:, 0]).at[:, 0].set(sums[:, 1])
        if near_BNCD is not None:
            near = jnp.sum(near_BNCD, axis=(0, 2))
            distances = np.arange(near.shape[1]) - near.shape[1] // 2
            cotangent = cotangent.at[:, np.clip(distances, -bias.reach, bias.reach) + bias.reach].add(near)
        return vjp(cotangent)[0]
    scaled, vjp = jax.vjp(lambda bias: bias.scaled(1 / unit), bias)
    of_scaled = jax.tree.unflatten(jax.tree.structure(scaled), list(sums.T * unit))
    return vjp(of_scaled)[0]


def _by_distance(bias: DistanceBias) -> jax.Array:
    distances = jnp.arange(-bias.reach, bias.reach + 1, dtype=jnp.float32)
    return jax.vmap(lambda head: head.of_distance(distances))(bias)


def has_tables(bias: KernelBias) -> bool:
    """Whether kernels read it, and its derivatives, from tables by distance where tokens are in order."""
    return not isinstance(bias, NearTable) and not bias.is_linear


def distances_of_table(q_len: int, kv_len: int) -> jax.Array:
    """Those of a table by distance, from the least to the greatest, float32 `[2 length]`: of all tiles that have a
    pair, and of some that nobody wants."""
    length = (-(-max(q_len, kv_len) // WARPGROUP) + 2) * WARPGROUP
    return jnp.arange(-length, length, dtype=jnp.float32)


def value_table(bias: KernelBias | None, q_len: int, kv_len: int) -> jax.Array | None:
    """The bias by distance, from the least to the greatest, float32 `[N, 2 length]`; None where kernels read none.

    Memory: 8 N max(T, S) bytes.
    """
    if bias is None or not has_tables(bias):
        return None
    return jax.vmap(lambda head, distances: head.of_distance(distances), (0, None))(
        bias, distances_of_table(q_len, kv_len)
    )


def bring_distances_near(tables: Sequence, least: ArrayLike, count: int) -> None:
    """So many of tables by distance, vectors in device memory, from the least on, to the first-level cache."""
    at = pl.ds(least + tables[0].shape[0] // 2, WARPGROUP)
    bring_near(*(table.at[at] for table in tables), offsets=range(0, count, WARPGROUP))


def slopes_of(bias: KernelBias, head: ArrayLike) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """Of distances, what to multiply gradients of a head's logits by to have those of each sum."""
    if isinstance(bias, NearTable):
        reach = float(bias.reach)
        return lambda d: (jnp.where(d >= reach, 1.0, 0.0), jnp.where(d <= -reach, 1.0, 0.0))
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda ref: ref[head], bias))

    def slopes(d):
        def of_leaf(i: int) -> jax.Array:
            def value(x):
                return jax.tree.unflatten(tree, [*leaves[:i], x, *leaves[i + 1 :]]).of_distance(d)

            return jax.jvp(value, (leaves[i],), (jnp.float32(1.0),))[1]

        return tuple(map(of_leaf, range(len(leaves))))

    return slopes


class Side(NamedTuple):
    """Tokens along one side of a tile: their positions, `[B or 1, length]` in device memory, or None in order; and
    where they begin."""

    positions: Any
    start: ArrayLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileBias:
    """The bias of tiles `[64, columns]` of one kernel.

    Attributes:
      bias: References.
      values: Its `value_table`, a reference; None where there is none.
      reads_early: Whether there are registers for values that are asked for before the logits come.
      columns: A multiple of 16.
      rows_are_queries: Or keys.
      interpret: Whether in JAX's interpreter.
    """

    bias: KernelBias
    values: Any
    reads_early: bool
    columns: int
    rows_are_queries: bool
    interpret: bool

    def adding(
        self, head: ArrayLike, batch: ArrayLike, of_rows: Side, of_columns: Side
    ) -> Callable[[jax.Array], tuple[jax.Array, jax.Array | None]]:
        """A function of a tile's logits: those with their bias, but for what is the same for all pairs, and that; None
        for none. What is the same is read here: early, where the logits are still to come."""

        def of_each(logits):
            if isinstance(self.bias, NearTable):
                of_distance = functools.partial(self._read, head)
            else:
                of_distance = jax.tree.map(lambda ref: ref[head], self.bias).of_distance
            return logits + self._evaluated(lambda d: (of_distance(d),), batch, of_rows, of_columns)[0]

        if self.values is not None:
            read = self._reading(head, of_rows, of_columns)
            return lambda logits: (logits + read(), None)
        if not (isinstance(self.bias, NearTable) and self._in_order(of_rows, of_columns)):
            return lambda logits: (of_each(logits), None)
        least = self._first_distance(of_rows, of_columns) - (self.columns if self.rows_are_queries else ROWS)
        greatest = least + ROWS + self.columns
        reach, table = self.bias.reach, self.bias.by_distance
        is_far = (least >= reach) | (greatest <= -reach)
        of_all = jnp.where(is_far, table[head, jnp.where(least >= reach, 2 * reach, 0)], 0.0)
        return lambda logits: (lax.cond(is_far, lambda logits: logits, of_each, logits), of_all)

    def slopes(self, head: ArrayLike, batch: ArrayLike, of_rows: Side, of_columns: Side) -> tuple[jax.Array, ...]:
        """What to multiply gradients of logits by to have those of each sum, tiles."""
        return self._evaluated(slopes_of(self.bias, head), batch, of_rows, of_columns)

    def _in_order(self, of_rows: Side, of_columns: Side) -> bool:
        return of_rows.positions is None and of_columns.positions is None

    def _first_distance(self, of_rows: Side, of_columns: Side) -> jax.Array:
        """Of the first row and column of tokens in order."""
        distance = jnp.asarray(of_rows.start - of_columns.start, jnp.int32)
        return distance if self.rows_are_queries else -distance

    def _evaluated(
        self, functions: Callable[[jax.Array], tuple[jax.Array, ...]], batch, of_rows: Side, of_columns: Side
    ) -> tuple[jax.Array, ...]:
        """functions(distances of the tile), each elementwise."""
        shape, sign = (ROWS, self.columns), 1 if self.rows_are_queries else -1
        if not self._in_order(of_rows, of_columns):
            row_positions, column_positions = (
                _positions(side, batch, length, layout)
                for side, length, layout in ((of_rows, ROWS, ROW), (of_columns, self.columns, COLUMN))
            )
            distance = (rows(row_positions, shape) - columns(column_positions, shape)) * sign
            return functions(distance.astype(jnp.float32))
        first = self._first_distance(of_rows, of_columns).astype(jnp.float32)
        narrow = shape if self.interpret else (ROWS, _GROUP)
        steps = rows(indices(0, ROWS, ROW).astype(jnp.float32), narrow) - columns(
            indices(0, narrow[1], COLUMN).astype(jnp.float32), narrow
        )
        distance = steps * float(sign) + first
        if self.interpret:
            return functions(distance)
        groups = [functions(distance - float(sign * 2 * _GROUP * i)) for i in range(self.columns // (2 * _GROUP) + 1)]
        return tuple(_shared_out(group) for group in zip(*groups, strict=True))

    def _reading(self, head: ArrayLike, of_rows: Side, of_columns: Side) -> Callable[[], jax.Array]:
        """What returns the table at the distances of a tile of tokens in order."""
        values, first = self.values.at[head], self._first_distance(of_rows, of_columns)
        middle = self.values.shape[1] // 2
        if not self.interpret:
            sign = 1 if self.rows_are_queries else -1
            read = functools.partial(_diagonals, values, first + middle, sign, self.columns, early=self.reads_early)
            if not self.reads_early:
                return read
            found = read()
            return lambda: found

        def at(distance):
            return (jnp.take(values[...], distance.astype(jnp.int32) + middle),)

        return lambda: self._evaluated(at, None, of_rows, of_columns)[0]

    def _read(self, head: ArrayLike, distance: jax.Array) -> jax.Array:
        """The table at these distances."""
        reach, table = float(self.bias.reach), self.bias.by_distance
        slots = (jnp.clip(distance, -reach, reach) + reach).astype(jnp.int32)
        if self.interpret:
            return jnp.take(table[head], slots)
        return _gathered(table.at[head], slots)


def _positions(side: Side, batch, length: int, layout) -> jax.Array:
    if side.positions is None:
        return indices(side.start, length, layout)
    at = row_of_batch(side.positions, batch), pl.ds(side.start, length)
    return plgpu.load(side.positions.at[at], layout=layout, optimized=False)


def nothing_summed(count: int) -> tuple[jax.Array, ...]:
    """What sums of a key start from: as many as 8 columns of a tile, to be added up at the end."""
    return (plgpu.layout_cast(jnp.zeros((ROWS, _GROUP), jnp.float32), MATRIX),) * count


def added(sums: Sequence[jax.Array], slopes: Sequence[jax.Array], dlogits: jax.Array) -> tuple[jax.Array, ...]:
    """Sums with those of a tile of gradients of logits."""

    def add(total, slope):
        for i in range(0, dlogits.shape[1], _GROUP):
            at = slice(i, i + _GROUP)
            total = total + dlogits[:, at] * slope[:, at]
        return total

    return tuple(map(add, sums, slopes))


def _shared_out(groups: Sequence[jax.Array]) -> jax.Array:
    """`[64, columns]` of which every other group of 8 columns is computed, and one more (`_of_whole_tile`)."""
    shape = ROWS, 2 * _GROUP * (len(groups) - 1)

    @plgpu.inline_mgpu(arg_types=(MATRIX,) * len(groups), return_type=array_type(shape, MATRIX))
    def emit(_, *groups):
        registers = [list(x.to_layout(IN_FLIGHT.to_mgpu()).registers.flat) for x in groups]
        return fragmented(_of_whole_tile(registers), shape).to_layout(MATRIX.to_mgpu())

    return emit(*groups)


def _diagonals(table, place: ArrayLike, sign: int, num_columns: int, *, early: bool) -> jax.Array:
    """table[place + sign (row - column)] of a tile, float32 `[64, columns]`: each value read once a thread.

    Args:
      table: A vector in device memory.
      early: Whether to ask for it where this stands, rather than where it is needed.
    """
    num_groups = num_columns // (2 * _GROUP) + 1
    # Of a group of 8 columns: two of a row, then two of the row 8 below.
    steps = [
        sign * (row - column - 2 * _GROUP * group)
        for group in range(num_groups)
        for row in (0, _GROUP)
        for column in (0, 1)
    ]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR), return_type=array_type((ROWS, num_columns), MATRIX))
    def emit(_, table, place):
        f32 = ir.F32Type.get()
        count = len(steps)
        text = f"""{{
        .reg .b32 thread, row, column;
        .reg .b64 at;
        mov.u32 thread, %tid.x;
        bfe.u32 row, thread, 2, 3;
        bfe.u32 column, thread, 5, 2;
        mad.lo.u32 row, column, 16, row;
        bfe.u32 column, thread, 0, 2;
        mad.lo.s32 row, column, -2, row;
        mad.lo.s32 row, row, {sign}, ${count + 1};
        mad.wide.s32 at, row, 4, ${count};
        {" ".join(f"ld.global.nc.f32 ${i}, [at + {4 * step}];" for i, step in enumerate(steps))}
        }}"""
        start = llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(table))
        read = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * count),
            [start, place.registers.item()],
            text,
            ",".join(["=&f"] * count + ["l", "r"]),
            has_side_effects=early,
        )
        of_element = ir.VectorType.get((1,), f32)
        values = [vector.broadcast(of_element, llvm.extractvalue(f32, read, [i])) for i in range(count)]
        groups = [values[4 * i : 4 * i + 4] for i in range(num_groups)]
        return fragmented(_of_whole_tile(groups), (ROWS, num_columns)).to_layout(MATRIX.to_mgpu())

    return emit(table, jnp.asarray(place, jnp.int32))


def _of_whole_tile(groups: Sequence[list]) -> list:
    """The registers of a tile of tokens in order, of those of every other group of 8 columns and one more: the others
    are what stands 8 rows down in the next, or 8 rows up in the last."""
    shared = []
    for this, following in itertools.pairwise(groups):
        shared += this + following[2:] + this[:2]
    return shared


def _gathered(ref, at: jax.Array) -> jax.Array:
    """ref[at] of a vector of float32 in device memory and int32 indices."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), MATRIX), return_type=array_type(at.shape, MATRIX))
    def emit(_, ref, at):
        i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
        start = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))

        def read(register: ir.Value) -> ir.Value:
            text = "{ .reg .b64 at; mad.wide.s32 at, $1, 4, $2; ld.global.nc.f32 $0, [at]; }"
            value = llvm.inline_asm(f32, [as_int32(register), start], text, "=f,r,l", has_side_effects=False)
            return vector.broadcast(ir.VectorType.get((1,), f32), value)

        registers = at.to_layout(IN_FLIGHT.to_mgpu()).registers.flat
        return fragmented([read(x) for x in registers], at.shape).to_layout(MATRIX.to_mgpu())

    return emit(ref, at)

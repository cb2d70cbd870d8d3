"""Sums for the gradient of a bias on Hopper, by a warpgroup that has nothing else to compute.

Of each key and parameter, `sum over queries of dlogit dbias/dparameter` (pallas_mosaic_gpu_bias.py). Those who compute
gradients of logits leave them in shared memory for dq, in 16 bits, and have no register left. So the warpgroup that
adds up dq reads them there once more, a thread for each key of a block, which is one register a parameter, and no sum
over threads. It has a step's time for that, and few registers. It does so where tokens are in order:

- `dbias/dparameter`, unless it is linear, comes from a table by distance, which XLA makes (`SlopeTable`): computed
  pair by pair it would take the unit for exponentials as long as everything else together. Those of two parameters
  stand in one word, in 16 bits each, as gradients of logits do: every 8 queries there is a wait for 8 words, and no
  register to ask for the next ones meanwhile.
- Of a bias that has a reach it is a number in tiles beyond; of the few tiles within, the sum of each diagonal is made,
  and added to sums by distance, which each block of keys has of its own (`near_zeros`).
"""

import dataclasses
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
from jaxlib.mlir.dialects import arith, llvm, math, vector

from pallas_kernels.blockwise.pallas_mosaic_gpu_bias import (
    KernelBias,
    NearTable,
    bring_distances_near,
    distances_of_table,
    num_sums,
    slopes_of,
)
from pallas_kernels.mosaic_gpu import WARPGROUP
from pallas_kernels.wgmma import ROWS, SCALAR, TILE_BYTES, TRANSFORMS, array_type, as_int32

_MOST_REACH = 1024
"""That there are sums by distance for: of more, most tiles would be within."""
_QUERIES = 8
"""That a thread reads at a time, as 16 bytes."""
_KEYS = plgpu.Layout.WG_STRIDED((WARPGROUP,), vec_size=1)
_PAIRS = plgpu.Layout.WG_STRIDED((_QUERIES, WARPGROUP), vec_size=1)
"""A thread has all queries of its key."""


def makes_sums(bias: KernelBias, head_dim: int, soft_cap: float | None) -> bool:
    """Whether that warpgroup makes the sums of a call on tokens in order, or those who compute gradients of logits.

    In shared memory are those of logits before a cap, and a bias is added behind it. At head dim 64 a step has twice
    the pairs in the same time: only numbers are added up fast enough.
    """
    return soft_cap is None and (head_dim > 64 if bias.reach is None else bias.reach <= _MOST_REACH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeySums:
    """Of a block of 128 keys.

    Attributes:
      bias: References.
      table: The words of the bias' `SlopeTable`, a reference; None where it is linear or has a reach.
      near: Of `near_zeros`, zeros before the first tile, a reference; None where it has no reach.
      kv_len: Keys that there are.
      ds: Gradients of logits, `[slots, 2, 64 keys, queries of a tile]` in shared memory.
      interpret: Whether in JAX's interpreter.
    """

    bias: KernelBias
    table: Any
    near: Any
    kv_len: int
    ds: Any
    interpret: bool

    def nothing(self) -> tuple[jax.Array, ...]:
        return (_keys(0.0, self.interpret),) * num_sums(self.bias)

    def bring_near(self, head: ArrayLike, distance: ArrayLike) -> None:
        """What `added` will read of the table, to the first-level cache."""
        if self.table is None or self.interpret:
            return
        tables = [self.table.at[head, i] for i in range(self.table.shape[1])]
        bring_distances_near(tables, distance - WARPGROUP, 2 * WARPGROUP)

    def added(
        self,
        sums: tuple[jax.Array, ...],
        slot: ArrayLike,
        head: ArrayLike,
        batch: ArrayLike,
        block: ArrayLike,
        distance: ArrayLike,
        between: Callable[[], None],
    ) -> tuple[jax.Array, ...]:
        """Sums with those of a tile.

        Args:
          block: Of keys.
          distance: From its first key to the tile's first query.
          between: What to do when half of it is done.
        """
        num_queries = self.ds.shape[3]
        of_block = None if self.near is None else self.near.at[batch, head, block]
        num_keys = jnp.minimum(self.kv_len - block * WARPGROUP, WARPGROUP)
        if self.interpret:
            return self._interpreted(sums, slot, head, distance, of_block, num_keys)
        rows = _rows_of_keys(self.ds, slot)

        def for_some(add: Callable, sums):
            """sums = add(i, gradients, sums) for the i-th 8 queries."""

            def some(i, sums):
                pl.when(i == num_queries // _QUERIES // 2)(between)
                return add(i, _gradients(rows, i, self.ds.dtype), sums)

            return lax.fori_loop(0, num_queries // _QUERIES, some, sums)

        if self.table is not None:

            def from_table(i, x, sums):
                place = distance + i * _QUERIES + self.table.shape[2] // 2
                slopes = (y for j in range(self.table.shape[1]) for y in _from_table(self.table.at[head, j], place))
                return tuple(_plus(total, x, y) for total, y in zip(sums, slopes, strict=False))

            return for_some(from_table, sums)

        if of_block is None:
            slopes = slopes_of(self.bias, head)

            def of_each(i, x, sums):
                of_sums = slopes(_distances(distance + i * _QUERIES))
                return tuple(_plus(total, x, y) for total, y in zip(sums, of_sums, strict=True))

            return for_some(of_each, sums)

        def beyond(sums, weights):
            total = for_some(lambda i, x, total: _plus(total, x), _keys(0.0))
            return tuple(x + total * weight for x, weight in zip(sums, weights, strict=True))

        def within(sums, _):
            between()
            _add_diagonals(of_block, least + of_block.shape[0] // 2, self.ds, slot, num_keys)
            return sums

        least, greatest = distance - (WARPGROUP - 1), distance + (num_queries - 1)
        is_after, is_before = least >= self.bias.reach, greatest <= -self.bias.reach
        weights = is_after.astype(jnp.float32), is_before.astype(jnp.float32)
        return lax.cond(is_after | is_before, beyond, within, sums, weights)

    def _interpreted(self, sums, slot, head, distance, of_block, num_keys) -> tuple[jax.Array, ...]:
        num_queries = self.ds.shape[3]
        ds = self.ds[slot].reshape(WARPGROUP, num_queries).astype(jnp.float32)
        keys = jnp.arange(WARPGROUP)
        distances = distance + jnp.arange(num_queries)[None, :] - keys[:, None]
        if of_block is not None:
            is_far = jnp.min(jnp.abs(distances)) >= self.bias.reach
            places = jnp.clip(distances + of_block.shape[0] // 2, 0, of_block.shape[0] - 1)
            of_near = jnp.where((keys < num_keys)[:, None] & ~is_far, ds, 0.0)
            of_block[...] = of_block[...].at[places].add(of_near)
            ds = jnp.where(is_far, ds, 0.0)
        if self.table is None:
            of_sums = slopes_of(self.bias, head)(distances.astype(jnp.float32))
        else:
            words = jnp.take(self.table[head], distances + self.table.shape[2] // 2, axis=1)
            halves = lax.bitcast_convert_type(words, jnp.float16).astype(jnp.float32)
            of_sums = jnp.moveaxis(halves, -1, 1).reshape(-1, *distances.shape)[: len(sums)]
        return tuple(total + jnp.sum(ds * y, axis=1) for total, y in zip(sums, of_sums, strict=True))


def near_zeros(bias: NearTable, shape: tuple[int, int, int]) -> jax.Array:
    """Zeros for the sums by distance of `[B, N, S]`, from the least to the greatest, float32
    `[B, N, blocks of keys, 2 length]`: of the distances of all tiles that hold some within the reach."""
    batch_size, num_heads, kv_len = shape
    length = -(-bias.reach // WARPGROUP) * WARPGROUP + 2 * WARPGROUP
    return jnp.zeros((batch_size, num_heads, -(-kv_len // WARPGROUP), 2 * length), jnp.float32)


class SlopeTable(NamedTuple):
    """`dbias/dparameter` by distance, from the least to the greatest.

    Attributes:
      words: Those of two parameters in one word, float16, int32 `[N, half of the parameters, 2 length]`.
      units: What they are in, float32 `[N, parameters]`: the greatest of each parameter is 2^15 of them, so that those
        down to 2^-29 of it have all 11 bits. That is one token's of 32,768, squared.
    """

    words: jax.Array
    units: jax.Array


def slope_table(bias: KernelBias, q_len: int, kv_len: int) -> SlopeTable:
    """Memory: 8 N max(T, S) bytes for two parameters; while it is made, three times as much."""
    heads = jnp.arange(jax.tree.leaves(bias)[0].shape[0])
    distances = distances_of_table(q_len, kv_len)
    slopes = jax.vmap(lambda head: jnp.stack(slopes_of(bias, head)(distances)))(heads)
    greatest = jnp.max(jnp.where(jnp.isfinite(slopes), jnp.abs(slopes), 0.0), axis=2)
    units = jnp.where(greatest == 0, 1.0, greatest * 2.0**-15)
    halves = (slopes / units[:, :, None]).astype(jnp.float16)
    num_heads, num_slopes, length = slopes.shape
    halves = jnp.pad(halves, ((0, 0), (0, num_slopes % 2), (0, 0)))
    pairs = jnp.moveaxis(halves.reshape(num_heads, -1, 2, length), 2, 3)
    return SlopeTable(lax.bitcast_convert_type(pairs, jnp.int32), units)


def _from_table(table, place: ArrayLike) -> Sequence[jax.Array]:
    """Of 8 queries and 128 keys, both slopes of a word, float32 `[8, 128 keys]` each.

    Args:
      table: Words of a head.
      place: In it, of the first pair.
    """
    tile = array_type((_QUERIES, WARPGROUP), _PAIRS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR), return_type=(tile, tile))
    def emit(_, table, place):
        i32 = ir.IntegerType.get_signless(32)
        lines = [
            ".reg .b32 thread;",
            ".reg .b64 at;",
            "mov.u32 thread, %tid.x;",
            f"and.b32 thread, thread, {WARPGROUP - 1};",
            f"sub.s32 thread, ${_QUERIES + 1}, thread;",
            f"mad.wide.s32 at, thread, 4, ${_QUERIES};",
            *(f"ld.global.nc.b32 ${j}, [at + {4 * j}];" for j in range(_QUERIES)),
        ]
        address = llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(table))
        results = llvm.inline_asm(
            llvm.StructType.get_literal([i32] * _QUERIES),
            [address, place.registers.item()],
            "{\n" + "\n".join(lines) + "\n}",
            ",".join(["=&r"] * _QUERIES + ["l", "r"]),
            has_side_effects=False,
        )
        words = [llvm.extractvalue(i32, results, [j]) for j in range(_QUERIES)]
        floats = [_taken_apart(word, jnp.float16) for word in words]
        return tuple(_of_threads([pair[i] for pair in floats], _PAIRS) for i in range(2))

    return emit(table, jnp.asarray(place, jnp.int32))


def _taken_apart(word: ir.Value, dtype: jnp.dtype) -> list[ir.Value]:
    """Both floats of 16 bits that a word holds, in 32: where they are used, as there are few registers."""
    halves = llvm.bitcast(ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype)), word)
    floats = arith.extf(ir.VectorType.get((2,), ir.F32Type.get()), halves)
    return [vector.extract(floats, dynamic_position=[], static_position=[i]) for i in (0, 1)]


def _add_diagonals(sums, place: ArrayLike, ds, slot: ArrayLike, num_keys: ArrayLike) -> None:
    """Adds the sum of each diagonal of a tile, by distance.

    Args:
      sums: Of a block of keys.
      place: In them, of the least distance.
      num_keys: Of the tile's 128 those that there are.
    """
    tile = ds.shape[3]
    is_bfloat16 = jnp.dtype(ds.dtype) == jnp.bfloat16

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(TRANSFORMS), SCALAR, SCALAR, SCALAR))
    def emit(_, sums, ds, *scalars):
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        in_smem = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ds))
        address = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(sums))
        lines = [
            ".reg .b32 diagonal, first, query, key, part, at, column;",
            ".reg .b16 half, none;",
            ".reg .b64 to;",
            ".reg .f32 total, x;",
            ".reg .pred is_in, goes_on;",
            "mov.b16 none, 0;",
            "mov.u32 diagonal, %tid.x;",
            f"and.b32 diagonal, diagonal, {WARPGROUP - 1};",
            f"mad.lo.s32 first, $3, {2 * ROWS * tile * 2}, $1;",
        ]
        for i in range(2):  # a thread has two of them
            lines += [
                "mov.f32 total, 0f00000000;",
                "mov.b32 query, 0;",
                f"sub.s32 key, {WARPGROUP - 1}, diagonal;",
                f"AGAIN{i}:",
                '.pragma "nounroll";',
                "setp.lt.u32 is_in, key, $4;",
                # As _rows_of_keys says.
                "shr.u32 at, key, 3;",
                f"mad.lo.u32 at, at, {tile // ROWS * TILE_BYTES}, first;",
                "shr.u32 part, query, 6;",
                f"mad.lo.u32 at, part, {TILE_BYTES}, at;",
                "and.b32 part, key, 7;",
                "mad.lo.u32 at, part, 128, at;",
                "shl.b32 part, part, 4;",
                "shl.b32 column, query, 1;",
                "and.b32 column, column, 127;",
                "xor.b32 part, part, column;",
                "add.u32 at, at, part;",
                "mov.b16 half, none;",
                "@is_in ld.shared.b16 half, [at];",
                "mov.b32 x, {none, half};" if is_bfloat16 else "cvt.f32.f16 x, half;",
                "add.f32 total, total, x;",
                "add.s32 key, key, 1;",
                "add.s32 query, query, 1;",
                f"setp.lt.s32 goes_on, query, {tile};",
                f"@goes_on bra AGAIN{i};",
                f"setp.lt.s32 is_in, diagonal, {WARPGROUP - 1 + tile};",
                "add.s32 at, diagonal, $2;",
                "mad.wide.s32 to, at, 4, $0;",
                "@is_in ld.global.f32 x, [to];",
                "@is_in add.f32 total, total, x;",
                "@is_in st.global.f32 [to], total;",
                f"add.s32 diagonal, diagonal, {WARPGROUP};",
            ]
        place, slot, num_keys = (x.registers.item() for x in scalars)
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [address, in_smem, place, slot, num_keys],
            "{\n" + "\n".join(lines) + "\n}",
            "l,r,r,r,r,~{memory}",
            has_side_effects=True,
        )

    emit(sums, ds, *(jnp.asarray(x, jnp.int32) for x in (place, slot, num_keys)))


def _keys(number: float, interpret: bool = False) -> jax.Array:
    x = jnp.full((WARPGROUP,), number, jnp.float32)
    return x if interpret else plgpu.layout_cast(x, _KEYS)


def _rows_of_keys(ds, slot: ArrayLike) -> jax.Array:
    """Where in shared memory each key's gradients of a tile are, int32 `[128 keys]`."""
    tile = ds.shape[3]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(TRANSFORMS), SCALAR),
        return_type=plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.int32, layout=_KEYS),
    )
    def emit(_, ds, slot):
        i32 = ir.IntegerType.get_signless(32)
        # A row of 64 queries has 128 bytes, in which pieces of 16 are swapped around by the row's number in its 8.
        text = f"""{{
        .reg .b32 key, row;
        mov.u32 key, %tid.x;
        and.b32 key, key, {WARPGROUP - 1};
        and.b32 row, key, 7;
        shr.u32 key, key, 3;
        mad.lo.s32 $0, $2, {2 * ROWS * tile * 2}, $1;
        mad.lo.u32 $0, key, {tile // ROWS * TILE_BYTES}, $0;
        mad.lo.u32 $0, row, {128 + 16}, $0;
        }}"""
        address = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ds))
        operands = [address, slot.registers.item()]
        row = llvm.inline_asm(i32, operands, text, "=&r,r,r", has_side_effects=False)
        return _of_threads([row], _KEYS, is_signed=True)

    return emit(ds, jnp.asarray(slot, jnp.int32))


def _gradients(rows: jax.Array, i: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    """Those of the i-th 8 queries of a tile, float32 `[8, 128 keys]`."""

    @plgpu.inline_mgpu(
        arg_types=(_KEYS, SCALAR),
        return_type=array_type((_QUERIES, WARPGROUP), _PAIRS),
    )
    def emit(_, rows, i):
        i32 = ir.IntegerType.get_signless(32)
        text = f"""{{
        .reg .b32 piece, at;
        and.b32 piece, $5, 7;
        shl.b32 piece, piece, 4;
        xor.b32 at, $4, piece;
        shr.u32 piece, $5, 3;
        mad.lo.u32 at, piece, {TILE_BYTES}, at;
        ld.shared.v4.b32 {{$0, $1, $2, $3}}, [at];
        }}"""
        words = llvm.inline_asm(
            llvm.StructType.get_literal([i32] * 4),
            [as_int32(rows.registers.item()), i.registers.item()],
            text,
            "=r,=r,=r,=r,r,r",
            has_side_effects=True,
        )
        return _of_threads(
            [x for j in range(4) for x in _taken_apart(llvm.extractvalue(i32, words, [j]), dtype)], _PAIRS
        )

    return emit(rows, jnp.asarray(i, jnp.int32))


def _distances(first: ArrayLike) -> jax.Array:
    """Of 8 queries and 128 keys, the first of which are so far apart, float32 `[8, 128 keys]`."""

    @plgpu.inline_mgpu(
        arg_types=(SCALAR,),
        return_type=array_type((_QUERIES, WARPGROUP), _PAIRS),
    )
    def emit(_, first):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        text = f"{{ mov.u32 $0, %tid.x; and.b32 $0, $0, {WARPGROUP - 1}; }}"
        thread = llvm.inline_asm(i32, [], text, "=r", has_side_effects=False)
        # Conversions have a quarter of the rate of additions.
        distance = arith.sitofp(f32, arith.subi(first.registers.item(), thread))
        return _of_threads([arith.addf(distance, mgpu.utils.c(float(j), f32)) for j in range(_QUERIES)], _PAIRS)

    return emit(jnp.asarray(first, jnp.int32))


def _plus(total: jax.Array, *factors: jax.Array) -> jax.Array:
    """`[128 keys]`, with the sum over queries of one `[8, 128 keys]`, or of the product of two."""

    @plgpu.inline_mgpu(
        arg_types=(_KEYS, *(_PAIRS,) * len(factors)),
        return_type=array_type((WARPGROUP,), _KEYS),
    )
    def emit(_, total, *factors):
        register = total.registers.item()
        one = mgpu.utils.c(1.0, register.type)
        for x, *y in zip(*(factor.registers.flat for factor in factors), strict=True):
            register = math.fma(x, y[0] if y else one, register)
        return _of_threads([register], _KEYS)

    return emit(total, *factors)


def _of_threads(values: list[ir.Value], layout, *, is_signed: bool | None = None) -> mgpu.FragmentedArray:
    """Of numbers, or vectors of one, that each thread has of an array."""
    registers = [
        x if isinstance(x.type, ir.VectorType) else vector.broadcast(ir.VectorType.get((1,), x.type), x) for x in values
    ]
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object), _layout=layout.to_mgpu(), _is_signed=is_signed
    )

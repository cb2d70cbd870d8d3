"""Sums of logits along antidiagonals and what of their softmax a selector needs, on Hopper GPUs (Mosaic GPU).

A square's sum is the product of `stride` queries, laid end to end, and as many keys in reverse, so all of them are one
matmul, whose rows are squares of queries and whose columns are squares of keys. Grid: one block of threads a
multiprocessor, each with tiles of 128 x 256 squares of a head, of those tiles alone in which a pair may attend. A
producer warpgroup copies a query and a key of every square at a time to shared memory, from where they stand (TMA); two
consumers, 64 rows each, multiply, and write of each row and 8 neighbouring columns the logarithm of the sum of
exponentials: a 64th of a float32 a pair of tokens, at stride 16 an eighth of the sums.

Reference: Xu et al. 2025, XAttention, arXiv:2503.16428, Algorithm 1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic_gpu import NAMED_BARRIERS, WARPGROUP, arrive, hopper_cores, refuse, sync
from pallas_kernels.wgmma import IN_FLIGHT, MATRIX, ROWS, SCALAR, TILE_ROWS, TRANSFORMS, int32s, ptx_float

HEAD_DIMS = (64, 128)
GROUP = 8
"""Squares of keys whose exponentials are added up: the columns that four neighbouring threads hold of a row."""

_NUM_CONSUMERS = 2
_TILE_Q, _TILE_KV = ROWS * _NUM_CONSUMERS, 256  # squares
_SLOTS = 4
_STEP = 64  # dims that are multiplied at a time
_WORD = 32  # squares of which a word says whether they are seen
_LOG2_E = math.log2(math.e)


def check(q, *, stride: int, block_kv: int) -> None:
    """Raises NotImplementedError with the reason where the kernel does not serve a call."""
    hopper_cores()
    if q.dtype != jnp.bfloat16 or q.shape[-1] not in HEAD_DIMS:
        refuse(f"q is {q.dtype} of head dim {q.shape[-1]}, it takes bfloat16 of {HEAD_DIMS}")
    if block_kv % (GROUP * stride):
        refuse(f"blocks of {block_kv} keys with stride {stride}, it takes multiples of {GROUP} squares")


def group_logsumexp(q: jax.Array, k: jax.Array, seen: jax.Array, *, scale: float) -> jax.Array:
    """For each row of squares and 8 neighbouring squares of keys the logsumexp of the sums along their antidiagonals.

    Args:
      q: `[B, R, stride, N, H]`.
      k: `[B, C, stride, K, H]`, with C a multiple of GROUP.
      seen: Which squares count, bool `[B or 1, R, C]`.
      scale: Multiplies the sums.
    Returns: float32 `[B, N, R, C / GROUP]`, -inf where no square counts.
    """
    num_rows = q.shape[1]
    q, seen = (jnp.pad(x, ((0, 0), (0, -num_rows % TILE_ROWS)) + ((0, 0),) * (x.ndim - 2)) for x in (q, seen))
    (B, R, stride, N, H), (_, C, _, K, _) = q.shape, k.shape
    words, items, count = _tiles(seen)
    shape = _Shape(
        batch_size=B,
        rows=R,
        columns=C,
        stride=stride,
        heads=N,
        kv_heads=K,
        head_dim=H,
        tiles=(words.shape[1] // _TILE_Q, words.shape[2] * _WORD // _TILE_KV),
        by_row=len(seen) > 1,
    )
    num_blocks = hopper_cores()

    def smem(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=TRANSFORMS)

    out = plgpu.kernel(
        lambda *refs: _Sums(shape, num_blocks, scale, *refs).run(),
        out_type=jax.ShapeDtypeStruct((B, N, R, C // GROUP), jnp.float32),
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=_NUM_CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=[
            smem(_SLOTS, _NUM_CONSUMERS, ROWS, _STEP),
            smem(_SLOTS, _TILE_KV, _STEP),
            plgpu.Barrier(num_arrivals=_NUM_CONSUMERS + 1, num_barriers=_SLOTS),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(_rows(q, _TILE_Q), _rows(k, _TILE_KV), words, items, count)
    any_seen = jnp.any(seen.reshape(*seen.shape[:2], -1, GROUP), axis=-1)
    return jnp.where(any_seen[:, None], out, -jnp.inf)[:, :, :num_rows]


def _rows(x: jax.Array, least: int) -> jax.Array:
    """Squares of all rows one below the other, `[any, stride heads H]`: at least as many as a copy takes."""
    x = x.reshape(x.shape[0] * x.shape[1], -1)
    return jnp.pad(x, ((0, least - len(x)), (0, 0))) if len(x) < least else x


def _tiles(seen: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bits of squares, int32 `[B or 1, rows, columns / 32]` in whole tiles; the tiles with a pair that counts, twice
    their number and 1 more where all do; and how many these are, `[1]`."""
    B, R, C = seen.shape
    seen = jnp.pad(seen, ((0, 0), (0, -R % _TILE_Q), (0, -C % _TILE_KV)))
    bits = seen.reshape(*seen.shape[:2], -1, _WORD).astype(jnp.uint32) << jnp.arange(_WORD, dtype=jnp.uint32)
    words = lax.bitcast_convert_type(jnp.sum(bits, axis=-1, dtype=jnp.uint32), jnp.int32)
    of_tiles = words.reshape(B, -1, _TILE_Q, seen.shape[2] // _TILE_KV, _TILE_KV // _WORD)
    counts = jnp.any(of_tiles != 0, axis=(2, 4)).reshape(-1)
    full = jnp.all(of_tiles == -1, axis=(2, 4)).reshape(-1)
    number = jnp.arange(len(counts), dtype=jnp.int32)
    place = jnp.where(counts, jnp.cumsum(counts) - 1, len(counts))
    items = jnp.zeros(len(counts), jnp.int32).at[place].set(2 * number + full.astype(jnp.int32), mode="drop")
    return words, items, jnp.sum(counts, dtype=jnp.int32)[None]


class _Shape(NamedTuple):
    """What is static of a call.

    Attributes:
      rows, columns: Squares of queries and of keys of a row of the batch.
      tiles: Of its squares, in either direction.
      by_row: Whether each row of the batch has tiles of its own.
    """

    batch_size: int
    rows: int
    columns: int
    stride: int
    heads: int
    kv_heads: int
    head_dim: int
    tiles: tuple[int, int]
    by_row: bool


class _Item(NamedTuple):
    """A tile of a head; `of_words` is the row of the batch whose bits are read."""

    batch: jax.Array
    head: jax.Array
    row: jax.Array
    column: jax.Array
    of_words: jax.Array
    is_full: jax.Array


class _Sums:
    """What one block of threads does."""

    def __init__(self, shape: _Shape, num_blocks: int, scale: float, q, k, words, items, count, out, a, b, full):
        self.shape, self.num_blocks, self.scale = shape, num_blocks, scale
        self.q, self.k, self.words, self.items, self.count, self.out = q, k, words, items, count, out
        self.a, self.b, self.full = a, b, full
        self.warpgroup = lax.axis_index("warpgroup")
        self.free = NAMED_BARRIERS.start
        self.everyone = (_NUM_CONSUMERS + 1) * WARPGROUP
        self.parts = shape.head_dim // _STEP

    def run(self) -> None:
        @pl.when(self.warpgroup < _NUM_CONSUMERS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            self.consume()

        @pl.when(self.warpgroup == _NUM_CONSUMERS)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            self.produce()

    def for_each_item(self, body) -> None:
        """count = body(item, count): head by head."""
        shape, num_tiles = self.shape, self.shape.tiles[0] * self.shape.tiles[1]
        heads = shape.heads if shape.by_row else shape.batch_size * shape.heads
        num_items, block = self.count[0], lax.axis_index("block")

        def one_item(i, count):
            number = i * self.num_blocks + block
            head = lax.div(number, num_items)
            item = self.items[lax.rem(number, num_items)]
            tile = lax.div(item, 2)
            of_words, tile = lax.div(tile, num_tiles), lax.rem(tile, num_tiles)
            batch, head = (of_words, head) if shape.by_row else (lax.div(head, shape.heads), lax.rem(head, shape.heads))
            row, column = lax.div(tile, shape.tiles[1]), lax.rem(tile, shape.tiles[1])
            return body(_Item(batch, head, row, column, of_words, lax.rem(item, 2)), count)

        num_rounds = lax.div(num_items * heads + self.num_blocks - 1 - block, self.num_blocks)
        lax.fori_loop(0, num_rounds, one_item, jnp.int32(0))

    def produce(self) -> None:
        shape = self.shape
        group = shape.heads // shape.kv_heads

        def one_item(item: _Item, count):
            def one_step(step, count):
                slot, i, part = lax.rem(count, _SLOTS), lax.div(step, self.parts), lax.rem(step, self.parts)

                def dims(token, heads: int, head):
                    return pl.ds((token * heads + head) * shape.head_dim + part * _STEP, _STEP)

                of_query = dims(shape.stride - 1 - i, shape.heads, item.head)
                of_key = dims(i, shape.kv_heads, lax.div(item.head, group))
                row = item.batch * shape.rows + item.row * _TILE_Q
                column = item.batch * shape.columns + item.column * _TILE_KV
                sync(self.free + slot, self.everyone)
                for half in range(_NUM_CONSUMERS):
                    squares = pl.ds(row + half * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(self.q.at[squares, of_query], self.a.at[slot, half], self.full.at[slot])
                keys = self.k.at[pl.ds(column, _TILE_KV), of_key]
                plgpu.copy_gmem_to_smem(keys, self.b.at[slot], self.full.at[slot])
                return count + 1

            return lax.fori_loop(0, shape.stride * self.parts, one_step, count)

        self.for_each_item(one_item)

    def consume(self) -> None:
        for slot in range(_SLOTS):
            arrive(self.free + slot, self.everyone)

        def one_item(item: _Item, count):
            def contract(acc):
                def one_step(step, count):
                    slot = lax.rem(count, _SLOTS)
                    plgpu.barrier_wait(self.full.at[slot])
                    plgpu.wgmma(acc, self.a.at[slot, self.warpgroup], self.b.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(1)
                    pl.when(step > 0)(lambda: self.give_back(count - 1))
                    return count + 1

                after = lax.fori_loop(0, self.shape.stride * self.parts, one_step, count)
                plgpu.wgmma_wait(0)
                self.give_back(after - 1)
                return acc[...], after

            sums, count = pl.run_scoped(contract, plgpu.ACC((ROWS, _TILE_KV), jnp.float32))
            row = item.row * _TILE_Q + self.warpgroup * ROWS
            _store(sums * (self.scale * _LOG2_E), self.words, self.out, item, row)
            return count

        self.for_each_item(one_item)

    def give_back(self, count) -> None:
        arrive(self.free + lax.rem(count, _SLOTS), self.everyone)


def _store(sums: jax.Array, words, out, item: _Item, row: jax.Array) -> None:
    """out[batch, head, row + i, c] = log(sum(2 ** sums[i, 8 c + j] for j that are seen)), of `[64, 256]`."""
    words_shape, shape = words.shape[1:], out.shape[1:]

    @plgpu.inline_mgpu(arg_types=(MATRIX, plgpu.RefType(), plgpu.RefType(), *(SCALAR,) * 6))
    def emit(_, sums, words, out, *scalars):
        registers = list(sums.to_layout(IN_FLIGHT.to_mgpu()).registers.flat)
        i64 = ir.IntegerType.get_signless(64)
        addresses = [llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref)) for ref in (words, out)]
        operands = [*registers, *addresses, *(x.registers.item() for x in scalars)]
        constraints = ",".join([*["f"] * len(registers), "l", "l", *["r"] * len(scalars), "~{memory}"])
        lines = _store_lines(len(registers), words_shape, *shape)
        llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, lines, constraints, has_side_effects=True)

    emit(sums, words, out, *int32s((item.batch, item.head, item.of_words, row, item.column, item.is_full)))


def _store_lines(num_registers: int, words_shape: tuple[int, int], heads: int, rows: int, groups: int) -> str:
    """Operands: sums, the addresses of words and out, the batch row, the head, the row of words, the first row, the
    tile of columns, and whether all is seen.

    A thread holds pairs of neighbouring columns of two rows, 8 apart, and the four threads of a row 8 columns. Each of
    the four comes to have every fourth of the row's sums: it sends the others theirs, and is sent its own.
    """
    words, out, batch, head, of_words, first, tile, is_full = (f"${num_registers + i}" for i in range(8))
    num_groups, words_of_tile = num_registers // 4, _TILE_KV // _WORD
    xs, sums, bits = (
        [f"{name}{i}" for i in range(count)]
        for name, count in (("x", 2 * num_groups), ("sum", num_groups), ("word", words_of_tile))
    )
    minus_infinity = ptx_float(-math.inf)
    lines = [
        f".reg .b32 lane, column, row, number, shift, {', '.join(bits)}; .reg .b64 from, at, to;",
        f".reg .f32 most, other, send, {', '.join(xs + sums)};",
        ".reg .pred full, seen, odd, high, there, row_there;",
        "mov.u32 lane, %tid.x;",
        f"and.b32 lane, lane, {WARPGROUP - 1};",
        "and.b32 column, lane, 3;",
        "shr.u32 row, lane, 5; shl.b32 row, row, 4;",
        f"and.b32 lane, lane, 31; shr.u32 lane, lane, 2; add.u32 row, row, lane; add.u32 row, row, {first};",
        "and.b32 number, column, 1; setp.ne.b32 odd, number, 0;",
        "setp.ge.u32 high, column, 2;",
        f"setp.ne.b32 full, {is_full}, 0;",
        "shl.b32 shift, column, 1;",
    ]
    for half in range(2):
        of_group = [[f"${4 * j + 2 * half + i}" for i in range(2)] for j in range(num_groups)]
        lines += [f"mov.f32 {x}, {value};" for x, value in zip(xs, sum(of_group, []), strict=True)]
        if half:
            lines.append("add.u32 row, row, 8;")
        lines += [
            f"@full bra SEEN{half};",
            f"mad.lo.s32 number, {of_words}, {words_shape[0]}, row;",
            f"mad.wide.s32 from, number, {4 * words_shape[1]}, {words};",
            f"mad.wide.s32 from, {tile}, {4 * words_of_tile}, from;",
        ]
        for i in range(0, words_of_tile, 4):
            lines.append(f"ld.global.nc.v4.b32 {{{', '.join(bits[i : i + 4])}}}, [from + {4 * i}];")
        lines += [f"shr.u32 {word}, {word}, shift;" for word in bits]
        for i, x in enumerate(xs):
            square = i // 2 * GROUP + i % 2  # this thread's, but for the shift
            lines += [
                f"and.b32 number, {bits[square // _WORD]}, {1 << square % _WORD};",
                "setp.ne.b32 seen, number, 0;",
                f"selp.f32 {x}, {x}, {minus_infinity}, seen;",
            ]
        lines += [f"SEEN{half}:", f"max.f32 most, {xs[0]}, {xs[1]};"]
        lines += [f"max.f32 most, most, {x};" for x in xs[2:]]
        for step in (1, 2):
            lines += [f"shfl.sync.bfly.b32 other, most, {step}, 31, 0xffffffff;", "max.f32 most, most, other;"]
        # Of a row that sees nothing all are -inf, and stay so.
        lines += [f"setp.eq.f32 seen, most, {minus_infinity};", f"selp.f32 most, {ptx_float(0.0)}, most, seen;"]
        for x in xs:
            lines += [f"sub.f32 {x}, {x}, most;", f"ex2.approx.ftz.f32 {x}, {x};"]
        lines += [f"add.f32 {total}, {xs[2 * j]}, {xs[2 * j + 1]};" for j, total in enumerate(sums)]
        lines += [
            f"mad.lo.s32 number, {batch}, {heads}, {head};",
            f"mad.lo.s32 number, number, {rows}, row;",
            f"mad.wide.s32 at, number, {4 * groups}, {out};",
            f"mad.lo.s32 number, {tile}, {_TILE_KV // GROUP}, column;",
            "mad.wide.s32 at, number, 4, at;",
            f"setp.lt.s32 row_there, row, {rows};",
        ]
        for j in range(0, num_groups, 4):
            for first_of_pair, pred, step in ((j, "odd", 1), (j + 2, "odd", 1), (j, "high", 2)):
                low, up = sums[first_of_pair], sums[first_of_pair + step]
                lines += [
                    f"selp.f32 send, {low}, {up}, {pred};",
                    f"selp.f32 {low}, {up}, {low}, {pred};",
                    f"shfl.sync.bfly.b32 other, send, {step}, 31, 0xffffffff;",
                    f"add.f32 {low}, {low}, other;",
                ]
            lines += [
                f"lg2.approx.ftz.f32 {sums[j]}, {sums[j]};",
                f"add.f32 {sums[j]}, {sums[j]}, most;",
                f"mul.f32 {sums[j]}, {sums[j]}, {ptx_float(math.log(2))};",
                f"add.s32 lane, number, {j}; setp.lt.and.s32 there, lane, {groups}, row_there;",
                f"@there st.global.f32 [at + {4 * j}], {sums[j]};",
            ]
    return "{\n" + "\n".join(lines) + "\n}"

"""Scores of blocks and the best of them for queries of Native Sparse Attention, on Hopper GPUs (Mosaic GPU).

Two kernels. The first computes logits of compressed keys and queries on the tensor cores, keys by queries, so that the
sum of probabilities over a group of heads is one over neighbouring columns, which a thread and its three neighbours
have; what it writes is one float32 a query, kv head and compressed key. In the second a warp takes a query of a kv
head, folds those onto blocks, which stay in registers, and searches for the least score that is chosen, bit by bit.

Reference: Yuan et al. 2025, Native Sparse Attention, arXiv:2502.11089, equations 8 to 11.
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

from pallas_kernels import scattered_rows, wgmma_chosen
from pallas_kernels.blockwise.pallas_mosaic_gpu_tiles import COLUMN, columns
from pallas_kernels.mosaic_gpu import NAMED_BARRIERS, WARPGROUP, arrive, hopper_cores, refuse, sync
from pallas_kernels.wgmma import IN_FLIGHT, MATRIX, ROWS, SCALAR, TRANSFORMS, int32s, ptx_float

HEAD_DIMS = (64, 128)
GROUPS = (1, 2, 4, 8, 16, 32, 64)
MOST_BLOCKS = 4096
"""Blocks whose scores a warp has registers for."""

TILE = 128
"""Rows of queries, and compressed keys, of a step."""

_SLOTS = 4
_Q_SLOTS = 2
_NUM_CONSUMERS = 2
_LOG2_E = math.log2(math.e)
_KEYS_OF_CHECK = 4  # that a thread counts before it looks whether there are more


def check(q, group: int, num_blocks: int, num_chosen: int) -> None:
    """Raises NotImplementedError with the reason where the kernels do not serve a call."""
    hopper_cores()
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] not in HEAD_DIMS:
        refuse(f"q is {q.dtype} of head dim {q.shape[-1]}, it takes bfloat16 and float16 of {HEAD_DIMS}")
    if group not in GROUPS:
        refuse(f"{group} query heads share a kv head, it takes {GROUPS}")
    if num_blocks > MOST_BLOCKS:
        refuse(f"{num_blocks} blocks a row, it takes at most {MOST_BLOCKS}")
    if num_chosen > 32:
        refuse(f"{num_chosen} blocks to choose, it takes at most 32")


def probabilities(
    q: jax.Array, k: jax.Array, begin: jax.Array, lse: jax.Array, first: jax.Array, stop: jax.Array, *, scale: float
) -> jax.Array:
    """The probability of each compressed key for each of Q queries, summed over the heads of its group.

    Args:
      q: All queries, `[B, T, N, H]`.
      k: `[F, M, H]`.
      begin: Which is the first of the Q; some of the last may be beyond T.
      lse: Of the attention to the compressed keys, float32 `[F, Q, G]`.
      first, stop: The keys that a query sees, int32 `[F, Q]`.
    Returns: float32 `[F, Q', M']`, of at least Q queries and M keys; anything for keys that are not seen.
    """
    (B, T, _, H), (F, Q, G), M = q.shape, lse.shape, k.shape[1]
    queries = TILE // G
    num_tiles = -(-Q // queries)
    more = (0, 0), (0, num_tiles * queries - Q)
    lse = jnp.pad(lse * _LOG2_E, (*more, (0, 0))).reshape(F, -1)
    k = jnp.pad(k, ((0, 0), (0, -M % TILE), (0, 0)))
    first, stop = (x.reshape(F, num_tiles, queries) for x in (jnp.pad(first, more, mode="edge"), jnp.pad(stop, more)))
    seen = first < stop
    bounds = jnp.min(jnp.where(seen, first, M), axis=2) // TILE, -(-jnp.max(jnp.where(seen, stop, 0), axis=2) // TILE)
    num_blocks = min(hopper_cores(), F * num_tiles)

    def smem(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=TRANSFORMS)

    return plgpu.kernel(
        lambda *refs: _Scores((T, F // B, G), num_blocks, scale, *refs).run(),
        out_type=jax.ShapeDtypeStruct((F, num_tiles * queries, k.shape[1]), jnp.float32),
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=_NUM_CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=[
            smem(_Q_SLOTS, TILE, H),
            smem(_SLOTS, TILE, H),
            plgpu.Barrier(num_arrivals=1, num_barriers=_Q_SLOTS),
            plgpu.Barrier(num_arrivals=1, num_barriers=_SLOTS),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(q.reshape(-1, H), k, begin[None], lse, *bounds)


class _Scores:
    """What one block of threads does in the first kernel."""

    def __init__(self, shape: tuple[int, int, int], num_blocks: int, scale: float, *refs):
        """`shape` is tokens of a row, its kv heads, and heads that share one."""
        self.length, self.num_kv_heads, self.group = shape
        self.num_blocks, self.scale = num_blocks, scale
        self.q, self.k, self.begin, self.lse, self.first, self.stop, self.out, *shared = refs
        self.q_smem, self.k_smem, self.q_full, self.k_full = shared
        self.warpgroup = lax.axis_index("warpgroup")
        self.q_free, self.k_free = NAMED_BARRIERS[0], NAMED_BARRIERS[_Q_SLOTS]
        self.everyone = (_NUM_CONSUMERS + 1) * WARPGROUP

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
        """count = body(row and kv head, tile of queries, tiles of keys, slot of q, count): those with most keys first.

        `count` is of tiles of keys before the item.
        """
        F, num_tiles = self.first.shape

        def one_round(i, counts):
            number = i * self.num_blocks + lax.axis_index("block")
            there = jnp.minimum(number, F * num_tiles - 1)
            f, tile = lax.rem(there, F), num_tiles - 1 - lax.div(there, F)
            first, stop = self.first[f, tile], self.stop[f, tile]
            exists = (number < F * num_tiles) & (first < stop)

            def one_item(items, count):
                return items + 1, body(f, tile, first, stop, lax.rem(items, _Q_SLOTS), count)

            return lax.cond(exists, one_item, lambda *counts: counts, *counts)

        lax.fori_loop(0, -(-F * num_tiles // self.num_blocks), one_round, (jnp.int32(0), jnp.int32(0)))

    def produce(self) -> None:
        def one_item(f, tile, first, stop, q_slot, count):
            sync(self.q_free + q_slot, self.everyone)
            self.gather_queries(f, tile, q_slot)

            def one_tile(j, count):
                slot = lax.rem(count, _SLOTS)
                sync(self.k_free + slot, self.everyone)
                keys = self.k.at[f, pl.ds(j * TILE, TILE)]
                plgpu.copy_gmem_to_smem(keys, self.k_smem.at[slot], self.k_full.at[slot])
                pl.when(j == first)(lambda: self.announce_queries(q_slot))
                return count + 1

            return lax.fori_loop(first, stop, one_tile, count)

        self.for_each_item(one_item)

    def gather_queries(self, f, tile, q_slot) -> None:
        """Starts to copy the heads of a group of some queries, from where they are among all `[B T N]`."""
        num_heads, queries = self.num_kv_heads * self.group, ROWS // self.group
        for half in range(TILE // ROWS):
            token = self.begin[0] + (tile * (TILE // ROWS) + half) * queries
            first = (lax.div(f, self.num_kv_heads) * self.length + token) * num_heads
            first += lax.rem(f, self.num_kv_heads) * self.group
            there = jnp.maximum(self.length - token, 0) * self.group
            rows = scattered_rows.Spaced(first, num_heads, there, run=self.group)
            scattered_rows.gather([(self.q, self.q_smem)], [], rows, q_slot * (TILE // ROWS) + half)

    def announce_queries(self, q_slot) -> None:
        """Tells the consumers that they are there."""
        scattered_rows.wait(0)
        plgpu.commit_smem()  # for its barrier
        plgpu.barrier_arrive(self.q_full.at[q_slot])

    def consume(self) -> None:
        for slot in range(_Q_SLOTS):
            arrive(self.q_free + slot, self.everyone)
        for slot in range(_SLOTS):
            arrive(self.k_free + slot, self.everyone)

        def one_item(f, tile, first, stop, q_slot, count):
            lse = plgpu.load(self.lse.at[f, pl.ds(tile * TILE, TILE)], layout=COLUMN, optimized=False)
            plgpu.barrier_wait(self.q_full.at[q_slot])

            def one_tile(j, count):
                slot = lax.rem(count, _SLOTS)
                plgpu.barrier_wait(self.k_full.at[slot])
                s = wgmma_chosen.logits(self.k_smem, self.q_smem, slot=slot, part=self.warpgroup, b_slot=q_slot)
                arrive(self.k_free + slot, self.everyone)
                p = jnp.exp2(s * (self.scale * _LOG2_E) - columns(lse, s.shape))
                key = j * TILE + self.warpgroup * ROWS
                _store_group_sums(p, self.out, f, tile * (TILE // self.group), key, self.group)
                return count + 1

            count = lax.fori_loop(first, stop, one_tile, count)
            arrive(self.q_free + q_slot, self.everyone)
            return count

        self.for_each_item(one_item)


def _store_group_sums(p: jax.Array, out, f, query, key, group: int) -> None:
    """out[f, query + i, key + j] = sum of p[j, i group : (i + 1) group], of p float32 `[64 keys, 128 rows]`."""
    _, num_queries, num_keys = out.shape

    @plgpu.inline_mgpu(arg_types=(MATRIX, plgpu.RefType(), *(SCALAR,) * 3))
    def emit(_, p, out, f, query, key):
        registers = list(p.to_layout(IN_FLIGHT.to_mgpu()).registers.flat)
        address = llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(out))
        operands = [*registers, address, *(x.registers.item() for x in (f, query, key))]
        constraints = ",".join([*["f"] * len(registers), "l", "r", "r", "r", "~{memory}"])
        lines = _group_sum_lines(len(registers), group, num_queries, num_keys)
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, operands, lines, constraints, has_side_effects=True)

    emit(p, out, *int32s((f, query, key)))


def _group_sum_lines(num_registers: int, group: int, num_queries: int, num_keys: int) -> str:
    """Operands: p, the address of out, and f, query and key."""
    out, f, query, key = (f"${num_registers + i}" for i in range(4))
    pitch = 4 * num_keys
    lines = [
        ".reg .b32 thread, lane, column, row; .reg .b64 at, to; .reg .f32 x, y; .reg .pred mine;",
        "mov.u32 thread, %tid.x;",
        f"and.b32 thread, thread, {WARPGROUP - 1};",
        "and.b32 lane, thread, 31;",
        # A thread holds pairs of columns of two rows, 8 apart; a warp those of 16 rows.
        "and.b32 column, lane, 3;",
        "shr.u32 row, thread, 5;",
        "shl.b32 row, row, 4;",
        "shr.u32 lane, lane, 2;",
        "add.u32 row, row, lane;",
        f"add.u32 row, row, {key};",
        f"mad.lo.s32 thread, {f}, {num_queries}, {query};",
        f"mad.wide.s32 at, thread, {pitch}, {out};",
        "mad.wide.u32 at, row, 4, at;",
    ]
    # How many queries the threads of a row have in 8 columns; this thread's is the first of them.
    if group < 8:
        lines += [
            f"mul.lo.u32 thread, column, 2;div.u32 thread, thread, {group};",
            f"mad.wide.u32 at, thread, {pitch}, at;",
        ]
    for half in range(2):
        columns_of = [[f"${4 * j + 2 * half + i}" for i in range(2)] for j in range(num_registers // 4)]
        place = 32 * half  # 8 keys further
        if group == 1:
            for j, pair in enumerate(columns_of):
                for i, value in enumerate(pair):
                    lines += [f"add.s64 to, at, {(8 * j + i) * pitch + place};", f"st.global.f32 [to], {value};"]
            continue
        blocks = max(1, group // 8)
        for number in range(0, len(columns_of), blocks):
            values = [value for pair in columns_of[number : number + blocks] for value in pair]
            lines.append(f"add.f32 x, {values[0]}, {values[1]};")
            lines += [f"add.f32 x, x, {value};" for value in values[2:]]
            for step in (1, 2):
                if group >= 4 * step:
                    lines += [f"shfl.sync.bfly.b32 y, x, {step}, 31, 0xffffffff;", "add.f32 x, x, y;"]
            if group >= 8:
                token = number // blocks
                lines.append(f"setp.eq.u32 mine, column, {token % 4};")
            else:
                token = number * (8 // group)
                lines += ["and.b32 thread, column, 1;", "setp.eq.u32 mine, thread, 0;"] if group == 4 else []
            guard = "" if group == 2 else "@mine "
            lines += [f"add.s64 to, at, {token * pitch + place};", f"{guard}st.global.f32 [to], x;"]
    return "{\n" + "\n".join(lines) + "\n}"


class Fold(NamedTuple):
    """How probabilities of compressed keys become scores of blocks: score[w] = sum_i times[i] p[c[w] + first + i]."""

    first: int
    times: tuple[int, ...]


def choose(p: jax.Array, whole_compressed: jax.Array, after: jax.Array, end: jax.Array, count: int, fold: Fold):
    """The `count` blocks of greatest score of each query, ascending; of equal ones the earlier.

    Args:
      p: `[F, Q', M']`, of which the first Q queries are read.
      whole_compressed: c, int32 `[F, W]`.
      after, end: Blocks strictly between them are chosen from, int32 `[F, Q]`.
    Returns: int32 `[F, Q, count]`, -1 where there are fewer.
    """
    (F, W), Q = whole_compressed.shape, after.shape[1]
    num_blocks = min(hopper_cores() * 4, -(-F * Q // 4))
    lines = _choose_lines(F, Q, W, p.shape[1], p.shape[2], count, fold)

    def body(*refs):
        def one_round(i, _):
            number = (i * num_blocks + lax.axis_index("block")) * 4

            @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * len(refs), SCALAR))
            def emit(_, *operands):
                *refs, number = operands
                i64 = ir.IntegerType.get_signless(64)
                addresses = [llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref)) for ref in refs]
                constraints = ",".join(["r", *["l"] * len(addresses), "~{memory}"])
                values = [number.registers.item(), *addresses]
                llvm.inline_asm(ir.Type.parse("!llvm.void"), values, lines, constraints, has_side_effects=True)

            emit(*refs, *int32s((number,)))
            return 0

        lax.fori_loop(0, -(-F * Q // (num_blocks * 4)), one_round, 0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((F, Q, count), jnp.int32),
        grid=(num_blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(p, whole_compressed, after, end)


def _choose_lines(F: int, Q: int, W: int, num_queries: int, num_keys: int, count: int, fold: Fold) -> str:
    """PTX of one query of a kv head by each warp of four. Operands: the first warp's, then addresses."""
    per_lane = -(-W // 32)
    keys = [f"key{i}" for i in range(per_lane)]
    lines = [
        f".reg .b32 number, lane, f, query, after, end, column, c, {', '.join(keys)};",
        ".reg .b32 best, least, step, trial, many, wanted, before, written, equal, x;",
        ".reg .b64 row, table, at; .reg .f32 score, p; .reg .pred done, free, other;",
        "mov.u32 lane, %tid.x;",
        "shr.u32 number, lane, 5;",
        "and.b32 lane, lane, 31;",
        "add.u32 number, number, $0;",
        f"setp.ge.u32 done, number, {F * Q};",
        "@done bra END;",
        f"div.u32 f, number, {Q};",
        f"rem.u32 query, number, {Q};",
        "mad.wide.u32 at, number, 4, $3; ld.global.nc.s32 after, [at];",
        "mad.wide.u32 at, number, 4, $4; ld.global.nc.s32 end, [at];",
        f"mad.wide.u32 table, f, {4 * W}, $2;",
        f"mad.lo.u32 c, f, {num_queries}, query;",
        f"mad.wide.u32 row, c, {4 * num_keys}, $1;",
        # Scores are not negative, so that their bits are in their order; 0 is none.
        *(f"mov.b32 {key}, 0;" for key in keys),
    ]
    for i, key in enumerate(keys):
        lines += [
            f"setp.le.s32 done, end, {32 * i};",
            "@done bra SCORED;",
            f"add.u32 column, lane, {32 * i};",
            "setp.gt.s32 free, column, after;",
            "setp.lt.and.s32 free, column, end, free;",
            "mad.wide.u32 at, column, 4, table;",
            "mov.b32 c, 0;",
            "@free ld.global.nc.b32 c, [at];",
            "mad.wide.s32 at, c, 4, row;",
            "mov.f32 score, 0f00000000;",
        ]
        for j, times in enumerate(fold.times):
            lines += [
                "mov.f32 p, 0f00000000;",
                f"@free ld.global.nc.f32 p, [at + {4 * (fold.first + j)}];",
                f"fma.rn.f32 score, p, {ptx_float(float(times))}, score;",
            ]
        lines += [f"mov.b32 {key}, score;", f"@free add.u32 {key}, {key}, 1;"]
    lines += ["SCORED:", *_threshold_lines(keys, count), *_choice_lines(keys, count), "END:"]
    return "{\n" + "\n".join(lines) + "\n}"


def _threshold_lines(keys: list[str], count: int) -> list[str]:
    """The greatest `least` that `count` keys of the warp are at least as great as, 0 where there are fewer keys; and
    how many keys that equal it are `wanted`, after all greater ones."""
    lines = [
        "mov.b32 best, 0;",
        *(f"max.u32 best, best, {key};" for key in keys),
        "redux.sync.max.u32 best, best, 0xffffffff;",
        # Bit by bit, from the first that any key has.
        "clz.b32 step, best;",
        "sub.u32 step, 31, step;",
        "mov.b32 least, 1;",
        "shl.b32 step, least, step;",
        "mov.b32 least, 0;",
        "SEARCH:",
        "or.b32 trial, least, step;",
        "mov.b32 many, 0;",
    ]
    for i, key in enumerate(keys):
        if i and i % _KEYS_OF_CHECK == 0:
            lines += [f"setp.le.s32 done, end, {32 * i};", "@done bra COUNTED;"]
        lines += [f"set.ge.u32.u32 x, {key}, trial;", "sub.u32 many, many, x;"]
    lines += [
        "COUNTED:",
        "redux.sync.add.u32 many, many, 0xffffffff;",
        f"setp.ge.u32 other, many, {count};",
        "@other mov.b32 least, trial;",
        "shr.u32 step, step, 1;",
        f"setp.ne.u32 other, many, {count};",
        "setp.ne.and.b32 other, step, 0, other;",
        "@other bra SEARCH;",
        "mov.b32 many, 0;",
    ]
    for key in keys:
        lines += [f"set.gt.u32.u32 x, {key}, least;", "sub.u32 many, many, x;"]
    return [
        *lines,
        "redux.sync.add.u32 many, many, 0xffffffff;",
        f"sub.u32 wanted, {count}, many;",
        "setp.eq.u32 other, least, 0;",
        "selp.b32 wanted, 0, wanted, other;",
    ]


def _choice_lines(keys: list[str], count: int) -> list[str]:
    """Writes the numbers of the chosen keys, ascending, and -1 behind them."""
    lines = [
        f"mul.lo.u32 column, number, {count};",
        "mad.wide.u32 row, column, 4, $5;",
        "mov.u32 before, %lanemask_lt;",
        "mov.b32 written, 0;",
    ]
    for i, key in enumerate(keys):
        lines += [
            f"setp.le.s32 done, end, {32 * i};",
            "@done bra WRITTEN;",
            f"setp.eq.u32 other, {key}, least;",
            "vote.sync.ballot.b32 equal, other, 0xffffffff;",
            # Of equal ones the first.
            "and.b32 x, equal, before;",
            "popc.b32 x, x;",
            "setp.lt.and.u32 other, x, wanted, other;",
            f"setp.gt.or.u32 other, {key}, least, other;",
            "popc.b32 equal, equal;",
            "min.u32 equal, equal, wanted;",
            "sub.u32 wanted, wanted, equal;",
            "vote.sync.ballot.b32 equal, other, 0xffffffff;",
            "and.b32 x, equal, before;",
            "popc.b32 x, x;",
            "add.u32 x, x, written;",
            "mad.wide.u32 at, x, 4, row;",
            f"add.u32 column, lane, {32 * i};",
            "@other st.global.b32 [at], column;",
            "popc.b32 equal, equal;",
            "add.u32 written, written, equal;",
        ]
    return [
        *lines,
        "WRITTEN:",
        "mad.wide.u32 at, lane, 4, row;",
        "mov.b32 x, -1;",
        "setp.ge.u32 other, lane, written;",
        f"setp.lt.and.u32 other, lane, {count}, other;",
        "@other st.global.b32 [at], x;",
    ]

"""The kernels of attention of few queries to many keys on Hopper GPUs (Mosaic GPU): keys split over multiprocessors.

What takes time is reading the keys and values, once; the rows of a tile are all that reads them: the queries of a row
of the batch, of all query heads that share a kv head. All blocks of keys that are to be read, of all rows and kv heads,
stand in one line, which is cut into as many runs of equal length as there are multiprocessors, wherever that falls. So
all finish together, however few rows there are and however much their keys differ in number.

A run is, for each kv head of a row that it comes by, a piece of its blocks, one after the other. A producer warpgroup
copies them into shared memory (TMA), far ahead; two consumers take them in turns, each with a softmax of its own, and
write what comes of a piece as two parts: out and lse over the keys seen. The second kernel merges the parts of each
query:

  lse = log sum_i exp(lse_i);  out = sum_i exp(lse_i - lse) out_i

Where run c meets pair p (a row of the batch and a tile of its queries) the parts are the (c + p)-th two: from one piece
to the next either the run is the next or the pair is, so no two share a place, and those of a pair stand together.

Values may be the first dims of the keys, as those of latent attention are, which are many: then keys alone are copied,
both consumers take every block, each for half of the dims of the values, and a piece is one part.

Reference: Dao et al. 2023, Flash-Decoding for long-context inference; runs of a line, whatever they cut: Osama et al.
2023, Stream-K, arXiv:2301.03598.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike

from pallas_kernels.blockwise.pallas_mosaic_gpu_pairs import PairTest, token_vectors
from pallas_kernels.blockwise.pallas_mosaic_gpu_tiles import (
    COLUMN,
    MATRIX,
    ROW,
    columns,
    indices,
    rows,
)
from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import row_of_batch
from pallas_kernels.mosaic_gpu import NAMED_BARRIERS, WARPGROUP, arrive, sync
from pallas_kernels.online_softmax import SoftmaxCarry
from pallas_kernels.wgmma import ROWS, TILE_ROWS, TRANSFORMS

_CONSUMERS = 2
_Q_SLOTS = 2
_SHARED_BYTES = 226 * 1024  # of the 227 KB that a block of threads may have
_MOST_SLOTS = 6
_AT_ONCE = 16  # parts that the merge reads at a time
_LANES = WARPGROUP  # numbers of a row that the merge takes together, one a thread

_LOG2_E = math.log2(math.e)
_LOWEST = -1e30  # of what logits are measured against: finite, so that rows that see nothing make no nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is static of a call.

    Attributes:
      scale: Multiplies q.k; positive.
      block: Keys of a block.
      value_dim: Dims of values, V.
      kv_len: Number of keys, of which the last block may hold fewer than it has room for.
      q_len: Queries of a row of the batch.
      num_heads: Query heads.
      pair_test: Whether pairs may attend, of their positions and segment ids (q, kv, q, kv), `[64, block]` each; None
        where all may, of those that are visited.
      num_runs: Runs that the line is cut into: multiprocessors.
      return_carry: Whether to return the running softmax rather than the result.
      interpret: Whether to run on a CPU, in JAX's interpreter.
    """

    scale: float
    block: int
    value_dim: int
    kv_len: int
    q_len: int
    num_heads: int
    pair_test: PairTest | None
    num_runs: int
    return_carry: bool
    interpret: Any = None


class Line(NamedTuple):
    """The blocks of keys to read, in one line: row by row of the batch, in each tile by tile of queries.

    Attributes:
      blocks: Lists of blocks, int32 `[B or 1, most]`: 2 j for block j, or 2 j + 1 where it needs the pair test.
      offsets: Where each row's own begin in its list, int32 `[B]`.
      counts: How many each row has, int32 `[B]`.
      starts: Where each row begins in the line, and where the last one ends, int32 `[B + 1]`.
      first_pair: The pair that each run begins in, int32 `[runs]`.
      first_block: At how manieth of its blocks, int32 `[runs]`.
    """

    blocks: Any
    offsets: Any
    counts: Any
    starts: Any
    first_pair: Any
    first_block: Any


class Inputs(NamedTuple):
    """What the kernel reads; None where there is nothing to read.

    Attributes:
      q: The rows of each tile, `[B, K, 64 tiles, H]`: query t of the g-th head of a kv head is row t G + g. Those
        behind the last are anything.
      k, v: `[B, S, K, H]` and `[B, S, K, V]`, S a multiple of 8; v None where values are the first dims of the keys.
      line: What to read.
      q_positions, q_segment_ids: Of the rows, int32 `[B or 1, 64 tiles]`.
      kv_positions, kv_segment_ids: Int32 `[B or 1, whole blocks]`.
    """

    q: Any
    k: Any
    v: Any
    line: Line
    q_positions: Any
    kv_positions: Any
    q_segment_ids: Any
    kv_segment_ids: Any

    @property
    def pairs_of_row(self) -> int:
        """Kv heads times tiles of queries."""
        return self.q.shape[1] * (self.q.shape[2] // ROWS)


def num_slots(key_dim: int, value_dim: int, block: int) -> int:
    """Blocks of keys and values that shared memory has room for; even, so that a slot is always one consumer's."""
    used = _Q_SLOTS * ROWS * key_dim * 2 + _CONSUMERS * ROWS * value_dim * 4
    return min(_MOST_SLOTS, (_SHARED_BYTES - used) // (block * (key_dim + value_dim) * 2)) // 2 * 2


def num_slots_of_keys(key_dim: int, block: int) -> int:
    """Blocks of keys that it has room for where values are part of them, beside one tile of queries."""
    return min(_MOST_SLOTS, (_SHARED_BYTES - ROWS * key_dim * 2) // (block * key_dim * 2))


def attend(inputs: Inputs, config: Config) -> tuple[jax.Array, jax.Array] | SoftmaxCarry:
    """Runs both kernels: out and lse, or the running softmax, of every query."""
    return _merged(*_parts(inputs, config), inputs, config)


def _parts(inputs: Inputs, config: Config) -> tuple[jax.Array, jax.Array]:
    """What the runs make of their pieces: out `[parts, 2, rows, V]` and lse, base 2, `[parts, 2, 64]`, float32; 1 in
    place of 2 where values are the first dims of the keys.

    V is filled up to a multiple of 128, by anything. Where a part has seen no key its lse is _LOWEST.
    """
    H, V, has_values = inputs.q.shape[3], config.value_dim, inputs.v is not None
    slots = num_slots(H, V, config.block) if has_values else num_slots_of_keys(H, config.block)
    q_slots = _Q_SLOTS if has_values else 1
    num_parts = config.num_runs + inputs.q.shape[0] * inputs.pairs_of_row - 1
    group = config.num_heads // inputs.q.shape[1]
    num_rows = min(ROWS, -(-config.q_len * group // TILE_ROWS) * TILE_ROWS) if has_values else ROWS
    of_piece = _CONSUMERS if has_values else 1
    out_type = [
        jax.ShapeDtypeStruct((num_parts, of_piece, num_rows, -(-V // _LANES) * _LANES), jnp.float32),
        jax.ShapeDtypeStruct((num_parts, of_piece, ROWS), jnp.float32),
    ]
    leaves, tree = jax.tree.flatten(inputs)

    def smem(*shape):
        return plgpu.SMEM(shape, inputs.q.dtype, transforms=TRANSFORMS)

    scratch, shared_tree = jax.tree.flatten(
        _Shared(
            q=smem(q_slots, ROWS, H),
            k=smem(slots, config.block, H),
            v=smem(slots, config.block, V) if has_values else None,
            out=plgpu.SMEM((_CONSUMERS, ROWS, V), jnp.float32) if has_values else None,
            q_full=plgpu.Barrier(num_barriers=q_slots),
            k_full=plgpu.Barrier(num_barriers=slots),
            v_full=plgpu.Barrier(num_barriers=slots) if has_values else None,
        )
    )

    def body(*refs):
        refs = iter(refs)
        inputs = jax.tree.unflatten(tree, itertools.islice(refs, tree.num_leaves))
        results = list(itertools.islice(refs, len(out_type)))
        role = _Split if has_values else _SplitKeys
        role(config, inputs, results, jax.tree.unflatten(shared_tree, refs)).run()

    parts, lse_parts = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(config.num_runs,),
        grid_names=("block",),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        # No thread reads shared memory that it has written, so Pallas need not separate the two.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=config.interpret,
    )(*leaves)
    return parts, lse_parts


class _Shared(NamedTuple):
    """Shared memory, and the barriers that say when a buffer is full; None for what is not there."""

    q: Any
    k: Any
    v: Any
    out: Any
    q_full: Any
    k_full: Any
    v_full: Any


class _Piece(NamedTuple):
    """A run's blocks of one pair.

    Attributes:
      number: Pieces of the run before it.
      batch, kv_head, tile: The pair: a row of the batch, and a tile of the queries of a kv head.
      part: Where its parts go.
      start, count: Its blocks, of the row's list.
      blocks_before: Blocks of the run before it.
    """

    number: ArrayLike
    batch: ArrayLike
    kv_head: ArrayLike
    tile: ArrayLike
    part: ArrayLike
    start: ArrayLike
    count: ArrayLike
    blocks_before: ArrayLike


class _Running(NamedTuple):
    """A consumer's softmax: `acc [64, V]`, what logits are measured against, base 2, and their sum, `[64]` each."""

    acc: jax.Array
    row_max: jax.Array
    row_sum: jax.Array


class _Split:
    """What one block of threads does.

    Attributes:
      readers: Consumers that read a block.
    """

    readers = 1

    def __init__(self, config: Config, inputs: Inputs, results: list, shared: _Shared):
        self.config, self.inputs, self.shared = config, inputs, shared
        self.parts, self.lse_parts = results
        self.num_slots, self.num_q_slots = shared.k.shape[0], shared.q.shape[0]
        self.tile = ROWS, config.block
        self.warpgroup = lax.axis_index("warpgroup")
        # Named barriers, which tell the producer that a buffer may be filled again, and how many threads they take.
        self.q_free = NAMED_BARRIERS.start
        self.free = self.q_free + self.num_q_slots
        assert self.free + self.num_slots <= NAMED_BARRIERS.stop
        self.everyone = (_CONSUMERS + 1) * WARPGROUP
        self.sharers = (self.readers + 1) * WARPGROUP

    def run(self) -> None:
        @pl.when(self.warpgroup < _CONSUMERS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            self.consume()

        @pl.when(self.warpgroup == _CONSUMERS)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            self.produce()

    def for_each_piece(self, body: Callable[[_Piece], None]) -> None:
        line, run = self.inputs.line, lax.axis_index("block")
        pairs_of_row, num_tiles = self.inputs.pairs_of_row, self.inputs.q.shape[2] // ROWS
        num_rows = self.inputs.q.shape[0]
        length = _length_of_run(line.starts[num_rows], run, self.config.num_runs)

        def some_left(loop):
            number, pair, first, done = loop
            del number, pair, first
            return done < length

        def one_piece(loop):
            number, pair, first, done = loop
            batch, of_row = lax.div(pair, pairs_of_row), lax.rem(pair, pairs_of_row)
            count = jnp.minimum(line.counts[batch] - first, length - done)
            piece = _Piece(
                number=number,
                batch=batch,
                kv_head=lax.div(of_row, num_tiles),
                tile=lax.rem(of_row, num_tiles),
                part=run + pair,
                start=line.offsets[batch] + first,
                count=count,
                blocks_before=done,
            )
            pl.when(count > 0)(lambda: body(piece))
            return number + (count > 0).astype(jnp.int32), pair + 1, jnp.int32(0), done + count

        start = jnp.int32(0), line.first_pair[run], line.first_block[run], jnp.int32(0)
        lax.while_loop(some_left, one_piece, start)

    def block_of(self, piece: _Piece, i) -> ArrayLike:
        """The i-th of a piece, as the line has it; behind its end any other."""
        blocks = self.inputs.line.blocks
        return blocks[row_of_batch(blocks, piece.batch), jnp.minimum(piece.start + i, blocks.shape[1] - 1)]

    # The producer.

    def produce(self) -> None:
        inputs, shared, block = self.inputs, self.shared, self.config.block

        def one_piece(piece: _Piece) -> None:
            slot = lax.rem(piece.number, self.num_q_slots)
            sync(self.q_free + slot, self.everyone)
            queries = inputs.q.at[piece.batch, piece.kv_head, pl.ds(piece.tile * ROWS, ROWS)]
            plgpu.copy_gmem_to_smem(queries, shared.q.at[slot], shared.q_full.at[slot])

            def one_block(i, entry):
                ahead = self.block_of(piece, i + 1)
                slot = lax.rem(piece.blocks_before + i, self.num_slots)
                at = piece.batch, pl.ds(lax.div(entry, 2) * block, block), piece.kv_head
                sync(self.free + slot, self.sharers)
                plgpu.copy_gmem_to_smem(inputs.k.at[at], shared.k.at[slot], shared.k_full.at[slot])
                if inputs.v is not None:
                    plgpu.copy_gmem_to_smem(inputs.v.at[at], shared.v.at[slot], shared.v_full.at[slot])
                return ahead

            lax.fori_loop(0, piece.count, one_block, self.block_of(piece, 0))

        self.for_each_piece(one_piece)

    # A consumer.

    def consume(self) -> None:
        for slot in range(self.num_q_slots):
            arrive(self.q_free + slot, self.everyone)
        self.give_all_back()
        self.for_each_piece(self.consume_piece)
        plgpu.wait_smem_to_gmem(0)

    def give_all_back(self) -> None:
        """Tells the producer that the slots of this consumer may be filled for the first time."""
        for slot in range(0, self.num_slots, _CONSUMERS):
            arrive(self.free + self.warpgroup + slot, self.sharers)

    def blocks_of(self, piece: _Piece) -> tuple[ArrayLike, int]:
        """The first of a piece's blocks that is this consumer's, and how many on the next is: they go in turns."""
        return lax.rem(self.warpgroup + piece.blocks_before, _CONSUMERS), _CONSUMERS

    @property
    def columns(self) -> int:
        """Dims of the values that a consumer's result has."""
        return self.config.value_dim

    def consume_piece(self, piece: _Piece) -> None:
        q_slot = lax.rem(piece.number, self.num_q_slots)
        plgpu.barrier_wait(self.shared.q_full.at[q_slot])
        allowed = self.pair_test(piece)
        first, stride = self.blocks_of(piece)

        def one_block(i, loop):
            entry, running = loop
            i = first + stride * i
            ahead = self.block_of(piece, i + stride)
            slot = lax.rem(piece.blocks_before + i, self.num_slots)
            return ahead, self.step(entry, q_slot, slot, running, allowed)

        mine = lax.div(piece.count - first + stride - 1, stride)
        loop = self.block_of(piece, first), self.nothing_running()
        _, running = lax.fori_loop(0, mine, one_block, loop)
        arrive(self.q_free + q_slot, self.everyone)
        self.write(piece.part, running)

    def nothing_running(self) -> _Running:
        return _Running(
            acc=plgpu.layout_cast(jnp.zeros((ROWS, self.columns), jnp.float32), MATRIX),
            row_max=plgpu.layout_cast(jnp.full((ROWS,), _LOWEST, jnp.float32), ROW),
            row_sum=plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW),
        )

    def step(self, entry, q_slot, slot, running: _Running, allowed: Callable) -> _Running:
        """One block of keys."""
        shared, to_base_2 = self.shared, self.config.scale * _LOG2_E
        plgpu.barrier_wait(shared.k_full.at[slot])

        def logits(s_ref):
            plgpu.wgmma(s_ref, shared.q.at[q_slot], shared.k.at[slot].transpose((1, 0)))
            return s_ref[...]

        s = pl.run_scoped(logits, plgpu.ACC(self.tile, jnp.float32))
        if self.config.pair_test is not None:
            needs_test = lax.rem(entry, 2) == 1
            s = lax.cond(needs_test, lambda s: jnp.where(allowed(lax.div(entry, 2)), s, -jnp.inf), lambda s: s, s)
        new_max = jnp.maximum(running.row_max, s.max(axis=1) * to_base_2)
        rescale = jnp.exp2(running.row_max - new_max)
        p = jnp.exp2(s * to_base_2 - rows(new_max, self.tile))
        row_sum = running.row_sum * rescale + p.sum(axis=1)
        acc = running.acc * rows(rescale, running.acc.shape)
        acc = self.add_product(acc, p.astype(self.inputs.q.dtype), slot)
        arrive(self.free + slot, self.sharers)
        return _Running(acc=acc, row_max=new_max, row_sum=row_sum)

    def add_product(self, acc, p, slot) -> jax.Array:
        """acc + p v of a slot's values."""
        plgpu.barrier_wait(self.shared.v_full.at[slot])
        return self.multiply(acc, p, self.shared.v.at[slot])

    def multiply(self, acc, p, v_smem) -> jax.Array:
        if self.config.interpret:
            # By an ordinary read, which a copy may overwrite only behind a fence.
            acc = acc + jnp.dot(p, v_smem[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()
            return acc
        return pl.run_state(lambda acc: plgpu.wgmma(acc, p, v_smem))(plgpu.ACC.init(acc))

    def pair_test(self, piece: _Piece) -> Callable[[ArrayLike], jax.Array]:
        """allowed(j): which pairs of the piece's queries and the keys of block j may attend."""
        inputs, block, test = self.inputs, self.config.block, self.config.pair_test
        if test is not None:
            of_q = piece.tile * ROWS, ROWS, ROW
            q_positions, _, q_segments, _ = token_vectors(inputs, test, batch=piece.batch, q=of_q, kv=None)

        def allowed(j) -> jax.Array:
            of_kv = j * block, block, COLUMN
            _, kv_positions, _, kv_segments = token_vectors(inputs, test, batch=piece.batch, q=None, kv=of_kv)
            bits = test.allowed(
                rows(q_positions, self.tile),
                columns(kv_positions, self.tile),
                rows(q_segments, self.tile),
                columns(kv_segments, self.tile),
            )
            if self.config.kv_len % block:
                bits = bits & (columns(indices(j * block, block, COLUMN), self.tile) < self.config.kv_len)
            return bits

        return allowed

    def write(self, part, running: _Running) -> None:
        """Writes a part."""
        empty = running.row_sum == 0
        some = jnp.where(empty, 1.0, running.row_sum)
        self.lse_parts.at[part, self.warpgroup][...] = jnp.where(empty, _LOWEST, running.row_max + jnp.log2(some))
        staged = self.shared.out.at[self.warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last piece's
        staged[...] = running.acc * rows(1.0 / some, running.acc.shape)
        plgpu.commit_smem()
        to = self.parts.at[part, self.warpgroup, :, pl.ds(0, self.columns)]
        plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, self.parts.shape[2])], to)


class _SplitKeys(_Split):
    """What one block of threads does where values are the first dims of the keys: consumers share out these dims."""

    readers = _CONSUMERS

    @property
    def columns(self) -> int:
        return self.config.value_dim // _CONSUMERS

    def give_all_back(self) -> None:
        for slot in range(self.num_slots):
            arrive(self.free + slot, self.sharers)

    def blocks_of(self, piece: _Piece) -> tuple[ArrayLike, int]:
        return jnp.int32(0), 1

    def add_product(self, acc, p, slot) -> jax.Array:
        def of(consumer: int):
            columns = pl.ds(consumer * self.columns, self.columns)
            return lambda acc, p: self.multiply(acc, p, self.shared.k.at[slot, :, columns])

        return lax.cond(self.warpgroup == 0, of(0), of(1), acc, p)

    def write(self, part, running: _Running) -> None:
        empty = running.row_sum == 0
        some = jnp.where(empty, 1.0, running.row_sum)

        @pl.when(self.warpgroup == 0)
        def _():
            self.lse_parts.at[part, 0][...] = jnp.where(empty, _LOWEST, running.row_max + jnp.log2(some))

        # Shared memory is full: all 64 rows, from the registers.
        to = self.parts.at[part, 0, :, pl.ds(self.warpgroup * self.columns, self.columns)]
        to[...] = running.acc * rows(1.0 / some, running.acc.shape)


def _length_of_run(line_len, run, num_runs: int) -> ArrayLike:
    return lax.div(line_len, num_runs) + (run < lax.rem(line_len, num_runs)).astype(jnp.int32)


def start_of_run(line_len, run, num_runs: int) -> ArrayLike:
    """Where a run begins in the line."""
    return run * lax.div(line_len, num_runs) + jnp.minimum(run, lax.rem(line_len, num_runs))


def _run_at(line_len, place, num_runs: int) -> ArrayLike:
    """The run that a place in the line belongs to."""
    length, longer = lax.div(line_len, num_runs), lax.rem(line_len, num_runs)
    of_longer = lax.div(place, length + 1)
    of_others = longer + lax.div(place - longer * (length + 1), jnp.maximum(length, 1))
    return jnp.where(place < longer * (length + 1), of_longer, of_others)


def _merged(parts, lse_parts, inputs: Inputs, config: Config) -> tuple[jax.Array, jax.Array] | SoftmaxCarry:
    """What the parts of every query are together: a block of threads a query of a head."""
    (B, K), V = inputs.q.shape[:2], config.value_dim
    T, N = config.q_len, config.num_heads
    group, num_tiles = N // K, inputs.q.shape[2] // ROWS
    of_piece, padded_dim = parts.shape[1], parts.shape[3]
    row_vector = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    out_dtype = jnp.float32 if config.return_carry else inputs.q.dtype
    layout = plgpu.Layout.WG_STRIDED((padded_dim,), vec_size=padded_dim // _LANES)

    def body(parts, lse_parts, starts, counts, out_ref, *row_refs):
        batch, head, t = (lax.axis_index(name) for name in ("batch", "head", "token"))
        row = t * group + lax.rem(head, group)
        tile, row = lax.div(row, ROWS), lax.rem(row, ROWS)
        of_row = lax.div(head, group) * num_tiles + tile
        pair, line_len = batch * inputs.pairs_of_row + of_row, starts[B]
        start, count = starts[batch] + of_row * counts[batch], counts[batch]
        first = _run_at(line_len, start, config.num_runs) + pair
        last = _run_at(line_len, start + count - 1, config.num_runs) + pair
        # Rows without a key have no parts.
        num = jnp.where(count > 0, of_piece * (last - first + 1), 0)

        def some_parts(i, loop):
            greatest, total, acc = loop
            numbers = [i * _AT_ONCE + n for n in range(_AT_ONCE)]
            clipped = [jnp.minimum(n, num - 1) for n in numbers]
            places = [(first + lax.div(n, of_piece), lax.rem(n, of_piece), row) for n in clipped]
            lses = [jnp.where(n < num, lse_parts[at], _LOWEST) for n, at in zip(numbers, places, strict=True)]
            values = [plgpu.load(parts.at[at], layout=layout, optimized=False) for at in places]
            new = functools.reduce(jnp.maximum, lses, greatest)
            rescale = jnp.exp2(greatest - new)
            total, acc = total * rescale, acc * rescale
            for lse, value in zip(lses, values, strict=True):
                weight = jnp.where(lse > _LOWEST, jnp.exp2(lse - new), 0.0)
                total, acc = total + weight, acc + value * weight
            return new, total, acc

        nothing = plgpu.layout_cast(jnp.zeros((padded_dim,), jnp.float32), layout)
        num_rounds = lax.div(num + _AT_ONCE - 1, _AT_ONCE)
        greatest, total, acc = lax.fori_loop(0, num_rounds, some_parts, (jnp.float32(_LOWEST), jnp.float32(0), nothing))
        empty = total == 0
        if config.return_carry:
            max_ref, sum_ref = row_refs
            max_ref[batch, head, t] = jnp.where(empty, -jnp.inf, greatest * (1 / _LOG2_E))
            sum_ref[batch, head, t] = total
        else:
            some = jnp.where(empty, 1.0, total)
            acc = acc * (1.0 / some)
            (lse_ref,) = row_refs
            lse_ref[batch, head, t] = jnp.where(empty, -jnp.inf, (greatest + jnp.log2(some)) * (1 / _LOG2_E))
        out_ref.at[batch, t, head][...] = acc.astype(out_dtype)

    out, *of_rows = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((B, T, N, padded_dim), out_dtype)] + [row_vector] * (1 + config.return_carry),
        grid=(B, N, T),
        grid_names=("batch", "head", "token"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=config.interpret,
    )(parts, lse_parts, inputs.line.starts, inputs.line.counts)
    out = out[..., :V]
    return SoftmaxCarry(max=of_rows[0], sum=of_rows[1], acc=out) if config.return_carry else (out, of_rows[0])

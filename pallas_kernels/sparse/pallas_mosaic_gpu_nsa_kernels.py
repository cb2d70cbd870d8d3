"""The kernels of attention to blocks chosen query by query, on Hopper GPUs (Mosaic GPU).

A block of 64 keys stands still in shared memory, and the queries that chose it come by, in tiles of 64 rows that a
producer warpgroup gathers from wherever they are (scattered_rows.py). Two consumer warpgroups take the tiles in turns,
and write what comes of each as a tile of parts, in the order of the lists: out and lse over the keys of the block, or
this block's part of dq. What the parts of a query are together is for pallas_mosaic_gpu_nsa_parts.py. dk and dv stay in
registers over an item, and are added to in device memory; the items of a block take turns at that.

Grid: one block of threads a multiprocessor, which takes every so-manieth item of the lists (nsa_lists.py).

Reference: Yuan et al. 2025, Native Sparse Attention, arXiv:2502.11089, section 3.3.2; Yan et al. 2025, Flash Sparse
Attention, arXiv:2508.18224, section 3.2, for keys outside and queries inside.
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import scattered_rows, wgmma_backward, wgmma_chosen
from pallas_kernels.blockwise.pallas_mosaic_gpu_tiles import COLUMN, MATRIX, ROW, columns, indices, rows
from pallas_kernels.mosaic_gpu import NAMED_BARRIERS, WARPGROUP, arrive, end_turn, fence_smem, sync, take_turn
from pallas_kernels.sparse.nsa_lists import ITEM_FIELDS
from pallas_kernels.wgmma import ROWS, TRANSFORMS

BLOCK = 64
_SLOTS = 4
_LAG = 2  # gathers that a producer leaves in flight
_LOG2_E = math.log2(math.e)
_ADDED = 32  # columns of dk and dv that are added at a time
_STAGE_BYTES = ROWS * 128 * 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is static of a call.

    Attributes:
      scale: Multiplies q.k; positive.
      kv_shape: (B, S, K).
      num_cores: Multiprocessors.
      interpret: Whether to run on a CPU, in JAX's interpreter.
    """

    scale: float
    kv_shape: tuple[int, int, int]
    num_cores: int
    interpret: Any = None

    @property
    def num_consumers(self) -> int:
        """Warpgroups that compute: one in the interpreter, where additions of several could meet."""
        return 1 if self.interpret else 2


class Inputs(NamedTuple):
    """What a kernel reads; None where there is nothing to read.

    Rows are those of the queries: R = B T N.

    Attributes:
      q, dout: `[R, H]`.
      k, v: `[B S K, H]`.
      seen: Rows of k up to where the query of each row stands, it included, int32 `[R]`.
      lse: Base 2, infinite for queries that see nothing, float32 `[R]`.
      delta: rowsum(dout out) - dlse, float32 `[R]`.
      rows, items, num_items: Of the lists, of one chunk of queries.
    """

    q: Any
    k: Any
    v: Any
    dout: Any
    seen: Any
    lse: Any
    delta: Any
    rows: Any
    items: Any
    num_items: Any


class KeyGradients(NamedTuple):
    """References to what is added to: dk and dv, float32 `[B S K, H]`."""

    dk: Any
    dv: Any


class _Shared(NamedTuple):
    """Shared memory, and barriers: that keys and values are there, and of the two consumers."""

    k: Any
    v: Any
    q: Any
    dout: Any
    seen: Any
    lse: Any
    delta: Any
    ds: Any
    stage: Any
    kv_full: Any
    consumers: Any


class _Item(NamedTuple):
    """See ITEM_FIELDS."""

    batch: Any
    head: Any
    start: Any
    first_tile: Any
    num_tiles: Any
    block: Any
    turn: Any


assert _Item._fields == ITEM_FIELDS


def attend(inputs: Inputs, config: Config) -> tuple[jax.Array, jax.Array]:
    """Of every row of the lists, over the keys of its block: out `[tiles, 64, H]`, and lse, base 2, float32
    `[tiles, 64]`; 0 and -inf where it sees none."""
    tiles = inputs.rows.shape
    out_type = [jax.ShapeDtypeStruct((*tiles, inputs.q.shape[1]), inputs.q.dtype)]
    out_type.append(jax.ShapeDtypeStruct(tiles, jnp.float32))
    return tuple(_call(_Forward, inputs, config, out_type, None))


def differentiate(inputs: Inputs, gradients: KeyGradients, num_blocks: int, config: Config) -> jax.Array:
    """The part of dq of every row of the lists that is from the keys of its block `[tiles, 64, H]`; adds to gradients.

    Args:
      num_blocks: Of all rows and kv heads.
    """
    out_type = [jax.ShapeDtypeStruct((*inputs.rows.shape, inputs.q.shape[1]), inputs.q.dtype)]
    counters = jax.new_ref(jnp.zeros((2 * num_blocks,), jnp.int32))  # for dk, and for dv
    return _call(_Backward, inputs, config, out_type, (gradients, counters))[0]


def _call(role: type, inputs: Inputs, config: Config, out_type: list, state: Any) -> list[jax.Array]:
    """Runs a kernel; `state` are references that it reads and writes."""
    H = inputs.q.shape[1]
    num_blocks = min(config.num_cores, len(inputs.items))
    leaves, tree = jax.tree.flatten((inputs, state))

    def smem(*shape):
        return plgpu.SMEM(shape, inputs.q.dtype, transforms=TRANSFORMS)

    def numbers(dtype):
        return plgpu.SMEM((_SLOTS, ROWS), dtype)

    differentiates = inputs.dout is not None
    scratch, shared_tree = jax.tree.flatten(
        _Shared(
            k=smem(1, BLOCK, H),
            v=smem(1, BLOCK, H),
            q=smem(_SLOTS, ROWS, H),
            dout=smem(_SLOTS, ROWS, H) if differentiates else None,
            seen=numbers(jnp.int32),
            lse=numbers(jnp.float32) if differentiates else None,
            delta=numbers(jnp.float32) if differentiates else None,
            ds=smem(config.num_consumers, BLOCK, ROWS) if differentiates else None,
            # At head dim 64 twice as many as are written, for what is added to dk and dv.
            stage=smem(config.num_consumers * (128 // H), ROWS, H),
            kv_full=plgpu.Barrier(num_arrivals=1),
            consumers=plgpu.Barrier(num_arrivals=config.num_consumers) if differentiates else None,
        )
    )

    def body(*refs):
        refs = iter(refs)
        inputs, state = jax.tree.unflatten(tree, itertools.islice(refs, tree.num_leaves))
        results = list(itertools.islice(refs, len(out_type)))
        role(config, num_blocks, inputs, state, results, jax.tree.unflatten(shared_tree, refs)).run()

    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=config.num_consumers + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=config.interpret,
    )(*leaves)


class _Block:
    """What one block of threads does in either kernel."""

    def __init__(self, config: Config, num_blocks: int, inputs: Inputs, state: Any, results: list, shared: _Shared):
        self.config, self.inputs, self.state, self.results, self.shared = config, inputs, state, results, shared
        self.num_blocks = num_blocks
        self.head_dim, self.dtype = inputs.q.shape[1], inputs.q.dtype
        self.interpret, self.num_consumers = config.interpret, config.num_consumers
        self.warpgroup = lax.axis_index("warpgroup")
        self.stage = self.warpgroup * (128 // self.head_dim)
        # Named barriers.
        self.full, self.free = NAMED_BARRIERS[0], NAMED_BARRIERS[_SLOTS]
        self.kv_free, own = NAMED_BARRIERS[2 * _SLOTS : 2 * _SLOTS + 2]
        self.own = own + self.warpgroup
        self.two, self.everyone = 2 * WARPGROUP, (self.num_consumers + 1) * WARPGROUP

    def begin_item(self):
        """What is kept over an item, before its first tile."""
        return ()

    def consume_tile(self, item: _Item, tile, slot, state):
        """One tile of queries, `tile` counted over all lists; returns what is kept over the item after it."""
        raise NotImplementedError

    def end_item(self, item: _Item, state) -> None:
        del item, state

    def run(self) -> None:
        for first, stop, registers, action, role in (
            (0, self.num_consumers, 232, "increase", self.consume),
            (self.num_consumers, self.num_consumers + 1, 40, "decrease", self.produce),
        ):

            @pl.when((self.warpgroup >= first) & (self.warpgroup < stop))
            def _(registers=registers, action=action, role=role):
                plgpu.set_max_registers(registers, action=action)
                role()

    def for_each_item(self, body) -> None:
        """body(item, count) for each item of this block; count is of the tiles before it."""
        block = lax.axis_index("block")

        def one_item(i, count):
            number = i * self.num_blocks + block
            item = _Item(*(self.inputs.items[number, field] for field in range(len(ITEM_FIELDS))))
            body(item, count)
            return count + item.num_tiles

        left = self.inputs.num_items[0] - block
        lax.fori_loop(0, lax.div(left + self.num_blocks - 1, self.num_blocks), one_item, jnp.int32(0))

    # The producer.

    def produce(self) -> None:
        def one_item(item: _Item, count):
            first = self.read_rows(item, 0)
            sync(self.kv_free, self.everyone)
            self.gather([(self.inputs.k, self.shared.k), (self.inputs.v, self.shared.v)], [], self.keys_of(item), 0)

            def one_tile(i, rows):
                # Those of the next tile come while this one's are used.
                following = self.read_rows(item, i + 1)
                slot = lax.rem(count + i, _SLOTS)
                pl.when(i >= _LAG)(lambda: self.announce(count + i - _LAG, _LAG - 1))
                sync(self.free + slot, self.two)
                self.gather_queries(rows, slot)
                pl.when(i == 0)(self.announce_keys)
                return following

            lax.fori_loop(0, item.num_tiles, one_tile, first)
            for behind in reversed(range(_LAG)):
                last = item.num_tiles - 1 - behind
                pl.when(last >= 0)(lambda last=last, behind=behind: self.announce(count + last, behind))

        self.for_each_item(one_item)

    def gather(self, *arguments) -> None:
        (scattered_rows.interpret_gather if self.interpret else scattered_rows.gather)(*arguments)

    def keys_of(self, item: _Item) -> scattered_rows.Spaced:
        """The rows of a block among the B S K of the keys."""
        _, S, K = self.config.kv_shape
        first = (item.batch * S + item.start) * K + item.head
        return scattered_rows.Spaced(first, K, jnp.minimum(S - item.start, BLOCK))

    def read_rows(self, item: _Item, i) -> jax.Array:
        """Starts to read which rows the i-th tile of an item has, if it has one; for `gather_queries`."""
        tile = item.first_tile + jnp.minimum(i, item.num_tiles - 1)
        return tile if self.interpret else scattered_rows.read(scattered_rows.Listed(self.inputs.rows, tile))

    def gather_queries(self, rows, slot) -> None:
        inputs, shared = self.inputs, self.shared
        matrices = [(inputs.q, shared.q)]
        # Rows that are none see nothing.
        numbers = [scattered_rows.Numbers(inputs.seen, shared.seen)]
        if inputs.dout is not None:
            matrices.append((inputs.dout, shared.dout))
            numbers.append(scattered_rows.Numbers(inputs.lse, shared.lse))
            numbers.append(scattered_rows.Numbers(inputs.delta, shared.delta))
        rows = scattered_rows.Listed(inputs.rows, rows) if self.interpret else scattered_rows.Held(rows)
        self.gather(matrices, numbers, rows, slot)

    def announce_keys(self) -> None:
        """Tells the consumers that keys and values are there; the gather of a tile may be under way."""
        if not self.interpret:
            scattered_rows.wait(1)
        plgpu.commit_smem()  # for its barrier too
        plgpu.barrier_arrive(self.shared.kv_full)

    def announce(self, count, in_flight: int) -> None:
        """Tells its consumer that a tile is there, when no more than the last `in_flight` gathers are under way."""
        if not self.interpret:
            scattered_rows.wait(in_flight)
        else:
            plgpu.commit_smem()
        arrive(self.full + lax.rem(count, _SLOTS), self.two)

    # A consumer.

    def consume(self) -> None:
        arrive(self.kv_free, self.everyone)
        for slot in range(0, _SLOTS, self.num_consumers):
            arrive(self.free + self.warpgroup + slot, self.two)
        self.for_each_item(self.consume_item)
        plgpu.wait_smem_to_gmem(0)

    def consume_item(self, item: _Item, count) -> None:
        plgpu.barrier_wait(self.shared.kv_full)
        first = lax.rem(self.warpgroup + count, self.num_consumers)

        def one_tile(i, state):
            i = first + i * self.num_consumers
            slot = lax.rem(count + i, _SLOTS)
            sync(self.full + slot, self.two)
            return self.consume_tile(item, item.first_tile + i, slot, state)

        mine = lax.div(item.num_tiles - first + self.num_consumers - 1, self.num_consumers)
        state = lax.fori_loop(0, mine, one_tile, self.begin_item())
        arrive(self.kv_free, self.everyone)
        self.end_item(item, state)

    def give_back(self, slot) -> None:
        arrive(self.free + slot, self.two)

    def wait_for_stage(self) -> None:
        """Until this warpgroup may write to its stage."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.meet()

    def write_stage(self, tile) -> None:
        """Starts to copy this warpgroup's stage to a tile of parts."""
        self.fence()
        self.meet()
        plgpu.copy_smem_to_gmem(self.shared.stage.at[self.stage], self.results[0].at[tile])

    def meet(self) -> None:
        """A barrier of this warpgroup."""
        if not self.interpret:
            sync(self.own, WARPGROUP)

    def fence(self) -> None:
        """Before what this warpgroup has written to shared memory is read by a copy or a matmul."""
        if self.interpret:
            plgpu.commit_smem()
        else:
            fence_smem()


class _Forward(_Block):
    def consume_tile(self, item, tile, slot, state):
        shared = self.shared
        if not self.interpret:
            s = wgmma_chosen.logits(shared.q, shared.k, slot=slot)
        else:
            s = wgmma_chosen.product(shared.q[slot], shared.k[0].T)
        seen = plgpu.load(shared.seen.at[slot], layout=ROW, optimized=False)
        self.give_back(slot)
        keys = indices(item.start, BLOCK, COLUMN)
        is_seen = columns(keys, s.shape) < rows(seen, s.shape)
        s = jnp.where(is_seen, s * (self.config.scale * _LOG2_E), -jnp.inf)
        greatest = jnp.max(s, axis=1)
        shift = jnp.where(greatest == -jnp.inf, 0.0, greatest)
        p = jnp.exp2(s - rows(shift, s.shape))
        total = jnp.sum(p, axis=1)
        p = p.astype(self.dtype)
        out = wgmma_chosen.product(p, shared.v[0]) if self.interpret else wgmma_chosen.weighted(p, shared.v)
        is_empty = total == 0
        out = out * rows(jnp.where(is_empty, 0.0, 1.0 / jnp.where(is_empty, 1.0, total)), out.shape)
        self.wait_for_stage()
        shared.stage.at[self.stage][...] = out.astype(self.dtype)
        self.write_stage(tile)
        self.results[1].at[tile][...] = jnp.where(is_empty, -jnp.inf, shift + jnp.log2(total))
        return state


class _Backward(_Block):
    def begin_item(self):
        """dk and dv of the block."""
        nothing = plgpu.layout_cast(jnp.zeros((BLOCK, self.head_dim), jnp.float32), MATRIX)
        return nothing, nothing

    def consume_tile(self, item, tile, slot, state):
        dk, dv = state
        shared, shape = self.shared, (BLOCK, ROWS)
        s, dp = self.scores(slot)
        seen, lse, delta = (
            plgpu.load(x.at[slot], layout=COLUMN, optimized=False) for x in (shared.seen, shared.lse, shared.delta)
        )
        p = jnp.exp2(s * (self.config.scale * _LOG2_E) - columns(lse, shape))
        dp, p = (dp, p) if self.interpret else wgmma_backward.settle(dp, p)
        p = jnp.where(rows(indices(item.start, BLOCK, ROW), shape) < columns(seen, shape), p, 0.0)
        ds = (p * (dp - columns(delta, shape))).astype(self.dtype)
        p = p.astype(self.dtype)
        shared.ds.at[self.warpgroup][...] = ds
        self.fence()
        self.wait_for_stage()
        dv = self.update(dv, p, shared.dout, slot, 0)
        dk = self.update(dk, ds, shared.q, slot, ROWS)
        self.give_back(slot)
        self.write_stage(tile)
        return dk, dv

    def scores(self, slot):
        shared = self.shared
        if self.interpret:
            return tuple(
                wgmma_chosen.product(x[0], y[slot].T) for x, y in ((shared.k, shared.q), (shared.v, shared.dout))
            )
        return wgmma_backward.scores(shared.k, shared.v, shared.q, shared.dout, warpgroup=0, slot=slot)

    def update(self, acc, weights, of_queries, slot, column: int):
        """acc + weights of_queries[slot]; and puts 64 columns of dq on the stage, if it has those."""
        shared = self.shared
        if column >= self.head_dim:
            if not self.interpret:
                return wgmma_chosen.accumulate(acc, weights, of_queries, slot=slot)
            return acc + wgmma_chosen.product(weights, of_queries[slot])
        if not self.interpret:
            where = {"slot": slot, "warpgroup": self.warpgroup, "column": column}
            acc, dq = wgmma_chosen.accumulate_and_dq(acc, weights, of_queries, shared.ds, shared.k, **where)
        else:
            acc = acc + wgmma_chosen.product(weights, of_queries[slot])
            dq = wgmma_chosen.product(shared.ds[self.warpgroup].T, shared.k[0])[:, column : column + ROWS]
        dq = dq * self.config.scale
        shared.stage.at[self.stage, :, pl.ds(column, ROWS)][...] = dq.astype(self.dtype)
        return acc

    def end_item(self, item, state) -> None:
        """Adds to dk and dv, one after the other of those that add to the same block's.

        What the two consumers have is added up before, of dk by the first and of dv by the second.
        """
        gradients, counters = self.state
        dk, dv = state
        self.wait_for_stage()
        keys, targets = self.keys_of(item), ((dk * self.config.scale, gradients.dk), (dv, gradients.dv))
        if self.interpret:
            for x, target in targets:
                scattered_rows.interpret_add(x, target, keys, 0)
            return
        is_first = self.warpgroup == 0
        halves = self.add_up(*(x for x, _ in targets))
        counter = item.block + self.warpgroup * (counters.shape[0] // 2)
        take_turn(counters, counter, item.turn, -1, by_copies=False)
        for is_mine, (_, target) in zip((is_first, ~is_first), targets, strict=True):

            @pl.when(is_mine)
            def _(target=target):
                for column in range(0, self.head_dim, _ADDED):
                    piece = halves[column // ROWS][:, column % ROWS : column % ROWS + _ADDED]
                    where = {"part": self.warpgroup, "part_bytes": _STAGE_BYTES, "column": column}
                    scattered_rows.add(piece, self.shared.stage, target, keys, **where)

        self.meet()
        end_turn(counters, counter, by_copies=False)

    def add_up(self, dk, dv) -> list[jax.Array]:
        """Of the first consumer dk, of the second dv: the sum of what both have, 64 columns at a time."""
        halves, where = [], {"part": self.warpgroup, "part_bytes": _STAGE_BYTES}
        for column in range(0, self.head_dim, ROWS):
            pair = tuple(x[:, column : column + ROWS] for x in (dk, dv))
            scattered_rows.give(pair, self.shared.stage, **where)
            self.meet_other()
            halves.append(scattered_rows.take_sum(pair, self.shared.stage, **where))
            self.meet_other()
        return halves

    def meet_other(self) -> None:
        """A barrier of the two consumers."""
        self.meet()
        plgpu.barrier_arrive(self.shared.consumers)
        plgpu.barrier_wait(self.shared.consumers)

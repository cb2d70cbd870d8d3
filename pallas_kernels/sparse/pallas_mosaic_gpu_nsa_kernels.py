"""The kernels of attention to blocks chosen query by query, on Hopper GPUs (Mosaic GPU).

A block of 64 keys stands still in shared memory, and the queries that chose it come by, in tiles of 64 rows that a
producer warpgroup gathers from wherever they are (scattered_rows.py). Two consumer warpgroups take the tiles in turns.
Nothing is kept for a pair of query and block but one number of the first pass:

    lse        the lse of each row over the keys of the block, written in the order of the lists
    out        given the lse over all blocks chosen, P v, added to out
    gradients  P and dS = P (dP - delta), of which dv and dk stay in registers over an item and dq is added to

A query's results come from several blocks, in no fixed order. So out and dq are added up as integers, of which each row
has a unit that no sum can overflow: integer sums do not depend on the order. Items of one block take turns to add to dk
and dv, in float32.

Grid: one block of threads a multiprocessor, which takes every so-manieth item of the lists (nsa_lists.py).

Reference: Yuan et al. 2025, Native Sparse Attention, arXiv:2502.11089, section 3.3.2; Yan et al. 2025, FSA, arXiv:
2508.18224, section 3.2, for keys outside and queries inside.
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
_INFINITY = 0x7F800000


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
      place: The row of k at which the query of each row stands, int32 `[R]`.
      lse: Base 2, infinite for queries that see nothing, float32 `[R]`.
      delta: rowsum(dout out) - dlse, float32 `[R]`.
      unit: What out, or a row of dq, is multiplied with as it becomes an integer: float32 `[B K]`, or `[R]`.
      rows, items: Of the lists.
    """

    q: Any
    k: Any
    v: Any
    dout: Any
    place: Any
    lse: Any
    delta: Any
    unit: Any
    rows: Any
    items: Any


class _Shared(NamedTuple):
    """Shared memory, and the barrier that says when keys and values are there."""

    k: Any
    v: Any
    q: Any
    dout: Any
    place: Any
    lse: Any
    delta: Any
    unit: Any
    ds: Any
    stage: Any
    kv_full: Any


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


def partial_lse(inputs: Inputs, config: Config) -> jax.Array:
    """The lse, base 2, of every row of the lists over the keys of its block: float32 `[tiles, 64]`, -inf for none."""
    return _call(_PartialLse, inputs, config, [jax.ShapeDtypeStruct(inputs.rows.shape, jnp.float32)], {})["result"][0]


def weighted_sum(inputs: Inputs, config: Config) -> jax.Array:
    """out in units: int32 `[R, H]`."""
    zeros = {"out": jnp.zeros(inputs.q.shape, jnp.int32)}
    return _call(_WeightedSum, inputs, config, [], zeros)["out"]


def gradients(inputs: Inputs, num_blocks: int, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq in units, int32 `[R, H]`; dk and dv, float32 `[B S K, H]`.

    Args:
      num_blocks: Of all rows and kv heads.
    """
    state = {
        "dq": jnp.zeros(inputs.q.shape, jnp.int32),
        "dk": jnp.zeros(inputs.k.shape, jnp.float32),
        "dv": jnp.zeros(inputs.k.shape, jnp.float32),
        "counters": jnp.zeros((num_blocks,), jnp.int32),
    }
    state = _call(_Gradients, inputs, config, [], state)
    return state["dq"], state["dk"], state["dv"]


def _call(role: type, inputs: Inputs, config: Config, out_type: list, state: dict[str, jax.Array]) -> dict[str, Any]:
    """Runs a kernel; `state` is what it adds to, as it is after, with "result", a list of what it writes."""
    H = inputs.q.shape[1]
    num_blocks = min(config.num_cores, len(inputs.items))
    refs = {name: jax.new_ref(x) for name, x in state.items()}
    leaves, tree = jax.tree.flatten((inputs, refs))

    def body(*refs):
        refs = iter(refs)
        inputs, state = jax.tree.unflatten(tree, itertools.islice(refs, tree.num_leaves))
        results = list(itertools.islice(refs, len(out_type)))
        role(config, num_blocks, inputs, state, results, jax.tree.unflatten(shared_tree, refs)).run()

    def smem(*shape):
        return plgpu.SMEM(shape, inputs.q.dtype, transforms=TRANSFORMS)

    def numbers(dtype):
        return plgpu.SMEM((_SLOTS, ROWS), dtype)

    stage_width = role.stage_width(H)
    stage_shape = config.num_consumers, ROWS, stage_width + scattered_rows.STAGE_PADDING
    scratch, shared_tree = jax.tree.flatten(
        _Shared(
            k=smem(1, BLOCK, H),
            v=smem(1, BLOCK, H),
            q=smem(_SLOTS, ROWS, H),
            dout=smem(_SLOTS, ROWS, H) if inputs.dout is not None else None,
            place=numbers(jnp.int32),
            lse=numbers(jnp.float32),
            delta=numbers(jnp.float32),
            unit=numbers(jnp.float32),
            ds=smem(config.num_consumers, BLOCK, ROWS) if inputs.dout is not None else None,
            stage=plgpu.SMEM(stage_shape, jnp.int32) if stage_width else None,
            kv_full=plgpu.Barrier(num_arrivals=1),
        )
    )
    result = plgpu.kernel(
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
    return {"result": result, **{name: jax.freeze(ref) for name, ref in refs.items()}}


class _Block:
    """What one block of threads does in each of the kernels."""

    def __init__(self, config: Config, num_blocks: int, inputs: Inputs, state: dict, results: list, shared: _Shared):
        self.config, self.inputs, self.state, self.results, self.shared = config, inputs, state, results, shared
        self.num_blocks = num_blocks
        self.head_dim = inputs.q.shape[1]
        self.dtype = inputs.q.dtype
        self.warpgroup = lax.axis_index("warpgroup")
        self.interpret, self.num_consumers = config.interpret, config.num_consumers
        # Named barriers.
        self.full, self.free = NAMED_BARRIERS[0], NAMED_BARRIERS[_SLOTS]
        self.kv_free, own = NAMED_BARRIERS[2 * _SLOTS : 2 * _SLOTS + 2]
        self.own = own + self.warpgroup
        self.two, self.everyone = 2 * WARPGROUP, (self.num_consumers + 1) * WARPGROUP

    @staticmethod
    def stage_width(head_dim: int) -> int:
        """Columns that are added at a time; 0 where nothing is."""
        raise NotImplementedError

    def consume_tile(self, item: _Item, tile, slot, state):
        """One tile of queries, `tile` counted over all lists; returns the state of the item after it."""
        raise NotImplementedError

    def begin_item(self):
        """The state of an item before its first tile."""
        return ()

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

    def for_each_item(self, body):
        """count = body(item, count) for each item of this block that has tiles; count is of tiles before it."""
        block = lax.axis_index("block")
        num_items = len(self.inputs.items)

        def one_round(i, count):
            number = jnp.minimum(i * self.num_blocks + block, num_items - 1)
            item = _Item(*(self.inputs.items[number, field] for field in range(len(ITEM_FIELDS))))
            there = (i * self.num_blocks + block < num_items) & (item.num_tiles > 0)

            def run_item(count):
                body(item, count)
                return count + item.num_tiles

            return lax.cond(there, run_item, lambda count: count, count)

        lax.fori_loop(0, -(-num_items // self.num_blocks), one_round, jnp.int32(0))

    # The producer.

    def produce(self) -> None:
        def one_item(item: _Item, count):
            sync(self.kv_free, self.everyone)
            self.gather([(self.inputs.k, self.shared.k), (self.inputs.v, self.shared.v)], [], self.keys_of(item), 0)

            def one_tile(i, _):
                slot = lax.rem(count + i, _SLOTS)
                sync(self.free + slot, self.two)
                self.gather_queries(item.first_tile + i, slot)
                pl.when(i == 0)(self.announce_keys)
                pl.when(i >= _LAG)(lambda: self.announce(count + i - _LAG, _LAG))
                return 0

            lax.fori_loop(0, item.num_tiles, one_tile, 0)
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

    def gather_queries(self, tile, slot) -> None:
        inputs, shared = self.inputs, self.shared
        matrices = [(inputs.q, shared.q)]
        numbers = [scattered_rows.Numbers(inputs.place, shared.place, -1)]
        if inputs.lse is not None:
            numbers.append(scattered_rows.Numbers(inputs.lse, shared.lse, _INFINITY))
        if inputs.dout is not None:
            matrices.append((inputs.dout, shared.dout))
            numbers += [
                scattered_rows.Numbers(inputs.delta, shared.delta, 0),
                scattered_rows.Numbers(inputs.unit, shared.unit, 0),
            ]
        self.gather(matrices, numbers, scattered_rows.Listed(inputs.rows, tile), slot)

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
        if not self.interpret:
            scattered_rows.finish()

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

    def logits(self, slot) -> jax.Array:
        """S of 64 queries and keys, times scale log2(e)."""
        shared = self.shared
        if not self.interpret:
            s = wgmma_chosen.logits(shared.q, shared.k, slot=slot)
        else:
            s = wgmma_chosen.product(shared.q[slot], shared.k[0].T)
        return s * (self.config.scale * _LOG2_E)

    def add(self, x, factors, target, rows, column: int) -> None:
        """target[rows, column:] += factors x."""
        if not self.interpret:
            where = {"part": self.warpgroup, "column": column, "barrier": self.own}
            scattered_rows.add(x, factors, self.shared.stage, target, rows, **where)
        else:
            scattered_rows.interpret_add(x, factors, target, rows, column)


class _PartialLse(_Block):
    stage_width = staticmethod(lambda head_dim: 0)

    def consume_tile(self, item, tile, slot, state):
        s = self.logits(slot)
        place = plgpu.load(self.shared.place.at[slot], layout=ROW, optimized=False)
        self.give_back(slot)
        keys = indices(item.start, BLOCK, COLUMN)
        s = jnp.where(columns(keys, s.shape) <= rows(place, s.shape), s, -jnp.inf)
        greatest = jnp.max(s, axis=1)
        shift = jnp.where(greatest == -jnp.inf, 0.0, greatest)
        total = jnp.sum(jnp.exp2(s - rows(shift, s.shape)), axis=1)
        lse = jnp.where(total == 0, -jnp.inf, shift + jnp.log2(total))
        self.results[0].at[tile][...] = lse
        return state


class _WeightedSum(_Block):
    stage_width = staticmethod(lambda head_dim: head_dim)

    def consume_tile(self, item, tile, slot, state):
        shared = self.shared
        s = self.logits(slot)
        place, lse = (plgpu.load(x.at[slot], layout=ROW, optimized=False) for x in (shared.place, shared.lse))
        self.give_back(slot)
        keys = indices(item.start, BLOCK, COLUMN)
        p = jnp.exp2(s - rows(lse, s.shape))
        p = jnp.where(columns(keys, s.shape) <= rows(place, s.shape), p, 0.0).astype(self.dtype)
        out = wgmma_chosen.product(p, shared.v[0]) if self.interpret else wgmma_chosen.weighted(p, shared.v)
        unit = self.inputs.unit[item.batch * self.config.kv_shape[2] + item.head]
        self.add(out * unit, None, self.state["out"], scattered_rows.Listed(self.inputs.rows, tile), 0)
        return state


class _Gradients(_Block):
    stage_width = staticmethod(lambda head_dim: ROWS)

    def begin_item(self):
        nothing = plgpu.layout_cast(jnp.zeros((BLOCK, self.head_dim), jnp.float32), MATRIX)
        return nothing, nothing

    def consume_tile(self, item, tile, slot, state):
        dk, dv = state
        shared, shape = self.shared, (BLOCK, ROWS)
        s, dp = self.scores(slot)
        place, lse, delta = (
            plgpu.load(x.at[slot], layout=COLUMN, optimized=False) for x in (shared.place, shared.lse, shared.delta)
        )
        unit = plgpu.load(shared.unit.at[slot], layout=ROW, optimized=False)
        p = jnp.exp2(s * (self.config.scale * _LOG2_E) - columns(lse, shape))
        dp, p = (dp, p) if self.interpret else wgmma_backward.settle(dp, p)
        p = jnp.where(rows(indices(item.start, BLOCK, ROW), shape) <= columns(place, shape), p, 0.0)
        ds = (p * (dp - columns(delta, shape))).astype(self.dtype)
        p = p.astype(self.dtype)
        shared.ds.at[self.warpgroup][...] = ds
        self.share_ds()
        updates = [(dv, p, shared.dout), (dk, ds, shared.q)]
        for i, (acc, weights, of_queries) in enumerate(updates):
            if self.head_dim > i * ROWS:
                updates[i], dq = self.update(acc, weights, of_queries, slot, i * ROWS)
                if i == 1:
                    self.give_back(slot)
                self.add(dq, unit, self.state["dq"], scattered_rows.Listed(self.inputs.rows, tile), i * ROWS)
            else:
                updates[i] = self.update(acc, weights, of_queries, slot, 0)[0]
                self.give_back(slot)
        return updates[1], updates[0]

    def scores(self, slot):
        shared = self.shared
        if self.interpret:
            return tuple(
                wgmma_chosen.product(x[0], y[slot].T) for x, y in ((shared.k, shared.q), (shared.v, shared.dout))
            )
        return wgmma_backward.scores(shared.k, shared.v, shared.q, shared.dout, warpgroup=0, slot=slot)

    def share_ds(self) -> None:
        """Before what this warpgroup has written is read by its matmuls."""
        if self.interpret:
            plgpu.commit_smem()
        else:
            fence_smem()
            sync(self.own, WARPGROUP)

    def update(self, acc, weights, of_queries, slot, column: int):
        """acc + weights of_queries[slot], and 64 columns of dq."""
        shared = self.shared
        if not self.interpret:
            where = {"slot": slot, "warpgroup": self.warpgroup, "column": column}
            return wgmma_chosen.accumulate_and_dq(acc, weights, of_queries, shared.ds, shared.k, **where)
        ds = shared.ds[self.warpgroup]
        dq = wgmma_chosen.product(ds.T, shared.k[0])[:, column : column + ROWS]
        return acc + wgmma_chosen.product(weights, of_queries[slot]), dq

    def end_item(self, item, state) -> None:
        """Adds to dk and dv, one after the other of those that add to the same block's."""
        dk, dv = state
        counters, turn = self.state["counters"], item.turn * self.num_consumers + self.warpgroup
        if not self.interpret:
            scattered_rows.finish()
            take_turn(counters, item.block, turn, -1)
        for x, target in ((dk * self.config.scale, self.state["dk"]), (dv, self.state["dv"])):
            for column in range(0, self.head_dim, ROWS):
                self.add(x[:, column : column + ROWS], None, target, self.keys_of(item), column)
        if not self.interpret:
            end_turn(counters, item.block)

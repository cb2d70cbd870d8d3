"""What Mosaic GPU kernels share: the machine, named barriers, and how a persistent grid deals out its work."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.dispatch import current_platform

WARPGROUP = 128
"""Threads of a warpgroup."""

NAMED_BARRIERS = range(5, 16)
"""Of a block's 16 named barriers the compiler takes the first five: one for all threads, one a warpgroup."""

L2_BYTES = 32 * 2**20
"""Of a Hopper's 50 MB of second-level cache, what keys and values that are read over and over may fill."""


def arrive(barrier, num_threads: int) -> None:
    """Arrives at a named barrier without waiting: PTX `bar.arrive`.

    Cheaper than an mbarrier in shared memory, but it holds one phase: who arrives again must know that the last phase
    is over.

    Args:
      barrier: One of NAMED_BARRIERS; may be traced.
      num_threads: Threads that take part, those that wait included.
    """
    _named_barrier("arrive", barrier, num_threads)


def sync(barrier, num_threads: int) -> None:
    """Waits at a named barrier until all of its threads have arrived: PTX `bar.sync`."""
    _named_barrier("sync", barrier, num_threads)


def _named_barrier(operation: str, barrier, num_threads: int) -> None:
    # JAX's GPU interpreter knows a function of this name, and reads `operation` and `num_threads` from its closure: a
    # lambda's, which nothing that wraps functions for type checks comes between.
    bar_op = lambda _, index: _bar(operation, num_threads, index)  # noqa: E731
    bar_op.__qualname__ = "bar_op"
    plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))(bar_op)(jnp.asarray(barrier, jnp.int32))


def _bar(operation: str, num_threads: int, index) -> None:
    void = ir.Type.parse("!llvm.void")
    text = f"bar.{operation} $0, {num_threads};"
    llvm.inline_asm(void, [index.registers.item()], text, "r", has_side_effects=True)


def take_turn(counters, index, turn, last, *, by_copies: bool) -> None:
    """Waits until `counters[index]`, int32 in device memory, is `turn`; before, ends the turn taken last.

    A turn ends when what this warpgroup has started since, to add to device memory, is done, and adds 1 to its counter.
    Both waits are under way at the same time, and the turn ends first, so that nobody waits for each other.

    Args:
      last: Index of the counter of the turn taken last; negative if none was.
      by_copies: Whether all that is done in a turn are reductions by TMA. Those are done, in the second-level cache,
        when the wait for them is over, and others are started behind the wait for their turn: no fence has to order
        anything else, and one would take the time of a round trip, and empty the first-level cache, on the way of every
        turn to the next. What threads themselves add has to be fenced.
    """
    acquire, fence = ("relaxed", "") if by_copies else ("acquire", "fence.proxy.async;")
    _on_counters(
        f"""
        ld.{acquire}.gpu.global.b32 seen, [at];
        {_end_of_turn(by_copies)}
        AGAIN:
        setp.eq.b32 ready, seen, $2;
        @ready bra READY;
        ld.{acquire}.gpu.global.b32 seen, [at];
        bra AGAIN;
        READY:
        {fence}
        """,
        counters,
        index,
        turn,
        last,
    )


def end_turn(counters, last, *, by_copies: bool) -> None:
    """Ends the turn taken last, as `take_turn` does."""
    _on_counters(_end_of_turn(by_copies), counters, 0, 0, last)


def _end_of_turn(by_copies: bool) -> str:
    return f"""
        cp.async.bulk.wait_group 0;
        bar.warp.sync 0xffffffff;
        @ends red.{"relaxed" if by_copies else "release"}.gpu.global.add.s32 [at_last], 1;
        """


def _on_counters(lines: str, counters, index, turn, last) -> None:
    """PTX in which `at` and `at_last` are addresses of counters, `$2` is the turn, and `ends` holds in one thread."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(plgpu.Layout.WG_SPLAT,) * 3))
    def emit(_, counters, *scalars):
        i64 = ir.IntegerType.get_signless(64)
        base = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(counters))
        index, turn, last = (x.registers.item() for x in scalars)
        text = f"""{{
        .reg .b64 at, at_last;
        .reg .b32 seen, thread;
        .reg .pred ends, ready;
        mad.wide.s32 at, $1, 4, $0;
        mad.wide.s32 at_last, $3, 4, $0;
        mov.u32 thread, %tid.x;
        and.b32 thread, thread, {WARPGROUP - 1};
        setp.eq.b32 ends, thread, 0;
        setp.ge.and.s32 ends, $3, 0, ends;
        {lines}
        }}"""
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [base, index, turn, last], text, "l,r,r,r,~{memory}", has_side_effects=True)

    emit(counters, *(jnp.asarray(x, jnp.int32) for x in (index, turn, last)))


def take_number(counter, cell) -> None:
    """cell[0] = counter[0] and counter[0] += 1, in one go; both int32 `[1]` in device memory.

    One thread writes the cell, so a barrier of the warpgroup must come before it is read.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def emit(_, counter, cell):
        i64 = ir.IntegerType.get_signless(64)
        at, to = (llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref)) for ref in (counter, cell))
        text = f"""{{
        .reg .b32 number, thread;
        .reg .pred takes;
        mov.u32 thread, %tid.x;
        and.b32 thread, thread, {WARPGROUP - 1};
        setp.eq.b32 takes, thread, 0;
        @takes atom.relaxed.gpu.global.add.s32 number, [$0], 1;
        @takes st.global.s32 [$1], number;
        }}"""
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [at, to], text, "l,l,~{memory}", has_side_effects=True)

    emit(counter, cell)


def bring_near(*refs, offsets: Sequence[int] = (0,)) -> None:
    """Reads vectors in device memory, of 128 elements of 32 bits, so that the first-level cache holds them after: of
    each reference those that are so many elements from its first.

    Hopper does nothing for PTX's `prefetch.global.L1`. A read whose result nobody wants would be left out, so a thread
    that finds one certain number sleeps for a nanosecond.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    def emit(_, *refs):
        i64 = ir.IntegerType.get_signless(64)
        starts = [llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref)) for ref in refs]
        number = len(offsets)
        reads = "\n".join(
            f"mad.wide.u32 at, thread, 4, ${i};\n"
            + "\n".join(f"ld.global.b32 found{number * i + j}, [at + {4 * x}];" for j, x in enumerate(offsets))
            for i in range(len(starts))
        )
        uses = "\n".join(
            f"setp.eq.s32 sleeps, found{i}, 0x80000001; @sleeps nanosleep.u32 1;" for i in range(len(starts) * number)
        )
        text = f"""{{
        .reg .b32 thread, found<{len(starts) * number}>;
        .reg .b64 at;
        .reg .pred sleeps;
        mov.u32 thread, %tid.x;
        and.b32 thread, thread, {WARPGROUP - 1};
        {reads}
        {uses}
        }}"""
        constraints = ",".join("l" for _ in starts)
        llvm.inline_asm(ir.Type.parse("!llvm.void"), starts, text, constraints, has_side_effects=True)

    emit(*refs)


def fence_smem() -> None:
    """Makes what this thread has written to shared memory visible to copies and matmuls, whose start must be behind a
    barrier; `plgpu.commit_smem` is the same with a barrier of the warpgroup."""

    @plgpu.inline_mgpu()
    def emit(_):
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"), [], "fence.proxy.async.shared::cta;", "~{memory}", has_side_effects=True
        )

    emit()


def do_not_unroll() -> None:
    """At the head of a loop's body: keeps ptxas from unrolling the loop, which takes registers."""

    @plgpu.inline_mgpu()
    def emit(_):
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], '.pragma "nounroll";', "", has_side_effects=True)

    emit()


def interpreter(*, detect_races: bool = False) -> plgpu.InterpretGPUParams:
    """JAX's interpreter of GPU kernels on a CPU, told to model named barriers; it prints the races that it finds."""
    return plgpu.InterpretGPUParams(inline_mgpu="_hack_model_inline_mgpu_tokamax", detect_races=detect_races)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deal:
    """How a persistent grid, one block a multiprocessor, shares out (pair, rank) items, longest first.

    Pairs (a batch row and a head) are taken in sections, so that what those at work read again and again stays in the
    second-level cache. A section's items go out rank by rank, the pairs of a rank side by side, in rounds of one item a
    block: to the blocks in order, then in reverse, and so on, which evens out what each is given of a list that only
    falls. A section starts on a new round, and each with another block, since its last round may not go round.

    Attributes:
      num_blocks: Blocks of the grid.
      num_pairs: Pairs in all.
      num_ranks: Items of a pair.
      section: Pairs of a section; the last one may have fewer.
    """

    num_blocks: int
    num_pairs: int
    num_ranks: int
    section: int

    @classmethod
    def of(cls, *, num_pairs: int, num_ranks: int, pair_bytes: int, group: int, num_cores: int) -> "Deal":
        """A deal whose sections fill the second-level cache, or at least give every block an item.

        Args:
          pair_bytes: What the items of a pair read over and over.
          group: Neighbouring pairs that read the same, and so count once.
          num_cores: Multiprocessors.
        """
        num_blocks = min(num_cores, num_pairs * num_ranks)
        fit = max(1, L2_BYTES // pair_bytes) * group
        at_least = math.ceil(num_blocks / num_ranks / group) * group
        return cls(
            num_blocks=num_blocks,
            num_pairs=num_pairs,
            num_ranks=num_ranks,
            section=min(num_pairs, max(fit, at_least)),
        )

    @property
    def rounds_of_section(self) -> int:
        return -(-self.section * self.num_ranks // self.num_blocks)

    @property
    def num_rounds(self) -> int:
        return -(-self.num_pairs // self.section) * self.rounds_of_section

    @property
    def num_items(self) -> int:
        return self.num_pairs * self.num_ranks

    def item_in_line(self, number) -> tuple[Any, Any, Any]:
        """As `item`, of items that go out one by one to whoever asks next: by sections too, rank by rank in each."""
        div, rem, minimum, _ = _integer_arithmetic(number)
        is_item = number < self.num_items
        number = minimum(number, self.num_items - 1)
        section = div(number, self.section * self.num_ranks)
        number = number - section * (self.section * self.num_ranks)
        width = minimum(self.section, self.num_pairs - section * self.section)
        return is_item, section * self.section + rem(number, width), div(number, width)

    def item(self, block, turn) -> tuple[Any, Any, Any]:
        """What `block` does in round `turn`: whether anything, the pair and the rank; int32, NumPy's if those are."""
        div, rem, minimum, where = _integer_arithmetic(turn)
        section = div(turn, self.rounds_of_section)
        spare = self.rounds_of_section * self.num_blocks - self.section * self.num_ranks
        block = rem(block + section * spare, self.num_blocks)
        place = where(rem(turn, 2) == 0, block, self.num_blocks - 1 - block)
        number = rem(turn, self.rounds_of_section) * self.num_blocks + place
        width = minimum(self.section, self.num_pairs - section * self.section)
        is_item = number < width * self.num_ranks
        number = where(is_item, number, 0)
        return is_item, section * self.section + rem(number, width), div(number, width)


def _integer_arithmetic(x) -> tuple[Callable, ...]:
    """Division, remainder, minimum and choice, NumPy's for its arrays, else such as a kernel can do."""
    if isinstance(x, np.ndarray):
        return np.floor_divide, np.remainder, np.minimum, np.where
    return lax.div, lax.rem, jnp.minimum, jnp.where


def refuse(reason: str) -> NoReturn:
    """Raises NotImplementedError: what an implementation of that name does not serve."""
    raise NotImplementedError(f"mosaic_gpu: {reason}")


def store_registers(ref, value) -> None:
    """ref[...] = value, in device memory, each thread what it has, also where that is not whole sectors of 32 bytes."""
    if hasattr(plgpu, "store"):  # JAX 0.12 wants to be told, JAX 0.11 has no way to
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def hopper_cores(interpret: Any = None, *, interpreted: int = 1) -> int:
    """Multiprocessors of the Hopper GPU that a program is being traced for, or so many where it is interpreted.

    Raises: NotImplementedError where it is for something else.
    """
    num_cores = num_hopper_cores() if interpret is None else interpreted
    if num_cores is None:
        refuse("it needs an NVIDIA Hopper GPU (H100, H200)")
    return num_cores


def num_hopper_cores() -> int | None:
    """Multiprocessors of the Hopper GPU that a program is being traced for; None where it is for something else."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        is_hopper = current_platform() == "gpu" and any(name in device.device_kind for name in _HOPPERS)
        return device.num_cores if is_hopper else None
    if current_platform() != "gpu":
        return None
    device = jax.local_devices()[0]
    return device.core_count if getattr(device, "compute_capability", None) == "9.0" else None


_HOPPERS = ("H100", "H200", "H800", "H20", "GH200")

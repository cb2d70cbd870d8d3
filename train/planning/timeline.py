"""Runs a compiled program on paper: when each instruction would run, and which collectives the compute hides.

Instructions run one after the other in the order of the schedule, each for as long as its matmuls take at the device's
matmul speed or its bytes at the memory's, whichever is longer. A collective runs beside them from its start to its
done, and after the collectives that were started before it; what is still missing at its done is waited for: that part
is exposed. A synchronous collective is exposed as a whole.

Attention over a schedule of blocks is a loop whose length only the data knows. Its calls are recognised by the scope
that `pallas_kernels.dispatch` gives them, and cost what the caller says, hop by hop of the ring: a hop without work
hides nothing. Where a loop runs over hops, its times are the mean over them. Linear attention makes several kernels or
loops of a call, one for each time that it reads the row, which share its cost.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from longctx.context_parallel.api import HOP_SCOPE
from pallas_kernels.dispatch import IMPLEMENTATIONS
from train.devices import DeviceSpec
from train.planning.hlo import Computation, Instruction, Module, Shape
from train.planning.host_copies import HostCopy, host_copy
from train.planning.links import Links, groups_of, is_collective, kind_of, sent_by_kernel
from train.planning.op_names import is_telling, layer_of, merged, part_of, phase_of, readable
from train.planning.work import Work, is_kernel

HOST_COPY = "host-copy"
"""What copies between a device and its host count as, among collectives."""
HIDDEN_SHARE = 0.05  # a collective counts as hidden if at most this part of its time is waited for

_OP = re.compile(rf"(\w+)_(forward|backward|states|state_cotangents)\.({'|'.join(IMPLEMENTATIONS)})\b")
_KERNELS = ("mosaic_gpu", "mosaic_tpu", "cudnn")

_LINEAR_ATTENTION = "linear_attention"
# The backward pass is three sweeps (pallas_kernels.linear.sweeps). The maps of runs take a pass that writes states as
# the forward sweep does, and reads none. Where a row is swept in parts, the pass before them counts as one more sweep.
_SHARE_OF_KERNEL = {
    "forward": ("forward", 1.0),
    "backward": ("backward", 1 / 3),
    "states": ("forward", 0.5),
    "state_cotangents": ("forward", 0.5),
}
"""By phase of linear attention: which call's cost a kernel or loop of it takes a part of, and which part."""

# On TPU the backward pass of softmax attention is two kernels, of three matmuls a tile and of four.
_SHARE_OF_TPU_KERNEL = {"blockwise_attention_backward_dq": 3 / 7, "blockwise_attention_backward_dkdv": 4 / 7}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """Executions of one collective instruction in a step.

    Attributes:
      kind: One of links.KINDS, `remote-dma` for what a kernel sends itself, or `host-copy`.
      name: Where it comes from.
      part: The part of the model that it belongs to.
      phase: "forward", "recompute", "backward" or "update".
      is_hop: Whether a context-parallel strategy sends it for a layer.
      asynchronous: Whether compute may run beside it.
      count: Executions in a step.
      num_bytes: What one device sends in one execution.
      seconds: Of one execution on its links, mean.
      overlapped: Seconds of compute between its start and its done, mean.
      exposed: Seconds of one execution that are waited for, mean.
      links: The links that it takes.
      group_size: Devices that take part together.
    """

    kind: str
    name: str
    part: str
    phase: str
    is_hop: bool
    asynchronous: bool
    count: int
    num_bytes: int
    seconds: float
    overlapped: float
    exposed: float
    links: str
    group_size: int

    @property
    def is_exposed(self) -> bool:
        return self.exposed > HIDDEN_SHARE * self.seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """A step on paper.

    Attributes:
      seconds: Of the step.
      compute: Seconds by (part, phase).
      flops: FLOPs by (part, phase), of one device.
      collectives: All of the step.
      notes: What could not be known.
    """

    seconds: float
    compute: Mapping[tuple[str, str], float]
    flops: Mapping[tuple[str, str], float]
    collectives: Sequence[Collective]
    notes: Sequence[str] = ()

    @property
    def exposed(self) -> float:
        """Seconds that the step waits for collectives."""
        return sum(c.exposed * c.count for c in self.collectives)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpCall:
    """One call of an attention op on one device.

    Attributes:
      seconds: By call that a layer makes, of the device with most work in it; `[calls]`: one a hop of a ring.
      flops: By call, mean over devices; `[calls]`.
    """

    seconds: np.ndarray
    flops: np.ndarray


def run(
    module: Module, spec: DeviceSpec, links: Links, num_devices: int, calls: Mapping[tuple[str, str], OpCall]
) -> Timeline:
    """Runs a program on paper.

    Args:
      module: The program of one device.
      spec: Its speeds; must have `spec.has_speeds`.
      links: Of the mesh.
      num_devices: Of the mesh.
      calls: Calls of attention ops by (mixer's name, "forward" or "backward").
    """
    runner = _Runner(module, spec, links, num_devices, calls)
    result = runner.computation(module.entry.name)
    return Timeline(
        seconds=result.seconds,
        compute=dict(result.compute),
        flops=dict(result.flops),
        collectives=result.collectives,
        notes=tuple(dict.fromkeys(runner.notes)),
    )


@dataclasses.dataclass
class _Result:
    """Of one execution of a computation."""

    clock: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1))
    compute: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    flops: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    collectives: list[Collective] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        return float(np.mean(self.clock))

    def add(self, other: "_Result", times: int) -> None:
        """Adds executions of a called computation, which take their mean each."""
        clock, took = _comparable(self.clock, other.clock if times == 1 else np.full(1, times * other.seconds))
        self.clock = clock + took
        for key, value in other.compute.items():
            self.compute[key] += times * value
        for key, value in other.flops.items():
            self.flops[key] += times * value
        self.collectives += [dataclasses.replace(c, count=times * c.count) for c in other.collectives]

    def work(self, key: tuple[str, str], seconds, flops) -> None:
        clock, took = _comparable(self.clock, np.atleast_1d(seconds))
        self.clock = clock + took
        self.compute[key] += float(np.mean(seconds))
        self.flops[key] += float(np.mean(flops))


@dataclasses.dataclass
class _InFlight:
    instruction: Instruction
    started: np.ndarray
    finished: np.ndarray
    draft: Collective


class _Runner:
    def __init__(self, module, spec, links, num_devices, calls):
        self._module, self._spec, self._links, self._num_devices = module, spec, links, num_devices
        self._calls = calls
        self._work = Work(module)
        self._results: dict[str, _Result] = {}
        self.notes: list[str] = []

    def computation(self, name: str) -> _Result:
        if name not in self._results:
            self._results[name] = self._run(self._module.computations[name])
        return self._results[name]

    def _run(self, computation: Computation) -> _Result:
        result, in_flight = _Result(), {}
        fused = self._fused_collectives(computation)
        links_free = np.zeros(1)
        host_free = {True: np.zeros(1), False: np.zeros(1)}  # the link to the host takes both directions at once
        for instruction in computation.instructions:
            kind = kind_of(instruction)
            begins = kind is not None and kind[1] == "start"
            begins |= instruction.opcode == "async-start" and self._wrapped(instruction) is not None
            if instruction.name in fused.starts:
                for collective in fused.starts[instruction.name]:
                    links_free = self._start(collective, collective.name, result, in_flight, links_free)
            copied = host_copy(instruction, computation)
            if copied is not None:
                host_free[copied.to_host] = self._copy(
                    instruction, copied, result, in_flight, host_free[copied.to_host]
                )
            elif begins:
                collective = self._wrapped(instruction) or instruction
                links_free = self._start(collective, instruction.name, result, in_flight, links_free)
            elif instruction.opcode.endswith("-done") and instruction.operands[0] in in_flight:
                self._finish(in_flight.pop(instruction.operands[0]), result)
            elif kind is not None and kind[1] == "":
                self._synchronous(instruction, result)
            else:
                self._instruction(instruction, computation, result)
            for name in fused.ends.get(instruction.name, ()):
                self._finish(in_flight.pop(name), result)
        for open_collective in in_flight.values():  # ends in a later iteration; waited for here at the latest
            self._finish(open_collective, result)
        return result

    # --- compute ---

    def _instruction(self, instruction: Instruction, computation: Computation, result: _Result) -> None:
        called, subject = instruction.called, self._subject(instruction)
        if self._is_op_call(subject):
            self._op_call(subject, result)
        elif instruction.opcode == "while":
            times = self._module.trip_count(instruction, computation)
            if times is None:
                self.notes.append(f"a loop of unknown length counts once: {readable(instruction.op_name)}")
            result.add(self.computation(called["body"][0]), 1 if times is None else times)
        elif instruction.opcode == "conditional":
            branches = [self.computation(name) for name in called["branches"]]
            result.add(max(branches, key=lambda branch: branch.seconds), 1)
        elif instruction.opcode in ("call", "async-start") and called:
            result.add(self.computation(next(iter(called.values()))[0]), 1)
        else:
            flops = self._work.flops(instruction, computation)
            num_bytes = self._work.main_memory_bytes(instruction, computation)
            seconds = max(flops / self._spec.matmul_flops, num_bytes / (self._spec.memory_gb_per_s * 1e9))
            if seconds:
                result.work((part_of(subject.op_name), phase_of(subject.op_name)), seconds, flops)

    def _subject(self, instruction: Instruction) -> Instruction:
        """The kernel or matmul that a fusion without a name is made around: on GPUs XLA fuses slices of operands."""
        if instruction.opcode != "fusion" or instruction.op_name:
            return instruction
        fused = self._module.computations[instruction.called["calls"][0]].instructions
        return next((i for i in fused if i.opcode == "custom-call" and i.op_name), instruction)

    def _is_op_call(self, instruction: Instruction) -> bool:
        found = _OP.search(instruction.op_name)
        if not found:
            return False
        # XLA also names a loop, such as a ring, after a kernel in its body; an op that is a kernel has no loops itself.
        if instruction.opcode == "while" and found[3] not in _KERNELS:
            return self._work.has_matmul(instruction.called["body"][0])
        return is_kernel(instruction)

    def _op_call(self, instruction: Instruction, result: _Result) -> None:
        op, phase, _ = _OP.search(instruction.op_name).groups()
        layer = layer_of(instruction.op_name) or ""
        share = next((share for name, share in _SHARE_OF_TPU_KERNEL.items() if name in instruction.op_name), 1.0)
        if op == _LINEAR_ATTENTION:
            phase, share = _SHARE_OF_KERNEL[phase]
        call = self._calls.get((layer, phase))
        if call is None:
            self.notes.append(f"an attention op of unknown cost counts nothing: {readable(instruction.op_name)}")
            return
        key = f"{layer} attention", phase_of(instruction.op_name)
        sent = self._sent_by(instruction, layer)
        started = result.clock
        result.work(key, share * call.seconds, share * call.flops)
        if sent is not None:
            self._finish(_InFlight(instruction, started, started + sent.seconds, sent), result)

    def _sent_by(self, kernel: Instruction, layer: str) -> Collective | None:
        """What a kernel sends itself, from its start to its end."""
        sends = sent_by_kernel(kernel.attributes)
        if sends is None:
            return None
        num_bytes, pairs = sends
        seconds, links = self._links.seconds("collective-permute", num_bytes, pairs)
        return Collective(
            kind="remote-dma",
            name=readable(kernel.op_name),
            part=f"{layer} mixer",
            phase=phase_of(kernel.op_name),
            is_hop=True,
            asynchronous=True,
            count=1,
            num_bytes=num_bytes,
            seconds=seconds,
            overlapped=0.0,
            exposed=seconds,
            links=links,
            group_size=2,
        )

    def _copy(self, instruction: Instruction, copied: HostCopy, result: _Result, in_flight, free) -> np.ndarray:
        """Starts a copy to or from the host, or makes it; when the link is free again."""
        if self._spec.host_gb_per_s is None:
            self.notes.append("copies to and from the host take no time: the table of devices has no host_gb_per_s")
        seconds = copied.num_bytes / (1e9 * (self._spec.host_gb_per_s or math.inf))
        asynchronous = instruction.opcode.endswith("-start")
        phase = phase_of(instruction.op_name)
        if not instruction.op_name:  # what XLA moved from one iteration of a loop to another has no name
            phase = "forward" if copied.to_host else "backward"
        draft = Collective(
            kind=HOST_COPY,
            name=readable(instruction.op_name),
            part=part_of(instruction.op_name),
            phase=phase,
            is_hop=False,
            asynchronous=asynchronous,
            count=1,
            num_bytes=copied.num_bytes,
            seconds=seconds,
            overlapped=0.0,
            exposed=seconds,
            links="to the host" if copied.to_host else "from the host",
            group_size=1,
        )
        finished = np.maximum(*_comparable(result.clock, free)) + seconds
        in_flight[instruction.name] = _InFlight(instruction, result.clock, finished, draft)
        if not asynchronous:
            self._finish(in_flight.pop(instruction.name), result)
        return finished

    # --- collectives ---

    def _draft(self, instruction: Instruction) -> Collective:
        kind, _ = kind_of(instruction)
        groups = groups_of(instruction.attributes, self._num_devices)
        num_bytes = _bytes_sent(kind, instruction, max(map(len, groups)))
        seconds, links = self._links.seconds(kind, num_bytes, groups)
        return Collective(
            kind=kind,
            name=readable(instruction.op_name),
            part=part_of(instruction.op_name),
            phase=phase_of(instruction.op_name),
            is_hop=_is_hop(instruction.op_name),
            asynchronous=True,
            count=1,
            num_bytes=num_bytes,
            seconds=seconds,
            overlapped=0.0,
            exposed=seconds,
            links=links,
            group_size=max(map(len, groups)),
        )

    def _start(self, collective: Instruction, key: str, result: _Result, in_flight, links_free) -> np.ndarray:
        draft = self._draft(collective)
        finished = np.maximum(*_comparable(result.clock, links_free)) + draft.seconds
        in_flight[key] = _InFlight(collective, result.clock, finished, draft)
        return finished

    def _finish(self, flight: _InFlight, result: _Result) -> None:
        finished, clock = _comparable(flight.finished, result.clock)
        waited = np.maximum(0.0, finished - clock)
        overlapped = np.subtract(*_comparable(result.clock, flight.started))
        whole = dataclasses.replace(flight.draft, overlapped=float(np.mean(overlapped)), exposed=float(np.mean(waited)))
        result.collectives += _by_name(whole, flight.instruction)
        result.clock = clock + waited

    def _synchronous(self, instruction: Instruction, result: _Result) -> None:
        draft = dataclasses.replace(self._draft(instruction), asynchronous=False)
        result.clock = result.clock + draft.seconds
        result.collectives += _by_name(draft, instruction)

    def _wrapped(self, instruction: Instruction) -> Instruction | None:
        """The collective in the computation that an async-start calls."""
        if instruction.opcode != "async-start":
            return None
        return next((c for c in self._collectives_in(instruction)), None)

    def _collectives_in(self, instruction: Instruction) -> list[Instruction]:
        names = instruction.called.get("calls", ()) + instruction.called.get("called_computations", ())
        return [i for name in names for i in self._module.computations[name].instructions if is_collective(i)]

    def _fused_collectives(self, computation: Computation) -> "_Fused":
        """Collectives that a TPU runs in steps inside fusions: one channel, from its first fusion to its last."""
        first, last, starts, ends = {}, {}, collections.defaultdict(list), collections.defaultdict(list)
        for instruction in computation.instructions:
            if instruction.opcode == "fusion":
                for collective in self._collectives_in(instruction):
                    channel = re.search(r"channel_id=(\d+)", collective.attributes)
                    key = channel[1] if channel else collective.name
                    first.setdefault(key, (instruction.name, collective))
                    last[key] = instruction.name
        for key, (name, collective) in first.items():
            starts[name].append(collective)
            ends[last[key]].append(collective.name)
        return _Fused(starts, ends)


@dataclasses.dataclass(frozen=True)
class _Fused:
    """Collectives inside fusions by the fusion before which they start; their names by the one after which they end."""

    starts: Mapping[str, list[Instruction]]
    ends: Mapping[str, list[str]]


def _comparable(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times by hop of one ring; those of rings with other numbers of hops meet in their means."""
    if 1 < x.size != y.size > 1:
        return x.mean(keepdims=True), y.mean(keepdims=True)
    return x, y


def _is_hop(op_name: str) -> bool:
    return f"/{HOP_SCOPE}/" in op_name and not _OP.search(op_name)


def _by_name(whole: Collective, instruction: Instruction) -> list[Collective]:
    """A collective that XLA combined of several, as one for each part and phase; their times add up to its own.

    XLA combines what leaves at the same time, whatever it is of: hops of the recomputation with those of the backward
    pass, or with parameters. The name that it makes holds one for each array, in their order; where it holds fewer,
    nobody knows whose they are, and the collective stays whole.
    """
    names = merged(instruction.op_name)
    arrays = _arrays_sent(whole.kind, instruction) if is_collective(instruction) else ()
    if len(names) == 1 or len(names) != len(arrays):
        return [whole]
    shares = collections.Counter()
    for name, array in zip(names, arrays, strict=True):
        # A name that XLA made up tells nothing: its array goes by all names together.
        told = name if is_telling(name) else instruction.op_name
        shares[part_of(told), phase_of(told), _is_hop(name)] += array.data_bytes
    total = max(1, shares.total())
    return [
        dataclasses.replace(
            whole,
            part=part,
            phase=phase,
            is_hop=is_hop,
            num_bytes=whole.num_bytes * share // total,
            seconds=whole.seconds * share / total,
            exposed=whole.exposed * share / total,
        )
        for (part, phase, is_hop), share in shares.items()
    ]


def _bytes_sent(kind: str, instruction: Instruction, group_size: int) -> int:
    """What one device sends, were every byte sent once: operand or result, less the part that stays."""
    total = sum(shape.data_bytes for shape in _arrays_sent(kind, instruction))
    rest = group_size - 1
    match kind:
        case "collective-permute" | "collective-broadcast":
            return total
        case "all-gather":
            return total * rest // group_size
        case "reduce-scatter":
            return total * rest
        case "all-reduce":
            return 2 * total * rest // group_size
        case _:
            return total * rest // group_size


def _arrays_sent(kind: str, instruction: Instruction) -> Sequence[Shape]:
    """The arrays of its result, one for each operand."""
    shapes = instruction.shapes
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # (operands, results, ...): the operands come first, and a permute's may be followed by context.
        shapes = [s for s in shapes if s.dims or s.dtype not in ("u32", "s32")]
        half = len(shapes) // 2
        return shapes[half:] if len(shapes) > 1 else shapes
    if instruction.opcode.endswith("-start"):
        return shapes[: max(1, len(instruction.operands))]
    return shapes

"""Which arrays lie in a device's memory at each instruction of a compiled program, and when they are most.

XLA lets many instructions return memory of their operands, so an `Array` here is one with memory of its own, whatever
names it goes on under. In a scheduled program every copy that this needs is an instruction, so that memory which is
handed on holds a dead value.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping

from train.planning import hlo

Leaf = tuple[str, int]
"""One of a computation's arrays: the name of its instruction, its index among that one's shapes."""

_NO_MEMORY = {"parameter", "constant", "iota"}
NO_WORK = {"get-tuple-element", "tuple", "bitcast", "opt-barrier"}
"""Instructions that only rename arrays."""
_ALIASING = re.compile(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Array:
    """Array `index` of what `instruction` returns, in memory from time `start` to `end`.

    Instruction i of a computation runs at time 2i. The results of a conditional or a call start at 2i + 1: until then
    they are counted inside, where they are computed.
    """

    computation: hlo.Computation
    instruction: hlo.Instruction
    index: int
    start: int
    end: int

    @property
    def shape(self) -> hlo.Shape:
        return self.instruction.shapes[self.index]

    @property
    def last_use(self) -> hlo.Instruction | None:
        """None where the computation returns it."""
        instructions = self.computation.instructions
        return instructions[self.end // 2] if self.end < 2 * len(instructions) else None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Moment:
    """The run of one instruction, and the arrays in memory then, of all computations that are under way."""

    computation: hlo.Computation
    instruction: hlo.Instruction
    arrays: tuple[Array, ...]

    @functools.cached_property
    def num_bytes(self) -> int:
        return sum(array.shape.num_bytes for array in self.arrays)


class Liveness:
    """Live ranges of a module's arrays. Cost: linear in the program."""

    def __init__(self, module: hlo.Module):
        self._module = module
        self._owners: dict[str, dict[Leaf, Leaf]] = {}

    def fullest_moment(self) -> Moment:
        """When the most bytes lie in main memory, the program's arguments left out."""
        entry = self._module.entry
        donated = {}
        for output, number, index in _ALIASING.findall(self._module.header):
            parameter = entry.parameter(int(number))
            donated[_index(entry.root, output)] = (parameter.name, _index(parameter, index))
        return self._fullest_moment(entry, donated)

    def owners(self, computation: hlo.Computation) -> Mapping[Leaf, Leaf]:
        """For each array of a computation the one in whose memory it lies: itself or one before it."""
        if computation.name not in self._owners:
            owners: dict[Leaf, Leaf] = {}
            for instruction in computation.instructions:
                shared = self.shared(instruction, computation)
                for leaf in leaves(instruction):
                    owners[leaf] = owners[shared[leaf[1]]] if leaf[1] in shared else leaf
            self._owners[computation.name] = owners
        return self._owners[computation.name]

    def callees(
        self, instruction: hlo.Instruction, computation: hlo.Computation
    ) -> Iterator[tuple[hlo.Computation, dict[Leaf, Leaf]]]:
        """The computations that an instruction runs, with the caller's array for each array of their parameters."""
        operands = [computation.by_name[name] for name in instruction.operands]
        called = instruction.called
        match instruction.opcode:
            case "while":
                runs = [(called["body"][0], operands), (called["condition"][0], operands)]
            case "conditional":
                runs = [(name, [operand]) for name, operand in zip(called["branches"], operands[1:], strict=True)]
            case "call":
                runs = [(called["to_apply"][0], operands)]
            case _:
                runs = []
        for name, given in runs:
            callee = self._module.computations[name]
            parameters = [leaf for number in range(len(given)) for leaf in leaves(callee.parameter(number))]
            yield callee, dict(zip(parameters, itertools.chain(*map(leaves, given)), strict=True))

    def behind_names(self, computation: hlo.Computation, leaf: Leaf) -> Leaf:
        """The array that instructions which only rename arrays have this one from."""
        while (instruction := computation.by_name[leaf[0]]).opcode in NO_WORK:
            leaf = self.shared(instruction, computation)[leaf[1]]
        return leaf

    def shared(self, instruction: hlo.Instruction, computation: hlo.Computation) -> dict[int, Leaf]:
        """Those arrays of a result, by index, that lie in an operand's memory, and which of its arrays they are."""
        operands = [computation.by_name[name] for name in instruction.operands]
        given = [leaf for operand in operands for leaf in leaves(operand)]
        match instruction.opcode:
            case "tuple" | "bitcast" | "opt-barrier" | "while" | "copy-done":
                shared = given
            case "get-tuple-element":
                shared = given[sum(operands[0].elements[: instruction.tuple_index]) :]
            case "dynamic-update-slice":
                shared = given[:1]
            case "copy-start":
                return {1: given[0]}
            case "conditional" | "call":
                return self._handed_through(instruction, computation)
            case opcode if opcode.endswith("-done"):
                shared = given[num_operands_returned(operands[0], computation) :]
            case _:
                shared = given[: num_operands_returned(instruction, computation)]
        by_index = dict(zip(range(len(instruction.shapes)), shared, strict=False))
        return by_index | self._updated(instruction, computation) | _declared(instruction, operands)

    def _handed_through(self, instruction: hlo.Instruction, computation: hlo.Computation) -> dict[int, Leaf]:
        """The results of a conditional or a call that lie in memory which a callee was given."""
        shared = {}
        for callee, given in self.callees(instruction, computation):
            owners = self.owners(callee)
            for index, leaf in enumerate(leaves(callee.root)):
                if owners[leaf] in given:
                    shared.setdefault(index, given[owners[leaf]])
        return shared

    def _updated(self, instruction: hlo.Instruction, computation: hlo.Computation) -> dict[int, Leaf]:
        """The results of a fusion that are operands with a slice updated."""
        if instruction.opcode not in ("fusion", "fusion-start"):
            return {}
        fused = self._module.computations[instruction.called["calls"][0]]
        first = num_operands_returned(instruction, computation)
        return {first + index: (instruction.operands[number], 0) for index, number in _slice_updates(fused)}

    def _fullest_moment(self, computation: hlo.Computation, returned: Mapping[int, Leaf | None]) -> Moment:
        """The fullest moment of a computation, its parameters left out.

        Args:
          returned: arrays of its result, by index, that its caller wants in memory of its own: in that of a
            parameter's array, or None where the computation does not see what that memory holds.
        """
        arrays = self._arrays(computation, returned)
        instructions = computation.instructions
        changes = [0] * (2 * len(instructions) + 2)
        for array in arrays:
            changes[array.start] += array.shape.num_bytes
            changes[array.end + 1] -= array.shape.num_bytes
        totals = list(itertools.accumulate(changes[:-2]))
        insides = {}
        for position, instruction in enumerate(instructions):
            inside = self._inside(instruction, computation)
            if inside is not None:
                insides[2 * position] = inside
                totals[2 * position] += inside.num_bytes
        time = totals.index(max(totals))
        live = tuple(array for array in arrays if array.start <= time <= array.end)
        inside = insides.get(time)
        if inside is None:
            return Moment(computation=computation, instruction=instructions[time // 2], arrays=live)
        return dataclasses.replace(inside, arrays=live + inside.arrays)

    def _inside(self, instruction: hlo.Instruction, computation: hlo.Computation) -> Moment | None:
        """The fullest moment of the computations that an instruction runs."""
        owners = self.owners(computation)
        moments = []
        for callee, given in self.callees(instruction, computation):
            parameters = {owners[leaf]: parameter for parameter, leaf in given.items()}
            kept = {leaf[1]: parameters.get(owners[leaf]) for leaf in leaves(instruction) if owners[leaf] != leaf}
            moments.append(self._fullest_moment(callee, kept))
        return max(moments, key=lambda moment: moment.num_bytes, default=None)

    def _arrays(self, computation: hlo.Computation, returned: Mapping[int, Leaf | None]) -> list[Array]:
        """The arrays that take memory of the computation's own."""
        owners = self.owners(computation)
        starts, ends = {}, {}
        for position, instruction in enumerate(computation.instructions):
            for leaf in _read(instruction, computation):
                ends[owners[leaf]] = 2 * position
            start = 2 * position + (instruction.opcode in ("conditional", "call"))
            for leaf in leaves(instruction):
                if owners[leaf] == leaf:
                    starts[leaf] = ends[leaf] = start
        results = [owners[leaf] for leaf in leaves(computation.root)]
        # A new value goes where the caller wants it if nothing reads the old one there any more.
        elsewhere = {
            result
            for index, result in enumerate(results)
            if index in returned and (returned[index] is None or ends[returned[index]] <= starts[result])
        }
        ends |= dict.fromkeys(results, 2 * len(computation.instructions))
        return [
            Array(computation=computation, instruction=instruction, index=index, start=starts[leaf], end=ends[leaf])
            for instruction in computation.instructions
            for leaf in leaves(instruction)
            if leaf in starts and leaf not in elsewhere and _takes_memory(instruction, index := leaf[1])
        ]


def leaves(instruction: hlo.Instruction) -> list[Leaf]:
    """The arrays of an instruction's result."""
    return [(instruction.name, index) for index in range(len(instruction.shapes))]


def _takes_memory(instruction: hlo.Instruction, index: int) -> bool:
    shape = instruction.shapes[index]
    return instruction.opcode not in _NO_MEMORY and shape.in_main_memory and shape.dims != ()


def _read(instruction: hlo.Instruction, computation: hlo.Computation) -> list[Leaf]:
    """The arrays that must be in memory while an instruction runs."""
    if instruction.opcode in NO_WORK:
        return []
    operands = [computation.by_name[name] for name in instruction.operands]
    if instruction.opcode.endswith("-done"):
        # What started works on its operands until it is done.
        operands += [computation.by_name[name] for name in operands[0].operands]
    return [leaf for operand in operands for leaf in leaves(operand)]


def num_operands_returned(instruction: hlo.Instruction, computation: hlo.Computation) -> int:
    """How many arrays of a result are the operands, which come first in what an asynchronous start returns."""
    if not instruction.opcode.endswith("-start"):
        return 0
    given = sum(len(computation.by_name[name].shapes) for name in instruction.operands)
    return given if len(instruction.shapes) > given else 0


def _slice_updates(fused: hlo.Computation) -> Iterator[tuple[int, int]]:
    """The results of a fusion, by index, that are a parameter with a slice updated, and the parameter's number."""
    root = fused.root
    for index, name in enumerate(root.operands if root.opcode == "tuple" else [root.name]):
        value = fused.by_name[name]
        is_update = False
        while value.opcode in ("bitcast", "dynamic-update-slice"):
            is_update |= value.opcode == "dynamic-update-slice"
            value = fused.by_name[value.operands[0]]
        if is_update and value.opcode == "parameter":
            yield index, int(value.arguments)


def _declared(instruction: hlo.Instruction, operands: list[hlo.Instruction]) -> dict[int, Leaf]:
    """The results that an instruction declares to lie in memory of its operands."""
    if "output_to_operand_aliasing" not in instruction.attributes:
        return {}
    return {
        _index(instruction, output): (operands[int(number)].name, _index(operands[int(number)], index))
        for output, number, index in _ALIASING.findall(instruction.attributes)
    }


def _index(instruction: hlo.Instruction, path: str) -> int:
    """The index among an instruction's shapes of an array at a path such as "1, 0", at most two deep."""
    first, *rest = [int(step) for step in path.split(",") if step.strip()] or [0]
    return sum(instruction.elements[:first]) + sum(rest)

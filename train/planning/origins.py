"""Where the arrays of a compiled program come from, in the words of the JAX program."""

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from train.planning import hlo
from train.planning.links import is_collective
from train.planning.liveness import NO_WORK, Array, Leaf, Liveness, leaves, num_operands_returned
from train.planning.op_names import is_telling, layer_of

_Place = tuple[hlo.Computation, Leaf]


@dataclass(frozen=True, kw_only=True)
class History:
    """What a program does with an array's memory.

    Args:
      computed: The instruction whose result lies there, or of which it is a copy.
      written: What computes the values that are written there later on, or else the first ones.
      last_work: The op_name of the last instruction that works on it or on a copy; "" where none does.
      is_layer_state: Whether a loop over layers carries it and changes it.
    """

    computed: hlo.Instruction
    written: hlo.Instruction
    last_work: str
    is_layer_state: bool


class Origins:
    """Finds the instruction that computed what an array holds: behind copies, updated slices and the state of loops."""

    def __init__(self, module: hlo.Module, liveness: Liveness):
        self._module = module
        self._liveness = liveness
        self._shared: dict[str, dict[Leaf, list[Leaf]]] = {}

    def history(self, array: Array) -> History:
        return History(
            computed=self._follow(array.computation, _leaf(array), self._copied_from),
            written=self._written(array),
            last_work=self._last_work(array),
            is_layer_state=self._is_layer_state(array),
        )

    def origin(self, computation: hlo.Computation, leaf: Leaf) -> hlo.Instruction:
        """What computed an array. An instruction that does not say where it is from is taken for a copy."""
        return self._follow(computation, leaf, lambda *place: self._copied_from(*place) or self._moved_from(*place))

    def _written(self, array: Array) -> hlo.Instruction:
        written = (leaf for leaf in self._sharing(array) if self._is_written(array.computation, leaf))
        return self.origin(array.computation, next(written, _leaf(array)))

    def _last_work(self, array: Array) -> str:
        computation, instruction = array.computation, array.last_use
        while instruction and "/" not in instruction.op_name and instruction.opcode not in ("fusion", "while"):
            readers = (reader for reader in reversed(computation.instructions) if instruction.name in reader.operands)
            instruction = next(readers, None)
        if instruction is None or "/" in instruction.op_name:
            return instruction.op_name if instruction else ""
        return self.origin(computation, (instruction.name, 0)).op_name

    def _is_layer_state(self, array: Array) -> bool:
        return any(
            self._is_layer_loop(array.computation.by_name[leaf[0]]) and self._is_written(array.computation, leaf)
            for leaf in self._sharing(array)
        )

    def _sharing(self, array: Array) -> Sequence[Leaf]:
        """The other arrays that lie in its memory later on."""
        name = array.computation.name
        if name not in self._shared:
            self._shared[name] = collections.defaultdict(list)
            for leaf, owner in self._liveness.owners(array.computation).items():
                if leaf != owner:
                    self._shared[name][owner].append(leaf)
        return self._shared[name][_leaf(array)]

    @staticmethod
    def _follow(
        computation: hlo.Computation, leaf: Leaf, step: Callable[[hlo.Computation, Leaf], _Place | None]
    ) -> hlo.Instruction:
        """Goes from array to array as far as `step` leads, but only once round a loop."""
        seen = set()
        place: _Place | None = (computation, leaf)
        while place is not None and (place[0].name, place[1]) not in seen:
            computation, leaf = place
            seen.add((computation.name, leaf))
            place = step(computation, leaf)
        return computation.by_name[leaf[0]]

    def _copied_from(self, computation: hlo.Computation, leaf: Leaf) -> _Place | None:
        """The array that this one is a copy of; also the collective's where a fusion wraps one."""
        instruction = computation.by_name[leaf[0]]
        if instruction.opcode in ("copy", "copy-start"):
            return computation, (instruction.operands[0], 0)
        if instruction.opcode in NO_WORK or instruction.opcode.endswith("-done"):
            return computation, self._liveness.shared(instruction, computation)[leaf[1]]
        inside = self._inside_fusion(computation, leaf)
        return inside if inside and is_collective(_instruction(inside)) else None

    def _moved_from(self, computation: hlo.Computation, leaf: Leaf) -> _Place | None:
        """The array whose values this one holds, in a slice or in another form, unless its op_name tells what it is."""
        instruction = computation.by_name[leaf[0]]
        if instruction.opcode == "parameter":
            return self._given(computation, leaf)
        if instruction.opcode == "dynamic-update-slice":
            return computation, (instruction.operands[1], 0)
        if instruction.opcode == "while":
            body = self._body(instruction)
            if self._is_written(computation, leaf):
                return body, leaves(body.root)[leaf[1]]
            return computation, self._liveness.shared(instruction, computation)[leaf[1]]
        inside = self._inside_fusion(computation, leaf)
        if inside and _instruction(inside).opcode == "dynamic-update-slice":
            return inside
        if is_telling(instruction.op_name) or not instruction.operands:
            return None
        operands = [computation.by_name[name] for name in instruction.operands]
        return inside or (computation, leaves(max(operands, key=lambda operand: operand.num_bytes))[0])

    def _is_layer_loop(self, instruction: hlo.Instruction) -> bool:
        if instruction.opcode != "while" or layer_of(instruction.op_name):
            return False
        return any(layer_of(inside.op_name) for inside in self._body(instruction).instructions)

    def _body(self, loop: hlo.Instruction) -> hlo.Computation:
        return self._module.computations[loop.called["body"][0]]

    def _given(self, computation: hlo.Computation, leaf: Leaf) -> _Place | None:
        """What a computation's parameter holds: in a loop what its body computed, otherwise the caller's array."""
        if computation.name not in self._module.callers:
            return None
        outside, caller = self._module.callers[computation.name]
        if caller.opcode == "while" and self._is_written(outside, (caller.name, leaf[1])):
            body = self._body(caller)
            return body, leaves(body.root)[leaf[1]]
        if caller.opcode in ("fusion", "fusion-start"):
            return outside, (caller.operands[int(computation.by_name[leaf[0]].arguments)], 0)
        for callee, given in self._liveness.callees(caller, outside):
            if callee is computation:
                return outside, given[leaf]
        return None

    def _inside_fusion(self, computation: hlo.Computation, leaf: Leaf) -> _Place | None:
        """The array of a fusion's own computation that it returns as this one."""
        instruction = computation.by_name[leaf[0]]
        index = leaf[1] - num_operands_returned(instruction, computation)
        if instruction.opcode not in ("fusion", "fusion-start") or index < 0:
            return None
        fused = self._module.computations[instruction.called["calls"][0]]
        return fused, self._liveness.behind_names(fused, leaves(fused.root)[index])

    def _is_written(self, computation: hlo.Computation, leaf: Leaf) -> bool:
        """Whether an instruction that returns an operand's memory puts other values there."""
        instruction = computation.by_name[leaf[0]]
        if instruction.opcode == "while":
            body = self._body(instruction)
            name, index = self._liveness.behind_names(body, leaves(body.root)[leaf[1]])
            return body.by_name[name].opcode != "parameter" or index != leaf[1]
        inside = self._inside_fusion(computation, leaf)
        return instruction.opcode in ("dynamic-update-slice", "conditional", "call") or (
            inside is not None and _instruction(inside).opcode != "parameter"
        )


def _instruction(place: _Place) -> hlo.Instruction:
    computation, leaf = place
    return computation.by_name[leaf[0]]


def _leaf(array: Array) -> Leaf:
    return array.instruction.name, array.index

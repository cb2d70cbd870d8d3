"""Copies between a device's memory and its host's, as a compiled program makes them."""

from typing import NamedTuple

from train.planning.hlo import Computation, Instruction
from train.planning.liveness import NO_WORK, num_operands_returned

_NO_COPIES = NO_WORK | {"parameter", "while", "conditional", "call", "custom-call"}


class HostCopy(NamedTuple):
    """What one instruction copies."""

    num_bytes: int
    to_host: bool


def host_copy(instruction: Instruction, within: Computation) -> HostCopy | None:
    """The copy that an instruction makes or starts; None of all others, and of those that end one.

    A slice of a larger array that is updated on the host, or read from it, travels alone.
    """
    if instruction.opcode in _NO_COPIES or instruction.opcode.endswith("-done"):
        return None
    operands = [shape for name in instruction.operands for shape in within.by_name[name].shapes]
    results = instruction.shapes[num_operands_returned(instruction, within) :]
    if any(shape.in_host_memory for shape in results):
        return HostCopy(sum(shape.num_bytes for shape in operands if shape.in_main_memory and shape.dims), True)
    if any(shape.in_host_memory for shape in operands):
        return HostCopy(sum(shape.num_bytes for shape in results if shape.in_main_memory and shape.dims), False)
    return None

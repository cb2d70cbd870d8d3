"""Completes the names of operations that XLA cut short.

Where the body of a shard_map holds a Pallas kernel, XLA's inliner for TPUs puts the kernel's own name in the place of
the call's: every operation in the body is named "context_parallel/OP/pallas_call/context_parallel/all_to_all" instead
of "jit(step)/.../layer.far/mixer/shard_map/context_parallel/all_to_all". Its layer and its pass are then told only by
what it computes with: a layer's queries, keys and values are computed outside the body, and have whole names.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

from longctx.context_parallel.api import HOP_SCOPE
from train.planning.hlo import Computation, Instruction, Module
from train.planning.op_names import is_whole, mixer_of


def with_whole_names(module: Module) -> Module:
    """The program, with cut names completed.

    A name stays as it is where nothing tells the layer, as in schedules that are built outside layers. So does that of
    a loop: XLA names one after a kernel in its body, also the loop over layers.

    Cost: below a second for 10 MB of text.
    """
    completer = _Completer(module)
    computations = {name: completer.completed(computation) for name, computation in module.computations.items()}
    return dataclasses.replace(module, computations=computations, entry=computations[module.entry.name])


def _is_cut(instruction: Instruction) -> bool:
    return instruction.op_name.startswith(f"{HOP_SCOPE}/")


class _Completer:
    def __init__(self, module: Module):
        self._callers = module.callers
        self._told_by_caller = functools.cache(self._mixer_of_caller)
        self._users = functools.cache(_users)

    def completed(self, computation: Computation) -> Computation:
        cut = [i for i in computation.instructions if _is_cut(i) and i.opcode != "while"]
        if not cut:
            return computation
        told = {i.name: self._mixer(i, computation) for i in cut}
        return dataclasses.replace(
            computation,
            instructions=tuple(_completed(i, told.get(i.name)) for i in computation.instructions),
        )

    def _mixer(self, instruction: Instruction, within: Computation) -> str | None:
        """The path of the mixer that it belongs to: that of the nearest operand that tells, or else user, or caller."""
        users = self._users(within)
        return (
            _nearest(instruction, within, lambda i: i.operands)
            or _nearest(instruction, within, lambda i: users[i.name])
            or self._told_by_caller(within.name)
        )

    def _mixer_of_caller(self, name: str) -> str | None:
        if name not in self._callers:
            return None
        outside, caller = self._callers[name]
        return mixer_of(caller.op_name) if is_whole(caller.op_name) else self._mixer(caller, outside)


def _nearest(start: Instruction, within: Computation, step: Callable[[Instruction], Iterable[str]]) -> str | None:
    """The mixer of the nearest instruction that tells one, going on from those whose names are cut or missing."""
    seen, queue = {start.name}, collections.deque([start])
    while queue:
        for name in step(queue.popleft()):
            if name in seen or name not in within.by_name:
                continue
            seen.add(name)
            found = within.by_name[name]
            if not is_whole(found.op_name):
                queue.append(found)
            # Equal constants of several passes become one.
            elif found.opcode != "constant" and mixer_of(found.op_name):
                return mixer_of(found.op_name)
    return None


def _users(computation: Computation) -> Mapping[str, Sequence[str]]:
    users = collections.defaultdict(list)
    for instruction in computation.instructions:
        # A loop over layers, which uses what is built before it, leads to layers of any pass.
        for name in instruction.operands if instruction.opcode != "while" else ():
            users[name].append(instruction.name)
    return users


def _completed(instruction: Instruction, mixer: str | None) -> Instruction:
    if mixer is None:
        return instruction
    cut = instruction.op_name
    whole = f"{mixer}/shard_map/{cut.rpartition('/pallas_call/')[2]}"
    attributes = instruction.attributes.replace(f'op_name="{cut}"', f'op_name="{whole}"')
    return dataclasses.replace(instruction, attributes=attributes)

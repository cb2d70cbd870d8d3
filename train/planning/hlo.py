"""Reads a compiled, scheduled XLA program from its text: computations, instructions, shapes, loops.

Only what planning needs: the text is that of `jax.stages.Compiled.as_text()`, whose instructions stand in the order in
which they run.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "opaque": 0}
_LEAF = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_TOKEN = re.compile(rf"[()]|{_LEAF.pattern}")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|called_computations|true_computation|false_computation)=%?([\w.\-]+)"
)
_END = re.compile(r'\}(, execution_thread="\w+")?')
_BEGINS = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = |\s*$|\}(?:,|$)|(?:ENTRY )?%?[\w.\-]+ \(")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def bits(self) -> int:
        """Of one element."""
        if self.dtype in _BITS:
            return _BITS[self.dtype]
        digits = re.search(r"\d+", self.dtype)
        return int(digits[0]) if digits else 8

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in memory: those of a TPU's tiles included, which pad the two minor dims."""
        dims = list(self.dims)
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        order = [int(dim) for dim in self.layout.split(":")[0].split(",") if dim.isdigit()]
        if tile and len(order) == len(dims):
            sizes = [int(size) for size in tile[1].split(",")]
            for dim, size in zip(order, reversed(sizes), strict=False):
                dims[dim] = -(-dims[dim] // size) * size
        return -(-math.prod(dims) * self.bits // 8)

    @property
    def data_bytes(self) -> int:
        """Bytes of its elements alone: what travels."""
        return -(-math.prod(self.dims) * self.bits // 8)

    @property
    def in_main_memory(self) -> bool:
        """Whether it lies in the device's main memory (HBM), not in a TPU's vector memory, say."""
        space = re.search(r"S\((\d+)\)", self.layout)
        return space is None or space[1] == "0"

    @property
    def in_host_memory(self) -> bool:
        """Whether it lies in the host's memory."""
        return "S(5)" in self.layout

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction. `shapes` are the arrays of its result, those of nested tuples in order.

    `elements` says how many of them belong to each element of a tuple; () where the result is no tuple.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    elements: tuple[int, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    arguments: str

    @functools.cached_property
    def op_name(self) -> str:
        """Where the program says it comes from: JAX's scopes and primitive."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Names of the computations it calls, by role: calls, body, condition, to_apply, branches."""
        called = {role: (name,) for role, name in _CALLED.findall(self.attributes)}
        branches = [name for role in ("true_computation", "false_computation") for name in called.pop(role, ())]
        found = _BRANCHES.search(self.attributes)
        if found:
            branches = _NAME.findall(found[1])
        return called | ({"branches": tuple(branches)} if branches else {})

    @property
    def num_bytes(self) -> int:
        return sum(shape.num_bytes for shape in self.shapes)

    @property
    def tuple_index(self) -> int:
        """Of a get-tuple-element: which element of its operand it is."""
        return int(re.search(r"index=(\d+)", self.attributes)[1])


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.instructions if instruction.is_root)

    def parameter(self, number: int) -> Instruction:
        return next(i for i in self.instructions if i.opcode == "parameter" and i.arguments.strip() == str(number))


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A compiled program for one device."""

    computations: Mapping[str, Computation]
    entry: Computation
    header: str

    @functools.cached_property
    def callers(self) -> Mapping[str, tuple[Computation, Instruction]]:
        """By the name of a computation: the last instruction that calls it, and where that stands."""
        return {
            callee: (computation, instruction)
            for computation in self.computations.values()
            for instruction in computation.instructions
            for names in instruction.called.values()
            for callee in names
        }

    def trip_count(self, loop: Instruction, within: Computation) -> int | None:
        """How often the body of a `while` runs; None where only the data decides."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called["condition"][0]]
        body = self.computations[loop.called["body"][0]]
        test = condition.root
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, bound = (condition.by_name[name] for name in test.operands)
        if counter.opcode != "get-tuple-element":
            return None
        index = counter.tuple_index
        stop = self._constant(bound, condition, body, loop, within)
        start = self._constant_of_operand(loop, within, index)
        if stop is None or start is None:
            return None
        return max(0, -(-(stop - start) // self._step(body, index)))

    def _constant(self, bound, condition, body, loop, within) -> int | None:
        if bound.opcode == "constant":
            return int(bound.arguments)
        if bound.opcode != "get-tuple-element":
            return None
        # A bound that travels in the loop's state counts if the body passes it on as it is.
        index = bound.tuple_index
        passed_on = body.by_name.get(body.root.operands[index]) if body.root.opcode == "tuple" else None
        if passed_on is None or passed_on.opcode != "get-tuple-element" or passed_on.tuple_index != index:
            return None
        return self._constant_of_operand(loop, within, index)

    def _constant_of_operand(self, loop: Instruction, within: Computation, index: int) -> int | None:
        """The element of a loop's initial state, if it is a constant."""
        state = within.by_name.get(loop.operands[0])
        if state is None or state.opcode != "tuple":
            return None
        value = within.by_name.get(state.operands[index])
        while value is not None and value.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
            value = within.by_name.get(value.operands[0])
        if value is None or value.opcode != "constant" or not re.fullmatch(r"-?\d+", value.arguments):
            return None
        return int(value.arguments)

    def _step(self, body: Computation, index: int) -> int:
        """What a loop's counter grows by; 1 where the program does not show it."""
        if body.root.opcode != "tuple":
            return 1
        update = body.by_name.get(body.root.operands[index])
        within = body
        if update is not None and update.opcode == "fusion":
            within = self.computations[update.called["calls"][0]]
            update = within.root
        if update is None or update.opcode != "add":
            return 1
        addends = (within.by_name.get(name) for name in update.operands)
        constants = [int(a.arguments) for a in addends if a is not None and a.opcode == "constant"]
        return constants[0] if constants and constants[0] > 0 else 1


def parse(text: str) -> Module:
    """The program that the text describes.

    Raises: ValueError where the text is no scheduled HLO module.
    Cost: some seconds for 10 MB.
    """
    lines = text.splitlines()
    if not lines or not lines[0].startswith("HloModule") or "is_scheduled=true" not in lines[0]:
        raise ValueError("text: wanted a scheduled HLO module, as Compiled.as_text() gives for GPUs and TPUs")
    computations, entry = {}, None
    name, is_entry, instructions = None, False, []
    for line in _whole(lines[1:]):
        if name is None:
            header = _HEADER.match(line)
            if header:
                name, is_entry, instructions = header[2], bool(header[1]), []
        elif _END.fullmatch(line):
            computations[name] = Computation(name, tuple(instructions))
            entry = computations[name] if is_entry else entry
            name = None
        elif line.strip():
            instructions.append(_parse_instruction(line))
    if entry is None:
        raise ValueError("text: holds no ENTRY computation")
    return Module(computations, entry, lines[0])


def _whole(lines: Sequence[str]) -> Iterator[str]:
    """One line an instruction: some are printed on several, such as those with `kernel_metadata`."""
    begun: list[str] = []
    for line in lines:
        if begun and _BEGINS.match(line):
            yield " ".join(begun)
            begun = []
        begun.append(line)
    yield " ".join(begun)


def _parse_instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    is_root = left.startswith("ROOT ")
    end = _end_of_shape(right)
    shape_text, rest = right[:end], right[end + 1 :]
    opcode, rest = rest.split("(", 1)
    close = _closing(rest, 0)
    shapes, elements = _result(shape_text)
    arguments, attributes = rest[:close], rest[close + 1 :]
    operands = () if opcode in ("constant", "parameter", "iota") else tuple(_operand_names(arguments))
    return Instruction(
        name=left.removeprefix("ROOT ").removeprefix("%"),
        opcode=opcode,
        shapes=shapes,
        elements=elements,
        operands=operands,
        attributes=attributes,
        is_root=is_root,
        arguments=arguments,
    )


def _result(text: str) -> tuple[tuple[Shape, ...], tuple[int, ...]]:
    """The arrays of a result and how many each element of a tuple has."""
    shapes, elements, depth = [], [], 0
    for token in _TOKEN.finditer(re.sub(r"/\*.*?\*/", "", text)):
        if token[0] == "(":
            depth += 1
            if depth == 2:
                elements.append(0)
        elif token[0] == ")":
            depth -= 1
        else:
            dtype, dims, layout = token.groups("")
            shapes.append(Shape(dtype, tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim), layout))
            if depth == 1:
                elements.append(1)
            elif depth > 1:
                elements[-1] += 1
    return tuple(shapes), tuple(elements)


def _operand_names(arguments: str) -> Iterator[str]:
    for argument in re.sub(r"/\*.*?\*/", "", arguments).split(", "):
        # Some printers put the operand's shape before its name.
        found = re.search(r"%?([\w.\-]+)$", argument.strip())
        if found:
            yield found[1]


def _end_of_shape(text: str) -> int:
    """Where the result's shape ends: the first space outside any bracket."""
    depth = 0
    for place, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == " " and depth == 0:
            return place
    raise ValueError(f"no instruction: {text[:80]}")


def _closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one before `start`."""
    depth = 1
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")

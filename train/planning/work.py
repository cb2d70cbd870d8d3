"""What an instruction of a compiled program computes and moves: FLOPs of its matmuls, bytes of main memory."""

import functools
import math
import re

import numpy as np

from train.planning.hlo import Computation, Instruction, Module, Shape

# Views, constants, and what is counted where it is computed. The copies that a TPU program starts ahead of their use
# run beside the compute.
_FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id iota opt-barrier "
    "copy-start copy-done slice-start slice-done dynamic-slice-start dynamic-slice-done fusion-done async-done".split()
)


class Work:
    """FLOPs and bytes of the instructions of a module; each computation is looked at once."""

    def __init__(self, module: Module):
        self._module = module
        self._matmul_flops_of = functools.cache(self._flops_of_computation)
        self._touched = functools.cache(self._bytes_of_parameters)

    def flops(self, instruction: Instruction, within: Computation) -> float:
        """2 m n k of its matmuls, those inside a fusion included; loops and branches are not followed."""
        if instruction.opcode == "dot":
            return _dot_flops(instruction, within)
        if instruction.opcode == "convolution":
            return _convolution_flops(instruction, within)
        if _is_gemm(instruction):
            return _gemm_flops(instruction, within)
        return sum(self._matmul_flops_of(name) for name in instruction.called.get("calls", ()))

    def main_memory_bytes(self, instruction: Instruction, within: Computation) -> float:
        """Bytes that it reads and writes in main memory; of an array of which it takes a slice, the slice."""
        if instruction.opcode in _FREE:
            return 0
        written = sum(shape.num_bytes for shape in instruction.shapes if shape.in_main_memory)
        operands = [within.by_name[name] for name in instruction.operands if name in within.by_name]
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * written
        if instruction.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * operands[1].num_bytes
        if instruction.opcode not in ("fusion", "fusion-start"):
            return written + sum(_in_main_memory(operand) for operand in operands)
        touched = self._touched(instruction.called["calls"][0])
        read = sum(
            min(_in_main_memory(operand), limit) for operand, limit in zip(operands, touched.parameters, strict=False)
        )
        return read + min(written, touched.result)

    def has_matmul(self, name: str) -> bool:
        """Whether a computation, or one that it calls, holds a matmul or a kernel."""
        return self._has_matmul(name)

    @functools.cached_property
    def _has_matmul(self):
        @functools.cache
        def found(name: str) -> bool:
            return any(
                i.opcode in ("dot", "convolution")
                or is_kernel(i)
                or _is_gemm(i)
                or any(found(c) for cs in i.called.values() for c in cs)
                for i in self._module.computations[name].instructions
            )

        return found

    def _flops_of_computation(self, name: str) -> float:
        computation = self._module.computations[name]
        return sum(self.flops(i, computation) for i in computation.instructions)

    def _bytes_of_parameters(self, name: str) -> "_Touched":
        computation = self._module.computations[name]
        limits: dict[str, float] = {}
        parameters = [i for i in computation.instructions if i.opcode == "parameter"]
        for parameter in parameters:
            limit = 0.0
            for user in _users(computation, parameter.name):
                if user.opcode in ("dynamic-slice", "gather", "slice"):
                    limit += user.num_bytes
                elif user.opcode == "dynamic-update-slice" and user.operands[0] in _views(computation, parameter.name):
                    limit += computation.by_name[user.operands[1]].num_bytes
                else:
                    limit = math.inf
                    break
            limits[parameter.name] = limit
        parameters.sort(key=lambda p: int(p.arguments))
        root = computation.root
        updates = [i for i in computation.instructions if i.opcode == "dynamic-update-slice"]
        in_place = root.opcode in ("dynamic-update-slice", "tuple", "bitcast") and updates
        written = sum(computation.by_name[u.operands[1]].num_bytes for u in updates) if in_place else math.inf
        if root.opcode == "tuple" and in_place:
            updated = {u.name for u in updates}
            written += sum(
                computation.by_name[o].num_bytes for o in root.operands if not _views_any(computation, o, updated)
            )
        return _Touched(parameters=[limits[p.name] for p in parameters], result=written)


class _Touched:
    """Of a fused computation: bytes that it can read of each parameter, and can write."""

    def __init__(self, *, parameters: list[float], result: float):
        self.parameters, self.result = parameters, result


def is_kernel(instruction: Instruction) -> bool:
    """Whether it calls a hand-written kernel: Mosaic's, cuDNN's attention."""
    return instruction.opcode.startswith("custom-call") and bool(
        re.search(r'custom_call_target="(mosaic_gpu\w*|tpu_custom_call|__cudnn\$fmha\w*)', instruction.attributes)
    )


def _is_gemm(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and 'custom_call_target="__cublas' in instruction.attributes


def _views(computation: Computation, name: str) -> set[str]:
    """The value and its bitcasts."""
    views = {name}
    for instruction in computation.instructions:
        if instruction.opcode == "bitcast" and instruction.operands[0] in views:
            views.add(instruction.name)
    return views


def _users(computation: Computation, name: str) -> list[Instruction]:
    views = _views(computation, name)
    return [i for i in computation.instructions if i.opcode != "bitcast" and views & set(i.operands)]


def _views_any(computation: Computation, name: str, updated: set[str]) -> bool:
    instruction = computation.by_name[name]
    while instruction.opcode == "bitcast":
        instruction = computation.by_name[instruction.operands[0]]
    return instruction.name in updated


def _in_main_memory(instruction: Instruction) -> int:
    return sum(shape.num_bytes for shape in instruction.shapes if shape.in_main_memory)


def _shape(name: str, within: Computation) -> Shape:
    return within.by_name[name].shapes[0]


def _dot_flops(dot: Instruction, within: Computation) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    dims = _shape(dot.operands[0], within).dims
    inner = math.prod(dims[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
    return 2.0 * math.prod(dot.shapes[0].dims) * inner


def _gemm_flops(call: Instruction, within: Computation) -> float:
    """Of a call of cuBLAS, whose result may be followed by a workspace."""
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes)
    if contracted is None:
        return 0.0
    dims = _shape(call.operands[0], within).dims
    inner = math.prod(dims[int(d)] for d in re.findall(r"\d+", contracted[1]))
    return 2.0 * math.prod(call.shapes[0].dims) * inner


def _convolution_flops(convolution: Instruction, within: Computation) -> float:
    """TPU programs write matmuls as convolutions, with batch dims as windows most of whose places are padding."""
    lhs, rhs = (_shape(name, within).dims for name in convolution.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    lhs_labels, rhs_labels, out_labels = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    places = 1
    for number, size in enumerate(fields.get("size", "").split("x") if "size" in fields else ()):
        places *= _valid_places(
            size=int(size),
            base=lhs[lhs_labels.index(str(number))],
            out=convolution.shapes[0].dims[out_labels.index(str(number))],
            stride=_field(fields, "stride", number, 1),
            low=int(fields["pad"].split("x")[number].split("_")[0]) if "pad" in fields else 0,
            base_dilation=_field(fields, "lhs_dilate", number, 1),
            window_dilation=_field(fields, "rhs_dilate", number, 1),
        )
    groups = re.search(r"batch_group_count=(\d+)", convolution.attributes)
    batch = lhs[lhs_labels.index("b")] // (int(groups[1]) if groups else 1)
    return 2.0 * batch * rhs[rhs_labels.index("i")] * rhs[rhs_labels.index("o")] * places


def _field(fields: dict[str, str], name: str, number: int, default: int) -> int:
    return int(fields[name].split("x")[number]) if name in fields else default


def _valid_places(*, size, base, out, stride, low, base_dilation, window_dilation) -> int:
    """(output, window) places of one dim that meet an element of the input, and not padding or a hole."""
    at = np.arange(out)[:, None] * stride + np.arange(size) * window_dilation - low
    return int(np.sum((at >= 0) & (at < (base - 1) * base_dilation + 1) & (at % base_dilation == 0)))

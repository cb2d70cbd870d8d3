"""What lies in a device's memory at the fullest moment of a compiled step, by name and by class."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from train.planning import hlo
from train.planning.links import is_collective
from train.planning.liveness import Array, Liveness
from train.planning.op_names import argument, is_backward, is_forward, is_telling, readable
from train.planning.origins import History, Origins

KINDS = ("gradients", "activations", "communication", "temporaries")
"""Classes of memory beside the program's arguments."""

_COLLECTIVE_PRIMITIVES = ("ppermute", "all_gather", "reduce_scatter", "psum", "all_to_all")


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """An array in a device's main memory.

    Args:
      name: What computed it: JAX's scopes and the primitive.
      shape: Its dtype and dims on one device, such as "f32[4096,32768]".
      num_bytes: Bytes that it takes, padding to a TPU's tiles included.
      kind: "communication": the result or the landing buffer of a collective. "gradients": float32, of a parameter's
        shape. "activations": from the forward pass for the backward pass, or carried from layer to layer.
        "temporaries": everything else.
    """

    name: str
    shape: str
    num_bytes: int
    kind: str


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The fullest moment of a program.

    Args:
      buffers: What is in memory then beside the program's arguments, largest first.
      num_bytes: Their sum.
      at: What runs then, named as the buffers are.
    """

    buffers: tuple[Buffer, ...]
    num_bytes: int
    at: str


def peak(module: hlo.Module, *, parameter_shapes: Set[tuple[int, ...]] = frozenset()) -> Peak:
    """The moment at which a program has the most bytes in a device's main memory, its arguments left out.

    Args:
      module: A scheduled program for one device.
      parameter_shapes: Shapes of the model's parameters on one device; they tell gradients.

    Cost: linear in the program; under a second for 10 MB of text.
    """
    liveness = Liveness(module)
    origins = Origins(module, liveness)
    moment = liveness.fullest_moment()
    at = origins.origin(moment.computation, (moment.instruction.name, 0))
    buffers = [_buffer(array, origins.history(array), parameter_shapes) for array in moment.arrays]
    return Peak(
        buffers=tuple(sorted(buffers, key=lambda buffer: -buffer.num_bytes)),
        num_bytes=moment.num_bytes,
        at=readable(at.op_name) or at.name,
    )


def memory_by_class(peak: Peak, stats: Any, state_bytes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of a device that a program needs, by class: `state_bytes`, then those of KINDS.

    Those of KINDS add up to what the compiler says: everything that it allocates beside the arguments, and code that
    lies on the device. The peak's buffers go to their classes and what they leave of the compiler's figure
    (fragmentation, alignment, code) to "temporaries"; if they are more than that figure, all are scaled down to it.

    Args:
      stats: What jax.stages.Compiled.memory_analysis() returns.
      state_bytes: Bytes of the arguments on a device, by class.
    """
    total = _allocated(stats) - stats.argument_size_in_bytes + stats.generated_code_size_in_bytes
    scale = min(1.0, total / max(1, peak.num_bytes))
    explained = {
        kind: int(scale * sum(buffer.num_bytes for buffer in peak.buffers if buffer.kind == kind)) for kind in KINDS
    }
    explained["temporaries"] += total - sum(explained.values())
    return dict(state_bytes) | explained


def _allocated(stats: Any) -> int:
    """Bytes of all allocations but code; on a TPU less than the parts that the compiler states add up to."""
    outputs = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    stated = stats.argument_size_in_bytes + stats.temp_size_in_bytes + outputs
    return min(stated, stats.total_allocation_bytes or stated)


def _buffer(array: Array, history: History, parameter_shapes: Set[tuple[int, ...]]) -> Buffer:
    return Buffer(
        name=_name(array, history),
        shape=str(array.shape),
        num_bytes=array.shape.num_bytes,
        kind=_kind(array, history, parameter_shapes),
    )


def _kind(array: Array, history: History, parameter_shapes: Set[tuple[int, ...]]) -> str:
    written = history.written.op_name
    if is_collective(history.computed):
        return "communication"
    is_argument = history.written.opcode == "parameter"
    if array.shape.dtype == "f32" and array.shape.dims in parameter_shapes and not (is_argument or is_forward(written)):
        return "gradients"
    is_backward_from_start = is_backward(written) or is_backward(history.computed.op_name)
    if is_telling(written) and not is_backward_from_start and is_backward(history.last_work):
        return "activations"
    if history.is_layer_state:
        return "activations"
    return "communication" if is_collective(history.written) else "temporaries"


def _name(array: Array, history: History) -> str:
    written = history.written
    if is_telling(written.op_name):
        name = readable(written.op_name)
        if is_collective(history.computed) and not name.endswith(_COLLECTIVE_PRIMITIVES):
            return f"{name} {history.computed.opcode.removesuffix('-start')}"
        return name
    if written.opcode == "parameter" and written.op_name:
        return f"copy of {argument(written.op_name)}"
    # Nothing says what it is, but its use may say what it is for.
    opcode = array.instruction.opcode.removesuffix("-start")
    return f"{opcode} for {readable(history.last_work)}" if history.last_work else opcode

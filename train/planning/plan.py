"""The plan of a run: what it needs and costs on its devices, as data."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from train.planning.memory import Buffer
from train.planning.timeline import Collective


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartTime:
    """FLOPs and seconds of a part of the model in one phase of a step, on one device."""

    part: str
    phase: str
    flops: float
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs and costs.

    Attributes:
      devices: As the user named them.
      device_kind, num_devices: What they are.
      mesh: Sizes of the axes.
      seq_len, batch_size: Of a step.
      parameters: Of the model.
      source: "compiler", or "formula" where there was none; `source_note` says why.
      compile_seconds: None for a formula.
      memory: Bytes of a device by class.
      memory_total: The most that a device holds at once; a formula's classes are not all held at once.
      memory_limit: Bytes that a program may use; None where nobody knows.
      memory_note: Where the limit comes from.
      host_memory: Bytes of the host's memory that one device holds tensors in, by class; without those that are 0.
      host_memory_limit: Bytes of it that one device may use; None where nobody knows.
      host_memory_note: Where that limit comes from.
      buffers: What is largest at the fullest moment.
      collectives: Equal ones together.
      parts: Where the time goes; empty where the table of devices has no speeds.
      compute_seconds, exposed_seconds, step_seconds: Of a step; None likewise.
      mfu: Of a step whose rows are one document each; None likewise.
      tokens_per_second: Over all devices; None likewise.
      imbalance: Of the layout, by mixer: 1 is even.
      implementations: Of the attention ops.
      problems: Why the run should not start like this; none means that it fits and that no hop is exposed.
      advice: What to change.
      notes: What else to know.
      refused: Whether the compiler refused the program because of its memory.
    """

    devices: str
    device_kind: str
    num_devices: int
    mesh: Mapping[str, int]
    seq_len: int
    batch_size: int
    parameters: int
    source: str
    source_note: str
    compile_seconds: float | None
    memory: Mapping[str, int]
    memory_total: int
    memory_limit: int | None
    memory_note: str
    host_memory: Mapping[str, int]
    host_memory_limit: int | None
    host_memory_note: str
    buffers: Sequence[Buffer]
    collectives: Sequence[Collective]
    parts: Sequence[PartTime]
    compute_seconds: float | None
    exposed_seconds: float | None
    step_seconds: float | None
    mfu: float | None
    tokens_per_second: float | None
    imbalance: Mapping[str, float]
    implementations: Mapping[str, str]
    problems: Sequence[str]
    advice: Sequence[str]
    notes: Sequence[str]
    refused: bool = False

    @property
    def fits(self) -> bool | None:
        """Whether device and host have the memory; None where a limit is not known."""
        if self.memory_limit is None or (self.host_memory_total and self.host_memory_limit is None):
            return None
        return not self.refused and self.memory_total <= self.memory_limit and self.fits_host

    @property
    def host_memory_total(self) -> int:
        return sum(self.host_memory.values())

    @property
    def fits_host(self) -> bool:
        """False only where the host has too little memory for sure."""
        return self.host_memory_limit is None or self.host_memory_total <= self.host_memory_limit

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, in SI units: bytes, seconds, FLOPs."""
        return dataclasses.asdict(self) | {"fits": self.fits}

"""What training asks of planning: a warning before memory runs out, and help when it did."""

import contextlib
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from train.assemble import Parts
from train.config import TrainConfig
from train.devices import DeviceTable
from train.planning.analysis import estimate_memory
from train.planning.program import Run
from train.planning.target import local_target
from train.planning.verdict import memory_levers

_WARN_FROM = 0.9  # of the limit: the formulas are not exact


class OutOfDeviceMemory(RuntimeError):
    """A device had too little memory for the run."""


class MemoryWatch:
    """Knows by formula what a run that starts now needs of its devices.

    Args:
      config, mesh, parts: Of the run.
      table: Of its devices.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, parts: Parts, table: DeviceTable):
        target = local_target(mesh.local_devices, table)
        self._run = Run(config=config, target=target, mesh=mesh, parts=parts)

    def warning(self) -> str | None:
        """A line that says that memory may run out, and what would help; None where it should suffice."""
        _, total = estimate_memory(self._run)
        limit = self._run.target.memory_bytes
        if limit is None or total < _WARN_FROM * limit:
            return None
        return (
            f"warning: by formula this run needs about {total / 2**30:.1f} GiB of a device, which has "
            f"{limit / 2**30:.1f} GiB; {self._help()}"
        )

    @contextlib.contextmanager
    def helping(self) -> Iterator[None]:
        """Turns XLA's out-of-memory error into one that says what would have helped.

        Raises: OutOfDeviceMemory.
        """
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            first_line = str(error).splitlines()[0]
            raise OutOfDeviceMemory(
                f"out of device memory: {first_line}\n{self._help()}\nCheckpoints are as they were."
            ) from error

    def _help(self) -> str:
        by_class, total = estimate_memory(self._run)
        classes = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in by_class.items() if size >= 2**27)
        levers = "; ".join(memory_levers(self._run, by_class, total)[:3])
        return (
            f"GiB by class: {classes or 'all below 0.13'}. What would help: {levers}. `python -m train.plan` says more"
        )

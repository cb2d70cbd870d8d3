"""How the TPU kernels of blockwise attention are launched, and how they send arrays to other devices as they compute.

A kernel that sends starts a copy from its memory into that of the device ahead before its first tile, and waits behind
its last one until its arrays are there and those of the device behind have come. The arrays of a hop are read and those
of the next written, two buffers that change places from kernel to kernel; neither is an operand and a result at once,
for which XLA would copy it first.

A device may be written to only while it runs the same kernel: before that its buffer is another's. So each kernel first
gives the device behind a credit, and waits for one from the device ahead. Credits are counted by a barrier semaphore,
which outlives kernels, and nothing is waited for before a credit is given, so a ring of any size moves. Credits have no
name: one semaphore is for one device ahead, `Send.collective_id`.

Where two cores share a kernel, the heads are dealt out to them here, and the first core sends.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blockwise.pallas_mosaic_tpu_tiles import Config
from pallas_kernels.mosaic_tpu import num_cores

SENDING = "_sending"
"""The end of the name of a kernel that sends; what it sends stands in its metadata."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Send:
    """From each device of a ring to one ahead; static.

    Attributes:
      axes: The mesh axes of the ring, the last one the fastest.
      sizes: Devices along each.
      stride: How many devices ahead.
      collective_id: Of the semaphore that counts credits: one for each set of axes and stride in a program.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    stride: int
    collective_id: int

    def device(self, stride: int) -> dict[str, jax.Array]:
        """Where the device so many ahead is, by axis; of other axes it is where this one is. Inside a kernel."""
        rank = 0
        for axis, size in zip(self.axes, self.sizes, strict=True):
            rank = rank * size + jax.lax.axis_index(axis)
        rank = jax.lax.rem(rank + stride % math.prod(self.sizes), math.prod(self.sizes))
        place = {}
        for axis, size in reversed(tuple(zip(self.axes, self.sizes, strict=True))):
            place[axis], rank = jax.lax.rem(rank, size), jax.lax.div(rank, size)
        return place

    def start(self, parcel, received, semaphores) -> None:
        """Gives and takes a credit, and starts the copies."""
        credit, mesh = pltpu.get_barrier_semaphore(), pl.DeviceIdType.MESH
        pl.semaphore_signal(credit, 1, device_id=self.device(-self.stride), device_id_type=mesh)
        pl.semaphore_wait(credit, 1)
        for copy in self._copies(parcel, received, semaphores):
            copy.start()

    def wait(self, parcel, received, semaphores) -> None:
        """Until everything was sent and has come."""
        for copy in self._copies(parcel, received, semaphores):
            copy.wait()

    def _copies(self, parcel, received, semaphores) -> list:
        return [
            pltpu.make_async_remote_copy(
                mine,
                theirs,
                semaphores.at[0, i],
                semaphores.at[1, i],
                device_id=self.device(self.stride),
                device_id_type=pl.DeviceIdType.MESH,
            )
            for i, (mine, theirs) in enumerate(zip(parcel, received, strict=True))
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One launch.

    Attributes:
      body: Of the step of the grid (a row of the batch, a head, a block, a member of a group of heads), inputs,
        outputs and scratch.
      grid: How many there are of each.
      in_specs, out_specs, out_shape: Trees; index maps are of the four numbers of a step.
      scratch: By name.
      dims: Of matmuls in all, for the estimate of its cost.
    """

    body: Callable[..., None]
    grid: tuple[int, int, int, int]
    in_specs: object
    out_specs: object
    out_shape: object
    scratch: dict
    dims: int
    name: str

    def __call__(self, inputs, config: Config) -> object:
        """The outputs."""
        (outputs,) = pl.pallas_call(
            lambda *refs: self.body(tuple(pl.program_id(i) for i in range(4)), *refs),
            grid=self.grid,
            in_specs=(self.in_specs,),
            out_specs=(self.out_specs,),
            out_shape=(self.out_shape,),
            scratch_shapes=(self.scratch,),
            compiler_params=config.compiler_params(),
            cost_estimate=config.cost(inputs, self.out_shape, dims=self.dims),
            name=self.name,
        )(inputs)
        return outputs

    def and_send(self, inputs, config: Config, send: Send, parcel: tuple[jax.Array, ...]) -> tuple[object, tuple]:
        """The outputs, and what was received: as `parcel`, of the device behind."""
        B, heads, *rest = self.grid
        cores = num_cores() if heads % num_cores() == 0 else 1
        grid = (cores, B, heads // cores, *rest)

        def step():
            core, b, head, *others = (pl.program_id(i) for i in range(5))
            return b, core * (heads // cores) + head, *others

        def mapped(spec: pl.BlockSpec) -> pl.BlockSpec:
            if spec.index_map is None:
                return spec
            return pl.BlockSpec(
                spec.block_shape,
                lambda core, b, head, *others: spec.index_map(b, core * (heads // cores) + head, *others),
                memory_space=spec.memory_space,
            )

        def body(inputs, parcel, outputs, received, scratch, semaphores):
            numbers = [pl.program_id(i) for i in range(5)]
            is_first = functools.reduce(jnp.logical_and, [number == 0 for number in numbers])
            last = (0, *(size - 1 for size in grid[1:]))
            is_last = functools.reduce(jnp.logical_and, [n == end for n, end in zip(numbers, last, strict=True)])
            pl.when(is_first)(lambda: send.start(parcel, received, semaphores))
            self.body(step(), inputs, outputs, scratch)
            pl.when(is_last)(lambda: send.wait(parcel, received, semaphores))

        in_memory = pl.BlockSpec(memory_space=pltpu.HBM)
        specs = jax.tree.map(mapped, (self.in_specs, self.out_specs), is_leaf=lambda x: isinstance(x, pl.BlockSpec))
        received = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in parcel)
        num_bytes = sum(x.size * x.dtype.itemsize for x in parcel)
        mesh = dict(jax.sharding.get_abstract_mesh().shape)
        sends = {"bytes": num_bytes, "mesh": mesh, "axes": send.axes, "stride": send.stride}
        return pl.pallas_call(
            body,
            grid=grid,
            in_specs=(specs[0], (in_memory,) * len(parcel)),
            out_specs=(specs[1], (in_memory,) * len(parcel)),
            out_shape=(self.out_shape, received),
            scratch_shapes=(self.scratch, pltpu.SemaphoreType.DMA((2, len(parcel)))),
            # Steps in order, or nobody knows which is the first.
            compiler_params=dataclasses.replace(
                config.compiler_params(),
                dimension_semantics=("core_parallel" if cores > 1 else "arbitrary", *("arbitrary",) * 4),
                collective_id=send.collective_id,
            ),
            cost_estimate=dataclasses.replace(
                config.cost(inputs, self.out_shape, dims=self.dims), remote_bytes_transferred=num_bytes
            ),
            name=self.name + SENDING,
            metadata={"sends": json.dumps(sends)},
        )(inputs, parcel)

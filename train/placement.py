"""Which part of a batch this process reads, and how it gets onto the mesh.

Every device holds some rows and, of these, the tokens of its place in the context layout. A process reads no other rows
than those of its devices, cuts them to the tokens of its devices, and hands each device its piece. In a balanced layout
which tokens these are differs from row to row, and is found out where a row is read, in the threads of the loader.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from longctx.context_parallel import BalancedRow, Balancer
from longctx.sharding import batch_sharding

Row = Mapping[str, np.ndarray]
Slots = Int[np.ndarray, "held"] | Callable[[Row], Int[np.ndarray, " held"]]


class BatchPlacement:
    """Places batches of one size.

    Args:
      mesh: Where the batches lie.
      batch_size: Rows of a whole batch, over all processes.
      order: Entry i is the slot of a row that stands at i in the layout: `ContextParallelConfig.order`; or what makes
        the order of each row.

    Attributes:
      rows: Numbers of the rows of a batch that this process must read, ascending.
      slots: The slots of these rows that it must read, in the layout's order, or a function of the row that says them;
        None for all of them in their own.
    """

    slots: Slots | None

    def __init__(self, mesh: Mesh, *, batch_size: int, order: Int[np.ndarray, " length"] | Balancer):
        self._shape = (batch_size, len(order))
        self._shardings = {ndim: batch_sharding(mesh, ndim) for ndim in (1, 2)}
        indices = self._shardings[2].addressable_devices_indices_map(self._shape).values()
        self.rows, self._places = (
            np.unique(np.concatenate([np.arange(*part.indices(size)) for part in {index[dim] for index in indices}]))
            for dim, size in enumerate(self._shape)
        )
        self._order = order
        if isinstance(order, Balancer):
            self.slots = functools.partial(_slots_of_row, order, self._places)
        else:
            slots = order[self._places]
            self.slots = None if np.array_equal(slots, np.arange(len(order))) else slots

    def balance_of(self, row: Row) -> BalancedRow | None:
        """How evenly a whole row is spread over the devices; None where the layout is not made for it."""
        return _balanced(self._order, row) if isinstance(self._order, Balancer) else None

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The batch on the mesh: [B, T] arrays over (rows, tokens), [B] arrays over rows.

        Args:
          batch: This process's part: its `rows`, cut to its `slots`.
        Returns: the whole batch as global arrays.
        """
        return {name: self._place(array) for name, array in batch.items()}

    def _place(self, array: np.ndarray) -> jax.Array:
        numbers = (self.rows, self._places)[: array.ndim]

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            bounds = (part.indices(size)[:2] for part, size in zip(index, self._shape, strict=False))
            return array[tuple(slice(*np.searchsorted(held, ends)) for held, ends in zip(numbers, bounds, strict=True))]

        return jax.make_array_from_callback(self._shape[: array.ndim], self._shardings[array.ndim], piece)


def _slots_of_row(balancer: Balancer, places: Int[np.ndarray, " held"], row: Row) -> Int[np.ndarray, " held"]:
    return _balanced(balancer, row).order[places]


def _balanced(balancer: Balancer, row: Row) -> BalancedRow:
    return balancer.row(row["positions"], row["segment_ids"])


def one_a_device(value: bool | np.float32, mesh: Mesh) -> jax.Array:
    """[devices], in which the devices of each process hold that process's value."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.array([value]))


def same_everywhere(value: np.float32, mesh: Mesh) -> jax.Array:
    """A scalar that all processes know."""
    return jax.make_array_from_callback((), NamedSharding(mesh, PartitionSpec()), lambda _: np.array(value))

"""Attention to chosen blocks in plain XLA: one list of blocks after the other, each a call on its own heads.

A walk over all heads at once would visit what any of them chose; one list's walk visits what it holds, no more.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bias import Bias
from pallas_kernels.blockwise.options import Options
from pallas_kernels.dropout import Dropout
from pallas_kernels.online_softmax import SoftmaxCarry
from pallas_kernels.schedule import BlockRanges, Schedule
from pallas_kernels.tokens import Tokens


class Lists:
    """How a call splits into one for each row of the batch and list of blocks.

    Args:
      q, k: Of the call.
      schedule: Whose lists they are.
    """

    def __init__(self, q: jax.Array, k: jax.Array, schedule: Schedule):
        self.batch_size, self.num_lists = q.shape[0], schedule.num_lists
        self.num_kv_heads, self.schedule = k.shape[2], schedule

    def map(self, body: Callable[["OneList"], Any]) -> Any:
        """body(list) of each, its results with a dim of batch rows times lists in front."""
        return jax.lax.map(lambda i: body(OneList(self, *divmod(i, self.num_lists))), jnp.arange(self._num_calls))

    @property
    def _num_calls(self) -> int:
        return self.batch_size * self.num_lists

    def joined(self, results: jax.Array, axis: int) -> jax.Array:
        """Results `[calls, 1, ...]` of query heads as one array, in which heads are on this axis."""
        x = results.reshape(self.batch_size, self.num_lists, *results.shape[2:])
        x = jnp.moveaxis(x, 1, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    def summed(self, results: jax.Array) -> jax.Array:
        """Results `[calls, 1, S, kv heads of a list, H]` as `[B, S, K, H]`, added where lists share a kv head."""
        x = self.joined(results, 2)
        return x.reshape(*x.shape[:2], self.num_kv_heads, -1, x.shape[3]).sum(axis=3)

    def over_rows(self, results: jax.Array) -> jax.Array:
        """Results `[calls, heads of a list, ...]` as `[N, ...]`, added over the rows of the batch."""
        x = results.reshape(self.batch_size, self.num_lists * results.shape[1], *results.shape[2:])
        return x.sum(axis=0)


@dataclasses.dataclass(frozen=True)
class OneList:
    """One row of the batch and the heads of one list."""

    lists: Lists
    row: jax.Array
    number: jax.Array

    def heads(self, x: jax.Array, axis: int) -> jax.Array:
        """Of an array of the call, `[B, ...]`: this row, and those heads that the list serves."""
        num = x.shape[axis]
        first = self.number * num // self.lists.num_lists
        return jax.lax.dynamic_slice_in_dim(self.of_row(x), first, max(1, num // self.lists.num_lists), axis)

    def of_row(self, x: jax.Array) -> jax.Array:
        """Of `[B or 1, ...]`, this row."""
        return jax.lax.dynamic_slice_in_dim(x, self.row, 1, 0) if x.shape[0] > 1 else x

    def tokens(self, tokens: Tokens | None) -> Tokens | None:
        return jax.tree.map(self.of_row, tokens)

    def dropout(self, dropout: Dropout | None) -> Dropout | None:
        return jax.tree.map(lambda seeds: self.heads(seeds, 1), dropout)

    def bias(self, bias: Bias | None) -> Bias | None:
        def of_list(x: jax.Array) -> jax.Array:
            size = x.shape[0] // self.lists.num_lists
            return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), self.number * size, size)

        return jax.tree.map(of_list, bias)

    def carry(self, carry: SoftmaxCarry) -> SoftmaxCarry:
        return SoftmaxCarry(max=self.heads(carry.max, 1), sum=self.heads(carry.sum, 1), acc=self.heads(carry.acc, 2))

    def schedule(self) -> Schedule:
        """Its blocks, as of a mask that allows no others; the transpose, which XLA does not read, stays all lists'."""

        def of_list(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(self.of_row(x), self.number, 1, 2) if x.shape[2] > 1 else self.of_row(x)

        schedule = self.lists.schedule
        blocks: BlockRanges = jax.tree.map(of_list, schedule.kv_blocks)
        return dataclasses.replace(schedule, kv_blocks=blocks, is_selection=False)

    def options(self, options: Options) -> Options:
        """Those of the call, and that no blocks are made one."""
        return dataclasses.replace(options, block_sizes=self.lists.schedule.block_sizes)

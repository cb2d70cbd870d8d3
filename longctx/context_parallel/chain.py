"""The states of linear attention along a sequence that is split over devices.

A device holds one run of neighbouring tokens, or for zigzag two. What a run does to a state is a map
`after = decay * before + value` (LinearState; of the delta rule decay is a matrix), and maps of neighbouring runs
combine, in order, to that of both. So the state before each run is an exclusive scan of the maps over the devices: in
round i a device receives from 2^i before it the map of the 2^i runs that end there, and has then that of the 2^(i + 1)
- 1 runs before its own. ceil(log2 P) rounds do for any P. The first device's map holds the state before the row;
nobody sends beyond the ends, and the zeros that arrive there are a map that forgets, which is what there is before a
row.

The matrices of the delta rule make a map of H (H + V) numbers a head in place of H V + 1, and combine by a matmul.

The second runs of zigzag follow each other from the last device to the first, and the last has what comes before them:
the state after its own first run. Cotangents of states go the same way back.
"""

import dataclasses

import jax
import jax.numpy as jnp

from longctx.context_parallel.layout import Layout
from pallas_kernels.linear.state import LinearState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """The runs of a row, R on each of P devices; hashable. Run i of the devices goes up their order if i is even, else
    down, and run i + 1 goes on where run i ends.

    Attributes:
      axes: The mesh axes that the devices are on; () where nothing is run, but planned.
      degree: Devices, P > 1.
      num_runs: Runs of a device, R.
    """

    axes: tuple[str, ...] = ()
    degree: int
    num_runs: int

    @classmethod
    def of(cls, layout: Layout, degree: int, axes: tuple[str, ...] = ()) -> "Chain":
        """The chain of a layout whose devices hold runs."""
        return cls(axes=axes, degree=degree, num_runs=layout.runs(degree).shape[1])

    @property
    def num_permutes(self) -> int:
        """What it takes to go along the chain in one direction, one after the other."""
        return self.num_runs * (self.degree - 1).bit_length()

    def reached(self, segment_ids: jax.Array) -> jax.Array:
        """Whether the state before each run is that of its first token's document, bool `[B or 1, R]`; per shard.

        Sends R times 4 bytes a row.

        Args:
          segment_ids: Of this device's tokens, `[B or 1, T / P]`, its runs one after the other.
        """
        # Negative ids are padding, which is one document (pallas_kernels.linear.documents).
        ids = jnp.maximum(segment_ids, -1).reshape(segment_ids.shape[0], self.num_runs, -1)
        first, last = ids[:, :, 0], ids[:, :, -1]
        begins_row = self._is_first(True) & (jnp.arange(self.num_runs) == 0)
        return (first == self.of_runs_before(last)) | begins_row

    def of_runs_before(self, x: jax.Array) -> jax.Array:
        """Of `x`, which is of each run, `[B, R, ...]`, that of the run before each; zeros before a row; per shard.

        Sends each run's once.
        """
        before = []
        for run in range(self.num_runs):
            upward = run % 2 == 0
            turned = x[:, run - 1] if run else jnp.zeros_like(x[:, 0])
            before.append(jnp.where(self._is_first(upward), turned, self._from_before(x[:, run], 1, upward)))
        return jnp.stack(before, axis=1)

    def to_runs_before(self, x: jax.Array) -> jax.Array:
        """The transpose of `of_runs_before`: each run gets what the run after it has for it; zeros after a row."""
        after = [jnp.zeros_like(x[:, 0])] * self.num_runs
        for run in range(self.num_runs):
            upward = run % 2 == 0
            after[run] = after[run] + self._from_before(x[:, run], 1, not upward)
            if run:
                turned = jnp.where(self._is_first(upward), x[:, run], jnp.zeros_like(x[:, run]))
                after[run - 1] = after[run - 1] + turned
        return jnp.stack(after, axis=1)

    def states_before(self, runs: LinearState, reached: jax.Array | None, initial: jax.Array | None) -> jax.Array:
        """The state before each of this device's runs, float32 `[B, R, N, H, V]`; per shard.

        Args:
          runs: What they do to a state, value `[B, R, N, H, V]`.
          reached: From `reached`; None where a row is one document.
          initial: The state before the row, `[B, N, H, V]`; None is zero.
        """
        if reached is not None:
            runs = dataclasses.replace(runs, decay=_where(reached, runs.decay))
        before = self._along(runs, initial, backward=False)
        return before if reached is None else _where(reached, before)

    def cotangents_after(self, runs: LinearState, reached: jax.Array | None, last: jax.Array | None) -> jax.Array:
        """The cotangent of the state after each of this device's runs, float32 `[B, R, N, H, V]`; per shard.

        Args:
          runs: What they do to a cotangent on its way back, value `[B, R, N, H, V]`.
          reached: As for `states_before`.
          last: The cotangent of the state after the row, `[B, N, H, V]`; None is zero.
        """
        if reached is not None:
            runs = LinearState(value=_where(reached, runs.value), decay=_where(reached, runs.decay))
        return self._along(runs, last, backward=True)

    def of_last_run(self, x: jax.Array) -> jax.Array:
        """Of `[B, R, ...]` that of the last run of the row, `[B, ...]`, on every device; per shard."""
        at_the_end = self._is_first(self.num_runs % 2 == 0)
        return jax.lax.psum(jnp.where(at_the_end, x[:, -1], 0.0), self.axes)

    def of_first_run(self, x: jax.Array) -> jax.Array:
        """Of `[B, R, ...]` that of the first run of the row, `[B, ...]`, on every device; per shard."""
        return jax.lax.psum(jnp.where(self._is_first(True), x[:, 0], 0.0), self.axes)

    def _along(self, runs: LinearState, first: jax.Array | None, *, backward: bool) -> jax.Array:
        """What arrives at each run where `first` comes in at the end that the chain is gone along from."""
        arrives = {}
        entering = jnp.zeros_like(runs.value[:, 0]) if first is None else first
        for run in reversed(range(self.num_runs)) if backward else range(self.num_runs):
            own = jax.tree.map(lambda x, run=run: x[:, run], runs)
            arrives[run] = self._before_each(own, entering, upward=(run % 2 == 0) != backward)
            entering = own.apply(arrives[run])  # read by the device alone where the chain turns round
        return jnp.stack([arrives[run] for run in range(self.num_runs)], axis=1)

    def _before_each(self, own: LinearState, first: jax.Array, *, upward: bool) -> jax.Array:
        """Exclusive scan over the devices, `[B, N, H, V]`; `first` is read by the first of them alone."""
        at_the_start = self._is_first(upward)
        # Of the runs before this one, and of them and this one, as many as are known.
        with_own = dataclasses.replace(own, value=own.apply(jnp.where(at_the_start, first, 0.0)))
        before = None
        for i in range((self.degree - 1).bit_length()):
            received = self._received(with_own, 2**i, upward)
            before = received if before is None else received.combine(before)
            with_own = received.combine(with_own)
        return jnp.where(at_the_start, first, before.value)

    def _received(self, state: LinearState, distance: int, upward: bool) -> LinearState:
        """The map of the device so far before this one, value and decay in one message; zeros if there is none."""
        flat = [x.reshape(*x.shape[:2], -1) for x in (state.value, state.decay)]
        received = self._from_before(jnp.concatenate(flat, axis=2), distance, upward)
        value, decay = jnp.split(received, [flat[0].shape[2]], axis=2)
        return LinearState(value=value.reshape(state.value.shape), decay=decay.reshape(state.decay.shape))

    def _from_before(self, x: jax.Array, distance: int, upward: bool) -> jax.Array:
        pairs = [(rank, rank + distance) for rank in range(self.degree - distance)]
        return jax.lax.ppermute(x, self.axes, pairs if upward else [pair[::-1] for pair in pairs])

    def _is_first(self, upward: bool) -> jax.Array:
        return jax.lax.axis_index(self.axes) == (0 if upward else self.degree - 1)


def _where(reached: jax.Array, x: jax.Array) -> jax.Array:
    """`x`, `[B, R, ...]`, with zeros where `reached`, `[B or 1, R]`, is not true."""
    return jnp.where(reached.reshape(*reached.shape, *(1,) * (x.ndim - 2)), x, 0.0)

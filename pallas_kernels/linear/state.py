"""The state of linear attention over a run of tokens, and how those of runs that follow each other combine."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tokens import Leaf


class Passed(NamedTuple):
    """What a forward pass gives.

    Attributes:
      out: The result, `[B, T, N, V]`.
      state: After the last token, float32 `[B, N, H, V]`.
      starts: Before each of P equal parts of the run, float32 `[B, P, N, H, V]`.
      among: What the tokens of a chunk are to each other, which its implementation would have to make again in the
        backward pass; None where it makes nothing of the kind.
    """

    out: jax.Array
    state: jax.Array
    starts: jax.Array
    among: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearState:
    """What a run of tokens does to a state: `after = decay * before + value`, an associative map.

    Attributes:
      value: The state after the run where it was zero before it, float32 [..., N, H, V].
      decay: The factor with which a state from before the run arrives after it, float32 [..., N], or [..., N, H] where
        each row of the state decays on its own, or of the delta rule a matrix [..., N, H, H]. Zero where a document
        begins inside the run.
    """

    value: Leaf
    decay: Leaf

    def apply(self, before: jax.Array) -> jax.Array:
        """The state after the run, given that before it."""
        return self._times(before) + self.value

    def combine(self, later: "LinearState") -> "LinearState":
        """The map of this run and the one after it."""
        decay = later._times(self.decay) if later._is_matrix else self.decay * later.decay
        return LinearState(value=later.apply(self.value), decay=decay)

    @property
    def _is_matrix(self) -> bool:
        return self.decay.ndim == self.value.ndim

    def _times(self, x: jax.Array) -> jax.Array:
        """The factor times [..., N, H, columns]."""
        if self._is_matrix:
            # Float32 in full, as states are: left to itself XLA takes TF32 on a GPU and bfloat16 on a TPU.
            return jnp.matmul(self.decay, x, precision=jax.lax.Precision.HIGHEST)
        missing = self.value.ndim - self.decay.ndim
        return self.decay.reshape(*self.decay.shape, *(1,) * missing) * x


_UNROLL = 16


def before_each(parts: LinearState, initial: jax.Array | None, *, reverse: bool = False) -> tuple[jax.Array, jax.Array]:
    """The state before each of P parts of a row that follow each other, and the one after them all.

    Args:
      parts: Maps of the parts, value [B, P, N, H, V].
      initial: The state before the first part, [B, N, H, V]; None is zero.
      reverse: Whether the parts follow each other from the last to the first, as cotangents of states do.
    Returns: float32 [B, P, N, H, V] and [B, N, H, V].
    Cost: P steps over one state.
    """
    first = jnp.zeros_like(parts.value[:, 0]) if initial is None else initial

    def step(state, part):
        return part.apply(state), state

    along = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), parts)
    # Few parts are one fused kernel; a loop's steps would each cost more to start than to run.
    last, before = jax.lax.scan(step, first, along, reverse=reverse, unroll=_UNROLL)
    return jnp.moveaxis(before, 0, 1), last


def total(parts: LinearState, *, reverse: bool = False) -> LinearState:
    """The map of all P parts of a row together: value [B, N, H, V].

    Cost: as `before_each`, and P - 1 products of matrices where decays are matrices.
    """
    if parts.decay.ndim == parts.value.ndim:
        each = [jax.tree.map(lambda x, part=part: x[:, part], parts) for part in range(parts.value.shape[1])]
        return functools.reduce(LinearState.combine, reversed(each) if reverse else each)
    _, value = before_each(parts, None, reverse=reverse)
    return LinearState(value=value, decay=jnp.prod(parts.decay, axis=1))

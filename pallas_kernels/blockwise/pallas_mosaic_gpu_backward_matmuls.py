"""The matmuls of a step of the fused backward kernel on Hopper GPUs: on tensor cores (../wgmma_backward.py), or as the
interpreter can do them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import wgmma_backward
from pallas_kernels.mosaic_gpu import arrive
from pallas_kernels.wgmma import ROWS, Arrival

PIECE = 64
"""Rows and columns of what a consumer computes of a tile of dq."""


class Matmuls:
    """Of one of the two consumers, with 64 keys of a block of 128.

    `wgmma_backward` says what each does; what is in flight there is done here, where it interprets.
    """

    def __init__(self, shared: Any, *, warpgroup: jax.typing.ArrayLike, interpret: bool):
        """
        Args:
          shared: Its k and v `[128, H]`, q and dout `[slots, tile, H]` and ds `[slots, 2, 64, tile]`.
        """
        self.shared, self.warpgroup, self.interpret = shared, warpgroup, interpret
        self.two_parts = shared.q.shape[1] == 2 * ROWS

    def scores(self, slot):
        shared, at = self.shared, {"warpgroup": self.warpgroup, "slot": slot}
        if not self.interpret:
            return wgmma_backward.scores(shared.k, shared.v, shared.q, shared.dout, **at)
        mine = pl.ds(self.warpgroup * ROWS, ROWS)
        s, dp = (_dot(x.at[mine][...], y[slot].T) for x, y in ((shared.k, shared.q), (shared.v, shared.dout)))
        return s, dp[:, :ROWS]

    def settle(self, in_flight, x):
        return (in_flight, x) if self.interpret else wgmma_backward.settle(in_flight, x)

    def more(self, slot, dv, p):
        shared, at = self.shared, {"warpgroup": self.warpgroup, "slot": slot}
        if not self.interpret:
            return wgmma_backward.more(dv, p, shared.v, shared.dout, **at)
        dout = shared.dout[slot]
        return _dot(shared.v.at[pl.ds(self.warpgroup * ROWS, ROWS)][...], dout[ROWS:].T), dv + _dot(p, dout)

    def gradients(self, slot, dv, dk, p, ds, before):
        """This warpgroup's piece of dq of slot `before`, or None, and in flight dv, if still to be done, and dk."""
        shared, at = self.shared, {"warpgroup": self.warpgroup, "slot": slot}
        if not self.interpret:
            dv_and_p = None if self.two_parts else (dv, p)
            of_dq = None if before is None else (shared.ds, before, shared.k)
            return wgmma_backward.gradients(dk, ds, dv_and_p, shared.q, shared.dout, of_dq, **at)
        dq = None if before is None else self.dq(before)
        in_flight = [] if self.two_parts else [dv + _dot(p, shared.dout[slot])]
        in_flight.append(dk + _dot(jnp.concatenate(ds, axis=1), shared.q[slot]))
        plgpu.commit_smem()  # ordinary reads, which a copy may overwrite only behind a fence
        return dq, in_flight

    def dq(self, slot):
        """This warpgroup's piece, float32 `[64, 64]`."""
        shared = self.shared
        if not self.interpret:
            return wgmma_backward.dq_alone(shared.ds, shared.k, warpgroup=self.warpgroup, slot=slot)
        ds_of_both = shared.ds[slot].reshape(2 * ROWS, -1)
        dq = _dot(ds_of_both.T, shared.k[...]).reshape(-1, PIECE, shared.k.shape[1])
        if self.two_parts:
            return lax.dynamic_index_in_dim(dq, self.warpgroup, keepdims=False)
        return lax.dynamic_slice_in_dim(dq[0], self.warpgroup * PIECE, PIECE, axis=1)

    def finish(self, dv, in_flight: list, free: Arrival):
        """dv and dk, of what `gradients` left in flight."""
        if self.interpret:
            arrive(*free)
        else:
            in_flight = wgmma_backward.finish(in_flight, free)
        *of_dv, dk = in_flight
        return of_dv[0] if of_dv else dv, dk


def _dot(x, y) -> jax.Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)

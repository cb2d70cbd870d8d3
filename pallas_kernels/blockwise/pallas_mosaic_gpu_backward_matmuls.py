"""The matmuls of a step of the fused backward kernel on Hopper GPUs: on tensor cores (../wgmma_backward.py and
../wgmma_backward_wide.py), or as the interpreter can do them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import wgmma_backward, wgmma_backward_wide
from pallas_kernels.mosaic_gpu import arrive
from pallas_kernels.wgmma import ROWS, Arrival

PIECE = 64
"""Rows and columns of what a consumer computes of a tile of dq at a time."""


class Matmuls:
    """Of one of the two consumers, with 64 keys of a block of 128.

    `wgmma_backward` says what each does; what is in flight there is done here, where it interprets.
    """

    def __init__(self, shared: Any, *, warpgroup: jax.typing.ArrayLike, interpret: bool):
        """
        Args:
          shared: Its k and v `[128, H]` and `[128, V]`, q and dout `[slots, tile, H]` and `[slots, tile, V]`, and ds
            `[slots, 2, 64, tile]`.
        """
        self.shared, self.warpgroup, self.interpret = shared, warpgroup, interpret
        self.two_parts = shared.q.shape[1] == 2 * ROWS

    def scores(self, slot, rows=None):
        shared, at = self.shared, {"warpgroup": self.warpgroup, "slot": slot}
        if not self.interpret:
            return wgmma_backward.scores(shared.k, shared.v, shared.q, shared.dout, **at, rows=rows)
        mine, queries = pl.ds(self.warpgroup * ROWS, ROWS), pl.ds(*(rows or (0, shared.q.shape[1])))
        pairs = (shared.k, shared.q), (shared.v, shared.dout)
        s, dp = (_dot(x.at[mine][...], y.at[slot, queries][...].T) for x, y in pairs)
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
        dq = None if before is None else self.dq(before, self.warpgroup)
        in_flight = [] if self.two_parts else [dv + _dot(p, shared.dout[slot])]
        in_flight.append(dk + _dot(jnp.concatenate(ds, axis=1), shared.q[slot]))
        plgpu.commit_smem()  # ordinary reads, which a copy may overwrite only behind a fence
        return dq, in_flight

    def dq(self, slot, piece):
        """A piece, float32 `[64, 64]`: of 64 columns, at head dim 64 of 64 queries."""
        shared = self.shared
        if not self.interpret:
            return wgmma_backward.dq_alone(shared.ds, shared.k, slot=slot, piece=piece)
        ds_of_both = shared.ds[slot].reshape(2 * ROWS, -1)
        dq = _dot(ds_of_both.T, shared.k[...])
        return lax.dynamic_slice_in_dim(dq, piece * PIECE, PIECE, axis=0 if self.two_parts else 1)

    def finish(self, dv, in_flight: list, free: Arrival):
        """dv and dk, of what `gradients` left in flight."""
        if self.interpret:
            arrive(*free)
        else:
            in_flight = wgmma_backward.finish(in_flight, free)
        *of_dv, dk = in_flight
        return of_dv[0] if of_dv else dv, dk


class WideMatmuls(Matmuls):
    """With head dims of 192 and values of 128, where registers hold less at a time."""

    def store_half(self, slot, first, ds) -> None:
        """dS of 32 queries from `first` on to shared memory."""
        if self.interpret:
            self.shared.ds.at[slot, self.warpgroup, :, pl.ds(first, ds.shape[1])][...] = ds
        else:
            wgmma_backward_wide.store_half(self.shared.ds, ds, first, warpgroup=self.warpgroup, slot=slot)

    def beside(self, x, y):
        return jnp.concatenate((x, y), axis=1) if self.interpret else wgmma_backward_wide.beside(x, y)

    def own_gradients(self, slot, dv, p, dk):
        """dv with that of a tile added, and in flight dk."""
        shared, at = self.shared, {"warpgroup": self.warpgroup, "slot": slot}
        if not self.interpret:
            return wgmma_backward_wide.own_gradients(dv, p, dk, shared.ds, shared.q, shared.dout, **at)
        return dv + _dot(p, shared.dout[slot]), dk + _dot(shared.ds[slot, self.warpgroup], shared.q[slot])

    def behind(self, dk, before, piece, free: Arrival):
        """dk, of what `own_gradients` left in flight, and a piece of dq of slot `before`, or None of None."""
        if not self.interpret:
            if before is None:
                return *wgmma_backward.finish([dk], free), None
            return wgmma_backward_wide.behind(dk, free, self.shared.ds, self.shared.k, slot=before, piece=piece)
        plgpu.commit_smem()  # ordinary reads, which a copy may overwrite only behind a fence
        arrive(*free)
        return dk, None if before is None else self.dq(before, piece)


def _dot(x, y) -> jax.Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)

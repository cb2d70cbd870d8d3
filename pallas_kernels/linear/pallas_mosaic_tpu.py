"""Linear attention by a Mosaic TPU kernel: which calls it serves, and how a call reaches it.

A TPU core works through the grid one step after the other, so a row is swept in one part: there is nothing to fill.

Reference: see pallas_mosaic_tpu_sweep.py.
"""

import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.linear.options import Options, kind_of
from pallas_kernels.linear.pallas_mosaic_tpu_sweep import CHUNK, SNAPSHOT_CHUNKS, maps, sweep
from pallas_kernels.linear.state import LinearState
from pallas_kernels.linear.sweeps import Primitives

HEAD_DIMS = (64, 128, 192, 256)

_PRIMITIVES = Primitives(
    chunk=CHUNK, snapshot_chunks=SNAPSHOT_CHUNKS, num_parts=lambda B, N, T: 1, maps=maps, sweep=sweep
)  # fmt: skip


def forward(q, k, v, *, decay, beta, initial_state, segment_ids, parts, options: Options):
    """`linear_attention_forward` on a TPU."""
    _check_call(decay, beta, q=q, k=k, v=v)
    return _PRIMITIVES.forward(
        q, k, v, decay=decay, initial_state=initial_state, segment_ids=segment_ids, parts=parts, options=options
    )


def backward(q, k, v, dout, dstate, *, decay, beta, initial_state, segment_ids, starts, among, parts, options: Options):
    """`linear_attention_backward` on a TPU."""
    del among
    _check_call(decay, beta, q=q, k=k, v=v)
    return _PRIMITIVES.backward(
        q, k, v, dout.astype(v.dtype), dstate, decay=decay, initial_state=initial_state, segment_ids=segment_ids,
        starts=starts, parts=parts, options=options,
    )  # fmt: skip


def states(k, v, *, decay, segment_ids, options: Options) -> LinearState:
    """`linear_attention_states` on a TPU."""
    del options
    _check_call(decay, None, k=k, v=v)
    return _PRIMITIVES.states(k, v, decay=decay, segment_ids=segment_ids)


def state_cotangents(q, dout, *, decay, segment_ids, options: Options) -> LinearState:
    """`linear_attention_state_cotangents` on a TPU."""
    _check_call(decay, None, k=q, v=dout)
    return _PRIMITIVES.state_cotangents(q, dout, decay=decay, segment_ids=segment_ids, options=options)


def _check_call(decay, beta, **arrays) -> None:
    """Refuses what the kernel does not serve."""
    platform = dispatch.current_platform()
    if platform != "tpu":
        raise NotImplementedError(f"mosaic_tpu: the platform is {platform}, wanted tpu")
    if beta is not None:
        raise NotImplementedError("mosaic_tpu: beta, the delta rule, wanted None")
    if kind_of(decay) == "vector":
        raise NotImplementedError(f"mosaic_tpu: a decay for each dim, {decay.shape}, wanted [N], [B, T, N] or None")
    k, v = arrays["k"], arrays["v"]
    if v.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"mosaic_tpu: q, k and v are {v.dtype}, wanted bfloat16 or float32")
    for name, x in (("q and k", k), ("v", v)):
        if x.shape[3] not in HEAD_DIMS:
            raise NotImplementedError(f"mosaic_tpu: the head dim of {name} is {x.shape[3]}, wanted one of {HEAD_DIMS}")

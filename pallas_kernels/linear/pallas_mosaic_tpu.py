"""Linear attention by a Mosaic TPU kernel: which calls it serves, and how a call reaches it.

A TPU core works through the grid one step after the other, so a row is swept in one part: there is nothing to fill.
What a run of tokens does to a state that decays by each dim is one matmul a chunk, which is left to XLA.

Reference: see pallas_mosaic_tpu_sweep.py and, for decays of each dim and delta rules, pallas_mosaic_tpu_scan.py.
"""

import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.linear import pallas_mosaic_tpu_scan as scan
from pallas_kernels.linear import xla_scan
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
    _check_call(q=q, k=k, v=v)
    if not _is_swept(decay, beta):
        call = {"initial_state": initial_state, "segment_ids": segment_ids, "options": options}
        return scan.forward(q, k, v, decay=decay, beta=beta, **call)
    return _PRIMITIVES.forward(
        q, k, v, decay=decay, initial_state=initial_state, segment_ids=segment_ids, parts=parts, options=options
    )


def backward(q, k, v, dout, dstate, *, decay, beta, initial_state, segment_ids, starts, among, parts, options: Options):
    """`linear_attention_backward` on a TPU."""
    del among
    _check_call(q=q, k=k, v=v)
    if not _is_swept(decay, beta):
        call = {"initial_state": initial_state, "segment_ids": segment_ids, "options": options}
        return scan.backward(q, k, v, dout, dstate, decay=decay, beta=beta, **call)
    return _PRIMITIVES.backward(
        q, k, v, dout.astype(v.dtype), dstate, decay=decay, initial_state=initial_state, segment_ids=segment_ids,
        starts=starts, parts=parts, options=options,
    )  # fmt: skip


def states(k, v, *, decay, segment_ids, options: Options) -> LinearState:
    """`linear_attention_states` on a TPU."""
    del options
    _check_call(k=k, v=v)
    if kind_of(decay) == "vector":
        return xla_scan.states(k, v, decay=decay, segment_ids=segment_ids)
    return _PRIMITIVES.states(k, v, decay=decay, segment_ids=segment_ids)


def state_cotangents(q, dout, *, decay, segment_ids, options: Options) -> LinearState:
    """`linear_attention_state_cotangents` on a TPU."""
    _check_call(k=q, v=dout)
    if kind_of(decay) == "vector":
        return xla_scan.state_cotangents(q, dout, decay=decay, segment_ids=segment_ids, options=options)
    return _PRIMITIVES.state_cotangents(q, dout, decay=decay, segment_ids=segment_ids, options=options)


def _is_swept(decay, beta) -> bool:
    return beta is None and kind_of(decay) != "vector"


def _check_call(**arrays) -> None:
    """Refuses what the kernel does not serve."""
    platform = dispatch.current_platform()
    if platform != "tpu":
        raise NotImplementedError(f"mosaic_tpu: the platform is {platform}, wanted tpu")
    k, v = arrays["k"], arrays["v"]
    if v.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"mosaic_tpu: q, k and v are {v.dtype}, wanted bfloat16 or float32")
    for name, x in (("q and k", k), ("v", v)):
        if x.shape[3] not in HEAD_DIMS:
            raise NotImplementedError(f"mosaic_tpu: the head dim of {name} is {x.shape[3]}, wanted one of {HEAD_DIMS}")

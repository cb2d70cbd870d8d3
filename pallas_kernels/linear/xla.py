"""Linear attention by chunks, in XLA: on any backend, of any length, in memory linear in T."""

import jax.numpy as jnp

from pallas_kernels.linear import xla_scan
from pallas_kernels.linear.options import Options, kind_of
from pallas_kernels.linear.state import LinearState
from pallas_kernels.linear.xla_sweep import PRIMITIVES


def forward(q, k, v, *, decay, beta, initial_state, segment_ids, parts, options: Options):
    """As `api.linear_attention_forward`."""
    call = {"decay": decay, "initial_state": initial_state, "segment_ids": segment_ids, "options": options}
    if _is_swept(decay, beta):
        return PRIMITIVES.forward(q, k, v, parts=parts, **call)
    return xla_scan.forward(q, k, v, beta=beta, **call)


def backward(q, k, v, dout, dstate, *, decay, beta, initial_state, segment_ids, starts, among, parts, options: Options):
    """As `api.linear_attention_backward`."""
    del among
    call = {"decay": decay, "initial_state": initial_state, "segment_ids": segment_ids, "options": options}
    # The gradient of a decay by sweeps is a difference, of which float32 inputs want more than is left.
    wants_exact_decay = decay is not None and options.decay_gradient and v.dtype == jnp.float32
    if _is_swept(decay, beta) and not wants_exact_decay:
        return PRIMITIVES.backward(q, k, v, dout, dstate, starts=starts, parts=parts, **call)
    return xla_scan.backward(q, k, v, dout, dstate, beta=beta, **call)


def states(k, v, *, decay, segment_ids, options: Options) -> LinearState:
    """As `api.linear_attention_states`."""
    del options
    family = PRIMITIVES if _is_swept(decay, None) else xla_scan
    return family.states(k, v, decay=decay, segment_ids=segment_ids)


def state_cotangents(q, dout, *, decay, segment_ids, options: Options) -> LinearState:
    """As `api.linear_attention_state_cotangents`."""
    family = PRIMITIVES if _is_swept(decay, None) else xla_scan
    return family.state_cotangents(q, dout, decay=decay, segment_ids=segment_ids, options=options)


def _is_swept(decay, beta) -> bool:
    """Whether a state's rows decay as one and nothing is corrected: then every gradient is a sweep of its own, which
    costs less than to differentiate a scan."""
    return beta is None and kind_of(decay) != "vector"

"""Linear attention token by token, in float32: what every implementation is compared with."""

import jax
import jax.numpy as jnp

from pallas_kernels.linear.documents import boundaries
from pallas_kernels.linear.options import Options
from pallas_kernels.linear.state import LinearState, Passed


def forward(q, k, v, *, decay, beta, initial_state, segment_ids, parts, options: Options):
    """The recurrence as it stands.

    S = exp(decay[t]) S;  S += beta[t] k[t] (v[t] - k[t]^T S)^T  or  S += k[t] v[t]^T;  out[t] = scale q[t]^T S

    Reference: without decay and beta Katharopoulos et al. 2020, arXiv:2006.16236, equations 16 - 20; with a scalar
      decay Sun et al. 2023, RetNet, arXiv:2307.08621, equation 6; with a vector Yang et al. 2024, GLA,
      arXiv:2312.06635, equation 3; with beta Yang et al. 2024, DeltaNet, arXiv:2406.06484, section 2.2, and
      Gated DeltaNet, arXiv:2412.06464, equation 10.
    """
    del parts
    (B, T, N, V), H = v.shape, q.shape[3]
    q, k = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (q, k))
    gone = jnp.expm1(_logs(decay, (B, T, N, H)))
    keeps, real = boundaries(segment_ids, B, T)
    state = jnp.zeros((B, N, H, V)) if initial_state is None else initial_state

    def step(state, token):
        q, k, v, gone, beta, keeps, real = token
        k, q = (jnp.where(real[:, None, None], x, 0.0) for x in (k, q))
        state = jnp.where(keeps[:, None, None, None], state, 0.0)
        # exp(decay), had it been rounded, would after a thousand weak decays be off by a thousand roundings.
        state = state + gone[..., None] * state
        if beta is not None:
            v = beta[..., None] * (v - jnp.einsum("bnh,bnhv->bnv", k, state))
        state = state + k[..., None] * v[..., None, :]
        return state, options.scale * jnp.einsum("bnh,bnhv->bnv", q, state)

    tokens = tuple(x if x is None else jnp.asarray(x, jnp.float32) for x in (q, k, v, gone, beta))
    along = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (*tokens, keeps, real))
    final, out = jax.lax.scan(step, state, along)
    return Passed(jnp.moveaxis(out, 0, 1).astype(v.dtype), final, state[:, None])


def backward(
    q, k, v, dout, dstate, *, decay, beta, initial_state, segment_ids, starts, among, parts, options: Options
):  # fmt: skip
    """The derivative of `forward` by JAX."""
    del starts, among, parts
    decay, beta = (None if x is None else x.astype(jnp.float32) for x in (decay, beta))
    shape = q.shape[0], v.shape[2], q.shape[3], v.shape[3]
    initial_state, dstate = (jnp.zeros(shape) if x is None else x for x in (initial_state, dstate))

    def run(q, k, v, decay, beta, initial_state):
        passed = forward(
            q, k, v, decay=decay, beta=beta, initial_state=initial_state, segment_ids=segment_ids, parts=None,
            options=options,
        )  # fmt: skip
        return passed.out, passed.state

    _, vjp = jax.vjp(run, q, k, v, decay, beta, initial_state)
    dq, dk, dv, ddecay, dbeta, dinitial_state = vjp((dout, dstate))
    return dq, dk, dv, ddecay if options.decay_gradient else None, dbeta, dinitial_state


def states(k, v, *, decay, segment_ids, options: Options) -> LinearState:
    """The map of all tokens: the state they leave where it was zero, and what is left of one."""
    call = {"decay": decay, "beta": None, "segment_ids": segment_ids, "parts": None, "options": options}
    value = forward(k, k, v, initial_state=None, **call).state
    return LinearState(value=value[:, None], decay=_left(k, v, decay, segment_ids)[:, None])


def state_cotangents(q, dout, *, decay, segment_ids, options: Options) -> LinearState:
    """The cotangent of the state before all tokens that their outputs give it: forward is linear in that state."""
    zeros = jnp.zeros((*q.shape[:2], dout.shape[2], q.shape[3])), jnp.zeros(dout.shape)

    def run(initial_state):
        call = {"decay": decay, "beta": None, "segment_ids": segment_ids, "parts": None, "options": options}
        return forward(q, *zeros, initial_state=initial_state, **call)[0]

    before = jnp.zeros((q.shape[0], dout.shape[2], q.shape[3], dout.shape[3]))
    _, vjp = jax.vjp(run, before)
    return LinearState(
        value=vjp(dout.astype(jnp.float32))[0][:, None], decay=_left(q, dout, decay, segment_ids)[:, None]
    )


def _logs(decay, shape) -> jax.Array:
    """Log decays as float32 [B, T, N, H]."""
    if decay is None:
        return jnp.zeros(shape)
    logs = jnp.asarray(decay, jnp.float32)
    if logs.ndim == 1:
        logs = logs[None, None]
    return jnp.broadcast_to(logs if logs.ndim == 4 else logs[..., None], shape)


def _left(k, v, decay, segment_ids) -> jax.Array:
    (B, T, N, _), H = v.shape, k.shape[3]
    keeps, _ = boundaries(segment_ids, B, T)
    left = jnp.exp(jnp.sum(_logs(decay, (B, T, N, H)), axis=1))
    left = jnp.where(jnp.all(keeps, axis=1)[:, None, None], left, 0.0)
    return left if decay is not None and decay.ndim == 4 else left[..., 0]

"""Linear attention: the public ops of the family."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_qkv, check_results
from pallas_kernels.dispatch import Implementation
from pallas_kernels.linear import pallas_mosaic_gpu, pallas_mosaic_tpu, reference, xla
from pallas_kernels.linear.options import Options
from pallas_kernels.linear.state import LinearState
from pallas_kernels.linear.xla_chunks import multiply
from pallas_kernels.perturbed import is_perturbed, values_of
from pallas_kernels.saved import as_attention

_MODULES = {
    "mosaic_gpu": pallas_mosaic_gpu,
    "mosaic_tpu": pallas_mosaic_tpu,
    "xla": xla,
    "reference": reference,
}

FORWARD: Mapping = {name: module.forward for name, module in _MODULES.items()}
BACKWARD: Mapping = {name: module.backward for name, module in _MODULES.items()}
STATES: Mapping = {name: module.states for name, module in _MODULES.items()}
STATE_COTANGENTS: Mapping = {name: module.state_cotangents for name, module in _MODULES.items()}


class LinearGradients(NamedTuple):
    """Gradients of a linear attention's inputs; None where there was no such input.

    Attributes:
      dq, dk, dv: In the dtypes of q, k and v.
      ddecay: float32, of decay's shape; None where it was not asked for, too.
      dbeta: float32 [B, T, N].
      dinitial_state: float32 [B, N, H, V]; there even where the initial state was None, which is zero.
    """

    dq: Any
    dk: Any
    dv: Any
    ddecay: Any
    dbeta: Any
    dinitial_state: Any


def linear_attention(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N V"],
    *,
    decay: Float[Array, " N"] | Float[Array, "B T N"] | Float[Array, "B T N H"] | None = None,
    beta: Float[Array, "B T N"] | None = None,
    initial_state: Float32[Array, "B N H _"] | None = None,
    return_state: bool = False,
    segment_ids: Int32[Array, "#B T"] | None = None,
    scale: float | None = None,
    normalize: bool = False,
    bidirectional: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float32[Array, "B N H _"]]:
    """Attention by a state of fixed size, in time and memory linear in T; differentiable in every array of floats.

    S[t] = exp(decay[t]) S[t - 1] + k[t] v[t]^T,    out[t] = scale q[t]^T S[t]
    with beta, the delta rule:  S' = exp(decay[t]) S[t - 1],  S[t] = S' + beta[t] k[t] (v[t] - k[t]^T S')^T
    with normalize:             out[t] = q[t]^T S[t] / q[t]^T z[t],  z[t] = exp(decay[t]) z[t - 1] + k[t]

    Args:
      q: Queries; N is a multiple of K, and head n reads query and key head n // (N / K), as Mamba-2 shares them.
      k: Keys.
      v: Values.
      decay: Log of the factor by which a state decays before a token is written, <= 0: None for 0; [N] for one a head
        (retention, Lightning Attention); [B, T, N] for one a token (simple GLA, Mamba-2); [B, T, N, H] for one for
        each dim of the keys (GLA). Any float dtype, computed in float32.
      beta: Write strength of the delta rule, [B, T, N]; None adds what is written to what is there.
      initial_state: The state before the first token, which belongs to the first token's document; None is zero. With
        normalize its last dim is V + 1: z stands in the last column.
      return_state: Whether to return the state after the last token too, in the form of `initial_state`.
      segment_ids: Document of each token; the state is zero where a document begins, that is, where the id is not that
        of the token before. Negative is padding, which is neither written nor read.
      scale: Multiplies q; default H ** -0.5.
      normalize: Whether to divide by the sum of the weights. For weights that are not negative, such as those of
        positive features: where they cancel out the result is what a division by almost nothing is.
      bidirectional: Whether a token also reads what comes after it in its document, decayed by the same distance: for
        encoders. Takes no beta and no states.
      implementation: Which implementation to use; None takes the first of the platform's that serves the call.
    Returns: out in q's dtype, zero for padding; with return_state also the state, float32, whose cotangent is honoured.
    Raises: ValueError where the call is wrong; NotImplementedError where the named implementation does not serve it;
      ExceptionGroup with every reason where none does.
    Memory: O(B T N (H + V)) plus O(B N H V T / C) for states at chunks of C tokens, in the backward pass. From the
      forward pass `mosaic_gpu` keeps for a delta rule 256 bytes for each token and head.
    Cost: O(B T N (C (H + V) + H V)).
    Reference: Katharopoulos et al. 2020, Transformers are RNNs, arXiv:2006.16236; chunks: Yang et al. 2024, Gated
      Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635, section 2.2 and 4.
    """
    op = "linear_attention"
    options = _options(op, q, k, v, decay, beta, initial_state, segment_ids, scale, normalize)
    if bidirectional:
        if beta is not None or initial_state is not None or return_state:
            raise ValueError(
                f"{op}: bidirectional=True takes no beta, initial_state or return_state, which belong to one "
                "direction; leave them out"
            )

    def attend(q, k, v, initial_state, implementation=implementation):
        call = functools.partial(_attention, options, implementation)
        if bidirectional:
            return _both_directions(call, q, k, v, decay, segment_ids, options.scale), None
        return call(q, k, v, decay, beta, initial_state, segment_ids)

    out, state = normalized(attend, q, k, v, initial_state) if normalize else attend(q, k, v, initial_state)
    return (out, state) if return_state else out


def linear_attention_forward(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N V"],
    *,
    decay: Float[Array, " N"] | Float[Array, "B T N"] | Float[Array, "B T N H"] | None = None,
    beta: Float[Array, "B T N"] | None = None,
    initial_state: Float32[Array, "B N H V"] | None = None,
    segment_ids: Int32[Array, "#B T"] | None = None,
    parts: LinearState | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N V"], Float32[Array, "B N H V"], Float32[Array, "B P N H V"]]:
    """One forward pass over a run of tokens, given the state before it. Not differentiable by itself.

    Args:
      parts: What `linear_attention_states` of the same keys gave, if it was called; an implementation that works on
        several parts of the row at once then need not make it again. Of no use with beta.
      Others: as `linear_attention`.
    Returns: `(out, state, starts)`: the result; the state after the last token; the state before each of P equal parts
      of the run, which `linear_attention_backward` takes. How many is the implementation's choice.
    Raises: as `linear_attention`.
    """
    op = "linear_attention_forward"
    options = _options(op, q, k, v, decay, beta, initial_state, segment_ids, scale)
    passed = dispatch.run(
        op, FORWARD, implementation, q, k, v, decay=decay, beta=beta, initial_state=initial_state,
        segment_ids=segment_ids, parts=parts if beta is None else None, options=options,
    )  # fmt: skip
    return passed.out, passed.state, passed.starts


def linear_attention_backward(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N V"],
    dout: Float[Array, "B T N V"],
    dstate: Float32[Array, "B N H V"] | None,
    *,
    decay: Float[Array, " N"] | Float[Array, "B T N"] | Float[Array, "B T N H"] | None = None,
    beta: Float[Array, "B T N"] | None = None,
    initial_state: Float32[Array, "B N H V"] | None = None,
    segment_ids: Int32[Array, "#B T"] | None = None,
    starts: Float32[Array, "B P N H V"] | None = None,
    parts: LinearState | None = None,
    scale: float | None = None,
    decay_gradient: bool = True,
    implementation: Implementation | None = None,
) -> LinearGradients:
    """One backward pass over a run of tokens, given the cotangent of the state after it.

    Args:
      dout: Cotangent of out.
      dstate: Cotangent of the state after the last token, which is all that later runs make of it; None is zero.
      starts: What the forward pass returned; None, or that of another implementation, makes it again.
      parts: What `linear_attention_state_cotangents` of the same queries gave, if it was called.
      decay_gradient: Whether to give the gradient of decay; that of a constant is left out, with the work for it.
      Others: as `linear_attention`.
    Returns: the gradients; those of decay and beta are of this run's tokens alone, so that a decay of a head is to be
      summed over all runs.
    Raises: as `linear_attention`.
    """
    op = "linear_attention_backward"
    options = _options(op, q, k, v, decay, beta, initial_state, segment_ids, scale)
    check_results(op, v.shape, out={"dout": dout}, lse={})
    state_shape = v.shape[0], v.shape[2], q.shape[3], v.shape[3]
    if dstate is not None and (dstate.shape != state_shape or dstate.dtype != jnp.float32):
        raise ValueError(f"{op}: dstate is {dstate.dtype}{list(dstate.shape)}, wanted float32{list(state_shape)}")
    options = dataclasses.replace(options, decay_gradient=decay_gradient)
    gradients = dispatch.run(
        op, BACKWARD, implementation, q, k, v, dout, dstate, decay=decay, beta=beta, initial_state=initial_state,
        segment_ids=segment_ids, starts=starts, among=None, parts=parts if beta is None else None, options=options,
    )  # fmt: skip
    return LinearGradients(*gradients)


def linear_attention_states(
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N V"],
    *,
    decay: Float[Array, " N"] | Float[Array, "B T N"] | Float[Array, "B T N H"] | None = None,
    beta: Float[Array, "B T N"] | None = None,
    segment_ids: Int32[Array, "#B T"] | None = None,
    implementation: Implementation | None = None,
) -> LinearState:
    """What runs of tokens do to a state, without any output: one pass over k and v.

    With beta the factors are matrices, and the map is made of two forward passes, by whatever implementation serves
    these: one from a state of zero, and one that writes no values from the identity.

    Args: as `linear_attention`.
    Returns: the maps of P equal parts of the row, value [B, P, N, H, V]; P is the implementation's choice, 1 with beta.
      `state.total` is that of the row, which is what context parallelism sends.
    Raises: as `linear_attention`.
    """
    op = "linear_attention_states"
    options = _options(op, k, k, v, decay, beta, None, segment_ids, None)
    if beta is None:
        return dispatch.run(op, STATES, implementation, k, v, decay=decay, segment_ids=segment_ids, options=options)
    tokens = {"decay": decay, "beta": beta, "segment_ids": segment_ids, "implementation": implementation}
    _, value, _ = linear_attention_forward(k, k, v, **tokens)
    _, factor = _from_identity(k, k, v, **tokens)
    return LinearState(value=value[:, None], decay=factor[:, None])


def linear_attention_state_cotangents(
    q: Float[Array, "B T K H"],
    dout: Float[Array, "B T N V"],
    *,
    k: Float[Array, "B T K H"] | None = None,
    decay: Float[Array, " N"] | Float[Array, "B T N"] | Float[Array, "B T N H"] | None = None,
    beta: Float[Array, "B T N"] | None = None,
    segment_ids: Int32[Array, "#B T"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> LinearState:
    """What runs of tokens do to the cotangent of a state on its way back: one pass over q and dout.

    With beta it is one forward pass, as of `linear_attention_states`: what queries read of the identity is how they
    read a state before the row.

    Args:
      k: The keys, which the delta rule, beta, erases by; without it they say nothing here.
      Others: as `linear_attention_backward`.
    Returns: the maps of P equal parts of the row, in the order of the tokens: value is the cotangent of the state
      before the part that the part's outputs give it, and decay what is left there of the cotangent of the state after
      it. With beta P is 1.
    Raises: as `linear_attention`; ValueError where beta is given without k.
    """
    op = "linear_attention_state_cotangents"
    if beta is not None and k is None:
        raise ValueError(f"{op}: got beta without k, wanted the keys by which the delta rule erases; pass k")
    options = _options(op, q, q if k is None else k, dout, decay, beta, None, segment_ids, scale)
    if beta is None:
        return dispatch.run(
            op, STATE_COTANGENTS, implementation, q, dout, decay=decay, segment_ids=segment_ids, options=options
        )
    tokens = {"decay": decay, "beta": beta, "segment_ids": segment_ids, "implementation": implementation}
    reads, factor = _from_identity(q, k, dout, **tokens, scale=scale)
    value = multiply("btnh,btnv->bnhv", q.dtype.name, reads.astype(jnp.float32), dout.astype(jnp.float32))
    return LinearState(value=value[:, None], decay=factor.mT[:, None])


def _from_identity(q, k, v, **call) -> tuple[jax.Array, jax.Array]:
    """A forward pass of the delta rule that only erases, from the state 1: what is read, `[B, T, N, H]`, with which a
    query reads the state before the row, and the factor of the row, `[B, N, H, H]`."""
    (B, T, N, _), H = v.shape, k.shape[3]
    identity = jnp.broadcast_to(jnp.eye(H, dtype=jnp.float32), (B, N, H, H))
    reads, factor, _ = linear_attention_forward(
        q, k, jnp.zeros((B, T, N, H), q.dtype), **call, initial_state=identity
    )  # fmt: skip
    return reads, factor


def check_call(
    op: str, q, k, v, *, decay=None, beta=None, initial_state=None, segment_ids=None, scale=None, normalize=False
) -> None:  # fmt: skip
    """Raises what `linear_attention` raises of a wrong call: for those who cut its arrays up first."""
    _options(op, q, k, v, decay, beta, initial_state, segment_ids, scale, normalize)


def normalized(
    attend: Callable[..., tuple[jax.Array, jax.Array | None]],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    initial_state: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """An attention divided by the sum of its weights, which is the attention to values that are all 1.

    The sums are one column, of which a kernel makes nothing: they are left to XLA. Both sums grow with the row, beyond
    the range of float16, of which float32 is computed instead.

    Args:
      attend: `(q, k, v, initial_state, **kwargs) -> (out, state)`; the kwargs may be an implementation.
      q, k, v, initial_state: As `linear_attention` takes them with normalize.
    Returns: out and the state, in the same form.
    """
    dtype = v.dtype
    if dtype == jnp.float16:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    values, sums = (None, None) if initial_state is None else jnp.split(initial_state, [v.shape[3]], axis=3)
    out, state = attend(q, k, v, values)
    weights, state_of_sums = attend(q, k, jnp.ones((*v.shape[:3], 1), v.dtype), sums, implementation="xla")
    weights = weights.astype(jnp.float32)
    # No weight at all, as of padding, is no output; nor may its division reach a gradient.
    out = out.astype(jnp.float32) / jnp.where(weights == 0, 1.0, weights)
    out = jnp.where(weights == 0, 0.0, out).astype(dtype)
    return out, None if state is None else jnp.concatenate([state, state_of_sums], axis=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(options: Options, implementation, q, k, v, decay, beta, initial_state, segment_ids):
    passed = dispatch.run(
        "linear_attention_forward", FORWARD, implementation, q, k, v, decay=decay, beta=beta,
        initial_state=initial_state, segment_ids=segment_ids, parts=None, options=options,
    )  # fmt: skip
    return passed.out, passed.state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Residuals:
    """What the backward pass takes from the forward pass, and whether anything asks for the gradient of the decay."""

    arrays: tuple
    context: dict[str, Any]
    decay_gradient: bool = dataclasses.field(metadata={"static": True})


def _attention_fwd(options, implementation, *arguments):
    q, k, v, *others = values_of(arguments)
    context = dict(zip(("decay", "beta", "initial_state", "segment_ids"), others, strict=True))
    passed = dispatch.run(
        "linear_attention_forward", FORWARD, implementation, q, k, v, parts=None, options=options, **context
    )
    # Where layers are rematerialized, what is large and quickly made is made again.
    out, state, starts = as_attention((passed.out, passed.state, passed.starts))
    context |= {"starts": starts, "among": passed.among}
    return (out, state), _Residuals(arrays=(q, k, v), context=context, decay_gradient=is_perturbed(arguments[3]))


def _attention_bwd(options, implementation, residuals: _Residuals, cotangents):
    # Without a cotangent a result is one that nothing depends on.
    dout, dstate = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    q, k, v = residuals.arrays
    dq, dk, dv, ddecay, dbeta, dinitial_state = dispatch.run(
        "linear_attention_backward", BACKWARD, implementation, q, k, v, jnp.zeros_like(v) if dout is None else dout,
        dstate, parts=None, options=dataclasses.replace(options, decay_gradient=residuals.decay_gradient),
        **residuals.context,
    )  # fmt: skip
    decay, beta, initial_state = (residuals.context[name] for name in ("decay", "beta", "initial_state"))
    ddecay = None if ddecay is None else ddecay.astype(decay.dtype)
    dbeta = None if beta is None else dbeta.astype(beta.dtype)
    return dq, dk, dv, ddecay, dbeta, None if initial_state is None else dinitial_state, None


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


def _both_directions(call, q, k, v, decay, segment_ids, scale: float) -> jax.Array:
    """What comes before a token, and what comes after it, which is what comes before it in the flipped row."""

    def flip(x):
        return x if x is None else jnp.flip(x, axis=1)

    # Between t and t + 1 lies the decay of t + 1, which in the flipped row is to be that of t.
    after = decay if decay is None or decay.ndim == 1 else flip(jnp.roll(decay, -1, axis=1))
    forward, _ = call(q, k, v, decay, None, None, segment_ids)
    backward, _ = call(flip(q), flip(k), flip(v), after, None, None, flip(segment_ids))
    group = v.shape[2] // q.shape[2]
    itself = jnp.repeat(jnp.einsum("btkh,btkh->btk", q, k, preferred_element_type=jnp.float32), group, axis=2)
    if segment_ids is not None:
        itself = jnp.where((segment_ids >= 0)[..., None], itself, 0.0)
    total = forward.astype(jnp.float32) + flip(backward).astype(jnp.float32)
    return (total - scale * itself[..., None] * v.astype(jnp.float32)).astype(v.dtype)


def _options(
    op, q, k, v, decay, beta, initial_state, segment_ids, scale, normalize: bool = False
) -> Options:  # fmt: skip
    """Validates a call, and gathers what is static of it."""

    def wrong(message: str) -> NoReturn:
        raise ValueError(f"{op}: {message}")

    check_qkv(op, q, k, v)
    if q.shape != k.shape or q.shape[:2] != v.shape[:2]:
        wrong(
            f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; wanted q and k of one shape, and v of their B and T"
        )
    if v.shape[2] % q.shape[2]:
        wrong(f"{v.shape[2]} value heads over {q.shape[2]} query and key heads, wanted a multiple")
    (B, T, N, V), H = v.shape, q.shape[3]
    if decay is not None:
        wanted = {1: (N,), 3: (B, T, N), 4: (B, T, N, H)}
        if decay.shape != wanted.get(decay.ndim) or not jnp.issubdtype(decay.dtype, jnp.floating):
            wrong(
                f"decay is {decay.dtype}{list(decay.shape)}, wanted floats of shape [N], [B, T, N] or [B, T, N, H]: "
                f"{', '.join(str(list(shape)) for shape in wanted.values())}"
            )
    if beta is not None and (beta.shape != (B, T, N) or not jnp.issubdtype(beta.dtype, jnp.floating)):
        wrong(f"beta is {beta.dtype}{list(beta.shape)}, wanted floats of shape [B, T, N]: {[B, T, N]}")
    if normalize and beta is not None:
        wrong("normalize=True with beta: the weights of a delta rule do not add up to a normaliser; leave one out")
    if initial_state is not None:
        shape = (B, N, H, V + 1 if normalize else V)
        if initial_state.shape != shape or initial_state.dtype != jnp.float32:
            wrong(
                f"initial_state is {initial_state.dtype}{list(initial_state.shape)}, wanted float32{list(shape)}"
                + (", the sums of the weights in its last column" if normalize else "")
            )
    if segment_ids is not None:
        if segment_ids.shape not in ((B, T), (1, T)) or segment_ids.dtype != jnp.int32:
            wrong(
                f"segment_ids is {segment_ids.dtype}{list(segment_ids.shape)}, wanted int32 {[B, T]} or {[1, T]}; cast "
                "with .astype('int32')"
            )
    scale = H**-0.5 if scale is None else float(scale)
    if scale == 0 or not math.isfinite(scale):
        wrong(f"scale={scale}, wanted a finite number that is not 0; for an output of 0 leave the call out")
    return Options(scale=scale)

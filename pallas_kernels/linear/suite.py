"""What the conformance suite runs of the linear family: the ways to call its ops, and who must serve what.

The truth is the reference's forward and its derivative by JAX, in float32, with random cotangents of both out and the
state after the row; in both directions it is the matrix of all weights.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.linear import api, reference
from pallas_kernels.linear.cases import CASES, KERNEL_CASES, Case
from pallas_kernels.linear.options import Options
from pallas_kernels.linear.state import LinearState, before_each, total
from pallas_kernels.testing import Family, Serves, Trial, Way

_FORWARD, _BACKWARD = "linear_attention_forward", "linear_attention_backward"
_STATES, _STATE_COTANGENTS = "linear_attention_states", "linear_attention_state_cotangents"
_OPERANDS = ("q", "k", "v", "decay", "beta", "initial_state")


def truth(case: Case) -> Callable[[dict], dict]:
    """out, the state after the row and every gradient of float32 inputs."""
    scale = case.scale or case.head_dim**-0.5

    def attend(q, k, v, decay=None, beta=None, initial_state=None):
        if case.normalize:
            v = jnp.concatenate([v, jnp.ones((*v.shape[:3], 1))], axis=3)
        if case.bidirectional:
            out, state = _both_directions(q, k, v, decay, case.segment_ids(), scale), None
        else:
            out, state, *_ = reference.forward(
                q, k, v, decay=decay, beta=beta, initial_state=initial_state, segment_ids=case.segment_ids(),
                parts=None, options=Options(scale=scale),
            )  # fmt: skip
        if case.normalize:
            out, weights = out[..., :-1], out[..., -1:]
            out = jnp.where(weights == 0, 0.0, out / jnp.where(weights == 0, 1.0, weights))
        return out, state

    return _with_gradients(attend, with_state=not case.bidirectional)


def _both_directions(q, k, v, decay, segment_ids, scale: float) -> jax.Array:
    """out[i] = scale sum_j (q[i] . exp(sum of the decays between i and j) k[j]) v[j] over j of the document."""
    (B, T, N, _), H = v.shape, q.shape[3]
    q, k = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (q, k))
    decay = jnp.zeros(N) if decay is None else decay
    log = jnp.broadcast_to(decay if decay.ndim == 4 else decay[..., None], (B, T, N, H))
    later = jnp.tril(jnp.ones((T, T), bool), -1)[..., None, None]
    apart = jnp.cumsum(jnp.where(later, log[:, :, None], 0.0), axis=1)
    apart = apart + apart.swapaxes(1, 2)
    weights = jnp.sum(q[:, :, None] * k[:, None] * jnp.exp(apart), axis=4)
    if segment_ids is not None:
        same = (segment_ids[:, :, None] == segment_ids[:, None]) & (segment_ids >= 0)[:, None]
        weights = jnp.where(same[..., None], weights, 0.0)
    return scale * jnp.einsum("bijn,bjnv->binv", weights, v, precision=jax.lax.Precision.HIGHEST)


def _with_gradients(attend: Callable, *, with_state: bool) -> Callable[[dict], dict]:
    """Results of `attend(**operands) -> (out, state)`, with the gradients of its operands."""

    def run(inputs):
        (out, state), vjp = jax.vjp(lambda operands: attend(**operands), operands(inputs))
        (gradients,) = vjp((inputs["dout"], inputs["dstate"] if with_state else None))
        return {"out": out} | ({"state": state} if with_state else {}) | named(gradients)

    return run


def operands(inputs: dict) -> dict[str, jax.Array]:
    """What the op is differentiated in."""
    return {name: inputs[name] for name in _OPERANDS if name in inputs}


def named(gradients: dict) -> dict[str, jax.Array]:
    """The gradients of operands under their own names."""
    return {f"d{name}": gradient for name, gradient in gradients.items()}


def _call(case: Case, implementation: str | None) -> dict:
    """The arguments of the differentiable op that are no inputs."""
    flags = {"normalize": case.normalize, "bidirectional": case.bidirectional}
    return {"segment_ids": case.segment_ids(), "scale": case.scale, "implementation": implementation} | flags


def _gradient_of_out_and_state(case: Case, implementation: str | None) -> Callable[[dict], dict]:
    """Every result of the differentiable op, with cotangents of out and of the state after the row."""
    with_state = not case.bidirectional

    def attend(**operands):
        results = api.linear_attention(**operands, return_state=with_state, **_call(case, implementation))
        return results if with_state else (results, None)

    return _with_gradients(attend, with_state=with_state)


def _gradient_of_out(case: Case, implementation: str | None) -> Callable[[dict], dict]:
    """Every result where nothing depends on the state."""
    forward = _forward(case, implementation)

    def run(inputs):
        def attend(operands):
            return api.linear_attention(**operands, **_call(case, implementation))

        out, vjp = jax.vjp(attend, operands(inputs))
        (gradients,) = vjp(inputs["dout"])
        return forward(inputs) | {"out": out} | named(gradients)

    return run


def _forward(case: Case, implementation: str | None) -> Callable[[dict], dict]:
    """out and the state alone."""

    def run(inputs):
        call = operands(inputs) | _call(case, implementation)
        if case.bidirectional:
            return {"out": api.linear_attention(**call)}
        out, state = api.linear_attention(**call, return_state=True)
        return {"out": out, "state": state}

    return run


def _runs_of(case: Case, inputs: dict) -> list[tuple[dict, dict]]:
    """The row cut into runs: the arguments of each, without states, and what else is of it: dout, and whether a state
    before it reaches it, `[B]`."""
    ids = case.segment_ids()
    runs = []
    for start in range(0, case.length, case.run_length):

        def part(x, along=slice(start, start + case.run_length)):
            return x if x is None or x.ndim == 1 else x[:, along]

        arguments = {name: part(inputs.get(name)) for name in ("q", "k", "v", "decay", "beta")}
        reached = jnp.ones(case.batch_size, bool)
        if ids is not None and start:
            reached = ids[:, start] == ids[:, start - 1]
        runs.append((arguments | {"segment_ids": part(ids)}, {"dout": part(inputs["dout"]), "reached": reached}))
    return runs


def _runs(case: Case, implementation: str | None) -> Callable[[dict], dict]:
    """The row cut into runs as context parallelism cuts it, whose states are found first, by a pass of their own."""
    options = {"scale": case.scale, "implementation": implementation}

    def run(inputs):
        runs = _runs_of(case, inputs)
        reached = [mine["reached"].astype(jnp.float32) for _, mine in runs]
        maps, back_maps = [], []
        for call, mine in runs:
            which = {name: call[name] for name in ("segment_ids", "decay", "beta")}
            which["implementation"] = implementation
            maps.append(api.linear_attention_states(call["k"], call["v"], **which))
            back_maps.append(
                api.linear_attention_state_cotangents(
                    call["q"], mine["dout"], k=call["k"], scale=case.scale, **which
                )
            )  # fmt: skip
        starts, state = before_each(_joined(maps, reached), inputs.get("initial_state"))
        back = _joined(back_maps, reached, reverse=True)
        ends, _ = before_each(back, inputs["dstate"], reverse=True)
        outs, gradients = [], []
        for i, (call, mine) in enumerate(runs):
            start = starts[:, i] * _spread(reached[i])
            out, _, inside = api.linear_attention_forward(**call, initial_state=start, parts=maps[i], **options)
            gradients.append(
                api.linear_attention_backward(
                    **call, dout=mine["dout"], dstate=ends[:, i], initial_state=start, starts=inside,
                    parts=back_maps[i], **options,
                )
            )  # fmt: skip
            outs.append(out)
        return {"out": jnp.concatenate(outs, axis=1), "state": state} | _gradients_of_runs(inputs, gradients)

    return run


def _runs_in_turn(case: Case, implementation: str | None) -> Callable[[dict], dict]:
    """The row cut into runs, each of which is handed the state, or its cotangent, by the one before."""
    options = {"scale": case.scale, "implementation": implementation}

    def run(inputs):
        runs = _runs_of(case, inputs)
        state = inputs.get("initial_state")
        outs, saved, gradients = [], [], []
        for call, mine in runs:
            start = None if state is None else state * _spread(mine["reached"].astype(jnp.float32))
            out, state, inside = api.linear_attention_forward(**call, initial_state=start, **options)
            outs.append(out)
            saved.append({"initial_state": start, "starts": inside})
        dstate = inputs["dstate"]
        for (call, mine), kept in zip(reversed(runs), reversed(saved), strict=True):
            gradient = api.linear_attention_backward(**call, dout=mine["dout"], dstate=dstate, **kept, **options)
            dstate = gradient.dinitial_state * _spread(mine["reached"].astype(jnp.float32))
            gradients.insert(0, gradient)
        return {"out": jnp.concatenate(outs, axis=1), "state": state} | _gradients_of_runs(inputs, gradients)

    return run


def _spread(per_row: jax.Array) -> jax.Array:
    return per_row[:, None, None, None]


def _joined(maps: list[LinearState], reached: list[jax.Array], *, reverse: bool = False) -> LinearState:
    """The maps of runs side by side, cut where a document begins with a run: what comes before it does not enter it,
    and in reverse nothing leaves it."""
    totals = [total(parts, reverse=reverse) for parts in maps]
    values = [x.value * _spread(r) if reverse else x.value for x, r in zip(totals, reached, strict=True)]
    decays = [x.decay * r.reshape(-1, *(1,) * (x.decay.ndim - 1)) for x, r in zip(totals, reached, strict=True)]
    return LinearState(value=jnp.stack(values, axis=1), decay=jnp.stack(decays, axis=1))


def _gradients_of_runs(inputs: dict, gradients: list[api.LinearGradients]) -> dict[str, jax.Array]:
    """Gradients of the row: side by side, but for that of a decay of a head, to which each run adds."""
    joined = {}
    for name in operands(inputs):
        parts = [getattr(gradient, f"d{name}") for gradient in gradients]
        if name == "initial_state":
            joined[f"d{name}"] = parts[0]
        else:
            joined[f"d{name}"] = sum(parts) if parts[0].ndim == 1 else jnp.concatenate(parts, axis=1)
    return joined


_BOTH = frozenset({_FORWARD, _BACKWARD})
_STATE_IS_ABSENT = frozenset({"dstate"})
WAYS = {
    "forward": Way(function=_forward, ops=frozenset({_FORWARD}), absent=frozenset({"dout", "dstate"})),
    "gradient": Way(function=_gradient_of_out, ops=_BOTH, absent=_STATE_IS_ABSENT),
    "gradient of state": Way(function=_gradient_of_out_and_state, ops=_BOTH),
    "normalized": Way(
        function=_gradient_of_out_and_state, ops=_BOTH, left_to_others=frozenset((op, "xla") for op in _BOTH)
    ),
    "runs": Way(function=_runs, ops=_BOTH | {_STATES, _STATE_COTANGENTS}),
    "runs of the delta rule": Way(function=_runs, ops=_BOTH),  # whose maps are forward passes
    "runs in turn": Way(function=_runs_in_turn, ops=_BOTH),
}


def _ways_of(case: Case) -> tuple[tuple[str, ...], ...]:
    if case.normalize:
        return (("normalized",),)
    if case.bidirectional:
        return (("gradient", "forward"),)
    strongest_first = ("gradient of state", "gradient", "forward")
    if not case.all_ways:
        return (strongest_first,)
    if case.beta:
        return strongest_first, ("gradient",), ("runs in turn",), ("runs of the delta rule",)
    return strongest_first, ("gradient",), ("runs",)


_ALL_CASES = CASES + KERNEL_CASES
_EVERYTHING = Serves(
    cases=frozenset(case.name for case in _ALL_CASES),
    dtypes=frozenset({"float32", "bfloat16", "float16"}),
    ways=frozenset(WAYS),
)


def _kernels(*dtypes: str, most: int) -> Serves:
    """What kernels serve: head dims of 64 and 128, decays of a head or of a token, and of the delta rule and decays of
    each dim `most` at the same time."""
    cases = frozenset(
        case.name
        for case in _ALL_CASES
        if {case.head_dim, case.value_dim} <= {64, 128} and (case.decay == "vector") + case.beta <= most
    )
    return Serves(cases=cases, dtypes=frozenset(dtypes), ways=frozenset(WAYS))


# An implementation that api.py has and this has not fails the suite.
SERVES = {
    "mosaic_gpu": _kernels("bfloat16", most=1),
    "mosaic_tpu": _kernels("bfloat16", "float32", most=2),
    "reference": _EVERYTHING,
    "xla": _EVERYTHING,
}

_LOW_PRECISION = (
    *("none", "fixed", "scalar", "vector", "delta", "delta_scalar", "delta_vector"),
    *("documents_scalar", "documents_vector", "documents_delta_vector", "normalize_documents_scalar"),
    *("strong_scalar", "strong_vector", "bidirectional_documents_scalar"),
)


def _trials(platform: str) -> tuple[Trial, ...]:
    """On a GPU or TPU the platform's implementations in half precision; on a CPU mostly in float32, as it computes, and
    not the cases of kernels, which it has none of and takes long for."""
    taken = [name for name in dispatch.PREFERENCE[platform] if name in api.FORWARD]
    if platform == "cpu":
        runs = [(case, name, "float32") for case in CASES for name in ("reference", *taken)]
        cover = [case for case in CASES if case.name in _LOW_PRECISION]
        runs += [(case, name, dtype) for case in cover for name in taken for dtype in ("bfloat16", "float16")]
    else:
        runs = [(case, name, "bfloat16") for case in _ALL_CASES for name in taken]
        runs += [(case, "xla", "float32") for case in CASES]
    return tuple(Trial(case=case, implementation=name, dtype=dtype) for case, name, dtype in runs)


FAMILY = Family(
    name="linear", cases=_ALL_CASES, truth=truth, ways=WAYS, ways_of=_ways_of, serves=SERVES, trials=_trials
)

"""What the conformance suite runs of the blockwise family: the ways to call its ops, and who must serve what.

The truth is the reference's forward and its derivative by JAX, in float32, with random cotangents of both out and lse;
so the hand-written backward of the reference is under test like any other.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.blockwise import api, reference
from pallas_kernels.blockwise.cases import CASES, KERNEL_CASES, Case
from pallas_kernels.blockwise.options import Options
from pallas_kernels.blockwise.pallas_mosaic_tpu import HEAD_DIMS as TPU_HEAD_DIMS
from pallas_kernels.testing import Family, Serves, Trial, Way
from pallas_kernels.tokens import Tokens

GRADIENTS = ("dq", "dk", "dv")
_RUNNING = 0.125  # what a hop finds in dk and dv: of the size of gradients, so that little precision is lost to it
_FORWARD, _BACKWARD = "blockwise_attention_forward", "blockwise_attention_backward"


def truth(case: Case) -> Callable[[dict], dict]:
    """out, lse and every gradient of float32 inputs, by differentiating the reference's forward."""
    options = Options(
        mask=case.mask,
        scale=case.scale or case.head_dim**-0.5,
        logits_soft_cap=case.logits_soft_cap,
        block_sizes=None,
        deterministic=True,
    )
    call = {"tokens": case.tokens(), "schedule": case.schedule(), "dropout": case.dropout(), "options": options}

    def attend(q, k, v, sinks=None, bias=None):
        if sinks is not None:
            return reference.forward_with_sinks(q, k, v, sinks, bias=bias, **call)
        return reference.forward(q, k, v, carry=None, return_carry=False, bias=bias, **call)

    return _with_gradients(case, attend)


def operands(case: Case, inputs: dict) -> tuple[Any, ...]:
    """What the op is differentiated in: q, k, v, and the sinks and the bias, None where the case has none."""
    return tuple(inputs.get(name) for name in ("q", "k", "v", "sinks", "bias"))


def named(gradients: tuple[Any, ...]) -> dict[str, jax.Array]:
    """The gradients of `operands` by name; of a bias, of each of its parameters."""
    *of_arrays, of_bias = gradients
    of_bias = {f"d{path[0].name}": dx for path, dx in jax.tree.leaves_with_path(of_bias)}
    return {name: dx for name, dx in zip((*GRADIENTS, "dsinks"), of_arrays, strict=True) if dx is not None} | of_bias


def _gradient_of_out_and_lse(case: Case, implementation: str | None) -> Callable[[dict], dict]:
    """Every result of the differentiable op, with cotangents of out and lse."""

    def attend(q, k, v, sinks, bias):
        return api.blockwise_attention(
            q, k, v, sinks=sinks, bias=bias, implementation=implementation, return_lse=True, **case.arguments()
        )

    return _with_gradients(case, attend)


def _gradient_of_out(case: Case, implementation: str | None, *, deterministic: bool = True) -> Callable[[dict], dict]:
    """Every result where nothing depends on lse."""
    forward = _forward(case, implementation)

    def run(inputs):
        def attend(q, k, v, sinks, bias):
            return api.blockwise_attention(
                q, k, v, sinks=sinks, bias=bias, implementation=implementation, deterministic=deterministic,
                **case.arguments(),
            )  # fmt: skip

        out, vjp = jax.vjp(attend, *operands(case, inputs))
        return forward(inputs) | {"out": out} | named(vjp(inputs["dout"]))

    return run


def _forward(case: Case, implementation: str | None) -> Callable[[dict], dict]:
    """out and lse alone."""

    def run(inputs):
        arguments = case.arguments() | {"implementation": implementation}
        arguments |= {name: inputs.get(name) for name in ("sinks", "bias")}
        out, lse = api.blockwise_attention_forward(*(inputs[name] for name in "qkv"), **arguments)
        return {"out": out, "lse": lse}

    return run


def _forward_hops(case: Case, implementation: str | None) -> Callable[[dict], dict]:
    """The forward pass of `_hops` alone."""
    arguments = case.arguments() | {"implementation": implementation}
    tokens = arguments.pop("tokens")

    def run(inputs):
        out, lse = _hop_by_hop(inputs, _hops_of(inputs, tokens), arguments | {"bias": inputs.get("bias")})
        return {"out": out, "lse": lse}

    return run


def _hops_of(inputs: dict, tokens: Tokens | None) -> list[tuple]:
    """Two parts of the keys: k, v and the tokens of each."""
    q_len, kv_len = inputs["q"].shape[1], inputs["k"].shape[1]
    parts = slice(0, kv_len // 3), slice(kv_len // 3, kv_len)
    return [(inputs["k"][:, part], inputs["v"][:, part], keys_of(tokens, part, q_len, kv_len)) for part in parts]


def _hop_by_hop(inputs: dict, hops: list[tuple], arguments: dict) -> tuple[jax.Array, jax.Array]:
    """(out, lse) over all hops, by a carry that goes from the first, which takes the sinks, to the last."""
    q, start = inputs["q"], {"sinks": inputs.get("sinks")}
    for k, v, tokens in hops:
        carry = api.blockwise_attention_forward(q, k, v, tokens=tokens, return_carry=True, **start, **arguments)
        start = {"carry": carry}
    return carry.finalize(q.dtype)


def _hops(case: Case, implementation: str | None) -> Callable[[dict], dict]:
    """Keys taken in two parts, as a ring takes them: the carry goes forward, the gradients accumulate."""
    arguments = case.arguments() | {"implementation": implementation}
    tokens = arguments.pop("tokens")

    def run(inputs):
        q, dout, dlse = (inputs[name] for name in ("q", "dout", "dlse"))
        hops, bias = _hops_of(inputs, tokens), inputs.get("bias")
        out, lse = _hop_by_hop(inputs, hops, arguments | {"bias": bias})
        dq, gradients_kv, gradients_bias = jnp.zeros(q.shape, jnp.float32), [], []
        for k_part, v_part, tokens_part in hops:
            running = dq, *(jnp.full(x.shape, _RUNNING, jnp.float32) for x in (k_part, v_part))
            dq, dk, dv, *dbias = api.blockwise_attention_backward(
                q, k_part, v_part, out, lse, dout, dlse, tokens=tokens_part, accumulate=running, bias=bias,
                bias_gradient=bias is not None, **arguments,
            )  # fmt: skip
            gradients_bias += dbias
            gradients_kv.append((dk - _RUNNING, dv - _RUNNING))
        dk, dv = (jnp.concatenate(x, axis=1) for x in zip(*gradients_kv, strict=True))
        dsinks = api.sinks_gradient(inputs["sinks"], out, lse, dout, dlse) if case.sinks else None
        dbias = jax.tree.map(jnp.add, *gradients_bias) if gradients_bias else None
        gradients = dq, dk, dv, dsinks, dbias
        return {"out": out, "lse": lse} | named(gradients)

    return run


def keys_of(tokens: Tokens | None, part: slice, q_len: int, kv_len: int) -> Tokens:
    """The tokens of all queries and of one part of the keys; positions are then data."""
    q = (tokens or Tokens()).queries(q_len)
    kv = (tokens or Tokens()).keys(kv_len)
    return Tokens(
        q_positions=q.positions,
        q_segment_ids=q.segment_ids,
        kv_positions=kv.positions[:, part],
        kv_segment_ids=kv.segment_ids[:, part],
    )


def _with_gradients(case: Case, attend: Callable) -> Callable[[dict], dict]:
    def run(inputs):
        (out, lse), vjp = jax.vjp(attend, *operands(case, inputs))
        return {"out": out, "lse": lse} | named(vjp((inputs["dout"], inputs["dlse"])))

    return run


WAYS = {
    "forward": Way(function=_forward, ops=frozenset({_FORWARD}), absent=frozenset({"dout", "dlse"})),
    "gradient": Way(function=_gradient_of_out, ops=frozenset({_FORWARD, _BACKWARD}), absent=frozenset({"dlse"})),
    "gradient in any order": Way(
        function=functools.partial(_gradient_of_out, deterministic=False),
        ops=frozenset({_FORWARD, _BACKWARD}),
        absent=frozenset({"dlse"}),
    ),
    "gradient of lse": Way(function=_gradient_of_out_and_lse, ops=frozenset({_FORWARD, _BACKWARD})),
    "hops": Way(function=_hops, ops=frozenset({_FORWARD, _BACKWARD})),
    "forward hops": Way(function=_forward_hops, ops=frozenset({_FORWARD}), absent=frozenset({"dout", "dlse"})),
}


def _ways_of(case: Case) -> tuple[tuple[str, ...], ...]:
    strongest_first = ("gradient of lse", "gradient", "gradient in any order", "forward")
    if not case.all_ways:
        return (strongest_first,)
    return strongest_first, ("gradient",), ("gradient in any order",), ("hops", "forward hops")


_ALL_CASES = CASES + KERNEL_CASES
_EVERYTHING = Serves(
    cases=frozenset(case.name for case in _ALL_CASES),
    dtypes=frozenset({"float32", "bfloat16", "float16"}),
    ways=frozenset(WAYS),
)

_NOT_ON_HOPPER = {"table_of_64_D64"}  # its blocks are smaller than the kernel's, whose pair test reads no table

# Tables are memory, which a pair test does not read, and the default blocks are larger than theirs.
# Other head dims than its own it refuses.
_NOT_ON_TPU = {
    *("table_D128", "table_of_64_D64"),
    *(case.name for case in KERNEL_CASES if case.dropout_rate or case.chosen or case.bias),
    *(case.name for case in KERNEL_CASES if case.head_dim not in TPU_HEAD_DIMS),
}

# An implementation that api.py has and this has not fails the suite.
SERVES = {
    "mosaic_gpu": Serves(
        cases=frozenset(case.name for case in KERNEL_CASES if case.name not in _NOT_ON_HOPPER),
        dtypes=frozenset({"bfloat16", "float16"}),
        ways=frozenset(WAYS),
    ),
    "mosaic_tpu": Serves(
        cases=frozenset(case.name for case in KERNEL_CASES if case.name not in _NOT_ON_TPU),
        dtypes=frozenset({"bfloat16", "float32"}),
        ways=frozenset(WAYS),
    ),
    "reference": _EVERYTHING,
    "xla": _EVERYTHING,
    "cudnn": Serves(
        cases=frozenset({
            *("causal", "full", "causal_T1000", "window"),
            *("head_dim_64_gqa_scale", "head_dim_128_cross_mqa", "head_dim_128_window_gqa"),
            *("causal_D64", "causal_D128", "full_D128", "causal_T1000_D64", "causal_T1000_D128"),
            *("gqa_D128", "gqa_heads_of_3_rows_D64", "mqa_D64", "scale_D128"),
            *("window_D64", "window_D128", "causal_D96", "causal_gqa_D80"),
        }),
        dtypes=frozenset({"bfloat16", "float16"}),
        ways=frozenset({"forward", "gradient in any order"}),
    ),
}  # fmt: skip

_LOW_PRECISION = ("causal", "gqa", "documents", "empty_rows", "soft_cap")


def _trials(platform: str) -> tuple[Trial, ...]:
    """On a GPU or TPU the platform's implementations in half precision, on a CPU mostly in float32, as it computes."""
    taken = [name for name in dispatch.PREFERENCE[platform] if name in api.FORWARD]
    if platform == "cpu":
        runs = [(case, name, "float32") for case in CASES for name in ("reference", *taken)]
        cover = [case for case in CASES if case.name in _LOW_PRECISION]
        runs += [(case, name, dtype) for case in cover for name in taken for dtype in ("bfloat16", "float16")]
        runs += [(case, name, "float32") for case in KERNEL_CASES for name in taken]
    else:
        runs = [
            (case, name, dtype) for case in _ALL_CASES for name in taken for dtype in ("bfloat16", "float16")
            if dtype == "bfloat16" or name != "xla"
        ]  # fmt: skip
        runs += [(case, "xla", "float32") for case in CASES]
    return tuple(Trial(case=case, implementation=name, dtype=dtype) for case, name, dtype in runs)


FAMILY = Family(
    name="blockwise",
    cases=_ALL_CASES,
    truth=truth,
    ways=WAYS,
    ways_of=_ways_of,
    serves=SERVES,
    trials=_trials,
    precise=frozenset({"lse"}),  # the products of a logit are exact in float32
    # In a head of bias_kerple_log_D64 dr2 by xla is 2.6e-6 of it from its float64 value, by the reference 2e-7.
    cancelling=frozenset({"dslopes", "dtable", "dr1", "dr2"}),
)

"""What the conformance suite runs of the sparse family: the ways to call its ops, and who must serve what.

The truth is the formula over the whole matrix, in float32, and its derivative by JAX, with random cotangents of both
out and lse. Nothing is differentiated through MoBA's choice, and selected attention is given its own.
"""

from collections.abc import Callable

import jax

from pallas_kernels.sparse import nsa_selected_reference
from pallas_kernels.sparse.cases import CASES, KERNEL_CASES, Case
from pallas_kernels.sparse.moba import moba_attention
from pallas_kernels.sparse.moba_reference import moba_reference
from pallas_kernels.sparse.nsa_selected import selected_attention
from pallas_kernels.testing import Family, Serves, Trial, Way

GRADIENTS = ("dq", "dk", "dv")


def truth(case: Case) -> Callable[[dict], dict]:
    """out, lse and every gradient of float32 inputs, by differentiating the formula."""
    arguments = case.arguments()

    def attend(q, k, v):
        if case.op == "moba_attention":
            return moba_reference(q, k, v, **arguments)
        scale = case.head_dim**-0.5 if case.scale is None else case.scale
        return nsa_selected_reference.forward(q, k, v, **arguments | {"q_place": None, "scale": scale})

    return _with_gradients(attend)


def _with_gradients(attend: Callable) -> Callable[[dict], dict]:
    """Results of `attend(q, k, v) -> (out, lse)`, with the gradients of its operands."""

    def run(inputs):
        (out, lse), vjp = jax.vjp(attend, *(inputs[name] for name in "qkv"))
        return {"out": out, "lse": lse} | _named(vjp((inputs["dout"], inputs["dlse"])))

    return run


def _named(gradients: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
    return dict(zip(GRADIENTS, gradients, strict=True))


def _gradient_of_out_and_lse(case: Case, implementation: str | None) -> Callable[[dict], dict]:
    """Every result, with cotangents of out and lse."""
    arguments = case.arguments() | {"implementation": implementation}
    if case.op == "moba_attention":
        return _with_gradients(lambda q, k, v: moba_attention(q, k, v, return_lse=True, **arguments))
    return _with_gradients(lambda q, k, v: selected_attention(q, k, v, **arguments))


def _gradient_of_out(case: Case, implementation: str | None, **options) -> Callable[[dict], dict]:
    """out and the gradients where nothing depends on lse."""
    arguments = case.arguments() | {"implementation": implementation}

    def attend(q, k, v):
        if case.op == "moba_attention":
            return moba_attention(q, k, v, **arguments, **options)
        return selected_attention(q, k, v, **arguments)[0]

    def run(inputs):
        out, vjp = jax.vjp(attend, *(inputs[name] for name in "qkv"))
        return {"out": out} | _named(vjp(inputs["dout"]))

    return run


def _gradient_in_any_order(case: Case, implementation: str | None) -> Callable[[dict], dict]:
    """`_gradient_of_out`, its sums in any order."""
    return _gradient_of_out(case, implementation, deterministic=False)


def _passes(of: str) -> frozenset[str]:
    return frozenset({f"{of}_attention_forward", f"{of}_attention_backward"})


_LSE_IS_ABSENT = frozenset({"dlse"})
WAYS = {
    "gradient of lse": Way(function=_gradient_of_out_and_lse, ops=_passes("selected")),
    "gradient": Way(function=_gradient_of_out, ops=_passes("selected"), absent=_LSE_IS_ABSENT),
    "MoBA's gradient of lse": Way(function=_gradient_of_out_and_lse, ops=_passes("blockwise")),
    "MoBA's gradient": Way(function=_gradient_of_out, ops=_passes("blockwise"), absent=_LSE_IS_ABSENT),
    "MoBA's in any order": Way(function=_gradient_in_any_order, ops=_passes("blockwise"), absent=_LSE_IS_ABSENT),
}


def _ways_of(case: Case) -> tuple[tuple[str, ...], ...]:
    if case.op == "moba_attention":
        first, *others = "MoBA's gradient of lse", "MoBA's gradient", "MoBA's in any order"
    else:
        first, *others = "gradient of lse", "gradient"
    return (first,), *((way,) for way in others if case.all_ways)


_ALL_CASES = CASES + KERNEL_CASES
_EVERYTHING = Serves(
    cases=frozenset(case.name for case in _ALL_CASES),
    dtypes=frozenset({"float32", "bfloat16", "float16"}),
    ways=frozenset(WAYS),
)


def _is_of_kernels(case: Case) -> bool:
    """Whether the Hopper kernels serve it: MoBA as blockwise attention does, of the other op one size of block."""
    if case.op == "moba_attention":
        return True
    return case.head_dim in (64, 128) and case.value_dim is None and case.block_size == 64


# An implementation that the ops have and this has not fails the suite.
SERVES = {
    "mosaic_gpu": Serves(
        cases=frozenset(case.name for case in _ALL_CASES if _is_of_kernels(case)),
        dtypes=frozenset({"bfloat16", "float16"}),
        ways=frozenset(WAYS),
    ),
    "reference": _EVERYTHING,
    "xla": _EVERYTHING,
}

_LOW_PRECISION = "moba_packed", "moba_a_head_each", "selected_gqa", "selected_values_of_12"


def _trials(platform: str) -> tuple[Trial, ...]:
    """On a GPU its kernels in half precision, and some cases by XLA; elsewhere XLA, mostly in float32, as it computes,
    and some by the reference, without the cases of kernels."""
    if platform == "gpu":
        runs = [(case, "mosaic_gpu", "bfloat16") for case in _ALL_CASES]
        runs += [(case, "mosaic_gpu", "float16") for case in KERNEL_CASES]
        runs += [(case, "xla", "bfloat16") for case in _ALL_CASES if case.all_ways]
    else:
        runs = [(case, "xla", "float32") for case in CASES]
        runs += [(case, "reference", "float32") for case in CASES if case.all_ways]
        cover = [case for case in CASES if case.name in _LOW_PRECISION]
        runs += [(case, "xla", dtype) for case in cover for dtype in ("bfloat16", "float16")]
    return tuple(Trial(case=case, implementation=name, dtype=dtype) for case, name, dtype in runs)


FAMILY = Family(
    name="sparse",
    cases=_ALL_CASES,
    truth=truth,
    ways=WAYS,
    ways_of=_ways_of,
    serves=SERVES,
    trials=_trials,
    precise=frozenset({"lse"}),
)

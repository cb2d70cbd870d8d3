"""Every implementation of the linear family, in every case, against the float32 reference.

The cases, the ways to call the ops and what each implementation must serve are in pallas_kernels/linear/cases.py and
suite.py; `python -m pallas_kernels.conformance --family linear` runs the same trials without pytest.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import conformance
from pallas_kernels.linear import api, suite
from pallas_kernels.linear.suite import FAMILY
from pallas_kernels.testing import Trial, assert_close

CASES_BY_NAME = {case.name: case for case in FAMILY.cases}
GRADIENTS = ("dq", "dk", "dv", "ddecay", "dbeta", "dinitial_state")

# Every form of decay, documents, runs, sweep and scan, both precisions, the reference: what takes seconds.
_QUICK = {
    ("documents_scalar", "xla", "bfloat16"),
    ("documents_delta_vector", "xla", "float32"),
    ("one_token_scalar", "reference", "float32"),
    ("normalize_none", "xla", "float32"),
    ("bidirectional_normalize_fixed", "xla", "float32"),
    ("T64_none", "xla", "float32"),  # whole chunks: no masks
}


def is_slow(trial: Trial) -> bool:
    return (trial.case.name, trial.implementation, trial.dtype) not in _QUICK


def parameters(platform: str):
    return [
        pytest.param(trial, id=str(trial), marks=[pytest.mark.slow] * (platform == "cpu" and is_slow(trial)))
        for trial in FAMILY.trials(platform)
    ]


@pytest.mark.parametrize("trial", parameters("cpu"))
def test_equals_reference(trial):
    (outcome,) = conformance.run(FAMILY, [trial])
    assert outcome.verdict == "ok", outcome


@pytest.mark.gpu
@pytest.mark.parametrize("trial", parameters("gpu"))
def test_equals_reference_or_refuses_on_a_gpu(trial):
    (outcome,) = conformance.run(FAMILY, [trial])
    assert not outcome.problems, outcome


def test_every_implementation_has_promises():
    assert set(FAMILY.serves) == set(api.FORWARD) == set(api.BACKWARD)
    assert set(api.STATES) == set(api.STATE_COTANGENTS) <= set(api.FORWARD)


def test_the_quick_trials_are_trials():
    assert {(x.case.name, x.implementation, x.dtype) for x in FAMILY.trials("cpu")} >= _QUICK


@pytest.mark.parametrize("name", ["documents_vector", "documents_delta_scalar"])
def test_results_have_the_dtypes_of_the_contract(name):
    case = CASES_BY_NAME[name]
    for way in FAMILY.ways_of(case):
        shapes = jax.eval_shape(FAMILY.ways[way[0]].function(case, "xla"), case.inputs("bfloat16"))
        for result, x in shapes.items():
            assert x.dtype == (jnp.bfloat16 if result in ("out", "dq", "dk", "dv") else jnp.float32), result


@pytest.fixture(scope="module")
def truths():
    """Every result of a case with every gradient, for inputs of each dtype: the truth of the suite."""
    case = CASES_BY_NAME["value_dim_shared_heads_delta_vector"]
    program = jax.jit(suite.truth(case))

    def of(dtype):
        return program({name: x.astype(jnp.float32) for name, x in case.inputs(dtype).items()})

    return {dtype: of(dtype) for dtype in ("float32", "bfloat16")}


# Heads are dim 1 of a state, and dim 2 of the rest.
MUTATIONS = {
    "zero": lambda name, x: jnp.zeros_like(x),
    "swapped_heads": lambda name, x: jnp.flip(x, 1 if name == "dinitial_state" else 2),
    "reversed_time": lambda name, x: jnp.flip(x, 1),
    "one_percent_off": lambda name, x: 1.01 * x,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_a_wrong_gradient_fails(name, mutation, truths):
    """The suite can fail: each mutated gradient is told apart from the true one."""
    want = truths["float32"][name]
    with pytest.raises(AssertionError, match=name):
        assert_close(name, MUTATIONS[mutation](name, want), want, "float32")


@pytest.mark.parametrize("mutation", ["zero", "swapped_heads", "reversed_time"])
def test_a_wrong_gradient_fails_in_low_precision(mutation, truths):
    for name in GRADIENTS:
        want = truths["bfloat16"][name]
        with pytest.raises(AssertionError, match=name):
            assert_close(name, MUTATIONS[mutation](name, want), want, "bfloat16")

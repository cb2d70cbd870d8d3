"""Every implementation of the blockwise family, in every case, against the float32 reference.

The cases, the ways to call the ops and what each implementation must serve are in pallas_kernels/blockwise/cases.py and
suite.py; `python -m pallas_kernels.conformance` runs the same trials without pytest.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import (
    SoftmaxCarry,
    blockwise_attention,
    conformance,
    dispatch,
    merge_partials,
)
from pallas_kernels.blockwise import suite
from pallas_kernels.blockwise.suite import FAMILY, GRADIENTS, keys_of
from pallas_kernels.testing import Trial, assert_close

CASES_BY_NAME = {case.name: case for case in FAMILY.cases}


# What every change runs of each implementation that a CPU has, in float32; the first two in bfloat16 too.
QUICK = (
    "causal", "documents_window_gqa", "empty_rows", "cross", "one_token", "value_dim", "table", "per_head_gqa",
    "striped_documents_window", "soft_cap", "learned_sinks_gqa_documents", "dropout_gqa_documents",
    "chosen_by_head_documents", "bias_kerple_power_empty_rows",
)  # fmt: skip


def is_slow(trial: Trial) -> bool:
    if trial.implementation == "reference":
        return trial.dtype != "float32" or trial.case.name not in QUICK[:3]
    return trial.case.name not in {"float32": QUICK, "bfloat16": QUICK[:2]}.get(trial.dtype, ())


def test_the_quick_cases_are_there():
    assert set(QUICK) <= set(CASES_BY_NAME)


@pytest.fixture(scope="session")
def outcome_of(request):
    """The outcome of a trial. All that were selected are run together where that pays, or where they make one file."""
    path = request.config.getoption("--conformance-json")
    on_gpu = jax.default_backend() == "gpu"
    if path is None and not on_gpu:
        return lambda trial: conformance.run(FAMILY, [trial])[0]
    items = [item for item in request.session.items if bool(item.get_closest_marker("gpu")) == on_gpu]
    parameters = [item.callspec.params for item in items if hasattr(item, "callspec")]
    selected = [params["trial"] for params in parameters if "trial" in params]
    outcomes = conformance.run_in_processes(FAMILY, selected, conformance.default_num_processes(), progress=print)
    if path is not None:
        conformance.Report.of(FAMILY, outcomes).write_json(path)
    return dict(zip(selected, outcomes, strict=True)).__getitem__


@pytest.mark.parametrize(
    "trial",
    [pytest.param(trial, id=str(trial), marks=[pytest.mark.slow] * is_slow(trial)) for trial in FAMILY.trials("cpu")],
)
def test_equals_reference(trial, outcome_of):
    outcome = outcome_of(trial)
    assert outcome.verdict == "ok", outcome


@pytest.mark.gpu
@pytest.mark.parametrize("trial", [pytest.param(trial, id=str(trial)) for trial in FAMILY.trials("gpu")])
def test_equals_reference_or_refuses_on_a_gpu(trial, outcome_of):
    outcome = outcome_of(trial)
    assert not outcome.problems, outcome


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [8, 40, 96])
def test_cudnn_takes_multiples_of_8(head_dim):
    case = dataclasses.replace(CASES_BY_NAME["head_dim_64_gqa_scale"], head_dim=head_dim)
    (outcome,) = conformance.run(FAMILY, [Trial(case=case, implementation="cudnn", dtype="bfloat16")])
    assert outcome.verdict == "ok (no gradient of lse, no gradient)", outcome


@pytest.mark.gpu
def test_the_gradient_of_an_lse_is_taken_by_another_implementation():
    case = CASES_BY_NAME["head_dim_128_window_gqa"]
    inputs = case.inputs("bfloat16")
    with dispatch.record() as taken:
        got = jax.jit(suite.WAYS["gradient of lse"].function(case, None))(inputs)
    names = [name for _, name in taken]
    assert len(names) == 2 and names[0] != "xla" and names[1] != "cudnn"
    assert_all_close(got, truth(case, inputs), "bfloat16")


@pytest.mark.gpu
def test_sinks_reach_the_backward_pass_of_cudnn_in_the_lse():
    """It takes no carry, so the forward pass is another's; its gradients of q, k and v know sinks by the lse alone."""
    case = dataclasses.replace(CASES_BY_NAME["learned_sinks_gqa_D64"], head_dim=96)
    inputs = case.inputs("bfloat16")
    with dispatch.record() as taken:
        got = jax.jit(suite.WAYS["gradient in any order"].function(case, None))(inputs)
    assert {op.removeprefix("blockwise_attention_"): name for op, name in taken} == {
        "forward": "xla",
        "backward": "cudnn",
    }
    assert_all_close(got, truth(case, inputs | {"dlse": jnp.zeros_like(inputs["dlse"])}), "bfloat16")


def truth(case, inputs):
    return jax.jit(suite.truth(case))({name: x.astype(jnp.float32) for name, x in inputs.items()})


def assert_all_close(got, want, dtype):
    for name in want:
        assert_close(name, got[name], want[name], dtype)


def test_the_truth_is_finite_where_logits_round_otherwise_when_computed_again():
    """Few optimisations, and a scale that is no power of two: XLA adds the bias with an FMA in some places only."""
    case = dataclasses.replace(CASES_BY_NAME["bias_alibi_gqa_D128"], q_len=24, head_dim=24)
    for name, x in jax.jit(suite.truth(case))(case.inputs("float32")).items():
        assert jnp.isfinite(x).all(), name


def test_results_have_the_dtype_of_the_inputs_and_lse_is_float32():
    case = CASES_BY_NAME["causal"]
    for way in suite.WAYS.values():
        shapes = jax.eval_shape(way.function(case, "xla"), case.inputs("bfloat16"))
        for name, x in shapes.items():
            is_float32 = name == "lse" or (name in GRADIENTS and way is suite.WAYS["hops"])
            assert x.dtype == (jnp.float32 if is_float32 else jnp.bfloat16), name


def test_merge_of_partials_equals_one_call():
    """The public op over two sets of keys, merged, differentiates to the gradients of one call: lse's cotangent."""
    case = CASES_BY_NAME["empty_rows"]
    inputs, arguments = case.inputs("float32"), case.arguments()
    arguments.pop("tokens")
    half = case.q_len // 2

    def attend(q, k, v):
        partials = [
            blockwise_attention(
                q, k[:, part], v[:, part], tokens=keys_of(None, part, case.q_len, case.q_len), return_lse=True,
                **arguments,
            )
            for part in (slice(0, half), slice(half, None))
        ]  # fmt: skip
        return merge_partials(*partials)

    @jax.jit
    def run(q, k, v, cotangents):
        results, vjp = jax.vjp(attend, q, k, v)
        return *results, *vjp(cotangents)

    results = run(inputs["q"], inputs["k"], inputs["v"], (inputs["dout"], inputs["dlse"]))
    got = dict(zip(("out", "lse", *GRADIENTS), results, strict=True))
    assert_all_close(got, truth(case, inputs), "float32")


def test_empty_carry_is_an_empty_row():
    out, lse = SoftmaxCarry.empty(batch_size=1, q_len=3, num_heads=2, value_dim=4).finalize(jnp.float32)
    assert not out.any() and (lse == -jnp.inf).all()


MUTATIONS = {
    "zero": jnp.zeros_like,
    "swapped_heads": lambda x: x[:, :, ::-1],
    "reversed_time": lambda x: x[:, ::-1],
    "one_percent_off": lambda x: 1.01 * x,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_a_wrong_gradient_fails(name, mutation):
    """The suite can fail: each mutated gradient is told apart from the true one."""
    case = CASES_BY_NAME["gqa"]
    want = truth(case, case.inputs("float32"))
    with pytest.raises(AssertionError, match=name):
        assert_close(name, MUTATIONS[mutation](want[name]), want[name], "float32")


@pytest.mark.parametrize("mutation", ["zero", "swapped_heads", "reversed_time"])
def test_a_wrong_gradient_fails_in_low_precision(mutation):
    case = CASES_BY_NAME["gqa"]
    want = truth(case, case.inputs("bfloat16"))
    for name in GRADIENTS:
        with pytest.raises(AssertionError, match=name):
            assert_close(name, MUTATIONS[mutation](want[name]), want[name], "bfloat16")

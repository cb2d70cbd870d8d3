"""Measuring: what is wrong is not timed, what is refused or fails is said, and the rest gets its figures."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks.blockwise import all_candidates, measure_blockwise, our_candidate
from benchmarks.cases import SMOKE
from benchmarks.check import Check
from benchmarks.measure import Ceiling
from benchmarks.peers import Candidate, Peer
from pallas_kernels import blockwise_attention

pytestmark = pytest.mark.usefixtures("compile_quickly")
CEILING = Ceiling(size=8, flops=1e9)


def right(case):
    """Attention by the reference's formula, as a candidate."""
    return Candidate(name="right", ours=False, attend=attend_with(case))


def attend_with(case, **options):
    arguments = {"mask": case.mask, "tokens": case.tokens, "implementation": "xla"} | options
    return lambda q, k, v, extra: blockwise_attention(q, k, v, **arguments)


def measure(case, *candidates):
    return measure_blockwise(
        [case],
        peers={},
        ceiling=CEILING,
        repetitions=2,
        progress=lambda text: None,
        candidates_of=lambda case: candidates,
    )


@pytest.fixture(autouse=True)
def little_time(monkeypatch):
    monkeypatch.setattr("benchmarks.measure.MIN_SECONDS", 1e-4)


def scaled_gradient(case, argument):
    """Attention whose gradient of one argument is 5 % too large."""
    attend = attend_with(case)

    @jax.custom_vjp
    def wrong(q, k, v):
        return attend(q, k, v, None)

    def forward(q, k, v):
        return jax.vjp(lambda q, k, v: attend(q, k, v, None), q, k, v)

    def backward(vjp, dout):
        gradients = dict(zip("qkv", vjp(dout), strict=True))
        gradients[argument] *= jnp.asarray(1.05, gradients[argument].dtype)
        return tuple(gradients.values())

    wrong.defvjp(forward, backward)
    return lambda q, k, v, extra: wrong(q, k, v)


def test_a_right_candidate_gets_its_figures():
    case = SMOKE[0]
    forward, both = measure(case, right(case))
    assert (forward.which, both.which) == ("forward", "forward+backward")
    for row in (forward, both):
        assert row.problem is None and not row.ours
        assert 0 < row.low_ms <= row.median_ms <= row.high_ms
        assert row.tflops == pytest.approx(case.flops(row.which) / (row.median_ms * 1e9))
        assert row.ceiling_share == pytest.approx(row.tflops * 1e12 / CEILING.flops)
    q, k, v, dout = (x.size * 2 for x in case.shapes("bfloat16"))
    assert forward.memory_bytes >= q + k + v + q
    assert both.memory_bytes > forward.memory_bytes


WRONG = {
    "half the window": lambda case: attend_with(case, mask=dataclasses.replace(case, window=12).mask),
    "another scale": lambda case: attend_with(case, scale=0.3),
    "not a number": lambda case: (
        lambda q, k, v, extra: attend_with(case)(q, k, v, extra) * jnp.asarray(jnp.nan, q.dtype)
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_result_is_not_timed(name):
    case = SMOKE[2]
    rows = measure(case, Candidate(name="wrong", ours=True, attend=WRONG[name](case)))
    assert len(rows) == 2
    for row in rows:
        assert row.problem.startswith("wrong: max error ") and "of out's greatest, wanted <= 0.02" in row.problem
        assert row.median_ms is None and row.tflops is None


@pytest.mark.parametrize("argument", ["q", "k", "v"])
@pytest.mark.parametrize("case", SMOKE, ids=lambda case: case.name)
def test_a_wrong_gradient_is_not_timed(case, argument):
    forward, both = measure(case, Candidate(name="wrong", ours=True, attend=scaled_gradient(case, argument)))
    assert forward.problem is None
    assert f"of d{argument}'s greatest" in both.problem and both.median_ms is None


def test_what_is_refused_or_fails_is_said_and_the_rest_goes_on():
    def refuses(q, k, v, extra):
        raise NotImplementedError("head dim 16")

    def fails(q, k, v, extra):
        raise RuntimeError("no such kernel\nlong story")

    case = SMOKE[0]
    rows = measure(
        case,
        Candidate(name="refuses", ours=False, attend=refuses, passes=("forward",)),
        Candidate(name="fails", ours=False, attend=fails, passes=("forward",)),
        our_candidate(case, "xla"),
    )
    problems = [row.problem for row in rows]
    assert problems == ["refused: head dim 16", "failed: RuntimeError: no such kernel", None, None]


def test_a_peer_that_cannot_be_imported_is_said_and_the_rest_goes_on():
    def candidates(case):
        raise ImportError("it wants another JAX")

    broken = Peer(module="broken", package="broken", candidates=candidates)
    ours, row = all_candidates(SMOKE[0], implementations=("xla",), peers={"broken": broken})
    assert ours.name == "longctx xla"
    assert row.implementation == "broken" and row.problem == "failed: ImportError: it wants another JAX"


@pytest.mark.parametrize("case", SMOKE, ids=lambda case: case.name)
def test_a_sample_of_rows_gives_every_gradient(case):
    """With fewer rows than the sequence has: the cotangent is zero elsewhere."""
    q, k, v, dout = case.inputs("bfloat16")
    check = Check.of(case, q, k, v, dout, num_rows=10)
    assert len(check.rows) <= 12 and check.rows[0] == 0 and check.rows[-1] == case.length - 1
    out, vjp = jax.vjp(lambda *x: attend_with(case)(*x, None), q, k, v)
    assert check.problem((out, *vjp(check.dout))) is None
    assert "dk" in check.problem((out, *vjp(dout))[:3])

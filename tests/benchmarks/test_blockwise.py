"""Measuring: what is wrong is not timed, what is refused or fails is said, and the rest gets its figures."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks.blockwise import all_candidates, hop_backward_candidates, measure_blockwise, our_candidates
from benchmarks.cases import SMOKE
from benchmarks.check import Check
from benchmarks.measure import Ceiling
from benchmarks.peers import Candidate, Peer
from pallas_kernels import blockwise_attention
from pallas_kernels.blockwise import api, xla

HOP = next(case for case in SMOKE if case.hop)
CEILING = Ceiling(size=8, flops=1e9)


def right(case):
    """Attention by the reference's formula, as a candidate."""
    return candidate("right", attend_with(case), ours=False)


def candidate(name, attend, **options):
    return Candidate(name=name, attend=attend, **{"ours": True, "deterministic": True} | options)


def attend_with(case, **options):
    arguments = {"mask": case.mask, "tokens": case.tokens, "implementation": "xla", **case.constants, **case.learned}
    arguments |= options
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
    rows = measure(case, candidate("wrong", WRONG[name](case)))
    assert len(rows) == 2
    for row in rows:
        assert row.problem.startswith("wrong: max error ") and "of out's greatest, wanted <= 0.02" in row.problem
        assert row.median_ms is None and row.tflops is None


QUICK = [SMOKE[1], *(pytest.param(SMOKE[i], marks=pytest.mark.slow) for i in (0, 2, 3, 4, 5))]


@pytest.mark.parametrize("argument", ["q", "k", "v"])
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_a_wrong_gradient_is_not_timed(case, argument):
    forward, both = measure(case, candidate("wrong", scaled_gradient(case, argument)))
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
        candidate("refuses", refuses, ours=False, passes=("forward",)),
        candidate("fails", fails, ours=False, passes=("forward",)),
        *our_candidates(case, "xla"),
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


def test_gradients_in_any_order_are_candidates_of_their_own():
    def told(implementation):
        return [(x.name, x.deterministic, x.passes) for x in our_candidates(SMOKE[0], implementation)]

    forward, both = ("forward",), ("forward+backward",)
    assert told("xla") == [("longctx xla", True, forward + both)]
    assert told("cudnn") == [("longctx cudnn", True, forward), ("longctx cudnn, any order", False, both)]
    assert told("mosaic_gpu") == [
        ("longctx mosaic_gpu", True, forward + both),
        ("longctx mosaic_gpu, any order", False, both),
    ]


@pytest.mark.parametrize("deterministic", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_ops_are_asked_for_the_order_that_the_name_says(deterministic, monkeypatch):
    told = set()

    def backward(*args, options, **kwargs):
        told.add(options.deterministic)
        return xla.backward(*args, options=options, **kwargs)

    monkeypatch.setitem(api.BACKWARD, "xla", backward)
    monkeypatch.setattr("benchmarks.blockwise.DETERMINISTIC", {"xla": (deterministic,)})
    rows = measure(HOP, *our_candidates(HOP, "xla"), *hop_backward_candidates(HOP, "xla"))
    assert told == {deterministic} and all(row.problem is None for row in rows)
    with_gradients = [row for row in rows if row.which != "forward"]
    assert len(with_gradients) == 3
    for row in with_gradients:
        assert row.deterministic == deterministic == (not row.implementation.endswith(", any order"))
    (forward,) = (row for row in rows if row.which == "forward")
    assert forward.deterministic


def test_the_backward_pass_of_a_hop_gets_its_figures():
    alone, accumulating = measure(HOP, *hop_backward_candidates(HOP, "xla"))
    assert alone.implementation == "longctx xla" and accumulating.implementation == "longctx xla with accumulate"
    for row in (alone, accumulating):
        assert row.which == "backward" and row.problem is None and row.ours
        assert row.tflops == pytest.approx(2.5 * HOP.flops("forward") / (row.median_ms * 1e9))


ACCUMULATES_WRONGLY = {
    "not at all": lambda accumulate: tuple(map(jnp.zeros_like, accumulate)),
    "twice": lambda accumulate: tuple(2 * x for x in accumulate),
    "other rows": lambda accumulate: tuple(x[:, ::-1] for x in accumulate),
}


@pytest.mark.parametrize("name", ACCUMULATES_WRONGLY)
def test_running_gradients_that_are_added_wrongly_are_not_timed(name, monkeypatch):
    def wrong(*args, accumulate, **kwargs):
        running = accumulate if accumulate[0] is None else ACCUMULATES_WRONGLY[name](accumulate)
        return xla.backward(*args, accumulate=running, **kwargs)

    monkeypatch.setitem(api.BACKWARD, "xla", wrong)
    alone, accumulating = measure(HOP, *hop_backward_candidates(HOP, "xla"))
    assert alone.problem is None
    assert accumulating.problem.startswith("wrong: max error ") and "of dq's greatest" in accumulating.problem


@pytest.mark.parametrize("case", [case for case in SMOKE if not case.hop], ids=lambda case: case.name)
def test_a_sample_of_rows_gives_every_gradient(case):
    """With fewer rows than the sequence has: the cotangent is zero elsewhere."""
    q, k, v, dout = case.inputs("bfloat16")
    check = Check.of(case, q, k, v, dout, num_rows=10)
    first = 1 if case.option == "dropout" else 0
    assert len(check.rows) <= 12 and check.rows[0] == first and check.rows[-1] == case.length - 1
    out, vjp = jax.vjp(lambda *x: attend_with(case)(*x, None), q, k, v)
    assert check.problem((out, *vjp(check.dout))) is None
    assert "dk" in check.problem((out, *vjp(dout))[:3])

"""The matrix of features and strategies: a cover of it runs, and the committed outcomes are of the cases there are."""

import functools
import itertools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from longctx.context_parallel import matrix

CASE = matrix.Case(features=("learned_sinks", "causal"), strategy="ring", layout="zigzag", degree=2)
RESULTS = sorted((Path(matrix.__file__).parent / "results").glob("*.json"))


# The first of it runs in CI, beside test_strategies.py.
GROUPS = range(0, len(matrix.cover()), 4)


@pytest.mark.parametrize("group", [GROUPS[0], *(pytest.param(x, marks=pytest.mark.slow) for x in GROUPS[1:])])
def test_a_cover_of_all_pairs(group):
    outcomes = list(matrix.run(matrix.cover()[group : group + 4]))
    assert [str(outcome) for outcome in outcomes if outcome.verdict != "ok"] == []
    assert all({"out", "dq", "dk", "dv"} <= set(outcome.errors) for outcome in outcomes)


def test_the_cover_holds_every_pair_that_is_served():
    served = [case for case in matrix.every_case() if case.is_served]
    assert set().union(*(case.pairs() for case in served)) == set().union(*(case.pairs() for case in matrix.cover()))
    features = {name for of_factor in matrix.FEATURES.values() for name in of_factor}
    assert {("halo", "zigzag"), ("soft_cap", "halo"), ("dropout", 8)} <= set().union(*(x.pairs() for x in served))
    assert {name for case in matrix.cover() for name in case.features} == features
    assert all(case.is_served for case in matrix.cover())


def test_every_feature_is_asked_of_every_strategy():
    features = [name for of_factor in matrix.FEATURES.values() for name in of_factor]
    asked = {(case.features, case.strategy, case.layout, case.degree) for case in matrix.every_case()}
    wanted = itertools.product([(name,) for name in features], matrix.ANYWHERE, matrix.LAYOUTS, matrix.DEGREES)
    assert asked == set(wanted) and len(features) == len(set(features))


def test_masked_shards_are_masked():
    """In every layout and degree each device but one holds nothing of the first row that sees anything."""
    problem = matrix._problem(("fully_masked_shards",))
    for case in matrix.every_case():
        if case.features == ("fully_masked_shards",):
            of_queries, _ = matrix._orders(case)
            shards = problem.tokens().q_segment_ids[0][of_queries].reshape(case.degree, -1)
            assert (shards < 0).all(axis=1).sum() == case.degree - 1


@functools.cache
def program():
    return matrix._lower(CASE, CASE.mask_or_refusal()).compile()


def test_the_same_program_gives_the_same_bits():
    """out, the gradients of q, k and v, and that of the sinks, which is summed over the devices."""
    with jax.set_mesh(matrix._mesh(CASE.degree)):
        first, second = (jax.device_get(program()(*matrix._in_layout(CASE))) for _ in range(2))
    assert len(first) == len(matrix._NAMES) and all(x.any() for x in first)
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_wrong_gradient_fails(monkeypatch):
    reference = matrix._reference(CASE.problem, CASE.mask_or_refusal())
    assert set(matrix._errors(CASE, program())) == set(matrix._NAMES)
    for index, name in enumerate(matrix._NAMES):
        scaled = [x * np.float32(1.001) if i == index else x for i, x in enumerate(reference)]
        monkeypatch.setattr(matrix, "_reference", lambda problem, mask, scaled=scaled: scaled)
        with pytest.raises(AssertionError, match=f"{name}: rms error 0.001"):
            matrix._errors(CASE, program())


def test_what_raises_is_a_failure_and_the_next_case_runs(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no such thing\nmore")

    monkeypatch.setattr(matrix, "sharded_attention", fails)
    refused = matrix.Case(features=("causal",), strategy="halo", layout="zigzag", degree=2)
    failed, was_refused = matrix.run([CASE, refused])
    assert (failed.verdict, failed.reason) == ("FAILED", "no such thing")
    assert was_refused.verdict == "refused" and "halo needs a window that is bounded on both sides" in str(was_refused)


def test_a_call_refuses_what_the_matrix_says_is_refused():
    """In the same sentence."""
    case = matrix.Case(features=("cross_attention",), strategy="halo", layout="contiguous", degree=2)
    with pytest.raises(NotImplementedError) as raised:
        matrix._lower(case, case.problem.masks[-1])
    assert str(raised.value) == f"sharded_attention: {case.mask_or_refusal()}"


def test_the_committed_outcomes_are_of_the_cases_there_are():
    """Refused is what is refused now, in the same sentence, and nothing has failed."""
    cases = {str(case): case for case in matrix.every_case()}
    assert RESULTS
    for path in RESULTS:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["counts"]["FAILED"] == 0 and result["counts"]["ok"] > 0 and result["machine"]["date"]
        for outcome in result["outcomes"]:
            found = cases[outcome["case"]].mask_or_refusal()
            refused = isinstance(found, str)
            assert (outcome["verdict"], outcome.get("reason")) == (("refused", found) if refused else ("ok", None))


def test_the_command_writes_what_it_ran(tmp_path, monkeypatch, capsys):
    path = tmp_path / "outcomes.json"
    monkeypatch.setattr("sys.argv", ["matrix", "^cross_attention-halo-.*-2$", "--json", str(path), "--commit", "abc"])
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)  # devices are there already
    with pytest.raises(SystemExit) as exited:
        matrix.main()
    assert not exited.value.code
    assert "[3/3] cross_attention-halo-striped-2: refused (halo serves queries and keys" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["counts"] == {"ok": 0, "refused": 3, "FAILED": 0} and len(result["outcomes"]) == 3
    assert result["selected"] == "^cross_attention-halo-.*-2$" and result["machine"]["commit"] == "abc"


def test_the_tests_that_the_page_on_numerics_names_are_there():
    root = Path(__file__).parents[2]
    named = set(re.findall(r"`(test_\w+)`", (root / "docs" / "numerics.md").read_text(encoding="utf-8")))
    there = {
        name
        for path in (root / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(named) > 10 and named <= there

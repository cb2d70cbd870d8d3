"""The machinery of the conformance suite: it can fail, its files are read again, and the READMEs say what they hold."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from pallas_kernels import conformance, machine
from pallas_kernels.blockwise import api, suite
from pallas_kernels.blockwise.cases import CASES
from pallas_kernels.blockwise.suite import FAMILY
from pallas_kernels.testing import Trial

CASE = next(case for case in FAMILY.cases if case.name == "gqa")
TRIAL = Trial(case=CASE, implementation="xla", dtype="float32")
FAMILIES = pytest.mark.parametrize("family", conformance.FAMILIES.values(), ids=lambda family: family.name)


@FAMILIES
def test_the_table_of_the_readme_is_current(family):
    text = conformance.readme_of(family).read_text(encoding="utf-8")
    assert conformance.with_table(family, text) == text, "run `make docs`"


@FAMILIES
def test_the_file_of_the_cpu_holds_every_case(family):
    path = conformance.folder_of(family) / "cpu.json"
    report = conformance.Report.read_json(path)
    missing = [str(trial) for trial in family.trials("cpu") if report.outcome_of(trial) is None]
    assert not missing, "run `JAX_PLATFORMS=cpu python -m pallas_kernels.conformance --json`, then `make docs`"
    assert not [outcome for outcome in report.outcomes if outcome.problems]


@FAMILIES
def test_names_of_cases_are_unique_and_promises_are_of_cases(family):
    names = [case.name for case in family.cases]
    assert len(set(names)) == len(names)
    for serves in family.serves.values():
        assert serves.cases <= set(names) and serves.ways <= set(family.ways)


def test_every_implementation_has_promises():
    assert set(FAMILY.serves) == set(api.FORWARD) >= set(api.BACKWARD)
    with pytest.raises(ValueError, match="nothing says what 'abacus' must serve; add it to the family's `serves`"):
        conformance.run(FAMILY, [dataclasses.replace(TRIAL, implementation="abacus")])


def problems(family=FAMILY, trial=TRIAL):
    (outcome,) = conformance.run(family, [trial])
    assert outcome.verdict == "FAILED"
    return "; ".join(outcome.problems)


def promising(**changes):
    serves = dataclasses.replace(suite.SERVES["xla"], **changes)
    return dataclasses.replace(FAMILY, serves={"xla": serves})


def refuse(*args, **kwargs):
    raise NotImplementedError("xla: not today")


def test_a_gradient_that_is_slightly_off_fails(monkeypatch):
    def wrong(*args, **kwargs):
        dq, dk, dv = suite.api.xla.backward(*args, **kwargs)
        return dq, 1.01 * dk, dv

    monkeypatch.setitem(api.BACKWARD, "xla", wrong)
    assert problems().startswith("gradient of lse: dk: rms error 0.01 of the rms, wanted <= 1e-06")


def test_not_a_number_fails(monkeypatch):
    def wrong(*args, **kwargs):
        out, lse = suite.api.xla.forward(*args, **kwargs)
        return out.at[0, 3].set(jnp.nan), lse

    monkeypatch.setitem(api.FORWARD, "xla", wrong)
    assert "gradient of lse: out: 96 values are not finite" in problems()


def test_a_refusal_of_what_is_promised_fails(monkeypatch):
    monkeypatch.setitem(api.BACKWARD, "xla", refuse)
    said = problems()
    assert "gradient of lse: wanted it served, got a refusal: xla: not today" in said
    assert "gradient: wanted it served" in said and "forward: " not in said


def test_a_refusal_that_is_promised_passes(monkeypatch):
    monkeypatch.setitem(api.FORWARD, "xla", refuse)
    (outcome,) = conformance.run(promising(cases=frozenset()), [TRIAL])
    assert outcome.verdict == "-"
    assert set(outcome.refused) == {"gradient of lse", "gradient", "gradient in any order", "forward"}
    monkeypatch.delitem(api.BACKWARD, "xla")
    monkeypatch.setitem(api.FORWARD, "xla", suite.api.xla.forward)
    (outcome,) = conformance.run(promising(ways=frozenset({"forward"})), [TRIAL])
    assert outcome.verdict == "ok (no gradient of lse, no gradient, no gradient in any order)"
    assert set(outcome.errors["forward"]) == {"out", "lse"}


@pytest.mark.slow
def test_a_gradient_in_any_order_is_taken_before_the_forward_pass_alone(monkeypatch):
    def unordered(*args, options, **kwargs):
        running = any(x is not None for x in kwargs["accumulate"])
        if args[-1] is not None or running or options.deterministic:
            refuse()
        return suite.api.xla.backward(*args, options=options, **kwargs)

    monkeypatch.setitem(api.BACKWARD, "xla", unordered)
    trial = dataclasses.replace(TRIAL, case=next(case for case in FAMILY.cases if case.all_ways))
    ways = frozenset({"forward", "forward hops", "gradient in any order"})
    (outcome,) = conformance.run(promising(ways=ways), [trial])
    assert outcome.verdict == "ok (no gradient of lse, no gradient, no hops)"
    assert set(outcome.errors) == {"gradient in any order", "forward hops"}
    assert set(outcome.errors["gradient in any order"]) == {"out", "lse", "dq", "dk", "dv"}


def test_a_refusal_without_the_name_fails(monkeypatch):
    def nameless(*args, **kwargs):
        raise NotImplementedError("no")

    monkeypatch.setitem(api.FORWARD, "xla", nameless)
    assert "forward: wanted a refusal that begins with 'xla', got 'no'" in problems(promising(cases=frozenset()))


def test_what_is_served_and_not_promised_fails():
    assert "gradient of lse: wanted a refusal, it is served" in problems(promising(dtypes=frozenset()))


def test_another_implementation_than_the_named_one_fails():
    def unasked(case, implementation):
        return suite.WAYS["gradient of lse"].function(case, "reference")

    ways = FAMILY.ways | {"gradient of lse": dataclasses.replace(suite.WAYS["gradient of lse"], function=unasked)}
    said = problems(dataclasses.replace(FAMILY, ways=ways))
    assert "gradient of lse: ran [('blockwise_attention_backward', 'reference')" in said


def test_whatever_an_implementation_raises_is_its_outcome(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel\nlong story")

    monkeypatch.setitem(api.FORWARD, "xla", broken)
    assert problems() == "all ways: failed with RuntimeError: no such kernel"


def test_a_report_survives_its_file_and_knows_a_changed_case(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGCTX_COMMIT", "abc")
    outcomes = conformance.run(FAMILY, [TRIAL])
    path = tmp_path / "new" / "cpu.json"
    conformance.Report.of(FAMILY, outcomes).write_json(path)
    read = conformance.Report.read_json(path)
    assert read.machine["commit"] == "abc" and read.machine["platform"] == "cpu"
    assert read.outcome_of(TRIAL).verdict == "ok"
    assert "mask=Causal(offset=0)" in json.loads(path.read_text())["cases"]["gqa"]["case"]
    changed = dataclasses.replace(CASE, q_len=51)
    assert read.outcome_of(dataclasses.replace(TRIAL, case=changed)) is None
    assert read.outcome_of(dataclasses.replace(TRIAL, dtype="float16")) is None


def test_a_report_keeps_what_an_earlier_one_holds_of_unchanged_cases(tmp_path):
    def outcome(case, dtype="float32", **figures):
        return conformance.Outcome(case=case, implementation="xla", dtype=dtype, **figures)

    first = [outcome("gqa"), outcome("one_token"), outcome("soft_cap"), outcome("soft_cap", "float16", commit="a")]
    earlier = conformance.Report.of(FAMILY, first, commit="b")
    earlier.cases["one_token"]["digest"] = "another"
    new = conformance.Report.of(FAMILY, [outcome("gqa", problems=["worse"])], commit="c")
    path = tmp_path / "cpu.json"
    new.over(earlier, FAMILY).write_json(path)
    read = conformance.Report.read_json(path)
    assert [(x.case, x.dtype, x.commit) for x in read.outcomes] == [
        ("soft_cap", "float32", "b"),
        ("soft_cap", "float16", "a"),
        ("gqa", "float32", None),
    ]
    assert set(read.cases) == {"soft_cap", "gqa"} and read.machine["commit"] == "c"
    assert read.outcome_of(TRIAL).problems == ["worse"]


def test_what_a_command_ran_joins_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(conformance, "folder_of", lambda family: tmp_path)
    for name in ("one_token", "gqa"):
        chosen = ["--family", "blockwise", "--cases", f"^{name}$", "--implementations", "xla", "--json"]
        assert conformance.main([*chosen, "--commit", name]) == 0
    (path,) = tmp_path.iterdir()
    assert str(path) in capsys.readouterr().out
    read = conformance.Report.read_json(path)
    assert {(x.case, x.commit) for x in read.outcomes} == {("one_token", "one_token"), ("gqa", None)}
    assert not [x for x in read.outcomes if x.problems]


def test_a_file_that_is_written_does_not_change_the_commit_it_names(tmp_path, monkeypatch):
    commits = iter(["abc", *["abc with changes"] * 9])
    monkeypatch.delenv("LONGCTX_COMMIT", raising=False)
    monkeypatch.setattr(machine, "_git_commit", lambda: next(commits))
    monkeypatch.setattr(conformance, "folder_of", lambda family: tmp_path)
    chosen = ["--family", "blockwise", "--cases", "^(one_token|block_of_one)$", "--implementations", "xla"]
    assert conformance.main([*chosen, "--json"]) == 0
    (path,) = tmp_path.iterdir()
    assert conformance.Report.read_json(path).machine["commit"] == "abc"


def test_the_text_of_a_case_is_the_same_in_every_process():
    assert not [case.name for case in FAMILY.cases if " at 0x" in conformance.text_of(case)]


def test_cells_say_where_dtypes_differ_and_what_was_not_run(monkeypatch):
    def outcome(**figures):
        return conformance.Outcome(case="gqa", implementation="xla", **figures)

    def cell(*outcomes):
        report = conformance.Report.of(FAMILY, outcomes, commit="abc")
        trials = [dataclasses.replace(TRIAL, dtype=dtype) for dtype in ("bfloat16", "float16")]
        return conformance._cell(report, trials, CASE)

    right = {"gradient": {"dq": (0.0, 0.0)}}
    weaker = outcome(dtype="bfloat16", errors=right, refused={"gradient of lse": "xla: no"})
    assert cell(weaker, outcome(dtype="float16", errors=right, refused=weaker.refused)) == "ok (no gradient of lse)"
    assert cell(weaker, outcome(dtype="float16", refused={"forward": "xla: no"})) == (
        "bfloat16: ok (no gradient of lse); float16: -"
    )
    assert cell(weaker) == "bfloat16: ok (no gradient of lse); float16: not run"
    assert cell(outcome(dtype="bfloat16", problems=["x"]), outcome(dtype="float16", problems=["x"])) == "FAILED"


def test_the_command_says_what_it_ran(capsys):
    assert conformance.main(["--family", "blockwise", "--cases", "^one_token$", "--implementations", "xla"]) == 0
    assert "one_token xla float32: ok, greatest rms error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "triangle"], "blockwise: no case by an implementation is chosen"),
    ],
)
def test_a_wrong_command_line_is_told(arguments, message, capsys):
    assert conformance.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_processes_that_share_the_work_change_nothing(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # for the children: this process was told in another way
    names = ("one_token", "block_of_one", "table")
    trials = [trial for trial in FAMILY.trials("cpu") if trial.case.name in names and trial.case in CASES]
    shared, alone = conformance.run_in_processes(FAMILY, trials, 2), conformance.run(FAMILY, trials)
    # But for the last bits of errors: this process compiles with fewer optimisations.
    assert [dataclasses.replace(x, errors={}) for x in shared] == [dataclasses.replace(x, errors={}) for x in alone]
    assert [set(x.errors) for x in shared] == [set(x.errors) for x in alone]

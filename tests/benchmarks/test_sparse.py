"""The benchmark of sparse attention: what it counts, what it compares with, and that it runs."""

import dataclasses

import numpy as np
import pytest

from benchmarks import run, sparse, sparse_cases
from benchmarks.results import Results, Row
from benchmarks.sparse_cases import SMOKE, SparseCase
from pallas_kernels.sparse import nsa


def case_of(kind: str) -> SparseCase:
    return next(case for case in SMOKE if case.kind == kind)


def test_lists_and_mask_say_the_same():
    """And pairs and density are those of the mask, by dense attention's."""
    case = case_of("chosen")
    allowed = np.broadcast_to(
        case.mask.dense(None, case.length, case.length, num_heads=case.num_heads), (1, 4, case.length, case.length)
    )
    blocks = np.asarray(case.selection().chosen())
    of_pairs = np.repeat(np.repeat(blocks, 128, axis=2), 128, axis=3) & np.tri(case.length, dtype=bool)
    np.testing.assert_array_equal(allowed, of_pairs)
    assert (allowed.sum(axis=(2, 3)) == case.pairs).all()
    assert len(np.unique(blocks, axis=1)) and blocks.sum() / 4 == case.density * (4 * 5 / 2)


def test_pairs_of_moba_by_hand():
    """Four chunks of 128, two of them at most: own ones of 128 * 129 / 2 pairs, and three whole ones of 128 ** 2."""
    assert case_of("moba").pairs == 4 * 128 * 129 // 2 + 3 * 128**2


def test_times_are_compared_with_dense_attention_of_the_same_order():
    case = dataclasses.replace(case_of("chosen"), one_in=1)
    dense, choice = case.dense_case, dataclasses.replace(case, kind="select")

    def row(case, name, ms, which="forward"):
        return Row(case=case.name, which=which, implementation=name, ours=True, median_ms=ms)

    rows = [row(dense, "a", 4.0), row(dense, "b", 2.0), row(case, "a", 3.0), row(choice, "means", 0.5)]
    *_, chosen, chose = sparse._with_savings(rows, (dense, case, choice))
    assert chosen.details == {"density": 1.0, "x density": 0.75, "speed-up": 4 / 3}
    assert chose.details == {"% of dense": 25.0}


def test_the_cases_are_listed(capsys):
    assert run.main(["--family", "sparse", "--list", "--cases", "MoBA"]) == 0
    assert capsys.readouterr().out.count("MoBA, chunks of 512, top 4") == 2
    assert run.main(["--family", "sparse", "--passes", "backward"]) == 2


@pytest.mark.slow
def test_smoke_cases_end_to_end(tmp_path):
    assert (
        run.main(
            ["--family", "sparse", "--cases", "smoke", "--repetitions", "1", "--peers", "", "--out", str(tmp_path)]
        )
        == 0
    )
    (path,) = tmp_path.glob("*.json")
    rows = Results.read_json(path).rows
    assert {row.case for row in rows} == {case.name for case in (*SMOKE, SMOKE[0].dense_case)}
    assert all(row.problem is None for row in rows)
    assert all(row.details for row in rows if not row.case.startswith("dense"))
    assert {row.implementation for row in rows if row.case.startswith("select")} == set(sparse_cases.SELECTORS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["selected", "nsa"])
def test_a_block_that_is_left_out_is_found(kind, monkeypatch):
    """By the rows that are compared, out and every gradient; and what is right passes."""
    case = dataclasses.replace(case_of(kind), length=1536, num_heads=2, num_kv_heads=1)
    family = sparse._Sparse(implementations=("xla",), peers={}, ceiling=None, dtype="bfloat16")
    run_one = family.start(case, {which: lower().compile() for which, lower in family.checks(case).items()})

    def problem():
        (candidate,) = family.candidates(case)
        return run_one(candidate, "forward+backward", family.lower(candidate, case, "forward+backward").compile())[0]

    assert problem() is None
    chooser = "benchmarks.sparse.draw_choices" if kind == "selected" else "pallas_kernels.sparse.nsa.choose_blocks"
    choose = sparse.draw_choices if kind == "selected" else nsa.choose_blocks
    monkeypatch.setattr(chooser, lambda *args, **options: choose(*args, **options).at[..., 5].set(-1))
    assert "out" in problem()

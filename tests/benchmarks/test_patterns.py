"""The patterns measured: each beside its dense attention, shares counted as its mask has them, wrong results told."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import measure, patterns, run
from benchmarks.cases import WHOLE_PASSES
from benchmarks.check import Check
from benchmarks.pattern_cases import (
    CASES,
    DENSE,
    SMOKE,
    PatternCase,
    big_bird,
    packed_contexts,
    sections_of_sentences,
)
from benchmarks.patterns import with_savings
from benchmarks.results import Row
from longctx import masks
from pallas_kernels import blockwise_attention


# One case against its dense one with gradients, and all of them both ways.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("smoke", "passes"),
    [(SMOKE[:1], ("forward+backward",)), pytest.param(SMOKE, WHOLE_PASSES, marks=pytest.mark.slow)],
    ids=["one", "all"],
)
def test_smoke_cases_end_to_end(smoke, passes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(patterns, "SMOKE", smoke)
    monkeypatch.setattr(measure, "MIN_SECONDS", 1e-3)
    monkeypatch.setattr(measure, "CEILING_SIZE", {"cpu": 32})
    arguments = ["--family", "patterns", "--cases", "smoke", "--passes", ",".join(passes)]
    assert run.main([*arguments, "--repetitions", "2", "--out", str(tmp_path), "--commit", "abc"]) == 0
    saved, page = (next(tmp_path.glob(f"*_cpu_patterns.{ending}")).read_text() for ending in ("json", "md"))
    rows = json.loads(saved)["rows"]
    dense = [f"{kind} {smoke[0].shape_name}" for kind in DENSE if kind in {case.dense for case in smoke}]
    assert [row["case"] for row in rows] == [name for name in (*dense, *(x.name for x in smoke)) for _ in passes]
    by_case = {(row["case"], row["which"]): row for row in rows}
    for row in rows:
        assert row["problem"] is None and row["implementation"] == "longctx xla"
        if row["case"] in dense:
            assert row["details"] == {}
    for case in smoke:
        for which in passes:
            row, against = by_case[case.name, which], by_case[case.dense_case.name, which]
            speed_up = against["median_ms"] / row["median_ms"]
            share = case.blocks / case.dense_case.blocks
            assert row["details"] == pytest.approx(
                {
                    "% of pairs": 100 * case.pairs / case.dense_case.pairs,
                    "% of blocks": 100 * share,
                    "speed-up": speed_up,
                    "% of ideal": 100 * speed_up * share,
                }
            )
    assert "| % of pairs | % of blocks | speed-up | % of ideal |" in page and "Interrupted" not in page
    assert f"[1/{len(rows)}] {dense[0]}, {passes[0]}, longctx xla: " in capsys.readouterr().out


@pytest.mark.parametrize("case", SMOKE, ids=lambda case: case.name)
def test_pairs_and_blocks_are_those_of_the_dense_mask(case):
    dense = np.asarray(case.mask.dense(case.tokens, case.length, case.length, num_heads=case.num_heads))
    dense = np.broadcast_to(dense[0], (case.num_heads, case.length, case.length))
    assert case.pairs == dense.sum() / case.num_heads
    blocks = dense.reshape(case.num_heads, case.length // 128, 128, -1, 128).any(axis=(2, 4))
    assert case.blocks == blocks.sum() / case.num_heads
    assert case.flops("forward") == 4 * dense.sum() * case.head_dim


@pytest.mark.slow
def test_the_check_knows_masks_that_differ_between_heads():
    case = dataclasses.replace(SMOKE[0], length=256, num_heads=4, num_kv_heads=2)
    q, k, v, dout = case.inputs("bfloat16")
    check = Check.of(case, q, k, v, dout, num_rows=40)

    def attend(mask):
        return blockwise_attention(q, k, v, mask=mask, implementation="reference")

    assert check.problem((attend(case.mask),)) is None
    swapped = masks.per_head(*reversed(case.mask.masks))
    assert check.problem((attend(swapped),)).startswith("max error ")


def test_a_pattern_without_its_dense_time_has_no_speed_up():
    case = SMOKE[0]
    row = Row(case=case.name, which="forward", implementation="a", ours=True, median_ms=2.0)
    dense = dataclasses.replace(row, case=case.dense_case.name, median_ms=4.0)
    cases = case.dense_case, case
    assert set(with_savings([row], cases)[0].details) == {"% of pairs", "% of blocks"}
    assert with_savings([dense, row], cases)[1].details["speed-up"] == 2
    other = dataclasses.replace(dense, implementation="b")
    assert "speed-up" not in with_savings([other, row], cases)[1].details
    wrong = dataclasses.replace(row, median_ms=None, problem="wrong: all of it")
    assert with_savings([dense, wrong], cases)[1] == wrong


def test_the_cases_are_of_one_shape_and_told_apart():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) == 22
    assert {case.shape_name for case in CASES} == {"B1 S32768 16/16 D128"}
    for case in CASES:
        assert len(case.mask.by_head(case.num_heads)) == 16 and case.dense in DENSE
        assert (case.segment_ids_of is not None) == case.mask.uses_segments
        tokens = case.tokens
        assert tokens is None or tokens.q_segment_ids.shape == (1, 32768)


@pytest.mark.parametrize(
    ("pattern", "share"),
    [
        ("8 shards", None),
        pytest.param("strided 16, blocks", 0.1792, marks=pytest.mark.slow),
        pytest.param("stride 8, by tiles", 4 * 4 * 3 / 256, marks=pytest.mark.slow),
        pytest.param("blocks of 16 x 16 x 16", 1 / 8, marks=pytest.mark.slow),
    ],
)
def test_patterns_of_whole_blocks_visit_no_others(pattern, share):
    """Nothing but the blocks on the diagonal of causal patterns, of which half the pairs may attend."""
    (case,) = (case for case in CASES if pattern in case.name)
    if share is None:  # of one head: quick
        case = dataclasses.replace(case, mask=case.mask.masks[3])
    causal = case.dense == "dense causal"
    assert case.blocks - 256 * causal / 2 == pytest.approx(case.pairs / 128**2, abs=1 if causal else 0)
    dense_blocks = 256 * 257 / 2 if causal else 256**2
    assert share is None or case.blocks / dense_blocks == pytest.approx(share, abs=1e-4)


def test_segment_ids_of_the_cases():
    contexts = packed_contexts(320)
    assert contexts[0] == 0 and contexts[-1] == 255 and (np.diff(contexts) >= 0).all() and len(set(contexts)) == 16
    levels = sections_of_sentences(20, section=9, sentence=4)
    fields = [(x >> 13 & 255, x >> 1 & 4095, x & 1) for x in levels.tolist()]
    assert fields[:11] == [
        (0, 0, 0),
        (1, 0, 0),
        *[(1, 1, 0), *[(1, 1, 1)] * 3],
        *[(1, 2, 0), *[(1, 2, 1)] * 3],
        (2, 0, 0),
    ]
    assert (levels >> 21 == 0).all() and (np.diff(levels) >= 0).all()


def test_big_bird_has_as_many_blocks_as_told():
    blocks = np.asarray(big_bird(2048).dense(None, 2048, 2048))[0].reshape(16, 128, 16, 128)
    assert (blocks.any(axis=(1, 3)) == blocks.all(axis=(1, 3))).all()
    of_a_row = blocks.any(axis=(1, 3)).sum(axis=1)
    assert (of_a_row[:2] == 16).all() and (of_a_row[2:] >= 5).all() and (of_a_row[2:] <= 8).all()


def test_a_case_is_a_value():
    assert PatternCase(**{f.name: getattr(SMOKE[0], f.name) for f in dataclasses.fields(PatternCase)}) == SMOKE[0]
    assert SMOKE[0].dense_case.dense_case == SMOKE[0].dense_case


def test_list_shows_what_each_is_compared_with(capsys):
    assert run.main(["--family", "patterns", "--list", "--cases", "MoA"]) == 0
    assert capsys.readouterr().out == "windows 1024 to 8192 (MoA) B1 S32768 16/16 D128  (against dense causal)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "cudnn"], "--peers: goes with another family, got --family patterns; leave it out"),
        (["--passes", "backward"], "--passes: 'backward' alone is measured of hops only"),
        (
            ["--implementations", "cuda"],
            "--implementations: got 'cuda', wanted some of mosaic_gpu,mosaic_tpu,cudnn,xla",
        ),
        (["model.dim=3"], "model.dim=3: overrides go with --family train"),
    ],
)
def test_a_wrong_command_line_is_told(arguments, message, capsys):
    assert run.main(["--family", "patterns", "--cases", "smoke", *arguments]) == 2
    assert message in capsys.readouterr().err

"""The benchmark of decoding: what it counts, that what is wrong is not timed, and that it runs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decode, run
from benchmarks.decode import CASES, SMOKE
from benchmarks.measure import Bandwidth
from benchmarks.results import Results


@pytest.mark.parametrize("case", SMOKE, ids=lambda case: case.name)
def test_the_keys_read_are_those_that_any_query_sees(case):
    dense = np.asarray(case.mask.dense(case.tokens, case.q_len, case.num_slots)).reshape(-1, case.q_len, case.num_slots)
    assert case.num_read == dense.any(axis=1).sum()
    arrays = 2 if case.value_dim is None else 1
    assert case.bytes("bfloat16") == arrays * 2 * case.num_read * case.num_kv_heads * case.head_dim


def test_names_tell_cases_apart():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert names[2] == "B1 S131072 T1 32/8 D128" and names[-4] == "window 65536 B1 S1048576 T1 32/8 D128"
    assert names[-1] == "latents B16 S8192 T1 16/1 D576 of 512 values"
    assert CASES[2].bytes("bfloat16") == 2**29


def test_what_is_wrong_is_not_timed(monkeypatch):
    case = dataclasses.replace(SMOKE[0], lengths=(40,))
    of_another_mask = dataclasses.replace(case, window=3)
    monkeypatch.setattr(decode, "_formula", lambda case, original=decode._formula: original(of_another_mask))
    bandwidth = Bandwidth(size=1, bytes=1e9)
    rows = decode.measure_decode(
        [case], bandwidth=bandwidth, implementations=("xla",), peers=("cudnn",), progress=lambda text: None
    )
    assert [(row.implementation, row.problem.split(":")[0], row.median_ms) for row in rows] == [
        ("cudnn", "refused", None),
        ("longctx xla", "wrong", None),
    ]


def test_a_command_line_that_does_not_fit_is_told(capsys):
    for arguments, message in (
        (["--passes", "backward"], "--passes: got 'backward', wanted forward: decoding has no other"),
        (["--peers", "jla"], "--peers: got 'jla', wanted some of cudnn,triton"),
        (["--implementations", "cudnn"], "--implementations: got 'cudnn', wanted some of mosaic_gpu,xla"),
        (["--config", "x"], "--config: goes with --family train, got --family decode; leave it out"),
        (["a=b"], "a=b: overrides go with --family train"),
    ):
        assert run.main(["--family", "decode", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_smoke_cases_end_to_end(tmp_path, capsys):
    assert run.main(["--family", "decode", "--list", "--cases", "T8"]) == 0
    assert "B1 S131072 T8 32/8 D128  (536.9 MB read)" in capsys.readouterr().out
    arguments = ["--cases", "smoke", "--repetitions", "1", "--implementations", "xla", "--out", str(tmp_path)]
    assert run.main(["--family", "decode", *arguments]) == 0
    (path,) = tmp_path.glob("*.json")
    results = Results.read_json(path)
    timed = [row for row in results.rows if row.ours]
    assert {row.case for row in timed} == {case.name for case in SMOKE}
    assert all(row.problem is None and row.details["% of copy"] > 0 for row in timed)
    assert all(row.problem.startswith("refused: ") for row in results.rows if not row.ours)
    assert jnp.isfinite(results.copy_gb_per_second)

"""The loss's benchmark, and a step's parts."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import loss, run, train_floor
from benchmarks.measure import Ceiling
from benchmarks.train_floor import Line, Part
from longctx import LightningConfig


def test_smoke(tmp_path, capsys):
    assert run.main(["--family", "loss", "--cases", "smoke", "--repetitions", "1", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*_loss.json")
    rows = json.loads(file.read_text())["rows"]
    names = ["plain", "longctx, tile 16", "longctx, tile 64", "matmuls alone"]
    assert [row["implementation"] for row in rows] == names
    assert all(row["median_ms"] > 0 and row["problem"] is None for row in rows)


def test_what_is_wrong_is_not_timed(monkeypatch):
    good = loss.fused_cross_entropy

    def halved(hidden, *arguments, **options):
        return good(0.5 * hidden, *arguments, **options)

    monkeypatch.setattr(loss, "fused_cross_entropy", halved)
    rows = loss.measure_loss(loss.SMOKE, ceiling=Ceiling(size=1, flops=1.0), repetitions=1)
    assert [row.median_ms is None for row in rows] == [False, True, True, False]
    assert rows[1].problem.startswith("wrong: loss differs from the plain loss's by")


def test_options_of_other_families_are_refused(capsys):
    assert run.main(["--family", "loss", "--peers", "cudnn"]) == 2
    assert "--peers: goes with another family, got --family loss; leave it out" in capsys.readouterr().err


def line(kind, name, count, seconds, flops=None):
    part = Part(kind=kind, name=name, count=count, function=print, arguments=(), flops=flops)
    return Line(part=part, seconds=seconds)


def test_the_table_adds_up():
    lines = [
        line("matmuls", "mlp: down", 10, 0.03, flops=3e10),
        line("matmuls", "loss, 4 x 8", 2, 0.05),
        line("attention", "far: attention", 10, 0.01),
        line("loss", "loss, fused", 1, 0.15),
    ]
    shown = train_floor.table(lines, 0.8, Ceiling(size=8, flops=2e12))
    assert "| mlp: down | 10 | 30.000 | 1 | 50% | 300.0 | 37.5 |" in shown
    assert "| **matmuls** |  |  |  |  | 400.0 | 50.0 |" in shown
    assert "| **loss** beyond its matmuls |  |  |  |  | 50.0 | 6.2 |" in shown  # of which 100 ms are its matmuls
    assert "| **floor**: matmuls and attention |  |  |  |  | 500.0 | 62.5 |" in shown
    assert "| recomputed, and not accounted for |  |  |  |  | 250.0 | 31.2 |" in shown
    assert shown.endswith("The step takes 1.600 of its floor.")


SMALL = [
    "configs/gpu_small.yaml",
    "model.dim=64",
    "model.num_layers=2",
    "model.mlp_dim=96",
    "model.mixers.attention.num_heads=4",
    "model.mixers.attention.num_kv_heads=2",
    "model.mixers.attention.head_dim=16",
    "data.seq_len=128",
    "training.accumulate_steps=2",
]


@pytest.mark.slow
def test_parts_of_a_step():
    """In a process of its own, since the tests have eight devices."""
    command = [sys.executable, "-m", "benchmarks.train_floor", *SMALL, "--repetitions", "1", "--warm", "0"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    parts = ("attention: q, 64 x 64", "mlp: gate, up, 64 x 96", "loss, fused", "sums of gradients", "optimizer")
    assert all(f"| {part} |" in run.stdout for part in parts)
    # Two layers in two microbatches; gate and up are two matmuls.
    assert "| mlp: gate, up, 64 x 96 | 8 |" in run.stdout and "| attention: attention | 4 |" in run.stdout


def test_what_it_cannot_take_apart_is_refused(capsys):
    model = SimpleNamespace(mixers={"far": LightningConfig(num_heads=2)})
    step = SimpleNamespace(parts=SimpleNamespace(model=model), config=SimpleNamespace(training=None))
    with pytest.raises(ValueError, match="model.mixers.far: is of kind 'lightning', wanted attention"):
        next(train_floor.parts_of(step))
    assert train_floor.main(["configs/none.yaml"]) == 2
    assert "configs/none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--repetitions", "0"], ["--warm", "-1"]])
def test_no_measurement_is_refused(capsys, arguments):
    assert train_floor.main(["configs/transformer_1p3b_gpu1.yaml", *arguments]) == 2
    assert "wanted >= 1 and >= 0" in capsys.readouterr().err
    if arguments[0] == "--repetitions":
        assert run.main(["--family", "decode", *arguments]) == 2
        assert "--repetitions: got 0, wanted 1 or more" in capsys.readouterr().err

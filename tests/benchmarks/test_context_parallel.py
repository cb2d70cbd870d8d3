"""Attention over ever more devices: every strategy has a row, what is wrong is not timed, and the figures are right."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import context_parallel, measure, run, scaling_report
from benchmarks.context_parallel import CASES, SMOKE, ScalingCase, Way, _Trial, degrees_up_to, measure_context_parallel
from benchmarks.measure import Ceiling
from benchmarks.results import Results, Row
from longctx.context_parallel import Layout
from longctx.context_parallel.config import STRATEGIES
from longctx.context_parallel.ring import Ring

pytestmark = pytest.mark.usefixtures("little_time")
ROOT = Path(__file__).parents[2]
ZIGZAG = Layout(name="zigzag")
TINY = ScalingCase(
    kind="window 3",
    tokens_per_device=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    window=3,
    ways=(
        Way(strategy="ring", layout=ZIGZAG),
        Way(strategy="all_gather", layout=Layout(name="striped", stripe_size=2)),
        Way(strategy="ulysses"),
        Way(strategy="halo"),
        Way(strategy="halo", layout=ZIGZAG),
    ),
)
RING = dataclasses.replace(TINY, ways=(Way(strategy="ring"),))


@pytest.fixture(scope="module")
def little_time():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "MIN_SECONDS", 1e-4)
        patch.setattr(measure, "CEILING_SIZE", {"cpu": 32})
        yield


def rows_of(*cases, passes=("forward",)):
    ceiling = Ceiling(size=8, flops=1e9)
    return measure_context_parallel(
        cases, degrees=(1, 2), ceiling=ceiling, passes=passes, repetitions=2, progress=lambda text: None
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, little_time):
    """What the command writes of TINY."""
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_parallel, "SMOKE", (TINY,))
        arguments = ["--family", "context_parallel", "--devices", "2", "--cases", "smoke", "--passes", "forward"]
        assert run.main([*arguments, "--repetitions", "2", "--out", str(out), "--commit", "abc"]) == 0
    return out


@pytest.fixture(scope="module")
def results(folder):
    (path,) = folder.glob("*_cpu_context_parallel.json")
    return Results.read_json(path)


@pytest.fixture(scope="module")
def rows(results):
    return results.rows


def test_every_strategy_has_a_row_or_its_refusal(rows):
    assert [(row.devices, row.implementation) for row in rows] == [
        (1, "one device"),
        (2, "ring zigzag"),
        (2, "all_gather striped 2"),
        (2, "ulysses contiguous"),
        (2, "halo contiguous"),
        (2, "halo zigzag"),
    ]
    *timed, refused = rows
    for row in timed:
        assert row.problem is None and row.case == TINY.name == "window 3 B1 S8 a device 4/2 D8"
        assert 0 < row.low_ms <= row.median_ms <= row.high_ms and row.memory_bytes > 0
        assert row.kernels == ("attention_forward xla",)
    assert refused.problem.startswith("refused: sharded_attention: halo reads a window off positions")
    assert refused.median_ms is None and refused.one_device_share is None


def test_flops_are_those_of_one_device_and_are_set_beside_one_alone(results):
    """Counted by hand: a window of 3 holds 1 + 2 + 3 (length - 2) pairs, each of 4 D FLOPs for each head."""
    alone, *split, _ = results.rows
    flops = {1: (1 + 2 + 3 * 6) * 4 * 8 * 4, 2: (1 + 2 + 3 * 14) * 4 * 8 * 4}
    assert alone.tflops == pytest.approx(flops[1] / (alone.median_ms * 1e9)) and alone.one_device_share is None
    for row in split:
        assert row.tflops == pytest.approx(flops[2] / 2 / (row.median_ms * 1e9))
        assert row.one_device_share == pytest.approx(row.tflops / alone.tflops)
        assert row.ceiling_share == pytest.approx(row.tflops / results.ceiling_tflops)


def test_a_wrong_strategy_is_said_and_not_timed(monkeypatch):
    right = Ring.forward

    def forgets_a_hop(self, setting, q, k, v, tokens, schedule, **options):
        out, residuals = right(self, setting, q, k, v, tokens, schedule, **options)
        first = jax.lax.axis_index(setting.axes) == 0
        return jnp.where(first, out, jnp.zeros_like(out)), residuals

    monkeypatch.setattr(Ring, "forward", forgets_a_hop)
    alone, wrong = rows_of(RING)
    assert alone.problem is None
    assert wrong.problem.startswith("wrong: max error ") and "of out's greatest" in wrong.problem
    assert wrong.median_ms is None and wrong.tflops is None and wrong.one_device_share is None


def test_a_wrong_gradient_is_said_and_not_timed(monkeypatch):
    backward = Ring.backward

    def too_large(self, *args, **options):
        dq, dk, dv = backward(self, *args, **options)
        return dq, dk * jnp.asarray(1.05, dk.dtype), dv

    monkeypatch.setattr(Ring, "backward", too_large)
    ways = Way(strategy="ring"), Way(strategy="halo")
    alone, wrong, right = rows_of(dataclasses.replace(TINY, ways=ways), passes=("forward+backward",))
    for row in (alone, right):
        assert row.problem is None and row.median_ms > 0
        assert row.kernels == ("attention_forward xla", "attention_backward xla")
    assert "of dk's greatest" in wrong.problem and wrong.median_ms is None


def test_what_fails_is_said_and_the_rest_goes_on(monkeypatch):
    def fails(self, *args, **options):
        raise RuntimeError("no such link\nlong story")

    monkeypatch.setattr(Ring, "schedule", fails)
    alone, failed = rows_of(RING)
    assert alone.problem is None and failed.problem == "failed: RuntimeError: no such link"


@pytest.mark.parametrize("way", TINY.ways[:3], ids=lambda way: way.name)
def test_inputs_lie_on_the_devices_as_the_layout_says(way):
    trial = _Trial(whole=TINY.at(2), degree=2, way=way)
    x = jnp.arange(32).reshape(2, 16)
    placed = trial.place(x)
    order = way.layout.order(16, 2)
    for shard in placed.addressable_shards:
        device = jax.devices().index(shard.device)
        assert np.array_equal(shard.data, np.asarray(x)[:, order[8 * device : 8 * device + 8]])
    assert np.array_equal(trial.restore(placed), x)
    positions = trial.tokens().q_positions
    assert positions is None if way.layout.name == "contiguous" else np.array_equal(positions[0], order)


def test_documents_stretch_with_the_length_and_count_from_zero():
    case = SMOKE[2]
    assert case.documents == (20, 5, 39) and case.at(1).documents == (10, 2, 20) and case.at(2).documents == (20, 5, 39)
    positions = _Trial(whole=case.at(2), degree=2, way=None).tokens().q_positions
    assert positions[0, [0, 19, 20, 24, 25, 63]].tolist() == [0, 19, 0, 4, 0, 38]
    bounded = _Trial(whole=case.at(2), degree=2, way=Way(strategy="halo", told_longest=True))
    assert bounded.sharding.max_document_length == 39


def test_the_cases_are_those_of_the_field():
    assert len({case.name for case in CASES}) == len(CASES) == 4
    *weak, strong = CASES
    for case in weak:
        assert (case.num_heads, case.num_kv_heads, case.head_dim) == (64, 8, 128)
        assert [case.at(degree).length for degree in (1, 8)] == [8192, 65536]
        assert len({way.name for way in case.ways}) == len(case.ways)
    assert strong.at(1) == strong.at(4) and strong.at(4).documents == (12288, 4096) * 4
    assert strong.at(4).pairs == 4 * (8192 * 8193 // 2 + 4096 * 8192 + 4096 * 4097 // 2)
    for cases in (CASES, SMOKE):
        assert {way.strategy for case in cases for way in case.ways} == {
            name for name, x in STRATEGIES.items() if x.platform is None
        }
    assert [degrees_up_to(number) for number in (2, 6, 8)] == [(1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]


def test_a_case_has_one_kind_of_length():
    for options in ({}, {"length": 64, "tokens_per_device": 8}):
        with pytest.raises(ValueError, match="wanted one of them; leave out the other"):
            ScalingCase(kind="causal", num_heads=1, num_kv_heads=1, head_dim=8, ways=(), **options)


def test_the_page_says_what_the_figures_are(folder, results):
    assert results.settings == {"devices": 2, "dtype": "bfloat16", "repetitions": 2, "cases": "smoke"}
    (path,) = folder.glob("*.md")
    page = path.read_text()
    for text in (
        "% of one device** is that over the TFLOP/s of one device alone",
        "say nothing of speed",
        "## forward",
        "### window 3 B1 S8 a device 4/2 D8",
        "One device alone: ",
        "| devices | ring zigzag | all_gather striped 2 | ulysses contiguous | halo contiguous | halo zigzag |",
        "Kernels: attention_forward xla.",
        "| halo zigzag, 2 devices | refused: ",
        "Commit abc.",
    ):
        assert text in page
    if importlib.util.find_spec("matplotlib"):
        (picture,) = folder.glob("*.png")
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_strategies_stand_side_by_side_by_case_and_number_of_devices():
    def row(name, devices, median_ms=None, **options):
        figures = {} if median_ms is None else dict(low_ms=1.0, high_ms=9.0, tflops=400.0, ceiling_share=0.5)
        return Row(
            case="causal", which="forward", implementation=name, ours=True, devices=devices, median_ms=median_ms,
            kernels=("forward xla",), **figures, **options,
        )  # fmt: skip

    lines = scaling_report.tables(
        [
            row("one device", 1, 2.0),
            row("ring", 2, 3.0, one_device_share=0.9),
            row("halo", 2, problem="refused: no window"),
            row("ring", 4, 4.0, one_device_share=0.8),
            row("halo", 4, 2.5, one_device_share=1.01),
        ]
    )
    assert [line for line in lines if line] == [
        "### causal",
        "One device alone: 2 ms (1 - 9), 400 TFLOP/s, 50% of the ceiling.",
        "| devices | ring | halo |",
        "|---|---|---|",
        "| 2 | **3** (1 - 9), 400, 90% | refused |",
        "| 4 | 4 (1 - 9), 400, 80% | **2.5** (1 - 9), 400, 101% |",
        "Kernels: forward xla.",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "9"], "--devices: got 9, wanted at most the 8 cpu devices at hand; ask for fewer"),
        (["--devices", "1"], "--devices: got 1, wanted 2 or more to split a sequence over"),
        (["--passes", "backward"], "--passes: 'backward' alone is measured of hops only; choose forward"),
        (["--peers", "cudnn"], "--peers: goes with another family, got --family context_parallel; leave it out"),
        (["--implementations", "xla"], "--implementations: goes with another family"),
        (["--config", "run.yaml"], "--config: goes with another family"),
        (["model.dim=3"], "model.dim=3: overrides go with --family train"),
        (["--cases", "triangle"], "--cases: 'triangle' matches no case; --list shows them"),
        (["--family", "blockwise", "--devices", "2"], "--devices: goes with --family context_parallel"),
    ],
)
def test_a_wrong_command_line_is_told(arguments, message, capsys):
    assert jax.device_count() == 8  # JAX has started, and can be asked for no more
    assert run.main(["--family", "context_parallel", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_list_shows_the_cases_and_their_ways(capsys):
    assert run.main(["--family", "context_parallel", "--list", "--cases", "^window 8192 B1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("window 8192 B1 S8192 a device 64/8 D128  (ring contiguous, ring zigzag, ")


def test_cpu_devices_are_asked_for_before_jax_starts():
    code = "import jax; from benchmarks.run import devices_at_hand as f; assert f(3) == jax.device_count() == 3"
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=environment)

"""The command: end to end on tiny cases, the files it writes, and what it says of a wrong command line."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import blockwise, measure, peers, report, run
from benchmarks.results import Results, Row, with_peer_ratios
from pallas_kernels import machine

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG"


@pytest.fixture
def little_time(monkeypatch):
    monkeypatch.setattr(measure, "MIN_SECONDS", 1e-3)
    monkeypatch.setattr(measure, "CEILING_SIZE", {"cpu": 32})


def files(folder, family):
    stem = f"{machine.describe()['date']}_cpu_{family}"
    assert {path.name for path in folder.iterdir()} == {f"{stem}.{ending}" for ending in ("json", "md", "png")}
    assert (folder / f"{stem}.png").read_bytes().startswith(PNG)
    return json.loads((folder / f"{stem}.json").read_text()), (folder / f"{stem}.md").read_text()


@pytest.mark.slow
def test_smoke_cases_end_to_end(tmp_path, little_time, capsys):
    code = run.main(
        ["--cases", "smoke", "--peers", "cudnn", "--repetitions", "2", "--out", str(tmp_path), "--commit", "abc"]
    )
    assert code == 0
    saved, page = files(tmp_path, "blockwise")
    timed = [row for row in saved["rows"] if row["problem"] is None]
    assert {row["implementation"] for row in timed} == {
        "longctx xla",
        "longctx xla with carry",
        "longctx xla with accumulate",
    }
    assert len(timed) == 21
    refused = {row["implementation"]: row["problem"] for row in saved["rows"] if row["problem"]}
    of_tpu = {name: refused.pop(name) for name in list(refused) if "mosaic_tpu" in name}
    assert len(of_tpu) == 5 and all("the platform is cpu, wanted tpu" in reason for reason in of_tpu.values())
    for order in ("", ", any order"):
        assert refused.pop(f"longctx mosaic_gpu with accumulate{order}").startswith("refused: ")
    assert refused == {
        "cudnn": "peers are not called with options",  # of the last case
        "longctx mosaic_gpu": "refused: mosaic_gpu: it needs an NVIDIA Hopper GPU (H100, H200)",
        "longctx mosaic_gpu with carry": "refused: mosaic_gpu: it needs an NVIDIA Hopper GPU (H100, H200)",
        "longctx cudnn with carry": (
            "refused: cudnn: it takes and returns no running softmax (carry, return_carry, sinks)"
        ),
        "longctx cudnn": "refused: cudnn: it needs an NVIDIA GPU, the platform is cpu",
        "longctx cudnn, any order": "refused: cudnn: it needs an NVIDIA GPU, the platform is cpu",
        "longctx cudnn with accumulate, any order": "refused: cudnn: it adds into no running gradients (accumulate)",
        "longctx mosaic_gpu, any order": "refused: mosaic_gpu: it needs an NVIDIA Hopper GPU (H100, H200)",
    }
    assert saved["machine"]["commit"] == "abc" and saved["machine"]["versions"]["jax"]
    assert saved["ceiling_size"] == 32 and saved["ceiling_tflops"] > 0
    assert "# blockwise: cpu" in page and "## forward+backward" in page and "Commit abc." in page
    assert "| documents 3 B1 S96 2/1 D16 | longctx xla | **" in page
    printed = capsys.readouterr().out
    assert "[1/106] causal B2 S64 2/1 D16, forward, longctx mosaic_gpu: refused" in printed and "TFLOP/s" in printed


@pytest.mark.slow
def test_one_pass_alone(tmp_path, little_time):
    arguments = ["--cases", "smoke", "--peers", "", "--implementations", "xla", "--passes", "forward"]
    assert run.main([*arguments, "--repetitions", "1", "--out", str(tmp_path)]) == 0
    saved, _ = files(tmp_path, "blockwise")
    assert {row["which"] for row in saved["rows"]} == {"forward"}


def test_the_backward_pass_alone_is_of_hops(tmp_path, little_time):
    arguments = ["--cases", "smoke", "--peers", "", "--implementations", "xla", "--passes", "backward"]
    assert run.main([*arguments, "--repetitions", "1", "--out", str(tmp_path)]) == 0
    saved, page = files(tmp_path, "blockwise")
    assert {(row["case"], row["which"]) for row in saved["rows"]} == {("hop, full B1 S64 2/2 D16", "backward")}
    assert [row["implementation"] for row in saved["rows"]] == ["longctx xla", "longctx xla with accumulate"]
    assert "Interrupted" not in page


CONFIG = """
run_dir: {folder}
data:
  seq_len: 64
  sources: [{{kind: text, files: ["{folder}/*.txt"]}}]
  held_out_fraction: 0
  cache_dir: "{folder}/cache"
model:
  dim: 16
  num_layers: 1
  mlp_dim: 32
  mixers: {{attention: {{kind: attention, num_heads: 2, num_kv_heads: 1}}}}
  pattern: [attention]
training: {{steps: 2, batch_size: 8}}
optimizer: {{learning_rate: 1.0e-3}}
mesh: {{context_inner: 8}}
context_parallel: {{strategy: ring}}
"""


@pytest.mark.slow
def test_a_training_step_end_to_end(tmp_path, little_time):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 400)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(folder=tmp_path))
    out = tmp_path / "out"
    arguments = ["--family", "train", "--config", str(config), "--repetitions", "2", "--out", str(out)]
    assert run.main([*arguments, "training.batch_size=4"]) == 0
    saved, page = files(out, "train")
    (row,) = saved["rows"]
    assert row["implementation"] == "attention_forward xla, softmax_statistics xla, attention_backward xla"
    assert row["details"]["tokens a step"] <= 4 * 64
    assert row["details"]["tokens/s"] == pytest.approx(row["details"]["tokens a step"] / row["median_ms"] * 1e3)
    assert row["memory_bytes"] > 0 and saved["settings"]["overrides"] == "training.batch_size=4"
    assert "## training step" in page and "| tokens/s |" in page


def test_list_shows_the_cases_that_match(capsys):
    assert run.main(["--list", "--cases", "window"]) == 0
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "window 4096 B1 S32768 16/16 D128",
        "window 4096 B1 S32768 16/4 D64",
        "window 8192 B1 S16384 64/8 D128",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "triangle"], "--cases: 'triangle' matches no case; --list shows them"),
        (["--cases", "smoke", "--peers", "cudnn,fa9"], "--peers: got 'fa9', wanted some of cudnn,jla,tokamax"),
        (
            ["--cases", "smoke", "--implementations", "xla,cuda"],
            "--implementations: got 'cuda', wanted some of mosaic_gpu,mosaic_tpu,cudnn,xla",
        ),
        (
            ["--cases", "smoke", "--passes", "up"],
            "--passes: got 'up', wanted some of forward,forward+backward,backward",
        ),
        (["--cases", "window", "--passes", "backward"], "--passes: 'backward' alone is measured of hops only"),
        (["--cases", "smoke", "model.dim=3"], "model.dim=3: overrides go with --family train"),
        (["--family", "train"], "--config: got none, wanted the YAML file of a run"),
    ],
)
def test_a_wrong_command_line_is_told(arguments, message, capsys):
    assert run.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_an_error_where_it_is_named(monkeypatch, capsys):
    absent = peers.Peer(module="no_such_module", package="no-such-package", candidates=lambda case: [])
    monkeypatch.setitem(peers.PEERS, "jla", absent)
    assert run.main(["--cases", "smoke", "--peers", "jla"]) == 2
    assert "--peers: jla is not installed; `pip install no-such-package`, or leave it out" in capsys.readouterr().err
    said = []
    assert "jla" not in peers.chosen_peers(None, note=said.append)
    assert "peer jla left out: no-such-package is not installed" in said
    assert peers.chosen_peers("", note=said.append) == {}


def row(implementation, median_ms=None, *, ours=False, problem=None, deterministic=True):
    figures = {} if median_ms is None else dict(low_ms=median_ms, high_ms=median_ms, tflops=1.0, ceiling_share=0.5)
    return Row(
        case="causal", which="forward", implementation=implementation, ours=ours, problem=problem, median_ms=median_ms,
        memory_bytes=2**20, deterministic=deterministic, **figures,
    )  # fmt: skip


ROWS = (
    row("a", 2.0),
    row("b", 1.0),
    row("mine", 4.0, ours=True),
    row("mine too", ours=True, problem="wrong: all of it"),
)


ORDERED = (
    row("slow and the same each time", 2.0),
    row("fast in any order", 1.0, deterministic=False),
    row("mine", 4.0, ours=True),
    row("mine, any order", 4.0, ours=True, deterministic=False),
)


def results(rows=ROWS):
    return Results(
        family="blockwise",
        machine={
            "date": "2026-01-02", "commit": "abc", "device": "NVIDIA H100 80GB HBM3", "platform": "gpu",
            "num_devices": 1, "driver": "580", "python": "3.12", "versions": {"jax": "0.11"},
        },
        settings={"dtype": "bfloat16"},
        ceiling_size=8192,
        ceiling_tflops=700.0,
        rows=with_peer_ratios(rows),
        notes=("peer c left out",),
    )  # fmt: skip


def test_ratios_are_to_the_best_peer():
    assert [row.peer_ratio for row in results().rows] == [None, None, 0.25, None]
    assert [row.peer_ratio for row in with_peer_ratios(ROWS[2:])] == [None, None]


def test_ratios_of_gradients_are_to_peers_that_promise_as_much():
    both = dataclasses.replace(results(), rows=with_peer_ratios(ORDERED)).rows
    assert [row.peer_ratio for row in both] == [None, None, 0.5, 0.25]
    assert [row.peer_ratio for row in with_peer_ratios(ORDERED[1:])] == [None, None, 0.25]


def test_the_page_says_whose_gradients_come_in_any_order():
    page = report.markdown(results(ORDERED), picture=None)
    assert "| case | implementation | gradients | ms |" in page
    assert "| causal | mine | same each time | 4 (4 - 4) |" in page
    assert "| causal | mine, any order | any order | 4 (4 - 4) |" in page
    assert "| case | implementation | ms |" in report.markdown(results(), picture=None)


def test_results_survive_their_file_and_are_drawn_again(tmp_path):
    path, *_ = report.write_report(results(), tmp_path)
    assert path.name == "2026-01-02_nvidia-h100-80gb-hbm3_blockwise.json"
    assert Results.read_json(path) == results()
    path.with_suffix(".md").unlink()
    path.with_suffix(".png").unlink()
    assert report.main([str(path)]) == 0
    page = path.with_suffix(".md").read_text()
    assert "| causal | b | **1** (1 - 1) | 1 | 50% | 1.0 MiB |  |" in page
    assert "| causal | mine | 4 (4 - 4) | 1 | 50% | 1.0 MiB | 0.25 |" in page
    assert "| causal | forward | mine too | wrong: all of it |" in page and "peer c left out" in page
    assert path.with_suffix(".png").read_bytes().startswith(PNG)


def test_a_second_run_of_a_day_leaves_the_first_alone(tmp_path):
    first, *_ = report.write_report(results(), tmp_path)
    before = first.read_bytes()
    second, page, *_ = report.write_report(results(), tmp_path)
    assert second.stem == f"{first.stem}_2" and first.read_bytes() == before
    assert f"({second.stem}.png)" in page.read_text()


def test_without_matplotlib_the_picture_is_left_for_later(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    said = []
    paths = report.write_report(results(), tmp_path, note=said.append)
    assert [path.suffix for path in paths] == [".json", ".md"] and "![" not in paths[1].read_text()
    assert "matplotlib is not installed: `python -m benchmarks.report" in said[0]


def test_only_this_projects_faults_fail_the_command(tmp_path, monkeypatch, little_time):
    monkeypatch.setattr(run, "write_report", lambda *args, **kwargs: [])
    arguments = ["--cases", "smoke", "--repetitions", "2", "--out", str(tmp_path)]
    for rows, code in ((ROWS, 1), (ROWS[:3], 0), ([row("a", problem="failed: x")], 0)):
        monkeypatch.setattr(run, "measure_blockwise", lambda *args, rows=rows, **kwargs: list(rows))
        assert run.main(arguments) == code


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(tmp_path, little_time, monkeypatch, capsys):
    inputs = blockwise.Case.inputs

    def interrupted(case, dtype):
        if case.documents is not None:
            raise KeyboardInterrupt
        return inputs(case, dtype)

    monkeypatch.setattr(blockwise.Case, "inputs", interrupted)
    arguments = ["--cases", "smoke", "--peers", "", "--repetitions", "2", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    assert "interrupted: what was measured until now is kept" in capsys.readouterr().out
    saved, page = files(tmp_path, "blockwise")
    assert "Interrupted before: documents 3 B1 S96 2/1 D16, blocks 1/4 B1 S384 2/1 D16." in page
    assert len([row for row in saved["rows"] if row["problem"] is None]) == 9


def test_calls_are_batched_until_they_can_be_timed(monkeypatch):
    monkeypatch.setattr(measure, "MIN_SECONDS", 0.005)
    timing = measure.time_calls(lambda: None, repetitions=3, max_calls=50)
    assert timing.calls == 50 and timing.repetitions == 3 and 0 <= timing.low <= timing.median <= timing.high


def test_kernels_are_measured_without_the_extras():
    missing = ["train", "flax", "optax", "matplotlib", "yaml", "pydantic"]
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import benchmarks.run"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

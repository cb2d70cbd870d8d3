"""The comparison of what mixers learn: its configs, a tiny run end to end, and what makes it void."""

import json
import re

import jax
import pytest

from benchmarks import learning, learning_report
from benchmarks.learning_cases import TASKS, mixer_overrides, task_config, with_mixers, with_seq_len
from benchmarks.learning_report import Comparison, Learned, Point
from longctx.mixers.linear import LinearConfig
from longctx.mixers.moba import MobaConfig
from pallas_kernels import machine
from train.config import ConfigError

TINY = (
    *("model.dim=16", "model.num_layers=1", "model.mlp_dim=16", "model.dtype=float32"),
    *("model.mixers.mixer.num_heads=2", "model.mixers.mixer.head_dim=8", "distributed.virtual_cpu_devices=1"),
    *("training.batch_size=4", "training.steps=4", "evaluation.every=2", "optimizer.warmup_steps=1"),
    "data.sources=[{kind: passkey, min_length: 30, max_length: 63, num_documents: 50}]",
    "data.held_out_sources=[{kind: passkey, min_length: 63, max_length: 63, num_documents: 9, seed: 1}]",
    "data.seq_len=64",
)


@pytest.fixture(scope="module", autouse=True)
def started():
    jax.devices()  # the eight of conftest.py, before a run asks for fewer


@pytest.mark.parametrize("name", TASKS)
def test_the_configs_of_the_tasks_take_every_mixer(name):
    base = task_config(TASKS[name])
    for length in learning.evaluated_lengths(None, base.data.seq_len, TASKS[name]):
        assert with_seq_len(base, length, held_out_only=True).data.held_out_sources[0].max_length == length - 1
    for spec in (
        "attention",
        "window",
        "moba",
        "nsa",
        "linear",
        "taylor",
        "window+taylor",
        "retention",
        "lightning",
        "mamba2",
        "gla",
        "regla",
        "delta",
        "gated_delta",
    ):
        config = with_mixers(base, spec)
        assert config.model.pattern == tuple(spec.split("+"))
        assert (config.data, config.optimizer, config.training, config.seed) == (
            *(base.data, base.optimizer, base.training),
            base.seed,
        )
    assert with_mixers(base, "attention").model.mixers["attention"] == base.model.mixers["mixer"]


def test_a_mixer_keeps_what_it_shares_with_the_one_of_the_config():
    base = task_config(TASKS["passkey"], overrides=["model.mixers.mixer.implementation=xla"])
    own = base.model.mixers["mixer"]
    of_mixers, rest = mixer_overrides(["mixers.moba.top_k=7", "training.steps=3", "mixers.taylor.head_dim=8"])
    assert rest == ["training.steps=3"]
    mixers = with_mixers(base, "moba+taylor+window", of_mixers).model.mixers
    moba, taylor, window = (mixers[name] for name in ("moba", "taylor", "window"))
    assert isinstance(moba, MobaConfig) and isinstance(taylor, LinearConfig)
    assert (moba.num_heads, moba.head_dim, moba.qk_norm, moba.rope_theta) == (
        *(own.num_heads, own.head_dim, own.qk_norm),
        own.rope_theta,
    )
    assert moba.implementation is None and window.implementation == "xla" and window.window == 64
    assert moba.top_k == 7 and taylor.head_dim == 8 and taylor.feature_map == "taylor2"


def test_another_length_keeps_what_fills_rows():
    base = task_config(TASKS["passkey"], seq_len=1024, overrides=TINY[:-3])
    lengths = [(source.min_length, source.max_length) for source in base.data.sources]
    assert base.data.seq_len == 1024 and lengths[-1] == (1023, 1023)
    assert all(low <= high <= 1023 for low, high in lengths)
    held_out = with_seq_len(base, 2048, held_out_only=True).data
    assert held_out.sources == held_out.held_out_sources
    assert [source.max_length for source in held_out.sources] == [2047]
    assert with_seq_len(base, 1024) == base


def test_refusals_name_the_option(capsys, tmp_path):
    base = task_config(TASKS["passkey"])
    with pytest.raises(ValueError, match="--mixers: got 'mobo', wanted some of attention, window, moba, .* joined by"):
        with_mixers(base, "attention+mobo")
    with pytest.raises(ConfigError, match="model.mixers.moba.top_q: unknown"):
        with_mixers(base, "moba", {"moba": {"top_q": 3}})
    two = [
        "model.mixers={a: {kind: attention, num_heads: 2}, b: {kind: attention, num_heads: 4}}",
        "model.pattern=[a, b]",
    ]
    with pytest.raises(ValueError, match="model.mixers: got a, b, wanted one, in whose place others are put"):
        task_config(TASKS["passkey"], overrides=two)
    with pytest.raises(ValueError, match="--lengths: got '5,x', wanted numbers of tokens"):
        learning.evaluated_lengths("5,x", 8, TASKS["passkey"])
    assert learning.evaluated_lengths("32,8,16", 16, TASKS["passkey"]) == [8, 32]
    arguments = ["--task", "passkey", "--out", str(tmp_path), *TINY]
    assert learning.main([*arguments, "--mixers", "nothing"]) == 2
    assert learning.main([*arguments, "--seconds", "0"]) == 2
    assert learning.main([*arguments, "--mixers", "attention,window", "mixers.moba.top_k=2"]) == 2
    assert "mixers.moba: got a setting of a mixer that is not compared" in capsys.readouterr().err
    assert learning.main([*arguments, "data.held_out_sources=[{kind: synthetic, min_length: 9, max_length: 9}]"]) == 2
    assert "data.held_out_sources: got none that is a task" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_tiny_run_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(learning, "TIMING_SECONDS", 1e-3)
    arguments = ["--task", "passkey", "--mixers", "attention,window", "--lengths", "128", "--commit", "abc"]
    assert learning.main([*arguments, "--out", str(tmp_path), *TINY]) == 1  # void: nothing is learned in four steps
    stem = f"{machine.describe()['date']}_cpu_learning_passkey"
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.{ending}" for ending in ("json", "md", "png")}
    assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / f"{stem}.json").read_text())
    assert saved["void"] == "the softmax baseline gets 0.0% of the answers right, wanted 90%"
    assert "VOID" in capsys.readouterr().out
    assert saved["config"]["model"]["dim"] == 16 and saved["machine"]["commit"] == "abc"
    assert [model["mixers"] for model in saved["models"]] == ["attention", "window"]
    for model in saved["models"]:
        assert model["problem"] is None and model["kernels"] and model["num_parameters"] > 0
        assert [point["step"] for point in model["curve"]] == [2, 4]
        assert set(model["scores"]) == {"64", "128"} and 0 <= model["scores"]["128"]["eval/exact_match"] <= 1
        assert model["step_ms"][0] > 0
    comparison = learning_report.read_json(tmp_path / f"{stem}.json")
    again = tmp_path / "again"
    learning_report.write(comparison, again)
    assert (tmp_path / "again.json").read_text() == (tmp_path / f"{stem}.json").read_text()


SMALL = (
    *("model.dim=64", "model.num_layers=2", "model.mlp_dim=128", "model.dtype=float32"),
    *("model.mixers.mixer.implementation=reference", "distributed.virtual_cpu_devices=1"),
    *("optimizer.learning_rate=3e-3", "optimizer.decay_steps=1500", "training.steps=4000", "evaluation.every=100"),
)
LEARNABLE = {
    "passkey": (
        *("data.seq_len=128", "data.tokenizer=ids:32", "training.batch_size=8"),
        "data.sources=[{kind: passkey, min_length: 32, max_length: 48, filler: noise}, "
        "{kind: passkey, min_length: 48, max_length: 127, filler: noise}]",
        "data.held_out_sources=[{kind: passkey, min_length: 127, max_length: 127, filler: noise, seed: 1, "
        "num_documents: 128}]",
    ),
    "mqar": (
        *("data.seq_len=64", "data.tokenizer=ids:65", "training.batch_size=16"),
        "data.sources=[{kind: mqar, min_pairs: 2, max_pairs: 4, min_length: 16, max_length: 32}, "
        "{kind: mqar, min_pairs: 4, max_pairs: 8, min_length: 32, max_length: 63}]",
        "data.held_out_sources=[{kind: mqar, min_pairs: 8, max_pairs: 8, min_length: 63, max_length: 63, seed: 1, "
        "num_documents: 64}]",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_softmax_baseline_learns_each_task(name, tmp_path):
    arguments = ["--task", name, "--lengths", "", "--seconds", "1200", "--stop-at", "0.97", "--out", str(tmp_path)]
    assert learning.main([*arguments, *SMALL, *LEARNABLE[name]]) == 0
    (path,) = tmp_path.glob("*.json")
    comparison = learning_report.read_json(path)
    assert comparison.void is None and comparison.models[0].curve[0].exact_match < 0.5


def comparison_of(*models):
    return Comparison(
        task="mqar",
        machine={"device": "D", "date": "2026-01-01", "python": "3", "commit": "c", "versions": {"jax": "1"}},
        settings={"steps": 5},
        config={},
        seq_len=16,
        bar=0.95,
        models=list(models),
    )


def learned(mixers, *curve, right=0.97):
    return Learned(
        mixers=mixers,
        num_parameters=1234,
        step_ms=(2.0, 1.0, 3.0),
        tokens_per_second=5e6,
        curve=[Point(step=10 * i, seconds=2.0 * i, loss=0.1, exact_match=match) for i, match in enumerate(curve, 1)],
        scores={
            16: {"eval/exact_match": right, "eval/exact_match/a_b": 0.5, "eval/exact_match/c": 1.0},
            32: {"eval/exact_match": 0.25},
        },
    )


def test_the_page_tells_steps_to_the_bar_and_the_groups():
    page = learning_report.markdown(
        comparison_of(
            learned("attention", 0.2, 0.96, 0.99),
            learned("moba", 0.1, 0.3, right=0.3),
            Learned(mixers="nsa", problem="failed: X | y"),
        ),
        picture="p.png",
    )
    assert "Valid: the softmax baseline is above its bar." in page and "![mqar](p.png)" in page
    assert "| attention | 1,234 | 2 (1 - 3) | 5,000,000 | 20 | 4.0 | 30 | 97.0% | 25.0% |" in page
    assert "| moba | 1,234 | 2 (1 - 3) | 5,000,000 | never |  | 20 | 30.0% | 25.0% |" in page
    assert "| mixers | a b | c |\n|---|---|---|\n| attention | 50.0% | 100.0% |" in page
    assert "| nsa | failed: X \\| y |" in page


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        ([learned("moba", 0.9)], r"no softmax baseline \(attention\) was trained beside them"),
        ([learned("attention", 0.9, right=0.94)], "baseline gets 94.0% of the answers right, wanted 95%"),
        ([Learned(mixers="attention", problem="failed: no")], "baseline was not trained to the end: failed: no"),
    ],
    ids=["none", "low", "failed"],
)
def test_a_comparison_without_a_good_baseline_is_void(models, reason):
    comparison = comparison_of(*models)
    assert re.search(reason, comparison.void)
    assert f"**Void**: {comparison.void}." in learning_report.markdown(comparison, picture=None)

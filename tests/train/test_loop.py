"""Whole runs of a tiny model, in this process and, for signals, in one of their own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache

from train.__main__ import main
from train.checkpoint import find_checkpoint
from train.evaluate import main as evaluate_main
from train.generate import main as generate_main
from train.metrics import read_records
from train.state import frozen, trained

ROOT = Path(__file__).parents[2]
_LEAST_SECONDS = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture(scope="module", autouse=True)
def started():
    """JAX starts with the eight devices of conftest.py before a run can ask for fewer."""
    jax.devices()


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A config over two weighted sources of short texts."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for name in ("letters", "digits"):
        alphabet = "abcdefgh " if name == "letters" else "0123456789\n"
        for index in range(30):
            text = "".join(rng.choice(list(alphabet), rng.integers(5, 90)))
            (folder / f"{name}{index}.txt").write_text(text)
    config = {
        "run_dir": "set by each test",
        "model": {
            "dim": 16,
            "num_layers": 1,
            "mlp_dim": 16,
            "mixers": {"global": {"kind": "attention", "num_heads": 2}},
            "pattern": ["global"],
            "dtype": "float32",
        },
        "data": {
            "seq_len": 64,
            "cache_dir": str(folder / "cache"),
            "held_out_fraction": 0.2,
            "sources": [
                {"kind": "text", "files": [str(folder / "letters*.txt")], "weight": 2.0},
                {"kind": "text", "files": [str(folder / "digits*.txt")], "weight": 1.0},
            ],
        },
        "training": {"steps": 20, "batch_size": 4},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 5, "decay_steps": 15},
        "mesh": {"data": 2},
        "distributed": {"virtual_cpu_devices": 2},
        "evaluation": {"every": 10},
        "checkpoint": {"every": 5},
        "metrics": {"every": 1, "tensorboard": False, "plot": False},
        "sample": {"num_tokens": 0},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def run(config_file):
    """run(run_dir, *overrides) -> exit code of `python -m train`."""
    return lambda run_dir, *overrides: main([str(config_file), f"run_dir={run_dir}", *overrides])


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """The folder of a finished run of 20 steps."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert run(run_dir) == 0
    return run_dir


def test_a_table_of_devices_that_is_not_there_is_told_before_anything_is_written(run, tmp_path, capsys):
    table = tmp_path / "speeds.yaml"
    assert run(tmp_path / "run", f"device_table={table}") == 2
    assert f"{table}: no such file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def losses(run_dir):
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_records(run_dir / "metrics.jsonl") if "loss" in r]


def final_arrays(run_dir):
    import orbax.checkpoint as ocp

    directory, step = find_checkpoint(run_dir)
    with ocp.StandardCheckpointer() as checkpointer:
        return [checkpointer.restore(directory / str(step) / item) for item in ("params", "training")]


def test_resuming_gives_the_same_losses_bit_for_bit(run, finished, tmp_path, capsys):
    assert run(tmp_path, "training.steps=10") == 0
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, 11))
    capsys.readouterr()
    assert run(tmp_path) == 0
    output = capsys.readouterr().out
    assert f"resuming {tmp_path} at step 10" in output
    assert "changed since then: training.steps: 10 -> 20" in output
    assert losses(tmp_path) == losses(finished)
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, 21))
    jax.tree.map(np.testing.assert_array_equal, final_arrays(tmp_path), final_arrays(finished))


@pytest.mark.slow
def test_a_second_start_compiles_nothing_anew(run, tmp_path, capsys, monkeypatch):
    found = []
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.monitoring.register_event_listener(lambda event, **_: found.append(event.rpartition("/")[2]))
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", _LEAST_SECONDS)}
    jax.config.update(_LEAST_SECONDS, 0.0)  # the programs of a tiny model take no second
    quick = ("training.steps=6", f"distributed.compilation_cache_dir={tmp_path}/compiled", "checkpoint.every=null")
    try:
        for number in range(2):
            jax.clear_caches()
            found.clear()
            assert run(tmp_path / str(number), *quick) == 0
            assert f"compiled programs are kept in {tmp_path}/compiled" in capsys.readouterr().out
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        jax.monitoring.clear_event_listeners()
    assert any("jit_step" in path.name for path in (tmp_path / "compiled").iterdir())
    assert found.count("cache_hits") > 5 and "cache_misses" not in found


@pytest.mark.slow
def test_adapters_are_trained_and_nothing_else(run, finished, tmp_path, capsys):
    """From the weights of another run; resumed in the middle, evaluated and sampled from."""
    folder = tmp_path / "lora"
    adapted = ("model.lora={rank: 2, alpha: 4}", f"init_from={finished}", "training.accumulate_steps=2")
    assert run(folder, *adapted, "training.steps=10") == 0
    output = capsys.readouterr().out
    assert f"weights from {finished}" in output and "448 parameters are trained, those of the adapters" in output
    assert run(folder, *adapted) == 0
    assert run(tmp_path / "at once", *adapted) == 0
    jax.tree.map(np.testing.assert_array_equal, final_arrays(folder), final_arrays(tmp_path / "at once"))
    assert losses(folder) == losses(tmp_path / "at once")
    assert losses(folder)[0][1] < 0.8 * losses(finished)[0][1]  # where that run ended

    base, (params, training) = final_arrays(finished)[0], final_arrays(folder)
    jax.tree.map(np.testing.assert_array_equal, frozen(params), base)
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(trained(params)))
    moments = [leaf for leaf in jax.tree.leaves(training["opt_state"]) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * 448
    for command in (evaluate_main, generate_main):
        assert command([str(folder), "sample.num_tokens=3"]) == 0


@pytest.mark.slow
def test_optimizer_state_in_the_hosts_memory(run, tmp_path, finished):
    """Trains and resumes as it would on the device, bit by bit."""
    assert run(tmp_path, "optimizer.offload=true", "training.steps=10") == 0
    assert run(tmp_path, "optimizer.offload=true") == 0
    assert losses(tmp_path) == losses(finished)
    jax.tree.map(np.testing.assert_array_equal, final_arrays(tmp_path), final_arrays(finished))


@pytest.mark.slow
def test_documents_that_changed_before_a_resume_are_noted(run, config_file, tmp_path, capsys):
    text = tmp_path / "more.jsonl"
    text.write_text("".join(json.dumps({"text": "ab" * n}) + "\n" for n in range(5, 40)))
    short = [f'data.sources=[{{kind: text, files: ["{text}"]}}]', "optimizer.warmup_steps=0", "optimizer.decay_steps=1"]
    assert run(tmp_path / "run", *short, "training.steps=2") == 0
    capsys.readouterr()
    assert run(tmp_path / "run", *short, "training.steps=3") == 0
    assert "the documents" not in capsys.readouterr().out
    text.write_text("".join(json.dumps({"text": "ab" * n}) + "\n" for n in range(5, 60)))
    assert run(tmp_path / "run", *short, "training.steps=4") == 0
    assert "changed since then: the documents; the rows from here on are not those" in capsys.readouterr().out


@pytest.mark.slow
def test_sources_of_bare_ids_have_no_bits_per_byte(run, tmp_path, capsys):
    source = "{kind: synthetic, num_documents: 50, num_symbols: 32, min_length: 8, max_length: 60}"
    assert run(tmp_path, f"data.sources=[{source}]", "data.tokenizer=ids:33") == 0
    output = capsys.readouterr().out
    assert "bits/byte -" in output and "inf" not in output
    assert all("bits_per_byte" not in name for record in read_records(tmp_path / "metrics.jsonl") for name in record)


@pytest.mark.slow
def test_runs_on_tasks_tell_how_many_answers_are_right(run, tmp_path, capsys):
    source = "{kind: passkey, min_length: 30, max_length: 63, num_documents: 40, seed: SEED}"
    overrides = (
        f"data.sources=[{source.replace('SEED', '0')}]",
        f"data.held_out_sources=[{source.replace('SEED', '1')}]",
        "data.tokenizer=ids:64",
    )
    assert run(tmp_path, *overrides) == 0
    assert re.search(
        r"step 0: held-out loss [\d.]+, [\d.]+% of answer tokens and [\d.]+% of answers right", capsys.readouterr().out
    )
    last = [record for record in read_records(tmp_path / "metrics.jsonl") if "eval/loss" in record][-1]
    groups = [name for name in last if name.startswith("eval/exact_match/passkey_depth_")]
    assert 0 < last["eval/accuracy"] < 1 and 0 <= last["eval/exact_match"] <= 1 and len(groups) == 5
    assert evaluate_main([str(tmp_path)]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["eval/accuracy"] == last["eval/accuracy"] and groups[0] in shown


def test_what_a_run_writes(finished):
    records = read_records(finished / "metrics.jsonl")
    second = next(r for r in records if r["step"] == 2)
    assert set(second) == {
        "step", "loss", "bits_per_byte", "grad_norm", "learning_rate", "tokens", "finite", "skipped_steps",
        "tokens_per_second", "data_wait_share", "step_seconds_p50", "step_seconds_p95", "step_seconds_max",
        "host_memory_gib",
    }  # fmt: skip
    evaluations = [r for r in records if "eval/loss" in r]
    assert [r["step"] for r in evaluations] == [0, 10, 20]
    assert evaluations[-1]["eval/bits_per_byte"] < evaluations[0]["eval/bits_per_byte"]
    assert sorted(p.name for p in (finished / "checkpoints").iterdir() if p.name.isdecimal()) == ["15", "20"]
    assert yaml.safe_load((finished / "config.yaml").read_text())["training"]["steps"] == 20


def test_a_finished_run_says_so(run, finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert run(finished) == 0
    output = capsys.readouterr().out
    assert f"{finished} is done at step 20. Everything is in {finished}" in output
    assert "training.steps=40 goes on" in output
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_another_model_cannot_resume(run, finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    assert run(finished, "model.mlp_dim=24", "training.steps=30") == 1
    error = capsys.readouterr().err
    assert re.search(
        r"checkpoints/20: this config cannot resume from it: \S+ has shape \[.*16.*\] in the checkpoint and "
        r"\[.*24.*\] here; choose another run_dir, with init_from=",
        error,
    )
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before


def test_a_batch_size_that_does_not_fit_the_rows_consumed(run, finished, capsys):
    assert run(finished, "training.batch_size=12", "training.steps=30") == 2
    assert "training.batch_size: got 12, but the run has consumed 80 rows" in capsys.readouterr().err


def test_rows_may_be_longer_from_a_resume_on(run, finished, tmp_path, capsys):
    """80 rows of 64 tokens are as many as 40 of 128, and behind 42 whole batches of 6 have been read."""
    again = tmp_path / "run"
    shutil.copytree(finished, again)
    longer = "data.seq_len=128", "training.batch_size=6"
    assert run(again, *longer, "training.steps=22", "model.mixers.global.rope_theta=40000") == 0
    output = capsys.readouterr().out
    assert "changed since then: data.seq_len: 64 -> 128" in output
    assert "going on from row 42 of these, as far in the data as 80 of the others" in output
    assert run(again, *longer, "training.steps=23") == 0
    assert "rows are of another length" not in capsys.readouterr().out
    assert run(again, "training.steps=24") == 0
    assert "going on from row 120 of these, as far in the data as 60 of the others" in capsys.readouterr().out
    assert [record["step"] for record in read_records(again / "metrics.jsonl") if "loss" in record] == [*range(1, 25)]


@pytest.mark.slow
def test_init_from_starts_from_the_weights_alone(run, finished, tmp_path, capsys):
    assert run(tmp_path, f"init_from={finished}", "training.steps=1", "optimizer.warmup_steps=0") == 0
    assert f"weights from {finished}" in capsys.readouterr().out
    old = [r["eval/loss"] for r in read_records(finished / "metrics.jsonl") if "eval/loss" in r]
    new = [r["eval/loss"] for r in read_records(tmp_path / "metrics.jsonl") if "eval/loss" in r]
    assert new[0] == pytest.approx(old[-1], rel=1e-6)
    assert run(tmp_path / "other", f"init_from={tmp_path / 'nothing'}") == 1
    assert "nothing: holds no complete checkpoint" in capsys.readouterr().err


def test_the_evaluate_command_repeats_the_last_evaluation(finished, capsys):
    assert evaluate_main([str(finished)]) == 0
    values = json.loads(capsys.readouterr().out)
    record = [r for r in read_records(finished / "metrics.jsonl") if "eval/loss" in r][-1]
    assert values == {name: pytest.approx(record[name], rel=1e-6) for name in values}
    assert values["step"] == 20
    assert evaluate_main([str(finished), "model.mixers.global.implementation=mosaic_gpu"]) == 2
    error = capsys.readouterr().err
    assert "model: mosaic_gpu: it needs an NVIDIA Hopper GPU" in error and "Traceback" not in error


def test_the_generate_command(finished, capsys):
    command = [str(finished), "--prompt", "abc: #1", "sample.num_tokens=5", "sample.temperature=0"]
    assert generate_main(command) == 0
    text = capsys.readouterr().out
    assert text.startswith("abc: #1") and len(text) > len("abc: #1\n")
    split = ["distributed.virtual_cpu_devices=4", "mesh.data=1", "mesh.context_inner=4"]
    assert generate_main([*command, *split, "--prefill", "context_parallel"]) == 0
    assert capsys.readouterr().out == text
    assert generate_main([str(finished.parent)]) == 2
    assert "holds no config.yaml, so it is no run's folder" in capsys.readouterr().err
    assert generate_main([str(finished.parent / "rum")]) == 2
    assert "rum: is not there; pass the folder of a run or a config file" in capsys.readouterr().err


def test_a_non_finite_step_stops_the_run(run, tmp_path, capsys):
    assert run(tmp_path, "optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", "evaluation.every=null") == 1
    error = capsys.readouterr().err
    assert re.search(r"error: step 2: loss \S+ and gradient norm \S+ are not both finite; stopped\. Lower", error)
    assert [
        (r["step"], r["grad_norm"]) for r in read_records(tmp_path / "metrics.jsonl") if r.get("finite") is False
    ] == [(2, None)]


def test_a_non_finite_step_is_skipped_and_counted(run, tmp_path, capsys):
    settings = ("optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", "training.on_nonfinite=skip")
    assert run(tmp_path, *settings, "training.steps=4", "evaluation.every=null", "metrics.every=100") == 0
    output = capsys.readouterr().out
    assert re.search(r"step 4: loss \S+ and gradient norm nan are not both finite; skipped, 3 so far", output)
    assert [r["skipped_steps"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.warmup_steps=20", "optimizer.warmup_steps: got 20, wanted fewer than training.steps=20"),
        ("training.batch_size=3", r"training.batch_size: got 3 in 1 microbatch\(es\) of 3 rows, wanted rows that"),
        ("mesh.data=3", "mesh: data=3 .* does not use exactly the 2 devices"),
        ("distributed.virtual_cpu_devices=null mesh.fsdp=-1 training.batch_size=4", "4 rows, wanted rows that .* = 8"),
        ("model.vocab_size=200", "model.vocab_size: got 200, wanted at least the tokenizer's 257"),
        ("training.stepz=1", "training.stepz: unknown key"),
    ],
)
def test_config_errors_leave_no_trace(run, tmp_path, capsys, override, message):
    assert run(tmp_path / "run", *override.split()) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_print_config_and_help(config_file, tmp_path, capsys):
    assert main([str(config_file), "--print-config", f"run_dir={tmp_path / 'run'}", "seed=3"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 3
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "optimizer.clip_norm" in capsys.readouterr().out


def start(config_file, run_dir, *overrides):
    command = [sys.executable, "-m", "train", str(config_file), f"run_dir={run_dir}", *overrides]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_command_starts_jax_on_the_devices_of_the_run(finished):
    command = [sys.executable, "-m", "train.generate", str(finished), "sample.num_tokens=3"]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert (result.returncode, result.stderr) == (0, "")


def wait_for_step(process, run_dir, step, *, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        path = run_dir / "metrics.jsonl"
        if path.exists() and any(r["step"] >= step for r in read_records(path)):
            return
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no record of step {step}: {process.communicate()}")


def test_signals_save_and_running_again_goes_on(config_file, tmp_path):
    endless = ("training.steps=1000000", "checkpoint.every=null", "evaluation.every=null")
    last = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(config_file, tmp_path, *endless)
        wait_for_step(process, tmp_path, last + 3)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert f"{number.name}: finishing this step, then saving" in errors
        saved = re.search(rf"{number.name}: saved step (\d+) of 1000000 in \S+; run the same command again", output)
        assert saved, output
        if last:
            assert f"resuming {tmp_path} at step {last}" in output
        last = int(saved[1])
        assert find_checkpoint(tmp_path)[1] == last
    steps = [r["step"] for r in read_records(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, last + 1))


def test_records_without_a_checkpoint_are_put_aside(run, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    records = (finished / "metrics.jsonl").read_bytes()
    assert run(tmp_path / "run", "training.steps=1", "optimizer.warmup_steps=0") == 0
    assert "metrics.jsonl: has records up to step 20, but no checkpoint is there" in "".join(
        capsys.readouterr().out.split("\n")
    )
    assert (tmp_path / "run/metrics.jsonl.1").read_bytes() == records
    assert [record["step"] for record in read_records(tmp_path / "run/metrics.jsonl")][-1] == 1
    assert not (tmp_path / "run/config.yaml.1").exists()


def test_a_config_that_somebody_wrote_is_kept(run, config_file, tmp_path):
    text = "# mine\n" + config_file.read_text()
    (tmp_path / "config.yaml").write_text(text)
    overrides = f"run_dir={tmp_path}", "training.steps=1", "optimizer.warmup_steps=0"
    assert main([str(tmp_path / "config.yaml"), *overrides]) == 0
    assert (tmp_path / "config.yaml.1").read_text() == text


def test_a_config_of_an_earlier_version_is_replaced(finished, tmp_path):
    config = tmp_path / "run" / "config.yaml"
    shutil.copytree(finished, config.parent)
    lines = config.read_text().splitlines(keepends=True)
    lines.remove("deterministic: false\n")
    config.write_text("".join(lines))
    assert main([str(config), f"run_dir={config.parent}", "training.steps=21"]) == 0
    assert "deterministic: false\n" in config.read_text() and not config.with_name("config.yaml.1").exists()


def test_a_run_that_was_copied_does_not_train_the_other(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "copy")
    before = (finished / "metrics.jsonl").read_bytes()
    file = str(tmp_path / "copy/config.yaml")
    assert main([file, "training.steps=21"]) == 2
    assert f"run_dir: got {finished} in a file of the run in {tmp_path}/copy; add run_dir=" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before
    assert main([file, f"run_dir={tmp_path / 'copy'}"]) == 0
    assert f"{tmp_path / 'copy'} is done at step 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (
            ["model.mixers.global={kind: gla, num_heads: 2}", "sample={prompt: abc, num_tokens: 4, prefill: star}"],
            2,
            "sample: prefill: star attention cuts a context into blocks",
        ),
        (["init_from=nothing"], 1, "nothing: holds no complete checkpoint"),
        (
            ["model.mixers.global.num_heads=3", "data.sources=[{kind: text, files: [none.txt]}]"],
            2,
            "model: mixers.global: head_dim: dim=16 is not a multiple of num_heads=3",
        ),
        (
            ["model.mixers.global.implementation=mosaic_gpu"],
            2,
            "model: mosaic_gpu: it needs an NVIDIA Hopper GPU (H100, H200); leave out model.mixers.global.implem",
        ),
        (
            ["mesh.data=1", "mesh.context_inner=2", "context_parallel.strategy=ring_dma"],
            2,
            "model: sharded_attention: ring_dma runs on tpu, got cpu; choose strategy=ring",
        ),
    ],
)
def test_what_cannot_end_well_does_not_begin(run, tmp_path, capsys, overrides, code, message):
    assert run(tmp_path / "run", *overrides) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_run_tells_what_was_asked_for_and_will_not_be(run, tmp_path, capsys):
    never = (
        "data.held_out_fraction=0",
        "profile.start=2",
        "training.spikes.threshold=9",
        "context_parallel.window_strategy=halo",
    )
    assert run(tmp_path, *never, "training.steps=1", "optimizer.warmup_steps=0") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "profile.start: got 2, and steps 1 to 1 are to come, so none is profiled" in output
    assert "nothing is held out (data.held_out_fraction), so nothing is evaluated" in output
    assert "training.spikes.threshold: set, and training.spikes.action=ignore, so no spike is looked for" in output
    assert "window_strategy: got halo, and no layer has a window, so it is not used" in output

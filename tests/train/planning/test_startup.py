"""What training says of memory: before it runs out, and after."""

import dataclasses

import jax
import pytest

from train import __main__, loop
from train.config import load_config
from train.planning import startup
from train.planning.target import Target

QUICK = (
    "training.steps=2",
    "optimizer.warmup_steps=1",
    "data.seq_len=64",
    "data.sources=[{kind: synthetic, num_documents: 50, num_symbols: 20, min_length: 20, max_length: 60}]",
    "data.tokenizer=ids:32",
    "evaluation.every=1000",
    "sample.num_tokens=0",
    "model.num_layers=1",
    "model.pattern=[global]",
    "model.mixers={global: {kind: attention, num_heads: 2}}",
    "mesh={data: 8}",
    "training.batch_size=8",
)


def config(tmp_path, *overrides):
    return load_config("configs/cpu_ring8.yaml", [*QUICK, f"run_dir={tmp_path}", *overrides])


@pytest.mark.slow
def test_a_run_that_has_room_starts_without_a_word(tmp_path, capsys):
    loop.train(config(tmp_path))
    assert "warning" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_may_run_out_of_memory_says_so_and_what_would_help(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(startup, "local_target", small_device)
    loop.train(config(tmp_path))
    out = capsys.readouterr().out
    assert "warning: by formula this run needs about 0.0 GiB of a device, which has 0.0 GiB" in out
    assert "What would help: mesh.fsdp in place of mesh.data" in out
    assert "done: step 2" in out  # a formula stops nothing


def small_device(devices, table):
    return Target(
        name="local",
        num_devices=len(devices),
        platform="cpu",
        device_kind="cpu",
        spec=None,
        devices=devices,
        memory_bytes=1000,
        memory_note="a thousand bytes",
        host_memory_bytes=None,
        host_memory_note="",
    )


@pytest.mark.slow
def test_running_out_of_memory_ends_with_what_would_have_helped(tmp_path, capsys, monkeypatch):
    run_dir = str(tmp_path)
    arguments = ["configs/cpu_ring8.yaml", *QUICK, f"run_dir={run_dir}", "checkpoint.every=1"]
    assert __main__.main(arguments) == 0
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    capsys.readouterr()

    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 104.80GiB\nmore")

    real = loop.assemble
    monkeypatch.setattr(loop, "assemble", lambda *a, **k: replace_step(real(*a, **k), exhausted))
    assert __main__.main([*arguments, "training.steps=4"]) == 1
    err = capsys.readouterr().err
    assert "error: out of device memory: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 104.80GiB\n" in err
    assert "What would help: " in err and "Checkpoints are as they were." in err
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before


def replace_step(parts, step):
    step.trace = parts.train_step.trace  # before the first call a run asks whether the step is served
    return dataclasses.replace(parts, train_step=step)


def test_other_errors_pass_through(tmp_path, monkeypatch):
    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    real = loop.assemble
    monkeypatch.setattr(loop, "assemble", lambda *a, **k: replace_step(real(*a, **k), broken))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: broken"):
        loop.train(config(tmp_path))

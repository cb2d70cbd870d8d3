import errno
import json
import shutil
import sys

import numpy as np
import pytest

from train.command import run_command
from train.metrics import MetricsConfig, MetricsLog, WandbConfig, draw_losses, drop_records_after, read_records
from train.schema import ConfigError


def test_records_are_json_lines(tmp_path):
    log = MetricsLog(tmp_path / "run", MetricsConfig(), step=0)
    log.write(1, {"loss": np.float32(2.5), "finite": True})
    log.write(2, {"loss": float("nan"), "grad_norm": float("inf"), "skipped_steps": np.int32(1)})
    log.draw()
    log.close()
    assert [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 2.5, "finite": True},
        {"step": 2, "loss": None, "grad_norm": None, "skipped_steps": 1},
    ]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_resuming_drops_what_lies_after_the_restored_step(tmp_path):
    config = MetricsConfig(tensorboard=False, plot=False)
    log = MetricsLog(tmp_path, config, step=0)
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": float(step)})
        if step == 2:
            log.write(step, {"eval/loss": 0.5})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # cut short by a crash
    log = MetricsLog(tmp_path, config, step=2)
    log.write(3, {"loss": 30.0})
    log.draw()
    log.close()
    assert read_records(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "eval/loss": 0.5},
        {"step": 3, "loss": 30.0},
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_dropping_leaves_the_old_file_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def crash(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("train.files.os.replace", crash)
    with pytest.raises(OSError, match=rf"no space left on device: '{path}'"):
        drop_records_after(path, 1)
    assert [found.name for found in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_run_without_records_draws_an_empty_plot(tmp_path):
    draw_losses({"": []}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_refused_settings():
    with pytest.raises(ValueError, match="every: got 0, wanted 1 or more"):
        MetricsConfig(every=0)


class StandInForWandb:
    """What is asked of the package, noted."""

    class Error(Exception):
        pass

    def __init__(self):
        self.calls = []

    def init(self, **arguments):
        self.calls.append(arguments)
        return self

    def define_metric(self, name, **_):
        self.calls.append(name)

    def log(self, record):
        self.calls.append(record)

    def finish(self):
        self.calls.append("finish")


def test_weights_and_biases_gets_each_record_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    stand_in = StandInForWandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    config = MetricsConfig(tensorboard=False, plot=False, wandb=WandbConfig(project="long", mode="offline"))
    for step in (0, 1):
        log = MetricsLog(tmp_path, config, step=step, settings={"seed": 3})
        log.write(step + 1, {"loss": 2.5, "grad_norm": float("nan")})
        log.close()
    first, second = (call for call in stand_in.calls if isinstance(call, dict) and "id" in call)
    assert first == second and (first["project"], first["mode"], first["config"]) == ("long", "offline", {"seed": 3})
    assert first["dir"] == str(tmp_path) and first["resume"] == "allow"
    assert stand_in.calls[3:5] == [{"step": 1, "loss": 2.5}, "finish"]


def test_weights_and_biases_that_is_not_installed_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setattr("train.metrics.importlib.util.find_spec", lambda name: None)
    config = MetricsConfig(wandb=WandbConfig(project="long"))
    with pytest.raises(ConfigError, match="metrics.wandb: got project 'long', wanted the package wandb .* pip install"):
        config.check_installed()
    MetricsConfig().check_installed()


def test_weights_and_biases_that_does_not_start(tmp_path, monkeypatch):
    stand_in = StandInForWandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)

    def refuse(**_):
        raise stand_in.Error("no API key configured")

    monkeypatch.setattr(stand_in, "init", refuse)
    with pytest.raises(ConfigError, match="does not start .no API key configured.; run `wandb login`, or set"):
        MetricsLog(tmp_path, MetricsConfig(tensorboard=False, wandb=WandbConfig(project="long")), step=0)


def test_going_back_drops_the_records_behind(tmp_path):
    log = MetricsLog(tmp_path, MetricsConfig(tensorboard=True, plot=False), step=0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log.rewind(1)
    log.write(2, {"loss": 20.0})
    log.close()
    assert [r["loss"] for r in read_records(tmp_path / "metrics.jsonl")] == [1.0, 20.0]


def test_lines_that_are_no_records_cost_no_others(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "los\n[3]\n\xff\n{"step": 4}\n{"step": 5')
    assert read_records(path) == [{"step": 1}, {"step": 4}]
    drop_records_after(path, 4)
    assert path.read_text() == '{"step": 1}\n{"step": 4}\n'


def test_a_folder_that_is_deleted_under_a_run_is_told(tmp_path, capsys):
    log = MetricsLog(tmp_path / "run", MetricsConfig(tensorboard=False), step=0)
    log.write(1, {"loss": 2.5})
    shutil.rmtree(tmp_path / "run")
    assert run_command(lambda: log.write(2, {"loss": 2.0})) == 1
    log.close()
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/run: was moved or deleted while the run wrote to it; move it back, then run the same "
        "command again\n"
    )

"""Losses that jump: when they count as spikes, and runs that warn of, skip and go back behind a bad batch."""

import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from train.__main__ import main
from train.metrics import read_records
from train.spikes import LeftOut, LeftOutRows, RecentLosses, SpikeConfig, SpikeError

TINY = Path(__file__).parents[1] / "tiny.yaml"
BAD_STEP = 14


@pytest.fixture(scope="module", autouse=True)
def started():
    jax.devices()


def test_the_limit_is_of_the_losses_that_were_known_two_steps_before():
    config = SpikeConfig(action="warn", window=5, threshold=10.0)
    losses = RecentLosses(config)
    for step, loss in enumerate([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 100.0], start=1):
        losses.add(step, loss)
    assert losses.limit(3) == math.inf  # one loss is known
    assert losses.limit(8) == 3.0 + 10.0 * 1.0  # of 1 to 5: not of 100, nor of 9, which is six before them
    assert RecentLosses(config, json.loads(json.dumps(losses.saved()))).limit(8) == losses.limit(8)


def test_losses_that_hardly_differ_have_a_least_deviation():
    losses = RecentLosses(SpikeConfig(action="warn", window=4, threshold=10.0), [(step, 2.0) for step in range(1, 6)])
    assert losses.limit(6) == pytest.approx(2.0 + 10.0 * 0.001 * 2.0)


def test_rows_that_are_left_out_are_kept_in_the_folder(tmp_path):
    rows = LeftOutRows(tmp_path, fresh=True, writes=True, seq_len=64)
    rows.add(LeftOut(start=8, stop=20, checkpoint=2, spike=5))
    rows.add(LeftOut(start=20, stop=24, checkpoint=2, spike=3))
    again = LeftOutRows(tmp_path, fresh=False, writes=False, seq_len=64)
    assert [again.next(row, 4) for row in (4, 8, 16, 24)] == [4, 24, 24, 24]
    assert again.next(10, 5) == 25  # a whole batch of another size
    rows.add(LeftOut(start=24, stop=28, checkpoint=6, spike=7, seq_len=32))  # shorter ones, which are others
    assert LeftOutRows(tmp_path, fresh=False, writes=False, seq_len=64).next(24, 4) == 24
    assert LeftOutRows(tmp_path, fresh=False, writes=False, seq_len=32).next(24, 4) == 28
    assert (again.rewinds_to(2), again.rewinds_to(3)) == (2, 0)
    assert LeftOutRows(tmp_path, fresh=True, writes=True, seq_len=64).parts == []
    (tmp_path / "skipped_rows.json").write_text('[{"start": 1')
    with pytest.raises(SpikeError, match="skipped_rows.json: got .*, wanted the rows that the run leaves out; delete"):
        LeftOutRows(tmp_path, fresh=False, writes=True, seq_len=64)


@pytest.mark.parametrize(("name", "value"), [("threshold", 0.0), ("window", 3)])
def test_refused_settings(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}, wanted"):
        SpikeConfig(**{name: value})


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A run over patterns that a model learns at once."""
    folder = tmp_path_factory.mktemp("spikes")
    config = yaml.safe_load(TINY.read_text())
    config["data"]["cache_dir"] = str(folder / "cache")
    config["data"]["sources"] = [{"kind": "synthetic", "num_symbols": 4, "min_length": 8, "max_length": 15}]
    config["training"] |= {"steps": 18, "spikes": {"window": 8, "threshold": 8.0}}
    config["optimizer"] = {"learning_rate": 0.05, "schedule": "constant"}
    config |= {"checkpoint": {"every": 4}, "evaluation": {"every": None}, "sample": {"num_tokens": 0}}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def with_bad_batch(monkeypatch):
    """with_bad_batch(weight): the rows of step BAD_STEP's batch aim at an id that no other row has, or, with a weight
    of nan, make a loss that is not finite; whenever they are read. Returns the numbers of what was read."""
    from train.data.pipeline import Data

    real = Data.batches
    read = []

    def install(weight=1.0):
        def batches(self, *, start_step, **rest):
            for number, batch in enumerate(real(self, start_step=start_step, **rest), start=start_step):
                read.append(number + 1)
                if number + 1 == BAD_STEP:
                    batch = batch | {
                        "targets": np.full_like(batch["targets"], 7),
                        "loss_weights": weight * batch["loss_weights"],
                    }
                yield batch

        monkeypatch.setattr(Data, "batches", batches)
        return read

    return install


def losses_of(run_dir):
    return [(r["step"], r["loss"]) for r in read_records(run_dir / "metrics.jsonl") if "loss" in r]


def test_a_spike_is_skipped_and_counted(config_file, with_bad_batch, tmp_path, capsys):
    with_bad_batch()
    assert main([str(config_file), f"run_dir={tmp_path}", "training.spikes.action=skip"]) == 0
    assert re.search(rf"step {BAD_STEP}: loss \S+ is a spike, above \S+; skipped, 1 so far", capsys.readouterr().out)
    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["spike"]] == [BAD_STEP]
    assert [r["skipped_steps"] for r in records[-5:]] == [1] * 5


@pytest.mark.slow
def test_a_spike_is_warned_of_and_applied(config_file, with_bad_batch, tmp_path, capsys):
    with_bad_batch()
    assert main([str(config_file), f"run_dir={tmp_path}", "training.spikes.action=warn"]) == 0
    assert f"warning: step {BAD_STEP}: loss" in capsys.readouterr().out
    assert read_records(tmp_path / "metrics.jsonl")[-1]["skipped_steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    ["training.spikes.action=rewind", pytest.param("training.on_nonfinite=rewind", marks=pytest.mark.slow)],
)
def test_a_run_goes_back_and_leaves_out_the_batches_between(config_file, with_bad_batch, tmp_path, capsys, setting):
    read = with_bad_batch(1.0 if "spikes" in setting else np.float32(np.nan))
    command = [str(config_file), f"run_dir={tmp_path / 'run'}", setting]
    assert main([*command, "training.steps=16"]) == 0
    output = capsys.readouterr().out
    assert re.search(rf"step {BAD_STEP}: .*; back to step 12, leaving out the rows from 24 to 28", output)
    # Step 13 has now the rows behind the bad batch, and the records tell of each step once.
    assert [step for step, _ in losses_of(tmp_path / "run")] == list(range(1, 17))
    assert [part["checkpoint"] for part in json.loads((tmp_path / "run" / "skipped_rows.json").read_text())] == [12]
    assert read[-1] >= 18

    # The same as a run that was told from the start to leave these rows out; and it goes on so after an interruption.
    (tmp_path / "told").mkdir()
    monitor = LeftOutRows(tmp_path / "told", fresh=False, writes=True, seq_len=64)
    assert main([str(config_file), f"run_dir={tmp_path / 'told'}", setting, "training.steps=4"]) == 0
    monitor.add(LeftOut(start=24, stop=28, checkpoint=12, spike=BAD_STEP))
    assert main([str(config_file), f"run_dir={tmp_path / 'told'}", setting]) == 0
    assert main(command) == 0
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "told")


@pytest.mark.slow
def test_a_run_that_goes_back_time_and_again_stops(config_file, with_bad_batch, tmp_path, monkeypatch, capsys):
    with_bad_batch()
    monkeypatch.setattr(LeftOutRows, "next", lambda self, rows, batch_size: rows)  # so that the batch comes again
    command = [str(config_file), f"run_dir={tmp_path}", "training.spikes.action=rewind", "training.max_repeats=2"]
    assert main(command) == 1
    assert "the run went back to step 12 2 times before. Lower optimizer.learning_rate" in capsys.readouterr().err


@pytest.mark.slow
def test_steps_that_are_skipped_in_a_row_stop_the_run(config_file, tmp_path, capsys):
    settings = ["optimizer.learning_rate=1e30", "training.on_nonfinite=skip", "training.max_repeats=3"]
    assert main([str(config_file), f"run_dir={tmp_path}", *settings]) == 1
    assert "3 steps in a row were skipped before" in capsys.readouterr().err

"""python -m train.checkpoint, on checkpoints that are whole, damaged, foreign or not there."""

import shutil

import jax
import jax.numpy as jnp
import optax
import pytest

from train.checkpoint import CheckpointConfig, Checkpoints, Position
from train.checkpoint.__main__ import main
from train.state import TrainState

ARRAYS = 7  # params and their momentum, two each; step, key, skipped steps


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run with checkpoints of steps 2 and 4."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    params = {"embedding": jax.random.normal(jax.random.key(0), (64, 32)), "layers": [{"scale": jnp.ones(8)}]}
    state = TrainState(
        params=params,
        opt_state=optax.sgd(0.1, momentum=0.9).init(params),
        step=jnp.int32(2),
        rng=jax.random.key(0),
        skipped_steps=jnp.int32(0),
    )
    checkpoints = Checkpoints(run_dir / "checkpoints", CheckpointConfig())
    for step in (2, 4):
        checkpoints.save(state, step=step, position=Position(rows=step, data="documents", config={"seed": 0}))
    checkpoints.close()
    return run_dir


@pytest.fixture
def run_dir(saved, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


def contents(directory):
    return {path: path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.rglob("*")}


def largest_file(directory):
    return max((path for path in directory.rglob("d/*")), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("where", ["", "checkpoints"])
def test_whole_checkpoints(saved, capfd, where):
    before = contents(saved)
    assert main(["ls", str(saved / where)]) == 0
    output, errors = capfd.readouterr()
    rows = [line.split("│")[1:-1] for line in output.splitlines() if "complete" in line]
    assert [row[0].strip() for row in rows] == ["2", "4"] and "kB" in rows[0][2] and not errors
    for arguments, steps in (([], 1), (["--step", "2"], 1), (["--all"], 2)):
        assert main(["verify", str(saved / where), *arguments]) == 0
        output, errors = capfd.readouterr()
        assert output.count(f"whole: {ARRAYS} arrays read") == steps and "error" not in errors
    assert contents(saved) == before


def test_one_checkpoint(saved, capfd):
    assert main(["verify", str(saved / "checkpoints" / "2")]) == 0
    assert "│ 2 " in capfd.readouterr().out


@pytest.mark.parametrize("damage", ["cut off", "gone"])
def test_an_array_that_is_not_whole_is_named(run_dir, capfd, damage):
    file = largest_file(run_dir / "checkpoints/4/params")
    file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[:100])
    before = contents(run_dir)
    assert main(["verify", str(run_dir)]) == 1
    output, errors = capfd.readouterr()
    assert "broken: params.embedding cannot be read: " in output
    assert "error: " in errors and "delete that folder to go on from step 2" in errors and "Traceback" not in errors
    assert main(["verify", str(run_dir), "--all"]) == 1
    output, errors = capfd.readouterr()
    assert output.count("whole") == 1 and output.count("broken") == 1
    assert main(["verify", str(run_dir), "--step", "2"]) == 0
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("params/_METADATA", "{", "the description of its params cannot be read"),
        ("training/_METADATA", None, "the description of its training cannot be read"),
        ("position/metadata", "{", "its position cannot be read: "),
        ("position/metadata", '{"rows": 1}', "its position cannot be read: "),
        ("params", None, "not a checkpoint of this trainer: it holds no params"),
    ],
)
def test_what_can_be_seen_without_arrays(run_dir, capfd, file, text, problem):
    path = run_dir / "checkpoints/4" / file
    if text is not None:
        path.write_text(text)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert main(["ls", str(run_dir)]) == 0
    output, errors = capfd.readouterr()
    assert f"broken: {problem}" in output and "complete" in output
    assert "4: delete that folder to go on from step 2" in errors
    assert main(["verify", str(run_dir)]) == 1
    errors = capfd.readouterr().err
    assert problem in errors and "Traceback" not in errors


def test_a_foreign_checkpoint(tmp_path, capfd):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "model.bin").write_bytes(b"weights")
    assert main(["verify", str(tmp_path)]) == 1
    errors = capfd.readouterr().err
    assert "not a checkpoint of this trainer: it holds no params; no earlier one is complete: delete that" in errors


def test_a_save_that_was_cut_off(run_dir, capfd):
    (run_dir / "checkpoints/4").rename(run_dir / "checkpoints/4.orbax-checkpoint-tmp")
    assert main(["ls", str(run_dir)]) == 0
    output, errors = capfd.readouterr()
    assert "unfinished: saving it was cut off, or goes on" in output and "its next start removes it" in errors
    assert main(["verify", str(run_dir)]) == 0
    assert "│ 2 " in capfd.readouterr().out
    assert main(["verify", str(run_dir), "--step", "4"]) == 1
    assert f"--step: got 4, wanted a step that {run_dir} holds: 2" in capfd.readouterr().err
    shutil.rmtree(run_dir / "checkpoints/2")
    assert main(["verify", str(run_dir)]) == 1
    assert "start the run again, which begins at step 0" in capfd.readouterr().err


@pytest.mark.parametrize("verb", ["ls", "verify"])
def test_no_checkpoint_at_all(tmp_path, capfd, verb):
    assert main([verb, str(tmp_path / "nowhere")]) == 1
    assert "nowhere: is no folder; pass a run's folder" in capfd.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    assert main([verb, str(tmp_path)]) == 1
    assert f"error: {tmp_path}: holds no checkpoint; pass a run's folder" in capfd.readouterr().err
    assert not list((tmp_path / "checkpoints").iterdir())

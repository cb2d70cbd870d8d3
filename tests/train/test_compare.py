import json

import pytest

from train.compare import main


def _run(path, loss):
    path.mkdir(parents=True)
    records = [
        {"step": 0, "eval/loss": 5.5, "eval/bits_per_byte": 8.0},
        {"step": 10, "loss": 4.0, "bits_per_byte": 5.8, "tokens_per_second": 900.0, "mfu": 0.3, "memory_gib": 2.0},
        {"step": 20, "loss": loss, "bits_per_byte": 4.3, "tokens_per_second": 1100.0, "mfu": 0.4, "memory_gib": None},
        {"step": 20, "eval/loss": loss + 0.5, "eval/bits_per_byte": 5.0},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_the_last_losses_and_the_median_speed_of_each_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    runs = [_run(tmp_path / "softmax", 3.0), _run(tmp_path / "hybrid", 2.0), _run(tmp_path / "again/hybrid", 1.0)]
    assert main([*runs, "--output", str(tmp_path / "curves.png")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    found = {row[0]: row[1:] for row in rows if len(row) == 9}
    assert found["softmax"] == ["20", "3.0000", "3.5000", "5.0000", "1,000", "35.0%", "2.00", "GiB"]
    assert found["hybrid"][1:3] == ["2.0000", "2.5000"]
    assert found["again/hybrid"][1:3] == ["1.0000", "1.5000"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_records_has_no_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "metrics.jsonl").write_text("")
    assert main([str(tmp_path), "--output", str(tmp_path / "curves.png")]) == 0
    assert capsys.readouterr().out.count(" - ") == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere, wanted the folder of a run, which has a metrics.jsonl"),
        (["nowhere", "--output", "x.svg"], "--output: got x.svg, wanted a file name that ends in .png"),
        (["nowhere", "--output", "missing/x.png"], "--output: got missing/x.png, wanted a folder that is there"),
    ],
)
def test_what_is_wrong_is_said(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

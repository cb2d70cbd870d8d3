"""Generated bad input, in a process whose calls no type checker guards."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def faults(*arguments, seconds):
    command = [sys.executable, "-m", "tests.faults", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=seconds)


def test_a_few_cases_of_each_part_hold():
    result = faults("--short", seconds=600)
    assert result.returncode == 0, result.stderr[-5000:]
    assert all(part in result.stdout for part in ("bad configs", "bad data", "bad arrays"))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["configs", "data", "arrays"])
def test_all_cases_hold(part):
    result = faults(part, seconds=7200)
    assert result.returncode == 0, result.stderr[-5000:]


def test_a_part_that_is_not_there_is_refused():
    result = faults("nonsense", seconds=120)
    assert result.returncode == 2 and "PART: got nonsense, wanted some of configs, data, arrays" in result.stderr

"""Faults and bad input, in processes whose calls no type checker guards."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = ("configs", "data", "arrays")
PROCESSES = ("lines", "kills", "stops", "full", "truncated")


def faults(*arguments, seconds):
    command = [sys.executable, "-m", "tests.faults", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=seconds)


def test_a_few_cases_of_generated_input_hold():
    result = faults("--short", *GENERATED, seconds=600)
    assert result.returncode == 0, result.stderr[-5000:]
    assert all(part in result.stdout for part in GENERATED)


@pytest.mark.slow
@pytest.mark.parametrize("part", PROCESSES)
def test_a_few_faults_of_runs_in_processes_hold(part):
    result = faults("--short", part, seconds=1200)
    assert result.returncode == 0, result.stderr[-5000:]


@pytest.mark.slow
@pytest.mark.parametrize("part", [*GENERATED, *PROCESSES])
def test_all_cases_hold(part):
    result = faults(part, seconds=7200)
    assert result.returncode == 0, result.stderr[-5000:]


def test_a_part_that_is_not_there_is_refused():
    result = faults("nonsense", seconds=120)
    assert result.returncode == 2 and "PART: got nonsense, wanted some of configs, data, arrays" in result.stderr

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from train.assemble import check_agreement
from train.checkpoint import CheckpointError
from train.config import ConfigError, load_config
from train.data import DataError

CONFIG = load_config(Path(__file__).parents[2] / "configs/quickstart.yaml")
GATHER = "jax.experimental.multihost_utils.process_allgather"


def check(config=CONFIG, fingerprint="ab", step=10):
    checkpoints = SimpleNamespace(latest_step=step, directory="dir")
    check_agreement(config, SimpleNamespace(fingerprint=fingerprint), checkpoints)


def check_beside(monkeypatch, **there):
    """Checks in two processes, in the other of which some things are different."""
    theirs = []

    def record(digests):
        theirs.append(digests)
        return digests[None]

    monkeypatch.setattr(GATHER, record)
    check(**there)
    monkeypatch.setattr(GATHER, lambda digests: np.stack([digests, *theirs]))
    check()


def test_processes_that_agree(monkeypatch):
    check_beside(monkeypatch)


@pytest.mark.parametrize(
    ("there", "error", "message"),
    [
        (
            {"config": dataclasses.replace(CONFIG, seed=7)},
            ConfigError,
            "config: the processes have different settings; start all with the same file",
        ),
        (
            {"fingerprint": "cd"},
            DataError,
            "data.sources: the processes read different documents, ab by their lengths here; give every host",
        ),
        (
            {"step": None},
            CheckpointError,
            "dir: the processes see different checkpoints, step 10 as the last one here; put run_dir and checkpoint",
        ),
    ],
)
def test_processes_that_do_not(monkeypatch, there, error, message):
    with pytest.raises(error, match=message):
        check_beside(monkeypatch, **there)

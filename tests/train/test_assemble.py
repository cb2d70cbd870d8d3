import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from longctx.sharding import MeshConfig, make_mesh
from train import assemble
from train.assemble import check_agreement
from train.checkpoint import CheckpointError
from train.config import ConfigError, load_config
from train.data import DataError

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
CONFIG = load_config(QUICKSTART)
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


@pytest.mark.parametrize(
    ("override", "offloads"),
    [
        ("model.remat={residual: offload}", True),
        ("model.remat={attention: save}", False),
        ("optimizer.offload=true", True),
        ("model.remat=full", False),
    ],
)
def test_the_step_is_told_of_copies_to_the_host(monkeypatch, override, offloads):
    told = []
    monkeypatch.setattr(assemble, "make_train_step", lambda *_, **options: told.append(options["offloads"]))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        assemble.assemble(load_config(QUICKSTART, [override]), mesh, vocab_size=512)
    assert told == [offloads]

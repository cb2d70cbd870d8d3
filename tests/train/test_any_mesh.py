"""One run from mesh to mesh: every shape of 8 devices, layout and strategy goes on as one device would have.

The rows are of two sources, mixed by weights. Each leg resumes the checkpoint of the one before on another mesh and
trains five steps; the rows that it trains on must be those of an undisturbed run on one device exactly, everything that
is logged the same to float32 rounding.
"""

import jax
import numpy as np
import pytest
import yaml

from train.__main__ import main
from train.metrics import read_records
from train.placement import BatchPlacement

STEPS_A_LEG = 5
LEGS = [  # (data, fsdp, context_outer, context_inner, tensor), layout, strategy
    ((2, 2, 1, 2, 1), "zigzag", "ring"),
    ((1, 2, 2, 2, 1), "contiguous", "halo"),
    ((1, 1, 1, 8, 1), "striped", "all_gather"),
    ((2, 1, 1, 2, 2), "zigzag", "ulysses"),
    ((1, 1, 2, 2, 2), "striped", "double_ring"),
    ((2, 1, 2, 2, 1), "zigzag", "usp"),
    ((1, 4, 1, 1, 2), "zigzag", "ring"),
    ((2, 1, 1, 4, 1), "contiguous", "ring"),
    ((1, 2, 2, 2, 1), "balanced", "ring"),
]
AXES = ("data", "fsdp", "context_outer", "context_inner", "tensor")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any_mesh")
    rng = np.random.default_rng(0)
    for name, symbols, count in (("letters", "abcdefgh ", 30), ("digits", "0123456789", 20)):
        for index in range(count):
            (folder / f"{name}{index}.txt").write_text("".join(rng.choice(list(symbols), rng.integers(5, 90))))
    sources = [
        {"kind": "text", "files": [str(folder / f"{name}*.txt")], "weight": weight}
        for name, weight in (("letters", 2.0), ("digits", 1.0))
    ]
    config = {
        "run_dir": "set by each test",
        "model": {
            "dim": 16,
            "num_layers": 1,
            "mlp_dim": 32,
            "mixers": {
                "local": {
                    **{"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "window": 12},
                    **{"sinks": True, "dropout": 0.1},
                },
            },
            "pattern": ["local"],
            "dtype": "float32",
        },
        "data": {
            "seq_len": 64,
            "cache_dir": str(folder / "cache"),
            "held_out_fraction": 0.2,
            "sources": sources,
        },
        "training": {"steps": STEPS_A_LEG * len(LEGS), "batch_size": 4, "z_loss": 0.001},
        "optimizer": {"learning_rate": 0.003, "warmup_steps": 2, "decay_steps": 2},
        "evaluation": {"every": STEPS_A_LEG, "max_batches": 2},
        "checkpoint": {"every": None},
        "metrics": {"every": 1, "tensorboard": False, "plot": False},
        "sample": {"num_tokens": 0},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def rows_read(monkeypatch):
    """The batches that were placed, as their devices hold them, put back into the order of the sequence."""
    batches = []
    place = BatchPlacement.place

    def record(self, batch):
        placed = place(self, batch)
        arrays = {name: np.asarray(array) for name, array in placed.items()}
        if callable(self.slots):  # each row has an order of its own
            segments = np.where(arrays["segment_ids"] < 0, 64, arrays["segment_ids"])
            order = np.stack([np.lexsort(row) for row in zip(arrays["positions"], segments, strict=True)])
        else:
            slots = np.arange(64) if self.slots is None else self.slots
            order = np.tile(np.argsort(slots), (4, 1))
        batches.append(
            {
                name: np.take_along_axis(array, order, axis=1) if array.ndim == 2 else array
                for name, array in arrays.items()
            }
        )
        return placed

    monkeypatch.setattr(BatchPlacement, "place", record)

    def take():
        taken = batches[:]
        batches.clear()
        return taken

    return take


def numbers(run_dir):
    """What was logged, by (step, name), apart from times and memory."""
    timed = ("second", "share", "memory")
    return {
        (record["step"], name): value
        for record in read_records(run_dir / "metrics.jsonl")
        for name, value in record.items()
        if name not in ("step", "finite") and not any(word in name for word in timed)
    }


@pytest.mark.slow
def test_a_run_goes_on_from_mesh_to_mesh(config_file, tmp_path, rows_read, capsys):
    jax.devices()  # the eight of conftest.py
    one, moving = tmp_path / "one", tmp_path / "moving"
    assert main([str(config_file), f"run_dir={one}", "distributed.virtual_cpu_devices=1"]) == 0
    rows_of_one = rows_read()
    rows = []
    for leg, (sizes, layout, strategy) in enumerate(LEGS, 1):
        mesh = [f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True)]
        steps = f"training.steps={leg * STEPS_A_LEG}"
        chunks = ", chunk_size: 2" if layout == "balanced" else ""
        how = f"context_parallel={{layout: {layout}, strategy: {strategy}{chunks}}}"
        assert main([str(config_file), f"run_dir={moving}", *mesh, how, steps]) == 0
        rows += rows_read()
    assert f"resuming {moving} at step {STEPS_A_LEG * (len(LEGS) - 1)}" in capsys.readouterr().out

    assert len(rows) == len(rows_of_one)
    for ours, theirs in zip(rows, rows_of_one, strict=True):
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], array, err_msg=name)

    wanted, got = numbers(one), numbers(moving)
    assert wanted.keys() == got.keys()
    assert {"loss", "z_loss", "grad_norm", "bits_per_byte", "tokens", "eval/loss", "eval/bits_per_byte"} <= {
        name for _, name in wanted
    }
    for (step, name), value in wanted.items():
        # z_loss is a mean of squares of sums that are near zero, so that their rounding counts more.
        np.testing.assert_allclose(got[step, name], value, rtol=2e-5, atol=2e-6, err_msg=f"{name} of step {step}")

"""`deterministic: true`: two runs on the same devices give the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from train.__main__ import main
from train.checkpoint import find_checkpoint
from train.metrics import read_records
from train.step import gpu_compiler_options

CONFIG = {
    "run_dir": "set by each test",
    "deterministic": True,
    "model": {
        "dim": 16,
        "num_layers": 1,
        "mlp_dim": 32,
        "mixers": {"global": {"kind": "attention", "num_heads": 2, "dropout": 0.1}},
        "pattern": ["global"],
    },
    "data": {
        "seq_len": 32,
        "tokenizer": "ids:33",
        "cache_dir": "set by each test",
        "sources": [{"kind": "synthetic", "num_symbols": 32, "min_length": 8, "max_length": 31}],
    },
    "training": {"steps": 4, "batch_size": 4, "accumulate_steps": 2},
    "optimizer": {"learning_rate": 0.01},
    "checkpoint": {"every": None},
    "evaluation": {"max_batches": 1},
    "metrics": {"every": 1, "tensorboard": False, "plot": False},
    "sample": {"num_tokens": 0},
}
MESHES = {"1": {}, "8": {"fsdp": 2, "context_inner": 2, "tensor": 2}}


@pytest.fixture(autouse=True)
def started():
    jax.devices()


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["1", "8"])
def test_two_runs_are_equal_bit_for_bit(tmp_path, devices):
    file = tmp_path / "config.yaml"
    config = CONFIG | {"mesh": MESHES[devices], "distributed": {"virtual_cpu_devices": int(devices)}}
    file.write_text(yaml.safe_dump(config))
    results = []
    for name in ("first", "second"):
        run_dir = tmp_path / name
        assert main([str(file), f"run_dir={run_dir}", f"data.cache_dir={tmp_path}"]) == 0
        timed = ("second", "share", "memory")
        records = [
            {key: value for key, value in record.items() if not any(word in key for word in timed)}
            for record in read_records(run_dir / "metrics.jsonl")
        ]
        directory, step = find_checkpoint(run_dir)
        with ocp.StandardCheckpointer() as reader:
            arrays = [reader.restore(directory / str(step) / item) for item in ("params", "training")]
        results.append((records, arrays))
    (records, arrays), (other_records, other_arrays) = results
    assert len(records) >= 4 and records == other_records
    assert jax.tree.leaves(arrays)
    jax.tree.map(np.testing.assert_array_equal, arrays, other_arrays)


def test_a_mixer_that_allows_any_order_is_refused(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    assert main([str(file), "model.mixers.global.deterministic=false", f"run_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert "deterministic: got true with model.mixers.global.deterministic=false, wanted the same of all" in error
    assert not (tmp_path / "run").exists()


def test_compilers_for_gpus_are_told():
    assert gpu_compiler_options(deterministic=True)["xla_gpu_deterministic_ops"] is True
    assert "xla_gpu_deterministic_ops" not in gpu_compiler_options(deterministic=False)
    assert gpu_compiler_options(deterministic=False, offloads=True)["xla_gpu_enable_command_buffer"] == ""
    assert "xla_gpu_enable_command_buffer" not in gpu_compiler_options(deterministic=False)
    # Every compiler reads them all, and refuses a value that it cannot read.
    options = gpu_compiler_options(deterministic=True, offloads=True)
    jax.jit(jnp.sin, compiler_options=options).lower(jnp.ones(2)).compile()

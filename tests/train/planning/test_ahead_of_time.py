"""The real training step, compiled for devices that are not there."""

import importlib.util
import io

import pytest
from rich.console import Console

from train.config import TrainConfig
from train.devices import device_table
from train.plan import make_plan
from train.planning.estimate import expected_transfers
from train.planning.program import plan_run
from train.planning.target import named_target
from train.schema import parse

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def cuda_plugin():
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
    except ModuleNotFoundError:
        return False


needs_cuda_plugin = pytest.mark.skipif(not cuda_plugin(), reason="the CUDA plugin is not installed")


def config(devices, tokens_a_device=2048, **mesh) -> TrainConfig:
    return parse(
        TrainConfig,
        {
            "run_dir": "runs/none",
            "data": {"seq_len": devices * tokens_a_device, "sources": [{"kind": "stdlib"}]},
            "model": {
                "dim": 512,
                "num_layers": 4,
                "mlp_dim": 1024,
                "vocab_size": 512,
                "mixers": {"far": {"kind": "attention", "num_heads": 8, "num_kv_heads": 1, "head_dim": 128}},
                "pattern": ["far"],
                "remat": "full",
            },
            "training": {"steps": 10, "batch_size": 1},
            "optimizer": {"learning_rate": 1e-3},
            "mesh": mesh or {"context_inner": devices},
        },
    )


def plan_of(name, config):
    return make_plan(
        config, named_target(name, device_table()), by_formula=False, console=Console(file=io.StringIO(), width=160)
    )


def sent(plan):
    """Count and bytes of the hops by phase and bytes each."""
    found = {}
    for c in plan.collectives:
        if c.is_hop:
            key = (c.phase, c.num_bytes)
            found[key] = found.get(key, 0) + c.count
    return found


def stated(name, config):
    found = {}
    for _, transfer, phase, count in expected_transfers(plan_run(config, named_target(name, device_table()))):
        found[phase, transfer.num_bytes] = found.get((phase, transfer.num_bytes), 0) + count
    return found


@needs_libtpu
@pytest.mark.parametrize(("name", "devices"), [("v5e:2x4", 8), ("v5p:4x4x4", 64)])
def test_a_ring_on_a_tpu_sends_what_it_states_and_hides_it(name, devices):
    run = config(devices)
    plan = plan_of(name, run)
    assert plan.source == "compiler" and plan.num_devices == devices and plan.compile_seconds > 0
    assert sent(plan) == stated(name, run)
    assert all(c.asynchronous and not c.is_exposed for c in plan.collectives if c.is_hop)
    assert plan.fits and not plan.problems
    assert plan.implementations == {"blockwise_attention_forward": "xla", "blockwise_attention_backward": "xla"}
    assert 0 < plan.mfu < 1 and plan.step_seconds > plan.compute_seconds > 0

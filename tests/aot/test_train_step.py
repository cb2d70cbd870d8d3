"""The training step of a ring over a whole slice of TPUs that are not there, with the attention kernels in it."""

import importlib.util
import io

import pytest
from rich.console import Console

from train.config import TrainConfig
from train.devices import device_table
from train.plan import make_plan
from train.planning.target import named_target
from train.schema import parse

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
    pytest.mark.slow,
]


@pytest.mark.parametrize("strategy", ["ring", "ring_dma"])
@pytest.mark.parametrize(("name", "ring"), [("v5p:8x8x8", 64), ("v6e:16x16", 32)])
def test_a_ring_of_kernels_compiles(name, ring, strategy):
    """Dispatch sees the TPU, on a machine that has none; nothing but the kernels serves attention."""
    run = parse(
        TrainConfig,
        {
            "run_dir": "runs/none",
            "data": {"seq_len": ring * 2048, "sources": [{"kind": "stdlib"}]},
            "model": {
                "dim": 1024,
                "num_layers": 2,
                "mlp_dim": 1024,
                "vocab_size": 512,
                "mixers": {"far": {"kind": "attention", "num_heads": 8, "num_kv_heads": 2, "head_dim": 128}},
                "pattern": ["far"],
                "remat": "full",
            },
            "context_parallel": {"strategy": strategy, "layout": "zigzag"},
            "training": {"steps": 10, "batch_size": 8},
            "optimizer": {"learning_rate": 1e-3},
            "mesh": {"fsdp": 8, "context_inner": ring},
        },
    )
    target = named_target(name, device_table())
    plan = make_plan(run, target, by_formula=False, console=Console(file=io.StringIO(), width=160))
    assert plan.source == "compiler" and plan.num_devices == 8 * ring
    attention = dict.fromkeys(("blockwise_attention_forward", "blockwise_attention_backward"), "mosaic_tpu")
    assert plan.implementations == attention | {"softmax_statistics": "xla"}
    assert {c.phase for c in plan.collectives if c.is_hop} == {"forward", "recompute", "backward"}
    assert not any("the program sends" in problem for problem in plan.problems)
    by_kernels = {c.phase for c in plan.collectives if c.kind == "remote-dma"}
    assert by_kernels == ({"forward", "recompute", "backward"} if strategy == "ring_dma" else set())

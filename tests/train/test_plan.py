"""`python -m train.plan`, as a user calls it; compiling for devices that are not there is tests/train/planning's."""

import importlib.util
import json

import pytest
from rich.console import Console

from train import plan
from train.config import load_config
from train.devices import device_table
from train.planning import target

RING = "configs/cpu_ring8.yaml"
GPUS = "configs/gpu8_ring_128k.yaml"
SMALL = ("data.seq_len=512", "model.dim=32", "model.mlp_dim=64", "model.mixers.local.window=64")


@pytest.fixture
def no_compiler(monkeypatch):
    """A machine with neither libtpu nor a CUDA plugin."""
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)


def test_the_devices_at_hand(capsys, tmp_path):
    assert plan.main([RING, *SMALL, "--json", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["source"] == "compiler" and data["fits"] and data["problems"] == []
    assert data["mesh"]["context_inner"] == data["num_devices"] == 8
    # Times on a CPU are not known, and not made up.
    assert data["step_seconds"] is None and data["mfu"] is None and data["parts"] == []
    hops = [c for c in data["collectives"] if c["is_hop"]]
    assert {c["kind"] for c in hops} == {"collective-permute"} and all(c["seconds"] is None for c in hops)
    # Forward, backward: keys, gradients; of the local layer, whose window reaches two chunks, only four hops.
    assert sum(c["count"] for c in hops) == (7 + 7 + 8) + (4 + 4 + 5)
    assert data["memory_total"] == sum(data["memory"].values())
    assert out.splitlines()[-1].startswith("fits: ")
    assert "note: no times: the table of devices has no speeds for cpu" in out


@pytest.mark.slow
def test_a_window_may_have_a_strategy_of_its_own(tmp_path):
    """The global layer rings, the local one sends its halo one device on: in the program what is stated."""
    how = "context_parallel={window_strategy: halo, layout: contiguous}"
    assert plan.main([RING, *SMALL, how, "--json", str(tmp_path / "plan.json")]) == 0
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["problems"] == []
    counts = {"global mixer": 0, "local mixer": 0}
    for c in data["collectives"]:
        if c["is_hop"]:
            counts[c["part"]] += c["count"]
    assert counts == {"global mixer": 7 + 7 + 8, "local mixer": 1 + 1 + 1}


def test_json_on_stdout_is_json_alone(capsys):
    assert plan.main([GPUS, "--devices", "h100:8", "--formula", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert data["source"] == "formula" and data["step_seconds"] > 0 and 0 < data["mfu"] < 1
    assert "Figures by formula, nothing was compiled: asked for with --formula" in err


def test_without_a_compiler_formulas_are_given_and_marked(capsys, no_compiler):
    for name, remedy in (("v5p:2x2x2", "longctx-jax[plan]"), ("h100:8", "longctx-jax[plan-cuda]")):
        assert plan.main([GPUS, "--devices", name]) in (0, 3)
        out = capsys.readouterr().out
        assert "Figures by formula, nothing was compiled" in out and remedy in out
        assert "(by formula)" in out.splitlines()[-1]


def test_exposed_hops_are_a_problem(capsys):
    """Those of a ring, which has compute to hide them behind, but too little where rows are short."""
    ring = [GPUS, "--devices", "h100:8", "--formula", "context_parallel={strategy: ring, layout: zigzag}"]
    assert plan.main(ring) == 0
    assert plan.main([*ring, "data.seq_len=2048", "model.mixers.local.window=256"]) == plan.PROBLEM_CODE
    assert (
        "problem: exposed hops: 480 collective-permutes of local mixer (forward, 0.50 MiB)" in capsys.readouterr().out
    )


def test_what_is_sent_up_front_is_a_problem_where_it_takes_long(capsys):
    """A halo is there before its layer attends, so it is waited for: a little of these steps, but not of tiny ones."""
    assert plan.main([GPUS, "--devices", "h100:8", "--formula"]) == 0
    assert "note: what halo, all_gather, ulysses, usp or ring_dma send before and after they compute is waited for" in (
        capsys.readouterr().out
    )
    narrow = ["data.seq_len=16384", "model.mixers.local.window=1024", "context_parallel.strategy=all_gather"]
    assert plan.main([GPUS, "--devices", "v5e:2x4", "--formula", *narrow]) == plan.PROBLEM_CODE
    assert "problem: exposed hops: " in capsys.readouterr().out


NO_LOCAL = ["model.mixers={global: {kind: attention, num_heads: 16, num_kv_heads: 4, head_dim: 128}}"]


def test_what_does_not_fit_is_a_problem_and_says_what_helps(capsys):
    large = ["model.remat=none", "data.seq_len=1048576", "training.accumulate_steps=1"]
    assert plan.main([GPUS, "--devices", "h100:8", "--formula", *large]) == plan.PROBLEM_CODE
    out = capsys.readouterr().out
    assert "problem: does not fit: " in out and "would help: model.remat=dots or full" in out
    assert "would help: training.accumulate_steps=8" in out and "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" in out
    assert out.splitlines()[-1].startswith("does not fit: ")


def test_the_longest_sequence_is_the_last_line(capsys, monkeypatch):
    arguments = [GPUS, "--devices", "h100:8", "--formula", *NO_LOCAL, "model.pattern=[global]", "--max-seq"]
    plan.main(arguments)
    last = capsys.readouterr().out.splitlines()[-1]
    found = int(last.removeprefix("longest data.seq_len that fits h100:8: ").removesuffix(" tokens").replace(",", ""))
    assert found % 1024 == 0
    fits = [GPUS, "--devices", "h100:8", "--formula", *NO_LOCAL, "model.pattern=[global]"]
    assert plan.main([*fits, f"data.seq_len={found}"]) == 0
    assert plan.main([*fits, f"data.seq_len={found * 17 // 16 // 1024 * 1024}"]) == plan.PROBLEM_CODE
    # Half of the memory: a shorter one.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.375")
    plan.main(arguments)
    less = int("".join(filter(str.isdigit, capsys.readouterr().out.splitlines()[-1].split("h100:8: ")[1])))
    assert less < 0.6 * found


@pytest.mark.parametrize("name", ["v5p", "v9:2x2", "h100:0", "h100:12", "h100:2x4", "here", "v5e:2y4"])
def test_names_that_describe_no_devices(name, capsys):
    assert plan.main([RING, "--devices", name]) == 2
    assert "--devices: got" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_slice_that_does_not_exist(capsys):
    assert plan.main([RING, "--devices", "v5e:3x7"]) == 2
    assert "--devices: got v5e:3x7, which is no slice that libtpu knows" in capsys.readouterr().err


def test_a_mesh_that_does_not_use_the_devices(capsys):
    assert plan.main([GPUS, "--devices", "h100:16", "--formula"]) == 2
    assert "does not use exactly the 16 devices" in capsys.readouterr().err


def test_an_implementation_that_does_not_serve_the_devices(capsys):
    assert plan.main([RING, *SMALL, "model.mixers.global.implementation=cudnn"]) == 2
    error = capsys.readouterr().err
    assert "model: cudnn: it takes and returns no running softmax" in error and "Traceback" not in error


def test_another_table_of_devices(capsys, tmp_path):
    table = tmp_path / "devices.yaml"
    table.write_text(
        "devices:\n  h100:\n    {device_kinds: [H100], peak_tflops: 100, matmul_tflops: 50, memory_gib: 1,\n"
        "     memory_gb_per_s: 3000, link: switch, link_gb_per_s: 300, network_gb_per_s: 40}\n"
    )
    assert plan.main([GPUS, "--devices", "h100:8", "--formula", "--device-table", str(table)]) == plan.PROBLEM_CODE
    assert "of 0.75 GiB a device" in capsys.readouterr().out
    table.write_text("devices:\n  h100: {device_kind: [H100], peak_tflops: 100}\n")
    assert plan.main([GPUS, "--devices", "h100:8", "--formula", "--device-table", str(table)]) == 2
    assert f"{table}: devices.h100.device_kind: unknown key" in capsys.readouterr().err
    table.write_text("devices:\n  h100: {device_kinds: [H100], peak_tflops: 0}\n")
    assert plan.main([GPUS, "--devices", "h100:8", "--formula", "--device-table", str(table)]) == 2
    assert f"{table}: devices.h100.peak_tflops: got 0.0, wanted a number above 0" in capsys.readouterr().err


def test_the_table_lacks_the_device(capsys, tmp_path):
    table = tmp_path / "devices.yaml"
    table.write_text("devices:\n  v5e: {device_kinds: [x], peak_tflops: 1}\n")
    assert plan.main([GPUS, "--devices", "h100:8", "--formula", "--device-table", str(table)]) == 2
    assert "--device-table: has no entry h100" in capsys.readouterr().err


@pytest.mark.parametrize("offload", [False, True])
def test_a_formula_counts_the_optimizers_state_on_the_host(offload):
    """With JAX's CUDA plugin too, whose devices that are not there have no memory of the host."""
    overrides = [f"optimizer.offload={str(offload).lower()}", "model.remat=none"]
    found = plan.make_plan(
        load_config(GPUS, overrides), target.named_target("h100:8", device_table()), by_formula=True, console=Console()
    )
    on_host, on_device = found.host_memory.get("optimizer", 0), found.memory["optimizer"]
    assert on_host > 1e6 > on_device if offload else on_device > 1e6 > on_host

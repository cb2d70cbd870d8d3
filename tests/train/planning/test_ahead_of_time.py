"""The real training step, compiled for devices that are not there."""

import dataclasses
import importlib.util
import io
import math

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from longctx import sharding
from longctx.context_parallel import ContextParallelConfig
from longctx.context_parallel.ring import Ring
from longctx.context_parallel.strategy import Residuals
from pallas_kernels import SoftmaxCarry, blockwise_attention_forward
from train.config import TrainConfig
from train.devices import device_table
from train.plan import make_plan
from train.planning.estimate import expected_transfers
from train.planning.program import plan_run
from train.planning.target import named_target
from train.schema import parse

LAYERS = 4
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
                "dim": 1024,
                "num_layers": LAYERS,
                "mlp_dim": 1024,
                "vocab_size": 512,
                "mixers": {"far": {"kind": "attention", "num_heads": 16, "num_kv_heads": 1, "head_dim": 128}},
                "pattern": ["far"],
                "remat": "full",
            },
            "training": {"steps": 10, "batch_size": mesh.get("fsdp", 1)},
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


def check_hops(plan, *, ring_size):
    """All hops are hidden but for the first and last of the backward pass, which have little compute beside them."""
    hops = [c for c in plan.collectives if c.is_hop]
    exposed = [c for c in hops if c.is_exposed]
    assert all(c.phase == "backward" for c in exposed)
    assert sum(c.count for c in exposed) <= 3 * LAYERS < sum(c.count for c in hops) / ring_size * 2
    assert len(plan.problems) == len(exposed) and all("exposed hops" in problem for problem in plan.problems)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("name", "devices"), [("v5e:2x4", 8), ("v5p:4x4x4", 64)])
def test_a_ring_on_a_tpu_sends_what_it_states_and_hides_it(name, devices):
    run = config(devices)
    plan = plan_of(name, run)
    assert plan.source == "compiler" and plan.num_devices == devices and plan.compile_seconds > 0
    assert sent(plan) == stated(name, run)
    check_hops(plan, ring_size=devices)
    assert plan.fits
    attention = dict.fromkeys(("blockwise_attention_forward", "blockwise_attention_backward"), "mosaic_tpu")
    assert plan.implementations == attention | {"softmax_statistics": "xla"}
    assert 0 < plan.mfu < 1 and plan.step_seconds > plan.compute_seconds > 0


@needs_libtpu
@pytest.mark.parametrize("axes", [{"fsdp": 4, "context_inner": 128}, {"fsdp": 8, "context_outer": 4, "tensor": 16}])
def test_a_mesh_may_split_an_axis_of_the_torus(axes):
    run = config(512, tokens_a_device=32, **axes)
    mesh = plan_run(run, named_target("v5p:8x8x8", device_table())).mesh
    assert mesh.size == len(set(mesh.devices.flat)) == 512 and dict(mesh.shape) | axes == dict(mesh.shape)


@needs_cuda_plugin
def test_a_ring_on_gpus_sends_what_it_states_and_hides_it():
    run = config(8)
    plan = plan_of("h100:8", run)
    assert plan.source == "compiler" and plan.device_kind == "NVIDIA H100 80GB HBM3"
    by_phase = {}
    for (phase, num_bytes), count in stated("h100:8", run).items():
        by_phase[phase] = by_phase.get(phase, 0) + count * num_bytes
    # XLA sends what leaves at the same time together.
    found = {}
    for c in plan.collectives:
        if c.is_hop:
            found[c.phase] = found.get(c.phase, 0) + c.count * c.num_bytes
    assert found == by_phase
    check_hops(plan, ring_size=8)
    assert plan.fits


@needs_cuda_plugin
def test_what_is_offloaded_goes_to_the_host_and_comes_back_a_layer_ahead():
    """One GPU: the device keeps none of it, the host all, and compute hides what comes back, but for the last layer's
    and lse, which is 1 % of it and comes behind out."""
    base = config(1, tokens_a_device=65536)

    def plan(keeping):
        model = dataclasses.replace(base.model, remat=dict.fromkeys(("residual", "attention"), keeping))
        return plan_of("h100:1", dataclasses.replace(base, model=model))

    on_host, on_device = plan("offload"), plan("save")
    of_lse = 65536 * 16 * 4
    of_layer = 65536 * (1024 + 16 * 128) * 2 + of_lse  # inputs, out and lse
    assert on_host.host_memory == {"activations": LAYERS * of_layer} and not on_device.host_memory
    assert on_device.memory["activations"] - on_host.memory["activations"] > of_layer
    copies = [c for c in on_host.collectives if c.kind == "host-copy"]
    assert all(c.asynchronous for c in copies)
    for link in ("to the host", "from the host"):
        assert sum(c.count * c.num_bytes for c in copies if c.links == link) == LAYERS * of_layer
    coming_back = sum(c.count * c.num_bytes for c in copies if c.links == "from the host" and not c.is_exposed)
    assert coming_back >= (LAYERS - 1) * (of_layer - of_lse)
    assert on_host.fits and any("copies to and from the host" in note for note in on_host.notes)
    enough = math.ceil(1.02 * LAYERS * of_layer / 2**30) + 1
    limit = f"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB={enough} "
    assert [limit in " ".join(plan.notes) for plan in (on_host, on_device)] == [True, False]


@needs_cuda_plugin
@pytest.mark.parametrize("scan_layers", [True, False])
def test_attention_runs_once_in_a_layer_that_keeps_it(scan_layers):
    """XLA's program too: a kernel whose result is kept for the backward pass is not run once more to write it there."""
    base = config(1, tokens_a_device=8192)

    def flops(remat):
        model = dataclasses.replace(base.model, remat=remat, scan_layers=scan_layers)
        plan = plan_of("h100:1", dataclasses.replace(base, model=model))
        return sum(part.flops for part in plan.parts if part.part == "far attention")

    none, full = flops("none"), flops("full")
    assert flops({"attention": "save"}) == flops({"attention": "offload"}) == none
    assert none > 0 and full == pytest.approx(none * 9 / 7)  # of 7 matmuls, two again


def bytes_by_phase(hops):
    found = {}
    for (phase, num_bytes), count in hops.items():
        found[phase] = found.get(phase, 0) + count * num_bytes
    return found


def strategy_config(strategy):
    whole = config(8)
    mixers = whole.model.mixers
    if strategy == "halo":
        mixers = {name: dataclasses.replace(mixer, window=512) for name, mixer in mixers.items()}
    return dataclasses.replace(
        whole,
        model=dataclasses.replace(whole.model, mixers=mixers),
        context_parallel=ContextParallelConfig(strategy=strategy),
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["all_gather", "ulysses", "halo"])
@pytest.mark.parametrize(
    "name", [pytest.param("v5e:2x4", marks=needs_libtpu), pytest.param("h100:8", marks=needs_cuda_plugin)]
)
def test_other_strategies_send_what_they_state(name, strategy):
    run = strategy_config(strategy)
    plan = plan_of(name, run)
    assert plan.source == "compiler" and sent(plan)
    assert bytes_by_phase(sent(plan)) == bytes_by_phase(stated(name, run))
    assert not any("the program sends" in problem for problem in plan.problems)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses", "halo"])
def test_a_formula_counts_what_a_strategy_sends(strategy):
    """Without a compiler: a ring's hops have compute beside them, what others send is waited for."""
    run = strategy_config(strategy)
    plan = make_plan(run, named_target("h100:8", device_table()), by_formula=True, console=Console(file=io.StringIO()))
    assert sent(plan) == stated("h100:8", run)
    hops = [c for c in plan.collectives if c.is_hop]
    assert all(c.exposed < c.seconds if strategy == "ring" else c.exposed == c.seconds for c in hops)
    assert {c.group_size for c in hops} == {2 if strategy in ("ring", "halo") else 8}


def test_a_formula_counts_both_levels_of_usp():
    """Two hosts of four pairs: only keys go from host to host, and they have compute beside them."""
    mixers = {"far": dataclasses.replace(config(8).model.mixers["far"], num_kv_heads=2)}
    whole = config(16, context_outer=8, context_inner=2)
    run = dataclasses.replace(
        whole,
        model=dataclasses.replace(whole.model, mixers=mixers),
        context_parallel=ContextParallelConfig(strategy="usp"),
    )
    target = named_target("h100:16", device_table())
    plan = make_plan(run, target, by_formula=True, console=Console(file=io.StringIO()))
    assert sent(plan) == stated("h100:16", run)
    hops = [c for c in plan.collectives if c.is_hop]
    assert {(c.kind, c.group_size) for c in hops} == {("all-to-all", 2), ("collective-permute", 2)}
    inside, between = ({c.links for c in hops if c.kind == kind} for kind in ("all-to-all", "collective-permute"))
    assert len(inside) == len(between) == 1 and inside != between


def test_a_formula_counts_both_levels_of_a_double_ring():
    """Only what goes from host to host takes the network, beside eight hops."""
    whole = config(16, context_outer=2, context_inner=8)
    run = dataclasses.replace(whole, context_parallel=ContextParallelConfig(strategy="double_ring"))
    target = named_target("h100:16", device_table())
    plan = make_plan(run, target, by_formula=True, console=Console(file=io.StringIO()))
    assert sent(plan) == stated("h100:16", run)
    hops = [c for c in plan.collectives if c.is_hop]
    assert {c.kind for c in hops} == {"collective-permute"}
    forward = {c.links: c for c in hops if c.phase == "forward" and c.part == "far mixer"}
    assert forward["inside a host"].count == 14 * forward["network"].count
    assert forward["network"].overlapped > 7 * forward["inside a host"].overlapped


def ring_with_the_usual_mistakes(self, setting, q, k, v, tokens, schedule, **options):
    """Keys and values travel apart, only after the compute, and once more than needed."""
    size, axes = setting.degree, setting.axes
    ring = [(rank, (rank + 1) % size) for rank in range(size)]

    def hop(state, number):
        k, v, carry = state
        hop_schedule, hop_tokens = schedule.at(number, tokens)
        carry = blockwise_attention_forward(
            q, k, v, tokens=hop_tokens, schedule=hop_schedule, carry=carry, return_carry=True, **options
        )
        k, v, carry = jax.lax.optimization_barrier((k, v, carry))
        return (jax.lax.ppermute(k, axes, ring), jax.lax.ppermute(v, axes, ring), carry), None

    carry = SoftmaxCarry.empty(batch_size=q.shape[0], q_len=q.shape[1], num_heads=q.shape[2], value_dim=v.shape[3])
    (_, _, carry), _ = jax.lax.scan(hop, (k, v, carry), jnp.arange(size))
    out, lse = carry.finalize(q.dtype)
    return out, Residuals(q, k, v, out, lse)


@needs_libtpu
@pytest.mark.slow
def test_a_bad_program_is_reported_as_bad(monkeypatch):
    monkeypatch.setattr(Ring, "forward", ring_with_the_usual_mistakes)
    monkeypatch.setattr(sharding, "PARAMETER_AXES", {name: () for name in sharding.PARAMETER_AXES})
    plan = plan_of("v5e:2x4", config(8))
    problems = "\n".join(plan.problems)
    assert "exposed hops: 64 collective-permutes of far mixer (forward" in problems
    assert "exposed hops: 64 collective-permutes of far mixer (recompute" in problems
    assert "the program sends 32.00 MiB a device in the forward pass, the strategy states 28.00 MiB" in problems
    assert "parameters are replicated" in problems


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_is_said_with_what_would_help():
    plan = plan_of("v5e:2x4", config(8, tokens_a_device=1024 * 1024))
    assert plan.fits is False and plan.memory_total > plan.memory_limit
    assert plan.problems[0].startswith("does not fit")
    assert plan.advice

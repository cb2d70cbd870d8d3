"""Names that XLA for TPUs cut short, completed by what stands around them."""

import types

import jax
import pytest

from train.config import load_config
from train.devices import device_table
from train.planning import analysis, hlo
from train.planning.op_names import part_of, phase_of
from train.planning.program import Program, plan_run
from train.planning.target import local_target
from train.planning.whole_names import with_whole_names

FORWARD = "jit(step)/jvp()/while/body/layer.far/mixer"
AGAIN = "jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/layer.far/mixer"
KERNEL = "context_parallel/blockwise_attention_forward.mosaic_tpu/blockwise_attention_forward/pallas_call"
CUT = f"{KERNEL}/context_parallel/all_to_all"


def line(name, call, op_name=""):
    metadata = f', metadata={{op_name="{op_name}" stack_frame_id=5}}' if op_name else ""
    return f"  %{name} = f32[8]{{0}} {call}{metadata}"


def text(lines, *computations):
    header = ["HloModule m, is_scheduled=true", *computations, "ENTRY %main (p: f32[8]) -> f32[8] {"]
    return "\n".join([*header, line("p", "parameter(0)"), *lines, "}"])


def names(lines, *computations):
    """The names of all instructions, completed."""
    module = with_whole_names(hlo.parse(text(lines, *computations)))
    assert module.entry is module.computations["main"]
    return {i.name: i.op_name for computation in module.computations.values() for i in computation.instructions}


def computation(name, *lines):
    return "\n".join([f"%{name} (x: f32[8]) -> f32[8] {{", line("x", "parameter(0)"), *lines, "}"])


@pytest.mark.parametrize(("mixer", "phase"), [(FORWARD, "forward"), (AGAIN, "recompute")])
def test_an_operand_tells_layer_and_phase(mixer, phase):
    """The nearest one, behind those without names and those whose names are cut themselves."""
    found = names([
        line("other", "negate(%p)", FORWARD.replace("far", "near") + "/neg"),
        line("q", "add(%other, %p)", f"{mixer}/dot_general"),
        line("b", "bitcast(%q)"),
        line("sent", "all-to-all(%b), replica_groups={{0,1}}", CUT),
        line("k", "custom-call(%sent)", KERNEL),
        line("back", "all-to-all(%k), replica_groups={{0,1}}", CUT),
    ])  # fmt: skip
    assert found["sent"] == found["back"] == f"{mixer}/shard_map/context_parallel/all_to_all"
    assert found["k"] == f"{mixer}/shard_map/{KERNEL}"
    assert (part_of(found["back"]), phase_of(found["back"])) == ("far mixer", phase)
    assert (found["b"], found["q"]) == ("", f"{mixer}/dot_general")


def test_a_user_tells_where_no_operand_does():
    """Equal constants of several passes are one, and so tell nothing."""
    found = names([
        line("c", "constant(1)", f"{FORWARD}/mul"),
        line("w", "multiply(%p, %c)", f"{KERNEL}/context_parallel/mul"),
        line("out", "add(%w, %w)", f"{AGAIN}/add"),
    ])  # fmt: skip
    assert found["w"] == f"{AGAIN}/shard_map/context_parallel/mul"


def test_what_is_fused_or_in_a_loop_over_hops_goes_by_its_caller():
    found = names(
        [
            line("q", "negate(%p)", f"{AGAIN}/dot_general"),
            line("f", "fusion(%q), kind=kCustom, calls=%fused"),
            line("hops", "while(%f), condition=%condition, body=%body", KERNEL),
        ],
        computation("fused", line("sent", "all-gather(%x), replica_groups={{0,1}}", CUT)),
        computation("body", line("hop", "collective-permute(%x), source_target_pairs={{0,1},{1,0}}", CUT)),
        computation("condition"),
    )
    assert found["sent"] == found["hop"] == f"{AGAIN}/shard_map/context_parallel/all_to_all"


def test_names_of_which_nothing_tells_stay():
    """Schedules that are built before the loop over layers, and that loop itself, which XLA names after a kernel."""
    found = names(
        [
            line("t", "negate(%p)", "jit(step)/jvp()/shard_map/all_gather"),
            line("schedule", "add(%t, %t)", f"{KERNEL}/context_parallel/gather"),
            line("layers", "while(%schedule), condition=%condition, body=%body", KERNEL),
            line("after", "negate(%layers)", f"{FORWARD}/neg"),
        ],
        computation("body", line("q", "negate(%x)", f"{FORWARD}/neg"), line("k", "custom-call(%q)", KERNEL)),
        computation("condition"),
    )
    assert found["schedule"] == f"{KERNEL}/context_parallel/gather" and found["layers"] == KERNEL
    assert found["k"] == f"{FORWARD}/shard_map/{KERNEL}"


def test_a_plan_counts_by_whole_names():
    quick = [
        "data.sources=[{kind: synthetic, num_symbols: 20, min_length: 20, max_length: 60}]",
        "data.tokenizer=ids:32",
    ]
    config = load_config("configs/cpu_ring8.yaml", quick)
    run = plan_run(config, local_target(jax.devices(), device_table()))
    program_text = text([
        line("q", "negate(%p)", f"{AGAIN}/dot_general"),
        "  ROOT " + line("sent", "all-to-all(%q), replica_groups={{0,1}}, dimensions={0}", CUT).strip(),
    ])  # fmt: skip
    sizes = ("argument", "output", "alias", "temp", "host_temp", "generated_code")
    stats = types.SimpleNamespace(total_allocation_bytes=0, **{f"{size}_size_in_bytes": 64 for size in sizes})
    implementations = dict.fromkeys(("blockwise_attention_forward", "blockwise_attention_backward"), "mosaic_tpu")
    program = Program(text=program_text, stats=stats, seconds=1.0, implementations=implementations, notes=[])
    (hop,) = analysis.analyse(run, program).collectives
    assert (hop.part, hop.phase, hop.is_hop, hop.num_bytes) == ("far mixer", "recompute", True, 16)

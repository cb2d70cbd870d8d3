"""Programs on paper: what runs when, and what is waited for."""

import dataclasses

import numpy as np
import pytest

from train.devices import AttentionSpeed, DeviceSpec
from train.planning import hlo
from train.planning.links import Links, Place
from train.planning.timeline import OpCall, run

# A device that multiplies 1 GFLOP in a second, reads a GB in one, and sends a MB in one.
SPEC = DeviceSpec(
    device_kinds=("x",),
    peak_tflops=1e-3,
    matmul_tflops=1e-3,
    attention={"xla": AttentionSpeed(forward=1e-3, backward=1e-3)},
    memory_gb_per_s=1.0,
    link="switch",
    link_gb_per_s=1e-3,
)
LINKS = Links(SPEC, [Place(0, (i,)) for i in range(4)])
RING = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"


def on_paper(body, *computations, calls=None):
    text = "\n".join(
        ["HloModule m, is_scheduled=true", *computations, "ENTRY %main (p: f32[1]) -> f32[1] {", body, "}"]
    )
    return run(hlo.parse(text), SPEC, LINKS, 4, calls or {})


# 2 x 500 x 500 x 1000 FLOPs take half a second; their bytes take less than 10 ms.
DOT = """
  %a = f32[500,1000]{1,0} parameter(0)
  %b = f32[1000,500]{1,0} parameter(1)
  %dot = f32[500,500]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/jvp(logits)/dot_general"}"""  # noqa: E501


def test_a_matmul_takes_its_flops_and_a_copy_its_bytes():
    timeline = on_paper(DOT + "\n  %c = f32[500,1000]{1,0} copy(%a)")
    assert timeline.flops[("logits", "forward")] == 5e8
    assert timeline.compute[("logits", "forward")] == pytest.approx(0.5)
    assert timeline.compute[("other", "update")] == pytest.approx(2 * 2e6 / 1e9)
    assert timeline.seconds == pytest.approx(0.504)
    assert timeline.exposed == 0


def permute(size, *, between):
    return f"""
  %x = f32[{size}]{{0}} parameter(2)
  %s = (f32[{size}]{{0}}, f32[{size}]{{0}}, u32[], u32[]) collective-permute-start(%x), channel_id=1, {RING}, metadata={{op_name="jit(step)/jvp()/while/body/layer.a/mixer/shard_map/context_parallel/ppermute"}}
{between}
  %d = f32[{size}]{{0}} collective-permute-done(%s)"""  # noqa: E501


def test_compute_between_start_and_done_hides_a_permute():
    (hop,) = on_paper(permute(100_000, between=DOT)).collectives
    assert hop.kind == "collective-permute" and hop.is_hop and hop.asynchronous and not hop.is_exposed
    assert (hop.count, hop.num_bytes, hop.part, hop.phase) == (1, 400_000, "a mixer", "forward")
    assert hop.seconds == pytest.approx(0.4) and hop.overlapped == pytest.approx(0.5) and hop.exposed == 0


def test_what_compute_does_not_cover_is_exposed():
    timeline = on_paper(permute(200_000, between=DOT))
    (hop,) = timeline.collectives
    assert hop.is_exposed and hop.exposed == pytest.approx(0.3)
    assert timeline.seconds == pytest.approx(0.8) and timeline.exposed == pytest.approx(0.3)


def test_compute_before_the_start_hides_nothing():
    (hop,) = on_paper(DOT + permute(100_000, between="")).collectives
    assert hop.exposed == pytest.approx(0.4)


@pytest.mark.parametrize(("seconds", "exposed"), [(0.5, 0.0), (0.3, 0.1)])
def test_a_kernel_hides_what_it_sends_itself(seconds, exposed):
    """400 KB take 0.4 s, from the kernel's start; it says so on lines of its own."""
    kernel = """
  %x = f32[100000]{0} parameter(0)
  %k_sending = (f32[100000]{0}, f32[100000]{0}) custom-call(%x, %x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"mesh_axes":"[\\"c\\"]",
"sends":"{\\"bytes\\": 400000, \\"mesh\\": {\\"d\\": 2, \\"c\\": 2}, \\"axes\\": [\\"c\\"], \\"stride\\": 1}"
}}, metadata={op_name="jit(step)/jvp()/layer.a/mixer/blockwise_attention_forward.mosaic_tpu/k_sending"}"""  # noqa: E501
    timeline = on_paper(kernel, calls={("a", "forward"): OpCall(seconds=np.array([seconds]), flops=np.array([1.0]))})
    (hop,) = timeline.collectives
    assert (hop.kind, hop.is_hop, hop.num_bytes, hop.part) == ("remote-dma", True, 400_000, "a mixer")
    assert hop.seconds == pytest.approx(0.4) and hop.overlapped == pytest.approx(seconds)
    assert hop.exposed == pytest.approx(exposed) and timeline.seconds == pytest.approx(seconds + exposed)


def test_collectives_in_flight_at_once_share_the_links():
    second = permute(100_000, between=DOT).replace("%x", "%y").replace("%s", "%t").replace("%d ", "%e ")
    timeline = on_paper(permute(100_000, between=second.replace("parameter(2)", "parameter(3)")))
    # The inner one waits for the outer: done at 0.8 s, of which 0.5 s are covered.
    assert timeline.seconds == pytest.approx(0.8)


def test_a_synchronous_collective_is_exposed_as_a_whole():
    reduce = """
  %x = f32[100000]{0} parameter(2)
  %r = f32[100000]{0} all-reduce(%x), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%sum"""
    (collective,) = on_paper(reduce).collectives
    assert not collective.asynchronous and collective.is_exposed and not collective.is_hop
    assert collective.num_bytes == 2 * 400_000 * 3 // 4  # a scatter and a gather


@pytest.mark.parametrize(
    ("instruction", "num_bytes"),
    [
        ("%r = f32[400]{0} all-gather(%x)", 1200),
        ("%r = f32[25]{0} reduce-scatter(%x)", 300),
        ("%r = f32[100]{0} all-to-all(%x)", 300),
    ],
)
def test_bytes_that_a_device_sends(instruction, num_bytes):
    groups = "channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}"
    (collective,) = on_paper(f"  %x = f32[100]{{0}} parameter(0)\n  {instruction}, {groups}").collectives
    assert collective.num_bytes == num_bytes and collective.group_size == 4


BACKWARD = "jit(step)/transpose(jvp())/while/body/checkpoint"
HOP = "layer.a/mixer/shard_map/context_parallel/ppermute"


def combined(names, start="-start"):
    """Arrays of 100 and 300 KB that travel as one."""
    pair = "f32[25000]{0}, f32[75000]{0}"
    arrays = f"(({pair}), ({pair}))" if start else f"({pair})"
    permute = f'collective-permute{start}(%x, %y), channel_id=1, {RING}, metadata={{op_name="{names}"}}'
    return f"""
  %x = f32[25000]{{0}} parameter(2)
  %y = f32[75000]{{0}} parameter(3)
  %s = {arrays} {permute}
{DOT if start else ""}
{f"  %d = ({pair}) collective-permute-done(%s)" if start else ""}"""


@pytest.mark.parametrize("start", ["-start", ""])
def test_what_is_combined_counts_in_the_phase_of_each_array(start):
    """As XLA for GPUs combines what the recomputation and the backward pass send; the time is that of the one."""
    timeline = on_paper(combined(f"{BACKWARD}/({HOP}:rematted_computation/{HOP})", start))
    hops = {c.phase: c for c in timeline.collectives}
    assert {phase: c.num_bytes for phase, c in hops.items()} == {"backward": 100_000, "recompute": 300_000}
    assert all(c.is_hop and c.part == "a mixer" and c.count == 1 for c in hops.values())
    assert [hops[phase].seconds for phase in ("backward", "recompute")] == pytest.approx([0.1, 0.3])
    assert all(c.overlapped == pytest.approx(0.5 if start else 0.0) for c in hops.values())
    assert timeline.exposed == pytest.approx(0.0 if start else 0.4)
    assert timeline.seconds == pytest.approx(0.5 if start else 0.4)


def test_hops_that_are_combined_with_parameters():
    """Their names XLA may have made up, so that only all names together tell."""
    names = f"(reshape.1:{BACKWARD}/rematted_computation/{HOP})"
    rest, hop = on_paper(combined(names)).collectives
    assert (rest.is_hop, rest.num_bytes, rest.phase, rest.part) == (False, 100_000, "recompute", "a mixer")
    assert (hop.is_hop, hop.num_bytes, hop.phase, hop.part) == (True, 300_000, "recompute", "a mixer")


def test_what_is_combined_stays_whole_where_names_do_not_tell_arrays_apart():
    three = f"{BACKWARD}/({HOP}:{HOP}:rematted_computation/{HOP})"
    for names in (three, f"{BACKWARD}/{HOP}", f"{BACKWARD}/({HOP}:{HOP})"):
        (hop,) = on_paper(combined(names)).collectives
        assert hop.num_bytes == 400_000 and hop.seconds == pytest.approx(0.4)


LOOP = (
    "%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {\n"
    "  %s = (s32[], f32[8]) parameter(0)\n  %i = s32[] get-tuple-element(%s), index=0\n"
    "  %v = f32[8]{0} get-tuple-element(%s), index=1\n  %one = s32[] constant(1)\n"
    f"{DOT}\n  %next = s32[] add(%i, %one)\n  ROOT %t = (s32[], f32[8]) tuple(%next, %v)\n}}",
    "%condition (s: (s32[], f32[8])) -> pred[] {\n  %s = (s32[], f32[8]) parameter(0)\n"
    "  %i = s32[] get-tuple-element(%s), index=0\n  %n = s32[] constant(6)\n"
    "  ROOT %lt = pred[] compare(%i, %n), direction=LT\n}",
)


def loop(start="constant(0)", op_name=""):
    return (
        f"  %zero = s32[] {start}\n  %v = f32[8]{{0}} parameter(1)\n  %init = (s32[], f32[8]) tuple(%zero, %v)\n"
        "  %loop = (s32[], f32[8]) while(%init), condition=%condition, body=%body, "
        f'metadata={{op_name="{op_name}"}}'
    )


def test_a_loop_counts_as_often_as_it_runs():
    timeline = on_paper(loop(), *LOOP)
    assert timeline.seconds == pytest.approx(6 * 0.5) and timeline.flops[("logits", "forward")] == 6 * 5e8


def test_a_loop_of_unknown_length_counts_once_and_is_noted():
    timeline = on_paper(loop(start="parameter(2)", op_name="jit(step)/somewhere/while"), *LOOP)
    assert timeline.seconds == pytest.approx(0.5)
    assert timeline.notes == ("a loop of unknown length counts once: somewhere",)


SCOPE = "jit(step)/jvp()/while/body/layer.a/mixer/context_parallel/blockwise_attention_forward.xla/while"


def test_a_call_of_an_attention_op_costs_what_the_caller_says_hop_by_hop():
    calls = {("a", "forward"): OpCall(seconds=np.array([1.0, 0.0]), flops=np.array([4.0, 2.0]))}
    timeline = on_paper(permute(200_000, between=loop(start="parameter(3)", op_name=SCOPE)), *LOOP, calls=calls)
    assert timeline.compute[("a attention", "forward")] == 0.5 and timeline.flops[("a attention", "forward")] == 3.0
    # The hop with work hides the permute of 0.8 s, the one without does not.
    (hop,) = timeline.collectives
    assert hop.exposed == pytest.approx(0.4) and timeline.seconds == pytest.approx((1.0 + 0.8) / 2)


def test_rings_of_other_numbers_of_hops_meet_in_their_means():
    """As where a window leaves one kind of layers fewer hops than another."""
    calls = {
        ("a", "forward"): OpCall(seconds=np.array([1.0, 0.0]), flops=np.array([4.0, 2.0])),
        ("b", "forward"): OpCall(seconds=np.array([0.0, 0.3, 0.6]), flops=np.array([1.0, 2.0, 3.0])),
    }
    first = loop(start="parameter(3)", op_name=SCOPE)
    second = loop(start="parameter(4)", op_name=SCOPE.replace("layer.a", "layer.b"))
    for name in ("zero", "v", "init", "loop"):
        second = second.replace(f"%{name}", f"%{name}.2")
    timeline = on_paper(permute(200_000, between=f"{first}\n{second}"), *LOOP, calls=calls)
    assert timeline.compute == {("a attention", "forward"): 0.5, ("b attention", "forward"): pytest.approx(0.3)}
    (hop,) = timeline.collectives
    assert hop.exposed == pytest.approx(0.0) and timeline.seconds == pytest.approx(0.8)


def test_an_attention_op_of_unknown_cost_is_noted():
    timeline = on_paper(loop(start="parameter(3)", op_name=SCOPE), *LOOP)
    assert timeline.seconds == 0 and "unknown cost" in timeline.notes[0]


@pytest.mark.parametrize(("kernel", "share"), [("forward", 1.0), ("backward_dq", 3 / 7), ("backward_dkdv", 4 / 7)])
def test_a_loop_that_is_named_after_a_kernel_in_it_is_no_call(kernel, share):
    """As XLA names a ring over hops; each kernel of the backward pass costs its part."""
    phase = kernel.partition("_")[0]
    scope = f"{SCOPE.partition('blockwise')[0]}blockwise_attention_{phase}.mosaic_tpu/blockwise_attention_{kernel}"
    call = f'  %dot = f32[8]{{0}} custom-call(%v), custom_call_target="tpu_custom_call", metadata={{op_name="{scope}"}}'
    calls = {("a", phase): OpCall(seconds=np.array([1.0]), flops=np.array([7.0]))}
    timeline = on_paper(loop(op_name=scope), LOOP[0].replace(DOT, call), LOOP[1], calls=calls)
    assert timeline.seconds == pytest.approx(6 * share)
    assert sum(timeline.flops.values()) == pytest.approx(6 * 7 * share)


def test_a_kernel_that_is_fused_with_slices_is_found():
    """As XLA does on GPUs with one that writes into the activations of all layers."""
    fused = f"""%fused (x: f32[1]) -> f32[1] {{
  %x = f32[1]{{0}} parameter(0)
  ROOT %kernel = f32[1]{{0}} custom-call(%x), custom_call_target="mosaic_gpu_v2", metadata={{op_name="{SCOPE}"}}
}}"""
    calls = {("a", "forward"): OpCall(seconds=np.array([1.0]), flops=np.array([4.0]))}
    body = "  %p = f32[1]{0} parameter(0)\n  ROOT %f = f32[1]{0} fusion(%p), kind=kCustom, calls=%fused"
    timeline = on_paper(body, fused, calls=calls)
    assert timeline.compute[("a attention", "forward")] == 1.0 and timeline.flops[("a attention", "forward")] == 4.0


@pytest.mark.parametrize(
    ("op", "phase", "num_kernels", "seconds"),
    [
        ("forward", "forward", 1, 2.0),
        ("states", "forward", 1, 1.0),
        ("backward", "backward", 3, 6.0),
        ("state_cotangents", "backward", 1, 1.0),
    ],
)
def test_linear_attention_counts_each_time_it_reads_the_row(op, phase, num_kernels, seconds):
    """The backward pass in three sweeps costs one backward pass, and maps of runs half a forward sweep."""
    transform = "jvp()" if phase == "forward" else "transpose(jvp())"
    scope = f"jit(step)/{transform}/layer.a/mixer/shard_map/context_parallel/linear_attention_{op}.mosaic_tpu/sweep"
    calls = {
        ("a", "forward"): OpCall(seconds=np.array([2.0]), flops=np.array([8.0])),
        ("a", "backward"): OpCall(seconds=np.array([6.0]), flops=np.array([24.0])),
    }
    kernels = "\n".join(
        f"  %kernel.{i} = f32[1]{{0}} custom-call(%p), "
        f'custom_call_target="tpu_custom_call", metadata={{op_name="{scope}"}}'
        for i in range(num_kernels)
    )
    timeline = on_paper(f"  %p = f32[1]{{0}} parameter(0)\n{kernels}", calls=calls)
    assert timeline.compute == {("a attention", phase): pytest.approx(seconds)}
    assert timeline.flops == {("a attention", phase): pytest.approx(4 * seconds)} and not timeline.notes


HOST_READ = """
  %stack = f32[6,100000]{1,0:S(5)} parameter(2)
  %i = s32[] parameter(3)
  %s = ((f32[6,100000]{1,0:S(5)}, s32[], s32[]), f32[1,100000]{1,0}, u32[]) fusion-start(%stack, %i, %i), kind=kLoop, calls=%slice
BETWEEN
  %d = f32[1,100000]{1,0} fusion-done(%s)"""  # noqa: E501
HOST_WRITE = """
  %stack2 = f32[6,100000]{1,0:S(5)} parameter(4)
  %x = f32[1,100000]{1,0} parameter(5)
  %j = s32[] parameter(6)
  %t = ((f32[6,100000]{1,0:S(5)}, f32[1,100000]{1,0}, s32[], s32[]), f32[6,100000]{1,0:S(5)}, u32[]) fusion-start(%stack2, %x, %j, %j), kind=kLoop, calls=%update, metadata={op_name="jit(step)/jvp()/while/body/dynamic_update_slice"}
BETWEEN
  %e = f32[6,100000]{1,0:S(5)} fusion-done(%t)"""  # noqa: E501
SLICES = """
%slice (p: f32[6,100000], i: s32[], j: s32[]) -> f32[1,100000] {
  %p = f32[6,100000]{1,0:S(5)} parameter(0)
  %i = s32[] parameter(1)
  %j = s32[] parameter(2)
  ROOT %r = f32[1,100000]{1,0} dynamic-slice(%p, %i, %j), dynamic_slice_sizes={1,100000}
}
%update (p: f32[6,100000], x: f32[1,100000], i: s32[], j: s32[]) -> f32[6,100000] {
  %p = f32[6,100000]{1,0:S(5)} parameter(0)
  %x = f32[1,100000]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %j = s32[] parameter(3)
  ROOT %r = f32[6,100000]{1,0:S(5)} dynamic-update-slice(%p, %x, %i, %j)
}"""


def with_host(body, gb_per_s=1e-3):
    spec = dataclasses.replace(SPEC, host_gb_per_s=gb_per_s)
    text = "\n".join(["HloModule m, is_scheduled=true", SLICES, "ENTRY %main (p: f32[1]) -> f32[1] {", body, "}"])
    return run(hlo.parse(text), spec, LINKS, 4, {})


def test_compute_hides_a_copy_from_the_host():
    """Of the stack one slice travels: 400 KB at 1 MB a second."""
    (copy,) = with_host(HOST_READ.replace("BETWEEN", DOT)).collectives
    assert (copy.kind, copy.num_bytes, copy.links, copy.phase) == ("host-copy", 400_000, "from the host", "backward")
    assert copy.seconds == pytest.approx(0.4) and copy.exposed == 0 and not copy.is_hop
    timeline = with_host(HOST_READ.replace("BETWEEN", ""))
    assert timeline.exposed == timeline.seconds == pytest.approx(0.4)


def test_copies_to_and_from_the_host_do_not_wait_for_each_other():
    both = HOST_READ.replace("BETWEEN", HOST_WRITE.replace("BETWEEN", DOT))
    read, write = sorted(with_host(both).collectives, key=lambda c: c.links)
    assert (read.links, write.links) == ("from the host", "to the host")
    assert write.num_bytes == 400_000 and write.phase == "forward" and read.exposed == write.exposed == 0
    second = HOST_READ.replace("%stack", "%other").replace("%s ", "%u ").replace("(%s)", "(%u)").replace("%d ", "%f ")
    one_way = HOST_READ.replace("BETWEEN", second.replace("%i", "%k").replace("BETWEEN", DOT))
    assert with_host(one_way).seconds == pytest.approx(0.8)  # one after the other, of which 0.5 s are covered


def test_a_host_of_unknown_speed_is_noted():
    timeline = with_host(HOST_READ.replace("BETWEEN", ""), gb_per_s=None)
    assert timeline.seconds == 0 and "no host_gb_per_s" in timeline.notes[0]

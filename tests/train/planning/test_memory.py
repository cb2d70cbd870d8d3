"""Programs of a few instructions. An f32[256] takes 1 KiB, and K is a KiB."""

from types import SimpleNamespace

import pytest

from train.planning import hlo
from train.planning.memory import Buffer, Peak, memory_by_class, peak
from train.planning.op_names import readable

K = 1024
FORWARD = "jit(step)/jvp()/while/body"
BACKWARD = "jit(step)/transpose(jvp())/while/body/checkpoint"


def parse(entry, computations="", header=""):
    """A module of these instructions, with an f32[256] %a for its argument."""
    return hlo.parse(
        f"HloModule test, is_scheduled=true{header}\n\n{computations}\n\n"
        f"ENTRY %main (a: f32[256]) -> f32[256] {{\n  %a = f32[256]{{0}} parameter(0)\n{entry}\n}}\n"
    )


def kib(module):
    return peak(module).num_bytes / K


def only(module, **kwargs):
    (buffer,) = peak(module, **kwargs).buffers
    return buffer


def test_live_ranges():
    found = peak(
        parse("""
  %b = f32[512]{0} broadcast(%a), dimensions={0}
  %c = f32[1024]{0} concatenate(%b, %b), dimensions={0}, metadata={op_name="jit(f)/mlp/concatenate"}
  %d = f32[256]{0} slice(%c), slice={[0:256]}
  ROOT %e = f32[256]{0} add(%d, %a)""")
    )
    # b dies with c, d and e live when c is dead.
    assert (found.num_bytes, found.at) == (6 * K, "mlp concatenate")
    assert [(buffer.shape, buffer.num_bytes) for buffer in found.buffers] == [("f32[1024]", 4 * K), ("f32[512]", 2 * K)]


def test_what_is_returned_lives_to_the_end():
    module = parse("""
  %b = f32[256]{0} negate(%a)
  %c = f32[256]{0} negate(%a)
  %d = f32[256]{0} negate(%c)
  ROOT %t = (f32[256]{0}, f32[256]{0}) tuple(%b, %d)""")
    assert kib(module) == 3


def test_constants_iota_and_scalars_count_nothing():
    module = parse("""
  %b = f32[512]{0} constant({...})
  %c = s32[512]{0} iota(), iota_dimension=0
  %d = f32[] reduce(%a, %a), dimensions={0}, to_apply=%add
  ROOT %e = f32[256]{0} negate(%a)""")
    assert kib(module) == 1


def test_donated_arguments_hold_the_outputs():
    entry = """
  %b = f32[256]{0} negate(%a)
  %c = f32[256]{0} add(%b, %a)
  ROOT %t = (f32[256]{0}) tuple(%c)"""
    assert kib(parse(entry)) == 2
    assert kib(parse(entry, header=", input_output_alias={ {0}: (0, {}, may-alias) }")) == 1


@pytest.mark.parametrize(
    "renamed",
    [
        "%r = f32[128,2]{1,0} bitcast(%b)",
        "%r = f32[256]{0} opt-barrier(%b)",
        "%t = (f32[512]{0}, f32[256]{0}) tuple(%c, %b)\n  %r = f32[256]{0} get-tuple-element(%t), index=1",
    ],
    ids=["bitcast", "opt-barrier", "tuple"],
)
def test_renaming_takes_no_memory_and_extends_life(renamed):
    module = parse(f"""
  %b = f32[256]{{0}} negate(%a)
  %c = f32[512]{{0}} concatenate(%a, %a), dimensions={{0}}
  {renamed}
  %d = f32[256]{{0}} slice(%c), slice={{[0:256]}}
  %e = f32[1024]{{0}} concatenate(%d, %d, %d, %d), dimensions={{0}}
  ROOT %f = f32[256]{{0}} custom-call(%e, %r), custom_call_target="f\"""")
    # b, d and e: c is dead though the tuple holds it too.
    assert kib(module) == 1 + 1 + 4


def test_an_element_of_a_nested_tuple():
    module = parse("""
  %b = f32[256]{0} negate(%a)
  %c = f32[512]{0} concatenate(%a, %a), dimensions={0}
  %d = f32[1024]{0} concatenate(%c, %c), dimensions={0}
  %t = (f32[512]{0}, f32[256]{0}) tuple(%c, %b)
  %u = ((f32[512]{0}, f32[256]{0}), f32[1024]{0}) tuple(%t, %d)
  %e = f32[2048]{0} broadcast(%a), dimensions={0}
  %v = (f32[512]{0}, f32[256]{0}) get-tuple-element(%u), index=0
  %w = f32[1024]{0} get-tuple-element(%u), index=1
  %x = f32[256]{0} get-tuple-element(%v), index=1
  ROOT %f = f32[256]{0} custom-call(%e, %w, %x), custom_call_target="f\"""")
    # b, d, e and f: nothing reads c any more.
    assert kib(module) == 1 + 4 + 8 + 1


def test_a_slice_is_updated_in_place():
    module = parse("""
  %b = f32[1024]{0} concatenate(%a, %a, %a, %a), dimensions={0}
  %zero = s32[] constant(0)
  %c = f32[1024]{0} dynamic-update-slice(%b, %a, %zero)
  ROOT %d = f32[256]{0} slice(%c), slice={[0:256]}""")
    assert kib(module) == 4 + 1


UPDATE = """
%update (p: f32[1024], q: f32[256]) -> (f32[256], f32[4,256]) {
  %p = f32[1024]{0} parameter(0)
  %q = f32[256]{0} parameter(1)
  %zero = s32[] constant(0)
  %n = f32[256]{0} negate(%q), metadata={op_name="jit(step)/mlp/negate"}
  %u = f32[1024]{0} dynamic-update-slice(%p, %n, %zero)
  %v = f32[4,256]{1,0} bitcast(%u)
  ROOT %r = (f32[256]{0}, f32[4,256]{1,0}) tuple(%n, %v)
}"""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_fusion_updates_a_slice_in_place(asynchronous):
    call = "%f = (f32[256]{0}, f32[4,256]{1,0}) fusion(%b, %a), kind=kLoop, calls=%update"
    if asynchronous:
        call = """
  %s = ((f32[1024]{0}, f32[256]{0}), (f32[256]{0}, f32[4,256]{1,0}), u32[]) fusion-start(%b, %a), calls=%update
  %f = (f32[256]{0}, f32[4,256]{1,0}) fusion-done(%s)"""
    module = parse(
        f"""
  %b = f32[1024]{{0}} broadcast(%a), dimensions={{0}}
  {call}
  %g = f32[4,256]{{1,0}} get-tuple-element(%f), index=1
  ROOT %d = f32[256]{{0}} slice(%g), slice={{[0:256]}}""",
        UPDATE,
    )
    assert kib(module) == 4 + 1


def test_a_declared_alias():
    call = '%c = (f32[1024]{0}, f32[256]{0}) custom-call(%a, %b), custom_call_target="f"'
    entry = """
  %b = f32[1024]{{0}} broadcast(%a), dimensions={{0}}
  {call}
  ROOT %d = f32[256]{{0}} get-tuple-element(%c), index=1"""
    assert kib(parse(entry.format(call=call))) == 4 + 4 + 1
    assert kib(parse(entry.format(call=call + ", output_to_operand_aliasing={{0}: (1, {})}"))) == 4 + 1


def test_what_starts_keeps_its_operands_until_it_is_done():
    entry = """
  %b = f32[256]{{0}} negate(%a)
  {start}
  %c = f32[1024]{{0}} broadcast(%a), dimensions={{0}}
  %d = f32[256]{{0}} slice(%c), slice={{[0:256]}}
  %e = f32[256]{{0}} {done}
  ROOT %f = f32[256]{{0}} add(%d, %e)"""
    permute = "%s = (f32[256]{0}, f32[256]{0}, u32[], u32[]) collective-permute-start(%b), source_target_pairs={{0,1}}"
    reduce = "%s = f32[256]{0} all-reduce-start(%b), to_apply=%add"
    copy = "%s = (f32[256]{0}, f32[256]{0}, u32[]) copy-start(%b)"
    for start, done in (
        (permute, "collective-permute-done(%s)"),
        (reduce, "all-reduce-done(%s)"),
        (copy, "copy-done(%s)"),
    ):
        # Operand and result of what runs meanwhile, and the larger of its own arrays with the smaller.
        assert kib(parse(entry.format(start=start, done=done))) == 2 + 4 + 1


def loop(body, *, op_name=""):
    """A loop over (counter, f32[256], f32[256]) with this body, which computes %x from %p1 and %p2."""
    state = "(s32[], f32[256]{0}, f32[256]{0})"
    return f"""
%condition (s: {state}) -> pred[] {{
  %s = {state} parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(4)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

%body (s: {state}) -> {state} {{
  %s = {state} parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %p1 = f32[256]{{0}} get-tuple-element(%s), index=1
  %p2 = f32[256]{{0}} get-tuple-element(%s), index=2
{body}
  ROOT %t = {state} tuple(%i, %x, %p2)
}}"""


LOOPING = """
  %zero = s32[] constant(0)
  %b = f32[256]{0} negate(%a)
  %t = (s32[], f32[256]{0}, f32[256]{0}) tuple(%zero, %b, %a)
  %w = (s32[], f32[256]{0}, f32[256]{0}) while(%t), condition=%condition, body=%body
  ROOT %d = f32[256]{0} get-tuple-element(%w), index=1"""


def test_a_loop_changes_its_state_in_place():
    # b alone: the loop's new value lies there too.
    assert kib(parse(LOOPING, loop("  %x = f32[256]{0} add(%p1, %p2)"))) == 1


def test_a_loop_computes_beside_its_state_while_the_old_value_is_read():
    body = """
  %x = f32[256]{0} negate(%p2)
  %y = f32[256]{0} add(%p1, %x)
  %z = f32[] reduce(%y, %y), dimensions={0}, to_apply=%add"""
    # b; x, whose old value y still reads; y.
    assert kib(parse(LOOPING, loop(body))) == 3


def test_what_a_loop_needs_adds_to_what_is_live_outside():
    body = """
  %y = f32[1024]{0} broadcast(%p2), dimensions={0}, metadata={op_name="jit(step)/while/body/mlp/broadcast_in_dim"}
  %x = f32[256]{0} custom-call(%y, %p1), custom_call_target="f\""""
    found = peak(parse(LOOPING, loop(body)))
    assert (found.num_bytes, found.at) == (5 * K, "mlp broadcast_in_dim")


BRANCHES = """
%first (p: (f32[256], f32[256])) -> (f32[256], f32[256]) {{
  %p = (f32[256]{{0}}, f32[256]{{0}}) parameter(0)
  %x = f32[256]{{0}} get-tuple-element(%p), index=0
  %y = f32[256]{{0}} get-tuple-element(%p), index=1
  %big = f32[1024]{{0}} broadcast(%x), dimensions={{0}}
  %new = f32[256]{{0}} slice(%big), slice={{[0:256]}}
  ROOT %t = (f32[256]{{0}}, f32[256]{{0}}) tuple(%new, %{returned})
}}

%second (q: f32[256]) -> (f32[256], f32[256]) {{
  %q = f32[256]{{0}} parameter(0)
  %m = f32[256]{{0}} negate(%q)
  %n = f32[256]{{0}} negate(%q)
  ROOT %u = (f32[256]{{0}}, f32[256]{{0}}) tuple(%m, %n)
}}"""

CHOOSING = """
  %b = f32[256]{0} negate(%a)
  %t = (f32[256]{0}, f32[256]{0}) tuple(%a, %b)
  %k = s32[] constant(0)
  %c = (f32[256]{0}, f32[256]{0}) conditional(%k, %t, %a), branch_computations={%first, %second}
  %x = f32[256]{0} get-tuple-element(%c), index=0
  %y = f32[256]{0} get-tuple-element(%c), index=1
  %z = f32[1280]{0} concatenate(%x, %y, %a, %a, %a), dimensions={0}
  ROOT %d = f32[256]{0} slice(%z), slice={[0:256]}"""


def test_the_results_of_a_conditional_are_new():
    # The two results and z. In the first branch there are b, big and a result, and b is dead behind it.
    assert kib(parse(CHOOSING, BRANCHES.format(returned="new"))) == 2 + 5


def test_what_a_branch_hands_through_is_the_conditionals_result():
    branches = """
%first (p: (f32[256], f32[4096])) -> (f32[256], f32[4096]) {
  %p = (f32[256]{0}, f32[4096]{0}) parameter(0)
  %x = f32[256]{0} get-tuple-element(%p), index=0
  %y = f32[4096]{0} get-tuple-element(%p), index=1
  %new = f32[256]{0} negate(%x)
  ROOT %t = (f32[256]{0}, f32[4096]{0}) tuple(%new, %y)
}

%second (q: f32[256]) -> (f32[256], f32[4096]) {
  %q = f32[256]{0} parameter(0)
  %m = f32[256]{0} negate(%q)
  %n = f32[4096]{0} broadcast(%q), dimensions={0}
  ROOT %u = (f32[256]{0}, f32[4096]{0}) tuple(%m, %n)
}"""
    module = parse(
        """
  %b = f32[4096]{0} broadcast(%a), dimensions={0}
  %t = (f32[256]{0}, f32[4096]{0}) tuple(%a, %b)
  %k = pred[] constant(true)
  %c = (f32[256]{0}, f32[4096]{0}) conditional(%k, %t, %a), true_computation=%first, false_computation=%second
  %x = f32[256]{0} get-tuple-element(%c), index=0
  %y = f32[4096]{0} get-tuple-element(%c), index=1
  ROOT %d = f32[256]{0} custom-call(%x, %y), custom_call_target="f\"""",
        branches,
    )
    # b, where the second branch computes n; x and d.
    assert kib(module) == 16 + 1 + 1


def test_the_larger_branch_counts():
    # b, big and the result.
    assert kib(parse(CHOOSING, BRANCHES.format(returned="new").replace("1024", "4096"))) == 1 + 16 + 1


def test_a_call():
    called = """
%callee (p: f32[256], q: f32[256]) -> (f32[256], f32[256]) {
  %p = f32[256]{0} parameter(0)
  %q = f32[256]{0} parameter(1)
  %big = f32[1024]{0} broadcast(%p), dimensions={0}
  %new = f32[256]{0} slice(%big), slice={[0:256]}
  ROOT %t = (f32[256]{0}, f32[256]{0}) tuple(%q, %new)
}"""
    module = parse(
        """
  %b = f32[256]{0} negate(%a)
  %c = (f32[256]{0}, f32[256]{0}) call(%a, %b), to_apply=%callee
  %x = f32[256]{0} get-tuple-element(%c), index=0
  ROOT %d = f32[256]{0} negate(%x)""",
        called,
    )
    assert kib(module) == 1 + 4 + 1


def test_only_main_memory_counts():
    module = parse("""
  %b = f32[1024]{0:T(1024)S(1)} broadcast(%a), dimensions={0}
  %c = f32[1024]{0:T(1024)S(5)} broadcast(%a), dimensions={0}
  ROOT %d = f32[256]{0} custom-call(%b, %c), custom_call_target="f\"""")
    assert kib(module) == 1


def test_a_copy_out_of_vector_memory_counts_where_it_lands():
    module = parse("""
  %b = f32[1024]{0:T(1024)S(1)} broadcast(%a), dimensions={0}
  %s = (f32[1024]{0:T(1024)}, f32[1024]{0:T(1024)S(1)}, u32[]{:S(2)}) copy-start(%b)
  %c = f32[1024]{0:T(1024)} copy-done(%s)
  ROOT %d = f32[256]{0} slice(%c), slice={[0:256]}""")
    assert kib(module) == 4 + 1


def test_padding_to_tiles_counts():
    module = parse("""
  %b = f32[3,130]{1,0:T(8,128)} broadcast(%a), dimensions={0}
  ROOT %d = f32[256]{0} slice(%b), slice={[0:256]}""")
    assert peak(module).buffers[0] == Buffer(
        name="broadcast", shape="f32[3,130]", num_bytes=8 * 256 * 4, kind="temporaries"
    )


@pytest.mark.parametrize(
    ("instructions", "name"),
    [
        (
            '%r = f32[512]{0} all-gather(%a), dimensions={0}, metadata={op_name="jit(step)/jvp(logits)/convert"}',
            "logits convert all-gather",
        ),
        (
            "%s = (f32[256]{0}, f32[512]{0}, u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}, "
            'metadata={op_name="jit(step)/layer.local/mixer/shard_map/context_parallel/ppermute"}\n'
            "  %r = f32[512]{0} collective-permute-done(%s)",
            "layer.local mixer context_parallel ppermute",
        ),
        (
            "%f = f32[512]{0:S(1)} fusion(%a), kind=kCustom, calls=%gather\n  %r = f32[512]{0} copy(%f)",
            "layer.local mlp dot_general all-gather",
        ),
    ],
    ids=["all-gather", "start and done", "copy of a fusion's"],
)
def test_communication(instructions, name):
    fusion = """
%gather (p: f32[256]) -> f32[512] {
  %p = f32[256]{0} parameter(0)
  ROOT %g = f32[512]{0} all-gather(%p), dimensions={0}, metadata={op_name="jit(step)/layer.local/mlp/dot_general"}
}"""
    module = parse(f"  {instructions}\n  ROOT %d = f32[] reduce(%r, %r), dimensions={{0}}, to_apply=%add", fusion)
    # Also of a parameter's shape.
    assert only(module, parameter_shapes={(512,)}) == Buffer(
        name=name, shape="f32[512]", num_bytes=2 * K, kind="communication"
    )


def test_what_a_loop_receives_is_communication():
    body = f"""
  %hop = (f32[256]{{0}}, f32[256]{{0}}, u32[]) collective-permute-start(%p1), metadata={{op_name="{FORWARD}/ppermute"}}
  %r = f32[256]{{0}} collective-permute-done(%hop)
  %x = f32[256]{{0}} copy(%r)"""
    found = peak(parse(LOOPING, loop(body)))
    # The state, and where its next value lands.
    assert [(buffer.name, buffer.kind) for buffer in found.buffers] == [("ppermute", "communication")] * 2


@pytest.mark.parametrize(
    ("op_name", "kind"),
    [
        (f"{BACKWARD}/layer.local/mlp/dot_general", "gradients"),
        ("jit(step)/optimizer/mul", "gradients"),
        (f"{FORWARD}/layer.local/mlp/dot_general", "temporaries"),
    ],
)
def test_gradients(op_name, kind):
    module = parse(f"""
  %g = f32[2,64]{{1,0}} custom-call(%a), custom_call_target="f", metadata={{op_name="{op_name}"}}
  ROOT %d = f32[] reduce(%g, %g), dimensions={{0}}, to_apply=%add""")
    assert only(module, parameter_shapes={(2, 64)}).kind == kind
    assert only(module).kind == "temporaries"


def test_a_copy_of_a_parameter_is_no_gradient():
    text = """
  %b = f32[512]{0} parameter(1), metadata={op_name="state.params[\\'mlp\\'][\\'up\\']"}
  %c = f32[512]{0} copy(%b)
  ROOT %d = f32[] reduce(%c, %c), dimensions={0}, to_apply=%add"""
    found = only(parse(text), parameter_shapes={(512,)})
    assert (found.name, found.kind) == ("copy of state.params.mlp.up", "temporaries")


@pytest.mark.parametrize(
    ("used_by", "kind"), [(f"{BACKWARD}/mlp/mul", "activations"), (f"{FORWARD}/mlp/mul", "temporaries")]
)
def test_activations(used_by, kind):
    module = parse(f"""
  %b = f32[512]{{0}} broadcast(%a), dimensions={{0}}, metadata={{op_name="{FORWARD}/layer.local/mlp/dot_general"}}
  %c = f32[512]{{0:S(1)}} copy(%b)
  ROOT %d = f32[] reduce(%c, %c), dimensions={{0}}, to_apply=%add, metadata={{op_name="{used_by}"}}""")
    assert only(module) == Buffer(name="layer.local mlp dot_general", shape="f32[512]", num_bytes=2 * K, kind=kind)


def test_what_is_recomputed_is_temporary():
    module = parse(f"""
  %b = f32[512]{{0}} broadcast(%a), dimensions={{0}}, metadata={{op_name="{BACKWARD}/rematted_computation/mlp/mul"}}
  ROOT %d = f32[] reduce(%b, %b), dimensions={{0}}, to_apply=%add, metadata={{op_name="{BACKWARD}/mlp/mul"}}""")
    assert only(module) == Buffer(name="recomputed mlp mul", shape="f32[512]", num_bytes=2 * K, kind="temporaries")


def test_what_layers_hand_on_are_activations():
    body = f"""
  %x = f32[256]{{0}} add(%p1, %p2), metadata={{op_name="{FORWARD}/layer.local/mlp/add"}}"""
    assert only(parse(LOOPING, loop(body))) == Buffer(
        name="layer.local mlp add", shape="f32[256]", num_bytes=K, kind="activations"
    )
    # A loop inside a layer is none over layers.
    inner = LOOPING.replace("body=%body", f'body=%body, metadata={{op_name="{FORWARD}/layer.local/while"}}')
    assert only(parse(inner, loop(body))).kind == "temporaries"


def stacking(phase):
    """A loop that stacks what it computes, written as the compiler does: a fusion updates a slice of zeros."""
    state = "(s32[], f32[4,256]{1,0}, f32[256]{0})"
    access = f"{phase.removesuffix('/checkpoint')}/jit(dynamic_update_index_in_dim)"
    return (
        f"""
%update (p: f32[4,256], q: f32[256]) -> f32[4,256] {{
  %p = f32[4,256]{{1,0}} parameter(0)
  %q = f32[256]{{0}} parameter(1)
  %zero = s32[] constant(0)
  %r = f32[1,256]{{1,0}} reshape(%q), metadata={{op_name="{access}/broadcast_in_dim"}}
  ROOT %u = f32[4,256]{{1,0}} dynamic-update-slice(%p, %r, %zero, %zero)
}}

%condition (s: {state}) -> pred[] {{
  %s = {state} parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(4)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

%body (s: {state}) -> {state} {{
  %s = {state} parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %p1 = f32[4,256]{{1,0}} get-tuple-element(%s), index=1
  %p2 = f32[256]{{0}} get-tuple-element(%s), index=2
  %n = f32[256]{{0:S(1)}} negate(%p2), metadata={{op_name="{phase}/layer.local/mlp/neg"}}
  %x = f32[4,256]{{1,0}} fusion(%p1, %n), kind=kLoop, calls=%update, metadata={{op_name="{phase}/mlp/exp"}}
  ROOT %t = {state} tuple(%i, %x, %p2)
}}""",
        f"""
  %zero = s32[] constant(0)
  %b = f32[4,256]{{1,0}} broadcast(%zero), dimensions={{}}
  %t = {state} tuple(%zero, %b, %a)
  %w = {state} while(%t), condition=%condition, body=%body
  %x = f32[4,256]{{1,0}} get-tuple-element(%w), index=1
  ROOT %d = f32[] reduce(%x, %x), dimensions={{0,1}}, to_apply=%add, metadata={{op_name="{BACKWARD}/mul"}}""",
    )


@pytest.mark.parametrize(
    ("phase", "name", "kind"),
    [(FORWARD, "layer.local mlp neg", "activations"), (BACKWARD, "gradient of layer.local mlp neg", "gradients")],
)
def test_a_stack_is_what_is_written_into_it(phase, name, kind):
    computations, entry = stacking(phase)
    # Forward it is no gradient, whatever its shape.
    assert only(parse(entry, computations), parameter_shapes={(4, 256)}) == Buffer(
        name=name, shape="f32[4,256]", num_bytes=4 * K, kind=kind
    )


def test_a_buffer_of_unknown_origin_is_named_after_its_use():
    module = parse(f"""
  %b = f32[512]{{0}} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %d = f32[] reduce(%b, %b), dimensions={{0}}, to_apply=%add, metadata={{op_name="{BACKWARD}/mlp/mul"}}""")
    assert only(module).name == "custom-call for gradient of mlp mul"


@pytest.mark.parametrize(
    ("op_name", "name"),
    [
        ("jit(step)/jvp(logits)/btd,vd->btv/dot_general", "logits btd,vd->btv dot_general"),
        ("jit(step)/while/body/eval_jaxpr/transpose(jvp(loss))/add_any", "gradient of loss add_any"),
        (f"{BACKWARD}/rematted_computation/layer.global/mlp/mul", "recomputed layer.global mlp mul"),
        (f"{BACKWARD}/layer.global/mlp/jit(silu)/mul", "gradient of layer.global mlp silu mul"),
        (
            f"{FORWARD}/layer.local/mixer/shard_map/context_parallel/cond/branch_1_fun/blockwise_attention_forward.xla/"
            "while/body/closed_call/jit(_where)/select_n",
            "layer.local mixer context_parallel blockwise_attention_forward.xla select_n",
        ),
        ("jit(step)/(optimizer/mul:transpose(jvp(loss))/mul)", "optimizer mul"),
        ("jit(step)/optimizer/mul;jit(step)/add", "optimizer mul"),
        ("jit(step)/layer.local/mixer/shard_map/broadcast.12", "layer.local mixer"),
        ("broadcast.12", "broadcast.12"),
        ("", ""),
    ],
)
def test_readable(op_name, name):
    assert readable(op_name) == name


def a_peak(**num_bytes):
    buffers = tuple(Buffer(name="", shape="", num_bytes=size, kind=kind) for kind, size in num_bytes.items())
    return Peak(buffers=buffers, num_bytes=sum(num_bytes.values()), at="")


def stats(temp, output=0, alias=0, code=0, allocated=0):
    return SimpleNamespace(
        argument_size_in_bytes=9,
        total_allocation_bytes=allocated,
        temp_size_in_bytes=temp,
        output_size_in_bytes=output,
        alias_size_in_bytes=alias,
        generated_code_size_in_bytes=code,
    )


def test_what_is_not_explained_is_temporary():
    found = memory_by_class(
        a_peak(activations=50, communication=20, temporaries=10), stats(100, 40, 37, 5), {"parameters": 7, "batch": 2}
    )
    assert list(found.items()) == [
        ("parameters", 7),
        ("batch", 2),
        ("gradients", 0),
        ("activations", 50),
        ("communication", 20),
        ("temporaries", 10 + (100 + 3 + 5 - 80)),
    ]


def test_more_than_the_compilers_figure_is_scaled_down():
    found = memory_by_class(a_peak(activations=80, gradients=40, temporaries=80), stats(100), {})
    assert found == {"gradients": 20, "activations": 40, "communication": 0, "temporaries": 40}


def test_what_a_tpu_allocates_is_less_than_its_compiler_states():
    found = memory_by_class(a_peak(activations=50), stats(100, code=5, allocated=9 + 80), {"parameters": 9})
    assert found == {"parameters": 9, "gradients": 0, "activations": 50, "communication": 0, "temporaries": 80 + 5 - 50}


def test_a_program_without_arrays():
    found = peak(parse("  ROOT %r = f32[] constant(0)"))
    assert (found.buffers, found.num_bytes) == ((), 0)
    assert memory_by_class(found, stats(0), {})["temporaries"] == 0

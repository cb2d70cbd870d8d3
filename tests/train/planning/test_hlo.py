import pytest

from train.planning import hlo


def parse(entry, computations="", header="HloModule test, is_scheduled=true"):
    return hlo.parse(f"{header}\n\n{computations}\n\nENTRY %main (a: f32[8]) -> f32[8] {{\n{entry}\n}}\n")


def instruction(line):
    return parse(line).entry.instructions[0]


def shape(text):
    return instruction(f"  ROOT %a = {text} parameter(0)").shapes[0]


@pytest.mark.parametrize(
    ("text", "num_bytes", "data_bytes"),
    [
        ("f32[4,6]{1,0}", 4 * 6 * 4, 4 * 6 * 4),
        ("bf16[3,130]{1,0:T(8,128)(2,1)}", 8 * 256 * 2, 3 * 130 * 2),
        # The tile lies over the two minor dims of the layout, whichever they are.
        ("f32[130,2,3]{0,2,1:T(8,128)}", 2 * 8 * 256 * 4, 2 * 3 * 130 * 4),
        ("f32[5]{0:T(1024)}", 1024 * 4, 5 * 4),
        ("s32[2,4]{1,0:T(2,128)S(1)}", 2 * 128 * 4, 2 * 4 * 4),
        ("s4[3]{0}", 2, 2),
        ("pred[8]{0}", 8, 8),
        ("f8e4m3fn[8]{0}", 8, 8),
        ("c64[8]{0}", 64, 64),
        ("f32[]", 4, 4),
        ("f32[]{:T(128)}", 4, 4),
        ("f32[0,8]{1,0}", 0, 0),
        ("token[]", 0, 0),
    ],
)
def test_bytes(text, num_bytes, data_bytes):
    assert (shape(text).num_bytes, shape(text).data_bytes) == (num_bytes, data_bytes)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [("{0}", True), ("{0:T(1024)}", True), ("{0:S(0)}", True), ("{0:T(1024)S(1)}", False), ("{0:S(5)}", False)],
)
def test_in_main_memory(layout, expected):
    assert shape(f"f32[8]{layout}").in_main_memory is expected


def test_an_instruction():
    found = instruction(
        "  ROOT %fusion.3 = bf16[2,4]{1,0:T(8,128)(2,1)} fusion(%a, /*index=1*/%b.1), kind=kLoop, calls=%fused.2, "
        'metadata={op_name="jit(f)/mul" stack_frame_id=3}'
    )
    assert (found.name, found.opcode, found.operands, found.is_root) == ("fusion.3", "fusion", ("a", "b.1"), True)
    assert (str(found.shapes[0]), found.elements, found.op_name) == ("bf16[2,4]", (), "jit(f)/mul")
    assert found.called == {"calls": ("fused.2",)}


def test_a_nested_tuple():
    found = instruction(
        "  ROOT %s = ((f32[8]{0}, /*index=1*/bf16[2]{0:T(1024)}), (), s32[4]{0}, u32[]) all-gather-start(%a, %b)"
    )
    assert [str(shape) for shape in found.shapes] == ["f32[8]", "bf16[2]", "s32[4]", "u32[]"]
    assert found.elements == (2, 0, 1, 1)
    assert found.num_bytes == 32 + 2048 + 16 + 4


def test_a_tuples_element():
    assert instruction("  ROOT %e = f32[8]{0} get-tuple-element(%a), index=12, metadata={}").tuple_index == 12


@pytest.mark.parametrize(
    ("call", "called"),
    [
        (
            "while(%a), condition=%condition.1, body=%body.2",
            {"condition": ("condition.1",), "body": ("body.2",)},
        ),
        (
            "conditional(%p, %a, %b), true_computation=%yes, false_computation=%no",
            {"branches": ("yes", "no")},
        ),
        (
            "conditional(%k, %a, %b, %c), branch_computations={%one, %two, %three}",
            {"branches": ("one", "two", "three")},
        ),
        ("call(%a), to_apply=%callee", {"to_apply": ("callee",)}),
        ("add(%a, %b)", {}),
    ],
)
def test_called(call, called):
    assert instruction(f"  ROOT %r = f32[8]{{0}} {call}").called == called


def test_a_module():
    module = parse(
        "  %b = f32[8]{0} parameter(1)\n  %a = f32[8]{0} parameter(0)\n  ROOT %r = f32[8]{0} add(%a, %b)",
        "%other (x: f32[8]) -> f32[8] {\n  ROOT %x = f32[8]{0} parameter(0)\n}",
    )
    assert list(module.computations) == ["other", "main"]
    assert (module.entry.name, module.entry.root.name, module.entry.parameter(1).name) == ("main", "r", "b")


def loop(*, condition, step="%one = s32[] constant(1)\n  %next = s32[] add(%i, %one)", passes_on="%n"):
    """Computations of a loop over (counter, bound), and an entry that starts it from 2 with a bound of 12."""
    return f"""
%fused_step (c: s32[]) -> s32[] {{
  %c = s32[] parameter(0)
  %three = s32[] constant(3)
  ROOT %sum = s32[] add(%three, %c)
}}

%condition (s: (s32[], s32[])) -> pred[] {{
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  %ten = s32[] constant(10)
{condition}
}}

%body (s: (s32[], s32[])) -> (s32[], s32[]) {{
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  {step}
  ROOT %t = (s32[], s32[]) tuple(%next, {passes_on})
}}"""


ENTRY = """
  %start = s32[] constant(2)
  %copied = s32[] copy(%start)
  %stop = s32[] constant(12)
  %t = (s32[], s32[]) tuple(%copied, %stop)
  ROOT %w = (s32[], s32[]) while(%t), condition=%condition, body=%body"""
TO_TEN = "  ROOT %less = pred[] compare(%i, %ten), direction=LT"
TO_BOUND = "  ROOT %less = pred[] compare(%i, %n), direction=LT"
BY_TWO = "%two = s32[] constant(2)\n  %next = s32[] add(%i, %two)"
BY_FUSED_THREE = "%next = s32[] fusion(%i), kind=kLoop, calls=%fused_step"


@pytest.mark.parametrize(
    ("computations", "count"),
    [
        (loop(condition=TO_TEN), 8),
        (loop(condition=TO_TEN, step=BY_TWO), 4),
        (loop(condition=TO_TEN, step=BY_FUSED_THREE), 3),
        (loop(condition=TO_BOUND), 10),
        (loop(condition=TO_BOUND, passes_on="%next"), None),
        (loop(condition="  ROOT %greater = pred[] compare(%i, %ten), direction=GT"), None),
        (loop(condition="  ROOT %wrapped = pred[] fusion(%i), kind=kLoop, calls=%unknown"), None),
    ],
    ids=["constant", "step 2", "fused step", "bound in the state", "changing bound", "other direction", "no compare"],
)
def test_trip_count(computations, count):
    module = parse(ENTRY, computations)
    assert module.trip_count(module.entry.root, module.entry) == count


def test_a_dynamic_bound():
    entry = ENTRY.replace("%stop = s32[] constant(12)", "%stop = s32[] parameter(0)")
    module = parse(entry, loop(condition=TO_BOUND))
    assert module.trip_count(module.entry.root, module.entry) is None


def test_a_known_trip_count():
    entry = ENTRY + ', backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0","step":"1"}}'
    module = parse(entry, loop(condition=TO_BOUND, passes_on="%next"))
    assert module.trip_count(module.entry.root, module.entry) == 7


def test_a_loop_that_never_runs():
    module = parse(ENTRY.replace("constant(2)", "constant(11)"), loop(condition=TO_TEN))
    assert module.trip_count(module.entry.root, module.entry) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HloModule test\n\nENTRY %main () -> f32[] {\n  ROOT %a = f32[] constant(0)\n}\n", "wanted a scheduled HLO"),
        ("module @jit_f {}", "wanted a scheduled HLO"),
        ("", "wanted a scheduled HLO"),
        ("HloModule test, is_scheduled=true\n", "holds no ENTRY"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        hlo.parse(text)


def test_instructions_on_several_lines_and_computations_of_other_cores():
    """As TPU programs print a kernel's metadata, and what runs on their sparse cores."""
    computations = (
        '%other (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} parameter(0)\n}, execution_thread="sparsecore"'
    )
    kernel = (
        "  %a = f32[8]{0} parameter(0)\n"
        '  ROOT %k = f32[8]{0} custom-call(%a), frontend_attributes={kernel_metadata={\n"sends":"x"\n'
        '}}, metadata={op_name="jit(step)/kernel"}'
    )
    module = parse(kernel, computations)
    assert set(module.computations) == {"other", "main"}
    assert [i.name for i in module.entry.instructions] == ["a", "k"]
    assert module.entry.root.op_name == "jit(step)/kernel" and '"sends":"x"' in module.entry.root.attributes

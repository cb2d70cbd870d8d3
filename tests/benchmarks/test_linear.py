"""Linear attention measured: what is wrong is not timed, the truth is the reference's, and the figures are right."""

import dataclasses
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import linear_check, linear_report, measure, peers, run
from benchmarks.linear import all_candidates, measure_linear, our_candidate
from benchmarks.linear_cases import CASES, SMOKE, LinearCase
from benchmarks.measure import Bandwidth, Ceiling
from benchmarks.peers import Candidate, chosen_peers
from benchmarks.results import Row
from pallas_kernels.linear.api import linear_attention
from pallas_kernels.testing import assert_close

pytestmark = pytest.mark.usefixtures("little_time")
NONE, SCALAR, *FIXED = SMOKE
CEILING = Ceiling(size=8, flops=1e9)
BANDWIDTH = Bandwidth(size=8, bytes=1e9)


@pytest.fixture
def little_time(monkeypatch):
    monkeypatch.setattr(measure, "MIN_SECONDS", 1e-4)
    monkeypatch.setattr(measure, "CEILING_SIZE", {"cpu": 32})
    monkeypatch.setattr(measure, "COPY_SIZE", {"cpu": 2**16})


def measure_all(case, *candidates, **options):
    return measure_linear(
        [case],
        peers={},
        ceiling=CEILING,
        bandwidth=BANDWIDTH,
        repetitions=2,
        progress=lambda text: None,
        candidates_of=lambda case: candidates,
        **options,
    )


def candidate(name, attend, **options):
    options = {"ours": True, "deterministic": True, "extra": lambda: SCALAR.segment_ids} | options
    return Candidate(name=name, attend=attend, **options)


def attend(q, k, v, decay, segment_ids):
    """All pairs of tokens, in float32: a small program."""
    length = q.shape[1]
    q, k, v32 = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2).astype("float32") for x in (q, k, v))
    decay = jnp.zeros(v.shape[2]) if decay is None else decay
    since = jnp.cumsum(jnp.broadcast_to(decay, v.shape[:3]), axis=1)
    seen = jnp.tri(length, dtype=bool)
    if segment_ids is not None:
        seen &= segment_ids[:, :, None] == segment_ids[:, None]
    seen = jnp.broadcast_to(seen, (1, length, length) if segment_ids is None else seen.shape)[..., None]
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, since[:, :, None] - since[:, None], 0.0)), 0.0)
    weights *= jnp.einsum("btnh,bsnh->btsn", q, k) * q.shape[3] ** -0.5
    return jnp.einsum("btsn,bsnv->btnv", weights, v32).astype(v.dtype)


@pytest.mark.slow
def test_smoke_cases_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run.linear_cases, "SMOKE", FIXED)
    arguments = ["--family", "linear", "--cases", "smoke", "--implementations", "xla", "--peers", ""]
    assert run.main([*arguments, "--repetitions", "2", "--out", str(tmp_path), "--commit", "abc"]) == 0
    saved, page = (next(tmp_path.glob(f"*_cpu_linear.{ending}")).read_text() for ending in ("json", "md"))
    saved = json.loads(saved)
    assert (tmp_path / next(tmp_path.glob("*.png"))).stat().st_size > 1000
    assert [(row["case"], row["which"], row["problem"]) for row in saved["rows"]] == [
        (case.name, which, None) for case in FIXED for which in ("forward", "forward+backward")
    ]
    by_name = {case.name: case for case in FIXED}
    for row in saved["rows"]:
        case, seconds = by_name[row["case"]], row["median_ms"] / 1e3
        assert row["implementation"] == "longctx xla" and row["memory_bytes"] > 0
        assert row["tflops"] == pytest.approx(case.flops(row["which"]) / seconds / 1e12)
        rate = case.bytes(row["which"], "bfloat16") / seconds / 1e9
        assert row["details"] == pytest.approx(
            {
                "GB/s": rate,
                "% of copy": 100 * rate / saved["copy_gb_per_second"],
                "ns a token": 1e9 * seconds / (case.batch_size * case.length),
            }
        )
    assert "# linear: cpu" in page and "Commit abc." in page
    assert f"Copy: {saved['copy_gb_per_second']:,.0f} GB/s, read and written, in the same run." in page
    assert (
        "| case | implementation | ms | TFLOP/s | of ceiling | memory | ratio | GB/s | % of copy | ns a token |" in page
    )
    assert "4 and 11 arrays where all are alike" in page and "Packed documents over the dense row" in page
    assert f"| {FIXED[1].name} | forward+backward | longctx xla | " in page
    assert "nothing to compare in this run" in page and "Interrupted" not in page
    assert "[1/4] fixed B1 S300 2/2 D16, forward, longctx xla: " in capsys.readouterr().out


@pytest.mark.parametrize("case", [NONE, pytest.param(SCALAR, marks=pytest.mark.slow)], ids=lambda case: case.name)
def test_a_right_result_is_timed(case):
    right = candidate("right", attend, ours=False, extra=lambda: case.segment_ids)
    (row,) = measure_all(case, right, passes=("forward+backward",))
    assert row.problem is None and not row.ours and 0 < row.low_ms <= row.median_ms <= row.high_ms


def scaled_gradient(argument):
    """Attention whose gradient of one argument is 5 % too large."""

    def wrong(q, k, v, decay, segment_ids):
        inputs = {"q": q, "k": k, "v": v, "decay": decay}

        @jax.custom_vjp
        def op(inputs):
            return attend(**inputs, segment_ids=segment_ids)

        def forward(inputs):
            return jax.vjp(lambda inputs: attend(**inputs, segment_ids=segment_ids), inputs)

        def backward(vjp, dout):
            (gradients,) = vjp(dout)
            return (gradients | {argument: gradients[argument] * jnp.asarray(1.05, gradients[argument].dtype)},)

        op.defvjp(forward, backward)
        return op(inputs)

    return wrong


WRONG = {
    "no decay": lambda q, k, v, decay, ids: attend(q, k, v, None, ids),
    "decay after the write": lambda q, k, v, decay, ids: attend(q, k, v, jnp.roll(decay, 1, axis=1), ids),
    "one document": lambda q, k, v, decay, ids: attend(q, k, v, decay, None),
    "other heads": lambda q, k, v, decay, ids: attend(q[:, :, ::-1], k, v, decay, ids),
    "not a number": lambda *inputs: attend(*inputs) * jnp.asarray(jnp.nan, jnp.bfloat16),
}


QUICK = ("decay after the write", "one document"), ("decay",)


@pytest.mark.parametrize(
    ("wrong", "gradients"), [QUICK, pytest.param(tuple(WRONG), ("q", "k", "v", "decay"), marks=pytest.mark.slow)]
)
def test_a_wrong_result_is_not_timed_nor_a_wrong_gradient(wrong, gradients):
    candidates = [
        *(candidate(name, WRONG[name], passes=("forward",)) for name in wrong),
        *(candidate(f"d{name}", scaled_gradient(name), passes=("forward+backward",)) for name in gradients),
    ]
    rows = measure_all(SCALAR, *candidates)
    assert len(rows) == len(candidates)
    for row in rows:
        name = row.implementation if row.which == "forward+backward" else "out"
        assert row.problem.startswith("wrong: max error ") and f"of {name}'s greatest, wanted <= 0.02" in row.problem
        assert row.median_ms is None and row.details == {}


def test_results_of_another_shape_or_dtype_are_wrong():
    flat = candidate("flat", lambda *inputs: attend(*inputs)[..., :1], passes=("forward",))
    wide = candidate("wide", lambda *inputs: attend(*inputs).astype("float32"), passes=("forward",))
    assert [row.problem for row in measure_all(SCALAR, flat, wide, passes=("forward",))] == [
        "wrong: out is bfloat16[1, 96, 4, 1], wanted bfloat16[1, 96, 4, 8]",
        "wrong: out is float32[1, 96, 4, 8], wanted bfloat16[1, 96, 4, 8]",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("documents", [None, (16, 1, 30, 3, 40)])
def test_the_truth_is_the_token_by_token_reference(documents):
    """Many chunks, the last in part; documents that begin at a chunk's start and inside, and one over whole chunks."""
    case = LinearCase(
        kind="scalar", batch_size=1, length=90, num_heads=3, num_qk_heads=1, key_dim=4, value_dim=5, documents=documents
    )
    *inputs, dout = case.inputs("float32")
    lengths = documents or (case.length,)
    document = jnp.asarray(np.repeat(np.arange(len(lengths)), lengths), jnp.int32)

    def truth(q, k, v, decay):
        one_row = (x[0] for x in (q, k, v, decay))
        return linear_check._formula(*one_row, document=document, scale=case.key_dim**-0.5, chunk=16)[None]

    def reference(q, k, v, decay):
        return linear_attention(q, k, v, decay=decay, segment_ids=case.segment_ids, implementation="reference")

    def results(function):
        out, vjp = jax.vjp(function, *inputs)
        return out, *vjp(dout)

    names = linear_check.LinearCheck(case=case, which="forward+backward", dtype="float32").names
    for name, got, want in zip(
        names, jax.jit(results, static_argnums=0)(truth), jax.jit(results, static_argnums=0)(reference),
        strict=True,
    ):  # fmt: skip
        assert_close(name, got, want, "float32")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "delta"), [("vector", False), ("none", True), ("scalar", True)])
def test_the_truth_of_other_rules_is_the_reference(kind, delta):
    """By the check's own program, which takes the reference for right; and what is off by a little for wrong."""
    case = LinearCase(
        kind=kind, batch_size=2, length=300, num_heads=3, num_qk_heads=3, key_dim=4, value_dim=5, delta=delta,
        documents=(100, 1, 199),
    )  # fmt: skip
    check = linear_check.LinearCheck(case=case, which="forward+backward", dtype="float32")
    inputs = case.inputs("float32")
    *operands, dout = inputs

    def results(given):
        given = [given.get(i, x) for i, x in enumerate(operands)]
        beta = given[4] if delta else None
        return linear_attention(
            *given[:3], decay=given[3], beta=beta, segment_ids=case.segment_ids, implementation="reference"
        )

    out, vjp = jax.vjp(results, {i: operands[i] for i in case.differentiated})
    found = out, *vjp(dout)[0].values()
    program = check.lower().compile()
    assert check.problem(program, inputs, found) is None
    for i, name in enumerate(check.names):
        wrong = tuple(1.001 * x if j == i else x for j, x in enumerate(found))
        assert f"of {name}'s greatest" in check.problem(program, inputs, wrong)


def test_a_fixed_decay_is_no_argument_of_the_gradients():
    for case in SMOKE:
        shapes = linear_check.LinearCheck(case=case, which="forward+backward", dtype="bfloat16").shapes
        assert len(shapes) == (5 if case.kind == "scalar" else 4)


def test_flops_and_bytes_are_those_of_the_floor():
    case = next(case for case in CASES if case.name == "fixed B1 S32768 16/16 D128")
    array = 32768 * 16 * 128 * 2
    assert case.bytes("forward", "bfloat16") == 4 * array and case.bytes("forward+backward", "bfloat16") == 11 * array
    assert case.bytes("forward", "bfloat16") == pytest.approx(0.54e9, rel=0.01)  # as published for this case
    assert case.flops("forward") == 4 * 32768 * 16 * 128 * 128 == case.flops("forward+backward") / 3
    q, v = 8192 * 2 * 128, 8192 * 2 * 16 * 64  # one head of queries and keys
    shared = next(case for case in CASES if case.name == "scalar B2 S8192 16/1 D128/64")
    assert shared.bytes("forward", "float16") == 2 * (2 * q + 2 * v)
    assert shared.bytes("forward+backward", "float16") == 2 * (6 * q + 5 * v)


def test_the_cases_are_those_of_the_bars():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) == 22
    assert {
        f"{kind} {shape} 16/16 D{dim}"
        for kind in ("fixed", "scalar")
        for shape in ("B2 S8192", "B1 S32768")
        for dim in (128, 64)
    } <= set(names)
    assert {f"fixed B1 S{length} 16/16 D128" for length in (65536, 262144, 1048576)} <= set(names)
    documents = [case for case in CASES if case.documents]
    assert [case.name for case in documents] == [f"{x}, documents 16 B1 S32768 16/16 D128" for x in ("fixed", "scalar")]
    for case in documents:
        assert sum(case.documents) == case.length and dataclasses.replace(case, documents=None) in CASES
    assert {
        f"{rule} {shape} 16/16 D128"
        for rule in ("vector", "delta", "gated_delta")
        for shape in ("B2 S8192", "B1 S32768")
    } <= set(names)


@pytest.mark.parametrize(
    "case", [SCALAR, *(pytest.param(x, marks=pytest.mark.slow) for x in (NONE, *FIXED))], ids=lambda case: case.name
)
def test_inputs_are_seeded_and_of_the_shapes_they_say(case):
    inputs, again = case.inputs("float16"), case.inputs("float16")
    for x, same, shape in zip(inputs, again, case.shapes("float16"), strict=True):
        if shape is None:
            assert x is None
            continue
        assert (x.shape, x.dtype) == (shape.shape, shape.dtype) and jnp.array_equal(x, same)
    assert inputs[3] is None or (inputs[3] < 0).all()


def rows_of(times, which="forward", implementation="mine"):
    return [
        Row(case=name, which=which, implementation=implementation, ours=True, median_ms=ms, problem=problem)
        for name, ms, problem in times
    ]


def test_bars_are_told_where_both_sides_were_timed():
    dense, packed = FIXED
    long = tuple(dataclasses.replace(dense, length=length) for length in (70000, 140000, 280000))
    cases = (dense, packed, *long)
    times = [
        (dense.name, 2.0, None),
        (packed.name, 2.1, None),
        *((case.name, ms, None) for case, ms in zip(long, (70.0, 141.0, 300.0), strict=True)),
    ]
    other = [(dense.name, None, "wrong: all"), (packed.name, 1.0, None), (long[0].name, 7.0, None)]
    falling = [(case.name, ms, None) for case, ms in zip(long, (70.0, 119.0, 259.0), strict=True)]
    rows = rows_of(times) + rows_of(other, implementation="other") + rows_of(falling, implementation="falling")
    documents, lengths = linear_report.bars(rows, cases)
    assert "wanted <= 1.05" in documents and "other" not in documents + lengths
    assert f"| {packed.name} | forward | mine | 1.050 | held |" in documents
    told = "70,000: 1e+03, 140,000: 1.01e+03, 280,000: 1.07e+03"
    assert f"| fixed B1 2/2 D16 | forward | mine | {told} | 1.071 | missed |" in lengths
    # What falls from the shortest on holds, though it is slower again in the longest.
    assert "| falling | 70,000: 1e+03, 140,000: 850, 280,000: 925 | 0.925 | held |" in lengths
    documents, lengths = linear_report.bars(rows_of(other), cases)
    assert documents.endswith("nothing to compare in this run.") and lengths.endswith("compare in this run.")


def test_xla_is_left_out_of_long_rows_unless_it_is_named(monkeypatch):
    monkeypatch.setattr("benchmarks.linear.XLA_LENGTH", 90)
    monkeypatch.setattr("benchmarks.linear.OURS", ("xla",))
    monkeypatch.setattr(LinearCase, "inputs", lambda *args: pytest.fail("drawn for nothing"))
    rows = measure_all(SCALAR, *all_candidates(SCALAR, implementations=None, peers={}))
    assert [row.problem for row in rows] == [
        "refused: left out of rows of more than 90 tokens; --implementations xla measures it"
    ] * 2
    (named,) = all_candidates(SCALAR, implementations=("xla",), peers={})
    assert jax.eval_shape(named.attend, *SCALAR.shapes("bfloat16")[:4], SCALAR.segment_ids).shape == (1, 96, 4, 8)


def test_inputs_that_cannot_be_drawn_are_told(monkeypatch):
    def inputs(case, dtype):
        raise MemoryError("no room")

    monkeypatch.setattr(LinearCase, "inputs", inputs)
    (row,) = measure_all(SCALAR, our_candidate(SCALAR, "xla"), passes=("forward",))
    assert row.problem == "failed: MemoryError: no room"


def test_an_implementation_of_this_project_that_is_wrong_fails_the_command(tmp_path, monkeypatch):
    (wrong,) = rows_of([(SCALAR.name, None, "wrong: all of it")])
    monkeypatch.setattr(run, "measure_linear", lambda *args, **kwargs: [wrong])
    arguments = ["--family", "linear", "--cases", "smoke", "--peers", "", "--out", str(tmp_path), "--repetitions", "2"]
    assert run.main(arguments) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "cudnn"], "--peers: got 'cudnn', wanted some of jla"),
        (["--implementations", "cudnn"], "--implementations: got 'cudnn', wanted some of "),
        (["--passes", "backward"], "--passes: 'backward' alone is measured of --family blockwise only"),
        (["--config", "run.yaml"], "--config: goes with --family train, got --family linear"),
        (["a.b=c"], "a.b=c: overrides go with --family train"),
        (["--devices", "2"], "--devices: goes with --family context_parallel"),
    ],
)
def test_a_wrong_command_line_is_told(arguments, message, capsys):
    assert run.main(["--family", "linear", "--cases", "smoke", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_list_shows_the_bytes(capsys):
    assert run.main(["--family", "linear", "--list", "--cases", "none"]) == 0
    assert capsys.readouterr().out == "none B1 S32768 16/16 D128  (0.537 GB forward)\n"


def test_jla_serves_gpus_and_its_head_dims(monkeypatch):
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, the platform is cpu"):
        peers._jla_linear(CASES[0])
    monkeypatch.setattr(peers, "_needs_gpu", lambda: None)
    with pytest.raises(NotImplementedError, match="head dims are 64 or 128, got 16 and 8"):
        peers._jla_linear(SCALAR)
    assert "jla" in chosen_peers(None, note=lambda text: None, peers=peers.LINEAR_PEERS) or not (
        peers.LINEAR_PEERS["jla"].is_installed
    )


@pytest.mark.parametrize("kind", [pytest.param("none", marks=pytest.mark.slow), "fixed", "scalar"])
def test_jla_is_asked_for_the_same_as_this_project(kind, monkeypatch):
    """What it is called with, answered by this project's op."""
    case = LinearCase(
        kind=kind, batch_size=2, length=6, num_heads=2, num_qk_heads=1, key_dim=64, value_dim=64, documents=(2, 4)
    )

    def linear_attention_of_jla(name, q, k, v, *, g, segment_ids, impl):
        assert (name, impl, g.shape, g.dtype) == ("simple_gla", "mosaic_gpu", (2, 6, 2), jnp.float32)
        assert (segment_ids.shape, segment_ids.dtype) == ((2, 6), jnp.int32)
        return attend(q, k, v, g, segment_ids), None

    def run_of_jla(q, k, v, g, beta, *, segment_ids, grouped_key_grads, **options):
        assert grouped_key_grads and beta is None
        assert options == {"delta": False, "scale": None, "initial_state": None, "output_final_state": False}
        return linear_attention_of_jla("simple_gla", q, k, v, g=g, segment_ids=segment_ids, impl="mosaic_gpu")

    ops = types.ModuleType("jla.ops")
    ops.linear_attention = linear_attention_of_jla
    mosaic_gpu = types.ModuleType("jla.ops.mosaic_gpu")
    mosaic_gpu.scalar_gate = types.SimpleNamespace(run=run_of_jla)
    modules = {"jla": types.ModuleType("jla"), "jla.ops": ops, "jla.ops.mosaic_gpu": mosaic_gpu}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers, "_needs_gpu", lambda: None)
    plain, grouped = peers._jla_linear(case)
    assert grouped.passes == ("forward+backward",) and plain.passes == ("forward", "forward+backward")
    inputs = case.inputs("bfloat16")[:4]
    want = attend(*inputs, case.segment_ids)
    for each in (plain, grouped):
        assert_close(each.name, each.attend(*inputs, each.extra()), want, "bfloat16")


def test_a_measurement_takes_about_as_long_as_it_may(monkeypatch):
    monkeypatch.setattr(measure, "_seconds", lambda call, calls: 0.1 * calls)
    assert measure.time_calls(lambda: None, repetitions=20, max_seconds=1.0).repetitions == 10
    assert measure.time_calls(lambda: None, repetitions=20, max_seconds=0.1).repetitions == 5
    assert measure.time_calls(lambda: None, repetitions=3, max_seconds=0.1).repetitions == 3
    assert measure.time_calls(lambda: None, repetitions=20).repetitions == 20


def test_a_measurement_starts_when_the_card_is_warm(monkeypatch):
    clock, started = [0.0], []

    def seconds(call, calls):
        started.append(clock[0])
        clock[0] += 0.1
        return 0.1

    monkeypatch.setattr(measure, "_seconds", seconds)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    measure.time_calls(lambda: None, repetitions=2, warm_seconds=0.95)
    assert len(started) == 1 + 10 + 2


def test_a_copy_is_read_and_written(monkeypatch):
    timing = measure.Timing(median=0.5, low=0.5, high=0.5, repetitions=1, calls=1)
    monkeypatch.setattr(measure, "time_calls", lambda call, repetitions: call().size and timing)
    bandwidth = measure.copy_bandwidth()
    assert bandwidth == Bandwidth(size=2**16, bytes=2**18)
    assert str(Bandwidth(size=2**30, bytes=3e12)) == "copy of 1,024 MiB 3,000 GB/s read and written"

"""The TPU kernel of linear attention without a TPU: in JAX's TPU interpreter, and by its compiler ahead of time."""

import dataclasses
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels.linear.api import (
    linear_attention,
    linear_attention_backward,
    linear_attention_forward,
    linear_attention_state_cotangents,
    linear_attention_states,
)
from pallas_kernels.linear.pallas_mosaic_tpu import HEAD_DIMS
from pallas_kernels.linear.pallas_mosaic_tpu_sweep import VMEM_BYTES, grid_of
from pallas_kernels.testing import V5P, assert_close, tracing_for

BOTH = [("linear_attention_forward", "mosaic_tpu"), ("linear_attention_backward", "mosaic_tpu")]
GRADIENTS = ("dq", "dk", "dv", "ddecay", "dbeta", "dinitial_state")

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and forms of one call: T tokens, K query and key heads, N value heads, dims H and V."""

    T: int
    K: int = 1
    N: int = 2
    H: int = 64
    V: int = 64
    B: int = 1
    decay: str = "scalar"
    beta: bool = False
    strength: float = 0.05
    documents: bool = False
    states: bool = True
    dtype: str = "float32"
    slow: bool = True

    def __str__(self) -> str:
        words = (
            "delta_" * self.beta + self.decay,
            "documents" if self.documents else "row",
            "states" if self.states else "zero",
            self.dtype,
        )
        return f"T{self.T}_K{self.K}_N{self.N}_H{self.H}_V{self.V}_{'_'.join(words)}"

    def inputs(self) -> dict:
        # Traced, where only shapes are asked for: the longest rows are beyond this machine's memory.
        keys = iter(jax.random.split(jax.random.key(0), 9))

        def normal(*shape, dtype=self.dtype):
            return jax.random.normal(next(keys), shape, jnp.float32).astype(dtype)

        B, T, N = self.B, self.T, self.N
        decays = {"none": None, "fixed": (N,), "scalar": (B, T, N), "vector": (B, T, N, self.H)}[self.decay]
        sizes = None if decays is None else self.strength * jnp.abs(normal(*decays, dtype="float32"))
        if self.strength > 1:
            # Weak ones in between, without which nothing is left to tell.
            sizes = jnp.where(jax.random.uniform(next(keys), decays) < 0.25, 0.01 * sizes, sizes)
        k = normal(B, T, self.K, self.H) * jnp.asarray(self.H**-0.5, self.dtype)
        if self.beta:  # keys of length 1, with which a state stays bounded
            k = k.astype(jnp.float32)
            k = (k / jnp.linalg.norm(k, axis=3, keepdims=True)).astype(self.dtype)
        return {
            "q": normal(B, T, self.K, self.H),
            "k": k,
            "v": normal(B, T, N, self.V),
            "decay": None if sizes is None else -sizes,
            "beta": jax.nn.sigmoid(normal(B, T, N, dtype="float32")) if self.beta else None,
            "initial_state": normal(B, N, self.H, self.V, dtype="float32") if self.states else None,
            "dout": normal(B, T, N, self.V),
            "dstate": normal(B, N, self.H, self.V, dtype="float32"),
        }

    def segment_ids(self) -> jax.Array | None:
        """Documents of many lengths, padding within the row, and the last document up to its end."""
        if not self.documents:
            return None
        ids = np.cumsum(np.random.default_rng(1).random((self.B, self.T)) < 0.02, axis=1).astype(np.int32)
        ids[:, self.T // 2 : self.T // 2 + 9] = -1
        return jnp.asarray(ids)


CASES = (
    Case(T=63, K=2, V=128, decay="fixed", dtype="bfloat16"),
    Case(T=700, documents=True),
    Case(T=1, decay="none", states=False),
    Case(T=128, H=128, V=64, B=2),
    Case(T=63, decay="none", documents=True, B=2, slow=False),
    Case(T=257, strength=20.0),
    Case(T=400, strength=20.0, dtype="bfloat16"),
    Case(T=512, K=2, N=8, decay="none", dtype="bfloat16"),
    Case(T=600, K=1, N=8, documents=True, dtype="bfloat16"),
    Case(T=1100, K=2, N=4, V=128, documents=True, B=2),
    Case(T=1023, K=3, N=6, decay="fixed", dtype="bfloat16"),
    Case(T=1000, K=1, N=1, H=192, V=256, dtype="bfloat16"),
)

SCANNED = (
    Case(T=300, decay="vector", documents=True),
    Case(T=130, decay="scalar", beta=True, documents=True, slow=False),
    Case(T=256, decay="vector", K=1, N=2, V=128, dtype="bfloat16"),
    Case(T=257, decay="vector", strength=20.0, states=False),
    Case(T=129, decay="none", beta=True, K=1, B=2),
    Case(T=256, decay="fixed", beta=True, states=False, dtype="bfloat16"),
    Case(T=400, decay="scalar", beta=True, strength=20.0, H=128),
    Case(T=1, decay="vector", beta=True),
    Case(T=200, decay="vector", beta=True, documents=True, H=192, dtype="bfloat16"),
)
"""Of pallas_mosaic_tpu_scan.py: decays of each dim, and delta rules."""


@pytest.fixture
def interpreter(monkeypatch):
    """A TPU that is JAX's interpreter of its kernels, whose memory holds nan until it is written."""
    monkeypatch.setattr(dispatch, "current_platform", lambda: "tpu")
    with pltpu.force_tpu_interpret_mode(PARAMS):
        yield


PARAMS = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="uninitialized")


def differentiated(case: Case, implementation):
    """out, the end state and every gradient by name."""

    def run(q, k, v, decay, beta, initial_state, dout, dstate):
        def attend(q, k, v, decay, beta, initial_state):
            return linear_attention(
                q, k, v, decay=decay, beta=beta, initial_state=initial_state, return_state=True,
                segment_ids=case.segment_ids(), implementation=implementation,
            )  # fmt: skip

        (out, state), vjp = jax.vjp(attend, q, k, v, decay, beta, initial_state)
        return {"out": out, "state": state} | dict(zip(GRADIENTS, vjp((dout, dstate)), strict=True))

    return run


def in_float32(inputs: dict) -> dict:
    return jax.tree.map(lambda x: x.astype(jnp.float32), inputs)


def check(got: dict, want: dict, dtype: str) -> None:
    assert [name for name, x in got.items() if x is not None] == [name for name, x in want.items() if x is not None]
    for name, x in want.items():
        if x is not None:
            assert_close(name, got[name], x, dtype)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case.slow else ()) for case in CASES + SCANNED], ids=str
)
def test_forward_and_every_gradient(case):
    """Chosen by itself, next to the reference; what is behind the last token is nan."""
    inputs = case.inputs()
    with dispatch.record() as taken:
        got = jax.block_until_ready(jax.jit(differentiated(case, None))(**inputs))
    assert taken == BOTH
    want = jax.jit(differentiated(case, "reference"))(**in_float32(inputs))
    check(got, want, case.dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[-2], SCANNED[0]], ids=str)
def test_maps_of_states_and_their_cotangents(case):
    inputs, segment_ids = case.inputs(), case.segment_ids()

    def run(implementation, k, v, decay):
        options = {"decay": decay, "segment_ids": segment_ids, "implementation": implementation}
        return linear_attention_states(k, v, **options), linear_attention_state_cotangents(k, v, **options)

    arguments = {name: inputs[name] for name in ("k", "v", "decay")}
    with dispatch.record() as taken:
        got = jax.jit(run, static_argnums=0)(None, **arguments)
    assert {name for _, name in taken} == {"mosaic_tpu"}
    want = jax.jit(run, static_argnums=0)("reference", **in_float32(arguments))
    for name, of_kernel, of_reference in zip(("states", "cotangents"), got, want, strict=True):
        assert of_kernel.value.shape == of_reference.value.shape  # one part
        assert_close(f"{name}.value", of_kernel.value, of_reference.value, case.dtype)
        assert_close(f"{name}.decay", of_kernel.decay, of_reference.decay, case.dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_the_backward_op_needs_neither_starts_nor_a_cotangent_of_the_state():
    case = CASES[1]
    inputs = case.inputs()
    del inputs["dstate"], inputs["beta"]

    def run(implementation, q, k, v, decay, initial_state, dout):
        gradients = linear_attention_backward(
            q, k, v, dout, None, decay=decay, initial_state=initial_state, segment_ids=case.segment_ids(),
            implementation=implementation,
        )  # fmt: skip
        return gradients._asdict()

    got = jax.jit(run, static_argnums=0)(None, **inputs)
    check(got, jax.jit(run, static_argnums=0)("reference", **in_float32(inputs)), case.dtype)


@pytest.mark.slow
def test_no_race(monkeypatch, capfd):
    """Nothing reads what a copy is writing, with the parallel dims of the grid split over two cores."""
    monkeypatch.setattr(dispatch, "current_platform", lambda: "tpu")
    case = Case(T=1100, N=16, documents=True)
    inputs = case.inputs()
    with pltpu.force_tpu_interpret_mode(dataclasses.replace(PARAMS, detect_races=True, num_cores_or_threads=2)):
        jax.block_until_ready(jax.jit(differentiated(case, None))(**inputs))
    assert "RACE" not in capfd.readouterr().out.upper()


def test_refusals():
    def call(*, dtype="bfloat16", H=64, V=64):
        def attend(q, v):
            return linear_attention(q, q, v, implementation="mosaic_tpu")

        jax.eval_shape(attend, *(jax.ShapeDtypeStruct((1, 9, 2, dim), dtype) for dim in (H, V)))

    with pytest.raises(NotImplementedError, match=r"^mosaic_tpu: the platform is cpu, wanted tpu"):
        call()
    refused = {
        r"^mosaic_tpu: q, k and v are float16, wanted bfloat16 or float32": {"dtype": "float16"},
        r"^mosaic_tpu: the head dim of q and k is 48, wanted one of \(64, ": {"H": 48},
        r"^mosaic_tpu: the head dim of v is 1, wanted one of \(64, ": {"V": 1},
    }
    for message, arguments in refused.items():
        with tracing_for(V5P), pytest.raises(NotImplementedError, match=message):
            call(**arguments)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_grid_fits_and_takes_whole_groups(dtype):
    for H in HEAD_DIMS:
        for V in HEAD_DIMS:
            for K, N in ((1, 1), (2, 2), (1, 6), (4, 16), (16, 16), (5, 15), (2, 14)):
                grid = grid_of(N, {"q": (N, V), "k": (K, H), "v": (N, V), "dot_with": (K, H)}, 10**6, dtype_size(dtype))
                assert grid.vmem_bytes <= VMEM_BYTES
                assert N % grid.heads == 0 and (N // K % grid.heads == 0 or grid.heads % (N // K) == 0)


def dtype_size(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


def compiled_for(topology: str, case: Case, function):
    """The program of one chip of a TPU that is not there, and the implementations that it takes."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other tests may compile at the same time
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("device",))

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    shapes = jax.tree.map(shape, jax.eval_shape(case.inputs))
    with jax.set_mesh(mesh), dispatch.record() as taken:
        program = jax.jit(function).lower(**shapes).compile()
    return program, taken


def kernels(program) -> list[str]:
    """Names of the kernels that a compiled program calls."""
    return sorted(re.findall(r"%(linear_attention_[a-z_]+)[.\d]* = .*? custom-call\(", program.as_text()))


SWEEPS = ["linear_attention_sweep"] * 2 + ["linear_attention_sweep_reverse"] * 2


@needs_libtpu
def test_compiles_for_a_tpu_which_takes_it():
    case = Case(T=1000, K=2, N=4, documents=True, dtype="bfloat16")
    program, taken = compiled_for("v5e:2x2", case, differentiated(case, None))
    assert taken == BOTH
    assert kernels(program) == SWEEPS


@needs_libtpu
def test_delta_rules_compile_for_a_tpu_which_takes_them():
    case = Case(T=1000, K=2, N=4, beta=True, documents=True, dtype="bfloat16")
    program, taken = compiled_for("v5e:2x2", case, differentiated(case, None))
    assert taken == BOTH
    assert kernels(program) == SCANS


SCANS = ["linear_attention_scan"] * 2 + ["linear_attention_scan_gradients"]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (64, 256), (256, 256)], ids=str)
@pytest.mark.parametrize(("decay", "beta"), [("vector", False), ("none", True), ("scalar", True), ("vector", True)])
def test_every_scan_compiles(decay, beta, dims, dtype, topology):
    H, V = dims
    case = Case(T=1000, K=2, N=4, H=H, V=V, decay=decay, beta=beta, documents=True, dtype=dtype)
    program, taken = compiled_for(topology, case, differentiated(case, None))
    assert taken == BOTH
    assert kernels(program) == SCANS


SMALL = [Case(T=1000, K=2, N=4, H=H, V=V, documents=True) for H in HEAD_DIMS for V in (64, H)]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_head_dim_compiles(case, dtype, topology):
    case = dataclasses.replace(case, dtype=dtype)
    program, taken = compiled_for(topology, case, differentiated(case, None))
    assert taken == BOTH
    assert kernels(program) == SWEEPS


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("topology", "longest"), [("v5e:2x2", 2**17), ("v5p:2x2x1", 2**20), ("v6e:2x2", 2**18)])
@pytest.mark.parametrize("documents", [False, True], ids=["row", "documents"])
def test_memory_is_linear_in_tokens(documents, topology, longest):
    """At 16 heads of 128: 32768 tokens and as many as a chip's memory has room for, with what goes in and comes out."""

    def forward(q, k, v, decay, initial_state, segment_ids, **_):
        return linear_attention_forward(
            q, k, v, decay=decay, initial_state=initial_state, segment_ids=segment_ids
        )  # fmt: skip

    def backward(q, k, v, dout, dstate, decay, beta, initial_state, segment_ids):
        del beta
        return linear_attention_backward(
            q, k, v, dout, dstate, decay=decay, initial_state=initial_state, segment_ids=segment_ids,
            starts=initial_state[:, None],
        )  # fmt: skip

    for function, num in ((forward, 1), (backward, 3)):
        held = {}
        for T in (2**15, longest):
            case = WithSegmentIds(T=T, K=16, N=16, H=128, V=128, dtype="bfloat16", documents=documents)
            program, taken = compiled_for(topology, case, function)
            assert [name for _, name in taken] == ["mosaic_tpu"]
            assert len(kernels(program)) == num
            memory = program.memory_analysis()
            held[T] = memory.temp_size_in_bytes
            q_bytes = 2 * T * 16 * 128
            # Transposed inputs and outputs, which a layer makes in that form to begin with.
            assert memory.temp_size_in_bytes <= (5 if num == 1 else 9) * q_bytes
        assert held[longest] <= longest / 2**15 * held[2**15] * 1.1


class WithSegmentIds(Case):
    """The segment ids among the inputs."""

    def inputs(self) -> dict:
        segment_ids = jnp.zeros((self.B, self.T), jnp.int32) if self.documents else None
        return super().inputs() | {"segment_ids": segment_ids}

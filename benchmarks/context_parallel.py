"""Measures attention over a split sequence: strategies side by side, by the number of devices.

What is timed is what a training step does for each layer: `sharded_attention` and its gradients over inputs that lie on
the mesh in the layout's order, with a schedule that was built before. Beside it stands one device alone.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.cases import DOCUMENTS, WHOLE_PASSES, Case, Pass
from benchmarks.check import Check
from benchmarks.measure import Ceiling, memory_bytes, time_calls
from benchmarks.results import Row, problem_of
from longctx.context_parallel import (
    AnySchedule,
    AttentionSharding,
    Layout,
    balanced_order,
    sharded_attention,
    sharded_schedule,
)
from longctx.context_parallel.layout import permute, unpermute
from longctx.context_parallel.strategy import StrategyName
from longctx.sharding import CONTEXT_AXES, MeshConfig, make_mesh
from pallas_kernels import Tokens, dispatch
from pallas_kernels.compiling import compile_all
from pallas_kernels.testing import packed_tokens

ONE_DEVICE = "one device"
NOTES = (
    "Timed is what a training step does for each layer: attention, or it and its gradients, over inputs that lie on "
    "the mesh in the layout's order, all that the strategy sends included. Schedules are built outside the timing. "
    "At every number of devices, out and every gradient are first compared with the float32 formula on a sample of "
    "query rows.",
    "TFLOP/s a device count the pairs that the mask allows (forward 4 pairs D N B, 3.5 times that with backward), over "
    "the time and the devices. **% of one device** is that over the TFLOP/s of one device alone, which computes the "
    "same case at its own length by the plain op. Where the tokens a device are fixed (weak scaling), that is a "
    "sequence of the same kind of the tokens of one device, as in ring-flash-attention's % of its theoretical speed. "
    "Where the whole is fixed (strong scaling), it is the whole, and the % is the speedup over the number of devices. "
    "Longer rows suit a kernel better than short ones, and documents are longer in longer sequences, in proportion: so "
    "more than 100 % is possible.",
)
CPU_NOTE = "CPU devices share the cores of one machine: these numbers show that it runs, and say nothing of speed."
# XLA's CPU runtime aborts when many calls with collectives are queued.
_MAX_CALLS_IN_FLIGHT = {"cpu": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """A strategy over a layout.

    Attributes:
      told_longest: Whether it is told of how many tokens the longest document is, as by `data.max_document_length`.
    """

    strategy: StrategyName
    layout: Layout = Layout()
    told_longest: bool = False

    @property
    def name(self) -> str:
        stripes = f" {self.layout.stripe_size}" if self.layout.name == "striped" else ""
        return f"{self.strategy} {self.layout.name}{stripes}{', bounded documents' if self.told_longest else ''}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingCase:
    """Causal self-attention whose sequence is split over ever more devices.

    Attributes:
      kind: What its name begins with.
      tokens_per_device: Tokens of a row that each device holds, or None where `length` is given.
      length: Tokens of a row however many devices there are, or None.
      window: Tokens that each sees, itself included; None for all before it.
      documents: Lengths of packed documents in proportion to the row's, which are stretched to it; None for one.
      ways: What is timed, or refused.
    """

    kind: str
    tokens_per_device: int | None = None
    length: int | None = None
    batch_size: int = 1
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    documents: tuple[int, ...] | None = None
    ways: tuple[Way, ...]

    def __post_init__(self):
        if (self.tokens_per_device is None) == (self.length is None):
            raise ValueError(
                f"ScalingCase: got tokens_per_device={self.tokens_per_device} and length={self.length}, wanted one of "
                "them; leave out the other"
            )

    @property
    def name(self) -> str:
        length = f"S{self.length}" if self.length else f"S{self.tokens_per_device} a device"
        return f"{self.kind} B{self.batch_size} {length} {self.num_heads}/{self.num_kv_heads} D{self.head_dim}"

    def at(self, degree: int) -> Case:
        """The whole of it over that many devices."""
        length = self.length or self.tokens_per_device * degree
        documents = None
        if self.documents is not None:
            ends = np.cumsum(self.documents) * length // sum(self.documents)
            documents = tuple(np.diff(ends, prepend=0).tolist())
        return Case(
            batch_size=self.batch_size,
            length=length,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            window=self.window,
            documents=documents,
        )


_ZIGZAG = Layout(name="zigzag")
_STRIPED = Layout(name="striped")
_STRIPED_512 = Layout(name="striped", stripe_size=512)
_BALANCED = Layout(name="balanced")
_LLAMA = dict(tokens_per_device=8192, num_heads=64, num_kv_heads=8, head_dim=128)
_TINY = dict(tokens_per_device=32, num_heads=8, num_kv_heads=4, head_dim=16)
_DOCUMENT_WAYS = (
    Way(strategy="ring", layout=_ZIGZAG),
    Way(strategy="ring", layout=_STRIPED),
    Way(strategy="ring", layout=_STRIPED_512),
    Way(strategy="ring", layout=_BALANCED),
    Way(strategy="ring", told_longest=True),
    Way(strategy="all_gather", layout=_ZIGZAG),
    Way(strategy="all_gather", layout=_STRIPED_512),
    Way(strategy="all_gather", layout=_BALANCED),
    Way(strategy="ulysses"),
    Way(strategy="halo", told_longest=True),
)

CASES = (
    ScalingCase(
        kind="causal",
        **_LLAMA,
        ways=(
            Way(strategy="ring", layout=_ZIGZAG),
            Way(strategy="ring", layout=_STRIPED),
            Way(strategy="ring"),
            Way(strategy="all_gather", layout=_ZIGZAG),
            Way(strategy="ulysses"),
            Way(strategy="usp", layout=_ZIGZAG),
            Way(strategy="double_ring", layout=_ZIGZAG),
            Way(strategy="halo"),
        ),
    ),
    ScalingCase(
        kind="window 8192",
        **_LLAMA,
        window=8192,
        ways=(
            Way(strategy="ring"),
            Way(strategy="ring", layout=_ZIGZAG),
            Way(strategy="all_gather"),
            Way(strategy="all_gather", layout=_ZIGZAG),
            Way(strategy="ulysses"),
            Way(strategy="halo"),
            Way(strategy="halo", layout=_ZIGZAG),
        ),
    ),
    ScalingCase(kind="documents 16", **_LLAMA, documents=DOCUMENTS, ways=_DOCUMENT_WAYS),
    # The example of Transformer Engine's docs for context parallelism in JAX, whose four GPUs hold 2 rows of 4 segments
    # of 12,288 tokens, each with 4,096 of padding behind it. The padding is documents here, which adds an eighth.
    ScalingCase(
        kind="window 8192, documents 8",
        length=65536,
        batch_size=2,
        num_heads=128,
        num_kv_heads=8,
        head_dim=128,
        window=8192,
        documents=(3, 1) * 4,
        ways=(
            Way(strategy="ring"),
            Way(strategy="ring", layout=_STRIPED),
            Way(strategy="all_gather"),
            Way(strategy="all_gather", layout=_STRIPED_512),
            Way(strategy="ulysses"),
            Way(strategy="halo"),
            Way(strategy="halo", layout=_ZIGZAG),
        ),
    ),
)

SMOKE = (
    ScalingCase(
        kind="causal",
        **_TINY,
        ways=(
            Way(strategy="ring", layout=_ZIGZAG),
            Way(strategy="ulysses"),
            Way(strategy="usp", layout=_ZIGZAG),
            Way(strategy="double_ring", layout=_ZIGZAG),
            Way(strategy="halo"),
        ),
    ),
    ScalingCase(
        kind="window 24",
        **_TINY,
        window=24,
        ways=(Way(strategy="halo"), Way(strategy="halo", layout=_ZIGZAG)),
    ),
    ScalingCase(
        kind="documents 3",
        **_TINY,
        documents=(20, 5, 39),
        ways=(
            Way(strategy="ring", layout=Layout(name="striped", stripe_size=4)),
            Way(strategy="ring", layout=Layout(name="balanced", chunk_size=4)),
            Way(strategy="all_gather", layout=_ZIGZAG),
        ),
    ),
)


def degrees_up_to(num_devices: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the number itself."""
    powers = (2**i for i in range(num_devices.bit_length()))
    return tuple(dict.fromkeys((*powers, num_devices)))


def measure_context_parallel(
    cases: Sequence[ScalingCase],
    *,
    degrees: Sequence[int],
    ceiling: Ceiling,
    passes: Sequence[Pass] = WHOLE_PASSES,
    dtype: str = "bfloat16",
    repetitions: int = 20,
    progress: Callable[[str], None] = print,
) -> list[Row]:
    """For each case compiles every program, then checks and times them one by one.

    Args:
      degrees: Numbers of devices to split a sequence over; one device alone is measured first in any case.
      ceiling: What a large matmul reaches on one device.
      passes: Of WHOLE_PASSES.
    Returns: a row for each case, number of devices, way and pass; what does not fit the float32 formula is not timed.
      After Ctrl-C, the rows until then.
    """
    rows: list[Row] = []
    try:
        for case in cases:
            progress(f"{case.name}:")
            for row in _rows_of_case(case, degrees, ceiling, passes, dtype, repetitions, progress):
                progress(_line(row))
                rows.append(row)
    except KeyboardInterrupt:
        progress("interrupted: what was measured until now is kept")
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Trial:
    """A case over so many devices, one way; `way` is None for one device alone, with the plain op."""

    whole: Case
    degree: int
    way: Way | None

    @property
    def name(self) -> str:
        return ONE_DEVICE if self.way is None else self.way.name

    @property
    def sharding(self) -> AttentionSharding | None:
        """With the axes of `make_mesh`; None, and no mesh in scope, means the plain op."""
        if self.way is None:
            return None
        longest = max(self.whole.documents or (self.whole.length,)) if self.way.told_longest else None
        return AttentionSharding(strategy=self.way.strategy, layout=self.way.layout, max_document_length=longest)

    def scope(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.way is None else jax.set_mesh(self.mesh)

    @property
    def mesh(self) -> Mesh:
        """Of pairs of devices for a strategy of two levels, which has them as groups."""
        inner = 2 if self.way.strategy in ("usp", "double_ring") and self.degree % 2 == 0 else self.degree
        sizes = MeshConfig(context_outer=self.degree // inner, context_inner=inner)
        return make_mesh(sizes, jax.devices()[: self.degree])

    @property
    def placement(self) -> NamedSharding | None:
        """Of arrays `[B, T, ...]`."""
        return None if self.way is None else NamedSharding(self.mesh, PartitionSpec(None, CONTEXT_AXES))

    @functools.cached_property
    def order(self) -> np.ndarray:
        """Which token of the sequence lies where, of all rows: they hold the same documents."""
        whole, layout = self.whole, self.way.layout
        if not layout.is_of_rows:
            return layout.order(whole.length, self.degree)
        tokens = packed_tokens((whole.documents or (whole.length,),), whole.length)
        (order,), _ = balanced_order(whole.mask, tokens, layout, self.way.strategy, degree=self.degree)
        return order

    def place(self, x: jax.Array) -> jax.Array:
        """An array `[B, T, ...]` in the order of the sequence, as the devices hold it."""
        if self.way is None:
            return x
        if self.way.layout.name != "contiguous":
            x = permute(x, self.order)
        return jax.device_put(x, self.placement)

    def restore(self, x: jax.Array) -> jax.Array:
        """The inverse, on the first device."""
        if self.way is None:
            return x
        x = jax.device_put(x, jax.devices()[0])
        if self.way.layout.name == "contiguous":
            return x
        return unpermute(x, self.order)

    def tokens(self) -> Tokens:
        """As a model has them: positions start anew in every document, and are left out where they say nothing."""
        whole = self.whole
        if whole.documents is not None:
            tokens = packed_tokens((whole.documents,), whole.length)
        elif self.way is not None and self.way.layout.name != "contiguous":
            tokens = Tokens.self_attention(jnp.arange(whole.length, dtype=jnp.int32)[None], None)
        else:
            tokens = Tokens()
        return jax.tree.map(lambda x: self.place(jnp.asarray(x)), tokens)

    def schedule(self, tokens: Tokens) -> AnySchedule:
        build = functools.partial(
            sharded_schedule,
            self.whole.mask,
            batch_size=self.whole.batch_size,
            q_len=self.whole.length,
            kv_len=self.whole.length,
            sharding=self.sharding,
        )
        with self.scope():
            return jax.block_until_ready(jax.jit(build)(tokens))

    def lower(self, which: Pass, dtype: str, tokens: Tokens, schedule: AnySchedule) -> jax.stages.Lowered:
        def attend(q, k, v, tokens, schedule):
            return sharded_attention(
                q, k, v, mask=self.whole.mask, tokens=tokens, schedule=schedule, sharding=self.sharding
            )

        def forward(q, k, v, dout, tokens, schedule):
            return (attend(q, k, v, tokens, schedule),)

        def forward_and_backward(q, k, v, dout, tokens, schedule):
            out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, tokens, schedule), q, k, v)
            return out, *vjp(dout)

        program = forward if which == "forward" else forward_and_backward
        inputs = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.placement) for x in self.whole.shapes(dtype))
        with self.scope():
            return jax.jit(program).lower(*inputs, tokens, schedule)


@functools.cache
def _rows_of_case(
    case: ScalingCase,
    degrees: Sequence[int],
    ceiling: Ceiling,
    passes: Sequence[Pass],
    dtype: str,
    repetitions: int,
    progress: Callable[[str], None],
) -> Iterator[Row]:
    trials = [_Trial(whole=case.at(1), degree=1, way=None)]
    trials += [
        _Trial(whole=case.at(degree), degree=degree, way=way) for degree in degrees if degree > 1 for way in case.ways
    ]
    extras: dict[_Trial, tuple[Tokens, AnySchedule] | Exception] = {}
    for trial in trials:
        try:
            tokens = trial.tokens()
            extras[trial] = tokens, trial.schedule(tokens)
        except Exception as error:  # a row tells it, and the others go on
            extras[trial] = error
    ready = {trial: extra for trial, extra in extras.items() if not isinstance(extra, Exception)}
    kernels: dict[tuple[_Trial, Pass], tuple[str, ...]] = {}

    def lower(trial: _Trial, which: Pass, tokens: Tokens, schedule: AnySchedule) -> jax.stages.Lowered:
        with dispatch.record() as taken:
            lowered = trial.lower(which, dtype, tokens, schedule)
        kernels[trial, which] = tuple(dict.fromkeys(f"{op.removeprefix('blockwise_')} {name}" for op, name in taken))
        return lowered

    programs = {
        (trial, which): functools.partial(lower, trial, which, *extra)
        for trial, extra in ready.items()
        for which in passes
    }
    compiled = compile_all(programs, progress=progress)

    alone: dict[Pass, float] = {}
    whole = None
    for trial in trials:
        if trial.whole != whole:
            whole = trial.whole
            inputs = whole.inputs(dtype)
            check = Check.of(whole, *inputs)
        for which in passes:
            row = functools.partial(
                Row, case=case.name, which=which, implementation=trial.name, ours=True, devices=trial.degree
            )
            try:
                for outcome in (extras[trial], compiled.get((trial, which))):
                    if isinstance(outcome, Exception):
                        raise outcome
                program = compiled[trial, which]
                figures = _figures(trial, program, which, extras[trial], inputs, check, ceiling, repetitions)
            except Exception as error:  # as above; memory may not suffice
                yield row(problem=problem_of(error))
                continue
            if trial.way is None and "tflops" in figures:
                alone[which] = figures["tflops"]
            elif which in alone and "tflops" in figures:
                figures["one_device_share"] = figures["tflops"] / alone[which]
            yield row(**figures, kernels=kernels[trial, which])


def _figures(
    trial: _Trial,
    program: jax.stages.Compiled,
    which: Pass,
    extra: tuple[Tokens, AnySchedule],
    inputs: tuple[jax.Array, ...],
    check: Check,
    ceiling: Ceiling,
    repetitions: int,
) -> dict:
    """Fields of a row: the times, or only the problem of what is wrong."""
    *qkv, dout = map(trial.place, inputs)
    results = jax.block_until_ready(program(*qkv, trial.place(check.dout), *extra))
    problem = check.problem(tuple(map(trial.restore, results)))
    if problem is not None:
        return {"problem": f"wrong: {problem}"}
    del results
    timing = time_calls(
        lambda: program(*qkv, dout, *extra),
        repetitions=repetitions,
        max_calls=_MAX_CALLS_IN_FLIGHT.get(jax.default_backend(), 16),
    )
    flops_per_second = trial.whole.flops(which) / trial.degree / timing.median
    return {
        "median_ms": 1e3 * timing.median,
        "low_ms": 1e3 * timing.low,
        "high_ms": 1e3 * timing.high,
        "tflops": flops_per_second / 1e12,
        "ceiling_share": flops_per_second / ceiling.flops,
        "memory_bytes": memory_bytes(program),
    }


def _line(row: Row) -> str:
    outcome = row.problem or f"{row.median_ms:.3f} ms, {row.tflops:.3g} TFLOP/s a device"
    share = "" if row.one_device_share is None else f", {row.one_device_share:.0%} of one device"
    return f"{row.devices} x, {row.which}, {row.implementation}: {outcome}{share}"

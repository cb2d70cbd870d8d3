"""python -m benchmarks.train_floor CONFIG [a.b=c ...]: a training step's time line by line against its parts alone.

Each part of the step is timed by itself on the card, forward and backward, at the shapes that the step has, and
multiplied by how often the step has it; then the whole step. A card that was idle is faster for a moment than its limit
of power allows in a step, so each part runs a second before it is timed. The page that comes out is a Markdown table:

  matmuls      each projection of a layer, x W and its two gradients, and the loss's three
  attention    the op of each mixer on the documents at hand
  loss         what the fused loss takes beyond its matmuls
  elementwise  norms, rotary positions, silu(gate) * up, residual sums: what is read and written, one after the other
  the rest     embedding and its gradient, casts of parameters, sums of gradients over microbatches, optimizer

Matmuls and attention are the floor. What a step takes beyond the sum of all parts is recomputation (model.remat) and
what no part accounts for; where XLA fuses elementwise work into its neighbours it is below the sum.
"""

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.measure import Ceiling, Timing, time_calls
from benchmarks.train_step import TrainStep, measure_prepared, prepare
from longctx.fused_loss import fused_cross_entropy
from longctx.mixers.attention import AttentionConfig
from longctx.norms import RMSNorm
from longctx.rotary import apply_rotary
from pallas_kernels import Tokens, blockwise_attention, make_schedule
from pallas_kernels.compiling import compile_all
from train.state import float32

FLOOR = ("matmuls", "attention")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a step.

    Attributes:
      kind: The group of lines that it belongs to.
      name: The line.
      count: How often a step has it.
      function: What is timed; compiled by itself.
      arguments: Shapes of its arguments, or arrays.
      flops: Of one call, where it is matmuls.
      state: How many leading arguments are donated, and are what the call returns first.
    """

    kind: str
    name: str
    count: int
    function: Callable
    arguments: tuple
    flops: float | None = None
    state: int = 0


def differentiated(function: Callable) -> Callable:
    """A function of (arguments, cotangent) that returns the result and the gradients of the arguments."""

    def both(arguments, cotangent):
        result, vjp = jax.vjp(function, *arguments)
        return result, vjp(cotangent)

    return both


def parts_of(step: TrainStep) -> Iterator[Part]:
    """The parts of the step of a config.

    Raises: ValueError where a mixer is no softmax attention, whose parts are not known here.
    """
    model, training = step.parts.model, step.config.training
    for name, mixer in model.mixers.items():
        if not isinstance(mixer, AttentionConfig):
            raise ValueError(
                f"model.mixers.{name}: is of kind {mixer.kind!r}, wanted attention; its parts are not known"
            )
    microbatches, dtype = training.accumulate_steps, jnp.dtype(model.dtype)
    rows, length = training.batch_size // microbatches, step.config.data.seq_len
    tokens, layers = rows * length, microbatches * model.num_layers

    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    def matmul(name: str, count: int, in_dim: int, out_dim: int) -> Part:
        return Part(
            kind="matmuls",
            name=f"{name}, {in_dim} x {out_dim}",
            count=count,
            function=differentiated(jnp.matmul),
            arguments=((struct(tokens, in_dim), struct(in_dim, out_dim)), struct(tokens, out_dim)),
            flops=6.0 * tokens * in_dim * out_dim,
        )

    def elementwise(name: str, count: int, function: Callable, *arguments) -> Part:
        result = jax.eval_shape(function, *arguments)
        return Part(
            kind="elementwise", name=name, count=count, function=differentiated(function), arguments=(arguments, result)
        )

    x = struct(rows, length, model.dim)
    for name, mixer in model.mixers.items():
        heads, of_mixer = mixer.resolved(model.dim), microbatches * model.layers.count(name)
        q_dim, kv_dim = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
        if q_dim == kv_dim:
            yield matmul(f"{name}: q, k, v", 3 * of_mixer, model.dim, q_dim)
        else:
            yield matmul(f"{name}: q", of_mixer, model.dim, q_dim)
            yield matmul(f"{name}: k, v", 2 * of_mixer, model.dim, kv_dim)
        yield matmul(f"{name}: out", of_mixer, q_dim, model.dim)
        yield _attention(step, name, mixer, rows, of_mixer)
        q, kv = (struct(rows, length, n, heads.head_dim) for n in (heads.num_heads, heads.num_kv_heads))
        rotary = mixer.layer_options["rotary"]
        if rotary is not None:
            positions = jnp.arange(length, dtype=jnp.int32)[None]
            place = functools.partial(_rotated, positions=positions, rotary=rotary)
            yield elementwise(f"{name}: rotary positions", of_mixer, place, q, kv)
        if mixer.qk_norm:
            gain = struct(heads.head_dim, dtype=jnp.float32)
            yield elementwise(f"{name}: norm of q", of_mixer, _norm, q, gain)
            yield elementwise(f"{name}: norm of k", of_mixer, _norm, kv, gain)
    yield matmul("mlp: gate, up", 2 * layers, model.dim, model.mlp_dim)
    yield matmul("mlp: down", layers, model.mlp_dim, model.dim)
    hidden = struct(rows, length, model.mlp_dim)
    yield elementwise("mlp: silu(gate) * up", layers, lambda gate, up: jax.nn.silu(gate) * up, hidden, hidden)
    gain = struct(model.dim, dtype=jnp.float32)
    yield elementwise("norm of a layer's input, final norm", layers + microbatches, _norm_of_sum, gain, x)
    yield elementwise("residual sum and its norm", layers, _norm_of_sum, gain, x, x)
    yield elementwise("residual sums", layers, jnp.add, x, x)

    yield from _loss(step, x, microbatches)
    yield from _rest(step, x, microbatches)


def _norm(x, gain):
    return _norm_with(gain)(x)


def _norm_of_sum(gain, *summands):
    return _norm_with(gain).of_sum(*summands)


def _norm_with(gain) -> RMSNorm:
    return nnx.merge(nnx.split(nnx.eval_shape(lambda: RMSNorm(gain.shape[0])))[0], {"scale": gain})


def _rotated(q, k, *, positions, rotary):
    return apply_rotary(q, positions, rotary), apply_rotary(k, positions, rotary)


def _attention(step: TrainStep, name: str, mixer: AttentionConfig, rows: int, count: int) -> Part:
    """The op on the documents of a batch's first rows, with its schedule built outside."""
    heads, length, dtype = mixer.resolved(step.parts.model.dim), step.config.data.seq_len, step.parts.model.dtype
    positions, segment_ids = (step.batches[0][key][:rows] for key in ("positions", "segment_ids"))
    tokens = Tokens.self_attention(positions, segment_ids)
    schedule = make_schedule(mixer.mask, tokens, q_len=length, kv_len=length, block_sizes=mixer.block_sizes)

    def attend(q, k, v):
        return blockwise_attention(
            q, k, v, mask=mixer.mask, tokens=tokens, schedule=schedule, logits_soft_cap=mixer.logits_soft_cap,
            block_sizes=mixer.block_sizes, implementation=mixer.implementation, deterministic=mixer.deterministic,
        )  # fmt: skip

    q, kv = (
        jax.ShapeDtypeStruct((rows, length, n, heads.head_dim), dtype) for n in (heads.num_heads, heads.num_kv_heads)
    )
    flops = mixer.flops_by_part(step.parts.model.dim, step.document_lengths[0])["attention"]
    return Part(
        kind="attention",
        name=f"{name}: attention",
        count=count,
        function=differentiated(attend),
        arguments=((q, kv, kv), q),
        flops=3 * flops * rows / step.config.training.batch_size,
    )


def _loss(step: TrainStep, x: jax.ShapeDtypeStruct, microbatches: int) -> Iterator[Part]:
    model, training = step.parts.model, step.config.training
    table = jax.ShapeDtypeStruct((model.vocab_size, model.dim), model.param_dtype)
    targets = jnp.zeros(x.shape[:2], jnp.int32)
    num_tokens = math.prod(x.shape[:2])
    low = jax.ShapeDtypeStruct(table.shape, x.dtype)
    # A tile at a time, as the loss does: the logits of all tokens might not fit.
    tile = 4096 if num_tokens % 4096 == 0 else num_tokens
    some = jax.ShapeDtypeStruct((tile, model.dim), x.dtype)
    yield Part(
        kind="matmuls",
        name=f"loss, {model.dim} x {model.vocab_size}",
        count=microbatches * (num_tokens // tile),
        function=differentiated(lambda hidden, table: hidden @ table.T),
        arguments=((some, low), jax.ShapeDtypeStruct((tile, model.vocab_size), x.dtype)),
        flops=6.0 * tile * model.dim * model.vocab_size,
    )

    def loss(hidden, table):
        weights = jnp.ones(targets.shape, jnp.float32)
        return fused_cross_entropy(
            hidden,
            table,
            targets,
            weights,
            z_loss=training.z_loss,
            soft_cap=model.logits_soft_cap,
            tile=training.loss_tile,
        ).loss_sum

    yield Part(
        kind="loss",
        name="loss, fused",
        count=microbatches,
        function=jax.value_and_grad(loss, argnums=(0, 1)),
        arguments=(x, table),
        flops=6.0 * num_tokens * model.dim * model.vocab_size,
    )


def _rest(step: TrainStep, x: jax.ShapeDtypeStruct, microbatches: int) -> Iterator[Part]:
    model, abstract, optimizer = step.parts.model, step.parts.abstract, step.parts.optimizer
    tokens = step.batches[0]["tokens"][: x.shape[0]]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), abstract.params)
    gradients = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)

    def embed(table):
        return jnp.take(table, tokens, axis=0, mode="fill").astype(x.dtype)

    yield Part(
        kind="the rest",
        name="embedding",
        count=microbatches,
        function=differentiated(embed),
        arguments=((params["embedding"],), x),
    )
    if model.dtype != model.param_dtype:
        yield Part(
            kind="the rest",
            name="casts of parameters",
            count=microbatches,
            function=lambda params: jax.tree.map(lambda leaf: leaf.astype(model.dtype), params),
            arguments=(params,),
        )
    if microbatches > 1:
        yield Part(
            kind="the rest",
            name="sums of gradients",
            count=microbatches,
            function=lambda total, gradients: (jax.tree.map(jnp.add, total, gradients),),
            arguments=(gradients, gradients),
            state=1,
        )

    def update(params, opt_state, gradients):
        # As in train.step, without what decides whether a step counts.
        gradients = jax.tree.map(lambda g: g / optax.tree_utils.tree_norm(gradients), gradients)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradients, opt_state, float32(params))
        params = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), params, updates)
        return params, opt_state

    opt_state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), abstract.opt_state)
    yield Part(
        kind="the rest", name="optimizer", count=1, function=update, arguments=(params, opt_state, gradients), state=2
    )


def time_part(part: Part, compiled: jax.stages.Compiled, *, repetitions: int, warm_seconds: float) -> Timing:
    """Times it on random numbers."""
    timed = functools.partial(time_calls, repetitions=repetitions, warm_seconds=warm_seconds)
    arguments = jax.tree.map(_drawn, part.arguments, is_leaf=lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    if not part.state:
        return timed(functools.partial(compiled, *arguments))
    state, others = arguments[: part.state], arguments[part.state :]

    def call():
        nonlocal state
        state = compiled(*state, *others)[: part.state]
        return state

    return timed(call)


def _drawn(leaf):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return 0.1 * jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A part and the seconds of one call of it."""

    part: Part
    seconds: float

    @property
    def of_step(self) -> float:
        return self.part.count * self.seconds


def table(lines: Sequence[Line], step_seconds: float, ceiling: Ceiling) -> str:
    """Markdown: the parts by kind, their sums, and the step."""
    head = ("part", "calls", "ms alone", "TFLOP/s", "of ceiling", "ms a step", "% of step")
    shown = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]

    def row(*cells: str) -> None:
        shown.append("| " + " | ".join(cells) + " |")

    def share(seconds: float) -> tuple[str, str]:
        return f"{1e3 * seconds:.1f}", f"{100 * seconds / step_seconds:.1f}"

    sums: dict[str, float] = {}
    loss_matmuls = sum(
        line.of_step for line in lines if line.part.name.startswith("loss, ") and line.part.kind == "matmuls"
    )
    for line in lines:
        speed = ("", "")
        if line.part.flops is not None:
            flops = line.part.flops / line.seconds
            speed = f"{flops / 1e12:.0f}", f"{flops / ceiling.flops:.0%}"
        row(line.part.name, f"{line.part.count}", f"{1e3 * line.seconds:.3f}", *speed, *share(line.of_step))
        beyond = loss_matmuls if line.part.kind == "loss" else 0.0
        sums[line.part.kind] = sums.get(line.part.kind, 0.0) + line.of_step - beyond
    for kind, seconds in sums.items():
        beyond = " beyond its matmuls" if kind == "loss" else ""
        row(f"**{kind}**{beyond}", "", "", "", "", *share(seconds))
    floor, total = sum(sums.get(kind, 0.0) for kind in FLOOR), sum(sums.values())
    row("**floor**: matmuls and attention", "", "", "", "", *share(floor))
    row("all parts", "", "", "", "", *share(total))
    row("recomputed, and not accounted for", "", "", "", "", *share(step_seconds - total))
    row("**step**", "", "", "", "", *share(step_seconds))
    shown += ["", f"The step takes {step_seconds / floor:.3f} of its floor."]
    return "\n".join(shown)


def measure_floor(
    config_path: str,
    overrides: Sequence[str] = (),
    *,
    repetitions: int = 10,
    warm_seconds: float = 1.0,
    progress: Callable[[str], None] = print,
) -> str:
    """The page of a config's step: its parts and the step itself, timed.

    Args:
      warm_seconds: How long each part runs before it is timed.

    Raises: ValueError where the config is wrong, has more than one device, or a mixer whose parts are not known.
    """
    step = prepare(config_path, overrides, progress=progress)
    if step.mesh.size != 1:
        raise ValueError(f"mesh: has {step.mesh.size} devices, wanted 1; the parts are those of one device")
    with jax.set_mesh(step.mesh):
        parts = list(parts_of(step))
        programs = {
            number: functools.partial(
                jax.jit(part.function, donate_argnums=tuple(range(part.state))).lower, *part.arguments
            )
            for number, part in enumerate(parts)
        }
        compiled = compile_all(programs, progress=progress)
        lines = []
        for number, part in enumerate(parts):
            if isinstance(compiled[number], Exception):
                raise compiled[number]
            timing = time_part(part, compiled[number], repetitions=repetitions, warm_seconds=warm_seconds)
            lines.append(Line(part=part, seconds=timing.median))
            progress(f"{part.name}: {1e3 * timing.median:.3f} ms, {part.count} times")
    row, ceiling = measure_prepared(step, repetitions=repetitions, progress=progress)
    head = f"{row.case}, {step.mesh.devices.flat[0].device_kind}; {ceiling}"
    figures = ", ".join(f"{name} {value:,.1f}" for name, value in row.details.items())
    return f"{head}\n{figures}\n\n{table(lines, row.median_ms / 1e3, ceiling)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code, 2 where it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_floor", description=__doc__.splitlines()[0])
    parser.add_argument("config", metavar="CONFIG", help="of the run, on one device")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="config keys that differ from the file")
    parser.add_argument("--repetitions", type=int, default=10, help="measurements of each")
    parser.add_argument(
        "--warm", type=float, default=1.0, metavar="SECONDS", help="that each part runs before it is timed"
    )
    options = parser.parse_intermixed_args(arguments)
    say = functools.partial(print, file=sys.stderr, flush=True)
    try:
        if options.repetitions < 1 or options.warm < 0:
            raise ValueError(f"got --repetitions {options.repetitions} --warm {options.warm}, wanted >= 1 and >= 0")
        page = measure_floor(
            options.config,
            options.overrides,
            repetitions=options.repetitions,
            warm_seconds=options.warm,
            progress=say,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measures the loss over tiles of tokens against the loss of all logits and against its three matmuls alone."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Ceiling, memory_bytes, time_calls
from benchmarks.results import Row, problem_of
from longctx.fused_loss import default_tile, fused_cross_entropy
from longctx.losses import cross_entropy
from longctx.unembedding import logits_of
from pallas_kernels.compiling import compile_all

WHICH = "forward+backward"
NOTES = (
    "Cases: tokens x vocabulary, model dim. Timed are the loss and its gradients for bfloat16 hidden states and a "
    "float32 table, random and with a weight of 1 for each token. TFLOP/s count the three matmuls, 6 T V D. "
    "`tile N` is `longctx.fused_cross_entropy`, N tokens at a time; `plain` the loss of all logits, differentiated by "
    "JAX; `matmuls alone` the three products of a tile of the default size, on random operands; the ratio is to the "
    "faster of these two. What is timed has the "
    "loss and the gradients of the plain loss, to bfloat16 rounding.",
)
_TOLERANCE = 1e-2  # of the norm: what bfloat16 operands leave of a gradient; 2^-8 a product


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossCase:
    """Shapes of a loss; hashable."""

    num_tokens: int
    vocab_size: int
    dim: int
    tiles: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"T{self.num_tokens} V{self.vocab_size} D{self.dim}"

    @property
    def flops(self) -> float:
        return 6.0 * self.num_tokens * self.vocab_size * self.dim

    def inputs(self) -> tuple[jax.Array, ...]:
        """Hidden states, table, targets and weights."""
        keys = jax.random.split(jax.random.key(0), 3)
        tokens = (1, self.num_tokens)
        return (
            jax.random.normal(keys[0], (*tokens, self.dim), jnp.bfloat16),
            self.dim**-0.5 * jax.random.normal(keys[1], (self.vocab_size, self.dim)),
            jax.random.randint(keys[2], tokens, 0, self.vocab_size, jnp.int32),
            jnp.ones(tokens, jnp.float32),
        )


CASES = (
    LossCase(num_tokens=65536, vocab_size=32000, dim=2048, tiles=(1024, 2048, 4096, 8192)),
    LossCase(num_tokens=16384, vocab_size=128256, dim=2048, tiles=(1024, 2048, 4096, 8192)),
    LossCase(num_tokens=16384, vocab_size=128256, dim=4096, tiles=(1024, 2048, 4096)),
)
SMOKE = (LossCase(num_tokens=64, vocab_size=96, dim=16, tiles=(16, 64)),)


def measure_loss(
    cases: Sequence[LossCase],
    *,
    ceiling: Ceiling,
    repetitions: int = 20,
    progress: Callable[[str], None] = print,
) -> list[Row]:
    """A row for each case and way to compute it; what does not agree with the plain loss is not timed."""
    rows = []
    for case in cases:
        programs = dict(_programs(case))
        compiled = compile_all(
            {name: functools.partial(jax.jit(f).lower, *jax.eval_shape(case.inputs)) for name, f in programs.items()},
            progress=progress,
        )
        inputs = case.inputs()
        want = None
        for name, program in compiled.items():
            row = Row(case=case.name, which=WHICH, implementation=name, ours=name.startswith("longctx"))
            try:
                if isinstance(program, Exception):
                    raise program
                got = program(*inputs)
                if name == "plain":
                    want = jax.tree.map(np.asarray, got)
                problem = _problem(got, want) if row.ours and want is not None else None
                del got
                if problem is not None:
                    row = dataclasses.replace(row, problem=problem)
                else:
                    timing = time_calls(functools.partial(program, *inputs), repetitions=repetitions)
                    row = dataclasses.replace(
                        row,
                        median_ms=1e3 * timing.median,
                        low_ms=1e3 * timing.low,
                        high_ms=1e3 * timing.high,
                        tflops=case.flops / timing.median / 1e12,
                        ceiling_share=case.flops / timing.median / ceiling.flops,
                        memory_bytes=memory_bytes(program),
                    )
            except Exception as error:  # such as the plain loss for want of memory
                row = dataclasses.replace(row, problem=problem_of(error))
            progress(f"{case.name} {name}: {row.problem or f'{row.median_ms:.2f} ms, {row.ceiling_share:.1%}'}")
            rows.append(row)
    return rows


def _programs(case: LossCase) -> Iterator[tuple[str, Callable]]:
    """By name, of hidden states, table, targets and weights; the plain one first: the others are compared with it."""

    def of(loss) -> Callable:
        def program(hidden, table, targets, weights):
            return jax.value_and_grad(lambda hidden, table: loss(hidden, table, targets, weights).loss_sum, (0, 1))(
                hidden, table
            )

        return program

    def plain(hidden, table, targets, weights):
        return cross_entropy(logits_of(hidden, table), targets, weights)

    yield "plain", of(plain)
    for tile in case.tiles:
        yield f"longctx, tile {tile}", of(functools.partial(fused_cross_entropy, tile=tile))
    yield "matmuls alone", functools.partial(_matmuls, min(case.num_tokens, default_tile(case.vocab_size)))


def _matmuls(tile: int, hidden, table, targets, weights) -> Mapping[str, jax.Array]:
    """The products of the loss with a cotangent of the logits that has nothing to do with it."""
    table = table.astype(hidden.dtype)
    repeats = -(-table.shape[0] // hidden.shape[-1])
    dlogits = jnp.tile(hidden[0, :tile], (1, repeats))[:, : table.shape[0]]  # zeros would be faster than numbers

    def body(carry, hidden_CD):
        dtable, some = carry
        logits = jnp.einsum("cd,vd->cv", hidden_CD, table, preferred_element_type=jnp.float32)
        dtable = dtable + jnp.einsum("cv,cd->vd", dlogits, hidden_CD, preferred_element_type=jnp.float32)
        return (dtable, some + logits[0, 0]), jnp.einsum("cv,vd->cd", dlogits, table)

    start = jnp.zeros(table.shape, jnp.float32), jnp.float32(0)
    (dtable, some), dhidden = jax.lax.scan(body, start, hidden.reshape(-1, tile, hidden.shape[-1]))
    return {"some": some, "dhidden": dhidden, "dtable": dtable}


def _problem(got, want) -> str | None:
    names = ("loss", "gradient of hidden", "gradient of table")
    for name, x, y in zip(names, jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        error = float(np.linalg.norm((x - y).ravel()) / np.linalg.norm(y.ravel()))
        if not error <= _TOLERANCE:
            return f"wrong: {name} differs from the plain loss's by {error:.2g} of its norm"
    return None

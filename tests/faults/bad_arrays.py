"""Generated calls of the public ops and layers with shapes and dtypes that may not fit.

Each is refused with an error of the op's own, or its results and gradients are finite. An error from inside jax, or a
NaN, is a fault.
"""

import dataclasses
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import strategies as st

import longctx
import pallas_kernels
from pallas_kernels import sparse
from pallas_kernels.blockwise.api import blockwise_attention
from tests.faults.harness import Report, TooLong, for_each, time_limit

_OURS = tuple(Path(package.__file__).parent for package in (longctx, pallas_kernels))
_DTYPES = ("float32", "bfloat16", "float16", "float64", "int32", "bool", "complex64", "uint8")


@dataclasses.dataclass(frozen=True)
class Argument:
    """An array to be made: its shape, dtype and what its numbers are below, where they are ids."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    below: int | None = None

    def make(self, seed: int) -> jax.Array:
        rng = np.random.default_rng(seed)
        if self.below is not None:
            ids = rng.integers(0, self.below, self.shape)
            return jnp.asarray(np.sort(ids, axis=-1) if self.shape else ids, self.dtype)
        values = rng.standard_normal(self.shape)
        return jnp.asarray(values if self.dtype != "complex64" else values + 1j, self.dtype)


@dataclasses.dataclass(frozen=True)
class Call:
    """A public function, and arguments that fit it."""

    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Argument]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _layer(make: Callable[[nnx.Rngs], nnx.Module]) -> Callable[..., Any]:
    def call(*, x: jax.Array, **tokens: jax.Array) -> jax.Array:
        return make(nnx.Rngs(0))(x, **tokens)

    return call


def _calls() -> list[Call]:
    qkv = {"q": Argument((2, 8, 4, 8)), "k": Argument((2, 8, 2, 8)), "v": Argument((2, 8, 2, 8))}
    own = {name: Argument((2, 8, 4, 8)) for name in ("q", "k", "v")}
    x = {"x": Argument((2, 8, 16))}
    tokens = {"positions": Argument((2, 8), "int32", 8), "segment_ids": Argument((2, 8), "int32", 3)}
    documents = longctx.masks.causal() & longctx.masks.documents()
    layers: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
        "Attention": lambda rngs: longctx.Attention(16, num_heads=4, mask=documents, rngs=rngs),
        "LinearAttention": lambda rngs: longctx.LinearAttention(16, num_heads=4, rngs=rngs),
        "MobaAttention": lambda rngs: longctx.MobaAttention(16, num_heads=4, chunk_size=4, top_k=2, rngs=rngs),
        "RMSNorm": lambda rngs: longctx.RMSNorm(16),
        "SwiGLU": lambda rngs: longctx.SwiGLU(16, 32, rngs=rngs),
    }
    causal = {"mask": longctx.masks.causal()}
    return [
        Call("blockwise_attention", blockwise_attention, qkv, causal),
        Call("linear_attention", pallas_kernels.linear_attention, own),
        Call("moba_attention", sparse.moba_attention, qkv, {"chunk_size": 4, "top_k": 2}),
        Call(
            "cross_entropy",
            longctx.cross_entropy,
            {
                "logits_BTV": Argument((2, 8, 5)),
                "targets_BT": Argument((2, 8), "int32", 5),
                "weights_BT": Argument((2, 8)),
            },
        ),
        Call(
            "fused_cross_entropy",
            longctx.fused_cross_entropy,
            {
                "hidden_BTD": Argument((2, 8, 16)),
                "table_VD": Argument((5, 16)),
                "targets_BT": Argument((2, 8), "int32", 5),
                "weights_BT": Argument((2, 8)),
            },
        ),
        *(
            Call(name, _layer(make), x | ({} if name in ("RMSNorm", "SwiGLU") else tokens))
            for name, make in layers.items()
        ),
    ]


def _changed(argument: Argument) -> st.SearchStrategy[Argument]:
    """The argument with a dim of another size, one more, one fewer, two swapped, or another dtype."""
    shape = argument.shape
    place = st.integers(0, len(shape) - 1)

    def with_size(at: int, size: int) -> Argument:
        return dataclasses.replace(argument, shape=(*shape[:at], size, *shape[at + 1 :]))

    return st.one_of(
        st.builds(with_size, place, st.sampled_from([0, 1, 2, 3, 5, 16])),
        place.map(lambda at: dataclasses.replace(argument, shape=(*shape[:at], *shape[at + 1 :]))),
        place.map(lambda at: dataclasses.replace(argument, shape=(*shape[:at], 1, *shape[at:]))),
        st.permutations(shape).map(lambda other: dataclasses.replace(argument, shape=tuple(other))),
        st.sampled_from(_DTYPES).map(lambda dtype: dataclasses.replace(argument, dtype=dtype)),
        st.just(dataclasses.replace(argument, shape=())),
    )


def bad_calls() -> st.SearchStrategy[Call]:
    """Calls of which one or two arguments are changed."""

    def with_changes(call: Call) -> st.SearchStrategy[Call]:
        names = st.lists(st.sampled_from(sorted(call.arguments)), min_size=1, max_size=2, unique=True)
        return names.flatmap(
            lambda chosen: st.fixed_dictionaries({name: _changed(call.arguments[name]) for name in chosen}).map(
                lambda changes: dataclasses.replace(call, arguments=call.arguments | changes)
            )
        )

    return st.sampled_from(_calls()).flatmap(with_changes)


def check_arrays(folder: Path, count: int) -> Report:
    """Makes `count` generated calls, forward and backward."""
    report = Report("bad arrays")

    def check(call: Call) -> None:
        outcome, fault = _outcome(call)
        report.add(call.name, outcome, f"{fault}\n    {dict(call.arguments)}" if fault else None)

    for call in _calls():  # as they are they must compute, or nothing would be learned from what is refused
        outcome, fault = _outcome(call)
        report.add(call.name, outcome, fault or (None if outcome == "computed" else "refused as it is"))
    for_each(bad_calls(), count, check)
    return report


def _outcome(call: Call) -> tuple[str, str | None]:
    arrays = {name: argument.make(seed) for seed, (name, argument) in enumerate(call.arguments.items())}
    real = {name: array for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)}
    rest = {name: array for name, array in arrays.items() if name not in real}

    def total(real_arrays):
        found = [leaf for leaf in jax.tree.leaves(call.function(**real_arrays, **rest, **call.options))]
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in found)

    try:
        with time_limit(300):
            values = jax.tree.leaves(jax.jit(jax.value_and_grad(total))(real))
    except TooLong:
        return "computed", "hangs: no end after 300 s"
    except (ValueError, TypeError, NotImplementedError) as error:
        # Where it was raised: a public function must have refused what it cannot take before jax sees it.
        frames = traceback.extract_tb(error.__traceback__)
        ours = any(Path(frames[-1].filename).is_relative_to(package) for package in _OURS)
        return "refused", None if ours else f"{type(error).__name__} from {frames[-1].filename}: {str(error)[:200]}"
    except Exception as error:
        return "refused", f"{type(error).__name__}: {str(error)[:200]}"
    bad = [leaf.shape for leaf in values if not np.isfinite(np.asarray(leaf, np.float32)).all()]
    return "computed", f"results or gradients that are not finite, of shapes {bad}" if bad else None

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
    differentiable: bool = True
    """Whether gradients are asked for; the passes that gradients are made of have none."""


_CAUSAL = longctx.masks.causal()
_DOCUMENTS = _CAUSAL & longctx.masks.documents()
_NSA_SIZES = sparse.NsaSizes(compress_block=2, compress_stride=2, block_size=2, num_blocks=3, window=3)
_BLOCKS = pallas_kernels.BlockSizes(block_q=4, block_kv=2)

_Q, _KV = Argument((2, 8, 4, 8)), Argument((2, 8, 2, 8))
_LSE = Argument((2, 4, 8))
_QKV = {"q": _Q, "k": _KV, "v": _KV}
_RESULTS = {"out": _Q, "lse": _LSE, "dout": _Q, "dlse": _LSE}
_POSITIONS, _SEGMENT_IDS = Argument((2, 8), "int32", 8), Argument((2, 8), "int32", 3)
_CHOSEN = {"choices": Argument((2, 8, 2, 2), "int32", 4), "block_start": Argument((2, 4), "int32", 8)}


def _calls() -> list[Call]:
    return [*_blockwise_calls(), *_linear_calls(), *_sparse_calls(), *_layer_calls()]


def _and_lse(result: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """A result whose lse is finite: of a query that may attend to nothing it is -inf, as promised."""
    out, lse = result
    return out, jnp.where(jnp.isneginf(lse), jnp.float32(0), lse)


def _blockwise_calls() -> list[Call]:
    def forward(**arguments):
        return _and_lse(pallas_kernels.blockwise_attention_forward(**arguments, mask=_CAUSAL))

    def packed(positions, segment_ids, **arguments):
        tokens = pallas_kernels.Tokens(
            q_positions=positions, kv_positions=positions, q_segment_ids=segment_ids, kv_segment_ids=segment_ids
        )
        return blockwise_attention(**arguments, mask=_DOCUMENTS, tokens=tokens)

    def backward(**arguments):
        return pallas_kernels.blockwise_attention_backward(**arguments, mask=_CAUSAL)

    def merge(out, lse, other_out, other_lse):
        return pallas_kernels.merge_partials((out, lse), (other_out, other_lse))

    def dropped(seeds, **arguments):
        dropout = pallas_kernels.Dropout(rate=0.25, seeds=seeds)
        return blockwise_attention(**arguments, mask=_CAUSAL, dropout=dropout)

    def latent_forward(**arguments):
        return _and_lse(pallas_kernels.latent_attention_forward(**arguments, **latent))

    sinks = {"sinks": Argument((4,))}
    latent = {"value_dim": 5, "scale": 0.3, "mask": _CAUSAL}
    latents = {"q": _Q, "latent": Argument((2, 8, 8))}
    return [
        Call("blockwise_attention", blockwise_attention, _QKV | sinks, {"mask": _CAUSAL}),
        Call("blockwise_attention of documents", packed, _QKV | {"positions": _POSITIONS, "segment_ids": _SEGMENT_IDS}),
        Call("blockwise_attention_forward", forward, _QKV | sinks, differentiable=False),
        Call("blockwise_attention_backward", backward, _QKV | _RESULTS, differentiable=False),
        Call("blockwise_attention with dropout", dropped, _QKV | {"seeds": Argument((2, 4), "uint32", 99)}),
        Call("latent_attention", pallas_kernels.latent_attention, latents, latent),
        Call("latent_attention_forward", latent_forward, latents, differentiable=False),
        Call("merge_partials", merge, {"out": _Q, "lse": _LSE, "other_out": _Q, "other_lse": _LSE}),
        Call("sinks_gradient", pallas_kernels.sinks_gradient, sinks | _RESULTS, differentiable=False),
    ]


def _linear_calls() -> list[Call]:
    own = {"q": _KV, "k": _KV, "v": _Q}
    how = {"decay": Argument((2, 8, 4)), "beta": Argument((2, 8, 4)), "segment_ids": _SEGMENT_IDS}
    state = {"initial_state": Argument((2, 4, 8, 8))}

    def backward(dstate, **arguments):
        return pallas_kernels.linear_attention_backward(**arguments, dstate=dstate)

    return [
        Call("linear_attention", pallas_kernels.linear_attention, own | how | state, {"return_state": True}),
        Call("linear_attention, normalized", pallas_kernels.linear_attention, own, {"normalize": True}),
        Call("linear_attention_forward", pallas_kernels.linear_attention_forward, own | how | state, {}, False),
        Call(
            "linear_attention_backward", backward, own | how | state | {"dout": _Q, "dstate": state["initial_state"]},
            {}, False,
        ),
        Call(
            "linear_attention_states", pallas_kernels.linear_attention_states, {"k": _KV, "v": _Q} | how, {}, False,
        ),
        Call(
            "linear_attention_state_cotangents", pallas_kernels.linear_attention_state_cotangents,
            {"q": _KV, "dout": _Q, "k": _KV} | how, {}, False,
        ),
    ]  # fmt: skip


def _sparse_calls() -> list[Call]:
    sizes = _NSA_SIZES
    of_heads = (sparse.BlockMean(), sparse.BlockMean(), sparse.XAttention(stride=2), sparse.XAttention(stride=2))
    selectors = {
        "BlockMean": (sparse.BlockMean(heads="kv"), {"budget": 2}),
        "XAttention": (sparse.XAttention(stride=2), {"threshold": 0.9}),
        "VerticalSlash": (sparse.VerticalSlash(last_queries=4, vertical=2, slash=2), {"budget": 2}),
        "AShape": (sparse.AShape(local_blocks=2), {}),
        "PerHead": (sparse.PerHead(selectors=of_heads), {"budget": 2}),
    }
    qk = {"q": _Q, "k": _KV}

    def nsa(q, gates, segment_ids, **keys):
        branches = [sparse.BranchKeys(keys[f"{name}_k"], keys[f"{name}_v"]) for name in ("compressed", "own", "near")]
        return sparse.nsa_attention(q, *branches, gates, sizes=sizes, segment_ids=segment_ids)

    def selected(**arguments):
        return _and_lse(sparse.selected_attention(**arguments, block_size=2))

    def selected_forward(**arguments):
        return _and_lse(sparse.selected_attention_forward(**arguments, block_size=2))

    def select(selector, limits):
        def call(q, k):
            return selector.select(q, k, mask=_CAUSAL, block_sizes=_BLOCKS, **limits).blocks

        return call

    def recall(q, k):
        selection = sparse.BlockMean().select(q, k, mask=_CAUSAL, block_sizes=_BLOCKS, threshold=0.9)
        return sparse.attention_recall(q, k, selection, mask=_CAUSAL)

    def of_blocks(x, start):
        return sparse.tokens_of_blocks(x, start, sizes)

    def starts(segment_ids):
        return sparse.compressed_starts(segment_ids, 8, sizes)

    place = {"q_place": _POSITIONS}
    keys = {f"{name}_{kind}": _KV for name in ("own", "near") for kind in "kv"}
    keys |= {f"compressed_{kind}": Argument((2, sizes.num_compressed(8), 2, 8)) for kind in "kv"}
    return [
        Call("moba_attention", sparse.moba_attention, _QKV, {"chunk_size": 4, "top_k": 2}),
        Call("nsa_attention", nsa, {"q": _Q, "gates": Argument((2, 8, 4, 3)), "segment_ids": _SEGMENT_IDS} | keys),
        Call("selected_attention", selected, _QKV | _CHOSEN | place),
        Call("selected_attention_forward", selected_forward, _QKV | _CHOSEN | place, differentiable=False),
        Call(
            "selected_attention_backward", sparse.selected_attention_backward, _QKV | _CHOSEN | place | _RESULTS,
            {"block_size": 2}, False,
        ),
        Call("tokens_of_blocks", of_blocks, {"x": _KV, "start": Argument((2, 4), "int32", 7)}),
        Call("compressed_starts", starts, {"segment_ids": _SEGMENT_IDS}),
        *(Call(name, select(*how), qk, differentiable=False) for name, how in selectors.items()),
        Call("attention_recall", recall, qk, differentiable=False),
    ]  # fmt: skip


def _layer_calls() -> list[Call]:
    x = {"x": Argument((2, 8, 16))}
    tokens = {"positions": _POSITIONS, "segment_ids": _SEGMENT_IDS}
    mixers: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
        "Attention": lambda rngs: longctx.Attention(16, num_heads=4, mask=_DOCUMENTS, rngs=rngs),
        "LinearAttention": lambda rngs: longctx.LinearAttention(16, num_heads=4, rngs=rngs),
        "Mamba2": lambda rngs: longctx.Mamba2(16, num_heads=4, conv_size=3, rngs=rngs),
        "GatedLinearAttention": lambda rngs: longctx.GatedLinearAttention(16, num_heads=4, rngs=rngs),
        "DeltaNet": lambda rngs: longctx.DeltaNet(16, num_heads=4, rngs=rngs),
        "MlaAttention": lambda rngs: longctx.MlaAttention(
            16, num_heads=4, kv_rank=8, head_dim=4, rope_dim=4, value_dim=4, mask=_DOCUMENTS, rngs=rngs
        ),
        "MobaAttention": lambda rngs: longctx.MobaAttention(16, num_heads=4, chunk_size=4, top_k=2, rngs=rngs),
        "NsaAttention": lambda rngs: longctx.NsaAttention(16, num_heads=4, sizes=_NSA_SIZES, rngs=rngs),
    }
    others: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
        "RMSNorm": lambda rngs: longctx.RMSNorm(16),
        "SimpleRMSNorm": lambda rngs: longctx.SimpleRMSNorm(),
        "SwiGLU": lambda rngs: longctx.SwiGLU(16, 32, rngs=rngs),
    }
    model = longctx.ModelConfig(
        vocab_size=11, dim=16, num_layers=1, mlp_dim=16, pattern=("a",),
        mixers={"a": longctx.AttentionConfig(num_heads=4)}, dtype="float32",
    )  # fmt: skip

    def transformer(tokens, **rest):
        return longctx.TransformerLM(model, rngs=nnx.Rngs(0))(tokens, **rest)

    def rotary(x, positions):
        return longctx.apply_rotary(x, positions, longctx.RotaryConfig())

    # An id that the vocabulary lacks is promised a loss of NaN: those that a smaller one has too.
    targets = {"targets_BT": Argument((2, 8), "int32", 1), "weights_BT": Argument((2, 8))}
    losses = {"logits_BTV": Argument((2, 8, 5))} | targets
    hidden = {"hidden_BTD": Argument((2, 8, 16)), "table_VD": Argument((5, 16))}
    scored = hidden | {"targets_BT": targets["targets_BT"]}
    return [
        *(Call(name, _layer(make), x | tokens) for name, make in mixers.items()),
        *(Call(name, _layer(make), x) for name, make in others.items()),
        Call("TransformerLM", transformer, {"tokens": Argument((2, 8), "int32", 11)} | tokens, {}, False),
        Call("apply_rotary", rotary, {"x": _Q, "positions": _POSITIONS}),
        Call("cross_entropy", longctx.cross_entropy, losses),
        Call("fused_cross_entropy", longctx.fused_cross_entropy, hidden | targets),
        Call("token_scores", longctx.token_scores, scored, differentiable=False),
        Call("logits_of", longctx.logits_of, hidden),
    ]


def _layer(make: Callable[[nnx.Rngs], nnx.Module]) -> Callable[..., Any]:
    def call(*, x: jax.Array, **tokens: jax.Array) -> jax.Array:
        return make(nnx.Rngs(0))(x, **tokens)

    return call


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

    calls = _calls()
    # As they are they must compute, or nothing would be learned from what is refused; of a few cases, a few.
    for call in calls if count >= len(calls) else calls[:1]:
        outcome, fault = _outcome(call)
        report.add(call.name, outcome, fault or (None if outcome == "computed" else "refused as it is"))
    for_each(bad_calls(), count, check)
    return report


def _outcome(call: Call) -> tuple[str, str | None]:
    arrays = {name: argument.make(seed) for seed, (name, argument) in enumerate(call.arguments.items())}
    real = {name: array for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)}
    rest = {name: array for name, array in arrays.items() if name not in real}

    def total(real_arrays):
        found = jax.tree.leaves(call.function(**real_arrays, **rest, **call.options))
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in found)

    compute = jax.value_and_grad(total) if call.differentiable and real else total
    try:
        with time_limit(300):
            values = jax.tree.leaves(jax.jit(compute)(real))
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

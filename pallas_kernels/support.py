"""What each implementation serves, found out by asking it: the tables in the README.

`python -m pallas_kernels.support README.md` writes the tables between the markers of a file. Every cell is a call
that was traced, so the tables cannot promise what dispatch would refuse.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, markdown
from pallas_kernels.bias import Alibi
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.blockwise import api
from pallas_kernels.dropout import Dropout
from pallas_kernels.linear import api as linear
from pallas_kernels.mask import Causal, Full, PerHead, Prefix, SameDocument, Window
from pallas_kernels.mask_grids import Neighborhood
from pallas_kernels.mask_patterns import Chunked, Strided
from pallas_kernels.online_softmax import SoftmaxCarry
from pallas_kernels.testing import H100, V5P, tracing_for
from pallas_kernels.tokens import Tokens


def _call(
    *,
    q_len: int = 256,
    kv_len: int = 256,
    num_kv_heads: int = 4,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: str = "bfloat16",
    tokens: bool = False,
    **options,
) -> tuple[tuple[jax.ShapeDtypeStruct, ...], dict]:
    """Shapes of q, k, v, and the options of one call."""
    shapes = (
        (2, q_len, 4, head_dim),
        (2, kv_len, num_kv_heads, head_dim),
        (2, kv_len, num_kv_heads, value_dim or head_dim),
    )
    if tokens:
        options["tokens"] = Tokens.self_attention(*(jnp.zeros((2, q_len), jnp.int32),) * 2)
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), {"mask": Causal()} | options


# Where an implementation is asked, if not on the machine at hand.
_DEVICES = {"mosaic_gpu": H100, "mosaic_tpu": V5P, "cudnn": H100}

FEATURES = {
    "causal": _call(),
    "full": _call(mask=Full()),
    "sliding window": _call(mask=Causal() & Window(left=63)),
    "packed documents": _call(mask=Causal() & SameDocument(), tokens=True),
    "prefix LM, and any `&`, `\\|`, `~` of masks": _call(mask=(Causal() | Prefix(9)) & ~Window(left=3)),
    "strided, chunked, neighborhood and other sparse masks": _call(
        mask=Causal() & (Strided(8) | Chunked(64)) | Neighborhood((16, 16), (2, 2))
    ),
    "masks that differ between heads": _call(mask=PerHead((Causal(), Full()))),
    "positions in any order (striped, zigzag)": _call(tokens=True),
    "grouped and multi-query heads": _call(num_kv_heads=1),
    "T != S, any lengths": _call(q_len=37, kv_len=1001),
    "head dim 128": _call(head_dim=128),
    "head dim 256": _call(head_dim=256),
    "any head dim up to 256": _call(head_dim=37),
    "values of another head dim": _call(value_dim=128),
    "q and k of head dim 192, values of 128": _call(head_dim=192, value_dim=128),
    "float16": _call(dtype="float16"),
    "float32": _call(dtype="float32"),
    "gradient through the lse": _call(return_lse=True),
    "logit soft cap": _call(logits_soft_cap=30.0),
    "learned sinks": _call(sinks=jnp.zeros(4)),
    "additive bias": _call(bias=Alibi.geometric(4)),
    "maxima of blocks of logits": _call(block_maxima=BlockSizes(block_q=128, block_kv=128)),
    "tiles left out below a softmax threshold": _call(skip_softmax_threshold=1e-3),
    "attention dropout": _call(dropout=Dropout(rate=0.1, seeds=jnp.zeros((2, 4), jnp.uint32))),
}


def _serves(implementation: str, op: Callable, arguments: tuple) -> bool:
    with _device_in_scope(implementation):
        try:
            jax.eval_shape(op, *arguments)
        except NotImplementedError:
            return False
    return True


def _device_in_scope(implementation: str) -> AbstractContextManager:
    """The device that the implementation is for, as dispatch reads it."""
    device = _DEVICES.get(implementation)
    return nullcontext() if device is None else tracing_for(device)


def _gradient(attend: Callable) -> Callable:
    def run(*arguments):
        results, vjp = jax.vjp(attend, *arguments)
        return vjp(results)

    return run


def _carry_and_accumulate(implementation: str) -> str:
    (q, k, v), options = _call()
    carry = jax.eval_shape(lambda: SoftmaxCarry.empty(batch_size=2, q_len=256, num_heads=4, value_dim=64))
    float32 = tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, k, v))

    def forward(q, k, v, carry):
        return api.blockwise_attention_forward(
            q, k, v, carry=carry, return_carry=True, implementation=implementation, **options
        )

    def serves_gradient(deterministic: bool) -> bool:
        def backward(q, k, v, lse, accumulate):
            return api.blockwise_attention_backward(
                q, k, v, q, lse, q, None, accumulate=accumulate, implementation=implementation,
                deterministic=deterministic, **options,
            )  # fmt: skip

        return _serves(implementation, backward, (q, k, v, carry.max, float32))

    return _cell(_serves(implementation, forward, (q, k, v, carry)), serves_gradient)


def _cell(forward: bool, serves_gradient: Callable[[bool], bool]) -> str:
    """What is served, given whether the forward pass is; the gradient is asked for with `deterministic`."""
    if not forward:
        return "-"
    if serves_gradient(True):
        return "forward, gradient"
    return "forward, gradient in any order" if serves_gradient(False) else "forward"


def _head(title: str, names: Sequence[str]) -> list[list[str]]:
    """The first rows of a family's table: its implementations, and where each is taken by default."""
    taken = {
        name: [platform for platform, order in dispatch.PREFERENCE.items() if name in order] or ["only when named"]
        for name in names
    }
    return [
        [title, *(f"`{name}`" for name in names)],
        ["taken by default on", *(", ".join(taken[name]) for name in names)],
    ]


def table() -> str:
    """The support table of blockwise attention, as Markdown."""
    names = [name for name in dispatch.IMPLEMENTATIONS if name in api.FORWARD]
    rows = _head("blockwise attention", names)
    for feature, (qkv, options) in FEATURES.items():
        cells = []
        for name in names:

            def attend(q, k, v, *, name=name, options=options, deterministic=True):
                return api.blockwise_attention(q, k, v, implementation=name, deterministic=deterministic, **options)

            def serves_gradient(deterministic: bool, *, name=name, qkv=qkv, attend=attend) -> bool:
                return _serves(name, _gradient(functools.partial(attend, deterministic=deterministic)), qkv)

            cells.append(_cell(_serves(name, attend, qkv), serves_gradient))
        rows.append([feature, *cells])
    rows.append(["carry in and out, accumulate (for rings)", *map(_carry_and_accumulate, names)])
    return markdown.table(rows)


def _linear_call(
    *,
    decay: tuple[int, ...] | None = None,
    beta: bool = False,
    initial_state: bool = False,
    num_heads: int = 4,
    length: int = 256,
    head_dim: int = 128,
    value_dim: int | None = None,
    dtype: str = "bfloat16",
    documents: bool = False,
    **options,
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict]:
    """Shapes of what one call of linear attention is differentiated in, and its options."""
    value_dim = value_dim or head_dim
    operands = {name: jax.ShapeDtypeStruct((2, length, 4, head_dim), dtype) for name in ("q", "k")}
    operands["v"] = jax.ShapeDtypeStruct((2, length, num_heads, value_dim), dtype)
    if decay is not None:
        operands["decay"] = jax.ShapeDtypeStruct(decay, jnp.float32)
    if beta:
        operands["beta"] = jax.ShapeDtypeStruct((2, length, num_heads), jnp.float32)
    if initial_state:
        operands["initial_state"] = jax.ShapeDtypeStruct((2, num_heads, head_dim, value_dim), jnp.float32)
    if documents:
        options["segment_ids"] = jnp.zeros((2, length), jnp.int32)
    return operands, options


_PER_TOKEN, _PER_DIM = (2, 256, 4), (2, 256, 4, 128)

LINEAR_FEATURES = {
    "no decay": _linear_call(),
    "a decay for each head (retention, Lightning Attention)": _linear_call(decay=(4,)),
    "a decay for each token (simple GLA, Mamba-2)": _linear_call(decay=_PER_TOKEN),
    "a decay for each dim of the keys (GLA)": _linear_call(decay=_PER_DIM),
    "delta rule": _linear_call(beta=True),
    "gated delta rule, a decay for each token": _linear_call(beta=True, decay=_PER_TOKEN),
    "gated delta rule, a decay for each dim of the keys": _linear_call(beta=True, decay=_PER_DIM),
    "packed documents": _linear_call(decay=_PER_TOKEN, documents=True),
    "state in and out": _linear_call(decay=_PER_TOKEN, initial_state=True, return_state=True),
    "heads that share queries and keys (Mamba-2)": _linear_call(num_heads=8),
    "any length": _linear_call(decay=(2, 37, 4), length=37),
    "head dim 64": _linear_call(head_dim=64),
    "any head dim": _linear_call(head_dim=37),
    "values of another head dim": _linear_call(head_dim=64, value_dim=128),
    "float16": _linear_call(dtype="float16"),
    "float32": _linear_call(dtype="float32"),
    "divided by the sum of the weights": _linear_call(normalize=True),
    "both directions": _linear_call(bidirectional=True, decay=_PER_TOKEN),
}


def _states_and_cotangents(implementation: str) -> str:
    operands, _ = _linear_call(decay=_PER_TOKEN)
    arguments = tuple(operands[name] for name in ("k", "v", "decay"))

    def states(k, v, decay):
        return linear.linear_attention_states(k, v, decay=decay, implementation=implementation)

    def cotangents(q, dout, decay):
        return linear.linear_attention_state_cotangents(q, dout, decay=decay, implementation=implementation)

    if not _serves(implementation, states, arguments):
        return "-"
    return "forward, gradient" if _serves(implementation, cotangents, arguments) else "forward"


def linear_table() -> str:
    """The support table of linear attention, as Markdown."""
    names = [name for name in dispatch.IMPLEMENTATIONS if name in linear.FORWARD]
    rows = _head("linear attention", names)
    for feature, (operands, options) in LINEAR_FEATURES.items():
        cells = []
        for name in names:

            def attend(operands, *, name=name, options=options):
                return linear.linear_attention(**operands, implementation=name, **options)

            # A gradient takes the forward pass with it.
            if _serves(name, _gradient(attend), (operands,)):
                cells.append("forward, gradient")
            else:
                cells.append("forward" if _serves(name, attend, (operands,)) else "-")
        rows.append([feature, *cells])
    rows.append(["states of runs (for context parallelism)", *map(_states_and_cotangents, names)])
    return markdown.table(rows)


def with_table(text: str) -> str:
    """`text` with the tables between its markers."""
    return markdown.between_markers(text, "support table", [table(), "", linear_table()])


def main() -> None:
    """Rewrites the tables in the file named on the command line."""
    markdown.rewrite(Path(sys.argv[1]), with_table)


if __name__ == "__main__":
    main()

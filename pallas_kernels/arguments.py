"""What the ops of every family ask of their arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_DTYPES = ("bfloat16", "float16", "float32")


def check_qkv(op: str, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises ValueError, naming the argument, unless these are of four dims, none of them 0, and of one dtype, which is
    one that ops take."""
    check_heads(op, {"q": q, "k": k, "v": v})


def check_heads(op: str, arrays: Mapping[str, jax.Array]) -> None:
    """`check_qkv` of arrays by any names."""
    for name, x in arrays.items():
        if x.ndim != 4:
            raise ValueError(f"{op}: {name} has shape {x.shape}, wanted [batch, length, heads, head dim]")
        if x.dtype.name not in _DTYPES:
            raise ValueError(f"{op}: {name} is {x.dtype}, wanted one of {_DTYPES}")
        if 0 in x.shape:
            raise ValueError(f"{op}: {name} has shape {x.shape}, wanted no dimension of 0")
    dtypes = [x.dtype for x in arrays.values()]
    if len(set(dtypes)) > 1:
        rest = "two" if len(arrays) > 2 else "one"
        raise ValueError(
            f"{op}: {', '.join(arrays)} are {', '.join(map(str, dtypes))}, wanted one dtype; cast {rest} of them"
        )


def check_kind(op: str, name: str, value: Any, kind: type, *, optional: bool = True) -> None:
    """Raises ValueError, naming the argument, unless the value is of this class; None is too where it is optional."""
    if not (isinstance(value, kind) or (optional and value is None)):
        raise ValueError(f"{op}: {name}={value!r}, wanted {'None or ' if optional else ''}a {kind.__name__}")


def check_results(
    op: str,
    shape: tuple[int, int, int, int],
    *,
    out: Mapping[str, jax.Array | None],
    lse: Mapping[str, jax.Array | None],
) -> None:
    """Raises ValueError, naming the argument, unless attention's results, or their cotangents, are of one call.

    Args:
      op: What to call the op.
      shape: `[B, T, N, V]` of out.
      out: Arrays of this shape by their names; None passes.
      lse: Float32 arrays `[B, N, T]` by their names; None passes.
    """
    B, T, N, _ = shape
    for name, x in out.items():
        if x is not None and (x.shape != shape or x.dtype.name not in _DTYPES):
            raise ValueError(f"{op}: {name} is {x.dtype}{list(x.shape)}, wanted one of {_DTYPES}, {list(shape)}")
    for name, x in lse.items():
        if x is not None and (x.shape != (B, N, T) or x.dtype != jnp.float32):
            raise ValueError(f"{op}: {name} is {x.dtype}{list(x.shape)}, wanted float32{[B, N, T]}")

"""What the ops of every family ask of q, k and v."""

import jax

_DTYPES = ("bfloat16", "float16", "float32")


def check_qkv(op: str, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises ValueError, naming the argument, unless these are of four dims, none of them 0, and of one dtype, which is
    one that ops take."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{op}: {name} has shape {x.shape}, wanted [batch, length, heads, head dim]")
        if x.dtype.name not in _DTYPES:
            raise ValueError(f"{op}: {name} is {x.dtype}, wanted one of {_DTYPES}")
        if 0 in x.shape:
            raise ValueError(f"{op}: {name} has shape {x.shape}, wanted no dimension of 0")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{op}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, wanted one dtype; cast two of them")

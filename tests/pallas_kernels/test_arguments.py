"""What ops ask of their arrays; `python -m tests.faults arrays` asks the ops, where no type checker guards them."""

import re

import jax.numpy as jnp
import pytest

from pallas_kernels.arguments import check_heads, check_results

FITS = {"q": jnp.zeros((2, 8, 4, 16)), "k": jnp.zeros((2, 8, 2, 16))}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": jnp.zeros((2, 8, 16))}, "op: k has shape (2, 8, 16), wanted [batch, length, heads, head dim]"),
        ({"q": jnp.zeros((0, 8, 4, 16))}, "op: q has shape (0, 8, 4, 16), wanted no dimension of 0"),
        (
            {"q": jnp.zeros((2, 8, 4, 16), jnp.int32)},
            "op: q is int32, wanted one of ('bfloat16', 'float16', 'float32')",
        ),
        (
            {"k": jnp.zeros((2, 8, 2, 16), jnp.bfloat16)},
            "op: q, k are float32, bfloat16, wanted one dtype; cast one of",
        ),
    ],
)
def test_heads_that_do_not_fit(changed, message):
    check_heads("op", FITS)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_heads("op", FITS | changed)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("dout", jnp.zeros((2, 5, 4, 16)), "op: dout is float32[2, 5, 4, 16], wanted one of"),
        ("dout", jnp.zeros((2, 8, 4, 16), jnp.int32), "op: dout is int32[2, 8, 4, 16], wanted one of"),
        ("dlse", jnp.zeros((2, 8, 4)), "op: dlse is float32[2, 8, 4], wanted float32[2, 4, 8]"),
        ("dlse", jnp.zeros((2, 4, 8), jnp.bfloat16), "op: dlse is bfloat16[2, 4, 8], wanted float32[2, 4, 8]"),
    ],
)
def test_results_that_do_not_fit(name, array, message):
    out = {"out": None, "dout": jnp.zeros((2, 8, 4, 16), jnp.bfloat16)}
    lse = {"lse": jnp.zeros((2, 4, 8)), "dlse": None}
    check_results("op", (2, 8, 4, 16), out=out, lse=lse)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_results(
            "op", (2, 8, 4, 16), out=out | ({name: array} if name in out else {}),
            lse=lse | ({name: array} if name in lse else {}),
        )  # fmt: skip

"""Maximum and sum of exponentials of rows: by the kernel in JAX's interpreter, lowered for CUDA, and on a card."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.mosaic_gpu import interpreter
from pallas_kernels.softmax_statistics import by_pieces, softmax_statistics
from pallas_kernels.testing import H100, tracing_for


def rows(shape):
    """Of very different sizes, so that sums around another maximum would vanish or overflow."""
    scale = 10.0 ** jnp.linspace(-2, 3, shape[0])[:, None]
    return scale * jax.random.normal(jax.random.key(0), shape, jnp.float32)


def check(got, x):
    x = np.asarray(x, np.float64)
    greatest = x.max(axis=1)
    np.testing.assert_array_equal(got[0], greatest)
    np.testing.assert_allclose(got[1], np.exp(x - greatest[:, None]).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    "shape", [(24, 1024), *(pytest.param(x, marks=pytest.mark.slow) for x in ((64, 128), (1, 8192)))]
)
def test_pieces_are_put_together(shape):
    """One tile of pieces; fewer tiles than slots; a row of several tiles."""
    check(by_pieces(rows(shape), interpret=interpreter()), rows(shape))


@pytest.mark.parametrize("shape", [(1, 1), (3, 257)])
def test_xla_takes_any_rows(shape):
    with dispatch.record() as taken:
        check(softmax_statistics(rows(shape)), rows(shape))
    assert taken == [("softmax_statistics", "xla")]


@pytest.mark.parametrize(
    ("vocab_size", "implementation"), [(32768, "mosaic_gpu"), (128256, "mosaic_gpu"), (257, "xla")]
)
def test_hopper_takes_the_kernel_where_rows_can_be_cut(vocab_size, implementation):
    with tracing_for(H100), dispatch.record() as taken:
        traced = jax.jit(softmax_statistics).trace(jax.ShapeDtypeStruct((4096, vocab_size), jnp.float32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert taken == [("softmax_statistics", implementation)]
    assert ("mosaic_gpu_v2" in text) == (implementation == "mosaic_gpu")


def test_refusals():
    with pytest.raises(ValueError, match=re.escape("x is bfloat16[2, 3], wanted float32 [rows, columns], none of 0")):
        softmax_statistics(jnp.zeros((2, 3), jnp.bfloat16))
    uneven = jnp.zeros((4, 100))
    with (
        tracing_for(H100),
        pytest.raises(NotImplementedError, match=re.escape("x has shape [4, 100], it takes columns")),
    ):
        softmax_statistics(uneven, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="it needs an NVIDIA Hopper GPU"):
        softmax_statistics(jnp.zeros((64, 128)), implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 32768), (512, 128256), (1, 8192), (64, 128)])
def test_on_a_card(shape):
    check(softmax_statistics(rows(shape), implementation="mosaic_gpu"), rows(shape))

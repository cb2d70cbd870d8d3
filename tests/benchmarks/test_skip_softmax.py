"""The benchmark of the softmax threshold: what it says of tiles, and that it runs."""

import argparse

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.skip_softmax import measure, share_left_out


def test_share_of_tiles_left_out():
    """Six tiles, of which two come second, and of these one is far below the first in all rows."""
    maxima = np.stack([np.zeros(256), np.where(np.arange(256) < 128, -np.inf, -20.0)], axis=1)
    maxima[200, 1] = -1.0
    assert share_left_out(jnp.asarray(maxima, jnp.float32)[None, None], 1e-3) == pytest.approx(1 / 6)


@pytest.mark.slow
def test_runs_on_a_small_case():
    args = {"length": 256, "heads": 2, "head_dim": 16, "threshold": 1e-3, "repetitions": 5, "implementation": "xla"}
    result = measure(argparse.Namespace(**args))
    assert set(result["data"]) == {"random", "local", "sink"}
    assert all(data["lost_probability"] <= 256 * 1e-3 for data in result["data"].values())

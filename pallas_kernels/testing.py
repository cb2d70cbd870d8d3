"""Comparing an implementation with its reference: the tolerance table, the assertion that uses it, and what a family
hands to the conformance suite; tracing for a device that is not there."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np

from pallas_kernels.tokens import PADDING_SEGMENT_ID, Tokens

# By dtype of the inputs: the error's root mean square over the reference's, and its maximum over the reference's
# greatest magnitude. An implementation multiplies and stores in the input dtype and accumulates in float32, the
# reference does everything in float32; the table is that difference, measured, with a factor of about 3.
TOLERANCE = {
    "float32": (1e-6, 4e-6),
    "bfloat16": (1e-2, 2e-2),
    "float16": (1.5e-3, 3e-3),
}


def relative_errors(name: str, got, want) -> tuple[float, float]:
    """The error of `got`: its root mean square and its maximum, over those of the float32 reference `want`.

    Raises: AssertionError where the shapes differ, where `got` is not the same infinity as `want`, and where it is not
      finite elsewhere.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, wanted {want.shape}"
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=f"{name}: where the reference is infinite")
    error, want = got[finite] - want[finite], want[finite]
    assert np.isfinite(error).all(), f"{name}: {np.size(error) - np.isfinite(error).sum()} values are not finite"
    if not error.any():
        return 0.0, 0.0
    with np.errstate(divide="ignore"):  # any error is infinite where the reference is zero throughout
        rms = np.sqrt(np.mean(error**2)) / np.sqrt(np.mean(want**2))
        return float(rms), float(np.max(np.abs(error)) / np.max(np.abs(want)))


def assert_close(name: str, got, want, dtype: str, *, factor: float = 1.0) -> None:
    """Asserts that `got` agrees with the float32 reference `want` within `factor` of the table's tolerance for `dtype`.

    Where `want` is infinite `got` must be the same infinity; nan never passes.
    """
    rms_error, max_error = relative_errors(name, got, want)
    rms_tolerance, max_tolerance = (factor * x for x in TOLERANCE[dtype])
    assert rms_error <= rms_tolerance, f"{name}: rms error {rms_error:.3g} of the rms, wanted <= {rms_tolerance}"
    assert max_error <= max_tolerance, f"{name}: max error {max_error:.3g} of the greatest, wanted <= {max_tolerance}"


H100 = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
V5P = jax.sharding.AbstractDevice(device_kind="TPU v5p", num_cores=2, platform="tpu")


def tracing_for(device: jax.sharding.AbstractDevice) -> AbstractContextManager:
    """A scope in which dispatch takes what serves this device, which need not be there."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("device",), abstract_device=device))


def packed_tokens(rows: tuple[tuple[int, ...], ...], length: int) -> Tokens:
    """Tokens of self-attention over rows of packed documents, given each row's document lengths.

    Positions restart in every document; what a row does not fill is padding.
    """
    positions = np.zeros((len(rows), length), np.int32)
    segment_ids = np.full((len(rows), length), PADDING_SEGMENT_ID, np.int32)
    for row, lengths in enumerate(rows):
        if sum(lengths) > length:
            raise ValueError(f"packed_tokens: documents {lengths} hold {sum(lengths)} tokens, wanted <= {length}")
        start = 0
        for segment, document_length in enumerate(lengths):
            positions[row, start : start + document_length] = np.arange(document_length)
            segment_ids[row, start : start + document_length] = segment
            start += document_length
    return Tokens.self_attention(positions, segment_ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One case by one implementation, with inputs of one dtype."""

    case: Any
    implementation: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.case.name}-{self.implementation}-{self.dtype}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """One way to call a family's ops.

    Attributes:
      function: Given a case and an implementation, a function of the case's inputs, a dict, that returns results by
        name.
      ops: The ops that it goes through.
      absent: The inputs that it leaves out: cotangents, which are zero for the truth.
      left_to_others: Pairs of an op and an implementation that it may also go through, whichever is named.
    """

    function: Callable[[Any, str | None], Callable[[dict], dict]]
    ops: frozenset[str]
    absent: frozenset[str] = frozenset()
    left_to_others: frozenset[tuple[str, str]] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serves:
    """What an implementation must serve; it must refuse the rest.

    Attributes:
      cases: Their names.
      dtypes: Dtypes of the inputs.
      ways: Names of ways to call the ops.
    """

    cases: frozenset[str]
    dtypes: frozenset[str]
    ways: frozenset[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What the conformance suite runs of a family.

    Attributes:
      cases: Each has a name, says all that it is in its repr, and makes inputs: `inputs(dtype)`, a dict of arrays.
      truth: Given a case, a function of its inputs in float32 that returns every result by name.
      ways: Ways to call the ops, by name.
      ways_of: The ways that a case is run in: of each group the first that the implementation does not refuse.
      serves: What each implementation must serve.
      trials: The trials on a platform, "cpu", "gpu" or "tpu".
      precise: Results that bfloat16 inputs give as precisely as float16 ones.
      cancelling: Sums over all pairs, whose terms cancel: up to three times the table's tolerance.
    """

    name: str
    cases: tuple[Any, ...]
    truth: Callable[[Any], Callable[[dict], dict]]
    ways: Mapping[str, Way]
    ways_of: Callable[[Any], tuple[tuple[str, ...], ...]]
    serves: Mapping[str, Serves]
    trials: Callable[[str], tuple[Trial, ...]]
    precise: frozenset[str] = frozenset()
    cancelling: frozenset[str] = frozenset()

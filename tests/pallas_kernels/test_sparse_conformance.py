"""Every implementation of the sparse family, in every case, against the float32 formula over the whole matrix.

The cases, the ways to call the ops and what each implementation must serve are in pallas_kernels/sparse/cases.py and
suite.py; `python -m pallas_kernels.conformance --family sparse` runs the same trials without pytest.
"""

import pytest

from pallas_kernels import conformance
from pallas_kernels.sparse import nsa_selected
from pallas_kernels.sparse.suite import FAMILY


def parameters(platform: str, *marks):
    return [pytest.param(trial, id=str(trial), marks=marks) for trial in FAMILY.trials(platform)]


# The quick suite has tests of the ops; what differs here are the cases.
@pytest.mark.parametrize("trial", parameters("cpu", pytest.mark.slow))
def test_equals_the_formula(trial):
    (outcome,) = conformance.run(FAMILY, [trial])
    assert outcome.verdict == "ok", outcome


@pytest.mark.gpu
@pytest.mark.parametrize("trial", parameters("gpu"))
def test_equals_the_formula_or_refuses_on_a_gpu(trial):
    (outcome,) = conformance.run(FAMILY, [trial])
    assert not outcome.problems, outcome


def test_every_implementation_has_promises():
    assert set(FAMILY.serves) == set(nsa_selected.FORWARD) == set(nsa_selected.BACKWARD)

"""Compile time is most of what the tests of this folder cost."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def always_compile_quickly(compile_quickly):
    """Applies to every module of the folder."""

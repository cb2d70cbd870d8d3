"""Every test runs on eight virtual CPU devices, with strict dtype promotion and checked shape annotations.

`pytest -m gpu` runs the tests that need a GPU on the machine's own devices instead.
"""

import os
from pathlib import Path

# The delta rule's triangular systems are small: where other processes are at work, LAPACK's threads wait for each other
# hundreds of times as long as they compute. Read when SciPy is imported, which JAX does.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# No test is to find what an earlier one, or the user, compiled; none is empty.
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")

ROOT = Path(__file__).parents[1]


def modules_with_shapes() -> list[str]:
    """Those that annotate arrays with their shapes; to check the types of all others would take a fifth of the time."""
    paths = (path for package in ("pallas_kernels", "longctx") for path in (ROOT / package).rglob("*.py"))
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in paths
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    ]


install_import_hook(modules_with_shapes(), "beartype.beartype")

from pallas_kernels import conformance  # noqa: E402  behind the hook, which sees what is imported after it


def pytest_addoption(parser):
    parser.addoption(
        "--conformance-json",
        metavar="PATH",
        type=Path,
        help="write the outcomes of the conformance trials that are run, with commit (LONGCTX_COMMIT) and machine",
    )


def pytest_configure(config):
    if config.option.conformance_json and (hasattr(config, "workerinput") or config.getoption("numprocesses", None)):
        raise pytest.UsageError("--conformance-json: one process writes the file; leave out -n")
    if config.option.markexpr != "gpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    else:
        conformance.share_device()  # with the processes that run conformance trials


def pytest_collection_modifyitems(items):
    """Folders of long files first, so that no process is left with one while the others are done."""
    items.sort(key=lambda item: item.path.relative_to(ROOT).parts[1:-1], reverse=True)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs of one file are of no use to the next; kept, they would take gigabytes."""
    yield
    jax.clear_caches()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip(f"runs on {jax.default_backend()}, needs a GPU: `pytest -m gpu` on a machine with one")


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Compiles for CPUs with few optimisations, in half the time: most of what tests of small programs cost."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
    yield
    jax.config.update("jax_disable_most_optimizations", before)

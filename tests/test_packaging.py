"""What a fresh clone relies on: the Python finder, the Makefile, the metadata, the constraints."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import longctx

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def fake_python(path, version, *, without=(), level="final", name="cpython"):
    """A program that answers as a Python of the given version would, by running this one with a changed sys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = tuple(int(part) for part in version.split("."))
    lie = (
        "import collections, platform, sys, types;"
        f"sys.version_info = collections.namedtuple('V', 'major minor micro releaselevel')(*{numbers}, '{level}');"
        f"sys.implementation = types.SimpleNamespace(**vars(sys.implementation) | dict(name='{name}'));"
        f"sys.executable = '{path}';"
        f"sys.modules.update(dict.fromkeys({list(without)}));"
        f"platform.python_version = lambda: '{version}';"
        "exec(sys.argv[1])"
    )
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{lie}" "$2"\n')
    path.chmod(0o755)
    return path


def broken_python(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\necho 'version 3.12 is not installed' >&2\nexit 127\n")
    path.chmod(0o755)


@pytest.fixture
def find(tmp_path):
    (tmp_path / "bin").mkdir()

    def run(**environment):
        result = subprocess.run(
            ["/bin/sh", ROOT / "scripts/find_python.sh"],
            env={
                "PATH": str(tmp_path / "bin"),
                "HOME": str(tmp_path / "home"),
                "FIND_PYTHON_ROOT": str(tmp_path / "root"),
                **environment,
            },
            capture_output=True,
            text=True,
        )
        assert bool(result.stdout) == (result.returncode == 0)
        assert bool(result.stderr) == (result.returncode != 0)
        return result.stdout.strip() or result.stderr

    return run


def test_finder_passes_over_old_and_broken_interpreters(find, tmp_path):
    fake_python(tmp_path / "bin/python3", "3.11.7")
    broken_python(tmp_path / "bin/python3.12")
    good = fake_python(tmp_path / "bin/python", "3.13.0")
    assert find() == str(good)


def test_finder_prefers_the_tested_version(find, tmp_path):
    for version in ("3.14.1", "3.13.2", "3.12.9"):
        fake_python(tmp_path / "bin" / f"python{version[:4]}", version)
    assert find() == str(tmp_path / "bin/python3.12")


@pytest.mark.parametrize(
    ("place", "variables"),
    [
        ("home/.pyenv/versions/3.12.1/bin/python", {}),
        ("elsewhere/versions/3.13.0/bin/python", {"PYENV_ROOT": "elsewhere"}),
        ("home/.local/share/uv/python/cpython-3.12.4-linux-x86_64-gnu/bin/python3", {}),
        ("tools/uv/cpython-3.14.0-macos-aarch64-none/bin/python3", {"UV_PYTHON_INSTALL_DIR": "tools/uv"}),
        ("home/.asdf/installs/python/3.12.1/bin/python", {}),
        ("home/.local/share/mise/installs/python/3.13.1/bin/python", {}),
        ("home/miniforge3/envs/work space/bin/python", {}),
        ("conda/bin/python", {"CONDA_EXE": "conda/bin/conda"}),
        ("root/opt/conda/bin/python", {}),
        ("root/opt/homebrew/opt/python@3.12/bin/python3.12", {}),
        ("root/usr/local/bin/python3.13", {}),
        ("root/opt/python3.12/bin/python3", {}),
    ],
)
def test_finder_looks_where_version_managers_install(find, tmp_path, place, variables):
    version = next(iter(re.findall(r"3\.1\d", place)), "3.12") + ".0"
    good = fake_python(tmp_path / place, version)
    assert find(**{name: str(tmp_path / folder) for name, folder in variables.items()}) == str(good)


def test_finder_takes_the_named_interpreter_or_none(find, tmp_path):
    fake_python(tmp_path / "bin/python3.12", "3.12.1")
    named = fake_python(tmp_path / "mine", "3.14.2")
    old = fake_python(tmp_path / "old", "3.11.7")
    assert find(PYTHON=str(named)) == str(named)
    assert find(PYTHON="python3.12") == str(tmp_path / "bin/python3.12")
    message = find(PYTHON=str(old))
    assert f"PYTHON={old} does not serve; wanted CPython 3.12, 3.13 or 3.14 with venv:\n  {old} is 3.11.7" in message


def test_finder_says_what_it_tried_and_what_to_install(find, tmp_path):
    fake_python(tmp_path / "bin/python3", "3.11.7")
    broken_python(tmp_path / "bin/python3.12")
    fake_python(tmp_path / "bin/python3.13", "3.13.0", level="beta")
    fake_python(tmp_path / "bin/python3.14", "3.14.0", name="pypy")
    fake_python(tmp_path / "bin/python", "3.15.0")
    lines = find().splitlines()
    assert lines[:6] == [
        "No suitable Python found; wanted CPython 3.12, 3.13 or 3.14 with venv. Tried:",
        "  python3.12 does not run",
        "  python3.13 is the pre-release 3.13.0",
        "  python3.14 is pypy",
        "  python3 is 3.11.7",
        "  python is 3.15.0",
    ]
    assert any("apt-get install python3.12 python3.12-venv" in line for line in lines)
    assert "make quickstart PYTHON=" in lines[-1]


def test_finder_says_when_only_the_venv_module_is_missing(find, tmp_path):
    fake_python(tmp_path / "bin/python3.12", "3.12.3", without=["ensurepip"])
    message = find()
    assert "python3.12 is 3.12 without the venv module" in message
    assert "apt-get install python3.12-venv" in message
    good = fake_python(tmp_path / "bin/python3.13", "3.13.0")
    assert find() == str(good)


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_installs_only_when_something_changed(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "scripts/find_python.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    log = tmp_path / "log"
    python = fake_python(tmp_path / "fake/python3.12", "3.12.1")
    answer = python.read_text().splitlines()[1]
    python.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = -c ] && {answer}\n'
        f'echo "$@" >> "{log}"\n'
        'if [ "$2" = venv ]; then mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; fi\n'
    )

    def make(*arguments):
        log.write_text("")
        # Nothing of a make that runs these tests: neither its flags nor its ARGS.
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": str(python)}
        subprocess.run(["make", *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True)
        return log.read_text().splitlines()

    pip = "-m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable"
    assert make("quickstart") == [
        "-m venv --clear .venv",
        f"{pip} .[train]",
        "-m train configs/quickstart.yaml",
    ]
    assert make("quickstart") == ["-m train configs/quickstart.yaml"]
    pytest_call = "-m pytest -n 2 --dist loadfile --no-loadscope-reorder -m not slow"
    assert make("test", "ARGS=-k name") == [f"{pip} .[test]", f"{pytest_call} -k name"]
    assert make("test") == [pytest_call]
    later = (tmp_path / ".venv/.installed-test").stat().st_mtime + 10
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert make("docs") == [
        f"{pip} .[train]",
        "-m train.config",
        "-m pallas_kernels.support README.md",
        "-m longctx.context_parallel.support docs/context_parallel.md",
        "-m pallas_kernels.conformance --readme",
    ]


def test_version_has_one_source():
    try:
        installed = importlib.metadata.version("longctx-jax")
    except importlib.metadata.PackageNotFoundError:
        installed = "0+uninstalled"
    assert longctx.__version__ == installed
    assert installed in (PROJECT["version"], "0+uninstalled")


def test_the_library_imports_without_the_extras():
    extras = {"grain", "matplotlib", "pyarrow", "pydantic", "safetensors", "tensorboardX", "tokenizers", "transformers"}
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(extras)})); import longctx, pallas_kernels"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_constraints_pin_everything_that_make_installs():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(re.fullmatch(r"([A-Za-z0-9._-]+)==([^ ]+)", line).groups() for line in lines)
    assert pinned["jax"] == pinned["jaxlib"] == "0.11.2"
    extras = PROJECT["optional-dependencies"]
    wanted = [
        *PROJECT["dependencies"],
        *(item for name in ("train", "hf", "data", "test", "dev") for item in extras[name]),
    ]
    names = {re.match(r"[A-Za-z0-9._-]+", item)[0] for item in wanted} - {PROJECT["name"]}

    def normal(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    assert {normal(name) for name in names} <= {normal(name) for name in pinned}

"""What a result was measured on and with."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess

import jax

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "jax-linear-attention", "tokamax", "numpy")


def describe(commit: str | None = None) -> dict:
    """Commit, hardware, driver, versions and date, as JSON takes them.

    Args:
      commit: What to say instead of asking git, where a copy of the files is measured; LONGCTX_COMMIT in the
        environment says it too.
    """
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit or os.environ.get("LONGCTX_COMMIT") or _git_commit(),
        "device": device.device_kind,
        "platform": jax.default_backend(),
        "num_devices": jax.device_count(),
        "driver": _driver(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def slug(device_kind: str) -> str:
    """The name of a device as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


def _git_commit() -> str:
    commit = _output("git", "rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if changed else commit


def _driver() -> str | None:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

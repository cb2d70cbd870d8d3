"""The version of the installed distribution; pyproject.toml is its single source."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("longctx-jax")
except PackageNotFoundError:  # imported from a source tree that has not been installed
    __version__ = "0+uninstalled"

"""The trainer: `python -m train CONFIG`."""

from importlib.util import find_spec

_REQUIRED = ("grain", "matplotlib", "optax", "orbax", "pydantic", "rich", "tensorboardX", "yaml")
_missing = [name for name in _REQUIRED if find_spec(name) is None]
if _missing:
    raise ImportError(
        f"train: needs {', '.join(_missing)}, which the library alone does not install; "
        "install longctx-jax[train], or run `make install` in a clone"
    )

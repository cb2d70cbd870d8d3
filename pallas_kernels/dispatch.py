"""Dispatch: which implementation serves a call.

The refusal contract: an implementation that cannot serve a call raises NotImplementedError with its reason ("try the
next"); ValueError means that the call itself is wrong. With `implementation=None` the platform's preference list is
walked; a named implementation never falls back.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import jax

Implementation = Literal["mosaic_gpu", "mosaic_tpu", "cudnn", "xla", "reference"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

PREFERENCE: dict[str, tuple[str, ...]] = {
    "gpu": ("mosaic_gpu", "cudnn", "xla"),
    "tpu": ("mosaic_tpu", "xla"),
    "cpu": ("xla",),
}
"""What `implementation=None` tries, in order. The reference is never taken unasked: its memory is quadratic."""

_logger = logging.getLogger(__name__)
_recorded: contextvars.ContextVar[list[tuple[str, str]] | None] = contextvars.ContextVar("recorded", default=None)


def current_platform() -> str:
    """The platform a program is being traced for: "cpu", "gpu" or "tpu".

    Read from the mesh in scope first, so that compiling ahead of time for a TPU on a CPU machine takes the TPU's
    implementations, then from the default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def search_method() -> str:
    """The fastest of `jnp.searchsorted`: an iteration of a loop costs a GPU more than a step of the search does."""
    return "scan_unrolled" if current_platform() == "gpu" else "scan"


def run[R](
    op: str,
    implementations: Mapping[str, Callable[..., R]],
    implementation: str | None,
    *args,
    **kwargs,
) -> R:
    """Calls the implementation asked for, or the first on the platform's preference list that serves the call.

    Args:
      op: Name of the op, for messages.
      implementations: What exists, by name.
      implementation: A name, or None to walk the preference list.
      *args, **kwargs: The call.
    Returns: What the implementation returns.
    Raises:
      ValueError: the name is not one of IMPLEMENTATIONS.
      NotImplementedError: the named implementation refuses, or does not exist for this op.
      ExceptionGroup: every implementation on the preference list refuses; it holds every reason.
    """
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"{op}: implementation={implementation!r}, wanted None or one of {IMPLEMENTATIONS}")
        if implementation not in implementations:
            raise NotImplementedError(
                f"{op}: there is no {implementation!r} implementation; there are {tuple(implementations)}"
            )
        return _call(op, implementation, implementations[implementation], args, kwargs)
    platform = current_platform()
    refusals: list[NotImplementedError] = []
    for name in PREFERENCE.get(platform, ("xla",)):
        if name not in implementations:
            continue
        try:
            result = _call(op, name, implementations[name], args, kwargs)
        except NotImplementedError as refusal:
            refusals.append(refusal)
            continue
        _log_choice(op, platform, name, tuple(str(refusal) for refusal in refusals))
        return result
    raise ExceptionGroup(f"{op}: no implementation serves this call on {platform}", refusals)


@contextlib.contextmanager
def record() -> Iterator[list[tuple[str, str]]]:
    """Collects `(op, implementation)` for every op traced inside: how a test proves which implementation ran."""
    taken: list[tuple[str, str]] = []
    token = _recorded.set(taken)
    try:
        yield taken
    finally:
        _recorded.reset(token)


def _call(op: str, name: str, function: Callable[..., Any], args, kwargs) -> Any:
    # The scope tells in a compiled program or a profile which op an instruction belongs to, and who implements it.
    with jax.named_scope(f"{op}.{name}"):
        result = function(*args, **kwargs)
    _record(op, name)
    return result


def _record(op: str, implementation: str) -> None:
    taken = _recorded.get()
    if taken is not None:
        taken.append((op, implementation))


@functools.cache
def _log_choice(op: str, platform: str, name: str, reasons: tuple[str, ...]) -> None:
    """Logs a choice once: the cache is what makes it once."""
    passed_over = "".join(f"; passed over: {reason}" for reason in reasons)
    _logger.info("%s on %s: using %s%s", op, platform, name, passed_over)

"""A progress bar for the work of building a cache, for people who wait."""

import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

_PATIENCE_SECONDS = 1.0  # shorter work needs no bar


class ByteProgress:
    """Shows how many of `total_bytes` are done, on a terminal, once the work has taken a second."""

    def __init__(self, label: str, total_bytes: int, *, console: Console | None = None):
        self._console = Console(stderr=True) if console is None else console
        self._label = label
        self._total = total_bytes
        self._done = 0
        self._bar: Progress | None = None
        self._begin = time.monotonic()

    def __enter__(self) -> "ByteProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._bar is None:
            if not self._console.is_terminal or time.monotonic() - self._begin < _PATIENCE_SECONDS:
                return
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(self._label, total=self._total)
            self._bar.start()
        self._bar.update(self._task, completed=self._done)

"""Ctrl-C and SIGTERM ask the loop to stop after the step at hand."""

import os
import signal
from types import FrameType
from typing import Self


class StopSignals:
    """A context in which the first SIGINT or SIGTERM only sets `received`; a second
    one ends the process at once."""

    received: str | None = None
    """Name of the signal that asked to stop, or None."""

    def __enter__(self) -> Self:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        # With the default action a second signal needs no Python code, so it also ends a step that hangs.
        signal.signal(number, signal.SIG_DFL)
        text = f"\n{self.received}: finishing this step, then saving. The same signal again aborts at once.\n"
        os.write(2, text.encode())  # print could be interrupted inside its own buffer

"""What a run shows: a live bar on a terminal, plain lines elsewhere."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Progress of a run on stdout; only process 0 shows anything.

    Args:
      total_steps: Steps of the whole run.
      console: Where to; default the process's stdout.
    """

    def __init__(self, total_steps: int, *, console: Console | None = None):
        self._total = total_steps
        self._console = Console(soft_wrap=True) if console is None else console
        self._silent = jax.process_index() != 0
        self._bar = self._task = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self, step: int) -> None:
        """Starts the bar at a step."""
        if self._silent or not self._console.is_terminal:
            return
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=None),  # takes what the terminal leaves
            TextColumn("{task.fields[values]}"),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task("train", total=self._total, completed=step, values="compiling")
        self._bar.start()

    def stop(self) -> None:
        """Ends the bar and leaves its last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def step(self, step: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def record(self, step: int, values: Mapping[str, Any], *, seconds_left: float | None) -> None:
        """Shows the metrics of a step."""
        left = "-" if seconds_left is None else duration(seconds_left)
        text = f"{summary(values)} left {left}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, values=text)
        elif not self._silent:
            print(f"step {step}/{self._total} {text}", flush=True)

    def counted[T](self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """The items; how many were taken stands on the bar in place of metrics, or on one of its own before the first
        step."""
        if self._bar is None:
            yield from counted(items, total, label, console=self._console)
            return
        shown = self._bar.tasks[self._task].fields["values"]
        for number, item in enumerate(items):
            self._bar.update(self._task, values=f"{label} {number}/{total}")
            yield item
        self._bar.update(self._task, values=shown)

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._silent:
            self._console.print(text, markup=False, highlight=False)


def counted[T](items: Iterable[T], total: int, label: str, *, console: Console | None = None) -> Iterator[T]:
    """The items, with a bar of how many were taken while more are to come; on a terminal of process 0 alone.

    Args:
      items: Of which there are `total`.
      label: What stands before the bar.
      console: Where to; default the process's stderr, since stdout carries the result.
    """
    console = Console(stderr=True) if console is None else console
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    silent = jax.process_index() != 0 or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=silent) as bar:
        yield from bar.track(items, total=total, description=label)


def summary(values: Mapping[str, Any]) -> str:
    """Loss, bits per byte, tokens/s and MFU in one short text; `-` where a value is not known."""

    def text(name, form, scale=1.0):
        value = values.get(name)
        return "-" if value is None else form.format(value * scale)

    return (
        f"loss {text('loss', '{:.3f}')} bits/byte {text('bits_per_byte', '{:.3f}')} "
        f"tokens/s {text('tokens_per_second', '{:,.0f}')} MFU {text('mfu', '{:.1f}%', 100)}"
    )


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

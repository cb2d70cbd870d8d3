"""A plan on the terminal."""

import collections
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from train.planning.plan import Plan

_ROWS = 16  # of a long table; the JSON has them all


def show(plan: Plan, console: Console) -> None:
    """Prints the plan: what it is of, memory, collectives, time, and the verdict last."""
    axes = " x ".join(f"{name}={size}" for name, size in plan.mesh.items() if size > 1) or "one device"
    console.print(
        f"{plan.parameters:,} parameters, {plan.batch_size} rows of {plan.seq_len:,} tokens a step, on "
        f"{plan.num_devices} x {plan.device_kind} ({axes})",
        highlight=False,
    )
    if plan.source == "formula":
        console.print(
            f"[yellow]Figures by formula, nothing was compiled: {_plain(plan.source_note)}[/]", highlight=False
        )
    else:
        ops = ", ".join(f"{op} by {name}" for op, name in plan.implementations.items())
        console.print(f"compiled in {plan.compile_seconds:.0f} s; {ops}", highlight=False)
    console.print(_memory(plan))
    if plan.host_memory:
        console.print(_host_memory(plan))
    if plan.buffers:
        console.print(_buffers(plan))
    if plan.collectives:
        console.print(_collectives(plan))
    if plan.parts:
        console.print(_parts(plan))
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    for problem in plan.problems:
        console.print(f"[bold red]problem:[/] {_plain(problem)}", highlight=False)
    for advice in plan.advice:
        console.print(f"  would help: {_plain(advice)}", highlight=False)
    console.print(verdict(plan), highlight=False)


def verdict(plan: Plan) -> str:
    """One line: whether it fits, and what a step takes."""
    share = "" if plan.memory_limit is None else f" of {_gib(plan.memory_limit)}"
    fits = {True: "fits", False: "does not fit", None: "memory limit unknown"}[plan.fits]
    text = f"{fits}: {_gib(plan.memory_total)}{share} a device"
    if plan.host_memory:
        share = "" if plan.host_memory_limit is None else f" of {_gib(plan.host_memory_limit)}"
        text += f", {_gib(plan.host_memory_total)}{share} of its host"
    if plan.step_seconds is not None:
        text += (
            f"; a step takes {_seconds(plan.step_seconds)} at best, {_seconds(plan.exposed_seconds)} of it waiting for "
            f"links; {plan.tokens_per_second:,.0f} tokens/s, MFU {100 * plan.mfu:.1f} %"
        )
    return text + ("" if plan.source == "compiler" else " (by formula)")


def _memory(plan: Plan) -> Table:
    table = _table("Memory of a device", ("class", "GiB", "share"))
    for name, size in plan.memory.items():
        table.add_row(name, f"{size / 2**30:.3f}", f"{100 * size / max(1, plan.memory_total):.0f} %")
    table.add_section()
    limit = "-" if plan.memory_limit is None else f"{100 * plan.memory_total / plan.memory_limit:.0f} % of the limit"
    table.add_row("total", f"{plan.memory_total / 2**30:.3f}", limit)
    if plan.memory_limit is not None:
        table.add_row("limit", f"{plan.memory_limit / 2**30:.3f}", plan.memory_note)
    return table


def _host_memory(plan: Plan) -> Table:
    table = _table("Memory of the host, for a device", ("class", "GiB", "share"))
    for name, size in plan.host_memory.items():
        table.add_row(name, f"{size / 2**30:.3f}", f"{100 * size / plan.host_memory_total:.0f} %")
    if plan.host_memory_limit is not None:
        table.add_section()
        table.add_row("limit", f"{plan.host_memory_limit / 2**30:.3f}", plan.host_memory_note)
    return table


def _buffers(plan: Plan) -> Table:
    table = _table("Largest at the fullest moment", ("tensor", "shape", "times", "kind", "GiB"))
    equal = collections.Counter()
    for buffer in plan.buffers:
        equal[buffer.name, buffer.shape, buffer.kind] += buffer.num_bytes
    count = collections.Counter((buffer.name, buffer.shape, buffer.kind) for buffer in plan.buffers)
    for key, num_bytes in equal.most_common(_ROWS):
        if num_bytes >= 0.01 * plan.memory_total:
            name, shape, kind = key
            table.add_row(name, shape, str(count[key]), kind, f"{num_bytes / 2**30:.3f}")
    return table


def _collectives(plan: Plan) -> Table:
    columns = ("collective", "of", "phase", "times", "MiB each", "ms each", "compute beside it", "", "links")
    table = _table("Collectives of a step", columns)
    for c in plan.collectives[:_ROWS]:
        if c.seconds is None:
            status, times = "-", ("-", "-")
        else:
            times = (_ms(c.seconds), _ms(c.overlapped) if c.asynchronous else "synchronous")
            status = f"[red]{_ms(c.exposed)} exposed[/]" if c.is_exposed else "[green]hidden[/]"
        name = f"{c.kind}{' (hop)' if c.is_hop else ''}"
        table.add_row(name, c.part, c.phase, str(c.count), f"{c.num_bytes / 2**20:.2f}", *times, status, c.links)
    rest = plan.collectives[_ROWS:]
    if rest:
        table.add_section()
        total = sum(c.num_bytes * c.count for c in rest) / 2**20
        exposed = "-" if plan.step_seconds is None else f"{_ms(sum(c.exposed * c.count for c in rest))} exposed"
        count = str(sum(c.count for c in rest))
        table.add_row(f"{len(rest)} more kinds", "", "", count, f"{total:.2f} in all", "", "", exposed, "")
    return table


def _parts(plan: Plan) -> Table:
    table = _table(
        "Time of a step", ("part", "forward ms", "recompute ms", "backward ms", "update ms", "TFLOP", "share")
    )
    phases = ("forward", "recompute", "backward", "update")
    seconds, flops = collections.defaultdict(collections.Counter), collections.Counter()
    for p in plan.parts:
        seconds[p.part][p.phase] += p.seconds
        flops[p.part] += p.flops
    for part, of in sorted(seconds.items(), key=lambda item: -item[1].total()):
        table.add_row(
            part,
            *(_ms(of[phase]) if of[phase] else "" for phase in phases),
            f"{flops[part] / 1e12:.2f}",
            f"{100 * of.total() / plan.step_seconds:.1f} %",
        )
    table.add_row("waiting for links", "", "", "", "", "", f"{100 * plan.exposed_seconds / plan.step_seconds:.1f} %")
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    numeric = ("GiB", "times", "TFLOP", "share", "MiB each", "compute beside it")
    for column in columns:
        table.add_column(column, justify="right" if column in numeric or "ms" in column.split() else "left")
    return table


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"

"""Generated tables in Markdown files."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table, of which the first row is the head."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def between_markers(text: str, name: str, lines: Iterable[str]) -> str:
    """`text` with the lines between its markers, `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Raises: ValueError where it has no such markers.
    """
    begin, end = (f"<!-- {name}: {place} -->" for place in ("begin", "end"))
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{name}: found no markers, wanted a text with {begin!r} and {end!r}; add them")
    return "\n".join([f"{before}{begin}", *lines, f"{end}{after}"])


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    """Changes the text of a file."""
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

"""Every key of a config class with its type, default and meaning, for `--help` and docs/config.md."""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from train.plain_yaml import join, show
from train.schema import default_of, fields_of, kinds_of, shape_of, to_dict, type_text

REQUIRED = "required"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One key of the configuration."""

    key: str  # dotted; NAME stands for a name of the user's choice, N for an index into a list
    kind: str = ""  # the kind whose key this is, in a tagged union
    type: str
    default: str  # as in YAML; REQUIRED for a key that must be given, "" for a section, whose keys have their own
    doc: str  # the literal under the field, one paragraph a line

    @property
    def summary(self) -> str:
        """The first sentence of the documentation."""
        return re.split(r"(?<=[.!?])\s", self.doc, maxsplit=1)[0]


def describe(cls: type) -> Iterator[Entry]:
    """Every key of a config class in the order of its fields, with those of every variant of a union."""
    return _fields(cls, "", dataclasses.MISSING, {})


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The documentation of a dataclass's fields, inherited ones too: the text literal under each field."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, literal in zip(body, body[1:], strict=False):
            match field, literal:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    paragraphs = inspect.cleandoc(text).split("\n\n")
                    docs[name] = "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return docs


def help_text(cls: type) -> str:
    """One block a key for a terminal: the key with its type and default, then its documentation."""
    blocks = []
    for entry in describe(cls):
        kind = f" (kind: {entry.kind})" if entry.kind else ""
        default = {"": "", REQUIRED: ", required"}.get(entry.default, f" = {entry.default}")
        blocks.append(f"{entry.key}{kind}: {entry.type}{default}")
        blocks.append(textwrap.fill(entry.doc.replace("\n", " "), 100, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(blocks)


def markdown(cls: type) -> str:
    """A table for each top-level section, and one for the keys outside of any."""
    groups: dict[str, list[Entry]] = {}
    intro: dict[str, str] = {}
    for entry in describe(cls):
        section = entry.key.partition(".")[0]
        if entry.key == section and entry.type == "section":
            intro[section] = entry.doc
        elif entry.key == section:
            groups.setdefault("", []).append(entry)
        else:
            groups.setdefault(section, []).append(entry)
    parts = []
    for section, entries in groups.items():
        title = f"## {section}" if section else "## Top level"
        rows = [_row(entry) for entry in entries]
        table = ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows]
        parts.append("\n\n".join(filter(None, [title, intro.get(section, "")])) + "\n\n" + "\n".join(table))
    return "\n\n".join(parts) + "\n"


def _row(entry: Entry) -> str:
    key = f"`{entry.key}`" + (f" (kind: {entry.kind})" if entry.kind else "")
    default = {"": "", REQUIRED: REQUIRED}.get(entry.default, f"`{entry.default}`")
    cells = [key, entry.type, default, entry.doc.replace("\n", " ")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _fields(
    cls: type, path: str, inherited: Any, skip: Mapping[str, tuple[Any, Any]], kind: str = ""
) -> Iterator[Entry]:
    """The keys of a section. `inherited`: the default of the field that holds it; `skip`: keys told."""
    docs = field_docs(cls)
    for name, (field, expected) in fields_of(cls).items():
        default = getattr(inherited, name) if isinstance(inherited, cls) else default_of(field)
        if skip.get(name) == (expected, default):
            continue
        key = join(path, name)
        is_section = dataclasses.is_dataclass(default) or (
            default is dataclasses.MISSING and shape_of(expected).form in ("section", "tagged")
        )
        required = default is dataclasses.MISSING
        text = "" if is_section else REQUIRED if required else _default_text(expected, default)
        yield Entry(key=key, kind=kind, type=type_text(expected), default=text, doc=docs.get(name, ""))
        yield from _inside(expected, key, default)


def _inside(expected: Any, path: str, default: Any) -> Iterator[Entry]:
    """The keys below a field of the given type."""
    shape = shape_of(expected)
    match shape.form:
        case "section":
            yield from _fields(shape.inner[0], path, default, {})
        case "tagged":
            yield from _variants(shape.inner[0], path, default)
        case "mapping":
            yield from _inside(shape.inner[1], join(path, "NAME"), None)
        case "sequence":
            for i, item in enumerate(shape.inner):
                yield from _inside(item, join(path, str(i) if shape.fixed_length else "N"), None)
        case "choice":
            for arm in shape.inner:
                yield from _inside(arm, path, default)


def _variants(cls: type, path: str, default: Any) -> Iterator[Entry]:
    """The key `kind`, the keys that every variant has, then each variant's own."""
    kinds = kinds_of(cls)
    default_kind = next((name for name, variant in kinds.items() if type(default) is variant), REQUIRED)
    yield Entry(
        key=join(path, "kind"),
        type="|".join(kinds),
        default=default_kind,
        doc="Which of these the section describes.",
    )
    shared = {name: (expected, default_of(field)) for name, (field, expected) in fields_of(cls).items()}
    yield from _fields(cls, path, dataclasses.MISSING, {})
    for kind, variant in kinds.items():
        yield from _fields(variant, path, default, shared, kind)


def _default_text(expected: Any, default: Any) -> str:
    holder = dataclasses.make_dataclass("holder", [("value", expected)])
    return show(to_dict(holder(default))["value"])

"""Plain data to nested frozen dataclasses, strictly, and back.

A dataclass is a section: each key of the mapping is one of its fields. A dataclass with a classmethod
`variants() -> {kind: dataclass}` is a tagged union: the key `kind` chooses the class. Lists, tuples, mappings
and unions of these are followed; every other type is a leaf, which pydantic validates in strict JSON mode (so
`true` is no number, `"3"` is no int, 3 is a float). Where a field's default is a dataclass, the keys that the
file leaves out keep the values of that default; a list or a mapping of names replaces the default as a whole.
"""

import collections.abc
import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic

from train.plain_yaml import ConfigError, apply_overrides, dump_yaml, join, read_mapping, show

_REFUSED: Any = object()  # stands for a value whose problem has been noted


def load[C](cls: type[C], path: str | Path, overrides: Iterable[str] = ()) -> C:
    """The config of class `cls` that a YAML file and `a.b=c` overrides describe.

    Raises: ConfigError, one line a problem: dotted key, what was got, what is wanted, the nearest valid name.
    """
    return parse(cls, apply_overrides(read_mapping(path), overrides))


def parse[C](cls: type[C], data: Mapping[str, Any]) -> C:
    """The config of class `cls` that plain data describes; all problems come in one ConfigError."""
    problems: list[str] = []
    config = _Parser(cls, problems).value(cls, data, "", None)
    if problems:
        raise ConfigError(*problems)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain data that `parse` turns back into an equal one; every default is written out."""
    return _plain(type(config), config)


def to_yaml(config: Any) -> str:
    """A config as YAML text with every default written out."""
    return dump_yaml(to_dict(config))


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a type is laid out in the file.

    `inner`: for a `section` and a `tagged` union, the dataclass; for a `mapping`, the types of a key and of a
    value; for a `sequence`, the types of the items (one if any number is allowed); for a `choice`, the arms.
    """

    form: Literal["section", "tagged", "mapping", "sequence", "choice", "leaf"]
    inner: tuple[Any, ...] = ()
    fixed_length: bool = False
    container: type = tuple


def shape_of(expected: Any) -> Shape:
    """The layout of a type annotation; what is no dataclass, list, mapping or union of these is a leaf."""
    if isinstance(expected, typing.TypeAliasType):
        return shape_of(expected.__value__)
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin is typing.Annotated:
        return shape_of(args[0])
    if isinstance(expected, type) and dataclasses.is_dataclass(expected):
        return Shape("tagged" if kinds_of(expected) else "section", (expected,))
    if origin in (typing.Union, types.UnionType) and any(shape_of(arm).form != "leaf" for arm in args):
        return Shape("choice", args)
    if origin in (dict, collections.abc.Mapping):
        return Shape("mapping", args)
    if origin is tuple:
        variadic = args[-1] is Ellipsis
        return Shape("sequence", args[:1] if variadic else args, fixed_length=not variadic)
    if origin in (list, collections.abc.Sequence):
        return Shape("sequence", args, container=list if origin is list else tuple)
    return Shape("leaf")


def kinds_of(cls: type) -> dict[str, type]:
    """The variants of a tagged union by name; empty if `cls` is an ordinary section or itself a variant."""
    variants = cls.variants() if hasattr(cls, "variants") else {}
    return {} if cls in variants.values() else dict(variants)


@functools.cache
def fields_of(cls: type) -> dict[str, tuple[dataclasses.Field, Any]]:
    """The fields of a dataclass that a file may set, each with its resolved type."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def default_of(field: dataclasses.Field) -> Any:
    """A field's default value, or dataclasses.MISSING."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def type_text(expected: Any) -> str:
    """A type in the words of somebody who writes YAML."""
    if isinstance(expected, typing.TypeAliasType):
        return type_text(expected.__value__)
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin is typing.Annotated:
        return type_text(args[0])
    if origin is Literal:
        return "|".join(str(arg) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(arg) for arg in args)
    if origin in (dict, collections.abc.Mapping):
        return f"mapping of names to {type_text(args[1])}"
    if origin is tuple and args[-1] is not Ellipsis:
        return f"[{', '.join(type_text(arg) for arg in args)}]"
    if origin in (tuple, list, collections.abc.Sequence):
        return f"list of {type_text(args[0])}"
    if isinstance(expected, type) and dataclasses.is_dataclass(expected):
        kinds = kinds_of(expected)
        return f"section (kind: {'|'.join(kinds)})" if kinds else "section"
    names = {str: "text", bool: "true|false", types.NoneType: "null", Path: "path"}
    return names.get(expected) or getattr(expected, "__name__", str(expected))


class _Parser:
    """One walk over a type and the data for it; what is wrong goes into `problems`, and the walk goes on."""

    def __init__(self, root: type, problems: list[str]):
        self.root = root
        self.problems = problems

    def value(self, expected: Any, raw: Any, path: str, default: Any) -> Any:
        shape = shape_of(expected)
        match shape.form:
            case "leaf":
                return self.leaf(expected, raw, path)
            case "section":
                return self.section(shape.inner[0], raw, path, default)
            case "tagged":
                return self.tagged(shape.inner[0], raw, path, default)
            case "mapping":
                return self.mapping(expected, shape, raw, path)
            case "sequence":
                return self.sequence(expected, shape, raw, path)
            case "choice":
                return self.choice(expected, shape, raw, path, default)

    def section(
        self,
        cls: type,
        raw: Any,
        path: str,
        default: Any,
        kind: str = "",
        kinds: Mapping[str, type] | None = None,
    ) -> Any:
        raw = {} if raw is None else raw  # a section whose keys are all commented out
        if not isinstance(raw, dict):
            return self.refuse(path, raw, f"a mapping with keys {', '.join(fields_of(cls))}")
        fields = fields_of(cls)
        before = len(self.problems)
        for name in raw:
            if name not in fields:
                self.problems.append(self.unknown(join(path, name), raw[name], fields, kind, kinds or {}))
        values = {}
        for name, (field, expected) in fields.items():
            key = join(path, name)
            inherited = getattr(default, name) if isinstance(default, cls) else default_of(field)
            if name in raw:
                values[name] = self.value(expected, raw[name], key, inherited)
            elif inherited is dataclasses.MISSING:
                self.problems.append(f"{key}: missing; wanted {type_text(expected)}")
            else:
                values[name] = inherited
        if len(self.problems) > before:
            return _REFUSED
        try:
            return cls(**values)
        except (ValueError, NotImplementedError) as error:
            self.problems.append(_with_path(path, str(error), fields))
            return _REFUSED

    def tagged(self, cls: type, raw: Any, path: str, default: Any) -> Any:
        kinds = kinds_of(cls)
        allowed = ", ".join(kinds)
        if not isinstance(raw, dict):
            return self.refuse(path, raw, f"a mapping with a key kind ({allowed})")
        default_kind = _kind_of(kinds, default)
        kind = raw.get("kind", default_kind)
        if kind is None:
            self.problems.append(f"{join(path, 'kind')}: missing; wanted one of {allowed}")
            return _REFUSED
        if not isinstance(kind, str) or kind not in kinds:
            return self.refuse(join(path, "kind"), kind, f"one of {allowed}", _nearest(kind, kinds))
        inner = {name: value for name, value in raw.items() if name != "kind"}
        return self.section(kinds[kind], inner, path, default, kind, kinds)

    def mapping(self, expected: Any, shape: Shape, raw: Any, path: str) -> Any:
        if not isinstance(raw, dict):
            return self.refuse(path, raw, type_text(expected))
        names, values = shape.inner
        parsed = {}
        for name, item in raw.items():
            parsed[self.leaf(names, name, join(path, name))] = self.value(values, item, join(path, name), None)
            if self.problems and self.problems[-1].startswith(f"{join(path, name)}.kind: missing"):
                # Perhaps an override of a key of another one.
                self.problems[-1] += _nearest(name, (other for other in raw if other != name), path)
        return parsed

    def sequence(self, expected: Any, shape: Shape, raw: Any, path: str) -> Any:
        if isinstance(raw, dict) and raw and all(name.isdecimal() for name in raw):
            return self.refuse(path, raw, f"{type_text(expected)}; the file has no such list to index: give all of it")
        if not isinstance(raw, list):
            return self.refuse(path, raw, type_text(expected))
        items = shape.inner
        if not shape.fixed_length:
            items = items * len(raw)
        if len(items) != len(raw):
            return self.refuse(path, raw, f"{len(items)} items: {type_text(expected)}")
        return shape.container(
            self.value(item, value, join(path, str(i)), None)
            for i, (item, value) in enumerate(zip(items, raw, strict=True))
        )

    def choice(self, expected: Any, shape: Shape, raw: Any, path: str, default: Any) -> Any:
        wanted = {dict: ("section", "tagged", "mapping"), list: ("sequence",)}.get(type(raw), ())
        arms = [arm for arm in shape.inner if shape_of(arm).form in wanted]
        if len(arms) > 1:
            raise TypeError(f"{path}: {expected} is ambiguous; give one dataclass a `variants` classmethod")
        if arms:
            return self.value(arms[0], raw, path, default)
        leaves = tuple(arm for arm in shape.inner if shape_of(arm).form == "leaf")
        if not leaves:
            return self.refuse(path, raw, type_text(expected))
        return self.leaf(typing.Union[leaves], raw, path, wanted=type_text(expected))  # noqa: UP007

    def leaf(self, expected: Any, raw: Any, path: str, wanted: str = "") -> Any:
        wanted = wanted or type_text(expected)
        try:
            value = _adapter(expected).validate_json(json.dumps(raw), strict=True)
        except pydantic.ValidationError as error:
            problem = error.errors(include_url=False)[0]
        else:
            # pydantic takes true for Literal[1]: true == 1 in Python
            return value if isinstance(value, bool) or not isinstance(raw, bool) else self.refuse(path, raw, wanted)
        remedy = _nearest(raw, _literals(expected))
        if problem["type"] == "string_type" and isinstance(raw, bool | int | float):
            remedy = f'; in quotes it is text: "{show(raw)}"'
        elif "ctx" in problem and problem["type"] not in ("literal_error", "enum"):  # a bound, a pattern
            remedy = f" ({problem['msg'][:1].lower() + problem['msg'][1:]})"
        return self.refuse(path, raw, wanted, remedy)

    def refuse(self, path: str, raw: Any, wanted: str, remedy: str = "") -> Any:
        self.problems.append(f"{path or 'the configuration'}: got {show(raw)}, wanted {wanted}{remedy}")
        return _REFUSED

    def unknown(self, key: str, raw: Any, fields: Mapping, kind: str, kinds: Mapping[str, type]) -> str:
        name = key.rpartition(".")[2]
        hint = _nearest(name, fields)
        others = [other for other, variant in kinds.items() if name in fields_of(variant)]
        elsewhere = [other for other in _section_keys(self.root) if other.rpartition(".")[2] == name]
        if others:
            hint = f"; it is a key of kind {', '.join(others)}"
        elif not hint and elsewhere:
            hint = f"; did you mean {' or '.join(elsewhere)}?"
        of_kind = f" of kind {kind}" if kind else ""
        return f"{key}: unknown key{of_kind}, got {show(raw)}; wanted one of {', '.join(fields)}{hint}"


def _with_path(path: str, message: str, fields: Mapping) -> str:
    """A `__post_init__` message behind the dotted path; one that starts with `field:` continues the path."""
    message = " ".join(message.split())
    head = re.match(r"(\w+)[\w.]*: ", message)
    if head and head[1] in fields:
        return join(path, message)
    return f"{path}: {message}" if path else message


def _nearest(name: Any, allowed: Iterable[str], path: str = "") -> str:
    near = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {join(path, near[0]) if path else near[0]}?" if near else ""


def _literals(expected: Any) -> list[str]:
    """The names that a leaf type spells out."""
    args = typing.get_args(expected)
    if typing.get_origin(expected) is Literal:
        return [arg for arg in args if isinstance(arg, str)]
    return [name for arg in args for name in _literals(arg)]


def _section_keys(cls: type, path: str = "") -> Iterable[str]:
    for name, (_, expected) in fields_of(cls).items():
        yield join(path, name)
        shape = shape_of(expected)
        if shape.form == "section":
            yield from _section_keys(shape.inner[0], join(path, name))


@functools.cache
def _adapter(expected: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(expected)


def _plain(expected: Any, value: Any) -> Any:
    shape = shape_of(expected)
    match shape.form:
        case "leaf":
            return _adapter(expected).dump_python(value, mode="json")
        case "section" | "tagged":
            kinds = kinds_of(shape.inner[0])
            kind = _kind_of(kinds, value)
            if kinds and not kind:
                raise ValueError(f"got a {type(value).__name__}, wanted a registered variant: {', '.join(kinds)}")
            items = fields_of(type(value)).items()
            values = {name: _plain(inner, getattr(value, name)) for name, (_, inner) in items}
            return {"kind": kind} | values if kind else values
        case "mapping":
            return {name: _plain(shape.inner[1], item) for name, item in value.items()}
        case "sequence":
            items = shape.inner if shape.fixed_length else shape.inner * len(value)
            return [_plain(inner, item) for inner, item in zip(items, value, strict=True)]
        case "choice":
            return _plain(_arm_of(shape, value), value)


def _kind_of(kinds: Mapping[str, type], value: Any) -> str | None:
    return next((name for name, variant in kinds.items() if type(value) is variant), None)


def _arm_of(shape: Shape, value: Any) -> Any:
    """The arm of a union that holds `value`."""
    for arm in shape.inner:
        inner = shape_of(arm)
        if inner.form in ("section", "tagged") and isinstance(value, inner.inner[0]):
            return arm
        if inner.form == "mapping" and isinstance(value, Mapping):
            return arm
        if inner.form == "sequence" and isinstance(value, list | tuple):
            return arm
    return typing.Union[tuple(arm for arm in shape.inner if shape_of(arm).form == "leaf")]  # noqa: UP007

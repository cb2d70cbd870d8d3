"""YAML text to plain data (mappings, lists, text, numbers, booleans, null) and back; `a.b=c` overrides.

Scalars are read by the rules of YAML 1.2: `1e-3` is a number, `no` and `2024-01-01` are text. What a
configuration must not hold is refused here: a key given twice, a key that is not text, nan and inf, an alias
inside itself, aliases that stand for more than anybody would write.
"""

import copy
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_MOST_VALUES = 100_000  # of a document, what an alias stands for counted each time: a few lines can mean billions
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class ConfigError(ValueError):
    """What is wrong with a configuration: one line a problem."""

    def __init__(self, *problems: str):
        super().__init__(*problems)

    def __str__(self) -> str:
        return "\n".join(self.args)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # none of YAML 1.1's; the 1.2 ones are added below

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is given twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node

    def construct_document(self, node):
        if _size(node, {}) > _MOST_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"more than {_MOST_VALUES:,} values, those behind aliases included", node.start_mark
            )
        return super().construct_document(node)

    def construct_int(self, node):
        text = self.construct_scalar(node)
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes a node holds once aliases are written out; `known` are those of others, 0 while counted."""
    if id(node) not in known:
        known[id(node)] = 0
        match node:
            case yaml.MappingNode():
                inner = [part for pair in node.value for part in pair]
            case yaml.SequenceNode():
                inner = node.value
            case _:
                inner = []
        known[id(node)] = 1 + sum(_size(part, known) for part in inner)
    return known[id(node)]


_Loader.add_constructor(_TAG + "int", _Loader.construct_int)
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver(_TAG + "merge", re.compile(r"^<<$"), ["<"])


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""

    def ignore_aliases(self, data):
        return True

    def represent_list(self, data):
        """Lists of plain values on one line, everything else in blocks."""
        flow = not any(isinstance(item, dict | list) for item in data)
        return self.represent_sequence(_TAG + "seq", data, flow_style=flow)


_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))


def dump_yaml(data: Any) -> str:
    """Plain data as YAML text that `parse_yaml` reads back equal, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=100)


def parse_yaml(text: str, *, source: str, path: str = "") -> Any:
    """YAML text as plain data.

    Args:
      text: one YAML document.
      source: what to call the text in an error message: a file name, an override.
      path: the dotted key of the value, where the text is not a whole document.
    Raises: ConfigError, naming the line or the dotted key.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        what = " ".join(filter(None, [error.context, error.problem]))
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not readable as YAML: {what}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not readable as YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply to be a configuration") from None
    problems: list[str] = []
    value = _unshared(value, path, problems, ())
    if problems:
        raise ConfigError(*problems if path else (f"{source}: {problem}" for problem in problems))
    return value


def _unshared(value: Any, path: str, problems: list[str], parents: tuple[int, ...]) -> Any:
    """A copy in which no two aliases share an object, so that an override changes one place only."""
    if id(value) in parents:
        problems.append(f"{path or 'the document'}: an alias inside the value that it names")
        return None
    inside = (*parents, id(value))
    match value:
        case dict():
            for key in value:
                if not isinstance(key, str):
                    problems.append(f"{join(path, str(key))}: got the key {show(key)}, wanted text; write '{key}'")
            return {key: _unshared(item, join(path, str(key)), problems, inside) for key, item in value.items()}
        case list():
            return [_unshared(item, join(path, str(i)), problems, inside) for i, item in enumerate(value)]
        case float() if not math.isfinite(value):
            problems.append(f"{path or 'value'}: got {value}, wanted a finite number")
        case int() if abs(value) >= 2**64:
            problems.append(f"{path or 'value'}: got {show(value)}, wanted a number of at most 64 bits")
        case None | str() | bool() | int() | float():
            pass
        case _:
            problems.append(f"{path or 'value'}: got a {type(value).__name__}, wanted plain YAML without tags")
    return value


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises: ConfigError if the file is missing, unreadable, empty, not YAML or not a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such file; wanted a YAML file{hint}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: got a folder, wanted a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); wanted a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    data = parse_yaml(text, source=str(path))
    if data is None:
        raise ConfigError(f"{path}: the file is empty; wanted a mapping of configuration keys")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got {show(data)}, wanted a mapping of configuration keys")
    return data


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` with each `a.b=c` put in its place, in order; the value is read as YAML.

    A part of the key is a name in a mapping or an index into a list; mappings on the way are made.
    Raises: ConfigError with one line for each override that cannot be read or placed.
    """
    result = copy.deepcopy(dict(data))
    problems: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            problems.append(f"override {override!r}: wanted KEY=VALUE, such as training.steps=100")
        elif not text.strip():
            problems.append(f"{key}: the override has no value; write {key}=null, or {key}=\"''\" for empty text")
        else:
            try:
                _place(result, parts, parse_yaml(text, source=f"override {override!r}", path=key))
            except ConfigError as error:
                problems.extend(error.args)
    if problems:
        raise ConfigError(*problems)
    return result


def _place(data: dict[str, Any], parts: list[str], value: Any) -> None:
    node: Any = data
    for depth, part in enumerate(parts):
        here, key = ".".join(parts[:depth]), part
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(f"{'.'.join(parts)}: {here} got the index {part}, wanted one below {len(node)}")
            key = int(part)
        elif not isinstance(node, dict):
            raise ConfigError(f"{'.'.join(parts)}: {here} is {show(node)} and cannot hold {part}")
        elif part not in node:
            node[part] = None
        if depth == len(parts) - 1:
            node[key] = value
        elif node[key] is None:
            node[key] = {}
        node = node[key]


def join(path: str, name: str) -> str:
    """The dotted key of `name` under `path`."""
    return f"{path}.{name}" if path else name


def show(value: Any) -> str:
    """A value as one would write it, shortened to fit an error line."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 80 else text[:77] + "..."

"""Generated bad configs: `python -m train` refuses each with an error that names the key, and writes nothing.

What is extreme may also be valid. Then the config must come back from its own text unchanged, and, if it is small
enough for this machine, it must train.
"""

import copy
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.faults.harness import TINY, Ended, Report, for_each, run, snapshot
from train.__main__ import main
from train.config import TrainConfig
from train.plain_yaml import parse_yaml, read_mapping
from train.schema import parse, to_dict

ROOT = Path(__file__).parents[2]

_FLOATS = (0.0, -0.0, -1.0, 1e308, -1e308, 5e-324, 1e-45, 1e38, 1e39, 0.5, 1.0, 2.0)
_INTS = (0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63))
_MOST_STEPS = 8  # what asks for more than these may ask for more time or memory than there is
_LARGEST = 128
_NOT_YAML = (
    b"",
    b"# nothing\n",
    b"- a\n- list\n",
    b"text\n",
    b"7\n",
    b"{",
    b"a: [1, 2",
    b"a: 'open",
    b"\t- : [",
    b"a: 1\na: 2\n",
    b"a: &x [*x]\n",
    b"[" * 5000,
    b"{a: " * 3000,
    b"a: *nowhere\n",
    b"\xff\xfe",
    "a: 1".encode("utf-16"),
    b"\x00\x01\x02",
    b"a: \x00\n",
    b"\xc3\x28: 1\n",
    b"a: !!python/object/apply:os.mkdir [PWNED]\n",
    b"a: !!python/name:os.system\n",
    b"a: !custom {b: 1}\n",
    b"a: !!binary aGk=\n",
    b"a: !!set {b}\n",
    b"a: !!timestamp 2024-01-01\n",
    b"? [a, b]\n: 1\n",
    b"1: 2\n",
    b"null: 2\n",
    b"a: 0x\n",
    b"%YAML 9.9\n---\na: 1\n",
    b"--- {a: 1}\n--- {b: 2}\n",
    b"<<: 5\n",
    b"a: 1e999999\n",
    b"a: " + b"9" * 5000 + b"\n",
    b"PK\x03\x04" + bytes(60),
    b'a: "\\ud800"\n',
    b'a: "\\xzz"\n',
    b"\x85a: 1\n",
    b"".join(b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9) if i else b"1") for i in range(12)),
)
_OVERRIDES = (
    "nonsense",
    "=5",
    "a..b=1",
    ".=1",
    "training.steps=",
    "training.steps=  ",
    "training.steps=[",
    "training.steps={",
    "training.steps.x=1",
    "data.sources.9.kind=stdlib",
    "data.sources.-1.kind=stdlib",
    "data.sources.kind=stdlib",
    "model.mixers.zzz.kind=nothing",
    "model.mixers={}",
    "model.pattern=[]",
    "data.sources=[]",
    "training=5",
    "mesh=[1]",
    "training.steps=.nan",
    "optimizer.learning_rate=-.inf",
    "training.steps=!!python/name:os.system",
    "run_dir=''",
    "training.steps=\x00",
    "training.steps=\ud800",
    "seed=18446744073709551616",
    "seed=" + "9" * 5000,
    "run_dir=null",
    "optimizer.warmup_steps=2",
    "optimizer.schedule=wsd optimizer.decay_steps=3",
    "training.batch_size=3 mesh.data=2",
    "mesh.data=2",
    "mesh.data=0",
    "mesh.data=-2",
    "mesh.data=-1 mesh.fsdp=-1",
    "mesh.context_inner=3",
    "training.accumulate_steps=3",
    "model.mixers.global.num_heads=3",
    "model.mixers.global.head_dim=3",
    "model.mixers.global.num_kv_heads=3",
    "model.mixers.global.window=0",
    "model.mixers.global.window=4 model.mixers.global.chunk=4",
    "model.mixers.global.dropout=1",
    "model.mixers.global.dropout=-0.1",
    "model.mixers.other.kind=attention model.mixers.other.num_heads=2",
    "model.pattern=[other]",
    "model.edge_layers=1",
    "model.vocab_size=8",
    "data.tokenizer=ids:1",
    "data.tokenizer=ids:x",
    "data.tokenizer=nowhere.json",
    "data.sources.0.min_length=16",
    "data.sources.0.num_symbols=9",
    "data.end_token=x",
    "data.max_document_length=17",
    "data.held_out_fraction=1",
    "data.num_threads=9",
    "init_from=RUN_DIR",
    "checkpoint.every=2 checkpoint.keep_every=3",
    "distributed.num_processes=2",
    "distributed.coordinator_address=nowhere",
    "sample.temperature=-1",
    "training.on_nonfinite=no",
    "model.mixers.global={kind: moba, num_heads: 2, chunk_size: 0}",
    "model.mixers.global={kind: nsa, num_heads: 2, block_size: 7}",
    "model.mixers.global={kind: mla, num_heads: 2, rope_dim: 5}",
    "model.mixers.global={kind: linear, num_heads: 2, feature_map: cosine}",
    "model.mixers.global={kind: mamba2, num_heads: 0}",
    "model.mixers.global={kind: retention, num_heads: 3}",
    "model.mixers.global={kind: lightning, num_heads: 3}",
)


@dataclasses.dataclass(frozen=True)
class BadConfig:
    """A config file and overrides, and words of which the error must name one; a valid outcome may be allowed."""

    kind: str
    text: bytes
    overrides: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    may_be_valid: bool = False


def _bases() -> list[dict[str, Any]]:
    """The configs of the repository and one of each mixer's kind, every default written out."""
    files = [read_mapping(path) for path in sorted((ROOT / "configs").glob("*.yaml"))]
    names = ("mla", "moba", "nsa", "linear", "mamba2", "retention")
    kinds = [{"kind": name} for name in names]
    tiny = [copy.deepcopy(TINY) for _ in kinds]
    for config, kind in zip(tiny, kinds, strict=True):
        config["model"]["mixers"]["global"] = kind | {"num_heads": 2}
    return [to_dict(parse(TrainConfig, config)) for config in (TINY, *tiny, *files)]


def _paths(node: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every place in plain data, with what is there."""
    if path:
        yield path, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, inner in items:
        yield from _paths(inner, (*path, name))


def _with(config: dict[str, Any], path: Sequence, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    node: Any = changed
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    return changed


def _without(config: dict[str, Any], path: Sequence) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    node: Any = changed
    for name in path[:-1]:
        node = node[name]
    del node[path[-1]]
    return changed


def _wrong_types(value: Any) -> tuple:
    """What cannot stand where `value` stands; null may be what a number or a text is left out by."""
    match value:
        case bool():
            return (1, 0.5, "true", [True], {"nonsense": 1})
        case int() | float():
            return ("banana", "1", True, [1], {"nonsense": 1})
        case str():
            return (5, 0.5, True, [value], {"nonsense": 1})
        case None:
            return ({"nonsense": 1}, [{"nonsense": 1}], [[1]])
        case list():
            return (5, "banana", True, None, {"nonsense": 1})
    return (5, "banana", True, [1])


def _text(config: dict[str, Any]) -> bytes:
    return json.dumps(config).encode()  # which is YAML


def bad_configs() -> st.SearchStrategy[BadConfig]:
    """Configs that are wrong in one place, drawn so that each kind has about its share."""
    bases = _bases()
    places = {id(base): list(_paths(base)) for base in bases}
    start = st.sampled_from(bases)

    def key_of(path: Sequence) -> tuple[str, ...]:
        return (".".join(map(str, path)),)

    def place(base, wanted=lambda value: True):
        return st.sampled_from([found for found in places[id(base)] if wanted(found[1])])

    def unknown_key(base):
        def build(found, name):
            path = (*found[0], name)
            return BadConfig("unknown key", _text(_with(base, path, 1)), names=key_of(path))

        names = st.sampled_from(
            ["nonsense", "learning_rat", "Steps", "kind_", "", "a b", "ключ", "x" * 300, "0", "__class__"]
        )
        # A mapping of names takes any name, and an entry that is no section is refused as such.
        return st.builds(build, place(base, lambda value: isinstance(value, dict)), names)

    def wrong_type(base):
        def with_type(found):
            path, value = found
            return st.sampled_from(_wrong_types(value)).map(
                lambda wrong: BadConfig("wrong type", _text(_with(base, path, wrong)), names=(*key_of(path), "model"))
            )

        return place(base).flatmap(with_type)

    def nonfinite(base):
        def build(found, number):
            text = _text(_with(base, found[0], "NUMBER")).replace(b'"NUMBER"', number)
            return BadConfig("nan, inf", text, names=key_of(found[0]))

        is_number = place(base, lambda value: isinstance(value, int | float) and not isinstance(value, bool))
        return st.builds(build, is_number, st.sampled_from([b".nan", b".inf", b"-.inf", b".NaN", b"1e999", b"-1e400"]))

    def missing(base):
        required = [("run_dir",), ("model",), ("data",), ("training",), ("model", "dim"), ("model", "pattern")]
        required += [("data", "seq_len"), ("data", "sources"), ("training", "steps"), ("model", "num_layers")]
        required += [("model", "mixers", name, "kind") for name in base["model"]["mixers"]]
        required += [("model", "mixers", name, "num_heads") for name in base["model"]["mixers"]]
        required += [("data", "sources", i, "kind") for i in range(len(base["data"]["sources"]))]
        return st.sampled_from(required).map(
            lambda path: BadConfig("missing key", _text(_without(base, path)), names=key_of(path))
        )

    def extreme(base):
        def with_number(found):
            path, value = found
            return st.sampled_from(_INTS if isinstance(value, int) else _FLOATS).map(
                lambda number: BadConfig(
                    "extreme", _text(_with(base, path, number)), names=(str(path[0]), str(path[-1])), may_be_valid=True
                )
            )

        return place(base, lambda value: isinstance(value, int | float) and not isinstance(value, bool)).flatmap(
            with_number
        )

    tiny = _text(TINY)
    not_yaml = st.sampled_from(_NOT_YAML).map(lambda text: BadConfig("no config", text))
    junk = st.binary(min_size=1, max_size=200).map(lambda text: BadConfig("no config", text))
    cut = st.integers(1, len(tiny) - 1).map(lambda size: BadConfig("no config", tiny[:size]))
    override = st.sampled_from(_OVERRIDES).map(lambda text: BadConfig("override", tiny, overrides=tuple(_split(text))))
    mutated = [start.flatmap(kind) for kind in (unknown_key, wrong_type, nonfinite, missing, extreme, extreme)]
    return st.one_of(*mutated, not_yaml, st.one_of(junk, cut), override)


def _split(text: str) -> list[str]:
    """Overrides apart, where each begins with a key."""
    parts: list[str] = []
    for word in text.split(" "):
        if parts and not word.partition("=")[0].replace(".", "_").isidentifier():
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    return parts


def check_configs(folder: Path, count: int) -> Report:
    """Runs `count` generated configs; every second one finds files of an earlier run in its folder."""
    report = Report("bad configs")
    file = folder / "config.yaml"

    def check(case: BadConfig) -> None:
        number = report.count
        run_dir = folder / f"run{number}"
        if number % 2:
            run_dir.mkdir()
            (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        text = case.text.replace(b"RUN_DIR", bytes(run_dir)).replace(b"CACHE_DIR", bytes(folder / "cache"))
        file.write_bytes(text)
        overrides = [part.replace("RUN_DIR", str(run_dir)) for part in case.overrides]
        before = snapshot(run_dir)
        shown = run(main, [str(file), *overrides, "--print-config"])
        ended = shown
        outcome = "refused"
        if shown.code == 0 and case.may_be_valid:
            again = parse(TrainConfig, _printed(shown))
            fault = None if to_dict(again) == _printed(shown) else "the config does not come back from its text"
            outcome = "valid"
            if fault is None and _is_small(again):
                ended = run(main, [str(file), f"run_dir={run_dir}"])
                outcome = "trained" if ended.code == 0 else "refused"
                fault = None if ended.code == 0 else ended.refusal_fault()
                if "are not both finite; stopped" in ended.stderr:  # a learning rate of 1e38 is valid, and does that
                    outcome = "stopped at a step"
        else:
            if shown.code == 0:  # what only the start of a run can tell
                ended = run(main, [str(file), *overrides])
            fault = ended.refusal_fault(case.names)
        if fault is None and outcome == "refused" and snapshot(run_dir) != before:
            fault = "refused, but files of the run have changed"
        detail = f"{fault}\n    {case.text[:3000]!r} {case.overrides}" if fault else None
        report.add(case.kind, outcome, detail)

    for_each(bad_configs(), count, check)
    return report


def _printed(shown: Ended) -> Any:
    return parse_yaml(shown.stdout, source="the printed config")


def _is_small(config: TrainConfig) -> bool:
    """Whether the config is that of TINY but for a number, and no number asks for much."""
    plain = to_dict(config)
    if plain["data"]["sources"][0]["kind"] != "synthetic" or plain["distributed"]["num_processes"] is not None:
        return False
    return plain["training"]["steps"] <= _MOST_STEPS and all(
        abs(value) <= _LARGEST or path[-1] == "rope_theta"
        for path, value in _paths(plain)
        if path[0] in ("model", "data", "training", "sample") and isinstance(value, int | float)
    )

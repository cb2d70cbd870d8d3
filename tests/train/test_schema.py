"""The strict parser of configurations, on small configs of its own."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.plain_yaml import apply_overrides, dump_yaml, parse_yaml, read_mapping
from train.schema import ConfigError, load, parse, to_dict, to_yaml
from train.schema_docs import describe, field_docs, help_text, markdown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    weight: float = 1.0
    """How often. Relative to the others."""

    @classmethod
    def variants(cls):
        return {"files": Files, "noise": Noise}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files(Source):
    glob: str
    """Which files | folders.

    With a second paragraph.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise(Source):
    weight: float = 0.5
    """Noise weighs less."""
    shape: tuple[int, int] = (2, 3)
    """Rows and columns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    seq_len: int
    """Tokens in a row."""
    sources: tuple[Source, ...] = ()
    """What to read."""
    named: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    """By name."""
    extra: Source | None = None
    """Maybe one more."""
    mode: Literal["split", "drop", "pad"] = "split"
    """What to do."""

    def __post_init__(self):
        if self.seq_len <= 0:
            raise ValueError(f"seq_len: got {self.seq_len}, wanted a positive number; give more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    rate: float = 1e-3
    """Step size."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates."""
    clip: float | None = None
    """Norm limit."""
    nesterov: bool = False
    """Look ahead."""
    schedule: dict[str, int] = dataclasses.field(default_factory=dict)
    """Steps by phase."""

    def __post_init__(self):
        if self.clip == 0:
            raise NotImplementedError("a clip of zero is not built")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    name: str
    """Its name."""
    data: Data
    """The data."""
    optimizer: Optimizer = Optimizer(rate=0.5)
    """The optimizer."""
    path: Path | None = None
    """A file."""
    limit: int | Literal["none"] = "none"
    """Up to here."""

    def __post_init__(self):
        if self.name == "clash":
            raise ValueError("data.seq_len: got 8, wanted 9 with name clash")


BASE = """
name: run
data:
  seq_len: 8
  sources:
    - {kind: files, glob: "*.py", weight: 2}
    - {kind: noise, shape: [4, 5]}
  named:
    a: {kind: noise}
optimizer: {clip: 1e-3}
"""


def config_of(text=BASE, *overrides):
    return parse(Config, apply_overrides(parse_yaml(text, source="test"), overrides))


def error_of(*overrides, text=BASE):
    with pytest.raises(ConfigError) as caught:
        config_of(text, *overrides)
    return str(caught.value)


def test_a_whole_config():
    assert config_of() == Config(
        name="run",
        data=Data(
            seq_len=8,
            sources=(Files(glob="*.py", weight=2.0), Noise(shape=(4, 5))),
            named={"a": Noise(weight=0.5)},
        ),
        optimizer=Optimizer(rate=0.5, clip=1e-3),
    )
    assert type(config_of().data.sources[0].weight) is float


def test_a_section_default_keeps_what_the_file_leaves_out():
    assert config_of().optimizer.rate == 0.5
    assert config_of(BASE, "optimizer=null").optimizer.rate == 0.5


@pytest.mark.parametrize(
    ("override", "get", "wanted"),
    [
        ("data.sources.0.weight=3", lambda c: c.data.sources[0].weight, 3.0),
        ("data.named.a.shape=[7, 8]", lambda c: c.data.named["a"].shape, (7, 8)),
        ("data.named.b.kind=noise", lambda c: c.data.named["b"], Noise()),
        ("data.extra={kind: files, glob: x}", lambda c: c.data.extra, Files(glob="x")),
        ("data.extra=null", lambda c: c.data.extra, None),
        ("optimizer.rate=1e-4", lambda c: c.optimizer.rate, 1e-4),
        ("optimizer.rate=1", lambda c: c.optimizer.rate, 1.0),
        ("optimizer.nesterov=true", lambda c: c.optimizer.nesterov, True),
        ("optimizer.schedule.warm=5", lambda c: c.optimizer.schedule, {"warm": 5}),
        ("name=no", lambda c: c.name, "no"),
        ("name=a=b", lambda c: c.name, "a=b"),
        ("name=2024-01-01", lambda c: c.name, "2024-01-01"),
        ("name='3'", lambda c: c.name, "3"),
        ("path=a/b", lambda c: c.path, Path("a/b")),
        ("limit=3", lambda c: c.limit, 3),
        ("limit=0x10", lambda c: c.limit, 16),
        ("limit=010", lambda c: c.limit, 10),
    ],
)
def test_overrides(override, get, wanted):
    value = get(config_of(BASE, override))
    assert value == wanted
    assert type(value) is type(wanted)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        (
            "data.seqlen=9",
            "data.seqlen: unknown key, got 9; wanted one of seq_len, sources, named, extra, mode; "
            "did you mean seq_len?",
        ),
        (
            "seq_len=9",
            "seq_len: unknown key, got 9; wanted one of name, data, optimizer, path, limit; did you mean data.seq_len?",
        ),
        (
            "data.sources.0.shape=[1, 2]",
            "data.sources.0.shape: unknown key of kind files, got [1, 2]; wanted one of weight, glob; "
            "it is a key of kind noise",
        ),
        (
            "data.named.a.weigh=1",
            "data.named.a.weigh: unknown key of kind noise, got 1; wanted one of weight, shape; did you mean weight?",
        ),
        (
            "data.sources.0.kind=file",
            'data.sources.0.kind: got "file", wanted one of files, noise; did you mean files?',
        ),
        ("data.named.a.kind=3", "data.named.a.kind: got 3, wanted one of files, noise"),
        ("data.named.b={}", "data.named.b.kind: missing; wanted one of files, noise"),
        (
            "data.named.aa.weight=2",
            "data.named.aa.kind: missing; wanted one of files, noise; did you mean data.named.a?",
        ),
        ("data.named.b={kind: files}", "data.named.b.glob: missing; wanted text"),
        ("data.seq_len='8'", 'data.seq_len: got "8", wanted int'),
        ("data.seq_len=8.0", "data.seq_len: got 8.0, wanted int"),
        ("data.seq_len=true", "data.seq_len: got true, wanted int"),
        ("data.seq_len=null", "data.seq_len: got null, wanted int"),
        ("data.seq_len=1_000", 'data.seq_len: got "1_000", wanted int'),
        ("optimizer.rate=true", "optimizer.rate: got true, wanted float"),
        ("optimizer.nesterov=1", "optimizer.nesterov: got 1, wanted true|false"),
        ("optimizer.nesterov=no", 'optimizer.nesterov: got "no", wanted true|false'),
        ("optimizer.clip=a", 'optimizer.clip: got "a", wanted float or null'),
        ("optimizer.betas=[0.9]", "optimizer.betas: got [0.9], wanted 2 items: [float, float]"),
        ("optimizer.betas=[0.9, x]", 'optimizer.betas.1: got "x", wanted float'),
        ("optimizer.betas=0.9", "optimizer.betas: got 0.9, wanted [float, float]"),
        (
            "optimizer.betas.0=0.5",
            'optimizer.betas: got {"0": 0.5}, wanted [float, float]; '
            "the file has no such list to index: give all of it",
        ),
        ("optimizer.schedule={a: 1.5}", "optimizer.schedule.a: got 1.5, wanted int"),
        ("optimizer=3", "optimizer: got 3, wanted a mapping with keys rate, betas, clip, nesterov, schedule"),
        ("data.sources=3", "data.sources: got 3, wanted list of section (kind: files|noise)"),
        ("data.extra=3", "data.extra: got 3, wanted section (kind: files|noise) or null"),
        ("name=3", 'name: got 3, wanted text; in quotes it is text: "3"'),
        ("data.mode=spilt", 'data.mode: got "spilt", wanted split|drop|pad; did you mean split?'),
        ("limit=non", 'limit: got "non", wanted int or none; did you mean none?'),
        ("data.seq_len=-1", "data.seq_len: got -1, wanted a positive number; give more"),
        ("optimizer.clip=0", "optimizer: a clip of zero is not built"),
        ("name=clash", "data.seq_len: got 8, wanted 9 with name clash"),
        ("optimizer.rate=.nan", "optimizer.rate: got nan, wanted a finite number"),
        (
            "optimizer.betas=[.inf, 0]",
            "optimizer.betas.0: got inf, wanted a finite number",
        ),
        ("optimizer.rate=1e999", "optimizer.rate: got inf, wanted a finite number"),
        ("name", "override 'name': wanted KEY=VALUE, such as training.steps=100"),
        ("a..b=1", "override 'a..b=1': wanted KEY=VALUE, such as training.steps=100"),
        ("name=", "name: the override has no value; write name=null, or name=\"''\" for empty text"),
        (
            "data.sources.2.weight=1",
            "data.sources.2.weight: data.sources got the index 2, wanted one below 2",
        ),
        ("data.sources.x=1", "data.sources.x: data.sources got the index x, wanted one below 2"),
        ("data.seq_len.x=1", "data.seq_len.x: data.seq_len is 8 and cannot hold x"),
    ],
)
def test_refusals_are_one_clear_line(override, wanted):
    assert error_of(override) == wanted


def test_bounds_in_a_type_are_said():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Bounded:
        size: Annotated[int, pydantic.Field(gt=0)]

    with pytest.raises(ConfigError, match=r"^size: got 0, wanted int \(input should be greater than 0\)$"):
        parse(Bounded, {"size": 0})


def test_a_bad_override_value_names_the_override():
    assert error_of("name=a: b: c").startswith("override 'name=a: b: c' line 1 column 5: not readable as YAML")


def test_integers_are_bounded():
    assert "wanted a number of at most 64 bits" in error_of("optimizer.rate=1" + "0" * 400)


def test_several_problems_come_together():
    lines = error_of("data.seqlen=1", "optimizer.rate=x", text="data: {}").splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "name",
        "data.seqlen",
        "data.seq_len",
        "optimizer.rate",
    ]


def test_missing_keys():
    assert error_of(text="name: x") == "data: missing; wanted section"
    assert error_of(text="{name: x, data: {}}") == "data.seq_len: missing; wanted int"


def test_literals_of_numbers_take_no_booleans():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Small:
        size: Literal[1, 2]

    assert parse(Small, {"size": 2}).size == 2
    with pytest.raises(ConfigError, match=r"^size: got true, wanted 1\|2$"):
        parse(Small, {"size": True})


def test_a_kind_may_be_left_out_where_the_default_has_one():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Holder:
        source: Source = Noise(shape=(9, 9))

    assert parse(Holder, {"source": {"weight": 2}}).source == Noise(shape=(9, 9), weight=2.0)
    assert parse(Holder, {"source": {"kind": "files", "glob": "x"}}).source == Files(glob="x")


def aliases_of_aliases(first, rest):
    lines = [f"a{i}: &a{i} {rest.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 12)]
    return "\n".join([f"a0: &a0 {first}", *lines])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: 1\nb: {c: 1, d: 2,\n  c: 3}", "f line 3 column 3: not readable as YAML: key 'c' is given twice"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor for the tag"),
        ("a: [1, 2", "f line 1 column 9: not readable as YAML"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: !!binary aGk=", "f: a: got a bytes, wanted plain YAML without tags"),
        ("a: !!set {x}", "f: a: got a set, wanted plain YAML without tags"),
        ("a: &x [*x]", "f: a.0: an alias inside the value that it names"),
        (aliases_of_aliases("[1]", "[{}]"), "more than 100,000 values, those behind aliases included"),
        (aliases_of_aliases("{x: 1}", "{{<<: [{}]}}"), "more than 100,000 values, those behind aliases included"),
        ("1: a", "f: 1: got the key 1, wanted text; write '1'"),
        ("a: {b: -.inf}", "f: a.b: got -inf, wanted a finite number"),
        ("[" * 3000, "nested too deeply"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_yaml_that_is_refused(text, wanted):
    with pytest.raises(ConfigError, match=re.escape(wanted)) as caught:
        parse_yaml(text, source="f")
    assert len(str(caught.value).splitlines()) == 1


def test_yaml_merge_keys_and_aliases_are_independent_copies():
    data = parse_yaml("a: &x {p: 1, q: [2]}\nb: {<<: *x, p: 3}\nc: *x", source="f")
    assert data == {"a": {"p": 1, "q": [2]}, "b": {"p": 3, "q": [2]}, "c": {"p": 1, "q": [2]}}
    assert apply_overrides(data, ["a.q.0=9"])["c"] == {"p": 1, "q": [2]}
    assert data["a"]["q"] == [2], "overrides leave their input alone"


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    (tmp_path / "list.yaml").write_text("[1]")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    for name, wanted in {
        "quikstart.yaml": f"no such file; wanted a YAML file; did you mean {tmp_path}/quickstart.yaml?",
        "quickstart.yaml": "the file is empty; wanted a mapping of configuration keys",
        "list.yaml": "got [1], wanted a mapping of configuration keys",
        "latin.yaml": "not UTF-8 text (byte 3); wanted a YAML file",
        "list.yaml/x.yaml": "cannot be read: Not a directory",
        ".": "got a folder, wanted a YAML file",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / name}: {wanted}")):
            read_mapping(tmp_path / name)


def test_load_reads_the_file_and_creates_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text(BASE)
    assert load(Config, tmp_path / "a.yaml", ["name=other"]).name == "other"
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"]


texts = st.text(st.characters(exclude_categories=["Cs", "Cc", "Co", "Cn"])) | st.sampled_from(
    [
        "no",
        "1e-3",
        "1_0",
        "0o7",
        "1:30",
        "~",
        "null",
        "<<",
        "=",
        "true",
        "2024-01-01",
        ".inf",
        "a: b",
        " x ",
        "#",
        "\n",
    ]
)
floats = st.floats(allow_nan=False, allow_infinity=False)
sources = st.builds(Files, weight=floats, glob=texts) | st.builds(Noise, weight=floats)
configs = st.builds(
    Config,
    name=texts.filter(lambda name: name != "clash"),
    data=st.builds(
        Data,
        seq_len=st.integers(1, 2**63),
        sources=st.lists(sources).map(tuple),
        named=st.dictionaries(texts, sources, max_size=3),
        extra=st.none() | sources,
        mode=st.sampled_from(["split", "drop", "pad"]),
    ),
    optimizer=st.builds(
        Optimizer,
        rate=floats,
        clip=st.none() | floats.filter(bool),
        schedule=st.dictionaries(texts, st.integers(-(2**63), 2**63), max_size=3),
    ),
    path=st.none() | st.sampled_from([Path("a/b"), Path("1"), Path("/no")]),
    limit=st.integers(0, 9) | st.just("none"),
)


@settings(deadline=None)
@given(configs)
def test_round_trip(config):
    text = to_yaml(config)
    assert parse(Config, parse_yaml(text, source="text")) == config
    assert parse(Config, to_dict(config)) == config


@settings(deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | floats | texts, lambda inner: st.lists(inner)))
def test_yaml_round_trip_keeps_types(value):
    read = parse_yaml(dump_yaml({"x": value}), source="text")
    assert repr(read) == repr({"x": value})


def test_written_configs_read_well():
    text = to_yaml(config_of())
    assert text.startswith("name: run\ndata:\n  seq_len: 8\n  sources:\n  - kind: files\n    weight: 2.0\n")
    assert "    shape: [4, 5]\n" in text
    assert "limit: none\n" in text


def test_a_variant_that_is_not_registered_cannot_be_written():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Unknown(Source):
        pass

    config = dataclasses.replace(config_of(), data=Data(seq_len=1, extra=Unknown()))
    with pytest.raises(ValueError, match="got a Unknown, wanted a registered variant: files, noise"):
        to_dict(config)


def test_field_docs_are_read_from_the_source_and_inherited():
    assert field_docs(Noise) == {"weight": "Noise weighs less.", "shape": "Rows and columns."}
    assert field_docs(Files) == {
        "weight": "How often. Relative to the others.",
        "glob": "Which files | folders.\nWith a second paragraph.",
    }


def test_describe_lists_every_key_with_every_variant():
    rows = {(e.key, e.kind): (e.type, e.default) for e in describe(Config)}
    assert rows["name", ""] == ("text", "required")
    assert rows["data", ""] == ("section", "")
    assert rows["data.seq_len", ""] == ("int", "required")
    assert rows["data.sources", ""] == ("list of section (kind: files|noise)", "[]")
    assert rows["data.sources.N.kind", ""] == ("files|noise", "required")
    assert rows["data.sources.N.weight", ""] == ("float", "1.0")
    assert rows["data.sources.N.weight", "noise"] == ("float", "0.5")
    assert ("data.sources.N.weight", "files") not in rows
    assert rows["data.sources.N.glob", "files"] == ("text", "required")
    assert rows["data.named.NAME.shape", "noise"] == ("[int, int]", "[2, 3]")
    assert rows["data.extra", ""] == ("section (kind: files|noise) or null", "null")
    assert rows["data.extra.glob", "files"] == ("text", "required")
    assert rows["optimizer.rate", ""] == ("float", "0.5"), "the default of the field that holds the section"
    assert rows["limit", ""] == ("int or none", '"none"')
    assert rows["path", ""] == ("path or null", "null")
    assert all(entry.doc for entry in describe(Config))
    by_key = {entry.key: entry for entry in describe(Config)}
    assert by_key["data.sources.N.weight"].summary == "Noise weighs less."


def test_help_and_markdown_show_every_key():
    text, table = help_text(Config), markdown(Config)
    for entry in describe(Config):
        assert entry.key in text
    assert "data.sources.N.glob (kind: files): text, required\n    Which files | folders. With a second" in text
    assert "## data\n\nThe data.\n\n| key | type | default | meaning |" in table
    assert "| `data.extra.glob` (kind: files) | text | required | Which files \\| folders. With a second" in table
    assert '| `data.mode` | split\\|drop\\|pad | `"split"` | What to do. |' in table
    assert "| `name` | text |" in table.partition("## data")[0]

"""TrainConfig: the checks between sections, the shipped configs, and the generated documentation."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from train import config as config_module
from train.config import ConfigError, TrainConfig, config_text, help_text, load_config, markdown_text
from train.schema import to_dict
from train.schema_docs import describe

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

BASE = """
run_dir: runs/test
model:
  dim: 32
  num_layers: 3
  mlp_dim: 64
  mixers:
    global: {kind: attention, num_heads: 4}
    local: {kind: attention, num_heads: 4, window: 16}
  pattern: [local, global]
data:
  seq_len: 64
  sources: [{kind: stdlib}]
training: {steps: 10, batch_size: 8, accumulate_steps: 2}
optimizer: {learning_rate: 1e-3}
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def test_load_config_and_overrides(base):
    config = load_config(base, ["model.mixers.local.window=8", "data.sources.0.weight=2", "seed=3"])
    assert config.model.mixers["local"].window == 8
    assert config.data.sources[0].weight == 2.0
    assert config.seed == 3
    assert config.optimizer.learning_rate == 1e-3
    assert config.mesh.data == 1


def test_the_printed_config_reads_back_equal(base, tmp_path):
    config = load_config(base)
    (tmp_path / "again.yaml").write_text(config_text(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["training.batch=4"], r"training\.batch: unknown key, got 4; .*; did you mean batch_size\?"),
        (["model.mixers.local.windw=4"], r"model\.mixers\.local\.windw: unknown key of kind attention.*mean window\?"),
        (["model.pattern=[nowhere]"], r"model\.pattern: got 'nowhere', wanted names of mixers \(global, local\)"),
        (["data.seq_len=0"], r"data\.seq_len: got 0, wanted >= 2"),
        (["training.steps=0"], r"training\.steps: got 0, wanted 1 or more"),
        (["run_dir=''"], r"run_dir: got empty text, wanted a folder"),
        (["init_from=runs/test/"], r"init_from: got run_dir=runs/test itself, wanted another run's folder"),
        (
            ["mesh.context_inner=2", "mesh.context_outer=3"],
            r"context_parallel\.layout: zigzag over 6 devices splits a sequence into parts of a multiple of 12 tokens, "
            r"got 64; change seq_len, the mesh or the layout",
        ),
        (
            ["mesh.context_inner=-1", "distributed.virtual_cpu_devices=3", "context_parallel.layout=contiguous"],
            r"context_parallel\.layout: contiguous over 3 devices .* got 64",
        ),
        (
            ["context_parallel.stripe_size=4"],
            r"context_parallel\.stripe_size: got 4 with layout=zigzag, which has no stripes",
        ),
        (
            ["mesh.context_inner=2", "context_parallel.strategy=halo"],
            r"context_parallel: model\.mixers\.global: halo needs a window that is bounded on both sides, and .* sees "
            r"back without bound; add a window, bound the documents \(max_document_length\), or use ring or all_gather",
        ),
        (
            ["mesh.context_inner=8", "mesh.context_outer=2", "context_parallel.strategy=usp"],
            r"context_parallel: model\.mixers\.global: usp splits 4 query heads over the 8 devices of a group, wanted",
        ),
        (["data.max_document_length=65"], r"data\.max_document_length: got 65, wanted null or 2 to seq_len=64; the"),
        (["optimizer.warmup_steps=10"], r"optimizer\.warmup_steps: got 10, wanted fewer than training\.steps=10"),
        (
            ["mesh.data=8"],
            r"training\.batch_size: got 8 in 2 microbatch\(es\) of 4 rows, wanted rows that mesh\.data x "
            r"mesh\.fsdp = 8 devices share evenly; change batch_size, accumulate_steps or the mesh",
        ),
        (
            ["mesh.fsdp=-1", "mesh.data=2", "distributed.virtual_cpu_devices=16"],
            r"training\.batch_size: got 8 in 2 microbatch\(es\) of 4 rows, .* mesh\.fsdp = 16 devices",
        ),
        (
            ["distributed.virtual_cpu_devices=3", "mesh.data=2"],
            r"mesh: data=2 x .* does not use exactly the 3 devices at hand",
        ),
    ],
)
def test_refusals_are_one_line_and_leave_nothing_behind(base, tmp_path, monkeypatch, overrides, wanted):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^{wanted}") as caught:
        load_config(base, overrides)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == [base]


def test_a_mesh_that_takes_the_rest_is_checked_when_the_devices_are_known(base):
    assert load_config(base, ["mesh.fsdp=-1"]).mesh.fsdp == -1
    assert load_config(base, ["mesh.fsdp=-1", "distributed.virtual_cpu_devices=4"]).mesh.fsdp == -1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_is_valid(path):
    config = load_config(path)
    assert isinstance(config, TrainConfig)
    head = path.read_text().partition("\n\n")[0]
    assert head.startswith("# "), "the head comment says purpose, command, hardware and expected numbers"
    assert f"python -m train configs/{path.name}" in head


def test_reading_a_config_starts_no_backend(base):
    code = (
        "import sys, jax; from train.config import load_config; load_config(sys.argv[1]);"
        "jax.config.update('jax_num_cpu_devices', 3); jax.config.update('jax_platforms', 'cpu');"
        "print(jax.device_count())"
    )
    result = subprocess.run([sys.executable, "-c", code, base], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["3"]


def test_every_key_is_documented():
    for entry in describe(TrainConfig):
        assert entry.doc, f"{entry.key} has no text literal under its field"
        assert re.search(r"[.!?)]$", entry.summary), f"{entry.key}: {entry.summary!r} is no sentence"


def test_help_names_every_key_of_a_config(base):
    text = help_text()

    def keys(data, path=""):
        for name, value in data.items():
            yield f"{path}{name}"
            if isinstance(value, dict):
                yield from keys(value, f"{path}{name}.")

    for key in keys(to_dict(load_config(base))):
        generic = re.sub(r"mixers\.(global|local)", "mixers.NAME", key)
        if generic != "model.mixers.NAME":
            assert re.search(rf"^{re.escape(generic)}( \(kind: \w+\))?: ", text, re.MULTILINE), generic


def test_docs_are_current(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["config", "--write", str(tmp_path / "docs/config.md")])
    config_module.main()
    written = (tmp_path / "docs/config.md").read_text(encoding="utf-8")
    assert written == markdown_text()
    assert written == (ROOT / "docs/config.md").read_text(encoding="utf-8"), "run `make docs`"


def test_the_generator_of_the_page_takes_no_users_file(tmp_path, monkeypatch, capsys):
    mine = tmp_path / "mine.yaml"
    mine.write_text("run_dir: runs/mine")
    for arguments in ([str(mine)], ["--write", str(mine)]):
        monkeypatch.setattr(sys, "argv", ["train.config", *arguments])
        with pytest.raises(SystemExit, match="2"):
            config_module.main()
    assert mine.read_text() == "run_dir: runs/mine"
    monkeypatch.setattr(sys, "argv", ["train.config", "--write", str(tmp_path / "page.md")])
    config_module.main()
    assert (tmp_path / "page.md").read_text() == markdown_text()

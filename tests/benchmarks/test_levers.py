"""The table of levers: rows on top of each other, each with the longest row that fits."""

import json

import pytest

from benchmarks import levers


@pytest.mark.slow
def test_each_lever_adds_to_those_before(tmp_path, monkeypatch):
    """By formula, on a small model: the longest row grows from lever to lever, and all three files are written."""
    config = tmp_path / "small.yaml"
    config.write_text(
        """
run_dir: unused
data: {seq_len: 65536, tokenizer: "ids:64", sources: [{kind: synthetic, min_length: 60, max_length: 60}]}
model:
  dim: 2048
  num_layers: 4
  mlp_dim: 4096
  mixers: {attention: {kind: attention, num_heads: 16}}
  pattern: [attention]
training: {steps: 1, batch_size: 1}
optimizer: {}
"""
    )
    out = tmp_path / "made" / "levers"
    arguments = [str(config), "model.vocab_size=128", "--devices", "h100:1", "--out", str(out), "--formula"]
    assert levers.main(arguments) == 0
    figures = json.loads(out.with_suffix(".json").read_text())
    rows = figures["rows"]
    assert [row["lever"] for row in rows] == [lever.name for lever in levers.LEVERS]
    longest = [row["longest"] for row in rows]
    assert longest == sorted(longest) and longest[1] < longest[2] < longest[3] < longest[4]
    first = ["model.vocab_size=128", "model.remat=none", "model.mlp_tile=null", "training.loss=plain"]
    assert rows[1]["overrides"] == [*first, "training.loss=fused"]
    assert rows[3]["host_memory"] == 0 < rows[4]["host_memory"] < rows[6]["host_memory"]
    table = out.with_suffix(".md").read_text().splitlines()
    assert table[2].startswith(f"| none | {longest[0]:,} |") and len(table) == 2 + len(rows)
    assert out.with_suffix(".png").stat().st_size > 1000

"""The committed table of what strategies serve is the one that they give when asked."""

from pathlib import Path

from longctx.context_parallel import support

GUIDE = Path(__file__).parents[2] / "docs" / "context_parallel.md"


def test_the_committed_table_is_the_generated_one():
    text = GUIDE.read_text(encoding="utf-8")
    assert support.with_table(text) == text, "run `make docs`"


def test_main_writes_the_table(tmp_path, monkeypatch):
    path = tmp_path / "guide.md"
    path.write_text("before\n<!-- support table: begin -->\nold\n<!-- support table: end -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["support", str(path)])
    support.main()
    assert path.read_text().startswith("before\n<!-- support table: begin -->\n|  | `ring` |")
    assert "old" not in path.read_text() and path.read_text().endswith("after\n")

"""The README says what the code does: its table is the dispatch's, its example is the script that is run."""

import re
from pathlib import Path

import pytest

from pallas_kernels import support

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_support_table_is_current():
    assert support.with_table(README) == README, "run `make docs`"


@pytest.mark.slow
def test_the_support_table_tells_refusals_apart():
    cells = (re.split(r"(?<!\\)\|", row)[1:-1] for row in support.table().splitlines())
    head, *rows = ([cell.strip() for cell in row] for row in cells)
    served = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    whole, in_any_order = "forward, gradient", "forward, gradient in any order"
    everywhere = dict.fromkeys(("`mosaic_gpu`", "`mosaic_tpu`", "`cudnn`", "`xla`", "`reference`"), whole)
    assert served["causal"] == everywhere | {"`cudnn`": in_any_order}
    assert served["gradient through the lse"] == everywhere | {"`cudnn`": "forward"}
    assert served["learned sinks"] == everywhere | {"`cudnn`": "-"}
    for option in ("attention dropout", "additive bias"):
        assert served[option] == everywhere | {"`mosaic_tpu`": "-", "`cudnn`": "-"}


def test_the_layer_example_is_the_script():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    script = (ROOT / "docs/examples/attention_layer.py").read_text(encoding="utf-8")
    assert blocks[0].strip() in script


def test_the_example_of_linear_attention_is_the_script():
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/linear_attention.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert block.strip() in (ROOT / "docs/examples/linear_attention_layer.py").read_text(encoding="utf-8")


def test_the_configs_that_the_readme_names_exist():
    for name in re.findall(r"configs/\w+\.yaml", README):
        assert (ROOT / name).is_file(), name

"""docs/torch.md: its examples run as they stand, one after the other."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[3] / "docs" / "torch.md"


def test_the_examples_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = PAGE.read_text("utf-8")
    names = {}
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    assert len(blocks) == text.count("```") / 2
    for block in blocks:
        # Lines of a failure are those of the page.
        first = text.count("\n", 0, block.start(1))
        exec(compile("\n" * first + block.group(1), str(PAGE), "exec"), names)  # noqa: S102

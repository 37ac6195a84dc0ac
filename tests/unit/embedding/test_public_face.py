"""`import penstock`: what a script writes, and what it costs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import penstock

README = Path(__file__).resolve().parents[3] / "README.md"


def test_the_example_of_the_readme_runs_as_it_is_printed(tmp_path, monkeypatch):
    (source,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    exec(source, names)  # noqa: S102
    assert names["loss"].item() < 0.45  # 0.69 when nothing is learnt


def test_every_public_name_is_where_it_says():
    for name in penstock.__all__:
        assert getattr(penstock, name) is not None
        assert name in dir(penstock)
    assert penstock.EmbeddingCollection.__module__ == "penstock.embedding.collection.collection"
    with pytest.raises(AttributeError, match="module 'penstock' has no attribute 'Embedings'"):
        penstock.Embedings  # noqa: B018


def test_the_import_alone_brings_in_nothing_heavy():
    program = (
        "import sys, penstock; heavy = {'torch', 'numpy', 'pydantic', 'penstock._core'}; "
        "print(sorted(heavy & set(sys.modules))); penstock.Jagged; print('torch' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ
    )
    assert out.stdout.splitlines() == ["[]", "True"]


def test_the_checker_of_types_knows_the_same_names():
    # The names are written twice: once for the checker, once for the import when first used.
    text = Path(penstock.__file__).read_text("utf-8")
    (block,) = re.findall(r"if TYPE_CHECKING:\n(.*?)\n\n__version__", text, re.DOTALL)
    listed = re.findall(r"\w+", re.sub(r"\bfrom [\w.]+ import\b", "", block))
    assert sorted(listed) == sorted(set(penstock.__all__) - {"__version__"})

"""The README's job, as it stands there, trains."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from penstock import run as story
from penstock.config import parse_job

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_job_of_the_readme_trains(tmp_path, monkeypatch, quiet):
    rng, n = np.random.default_rng(0), 2000
    columns = {
        "click": rng.integers(0, 2, n),
        "n1": rng.random(n),
        "user": rng.integers(0, 10**12, n),
        "item": rng.integers(0, 100, n),
        "city": [f"city {i}" for i in rng.integers(0, 50, n)],
        "clicked_items": [rng.integers(0, 100, size).tolist() for size in rng.integers(0, 5, n)],
    }
    (tmp_path / "logs").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "logs" / "day_1.parquet")
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    summary = story.train(parse_job(yaml.safe_load(text)), tmp_path / "run", console=quiet)
    assert summary["samples"] == 1800
    assert set(summary["tables"]) == {"user", "item", "city"}
    assert summary["tables"]["item"]["rows"] <= 100

"""Every recipe is a valid job of its file's name."""

from pathlib import Path

import pytest

from penstock.job_file import load_job

JOBS = sorted((Path(__file__).resolve().parents[3] / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_recipe_is_a_valid_job(path):
    assert load_job(str(path)).name == path.stem.replace("_", "-")

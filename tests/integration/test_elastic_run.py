"""The short form of `tests/soak/elastic_killed.py`; the long one is run by hand."""

import pytest

from tests.soak.elastic_killed import Victim, write_files


@pytest.mark.slow
def test_killed_runs_apply_each_row_once_and_are_replayed_to_the_bit(tmp_path):
    rows = write_files(tmp_path / "data", 12, 1500)
    met = Victim(tmp_path / "victim", tmp_path / "data", rows, [1, 2, 3], 4).run(3)
    assert sum(met.values()) > 0

import pytest

from penstock.errors import ConfigError
from penstock.training.prediction import write_scores


def test_scores_cannot_lie_under_a_file(tmp_path):
    (tmp_path / "file").write_text("here already", encoding="utf-8")
    for out in (tmp_path / "file" / "scores.parquet", tmp_path / "file" / "a" / "scores.parquet"):
        with pytest.raises(ConfigError, match="cannot write the scores"):
            write_scores([], None, (), out)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "here already"

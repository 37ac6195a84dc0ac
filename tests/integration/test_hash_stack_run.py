"""A job whose table is a hash stack trains in as many rows as it has, and goes on with the same."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock import run as story
from penstock.config import parse_job
from penstock.errors import CheckpointError, ConfigError


def test_a_stacked_table_is_trained_evaluated_and_resumed(small_fields, tmp_path, quiet):
    stacked = {"name": "c0", "dim": 8, "hash_stack": {"rounds": 2, "size": 40}}
    small_fields["tables"] = [stacked]
    out = tmp_path / "run"
    small_fields["training"]["max_steps"] = 20
    story.train(parse_job(small_fields), out, console=quiet)
    small_fields["training"]["max_steps"] = 30
    summary = story.train(parse_job(small_fields), out, resume=True, console=quiet)
    assert story.evaluate(out)["auc"] == summary["auc"] > 0.55
    assert summary["tables"]["c0"]["rows"] == 80
    stacked["hash_stack"] = {"rounds": 2, "size": 41}
    small_fields["training"]["max_steps"] = 40
    with pytest.raises((CheckpointError, ConfigError), match="hash_stack"):
        story.train(parse_job(small_fields), out, resume=True, console=quiet)


@pytest.fixture
def stacked_fields(small_fields):
    small_fields["tables"] = [{"name": "c0", "dim": 8, "hash_stack": {"size": 40}}]
    small_fields["training"]["max_steps"] = 5
    return small_fields


def test_rows_of_another_stack_begin_no_run(stacked_fields, tmp_path, quiet):
    story.train(parse_job(stacked_fields), tmp_path / "one", console=quiet)
    stacked_fields["training"]["init_from"] = str(tmp_path / "one")
    story.train(parse_job(stacked_fields), tmp_path / "two", console=quiet)
    stacked_fields["tables"][0]["hash_stack"]["rounds"] = 3
    with pytest.raises(ConfigError, match="table c0: hash_stack is another than in that run"):
        story.train(parse_job(stacked_fields), tmp_path / "three", console=quiet)


def test_vectors_by_key_have_no_row_in_a_stack(stacked_fields, tmp_path, quiet):
    table = pa.table({"key": [1, 2], "vector": [[0.0] * 8, [1.0] * 8]})
    pq.write_table(table, tmp_path / "vectors.parquet")
    stacked_fields["training"]["pretrained"] = [
        {"table": "c0", "path": str(tmp_path / "vectors.parquet"), "key": "key", "vector": "vector"}
    ]
    with pytest.raises(ConfigError, match="table 'c0' is a hash_stack"):
        story.train(parse_job(stacked_fields), tmp_path / "run", console=quiet)

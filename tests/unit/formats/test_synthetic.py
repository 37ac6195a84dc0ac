import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from penstock.config import SyntheticSource
from penstock.data.formats.synthetic import SyntheticRows, write_synthetic
from penstock.errors import ConfigError


def table_of(config):
    source = SyntheticRows(config)
    return pa.concat_tables(
        chunk.table
        for split in source.extents()
        for chunk in source.read(split, source.schema.names)
    )


def auc(labels, scores):
    order = np.argsort(scores, kind="stable")
    ranks = np.empty(len(scores))
    ranks[order] = np.arange(1, len(scores) + 1)
    positives = labels.sum()
    return (ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (
        positives * (len(labels) - positives)
    )


def test_a_row_is_a_function_of_seed_and_number():
    long = table_of(SyntheticSource(rows=50_000, seed=3))
    assert table_of(SyntheticSource(rows=20_001, seed=3)).equals(long[:20_001])
    assert not table_of(SyntheticSource(rows=100, seed=4)).equals(long[:100])


def test_format_of_the_keys_and_clicks_never_changes():
    table = table_of(SyntheticSource(rows=1000, seed=-1))
    digest = hashlib.sha256()
    for name in ("click", "event_time", "c0", "c7"):
        digest.update(table[name].to_numpy().tobytes())
    assert digest.hexdigest()[:16] == "6cbc1588a83e1002"


@pytest.mark.parametrize("seed", range(3))
def test_the_teacher_is_worth_learning(seed):
    table = table_of(SyntheticSource(rows=100_000, seed=seed))
    click, teacher = table["click"].to_numpy(), table["teacher"].to_numpy()
    assert 0.1 <= click.mean() <= 0.3
    assert 0.77 <= auc(click, teacher) <= 0.85
    # Calibrated: in every tenth of the rows by probability, clicks are as many as it says.
    order = np.argsort(teacher)
    for tenth in np.array_split(order, 10):
        expected = teacher[tenth].sum()
        # Five standard deviations.
        assert abs(click[tenth].sum() - expected) < 5 * np.sqrt(expected)


def test_keys_are_many_and_follow_the_power_law():
    table = table_of(SyntheticSource(rows=100_000, exponent=1.2, keys_per_feature=100_000))
    keys = table["c0"].to_numpy()
    counts = np.sort(np.unique(keys, return_counts=True)[1])[::-1]
    weights = np.arange(1, 100_001) ** -1.2
    expected = weights[:50] / weights.sum() * 100_000
    np.testing.assert_allclose(counts[:50], expected, atol=6 * np.sqrt(expected[0]))
    assert len(counts) > 10_000
    assert (keys < 0).mean() == pytest.approx(0.5, abs=0.3)


@pytest.mark.parametrize("exponent", [1.0, 1.5])
def test_more_keys_than_the_exact_head(exponent):
    source = SyntheticRows(SyntheticSource(exponent=exponent, keys_per_feature=10**9))
    ranks = source._ranks(np.array([0.0, 0.5, 1 - 2**-53]))
    assert ranks[0] == 1
    assert ranks[2] == pytest.approx(10**9, rel=0.01)


def test_event_times_increase():
    times = table_of(SyntheticSource(rows=40_000))["event_time"].to_numpy()
    assert (np.diff(times) > 0).all()


@pytest.mark.parametrize("format", ["parquet", "csv", "tsv"])
def test_written_rows_are_the_rows(format, tmp_path):
    config = SyntheticSource(rows=70_000, num_categorical=2, num_numeric=1)
    path, progress = tmp_path / f"log.{format}", []
    write_synthetic(config, path, format, progress.append)
    assert progress == [65_536, 70_000]
    expected = table_of(config)
    if format == "parquet":
        assert pq.read_table(path).equals(expected)
    else:
        options = csv.ParseOptions(delimiter="\t" if format == "tsv" else ",")
        read = csv.read_csv(path, parse_options=options)
        assert read["c0"].equals(expected["c0"])
        assert read["click"].to_pylist() == expected["click"].to_pylist()
        np.testing.assert_array_equal(read["n0"].cast("float32"), expected["n0"])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "log.parquet"
    with pytest.raises(ConfigError, match=rf"{path}: cannot be written: "):
        write_synthetic(SyntheticSource(rows=10), path, "parquet")

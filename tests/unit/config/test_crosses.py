"""Crossed features and numbers in buckets: keys, columns and messages."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock import _core
from penstock.config import Bucketize, Hash, parse_job
from penstock.data import Dataset
from penstock.data.columns.transforms import cross, read_keys
from penstock.errors import ConfigError, DataError
from penstock.training.trained import _on_other_data
from tests.contract.data_cases import assert_resumes_everywhere, read_all

COLUMNS = {
    "label": [0, 1, 1, 0],
    "I1": [0.5, None, 3.0, float("nan")],
    "C1": [5, 6, None, 5],
    "C2": ["a", None, "", "a"],
}


def job_over(path, columns=None, **fields):
    pq.write_table(pa.table({**COLUMNS, **(columns or {})}), path / "x.parquet")
    return parse_job({
        "data": {
            "source": {"format": "parquet", "path": str(path / "x.parquet")},
            "label": {"column": "label"},
            "numeric": [{"columns": ["I*"]}],
            "shuffle": {"block_rows": 0},
        },
        "features": [{"columns": ["C1"]}],
        **fields,
    })


def message(error, call):
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


def by_hand(seed, *values):
    """The documented key, with the hash that has published test vectors."""
    for value in values:
        if value is None:
            data = b""
        else:
            number = _core.xxh64(value.encode()) if isinstance(value, str) else value
            data = (number % 2**64).to_bytes(8, "little")
        seed = _core.xxh64(data, seed)
    return seed


def signed(key):
    return key - 2**64 if key >= 2**63 else key


class TestCross:
    @pytest.mark.parametrize("seed", [0, 2**64 - 1])
    def test_keys_are_the_documented_hash(self, seed):
        numbers = [1, None, -1, 2**62, 0, None, 7]
        texts = ["a", None, None, "", "abc" * 20, "x", "a"]
        for low in range(4):
            columns = [pa.array(numbers)[low:], pa.array(texts)[low:]]
            expected = [signed(by_hand(seed, *row)) for row in zip(numbers, texts, strict=True)]
            assert cross(columns, seed, None).tolist() == expected[low:]
        small = cross([pa.array(numbers), pa.array(texts)], seed, 10)
        assert small.tolist() == [key % 2**64 % 10 for key in expected]

    def test_other_layouts_of_the_same_values(self):
        texts = ["a", None, "b"]
        plain = cross([pa.array(texts), pa.array([1, 0, 1])], 0, None).tolist()
        for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
            for other in (pa.int8(), pa.uint64(), pa.bool_()):
                columns = [pa.array(texts).cast(kind), pa.array([1, 0, 1]).cast(other)]
                assert cross(columns, 0, None).tolist() == plain
        assert (
            cross([pa.nulls(2), pa.nulls(2)], 3, None).tolist()
            == [signed(by_hand(3, None, None))] * 2
        )
        assert cross([pa.array([], pa.string())] * 2, 0, None).tolist() == []

    def test_order_counts_and_pairs_do_not_merge(self):
        a, b = pa.array([1, 2, 12]), pa.array([2, 1, 0])
        assert len({*cross([a, b], 0, None).tolist(), *cross([b, a], 0, None).tolist()}) == 4

    def test_a_feature_after_the_others(self, tmp_path):
        crosses = [
            {"name": "both", "columns": ["C1", "C2"]},
            {"name": "C0", "columns": ["C2", "C1"], "seed": 3, "buckets": 100, "table": "t"},
        ]
        tables = [{"name": "t", "dim": 8}]
        dataset = Dataset.open(job_over(tmp_path, crosses=crosses, tables=tables))
        assert [f.name for f in dataset.features] == ["C1", "both", "C0"]
        assert [(f.name, f.table) for f in dataset.features][2] == ("C0", "t")
        assert [table.name for table in dataset.tables] == ["t", "C1", "both"]
        (batch,) = read_all(dataset)
        rows = list(zip(COLUMNS["C1"], COLUMNS["C2"], strict=True))
        assert batch.sparse["both"].values.tolist() == [signed(by_hand(0, *row)) for row in rows]
        assert batch.sparse["C0"].values.tolist() == [by_hand(3, *row[::-1]) % 100 for row in rows]
        assert_resumes_everywhere(dataset, batch_size=2, epochs=2)

    def test_other_data_of_a_trained_job(self, tmp_path):
        job = job_over(
            tmp_path,
            features=[
                {"columns": ["C1"]},
                {"columns": ["c*", "C1x*", "C[3-9]", "C2"], "transforms": [{"kind": "hash"}]},
            ],
            crosses=[{"name": "cross", "columns": ["C1", "C2"]}],
        )
        resolved = {"numeric": ["I1"], "features": [{"name": n} for n in ("C1", "C2", "cross")]}
        other = _on_other_data(job, str(tmp_path / "x.parquet"), resolved)
        assert [f.name for f in Dataset.open(other).features] == ["C1", "C2", "cross"]

    @pytest.mark.parametrize(
        ("crosses", "error", "text"),
        [
            (
                [{"name": "C1", "columns": ["C1", "C2"]}],
                ConfigError,
                "crosses.0.name: another feature is named 'C1'; change one",
            ),
            (
                [{"name": "x", "columns": ["C1", "label"]}],
                ConfigError,
                "crosses.0.columns: 'label' is the label; leave it out",
            ),
            (
                [{"name": "x", "columns": ["C1", "C22"]}],
                DataError,
                "{path}: no column 'C22' (crosses.0); did you mean 'C2'?",
            ),
            (
                [{"name": "x", "columns": ["C1", "I1"]}],
                DataError,
                "{path}: column 'I1' is double; crossed columns hold one integer or text a row; "
                "leave it out of the cross",
            ),
            (
                [{"name": "x", "columns": ["C1", "C2"], "table": "t"}],
                ConfigError,
                "crosses.0.table: no table 't' under `tables`; there are none",
            ),
        ],
    )
    def test_messages(self, crosses, error, text, tmp_path):
        job = job_over(tmp_path, crosses=crosses)
        path = tmp_path / "x.parquet"
        assert message(error, lambda: Dataset.open(job)) == text.replace("{path}", str(path))

    def test_one_column_is_no_cross(self, tmp_path):
        assert message(
            ConfigError, lambda: job_over(tmp_path, crosses=[{"name": "x", "columns": ["C1"]}])
        ).startswith("job: crosses.0.columns: tuple should have at least 2 items")


class TestBucketize:
    def test_counts_the_boundaries_at_or_below(self):
        steps = [Bucketize(boundaries=(0, 1.5, 10))]
        numbers = [-1.0, 0.0, 1.4, 1.5, 9.0, 10.0, 1e300, None, float("nan")]
        keys = read_keys(pa.array(numbers, from_pandas=False), steps, -7)
        assert keys.values.tolist() == [0, 1, 1, 2, 2, 3, 3, -7, -7]
        keys = read_keys(pa.array([[1, None], None, [99]]), steps, None)
        assert (keys.values.tolist(), keys.lengths.tolist()) == ([1, 3], [1, 0, 1])
        hashed = read_keys(pa.array([1]), [*steps, Hash()], None).values.tolist()
        assert hashed == [signed(_core.xxh64(b"1"))]

    @pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.float16(), pa.float32()])
    def test_every_number_type(self, kind):
        column = pa.array(np.array([0, 1, 2], dtype=np.float16)).cast(kind)
        steps = [Bucketize(boundaries=(1,))]
        assert read_keys(column, steps, None).values.tolist() == [0, 1, 1]

    def test_beside_the_number_itself(self, tmp_path):
        features = [{"columns": ["I1"], "transforms": [{"kind": "bucketize", "boundaries": [1]}]}]
        (batch,) = read_all(Dataset.open(job_over(tmp_path, features=features)))
        assert batch.dense[:, 0].tolist() == [0.5, 0, 3, 0]
        assert batch.sparse["I1"].values.tolist() == [0, 1]
        assert batch.sparse["I1"].offsets.tolist() == [0, 1, 1, 2, 2]
        assert (
            message(ConfigError, lambda: Dataset.open(job_over(tmp_path, features=features * 2)))
            == "column 'I1' is claimed by features.0 and by features.1; leave it to one of them"
        )

    def test_text_columns_are_read_as_numbers(self, tmp_path):
        (tmp_path / "x.csv").write_text("label,age\n1,30\n0,\n1,7.5\n")
        job = parse_job({
            "data": {
                "source": {"format": "csv", "path": str(tmp_path / "x.csv")},
                "label": {"column": "label"},
                "shuffle": {"block_rows": 0},
            },
            "features": [
                {"columns": ["age"], "transforms": [{"kind": "bucketize", "boundaries": [18, 65]}]}
            ],
        })
        (batch,) = read_all(Dataset.open(job))
        assert batch.sparse["age"].values.tolist() == [1, 0]

    def test_messages(self, tmp_path):
        step = {"kind": "bucketize", "boundaries": [1, 1]}
        assert message(
            ConfigError,
            lambda: job_over(tmp_path, features=[{"columns": ["I1"], "transforms": [step]}]),
        ).startswith("job: features.0.transforms.0: boundaries must ascend, but 1 follows 1")
        late = [{"kind": "hash"}, {"kind": "bucketize", "boundaries": [1]}]
        assert message(
            ConfigError,
            lambda: job_over(tmp_path, features=[{"columns": ["I1"], "transforms": late}]),
        ).startswith("job: features.0: bucketize reads numbers: put it first, and once")
        texts = [{"columns": ["C2"], "transforms": late[1:]}]
        assert message(DataError, lambda: Dataset.open(job_over(tmp_path, features=texts))) == (
            f"{tmp_path}/x.parquet: column 'C2' is string; the transform bucketize reads numbers; "
            "remove it"
        )

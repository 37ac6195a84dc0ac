"""Weighted keys and sequences, from the file to the batch, against plain loops."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.config import FeatureColumns, parse_job
from penstock.data import Dataset
from penstock.data.columns.transforms import Keys, read_key_weights, read_keys, truncate
from penstock.errors import ConfigError, DataError
from penstock.training.checkpoint.job_difference import resolve, resolved_differences
from tests.contract.data_cases import assert_resumes_everywhere, read_all

NUMBERS = st.floats(-1024, 1024, width=32)


def weighted(keys, weights, missing=None):
    """The documented rule, row by row: (key, weight) of each bag."""
    bags = []
    for of_keys, of_weights in zip(keys, weights, strict=True):
        if of_keys is None:
            bags.append([] if missing is None else [(missing, 1.0)])
            continue
        pairs = zip(of_keys, of_weights or [], strict=True)
        bags.append([
            (missing if key is None else key, weight)
            for key, weight in pairs
            if key is not None or missing is not None
        ])
    return bags


def cut(pairs, most, keep):
    return pairs if len(pairs) <= most else pairs[:most] if keep == "first" else pairs[-most:]


def bags_of(keys, rows):
    lengths = np.ones(rows, int) if keys.lengths is None else keys.lengths
    pairs = list(zip(keys.values.tolist(), keys.weights.tolist(), strict=True))
    ends = np.cumsum(lengths)
    return [pairs[end - length : end] for end, length in zip(ends, lengths, strict=True)]


BAG = st.lists(st.tuples(st.none() | st.integers(-5, 5), NUMBERS), max_size=5)


class TestReading:
    @given(
        st.lists(st.none() | BAG, max_size=8),
        st.sampled_from([None, -1]),
        st.integers(1, 4),
        st.sampled_from(["first", "last"]),
        st.sampled_from([pa.list_, pa.large_list]),
        st.integers(0, 2),
        st.booleans(),
    )
    def test_lists_equal_a_plain_loop(self, rows, missing, most, keep, kind, low, null_lists):
        keys = [None if row is None else [key for key, _ in row] for row in rows]
        weights = [[w for _, w in row or ()] for row in rows]
        if null_lists:
            weights = [of_row or None for of_row in weights]
        columns = [
            pa.array(keys, kind(pa.int32()))[low:],
            pa.array(weights, pa.list_(pa.float64()))[low:],
        ]
        read = read_keys(columns[0], [], missing)
        read = read._replace(weights=read_key_weights(columns[1], columns[0], missing))
        expected = weighted(keys[low:], weights[low:], missing)
        assert bags_of(read, len(expected)) == expected
        short = truncate(read, most, keep)
        assert bags_of(short, len(expected)) == [cut(bag, most, keep) for bag in expected]

    @pytest.mark.parametrize(("missing", "expected"), [(None, []), (7, [1.0, 1.0])])
    def test_columns_without_any_value_hold_null_lists(self, missing, expected):
        nothing = pa.nulls(2)
        assert read_key_weights(nothing, nothing, missing).tolist() == expected
        keys = read_keys(nothing, [], missing)
        assert len(keys.values) == len(expected)

    @pytest.mark.parametrize("missing", [None, 7])
    @pytest.mark.parametrize(
        "kind", [pa.int64(), pa.uint8(), pa.dictionary(pa.int8(), pa.int64()), pa.float32()]
    )
    def test_one_key_a_row(self, kind, missing):
        keys = pa.array([1, None, 3])
        keys = keys.dictionary_encode() if pa.types.is_dictionary(kind) else keys.cast(kind)
        weights = pa.array([0.5, 2.0, -1.0], pa.float32())
        found = read_key_weights(weights, keys, missing)
        assert found.tolist() == ([0.5, -1.0] if missing is None else [0.5, 2.0, -1.0])
        # Where the key is left out, nobody asks for its weight.
        weights = pa.array([0.5, None, -1.0])
        assert read_key_weights(weights, keys, None).tolist() == [0.5, -1.0]

    @pytest.mark.parametrize(
        "kind", [pa.int8(), pa.uint64(), pa.bool_(), pa.decimal128(7, 2), pa.float16()]
    )
    def test_every_type_of_number(self, kind):
        numbers = pa.array([1, 0, 1], pa.int16()).cast(kind)
        lists = pa.FixedSizeListArray.from_arrays(numbers, 3)
        keys = pa.array([[4, 5, 6]])
        assert read_key_weights(lists, keys, None).tolist() == [1, 0, 1]


def table_of(rows, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 5, (2, rows))
    absent = rng.random(rows) < 0.15

    def lists(which, make):
        return [
            None if which == 1 and absent[row] else make(lengths[which][row]) for row in range(rows)
        ]

    return pa.table({
        "label": np.zeros(rows, np.int64),
        "row": np.arange(rows),
        "seen": lists(0, lambda n: rng.integers(0, 50, n).tolist()),
        "bought": lists(1, lambda n: [None if rng.random() < 0.2 else int(rng.integers(9))] * n),
        "spent": lists(1, lambda n: rng.integers(-8, 8, n).tolist()),
        "item": rng.integers(0, 6, rows),
        "trust": rng.integers(1, 9, rows) / 4,
    })


def job_over(path, table, **data):
    pq.write_table(table, path / "log.parquet", row_group_size=16)
    return parse_job({
        "data": {
            "source": {"format": "parquet", "path": str(path / "log.parquet")},
            **({} if "negatives" in data else {"label": {"column": "label"}}),
            "shuffle": {"block_rows": 20},
            **data,
        },
        "features": [
            {"columns": ["row"]},
            {"columns": ["seen"], "pooling": "sequence", "max_keys": 3, "keep": "last"},
            {"columns": ["bought"], "weights": "spent", "max_keys": 2, "missing": -1},
            {"columns": ["item"], "weights": "trust", "pooling": "mean"},
        ],
    })


def rows_expected(table):
    """Of each row by feature: (key, weight) of its bag."""
    columns = table.to_pydict()
    bought = weighted(columns["bought"], columns["spent"], -1)
    return [
        {
            "row": [(row, 1.0)],
            "seen": [(key, 1.0) for key in columns["seen"][row][-3:]],
            "bought": bought[row][:2],
            "item": [(columns["item"][row], columns["trust"][row])],
        }
        for row in range(table.num_rows)
    ]


def samples_of(batches):
    out = []
    for batch in batches:
        bags = {name: batch.sparse[name] for name in batch.sparse.features}
        for sample in range(batch.batch_size):
            here = {}
            for name, bag in bags.items():
                at = slice(bag.offsets[sample], bag.offsets[sample + 1])
                pairs = zip(bag.values[at].tolist(), bag.weights[at].tolist(), strict=True)
                here[name] = list(pairs)
            out.append((batch.labels[sample].item(), here))
    return out


class TestBatches:
    @settings(max_examples=30)
    @given(
        rows=st.integers(1, 70),
        seed=st.integers(0, 99),
        batch_size=st.integers(1, 40),
        shuffle=st.booleans(),
    )
    def test_equal_the_rows(self, rows, seed, batch_size, shuffle, tmp_path_factory):
        table = table_of(rows, seed)
        dataset = Dataset.open(job_over(tmp_path_factory.mktemp("rows"), table))
        batches = read_all(dataset, batch_size=batch_size, shuffle=None if shuffle else False)
        found = [sample for _, sample in samples_of(batches)]
        if shuffle:
            found.sort(key=lambda sample: sample["row"])
        assert found == rows_expected(table)

    @settings(max_examples=30)
    @given(rows=st.integers(8, 70), seed=st.integers(0, 99), batch_size=st.integers(1, 40))
    def test_negatives_take_weights_along(self, rows, seed, batch_size, tmp_path_factory):
        table = table_of(rows, seed)
        job = job_over(
            tmp_path_factory.mktemp("rows"),
            table,
            negatives={"per_positive": 2, "columns": ["item", "bought", "row"]},
        )
        # `row` follows the item, so that it tells which row that is; `seen` is the row's own.
        batches = read_all(Dataset.open(job), batch_size=batch_size, shuffle=False)
        expected = rows_expected(table)
        samples = samples_of(batches)
        assert len(samples) == 3 * rows
        for number, (label, sample) in enumerate(samples):
            own, taken = number // 3, sample["row"][0][0]
            assert label == (own == taken) == (number % 3 == 0)
            of_item = {name: expected[taken][name] for name in ("row", "bought", "item")}
            assert sample == {"seen": expected[own]["seen"], **of_item}

    def test_resume_anywhere(self, tmp_path):
        dataset = Dataset.open(job_over(tmp_path, table_of(70, 1)))
        whole = read_all(dataset, batch_size=16)
        assert all(len(batch.sparse.weights) == len(batch.sparse.values) for batch in whole)
        rest = read_all(dataset, batch_size=16, start=whole[1].end)
        assert samples_of(rest) == samples_of(whole[2:])
        assert_resumes_everywhere(dataset, batch_size=16, epochs=2)

    def test_without_weights_there_are_none(self, tmp_path):
        job = job_over(tmp_path, table_of(10, 0))
        plain = job.model_copy(update={"features": job.features[:2]})
        assert read_all(Dataset.open(plain))[0].sparse.weights is None

    def test_features_know_their_positions(self, tmp_path):
        dataset = Dataset.open(job_over(tmp_path, table_of(10, 0)))
        assert [(f.name, f.pooling, f.max_keys) for f in dataset.features] == [
            ("row", "sum", None),
            ("seen", "sequence", 3),
            ("bought", "sum", None),
            ("item", "mean", None),
        ]

    def test_text_and_json(self, tmp_path):
        (tmp_path / "a.csv").write_text("label,item,trust\n1,5,1\n0,6,0.25\n")
        # Weights that begin as integers are numbers all the same.
        lines = ['{"label": 1, "item": [5, 6], "trust": [1, 2]}'] * 1000
        lines.append('{"label": 0, "item": [7], "trust": [0.5]}')
        (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
        for name, types, expected in (
            ("a.csv", {"item": "int64"}, [[(5, 1.0)], [(6, 0.25)]]),
            ("a.jsonl", {}, [[(5, 1.0), (6, 2.0)], [(7, 0.5)]]),
        ):
            job = parse_job({
                "data": {
                    "source": {
                        "format": name[2:],
                        "path": str(tmp_path / name),
                        "types": types,
                    },
                    "label": {"column": "label"},
                    "shuffle": {"block_rows": 0},
                },
                "features": [{"columns": ["*"], "weights": "trust"}],
            })
            samples = samples_of(read_all(Dataset.open(job)))
            assert [sample["item"] for _, sample in samples][-2:] == expected
            assert set(samples[0][1]) == {"item"}


def message(error, call):
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


class TestMessages:
    @pytest.mark.parametrize(
        ("keys", "weights", "text"),
        [
            (
                [[1], [2, 3], None],
                [[1.0], [1.0], None],
                "{file} row 1, column 'w': 1 weights for 2 keys in 'items'; mend the file",
            ),
            (
                [[1], None],
                [[1.0], [2.0, 3.0]],
                "{file} row 1, column 'w': 2 weights for 0 keys in 'items'; mend the file",
            ),
            (
                [[1], [], [2, 3]],
                [[1.0], [], [1.0, None]],
                "{file} row 2, column 'w': the weight of a key is missing in 'items'; mend the "
                "file",
            ),
            (
                [[1], [4, 4]],
                [[1.0], [math.nan, 1.0]],
                "{file} row 1, column 'w': the weight of a key is missing in 'items'; mend the "
                "file",
            ),
            (
                [[1], [4]],
                [[1.0], [-math.inf]],
                "{file} row 1, column 'w': the weight of a key is -inf, not finite in 'items'; "
                "mend the file",
            ),
            (
                [1, 4],
                [1.0, 1e39],
                "{file} row 1, column 'w': the weight of a key is 1e+39, not finite in 'items'; "
                "mend the file",
            ),
            (
                [1, 4],
                [[1.0], [1.0]],
                "{file}: column 'w' is list<element: double>, but the keys 'items' are int64; "
                "their weights are one number a row",
            ),
            (
                [[1], [4]],
                [1.0, 2.0],
                "{file}: column 'w' is double, but the keys 'items' are list<element: int64>; "
                "their weights are lists of numbers",
            ),
            (
                [[1], [4]],
                [["a"], ["b"]],
                "{file}: column 'w' is list<element: string>, but the keys 'items' are "
                "list<element: int64>; their weights are lists of numbers",
            ),
        ],
    )
    def test_of_values(self, keys, weights, text, tmp_path):
        file = tmp_path / "x.parquet"
        pq.write_table(pa.table({"label": [0] * len(keys), "items": keys, "w": weights}), file)
        job = parse_job({
            "data": {
                "source": {"format": "parquet", "path": str(file)},
                "label": {"column": "label"},
            },
            "features": [{"columns": ["items"], "weights": "w"}],
        })
        found = message(DataError, lambda: read_all(Dataset.open(job)))
        assert found == text.replace("{file}", str(file))

    def test_of_a_column_that_is_not_there(self, tmp_path):
        job = job_over(tmp_path, table_of(10, 0).drop_columns(["spent"]))
        assert message(DataError, lambda: Dataset.open(job)) == (
            f"{tmp_path}/log.parquet: no column 'spent' (features.2.weights); did you mean 'seen'?"
        )

    def test_of_a_sequence_without_positions(self):
        assert message(
            ConfigError, lambda: FeatureColumns(columns=("x",), pooling="sequence")
        ).endswith("pooling 'sequence' needs max_keys, its number of positions")


def test_truncation_without_weights_has_none():
    cut_short = truncate(Keys(np.arange(4), np.array([3, 1])), 2, "last")
    assert cut_short.values.tolist() == [1, 2, 3]
    assert cut_short.weights is None


def test_other_positions_are_another_job_and_older_checkpoints_have_none(tmp_path):
    dataset = Dataset.open(job_over(tmp_path, table_of(10, 0)))
    resolved = resolve(dataset.numeric, dataset.features, dataset.tables)
    older = {
        **resolved,
        "features": [
            {name: value for name, value in one.items() if name != "max_keys" or value is not None}
            for one in resolved["features"]
        ],
    }
    assert resolved_differences(older, resolved) == []
    other = {**resolved, "features": [dict(one) for one in resolved["features"]]}
    other["features"][1]["max_keys"] = 4
    assert resolved_differences(resolved, other) == [
        "feature seen.max_keys: 3 in the checkpoint, 4 in the job"
    ]

"""One label and several: configuration, decoding, missing values."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.config import parse_job
from penstock.data import Dataset
from penstock.errors import ConfigError, DataError
from tests.contract.data_cases import read_all

ROWS = {"stars": [1.0, 4.0, 5.0, 3.0], "bought": [0, 1, None, 1], "user": [1, 2, 3, 4]}
BOTH = [
    {"name": "liked", "column": "stars", "at_least": 4},
    {"column": "stars", "task": "regression"},
    {"column": "bought", "missing": "ignore"},
]


@pytest.fixture
def job_with(tmp_path):
    def make(label, rows=ROWS):
        pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
        source = {"format": "parquet", "path": str(tmp_path / "rows.parquet")}
        data = {"source": source, "label": label, "shuffle": {"block_rows": 0}}
        return parse_job({"data": data, "features": [{"columns": ["user"]}]})

    return make


def labels_of(job, **options):
    (batch,) = read_all(Dataset.open(job, **options), "train", batch_size=8)
    return batch.labels


def test_several_labels_are_columns(job_with):
    labels = labels_of(job_with(BOTH))
    assert labels.shape == (4, 3)
    assert labels[:, 0].tolist() == [0, 1, 1, 0]
    assert labels[:, 1].tolist() == [1, 4, 5, 3]
    assert labels[:2, 2].tolist() == [0, 1]
    assert labels[2, 2].isnan()
    assert [label.title for label in job_with(BOTH).data.labels] == ["liked", "stars", "bought"]


@pytest.mark.parametrize("given", [{"column": "stars", "at_least": 4}, [BOTH[0]]])
def test_one_label_has_no_second_dimension(job_with, given):
    assert labels_of(job_with(given)).tolist() == [0, 1, 1, 0]


def test_a_missing_label_stays_missing_under_a_threshold(job_with):
    label = {"column": "bought", "at_least": 1, "missing": "ignore"}
    assert [math.isnan(value) for value in labels_of(job_with(label))] == [0, 0, 1, 0]


def test_prediction_needs_no_label_column(job_with):
    rows = {name: ROWS[name] for name in ("stars", "user")}
    labels = labels_of(job_with(BOTH, rows), labels="optional")
    assert labels[:, 2].isnan().all()
    assert not labels[:, :2].isnan().any()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            [BOTH[0], {"column": "bought"}],
            "rows.parquet row 2, column 'bought': the label is missing; leave such rows out of the "
            "file, or set missing: ignore of the label",
        ),
        (
            [BOTH[0], {"column": "bougth"}],
            "rows.parquet: no column 'bougth' (data.label.1.column); did you mean 'bought'?",
        ),
        (
            [{"name": "a", "column": "stars"}, BOTH[1]],
            "rows.parquet row 1, column 'stars': label 4 is not 0 or 1; set at_least of the label "
            "to make labels of numbers, or task regression to learn the number",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused(job_with, label, message):
    with pytest.raises(DataError) as caught:
        labels_of(job_with(label))
    assert str(caught.value).endswith(message)


def test_a_number_beyond_float32_is_refused(job_with):
    job = job_with(BOTH[1], ROWS | {"stars": [1.0, 2.0, 1e39, 0.0]})
    with pytest.raises(DataError) as caught:
        labels_of(job)
    assert str(caught.value).endswith(
        "row 2, column 'stars': label 1e+39 is no finite float32; mend the file"
    )


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([], "job: data: label is an empty list; name a column"),
        (
            [{"column": "x"}, {"column": "x", "at_least": 3}],
            "job: data: two labels are named 'x'; give one of them a `name`",
        ),
        (
            {"column": "x", "task": "regression", "at_least": 3},
            "job: data.label: at_least makes 0 and 1 of numbers; remove it or use task binary",
        ),
        (
            [{"column": "x", "offset": 3}],
            "job: data.label.0: offset and scale are of task regression; remove them",
        ),
        ({"colum": "x"}, "job: data.label.colum: unknown key; did you mean 'column'?"),
        (
            [{"column": "x", "at_lest": 3}],
            "job: data.label.0.at_lest: unknown key; did you mean 'at_least'?",
        ),
    ],
)
def test_configuration_that_makes_no_sense_is_refused(label, message):
    with pytest.raises(ConfigError) as caught:
        parse_job({"data": {"source": {"format": "synthetic"}, "label": label}})
    assert message in str(caught.value).splitlines()


def test_a_label_is_no_input(job_with):
    job = job_with(BOTH)
    every = job.model_copy(
        update={"features": (job.features[0].model_copy(update={"columns": ("*",)}),)}
    )
    assert [feature.name for feature in Dataset.open(every).features] == ["user"]

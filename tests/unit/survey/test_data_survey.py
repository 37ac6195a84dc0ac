"""What is found out about unknown data: figures of columns, their roles, the job that follows."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.config import JsonLinesSource, ParquetSource, TextSource, parse_job
from penstock.data import Dataset
from penstock.errors import ConfigError, DataError
from penstock.job_file import parse_yaml
from penstock.survey.job_draft import draft_job
from penstock.survey.survey import survey_data

ROWS = 5000
START_MS = 1_700_000_000_000


def clicks(rows=ROWS, seed=0):
    """A log with something of everything."""
    rng = np.random.default_rng(seed)
    items = rng.zipf(1.5, rows) % 500 + 10
    history = [(rng.zipf(1.5, n) % 500 + 10).tolist() for n in rng.integers(0, 9, rows)]
    return pa.table({
        "row": np.arange(rows) * 7 + 10**7,
        "click": (rng.random(rows) < np.where(items % 2, 0.4, 0.1)).astype(np.int64),
        "when": pa.array(START_MS + np.arange(rows) * 60_000, pa.timestamp("ms", tz="UTC")),
        "user_id": rng.integers(0, 40, rows),
        "item_id": items,
        "item_history": pa.array(history, pa.list_(pa.int64())),
        "city": pa.array(rng.choice(["Bonn", "Kiel", "Ulm"], rows), mask=rng.random(rows) < 0.1),
        "device": np.array([f"{one:08x}" for one in rng.integers(0, 2**32, 20)])[
            rng.integers(0, 20, rows)
        ],
        "price": np.where(rng.random(rows) < 0.2, np.nan, rng.lognormal(3, 2, rows)),
        "temperature": rng.normal(10, 5, rows),
        "version": np.full(rows, 3),
    })


@pytest.fixture
def survey_of(tmp_path):
    def survey(table, **options):
        path = tmp_path / "rows.parquet"
        pq.write_table(table, path, row_group_size=1000)
        return survey_data(ParquetSource(path=str(path)), **options)

    return survey


def roles_of(survey):
    return {column.name: column.role for column in survey.roles.columns}


def opened(survey, path="job.yaml"):
    text = draft_job(survey, "penstock data inspect rows", Path(path))
    job = parse_job(parse_yaml(text, path), path)
    return text, job, Dataset.open(job)


def test_every_column_gets_its_role(survey_of):
    survey = survey_of(clicks())
    assert roles_of(survey) == {
        "row": "id",
        "click": "label",
        "when": "event time",
        "user_id": "categorical",
        "item_id": "categorical",
        "item_history": "sequence",
        "city": "categorical",
        "device": "categorical",
        "price": "numeric",
        "temperature": "numeric",
        "version": "constant",
    }
    assert survey.num_groups == 5
    assert survey.bytes == Path(survey.profile.paths[0]).stat().st_size


def test_figures_are_those_of_the_columns(survey_of):
    table = clicks()
    profile = survey_of(table).profile
    assert profile.rows == ROWS and profile.is_whole
    price = profile["price"]
    numbers = table["price"].to_numpy()
    present = numbers[~np.isnan(numbers)]
    assert price.missing == np.isnan(numbers).sum()
    assert price.numbers.mean == pytest.approx(present.mean())
    assert price.numbers.deviation == pytest.approx(present.std())
    assert (price.numbers.minimum, price.numbers.maximum) == (present.min(), present.max())
    expected = np.quantile(present, [0.01, 0.5], method="inverted_cdf")
    assert [price.numbers.quantiles[place] for place in (0, 3)] == expected.tolist()
    city = profile["city"]
    assert (city.missing, city.values.distinct) == (table["city"].null_count, 3)
    assert city.hottest in {"Bonn", "Kiel", "Ulm"}
    assert profile["device"].hex_digits == 8
    history = profile["item_history"]
    lengths = [len(one) for one in table["item_history"].to_pylist()]
    assert history.missing == 0 and history.longest == 8
    assert history.lengths.mean == pytest.approx(np.mean(lengths))
    assert history.values.accesses == sum(lengths)


def test_label_rate_by_time(survey_of):
    table = clicks()
    rate = survey_of(table).rate
    labels = table["click"].to_numpy()
    assert rate.overall == labels.mean()
    assert rate.is_time and rate.edges[0] == START_MS
    assert rate.rows.sum() == ROWS and rate.rows.max() - rate.rows.min() <= 1
    first = int(rate.rows[0])
    assert rate.positives[0] == labels[:first].sum()


def test_label_rate_by_row_where_there_is_no_time(survey_of):
    table = clicks().drop(["when"])
    rate = survey_of(table).rate
    assert not rate.is_time and rate.edges.tolist() == np.linspace(0, ROWS, 25).tolist()
    assert rate.positives.sum() == table["click"].to_numpy().sum()


def test_a_sample_is_spread_over_the_file(survey_of, monkeypatch):
    monkeypatch.setattr("penstock.data.formats.columnar.EXTENT_ROWS", 1000)
    survey = survey_of(clicks(), max_rows=500)
    assert survey.profile.rows == 500 and not survey.profile.is_whole
    times = survey.profile["when"].numbers
    # A hundred rows of each row group, not the first five hundred.
    assert times.maximum == START_MS + 4099 * 60_000
    assert survey.rate.rows.sum() == 500


def test_the_draft_says_why_and_opens(survey_of):
    text, job, dataset = opened(survey_of(clicks()))
    assert [feature.name for feature in dataset.features] == [
        "user_id",
        "item_id",
        "item_history",
        "city",
        "device",
    ]
    tables = {feature.name: feature.table for feature in dataset.features}
    assert tables["item_history"] == "item_id"
    assert "# most of its keys are in 'item_id'" in text
    groups = {feature.columns[0]: feature for feature in job.features}
    assert groups["city"].transforms[0].kind == "hash" and groups["city"].missing == -1
    assert groups["device"].transforms[0].kind == "hex"
    assert groups["item_history"].pooling == "mean" and groups["item_history"].max_keys == 8
    assert job.data.event_time == "when" and job.data.split.by == "time"
    share = dataset.num_rows("evaluation") / ROWS
    assert share == pytest.approx(0.2, abs=0.03)
    numeric = {group.columns: group for group in job.data.numeric}
    assert [one.kind for one in numeric["price",].transforms] == ["log"]
    scale = numeric["temperature",].transforms[0]
    assert (scale.offset, 1 / scale.factor) == pytest.approx((10, 5), rel=0.05)
    assert "# Left out: version (every value is 3)." in text
    assert job.evaluation.metrics.grouped_auc == ("user_id",)
    assert all(len(line) <= 100 for line in text.splitlines())


def test_a_rating_becomes_a_label(survey_of):
    rng = np.random.default_rng(0)
    table = pa.table({
        "user_id": rng.integers(0, 90, ROWS),
        "rating": rng.choice([1, 2, 3, 4, 5], ROWS, p=[0.1, 0.1, 0.2, 0.4, 0.2]),
    })
    survey = survey_of(table)
    assert (survey.roles.label, survey.roles.at_least) == ("rating", 4)
    text, job, _ = opened(survey)
    assert job.data.label.at_least == 4 and job.model.kind == "dlrm"
    assert "5 different numbers from 1 to 5; from the median on a row is positive." in text
    assert survey.rate.overall == pytest.approx(0.6, abs=0.03)


def test_other_labels_are_left_out(survey_of):
    table = clicks().append_column("conversion", clicks(seed=1)["click"])
    survey = survey_of(table)
    assert roles_of(survey)["conversion"] == "left out"
    assert survey.roles.label == "click"
    assert survey_of(table, label="conversion").roles.label == "conversion"


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_integer_times_by_unit(survey_of, unit):
    per_ms = {"s": 1e-3, "ms": 1, "us": 1e3, "ns": 1e6}[unit]
    when = ((START_MS + np.arange(ROWS) * 60_000) * per_ms).astype(np.int64)
    table = clicks().drop(["when"]).append_column("created_at", pa.array(when))
    survey = survey_of(table)
    assert (survey.roles.event_time, survey.roles.time_unit) == ("created_at", unit)
    _, job, dataset = opened(survey)
    assert job.data.event_time_unit == unit
    assert dataset.num_rows("evaluation") / ROWS == pytest.approx(0.2, abs=0.03)


def test_ids_of_ten_digits_are_no_times(survey_of):
    rng = np.random.default_rng(0)
    hashed = rng.integers(6 * 10**8, 4 * 10**9, 300)[rng.integers(0, 300, ROWS)]
    table = clicks().drop(["when"]).append_column("x", pa.array(hashed))
    survey = survey_of(table)
    assert survey.roles.event_time is None and roles_of(survey)["x"] == "categorical"
    with pytest.raises(ConfigError) as caught:
        survey_of(table, event_time="city")
    assert str(caught.value) == (
        "--event-time: column 'city' holds no times, or lacks some: times are timestamps, dates, "
        "ISO 8601 text or integers since 1970, one in each row"
    )


def test_names_that_yaml_or_tables_do_not_take(survey_of):
    rng = np.random.default_rng(0)
    names = ["a b", "a_b", "yes", "1e5", 'q"uote', "käse", "x: y", "[z]", "- n", "#h", "null"]
    columns = {name: rng.integers(0, 30, ROWS) for name in names}
    table = pa.table({"label": rng.integers(0, 2, ROWS), **columns})
    _, _, dataset = opened(survey_of(table))
    assert sorted(feature.name for feature in dataset.features) == sorted(names)
    assert len({feature.table for feature in dataset.features}) == len(names)


def test_floats_that_are_keys_are_said_to_be(survey_of):
    table = clicks().append_column("shop_id", pa.array(np.arange(ROWS) % 9 * 1.0))
    survey = survey_of(table)
    (role,) = [one for one in survey.roles.columns if one.name == "shop_id"]
    assert role.role == "left out"
    assert role.reason == "its name says keys, but they are floats: write them as int64"


def test_infinite_numbers_are_clipped(survey_of):
    values = np.where(np.arange(ROWS) % 100 == 0, np.inf, np.arange(ROWS) % 17 + 0.5)
    survey = survey_of(clicks().append_column("size", pa.array(values)))
    assert survey.profile["size"].numbers.infinite == ROWS // 100
    _, job, dataset = opened(survey)
    (group,) = [one for one in job.data.numeric if "size" in one.columns]
    assert group.transforms[0].high == 16.5
    with dataset.batches("train", batch_size=512) as batches:
        assert all(np.isfinite(batch.dense.numpy()).all() for batch in batches)


def test_types_that_nothing_reads_are_left_out(survey_of):
    table = clicks().append_column("blob", pa.array([{"a": 1}] * ROWS))
    table = table.append_column("ragged", pa.array([[0.5], [0.5, 1.5]] * (ROWS // 2)))
    survey = survey_of(table)
    reasons = {one.name: (one.role, one.reason) for one in survey.roles.columns}
    assert reasons["blob"] == ("left out", "no input reads struct<a: int64>")
    ragged = "lists of floats, of several lengths: no input reads them"
    assert reasons["ragged"] == ("left out", ragged)


def test_vectors_are_numeric_input(survey_of):
    survey = survey_of(clicks().append_column("vector", pa.array([[0.5, 1.5]] * ROWS)))
    reasons = {one.name: (one.role, one.reason) for one in survey.roles.columns}
    assert reasons["vector"] == ("numeric", "each row is a vector of 2 numbers")
    _, job, dataset = opened(survey)
    assert [group.width for group in job.data.numeric if "vector" in group.columns] == [2]
    assert dataset.numeric_widths == {"vector": 2}


def test_without_a_label_there_is_no_job(survey_of):
    survey = survey_of(clicks().drop(["click"]))
    assert survey.rate is None
    with pytest.raises(ConfigError) as caught:
        draft_job(survey, "x", Path("job.yaml"))
    assert str(caught.value) == (
        "no column looks like a label (0 and 1, or a rating, by a name like label, click or "
        "rating), so there is no job to write; name it: --label COLUMN; or, if every row is a "
        "positive, name the columns of the item: --item COLUMN,..."
    )
    with pytest.raises(
        ConfigError, match="--label: no column 'clack'; there are row, click, when, "
    ):
        survey_of(clicks(), label="clack")
    with pytest.raises(ConfigError) as caught:
        survey_of(clicks(), label="city")
    assert str(caught.value) == "--label: column 'city' holds string; labels are numbers, one a row"


def test_missing_labels_are_left_out(survey_of):
    labels = clicks()["click"].to_pylist()
    labels[5] = None
    table = clicks().drop(["click"]).append_column("click", pa.array(labels))
    survey = survey_of(table)
    assert survey.rate.rows.sum() == ROWS - 1
    text, job, _ = opened(survey)
    assert job.data.label.missing == "ignore"
    assert "# 1 rows have no label: they are left out of the loss and metrics." in text


def test_logs_of_positives_alone(survey_of):
    table = clicks().drop(["click"])
    survey = survey_of(table, items=["item_id"])
    text, job, dataset = opened(survey)
    assert job.data.label is None and job.data.negatives.columns == ("item_id",)
    assert "# Every row is a positive." in text
    with dataset.batches("train", batch_size=100) as batches:
        assert next(batches).labels.mean() == pytest.approx(0.2, abs=0.1)
    with pytest.raises(ConfigError) as caught:
        survey_of(table, items=["version"])
    assert str(caught.value) == (
        "--item: column 'version' is no input (constant: every value is 3); leave it out"
    )
    with pytest.raises(ConfigError, match="--item says that every row is a positive; leave out"):
        survey_of(clicks(), items=["item_id"], label="click")


CSV = "when,click,user_id,price,zip\n"


def csv_lines(rows, price="{:.2f}"):
    for row in range(rows):
        when = f"2024-01-{row % 28 + 1:02d}T00:00:00Z"
        number = "NULL" if row % 5 == 0 else price.format(row % 7 + 0.5)
        yield f"{when},{row % 3 == 0:d},{row % 11},{number},{row % 90:05d}\n"


def test_text_is_read_as_narrowly_as_it_allows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(CSV + "".join(csv_lines(3000)))
    survey = survey_data(TextSource(path=str(path)))
    kinds = {one.name: one.kind for one in survey.profile.columns}
    # 00012 is no number: 12 would be another text.
    assert kinds == {
        "when": "time",
        "click": "integer",
        "user_id": "integer",
        "price": "float",
        "zip": "text",
    }
    assert survey.profile["price"].missing == 600
    _, job, dataset = opened(survey)
    assert job.data.source.null_values == ("NULL",)
    assert job.data.source.types == {"when": "string", "user_id": "int64"}
    with dataset.batches("train", batch_size=4096, shuffle=False) as batches:
        (batch,) = batches
    keys = batch.sparse["user_id"].values.tolist()
    assert set(keys) == set(range(11))


def test_null_texts_among_texts_are_texts(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        "label,country\n" + "".join(f"{n % 2},{['NA', 'DE'][n % 2]}\n" for n in range(99))
    )
    column = survey_data(TextSource(path=str(path))).profile["country"]
    assert (column.kind, column.missing, column.values.distinct) == ("text", 0, 2)
    assert (column.hottest, column.null_texts) == ("NA", ())


def test_a_column_that_turns_out_to_be_text(tmp_path, monkeypatch):
    monkeypatch.setattr("penstock.data.formats.lines.READ_BYTES", 64)
    path = tmp_path / "rows.csv"
    values = [*range(50), 0.5, *range(50), "x"]
    path.write_text("label,v\n" + "".join(f"{n % 2},{v}\n" for n, v in enumerate(values)))
    column = survey_data(TextSource(path=str(path))).profile["v"]
    assert (column.kind, column.numbers) == ("text", None)
    assert column.values.distinct == 52


def test_malformed_rows_are_counted_and_the_job_copes(tmp_path):
    path = tmp_path / "rows.csv"
    lines = [*csv_lines(1000)]
    lines[10:10] = ["a,b\n", "1\n"]
    path.write_text(CSV + "".join(lines))
    survey = survey_data(TextSource(path=str(path)))
    assert survey.malformed == 2 and survey.profile.rows == 1000
    assert survey.malformed_example == f"{path}:12: 2 fields, expected 5"
    _, job, dataset = opened(survey)
    assert job.data.source.on_malformed_row == "quarantine"
    with dataset.batches("train", batch_size=512) as batches:
        assert sum(batch.batch_size for batch in batches) < 1000
    assert dataset.quarantined_rows == 2


def test_a_wrong_format_is_said_early(tmp_path, monkeypatch):
    monkeypatch.setattr("penstock.survey.survey._MOST_MALFORMED", 50)
    path = tmp_path / "rows.txt"
    path.write_text("".join(f"{n}:{n}\n" for n in range(200)))
    with pytest.raises(DataError) as caught:
        survey_data(TextSource(path=str(path), columns=("a", "b")))
    assert str(caught.value) == (
        f"{path}:1: 1 fields, expected 2; 200 of the first 200 rows are malformed: give the right "
        "--format, and --columns if there is no header"
    )


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
@pytest.mark.parametrize("breaks", [False, True])
def test_the_dialect_of_text_is_drafted(tmp_path, delimiter, breaks):
    path = tmp_path / "rows.csv.zst"
    rows = [["click", "item", "title"]]
    rows += [[str(n % 2), str(n % 50), f'"see\n{n}"' if breaks else "see"] for n in range(400)]
    text = "".join(delimiter.join(row) + "\n" for row in rows).encode()
    path.write_bytes(pa.Codec("zstd").compress(text, asbytes=True))
    survey = survey_data(TextSource(path=str(path)))
    assert survey.profile.rows == 400
    draft, job, dataset = opened(survey)
    assert job.data.source.delimiter == delimiter
    assert job.data.source.quoted_line_breaks is breaks
    assert ("quoted_line_breaks" in draft) is breaks
    assert dataset.num_rows("train") + dataset.num_rows("evaluation") == 400


def test_json_lines(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    rows = clicks(600).drop(["when"]).to_pylist()
    for number, row in enumerate(rows):
        row["ts"] = START_MS + number * 1000
        if row["price"] != row["price"]:
            row["price"] = None
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    survey = survey_data(JsonLinesSource(path=str(path)))
    roles = roles_of(survey)
    assert (roles["item_history"], roles["ts"], roles["device"]) == (
        "sequence",
        "event time",
        "categorical",
    )
    _, _, dataset = opened(survey)
    assert dataset.num_rows("train") + dataset.num_rows("evaluation") == 600


def test_progress_comes_to_its_end(survey_of):
    told = []

    def stage(name):
        return lambda rows, share: told.append((name, rows, share))

    survey_of(clicks(), progress=stage)
    assert told[-1] == ("label", ROWS, 1.0)
    assert ("columns", ROWS, 1.0) in told

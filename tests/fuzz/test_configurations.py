"""Jobs that somebody got wrong: a job that trains, or a typed error that names the field."""

import io
import math
import tempfile
from copy import deepcopy
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from penstock import run
from penstock.config import Job, parse_job
from penstock.errors import ConfigError, PenstockError
from penstock.job_file import load_job, parse_yaml
from tests.contract.data_cases import make_table
from tests.fuzz.effort import effort

ROWS = 96

# Small, and with every part of a job in it.
FULL = {
    "name": "full",
    "data": {
        "source": {"format": "parquet", "path": "rows.parquet"},
        "split": {"by": "time", "at": 1_700_000_060_000},
        "label": {"column": "label"},
        "weight": "weight",
        "event_time": "time",
        "event_time_unit": "ms",
        "numeric": [
            {"columns": ["I1"], "missing": {"policy": "fill", "value": 1.5}},
            {
                "columns": ["I[23]"],
                "transforms": [
                    {"kind": "clip", "low": -2, "high": 500},
                    {"kind": "log"},
                    {"kind": "scale", "offset": 2.0, "factor": 0.5},
                ],
            },
        ],
        "shuffle": {"block_rows": 40},
    },
    "features": [
        {"columns": ["C1", "C2"], "table": "shared", "pooling": "mean", "missing": -1},
        {"columns": ["C3"], "transforms": [{"kind": "hash", "seed": 3, "buckets": 100}]},
        {"columns": ["C4"], "max_keys": 3, "keep": "last"},
        {"columns": ["I1"], "transforms": [{"kind": "bucketize", "boundaries": [0, 10, 100]}]},
    ],
    "crosses": [{"name": "both", "columns": ["C1", "C3"], "buckets": 50}],
    "tables": [
        {
            "name": "shared",
            "dim": 8,
            "optimizer": {"kind": "adagrad", "learning_rate": 0.1, "eps": 1e-6},
            "initializer": {"kind": "normal", "std": 0.1},
        }
    ],
    "table_defaults": {"dim": 8, "optimizer": {"kind": "adam", "clip_norm": 1.0}},
    "model": {"kind": "dlrm", "bottom": [8], "top": [8]},
    "training": {
        "batch_size": 16,
        "epochs": 1,
        "max_steps": 2,
        "optimizer": {
            "kind": "sgd",
            "learning_rate": 0.1,
            "momentum": 0.5,
            "schedule": {"warmup_steps": 2, "decay": "cosine", "decay_steps": 10},
        },
        "clip_gradient_norm": 1.0,
    },
    "run": {"threads": 1, "prefetch_batches": 2, "reader_threads": 1},
    "evaluation": {
        "batch_size": 64,
        "metrics": {"grouped_auc": ["C1"], "slices": [{"by": "C2", "top": 2}]},
    },
    "report": {"every_steps": 1},
    "checkpoint": {"every_steps": 1, "keep_last": 1},
}


def changed(**parts):
    """FULL with other parts; `data` is merged."""
    fields = deepcopy(FULL)
    fields["data"] |= parts.pop("data")
    fields |= parts
    # What is given as None is left out.
    fields["data"] = {name: value for name, value in fields["data"].items() if value is not None}
    return fields


SEVERAL_LABELS = changed(
    data={
        "weight": None,
        "label": [
            {"name": "liked", "column": "label"},
            {
                "column": "weight",
                "task": "regression",
                "offset": 1.0,
                "scale": 0.5,
                "missing": "ignore",
            },
        ],
    },
    model={
        "kind": "mmoe",
        "experts": 2,
        "expert": [8],
        "towers": [4],
        "task_weights": {"liked": 0.5},
    },
    tables=[
        {
            "name": "shared",
            "admission": {"kind": "min_count", "min_count": 2, "half_life_steps": 5},
            "max_bytes": "256KiB",
            "eviction": {"order": "lru", "ttl": 3},
        }
    ],
)
POSITIVES = changed(
    data={
        "label": None,
        "negatives": {"per_positive": 2, "columns": ["C1", "I1"], "candidates": "uniform"},
        "split": {"by": "fraction", "evaluation": 0.25},
    },
    model={"kind": "deepfm", "deep": [8]},
    tables=[
        {
            "name": "shared",
            "dim": 8,
            "optimizer": {"kind": "ftrl", "l1": 0.1},
            "admission": {"kind": "probability", "probability": 0.5},
            "max_bytes": 1 << 18,
            "eviction": {"order": "lfu", "half_life": 4},
        }
    ],
)
JOBS = {"full": FULL, "several labels": SEVERAL_LABELS, "positives": POSITIVES}

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 7, 2**31, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30]),
    st.sampled_from([0.0, -0.5, 1e-30, 0.5, 1.0, 1e30, 1e308, math.inf, -math.inf, math.nan]),
    st.sampled_from(["", "x", "sum", "adam", "C1", "I*", "[", "**", "label", "é\x00", "a" * 300]),
    st.sampled_from([[], {}, [[]], [{}], [None], {"kind": "log"}, ["C*", "I*"], [1, 2], {1: 2}]),
)
OPERATIONS = st.sampled_from(["drop", "rename", "replace", "add", "twice", "swap"])


def paths(node, before=()):
    """The path of every field and item of a job."""
    found = [before] if before else []
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        path = (*before, key)
        found += paths(value, path) if isinstance(value, dict | list) else [path]
    return found


def at(node, path):
    for key in path:
        node = node[key]
    return node


def mutate(draw, fields):
    """Changes one field of a job; returns its path."""
    path = draw(st.sampled_from(paths(fields)))
    node, key = at(fields, path[:-1]), path[-1]
    operation = draw(OPERATIONS)
    if operation == "drop":
        del node[key]
    elif operation == "rename" and isinstance(node, dict):
        name = draw(st.sampled_from([f"{key}s", str(key)[:-1], str(key).upper(), f" {key}", "x"]))
        node[name] = node.pop(key)
    elif operation == "add" and isinstance(node, dict):
        node[draw(st.sampled_from(["kinds", "columns", "x", ""]))] = deepcopy(draw(VALUES))
    elif operation == "twice" and isinstance(node, list):
        node.append(deepcopy(node[key]))
    elif operation == "swap":
        # What stands elsewhere in the job is likely to be of a nearly fitting type.
        node[key] = deepcopy(at(fields, draw(st.sampled_from(paths(fields)))))
    else:
        node[key] = deepcopy(draw(VALUES))
    return path


@st.composite
def wrong_jobs(draw, mutations):
    """Fields of a job with some of them changed, and the paths of these."""
    fields = deepcopy(JOBS[draw(st.sampled_from(list(JOBS)))])
    paths_changed = [mutate(draw, fields) for _ in range(draw(mutations))]
    return fields, paths_changed


@pytest.fixture(scope="module", autouse=True)
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    pq.write_table(make_table(ROWS), folder / "rows.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def train_or_refuse(job: Job) -> None:
    """Trains at most two steps; what goes wrong must be an error of Penstock's own."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            summary = run.train(
                job, Path(folder) / "run", console=Console(file=io.StringIO(), width=100)
            )
        except PenstockError as error:
            assert str(error).strip()
            return
        assert summary is not None and summary["samples"] > 0


@pytest.mark.parametrize("name", JOBS)
def test_the_jobs_that_are_changed_are_right(name):
    job = parse_job(JOBS[name])
    with tempfile.TemporaryDirectory() as folder:
        summary = run.train(
            job, Path(folder) / "run", console=Console(file=io.StringIO(), width=100)
        )
    assert summary["steps"] == 2 and summary["evaluation_samples"] > 0


@effort(60)
@given(wrong_jobs(st.just(1)))
def test_one_wrong_field_is_named(case):
    fields, [path] = case
    try:
        job = parse_job(fields, "job.yaml")
    except ConfigError as error:
        lines = str(error).splitlines()
        assert lines and all(line.startswith("job.yaml: ") for line in lines), error
        # A rule that joins fields names the mapping that they are in.
        known = [str(part) for part in path if isinstance(part, str)]
        assert any(part in str(error) for part in known), error
    else:
        assert parse_job(job.model_dump(mode="json")) == job


@effort(40)
@given(wrong_jobs(st.integers(1, 3)))
def test_a_job_that_is_accepted_trains_or_says_why_not(case):
    fields, _ = case
    # A job without an end would be right, too.
    if isinstance(fields.get("training"), dict):
        fields["training"]["max_steps"] = 2
    try:
        job = parse_job(fields)
    except ConfigError:
        return
    train_or_refuse(job)


SMALL_TEXT = """\
name: small
data: {source: {format: synthetic, rows: 100}, label: {column: click}}
features:
  - {columns: ["c*"]} # all
training:
  batch_size: 1e+1
  'seed': 0x10
"""
PIECES = ["\t", "\n", "- ", "\x00", "é", "0x", "~", "&a ", "*a", "<<: ", "!!int ", "---\n", "%Y"]


@effort(60)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(SMALL_TEXT)), st.sampled_from([*"{}[]:,#&*!|>'\"%@`-?0", *PIECES])
        ),
        max_size=6,
    )
)
def test_text_that_is_no_job(pieces):
    text = SMALL_TEXT
    for place, piece in pieces:
        text = text[:place] + piece + text[place:]
    try:
        parse_job(parse_yaml(text, "job.yaml"), "job.yaml")
    except ConfigError as error:
        assert str(error).startswith("job.yaml"), error


@effort(40)
@given(
    st.lists(
        st.sampled_from([*"abd.=:[]{}- ", "data", "source", "training", "0", "seed", "features"]),
        max_size=8,
    ),
    st.sampled_from(["1", "x", "[", "{a: 1}", "null", "2001-99-99", "\x00", ""]),
)
def test_overrides(pieces, value):
    path = Path("small.yaml")
    if not path.exists():
        path.write_text(SMALL_TEXT)
    try:
        assert isinstance(load_job(path, [f"{''.join(pieces)}={value}"]), Job)
    except ConfigError as error:
        assert str(error).strip()


@effort(80)
@given(st.binary(max_size=200))
def test_any_bytes_as_a_job(data):
    path = Path("bytes.yaml")
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"^bytes\.yaml"):
        load_job(path)

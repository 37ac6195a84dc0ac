"""Job files as people and programs happen to write them: read as meant, or refused by name."""

import math
import warnings
from typing import Annotated, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from penstock.config import parse_job
from penstock.config.base import Config
from penstock.config.moved import MOVED
from penstock.errors import ConfigError, JobNote
from penstock.job_file import load_job, override, parse_yaml

JOB = """
name: small
data:
  source: {format: synthetic, rows: 100}
  label: {column: click}
features:
  - columns: ["c[0-9]*"]
"""
NINE = "[" + ", ".join(["*{0}"] * 9) + "]"


@pytest.fixture
def write(tmp_path):
    def write(text, name="small.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_job(path, overrides)
    return str(caught.value).replace(str(path), "JOB")


def laughs():
    """A billion values in ten lines."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    names = "abcdefghij"
    lines += [
        f"{name}: &{name} {NINE.format(inner)}"
        for inner, name in zip(names, names[1:], strict=False)
    ]
    return "\n".join(lines)


def test_aliases_of_aliases_are_counted_before_anything_holds_them(write):
    # In an error message they would have filled the memory.
    bomb = write(laughs() + JOB.replace('["c[0-9]*"]', "*j"))
    assert refusal(bomb) == (
        "JOB:7: more than 1,000,000 values here, aliases written out; a job has no use for so many"
    )
    above = write("extends: small.yaml\n", "above.yaml")
    assert refusal(above).startswith(f"JOB extends {bomb}:7: more than")
    shared = write("x: &x [c1, c2]\ny: [*x, *x]\n")
    assert parse_yaml(shared.read_text(), "x")["y"] == [["c1", "c2"]] * 2


@pytest.mark.parametrize("text", ["training: &x\n  optimizer: *x\n", "name: &x [a, [*x]]\n"])
def test_an_anchor_that_holds_itself_is_refused(write, text):
    assert refusal(write(text)) == "JOB:1: an anchor holds itself; write out what is meant"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("1e3", 1000.0),
        ("1_000", 1000),
        ("-0x1F", -31),
        ("0o17", 15),
        ("0", 0),
        ("-1.5e-3", -0.0015),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("1:30.5", "1:30.5"),
        ("no", "no"),
        ("1e", "1e"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, read):
    found = parse_yaml(text, "x")
    assert (found, type(found)) == (read, type(read))


@pytest.mark.parametrize("text", ["010", "-08", "00", "0_7"])
def test_numbers_that_are_octal_to_some_are_refused(text):
    with pytest.raises(ConfigError, match=f"x:1: not valid YAML: {text} is octal to some and dec"):
        parse_yaml(text, "x")
    assert parse_yaml(f"'{text}'", "x") == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (JOB.encode("utf-16"), "JOB: byte 0 is no UTF-8 (invalid start byte); save the job file"),
        (JOB.replace("small", "smäll").encode("latin-1"), "JOB: byte 9 is no UTF-8 (invalid conti"),
        (JOB.replace("click", '"\\ud83d"'), r"JOB:5: not valid YAML: '\ud83d' is no str"),
        (JOB + "training:\n", "JOB: training: expected fields, as in `a: 1` (got None); give some"),
        (JOB + "model: dlrm\n", "JOB: model: expected fields, as in `a: 1` (got 'dlrm'); give"),
        (
            JOB + "model: {top: [8]}\n",
            "JOB: model: kind is not given; it is one of autoint, custom",
        ),
        (JOB + "model: {kind: DLRM}\n", "JOB: model: unknown kind 'DLRM'; did you mean 'dlrm'?"),
        (
            JOB + "model: {kind: [a]}\n",
            "JOB: model: unknown kind \"['a']\"; known: autoint, custom",
        ),
        (
            JOB.replace('["c[0-9]*"]', "c1"),
            "JOB: features.0.columns: expected a list (got 'c1'); write [c1]",
        ),
        (
            JOB.replace("{column: click}", "click"),
            "JOB: data.label: expected fields, as in `a: 1` ",
        ),
        (JOB + "Training: {epochs: 2}\n", "JOB: Training: unknown key; did you mean 'training'?"),
        (JOB + "training: {max-steps: 2}\n", "JOB: training.max-steps: unknown key; did you mean "),
        (
            JOB + "training: {MAX-STEPS: 2}\n",
            "JOB: training.MAX-STEPS: unknown key; did you mean 'm",
        ),
        (JOB + "training: {epochs: true}\n", "JOB: training: epochs: expected a number, got true"),
        (
            JOB + "training: {optimizer: {learning_rate: true}}\n",
            "JOB: training.optimizer: learning_rate: expected a number, got true",
        ),
        (
            JOB.replace(
                "label:",
                "numeric: [{columns: [n0], transforms: [{kind: clip, low: .nan}]}]\n  label:",
            ),
            "JOB: data.numeric.0.transforms.0: low nan is not at or below high inf; mend one",
        ),
        (
            JOB.replace(
                "label:",
                "numeric: [{columns: [n0], transforms: [{kind: clip, low: 2, high: 1}]}]\n  label:",
            ),
            "JOB: data.numeric.0.transforms.0: low 2 is not at or below high 1; mend one",
        ),
    ],
)
def test_what_is_wrong_is_said_in_words_of_the_job(write, text, message):
    assert refusal(write(text)).startswith(message)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("{grouped_auc: [u, v, u]}", "evaluation.metrics: grouped_auc names column 'u' twice; rem"),
        ("{slices: [{by: v}, {by: v, top: 3}]}", "evaluation.metrics: slices names column 'v' tw"),
    ],
)
def test_metrics_name_a_column_once(write, metrics, message):
    assert refusal(write(JOB), [f"evaluation.metrics={metrics}"]).startswith(f"JOB: {message}")
    both = load_job(write(JOB), ["evaluation.metrics={grouped_auc: [u, v], slices: [{by: u}]}"])
    assert both.evaluation.metrics.columns == ("u", "v")


@pytest.mark.parametrize("tasks", [["regression"], ["regression", "regression"]])
def test_an_auc_by_groups_needs_a_binary_label(write, tasks):
    labels = [f"{{column: c{number}, task: {task}}}" for number, task in enumerate(tasks)]
    given = f"[{', '.join(labels)}]" if len(labels) > 1 else labels[0]
    grouped = "evaluation.metrics.grouped_auc=[user]"
    message = "JOB: evaluation.metrics.grouped_auc: no label is binary, so there is no AUC; remove"
    assert refusal(write(JOB), [f"data.label={given}", grouped]).startswith(message)
    load_job(write(JOB), [f"data.label=[{{column: c9}}, {', '.join(labels)}]", grouped])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.label.column=[{x}]", "data.label.column: input should be a valid string"),
        ("features={{a: 1}}", "features: expected a list"),
        ("features=[{{columns: {{a: 1}}}}]", "features.0.columns: expected a list"),
    ],
)
def test_a_value_is_shown_if_it_is_short(write, change, message):
    # As Python shows it, with brackets and quotes: 80 characters and no more.
    whole, path = f"JOB: {message}", write(JOB)
    assert refusal(path, [change.format(x="x" * 77)]) == whole
    shown = f" (got ['{'x' * 76}'])" if "{x}" in change else ""
    assert refusal(path, [change.format(x="x" * 76)]) == whole + shown


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("null", "path: expected a text or a list (got None)"),
        ("3", "path: expected a text or a list (got 3)"),
        ("[a, 3]", "path.1: input should be a valid string (got 3)"),
    ],
)
def test_a_field_of_two_types_is_told_of_in_one_line(write, path, message):
    source = f"data.source={{format: csv, path: {path}}}"
    assert refusal(write(JOB), [source]) == f"JOB: data.source.{message}"


@pytest.mark.parametrize("change", ["[a]", "{a: 1}", "null", "1"])
def test_a_kind_that_is_no_text_is_refused(write, change):
    path = write(JOB)
    assert "model: unknown kind" in refusal(path, [f"model.kind={change}"])
    above = write(f"extends: small.yaml\nmodel: {{kind: {change}}}\n", "above.yaml")
    path.write_text(JOB + "model: {kind: dcn_v2}\n")
    assert "model: unknown kind" in refusal(above)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_marks_of_other_systems_are_read(write, ending, mark):
    assert load_job(write(mark + JOB.replace("\n", ending).encode())) == load_job(write(JOB))


def every_config(kind=Config):
    for one in kind.__subclasses__():
        yield one
        yield from every_config(one)


def test_no_number_of_a_job_may_be_nan():
    checked = 0
    for kind in every_config():
        for name, field in kind.model_fields.items():
            if float not in {field.annotation, *get_args(field.annotation)}:
                continue
            checked += 1
            if (kind.__name__, name) in {("Clip", "low"), ("Clip", "high")}:
                continue  # refused as a pair
            alone = TypeAdapter(Annotated[field.annotation, *field.metadata])
            with pytest.raises(ValidationError):
                alone.validate_python(math.nan)
    assert checked > 30


def test_flags_and_numbers_that_stand_for_flags_are_read():
    fields = parse_yaml(JOB, "x")
    job = parse_job(override(fields, ["training.deterministic=true", "data.negatives=null"]))
    assert job.training.deterministic is True
    negatives = {"per_positive": 1, "columns": ["c1"], "user": False}
    fields["data"] = {"source": fields["data"]["source"], "negatives": negatives}
    assert parse_job(fields).data.negatives.user is False


def test_a_job_of_before_takes_new_fields_over_it_and_a_new_one_old_ones(write):
    old = write(JOB + "training: {threads: 2}\n", "old.yaml")
    new = write(JOB + "run: {threads: 2, reader_threads: 3}\n", "new.yaml")
    with pytest.warns(JobNote, match="old.yaml: training.threads is now run.threads"):
        assert load_job(old, ["run.threads=5"]).run.threads == 5
    with pytest.warns(JobNote, match="--set training.threads=5: training.threads is now run.thr"):
        assert load_job(new, ["training.threads=5"]).run.threads == 5
    above = write("extends: old.yaml\nrun: {threads: 3}\n", "above.yaml")
    with pytest.warns(JobNote, match="old.yaml: training.threads is now run.threads"):
        job = load_job(above)
    assert job.run.threads == 3
    above = write("extends: new.yaml\ntraining: {threads: 3}\n", "above.yaml")
    with pytest.warns(JobNote, match="above.yaml: training.threads is now run.threads"):
        job = load_job(above)
    assert (job.run.threads, job.run.reader_threads) == (3, 3)
    write(JOB + "training: {threads: 2}\nrun: {threads: 2}\n")
    assert "and both are given; remove training.threads" in refusal(above.parent / "small.yaml")


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_what_a_run_of_before_wrote_takes_overrides_at_both_places(old, new):
    # Nobody can change the record of a run: `penstock evaluate --set` of one must work.
    record = parse_yaml(JOB, "x")
    value = {"training.device": "cpu", "training.metrics": {}, "training.checkpoint": {}}.get(
        old, 7
    )
    *way, last = old.split(".")
    group = record
    for name in way:
        group = group.setdefault(name, {})
    group[last] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JobNote)
        for place in (old, new):
            job = parse_job(override(record, [f"{place}={value}"]), is_record=True)
            found = job
            for name in new.split("."):
                found = getattr(found, name)
            assert found == value or not value
    assert record == parse_yaml(JOB, "x") | {way[0]: record[way[0]]}  # the record stays


def test_a_missing_file_is_told_with_what_extends_it(write):
    path = write("extends: smal.yaml\n")
    assert refusal(path) == (
        f"JOB extends {path.with_name('smal.yaml')}: no such job file; did you mean {path}?"
    ).replace(str(path), "JOB")


def test_a_function_that_needs_arguments_is_told(tmp_path, monkeypatch):
    (tmp_path / "careless_jobs.py").write_text(
        "from penstock.config import parse_job\n"
        "from penstock.job_file import parse_yaml\n"
        f"TEXT = {JOB!r}\n"
        "def needs(path, *, rows): ...\n"
        "def fine(rows=1, *more, **named): return parse_job(parse_yaml(TEXT, 'x'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_job("careless_jobs:fine").name == "small"
    with pytest.raises(
        ConfigError, match=r"^careless_jobs:needs: needs arguments \(path, rows\); w"
    ):
        load_job("careless_jobs:needs")

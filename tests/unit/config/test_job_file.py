"""Where jobs come from: YAML, functions, overrides. Exact messages, since users act on them."""

import json
import os
import warnings
from pathlib import Path

import pytest

from penstock.config import Adagrad, Job, parse_job
from penstock.config.moved import MOVED, place_now
from penstock.errors import ConfigError, JobNote
from penstock.job_file import dump_yaml, load_job, override, parse_yaml, read_fields

JOB = """
name: small
data:
  source: {format: synthetic, rows: 100}
  label: {column: click}
features:
  - columns: ["c[0-9]*"]
    pooling: sum
"""
RECIPES = sorted((Path(__file__).parents[3] / "jobs").glob("*.yaml"))


@pytest.fixture
def job_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(JOB, encoding="utf-8")
    return path


def refusal(call, *arguments):
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value)


def test_yaml_becomes_a_job(job_file):
    job = load_job(str(job_file))
    assert job.name == "small"
    assert job.data.source.rows == 100
    assert job.features[0].columns == ("c[0-9]*",)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("training.epochs=3", lambda job: job.training.epochs == 3),
        (
            "training.optimizer.learning_rate=1e-2",
            lambda job: job.training.optimizer.learning_rate == 0.01,
        ),
        ("features.0.pooling=mean", lambda job: job.features[0].pooling == "mean"),
        ("features.0.columns=[c1, c2]", lambda job: job.features[0].columns == ("c1", "c2")),
        ("model.top=[8, 4]", lambda job: (job.model.kind, job.model.top) == ("dlrm", (8, 4))),
        (
            "table_defaults.optimizer.learning_rate=0.5",
            lambda job: (
                (job.table_defaults.optimizer.kind, job.table_defaults.optimizer.learning_rate)
                == ("row_wise_adagrad", 0.5)
            ),
        ),
        (
            "table_defaults.optimizer={kind: adagrad}",
            lambda job: job.table_defaults.optimizer == Adagrad(),
        ),
        (
            "data.evaluation_source={format: synthetic, seed: 7}",
            lambda job: job.data.evaluation_source.seed == 7,
        ),
        ("training.max_steps=null", lambda job: job.training.max_steps is None),
        ("name=a=b", None),
    ],
)
def test_overrides_change_the_field_they_name(job_file, override, read):
    if read is None:  # the value is everything after the first =, and then it is validated
        assert "a=b" in refusal(load_job, str(job_file), [override])
        return
    plain = load_job(str(job_file))
    changed = load_job(str(job_file), [override])
    assert read(changed)
    assert changed != plain or override.endswith("null")


def test_a_later_override_wins_and_a_kind_can_follow_its_fields(job_file):
    job = load_job(
        job_file,
        ["model.cross_layers=4", "model.kind=dcn_v2", "training.epochs=2", "training.epochs=5"],
    )
    assert (job.model.kind, job.model.cross_layers, job.training.epochs) == ("dcn_v2", 4, 5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.epochs",
            "--set training.epochs: expected a.b=value, for instance training.epochs=2",
        ),
        (
            "training..epochs=1",
            "--set training..epochs=1: expected a.b=value, for instance training.epochs=2",
        ),
        (
            "features.1.pooling=mean",
            "--set features.1.pooling=mean: features is a list with indices 0 to 0, not '1'; use "
            "one of these or set the whole list",
        ),
        (
            "features.first.pooling=mean",
            "--set features.first.pooling=mean: features is a list with indices 0 to 0, not "
            "'first'; use one of these or set the whole list",
        ),
        (
            "name.first=1",
            "--set name.first=1: name is 'small', which has no key 'first'; set name itself",
        ),
        (
            "training.epochs=[",
            "--set training.epochs:1: not valid YAML: expected the node content, but found "
            "'<stream end>'",
        ),
        ("training.epoch=2", "{path}: training.epoch: unknown key; did you mean 'epochs'?"),
        ("trainning.epochs=2", "{path}: trainning: unknown key; did you mean 'training'?"),
    ],
)
def test_wrong_overrides_are_refused(job_file, override, message):
    assert refusal(load_job, str(job_file), [override]) == message.format(path=job_file)


def test_unknown_key_is_refused_with_the_nearest(job_file):
    job_file.write_text(JOB.replace("pooling:", "poling:"), encoding="utf-8")
    assert refusal(load_job, str(job_file)) == (
        f"{job_file}: features.0.poling: unknown key; did you mean 'pooling'?"
    )


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("name: a\ndata: {}\nname: b\n", encoding="utf-8")
    assert refusal(load_job, str(path)) == (
        f"{path}:3: key 'name' stands twice (first in line 1); remove one"
    )
    path.write_text("data:\n  label: {column: a, column: b}\n", encoding="utf-8")
    assert refusal(load_job, str(path)) == (
        f"{path}:2: key 'column' stands twice (first in line 2); remove one"
    )


def test_a_missing_file_is_named_with_the_nearest(job_file):
    missing = job_file.with_name("smal.yaml")
    assert refusal(load_job, str(missing)) == (
        f"{missing}: no such job file; did you mean {job_file}?"
    )
    nowhere = job_file.parent / "nowhere" / "a.yaml"
    assert refusal(load_job, str(nowhere)) == (
        f"{nowhere}: no such job file; there is no folder {nowhere.parent}"
    )


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n", encoding="utf-8")
    assert refusal(load_job, str(path)) == f"{path}: expected a mapping of fields, got list"


def test_yaml_is_safe_and_reads_numbers_as_yaml_1_2():
    assert parse_yaml("{a: 1e-3, b: 1E5, c: -2.5e+3, d: e5}", "x") == {
        "a": 1e-3,
        "b": 1e5,
        "c": -2500.0,
        "d": "e5",
    }
    words = ["no", "NO", "yes", "on", "off", "y"]
    assert parse_yaml(f"{{no: [{', '.join(words)}], a: true, b: False}}", "x") == {
        "no": words,
        "a": True,
        "b": False,
    }
    assert "could not determine a constructor" in refusal(
        parse_yaml, "!!python/object/apply:os.getcwd []", "x"
    )


def test_a_function_gives_a_job(tmp_path, monkeypatch):
    (tmp_path / "my_job_module.py").write_text(
        "from penstock.config import parse_job\n"
        "def small():\n"
        "    source = {'format': 'synthetic'}\n"
        "    return parse_job({'data': {'source': source, 'label': {'column': 'click'}}})\n"
        "def number():\n    return 3\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_job("my_job_module:small").data.source.format == "synthetic"
    assert load_job("my_job_module:small", ["training.epochs=4"]).training.epochs == 4
    assert refusal(load_job, "my_job_module:smal") == (
        "my_job_module:smal: module 'my_job_module' has no function 'smal'; did you mean 'small'?"
    )
    assert refusal(load_job, "my_job_module:number") == (
        "my_job_module:number: returned int, expected penstock.config.Job"
    )
    assert refusal(load_job, "no_such_module_here:small") == (
        "no_such_module_here:small: no module 'no_such_module_here' on the Python path; start from "
        "its folder or install it"
    )


def test_the_environment_is_not_read(job_file, monkeypatch):
    monkeypatch.setenv("NAME", "other")
    job_file.write_text(JOB.replace("name: small", 'name: "small"'), encoding="utf-8")
    before = dict(os.environ)
    assert load_job(job_file).name == "small"
    assert dict(os.environ) == before


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_survives_being_written(path, tmp_path):
    job = load_job(path)
    assert job.name.replace("-", "_") == path.stem
    copy = tmp_path / "job.yaml"
    copy.write_text(dump_yaml(job), encoding="utf-8")
    assert load_job(copy) == job


def test_the_schema_is_json_and_knows_the_fields():
    schema = json.loads(json.dumps(Job.model_json_schema()))
    assert set(schema["properties"]) == set(Job.model_fields)


def test_parse_job_names_its_origin():
    assert refusal(parse_job, {}, "here") == "here: data: required, but not given"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: \x00", "job.yaml: not valid YAML: special characters are not allowed (#x0000)"),
        ("a: 1\nb: 2001-99-99", "job.yaml:2: not valid YAML: '2001-99-99' is no timestamp"),
        ("a: !!int x", "job.yaml:1: not valid YAML: 'x' is no int"),
        ("a: !!timestamp x", "job.yaml:1: not valid YAML: 'x' is no timestamp"),
        ("a: !!bool x", "job.yaml:1: not valid YAML: 'x' is no bool"),
        ("a: " + "9" * 5000, f"job.yaml:1: not valid YAML: '{'9' * 37}... is no int"),
        ("a: " + "[" * 3000, "job.yaml: not valid YAML: nested too deeply"),
    ],
)
def test_yaml_that_its_library_chokes_on(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "job.yaml")
    assert str(caught.value) == message


BEFORE = {
    "training": {
        "batch_size": 7,
        "device": "cpu",
        "threads": 3,
        "evaluate_every_steps": 11,
        "evaluation_batch_size": 13,
        "metrics": {"exact_auc": True},
        "checkpoint": {"every_steps": 17},
        "log_every_steps": 19,
    },
    "data": {
        "source": {"format": "synthetic"},
        "label": {"column": "click"},
        "reader_threads": 5,
        "prefetch_batches": 23,
        "shuffle": {"window_rows": 29, "window_bytes": 31},
    },
}


def test_a_job_of_before_is_read_and_each_moved_field_is_named():
    with pytest.warns(JobNote) as notes:
        job = parse_job(BEFORE, "old.yaml")
    assert (job.run.threads, job.run.reader_threads, job.run.prefetch_batches) == (3, 5, 23)
    assert (job.evaluation.every_steps, job.evaluation.batch_size) == (11, 13)
    assert job.evaluation.metrics.exact_auc
    assert (job.checkpoint.every_steps, job.report.every_steps) == (17, 19)
    assert job.training.batch_size == 7
    assert (job.data.shuffle.block_rows, job.data.shuffle.block_bytes) == (29, 31)
    assert sorted(str(note.message) for note in notes) == sorted(
        f"old.yaml: {old} is now {new}" for old, new in MOVED.items()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_job(job.model_dump(mode="json")) == job
    assert "threads" in BEFORE["training"]  # the fields given are left as they are


@pytest.mark.parametrize("old", MOVED)
def test_a_field_given_in_its_old_and_its_new_place_is_refused(old):
    new = MOVED[old]
    fields = {"data": {"source": {"format": "synthetic"}, "label": {"column": "click"}}}
    for path, value in ((old, {} if old.endswith(("metrics", "checkpoint")) else 4), (new, 5)):
        *parents, last = path.split(".")
        node = fields
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    for value in (5, None, {}):  # what is empty is given, too
        node[last] = value
        message = refusal(parse_job, fields, "old.yaml")
        assert message == f"old.yaml: {old} is now {new}, and both are given; remove {old}"


def test_what_is_no_group_of_fields_is_refused_where_a_moved_field_goes():
    fields = {"training": {"device": "cpu"}, "run": 3}
    message = "old.yaml: training.device is now run.device, and run is no group of fields; mend it"
    assert refusal(parse_job, fields, "old.yaml") == message


@pytest.mark.parametrize("old", MOVED)
def test_what_has_a_longer_name_has_not_moved(old):
    assert place_now(old) == MOVED[old]
    assert place_now(f"{old}.every_steps") == f"{MOVED[old]}.every_steps"
    assert place_now(f"{old}s") == f"{old}s"


def test_an_error_in_a_moved_field_names_its_new_place():
    with pytest.warns(JobNote):
        message = refusal(parse_job, {**BEFORE, "training": {"threads": 0}}, "old.yaml")
    assert message.startswith("old.yaml: run.threads: ")


def test_a_job_is_laid_over_the_one_it_extends(job_file, tmp_path):
    job_file.write_text(
        JOB + "model: {kind: dlrm, top: [9]}\ntraining: {epochs: 3, batch_size: 8}\n",
        encoding="utf-8",
    )
    (tmp_path / "more").mkdir()
    middle, last = tmp_path / "more" / "middle.yaml", tmp_path / "more" / "last.yaml"
    middle.write_text("extends: ../small.yaml\ntraining: {epochs: 4}\n", encoding="utf-8")
    last.write_text(
        "extends: middle.yaml\nname: last\nfeatures: [{columns: [c1]}]\n"
        "model: {kind: dcn_v2, deep: [5]}\ndata: {shuffle: {block_rows: 0}}\n",
        encoding="utf-8",
    )
    with pytest.warns(JobNote) as notes:
        job = load_job(str(last))
    assert [str(note.message) for note in notes] == [
        f"{last}: model.kind is now dcn_v2, which has no top: dropped"
    ]
    assert (job.name, job.training.epochs, job.training.batch_size) == ("last", 4, 8)
    assert (job.model.kind, job.model.deep) == ("dcn_v2", (5,))
    assert [one.columns for one in job.features] == [("c1",)]  # a list is replaced whole
    assert (job.data.source.rows, job.data.shuffle.block_rows) == (100, 0)


def test_what_cannot_be_extended_is_refused(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("extends: two.yaml\n", encoding="utf-8")
    two.write_text("extends: one.yaml\n", encoding="utf-8")
    assert refusal(load_job, str(one)).endswith("a job cannot extend itself")
    one.write_text("extends: [two.yaml]\n", encoding="utf-8")
    assert "expected the path of a job file, got ['two.yaml']" in refusal(load_job, str(one))
    one.write_text("extends: twice.yaml\n", encoding="utf-8")
    assert "no such job file; did you mean" in refusal(load_job, str(one))
    two.write_text("- a list\n", encoding="utf-8")
    one.write_text("extends: two.yaml\n", encoding="utf-8")
    message = refusal(load_job, str(one))
    assert message == f"{one}: extends two.yaml, which holds a list and no fields of a job"


def test_another_kind_drops_the_fields_that_it_lacks_by_name(job_file):
    job_file.write_text(
        JOB + "model: {kind: dlrm, top: [9], bottom: [4]}\n"
        "table_defaults: {optimizer: {kind: adam, beta1: 0.5, learning_rate: 0.1}}\n",
        encoding="utf-8",
    )
    with pytest.warns(JobNote, match="model.kind is now wide_deep, which has no") as notes:
        job = load_job(str(job_file), ["model.kind=wide_deep"])
    assert job.model.kind == "wide_deep"
    assert "top" in str(notes[0].message) and "bottom" in str(notes[0].message)
    with pytest.warns(JobNote, match="table_defaults.optimizer.kind is now sgd, .* no beta1: drop"):
        job = load_job(str(job_file), ["table_defaults.optimizer.kind=sgd"])
    assert job.table_defaults.optimizer.learning_rate == 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_job(str(job_file), ["model.kind=dlrm"])
    assert "unknown kind 'dlmr'; did you mean 'dlrm'?" in refusal(
        load_job, str(job_file), ["model.kind=dlmr"]
    )


KINDS = """
tables:
  - {name: t, dim: 4, optimizer: {kind: adam, beta1: 0.5, learning_rate: 0.1}}
"""
NUMBERS = "  numeric: [{columns: [n], missing: {policy: fill, value: 3}}]\n"
SPLIT = "  split: {by: fraction, evaluation: 0.5}\n"


@pytest.mark.parametrize(
    ("field", "kind", "lacks"),
    [
        ("tables.0.optimizer.kind", "sgd", "beta1"),
        ("data.numeric.0.missing.policy", "fail", "value"),
        ("data.split.by", "time", "evaluation"),
        ("data.source.format", "csv", "rows"),
    ],
)
def test_whatever_word_tells_kinds_apart_fields_are_dropped(job_file, field, kind, lacks):
    job_file.write_text(JOB.replace("features:", NUMBERS + SPLIT + "features:") + KINDS)
    more = {
        "time": ["data.split.at=2026-01-31", "data.event_time=t"],
        "csv": ["data.source.path=x.csv"],
    }
    with pytest.warns(JobNote) as notes:
        job = load_job(job_file, [f"{field}={kind}", *more.get(kind, [])])
    assert [str(note.message) for note in notes] == [
        f"--set {field}={kind}: {field} is now {kind}, which has no {lacks}: dropped"
    ]
    assert job.tables[0].optimizer.learning_rate == 0.1  # what it has stays
    above = job_file.with_name("above.yaml")
    parents = field.split(".")[:-1]
    if "0" in parents:
        return  # a list is replaced whole
    given = "".join(f"{name}: {{" for name in parents) + f"{field.split('.')[-1]}: {kind}"
    above.write_text(f"extends: small.yaml\n{given}{'}' * len(parents)}\n", encoding="utf-8")
    with pytest.warns(JobNote) as notes:
        read_fields(above)
    assert [str(note.message) for note in notes] == [
        f"{above}: {field} is now {kind}, which has no {lacks}: dropped"
    ]


def test_a_word_that_tells_no_kinds_apart_drops_nothing(job_file):
    slices = "evaluation: {metrics: {slices: [{by: c1, top: 7}]}}\n"
    dense = "training: {optimizer: {kind: adam, learning_rate: 0.5}}\n"
    job_file.write_text(JOB + slices + dense, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        job = load_job(
            job_file, ["evaluation.metrics.slices.0.by=c2", "training.optimizer.kind=adamw"]
        )
    assert (job.evaluation.metrics.slices[0].by, job.evaluation.metrics.slices[0].top) == ("c2", 7)
    assert job.training.optimizer.learning_rate == 0.5


def test_fields_that_are_overridden_stay_as_they_were():
    fields = parse_yaml(JOB + KINDS, "x")
    sets = ["data.source.rows=7", "tables.0.optimizer.kind=sgd", "features.0.pooling=mean"]
    with pytest.warns(JobNote):
        changed = override(fields, sets)
    assert changed["data"]["source"]["rows"] == 7
    assert fields == parse_yaml(JOB + KINDS, "x")


def test_a_job_that_extends_itself_by_another_path_is_refused(tmp_path):
    path = tmp_path / "one.yaml"
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "link.yaml").symlink_to(path)
    for other in ("more/../one.yaml", "more/link.yaml", str(path)):
        path.write_text(f"extends: {other}\n", encoding="utf-8")
        message = refusal(load_job, path)
        assert message.startswith(f"{path}: extends: {path} extends ")
        assert message.endswith("a job cannot extend itself")


def test_a_module_that_a_job_needs_is_not_taken_for_the_jobs(tmp_path, monkeypatch):
    (tmp_path / "needy_jobs.py").write_text("import there_is_no_such_module\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="'there_is_no_such_module'"):
        load_job("needy_jobs:small")
    message = refusal(load_job, "no_such_package.more:small")
    assert message.startswith("no_such_package.more:small: no module 'no_such_package' on the ")


def test_what_a_run_wrote_of_its_job_is_read_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_job(BEFORE, "manifest", is_record=True).run.threads == 3
        assert parse_job(BEFORE, is_record=True) is not None

"""Where jobs come from: YAML, functions, overrides. Exact messages, since users act on them."""

import json
import os
from pathlib import Path

import pytest

from penstock.config import Adagrad, Job, parse_job
from penstock.errors import ConfigError
from penstock.job_file import dump_yaml, load_job, parse_yaml

JOB = """
name: small
data:
  source: {format: synthetic, rows: 100}
  label: {column: click}
features:
  - columns: ["c[0-9]*"]
    pooling: sum
"""
RECIPES = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))


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

"""Help that teaches, errors without a traceback, exit statuses, and a light start."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

COMMANDS = (
    ["train"],
    ["evaluate"],
    ["predict"],
    ["inspect"],
    ["compare"],
    ["schema"],
    ["data", "inspect"],
    ["data", "synth"],
    ["data", "history"],
    ["data", "plan"],
    ["data", "audit"],
    ["savepoint", "create"],
    ["savepoint", "restore"],
    ["suspend"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(penstock, command):
    code, shown, errors = penstock(*command, "--help")
    assert (code, errors) == (0, "")
    assert f"penstock {' '.join(command)} " in shown.partition("Example")[2]


def test_help_lists_what_exists(penstock):
    code, shown, _ = penstock("--help")
    assert code == 0
    for command in (
        "train",
        "evaluate",
        "predict",
        "inspect",
        "compare",
        "data",
        "savepoint",
        "suspend",
        "schema",
    ):
        assert f"│ {command} " in shown
    assert shown.count("│ ") == len([
        "train",
        "evaluate",
        "predict",
        "inspect",
        "compare",
        "data",
        "savepoint",
        "suspend",
        "schema",
        "version",
        "help",
    ])


def test_the_version_is_the_same_wherever_it_stands(penstock):
    import penstock as package

    code, shown, errors = penstock("--version")
    assert (code, shown, errors) == (0, f"penstock {package.__version__}\n", "")
    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    citation = yaml.safe_load((root / "CITATION.cff").read_text("utf-8"))
    assert project["version"] == citation["version"] == package.__version__


@pytest.mark.parametrize("arguments", (["--help"], ["train", "--help"], ["schema"]), ids=" ".join)
def test_help_and_schema_start_without_torch(arguments):
    code = (
        "import sys; from penstock.cli import main; sys.argv[1:] = " + repr(arguments) + "\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_schema_is_that_of_the_job(penstock):
    code, shown, _ = penstock("schema")
    assert code == 0
    assert {"data", "features", "model", "training"} <= set(json.loads(shown)["properties"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=2", "error: {job}: training.epoch: unknown key; did you mean 'epochs'?\n"),
        (
            "training.batch_size=0",
            "error: {job}: training.batch_size: input should be greater than 0 (got 0)\n",
        ),
        ("epochs", "error: --set epochs: expected a.b=value, for instance training.epochs=2\n"),
    ],
)
def test_a_wrong_job_is_one_line_on_stderr(penstock, small_yaml, tmp_path, override, message):
    code, shown, errors = penstock(
        "train", small_yaml, "--out", tmp_path / "run", "--set", override
    )
    assert (code, shown) == (2, "")
    assert errors == message.format(job=small_yaml)
    assert not (tmp_path / "run").exists()


def test_a_missing_run_is_named(penstock, tmp_path):
    for command in (["evaluate"], ["inspect"]):
        code, _, errors = penstock(*command, tmp_path / "none")
        assert code == 2
        assert errors == f"error: {tmp_path / 'none'}: no such run or checkpoint\n"


def test_resume_needs_out(penstock, small_yaml):
    code, _, errors = penstock("train", small_yaml, "--resume")
    assert code == 2
    assert "--out" in errors


def test_data_synth_writes_every_format(penstock, tmp_path):
    rows = {}
    for name in ("a.parquet", "a.csv", "a.tsv"):
        code, shown, errors = penstock("data", "synth", "--out", tmp_path / name, "--rows", 50)
        assert (code, errors) == (0, "")
        assert f"50 rows: {tmp_path / name}" in shown
        rows[name] = (tmp_path / name).stat().st_size
    assert all(rows.values())
    header = (tmp_path / "a.tsv").read_text(encoding="utf-8").splitlines()[0]
    assert header.split("\t")[0] == "click"
    code, _, errors = penstock("data", "synth", "--out", tmp_path / "a.orc", "--rows", 50)
    assert code == 2 and ".orc" in errors


def test_data_history_adds_what_was_before(penstock, tmp_path):
    log, out = tmp_path / "log.parquet", tmp_path / "new" / "seq.parquet"
    pq.write_table(pa.table({"u": [1, 2, 1, 1], "i": [5, 6, 7, 8], "t": [0, 1, 2, 3]}), log)
    call = ("data", "history", log, "--by", "u", "--of", "i", "--order", "t", "--out", out)
    assert penstock(*call) == (0, f"4 rows: {out}\n", "")
    assert pq.read_table(out)["i_history"].to_pylist() == [[], [], [5], [5, 7]]
    code, _, errors = penstock(*call)
    assert (code, errors.splitlines()[0]) == (
        2,
        f"error: {out}: exists already; name another file, or overwrite it with --force",
    )
    assert penstock(*call, "--last", 1, "--force")[0] == 0
    assert pq.read_table(out)["i_history"].to_pylist() == [[], [], [5], [7]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_arguments_that_are_no_text_are_refused_before_anything_is_made(
    penstock, command, tmp_path, monkeypatch
):
    # As Python gives them where a file's name is bytes that are no UTF-8.
    monkeypatch.chdir(tmp_path)
    code, shown, errors = penstock(*command, "--out", "r_\udcff")
    assert (code, shown) == (2, "")
    assert errors == (
        "error: 'r_\\udcff': this argument is no UTF-8; rename the file, or go by a link to it\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_working_folder_that_is_gone_ends_no_command_that_needs_none(tmp_path):
    code = (
        "import os; from penstock.cli import main; "
        f"folder = {str(tmp_path / 'gone')!r}; os.mkdir(folder); os.chdir(folder); "
        "os.rmdir(folder); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "schema"], capture_output=True, text=True, check=True
    )
    assert "$defs" in json.loads(done.stdout)

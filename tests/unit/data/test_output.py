"""Outputs: never over what is read, over what is there only when told, whole or not at all."""

import os
import re
from pathlib import Path

import pytest

from penstock.config import parse_job
from penstock.data.output import whole_file
from penstock.errors import ConfigError
from penstock.report.folder import RunFolder

READ = r"is, or would be, among the files that are read"


def write(out, reads=(), overwrite=True, text="new"):
    with whole_file(Path(out), reads=reads, overwrite=overwrite) as part:
        part.write_text(text, encoding="utf-8")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.csv", "b.csv", "deep/c.csv"):
        (folder / name).write_text("kept", encoding="utf-8")
    os.symlink(folder / "a.csv", tmp_path / "to_a.csv")
    os.link(folder / "a.csv", tmp_path / "hard_a.csv")
    os.symlink(folder, tmp_path / "same")
    return folder


@pytest.mark.parametrize(
    ("reads", "out"),
    [
        ("data/a.csv", "data/a.csv"),
        ("data/a.csv", "data/deep/../a.csv"),
        ("data/a.csv", "same/a.csv"),
        ("data/a.csv", "to_a.csv"),
        ("to_a.csv", "data/a.csv"),
        ("data/a.csv", "hard_a.csv"),
        ("data/a.csv", "absent/../data/a.csv"),
        ("data", "data/a.csv"),
        ("data", "hard_a.csv"),
        ("data", "data/new.csv"),
        ("data", "same/deep/new.csv"),
        ("same", "data/new.csv"),
        ("data/*.csv", "data/a.csv"),
        ("data/*.csv", "hard_a.csv"),
        ("data/*.csv", "data/new.csv"),
        ("same/*.csv", "data/new.csv"),
        ("data/*.csv", "same/new.csv"),
        ("data/**/*.csv", "data/deep/new.csv"),
        ("data/[ab].csv", "data/b.csv"),
        ("file://{}/data/a.csv", "data/a.csv"),
        ("file://{}/data", "data/new.csv"),
        ("file://{}/data/*.csv", "hard_a.csv"),
    ],
)
def test_what_is_read_is_never_written(data, tmp_path, monkeypatch, reads, out):
    monkeypatch.chdir(tmp_path)
    reads = reads.format(tmp_path)
    with pytest.raises(ConfigError, match=READ):
        write(out, ["data/b.csv" if "a.csv" in reads else "absent.csv", reads])
    for name in ("a.csv", "b.csv", "deep/c.csv"):
        assert (data / name).read_text(encoding="utf-8") == "kept"
    assert not list(tmp_path.rglob("new.csv")) and not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    ("reads", "out"),
    [
        ("data/a.csv", "data/b.csv"),
        ("data", "scores.csv"),
        ("data", "data/_scores.csv"),
        ("data/*.csv", "data/scores.parquet"),
        ("data/*.csv", "data/deep/scores.csv"),
        ("data/?.csv", "data/new.csv"),
    ],
)
def test_what_is_not_read_may_be_written(data, tmp_path, monkeypatch, reads, out):
    monkeypatch.chdir(tmp_path)
    write(out, [reads])
    assert Path(out).read_text(encoding="utf-8") == "new"


def test_a_name_that_looks_like_a_glob_is_that_of_its_file(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (data / "part[1].csv").write_text("kept", encoding="utf-8")
    with pytest.raises(ConfigError, match=READ):
        write("same/part[1].csv", ["data/part[1].csv"])
    assert (data / "part[1].csv").read_text(encoding="utf-8") == "kept"
    write("data/part1.csv", ["data/part[1].csv"])


def test_a_link_is_replaced_and_not_what_it_leads_to(data, tmp_path):
    write(tmp_path / "to_a.csv")
    write(tmp_path / "hard_a.csv")
    assert (data / "a.csv").read_text(encoding="utf-8") == "kept"
    for name in ("to_a.csv", "hard_a.csv"):
        assert (tmp_path / name).read_text(encoding="utf-8") == "new"


def test_what_is_there_needs_force(tmp_path):
    out = tmp_path / "out"
    write(out, overwrite=False)
    os.symlink(tmp_path / "absent", tmp_path / "dangling")
    for taken in (out, tmp_path / "dangling"):
        with pytest.raises(ConfigError) as raised:
            write(taken, overwrite=False, text="second")
        assert str(raised.value) == (
            f"{taken}: exists already; name another file, or overwrite it with --force"
        )
    assert out.read_text(encoding="utf-8") == "new"
    write(out, text="second")
    assert out.read_text(encoding="utf-8") == "second"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_writer_that_stops_leaves_the_older_file(tmp_path, error):
    out = tmp_path / "out"
    out.write_text("older", encoding="utf-8")
    with (
        pytest.raises((ConfigError, KeyboardInterrupt)) as raised,
        whole_file(out, overwrite=True) as part,
    ):
        part.write_text("half", encoding="utf-8")
        raise error
    if isinstance(error, OSError):
        assert str(raised.value) == f"{out}: cannot be written: No space left on device"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert out.read_text(encoding="utf-8") == "older"


def test_what_cannot_be_written_is_known_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for out, words in (
        (tmp_path / "file" / "out", "cannot be written: "),
        (tmp_path / ("n" * 300), "cannot be written: File name too long"),
        (tmp_path, "is a folder; name a file"),
        (Path("s3://bucket/out"), "outputs are written to local files; give a path"),
        (Path("file:///out"), "outputs are written to local files; give a path"),
    ):
        with (
            pytest.raises(ConfigError, match=re.escape(f"{out}: {words}")),
            whole_file(out, overwrite=True),
        ):
            raise AssertionError("the work began")


def test_devices_pipes_and_links_to_them_are_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/full", tmp_path / "to_full")
    for out in (tmp_path / "pipe", tmp_path / "to_full"):
        with pytest.raises(ConfigError, match=r"is a device, pipe or socket, not a file"):
            write(out)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "to_full").is_symlink()


def test_two_writers_of_one_file(tmp_path):
    out = tmp_path / "out"
    with whole_file(out, overwrite=False) as part:
        part.write_text("first", encoding="utf-8")
        with pytest.raises(ConfigError, match="another process is writing it"):
            write(out)
    assert out.read_text(encoding="utf-8") == "first"
    # What a process left that was killed is in nobody's way.
    (tmp_path / ".out.part").write_text("a good deal longer than what comes", encoding="utf-8")
    write(out)
    assert out.read_text(encoding="utf-8") == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("path", "is_refused"),
    [
        ("run/metrics.jsonl", True),
        ("run/*.jsonl", True),
        ("run", True),
        (".", True),
        ("*.jsonl", False),
        ("run/plots", False),
    ],
)
@pytest.mark.parametrize("place", ["source", "evaluation_source"])
def test_a_run_does_not_write_what_it_reads(tmp_path, monkeypatch, path, is_refused, place):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    data = {
        "source": {"format": "synthetic", "rows": 10},
        place: {"format": "jsonl", "path": ["elsewhere.jsonl", path]},
    }
    job = parse_job({
        "data": {**data, "label": {"column": "click"}},
        "features": [{"columns": ["c0"]}],
    })
    if is_refused:
        with pytest.raises(ConfigError, match=READ):
            RunFolder(Path("run")).refuse_unless_fit(job, resume=False)
    else:
        RunFolder(Path("run")).refuse_unless_fit(job, resume=False)

"""`inspect` draws a run, `compare` sets runs side by side."""

import sys

import pytest
import yaml

PICTURES = {"training.png", "calibration.png", "tables.png", "skew.png"}
NO_MATPLOTLIB = (
    "no PNG files: matplotlib is not installed; install it with: pip install 'penstock[plots]'"
)


@pytest.fixture
def finished(penstock, small_yaml, tmp_path):
    def train(name, *sets):
        overrides = [part for one in sets for part in ("--set", one)]
        code, _, errors = penstock("train", small_yaml, "--out", tmp_path / name, *overrides)
        assert (code, errors) == (0, "")
        return tmp_path / name

    return train


def test_inspect_draws_the_curves_of_a_run(penstock, finished):
    run = finished("run")
    code, shown, errors = penstock("inspect", run, "--no-plots")
    assert (code, errors) == (0, "")
    assert "training curves" in shown and "calibration, held-out" in shown
    assert not (run / "plots").exists()
    code, shown, errors = penstock("inspect", run)
    assert (code, errors) == (0, "")
    assert {file.name for file in (run / "plots").iterdir()} == PICTURES
    for name in PICTURES:
        assert f"picture {run / 'plots' / name}" in shown
    (checkpoint, *_) = sorted((run / "checkpoints").iterdir())
    _, shown, _ = penstock("inspect", checkpoint)
    assert "training curves" not in shown


def test_inspect_shows_admission_and_eviction(penstock, finished):
    defaults = "table_defaults={dim: 8, max_bytes: 6KiB, eviction: {order: lru}}"
    run = finished("run", defaults)
    code, shown, errors = penstock("inspect", run, "--no-plots")
    assert (code, errors) == (0, "")
    assert "admission and eviction" in shown
    # 6 KiB hold 96 rows of 8 columns, an accumulator, a mark of use and 24 bytes of index.
    for table in ("c0", "c3"):
        cells = next(line for line in shown.split("admission and")[1].splitlines() if table in line)
        admitted, refused, evicted, dropped, *ages = cells.replace("│", " ").split()[1:]
        assert int(admitted.replace(",", "")) - int(evicted.replace(",", "")) <= 96
        assert int(evicted.replace(",", "")) > 96
        assert (refused, dropped) == ("0", "0")
        assert int(ages[0]) <= int(ages[1]) <= int(ages[2]) <= 36


def test_a_drawn_run_can_be_resumed(penstock, finished, small_yaml):
    run = finished("run", "training.max_steps=12")
    penstock("inspect", run)
    code, _, errors = penstock("train", small_yaml, "--out", run, "--resume")
    assert (code, errors) == (0, "")


def test_compare_shows_metrics_differences_and_curves(penstock, finished, tmp_path):
    one, two = finished("one"), finished("two", "training.optimizer.learning_rate=0.01")
    picture = tmp_path / "both.png"
    code, shown, errors = penstock("compare", one, two, "--out", picture)
    assert (code, errors) == (0, "")
    lines = [[part.strip() for part in line.split("\u2502")[1:-1]] for line in shown.splitlines()]
    assert ["training.optimizer.learning_rate", "0.001", "0.01"] in lines
    assert {"auc", "log_loss", "samples/s"} <= {line[0] for line in lines if line}
    assert "data.source.rows" not in shown
    assert f"curves: {picture}" in shown
    assert picture.stat().st_size > 10_000
    picture.unlink()
    code, shown, _ = penstock("compare", one, two, "--no-plots", "--out", picture)
    assert code == 0 and not picture.exists() and "curves:" not in shown


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["one"], "compare needs two runs or more; `penstock inspect RUN` shows one"),
        (
            ["one", "none"],
            "{none}: no run folder (it has no job.yaml and metrics.jsonl); name the "
            "folder that `penstock train` wrote",
        ),
        (["one", "one"], "{one} is given twice; name each run once"),
    ],
)
def test_what_cannot_be_compared_is_said(penstock, finished, tmp_path, runs, message):
    paths = {"one": tmp_path / "one", "none": tmp_path / "none"}
    finished("one", "training.max_steps=3")
    code, _, errors = penstock("compare", *(paths[name] for name in runs))
    assert (code, errors) == (2, f"error: {message.format(**paths)}\n")


def test_without_matplotlib_the_terminal_says_how_to_get_it(penstock, finished, monkeypatch):
    one, two = (finished(name, "training.max_steps=8") for name in ("one", "two"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (["inspect", one], ["compare", one, two]):
        code, shown, errors = penstock(*command)
        assert (code, errors) == (0, "")
        assert NO_MATPLOTLIB in shown
    assert not (one / "plots").exists()


def test_key_skew_needs_the_data(penstock, small_fields, tmp_path):
    from penstock.config import SyntheticSource
    from penstock.data import write_synthetic

    data = tmp_path / "clicks.parquet"
    write_synthetic(SyntheticSource(rows=2000, num_categorical=4), data, "parquet")
    small_fields["data"]["source"] = {"format": "parquet", "path": str(data)}
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(small_fields))
    penstock("train", job, "--out", tmp_path / "run")
    _, shown, _ = penstock("inspect", tmp_path / "run")
    assert "all 2,000 rows of the job's data" in shown.replace("\n", " ")
    assert f"picture {tmp_path / 'run' / 'plots' / 'skew.png'}" in shown
    data.unlink()
    code, shown, errors = penstock("inspect", tmp_path / "run")
    assert (code, errors) == (0, "")
    assert f"no key skew, which needs the job's data: {data}: no such file or directory\n" in shown

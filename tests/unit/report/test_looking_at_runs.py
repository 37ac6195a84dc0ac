"""What a run folder tells, in the terminal and as pictures."""

import io
import json
import sys

import pytest
from rich.console import Console

from penstock.errors import ConfigError
from penstock.report import plots
from penstock.report.comparison import job_differences, metrics_side_by_side
from penstock.report.display import headline, rules_table, slices_tables
from penstock.report.plots import can_draw, draw_comparison, draw_run
from penstock.report.record import RunRecord, is_metric
from penstock.report.terminal_curves import curve_tables, sparkline
from tests.unit.tables import cells

PNG = b"\x89PNG\r\n\x1a\n"


def train_line(step, **fields):
    rows = {"small": {"rows": 3, "bytes": 12}, "large": {"rows": 10 * step, "bytes": 40 * step}}
    line = {"kind": "train", "step": step, "samples": 100 * step, "auc": 0.5 + step / 100}
    return line | {"log_loss": 1 / step, "normalized_entropy": 2 / step, "tables": rows} | fields


def evaluation_line(step, **fields):
    buckets = [[0.01, 0.0, 50.0], [0.1, 0.2, 50.0], [0.6, 0.5, 50.0]]
    line = {"kind": "evaluation", "step": step, "samples": 150, "auc": 0.7, "log_loss": 0.4}
    line |= {"normalized_entropy": 0.9, "calibration": 1.25, "calibration_buckets": buckets}
    return line | fields


@pytest.fixture
def make_run(tmp_path):
    def make(name="run", lines=None, job="name: small\nmodel: {kind: dlrm}\n", summary=None):
        path = tmp_path / name
        path.mkdir()
        (path / "job.yaml").write_text(job)
        if lines is None:
            lines = [*(train_line(step) for step in range(1, 21)), evaluation_line(20)]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (path / "metrics.jsonl").write_text(text + '{"kind": "train", "st')  # torn by a crash
        if summary is not None:
            (path / "summary.json").write_text(json.dumps(summary))
        return path

    return make


def test_curves_are_the_lines_of_the_metrics(make_run):
    lines = [train_line(10), train_line(20, auc=None), evaluation_line(15), train_line(30)]
    record = RunRecord.read(make_run(lines=lines))
    curve = record.training_curve(("auc",))
    assert curve.samples.tolist() == [1000, 3000]  # what is undefined is left out
    assert curve.values.tolist() == [0.6, 0.8]
    held_out = record.evaluation_curve(("auc",))
    assert (held_out.samples.tolist(), held_out.values.tolist()) == ([1500], [0.7])
    assert list(record.growth()) == ["large", "small"]
    assert record.growth()["large"].values.tolist() == [100, 200, 300]
    assert record.summary is None


def test_the_table_that_is_the_largest_at_the_end_stands_first(make_run):
    sizes = {10: {"a": 5, "b": 1, "c": 3}, 20: {"a": 6, "b": 8, "c": 7}}
    lines = [
        train_line(step, tables={name: {"rows": rows} for name, rows in of.items()})
        for step, of in sizes.items()
    ]
    assert list(RunRecord.read(make_run(lines=lines)).growth()) == ["b", "c", "a"]


def test_calibration_is_that_of_the_last_evaluation(make_run):
    early, late = [[0.1, 0.2, 5.0]], [[0.3, 0.4, 6.0]]
    lines = [
        evaluation_line(10, calibration_buckets=early),
        evaluation_line(20, calibration_buckets=late),
    ]
    assert RunRecord.read(make_run(lines=lines)).calibrations == {"": late}


def test_what_evaluations_alone_have_is_drawn_whenever_it_came(make_run):
    first, second = several(1, "evaluation"), several(2, "evaluation")
    first["tasks"] = {"liked": {"auc": 0.6}}
    second["recall_at_10"] = 0.25
    record = RunRecord.read(make_run(lines=[train_line(1), train_line(3), first, second]))
    drawn = record.drawn_metrics()
    assert drawn["recall_at_10",] == "recall@10"
    assert drawn["tasks", "stars", "rmse"] == "stars: RMSE"
    curve = record.evaluation_curve(("tasks", "liked", "auc"))
    assert (curve.samples.tolist(), curve.values.tolist()) == ([100, 200], [0.6, 0.52])
    assert record.training_curve(("recall_at_10",)).values.size == 0


def test_qualities_are_told_from_counts_and_times():
    for name in ("loss", "auc", "share_of_teacher", "recall_at_10", "bias"):
        assert is_metric(name), name
    for name in ("samples", "seconds", "recall_candidates", "tasks", "wall_s"):
        assert not is_metric(name), name


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        RunRecord.read(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: no run folder (it has no job.yaml and metrics.jsonl); name the folder that "
        "`penstock train` wrote"
    )


def test_a_damaged_line_is_named_and_not_skipped(make_run):
    path = make_run()
    (path / "metrics.jsonl").write_text('{"kind": \n{"kind": "train"}\n')
    with pytest.raises(ConfigError, match=f"{path}: cannot read the run folder: "):
        RunRecord.read(path)


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 8, ""),
        ([5.0], 8, "▁"),
        ([2.0, 2.0], 8, "▁▁"),
        (range(8), 8, "▁▂▃▄▅▆▇█"),
        ([0, 0, 7, 7], 2, "▁█"),
    ],
)
def test_sparkline(make_run, values, width, expected):
    lines = [train_line(step + 1, auc=value) for step, value in enumerate(values)]
    curve = RunRecord.read(make_run(lines=lines)).training_curve(("auc",))
    assert sparkline(curve, width) == expected


def test_the_fall_of_the_first_steps_does_not_flatten_the_rest(make_run):
    lines = [train_line(step, log_loss=90.0 if step < 3 else step % 2) for step in range(1, 31)]
    curve = RunRecord.read(make_run(lines=lines)).training_curve(("log_loss",))
    assert set(sparkline(curve)[2:]) == {"▁"}
    assert sparkline(curve, skip_start=True) == "██" + "█▁" * 14


def test_the_terminal_shows_curves_calibration_and_growth(make_run):
    shown = [cells(table) for table in curve_tables(RunRecord.read(make_run()))]
    curves, calibration, growth = shown
    assert ["AUC", "held-out", "▁", "0.7000", "0.7000"] in curves
    assert [row[:2] for row in calibration] == [
        ["0.0100", "0.0000"],
        ["0.1000", "0.2000"],
        ["0.6000", "0.5000"],
    ]
    assert calibration[1][2].split() == ["2.00", "|" + "▶" * 8]
    climb = "▁▁▂▂▂▃▃▄▄▄▅▅▅▆▆▇▇▇██"
    assert growth[0] == ["large", climb, "200", "100.0"]
    assert growth[1][0] == "small"


def test_pictures_hold_the_points(make_run, tmp_path):
    record = RunRecord.read(make_run())
    written = draw_run(record, tmp_path / "plots")
    assert [file.name for file in written] == ["training.png", "calibration.png", "tables.png"]
    assert all(file.read_bytes().startswith(PNG) for file in written)
    auc = plots._training(record).axes[2]
    training, held_out = auc.lines
    assert training.get_xdata().tolist() == [100 * step for step in range(1, 21)]
    assert held_out.get_ydata().tolist() == [0.7]
    axis = plots._calibrations(record).axes[0]
    by_label = {line.get_label(): line for line in axis.lines}
    assert by_label["no positive"].get_xdata().tolist() == [0.01]  # zero has no logarithm
    assert 0 < by_label["no positive"].get_ydata()[0] < 0.2
    growth, bars = plots._tables(record.growth()).axes
    assert [patch.get_height() for patch in bars.patches] == [200, 3]
    assert growth.lines[0].get_ydata()[-1] == 200


def test_runs_with_little_in_them_are_drawn_too(make_run, tmp_path):
    one = RunRecord.read(make_run("one", [train_line(5, auc=None)]))
    assert [file.name for file in draw_run(one, tmp_path / "a")] == ["training.png", "tables.png"]
    none = RunRecord.read(make_run("none", []))
    assert draw_run(none, tmp_path / "b") == []
    assert list(curve_tables(none)) == []
    assert draw_comparison({"one": one, "none": none}, tmp_path / "c.png").stat().st_size
    without = [train_line(1) | {"tables": {}}, evaluation_line(1, calibration_buckets=[])]
    bare = RunRecord.read(make_run("bare", without))
    assert [file.name for file in draw_run(bare, tmp_path / "d")] == ["training.png"]
    never = [evaluation_line(1, calibration=None, calibration_buckets=[[0.2, 0.0, 9.0]])]
    assert len(draw_run(RunRecord.read(make_run("never", never)), tmp_path / "e")) == 1


def test_a_comparison_draws_every_run(make_run, tmp_path):
    runs = {name: RunRecord.read(make_run(name)) for name in ("a", "b")}
    file = draw_comparison(runs, tmp_path / "both.png")
    alone = draw_comparison({"a": runs["a"]}, tmp_path / "one.png")
    assert file.read_bytes() != alone.read_bytes()
    with pytest.raises(ConfigError, match=r"both\.xyz: cannot write the picture: "):
        draw_comparison(runs, tmp_path / "both.xyz")


def test_without_matplotlib_nothing_can_be_drawn(monkeypatch):
    assert can_draw()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not can_draw()


def test_metrics_of_unfinished_runs_stand_beside_finished_ones(make_run):
    summary = {
        "samples_per_s": 1234.5,
        "wall_s": 6.0,
        "peak_memory_bytes": 3 << 20,
        "tables": {"a": {"rows": 7, "bytes": 2048}},
    }
    grouped = {"grouped_auc": {"user": {"auc": 0.65, "groups": 3, "share": 1.0}}}
    done = RunRecord.read(
        make_run("done", [train_line(20), evaluation_line(20, **grouped)], summary=summary)
    )
    running = RunRecord.read(make_run("running", [train_line(7)]))
    table = metrics_side_by_side({"done": done, "running": running})
    rows = {row[0]: row[1:] for row in cells(table)}
    assert rows["auc"] == ["[bold]0.700000[/bold]", "0.570000"]
    assert rows["log_loss"] == ["0.400000", "[bold]0.142857[/bold]"]
    assert rows["calibration"] == ["1.250000", "-"]
    assert rows["AUC grouped by user"] == ["[bold]0.650000[/bold]", "-"]
    assert rows["steps"] == ["20", "7"]
    assert rows["samples/s"] == ["1,234", "-"]
    assert rows["embedding rows"] == ["7", "-"]
    assert rows["embedding bytes"] == ["2.0 KiB", "-"]
    assert table.caption == "-: the run has not come to its end"


def test_only_fields_that_differ_are_shown(make_run):
    runs = {
        "a": RunRecord.read(make_run("a", job="name: x\nmodel: {kind: dlrm, top: [3]}\n")),
        "b": RunRecord.read(make_run("b", job="name: x\nmodel: {kind: dcn_v2}\n")),
    }
    assert cells(job_differences(runs)) == [
        ["model.kind", '"dlrm"', '"dcn_v2"'],
        ["model.top", "[3]", "-"],
    ]
    assert job_differences({"a": runs["a"]}) == "the jobs are equal in every field"


def test_brackets_are_shown_as_they_are(make_run):
    """Rich would read [a-z] as a style and leave it out."""
    runs = {
        "[red]": RunRecord.read(make_run("a", job="columns: ['[a-z]*']\n")),
        "b": RunRecord.read(make_run("b", job="columns: ['c*']\n")),
    }
    metrics = {"samples": 1, "positives": 0, "auc": None, "log_loss": 0.1}
    metrics |= {"normalized_entropy": None, "calibration": None}
    found = {"values": {"[bold]": metrics}, "rest": metrics | {"samples": 0}}
    console = Console(file=io.StringIO(), width=120)
    console.print(job_differences(runs))
    for table in slices_tables({"slices": {"[city]": found}}):
        console.print(table)
    shown = console.file.getvalue()
    for text in ("[red]", '["[a-z]*"]', "[city]", "[bold]"):
        assert text in shown


def several(step, kind="train"):
    """A line of a run of two labels."""
    tasks = {"liked": {"auc": 0.5 + step / 100, "log_loss": 0.6}, "stars": {"rmse": 1.0}}
    line = {"kind": kind, "step": step, "samples": 10 * step, "loss": 1.5, "tasks": tasks}
    if kind == "evaluation":
        tasks["liked"] |= {"calibration": 1.1, "calibration_buckets": [[0.1, 0.2, 50.0]]}
        tasks["liked"]["grouped_auc"] = {"user": {"auc": 0.61, "groups": 3, "share": 1.0}}
    return line


def test_each_label_has_curves_and_a_calibration_of_its_own(make_run, tmp_path):
    record = RunRecord.read(make_run("m", [several(1), several(2), several(2, "evaluation")]))
    assert list(record.drawn_metrics().values()) == [
        "loss",
        "liked: log loss",
        "liked: AUC",
        "stars: RMSE",
    ]
    curve = record.training_curve(("tasks", "liked", "auc"))
    assert curve.values.tolist() == [0.51, 0.52]
    assert list(record.calibrations) == ["liked"]
    titles = [table.title and str(table.title) for table in curve_tables(record)]
    assert titles == ["training curves", "calibration, held-out: liked"]
    written = draw_run(record, tmp_path / "plots")
    assert [file.name for file in written] == ["training.png", "calibration.png"]
    panels = plots._training(record).axes
    assert [axis.get_title() for axis in panels] == list(record.drawn_metrics().values())
    assert panels[2].lines[0].get_ydata().tolist() == [0.51, 0.52]


def test_labels_are_compared_one_by_one(make_run):
    one = RunRecord.read(make_run("one", [several(2, "evaluation")]))
    two = RunRecord.read(make_run("two", [several(4, "evaluation")]))
    rows = {row[0]: row[1:] for row in cells(metrics_side_by_side({"one": one, "two": two}))}
    assert rows["liked: auc"] == ["0.520000", "[bold]0.540000[/bold]"]
    assert rows["stars: rmse"] == ["[bold]1.000000[/bold]"] * 2
    assert rows["loss"] == ["[bold]1.500000[/bold]"] * 2
    assert rows["liked: AUC grouped by user"] == ["[bold]0.610000[/bold]"] * 2


def test_the_headline_names_each_label():
    line = several(1)
    assert headline(line) == "loss 1.5000  liked AUC 0.5100  stars RMSE 1.0000"
    assert headline(line, most=2) == "loss 1.5000  liked AUC 0.5100"
    assert headline({"log_loss": 0.5, "auc": float("nan")}) == "loss 0.5000"
    assert headline({"loss": 4.0, "recall_at_10": 0.25}) == "loss 4.0000  recall@10 0.2500"


def test_slices_of_a_number_show_errors(capsys):
    one = {"samples": 5, "rmse": 1.25, "mae": 1.0, "bias": -0.5}
    found = {"values": {"Oslo": one}, "rest": one | {"samples": 0}}
    (table,) = slices_tables({"tasks": {"stars": {"slices": {"city": found}}}})
    assert [column.header for column in table.columns] == [
        "stars by city",
        "samples",
        "RMSE",
        "MAE",
        "bias",
    ]
    assert cells(table)[0] == ["Oslo", "5", "1.2500", "1.0000", "-0.5000"]


def test_a_table_of_what_admission_and_eviction_did():
    ruled = {"rows": 5, "bytes": 320, "admitted": 1205, "refused": 9, "evicted": 1200}
    ruled |= {"evicted_age": 12.25, "dropped": 0, "candidates": 7, "budget_used": 0.5}
    plain = {"rows": 3, "bytes": 96}
    idle = {**ruled, "evicted": 0, "evicted_age": 0.0, "budget_used": None}
    assert rules_table({"a": plain}) is None
    assert cells(rules_table({"a": plain, "b": ruled, "c": idle})) == [
        ["b", "50.0%", "1,205", "9", "1,200", "12.2", "7"],
        ["c", "-", "1,205", "9", "0", "-", "7"],
    ]

"""What may happen to the data between stop and resume, and that each row is counted once."""

import gzip
import os
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.config import parse_job
from penstock.data import Dataset
from penstock.data.formats import columnar, lines
from penstock.errors import DataError
from penstock.position import LanePosition, Position

DAY = 100
"""Rows of each file."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(columnar, "EXTENT_ROWS", 40)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 400)
    monkeypatch.setattr(lines, "READ_BYTES", 90)


def ids_of(day, rows=DAY):
    return range(day * 1000, day * 1000 + rows)


def write(path, day, ids=None):
    """Writes a file of a day: Parquet, or text by its ending."""
    ids = list(ids_of(day) if ids is None else ids)
    if path.suffix == ".parquet":
        columns = {"label": np.zeros(len(ids), np.int64), "id": np.array(ids, np.int64)}
        pq.write_table(pa.table({**columns, "time": columns["id"]}), path, row_group_size=20)
        return
    text = "label,id,time\n" + "".join(f"0,{one},{one}\n" for one in ids)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def open_days(path, block=30, *, after=None, quarantine=None, **data):
    source = {"format": "parquet", "path": path}
    if ".csv" in path:
        source = {"format": "csv", "path": path, "types": {"id": "int64"}}
        source["on_malformed_row"] = "quarantine"
    job = parse_job({
        "data": {
            "source": source,
            "label": {"column": "label"},
            "event_time": "time",
            "shuffle": {"block_rows": block},
            **data,
        },
        "features": [{"columns": ["id"]}],
    })
    return Dataset.open(job, after=after, quarantine=quarantine)


def read(dataset, start=Position(), batches=None, size=10, epochs=1):  # noqa: B008 (frozen)
    """Ids of the next batches and where the one after them begins."""
    found, end = [], start
    with dataset.batches("train", batch_size=size, seed=3, start=start, epochs=epochs) as loader:
        for number, batch in enumerate(loader):
            if number == batches:
                break
            found += batch.sparse.values.tolist()
            end = batch.end
        else:
            end = loader.position
    # As a checkpoint keeps it.
    return found, Position.from_dict(end.to_dict())


def held_out(dataset):
    with dataset.batches("evaluation", batch_size=50) as batches:
        return [one for batch in batches for one in batch.sparse.values.tolist()]


@pytest.fixture(params=["parquet", "csv", "csv.gz"])
def days(request, tmp_path):
    """Three files; called, the glob of them all."""

    def path(day):
        return tmp_path / f"day_{day}.{request.param}"

    for day in (1, 2, 3):
        write(path(day), day)
    path.glob = str(path("*"))
    path.ending = request.param
    return path


def refusal(days, end, **options):
    with pytest.raises(DataError) as error:
        read(open_days(days.glob, **options), end)
    with pytest.raises(DataError) as again:
        open_days(days.glob, after=end, **options)
    assert str(again.value) == str(error.value)
    return str(error.value)


@pytest.mark.parametrize("batches", [3, 14])
def test_nothing_happened(days, batches, tmp_path):
    """Times of change, folders and names that keep their order are nothing."""
    first, end = read(open_days(days.glob), batches=batches)
    whole, _ = read(open_days(days.glob))
    assert first + read(open_days(days.glob), end)[0] == whole
    moved = tmp_path / "elsewhere" / "days"
    moved.mkdir(parents=True)
    for day in (1, 2, 3):
        shutil.copy(days(day), moved / days(day).name)
        os.utime(moved / days(day).name, (0, 0))
    glob = str(moved / os.path.basename(days.glob))
    assert first + read(open_days(glob, after=end), end)[0] == whole
    (moved / days(1).name).rename(moved / f"day_0.{days.ending}")
    assert first + read(open_days(glob, after=end), end)[0] == whole


def test_a_file_added_in_front_is_refused(days):
    _, end = read(open_days(days.glob), batches=13)
    write(days(0), 0)
    assert refusal(days, end) == (
        f"{days(0)}: added before {days(1)}, which was read already, so its rows would be left out "
        "and others read twice; give it a name or a place behind the files that the run began with"
    )


def test_a_file_that_was_read_and_is_gone_is_refused(days):
    _, end = read(open_days(days.glob), batches=13)
    days(1).unlink()
    assert refusal(days, end) == (
        f"{days(1)}: removed since the run began, and rows of it were trained on; put it back as "
        "it was, or train in a new run folder"
    )
    for day in (2, 3):
        days(day).unlink()
    write(days(4), 4)
    assert str(days(1)) in refusal(days, end)


@pytest.mark.parametrize("change", ["shorter", "longer", "other rows", "one row"])
def test_a_file_that_was_read_and_has_changed_is_refused(days, change):
    _, end = read(open_days(days.glob), batches=13)
    size = days(1).stat().st_size
    rows = {
        "shorter": ids_of(1, DAY - 1),
        "longer": ids_of(1, DAY + 1),
        "other rows": ids_of(5),
        "one row": [*ids_of(1, DAY - 1), 1998],
    }
    write(days(1), 1, rows[change])
    message = refusal(days, end)
    now = days(1).stat().st_size
    if change == "longer" and days.ending == "csv":
        assert message == (
            f"{days(1)}: rows were added after the run had read it to its end; put them into a "
            "file that comes behind the others, and this one back as it was"
        )
        return
    what = "the content is another" if now == size else f"{size:,} bytes then, {now:,} now"
    assert message == (
        f"{days(1)}: changed after rows of it were trained on ({what}); put it back as it was, or "
        "train in a new run folder"
    )


def test_files_in_another_order_are_refused(days, tmp_path):
    _, end = read(open_days(days.glob), batches=13)
    days(1).rename(tmp_path / "x")
    days(2).rename(days(1))
    (tmp_path / "x").rename(days(2))
    assert f"{days(1)}: changed after rows of it were trained on" in refusal(days, end)


def test_files_listed_in_another_order_are_refused(tmp_path):
    paths = [tmp_path / f"{name}.parquet" for name in "zyx"]
    for day, path in enumerate(paths):
        write(path, day)

    def open_list(order):
        source = {"format": "parquet", "path": [str(paths[number]) for number in order]}
        data = {"source": source, "label": {"column": "label"}, "shuffle": {"block_rows": 30}}
        job = {"data": data}
        return Dataset.open(parse_job({**job, "features": [{"columns": ["id"]}]}))

    _, end = read(open_list([0, 1, 2]), batches=13)
    with pytest.raises(DataError) as error:
        read(open_list([1, 0, 2]), end)
    assert str(error.value) == (
        f"{paths[1]}: now comes before {paths[0]}, which was read earlier; keep the order of the "
        "files that the run began with"
    )
    _, end = read(open_list([0, 1, 2]), batches=2)
    with pytest.raises(DataError) as error:
        read(open_list([0, 2, 1]), end)
    assert str(error.value).startswith(f"{paths[2]}: stands elsewhere among the files")


def test_files_still_to_be_read_may_change_but_not_go(days):
    first, end = read(open_days(days.glob), batches=3)
    write(days(3), 7)
    write(days(4), 4)
    write(days("1b"), 8, ids_of(8, 5))
    rest, _ = read(open_days(days.glob), end)
    expected = [*ids_of(1), *ids_of(8, 5), *ids_of(2), *ids_of(7), *ids_of(4)]
    assert sorted(first + rest) == sorted(expected)
    days(2).unlink()
    assert refusal(days, end) == (
        f"{days(2)}: removed since the run began, and it was still to be read; put it back as it "
        "was, or train in a new run folder"
    )


@pytest.mark.parametrize("block", [0, 30, 1000])
@pytest.mark.parametrize("batches", [1, 4, 29, None])
def test_files_added_behind_are_trained_on(days, block, batches):
    """In the middle, in the last block, and after the end."""
    first, end = read(open_days(days.glob, block=block), batches=batches)
    write(days(4), 4)
    rest, done = read(open_days(days.glob, block=block), end)
    assert sorted(first + rest) == sorted([*ids_of(1), *ids_of(2), *ids_of(3), *ids_of(4)])
    if batches is None:
        assert sorted(rest) == list(ids_of(4))
    assert done.counts == (400, 0, 0, 400)
    assert read(open_days(days.glob, block=block), done) == ([], done)


@pytest.mark.parametrize("batches", [7, 37, 43, None])
def test_with_more_epochs_added_files_join_the_one_under_way(days, batches):
    first, end = read(open_days(days.glob), batches=batches, epochs=2)
    write(days(4), 4)
    rest, done = read(open_days(days.glob), end, epochs=2)
    seen = Counter(first + rest)
    times = 2 if batches == 7 else 1
    assert {seen[one] for day in (1, 2, 3) for one in ids_of(day)} == {2}
    assert {seen[one] for one in ids_of(4)} == {times}
    assert len(seen) == 400
    # Another epoch reads all.
    assert sorted(read(open_days(days.glob), done, epochs=3)[0]) == sorted(seen)


@pytest.mark.parametrize("batches", [2, 13, 29, None])
def test_lines_added_to_the_file_being_read_are_trained_on(tmp_path, batches):
    path = tmp_path / "day.csv"
    write(path, 1, ids_of(1, 300))
    first, end = read(open_days(str(path)), batches=batches)
    write(path, 1, ids_of(1, 350))
    rest, done = read(open_days(str(path)), end)
    assert sorted(first + rest) == list(ids_of(1, 350))
    # And again.
    write(path, 1, ids_of(1, 360))
    assert sorted(first + rest + read(open_days(str(path)), done)[0]) == list(ids_of(1, 360))


@pytest.mark.parametrize("batches", [0, 2, 13, 29, None])
def test_line_breaks_in_quotes_may_come_with_a_later_day(tmp_path, batches):
    def open_texts(line_breaks):
        source = {"format": "csv", "path": f"{tmp_path}/*.csv", "types": {"id": "int64"}}
        source |= {"quoted_line_breaks": line_breaks}
        return open_days("", source=source)

    def write_texts(day, text):
        lines = [f'0,{one},{one},"{text}"\n' for one in ids_of(day)]
        (tmp_path / f"{day}.csv").write_text("label,id,time,text\n" + "".join(lines))

    write_texts(1, 'a "" b, c')
    write_texts(2, "d")
    first, end = read(open_texts(False), batches=batches)
    write_texts(3, "one\ntwo\n")
    with pytest.raises(DataError, match=r"3\.csv:2: .* set data.source.quoted_line_breaks: true"):
        read(open_texts(False), end)
    rest, _ = read(open_texts(True), end)
    assert sorted(first + rest) == [*ids_of(1), *ids_of(2), *ids_of(3)]


def test_a_line_that_was_not_whole_is_not_added_to(tmp_path):
    path = tmp_path / "day.csv"
    path.write_text("label,id,time\n0,1,1\n0,2,2")
    _, end = read(open_days(str(path)), size=1)
    path.write_text("label,id,time\n0,1,1\n0,2,22\n0,3,3\n")
    with pytest.raises(DataError, match=r"day\.csv: changed after rows of it were trained on"):
        read(open_days(str(path)), end)
    path.write_text("label,id,time\n0,1,1\n0,2,2\n0,3,3\n")
    assert read(open_days(str(path)), end)[0] == [3]


def test_a_row_behind_the_position_may_be_mended(tmp_path):
    path = tmp_path / "day.csv"
    rows = [f"0,{one},{one}\n" for one in ids_of(1, 300)]
    broken = [*rows[:250], "7,1250,1250\n", *rows[251:]]
    path.write_text("label,id,time\n" + "".join(broken))
    found = []
    with (
        open_days(str(path)).batches("train", batch_size=10, seed=3) as batches,
        pytest.raises(DataError, match=r"day\.csv:252, column 'label'"),
    ):
        for batch in batches:
            found += batch.sparse.values.tolist()
            end = batch.end
    assert len(found) >= 200
    path.write_text("label,id,time\n" + "".join(rows))
    assert sorted(found + read(open_days(str(path)), end)[0]) == list(ids_of(1, 300))


def test_what_a_fraction_holds_out_stays_held_out(days):
    split = {"by": "fraction", "evaluation": 0.25}
    dataset = open_days(days.glob, split=split)
    out = held_out(dataset)
    first, end = read(dataset, batches=9)
    write(days(4), 4)
    again = open_days(days.glob, after=end, split=split)
    assert held_out(again) == out == [*ids_of(3)][-75:]
    rest, done = read(again, end)
    assert sorted(first + rest + out) == sorted(o for day in (1, 2, 3, 4) for o in ids_of(day))
    # Opened without the position, the fraction would be cut elsewhere.
    with pytest.raises(DataError) as error:
        read(open_days(days.glob, split=split), end)
    assert str(error.value) == (
        f"{days(4)}: added since the run began, which held out a fraction of the files before it; "
        "open the data with the position to go on from"
    )
    write(days(5), 5)
    assert sorted(read(open_days(days.glob, after=done, split=split), done)[0]) == [*ids_of(5)]
    # No file of those that were divided may change, read or not.
    write(days(3), 3, ids_of(3, 120))
    with pytest.raises(DataError, match=rf"{days(3).name}: (changed|rows were added)"):
        open_days(days.glob, after=end, split=split)


def test_by_time_no_row_changes_sides(days):
    split = {"by": "time", "at": 2050}
    dataset = open_days(days.glob, split=split, event_time_unit="ms")
    first, end = read(dataset, batches=4)
    write(days(4), 4, [*range(4, 40), *ids_of(4, 20)])
    again = open_days(days.glob, after=end, split=split)
    rest, done = read(again, end)
    assert sorted(first + rest) == sorted([*ids_of(1), *ids_of(2, 50), *range(4, 40)])
    assert sorted(held_out(again)) == sorted([*ids_of(2)[50:], *ids_of(3), *ids_of(4, 20)])
    read_rows, filtered, quarantined, applied = done.counts
    assert (quarantined, applied) == (0, 186)
    assert read_rows == filtered + applied


@pytest.mark.parametrize("block", [0, 30, 64])
@pytest.mark.parametrize("change", [(10, 7), (7, 10), (10, 64), (64, 10), (1, 100), (30, 11)])
def test_another_batch_size_repeats_and_loses_no_row(days, block, change):
    before, after = change
    for batches in (1, 2, 5):
        first, end = read(open_days(days.glob, block=block), batches=batches, size=before)
        rest, done = read(open_days(days.glob, block=block), end, size=after)
        assert sorted(first + rest) == sorted([*ids_of(1), *ids_of(2), *ids_of(3)])
        assert done.samples == done.counts.applied == 300
        # Twice.
        second, end = read(open_days(days.glob, block=block), end, batches=1, size=after)
        rest, _ = read(open_days(days.glob, block=block), end, size=3)
        assert sorted(first + second + rest) == sorted([*ids_of(1), *ids_of(2), *ids_of(3)])


def test_another_block_takes_effect_with_the_next_one(days):
    first, end = read(open_days(days.glob, block=30), batches=4)
    rest, _ = read(open_days(days.glob, block=100), end)
    whole, _ = read(open_days(days.glob, block=30))
    # The block that was begun is finished in its order.
    assert rest[:20] == whole[40:60]
    assert sorted(rest[20:120]) == sorted([*ids_of(1)][60:] + [*ids_of(2)][:60])


def malformed_days(tmp_path, days=2):
    """Text with malformed lines at the front, at the end, in runs, and a file of nothing else."""
    lines_of = []
    for day in range(1, days + 1):
        rows = [f"0,{one},{one}" for one in ids_of(day)]
        for at in (0, 0, 17, 18, 19, 50, 99):
            rows.insert(at, f"bad {at}")
        rows.append("bad end")
        (tmp_path / f"day_{day}.csv").write_text("label,id,time\n" + "\n".join(rows) + "\n")
        lines_of.append(len(rows))
    (tmp_path / "day_1z.csv").write_text("label,id,time\nbad\nbad\n")
    return str(tmp_path / "*.csv"), sum(lines_of) + 2, 8 * days + 2


@pytest.mark.parametrize("block", [5, 30])
@pytest.mark.parametrize("split", [None, {"by": "time", "at": 2020}])
def test_rows_are_counted_once_at_every_position(tmp_path, split, block):
    """read = filtered + quarantined + applied, whatever was read ahead; the end says all."""
    path, read_rows, bad = malformed_days(tmp_path)
    kept = tmp_path / "quarantine.jsonl"
    dataset = open_days(path, block, split=split, quarantine=kept)
    with dataset.batches("train", batch_size=5, seed=3, epochs=2) as batches:
        ends = [batch.end for batch in batches]
        last = batches.position
    applied = 2 * (200 if split is None else 120)
    assert last == ends[-1]
    assert last.counts == (2 * read_rows, 2 * (read_rows - bad) - applied, 2 * bad, applied)
    assert dataset.quarantined_rows == bad
    entries = kept.read_text()
    assert len(entries.splitlines()) == len(set(entries.splitlines())) == bad
    for end in ends:
        count = end.counts
        assert count.read == count.filtered + count.quarantined + count.applied
        assert count.applied == end.samples
    for end in (ends[0], ends[5], ends[len(ends) // 2], ends[-2], ends[-1]):
        # What was written behind the position goes, and comes again.
        again = open_days(path, block, split=split, quarantine=kept, after=end)
        again.take_up_quarantine(end)
        assert again.quarantined_rows == min(end.counts.quarantined, bad)
        found, done = read(again, end, size=5, epochs=2)
        assert len(found) == applied - end.samples
        assert done.counts == last.counts
        assert kept.read_text() == entries


def test_a_block_that_was_begun_and_holds_other_rows_is_refused(tmp_path):
    """As the job leaves out others than it did; the files are the same."""
    path, _, _ = malformed_days(tmp_path)
    dataset = open_days(path, split={"by": "time", "at": 1030})
    _, end = read(dataset, batches=1)
    with pytest.raises(DataError) as error:
        read(open_days(path, split={"by": "time", "at": 1029}), end)
    assert str(error.value) == (
        f"{tmp_path}/day_1.csv: the block that was begun in it had 30 samples and has 29 now, so "
        "it cannot be finished in its order; put the files and the job's data back as they were, "
        "or train in a new run folder"
    )


def test_malformed_rows_at_the_very_end_are_counted(tmp_path):
    """No batch comes behind them."""
    path = tmp_path / "day_1.csv"
    write(path, 1)
    _, end = read(open_days(str(tmp_path / "*.csv")))
    (tmp_path / "day_2.csv").write_text("label,id,time\nbad\nbad\n")
    kept = tmp_path / "quarantine.jsonl"
    dataset = open_days(str(tmp_path / "*.csv"), after=end, quarantine=kept)
    found, done = read(dataset, end)
    assert found == [] and done.counts == (102, 0, 2, 100)
    assert dataset.quarantined_rows == len(kept.read_text().splitlines()) == 2
    assert read(dataset, done) == ([], done)


def test_a_file_that_grew_has_its_malformed_rows_once(tmp_path):
    path, kept = tmp_path / "day.csv", tmp_path / "quarantine.jsonl"
    text = "label,id,time\n0,1,1\nbad\n0,2,2\n"
    path.write_text(text)
    _, end = read(open_days(str(path), quarantine=kept), size=1)
    path.write_text(text + "bad\n0,3,3\n")
    dataset = open_days(str(path), quarantine=kept, after=end)
    dataset.take_up_quarantine(end)
    found, done = read(dataset, end, size=1, epochs=2)
    assert Counter(found) == {1: 1, 2: 1, 3: 2}
    assert done.counts == (10, 0, 4, 6)
    assert len(kept.read_text().splitlines()) == dataset.quarantined_rows == 2


def test_no_row_that_is_good_is_an_error(tmp_path):
    (tmp_path / "day.csv").write_text("label,id,time\nbad\nbad\n")
    with pytest.raises(DataError) as error:
        read(open_days(str(tmp_path / "day.csv")), epochs=10**9)
    assert str(error.value) == (
        f"{tmp_path}/day.csv: no row is left to train on; every one that was read is malformed "
        "(see quarantine.jsonl in the run), held out by its time, or has no others to draw "
        "negatives from"
    )


def test_a_file_without_rows_is_one_of_the_files(tmp_path):
    glob = str(tmp_path / "*.parquet")
    write(tmp_path / "a.parquet", 1)
    write(tmp_path / "b.parquet", 2, [])
    write(tmp_path / "c.parquet", 3)
    first, end = read(open_days(glob), batches=15)
    assert sorted(first + read(open_days(glob), end)[0]) == [*ids_of(1), *ids_of(3)]
    write(tmp_path / "b.parquet", 2)
    with pytest.raises(DataError, match=r"b\.parquet: changed after"):
        read(open_days(glob), end)


def test_positions_of_version_1(tmp_path):
    """They count extents and good rows of them, and know no files."""
    path, _, _ = malformed_days(tmp_path)
    dataset = open_days(path)
    part = dataset._parts["train"]
    extents = list(part.extents)
    with dataset.batches("train", batch_size=10, seed=3, epochs=2) as loader:
        batches = list(loader)
    block = batches[0].start
    for number, batch in enumerate(batches):
        if batch.start.block_row == 0:
            block = batch.start
        if block.epoch != batch.start.epoch or block.lanes[0].cursor.file == 3:
            continue
        places = [(part.files.index(one.path), one.start) for one in extents]
        split = places.index(block.lanes[0].cursor[:2]) if block.lanes[0].cursor > (0, 0, 0) else 0
        row = good = 0
        for chunk in part.source.read(extents[split], ["id"]):
            kept = np.arange(chunk.num_read) if chunk.kept is None else chunk.kept
            good += int((kept + row < block.lanes[0].cursor.row).sum())
            row += chunk.num_read
        old = Position(
            epoch=batch.start.epoch,
            block=batch.start.block,
            block_row=batch.start.block_row,
            samples=batch.start.samples,
            version_1=(split, good, 30),
        )
        rest, done = read(open_days(path, after=old), old, epochs=2)
        expected = [one for other in batches[number:] for one in other.sparse.values.tolist()]
        assert rest == expected
        assert done.samples == 400 and done.version_1 is None
        if batch.start.block_row:
            # Its block is finished as it was cut.
            rest, _ = read(open_days(path, after=old), old, epochs=2, size=7)
            assert sorted(rest) == sorted(expected)


@pytest.mark.parametrize("lanes", [2, 3, 5])
def test_text_that_some_lanes_are_behind_goes_on_from_any_batch(tmp_path, monkeypatch, lanes):
    """A lane may be in the next file while another one is in the middle of this one."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", 200)
    monkeypatch.setattr(lines, "READ_BYTES", 90)
    for number, rows in enumerate((61, 0, 140, 40)):
        text = ["label,id", *(f"0,{1000 * number + one}" for one in range(rows)), ""]
        (tmp_path / f"{number}.csv").write_text("\n".join(text))
    job = parse_job({
        "data": {
            "source": {"format": "csv", "path": str(tmp_path / "*"), "types": {"id": "int64"}},
            "label": {"column": "label"},
            "shuffle": {"block_rows": 10},
        },
        "features": [{"columns": ["id"]}],
    })
    start = Position(lanes=(LanePosition(),) * lanes)
    with Dataset.open(job).batches("train", batch_size=5, start=start) as loader:
        ends = [Position.from_dict(batch.end.to_dict()) for batch in loader]
    behind = [end for end in ends if len({lane.cursor.file for lane in end.lanes}) > 1]
    assert len(behind) > 2
    for end in ends:
        Dataset.open(job, after=end)
    # Lanes that are behind a file would leave out what is added to it.
    with (tmp_path / "2.csv").open("a") as file:
        file.write("".join(f"0,{9000 + one}\n" for one in range(60)))
    for end in ends:
        if max(lane.cursor.file for lane in end.lanes) > 2:
            with pytest.raises(DataError, match=r"2\.csv: rows were added after"):
                Dataset.open(job, after=end)
        else:
            Dataset.open(job, after=end)

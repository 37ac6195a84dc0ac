"""Windows in which no negatives can be drawn: their rows join their lane's next one."""

import shutil
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.config import parse_job
from penstock.config.streams import StreamsSource
from penstock.data import Dataset
from penstock.data.batches import lane_queue
from penstock.data.columns.negatives import NegativeColumns, can_draw, draw_rows
from penstock.data.windows import growing, spans
from penstock.errors import DataError, JobNote
from penstock.position import Cursor, FileTag, LanePosition, Position, Span
from tests.unit.data.test_negatives import item_rows_of
from tests.world.ranks import World, in_world

HOURS = 14
KWARGS = {"batch_size": 10, "seed": 3}
DRAWN = 2


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    in_world(monkeypatch)
    monkeypatch.setattr(StreamsSource, "poll_s", 0.002)
    monkeypatch.setattr(growing, "_MOST_FILES", 5)


class TestWhetherNegativesCanBeDrawn:
    @given(st.data(), st.booleans())
    def test_is_what_drawing_says(self, data, has_users):
        items = data.draw(st.lists(st.integers(-1, 2), min_size=1, max_size=9))
        users = None
        if has_users:
            user = st.sampled_from([None, -5, 7])
            users = data.draw(st.lists(user, min_size=len(items), max_size=len(items)))
        rows = item_rows_of(items, users)
        columns = NegativeColumns(1, "uniform", "item", (), (), (), "user")
        try:
            draw_rows(rows, columns, [0], "here")
        except DataError:
            assert not can_draw(rows)
        else:
            assert can_draw(rows)

    def test_of_many_rows(self):
        rng = np.random.default_rng(0)
        items = rng.integers(0, 30, 3000)
        users = rng.integers(0, 400, 3000)
        assert can_draw(item_rows_of(items, users.tolist()))
        users[:30], items[:30] = 1000, np.arange(30)
        assert not can_draw(item_rows_of(items, users.tolist()))
        items[0] = 1
        assert can_draw(item_rows_of(items, users.tolist()))


def rows_of_a_file(rng, number):
    """Users and items of one file: often so few, or so alike, that none can be drawn."""
    kind = rng.integers(0, 7)
    if kind == 0:
        return [], []
    if kind == 1:
        return [int(rng.integers(9))], [int(rng.integers(5))]
    if kind == 2:  # one item
        size = int(rng.integers(2, 5))
        return rng.integers(0, 9, size).tolist(), [int(rng.integers(5))] * size
    if kind == 3:  # one user has all items
        return [number, number, number, 3], [1, 2, 3, 2]
    size = int(rng.integers(5, 25))
    return rng.integers(0, 30, size).tolist(), rng.integers(0, 9, size).tolist()


def write(path, rows, first):
    users, items = rows
    ids = first + np.arange(len(users))
    columns = {"id": ids, "user": users, "item": items}
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(name, pa.int64()) for name in columns])
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=20)


def hour_of(number):
    return datetime(2026, 3, 1) + timedelta(hours=number)


def path_of(hour, part):
    return f"{hour_of(hour):%Y%m%d}/{hour_of(hour):%H}/{part}.parquet"


END = f"{hour_of(HOURS):%Y-%m-%dT%H}"


def make(folder, seed):
    """A log by the hour: its rows by id, and the ids of each file."""
    rng, rows, files = np.random.default_rng(seed), {}, {}
    for hour in range(HOURS):
        for part in range(int(rng.choice([0, 1, 1, 2, 4]))):
            found = rows_of_a_file(rng, hour)
            first = 1000 * hour + 100 * part
            write(folder / path_of(hour, part), found, first)
            files[hour, part] = list(range(first, first + len(found[0])))
            rows |= {first + n: one for n, one in enumerate(zip(*found, strict=True))}
    for hour in (HOURS, HOURS + 1):  # which say that those before are complete
        write(folder / path_of(hour, 0), ([1], [1]), 1000 * hour)
    return rows, files


def job(folder, end=END, *, block=400, **data):
    source = {
        "name": "all",
        "files": {"format": "parquet", "path": f"{folder}/{{YYYY}}{{MM}}{{DD}}/{{HH}}/*.parquet"},
    }
    stream = {"name": "log", "window": "hour", "start": "2026-03-01", "end": end}
    return parse_job({
        "data": {
            "source": {"format": "streams", "streams": [{**stream, "sources": [source]}]},
            "negatives": {"per_positive": DRAWN, "columns": ["item"], "user": "user"},
            "shuffle": {"block_rows": block},
            **data,
        },
        "features": [{"columns": ["id", "user", "item"]}],
    })


def in_lanes(number):
    return Position(lanes=(LanePosition(),) * number)


def samples_of(batch):
    """Id, user, item and label of each sample."""
    columns = [batch.sparse[name].values.tolist() for name in ("id", "user", "item")]
    return list(zip(*columns, batch.labels.tolist(), strict=True))


def read(loader, most=None):
    """Samples of each batch and where it ends; and where all of them do."""
    with loader:
        found = [(samples_of(one), one.end) for one in islice(loader, most)]
        return found, loader.position


def by_hand(rows, files, lanes):
    """Windows by the ids of each lane that are drawn from together; and ids that are left out."""
    waits, blocks = [[] for _ in range(lanes)], []
    lane_of = {one: number % lanes for number, one in enumerate(sorted(files))}
    for hour in range(HOURS):
        block = []
        for lane in range(lanes):
            mine = [one for one in sorted(files) if one[0] == hour and lane_of[one] == lane]
            waits[lane] += [row for one in mine for row in files[one]]
            if mine and is_drawable([rows[one] for one in waits[lane]]):
                block.append(waits[lane])
                waits[lane] = []
        blocks.append(block)
    return [one for one in blocks if one], [one for of in waits for one in of]


def is_drawable(rows):
    items = {item for _, item in rows}
    of_user = [{item for one, item in rows if one == user} for user, _ in rows]
    return len(items) > 1 and all(of != items for of in of_user)


@pytest.mark.filterwarnings("ignore::penstock.errors.JobNote")
@pytest.mark.parametrize("lanes", [1, 3, 4])
@pytest.mark.parametrize("seed", range(12))
def test_rows_join_the_next_window_of_their_lane(tmp_path, seed, lanes):
    rows, files = make(tmp_path, seed)
    blocks, left_out = by_hand(rows, files, lanes)
    dataset = Dataset.open(job(tmp_path))
    batches, end = read(dataset.batches("train", start=in_lanes(lanes), **KWARGS))
    samples = [one for batch, _ in batches for one in batch]
    found = Counter(one for one, *_, label in samples if label)
    assert found == Counter(rows.keys() - set(left_out))
    assert end.counts == (len(rows), len(left_out), 0, len(rows) - len(left_out))
    for block in blocks:
        size = (1 + DRAWN) * sum(map(len, block))
        some, samples = samples[:size], samples[size:]
        assert {one for one, *_ in some} == {one for of in block for one in of}
        together = {one: of for of in block for one in of}
        for one, user, item, label in some:
            assert rows[one][0] == user
            of_user = {rows[other][1] for other in together[one] if rows[other][0] == user}
            others = {rows[other][1] for other in together[one]} - of_user
            assert item in ({rows[one][1]} if label else others)
    assert not samples


class Shown:
    """A folder in which the hours of another one appear, some each time that somebody waits."""

    def __init__(self, whole, folder, seed):
        self.whole, self.folder, self.hours = whole, folder, 0
        self._rng = np.random.default_rng(seed)

    def show(self, *_):
        left, some = int(self._rng.integers(1, 4)), False
        while self.hours < HOURS + 2 and (left > 0 or not some):
            name = path_of(self.hours, 0).rpartition("/")[0]
            if (self.whole / name).exists():
                shutil.copytree(self.whole / name, self.folder / name)
                some = True
            self.hours, left = self.hours + 1, left - 1

    def open(self, end="now", **kwargs):
        while True:
            try:
                dataset = Dataset.open(job(self.folder, end), **kwargs)
            except DataError as error:
                assert "no window is complete yet" in str(error)
                self.show()
                continue
            dataset.tell_of_waits(self.show)
            return dataset


@pytest.fixture
def logs(tmp_path):
    """By seed: the whole log, and one that appears."""

    def made(seed):
        folder = tmp_path / str(seed)
        make(folder / "whole", seed)
        (folder / "shown").mkdir()
        return Shown(folder / "whole", folder / "shown", seed)

    return made


def whole_of(shown, lanes, **changes):
    dataset = Dataset.open(job(shown.whole, **changes))
    return read(dataset.batches("train", start=in_lanes(lanes), **KWARGS))


@pytest.mark.filterwarnings("ignore::penstock.errors.JobNote")
def test_a_stream_that_grows_has_the_same_batches_from_any_position(logs):
    waited = left_out = 0
    for seed in range(6):
        lanes, rng = (1, 3, 4)[seed % 3], np.random.default_rng(seed)
        shown = logs(seed)
        whole, end = whole_of(shown, lanes)
        left_out += end.counts.filtered
        found, _ = read(shown.open().batches("train", start=in_lanes(lanes), **KWARGS), len(whole))
        assert [one for one, _ in found] == [one for one, _ in whole]
        waited += sum(some_wait(at) for _, at in found)
        assert len({at.span.first_file for _, at in found}) > 1
        for number in rng.choice(len(found), 3, replace=False):
            after = Position.from_dict(found[number][1].to_dict())
            assert Dataset.open(job(shown.folder, "now"), after=after).audit(after).is_right
            again = Dataset.open(job(shown.folder), after=after)
            rest, at = read(again.batches("train", start=after, **KWARGS))
            assert [one for one, _ in rest] == [one for one, _ in whole[number + 1 :]]
            assert at.counts == end.counts
            assert Dataset.open(job(shown.folder), after=at).audit(at).is_right
    assert waited > 8 < left_out, "what this test is about does happen"


def some_wait(at):
    """Whether rows of a lane were left when the span began, for others to draw negatives from."""
    return len({one.file for one in at.span.begins}) > 1


@pytest.mark.filterwarnings("ignore::penstock.errors.JobNote")
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_has_the_same_batches(logs, ranks):
    shown = logs(4)
    whole, end = whole_of(shown, 4)

    def of_rank(group):
        options = {"start": in_lanes(4), "ranks": group, **KWARGS}
        grown, _ = read(shown.open().batches("train", **options), len(whole))
        fixed, at = read(Dataset.open(job(shown.whole)).batches("train", **options))
        assert at == end
        return [one for one, _ in grown], [one for one, _ in fixed]

    for parts in zip(*World(ranks).run(of_rank), strict=True):
        joined = [sorted(sum(of_ranks, [])) for of_ranks in zip(*parts, strict=True)]
        assert joined == [sorted(one) for one, _ in whole]


class TestNothingToDrawFrom:
    """Rows at the end of the data, or all of them."""

    def log(self, folder, hours):
        for hour, rows in hours.items():
            write(folder / path_of(hour, 0), rows, 100 * hour)

    MANY = ([1, 2, 3, 4], [1, 2, 3, 4])
    ALIKE = ([1, 2], [7, 7])

    def test_they_are_counted_and_told_of(self, tmp_path):
        self.log(tmp_path, {0: self.MANY, 5: self.ALIKE, 6: ([3], [7])})
        dataset = Dataset.open(job(tmp_path))
        told = []
        dataset.tell_of_left_out(told.append)
        options = {"epochs": 2, **KWARGS}
        batches, end = read(dataset.batches("train", start=in_lanes(1), **options))
        assert end.counts == (14, 6, 0, 8)
        assert len(told) == 1 and told[0].startswith("3 rows at the end of the data are left out")
        for _, at in batches:
            again = Dataset.open(job(tmp_path), after=at)
            again.tell_of_left_out(told.append)
            assert again.audit(at).is_right
            _, there = read(again.batches("train", start=at, **options))
            assert there.counts == end.counts
        with pytest.warns(JobNote, match="3 rows at the end of the data are left out"):
            read(Dataset.open(job(tmp_path)).batches("train", **KWARGS))

    def test_a_log_without_a_negative_is_an_error(self, tmp_path):
        self.log(tmp_path, {0: self.ALIKE, 3: ([5], [7])})
        message = "no row is left to train on.*no others to draw negatives from"
        with pytest.raises(DataError, match=message):
            read(Dataset.open(job(tmp_path)).batches("train", **KWARGS))
        self.log(tmp_path, {HOURS: self.ALIKE})
        dataset = Dataset.open(job(tmp_path, "now"))
        with dataset.batches("train", **KWARGS) as loader:
            unread = tuple(FileTag(path, -1, "") for path in dataset._rows("train").files)
            start = replace(loader.position, files=unread)
        with pytest.raises(DataError, match=message):
            read(Dataset.open(job(tmp_path), after=start).batches("train", start=start, **KWARGS))

    def test_one_window_keeps_its_error(self, tmp_path):
        self.log(tmp_path, {0: self.ALIKE})
        source = {"format": "parquet", "path": f"{tmp_path}/*/*/*.parquet"}
        dataset = Dataset.open(job(tmp_path, source=source))
        with pytest.raises(DataError, match="all 2 rows have one value of 'item'"):
            read(dataset.batches("train", **KWARGS))

    def test_so_do_many_rows(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lane_queue, "_MANY_ROWS", 1)
        self.log(tmp_path, {0: ([1] * 20, [7] * 20), 1: self.MANY})
        with pytest.raises(DataError, match="all 10 rows have one value of 'item'"):
            read(Dataset.open(job(tmp_path, block=10)).batches("train", **KWARGS))

    def test_held_out_windows_go_the_same_way(self, tmp_path):
        self.log(tmp_path / "train", {0: self.MANY})
        self.log(tmp_path / "held", {0: self.ALIKE, 1: self.MANY, 2: self.ALIKE})
        read_job = job(tmp_path / "train")
        held = job(tmp_path / "held").data.source
        read_job = read_job.model_copy(
            update={"data": read_job.data.model_copy(update={"evaluation_source": held})}
        )
        dataset = Dataset.open(read_job)
        told = []
        dataset.tell_of_left_out(told.append)
        for _ in range(2):
            batches, end = read(dataset.batches("evaluation", batch_size=50))
            assert [len(one) for one, _ in batches] == [18]
            assert end.counts.filtered == 2 == end.counts.read - end.counts.applied
        assert len(told) == 1

    def test_rows_that_wait_over_very_many_files_are_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(spans, "_MOST_WAITING_FILES", 3)
        self.log(tmp_path, dict.fromkeys(range(HOURS), self.ALIKE))
        dataset = Dataset.open(job(tmp_path, "now"))
        with pytest.raises(DataError, match=r"00/0.parquet: rows wait since 5 files .* longer win"):
            read(dataset.batches("train", **KWARGS))


def test_a_span_of_before_begins_with_its_first_file():
    span = Span(3, (5,), (), 7, (Cursor(4, 0, 2), Cursor(3)))
    fields = span._asdict()
    assert Span.from_dict(fields) == span
    del fields["begins"]
    assert Span.from_dict(fields) == span._replace(begins=())


def test_an_end_behind_the_last_file_ends_the_run(tmp_path):
    write(tmp_path / path_of(0, 0), TestNothingToDrawFrom.MANY, 0)
    write(tmp_path / path_of(1, 0), TestNothingToDrawFrom.MANY, 100)
    loader = Dataset.open(job(tmp_path, "now")).batches("train", **KWARGS)
    ((_, at),), _ = read(loader, 1)
    (tmp_path / path_of(1, 0)).unlink()
    _, end = read(Dataset.open(job(tmp_path), after=at).batches("train", start=at, **KWARGS))
    assert end.counts.applied == 4


def test_rows_that_wait_may_begin_within_an_extent(tmp_path):
    """Those behind the last block of a window, which are alike."""
    many, few = np.arange(10).tolist(), np.arange(4).tolist()
    hours = [(many + [50] * 12, many + [7] * 12), ([1, 2], [7, 7]), (few, few), ([1], [1])]
    for hour, rows in enumerate(hours):
        write(tmp_path / "whole" / path_of(hour, 0), rows, 100 * hour)

    def show(*_):
        hour = len(list((tmp_path / "shown").rglob("*.parquet")))
        if hour < len(hours):
            name = path_of(hour, 0)
            (tmp_path / "shown" / name).parent.mkdir(parents=True)
            shutil.copy(tmp_path / "whole" / name, tmp_path / "shown" / name)

    end = f"{hour_of(3):%Y-%m-%dT%H}"
    dataset = Dataset.open(job(tmp_path / "whole", end, block=10))
    whole, at = read(dataset.batches("train", **KWARGS))
    assert at.counts == (28, 0, 0, 28)
    show()
    show()
    dataset = Dataset.open(job(tmp_path / "shown", "now", block=10))
    dataset.tell_of_waits(show)
    found, _ = read(dataset.batches("train", **KWARGS), len(whole))
    assert [one for one, _ in found] == [one for one, _ in whole]
    assert [at.span.begins for _, at in found] == [()] * 3 + [(Cursor(0, 0, 10),)] * 6
    for number, (_, at) in enumerate(found):
        again = Dataset.open(job(tmp_path / "shown", end, block=10), after=at)
        assert again.audit(at).is_right
        rest, _ = read(again.batches("train", start=at, **KWARGS))
        assert [one for one, _ in rest] == [one for one, _ in whole[number + 1 :]]

"""Lanes: the same batches on any number of ranks, from any position, whatever the lanes hold."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.config import parse_job
from penstock.data import Dataset
from penstock.data.batches import agreement
from penstock.data.batches.agreement import deal
from penstock.data.batches.lane_queue import Offer
from penstock.data.batches.loader_plan import LoaderPlan
from penstock.data.formats import columnar, lines
from penstock.data.plan.lanes import Lane, batches_of
from penstock.data.source import Extent
from penstock.errors import ConfigError, DataError, GroupError
from penstock.position import LanePosition, Position
from tests.world.ranks import World, in_world


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    in_world(monkeypatch)
    monkeypatch.setattr(columnar, "EXTENT_ROWS", 20)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 200)
    monkeypatch.setattr(lines, "READ_BYTES", 90)


def in_lanes(number):
    return Position(lanes=(LanePosition(),) * number)


def write(path, first, rows, *, malformed=()):
    ids = np.arange(first, first + rows)
    if path.suffix == ".parquet":
        columns = {"label": np.zeros(rows, np.int64), "id": ids, "weight": np.ones(rows)}
        pq.write_table(pa.table(columns), path, row_group_size=10)
        return
    text = [f"0,{one},{'x' if place in malformed else 1}" for place, one in enumerate(ids)]
    path.write_text("\n".join(["label,id,weight", *text, ""]))


def opened(tmp_path, block=30, *, quarantine=None, **data):
    ending = next(iter(tmp_path.iterdir())).suffix
    source = {"format": ending[1:], "path": str(tmp_path / "*")}
    if ending == ".csv":
        source |= {"types": {"id": "int64", "weight": "float64"}, "on_malformed_row": "quarantine"}
    fields = {
        "data": {
            "source": source,
            "label": {"column": "label"},
            "weight": "weight",
            "shuffle": {"block_rows": block},
            **data,
        },
        "features": [{"columns": ["id"]}],
    }
    return Dataset.open(parse_job(fields), quarantine=quarantine)


@pytest.fixture(params=["parquet", "csv"])
def files(request, tmp_path):
    """Of unlike sizes: lanes have more and less; one file is smaller than an extent."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number, rows in enumerate((95, 3, 61, 40)):
        malformed = (0, 7, 39) if number == 3 else ()
        write(folder / f"{number}.{request.param}", 1000 * number, rows, malformed=malformed)
    return folder


def ids_of(batch):
    return batch.sparse.values.tolist()


def batches_in(loader, most=None):
    found = []
    with loader:
        for batch in loader:
            found.append((ids_of(batch), batch.batch_size, batch.start, batch.end, batch.weights))
            if len(found) == most:
                break
        end = found[-1][3] if found and most else loader.position
    return found, Position.from_dict(end.to_dict())


def on_ranks(ranks, make, start, most=None, **options):
    """What each rank has of each batch, and the position that all of them came to."""

    def of_rank(group):
        loader = make().batches("train", start=start, ranks=group, **options)
        return batches_in(loader, most)

    ended = World(ranks).run(of_rank)
    ends = [end for _, end in ended]
    assert all(end == ends[0] for end in ends)
    return [found for found, _ in ended], ends[0]


def assert_same_batches(whole, parts, lanes):
    """A rank has of each batch what its lanes have, in the order of lanes."""
    assert {len(found) for found in parts} == {len(whole)}
    for number, (ids, size, start, end, weights) in enumerate(whole):
        of_ranks = [found[number] for found in parts]
        assert sum(one[1] for one in of_ranks) == size == len(ids)
        assert sorted(i for one in of_ranks for i in one[0]) == sorted(ids)
        assert all((one[2], one[3]) == (start, end) for one in of_ranks)
        assert all(one[4].dtype == weights.dtype for one in of_ranks)
        for one in of_ranks:
            places = [ids.index(i) for i in one[0]]
            assert places == sorted(places)


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("options", [{}, {"shuffle": False}])
def test_any_number_of_ranks_has_the_same_batches(files, lanes, options):
    kwargs = {"batch_size": 8, "seed": 5, "epochs": 2, **options}
    dataset = opened(files)
    whole, end = batches_in(dataset.batches("train", start=in_lanes(lanes), **kwargs))
    rows = 199 - 3 * any(files.glob("*.csv"))
    first = whole[: len(whole) // 2]
    assert len({one for ids, *_ in first for one in ids}) == rows
    assert [size for _, size, *_ in first] == [8] * (rows // 8) + [rows % 8]
    assert end.counts.applied == 2 * rows and end.samples == 2 * rows
    for ranks in {2, 3, lanes} & set(range(2, lanes + 1)):
        parts, of_ranks = on_ranks(ranks, lambda: opened(files), in_lanes(lanes), **kwargs)
        assert of_ranks == end
        assert_same_batches(whole, parts, lanes)


@pytest.mark.parametrize("most", [1, 4, 5, 13])
def test_other_ranks_go_on_from_any_position(files, most):
    kwargs = {"batch_size": 10, "seed": 1, "epochs": 2}
    whole, end = batches_in(opened(files).batches("train", start=in_lanes(5), **kwargs))
    parts, middle = on_ranks(3, lambda: opened(files), in_lanes(5), most, **kwargs)
    assert_same_batches(whole[:most], parts, 5)
    rest, there = batches_in(opened(files).batches("train", start=middle, **kwargs))
    assert [one[:2] for one in rest] == [one[:2] for one in whole[most:]]
    assert there == end
    parts, there = on_ranks(2, lambda: opened(files), middle, **kwargs)
    assert_same_batches(whole[most:], parts, 5)
    assert there == end


def test_a_block_is_finished_as_it_was_cut_by_batches_of_another_size(files):
    kwargs = {"seed": 1, "epochs": 1}
    make = opened(files, block=60).batches
    _, middle = batches_in(make("train", batch_size=10, start=in_lanes(3), **kwargs), 2)
    left = middle.block_size - middle.block_row
    rest, _ = batches_in(make("train", batch_size=7, start=middle, **kwargs))
    sizes = [one[1] for one in rest]
    first = sizes[: -(-left // 7)]
    assert sum(first) == left and set(first[:-1]) == {7}
    again, _ = batches_in(make("train", batch_size=10, start=middle, **kwargs))
    one, other = (sorted(sum((x[0] for x in found), [])) for found in (rest, again))
    assert one == other


def test_every_batch_has_of_all_lanes_while_they_have_rows(files):
    whole, _ = batches_in(
        opened(files, block=40).batches("train", batch_size=20, seed=2, start=in_lanes(2))
    )
    lane_of = {}
    dataset = opened(files)
    part = dataset._parts["train"]
    numbers = {path: n for n, path in enumerate(part.files)}
    for lane in range(2):
        for _, extent in Lane(lane, 2).extents(part.extents, numbers):
            for chunk in part.read(extent, ["id"]):
                lane_of |= dict.fromkeys(chunk.table.column("id").to_pylist(), lane)
    for ids, _, _, _, _ in whole[:4]:
        assert sum(lane_of[one] for one in ids) == 10
        assert [lane_of[one] for one in ids] == sorted(lane_of[one] for one in ids)


def test_each_lane_has_a_shuffling_of_its_own(tmp_path):
    for number in range(2):
        write(tmp_path / f"{number}.parquet", 1000 * number, 20)
    found, _ = batches_in(
        opened(tmp_path, block=40).batches("train", batch_size=40, seed=2, start=in_lanes(2))
    )
    ((ids, *_),) = found
    orders = [[one % 1000 for one in ids if one // 1000 == number] for number in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20))
    assert orders[0] != orders[1] != sorted(orders[1])


def test_malformed_rows_reach_every_quarantine_once(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(4):
        write(folder / f"{number}.csv", 1000 * number, 50, malformed=(3, 30 + number))
    alone = opened(folder, quarantine=tmp_path / "alone.jsonl")
    _, end = batches_in(alone.batches("train", batch_size=8, start=in_lanes(4)))
    assert end.counts.quarantined == 8

    def of_rank(group):
        path = tmp_path / f"{group.rank}.jsonl"
        dataset = opened(folder, quarantine=path)
        batches_in(dataset.batches("train", batch_size=8, start=in_lanes(4), ranks=group))
        return dataset.quarantined_rows

    assert World(2).run(of_rank) == [8, 8]
    expected = (tmp_path / "alone.jsonl").read_text()
    assert expected.count("\n") == 8
    assert (tmp_path / "0.jsonl").read_text() == (tmp_path / "1.jsonl").read_text() == expected


def test_an_error_on_one_rank_ends_all_at_the_same_batch(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(4):
        columns = {"label": np.zeros(60, np.int64), "id": np.arange(60) + 1000 * number}
        columns["label"][50] = 9 * (number == 2)
        table = pa.table({**columns, "weight": np.ones(60)})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=10)

    def of_rank(group):
        found = []
        with (
            pytest.raises((DataError, GroupError)) as raised,
            opened(folder).batches("train", batch_size=8, start=in_lanes(2), ranks=group) as loader,
        ):
            found.extend(ids_of(batch) for batch in loader)
        return len(found), str(raised.value)

    (before, one), (same, other) = World(2).run(of_rank)
    assert before == same > 0
    assert "2.parquet" in one
    assert "rank 0 stopped reading its part of the data" in other


def test_ranks_that_stop_early_leave_no_thread_behind(files):
    def of_rank(group):
        dataset = opened(files)
        with dataset.batches(
            "train", batch_size=4, start=in_lanes(4), epochs=9, ranks=group
        ) as loader:
            for number, _ in enumerate(loader):
                if number == 5:
                    break
        assert not loader._assembler.is_alive()
        return True

    assert World(3).run(of_rank) == [True, True, True]


def test_more_ranks_than_lanes_are_refused(files):
    with pytest.raises(ConfigError, match="2 ranks, but the data is divided into 1 lanes"):
        opened(files).batches("train", batch_size=4, ranks=World(2).run(lambda group: group)[0])


def test_the_lane_of_an_extent_depends_on_its_own_file_alone():
    def lanes(counts):
        extents = [
            Extent(f"f{n}", i, i + 1) for n, count in enumerate(counts) for i in range(count)
        ]
        files = {f"f{n}": n for n in range(len(counts))}
        found = {}
        for lane in range(4):
            for number, extent in Lane(lane, 4).extents(extents, files):
                assert extents[number] == extent
                assert found.setdefault((extent.path, extent.start), lane) == lane
        assert len(found) == len(extents)
        return found

    before, grown = lanes([3, 1, 9]), lanes([5, 1, 9, 2])
    assert before.items() <= grown.items()
    assert sorted(before.values()) == sorted([0, 1, 2, 1, *[(2 + i) % 4 for i in range(9)]])


@pytest.mark.parametrize("seed", range(30))
def test_batches_are_dealt_evenly_from_all_lanes(seed):
    rng = np.random.default_rng(seed)
    samples = rng.integers(0, 50, rng.integers(1, 9)).tolist()
    total, batch = sum(samples), int(rng.integers(1, 40))
    begin = int(rng.integers(0, total + 1))
    dealt = batches_of(samples, begin, batch)
    taken = np.stack([np.diff(cuts) for cuts in dealt], axis=1)
    assert (taken >= 0).all()
    assert [cuts[-1] for cuts in dealt] == samples
    assert taken.sum(1).tolist() == [min(batch, total - low) for low in range(begin, total, batch)]
    for lane, cuts in enumerate(dealt):
        even = (
            np.minimum(begin + np.arange(len(cuts)) * batch, total) * samples[lane] / max(total, 1)
        )
        assert (np.abs(cuts - even) <= len(samples)).all()


class Source:
    """Lanes of some rows, of which a few may be beyond the memory that is allowed."""

    def __init__(self, rows, row_bytes, per_row=1):
        self.rows, self.row_bytes = list(rows), row_bytes
        self.asked = 0

    def offers(self, wanted, most_bytes, window):
        self.asked += 1
        found = []
        for rows, want, size in zip(self.rows, wanted, self.row_bytes, strict=True):
            fit = max(min(want, most_bytes // size), 1 if rows else 0)
            fit = min(fit, want) if want else 0
            found.append(Offer(rows, True, False) if rows <= fit else Offer(fit, False, fit < want))
        return found


@pytest.mark.parametrize("seed", range(60))
def test_blocks_are_whole_batches_until_nothing_is_left(seed):
    rng = np.random.default_rng(seed)
    lanes = int(rng.integers(1, 9))
    batch = int(rng.integers(1, 12))
    block = int(rng.integers(1, 60))
    plan = LoaderPlan.of(batch, block, 0, 1, in_lanes(lanes), shuffled=True)
    plan = replace(plan, block_bytes=int(rng.integers(1, 400)) * lanes)
    rows = (rng.integers(0, 80, lanes) * (rng.random(lanes) < 0.8)).tolist()
    source = Source(rows, rng.integers(1, 30, lanes).tolist())
    while True:
        source.asked = 0
        dealt = deal(plan, source.offers, 0)
        assert source.asked <= 2 * (lanes + 1)
        assert all(0 <= n <= left for n, left in zip(dealt.rows, source.rows, strict=True))
        source.rows = [left - n for left, n in zip(source.rows, dealt.rows, strict=True)]
        assert dealt.is_last == [not left for left in source.rows] or not all(dealt.is_last)
        if all(dealt.is_last):
            break
        assert sum(dealt.rows) and sum(dealt.rows) % batch == 0
        assert sum(dealt.rows) <= plan.block_rows


class WindowedSource:
    """Lanes of rows that each are in a window of event time, ascending."""

    def __init__(self, rows):
        self.rows = [list(one) for one in rows]

    def offers(self, wanted, most_bytes, window):
        found = []
        for rows, want in zip(self.rows, wanted, strict=True):
            fit = min(want, max(most_bytes // 10, 1))
            inside = sum(one <= window for one in rows)
            # As a queue that knows no row behind `fit` but one.
            if inside > fit:
                found.append(Offer(fit, False, fit < want))
            elif inside < len(rows):
                found.append(Offer(inside, False, False, rows[inside]))
            else:
                found.append(Offer(inside, True, False))
        return found


def dealt_from(plan, rows):
    """The blocks of lanes of windowed rows: of each lane, those that it gives."""
    source, window, blocks = WindowedSource(rows), 0, []
    while True:
        dealt = deal(plan, source.offers, window)
        window = dealt.window
        blocks.append([of[:n] for of, n in zip(source.rows, dealt.rows, strict=True)])
        source.rows = [of[n:] for of, n in zip(source.rows, dealt.rows, strict=True)]
        if all(dealt.is_last):
            assert not any(source.rows)
            return blocks
        assert sum(dealt.rows)
        assert sum(dealt.rows) <= plan.block_rows


@pytest.mark.parametrize("seed", range(60))
def test_a_block_is_of_one_window_and_knows_nothing_of_later_ones(seed):
    rng = np.random.default_rng(seed)
    lanes, batch, block = (
        int(rng.integers(1, 9)),
        int(rng.integers(1, 12)),
        int(rng.integers(1, 60)),
    )
    plan = LoaderPlan.of(batch, block, 0, 1, in_lanes(lanes), shuffled=True)
    if seed % 3 == 0:
        plan = replace(plan, block_bytes=int(rng.integers(10, 600)) * lanes)
    rows = [
        sorted(
            rng.choice([0, 1, 2, 5, 9], int(rng.integers(0, 60)) * (rng.random() < 0.8)).tolist()
        )
        for _ in range(lanes)
    ]
    blocks = dealt_from(plan, rows)
    assert sum(len(of) for one in blocks for of in one) == sum(map(len, rows))
    windows = [{row for of in one for row in of} for one in blocks]
    assert all(len(one) == 1 for one in windows if one)
    in_order = [one.pop() for one in windows if one]
    assert in_order == sorted(in_order)
    sizes = [sum(map(len, one)) for one in blocks if any(one)]
    for size, window, after in zip(sizes, in_order, [*in_order[1:], None], strict=False):
        assert size % batch == 0 or window != after, "only a window's last block is short"
    for last in (0, 1, 5):
        until = dealt_from(plan, [[row for row in of if row <= last] for of in rows])
        assert [one for one in until if any(one)] == [
            one
            for one, window in zip([b for b in blocks if any(b)], in_order, strict=True)
            if window <= last
        ]


def test_nothing_is_taken_off_where_nothing_is_over():
    assert agreement.without([1, 0, 5], 0) == [1, 0, 5]

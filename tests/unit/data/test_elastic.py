"""Lanes that take extents as they come to them: each row once, and again in the order that was."""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.config import parse_job
from penstock.data import Dataset
from penstock.data.batches.in_turn import deal_again, deal_now
from penstock.data.batches.lane_queue import LaneQueue, Offer
from penstock.data.batches.loader_plan import LoaderPlan
from penstock.data.batches.turns import News, Turns
from penstock.data.formats import columnar, lines
from penstock.data.source import Extent
from penstock.errors import ConfigError, DataError
from penstock.ledger.file import LedgerFile
from penstock.position import Cursor, LanePosition, Position, Taken
from tests.world.ranks import World, in_world


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    in_world(monkeypatch)
    monkeypatch.setattr(columnar, "EXTENT_ROWS", 20)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 200)
    monkeypatch.setattr(lines, "READ_BYTES", 90)


def write(path, first, rows, *, malformed=()):
    ids = np.arange(first, first + rows)
    if path.suffix == ".parquet":
        pq.write_table(
            pa.table({"label": np.zeros(rows, np.int64), "id": ids, "w": np.ones(rows)}),
            path,
            row_group_size=10,
        )
        return
    text = [f"0,{one},{'x' if place in malformed else 1}" for place, one in enumerate(ids)]
    path.write_text("\n".join(["label,id,w", *text, ""]))


SIZES = (95, 0, 3, 61, 140, 40)
MALFORMED = {3: (0, 7, 39, 60), 5: tuple(range(40))}


@pytest.fixture(params=["parquet", "csv"])
def log(request, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    ids = []
    for number, rows in enumerate(SIZES):
        bad = MALFORMED.get(number, ()) if request.param == "csv" else ()
        write(folder / f"{number}.{request.param}", 1000 * number, rows, malformed=bad)
        ids += [1000 * number + one for one in range(rows) if one not in bad]
    return folder, ids


def job_of(folder, block=30, **data):
    ending = next(iter(sorted(folder.iterdir()))).suffix
    source = {"format": ending[1:], "path": str(folder / "*")}
    if ending == ".csv":
        source |= {"types": {"id": "int64", "w": "float64"}, "on_malformed_row": "quarantine"}
    return parse_job({
        "data": {
            "source": source,
            "label": {"column": "label"},
            "weight": "w",
            "shuffle": {"block_rows": block},
            "policy": "elastic",
            **data,
        },
        "features": [{"columns": ["id"]}],
    })


def opened(job, ledger=None, **options):
    dataset = Dataset.open(job, **options)
    if ledger is not None:
        dataset.keep_ledger(ledger)
    return dataset


def in_lanes(number):
    return Position(lanes=(LanePosition(),) * number)


def read(dataset, start, most=None, *, batch_size=8, epochs=2, ranks=None):
    """Ids of each batch, and the position behind them."""
    found, end = [], start
    with dataset.batches(
        "train", batch_size=batch_size, seed=5, epochs=epochs, start=start, ranks=ranks
    ) as loader:
        for batch in loader:
            found.append(batch.sparse.values.tolist())
            end = batch.end
            if len(found) == most:
                break
        else:
            end = loader.position
    return found, Position.from_dict(end.to_dict())


def flat(batches):
    return sorted(one for batch in batches for one in batch)


@pytest.mark.parametrize("lanes", [1, 3, 8])
@pytest.mark.parametrize("block", [0, 30, 1000])
def test_each_row_comes_once_an_epoch(log, lanes, block):
    folder, ids = log
    found, end = read(opened(job_of(folder, block)), in_lanes(lanes))
    assert flat(found) == sorted(ids * 2)
    assert flat(found[: len(found) // 2]) != flat(found[len(found) // 2 :]) or len(found) % 2 == 0
    assert end.counts.applied == 2 * len(ids)
    assert end.counts.read == 2 * sum(SIZES)
    assert end.counts.quarantined == 2 * (sum(SIZES) - len(ids))
    assert end.taken == ((len(SIZES), 0), ())
    # Only the last batch of an epoch is short.
    sizes = [len(batch) for batch in found]
    assert sizes[:-1].count(8) >= len(sizes) - 2


def test_with_its_ledger_a_run_has_the_same_batches_from_anywhere(log, tmp_path):
    folder, ids = log
    job, ledger = job_of(folder), tmp_path / "ledger.db"
    whole, end = read(opened(job, ledger), in_lanes(3))
    for most in range(1, len(whole), 5):
        first, position = read(opened(job, ledger), in_lanes(3), most)
        assert first == whole[:most]
        rest, again = read(opened(job, ledger, after=position), position)
        assert first + rest == whole
        assert again == end


def test_without_its_ledger_a_run_goes_on_with_what_is_left(log, tmp_path):
    folder, ids = log
    job = job_of(folder)
    whole, end = read(opened(job, tmp_path / "ledger.db"), in_lanes(3))
    for most in range(1, len(whole), 4):
        first, position = read(opened(job, tmp_path / "ledger.db"), in_lanes(3), most)
        rest, again = read(opened(job, tmp_path / f"{most}.db", after=position), position)
        assert flat(first + rest) == sorted(ids * 2)
        assert (again.counts, again.taken) == (end.counts, end.taken)
        # Cut off once more, with the ledger that knows only a part of it.
        some, position = read(opened(job, tmp_path / f"{most}.db", after=position), position, 3)
        rest, again = read(opened(job, tmp_path / f"{most}.db", after=position), position)
        assert flat(first + some + rest) == sorted(ids * 2)


def test_with_the_ledger_of_a_part_an_earlier_position_loses_nothing(log, tmp_path):
    """It lacks what was read before it was made, of which an earlier position has some left."""
    folder, ids = log
    job = job_of(folder)
    early, at_early = read(opened(job), in_lanes(3), 3)
    more, at_late = read(opened(job, after=at_early), at_early, 4)
    read(opened(job, tmp_path / "late.db", after=at_late), at_late, 5)
    rest, _ = read(opened(job, tmp_path / "late.db", after=at_early), at_early)
    assert flat(early + rest) == sorted(ids * 2)


def test_with_a_ledger_that_was_begun_anew_an_earlier_position_goes_on(log, tmp_path):
    """Its blocks were dealt after others than those that come now."""
    folder, ids = log
    job, ledger = job_of(folder), tmp_path / "ledger.db"
    early, at_early = read(opened(job), in_lanes(3), 3)
    _, at_late = read(opened(job, after=at_early), at_early, 4)
    read(opened(job, ledger, after=at_late), at_late)
    rest, _ = read(opened(job, ledger, after=at_early), at_early)
    assert flat(early + rest) == sorted(ids * 2)
    assert read(opened(job, ledger, after=at_early), at_early)[0] == rest


def test_another_size_of_batches_counts_from_the_next_block_on(log, tmp_path):
    folder, ids = log
    ledger = tmp_path / "ledger.db"
    whole, _ = read(opened(job_of(folder), ledger), in_lanes(3))
    first, position = read(opened(job_of(folder), ledger), in_lanes(3), 5)
    job = job_of(folder, block=60)
    rest, _ = read(opened(job, ledger, after=position), position, batch_size=20)
    assert flat(first + rest) == sorted(ids * 2)
    assert sum(len(batch) == 20 for batch in rest) > 0.7 * len(rest)


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_batch_that_memory_has_no_room_for_comes_all_the_same(log, lanes):
    folder, ids = log
    job = job_of(folder, shuffle={"block_rows": 64, "block_bytes": 200})
    found, _ = read(opened(job), in_lanes(lanes), batch_size=32, epochs=1)
    assert flat(found) == sorted(ids)
    assert {len(batch) for batch in found[:-1]} == {32}


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_read_each_row_once_and_one_rank_reads_it_again_so(log, tmp_path, ranks):
    folder, ids = log
    job, ledger = job_of(folder), tmp_path / "ledger.db"

    def of_rank(group):
        return read(opened(job, ledger), in_lanes(4), ranks=group)

    ended = World(ranks).run(of_rank)
    assert len({len(found) for found, _ in ended}) == 1
    together = [
        sorted(sum(parts, [])) for parts in zip(*(found for found, _ in ended), strict=True)
    ]
    assert flat(together) == sorted(ids * 2)
    assert all(end == ended[0][1] for _, end in ended)
    again, end = read(opened(job, ledger), in_lanes(4))
    assert [sorted(batch) for batch in again] == together
    assert end == ended[0][1]


def slow_down(monkeypatch, lanes, delay_s):
    """Readers of some lanes wait before each chunk."""
    real = columnar.GroupedFiles.read

    def read_slowly(self, extent, columns):
        lane = int(threading.current_thread().name.split("-")[2])
        for chunk in real(self, extent, columns):
            time.sleep(delay_s if lane in lanes else 0)
            yield chunk

    monkeypatch.setattr(columnar.GroupedFiles, "read", read_slowly)


def test_a_slow_lane_has_fewer_rows_and_the_order_is_kept(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "0.parquet", 0, 2000)
    job, ledger = job_of(folder, block=80), tmp_path / "ledger.db"
    slow_down(monkeypatch, {1}, 0.05)
    whole, _ = read(opened(job, ledger), in_lanes(4), epochs=1)
    assert flat(whole) == list(range(2000))
    kept = LedgerFile(ledger)
    shares = [len(kept.history(0, lane)) for lane in range(4)]
    kept.close()
    assert sum(shares) == 100
    assert shares[1] < 15 < min(shares[0], shares[2], shares[3])
    slow_down(monkeypatch, {0}, 0.001)
    again, _ = read(opened(job, ledger), in_lanes(4), epochs=1)
    assert again == whole


def test_a_replay_follows_the_run_that_it_names(log, tmp_path):
    folder, _ = log
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    whole, end = read(opened(job_of(folder), tmp_path / "old/ledger.db"), in_lanes(3))
    job = job_of(folder, replay=str(tmp_path / "old"))
    again, other = read(opened(job, tmp_path / "new/ledger.db"), in_lanes(3))
    assert again == whole and other == end
    with pytest.raises(DataError, match="no ledger; runs with `data.policy: elastic`"):
        job = job_of(folder, replay=str(tmp_path / "none"))
        opened(job, tmp_path / "third.db").batches("train", batch_size=8)


@pytest.mark.parametrize(
    ("lanes", "batch_size", "block", "words"),
    [
        (2, 8, 30, "of 32 rows, in batches of 8, of 3 lanes; this run has 32, 8 and 2; set data"),
        (3, 16, 30, "of 3 lanes; this run has 32, 16 and 3; set data.shuffle.block_rows"),
        (3, 8, 60, "this run has 64, 8 and 3; "),
    ],
)
def test_a_replay_in_other_batches_is_refused(log, tmp_path, lanes, batch_size, block, words):
    folder, _ = log
    (tmp_path / "old").mkdir()
    read(opened(job_of(folder), tmp_path / "old/ledger.db"), in_lanes(3), 3)
    job = job_of(folder, block, replay=str(tmp_path / "old"))
    with pytest.raises(DataError, match=words):
        read(opened(job, tmp_path / "ledger.db"), in_lanes(lanes), batch_size=batch_size)
    assert not (tmp_path / "ledger.db").exists()


def test_a_run_whose_ledger_lacks_the_beginning_is_not_replayed(log, tmp_path):
    folder, _ = log
    (tmp_path / "old").mkdir()
    LedgerFile(tmp_path / "old/ledger.db").close()
    job = job_of(folder, replay=str(tmp_path / "old"))
    with pytest.raises(DataError, match=r"ledger.db: no block, so that .* remove data.replay"):
        read(opened(job, tmp_path / "ledger.db"), in_lanes(3))
    _, position = read(opened(job_of(folder)), in_lanes(3), 10)
    read(opened(job_of(folder), tmp_path / "old/ledger.db", after=position), position, 10)
    with pytest.raises(DataError, match="no block before number [1-9] of epoch 0"):
        read(opened(job, tmp_path / "ledger.db"), in_lanes(3))


def test_a_replay_that_goes_on_keeps_its_own_ledger(log, tmp_path):
    folder, _ = log
    (tmp_path / "old").mkdir()
    read(opened(job_of(folder), tmp_path / "old/ledger.db"), in_lanes(3), 8)
    job, ledger = job_of(folder, replay=str(tmp_path / "old")), tmp_path / "ledger.db"
    whole, _ = read(opened(job, ledger), in_lanes(3))
    (tmp_path / "old/ledger.db").unlink()
    first, position = read(opened(job, ledger), in_lanes(3), 15)
    rest, _ = read(opened(job, ledger, after=position), position)
    assert first + rest == whole


def test_a_ledger_of_other_data_is_refused_by_its_block(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "0.parquet", 0, 100)
    job, ledger = job_of(folder), tmp_path / "ledger.db"
    read(opened(job, ledger), in_lanes(2), epochs=1)
    write(folder / "0.parquet", 0, 70)
    with pytest.raises(DataError, match=r"ledger: block \d of epoch 0 had \d+ rows of lane \d"):
        read(opened(job, ledger), in_lanes(2), epochs=1)


def test_the_audit_counts_what_lanes_took(log, tmp_path):
    folder, _ = log
    job, ledger = job_of(folder), tmp_path / "ledger.db"
    whole, _ = read(opened(job, ledger), in_lanes(3))
    for most in range(1, len(whole), 3):
        _, position = read(opened(job, ledger), in_lanes(3), most)
        found = opened(job, after=position).audit(position)
        assert found.is_right, (most, found)
        if position.taken.beyond or position.taken.before > (0, 11):
            wrong = replace(position, taken=Taken())
            assert not opened(job, after=position).audit(wrong).is_right


def test_a_file_that_a_lane_had_read_to_its_end_may_not_grow(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "0.csv", 0, 50)
    job = job_of(folder)
    _, position = read(opened(job), in_lanes(2), epochs=1)
    with (folder / "0.csv").open("a") as file:
        file.write("0,7777,1\n")
    with pytest.raises(DataError, match=r"0\.csv: .*"):
        opened(job, after=position)
    # Files that come behind are read.
    write(folder / "0.csv", 0, 50)
    write(folder / "1.csv", 500, 9)
    more, _ = read(opened(job, after=position), position, epochs=1)
    assert flat(more) == list(range(500, 509))


def test_a_batch_is_given_after_its_block_was_written_down(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "0.parquet", 0, 800)
    job, ledger = job_of(folder, block=400), LedgerFile(None)
    dataset = opened(job)
    dataset._opened_ledger = lambda plan, ranks: ledger
    written = []
    ledger.add_block = lambda *block: written.append(block[:2])
    with dataset.batches("train", batch_size=8, start=in_lanes(2)) as loader:
        for batch in loader:
            assert (batch.start.epoch, batch.start.block) in written
    assert written == [(0, 0), (0, 1)]


def test_files_that_come_behind_are_read_where_the_last_block_was_full(tmp_path, monkeypatch):
    """The other lane learns later that nothing is left for it; that is no block."""
    folder, ledger = tmp_path / "data", tmp_path / "ledger.db"
    folder.mkdir()
    write(folder / "0.parquet", 0, 64)
    real = LedgerFile.take

    def take_late(self, epoch, lane, turn, upcoming):
        time.sleep(0.2 * lane)
        return real(self, epoch, lane, turn, upcoming)

    monkeypatch.setattr(LedgerFile, "take", take_late)
    job = job_of(folder, block=32)
    first, position = read(opened(job, ledger), in_lanes(2), epochs=1)
    write(folder / "1.parquet", 100, 40)
    rest, end = read(opened(job, ledger, after=position), position, epochs=1)
    assert flat(first) == list(range(64)) and flat(rest) == list(range(100, 140))
    assert end.taken == ((2, 0), ())


EXTENTS = [Extent(f"{number // 10}", 10 * (number % 10), 10) for number in range(60)]
NUMBERS = {f"{number}": number for number in range(6)}


def test_a_lane_passes_by_what_others_have_taken_however_much_it_is():
    ledger = LedgerFile(None)
    places = [(NUMBERS[one.path], one.start) for one in EXTENTS]
    for turn in range(50):
        ledger.take(0, 1, turn, places[:55])
    turns = Turns(ledger, News(), in_lanes(2))
    assert list(turns.of_lane(0, 0, EXTENTS, NUMBERS)) == list(range(50, 60))


def test_a_lane_reads_what_it_had_taken_in_the_order_in_which_it_did():
    ledger = LedgerFile(None)
    for turn, place in enumerate([(3, 0), (1, 20), (5, 90), (0, 0), (2, 0), (1, 30)]):
        ledger.take(0, 0, turn, [place])
    ledger.take(1, 0, 0, [(4, 0)])
    lanes = (LanePosition(cursor=Cursor(1, 30, 2)), LanePosition(cursor=Cursor(0, 70, 4)))
    start = Position(lanes=lanes, taken=Taken((0, 10), ((2, 0),)))
    turns = Turns(ledger, News(), start)
    again = turns.of_lane(0, 0, EXTENTS, NUMBERS)
    # (0, 0) and (2, 0) were read to their end; (1, 30) is at hand, as is (0, 70), another lane's.
    assert [next(again) for _ in range(9)] == [30, 12, 59, 1, 2, 3, 4, 5, 6]
    assert next(again) == 8
    assert next(turns.of_lane(0, 1, EXTENTS, NUMBERS)) == 40


@pytest.mark.parametrize(("most_rows", "most_bytes", "reads"), [(10, 1000, 4), (100, 250, 9)])
def test_a_lane_reads_on_until_rows_or_memory_suffice(most_rows, most_bytes, reads):
    asked = []

    def take_now():
        asked.append(1)
        return SimpleNamespace(size=3, memory=30, passage=SimpleNamespace(window=0))

    queue = LaneQueue(0, SimpleNamespace(take_now=take_now), plan_of(80, 8, 2))
    queue.begin_epoch()
    for _ in range(2):
        offer = queue.offer_now(most_rows, most_bytes, 0)
        assert offer == (3 * reads - 1, False, True, None)
        assert len(asked) == reads


def test_windows_come_one_after_the_other(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for hour, rows in enumerate((40, 3, 77, 12)):
        write(folder / f"2026-03-01-{hour:02}.parquet", 1000 * hour, rows)
    stream = {
        "name": "clicks",
        "window": "hour",
        "start": "2026-03-01T00:00:00Z",
        "end": "2026-03-01T04:00:00Z",
        "sources": [
            {
                "name": "log",
                "files": {
                    "format": "parquet",
                    "path": str(folder / "{YYYY}-{MM}-{DD}-{HH}.parquet"),
                },
            }
        ],
    }
    job = job_of(folder, source={"format": "streams", "streams": [stream]})
    whole, _ = read(opened(job), in_lanes(3), epochs=1)
    hours = [[one // 1000 for one in batch] for batch in whole]
    assert all(len(set(batch)) == 1 for batch in hours)
    assert [batch[0] for batch in hours] == sorted(batch[0] for batch in hours)
    assert len(flat(whole)) == 132


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"label": None, "negatives": {"columns": ["id"], "per_positive": 1}}, "policy: ordered"),
        ({"policy": "ordered", "replay": "run"}, "`replay` is for policy elastic"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, fields, words):
    write(tmp_path / "0.parquet", 0, 5)
    with pytest.raises(ConfigError, match=words):
        job_of(tmp_path, **fields)


def plan_of(block, batch, lanes):
    return LoaderPlan.of(batch, block, 0, 1, in_lanes(lanes), shuffled=True)


def test_a_block_is_dealt_when_lanes_have_it_together():
    asked = iter([[0, 0, 0], [5, 0, 1], [9, 0, 2], [30, 0, 2]])

    def offers(wanted, most_bytes, window):
        return [Offer(rows, False, False) for rows in next(asked)]

    found = deal_now(plan_of(24, 8, 3), offers, 0, News())
    assert sum(found.rows) == 24 and found.rows[1] == 0 and 0 < found.rows[2] <= 2
    assert next(asked, None) is None and not any(found.is_last)


def test_for_want_of_memory_a_block_is_smaller_but_whole_batches():
    def offers(wanted, most_bytes, window):
        return [Offer(13, False, True), Offer(0, True, False), Offer(6, False, True)]

    found = deal_now(plan_of(80, 8, 3), offers, 0, News())
    assert sum(found.rows) == 16 and found.is_last == [False, True, False]


def test_a_batch_that_does_not_fit_into_the_memory_is_dealt_all_the_same():
    asked = []

    def offers(wanted, most_bytes, window):
        asked.append((wanted, most_bytes))
        return [Offer(5 * len(asked), False, True), Offer(1, False, True)]

    plan = replace(plan_of(80, 16, 2), block_bytes=100)
    found = deal_now(plan, offers, 0, News())
    assert sum(found.rows) == 16
    assert asked == [([80, 80], 50), ([16, 16], 2**63 - 1), ([16, 16], 2**63 - 1)]


def test_less_than_a_batch_is_dealt_at_the_end_of_a_window_alone():
    asked = iter([
        [Offer(3, False, True), Offer(2, False, True)],
        [Offer(3, False, False, 4), Offer(2, False, False, 7)],
    ])
    found = deal_now(plan_of(80, 8, 2), lambda *_: next(asked), 2, News())
    assert found == ([3, 2], [False, False], 2)


def test_the_window_moves_on_when_no_lane_has_more_of_it():
    windows = []

    def offers(wanted, most_bytes, window):
        windows.append(window)
        if window < 4:
            return [Offer(0, False, False, 4), Offer(0, False, False, 7)]
        return [Offer(9, False, False), Offer(0, False, False, 7)]

    assert deal_now(plan_of(8, 8, 2), offers, 2, News()) == ([8, 0], [False, False], 4)
    assert windows == [2, 4]


def test_a_block_of_before_asks_for_its_rows():
    def offers(wanted, most_bytes, window):
        return [Offer(rows, lane == 1, False) for lane, rows in enumerate(wanted)]

    assert deal_again([5, 3], offers, 6, (0, 1), lanes=2) == ([5, 3], [False, True], 6)
    with pytest.raises(
        DataError, match="block 1 of epoch 0 had 5 rows of lane 0, which has only 4"
    ):
        deal_again(
            [5, 3], lambda *_: [Offer(4, True, False), Offer(3, False, False)], 6, (0, 1), lanes=2
        )


def test_where_a_stage_has_ended_a_block_of_before_may_be_of_the_next_one():
    def offers(wanted, most_bytes, window):
        return [Offer(0, True, False), Offer(0, True, False)]

    found = deal_again([5, 3], offers, 6, (0, 1), lanes=2, may_be_later=True)
    assert found == ([0, 0], [True, True], 6)
    with pytest.raises(DataError, match="only 0 left"):
        deal_again([5, 3], offers, 6, (0, 1), lanes=2)
    with pytest.raises(DataError, match="only 0 left"):
        some = [Offer(5, True, False), Offer(0, True, False)]
        deal_again([5, 3], lambda *_: some, 6, (0, 1), lanes=2, may_be_later=True)


def test_a_block_of_other_lanes_is_refused():
    with pytest.raises(DataError, match="rows of 2 lanes, and the run has 3"):
        deal_again([5, 3], None, 6, (0, 1), lanes=3)

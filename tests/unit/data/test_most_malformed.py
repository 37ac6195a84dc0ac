"""A run that leaves out too many rows stops before the batch by which they are too many."""

import pytest

from penstock.config import parse_job
from penstock.data import Dataset
from penstock.data.formats import lines
from penstock.errors import ConfigError, TooManyMalformedError
from penstock.position import LanePosition, Position
from tests.world.ranks import World, in_world


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    in_world(monkeypatch)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 400)
    monkeypatch.setattr(lines, "READ_BYTES", 90)


def opened(folder, bad, rows, limit, *, epochs=1):
    """Rows of which some are malformed; the batches that come, and where it stopped."""
    path = folder / "log.csv"
    text = [f"0,{one}" if one not in bad else "0,x" for one in range(rows)]
    path.write_text("\n".join(["label,id", *text, ""]))
    source = {"format": "csv", "path": str(path), "types": {"id": "int64"}}
    return Dataset.open(
        parse_job({
            "data": {
                "source": {**source, "on_malformed_row": "quarantine"},
                "label": {"column": "label"},
                "shuffle": {"block_rows": 20},
                "most_malformed": limit,
            },
            "features": [{"columns": ["id"]}],
        }),
        quarantine=folder / "quarantine.jsonl",
    )


def read(dataset, lanes=1, start=None, ranks=None, epochs=1):
    start = start or Position(lanes=(LanePosition(),) * lanes)
    found, error = [], None
    options = {"batch_size": 10, "start": start, "ranks": ranks, "epochs": epochs}
    with dataset.batches("train", **options) as loader:
        try:
            for batch in loader:
                found.append(batch)
        except TooManyMalformedError as raised:
            error = raised
        return found, error, loader.position


def test_as_many_as_are_allowed_are_left_out(tmp_path):
    found, error, position = read(opened(tmp_path, {5, 77, 90}, 100, {"rows": 3}))
    assert error is None and position.counts.quarantined == 3
    assert sum(batch.batch_size for batch in found) == 97


@pytest.mark.parametrize("lanes", [1, 3])
def test_one_more_stops_it_before_its_batch_and_a_higher_limit_goes_on(tmp_path, lanes):
    bad = {5, 77, 90}
    found, error, position = read(opened(tmp_path, bad, 100, {"rows": 2}), lanes)
    assert "3 of " in str(error) and "data.most_malformed.rows is 2" in str(error)
    assert "log.csv:" in str(error) and "--resume" in str(error)
    assert error.is_known_to_all
    assert position.counts.quarantined <= 2 and position == found[-1].end
    again, error, same = read(opened(tmp_path, bad, 100, {"rows": 2}), start=position)
    assert not again and error is not None and same == position
    rest, error, end = read(opened(tmp_path, bad, 100, {"rows": 3}), start=position)
    assert error is None and end.counts == (100, 0, 3, 97)
    ids = [one for batch in found + rest for one in batch.sparse.values.tolist()]
    assert sorted(ids) == sorted(set(range(100)) - bad)


def test_none_at_all_may_be_malformed(tmp_path):
    found, error, position = read(opened(tmp_path, {0}, 100, {"rows": 0}))
    assert not found and "1 of " in str(error) and position.counts.read == 0


def test_a_share_counts_from_a_thousand_rows_on(tmp_path):
    bad = set(range(100)) | {1500, 1600}
    found, error, position = read(opened(tmp_path, bad, 3000, {"share": 0.05}))
    assert "data.most_malformed.share is 0.05" in str(error)
    assert 980 <= position.counts.read < 1000
    found, error, position = read(opened(tmp_path, bad, 3000, {"share": 0.11}))
    assert error is None and position.counts.quarantined == 102


def test_rows_are_counted_in_all_epochs(tmp_path):
    dataset = opened(tmp_path, {3, 50}, 100, {"rows": 3})
    _, error, position = read(dataset, epochs=2)
    assert position.epoch == 1 and error is not None


def test_all_ranks_stop_before_the_same_batch(tmp_path):
    def of_rank(group):
        found, error, position = read(
            opened(tmp_path, {5, 77, 90}, 100, {"rows": 2}), 4, ranks=group
        )
        return len(found), str(error), position

    first, second = World(2).run(of_rank)
    assert first == second and "3 of" in first[1]


@pytest.mark.parametrize("limit", [{}, {"rows": -1}, {"share": 0}, {"share": 1.0}])
def test_a_limit_that_says_nothing_is_refused(tmp_path, limit):
    with pytest.raises(ConfigError, match="most_malformed"):
        opened(tmp_path, set(), 5, limit)

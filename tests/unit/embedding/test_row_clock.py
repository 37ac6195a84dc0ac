"""The time by which rows age: event times that are wrong, late, sparse, or begin anew."""

import copy
import hashlib
import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from penstock import run
from penstock.config import SGD, Eviction, FeatureConfig, TableConfig, parse_job
from penstock.embedding import EmbeddingCollection
from penstock.embedding.collection.row_clock import CONFIRMATIONS, MAX_JUMP_S, RowClock
from penstock.embedding.retention import NUMBERS
from penstock.types import Jagged, KeyedJagged

DAY = 86_400
BEGIN = 1_700_000_000
YEAR_2100 = 4_102_444_800


def ms(*seconds):
    return torch.tensor(seconds, dtype=torch.int64) * 1000


def follow(clock, times_s, size=5):
    """One batch at each time; the clock after each."""
    seen = []
    for time_s in times_s:
        clock.observe(ms(*range(time_s - size // 2, time_s + size - size // 2)))
        seen.append(clock.now_s)
    return seen


def test_the_time_of_a_batch_is_its_median():
    clock = RowClock()
    clock.observe(ms(BEGIN + 50, BEGIN, BEGIN + 10))
    assert clock.now_s == BEGIN + 10
    clock.observe(ms(BEGIN + 13, BEGIN + 11, BEGIN + 12, BEGIN + 14))
    assert clock.now_s == BEGIN + 12  # the lower one of two
    clock.observe(torch.tensor([], dtype=torch.int64))
    assert clock.now_s == BEGIN + 12
    assert clock.rows_ahead == 0


def test_rows_ahead_are_those_beyond_a_jump_from_where_the_clock_is_then():
    clock = RowClock()
    clock.observe(ms(BEGIN, BEGIN + 5, BEGIN + 5 + DAY, BEGIN + 6 + DAY, BEGIN - DAY))
    assert clock.now_s == BEGIN + 5
    assert clock.rows_ahead == 1


@pytest.mark.parametrize("wrong", [YEAR_2100, 2**40, 2**53, -(2**53), 0])
@pytest.mark.parametrize("at", [0, 1, 20])
def test_a_wrong_time_stamp_moves_nothing(wrong, at):
    clock, without = RowClock(), RowClock()
    for number in range(40):
        times = BEGIN + 60 * number + torch.arange(9)
        without.observe(times * 1000)
        if number == at:
            times[8 if wrong > BEGIN else 0] = wrong
        clock.observe(times * 1000)
        assert clock.now_s == without.now_s
    assert clock.rows_ahead == (1 if wrong > BEGIN else 0)


def test_late_events_do_not_turn_time_back():
    assert follow(RowClock(), [BEGIN, BEGIN - 5000, BEGIN + 1]) == [BEGIN, BEGIN, BEGIN + 1]


def test_a_batch_moves_the_clock_by_a_jump_at_most():
    assert follow(RowClock(), [BEGIN, BEGIN + DAY]) == [BEGIN, BEGIN + DAY]
    assert follow(RowClock(), [BEGIN, BEGIN + DAY + 1]) == [BEGIN, BEGIN]
    assert follow(RowClock(max_jump_s=10), [BEGIN, BEGIN + 11, BEGIN + 10]) == [
        BEGIN,
        BEGIN,
        BEGIN + 10,
    ]


def test_a_gap_is_passed_once_all_of_the_last_batches_have_passed_it():
    clock = RowClock()
    follow(clock, [BEGIN + n for n in range(20)])
    after = BEGIN + 7 * DAY
    seen = follow(clock, [after + n for n in range(CONFIRMATIONS + 3)])
    assert seen[: CONFIRMATIONS - 1] == [BEGIN + 19] * (CONFIRMATIONS - 1)
    # The oldest of them at first; from there on as ever.
    assert seen[CONFIRMATIONS - 1 :] == [after, *(after + CONFIRMATIONS + n for n in range(3))]
    assert clock.rows_ahead == 5 * (CONFIRMATIONS - 1)


def test_a_stretch_of_wrong_times_that_is_shorter_changes_nothing():
    clock = RowClock()
    follow(clock, [BEGIN + n for n in range(20)])
    for _ in range(10):
        seen = follow(clock, [YEAR_2100 + n for n in range(CONFIRMATIONS - 1)] + [BEGIN + 20])
        assert set(seen) <= {BEGIN + 19, BEGIN + 20}


def test_sparse_data_is_followed_a_few_batches_behind():
    times = [BEGIN + 30 * DAY * n for n in range(40)]
    seen = follow(RowClock(), times)
    assert seen[CONFIRMATIONS - 1 :] == times[: -(CONFIRMATIONS - 1)]


def test_it_goes_on_where_it_was():
    rng = np.random.default_rng(0)
    times = (BEGIN + np.cumsum(rng.integers(-20_000, 120_000, 80))).tolist()
    clock = RowClock()
    follow(clock, times[:37])
    twin = RowClock()
    twin.set_state(json.loads(json.dumps(clock.state())))
    assert follow(twin, times[37:]) == follow(clock, times[37:])
    assert twin == clock


def collection(**options):
    table = TableConfig(
        name="t", dim=1, optimizer=SGD(), eviction=Eviction(ttl=3600, unit="seconds")
    )
    return EmbeddingCollection(
        [table], [FeatureConfig(name="f", table="t")], num_threads=1, **options
    )


def train(embeddings, keys, times):
    embeddings.observe_times(times)
    sparse = KeyedJagged.pack({"f": Jagged.from_dense(torch.tensor(keys))})
    embeddings(sparse).sum().backward()
    embeddings.apply_gradients()


def held(embeddings):
    return {key for rows in embeddings.export_table("t") for key in rows.keys.tolist()}


def test_one_row_of_the_year_2100_leaves_every_row_where_it_is():
    embeddings = collection()
    for step in range(50):
        seconds = [BEGIN + 60 * step + n for n in range(8)]
        if step == 10:
            seconds[3] = YEAR_2100
        train(embeddings, list(range(step, step + 8)), ms(*seconds))
    # And rows still expire: 3,600 s are 60 steps.
    assert held(embeddings) == set(range(57))
    for step in range(50, 80):
        train(embeddings, [1000] * 8, ms(*(BEGIN + 60 * step + n for n in range(8))))
    assert 0 not in held(embeddings) and {56, 1000} <= held(embeddings)
    assert embeddings.row_clock.rows_ahead == 1


def test_events_before_1970_and_none_at_all():
    embeddings = collection()
    train(embeddings, [1, 2], ms(-(10**6), -5))
    assert embeddings.retention_state("t").numbers["now"] == 0
    without = collection()
    sparse = KeyedJagged.pack({"f": Jagged.from_dense(torch.tensor([1]))})
    without(sparse).sum().backward()  # by the machine's clock
    assert without.retention_state("t").numbers["now"] > BEGIN


@pytest.mark.parametrize("way", ["files", "state_dict", "pickle", "copy"])
def test_copies_of_a_collection_go_on_with_its_clock(tmp_path, way):
    embeddings = collection()
    embeddings.row_clock.max_jump_s = 100
    for step in range(5):
        train(embeddings, [step], ms(BEGIN + 200 * step))
    if way == "files":
        twin = collection()
        embeddings.save_tables(tmp_path / "tables")
        twin.row_clock.max_jump_s = 100
        twin.load_tables(tmp_path / "tables")
    elif way == "state_dict":
        twin = collection()
        twin.row_clock.max_jump_s = 100
        twin.load_state_dict(embeddings.state_dict())
    else:
        twin = (
            pickle.loads(pickle.dumps(embeddings)) if way == "pickle" else copy.deepcopy(embeddings)
        )
    assert twin.row_clock == embeddings.row_clock
    assert twin.row_clock is not embeddings.row_clock
    for step in range(5, 20):
        for one in (embeddings, twin):
            train(one, [step], ms(BEGIN + 200 * step))
    assert held(twin) == held(embeddings)
    assert twin.retention_state("t").numbers == embeddings.retention_state("t").numbers


def test_files_without_a_clock_begin_with_the_latest_time_of_their_tables(tmp_path):
    embeddings = collection()
    train(embeddings, [1], ms(BEGIN))
    embeddings.save_tables(tmp_path / "tables")
    manifest = tmp_path / "tables" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["row_clock"]
    manifest.write_text(json.dumps(content))
    digest = hashlib.blake2b(manifest.read_bytes(), digest_size=32).hexdigest()
    (tmp_path / "tables" / "manifest.b2sum").write_text(f"{digest}  manifest.json\n")
    twin = collection()
    twin.load_tables(tmp_path / "tables")
    # So that the first batch moves it by a jump at most.
    assert twin.row_clock == RowClock(MAX_JUMP_S, BEGIN)


BATCH = 16


def job_of(path):
    table = {"dim": 2, "eviction": {"ttl": 16 * 60, "unit": "seconds"}}
    return parse_job({
        "data": {
            "source": {"format": "parquet", "path": str(path)},
            "label": {"column": "click"},
            "event_time": "time",
            "event_time_unit": "s",
            "event_time_jump_s": 3600,
            "shuffle": {"block_rows": 0},
        },
        "features": [{"columns": ["key"]}],
        "table_defaults": table,
        "model": {"kind": "dlrm", "bottom": [], "top": [4]},
        "training": {"batch_size": BATCH},
        "run": {"threads": 1},
    })


def clock_and_numbers(out):
    (checkpoint,) = sorted((out / "checkpoints").glob("step-*"))[-1:]
    content = json.loads((checkpoint / "manifest.json").read_text())
    (table,) = content["tables"]
    with safe_open(checkpoint / table["retention"], "pt") as file:
        numbers = dict(zip(NUMBERS, file.get_tensor("retention").tolist(), strict=True))
    return content["row_clock"], numbers


def test_a_job_keeps_the_clock_of_its_rows(tmp_path):
    console = Console(file=io.StringIO())
    batches, gap_at = 60, 30
    minutes = np.arange(batches * BATCH) // BATCH
    seconds = BEGIN + 60 * minutes + np.arange(batches * BATCH) % BATCH
    seconds[gap_at * BATCH :] += 7 * DAY
    seconds[[100, 300, 700]] += 7200  # within the day that is the default
    path = tmp_path / "rows.parquet"
    columns = {"click": minutes % 2, "key": np.arange(batches * BATCH), "time": seconds}
    wrong = {"click": 1, "key": 77, "time": YEAR_2100}
    # Before rows 0, 400 and 950: they are left out, so that batches are as without them.
    columns = {name: np.insert(part, [0, 400, 950], wrong[name]) for name, part in columns.items()}
    pq.write_table(pa.table(columns), path)

    summary = run.train(job_of(path), tmp_path / "run", console=console)
    row_clock, numbers = clock_and_numbers(tmp_path / "run")
    median = BATCH // 2 - 1
    times = [BEGIN + 60 * n + median + (7 * DAY if n >= gap_at else 0) for n in range(batches)]
    assert row_clock["now_s"] == numbers["now"] == times[-1]
    assert row_clock["recent_s"] == times[-CONFIRMATIONS:]
    assert summary["quarantined_rows"] == 3
    assert summary["samples"] == batches * BATCH
    # Those hours ahead, and the batches after the gap until it was believed.
    ahead = 3 + (CONFIRMATIONS - 1) * BATCH
    assert summary["rows_ahead_of_time"] == row_clock["rows_ahead"] == ahead
    # A row lives for 16 batches, or 17; all of those before the gap is believed leave with it.
    assert 13 * BATCH < summary["tables"]["key"]["rows"] <= 18 * BATCH

    def dies(*arguments):
        if arguments[2] == gap_at + 3:
            raise RuntimeError("the power went")
        return real(*arguments)

    real = run.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "train_step", dies)
        job = job_of(path)
        often = job.checkpoint.model_copy(update={"every_steps": gap_at + 2})
        with pytest.raises(RuntimeError, match="the power went"):
            run.train(
                job.model_copy(update={"checkpoint": often}), tmp_path / "again", console=console
            )
    resumed = run.train(job_of(path), tmp_path / "again", resume=True, console=console)
    assert clock_and_numbers(tmp_path / "again") == (row_clock, numbers)
    assert resumed["rows_ahead_of_time"] == ahead
    assert resumed["quarantined_rows"] == 3
    lines = [(tmp_path / name / "quarantine.jsonl").read_text() for name in ("run", "again")]
    assert lines[0] == lines[1]
    assert [json.loads(line)["line"] for line in lines[0].splitlines()] == [1, 402, 953]
    assert resumed["tables"] == summary["tables"]

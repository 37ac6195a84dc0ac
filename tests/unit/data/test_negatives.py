"""Negative samples: which row each takes its item from, and that nothing else changes."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from penstock.config import parse_job
from penstock.data import Dataset
from penstock.data.columns.negatives import ItemRows, NegativeColumns, draw_rows
from penstock.data.columns.transforms import cross
from penstock.errors import ConfigError, DataError, JobNote
from penstock.training.planned import planned_samples
from tests.contract.data_cases import assert_resumes_everywhere, assert_same_batches, read_all

ROWS = 230


def columns_of(candidates="popularity", per_positive=3):
    return NegativeColumns(per_positive, candidates, "item", (), (), (), "user")


def item_rows_of(items, users=None):
    """Users may be None: nobody."""
    if users is not None:
        values = np.array([0 if user is None else user for user in users], dtype=np.int64)
        users = values, np.array([user is not None for user in users], dtype=bool)
    return ItemRows(np.array(items, dtype=np.int64), (), users)


def drawn_by_hand(items, columns, seed, users=None):
    """The documented rule, row by row."""
    n, k = len(items), columns.per_positive
    philox = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(1,)))
    bits = iter(philox.random_raw(n * k).tolist())
    by_item = sorted(range(n), key=lambda row: (items[row], row))
    firsts = [items.index(item) for item in sorted(set(items))]
    out = []
    for row in range(n):
        pool = by_item if columns.candidates == "popularity" else firsts
        spared = {items[row]}
        if users is not None and users[row] is not None:
            spared = {items[one] for one in range(n) if users[one] == users[row]}
        others = [one for one in pool if items[one] not in spared]
        out += [row, *(others[(next(bits) >> 32) * len(others) >> 32] for _ in range(k))]
    return out


class TestDrawing:
    @given(
        st.lists(st.integers(-3, 3), min_size=2, max_size=30).filter(lambda x: len(set(x)) > 1),
        st.sampled_from(["popularity", "uniform"]),
        st.integers(1, 4),
        st.integers(0, 99),
    )
    def test_equals_a_plain_loop(self, items, candidates, per_positive, seed):
        columns = columns_of(candidates, per_positive)
        drawn = draw_rows(item_rows_of(items), columns, [seed, 1], "here")
        assert drawn.tolist() == drawn_by_hand(items, columns, [seed, 1])
        own = np.repeat(items, 1 + per_positive).reshape(len(items), -1)
        assert (np.array(items)[drawn].reshape(own.shape)[:, 1:] != own[:, 1:]).all()

    @given(
        st.lists(
            st.tuples(st.integers(-4, 4), st.sampled_from([0, 1, 2, -(2**63), None])),
            min_size=2,
            max_size=40,
        ),
        st.sampled_from(["popularity", "uniform"]),
        st.integers(1, 4),
        st.integers(0, 99),
    )
    def test_users_equal_a_plain_loop(self, rows, candidates, per_positive, seed):
        items, users = zip(*rows, strict=True)
        has = {user: {i for i, u in rows if u == user} for user in users if user is not None}
        assume(len(set(items)) > 1 and all(set(items) - one for one in has.values()))
        columns = columns_of(candidates, per_positive)
        drawn = draw_rows(item_rows_of(items, users), columns, [seed, 1], "here")
        assert drawn.tolist() == drawn_by_hand(items, columns, [seed, 1], users)

    @pytest.mark.parametrize("candidates", ["popularity", "uniform"])
    def test_a_user_of_all_items_is_refused(self, candidates):
        with pytest.raises(DataError) as raised:
            rows = item_rows_of([1, 2, 1, 3], [None, 7, 8, 7])
            draw_rows(rows, columns_of(candidates), [0], "x.parquet rows 0-3")
            rows = item_rows_of([1, 2, 1, 2], [None, 7, 7, 8])
            draw_rows(rows, columns_of(candidates), [0], "x.parquet rows 0-3")
        assert str(raised.value) == (
            "x.parquet rows 0-3: the value of 'user' in row 1 of these has all 2 values of 'item' "
            "that there are, so no negative can be drawn for it; raise data.shuffle.block_rows, "
            "shuffle the file, or set data.negatives.user: false"
        )

    def test_popularity_is_in_proportion_and_uniform_is_not(self):
        items = np.array([5] * 60 + [-7] * 30 + [2**62] * 10)
        for candidates, expected in (
            ("popularity", {-7: 3 / 4, 2**62: 1 / 4}),
            ("uniform", {-7: 1 / 2, 2**62: 1 / 2}),
        ):
            drawn = items[draw_rows(item_rows_of(items), columns_of(candidates, 200), [0], "")]
            got = Counter(drawn.reshape(100, -1)[:60, 1:].ravel().tolist())
            for item, share in expected.items():
                # 12,000 draws: one standard deviation is below 0.5 %.
                assert abs(got[item] / 12_000 - share) < 0.02
            assert set(got) == set(expected)

    def test_one_item_alone_is_refused(self):
        with pytest.raises(DataError) as raised:
            draw_rows(item_rows_of([4, 4, 4]), columns_of(), [0], "x.parquet rows 0-2")
        assert str(raised.value) == (
            "x.parquet rows 0-2: all 3 rows have one value of 'item', so no negative can be drawn "
            "among them; raise data.shuffle.block_rows, or shuffle the file"
        )


def log_table(rows=ROWS, seed=0):
    """A log of clicks. `item_row` names the row; all item columns follow from it."""
    rng = np.random.default_rng(seed)
    item = rng.zipf(1.5, rows) % 20
    return pa.table({
        "user": rng.integers(0, 9, rows),
        "history": [rng.integers(0, 20, rng.integers(0, 4)).tolist() for _ in range(rows)],
        "hour": rng.integers(0, 24, rows).astype(np.float64),
        "item": pa.array(item, mask=rng.random(rows) < 0.1),
        "item_row": np.arange(rows),
        "tags": [rng.integers(0, 99, rng.integers(0, 3)).tolist() for _ in range(rows)],
        "word": pa.array([f"w{one % 3}" for one in item], mask=rng.random(rows) < 0.2),
        "price": rng.random(rows),
        "time": np.arange(rows) * 1000,
        "value": rng.integers(1, 5, rows) / 2,
    })


def log_job(path, table=None, negatives=None, features=None, **data):
    pq.write_table(log_table() if table is None else table, path / "log.parquet", row_group_size=64)
    chosen = {
        "per_positive": 3,
        "columns": ["item", "item_row", "tags", "word", "price"],
        "user": False,
        **(negatives or {}),
    }
    return parse_job({
        "data": {
            "source": {"format": "parquet", "path": str(path / "log.parquet")},
            "negatives": chosen,
            "weight": "value",
            "event_time": "time",
            "numeric": [{"columns": ["hour", "price"]}],
            "shuffle": {"block_rows": 50},
            **data,
        },
        "features": features
        or [
            {"columns": ["user", "item", "item_row"]},
            {"columns": ["history", "tags"], "table": "lists"},
        ],
        "crosses": [
            {"name": "user_word", "columns": ["user", "word"]},
            {"name": "word_item", "columns": ["word", "item"], "seed": 3, "buckets": 50},
            {"name": "item_user", "columns": ["item", "user"], "seed": 9},
            {"name": "hours", "columns": ["user", "item_row"], "table": "lists"},
        ],
        "tables": [{"name": "lists"}],
        "evaluation": {"metrics": {"grouped_auc": ["user", "item"]}},
    })


def samples_of(batches):
    """Every sample: label, own columns, columns of the item, crosses."""
    out = []
    for batch in batches:
        bags = {name: batch.sparse[name] for name in batch.sparse.features}
        for s in range(batch.batch_size):
            keys = {
                name: bag.values[bag.offsets[s] : bag.offsets[s + 1]].tolist()
                for name, bag in bags.items()
            }
            out.append({
                "label": batch.labels[s].item(),
                "dense": batch.dense[s].tolist(),
                "weight": batch.weights[s].item(),
                "time": batch.event_time[s].item(),
                "groups": {name: column[s].as_py() for name, column in batch.groups.items()},
                **keys,
            })
    return out


def check_sample(sample, table):
    """Everything of a sample, against the row of its own and the row of its item."""
    row, taken = sample["time"] // 1000, sample["item_row"][0]
    own, item = table.slice(row, 1).to_pylist()[0], table.slice(taken, 1).to_pylist()[0]
    assert sample["label"] == (row == taken)
    if row != taken:
        assert own["item"] != item["item"]
    assert sample["weight"] == own["value"]
    assert sample["dense"] == [np.float32(own["hour"]), np.float32(item["price"])]
    assert (sample["user"], sample["history"]) == ([own["user"]], own["history"])
    assert sample["item"] == ([] if item["item"] is None else [item["item"]])
    assert sample["tags"] == item["tags"]
    for name, values, options in (
        ("user_word", [own["user"], item["word"]], (0, None)),
        ("word_item", [item["word"], item["item"]], (3, 50)),
        ("item_user", [item["item"], own["user"]], (9, None)),
        ("hours", [own["user"], item["item_row"]], (0, None)),
    ):
        kinds = [pa.string() if isinstance(v, str) else pa.int64() for v in values]
        arrays = [pa.array([v], kind) for v, kind in zip(values, kinds, strict=True)]
        assert sample[name] == cross(arrays, *options).tolist()
    if sample["groups"]:
        assert sample["groups"] == {"user": own["user"], "item": own["item"]}
    return row, taken


class TestSamples:
    @pytest.mark.parametrize("candidates", ["popularity", "uniform"])
    @pytest.mark.parametrize("part", ["train", "evaluation"])
    def test_are_the_row_with_the_item_of_another(self, candidates, part, tmp_path):
        job = log_job(
            tmp_path,
            negatives={"candidates": candidates},
            split={"by": "fraction", "evaluation": 0.4},
        )
        dataset = Dataset.open(job)
        rows = range(138) if part == "train" else range(138, ROWS)
        batches = read_all(dataset, part, groups=True)
        pairs = [check_sample(sample, log_table()) for sample in samples_of(batches)]
        assert Counter(row for row, _ in pairs) == dict.fromkeys(rows, 4)
        assert sorted(taken for row, taken in pairs if row == taken) == list(rows)
        in_order = [row for row, _ in pairs] == [row for row in rows for _ in range(4)]
        assert in_order == (part == "evaluation")
        # Blocks of 56 rows, so that their samples are batches of 32; the last one is 56 to 111.
        last = 56 * (len(rows) // 56 - 1)
        for row, taken in pairs:
            block = [min((one - rows[0]) // 56 * 56, last) for one in (row, taken)]
            assert block[0] == block[1]

    def test_one_key_a_bag(self, tmp_path):
        features = [{"columns": ["user", "item", "item_row"], "missing": -1}]
        job = log_job(tmp_path, features=features, negatives={"columns": ["item", "item_row"]})
        job = job.model_copy(update={"tables": (), "crosses": job.crosses[2:3]})
        table = log_table()
        for sample in samples_of(read_all(Dataset.open(job))):
            row, taken = sample["time"] // 1000, sample["item_row"][0]
            item = table["item"][taken].as_py()
            assert sample["user"] == [table["user"][row].as_py()]
            assert sample["item"] == [-1 if item is None else item]
            pair = [pa.array([item], pa.int64()), table["user"].slice(row, 1)]
            assert sample["item_user"] == cross(pair, 9, None).tolist()

    def test_every_batch_but_the_last_is_full_and_positions_count_samples(self, tmp_path):
        dataset = Dataset.open(log_job(tmp_path))
        assert (dataset.num_rows("train"), dataset.expected_samples("train")) == (
            ROWS,
            (4 * ROWS, True),
        )
        for size in (1, 7, 32, 50, 999):
            batches = read_all(dataset, batch_size=size, epochs=2)
            sizes = [batch.batch_size for batch in batches]
            whole, rest = divmod(4 * ROWS, size)
            assert sizes == ([size] * whole + [rest] * (rest > 0)) * 2
            ends = np.cumsum(sizes).tolist()
            assert [batch.end.samples for batch in batches] == ends
            assert [batch.start.samples for batch in batches] == [0, *ends[:-1]]

    @pytest.mark.parametrize("block_rows", [0, 50])
    @pytest.mark.parametrize("batch_size", [7, 32, 64])
    def test_resume_anywhere(self, block_rows, batch_size, tmp_path):
        dataset = Dataset.open(log_job(tmp_path, shuffle={"block_rows": block_rows}))
        assert_resumes_everywhere(dataset, batch_size=batch_size, epochs=2, seed=5)

    def test_depend_on_seed_and_epoch_in_training_alone(self, tmp_path):
        for block_rows in (0, 50):
            job = log_job(
                tmp_path,
                shuffle={"block_rows": block_rows},
                split={"by": "fraction", "evaluation": 0.5},
            )
            dataset, table = Dataset.open(job), log_table()

            def pairs(part="train", dataset=dataset, table=table, **options):
                samples = samples_of(read_all(dataset, part, **options))
                return [check_sample(sample, table) for sample in samples]

            once = pairs(seed=1)
            assert pairs(seed=1) == once
            assert sorted(pairs(seed=2)) != sorted(once)
            assert pairs(seed=-1) != once
            twice = pairs(seed=1, epochs=2)
            assert twice[: len(once)] == once
            assert sorted(twice[len(once) :]) != sorted(once)
            for fixed in ({"part": "evaluation"}, {"part": "train", "shuffle": False}):
                held = pairs(seed=1, **fixed)
                assert pairs(seed=2, epochs=2, **fixed) == held * 2

    def test_threads_change_nothing(self, tmp_path):
        for threads in (1, 3):
            job = log_job(tmp_path, reader_threads=threads)
            batches = read_all(Dataset.open(job), seed=3)
            if threads == 1:
                first = batches
        assert_same_batches(batches, first)

    def test_origin_names_rows(self, tmp_path):
        job = log_job(tmp_path, split={"by": "fraction", "evaluation": 0.5})
        dataset = Dataset.open(job)
        file = f"{tmp_path}/log.parquet"
        batches = read_all(dataset, "evaluation", batch_size=30)
        assert [str(batch.origin) for batch in batches[:2]] == [
            f"{file} rows 115-122",
            f"{file} rows 122-129",
        ]
        assert str(read_all(dataset, batch_size=30)[-1].origin) == f"{file} rows 0-114 (shuffled)"

    def test_last_block_is_never_short(self, tmp_path):
        # 101 rows in blocks of 50: a block of one row would have nothing to draw from.
        for rows, last in ((101, 51), (99, 99), (100, 50), (1, None)):
            job = log_job(tmp_path, log_table(rows))
            dataset = Dataset.open(job)
            if last is None:
                with pytest.raises(DataError, match="all 1 rows have one value of 'item'"):
                    read_all(dataset, batch_size=20)
                continue
            batches = read_all(dataset, batch_size=20)
            assert max(batch.start.block for batch in batches) == (0 if last == 99 else 1)
            of_last = [b for b in batches if b.start.block == batches[-1].start.block]
            assert sum(batch.batch_size for batch in of_last) == 4 * last
            assert_resumes_everywhere(dataset, batch_size=20, epochs=2)

    def test_synthetic_rows_lose_their_teacher(self):
        job = parse_job({
            "data": {
                "source": {"format": "synthetic", "rows": 100},
                "negatives": {"per_positive": 1, "columns": ["c0"]},
            },
            "features": [{"columns": ["c[0-9]*"]}],
        })
        (batch,) = read_all(Dataset.open(job), batch_size=1000)
        assert batch.teacher is None
        assert (batch.batch_size, batch.labels.mean().item()) == (200, 0.5)

    @settings(max_examples=40)
    @given(data=st.data())
    def test_any_log(self, data, tmp_path_factory):
        rows = data.draw(st.integers(2, 60))
        table = log_table(rows, seed=data.draw(st.integers(0, 999)))
        block_rows = data.draw(st.integers(0, 30))
        items = table["item"].to_pylist()
        job = log_job(
            tmp_path_factory.mktemp("log"),
            table,
            shuffle={"block_rows": block_rows},
            negatives={
                "per_positive": data.draw(st.integers(1, 5)),
                "candidates": data.draw(st.sampled_from(["popularity", "uniform"])),
            },
        )
        batch_size = data.draw(st.integers(1, 50))
        dataset = Dataset.open(job)
        try:
            batches = read_all(dataset, batch_size=batch_size, epochs=2)
        except DataError as error:
            # Some block has one item alone.
            assert "rows have one value of 'item'" in str(error)
            assert len(set(items)) == 1 or max(Counter(items).values()) >= block_rows
            return
        pairs = [check_sample(sample, table) for sample in samples_of(batches)]
        per_row = 1 + job.data.negatives.per_positive
        assert Counter(row for row, _ in pairs) == dict.fromkeys(range(rows), 2 * per_row)
        assert sum(row == taken for row, taken in pairs) == 2 * rows


class TestUsers:
    """Items that a user has in the block are no negatives of that user."""

    def log(self, rows=300):
        rng = np.random.default_rng(4)
        user = [None if one == 5 else f"u{one}" for one in rng.integers(0, 6, rows)]
        return pa.table({
            "user": user,
            "item": rng.integers(0, 60, rows),
            "hour": rng.integers(0, 9, rows),
            "row": range(rows),
        })

    def job(self, path, features=("item", "row"), block_rows=100, **negatives):
        pq.write_table(self.log(), path / "log.parquet", row_group_size=47)
        return parse_job({
            "data": {
                "source": {"format": "parquet", "path": str(path / "log.parquet")},
                "negatives": {"per_positive": 4, "columns": ["item"], **negatives},
                "shuffle": {"block_rows": block_rows},
            },
            "features": [
                {"columns": [name], "transforms": [{"kind": "hash"}] if name == "user" else []}
                for name in features
            ],
        })

    def clashes(self, job):
        """Negatives whose item the row's user has, whose item the row has, and of nobody."""
        table = self.log().to_pylist()
        found = [0, 0, 0]
        for batch in read_all(Dataset.open(job), batch_size=64, shuffle=False):
            rows, items = batch.sparse["row"].values.tolist(), batch.sparse["item"].values.tolist()
            for row, item, label in zip(rows, items, batch.labels.tolist(), strict=True):
                user = table[row]["user"]
                own = {one["item"] for one in table if one["user"] == user and user is not None}
                if not label:
                    found[0] += item in own
                    found[1] += item == table[row]["item"]
                    found[2] += user is None
        return found

    @pytest.mark.parametrize("candidates", ["popularity", "uniform"])
    def test_own_items_are_spared(self, candidates, tmp_path):
        job = self.job(tmp_path, block_rows=300, user="user", candidates=candidates)
        own_positives, own_item, of_nobody = self.clashes(job)
        assert (own_positives, own_item) == (0, 0) and of_nobody > 0
        job = self.job(tmp_path, block_rows=300, user=False, candidates=candidates)
        without, own_item, _ = self.clashes(job)
        assert without > 100 and own_item == 0

    def test_the_user_is_no_input(self, tmp_path):
        dataset = Dataset.open(self.job(tmp_path, user="user"))
        assert {name for batch in read_all(dataset) for name in batch.sparse.features} == {
            "item",
            "row",
        }

    def test_the_only_other_feature_is_the_user(self, tmp_path):
        with pytest.warns(JobNote) as notes:
            dataset = Dataset.open(self.job(tmp_path, features=["user", "item"]))
        assert [str(one.message) for one in notes] == [
            "data.negatives.user: taken to be 'user', the only feature of one key a row that is "
            "not the item's, so its items in the block are no negatives; say which column it is, "
            "or false"
        ]
        named = Dataset.open(self.job(tmp_path, features=["user", "item"], user="user"))
        assert_same_batches(read_all(dataset), read_all(named))

    def test_of_several_features_none_is_guessed(self, tmp_path):
        features = ["user", "item", "hour", "row"]
        given = Dataset.open(self.job(tmp_path, features=features))
        none = Dataset.open(self.job(tmp_path, features=features, user=False))
        assert_same_batches(read_all(given), read_all(none))

    def test_resumes_everywhere(self, tmp_path):
        assert_resumes_everywhere(Dataset.open(self.job(tmp_path, user="user")), batch_size=53)

    @pytest.mark.parametrize(
        ("user", "error", "text"),
        [
            ("usr", DataError, "no column 'usr' (data.negatives.user); did you mean 'user'?"),
            ("item", ConfigError, "user 'item' is one of the item's columns; name another one"),
        ],
    )
    def test_what_is_no_user(self, user, error, text, tmp_path):
        with pytest.raises(error) as raised:
            Dataset.open(self.job(tmp_path, user=user))
        assert text in str(raised.value)

    def test_a_list_is_no_user(self, tmp_path):
        job = log_job(tmp_path, negatives={"user": "history"})
        with pytest.raises(DataError) as raised:
            Dataset.open(job)
        assert "names the user, by an integer or text a row; name another column" in str(
            raised.value
        )


def test_planned_samples_count_negatives(tmp_path):
    job = log_job(tmp_path)
    assert planned_samples(job, Dataset.open(job)) == (4 * ROWS, True)


def message(error, call):
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


class TestMessages:
    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            (
                {},
                "job: data: give `label`, the column of what to predict, or, if every row is a "
                "positive, `negatives`",
            ),
            (
                {"label": {"column": "x"}, "negatives": {"per_positive": 1, "columns": ["i"]}},
                "job: data: `negatives` takes every row as a positive, so there is no `label`; "
                "remove one of them",
            ),
            (
                {"negatives": {"per_positive": 1, "columns": ["i", "j", "i"]}},
                "job: data.negatives: columns names 'i' twice; remove one",
            ),
            (
                {"negatives": {"columns": ["i"], "candidate": "uniform", "per_positive": 0}},
                "job: data.negatives.per_positive: input should be greater than 0 (got 0)\n"
                "job: data.negatives.candidate: unknown key; did you mean 'candidates'?",
            ),
        ],
    )
    def test_of_fields(self, fields, text):
        data = {"source": {"format": "synthetic"}, **fields}
        assert message(ConfigError, lambda: parse_job({"data": data})) == text

    @pytest.mark.parametrize(
        ("columns", "error", "text"),
        [
            (
                ["itm"],
                DataError,
                "{path}: no column 'itm' (data.negatives); did you mean 'item'?",
            ),
            (
                ["item", "value"],
                ConfigError,
                "data.negatives.columns: 'value' is no input of the model, so it makes no "
                "difference of which row it is; list it under `features` or data.numeric, or "
                "remove it",
            ),
            (
                ["tags", "item"],
                DataError,
                "{path}: column 'tags' is list<element: int64>; the first of "
                "data.negatives.columns names the item, by an integer or text a row; put another "
                "one first",
            ),
            (
                ["item", "item_row", "tags", "word", "price", "user", "history", "hour"],
                ConfigError,
                "data.negatives.columns: these are all inputs, so that a negative would be "
                "another row's positive; leave out what belongs to the user or the moment",
            ),
        ],
    )
    def test_of_columns(self, columns, error, text, tmp_path):
        job = log_job(tmp_path, negatives={"columns": columns})
        path = str(tmp_path / "log.parquet")
        assert message(error, lambda: Dataset.open(job)) == text.replace("{path}", path)

    def test_a_block_of_one_item(self, tmp_path):
        table = log_table(120).set_column(3, "item", pa.array([7] * 60 + [8] * 60))
        job = log_job(tmp_path, table, shuffle={"block_rows": 40})
        assert message(DataError, lambda: read_all(Dataset.open(job), batch_size=40)) == (
            f"{tmp_path}/log.parquet rows 0-39 (shuffled): all 40 rows have one value of 'item', "
            "so no negative can be drawn among them; raise data.shuffle.block_rows, or shuffle "
            "the file"
        )

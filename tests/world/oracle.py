"""What a run must come to: rows in a dictionary, a step a global batch; a log of samples.

Gradients are whole numbers and the learning rate a power of 2, so that a sum has the same bits in
any order, and only the weights are rounded, once a step.
"""

from collections import Counter

import numpy as np
import torch

from penstock.config import SGD, Constant, TableConfig
from penstock.embedding.rules.initializer import initial_values
from penstock.embedding.sharded.ways import ROWS
from penstock.embedding.store import CURSOR_START, PooledFeature, PoolingPlan

DIM = 3
RATE = 0.125
MOST_KEYS = 3
"""Of a bag."""
BAGS = {"sequence": MOST_KEYS, "sum": MOST_KEYS, "mean": 2}
"""Most keys of a bag, by how it is pooled: means of three would be rounded."""


def tables_of(pooling):
    """Two tables; where bags are pooled, of values whose sums are not rounded in any order."""
    fields = {"dim": DIM, "optimizer": SGD(learning_rate=RATE)}
    if pooling != "sequence":
        fields["initializer"] = Constant(value=0.25)
    return [TableConfig(name=name, **fields) for name in "ab"]


def plan_of(pooling):
    """Features `id`, `one` and `bag`; what is read of a bag without keys is 0."""
    rows = MOST_KEYS if pooling == "sequence" else 1
    most = (MOST_KEYS,) if pooling == "sequence" else ()
    features = (
        PooledFeature(0, 1, "sum", 0),
        PooledFeature(1, 0, "sum", DIM),
        PooledFeature(2, 0, pooling, 2 * DIM, *most),
    )
    return PoolingPlan(features, (2 + rows) * DIM)


def any_way(sizes, dim, way):
    """In place of `way_of`: either way, alike on all ranks, and another one now and then."""
    return ROWS if sizes[:, -1].any() else int(sizes.sum()) * 7919 % 5 % 2


def gradient(ids, read):
    """[B, W] float32 of whole numbers: they depend on the sample, and on what was read of rows."""
    numbers = np.asarray(ids)[:, None] * 7 + np.arange(read.shape[1])
    return ((numbers % 5 - 2) + 3 * (np.asarray(read) > 0)).astype(np.float32)


class Oracle:
    """Rows by (table, key)."""

    def __init__(self, samples, seed, pooling):
        """Of samples by id: the key of `one`, and the keys of `bag`."""
        self._pooling, self._width = pooling, plan_of(pooling).stride
        self._keys = {
            number: [(1, number), (0, one), *((0, key) for key in bag)]
            for number, (one, bag) in samples.items()
        }
        self._first = {}
        for table, config in enumerate(tables_of(pooling)):
            wanted = {key for of in self._keys.values() for t, key in of if t == table}
            keys = np.array(sorted(wanted), np.int64)
            values = initial_values(config.initializer, seed, config.name, keys, DIM)
            self._first |= {
                (table, key): row for key, row in zip(keys.tolist(), values, strict=True)
            }
        self.rows = {}

    def read(self, number):
        """[W] what a sample reads."""
        rows = [self.rows.get(key, self._first[key]) for key in self._keys[number]]
        read = np.zeros(self._width, np.float32)
        for row, (place, factor) in zip(rows, self._parts(len(rows)), strict=True):
            read[place * DIM : (place + 1) * DIM] += row * factor
        return read

    def _parts(self, keys):
        """Of each key of a sample: where its row goes, and by what factor."""
        if self._pooling == "sequence":
            return [(place, np.float32(1)) for place in range(keys)]
        factor = np.float32(1 / max(1, keys - 2) if self._pooling == "mean" else 1)
        return [(min(place, 2), factor if place > 1 else np.float32(1)) for place in range(keys)]

    def step(self, ids):
        """Trains on a global batch."""
        sums = {}
        for number in ids:
            grad = gradient([number], self.read(number)[None])[0].astype(np.float64)
            keys = self._keys[number]
            for key, (place, factor) in zip(keys, self._parts(len(keys)), strict=True):
                part = grad[place * DIM : (place + 1) * DIM] * factor
                sums[key] = sums.get(key, 0) + part
        for key, total in sums.items():
            row = self.rows.get(key, self._first[key])
            self.rows[key] = (row - np.float64(RATE) * total).astype(np.float32)

    def bits(self):
        """Rows by (table, key), as bytes."""
        return {key: row.tobytes() for key, row in self.rows.items()}


def _is_same(position, of_whole):
    """Whether positions are, but for what depends on which files were listed."""
    if position.span is None:
        return position == of_whole
    mine, theirs = (
        (one.block, one.block_row, one.samples, one.counts.applied) for one in (position, of_whole)
    )
    return mine == theirs


class Log:
    """Of each step, what each rank applied: ids, what it read of them, and where it came to."""

    def __init__(self):
        self.steps = []

    def add(self, step, rank, ids, read, end):
        """Notes a rank's part of a step."""
        while len(self.steps) <= step:
            self.steps.append({})
        assert rank not in self.steps[step], f"rank {rank} applied step {step} twice"
        self.steps[step][rank] = ids, read, end

    def cut(self, steps):
        """Forgets what came after a checkpoint."""
        del self.steps[steps:]

    def check(self, oracle, batches):
        """Compares with the batches of one process, and with the oracle, which trains on them."""
        assert len(self.steps) == len(batches), (len(self.steps), len(batches))
        applied = Counter()
        for number, (of_ranks, (ids, lanes, end)) in enumerate(
            zip(self.steps, batches, strict=True)
        ):
            size, cuts = len(of_ranks), np.cumsum([0, *lanes])
            assert sorted(of_ranks) == list(range(size)), f"step {number}: ranks {of_ranks.keys()}"
            for rank, (mine, read, my_end) in of_ranks.items():
                wanted = [
                    one
                    for lane in range(rank, len(lanes), size)
                    for one in ids[cuts[lane] : cuts[lane + 1]]
                ]
                assert mine == wanted, f"step {number}: samples of rank {rank}"
                assert _is_same(my_end, end), f"step {number}: position of rank {rank}"
                for one, row in zip(mine, read, strict=True):
                    assert row.tobytes() == oracle.read(one).tobytes(), (
                        f"step {number}: rank {rank} read other rows for sample {one}"
                    )
                applied.update(mine)
            oracle.step([one for mine, _, _ in of_ranks.values() for one in mine])
        wanted = Counter(one for ids, *_ in batches for one in ids)
        assert applied == wanted, "samples are not applied as often as they are there"


def bits_of(store):
    """Rows of a store by (table, key), as bytes; and as they are exported, by table."""
    bits, parts = {}, []
    for table in range(len(store.tables)):
        rows, _ = store.export_batch(table, CURSOR_START, 1 << 20)
        parts.append(rows)
        values = rows.values.numpy()
        for key, value in zip(rows.keys.tolist(), values, strict=True):
            bits[table, key] = np.ascontiguousarray(value).tobytes()
    return bits, parts


def merged(parts):
    """Rows of several ranks as one's."""
    return type(parts[0])(
        *(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
    )

"""The C++ core takes no array of a wrong length, type or layout: none is read or written beyond."""

import numpy as np
import pytest

from penstock import _core
from penstock.config import SGD, Adagrad, TableConfig
from penstock.embedding.host_store import HostStore, core_plan
from penstock.embedding.store import PooledFeature, PoolingPlan

KEYS = np.arange(8)
OFFSETS = np.arange(9)
PLAN = core_plan(PoolingPlan((PooledFeature(0, 0, "sum", 0),), 4))
HYPERS = np.zeros((2, 10), np.float32)


def core():
    tables = [TableConfig(name=name, dim=4, optimizer=Adagrad()) for name in "ab"]
    store = HostStore(tables)._core
    assert store.find(0, KEYS, True, floats(8, 4), floats(8, 4), np.empty(8, bool)) is not None
    return store


def floats(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def looked_up(store, plan=PLAN):
    lookup = _core.Lookup()
    store.pooled_lookup(plan, KEYS, np.arange(9), None, 8, True, floats(8, 4), lookup)
    return lookup


def plan_of(**fields):
    right = {
        "packed_feature": [0],
        "table": [0],
        "pooling": [0],
        "max_keys": [0],
        "column": [0],
        "stride": 4,
    }
    return _core.PoolingPlan(**right | fields)


def look_up(keys=KEYS, offsets=OFFSETS, weights=None, size=8, out=None, plan=PLAN, lookup=None):
    out = floats(8, 4) if out is None else out
    return lambda s: s.pooled_lookup(
        plan, keys, offsets, weights, size, True, out, lookup or _core.Lookup()
    )


def update(grad=None, hypers=HYPERS, plan=PLAN, lookup=looked_up, defaults=(None, None)):
    grad = floats(8, 4) if grad is None else grad
    return lambda s: s.apply_gradients(plan, [(lookup(s), grad)], hypers, 0, False, *defaults)


def applied(store):
    lookup = looked_up(store)
    store.apply_gradients(PLAN, [(lookup, floats(8, 4))], HYPERS, 0, False, None, None)
    return lookup


def twice(store):
    lookup = looked_up(store)
    return store.apply_gradients(PLAN, [(lookup, floats(8, 4))] * 2, HYPERS, 0, False, None, None)


FLAGS = np.empty(8, bool)
NUMBERS = np.zeros(9, np.int64)
CALLS = {
    "lookup weights": look_up(weights=floats(7)),
    "lookup offsets": look_up(offsets=np.arange(0)),
    "lookup not a multiple": look_up(offsets=np.arange(8)),
    "lookup no samples": look_up(size=0),
    "lookup fewer than none": look_up(size=-1),
    "lookup out rows": look_up(out=floats(7, 4)),
    "lookup out columns": look_up(out=floats(8, 3)),
    "lookup plan table": look_up(plan=plan_of(table=[2])),
    "lookup plan feature": look_up(plan=plan_of(packed_feature=[1])),
    "lookup plan negative feature": look_up(plan=plan_of(packed_feature=[-1])),
    "lookup plan column": look_up(plan=plan_of(column=[1])),
    "lookup plan negative column": look_up(plan=plan_of(column=[-1])),
    "lookup plan huge column": look_up(plan=plan_of(column=[2**63 - 1])),
    "lookup plan pooling": look_up(plan=plan_of(pooling=[4])),
    "lookup plan positions": look_up(plan=plan_of(pooling=[3], max_keys=[2])),
    "lookup plan no positions": look_up(plan=plan_of(pooling=[3])),
    "lookup plan lengths": look_up(plan=plan_of(column=[0, 0])),
    "update gradient rows": update(floats(7, 4)),
    "update gradient columns": update(floats(8, 3)),
    "update hypers": update(hypers=HYPERS[:1]),
    "update hyper fields": update(hypers=floats(2, 9)),
    "update default sums alone": update(defaults=(floats(2, 4), None)),
    "update default sums": update(defaults=(floats(1, 4), np.zeros(2, bool))),
    "update default columns": update(defaults=(floats(2, 3), np.zeros(2, bool))),
    "update touched": update(defaults=(floats(2, 4), np.zeros(1, bool))),
    "update plan": update(plan=plan_of(table=[1])),
    "update other store": update(lookup=lambda _: looked_up(core())),
    "update no look-up": update(lookup=lambda _: _core.Lookup()),
    "update applied": update(lookup=applied),
    "update twice": twice,
    "find table": lambda s: s.find(2, KEYS, False, floats(8, 4), floats(8, 4), FLAGS),
    "find values": lambda s: s.find(0, KEYS, False, floats(7, 4), floats(8, 4), FLAGS),
    "find state": lambda s: s.find(0, KEYS, False, floats(8, 4), floats(8, 3), FLAGS),
    "find found": lambda s: s.find(0, KEYS, False, floats(8, 4), floats(8, 4), FLAGS[:7]),
    "assign table": lambda s: s.insert_or_assign(2, KEYS, floats(8, 4), floats(8, 4), None),
    "assign values": lambda s: s.insert_or_assign(0, KEYS, floats(8, 3), floats(8, 4), None),
    "assign state": lambda s: s.insert_or_assign(0, KEYS, floats(8, 4), floats(7, 4), None),
    "assign usage": lambda s: s.insert_or_assign(0, KEYS, floats(8, 4), floats(8, 4), KEYS),
    "assign bytes": lambda s: s.insert_or_assign(
        0, KEYS, floats(8, 4, dtype=np.float64), floats(8, 4), None
    ),
    "erase table": lambda s: s.erase(2, KEYS),
    "export table": lambda s: s.export_batch(2, 0, 0, KEYS, floats(8, 4), floats(8, 4), KEYS[:0]),
    "export values": lambda s: s.export_batch(0, 0, 0, KEYS, floats(7, 4), floats(8, 4), KEYS[:0]),
    "export state": lambda s: s.export_batch(0, 0, 0, KEYS, floats(8, 4), floats(8, 5), KEYS[:0]),
    "export usage": lambda s: s.export_batch(0, 0, 0, KEYS, floats(8, 4), floats(8, 4), KEYS),
    "candidates table": lambda s: s.num_candidates(2),
    "candidates counts": lambda s: s.export_candidates(0, 0, 0, KEYS, KEYS[:7]),
    "candidates given": lambda s: s.import_candidates(0, KEYS, KEYS[:7]),
    "candidates given table": lambda s: s.import_candidates(2, KEYS, KEYS),
    "retention table": lambda s: s.retention(2, floats(4), floats(4), NUMBERS),
    "retention value": lambda s: s.retention(0, floats(3), floats(4), NUMBERS),
    "retention numbers": lambda s: s.retention(0, floats(4), floats(4), NUMBERS[:8]),
    "set_retention state": lambda s: s.set_retention(0, floats(4), floats(3), NUMBERS),
    "set_retention table": lambda s: s.set_retention(2, floats(4), floats(4), NUMBERS),
    "rows table": lambda s: s.num_rows(2),
    "slots": lambda s: s.row_slots(0, np.empty(7, np.uint32)),
    "slots table": lambda s: s.row_slots(2, np.empty(0, np.uint32)),
}
TYPES = {
    "lookup keys of 32 bits": look_up(keys=KEYS.astype(np.int32)),
    "lookup keys strided": look_up(keys=np.arange(16)[::2]),
    "lookup offsets unsigned": look_up(offsets=np.arange(9).astype(np.uint64)),
    "lookup weights float64": look_up(weights=floats(8, dtype=np.float64)),
    "lookup out strided": look_up(out=floats(4, 8).T),
    "update gradient float64": update(floats(8, 4, dtype=np.float64)),
    "update gradient strided": update(floats(8, 8)[:, ::2]),
    "find keys strided": lambda s: s.find(
        0, np.arange(16)[::2], False, floats(8, 4), floats(8, 4), FLAGS
    ),
    "export keys read-only": lambda s: s.export_batch(
        0, 0, 0, np.frombuffer(bytes(64), np.int64), floats(8, 4), floats(8, 4), KEYS[:0]
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_arrays_of_wrong_shapes_are_refused(name):
    store = core()
    with pytest.raises(ValueError, match=": "):
        CALLS[name](store)
    assert store.check_invariants() == ""


@pytest.mark.parametrize("name", TYPES)
def test_arrays_of_wrong_types_are_refused(name):
    store = core()
    with pytest.raises(TypeError):
        TYPES[name](store)


def test_a_lookup_is_filled_once():
    store = core()
    with pytest.raises(ValueError, match="lookup: used before"):
        look_up(lookup=looked_up(store))(store)


def test_buffers_of_impossible_sizes_are_refused():
    for rows, columns in ((-1, 4), (4, -1), (2**62, 2**62)):
        with pytest.raises(ValueError, match="out of range"):
            _core.buffer_pool().take_rows(rows, columns)


def test_stores_that_cannot_be_are_refused():
    right = {
        "dim": 4,
        "value_type": 0,
        "state_dim": 0,
        "usage_dim": 0,
        "optimizer": 0,
        "tables": [],
        "num_threads": 1,
        "max_bytes": 0,
        "most_isa": "",
        "scan_from": 0,
    }
    for wrong in ({"dim": 0}, {"dim": 4097}, {"value_type": 3}, {"optimizer": 8}, {"state_dim": 1},
                  {"usage_dim": 3}, {"num_threads": 0}, {}):  # fmt: skip
        with pytest.raises(ValueError, match=": "):
            _core.HostStore(**right | wrong)


# --- columns and blocks -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("offsets", [[0, 9, 4], [0, -1, 4], [-1, 2, 4], [0, 2, 5], [4, 2, 4]])
def test_strings_beyond_their_bytes_are_refused(offsets, dtype):
    data = np.frombuffer(b"abcd", np.uint8)
    for read in (_core.hash_strings, _core.parse_hex):
        with pytest.raises(ValueError, match="offsets"):
            read(np.array(offsets, dtype), data)


def block(offsets, keys=8, start=0, stop=2):
    return _core.JaggedBlock([(np.arange(keys), np.array(offsets), None)], [start], [stop])


@pytest.mark.parametrize("bag", [0, 3, 7])
def test_one_bag_that_is_longer_than_its_sequence_is_enough(bag):
    plan = plan_of(pooling=[3], max_keys=[2], stride=8)
    for most, status in ((2, _core.Status.OK), (3, _core.Status.BAG_TOO_LONG)):
        offsets = np.concatenate([[0], np.cumsum(np.where(np.arange(8) == bag, most, 1))])
        keys = np.zeros(7 + most, np.int64)
        assert look_up(keys, offsets, plan=plan, out=floats(8, 8))(core()) == status


@pytest.mark.parametrize("bags", [8, 3 << 15])
@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("wrong", [-1, 1, 1 << 40])
def test_offsets_of_one_key_a_bag_begin_and_end_where_the_keys_do(wrong, place, bags):
    offsets = np.arange(bags + 1)
    offsets[0 if place == "first" else bags] += wrong
    given = look_up(np.zeros(bags, np.int64), offsets, size=bags, out=floats(bags, 4))
    assert given(core()) == _core.Status.BAD_OFFSETS


@pytest.mark.parametrize("offsets", [[0, 9, 8], [0, 5, 3], [-1, 2, 8], [0, 2, 9]])
def test_blocks_of_wrong_offsets_are_refused(offsets):
    with pytest.raises(ValueError, match="JaggedBlock"):
        block(offsets)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 3)])
def test_blocks_beyond_their_chunks_are_refused(start, stop):
    with pytest.raises(ValueError, match="JaggedBlock"):
        block([0, 4, 8], start=start, stop=stop)
    if stop < 3:
        with pytest.raises(ValueError, match="starts beyond stops"):
            _core.JaggedBlock([], [start], [stop])


def test_places_of_another_block_are_refused():
    large, small = block([0, 1, 2, 3, 4, 5, 6, 7, 8], stop=8), block([0, 4, 8])
    for places in (large.locate(np.array([7])), large.locate_run(5, 2)):
        for call in (
            lambda: small.cut(places, 1),  # noqa: B023
            lambda: small.cut(small.locate_run(0, len(places)), 1, places, [True]),  # noqa: B023
            lambda: small.take(places, [np.zeros(2, np.float32)]),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="found by another block"):
                call()


def test_bits_beyond_the_end_are_refused():
    for first_bit in (1, 2**64 - 1):
        with pytest.raises(ValueError, match="too few bits"):
            _core.fill_missing(KEYS, np.zeros(1, np.uint8), first_bit, 0)


def test_numbers_without_a_plan_are_refused():
    with pytest.raises(ValueError, match="plan: none"):
        _core.transform_numbers([(KEYS.astype(np.float32), None, 0, None, 0)], 8)


def test_a_store_of_narrow_rows_takes_values_of_its_width():
    table = TableConfig(name="a", dim=4, dtype="bfloat16", optimizer=SGD())
    store = HostStore([table])._core
    none = floats(8, 0)
    for width in (np.int8, np.int64):
        with pytest.raises(ValueError, match="not of the store's type"):
            store.insert_or_assign(0, KEYS, floats(8, 4, dtype=width), none, None)

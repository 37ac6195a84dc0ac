"""A store that runs out of memory on its way says so, and is whole: no thread ends the process.

Here the system refuses it; in test_every_allocation.py each request fails in its turn.
"""

import os
import subprocess
import sys

import pytest

# In a process of its own, whose address space is limited to little more than it has.
SCRIPT = """
import os, resource, traceback
import torch
from penstock.config import SGD, Eviction, TableConfig
from penstock.embedding.host_store import HostStore
from penstock.embedding.store import PooledFeature, PooledGradient, PoolingPlan
from penstock.errors import CapacityError, PartialUpdateError
from penstock.types import KeyedJagged

N = 1 << 15
EXTRAS = (1 << 17, 1 << 19)
KEYS = torch.arange(N)
PLAN = PoolingPlan((PooledFeature(0, 0, "sum", 0),), 1)
BAG = KeyedJagged(("f",), KEYS, torch.tensor([0, N]))
OUT, GRAD = torch.empty(1, 1), torch.ones(1, 1)

def opened(rules):
    table = TableConfig(
        name="a", dim=1, optimizer=SGD(learning_rate=1.0),
        **(dict(eviction=Eviction(ttl=5)) if rules else {})
    )
    store = HostStore([table], num_threads=3, max_bytes=1 << 26)
    few = KeyedJagged(("f",), KEYS[:1000], torch.tensor([0, 1000]))
    store.pooled_lookup(PLAN, few, insert=True, out=OUT)
    return store

def limited(extra, call):
    pages = int(open("/proc/self/statm").read().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + extra, hard))
    try:
        return call()
    except CapacityError as error:
        return error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))

def look_up(store, extra):
    first = limited(extra, lambda: store.pooled_lookup(PLAN, BAG, insert=True, out=OUT))
    store.check_invariants()
    store.pooled_lookup(PLAN, BAG, insert=True, out=OUT)
    assert store.num_rows(0) == N
    return first

def update(store, extra):
    part = PooledGradient(store.pooled_lookup(PLAN, BAG, insert=True, out=OUT), None, GRAD)
    before = store.find(0, KEYS).values
    first = limited(extra, lambda: store.apply_gradients(PLAN, [part], 0))
    moved = (store.find(0, KEYS).values - before)[:, 0]
    if isinstance(first, PartialUpdateError):
        assert moved.abs().max() > 0 and "go on from a checkpoint" in str(first)
        return first
    if isinstance(first, CapacityError):
        assert (moved == 0).all()
        assert store.apply_gradients(PLAN, [part], 0) == N
        moved = (store.find(0, KEYS).values - before)[:, 0]
    torch.testing.assert_close(moved, torch.full((N,), -1.0))
    return first

store = HostStore([TableConfig(name="a", dim=1)], num_threads=64)
error = limited(1 << 22, lambda: store.find_or_insert(0, KEYS))
assert "starts no more threads; use fewer" in str(error), error
store.check_invariants()
assert not store.find_or_insert(0, KEYS).found.any()
del store

def is_refused(call, rules, extra):
    # In a child, whose heap has nothing that was freed before.
    pid = os.fork()
    if not pid:
        code = 2
        try:
            store = opened(rules)
            result = call(store, extra)
            store.check_invariants()
            code = int(isinstance(result, CapacityError))
            for part in ("host store of 1 tables (a)", "memory"):
                assert not code or part in str(result), result
        except BaseException:
            traceback.print_exc()
            code = 2
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert status in {0, 256}, (call.__name__, rules, extra, status)
    return status == 256

for call in (look_up, update):
    cases = [(call, rules, extra) for rules in (False, True) for extra in EXTRAS]
    print(call.__name__, sum(is_refused(*case) for case in cases))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits by /proc and RLIMIT_AS")
def test_no_memory_on_the_way_is_an_error_and_the_store_goes_on():
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    refused = dict(line.split() for line in done.stdout.splitlines())
    assert list(refused) == ["look_up", "update"]
    assert all(int(times) > 0 for times in refused.values()), refused

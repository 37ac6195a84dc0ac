"""Stores are asked by one thread while another trains, and go on in the child of a fork."""

import multiprocessing
import os
import threading

import pytest
import torch

from penstock.config import AdmitFrequent, Eviction, FeatureConfig, RowWiseAdagrad, TableConfig
from penstock.embedding import EmbeddingCollection
from penstock.embedding.host_store import HostStore
from penstock.embedding.retention import Clock
from penstock.embedding.store import PooledFeature, PooledGradient, PoolingPlan
from penstock.types import Jagged, KeyedJagged

PLAN = PoolingPlan((PooledFeature(0, 0, "sum", 0),), 8)
KEYS = torch.arange(40_000)
BATCH = KeyedJagged.pack({"f": Jagged.from_dense(KEYS)})
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def opened(threads=2):
    rules = {"admission": AdmitFrequent(min_count=2), "eviction": Eviction(ttl=3)}
    tables = [TableConfig(name=name, dim=8, **rules) for name in "ab"]
    return HostStore(tables, num_threads=threads)


def train(store, steps, first=0):
    for step in range(steps):
        keys = torch.randint(0, 1 << 20, (2000,), generator=torch.Generator().manual_seed(step))
        batch = KeyedJagged(("f",), keys, torch.arange(2001))
        store.advance(Clock(first + step))
        lookup = store.pooled_lookup(PLAN, batch, insert=True, out=torch.empty(2000, 8))
        part = PooledGradient(lookup, batch, torch.ones(2000, 8))
        store.apply_gradients(PLAN, [part], first + step)
        store.erase(0, keys[:100])


def test_questions_are_answered_while_another_thread_trains():
    store = opened()
    done = threading.Event()
    asked, failures = [0], []

    def ask():
        while not done.is_set():
            memory = store.memory()
            # Of one moment: with rows and slots of two, this would not add up.
            if memory.rows + memory.free_slots != memory.slot_capacity:
                failures.append(memory)
            store.num_rows(0), store.num_candidates(0), store.retention_state(0)
            if asked[0] % 20 == 0:
                store.check_invariants()
            store.counters()
            assert store._core.longest_probe() >= 0
            assert store._core.content_version > 0
            asked[0] += 1

    watcher = threading.Thread(target=ask)
    watcher.start()
    train(store, 60)
    done.set()
    watcher.join()
    assert asked[0] > 3
    assert not failures


def in_child(call):
    """What `call` returns in the child of a fork; it may not take half a minute."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def answer():
        torch.set_num_threads(1)  # torch's own threads are not in the child either
        queue.put(call())

    child = context.Process(target=answer)
    child.start()
    try:
        result = queue.get(timeout=30)
    finally:
        child.join(5)
        child.kill()
    return result


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("is_used", [False, True])
def test_a_child_goes_on_with_what_the_parent_had(threads, is_used):
    store = HostStore([TableConfig(name="a", dim=8)], num_threads=threads)
    if is_used:
        store.find_or_insert(0, KEYS)

    def go_on():
        found = int(store.find(0, KEYS).found.sum())
        more = KeyedJagged.pack({"f": Jagged.from_dense(KEYS + 20_000)})
        lookup = store.pooled_lookup(PLAN, more, insert=True, out=torch.empty(40_000, 8))
        store.apply_gradients(PLAN, [PooledGradient(lookup, more, torch.ones(40_000, 8))], 0)
        store.check_invariants()
        # And its own child.
        return found, store.num_rows(0), in_child(lambda: int(store.find(0, KEYS).found.sum()))

    assert in_child(go_on) == ((40_000, 60_000, 40_000) if is_used else (0, 40_000, 20_000))
    # The parent's is as it was.
    assert store.num_rows(0) == (40_000 if is_used else 0)
    store.find_or_insert(0, KEYS + 1)
    store.check_invariants()


def test_a_fork_waits_for_a_call_of_another_thread():
    """Many forks, so that most of them meet a call on its way."""
    store = opened()
    done = threading.Event()

    def keep_training():
        step = 0
        while not done.is_set():
            train(store, 1, step)
            step += 1

    trainer = threading.Thread(target=keep_training)
    trainer.start()
    try:
        for _ in range(15):
            pid = os.fork()
            if not pid:
                # No Python of other threads is there to be waited for; the store must not wait.
                status = 1
                try:
                    torch.set_num_threads(1)
                    store.find_or_insert(0, KEYS[:5000])
                    store.check_invariants()
                    status = 0
                finally:
                    os._exit(status)
            assert wait(pid) == 0
    finally:
        done.set()
        trainer.join()


def wait(pid):
    """Exit status of a child, which is killed after half a minute."""
    late = threading.Timer(30, os.kill, (pid, 9))
    late.start()
    status = os.waitpid(pid, 0)[1]
    late.cancel()
    return status


def test_workers_of_a_data_loader_may_look_up():
    tables = [TableConfig(name="t", dim=8, optimizer=RowWiseAdagrad())]
    embeddings = EmbeddingCollection(tables, [FeatureConfig(name="f", table="t")], num_threads=2)
    embeddings(BATCH).sum().backward()
    embeddings.apply_gradients()
    embeddings.eval()

    def read(keys):
        with torch.no_grad():
            return embeddings(KeyedJagged.pack({"f": Jagged.from_dense(torch.tensor(keys))}))

    loader = torch.utils.data.DataLoader(
        range(64), batch_size=8, num_workers=2, collate_fn=read, multiprocessing_context="fork",
        timeout=60,
    )  # fmt: skip
    assert torch.equal(torch.cat(list(loader)), read(list(range(64))))

"""Each allocation of the core fails once, in each verb: the store says so and is whole.

A library that is loaded first gives the core its `operator new`, which fails when it is told to.
"""

import os
import shutil
import subprocess
import sys

import pytest

NEW = r"""
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

static std::atomic<long> left{-1};

extern "C" void fail_at(long number) { left = number; }
extern "C" long still_left() { return left; }

static void* allocate(std::size_t size, std::size_t alignment, void* caller) {
  // What the binding needs to call the core is smaller; it may not throw there.
  Dl_info info;
  const bool counts = size >= 256 && left >= 0 && dladdr(caller, &info) &&
                      std::strstr(info.dli_fname, "/_core.");
  if (counts && left.fetch_sub(1) == 0) throw std::bad_alloc();
  if (alignment) size = (size + alignment - 1) / alignment * alignment;
  void* const memory = alignment ? std::aligned_alloc(alignment, size) : std::malloc(size);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void* operator new(std::size_t size) { return allocate(size, 0, __builtin_return_address(0)); }
void* operator new[](std::size_t size) { return allocate(size, 0, __builtin_return_address(0)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, std::size_t(alignment), __builtin_return_address(0));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
"""

SCRIPT = """
import ctypes, sys
import torch
from penstock.config import SGD, AdmitFrequent, Eviction, TableConfig
from penstock.embedding import retention
from penstock.embedding.host_store import HostStore
from penstock.embedding.retention import Clock
from penstock.embedding.store import (
    CURSOR_START, PooledFeature, PooledGradient, PoolingPlan, RowLayout, TableRows
)
from penstock.errors import CapacityError, PartialUpdateError
from penstock.types import KeyedJagged

new = ctypes.CDLL(sys.argv[1])
N = 1500
KEYS = torch.arange(N)
PLAN = PoolingPlan((PooledFeature(0, 0, "sum", 0),), 2)

def bag(keys):
    return KeyedJagged(("f",), keys, torch.tensor([0, len(keys)]))

def opened(kind):
    rules = {
        "none": {},
        "ttl": dict(eviction=Eviction(ttl=5)),
        "full": dict(eviction=Eviction(ttl=1000)),
        "counted": dict(
            admission=AdmitFrequent(min_count=2, half_life_steps=3), eviction=Eviction(ttl=5)
        ),
    }[kind]
    table = TableConfig(name="a", dim=2, optimizer=SGD(), **rules)
    if kind == "full":
        each = RowLayout.of(table).row_bytes + retention.ENTRY_BYTES
        table = table.model_copy(update={"max_bytes": 2000 * each})
    other = TableConfig(name="b", dim=2, optimizer=SGD(), **rules)
    store = HostStore([table, other], num_threads=2)
    store.advance(Clock(1))
    for _ in range(2):
        look_up(store, KEYS)
    return store

def look_up(store, keys):
    return store.pooled_lookup(PLAN, bag(keys), insert=True, out=torch.empty(1, 2))

def update(store):
    part = PooledGradient(look_up(store, KEYS), None, torch.ones(1, 2))
    store.erase(0, KEYS[:300])
    def call():
        store.apply_gradients(PLAN, [part], 1)
    return call

def norm(store):
    part = PooledGradient(look_up(store, KEYS), None, torch.ones(1, 2))
    store.erase(0, KEYS[:300])
    def call():
        store.gradient_norm(PLAN, [part], 2.0)
    return call

def read(store):
    found = look_up(store, torch.arange(40_000))
    return lambda: store.read_looked_up(found)

def assign(store):
    keys = torch.arange(1000, 2500)
    rows = TableRows(keys, torch.ones(len(keys), 2), torch.zeros(len(keys), 0))
    return lambda: store.insert_or_assign(0, rows)

def export(store):
    def call():
        cursor = CURSOR_START
        while len((part := store.export_batch(0, cursor, 400))[0].keys):
            cursor = part[1]
        store.export_candidates(0, CURSOR_START, 400)
    return call

VERBS = {
    "look_up": lambda store: lambda: look_up(store, torch.arange(1000, 3500)),
    "find": lambda store: lambda: store.find_or_insert(0, torch.arange(1000, 3500)),
    "update": update,
    "norm": norm,
    "read": read,
    "assign": assign,
    "erase": lambda store: lambda: store.erase(0, torch.arange(200, 1400)),
    "sweep": lambda store: lambda: store.advance(Clock(50)),
    "export": export,
}
for kind in ("none", "ttl", "full", "counted"):
    for verb, prepare in VERBS.items():
        number = failures = 0
        while True:
            store = opened(kind)
            call = prepare(store)
            new.fail_at(number)
            try:
                call()
            except CapacityError as error:
                failures += 1
                assert "memory" in str(error), error
            reached = new.still_left() < 0
            new.fail_at(-1)
            store.check_invariants()
            # And on, with as much memory as it likes.
            look_up(store, torch.arange(500, 4000))
            store.check_invariants()
            store.advance(Clock(100))
            store.check_invariants()
            if not reached:
                break
            number += max(1, number // 12)
        print(kind, verb, failures)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="loads a library by LD_PRELOAD")
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_each_allocation_may_fail(tmp_path):
    (tmp_path / "new.cc").write_text(NEW)
    library = tmp_path / "new.so"
    build = ["c++", "-std=c++20", "-O1", "-shared", "-fPIC", str(tmp_path / "new.cc")]
    subprocess.run([*build, "-o", str(library), "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(library)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "LD_PRELOAD": str(library)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 4 * 9
    failed = {(kind, verb): int(failures) for kind, verb, failures in lines}
    assert all(failed[kind, "look_up"] >= 5 for kind in ("none", "ttl", "full", "counted")), failed
    assert failed["none", "update"] >= 5
    assert failed["none", "norm"] >= 5
    assert failed["none", "read"] >= 1
    assert failed["ttl", "sweep"] >= 5

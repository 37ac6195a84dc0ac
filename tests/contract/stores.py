"""The stores that the contract suite runs on."""

import importlib.util

import pytest
import torch

from penstock.embedding.dict_store import DictStore
from penstock.embedding.host_store import HostStore

ON_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None


class OnCpu:
    """A GPU store whose answers come to the CPU."""

    def __init__(self, tables, **options):
        from penstock.embedding.gpu_store import GpuStore

        if not ON_GPU:
            # The interpreter copies the arenas at every launch.
            options = {"device": "cpu", "max_bytes": 1 << 21, **options}
        self.store = GpuStore(tables, poison=True, **options)

    @classmethod
    def around(cls, store):
        """The same for another store that lies on a GPU."""
        made = cls.__new__(cls)
        made.store = store
        return made

    def __getattr__(self, name):
        return getattr(self.store, name)

    def find(self, table, keys):
        return to_cpu(self.store.find(table, keys))

    def find_or_insert(self, table, keys):
        return to_cpu(self.store.find_or_insert(table, keys))

    def export_batch(self, table, cursor, max_rows):
        rows, after = self.store.export_batch(table, cursor, max_rows)
        return to_cpu(rows), after

    def export_candidates(self, table, cursor, max_keys):
        candidates, after = self.store.export_candidates(table, cursor, max_keys)
        return to_cpu(candidates), after

    def pooled_lookup(self, plan, batch, *, insert, out, **options):
        there = out.to(self.store.device)
        lookup = self.store.pooled_lookup(plan, batch, insert=insert, out=there, **options)
        out.copy_(there)
        return lookup


def to_cpu(parts):
    return type(parts)(*(None if part is None else part.cpu() for part in parts))


STORES = {
    "dict": DictStore,
    "host-1": lambda tables, **options: HostStore(tables, num_threads=1, **options),
    "host-3": lambda tables, **options: HostStore(tables, num_threads=3, **options),
    "host-generic": lambda tables, **options: HostStore(tables, most_isa="generic", **options),
    "host-avx2": lambda tables, **options: HostStore(tables, most_isa="avx2", **options),
    "gpu": OnCpu,
}


def is_slow(open_store):
    """Plain Python, or Triton's interpreter."""
    return open_store is DictStore or (open_store is OnCpu and not ON_GPU)


def skip_in_interpreter(open_store, what):
    """Leaves a case to the run on a GPU."""
    if open_store is OnCpu and not ON_GPU:
        pytest.skip(f"{what}: on a GPU alone, Triton's interpreter takes minutes")


WITHOUT_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


GPU = pytest.param("gpu", marks=WITHOUT_TRITON)


@pytest.fixture(params=[GPU if name == "gpu" else name for name in STORES])
def open_store(request):
    return STORES[request.param]

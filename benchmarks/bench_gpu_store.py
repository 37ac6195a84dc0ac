"""Look-up + backward + update of the GPU store beside a static table, and its index alone.

    python benchmarks/bench_gpu_store.py [--cases TEXT ...] [--no-index] [--json] [--check]

Needs a CUDA GPU. Tables are dynamic: every key is inserted before timing, and each step looks its
keys up in the index. Times are medians between CUDA events over steps that rotate among index sets.
Beside each case stand FBGEMM's figures for a static table of the same size without hashing (one
H200, recorded), the time in which a copy measured in this run moves the bytes that any
implementation must move, and torch's embedding_bag, measured in this run. Each case ends with its
kernels: time a step, and the time their own bytes would take.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable

import torch
from circumstances import commit, end_check
from gpu_cases import CASES, Case
from torch.profiler import ProfilerActivity, profile

from penstock.embedding.gpu_store import GpuStore
from penstock.embedding.store import PooledGradient
from penstock.kernels.index.find import Misses, find_slots
from penstock.kernels.index.index import Index, KeyBatch, prime_from
from penstock.kernels.plan import DevicePlan, FeatureOnDevice
from penstock.types import KeyedJagged

INDEX_SETS = 8
INDEX_KEYS = 512 << 20
FIND_GOALS = {0.5: 15.0, 0.9: 8.0}
INSERT_GOAL = 3.0
HIERARCHICAL_KV = {"find at 0.5": 7.29, "find at 0.9": 4.64, "insert": 2.38}
"""G keys/s of its pointer verbs on one H200; loads 0.5 and 1.0."""
COLD_KEYS = 10_000_000
DEVICE = torch.device("cuda")


def median_ms(run: Callable[[int], object], times: int, warm_up: int) -> float:
    """Median over `times` of the time between events around run(i)."""
    for i in range(warm_up):
        run(i)
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(times)
    ]
    for i, (begin, end) in enumerate(events):
        begin.record()
        run(i)
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)[times // 2]


def copy_tb_per_s() -> float:
    """Bytes read and written by a copy on the device."""
    source = torch.randn(1 << 29, device=DEVICE)
    target = torch.empty_like(source)
    ms = median_ms(lambda _: target.copy_(source), 16, 4)
    return 2 * source.nbytes / ms / 1e9


def filled_store(case: Case) -> GpuStore:
    """A store that holds every key of every table, inserted in random order."""
    store = GpuStore(case.table_configs(), device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(1)
    for table in range(case.tables):
        keys = torch.randperm(case.rows_of_table, generator=generator, device=DEVICE)
        for part in keys.split(1 << 20):
            store.find_or_insert(table, part)
    return store


class Step:
    """The steps of one case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.plan = case.plan()
        generator = torch.Generator(DEVICE).manual_seed(7)
        self.batches = [case.batch(generator) for _ in range(INDEX_SETS)]
        width = self.plan.stride
        self.out = torch.empty(case.batch_size, width, device=DEVICE)
        self.grad = torch.randn(case.batch_size, width, generator=generator, device=DEVICE)
        tables = torch.arange(case.tables, device=DEVICE)
        tables = tables.repeat_interleave(case.batch_size * case.bag) * case.rows_of_table
        self.flat = [batch.values + tables for batch in self.batches]
        self.num_unique = len(self.flat[0].unique())

    def forward(self, store: GpuStore, i: int, *, insert: bool) -> object:
        batch = self.batches[i % INDEX_SETS]
        return store.pooled_lookup(self.plan, batch, insert=insert, out=self.out)

    def train(self, store: GpuStore, i: int) -> None:
        lookup = self.forward(store, i, insert=True)
        gradient = PooledGradient(lookup, self.batches[i % INDEX_SETS], self.grad)
        store.apply_gradients(self.plan, [gradient], i)

    def least_bytes(self) -> tuple[int, int]:
        """Bytes of rows and vectors that any forward, and any step, must move."""
        case = self.case
        vectors = case.tables * case.batch_size * case.dim * 4
        row, state = case.dim * 4, case.state_dim * 4
        forward = self.num_unique * row + vectors
        return forward, forward + vectors + 2 * self.num_unique * (row + state)

    def kernel_bytes(self, kernel: str) -> int | None:
        """Bytes that one of our kernels must move in a step."""
        case, n, unique = self.case, self.case.num_keys, self.num_unique
        row = case.dim * 4
        vectors = case.tables * case.batch_size * row
        update = 2 * unique * (row + 4 * case.state_dim)
        return {
            "_find_kernel": n * (8 + 128 + 4),
            "_pool_kernel": n * 4 + unique * row + vectors,
            "_describe_kernel": n * (4 + 4 + 4),
            "_list_kernel": n * (4 + 8 + 4 + 4) + unique * 12,
            "_pieces_kernel": n * 4 + unique * 12 + vectors + update,
        }.get(kernel)


def kernel_times(run: Callable[[int], object], steps: int = 8) -> dict[str, float]:
    """Milliseconds a step of each kernel; sorting's are added up."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for i in range(steps):
            run(i)
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in trace.key_averages():
        if event.device_time_total <= 0:
            continue
        is_sort = "cub" in event.key or "sort" in event.key.lower()
        is_other = not event.key.startswith("_")
        name = "sort" if is_sort else "others" if is_other else event.key
        times[name] = times.get(name, 0.0) + event.device_time_total / steps / 1e3
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def torch_times(case: Case, step: Step) -> dict[str, float]:
    """embedding_bag on one static table of all rows: forward, and with a sparse gradient."""
    weight = torch.empty(case.rows, case.dim, device=DEVICE).uniform_(-0.01, 0.01)
    weight.requires_grad_(True)
    offsets = step.batches[0].offsets[:-1]
    grad = step.grad.view(case.batch_size, case.tables, case.dim).transpose(0, 1)
    grad = grad.reshape(-1, case.dim)

    def forward(i: int) -> torch.Tensor:
        keys = step.flat[i % INDEX_SETS]
        return torch.nn.functional.embedding_bag(keys, weight, offsets, mode="sum", sparse=True)

    def train(i: int) -> None:
        weight.grad = None
        forward(i).backward(grad)
        with torch.no_grad():
            weight.add_(weight.grad, alpha=-0.01)

    with torch.no_grad():
        forward_ms = median_ms(forward, 8, 2)
    return {"forward_ms": round(forward_ms, 3), "sgd_train_ms": round(median_ms(train, 4, 1), 3)}


def penstock_times(case: Case, step: Step, iterations: int) -> dict:
    store = filled_store(case)

    def train(i: int) -> None:
        step.train(store, i)

    forward = median_ms(lambda i: step.forward(store, i, insert=False), iterations, 16)
    return {"forward": forward, "train": median_ms(train, iterations, 16)}


def run_case(case: Case, iterations: int, tb_per_s: float) -> dict:
    """Times one case."""
    step = Step(case)
    times = penstock_times(case, step, iterations)
    train = times["train"]
    collect()
    limits = [size / tb_per_s / 1e9 for size in step.least_bytes()]
    return {
        "case": case.name,
        "look_ups": case.num_keys,
        "unique": step.num_unique,
        "forward_ms": round(times["forward"], 4),
        "train_ms": round(train, 4),
        "goal_ms": case.goal_ms,
        "fbgemm": case.fbgemm._asdict(),
        "speed_over_fbgemm": round(case.fbgemm.train_ms / train, 2),
        "byte_limit_ms": {"forward": round(limits[0], 4), "train": round(limits[1], 4)},
        "share_of_byte_limit": round(limits[1] / train, 2),
        "torch_embedding_bag": torch_times(case, step),
    }


def run_kernels(case: Case, tb_per_s: float) -> dict:
    """Times the kernels of one case; slows down every launch after it."""
    step = Step(case)
    store = filled_store(case)
    times = kernel_times(lambda i: step.train(store, i))
    return {
        name: {"ms": round(ms, 4), "limit_ms": kernel_limit(step, name, tb_per_s)}
        for name, ms in times.items()
    }


def kernel_limit(step: Step, kernel: str, tb_per_s: float) -> float | None:
    size = step.kernel_bytes(kernel)
    return None if size is None else round(size / tb_per_s / 1e9, 4)


def collect() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def one_table(keys: torch.Tensor) -> tuple[DevicePlan, KeyedJagged]:
    """Keys as one bag of one feature."""
    feature = FeatureOnDevice(0, 0, 0, 0, 0)
    plan = DevicePlan.make([feature], num_packed=1, stride=1, dim=1, device=DEVICE)
    offsets = torch.tensor([0, len(keys)], device=DEVICE)
    return plan, KeyedJagged(("f",), keys, offsets)


class NewKeys:
    """Keys that are not in an index."""

    def __init__(self, keys: torch.Tensor) -> None:
        self.batch = KeyBatch.of_table(keys, 0)
        number = torch.tensor([len(keys)], device=DEVICE)
        self.misses = Misses(torch.arange(len(keys), device=DEVICE), number)
        self.found = torch.empty(len(keys), dtype=torch.int32, device=DEVICE)
        self.counter = keys.new_zeros(1)

    def insert(self, index: Index) -> None:
        """Finds that they are not there, and inserts them with their ranks as payloads."""
        claims = index.claim(self.batch, self.misses, self.found, self.counter)
        index.settle(self.batch, self.misses, claims, claims.rank)


def index_rates(num_keys: int) -> list[dict]:
    """G keys/s of the index alone: 2 Mi random keys a call among `num_keys`, and 1 Mi new ones."""
    results = []
    chunk = 1 << 20
    absent = torch.full((1,), -1, dtype=torch.int32, device=DEVICE)
    for load, goal in FIND_GOALS.items():
        index = Index(DEVICE)
        index.entries = torch.zeros(8 * prime_from(int(num_keys / load) // 8), 2,
                                    dtype=torch.int64, device=DEVICE)  # fmt: skip
        scattered = 0x9E3779B97F4A7C15 - (1 << 64)
        present = num_keys - 16 * chunk if load == 0.5 else num_keys
        for first in range(0, present, 4 * chunk):
            last = min(first + 4 * chunk, present)
            NewKeys(torch.arange(first, last, device=DEVICE) * scattered).insert(index)
        if load == 0.5:
            news = [NewKeys(torch.arange(first, first + chunk, device=DEVICE) * scattered)
                    for first in range(present, num_keys, chunk)]  # fmt: skip
            # Each is new once; the last four warm up.
            for each in news[12:]:
                each.insert(index)
            ms = median_ms(lambda i, news=news, index=index: news[i].insert(index), 12, 0)
            results.append(rate("insert", chunk, ms, INSERT_GOAL))
        sets = [torch.randint(0, num_keys, (2 * chunk,), device=DEVICE) * scattered
                for _ in range(INDEX_SETS)]  # fmt: skip
        slots = torch.empty(2 * chunk, dtype=torch.int32, device=DEVICE)
        missing, counter = torch.empty_like(sets[0]), sets[0].new_zeros(1)
        asked = [one_table(keys) for keys in sets]
        view = index.view

        out = slots, Misses(missing, counter)

        def find(i, view=view, asked=asked, absent=absent, out=out):
            find_slots(view, *asked[i % INDEX_SETS], absent, *out)

        results.append(rate(f"find at {load}", 2 * chunk, median_ms(find, 32, 8), goal))
        assert int(counter) == 0, "a key that was inserted is missing"
        del index, view, sets, asked, find
        collect()
    return results


def rate(verb: str, keys: int, ms: float, goal: float) -> dict:
    return {
        "case": f"index, {verb}",
        "G_keys_per_s": round(keys / ms / 1e6, 2),
        "goal": goal,
        "hierarchical_kv": HIERARCHICAL_KV[verb],
    }


def cold_start() -> dict:
    """New keys inserted, initialised and looked up in one step; a first one compiles."""
    case = Case("cold", 1, COLD_KEYS, 1, 128, COLD_KEYS, CASES[0].optimizer, 0.0, False,
                CASES[0].fbgemm)  # fmt: skip
    times = []
    for _ in range(2):
        store, plan = GpuStore(case.table_configs(), device=DEVICE), case.plan()
        keys = torch.randperm(COLD_KEYS, device=DEVICE)
        offsets = torch.arange(COLD_KEYS + 1, device=DEVICE)
        batch = KeyedJagged(("f0",), keys, offsets, is_checked=True, is_one_hot=True)
        out = torch.empty(COLD_KEYS, 128, device=DEVICE)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        store.pooled_lookup(plan, batch, insert=True, out=out)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
        assert store.num_rows(0) == COLD_KEYS
        del store, out
        collect()
    return {"case": f"cold start, {COLD_KEYS} new keys, D=128", "ms": round(times[-1], 2)}


def misses(results: list[dict]) -> list[str]:
    """One line for each goal that is not reached."""
    lines = []
    for result in results:
        if result.get("goal_ms") and result["train_ms"] > result["goal_ms"]:
            lines.append(f"{result['case']}: {result['train_ms']} ms, goal {result['goal_ms']}")
        if "goal" in result and result["G_keys_per_s"] < result["goal"]:
            reached = result["G_keys_per_s"]
            lines.append(f"{result['case']}: {reached} G keys/s, goal {result['goal']}")
    return lines


def print_result(result: dict) -> None:
    if "train_ms" not in result:
        print("  ".join(f"{name} {value}" for name, value in result.items()), flush=True)
        return
    fbgemm, limit = result["fbgemm"], result["byte_limit_ms"]
    bag = result["torch_embedding_bag"]
    goal = "" if result["goal_ms"] is None else f", goal {result['goal_ms']:.2f}"
    print(
        f"{result['case']}: {result['look_ups']} look-ups, {result['unique']} unique\n"
        f"  forward {result['forward_ms']:.3f} ms (FBGEMM {fbgemm['forward_ms']:.3f}, "
        f"bytes {limit['forward']:.3f}, embedding_bag {bag['forward_ms']:.3f})\n"
        f"  train   {result['train_ms']:.3f} ms (FBGEMM {fbgemm['train_ms']:.3f}, "
        f"bytes {limit['train']:.3f}, embedding_bag with SGD {bag['sgd_train_ms']:.3f}{goal}): "
        f"{result['speed_over_fbgemm']:.2f} x FBGEMM, {result['share_of_byte_limit']:.0%} of bytes"
    )
    for name, kernel in result["kernels"].items():
        bytes_ms = kernel["limit_ms"]
        own = "" if bytes_ms is None else f"  (bytes {bytes_ms:.4f})"
        print(f"    {name:<24} {kernel['ms']:.4f} ms{own}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", help="only cases whose name has one of these in it")
    parser.add_argument("--goals", action="store_true", help="only cases with a goal")
    parser.add_argument("--no-index", action="store_true", help="without the index and cold start")
    parser.add_argument("--iterations", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="one JSON object a case")
    parser.add_argument("--check", action="store_true", help="exit 1 if a case misses its goal")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_gpu_store.py needs a CUDA GPU")
    tb_per_s = copy_tb_per_s()
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {tb_per_s:.2f} TB/s"
    print(machine, file=sys.stderr)
    results = []

    def record(result: dict) -> None:
        results.append(result)
        if arguments.json:
            print(json.dumps({**result, "commit": commit(), "hardware": machine}), flush=True)
        else:
            print_result(result)

    cases = [
        case
        for case in CASES
        if (not arguments.cases or any(part in case.name for part in arguments.cases))
        and (case.goal_ms is not None or not arguments.goals)
    ]
    timed = []
    for case in cases:
        timed.append(run_case(case, arguments.iterations, tb_per_s))
        collect()
    for case, result in zip(cases, timed, strict=True):
        record({**result, "kernels": run_kernels(case, tb_per_s)})
        collect()
    if not arguments.no_index:
        for result in index_rates(INDEX_KEYS):
            record(result)
        record(cold_start())
    if arguments.check:
        end_check(misses(results))


if __name__ == "__main__":
    main()

"""The loader beside pyarrow alone: rows of a Criteo log to batches, against decoding its columns.

    python benchmarks/bench_loader.py [--file LOG.parquet] [--json] [--check]

1 M rows of label, I1..I13 (integers with blanks) and C1..C26 (64-bit ids, as many different ones
as the Criteo log has, Zipf 1.1, some blank), made here unless --file names a log of that shape.
Ours: logarithm of the numbers, blanks filled, batches of torch tensors, in order and shuffled
(default block). pyarrow: the same columns decoded to Arrow arrays, nothing else, by as many
threads as our readers, each reading row groups of its own (it is faster so than with
`use_threads`). Both take turns; the figure is the median of the turns' ratios.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from circumstances import commit, hardware

from penstock.config import parse_job
from penstock.data import Dataset

GOAL = 0.6
BATCH_SIZES = (1024, 4096, 8192)
NUMERIC, CATEGORICAL = 13, 26
# Different ids of each column of the Criteo Kaggle log.
CARDINALITIES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
# Share of rows where a column is blank, roughly as there.
BLANK_NUMERIC = (0.45, 0, 0.21, 0.22, 0.03, 0.22, 0.04, 0, 0.04, 0.45, 0.04, 0.76, 0.22)
BLANK_CATEGORICAL = {3: 0.03, 4: 0.03, 6: 0.12, 16: 0.03, 19: 0.44, 20: 0.44, 22: 0.76, 25: 0.44}


def write_log(path: Path, rows: int, seed: int = 0) -> None:
    """Writes a log of Criteo's shape: row groups of 64 k rows, Snappy, as most writers do."""
    rng = np.random.default_rng(seed)

    def column(values: np.ndarray, blank: float) -> pa.Array:
        return pa.array(values, mask=rng.random(rows) < blank if blank else None)

    columns = {"label": pa.array(rng.integers(0, 2, rows), pa.int64())}
    for number, blank in enumerate(BLANK_NUMERIC):
        columns[f"I{number + 1}"] = column(np.exp(rng.normal(2, 2, rows)).astype(np.int64), blank)
    for number, cardinality in enumerate(CARDINALITIES):
        # Inverse of a power law's distribution function; the ids are spread over 64 bits.
        u = rng.random(rows)
        rank = ((u * (cardinality**-0.1 - 1) + 1) ** -10).astype(np.uint64)
        ids = (rank * np.uint64(0x9E3779B97F4A7C15) + np.uint64(number)).view(np.int64)
        columns[f"C{number + 1}"] = column(ids, BLANK_CATEGORICAL.get(number + 1, 0.0))
    pq.write_table(pa.table(columns), path, row_group_size=65_536)


def open_log(path: Path, threads: int) -> Dataset:
    """The data of jobs/criteo.yaml, nothing held out."""
    return Dataset.open(
        parse_job({
            "data": {
                "source": {"format": "parquet", "path": str(path)},
                "label": {"column": "label"},
                "numeric": [{"columns": ["I*"], "transforms": [{"kind": "log"}]}],
            },
            "run": {"reader_threads": threads},
            "features": [{"columns": ["C*"], "missing": -1}],
        })
    )


def time_loader(dataset: Dataset, batch_size: int, shuffle: bool) -> float:
    """Seconds of one epoch."""
    begin = time.perf_counter()
    with dataset.batches(
        "train", batch_size=batch_size, shuffle=None if shuffle else False
    ) as all_:
        rows = sum(batch.batch_size for batch in all_)
    assert rows == dataset.num_rows("train")
    return time.perf_counter() - begin


def time_pyarrow(path: Path, columns: list[str], threads: int) -> float:
    """Seconds to decode the columns of every row group, in batches of pyarrow's default size."""
    footer = pq.read_metadata(path)

    def decode(group: int) -> int:
        with pq.ParquetFile(path, metadata=footer) as file:
            batches = file.iter_batches(row_groups=[group], columns=columns, use_threads=False)
            return sum(batch.num_rows for batch in batches)

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        rows = sum(pool.map(decode, range(footer.num_row_groups)))
    assert rows == footer.num_rows
    return time.perf_counter() - begin


def run_cases(path: Path, threads: int, turns: int) -> list[dict]:
    """Times every case against pyarrow, in turns."""
    dataset = open_log(path, threads)
    rows = dataset.num_rows("train")
    columns = ["label", *dataset.numeric, *(feature.name for feature in dataset.features)]
    cases = [(size, shuffle) for size in BATCH_SIZES for shuffle in (False, True)]
    time_pyarrow(path, columns, threads)
    time_loader(dataset, 4096, True)
    ours: dict[tuple[int, bool], list[float]] = {case: [] for case in cases}
    theirs: dict[tuple[int, bool], list[float]] = {case: [] for case in cases}
    for _ in range(turns):
        for case in cases:
            # Before and after, so that a neighbour that comes or goes meets both.
            before = time_pyarrow(path, columns, threads)
            ours[case].append(time_loader(dataset, *case))
            theirs[case].append((before + time_pyarrow(path, columns, threads)) / 2)
    results = []
    for case in cases:
        ratios = [other / own for own, other in zip(ours[case], theirs[case], strict=True)]
        results.append({
            "case": f"B{case[0]} {'shuffled' if case[1] else 'in order'}",
            "batch_size": case[0],
            "shuffled": case[1],
            "samples_per_s": round(rows / float(np.median(ours[case]))),
            "samples_per_s_range": [round(rows / f(ours[case])) for f in (max, min)],
            "pyarrow_samples_per_s": round(rows / float(np.median(theirs[case]))),
            "ratio": round(float(np.median(ratios)), 3),
            "ratio_range": [round(float(f(ratios)), 3) for f in (min, max)],
            "threads": threads,
            "rows": rows,
            "turns": turns,
        })
    return results


def machine() -> str:
    """Processor, cores and pyarrow of this run."""
    return hardware(f"pyarrow {pa.__version__}")


def print_table(results: list[dict]) -> None:
    print(f"{machine()}; {results[0]['threads']} threads; thousand samples/s (lowest - highest)")
    for result in results:
        low, high = (rate / 1e3 for rate in result["samples_per_s_range"])
        print(
            f"{result['case']:>15} {result['samples_per_s'] / 1e3:7.0f} ({low:.0f}-{high:.0f})"
            f"   pyarrow {result['pyarrow_samples_per_s'] / 1e3:7.0f}"
            f"   ratio {result['ratio']:.2f} ({result['ratio_range'][0]:.2f}-"
            f"{result['ratio_range'][1]:.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, help="Parquet of label, I*, C*; default: made here")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the file made here")
    parser.add_argument("--json", action="store_true", help="one JSON object a case")
    parser.add_argument("--check", action="store_true", help="exit 1 if a case misses its goal")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="readers, ours and pyarrow's")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.file or Path(folder) / "log.parquet"
        if arguments.file is None:
            write_log(path, arguments.rows)
        results = run_cases(path, arguments.threads, arguments.turns)
    if arguments.json:
        context = {"commit": commit(), "hardware": machine()}
        for result in results:
            print(json.dumps({**result, **context}))
    else:
        print_table(results)
    if arguments.check:
        missed = [
            f"{result['case']}: {result['ratio']} of pyarrow, goal {GOAL}"
            for result in results
            if result["ratio"] < GOAL
        ]
        print("\n".join(missed) or "all goals reached", file=sys.stderr)
        sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()

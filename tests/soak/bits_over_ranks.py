"""Whole deterministic runs on several numbers of ranks: have all of them the same bits?

    python -m tests.soak.bits_over_ranks [--steps 200] [--ranks 1 2 3 4] [--device cpu]
    python -m tests.soak.bits_over_ranks --reshard
    python -m tests.soak.bits_over_ranks --kills 20 [--seed 1]
    python -m tests.soak.bits_over_ranks --job jobs/criteo.yaml [--set A.B=VALUE] --ranks 1 2 3

The first: SGD, Adagrad and Adam, with and without admission and eviction, on data whose keys span
int64, come several times in a batch and on several ranks, in lanes of which some are empty. The
second changes the number of ranks on the way (4, 3, 1, 2). The third kills a rank at a random
moment, waits until all are gone, looks for what they left (processes, which alone hold ports,
temporary files, shared memory), and goes on; in the end the bits are those of the run that nobody
killed. The last compares any job. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from penstock.training.checkpoint.checkpoint import latest_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from run_contents import contents, differences  # noqa: E402

BINARY = str(Path(sys.executable).with_name("penstock"))
LIMIT_S = 15
RULES = {
    "sgd": {"kind": "sgd", "learning_rate": 0.1},
    "adagrad": {"kind": "adagrad"},
    "adam": {"kind": "adam", "learning_rate": 0.01},
}
KEEPING = {
    "admission": {"kind": "min_count", "min_count": 2},
    "eviction": {"ttl": 40, "unit": "steps"},
}


def write_data(folder: Path) -> None:
    """Five files for eight lanes."""
    rng = np.random.default_rng(3)
    taste = rng.normal(size=400)
    ends = np.iinfo(np.int64)
    for number in range(5):
        n = 2_000 - 350 * number
        keys = rng.zipf(1.2, (n, 3)) % 400
        likes = rng.random(n) < 1 / (1 + np.exp(-taste[keys].sum(1)))
        columns = {
            "label": likes.astype(np.int64),
            "n0": rng.random(n, dtype=np.float32),
            "k0": ends.min + keys[:, 0],
            "k1": ends.max - keys[:, 1],
            "k2": keys[:, 2],
        }
        pq.write_table(pa.table(columns), folder / f"{number}.parquet")


def fields_of(folder: Path, rule: str, *, keeps: bool, steps: int) -> dict[str, object]:
    """A job that trains for some steps."""
    table = {"dim": 6, "optimizer": RULES[rule], **(KEEPING if keeps else {})}
    return {
        "data": {
            "source": {"format": "parquet", "path": str(folder / "*.parquet")},
            "split": {"by": "fraction", "evaluation": 0.1},
            "label": {"column": "label"},
            "numeric": [{"columns": ["n0"]}],
            "shuffle": {"block_rows": 1024},
        },
        "features": [
            {"columns": ["k0"], "table": "both"},
            {"columns": ["k1"], "table": "both"},
            {"columns": ["k2"]},
        ],
        "tables": [{"name": "both", **table}],
        "table_defaults": table,
        "model": {"kind": "dlrm", "bottom": [8], "top": [16], "dropout": 0.1},
        "training": {"batch_size": 64, "epochs": 9, "max_steps": steps, "deterministic": True},
        "checkpoint": {"every_steps": 10},
    }


def start(job: Path, out: Path, ranks: int, *more: str) -> subprocess.Popen[str]:
    """Begins a run, whose temporary files are beside it."""
    command = [BINARY, "train", str(job), "--out", str(out), "--nproc", str(ranks), *more]
    temporary = out.with_name("tmp")
    temporary.mkdir(exist_ok=True)
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(job: Path, out: Path, ranks: int, *more: str) -> None:
    """Runs to the end; AssertionError with what it says, if it fails."""
    process = start(job, out, ranks, *more)
    _, errors = process.communicate(timeout=3600)
    assert process.returncode == 0, errors


def left_behind(out: Path, shared_before: set[Path]) -> list[str]:
    """What a run has left: processes, temporary files, shared memory that nobody maps."""
    temporary, found, mapped = out.with_name("tmp"), [], ""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            mapped += (folder / "maps").read_text()
        except OSError:
            continue
        if f"TMPDIR={temporary}".encode() in variables:
            found.append(f"process {folder.name}")
    found += [str(path) for path in temporary.iterdir()]
    new = set(Path("/dev/shm").iterdir()) - shared_before
    return found + [str(path) for path in new if str(path) not in mapped]


def of_ranks(launcher: int) -> list[int]:
    """Process numbers of what a launcher has started."""
    task = Path(f"/proc/{launcher}/task/{launcher}/children")
    try:
        return [int(one) for one in task.read_text().split()]
    except OSError:
        return []


def matrix(folder: Path, ranks: list[int], steps: int, device: str) -> dict[str, object]:
    """Every rule, with and without admission and eviction, on every number of ranks."""
    agreed = 0
    for rule in RULES:
        for keeps in (False, True):
            job = folder / f"{rule}-{keeps}.yaml"
            fields = fields_of(folder / "data", rule, keeps=keeps, steps=steps)
            job.write_text(yaml.safe_dump({**fields, "run": {"device": device}}))
            found = []
            for number in ranks:
                out = folder / f"{rule}-{keeps}-{number}"
                train(job, out, number)
                found.append(contents(out))
            for number, other in zip(ranks[1:], found[1:], strict=True):
                unlike = differences(found[0], other)
                assert not unlike, f"{rule}, {keeps}, {number} ranks: {unlike[:5]}"
                agreed += 1
            print(f"{rule}, admission and eviction {keeps}: {ranks} agree", flush=True)
    return {"comparisons": agreed, "steps": steps, "ranks": ranks, "device": device}


def same_job(folder: Path, job: Path, ranks: list[int], sets: list[str]) -> dict[str, object]:
    """Any job on every number of ranks."""
    more = [part for one in [*sets, "training.deterministic=true"] for part in ("--set", one)]
    found = []
    for number in ranks:
        train(job, folder / str(number), number, *more)
        found.append(contents(folder / str(number)))
        print(f"{job.name}: {number} ranks, step {found[-1]['step']}", flush=True)
        unlike = differences(found[0], found[-1])
        assert not unlike, f"{number} ranks: {unlike[:5]}"
    return {"job": job.name, "sets": sets, "steps": found[0]["step"], "ranks": ranks}


def without_lines(out: Path) -> dict[str, object]:
    """What a run computed, but for what it logged where it stopped."""
    found = contents(out)
    del found["lines"]
    return found


def reshard(folder: Path, steps: int) -> dict[str, object]:
    """The number of ranks changes on the way."""
    job = folder / "job.yaml"
    fields = fields_of(folder / "data", "adam", keeps=True, steps=steps)
    job.write_text(yaml.safe_dump(fields))
    train(job, folder / "whole", 1)
    order = (4, 3, 1, 2)
    for place, ranks in enumerate(order, 1):
        stop = steps * place // len(order)
        more = ["--resume"] if place > 1 else []
        train(job, folder / "run", ranks, "--set", f"training.max_steps={stop}", *more)
    unlike = differences(without_lines(folder / "whole"), without_lines(folder / "run"))
    assert not unlike, unlike[:5]
    return {"ranks": order, "steps": steps}


def kills(folder: Path, number: int, steps: int, seed: int) -> dict[str, object]:
    """A rank is killed again and again."""
    rng = random.Random(seed)
    job = folder / "job.yaml"
    fields = fields_of(folder / "data", "adam", keeps=True, steps=steps)
    job.write_text(yaml.safe_dump(fields))
    began = time.monotonic()
    train(job, folder / "whole", 2)
    whole_s = time.monotonic() - began
    done, longest, runs = 0, 0.0, 0
    shared = set(Path("/dev/shm").iterdir())
    while done < number:
        out, is_new = folder / f"run-{runs}", True
        runs += 1
        while True:
            process = start(job, out, rng.choice((2, 3)), *([] if is_new else ["--resume"]))
            try:
                process.wait(rng.uniform(0.3, 1.0) * whole_s if done < number else None)
            except subprocess.TimeoutExpired:
                ranks = of_ranks(process.pid)
                if ranks:
                    os.kill(rng.choice(ranks), signal.SIGKILL)
                    began = time.monotonic()
                    process.communicate(timeout=60)
                    longest = max(longest, time.monotonic() - began)
                    assert longest < LIMIT_S, f"all gone only after {longest:.1f} s"
                    assert not any(Path(f"/proc/{one}").exists() for one in ranks)
                    left = left_behind(out, shared)
                    assert not left, left
                    done += 1
                is_new = latest_checkpoint(out / "checkpoints") is None
                if is_new and out.exists():
                    subprocess.run(["rm", "-r", str(out)], check=True)
                continue
            _, errors = process.communicate()
            assert process.returncode == 0, errors
            break
        unlike = differences(without_lines(folder / "whole"), without_lines(out))
        assert not unlike, unlike[:5]
        print(f"{done} of {number} kills, {runs} runs with the same bits", flush=True)
    return {"kills": done, "runs": runs, "longest_s": round(longest, 2), "seed": seed}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reshard", action="store_true")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--job", type=Path)
    parser.add_argument("--set", action="append", default=[], help="field=value of the job")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        write_data(folder / "data")
        if options.job is not None:
            result = same_job(folder, options.job, options.ranks, options.set)
        elif options.reshard:
            result = reshard(folder, options.steps)
        elif options.kills:
            result = kills(folder, options.kills, options.steps, options.seed)
        else:
            result = matrix(folder, options.ranks, options.steps, options.device)
    print(json.dumps({"soak": "bits_over_ranks", "outcome": "the same bits", **result}))


if __name__ == "__main__":
    main()

"""AUC of the recipes beside the same network over nn.EmbeddingBag and torch's optimizers.

    python benchmarks/bench_quality.py [--criteo FILE] [--movielens FILE] [--json] [--check]

Each recipe of jobs/ runs as `penstock train` does, with seeds 0, 1 and 2 (of initial weights and
order of the batches), and so do its two twins on the same batches from the same initial weights:
`sparse_adam` updates the rows that a batch touches (nn.EmbeddingBag(sparse=True) and
torch.optim.SparseAdam), `dense_adam` all rows in every step (torch.optim.Adam), as a plain torch
DLRM does.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

from circumstances import commit, end_check
from embedding_bag_twin import Twin, keys_of
from rich.console import Console

from penstock.config import Job
from penstock.data.dataset import Dataset
from penstock.job_file import load_job
from penstock.report.environment import hardware, versions
from penstock.run import train

JOBS = Path(__file__).resolve().parents[1] / "jobs"
TWINS = {"sparse_adam": True, "dense_adam": False}
"""By name: whether its gradients are sparse."""
RECIPES = {
    "criteo": ("criteo", "criteo_deepfm", "criteo_wide_deep"),
    "movielens": ("movielens",),
}
"""By the data that they read."""
LOWEST_AUC = dict.fromkeys(RECIPES["criteo"], 0.715)
MOST_BELOW_A_TWIN = 0.003


def penstock_auc(job: Job) -> float:
    """AUC in summary.json of a whole run of the product."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train(job, out, console=Console(file=io.StringIO()))
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return float(summary["auc"])


def run_case(recipe: str, path: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Trains one recipe with one seed, and its twins."""
    job = load_job(
        JOBS / f"{recipe}.yaml",
        [*overrides, f"data.source.path={path}", f"training.seed={seed}"],
    )
    dataset = Dataset.open(job)
    keys = keys_of(dataset)
    result: dict[str, Any] = {
        "case": f"{recipe} seed {seed}",
        "recipe": recipe,
        "seed": seed,
        "penstock": round(penstock_auc(job), 5),
    }
    for name, sparse in TWINS.items():
        twin = Twin(job, dataset, keys, sparse=sparse)
        deque(twin.train(), maxlen=0)
        result[name] = round(twin.auc(), 5)
        result[f"over_{name}"] = round(result["penstock"] - result[name], 5)
    return result


def misses(results: list[dict[str, Any]]) -> list[str]:
    """One line for each goal that a case does not reach."""
    lines = []
    for result in results:
        lowest = LOWEST_AUC.get(result["recipe"])
        if lowest is not None and not result["penstock"] >= lowest:
            lines.append(f"{result['case']}: AUC {result['penstock']:.4f}, goal {lowest}")
        for twin in TWINS:
            over = result[f"over_{twin}"]
            if not over >= -MOST_BELOW_A_TWIN:
                lines.append(
                    f"{result['case']}: {over:+.4f} AUC over {twin}, goal {-MOST_BELOW_A_TWIN:+}"
                )
    return lines


def print_table(results: list[dict[str, Any]]) -> None:
    machine = hardware()
    print(f"AUC on the held-out part; {machine['cpu']}, {machine['cores']} cores")
    over = "".join(f"  over {twin:>11}" for twin in TWINS)
    print(f"{'case':<25} {'penstock':>9}" + "".join(f" {twin:>12}" for twin in TWINS) + over)
    for result in results:
        twins = "".join(f" {result[twin]:>12.4f}" for twin in TWINS)
        over = "".join(f" {result[f'over_{twin}']:>+17.4f}" for twin in TWINS)
        print(f"{result['case']:<25} {result['penstock']:>9.4f}{twins}{over}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--criteo", type=Path, metavar="FILE", help="Parquet of jobs/criteo*.yaml")
    parser.add_argument(
        "--movielens", type=Path, metavar="FILE", help="Parquet of jobs/movielens.yaml"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a case")
    parser.add_argument("--check", action="store_true", help="exit 1 if a case misses its goal")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides")
    arguments = parser.parse_args()
    paths = {name: getattr(arguments, name) for name in ("criteo", "movielens")}
    cases = [
        (recipe, path, seed)
        for data, path in paths.items()
        if path is not None
        for recipe in RECIPES[data]
        for seed in arguments.seeds
    ]
    if not cases:
        parser.error("nothing to measure: give --criteo FILE, --movielens FILE or both")
    results = []
    for recipe, path, seed in cases:
        results.append(run_case(recipe, path, seed, arguments.overrides))
        if arguments.json:
            facts = {"commit": commit(), "hardware": hardware(), "versions": versions()}
            print(json.dumps({**results[-1], **facts}), flush=True)
    if not arguments.json:
        print_table(results)
    if arguments.check:
        end_check(misses(results))


if __name__ == "__main__":
    main()

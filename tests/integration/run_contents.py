"""All that a run computed, in a form that can be compared bit for bit."""

import json

import torch

from penstock.embedding.durable_files import read_tensors
from penstock.events.registry import KINDS
from penstock.training.checkpoint.checkpoint import read_manifest
from penstock.training.trained import newest_of_run

# Seconds and rates are of the machine, not of the run.
MEASURED = {"seconds", "samples_per_s", "time_s"}


def contents(out):
    """Reads a run folder: tables by key, dense weights, optimizer, random state, metrics."""
    checkpoint = newest_of_run(out)
    manifest = read_manifest(checkpoint)
    tables = {}
    for table in manifest.tables:
        shards = [read_tensors(checkpoint / shard) for shard in table.shards]
        whole = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
        order = whole["keys"].argsort()
        tables[table.name] = {name: column[order] for name, column in whole.items()}
    # What happened to a process is not of the run either.
    lines = [
        {name: value for name, value in line.items() if name not in MEASURED}
        for line in map(json.loads, (out / "metrics.jsonl").read_text("utf-8").splitlines())
        if KINDS[line["kind"]].is_computed
    ]
    return {
        "step": manifest.step,
        "collection_step": manifest.collection_step,
        "position": manifest.position,
        "row_clock": manifest.row_clock,
        "best": manifest.best,
        "tables": tables,
        "dense": read_tensors(checkpoint / "dense.safetensors"),
        "optimizer": manifest.optimizer,
        "optimizer_tensors": read_tensors(checkpoint / "optimizer.safetensors"),
        "window": read_tensors(checkpoint / "metrics.safetensors"),
        "random": (checkpoint / "random.json").read_text(encoding="utf-8"),
        "lines": lines,
        "quarantine": _words(out / "quarantine.jsonl"),
    }


def _words(path):
    return path.read_text(encoding="utf-8") if path.exists() else ""


def bits(tensor):
    """Its bytes; numpy knows no bfloat16."""
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def differences(left, right, path=""):
    """Paths at which two trees of tensors and plain values are not the same bits."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = (left.dtype, left.shape) == (right.dtype, right.shape)
        return [] if same and bits(left) == bits(right) else [path]
    if isinstance(left, dict) and isinstance(right, dict) and set(left) == set(right):
        return [bad for key in left for bad in differences(left[key], right[key], f"{path}/{key}")]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [bad for i, pair in pairs for bad in differences(*pair, f"{path}/{i}")]
    return [] if left == right else [path]

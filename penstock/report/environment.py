"""What a run ran on: versions and hardware, for its summary."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib import metadata
from pathlib import Path

import torch

import penstock
from penstock.embedding.collection.collection import available_cores


def versions() -> dict[str, str]:
    """Versions of Penstock, Python and the libraries that decide a run's numbers."""
    found = {"penstock": penstock.__version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in ("torch", "numpy", "pyarrow")}


def hardware() -> dict[str, str | int]:
    """CPU model, usable cores, and memory of the machine in bytes; the GPU where one is in use."""
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    found: dict[str, str | int] = {"cpu": _cpu_model(), "cores": available_cores()}
    found["memory_bytes"] = pages * page_bytes
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["gpu"] = torch.cuda.get_device_name()
    return found


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _cpu_model() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

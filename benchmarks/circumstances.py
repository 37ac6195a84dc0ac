"""What a recorded result was measured on, and how a check of goals ends."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path


def hardware(library: str) -> str:
    """Processor and cores of this run, and the library named, with its version."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {library}"


def commit() -> str:
    """The checkout's commit, with a mark if files differ from it."""
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=10",
    ]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def end_check(missed: list[str]) -> None:
    """Ends the program: 1 and a line for each case that misses its goal, or 0."""
    print("\n".join(missed) or "all goals reached", file=sys.stderr)
    sys.exit(1 if missed else 0)

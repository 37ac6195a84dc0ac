"""C++ parts of the benchmarks, compiled when they run."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
CORE = FOLDER.parent / "csrc"


def compile_library(*sources: str) -> ctypes.CDLL:
    """Sources of this folder, or of the core, as a library for this machine; needs `c++`."""
    flags = ["-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread", f"-I{CORE}"]
    paths = [next(p for p in (FOLDER / name, CORE / name) if p.exists()) for name in sources]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        subprocess.run(["c++", *flags, *map(str, paths), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))

"""Builds the core with sanitizers and runs the tests of stores, columns and files on it.

    python -m tests.sanitizers.run [--short] [address|thread ...] [-- pytest arguments]

Each sanitizer has a build folder of its own under build/sanitize; the installed core stays as it
is. Prints a JSON line for each: what ran, for how long, and how many reports there were. Exits 1
if a test failed or a sanitizer reported anything; the reports are printed.

numpy, torch and Arrow are not instrumented: what is checked is the core and the memory that it is
given. Leaks are not: the interpreter and torch keep memory to the end.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPRESSIONS = Path(__file__).with_name("thread.supp")
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
# Allocations that must fail fail as they do without a sanitizer.
OPTIONS = {
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    "thread": {
        "TSAN_OPTIONS": f"allocator_may_return_null=1:halt_on_error=0:suppressions={SUPPRESSIONS}"
    },
}
STORES = [
    "tests/contract",
    "tests/fuzz/test_key_streams.py",
    "tests/unit/data/test_bad_input.py",
    "tests/unit/embedding/test_collection.py",
    "tests/unit/core/test_gradient_sums.py",
    "tests/unit/embedding/test_key_weights.py",
    "tests/unit/embedding/test_optimizer_reference.py",
    "tests/unit/embedding/test_rounding.py",
    "tests/unit/core/test_row_places.py",
]
FILES = [
    "tests/fuzz/test_files.py",
    "tests/unit/data/test_columns.py",
    "tests/unit/data/test_dataset.py",
    "tests/unit/data/test_group_columns.py",
]
TESTS = {"address": STORES + FILES, "thread": STORES + FILES}
SHORT = {
    "address": [
        "tests/contract/test_long_lookups.py",
        "tests/fuzz/test_files.py",
        "tests/unit/data/test_columns.py",
        "tests/unit/core/test_gradient_sums.py",
        "tests/unit/core/test_row_places.py",
    ],
    "thread": [
        "tests/contract/test_long_lookups.py",
        "tests/unit/core/test_row_places.py",
    ],
}


def build(sanitizer: str, is_short: bool) -> Path:
    """Builds the core; the file of the module."""
    folder = ROOT / "build" / "sanitize" / (sanitizer + ("-short" if is_short else ""))
    command = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja"]
    options = {
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",
        "PENSTOCK_SANITIZE": sanitizer,
        "PENSTOCK_FEW_KERNELS": "ON" if is_short else "OFF",
        "Python_EXECUTABLE": sys.executable,
    }
    command += [f"-D{name}={value}" for name, value in options.items()]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for step in (command, ["cmake", "--build", folder]):
        subprocess.run(
            step, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PATH": path}
        )
    (module,) = folder.glob("_core*.so")
    return module


def run(sanitizer: str, is_short: bool, arguments: list[str]) -> dict:
    """Runs the tests on a core with this sanitizer; prints reports, returns what is recorded."""
    began = time.monotonic()
    core = build(sanitizer, is_short)
    built = time.monotonic()
    reports = core.parent / "reports"
    reports.mkdir(exist_ok=True)
    for old in reports.iterdir():
        old.unlink()
    library = subprocess.run(
        ["gcc", f"-print-file-name={LIBRARIES[sanitizer]}"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    options = {
        name: f"{value}:log_path={reports / name.lower()}"
        for name, value in OPTIONS[sanitizer].items()
    }
    results = reports / "tests.xml"
    tests = arguments or [*(SHORT if is_short else TESTS)[sanitizer], "-k", "not gpu"]
    # The number of processes is the caller's: two cores make little of more.
    command = [sys.executable, "-m", "pytest", "-p", "tests.sanitizers.tested_core", *tests]
    done = subprocess.run(
        [*command, f"--junitxml={results}"],
        check=False,
        cwd=ROOT,
        env={
            **os.environ,
            **options,
            "LD_PRELOAD": library,
            "OMP_NUM_THREADS": "1",
            "PENSTOCK_CORE": str(core),
        },
    )
    found = sorted(set(reports.iterdir()) - {results})
    for report in found:
        print(report.read_text(encoding="utf-8", errors="replace"))
    return {
        "sanitizer": sanitizer,
        "short": is_short,
        "build_seconds": round(built - began),
        "test_seconds": round(time.monotonic() - built),
        "reports": len(found),
        "exit_code": done.returncode,
        **counts(results),
    }


def counts(results: Path) -> dict[str, int]:
    """Tests, failures, errors and skipped ones of a run."""
    if not results.exists():
        return {"tests": 0}
    (suite,) = ElementTree.parse(results).getroot().iter("testsuite")
    return {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sanitizers", nargs="*", metavar="address|thread")
    parser.add_argument("--short", action="store_true", help="what CI has time for")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:cut])
    if unknown := set(options.sanitizers) - set(LIBRARIES):
        parser.error(f"no sanitizer {sorted(unknown)}; there are {sorted(LIBRARIES)}")
    recorded = [
        run(sanitizer, options.short, given[cut + 1 :])
        for sanitizer in options.sanitizers or LIBRARIES
    ]
    for each in recorded:
        print(json.dumps(each))
    sys.exit(any(each["exit_code"] or each["reports"] or not each["tests"] for each in recorded))


if __name__ == "__main__":
    main()

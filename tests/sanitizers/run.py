"""Builds the core with sanitizers and runs the tests of stores, columns and files on it.

    python -m tests.sanitizers.run [--short] [address|thread ...] [-- pytest arguments]

Each sanitizer has a build folder of its own under build/sanitize; the installed core stays as it
is. Prints a JSON line for each: what ran, for how long, and how many reports there were. Exits 1
if a test failed or a sanitizer reported anything; the reports are printed. Where the compiler has
no such sanitizer, the short form says so and passes, the long form fails.

numpy, torch and Arrow are not instrumented: what is checked is the core and the memory that it is
given. Leaks are not: the interpreter and torch keep memory to the end.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPRESSIONS = Path(__file__).with_name("thread.supp")
COMPILER = os.environ.get("CXX", "c++")
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
FLAGS = {"address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread"}
CAPTURED = {"check": False, "capture_output": True, "text": True}
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
TESTS = [
    "tests/contract",
    "tests/fuzz/test_files.py",
    "tests/fuzz/test_key_streams.py",
    "tests/fuzz/test_quoted_text.py",
    "tests/sanitizers/test_bounds.py",
    "tests/unit/core/test_core_arguments.py",
    "tests/unit/core/test_gradient_sums.py",
    "tests/unit/core/test_row_places.py",
    "tests/unit/core/test_threads_and_forks.py",
    "tests/unit/data/test_bad_input.py",
    "tests/unit/data/test_columns.py",
    "tests/unit/data/test_dataset.py",
    "tests/unit/data/test_group_columns.py",
    "tests/unit/embedding/test_collection.py",
    "tests/unit/embedding/test_key_weights.py",
    "tests/unit/embedding/test_optimizer_reference.py",
    "tests/unit/embedding/test_pending_gradients.py",
    "tests/unit/embedding/test_rounding.py",
    "tests/unit/embedding/test_row_clock.py",
]
SHORT = {
    "address": [
        "tests/contract/test_what_belongs_together.py",
        "tests/fuzz/test_files.py",
        "tests/sanitizers/test_bounds.py",
        "tests/unit/core/test_core_arguments.py",
        "tests/unit/core/test_row_places.py",
        "tests/unit/data/test_columns.py",
    ],
    "thread": [
        "tests/contract/test_what_belongs_together.py",
        "tests/fuzz/test_key_streams.py",
        "tests/unit/core/test_row_places.py::test_erased_rows_do_so_too",
        "tests/unit/core/test_row_places.py::test_what_one_shard_has_too_many_of_the_others_take",
        "tests/unit/core/test_threads_and_forks.py",
    ],
}


class Missing(Exception):
    """This machine cannot run a sanitizer; the message says what it lacks."""


def check_there_is(sanitizer: str) -> None:
    """Raises Missing where the compiler's sanitizer has no library that Python could load."""
    library = LIBRARIES[sanitizer]
    if not sys.platform.startswith("linux"):
        raise Missing("the sanitizer's library is loaded first by LD_PRELOAD: Linux alone")
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.so")
        flags = ["-x", "c++", "-", "-shared", "-fPIC", FLAGS[sanitizer], "-o", str(probe)]
        try:
            done = subprocess.run(
                [COMPILER, *flags], input="", env={**os.environ, "LC_ALL": "C"}, **CAPTURED
            )
        except FileNotFoundError:
            raise Missing(f"there is no compiler {COMPILER}") from None
        lacks = ("cannot find", "libsanitizer.spec", "not supported for this target")
        if line := line_with(done.stderr, *lacks):
            raise Missing(f"{COMPILER} has no {library}: {line}")
        done.check_returncode()
        path = loaded_by(probe, library)
    if path is None:
        raise Missing(f"{COMPILER} links no {library} of this machine (if it is clang: CXX=g++)")
    environment = {**os.environ, **OPTIONS[sanitizer], "LD_PRELOAD": str(path)}
    starts = subprocess.run([sys.executable, "-c", ""], env=environment, **CAPTURED)
    if line := line_with(starts.stderr, "unexpected memory mapping"):
        raise Missing(f"{library} does not start here: {line}")
    starts.check_returncode()


def line_with(text: str, *words: str) -> str | None:
    """The first line that has any of these words."""
    return next((line for line in text.splitlines() if any(word in line for word in words)), None)


def loaded_by(module: Path, library: str) -> Path | None:
    """The file of a library that a module is linked with; None: not linked, or there is no file."""
    done = subprocess.run(["ldd", module], **CAPTURED)
    for line in done.stdout.splitlines():
        name, _, target = line.strip().partition(" => ")
        if name.startswith(library) and target.startswith("/"):
            return Path(target.rpartition(" (")[0])
    return None


def build(sanitizer: str, is_short: bool) -> Path:
    """Builds the core; the file of the module."""
    folder = ROOT / "build" / "sanitize" / (sanitizer + ("-short" if is_short else ""))
    command = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja"]
    options = {
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",
        "CMAKE_CXX_COMPILER": COMPILER,
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
    # The C++ library, too: the sanitizer looks for its functions when it begins.
    libraries = [loaded_by(core, name) for name in (LIBRARIES[sanitizer], "libstdc++.so")]
    options = {
        name: f"{value}:log_path={reports / name.lower()}"
        for name, value in OPTIONS[sanitizer].items()
    }
    if sanitizer == "address":
        # gcc 12 aligns the frames kept for it to 32 bytes; AVX-512, of the long form, asks for 64.
        options["ASAN_OPTIONS"] += f":detect_stack_use_after_return={int(is_short)}"
    results = reports / "tests.xml"
    tests = arguments or (SHORT[sanitizer] if is_short else TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.sanitizers.tested_core", *tests]
    # Undefined behaviour is reported to the standard error alone, and ends the process.
    done = subprocess.run(
        [*command, "--capture=sys", "-rs", f"--junitxml={results}"],
        check=False,
        cwd=ROOT,
        env={
            **os.environ,
            **options,
            "LD_PRELOAD": " ".join(str(path) for path in libraries),
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
        "compiler": first_line(COMPILER, "--version"),
        "commit": first_line("git", "describe", "--always", "--dirty", "--abbrev=10"),
        "build_seconds": round(built - began),
        "test_seconds": round(time.monotonic() - built),
        "reports": len(found),
        "exit_code": done.returncode,
        **counts(results),
    }


def first_line(*command: str) -> str:
    """What a command answers."""
    done = subprocess.run(command, cwd=ROOT, **CAPTURED)
    return (done.stdout.splitlines() or ["unknown"])[0]


def counts(results: Path) -> dict[str, int]:
    """Tests, failures, errors and skipped ones of a run."""
    if not results.exists():
        return {"tests": 0}
    (suite,) = ElementTree.parse(results).getroot().iter("testsuite")
    return {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}


def main(given: list[str]) -> int:
    """The exit code: 0 if all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sanitizers", nargs="*", metavar="address|thread")
    parser.add_argument("--short", action="store_true", help="what CI has time for")
    cut = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:cut])
    if unknown := set(options.sanitizers) - set(LIBRARIES):
        parser.error(f"no sanitizer {sorted(unknown)}; there are {sorted(LIBRARIES)}")
    recorded, is_well = [], True
    for sanitizer in options.sanitizers or LIBRARIES:
        try:
            check_there_is(sanitizer)
        except Missing as lack:
            recorded.append({"sanitizer": sanitizer, "skipped": str(lack)})
            is_well &= options.short
            continue
        each = run(sanitizer, options.short, given[cut + 1 :])
        recorded.append(each)
        is_well &= not each["exit_code"] and not each["reports"] and each["tests"] > 0
    for each in recorded:
        print(json.dumps(each))
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

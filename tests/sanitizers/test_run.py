"""A machine without a sanitizer: the short form says so and passes, and nothing else passes."""

import json
import re
import subprocess

import pytest

from tests.sanitizers import run

LINK = "/usr/bin/ld: cannot find -lasan: No such file or directory"
SPEC = "fatal error: cannot read spec file 'libsanitizer.spec': No such file or directory"
TARGET = "warning: '-fsanitize=thread' not supported for this target"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Takes a shell script for the compiler."""

    def take(script):
        path = tmp_path / "c++"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(run, "COMPILER", str(path))

    return take


@pytest.mark.parametrize("said", [LINK, SPEC, TARGET])
def test_a_missing_sanitizer_is_skipped_by_the_short_form_alone(compiler, capsys, said):
    compiler(f'echo "{said}" >&2; exit 1')
    assert run.main(["--short"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["sanitizer"] for line in lines] == ["address", "thread"]
    assert all(said in line["skipped"] for line in lines)
    assert run.main(["thread"]) == 1
    assert said in capsys.readouterr().out


def test_the_tests_that_are_named_are_there():
    named = {*run.TESTS, *run.SHORT["address"], *run.SHORT["thread"]}
    assert not [name for name in named if not (run.ROOT / name.partition("::")[0]).exists()]
    source = (run.ROOT / "tests/unit/core/test_threads_and_forks.py").read_text(encoding="utf-8")
    plugin = (run.ROOT / "tests/sanitizers/tested_core.py").read_text(encoding="utf-8")
    skipped = re.findall(r'"(test_\w+)",', plugin)
    assert len(skipped) == 3
    assert all(f"def {name}(" in source for name in skipped)


def test_a_compiler_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(run, "COMPILER", "/nowhere/c++")
    assert run.main(["--short", "address"]) == 0
    assert "no compiler /nowhere/c++" in capsys.readouterr().out


def test_a_library_that_was_not_linked_is_named(compiler, capsys):
    """A compiler with a library of another name, or one in each module."""
    compiler('while [ "$1" != -o ]; do shift; done; : > "$2"')
    assert run.main(["--short", "address"]) == 0
    assert "links no libasan.so" in capsys.readouterr().out


def test_a_library_that_does_not_start_is_named(compiler, tmp_path, monkeypatch):
    """Of gcc before 14, where the kernel places programs at random within more than 28 bits."""
    compiler("exit 0")
    monkeypatch.setattr(run, "loaded_by", lambda module, library: module)
    python = tmp_path / "python"
    monkeypatch.setattr(run.sys, "executable", str(python))
    said = "FATAL: ThreadSanitizer: unexpected memory mapping 0x5f6b1a3b4000-0x5f6b1a3b5000"
    python.write_text(f'#!/bin/sh\necho "{said}" >&2; exit 66\n')
    python.chmod(0o755)
    with pytest.raises(run.Missing, match="does not start here: FATAL"):
        run.check_there_is("thread")
    python.write_text("#!/bin/sh\nexit 66\n")
    with pytest.raises(subprocess.CalledProcessError):
        run.check_there_is("thread")


def test_another_error_of_the_compiler_fails(compiler):
    compiler('echo "internal compiler error" >&2; exit 4')
    with pytest.raises(subprocess.CalledProcessError):
        run.main(["--short"])


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        ({}, 0),
        ({"reports": 1}, 1),
        ({"exit_code": 1, "failures": 1}, 1),
        ({"exit_code": 66}, 1),
        ({"tests": 0}, 1),
    ],
)
def test_a_report_a_failure_and_a_run_of_no_test_fail(monkeypatch, outcome, code):
    monkeypatch.setattr(run, "check_there_is", lambda sanitizer: None)
    each = {"reports": 0, "exit_code": 0, "tests": 7, "failures": 0} | outcome
    monkeypatch.setattr(run, "run", lambda sanitizer, *_: each | {"sanitizer": sanitizer})
    assert run.main(["--short"]) == code

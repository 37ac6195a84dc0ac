"""A core that is not that of the sources beside it is refused by name, before anything uses it."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import penstock
from penstock import _core, built_core

ROOT = Path(__file__).resolve().parents[3]
CORE = Path(_core.__file__)
LOAD = """
from penstock.errors import CoreError
for _ in range(2):  # a second import finds the module, and is refused as well
    try:
        from penstock import _core
    except CoreError as error:
        print(error)
    else:
        print("loaded")
"""


@pytest.fixture
def tree(tmp_path):
    """A source tree with its core, as `pip install -e .` leaves it; names are real, most empty."""
    package = tmp_path / "tree" / "penstock"
    package.mkdir(parents=True)
    for name in ("__init__.py", "built_core.py", "errors.py"):
        shutil.copy(ROOT / "penstock" / name, package)
    shutil.copy(CORE, package)
    shutil.copy(ROOT / "CMakeLists.txt", package.parent)
    shutil.copytree(ROOT / "csrc", package.parent / "csrc")
    return package.parent


def load_in(tree):
    # Without the site packages, whose editable installation would find this project's own.
    program = f"import sys; sys.path.insert(0, {str(tree)!r})\n{LOAD}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first == second
    return first


def test_the_core_of_these_very_sources_is_taken(tree):
    assert load_in(tree) == "loaded"


def test_the_core_that_the_tests_run_on_is_of_these_sources():
    assert (_core.version, _core.built_from) == (penstock.__version__, built_core.digest(ROOT))


@pytest.mark.parametrize("change", ["changed", "added", "removed", "renamed", "flags"])
def test_other_sources_are_told(tree, change):
    source = tree / "csrc" / "store" / "host_store.h"
    if change == "changed":
        source.write_bytes(source.read_bytes() + b"\n")
    elif change == "added":
        source.with_name("new.h").touch()
    elif change == "removed":
        source.unlink()
    elif change == "renamed":
        source.rename(source.with_name("new.h"))
    else:
        (tree / "CMakeLists.txt").write_text("# other flags\n")
    core = tree / "penstock" / CORE.name
    assert load_in(tree) == (
        f"{core}: this C++ core was built from other sources than those in {tree / 'csrc'}; run "
        f"`pip install -e .` in {tree}"
    )


def test_files_that_nothing_is_built_from_do_not_matter(tree):
    (tree / "csrc" / "store" / ".host_store.h.swp").touch()
    assert load_in(tree) == "loaded"


def test_the_core_of_another_version_is_told(tree):
    # As where files of two versions lie in one folder: a wheel has no sources to compare with.
    shutil.rmtree(tree / "csrc")
    assert load_in(tree) == "loaded"
    face = tree / "penstock" / "__init__.py"
    text = face.read_text("utf-8")
    face.write_text(text.replace(penstock.__version__, "99.0.0"), "utf-8")
    assert load_in(tree) == (
        f"{tree / 'penstock' / CORE.name}: this C++ core is that of penstock "
        f"{penstock.__version__}, and the package is penstock 99.0.0; run `pip install "
        "--force-reinstall penstock`"
    )


@pytest.mark.parametrize("said", [{}, {"version": None}, {"version": penstock.__version__}])
def test_a_core_that_does_not_say_what_it_is_is_told(tree, said):
    told = built_core._difference(SimpleNamespace(**said), tree)
    if said.get("version") is None:
        assert told.startswith("this C++ core is that of penstock ")
        assert told.endswith(f", and the package is penstock {penstock.__version__}")
    else:
        assert told == (f"this C++ core was built from other sources than those in {tree / 'csrc'}")


def test_a_tree_that_is_not_built_is_told(tree):
    (tree / "penstock" / CORE.name).unlink()
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert load_in(tree) == (
        f"{tree / 'penstock'}: the C++ core (penstock._core) is not built for this Python "
        f"{version}; run `pip install -e .` in {tree}"
    )


def test_a_core_that_cannot_be_loaded_is_told(tree):
    core = tree / "penstock" / CORE.name
    core.write_bytes(b"no library")
    said = load_in(tree)
    assert said.startswith("the C++ core cannot be loaded: ") and str(core) in said
    assert said.endswith(f"; run `pip install -e .` in {tree}")


def test_the_command_line_says_it_in_a_line(monkeypatch, capsys):
    from penstock import cli

    monkeypatch.setattr(built_core, "digest", lambda root: "of other sources")
    monkeypatch.delattr(penstock, "_core")
    monkeypatch.setattr(sys, "argv", ["penstock", "schema"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and "built from other sources" in said.err

"""The C++ core, and whether it is the one of the sources beside it.

Also a script, by which the build writes into the core what it is built from; so this file imports
nothing of the package before it needs it.
"""

from __future__ import annotations

import hashlib
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
_BUILD = "CMakeLists.txt"
_SOURCES = ("csrc/*/*.cc", "csrc/*/*.h")
_VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)


def load() -> ModuleType:
    """Imports `penstock._core`.

    Raises:
      CoreError: it is not built, cannot be loaded, or is that of another version or of other
        sources than those in the folder of the package: what it takes and gives is not known then.
    """
    from penstock.errors import CoreError

    again = f"run `pip install -e .` in {PACKAGE.parent}"
    if not _is_source_tree(PACKAGE.parent):
        again = "run `pip install --force-reinstall penstock`"
    try:
        core = import_module("penstock._core")
    except ModuleNotFoundError as error:
        if error.name != "penstock._core":
            raise
        version = ".".join(str(part) for part in sys.version_info[:2])
        raise CoreError(
            f"{PACKAGE}: the C++ core (penstock._core) is not built for this Python {version}; "
            f"{again}"
        ) from None
    except ImportError as error:
        raise CoreError(f"the C++ core cannot be loaded: {error}; {again}") from None
    difference = _difference(core, PACKAGE.parent)
    if difference is not None:
        raise CoreError(f"{core.__file__}: {difference}; {again}")
    return core


def _difference(core: ModuleType, root: Path) -> str | None:
    """In what a core is not that of the package in the folder `root`; None: in nothing."""
    here = version_of(root)
    built = getattr(core, "version", "of before 0.1.0")
    if built != here:
        return f"this C++ core is that of penstock {built}, and the package is penstock {here}"
    if _is_source_tree(root) and getattr(core, "built_from", "") != digest(root):
        return f"this C++ core was built from other sources than those in {root / 'csrc'}"
    return None


def digest(root: Path) -> str:
    """SHA-256 over the names and bytes of all that a core is built from, in hexadecimal."""
    files = [root / _BUILD, *sorted(path for each in _SOURCES for path in root.glob(each))]
    total = hashlib.sha256()
    for path in files:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()


def version_of(root: Path) -> str:
    """The version of the package in a folder."""
    found = _VERSION.search((root / "penstock" / "__init__.py").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def _is_source_tree(root: Path) -> bool:
    return (root / _BUILD).is_file() and (root / "csrc" / "bindings").is_dir()


def _write(root: Path, out: Path) -> None:
    """Writes the C++ file that says in the core what it is built from."""
    out.write_text(
        '#include "bindings/bindings.h"\n'
        f'const char* const penstock::kVersion = "{version_of(root)}";\n'
        f'const char* const penstock::kBuiltFrom = "{digest(root)}";\n',
        encoding="utf-8",
    )


if __name__ == "__main__":
    _write(PACKAGE.parent, Path(sys.argv[1]))

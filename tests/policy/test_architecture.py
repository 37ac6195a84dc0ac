"""Rules of the code base that a machine can check; no torch, under a second."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "penstock"

# What each part may import, besides itself; nothing else of the package, and never upwards.
MAY_IMPORT = {
    "errors": set(),
    "types": {"errors"},
    "locking": set(),
    "interruption": {"errors"},
    "config": {"errors"},
    "data": {"errors", "types", "config", "locking", "_core"},
    "models": {"errors", "types", "config"},
    "kernels": {"errors", "types", "config", "_core"},
    "embedding": {"errors", "types", "config", "kernels", "_core"},
    "training": {"errors", "types", "config", "interruption", "data", "embedding", "models"},
    "job_file": {"errors", "config"},
    "report": {
        "errors",
        "types",
        "config",
        "locking",
        "data",
        "embedding",
        "job_file",
        "training",
    },
    "run": {
        "errors",
        "types",
        "config",
        "data",
        "models",
        "embedding",
        "training",
        "job_file",
        "report",
        "interruption",
    },
    "cli_data": {"errors", "config", "data", "job_file", "report"},
    "cli": {
        "_core",
        "errors",
        "config",
        "data",
        "training",
        "job_file",
        "report",
        "run",
        "cli_data",
        "interruption",
    },
}
MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 80
BANNED_NAMES = {"utils", "util", "helpers", "common", "base_classes", "manager", "misc"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(tree):
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            known = parts[0] == "penstock" and len(parts) > 1
            if known and (parts[1] in MAY_IMPORT or parts[1] == "_core"):
                yield parts[1]


def test_imports_point_one_way():
    wrong = []
    for path, tree in modules():
        part = part_of(path)
        if path.parent == PACKAGE and part in {"__init__", "__main__"}:
            continue
        assert part in MAY_IMPORT, f"{path.name} is no known part: say what it may import"
        wrong += [
            f"{path.relative_to(ROOT)} imports penstock.{other}"
            for other in sorted(set(imported_parts(tree)) - {part})
            if other not in MAY_IMPORT[part]
        ]
    assert not wrong, "\n".join(wrong)


def test_the_import_rules_have_no_cycle():
    order = []
    while len(order) < len(MAY_IMPORT):
        ready = [
            part
            for part, others in MAY_IMPORT.items()
            if part not in order and others - {"_core"} <= set(order)
        ]
        assert ready, f"cycle among {set(MAY_IMPORT) - set(order)}"
        order += ready


def test_modules_and_functions_stay_small():
    wrong = []
    for path, tree in modules():
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > MAX_MODULE_LINES:
            wrong.append(f"{path.relative_to(ROOT)}: {lines} lines > {MAX_MODULE_LINES}")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = node.end_lineno - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    wrong.append(
                        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {size} lines"
                    )
    for path in (ROOT / "csrc").iterdir():
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > MAX_MODULE_LINES:
            wrong.append(f"csrc/{path.name}: {lines} lines > {MAX_MODULE_LINES}")
    assert not wrong, "\n".join(wrong)


def test_no_module_has_a_name_that_says_nothing():
    wrong = [path.name for path, _ in modules() if path.stem in BANNED_NAMES]
    assert not wrong, wrong


def test_nothing_unsafe_is_loaded_and_no_error_is_swallowed():
    wrong = []
    for path, tree in modules():
        for node in ast.walk(tree):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ExceptHandler):
                names = ast.unparse(node.type) if node.type else "everything"
                # Raised again, or handed to the thread that raises it (Channel.fail).
                passed_on = any(
                    isinstance(inner, ast.Raise)
                    or (isinstance(inner, ast.Attribute) and inner.attr == "fail")
                    for inner in ast.walk(node)
                )
                broad = re.search(r"\b(everything|Exception|BaseException)\b", names)
                if broad and not passed_on:
                    wrong.append(f"{where}: catches {names}")
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                if named & {"pickle", "cloudpickle", "dill", "shelve", "marshal"}:
                    wrong.append(f"{where}: imports {named}")
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in {"torch.load", "torch.save", "yaml.load", "eval", "exec"}:
                    wrong.append(f"{where}: calls {called}")
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_prints():
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in modules()
        if part_of(path) not in {"cli", "report"}
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert not wrong, wrong


def test_the_page_of_the_architecture_names_every_file_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^- `([^`]+)`", page, re.MULTILINE))
    assert len(listed) == len(re.findall(r"^- `([^`]+)`", page, re.MULTILINE)), "a file twice"
    there = {path.relative_to(ROOT).as_posix() for path, _ in modules() if path.stat().st_size}
    there |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()}
    assert listed == there, f"missing {sorted(there - listed)}, gone {sorted(listed - there)}"

"""Rules of the code base that a machine can check; no torch, under a second."""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "penstock"

# What all that holds rows may import.
STORES = {
    "errors",
    "types",
    "config",
    "embedding/rules",
    "embedding/retention",
    "embedding/store",
    "embedding/checks",
}
# What each room may import of the package, besides itself: never upwards. A room is a folder or a
# file; the longest name counts. A name covers the rooms below it, so "data" is all of `data/`.
MAY_IMPORT = {
    "errors": set(),
    "built_core": {"errors"},
    "locking": set(),
    "ledger": {"errors", "locking"},
    "position": {"errors"},
    "types": {"errors", "position"},
    "events": {"errors"},
    "interruption": {"errors"},
    "config": {"errors"},
    "job_file": {"errors", "config"},
    #
    "data/identity": {"errors", "position", "types"},
    "data/files": {"errors"},
    "data/output": {"errors", "locking", "data/files"},
    "data/quarantine": {"errors", "position", "types", "data/identity"},
    "data/source": {"position", "types", "data/quarantine"},
    "data/columns": {"errors", "config", "_core", "data/quarantine", "data/source"},
    "data/plan": {
        "errors",
        "position",
        "types",
        "config",
        "data/files",
        "data/source",
        "data/columns",
    },
    "data/formats": {
        "errors",
        "position",
        "types",
        "config",
        "_core",
        "data/files",
        "data/identity",
        "data/output",
        "data/quarantine",
        "data/source",
        "data/columns",
        "data/plan",
    },
    "data/batches": {
        "errors",
        "position",
        "types",
        "_core",
        "data/identity",
        "data/quarantine",
        "data/source",
        "data/columns",
        "data/plan",
    },
    "data/windows": {
        "errors",
        "position",
        "types",
        "config",
        "data/files",
        "data/source",
        "data/identity",
        "data/plan",
        "data/batches",
    },
    "data/opening": {"errors", "config", "data/formats", "data/source", "data/windows"},
    "data": {"errors", "position", "types", "config", "ledger"},
    "survey": {"errors", "config", "data"},
    #
    "models": {"errors", "types", "config"},
    "kernels/device": {"errors"},
    "kernels/launch": {"_core"},
    "kernels/memory": {"errors"},
    "kernels/update": {
        "types",
        "kernels/launch",
        "kernels/plan",
        "kernels/pool",
        "kernels/reference",
        "kernels/tiles",
    },
    "kernels/index": {
        "types",
        "kernels/device",
        "kernels/launch",
        "kernels/plan",
        "kernels/update",
    },
    "kernels": {"errors", "types", "config"},
    #
    "embedding/durable_files": {"errors"},
    "embedding/rules": {"errors", "config"},
    "embedding/retention": {"errors", "config", "embedding/rules"},
    "embedding/store": {"errors", "types", "config", "embedding/rules", "embedding/retention"},
    "embedding/checks": {"embedding/retention", "errors", "types", "config", "embedding/store"},
    "embedding/host_store": STORES | {"_core"},
    "embedding/dict_table": {"config", "embedding/rules", "embedding/retention"},
    "embedding/dict_store": STORES | {"embedding/dict_table"},
    "embedding/gpu": STORES | {"kernels"},
    "embedding/gpu_store": STORES | {"kernels", "embedding/gpu"},
    "embedding/sharded/shard_map": set(),
    "embedding/sharded/exchange": {"errors"},
    "embedding/sharded/agreement": {"errors", "config", "embedding/sharded/exchange"},
    "embedding/sharded/routes": {
        "_core",
        "types",
        "embedding/store",
        "embedding/sharded/shard_map",
    },
    "embedding/sharded/defaults": {
        "config",
        "kernels/update/occurrences",
        "embedding/retention",
        "embedding/store",
        "embedding/sharded/exchange",
    },
    "embedding/sharded/placement": {"config"},
    "embedding/sharded/ways": {"embedding/store"},
    "embedding/sharded/bag_parts": {
        "types",
        "embedding/store",
        "embedding/sharded/routes",
        "embedding/sharded/shard_map",
    },
    "embedding/sharded/bags": {
        "types",
        "_core",
        "embedding/host_store",
        "embedding/store",
        "embedding/sharded/bag_parts",
        "embedding/sharded/routes",
    },
    "embedding/sharded/device_bags": {
        "types",
        "kernels",
        "embedding/gpu",
        "embedding/store",
        "embedding/sharded/bag_parts",
        "embedding/sharded/routes",
    },
    "embedding/sharded/lookups": {
        "types",
        "embedding/store",
        "embedding/sharded/bag_parts",
        "embedding/sharded/bags",
        "embedding/sharded/defaults",
        "embedding/sharded/exchange",
        "embedding/sharded/routes",
        "embedding/sharded/ways",
    },
    "embedding/sharded/all_ranks": {
        "errors",
        "embedding/sharded/agreement",
        "embedding/sharded/store",
    },
    "embedding/sharded/store": STORES
    | {
        "embedding/sharded/agreement",
        "embedding/sharded/bags",
        "embedding/sharded/defaults",
        "embedding/sharded/exchange",
        "embedding/sharded/lookups",
        "embedding/sharded/routes",
        "embedding/sharded/shard_map",
        "embedding/sharded/ways",
    },
    "embedding/shapes": {"errors", "types", "config", "embedding/checks", "embedding/store"},
    "embedding/collection": STORES
    | {
        "_core",
        "kernels/device",
        "embedding/durable_files",
        "embedding/shapes",
        "embedding/sharded",
        "embedding/gpu_store",
        "embedding/host_store",
    },
    "embedding/interop": {
        "errors",
        "types",
        "config",
        "embedding/rules",
        "embedding/store",
        "embedding/collection",
    },
    "embedding": {"errors", "types"},
    #
    "ranks/environment": {"errors"},
    "ranks/launch": {"interruption", "locking", "ranks/environment"},
    "ranks": {"errors", "interruption", "embedding"},
    #
    "training/metrics": {
        "errors",
        "types",
        "config",
        "data/columns",
        "models",
        "embedding",
        "training/items",
    },
    "training/checkpoint": {"errors", "position", "types", "config", "embedding", "ranks"},
    "training": {
        "errors",
        "position",
        "types",
        "config",
        "interruption",
        "data",
        "embedding",
        "models",
        "ranks",
    },
    "report": {
        "errors",
        "position",
        "types",
        "events",
        "config",
        "locking",
        "data",
        "survey",
        "embedding",
        "job_file",
        "ranks",
        "training",
    },
    "run": {
        "errors",
        "position",
        "types",
        "config",
        "data",
        "models",
        "embedding",
        "training",
        "job_file",
        "ranks",
        "report",
        "interruption",
    },
    "cli_savepoint": {"report", "training"},
    "cli_data": {"errors", "config", "data", "survey", "job_file", "report", "training"},
    "cli": {
        "cli_savepoint",
        "_core",
        "errors",
        "config",
        "data",
        "training",
        "job_file",
        "ranks",
        "report",
        "run",
        "cli_data",
        "interruption",
    },
}
CORE_MAY_INCLUDE = {
    "system": set(),
    "index": {"system"},
    "rows": {"index", "system"},
    "data": {"rows", "system"},
    "tables": {"rows", "index", "system"},
    "retention": {"tables", "rows", "index", "system"},
    "store": {"retention", "tables", "rows", "index", "system"},
    "bags": {"rows", "index", "system"},
    "bindings": {"store", "bags", "data", "tables", "rows", "index", "system"},
}
MAX_FOLDER_FILES = 16
MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_METHODS = 25
MAX_ARGUMENTS = 8
MAX_KERNEL_ARGUMENTS = 16
BANNED_NAMES = {"utils", "util", "helpers", "common", "base_classes", "manager", "misc"}

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def core_files():
    return sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())


def covers(name, module):
    return module == name or module.startswith(name + "/")


def room_of(module):
    """The longest name of a room that covers a module, "data/formats/csv"; None: of no room."""
    return max((room for room in MAY_IMPORT if covers(room, module)), key=len, default=None)


def imported_modules(tree):
    """The package's modules that a module imports, as "data/formats/csv"."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            first, _, module = name.replace(".", "/").partition("/")
            if first != "penstock":
                continue
            there = PACKAGE / module
            if not module:
                continue  # `import penstock`: its version
            if not (there.is_dir() or there.with_suffix(".py").is_file() or module == "_core"):
                module = module.rpartition("/")[0]  # a name of a module
            yield module or "__init__"


def test_imports_point_one_way():
    wrong = []
    for path, tree in modules():
        module = path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__")
        if module in {"__init__", "__main__"}:
            continue
        room = room_of(module)
        assert room, f"{path.name} is in no known room: say what it may import"
        for other in sorted(set(imported_modules(tree))):
            inside = covers(room, other)
            if not inside and not any(covers(name, other) for name in MAY_IMPORT[room]):
                wrong.append(f"{path.relative_to(ROOT)} imports {other}, which {room} may not")
    assert not wrong, "\n".join(wrong)


def test_includes_of_the_core_point_one_way():
    wrong = []
    for path in core_files():
        room = path.parent.name
        for other in re.findall(
            r'^#include "(\w+)/', path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            if other not in CORE_MAY_INCLUDE[room] | {room}:
                wrong.append(f"{path.relative_to(ROOT)} includes {other}/")
    assert not wrong, "\n".join(wrong)
    order = list(CORE_MAY_INCLUDE)
    for place, room in enumerate(order):
        assert CORE_MAY_INCLUDE[room] <= set(order[:place]), f"cycle at {room}"


def test_the_import_rules_have_no_cycle():
    # What a room may import: the rooms named, those below them, and those below itself.
    needs = {
        room: {
            other
            for other in MAY_IMPORT
            if other != room
            and (covers(room, other) or any(covers(name, other) for name in allowed))
        }
        for room, allowed in MAY_IMPORT.items()
    }
    order = []
    while len(order) < len(needs):
        ready = [room for room, of in needs.items() if room not in order and of <= set(order)]
        assert ready, f"cycle among {set(needs) - set(order)}"
        order += ready


def test_a_rule_of_imports_names_what_is_there():
    named = set().union(*MAY_IMPORT.values(), MAY_IMPORT) - {"_core"}
    there = {
        path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__")
        for path, _ in modules()
    }
    assert named <= there, f"gone: {sorted(named - there)}"


def test_modules_and_functions_stay_small():
    wrong = []
    for path, tree in modules():
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > MAX_MODULE_LINES:
            wrong.append(f"{path.relative_to(ROOT)}: {lines} lines > {MAX_MODULE_LINES}")
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS):
                size = node.end_lineno - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    wrong.append(
                        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {size} lines"
                    )
    for path in core_files():
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > MAX_MODULE_LINES:
            wrong.append(f"{path.relative_to(ROOT)}: {lines} lines > {MAX_MODULE_LINES}")
    assert not wrong, "\n".join(wrong)


def test_no_class_does_everything():
    """Functions in the body of a class count: methods, properties, private and dunder ones."""
    wrong = []
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(each, FUNCTIONS) for each in node.body)
                if methods > MAX_METHODS:
                    wrong.append(f"{path.relative_to(ROOT)}: {node.name} has {methods} methods")
    assert not wrong, "\n".join(wrong)


def test_no_class_of_the_core_does_everything():
    """Functions declared in a class count, but for constructors and destructors."""
    wrong = [
        f"{path.relative_to(ROOT)}: {name} has {len(methods)} functions: {', '.join(methods)}"
        for path in core_files()
        for name, methods in core_classes(path.read_text(encoding="utf-8")).items()
        if len(methods) > MAX_METHODS
    ]
    assert not wrong, "\n".join(wrong)


def core_classes(text):
    """The names of the functions that each class and struct of a C++ file declares."""
    text = re.sub(r'//[^\n]*|"(\\.|[^"\\\n])*"|^[ \t]*#[^\n]*', "", text, flags=re.MULTILINE)
    found = {}
    for head in re.finditer(r"\b(?:class|struct)\s+(?:alignas\(\w+\)\s+)?(\w+)[^;{}()]*\{", text):
        # What is in braces or brackets of its own is no part of a declaration.
        body, depth, at = "", 1, head.end()
        while depth and at < len(text):
            depth += (text[at] in "{(") - (text[at] in "})")
            if depth == 1:
                body += ";" if text[at] == "}" else "()" if text[at] == ")" else text[at]
            at += 1
        statements = re.sub(r"\b(public|private|protected)\s*:|alignas\(\)", ";", body).split(";")
        calls = [re.match(r"[^()=]*?(operator\S+|\w+)\s*\(\)", each) for each in statements]
        names = [call.group(1) for call in calls if call]
        found[head.group(1)] = [name for name in names if name != head.group(1)]
    return found


def test_what_counts_as_a_function_of_a_class_of_the_core():
    text = """
    class Two : public One {
     public:
      explicit Two(int a) : a_(a), b_{2} {}
      ~Two();
      int first() const { return call(a_); }  // not(this)
      template <typename Visit>
      void second(const Visit& visit, std::function<void(int)> other) const;
      bool operator==(const Two&) const = default;

     private:
      struct Inner {
        int third() { return 3; }
      };
      int a_ = f(1);
      std::vector<int> b_;
    };
    """
    assert core_classes(text) == {"Two": ["first", "second", "operator=="], "Inner": ["third"]}


def test_functions_take_few_arguments():
    """`self` and `cls` aside. Kernels take what they read: more, in as few groups as they can."""
    wrong = []
    for path, tree in modules():
        for node in ast.walk(tree):
            if not isinstance(node, FUNCTIONS):
                continue
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
            number = len(names) + len(node.args.kwonlyargs) - (names[:1] in (["self"], ["cls"]))
            is_kernel = any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
            most = MAX_KERNEL_ARGUMENTS if is_kernel else MAX_ARGUMENTS
            if number > most:
                wrong.append(f"{path.relative_to(ROOT)}: {node.name} has {number} arguments")
    assert not wrong, "\n".join(wrong)


def test_a_folder_shows_its_parts():
    folders = Counter(path.parent for path, _ in modules())
    folders.update(Counter(path.parent for path in core_files()))
    wrong = [
        f"{folder.relative_to(ROOT)}: {files} files"
        for folder, files in folders.items()
        if files > MAX_FOLDER_FILES
    ]
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


def test_the_page_of_the_architecture_names_every_room_and_no_other():
    """Rooms: folders without folders in them, and the files that lie beside folders."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- `([^`]+)`", page, re.MULTILINE)
    assert len(listed) == len(set(listed)), "a room twice"
    assert len(page.splitlines()) <= 120, "one page"
    files = [path for path, _ in modules() if path.stat().st_size] + core_files()
    parents = {folder for path in files for folder in path.parent.parents}
    there = {
        path.relative_to(ROOT).as_posix()
        if path.parent in parents
        else path.parent.relative_to(ROOT).as_posix() + "/"
        for path in files
    }
    assert set(listed) == there, f"missing {there - set(listed)}, gone {set(listed) - there}"


def test_the_first_line_of_a_file_says_what_it_is():
    wrong = []
    for path, tree in modules():
        first = (ast.get_docstring(tree) or "").partition("\n")[0]
        if path.stat().st_size and not re.search(r"[.:]$|…$", first):
            wrong.append(f"{path.relative_to(ROOT)}: {first!r}")
    for path in core_files():
        if not re.match(r"//+ \S", path.read_text(encoding="utf-8")):
            wrong.append(f"{path.relative_to(ROOT)}: no comment on its first line")
    assert not wrong, "\n".join(wrong)

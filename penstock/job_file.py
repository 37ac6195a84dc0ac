"""Where a job comes from: a YAML file or a Python function, with overrides of single fields.

The environment is not read and nothing is interpolated: what is written is what is run.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import re
import warnings
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from penstock.config import Job, parse_job
from penstock.config.explain import fields_at
from penstock.config.moved import bring_up_to_date, place_now
from penstock.errors import ConfigError, JobNote

_YAML_SUFFIXES = (".yaml", ".yml")
_FUNCTION = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
_MOST_VALUES = 1_000_000
_TAGS = ("kind", "format", "by", "policy")
"""Fields that say which member of a union a mapping is."""


def load_job(reference: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Loads a job.

    Args:
      reference: path of a YAML file, or `module:function` of a function without arguments that
        returns a `Job`.
      overrides: each `a.b=c`: a path of keys and list indices, and a value in YAML. Later ones
        win. A mapping on the way that the job leaves out is made.

    Raises:
      ConfigError: the file or function cannot be read, a key stands twice, or the fields do not
        make a valid job.
    """
    name = str(reference)
    if _FUNCTION.match(name) and not Path(name).exists():
        job = _call(name)
        if not overrides:
            return job
        fields: Any = job.model_dump(mode="json")
    else:
        fields = read_fields(Path(reference))
    return parse_job(override(_up_to_date(fields, name), overrides), origin=name)


def override(fields: Any, overrides: Sequence[str]) -> Any:
    """A copy of the fields of a job with single ones replaced, see `load_job`.

    A field is found by its place of before, too, in the fields and in the overrides.

    Raises:
      ConfigError: an override is not of the form `a.b=c`, or its path leads nowhere.
    """
    fields = copy.deepcopy(fields)
    if overrides and isinstance(fields, dict):
        fields = dict(bring_up_to_date(fields)[0])
    for one in overrides:
        fields = _apply(fields, one)
    return fields


def _up_to_date(fields: Any, origin: str) -> Any:
    """Puts moved fields into their places, and says so."""
    if not isinstance(fields, dict):
        return fields
    try:
        fields, moved = bring_up_to_date(fields)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    for note in moved:
        warnings.warn(f"{origin}: {note}", JobNote, stacklevel=3)
    return dict(fields)


def read_fields(path: Path) -> Any:
    """Reads the fields of a YAML file without checking them against `Job`.

    Where the file `extends` another, whose path is relative to it, its fields are laid over those
    of the other: mappings field by field, anything else whole. Of a mapping that becomes another
    kind (`model: {kind: dcn_v2}`) the fields that the new kind lacks are dropped.

    Raises:
      ConfigError: a file cannot be read, is not YAML, gives a key twice, or extends itself.

    Warns:
      JobNote: fields were dropped, which.
    """
    return _extended(path, ())


def _extended(path: Path, extending: tuple[Path, ...]) -> Any:
    if path.resolve() in [one.resolve() for one in extending]:
        chain = " extends ".join(str(one) for one in (*extending, path))
        raise ConfigError(f"{extending[-1]}: extends: {chain}; a job cannot extend itself")
    try:
        fields = _read(path)
    except ConfigError as error:
        raise ConfigError(" extends ".join(map(str, (*extending, error)))) from None
    if not isinstance(fields, dict) or "extends" not in fields:
        return fields
    other = fields.pop("extends")
    if not isinstance(other, str) or not other:
        raise ConfigError(f"{path}: extends: expected the path of a job file, got {other!r}")
    below = _extended(path.parent / other, (*extending, path))
    below, fields = _up_to_date(below, str(path.parent / other)), _up_to_date(fields, str(path))
    if not isinstance(below, dict):
        held = type(below).__name__
        raise ConfigError(f"{path}: extends {other}, which holds a {held} and no fields of a job")
    return _laid_over(below, fields, (), str(path))


def _laid_over(below: Any, above: Any, location: tuple[str, ...], origin: str) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    kept = _fitting(below, above, location, origin)
    return kept | {
        key: _laid_over(kept[key], value, (*location, key), origin) if key in kept else value
        for key, value in above.items()
    }


def _fitting(
    fields: dict[str, Any], change: dict[str, Any], location: tuple[str | int, ...], origin: str
) -> dict[str, Any]:
    """The fields that stay where `change` makes the mapping at `location` another kind."""
    for tag in _TAGS:
        kind = change.get(tag)
        if not isinstance(kind, str) or fields.get(tag) == kind:
            continue
        known = fields_at(Job, (*location, kind))
        dropped = [name for name in fields if known and name not in known]
        if dropped:
            where = ".".join(str(part) for part in location)
            warnings.warn(
                f"{origin}: {where}.{tag} is now {kind}, which has no {', '.join(dropped)}: "
                "dropped",
                JobNote,
                stacklevel=2,
            )
        fields = {name: value for name, value in fields.items() if name not in dropped}
    return fields


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such job file{_similar_files(path)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is no UTF-8 ({error.reason}); save the job file as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the job file: {error}") from None
    return parse_yaml(text, str(path))


def dump_yaml(job: Job) -> str:
    """Writes every field of a job, defaults too, as YAML that `load_job` reads back."""
    return str(yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def parse_yaml(text: str, origin: str) -> Any:
    """Parses YAML; `origin` is named in errors.

    Raises:
      ConfigError: not YAML, or a key stands twice in one mapping.
    """
    try:
        loader = _JobLoader(text)
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            f"{origin}: not valid YAML: {error.reason} (#x{error.character:04x})"
        ) from None
    loader.name = origin
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {}, origin)
        return loader.construct_document(node)
    except RecursionError:
        raise ConfigError(f"{origin}: not valid YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}:{mark.line + 1}" if mark is not None else origin
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}: not valid YAML: {problem}") from None
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, known: dict[yaml.Node, int | None], origin: str) -> int:
    """Values below a node, those of an alias again each time; refused where they are too many."""
    if node not in known:
        known[node] = None
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        items = node.value if isinstance(node, yaml.SequenceNode) else ()
        below = [*items, *(one for pair in pairs for one in pair)]
        known[node] = 1 + sum(_count_values(one, known, origin) for one in below)
    count, line = known[node], node.start_mark.line + 1
    if count is None:
        raise ConfigError(f"{origin}:{line}: an anchor holds itself; write out what is meant")
    if count > _MOST_VALUES:
        raise ConfigError(
            f"{origin}:{line}: more than {_MOST_VALUES:,} values here, aliases written out; a job "
            "has no use for so many"
        )
    return count


class _JobLoader(yaml.SafeLoader):  # type: ignore[misc] # PyYAML has no types
    """Safe YAML that refuses duplicate keys, and reads 1e-3, `no` and 1:30 as YAML 1.2 does."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag == _INT and _LEADING_ZERO.match(node.value):
            digits = node.value.lstrip("+-0_")
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{node.value} is octal to some and decimal to others; write {digits or 0}, or "
                f"0o{digits or 0}, or as a text '{node.value}'",
                node.start_mark,
            )
        try:
            value = super().construct_object(node, deep=deep)
            if isinstance(value, str):
                value.encode()
            return value
        except (ValueError, KeyError, AttributeError):
            # PyYAML's scalars are not checked before they are read. An error of what is within a
            # mapping or list has its own words.
            if not isinstance(node, yaml.ScalarNode):
                raise
            shown = repr(node.value)
            shown = shown if len(shown) <= 41 else f"{shown[:38]}..."
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown} is no {node.tag.rpartition(':')[2]}", node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first_line: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in first_line:
                raise ConfigError(
                    f"{self.name}:{line}: key {key!r} stands twice (first in line "
                    f"{first_line[key]}); remove one"
                )
            first_line[key] = line
        return dict(super().construct_mapping(node, deep=deep))


# In YAML 1.1 no, off, y and their like are false and true: columns and countries have such names.
# And 1:30 is 90, and 010 is 8.
_BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float"))
_LEADING_ZERO = re.compile(r"^[-+]?0[0-9_]+$")
_JobLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in {_BOOL, _INT, _FLOAT}]
    for first, found in _JobLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, r"[-+]?([0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)", "-+0123456789"),
    (
        _FLOAT,
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _JobLoader.add_implicit_resolver(_tag, re.compile(f"^({_pattern})$"), list(_first))


def _call(name: str) -> Job:
    module_name, function_name = name.split(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"{name}: no module {error.name!r} on the Python path; start from its folder or "
            "install it"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(
            f"{name}: module {module_name!r} has no function {function_name!r}"
            f"{_did_you_mean(function_name, [key for key in vars(module) if key[0] != '_'])}"
        )
    needed = [
        one.name
        for one in inspect.signature(function).parameters.values()
        if one.default is one.empty and one.kind not in {one.VAR_POSITIONAL, one.VAR_KEYWORD}
    ]
    if needed:
        raise ConfigError(
            f"{name}: needs arguments ({', '.join(needed)}); write a function without any that "
            "returns the job"
        )
    job = function()
    if not isinstance(job, Job):
        raise ConfigError(f"{name}: returned {type(job).__name__}, expected penstock.config.Job")
    return job


def _apply(fields: Any, override: str) -> Any:
    """Returns `fields` with one override applied (in place where they are mappings)."""
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"--set {override}: expected a.b=value, for instance training.epochs=2")
    keys = place_now(path).split(".")
    if keys != path.split("."):
        warnings.warn(f"--set {override}: {path} is now {place_now(path)}", JobNote, stacklevel=2)
    value = parse_yaml(text, f"--set {path}")
    if fields is None:
        fields = {}
    node, model = fields, Job
    at: type[BaseModel] | None = model
    for depth, key in enumerate(keys):
        done = ".".join(keys[:depth]) or "the job"
        last = depth == len(keys) - 1
        if isinstance(node, list):
            index = _index(node, key, done, override)
            if last:
                node[index] = value
            node, at = node[index], None
        elif isinstance(node, dict):
            if last:
                kept = _fitting(node, {key: value}, tuple(_places(keys[:-1])), f"--set {override}")
                for name in [name for name in node if name not in kept]:
                    del node[name]
                node[key] = value
            elif node.get(key) is None:
                node[key] = _default_tag(at, key)
            node, at = node[key], _model_of(at, key)
        else:
            raise ConfigError(
                f"--set {override}: {done} is {node!r}, which has no key {key!r}; set {done} itself"
            )
    return fields


def _places(keys: Sequence[str]) -> list[str | int]:
    """Keys of a path, those of lists as numbers."""
    return [int(key) if key.isdecimal() else key for key in keys]


def _index(node: list[Any], key: str, done: str, override: str) -> int:
    if key.isdecimal() and int(key) < len(node):
        return int(key)
    have = f"indices 0 to {len(node) - 1}" if node else "no items"
    raise ConfigError(
        f"--set {override}: {done} is a list with {have}, not {key!r}; use one of these or set "
        "the whole list"
    )


def _model_of(model: type[BaseModel] | None, key: str) -> type[BaseModel] | None:
    """The class of the default value of a field, where it is configuration."""
    if model is None or key not in model.model_fields:
        return None
    if isinstance(annotation := model.model_fields[key].annotation, type) and issubclass(
        annotation, BaseModel
    ):
        return annotation
    default = model.model_fields[key].get_default(call_default_factory=True, validated_data={})
    return type(default) if isinstance(default, BaseModel) else None


def _default_tag(model: type[BaseModel] | None, key: str) -> dict[str, Any]:
    """The tag of the union member that a left-out field would be."""
    chosen = _model_of(model, key)
    if chosen is None:
        return {}
    return {tag: chosen.model_fields[tag].default for tag in _TAGS if tag in chosen.model_fields}


def _similar_files(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; there is no folder {folder}"
    names = sorted(item.name for item in folder.iterdir() if item.suffix in _YAML_SUFFIXES)
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {folder / near[0]}?" if near else ""


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""

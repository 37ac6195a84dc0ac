"""Writes a first job for unknown data: YAML with the reasons as comments.

Choices are those of the recipes in `jobs/` where data is like theirs; the numbers of a column say
which. A person is meant to read and change it.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from penstock.config import JsonLinesSource, TextSource
from penstock.errors import ConfigError
from penstock.survey.profile import QUANTILES, ColumnSummary
from penstock.survey.survey import Survey

_HELD_OUT = 0.2
_PLAIN = re.compile(r"^[A-Za-z_./][A-Za-z0-9_./\-]*$")
_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
_TABLE_NAME = re.compile(r"[^A-Za-z0-9_.\-]")
_GROUPS = re.compile(r"(^|_)(user|member|customer|visitor|session|query)(_?id)?$", re.IGNORECASE)
_LIST_WORDS = re.compile(r"_?(ids?|history|hist|list|seq|sequence|last|recent|clicked|s)$", re.I)
_MANY_ACCESSES = 20
"""Of each key on average: then more than one pass helps."""
_LONG_TAIL = 20.0
_STEPS = 250
_NEGATIVES = 4
_FEW = 4
_WIDTH = 96


def draft_job(survey: Survey, command: str, target: Path) -> str:
    """Writes the job.

    Args:
      survey: what is known of the data.
      command: by which it was inspected, for the first comment.
      target: where the job will be, for the first comment; its name becomes the job's.

    Raises:
      ConfigError: nothing looks like a label, or there is nothing to learn from.
    """
    roles = survey.roles
    if roles.label is None and not survey.items:
        raise ConfigError(
            "no column looks like a label (0 and 1, or a rating, by a name like label, click or "
            "rating), so there is no job to write; name it: --label COLUMN; or, if every row is a "
            "positive, name the columns of the item: --item COLUMN,..."
        )
    if not roles.named("numeric", "categorical", "sequence"):
        raise ConfigError(
            "no column is left to learn from: each is the label, the time, an id or constant"
        )
    whole = "" if survey.profile.is_whole else "a sample of "
    lines = [
        *_remark(
            "",
            f"Drafted by `{command}` from {whole}{survey.profile.rows:,} rows. Read the reasons, "
            "change what you know better, and:",
        ),
        "#",
        f"#   penstock train {target}",
        f"name: {_text(_TABLE_NAME.sub('-', target.stem) or 'job')}",
        "",
        "data:",
        *_source(survey),
        *_time_and_split(survey),
        *_label(survey),
        *_numeric(survey),
        *_left_out(survey),
        "",
        *_features_tables_and_model(survey),
        "",
        *_training(survey),
    ]
    return "\n".join(lines) + "\n"


def _source(survey: Survey) -> Iterator[str]:
    source = survey.source
    yield "  source:"
    yield f"    format: {source.format}"
    yield f"    path: {_flow(source.path)}"
    if source.partitions:
        yield f"    partitions: {_flow(source.partitions)}"
    if isinstance(source, TextSource):
        for field in ("delimiter", "quote"):
            if (given := getattr(source, field)) is not None:
                yield f"    {field}: {json.dumps(given)}"
        if source.quoted_line_breaks:
            yield from _remark("    ", "Some quoted values hold line breaks.")
            yield "    quoted_line_breaks: true"
        if source.columns is not None:
            yield f"    columns: {_flow(source.columns)}"
        if survey.text_types:
            yield from _remark(
                "    ", "Columns not named here are read by their use: numbers or text."
            )
            yield f"    types: {_flow(_globbed_types(survey))}"
        if survey.null_values:
            yield from _remark("    ", "They stand among the numbers where one is missing.")
            yield f"    null_values: {_flow(survey.null_values)}"
    if isinstance(source, TextSource | JsonLinesSource):
        why = "" if survey.profile.is_whole else "Only a sample was looked at."
        if survey.malformed:
            why = f"{survey.malformed:,} rows cannot be read: see quarantine.jsonl in the run."
        if why:
            yield from _remark("    ", why)
            yield "    on_malformed_row: quarantine"


def _globbed_types(survey: Survey) -> dict[str, str]:
    names = [column.name for column in survey.profile.columns]
    types: dict[str, str] = {}
    for kind in dict.fromkeys(survey.text_types.values()):
        these = [name for name, one in survey.text_types.items() if one == kind]
        types |= dict.fromkeys(_globs(these, names), kind)
    return types


def _time_and_split(survey: Survey) -> Iterator[str]:
    name, profile = survey.roles.event_time, survey.profile
    at = None if name is None else _split_time(survey)
    if name is not None:
        yield f"  event_time: {_text(name)}"
        if profile[name].kind == "integer":
            yield f"  event_time_unit: {survey.roles.time_unit}"
    if at is not None:
        yield from _remark(
            "  ",
            f"What came before is trained on, what came later is held out: about {_HELD_OUT:.0%} "
            "of the rows. In use, too, a model meets only what came later.",
        )
        yield f"  split: {{by: time, at: {json.dumps(at)}}}"
    else:
        why = "No column says when a row came" if name is None else "All rows have one time"
        yield from _remark("  ", f"{why}: the last rows are held out, in the order of the files.")
        yield f"  split: {{by: fraction, evaluation: {_HELD_OUT}}}"


def _split_time(survey: Survey) -> str | None:
    """An instant with about `_HELD_OUT` of the rows after it; None: there is none."""
    assert survey.roles.event_time is not None
    column = survey.profile[survey.roles.event_time]
    numbers = column.numbers
    assert numbers is not None
    if numbers.minimum == numbers.maximum:
        return None
    # Between the quantiles 0.75 and 0.95, at a quarter of the way.
    low, high = (numbers.quantiles[QUANTILES.index(share)] for share in (0.75, 0.95))
    at = low + (high - low) * (1 - _HELD_OUT - 0.75) / 0.2
    at = at if at > numbers.minimum else numbers.maximum
    per_ms = {"s": 1e-3, "ms": 1.0, "us": 1e3, "ns": 1e6}[survey.roles.time_unit]
    scale = per_ms if column.kind == "integer" else 1.0
    first, ms, last = (math.ceil(one / scale) for one in (numbers.minimum, at, numbers.maximum))
    span = (high - low) / scale
    for unit, unit_ms in (("D", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        rounded = round(ms / unit_ms) * unit_ms
        # A round instant is easier to read, if it moves the border by little.
        if first < rounded <= last and abs(rounded - ms) <= span / 10:
            return str(np.datetime64(rounded, "ms").astype(f"datetime64[{unit}]")) + _ZEROS[unit]
    return f"{np.datetime64(min(max(ms, first + 1), last), 'ms')}Z"


_ZEROS = {"D": "T00:00:00Z", "h": ":00:00Z", "m": ":00Z", "s": "Z"}


def _label(survey: Survey) -> Iterator[str]:
    name, at_least = survey.roles.label, survey.roles.at_least
    if name is None:
        yield from _remark(
            "  ",
            "Every row is a positive. Each gives negatives, too: itself, with the item of another "
            "row.",
        )
        grouped = (name for name in survey.roles.named("categorical") if _GROUPS.search(name))
        user = next((name for name in grouped if name not in survey.items), None)
        if user is not None:
            yield from _remark("  ", "What a user chose is no negative of the same user.")
        spared = "" if user is None else f", user: {_text(user)}"
        yield (
            f"  negatives: {{per_positive: {_NEGATIVES}, columns: {_flow(survey.items)}{spared}}}"
        )
        return
    column = survey.profile[name]
    if column.missing:
        yield from _remark(
            "  ",
            f"{column.missing:,} rows have no label: they are left out of the loss and metrics.",
        )
    missing = ", missing: ignore" if column.missing else ""
    if at_least is None:
        yield f"  label: {{column: {_text(name)}{missing}}}"
        return
    numbers = column.numbers
    assert numbers is not None
    yield from _remark(
        "  ",
        f"{column.values.distinct} different numbers from {numbers.minimum:g} to "
        f"{numbers.maximum:g}; from the median on a row is positive.",
    )
    yield f"  label: {{column: {_text(name)}, at_least: {at_least:g}{missing}}}"


def _numeric(survey: Survey) -> Iterator[str]:
    names = [column.name for column in survey.profile.columns]
    numeric = [survey.profile[name] for name in survey.roles.named("numeric")]
    if not numeric:
        return
    yield "  numeric:"
    tailed = [column for column in numeric if _has_long_tail(column)]
    for has_infinite in (False, True):
        group = [one for one in tailed if _has_infinite(one) is has_infinite]
        if not group:
            continue
        yield from _remark(
            "    ", "Long tails: the logarithm brings them near the others. A missing number is 0."
        )
        yield from _item("    ", "columns", _globs([one.name for one in group], names))
        yield "      missing: {policy: fill, value: 0}"
        clip = f"{_clip(group)}, " if has_infinite else ""
        yield f"      transforms: [{clip}{{kind: log}}]"
    for column in numeric:
        if column not in tailed:
            yield from _scaled(column)


def _scaled(column: ColumnSummary) -> Iterator[str]:
    numbers = column.numbers
    assert numbers is not None
    mean = float(f"{numbers.mean:.3g}")
    factor = 1 / numbers.deviation if 0 < numbers.deviation < math.inf else 1.0
    clip = f"{_clip([column])}, " if numbers.infinite else ""
    yield from _item("    ", "columns", [column.name])
    if column.longest > 1:
        yield f"      width: {column.longest}"
    missing = f"; {column.missing:,} missing ones read as it" if column.missing else ""
    yield f"      # Mean {mean:g}, standard deviation {numbers.deviation:.3g}{missing}."
    yield f"      missing: {{policy: fill, value: {_number(mean)}}}"
    yield (
        f"      transforms: [{clip}{{kind: scale, offset: {_number(mean)}, "
        f"factor: {_number(float(f'{factor:.3g}'))}}}]"
    )


def _has_long_tail(column: ColumnSummary) -> bool:
    numbers = column.numbers
    if numbers is None or column.longest > 1:
        return False
    middle = abs(numbers.quantiles[QUANTILES.index(0.5)])
    return max(abs(numbers.minimum), abs(numbers.maximum)) > _LONG_TAIL * max(middle, 1.0)


def _has_infinite(column: ColumnSummary) -> bool:
    return column.numbers is not None and column.numbers.infinite > 0


def _clip(columns: Sequence[ColumnSummary]) -> str:
    """Infinite numbers read as the largest finite ones."""
    numbers = [column.numbers for column in columns if column.numbers is not None]
    low = min(one.minimum for one in numbers)
    high = max(one.maximum for one in numbers)
    return f"{{kind: clip, low: {_number(low)}, high: {_number(high)}}}"


def _left_out(survey: Survey) -> Iterator[str]:
    for column in survey.roles.columns:
        if column.role in {"id", "constant", "left out"}:
            yield from _remark("  ", f"Left out: {column.name} ({column.reason}).")


def _features_tables_and_model(survey: Survey) -> Iterator[str]:
    plan = _TablePlan.of(survey)
    if plan.keys:
        yield "features:"
        yield from _features(survey, plan)
        yield ""
    dims = [_dim(keys) for keys in plan.keys.values()]
    is_factorization = not survey.roles.named("numeric") and len(plan.table) <= _FEW
    if is_factorization and dims:
        dims = [max(dims)] * len(dims)
    default = max(dims, key=dims.count) if dims else 16
    optimizer = "{kind: adam, learning_rate: 2.0e-3}"
    yield "# A dim of about 2 * (different keys) ** 0.25, as a power of two from 4 to 32."
    yield "table_defaults:"
    yield f"  dim: {default}"
    yield f"  optimizer: {optimizer}"
    odd = [
        (name, dim)
        for name, dim in zip(plan.keys, dims, strict=True)
        if dim != default or name in plan.named
    ]
    if odd:
        yield ""
        yield "tables:"
        for name, dim in odd:
            yield (
                f"  - {{name: {_text(name)}, dim: {dim}, optimizer: {optimizer}}}"
                f" # {plan.keys[name]:,} keys"
            )
    yield ""
    yield "model:"
    if len(set(dims)) > 1:
        yield "  kind: dcn_v2 # takes any dims; dlrm wants one for all"
        yield "  cross_layers: 3"
        yield "  deep: [128, 64]"
    else:
        why = " # with few features, dot products are a matrix factorization"
        yield f"  kind: dlrm{why if is_factorization else ''}"
        if survey.roles.named("numeric"):
            yield "  bottom: [64, 32]"
        yield "  top: [128, 64]"


@dataclass(frozen=True)
class _TablePlan:
    """Which table each feature reads."""

    table: dict[str, str]
    """By column."""
    keys: dict[str, int]
    """Different keys by table."""
    shared: dict[str, str]
    """Columns of lists that read the table of another column: that column."""
    named: frozenset[str]
    """Tables that a feature has to name: the column's name does not imply them."""

    @classmethod
    def of(cls, survey: Survey) -> _TablePlan:
        shared = _shared(survey)
        columns = survey.roles.named("categorical", "sequence")
        of: dict[str, str] = {}
        for column in columns:
            name = allowed = _TABLE_NAME.sub("_", column) or "table"
            # Columns `a b` and `a_b` have tables of their own.
            while name in of.values() or (name != column and name in columns):
                name = f"{allowed}.{len(of)}"
            of[column] = name
        of |= {column: of[other] for column, other in shared.items()}
        keys: dict[str, int] = {}
        for column, table in of.items():
            keys[table] = max(keys.get(table, 0), survey.profile[column].values.distinct)
        named = {table for column, table in of.items() if table != column}
        return cls(of, keys, shared, frozenset(named))


def _shared(survey: Survey) -> dict[str, str]:
    """Columns of lists whose keys are those of another column: by name, that column."""
    found = {}
    profile = survey.profile
    counts = dict(zip([one.name for one in profile.columns], profile.counts, strict=True))
    for name in survey.roles.named("sequence"):
        for other in survey.roles.named("categorical"):
            is_named_so = _stem(other) and _stem(other) in name.lower()
            same = profile[name].kind == profile[other].kind
            if is_named_so and same and counts[name].share_within(counts[other]) > 0.5:
                found[name] = other
                break
    return found


def _stem(name: str) -> str:
    """`item` of item_id, items, item_list."""
    before, stem = "", name.lower()
    while stem != before:
        before, stem = stem, _LIST_WORDS.sub("", stem)
    return stem if len(stem) > 2 else ""


def _features(survey: Survey, plan: _TablePlan) -> Iterator[str]:
    names = [column.name for column in survey.profile.columns]
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in survey.roles.named("categorical", "sequence"):
        groups.setdefault(tuple(_feature_fields(survey.profile[name], plan)), []).append(name)
    for fields, members in groups.items():
        yield from _item("  ", "columns", _globs(members, names))
        yield from (f"    {field}" for field in fields)


def _feature_fields(column: ColumnSummary, plan: _TablePlan) -> Iterator[str]:
    """Lines of a feature's entry, besides its columns."""
    table = _text(plan.table[column.name])
    if column.name in plan.shared:
        share = f"most of its keys are in {plan.shared[column.name]!r}"
        yield f"table: {table} # {_comment(share)}"
    elif plan.table[column.name] != column.name:
        yield f"table: {table}"
    if column.longest > 1:
        lengths = column.lengths
        assert lengths is not None
        yield "pooling: mean"
        most = int(lengths.quantiles[QUANTILES.index(0.95)]) or 1
        yield f"max_keys: {most} # 95 % of the lists are no longer; one has {column.longest}"
        yield "keep: last"
    else:
        yield "missing: -1 # a missing value is a value of its own: it gets a row"
    if column.kind == "text":
        if column.hex_digits:
            yield f"transforms: [{{kind: hex}}] # {column.hex_digits} digits: the key itself"
        else:
            yield "transforms: [{kind: hash}] # text, as a 64-bit hash"


def _dim(keys: int) -> int:
    power: int = 2 ** round(math.log2(2 * max(keys, 1) ** 0.25))
    return min(max(power, 4), 32)


def _training(survey: Survey) -> Iterator[str]:
    profile, roles = survey.profile, survey.roles
    rows = profile.rows
    # Few rows need small batches, or there are too few steps.
    batch = 2 ** int(np.clip(np.log2(max(rows, 1) / _STEPS), 5, 12))
    accesses = [
        column.values.accesses / max(column.values.distinct, 1)
        for column in (profile[name] for name in roles.named("categorical", "sequence"))
    ]
    often = bool(accesses) and min(accesses) > _MANY_ACCESSES
    yield "training:"
    yield f"  batch_size: {batch}"
    if often and profile.is_whole:
        yield f"  epochs: 4 # each key comes {min(accesses):.0f} times or more on average"
    else:
        yield "  epochs: 1 # a second pass would learn the rare keys by heart"
    yield "  optimizer: {kind: adam, learning_rate: 1.0e-3}"
    grouped = [name for name in roles.named("categorical") if _GROUPS.search(name)]
    if grouped:
        yield "evaluation:"
        yield from _remark("  ", "How well the rows of each one are ordered among themselves.")
        yield f"  metrics: {{grouped_auc: {_flow(grouped[:1])}}}"


def _item(indent: str, key: str, names: Sequence[str]) -> Iterator[str]:
    """`- key: [a, b, ...]`, over several lines where it is long."""
    start, inside = f"{indent}- {key}: [", f"{indent}      "
    line = start
    for number, name in enumerate(names):
        piece = _text(name) + ("]" if number == len(names) - 1 else ",")
        space = "" if line in {start, inside} else " "
        if len(line) + len(space) + len(piece) > _WIDTH and line not in {start, inside}:
            yield line
            line, space = inside, ""
        line += space + piece
    yield line


def _globs(names: Sequence[str], all_names: Sequence[str]) -> list[str]:
    """The names, with `I[0-9]*` for four or more that are all the names that match it."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(name.rstrip("0123456789"), []).append(name)
    out = []
    for prefix, members in families.items():
        glob = f"{prefix}[0-9]*"
        exact = re.search(r"[*?\[]", prefix) is None
        found = [name for name in all_names if fnmatchcase(name, glob)]
        out += [glob] if exact and len(members) > 3 and found == members else members
    return out


def _text(value: str) -> str:
    """A YAML scalar that reads back as this text."""
    if _PLAIN.match(value) and value.lower() not in _WORDS and set(value) != {"."}:
        return value
    return json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    return repr(value) if "e" not in repr(value) or "." in repr(value) else f"{value:.1e}"


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(k)}: {_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return _text(value)
    return "[" + ", ".join(map(_text, value)) + "]"


def _remark(indent: str, text: str) -> Iterator[str]:
    prefix = f"{indent}# "
    yield from textwrap.wrap(
        _comment(text), _WIDTH, initial_indent=prefix, subsequent_indent=prefix
    )


def _comment(text: str) -> str:
    """A column's name may hold anything; a comment ends with its line."""
    return text if text.isprintable() else ascii(text)

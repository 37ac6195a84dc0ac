"""Names of a folder matched all at once: what a regular expression says of each alone."""

import re

import numpy as np
import pyarrow as pa
import pytest

from penstock.data.files import glob_pattern, is_hidden
from penstock.data.windows.patterns import PathPattern
from penstock.errors import DataError

FIELDS = ("YYYY", "MM", "DD", "HH")
# Of the last name of a path; what is known above it is a year, or nothing.
LEVELS = [
    "{YYYY}{MM}{DD}.csv",
    "{YYYY}{MM}{DD}{HH}",
    "a.{YYYY}-{MM}-{DD}T{HH}*.csv",
    "{MM}{DD}{YYYY}*",
    "{YYYY}-{MM}-{DD}.{HH}",
    "h{HH}é{DD}é{MM}-{YYYY}*",
    "day={DD}+{YYYY}+?+month={MM}",
    "{YYYY}{YYYY}{MM}{DD}{MM}*x",
    "*{YYYY}{MM}{DD}",
    "{YYYY}{MM}?{DD}*.csv",
    "[ab]{YYYY}{MM}{DD}[!ab]*",
    "é{YYYY}{MM}{DD}é*é",
    "{YYYY}{MM}{DD}**".replace("**", "*?"),
    "+ #&-^|~$(){YYYY}{MM}{DD}.\\*",
    "{YYYY}{MM}{DD}*[:[a]",
    "{YYYY}{MM}{DD}[]x]*[",
]
PLAIN = ["*.csv", "*", "a*b*c", "?", "part-*", "[!a-c]*", "*.csv?", "[]a]*", "*[a", "x[*]*"]


def plain(level, name, above):
    """Key of one name; None: it is not of the level; False: it contradicts itself, or `above`."""
    parts, fields, at = [], [], 0
    for found in re.finditer(r"\{(YYYY|MM|DD|HH)\}", level):
        parts.append(glob_pattern(level[at : found.start()]).pattern)
        beside = level[: found.start()][-1:] + level[found.end() :][:1]
        two = "2" if set(beside) & set("0123456789*?[]{}") else "1,2"
        parts.append(r"([0-9]{4})" if found[1] == "YYYY" else rf"([0-9]{{{two}}})")
        fields.append(found[1])
        at = found.end()
    parts.append(glob_pattern(level[at:]).pattern)
    found = re.fullmatch("".join(parts), name)
    if found is None or is_hidden(name):
        return None
    known = dict(zip(FIELDS, above, strict=False))
    for field, text in zip(fields, found.groups(), strict=True):
        if known.setdefault(field, int(text)) != int(text):
            return False
    return tuple(known[field] for field in FIELDS if field in known)


def drawn(level, rng):
    """A name that the level may match, or one that is nearly so."""
    name = level.replace("{YYYY}", str(rng.choice(["2024", "2025"])), int(rng.integers(1, 3)))
    name = name.replace("{YYYY}", "2025")
    for field in FIELDS[1:]:
        for _ in range(2):
            name = name.replace("{" + field + "}", str(rng.choice(["01", "12", "07", "7"])), 1)
    name = re.sub(r"\[.[^]]*\]", lambda _: str(rng.choice(list("abxé]:[\r"))), name)
    for glob in ("*", "?"):
        while glob in name:
            name = name.replace(glob, "".join(rng.choice(list("ab1é\nx"), rng.integers(0, 3))), 1)
    name = name.replace("\r", "*")
    kind = rng.integers(0, 10)
    if kind < 4:
        at = int(rng.integers(0, len(name) + 1))
        name = name[:at] + str(rng.choice(["", "x", "7", ".", "é"])) + name[at + kind % 2 :]
    prefix, end = ("_", ".", "")[min(kind - 4, 2)] if kind > 3 else "", "~" if kind == 9 else ""
    return prefix + name + end


def by_key(pattern, level, names, above):
    array = pa.array(["zz", *names, "zz"], pa.large_string())[1:-1]  # one that has an offset
    found = pattern.matches(level, array, above)
    assert found.keys == sorted(found.keys)
    return {
        key: array[rows].to_pylist() if isinstance(rows, slice) else array.take(rows).to_pylist()
        for key, rows in zip(found.keys, found.rows, strict=True)
    }


def expected(level, names, above):
    found = {}
    for name in names:
        key = plain(level, name, above)
        if key is not None:
            found.setdefault(key, []).append(name)
    return found


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("above", [(), (2025,)])
def test_names_with_a_date(level, above):
    rng = np.random.default_rng(len(level))
    pattern = PathPattern(f"logs/{'{YYYY}' if above else 'z*'}/{level}")
    num_matched = 0
    for count in (1, 7, 300):
        names = sorted({drawn(level, rng) for _ in range(count)})
        for name in [name for name in names if plain(level, name, above) is False]:
            with pytest.raises(DataError, match=re.escape(f"z/{name}: its path says two times")):
                pattern.matches(1, pa.array([name], pa.large_string()), above, "z")
            names.remove(name)
        reference = expected(level, names, above)
        assert by_key(pattern, 1, names, above) == reference
        num_matched += sum(len(one) for one in reference.values())
    assert num_matched > 4


@pytest.mark.parametrize("level", PLAIN)
def test_names_without_a_date(level):
    rng = np.random.default_rng(len(level))
    pattern = PathPattern(f"{{YYYY}}{{MM}}{{DD}}/{level}")
    key = (2025, 1, 2)
    names = sorted({drawn(level, rng) for _ in range(300)} - {""})
    reference = expected(level, names, key)
    assert reference
    assert by_key(pattern, 1, names, key) == reference
    assert by_key(pattern, 1, [], key) == {}


def test_one_day_of_a_folder_shares_its_names():
    pattern = PathPattern("{YYYY}{MM}{DD}*.csv")
    names = pa.array([f"202501{day:02}{part}.csv" for day in (1, 2, 3) for part in "abc"])
    found = pattern.matches(0, names.cast(pa.large_string()), ())
    assert found.rows == [slice(0, 3), slice(3, 6), slice(6, 9)]


def test_a_set_of_brackets_and_colons_is_no_class_of_letters():
    pattern = PathPattern("{YYYY}{MM}{DD}/[[:alpha:]*")
    found = by_key(pattern, 1, ["[x", "a", "b", "lx"], (2025, 1, 2))
    assert found == {(2025, 1, 2): ["[x", "a", "lx"]}


@pytest.mark.parametrize("glob", ["[z-a]", "[!]"])
def test_a_glob_that_is_none_is_named(glob):
    with pytest.raises(DataError, match=re.escape(f"x{glob}.csv: no glob")):
        PathPattern(f"{{YYYY}}{{MM}}{{DD}}/x{glob}.csv")

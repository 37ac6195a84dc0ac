"""docs/events.md, as the registry says; `python -m tests.unit.events.page` writes it."""

from pathlib import Path

from penstock.events.registry import KINDS, ROLES, Group

PAGE = Path(__file__).resolve().parents[3] / "docs" / "events.md"
MARK = "<!-- From here on made by `python -m tests.unit.events.page`, of the registry. -->"


def rows(fields):
    yield "| quantity | unit | meaning |"
    yield "|---|---|---|"
    for name, field in fields.items():
        if isinstance(field, Group):
            yield f"| `{name}/` | | [{field.name}](#{field.name.lower().replace(' ', '-')}) |"
        else:
            yield f"| `{name}` | {field.unit.symbol} | {field.meaning} |"
    yield ""


def groups_of(fields, found):
    """Each group once, those within another behind it."""
    for field in fields.values():
        if isinstance(field, Group) and field.name not in found:
            found[field.name] = field
            groups_of(field.fields, found)
    return found


def generated():
    found = {}
    lines = [MARK, "", "## Roles", ""]
    lines += [f"- `{name}`: {meaning}." for name, meaning in ROLES.items()]
    lines += ["", "## Kinds of events", ""]
    for name, kind in KINDS.items():
        after = " Told again where a run goes on from an earlier step." if kind.is_computed else ""
        lines += [f"### {name}", "", kind.meaning + after, "", *rows(kind.fields)]
        groups_of(kind.fields, found)
    lines += ["## Groups of quantities", ""]
    for group in found.values():
        lines += [f"### {group.name}", "", group.meaning, "", *rows(group.fields)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(head + generated(), encoding="utf-8")

"""metrics.jsonl: every event of a run, one a line; written as they come, and read again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError, EventError
from penstock.events.event import Event, event_of, line_of
from penstock.report.folder import cannot_write, replace_file


class JsonLines:
    """metrics.jsonl: every event, a line each, written as it comes.

    Args:
      path: of the file; lines that are there stay, except as `last` says.
      last: by kind the last step whose lines stay; of kinds that are not named all stay.

    Raises:
      ConfigError: the file cannot be read or written.
    """

    def __init__(self, path: Path, last: Mapping[str, int]) -> None:
        self._path = path
        try:
            lines = [(line, event_of(line)) for line in _read_lines(path)]
            kept = [(line, of) for line, of in lines if of.step <= last.get(of.kind, of.step)]
            replace_file(path, "".join(f"{json.dumps(line)}\n" for line, _ in kept))
        except OSError as error:
            raise cannot_write(path.parent, error) from None
        except ValueError as error:
            raise ConfigError(f"{path}: cannot be read: {error}; move it away") from None
        self.kept = [event for _, event in kept]
        """Events of the lines that stay, oldest first."""

    def take(self, event: Event) -> None:
        """Appends a line.

        Raises:
          ConfigError: the disk is full, or gone.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line_of(event)) + "\n")
        except OSError as error:
            raise cannot_write(self._path.parent, error) from None

    def close(self) -> None:
        """Nothing is open."""


def read_events(path: Path) -> list[Event]:
    """Reads what `JsonLines` wrote, of before too; a last line torn by a crash is left out.

    Raises:
      OSError, ValueError: it cannot be read, or a line is no event.
    """
    return [event_of(line) for line in _read_lines(path)]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    try:
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except RecursionError:
        raise EventError("a line is nested too deeply to be an event") from None

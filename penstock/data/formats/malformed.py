"""Finds the rows that are malformed, by halving, where a parser says only that there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penstock.data.quarantine import MalformedRow


def find_malformed(
    rows: Sequence[bytes], reason: Callable[[Sequence[bytes]], str | None], fail_fast: bool
) -> tuple[list[MalformedRow], bytes]:
    """Finds the malformed ones among rows.

    Args:
      rows: without their line feeds.
      reason: what is wrong with some of the rows given; None: nothing. Of one row, it says what is
        wrong with that one.
      fail_fast: stop at the first.

    Returns:
      The malformed rows in order, and the text of the others; with `fail_fast` none of these, if
      there is a malformed row.
    """
    malformed: list[MalformedRow] = []
    # Ranges still to look at, the first on top.
    stack = [(0, len(rows))] if rows else []
    while stack and not (fail_fast and malformed):
        start, stop = stack.pop()
        why = reason(rows[start:stop])
        if why is None:
            continue
        if stop - start == 1:
            malformed.append(MalformedRow(start, why, rows[start].decode(errors="replace")))
            continue
        middle = (start + stop) // 2
        stack += [(middle, stop), (start, middle)]
    if fail_fast and malformed:
        return malformed, b""
    bad = {row.line for row in malformed}
    good = [row for number, row in enumerate(rows) if number not in bad]
    return malformed, b"\n".join([*good, b""]) if good else b""

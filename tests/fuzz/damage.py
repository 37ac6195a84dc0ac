"""Damage done to the bytes of a file, as a hypothesis strategy."""

from typing import NamedTuple

from hypothesis import strategies as st

TEXT = (
    b"\n",
    b"\r\n",
    b"\r",
    b'"',
    b",",
    b"\t",
    b"{",
    b"}",
    b"[",
    b"\\",
    b"\x00",
    b"\xff",
    b"-",
    b"1e9",
)
BINARY = (
    b"\x00",
    b"\xff",
    b"\x80\x00\x00\x00",
    b"\x7f\xff\xff\xff\xff\xff\xff\xff",
    b"PAR1",
    b"ORC",
)


class Step(NamedTuple):
    """Damage in one place."""

    kind: str
    where: float
    count: int
    piece: bytes
    region: str


def damage(pieces=BINARY):
    """One to three steps of damage."""
    step = st.builds(
        Step,
        st.sampled_from(["flip", "insert", "delete", "zero", "truncate", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 40),
        st.sampled_from(pieces),
        # Footers and headers hold what readers trust.
        st.sampled_from(["anywhere", "anywhere", "end", "start"]),
    )
    return st.lists(step, min_size=1, max_size=3)


def damaged(data, steps):
    """The bytes after the damage."""
    for kind, where, count, piece, region in steps:
        span = len(data) if region == "anywhere" else min(len(data), 200)
        place = int(where * span) + (len(data) - span if region == "end" else 0)
        if kind == "flip" and data:
            place = min(place, len(data) - 1)
            flipped = data[place] ^ (1 << count % 8)
            data = data[:place] + bytes([flipped]) + data[place + 1 :]
        elif kind == "insert":
            data = data[:place] + piece + data[place:]
        elif kind == "delete":
            data = data[:place] + data[place + count :]
        elif kind == "zero":
            data = data[:place] + bytes(min(count, len(data) - place)) + data[place + count :]
        elif kind == "truncate":
            data = data[:place]
        else:
            data = data[: place + count] + data[place:]
    return data

"""Standard output that closes, fills up, or has few letters; terminals of any width."""

import gc
import io
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
from rich.table import Table

from penstock.errors import ConfigError
from penstock.report import terminal
from penstock.report.terminal import (
    NobodyReads,
    Stream,
    complain,
    console_of,
    ignored,
    needed,
    say,
    standard_streams,
)


@pytest.fixture
def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w")
    yield stream
    os.set_blocking(write, False)
    os.dup2(os.open(os.devnull, os.O_WRONLY), write)
    stream.close()


@pytest.fixture
def full():
    stream = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    yield stream
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    stream.close()


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def fails(stream):
    """What `Stream` is told, after writing three times."""
    reasons = []
    guarded = Stream(stream, reasons.append)
    for _ in range(3):
        assert guarded.write("text\n") == 5
        guarded.flush()
    (reason,) = reasons  # once
    return reason


def test_what_cannot_be_written_is_told_once(closed_pipe, full):
    assert isinstance(fails(closed_pipe), BrokenPipeError)
    assert fails(full).strerror == "No space left on device"
    assert "closed" in str(fails(None))
    assert "closed" in str(fails(closed()))


def test_a_stream_that_is_collected_says_nothing():
    reasons, inner = [], io.StringIO()
    guarded = Stream(inner, reasons.append)
    print("text", file=guarded)
    assert inner.getvalue() == "text\n"
    inner.close()
    del guarded
    gc.collect()
    assert not reasons


def test_output_that_is_needed_ends_the_command(closed_pipe, full):
    for stream, error in ((closed_pipe, NobodyReads), (full, ConfigError), (None, ConfigError)):
        with pytest.raises(error) as raised:
            print("text", file=Stream(stream, needed), flush=True)
        if error is ConfigError:
            assert str(raised.value).startswith("standard output: cannot be written: ")


def test_rich_prints_into_it(closed_pipe):
    for item in ("text", Table("column")):
        console_of(Stream(closed_pipe, ignored)).print(item)
        with pytest.raises(NobodyReads):
            console_of(Stream(closed_pipe, needed)).print(item)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_an_encoding_lacks_are_escaped(encoding):
    raw = io.BytesIO()
    stream = Stream(io.TextIOWrapper(raw, encoding=encoding), needed)
    assert stream.encoding == encoding
    for text in ("café", "日本", "a\udce9"):
        print(text, file=stream, flush=True)
    ascii_only = [b"caf\\xe9", b"\\u65e5\\u672c", b"a\\udce9", b""]
    found = raw.getvalue().split(b"\n")
    if encoding == "ascii":
        assert found == ascii_only
    else:
        assert found == ["café".encode(encoding), *found[1:2], *ascii_only[2:]]
        assert found[1] == ("日本".encode() if encoding == "utf-8" else ascii_only[1])


def test_as_much_is_written_as_was_given_whatever_its_escapes_take():
    stream = Stream(io.TextIOWrapper(io.BytesIO(), encoding="ascii"), needed)
    assert [stream.write(text) for text in ("", "text", "日本")] == [0, 4, 2]


@pytest.mark.parametrize("ends", [None, RuntimeError])
def test_a_command_has_guarded_streams_and_gives_the_others_back(monkeypatch, full, ends):
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(sys, "stderr", errors)
    with pytest.raises(ends) if ends else nullcontext(), standard_streams() as output:
        assert output is sys.stdout and sys.stderr is not errors
        with pytest.raises(ConfigError, match="standard output: cannot be written: No space left"):
            print("what the command is for", flush=True)  # it must arrive
        print("what accompanies it", file=sys.stderr)
        if ends is not None:
            raise ends
    assert (sys.stdout, sys.stderr) == (full, errors)
    assert errors.getvalue() == "what accompanies it\n"


def test_errors_that_nobody_can_read_end_no_command(monkeypatch, full):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", full)
    with standard_streams() as output:
        print("lost", file=sys.stderr, flush=True)
        print("kept", flush=True)
    assert output.write("x") == 1 and sys.stdout.getvalue() == "kept\nx"


@pytest.mark.parametrize(
    ("columns", "width"),
    [("0", 80), ("1", 40), ("5", 40), ("120", 120), ("999999999", 1000), ("-3", 80), ("x", 80)],
)
def test_widths(monkeypatch, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((80, 24)))
    console = console_of(io.StringIO())
    assert console.width == width
    console.print(Table("column", title="title"))


def test_lines_that_may_be_lost(monkeypatch, closed_pipe, full):
    for stream in (None, closed(), closed_pipe, full):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        say("text")
        complain("text")


def test_markup_is_text(capsys):
    complain("error: [red]a.csv[/red] :smile:")
    assert capsys.readouterr().err == "error: [red]a.csv[/red] :smile:\n"


CLOSED = """
import os, sys
from contextlib import suppress
from penstock.report.terminal import standard_streams
with standard_streams() as output:
    opened = os.open({path!r}, os.O_RDWR | os.O_CREAT)
    assert opened > 2, opened
    for number in (1, 2):
        with suppress(OSError):
            os.write(number, b"what a library prints")
    output.failed = lambda error: None
    print("text")
    print("text", file=sys.stderr)
assert os.read(opened, 9) == b""
"""


@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full 2>&1"])
def test_no_file_gets_the_descriptor_of_a_closed_stream(tmp_path, redirection):
    script = CLOSED.format(path=str(tmp_path / "data"))
    command = ["bash", "-c", f'"$0" -c "$1" {redirection}', sys.executable, script]
    assert subprocess.run(command, check=False).returncode == 0


def test_what_is_left_at_the_end_is_thrown_away(full):
    print("more than is flushed", end="", file=full)
    terminal._settle(full)
    full.flush()

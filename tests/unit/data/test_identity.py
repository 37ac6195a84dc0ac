"""Which file it is: by its size and the blocks at its front and end."""

import gzip
import os

import pyarrow.fs as fs
import pytest

from penstock.data.identity import tag_of
from penstock.errors import DataError

LOCAL = fs.LocalFileSystem()
BLOCK = 16_384


@pytest.mark.parametrize("size", [1, 100, BLOCK, BLOCK + 1, 2 * BLOCK + 5, 10 * BLOCK])
def test_front_size_and_end_tell(size, tmp_path):
    path, other = str(tmp_path / "a"), str(tmp_path / "b")
    content = bytes(number % 251 for number in range(size))

    def tag(data):
        with open(other, "wb") as file:
            file.write(data)
        return tag_of(LOCAL, other)

    with open(path, "wb") as file:
        file.write(content)
    before = tag_of(LOCAL, path)
    os.utime(path, (0, 0))
    assert tag_of(LOCAL, path) == before
    assert (before.path, before.size) == (path, size)
    assert tag(content).digest == before.digest
    for at in {0, min(size, BLOCK) - 1, max(size - BLOCK, 0), size - 1}:
        changed = bytearray(content)
        changed[at] ^= 1
        assert tag(bytes(changed)).digest != before.digest, at
    for changed in (content + b"x", content[:-1], b"x" + content):
        assert tag(changed).digest != before.digest
    # Of its front: that of a file which ends there.
    assert tag_of(LOCAL, path, size - 1)[1:] == tag(content[:-1])[1:]


def test_no_more_than_two_blocks_are_read(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # it takes no room
    assert tag_of(LOCAL, str(path)).size == 1 << 40


def test_when_gzip_compressed_does_not_count(tmp_path):
    tags = set()
    for number, (text, time) in enumerate([(b"a\n" * 99, 1), (b"a\n" * 99, 2), (b"b\n" * 99, 1)]):
        path = tmp_path / f"{number}.gz"
        path.write_bytes(gzip.compress(text, mtime=time))
        tags.add(tag_of(LOCAL, str(path)).digest)
    assert len(tags) == 2


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(DataError, match=rf"^{tmp_path}/gone: cannot be read"):
        tag_of(LOCAL, str(tmp_path / "gone"))

"""Files read from the front, decompressed where they are compressed."""

from __future__ import annotations

import io
from types import TracebackType

import pyarrow as pa
from pyarrow import fs

from penstock.config import compression_of_path
from penstock.errors import DataError

_READ_AHEAD_BYTES = 1 << 20


class ByteStream:
    """The bytes of a file; the ending of its name says how they are compressed.

    Members or frames that follow each other in one file are one stream. A context manager.

    Raises:
      DataError: the file cannot be read, or what is compressed is damaged or ends early; by every
        method.
    """

    def __init__(self, filesystem: fs.FileSystem, path: str) -> None:
        self._path = path
        self._kind = compression_of_path(path)
        try:
            self._size: int = filesystem.get_file_info(path).size or 0
            self._raw = _Counted(
                filesystem.open_input_stream(path, compression=None, buffer_size=_READ_AHEAD_BYTES)
            )
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
        plain = pa.PythonFile(self._raw, mode="r")
        self._stream = plain if self._kind is None else pa.CompressedInputStream(plain, self._kind)

    @property
    def bytes_read(self) -> int:
        """Bytes of the file, as it is stored, that were read so far."""
        return self._raw.count

    def read(self, size: int) -> bytes:
        """At most `size` bytes more; none at the end."""
        try:
            data: bytes = self._stream.read(size)
        except (OSError, pa.ArrowException) as error:
            where = ""
            if self._kind is not None:
                where = f" ({self._kind}, before byte {self.bytes_read:,} of {self._size:,})"
            raise DataError(f"{self._path}: cannot be read: {error}{where}") from None
        return data

    def read_whole(self, size: int) -> bytes:
        """`size` bytes more, fewer only at the end."""
        data = b""
        while len(data) < size and (more := self.read(size - len(data))):
            data += more
        return data

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.close()


class _Counted(io.RawIOBase):
    """Counts what is read."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self.count = 0
        self._stream = stream

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size)
        self.count += len(data)
        return data

    def close(self) -> None:
        self._stream.close()
        super().close()

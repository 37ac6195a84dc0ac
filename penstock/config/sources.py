"""Sources: which files are read, in which format.

A new one is a class here, in `AnyFileSource`, and its line in `penstock/data/opening.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from penstock.config.base import MAY_CHANGE, Config, Int64, PositiveInt

PartitionType: TypeAlias = Literal["string", "int64", "uint64", "float64", "date", "timestamp"]
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
"""What a folder says of a value that is null."""


class FileSource(Config):
    """Fields common to all sources that are files."""

    endings: ClassVar[Mapping[str, str]]
    """`format` by ending of the files' names."""
    extents: ClassVar[str]
    """What its extents are called in files of the format."""

    path: Annotated[str | tuple[str, ...], MAY_CHANGE]
    """Files, directories or globs (`day_*.parquet`), local or of any pyarrow file system
    (`s3://bucket/key`).

    Files are read in the order given; those of one directory or glob in order of name.
    """
    partitions: Mapping[Annotated[str, Field(min_length=1, pattern="^[^/=]+$")], PartitionType] = {}
    """Type by name of columns that folders name, as Hive does (`region=01/day=2024-01-03/`); they
    come behind those of the files, in order of name. A name that is not here is no column.
    """

    @property
    def globs(self) -> tuple[str, ...]:
        """Paths, directories and globs of its files."""
        return (self.path,) if isinstance(self.path, str) else self.path


class ParquetSource(FileSource):
    """Parquet files of one schema."""

    endings: ClassVar[Mapping[str, str]] = {"parquet": "parquet"}
    extents: ClassVar[str] = "row groups"
    format: Literal["parquet"] = "parquet"


class TextSource(FileSource):
    """CSV or TSV files, plain or compressed (`.gz`, `.bz2`, `.zst`)."""

    endings: ClassVar[Mapping[str, str]] = {"csv": "csv", "tsv": "tsv"}
    extents: ClassVar[str] = "pieces of text"
    format: Literal["csv", "tsv"] = "csv"
    delimiter: str | None = None
    """The character between values; null: a comma in `csv`, a tab in `tsv`."""
    quote: str | None = None
    """The character around values that hold delimiters; inside of them it is doubled. `none`:
    quotes are text. null: `"` in `csv`, `none` in `tsv`.
    """
    quoted_line_breaks: Annotated[bool, MAY_CHANGE] = False
    """Quoted values may hold line breaks. Each byte is then read twice, to find the rows. Where it
    is false, a quoted value that does not close on its line stops the run.
    """
    columns: tuple[str, ...] | None = None
    """Names of the columns of files without a header; null: the first line is the header.

    A name may stand for several: `I{1..13}` is I1, I2, ... I13.
    """
    types: Mapping[str, Literal["string", "int64", "float32", "float64"]] = {}
    """Type by column name or glob; a column without one: label, weight and numeric columns float64,
    event time int64, others string.
    """
    null_values: tuple[Annotated[str, Field(min_length=1, pattern=r"^[^\t\r\n,]+$")], ...] = ()
    """Texts that mean null in every column (`\\N`, `NULL`), besides the empty field."""
    on_malformed_row: Annotated[Literal["fail", "quarantine"], MAY_CHANGE] = "fail"
    """A row with the wrong number of fields or a value that is not of its type.

    `fail` stops with file:line; `quarantine` leaves the row out, counts it and appends it to
    quarantine.jsonl in the run.
    """

    @property
    def delimiter_character(self) -> str:
        """The character between values."""
        return self.delimiter or ("\t" if self.format == "tsv" else ",")

    @property
    def quote_character(self) -> str | None:
        """The character around values; None: quotes are text."""
        if self.quote is None:
            return '"' if self.format == "csv" else None
        return None if self.quote == "none" else self.quote

    @field_validator("delimiter", "quote")
    @classmethod
    def _is_one_character(cls, given: str | None, info: ValidationInfo) -> str | None:
        if given is None or (info.field_name == "quote" and given == "none"):
            return given
        if given == "\\t":
            raise ValueError('a tab is written "\\t", in double quotes')
        if len(given) != 1:
            other = "" if info.field_name == "delimiter" else ", or none"
            raise ValueError(f"one character expected{other}, not the {len(given)} of {given!r}")
        if not "\x01" <= given <= "~" or given in "\r\n":
            raise ValueError(f"{given!r} cannot be used: any other ASCII character can")
        return given

    @model_validator(mode="after")
    def _dialect_is_whole(self) -> TextSource:
        delimiter, quote = self.delimiter_character, self.quote_character
        if delimiter == quote:
            raise ValueError(f"delimiter and quote are both {quote!r}; they must differ")
        if self.quoted_line_breaks and quote is None:
            raise ValueError("quoted_line_breaks needs quotes, but quote is none; set quote")
        for text in self.null_values:
            if delimiter in text:
                raise ValueError(f"null_values: {text!r} holds the delimiter {delimiter!r}")
        return self


class OrcSource(FileSource):
    """ORC files of one schema."""

    endings: ClassVar[Mapping[str, str]] = {"orc": "orc"}
    extents: ClassVar[str] = "stripes"
    format: Literal["orc"] = "orc"


class ArrowSource(FileSource):
    """Arrow IPC files (`.arrow`, Feather version 2) or streams, of one schema."""

    endings: ClassVar[Mapping[str, str]] = {
        "arrow": "arrow",
        "arrows": "arrow",
        "feather": "arrow",
    }
    extents: ClassVar[str] = "record batches"
    format: Literal["arrow"] = "arrow"


JsonType: TypeAlias = Literal[
    "string",
    "int64",
    "uint64",
    "float32",
    "float64",
    "bool",
    "list<string>",
    "list<int64>",
    "list<uint64>",
    "list<float64>",
    "list<bool>",
]


class JsonLinesSource(FileSource):
    """JSON lines, plain or compressed (`.gz`, `.bz2`, `.zst`): one object a line.

    A field that is absent is null. Columns are the fields of the first 1000 lines of the first
    file, and those of `types`.
    Objects and lists of lists within a row are not read.
    """

    endings: ClassVar[Mapping[str, str]] = {"jsonl": "jsonl", "ndjson": "jsonl"}
    extents: ClassVar[str] = "pieces of text"
    format: Literal["jsonl"] = "jsonl"
    types: Mapping[str, JsonType] = {}
    """Type by column name or glob; a column without one has that of its first values (label,
    weight and numeric columns that are integers there: float64). Text stays text, times too.
    """
    on_malformed_row: Annotated[Literal["fail", "quarantine"], MAY_CHANGE] = "fail"
    """A line that is no JSON object, or a value that is not of its column's type.

    `fail` stops with file:line; `quarantine` leaves the row out, counts it and appends it to
    quarantine.jsonl in the run.
    """


TfRecordType: TypeAlias = Literal[
    "int64",
    "float32",
    "float64",
    "string",
    "bytes",
    "list<int64>",
    "list<float32>",
    "list<float64>",
    "list<string>",
    "list<bytes>",
]


class TfRecordSource(FileSource):
    """TFRecord files of `tf.train.Example`, plain or compressed (`.gz`).

    Needs `pip install 'penstock[tfrecord]'`. A feature that a record lacks is null.
    """

    endings: ClassVar[Mapping[str, str]] = {"tfrecord": "tfrecord", "tfrecords": "tfrecord"}
    extents: ClassVar[str] = "files"
    format: Literal["tfrecord"] = "tfrecord"
    types: Mapping[str, TfRecordType] = {}
    """Type by name of the features that are columns, at least one; others are not read.

    A name may stand for several: `I{1..13}` is I1, I2, ... I13. A type that is no list takes one
    value a record.
    """


class SyntheticSource(Config):
    """Click log made by a known teacher, so that the best reachable AUC is known.

    Columns: click, event_time, n0..., c0..., teacher. Row r is a pure function of (seed, r).
    """

    extents: ClassVar[str] = "pieces"
    format: Literal["synthetic"] = "synthetic"
    rows: Annotated[int, Field(gt=0, le=10**11)] = 400_000
    num_categorical: Annotated[int, Field(gt=0, le=10_000)] = 8
    num_numeric: Annotated[int, Field(ge=0, le=10_000)] = 4
    keys_per_feature: PositiveInt = 100_000
    exponent: Annotated[float, Field(gt=0, le=4, allow_inf_nan=False)] = 1.2
    """Power-law exponent of the keys: the r-th most frequent key has weight r ** -exponent."""
    seed: Int64 = 0

    @property
    def globs(self) -> tuple[str, ...]:
        """There are no files."""
        return ()


class PythonSource(Config):
    """Rows that a class of the user's gives, see `penstock.data.formats.users_source`.

    Its module is imported when the data is opened, and by nothing else.
    """

    extents: ClassVar[str] = "parts"
    format: Literal["python"] = "python"
    factory: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]
    """`module:name` of a class or function on the Python path."""
    arguments: Annotated[Mapping[str, Any], MAY_CHANGE] = {}
    """It is called with these, by name."""

    @property
    def globs(self) -> tuple[str, ...]:
        """There are no files."""
        return ()


AnyFileSource: TypeAlias = (
    ParquetSource | OrcSource | ArrowSource | TextSource | JsonLinesSource | TfRecordSource
)

FILE_SOURCES: tuple[type[FileSource], ...] = get_args(AnyFileSource)
_FORMATS = {end: name for source in FILE_SOURCES for end, name in source.endings.items()}
FILE_FORMATS = tuple(dict.fromkeys(_FORMATS.values()))
"""All values of `format` that are files."""


_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


def compression_of_path(path: str) -> str | None:
    """Pyarrow's name of the compression that a path's ending stands for; None: there is none."""
    return next((name for end, name in _COMPRESSIONS.items() if path.endswith(end)), None)


def format_of_path(path: str) -> str | None:
    """The `format` that a path's ending stands for (`.gz` and the like aside); None: none."""
    if compression_of_path(path) is not None:
        path = path.rpartition(".")[0]
    return _FORMATS.get(path.rpartition(".")[2].lower())

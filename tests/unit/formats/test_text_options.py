"""CSV and TSV: delimiters, quotes, line breaks in quotes, compressions; files that change or go."""

import gzip
import io
import os
import stat

import pytest
from pyarrow import fs

from penstock.config import TextSource, format_of_path, parse_job
from penstock.data import Dataset
from penstock.data.formats import lines
from penstock.data.formats.compressed import ByteStream
from penstock.data.formats.text import open_text
from penstock.data.source import RowCount, Vector
from penstock.errors import ConfigError, DataError
from tests.contract.data_cases import COMPRESSIONS, read_all

ROWS = 400


def job_of(path, features=("C1",), **source):
    return parse_job({
        "data": {
            "source": {"format": "csv", "path": str(path), **source},
            "label": {"column": "label"},
            "numeric": [{"columns": ["I*"]}],
            "shuffle": {"block_rows": 0},
        },
        "features": [{"columns": list(features), "transforms": [{"kind": "hash"}]}],
    })


def numbers(job):
    return [int(value) for batch in read_all(Dataset.open(job)) for value in batch.dense[:, 0]]


def message(kind, call, *arguments):
    with pytest.raises(kind) as caught:
        call(*arguments)
    return str(caught.value)


def rows(count=ROWS):
    return b"label,I1,C1\n" + b"".join(b"%d,%d,key%d\n" % (n % 2, n, n) for n in range(count))


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("delimiter", [";", "|", "\t", "\x01", " "])
def test_delimiters_and_no_header(tmp_path, delimiter, compression):
    path = tmp_path / f"x.csv.{compression}".rstrip(".")
    data = rows().replace(b",", delimiter.encode())
    path.write_bytes(COMPRESSIONS[compression](data))
    assert numbers(job_of(path, delimiter=delimiter)) == list(range(ROWS))
    bare = data.split(b"\n", 1)[1]
    path.write_bytes(COMPRESSIONS[compression](bare))
    names = ["label", "I1", "C1"]
    assert numbers(job_of(path, delimiter=delimiter, columns=names)) == list(range(ROWS))


def keys(job):
    (batch,) = read_all(Dataset.open(job))
    return batch.sparse["C1"].values.tolist()


def test_quotes(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("label,I1,C1\n1,1,'a,b'\n0,2,'it''s'\n1,3,6\" pipe\n")
    plain = tmp_path / "plain.tsv"
    plain.write_text("label\tI1\tC1\n1\t1\ta,b\n0\t2\tit's\n1\t3\t6\" pipe\n")
    assert keys(job_of(path, quote="'")) == keys(job_of(plain, format="tsv"))
    path.write_text('label,I1,C1\n1,1,"a\n0,2,b"\n')
    plain.write_text('label\tI1\tC1\n1\t1\t"a\n0\t2\tb"\n')
    assert keys(job_of(path, quote="none")) == keys(job_of(plain, format="tsv"))
    # Tab-separated text may have quotes too.
    plain.write_text('label\tI1\tC1\n1\t1\t"a\tb"\n')
    path.write_text("label,I1,C1\n1,1,a\tb\n")
    assert keys(job_of(plain, format="tsv", quote='"')) == keys(job_of(path))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"delimiter": "||"}, "delimiter: one character expected, not the 2 of '||'"),
        ({"delimiter": ""}, "delimiter: one character expected, not the 0 of ''"),
        ({"delimiter": "\\t"}, 'delimiter: a tab is written "\\t", in double quotes'),
        ({"delimiter": "\n"}, r"delimiter: '\n' cannot be used: any other ASCII character can"),
        ({"delimiter": "ä"}, "delimiter: 'ä' cannot be used: any other ASCII character can"),
        ({"quote": "''"}, "quote: one character expected, or none, not the 2 of \"''\""),
        ({"delimiter": '"'}, "delimiter and quote are both '\"'; they must differ"),
        ({"quote": ","}, "delimiter and quote are both ','; they must differ"),
        (
            {"quote": "none", "quoted_line_breaks": True},
            "quoted_line_breaks needs quotes, but quote is none; set quote",
        ),
        (
            {"format": "tsv", "quoted_line_breaks": True},
            "quoted_line_breaks needs quotes, but quote is none; set quote",
        ),
        ({"delimiter": ";", "null_values": ["a;b"]}, "null_values: 'a;b' holds the delimiter ';'"),
    ],
)
def test_options_that_cannot_be(options, error):
    assert error in message(ConfigError, lambda: job_of("x.csv", **options))


def test_a_header_with_line_breaks(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('label,"some\nname, of 1",I1,C1\n1,,5,"a\nb"\n0,,6,c\n')
    assert numbers(job_of(path, quoted_line_breaks=True)) == [5, 6]
    refused = message(DataError, Dataset.open, job_of(path))
    assert refused.startswith(f"{path}:1: a quoted value does not close on its line: ")


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_malformed_rows_with_line_breaks_are_named_by_their_first_line(
    tmp_path, compression, monkeypatch
):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 40)
    monkeypatch.setattr(lines, "READ_BYTES", 30)
    path = tmp_path / f"x.csv.{compression}".rstrip(".")
    text = 'label,I1,C1\n1,1,"a\n\nb"\n0,2,"c\nd",5\n1,3,"e\nf"g\n1,4,h\n'
    path.write_bytes(COMPRESSIONS[compression](text.encode()))
    kept = tmp_path / "bad.jsonl"
    job = job_of(path, quoted_line_breaks=True, on_malformed_row="quarantine")
    dataset = Dataset.open(job, quarantine=kept)
    assert [int(v) for b in read_all(dataset) for v in b.dense[:, 0]] == [1, 4]
    assert dataset.quarantined_rows == 2
    found = kept.read_text()
    assert '"line": 5, "reason": "4 fields, expected 3", "text": "0,2,\\"c\\nd\\",5"' in found
    assert '"line": 7, "reason": "text after the closing quote of a value with line' in found
    error = message(DataError, numbers, job_of(path, quoted_line_breaks=True))
    assert error.startswith(f"{path}:5: 4 fields, expected 3: ")


def test_a_stray_quote_does_not_swallow_rows_in_silence(tmp_path):
    path = tmp_path / "x.csv"
    stray = rows(20).replace(b"key7", b'"key7').replace(b"key12", b'"key12"')
    path.write_bytes(stray)
    error = message(DataError, numbers, job_of(path, quoted_line_breaks=True))
    assert error.startswith(f"{path}:9: text after the closing quote of a value with line breaks")
    path.write_bytes(rows(20).replace(b"key7", b'"key7'))
    error = message(DataError, numbers, job_of(path, quoted_line_breaks=True))
    assert error.startswith(f"{path}:9: in the row that begins here a quoted value never closes")
    error = message(DataError, numbers, job_of(path))
    assert error.startswith(f"{path}:9: a quoted value does not close on its line: '1,7,\"key7'")


@pytest.mark.parametrize("compression", list(COMPRESSIONS)[1:])
class TestCompressed:
    def test_parts_that_follow_each_other_are_read_whole(self, tmp_path, compression):
        path = tmp_path / f"x.csv.{compression}"
        whole, pack = rows(), COMPRESSIONS[compression]
        cuts = [0, 2, 900, 901, 4000, len(whole)]
        parts = [whole[i:j] for i, j in zip(cuts, cuts[1:], strict=False)]
        path.write_bytes(b"".join(map(pack, [b"", *parts, b""])))
        assert numbers(job_of(path)) == list(range(ROWS))
        assert format_of_path(str(path)) == "csv"

    @pytest.mark.parametrize("lost", [1, 9, 500])
    def test_truncated(self, tmp_path, compression, lost):
        path = tmp_path / f"x.csv.{compression}"
        packed = COMPRESSIONS[compression](rows(4000))
        for data in (packed[:-lost], packed + packed[:-lost]):
            path.write_bytes(data)
            error = message(DataError, numbers, job_of(path))
            assert error.startswith(f"{path}: cannot be read: "), error
            assert f"before byte {len(data):,} of {len(data):,})" in error

    def test_damaged(self, tmp_path, compression):
        path = tmp_path / f"x.csv.{compression}"
        for data in (b"label,I1,C1\n1,5,a\n", COMPRESSIONS[compression](rows()) + b"more"):
            path.write_bytes(data)
            error = message(DataError, numbers, job_of(path))
            assert error.startswith(f"{path}: cannot be read: "), error

    def test_header_only(self, tmp_path, compression):
        path = tmp_path / f"x.csv.{compression}"
        path.write_bytes(COMPRESSIONS[compression](rows(0)))
        error = message(DataError, Dataset.open, job_of(path))
        assert error == f"{path}: no rows; the source has none at all"


class TestFilesThatChange:
    """Opened first, then changed under the reader."""

    def test_gone(self, tmp_path):
        path = tmp_path / "x.csv"
        path.write_bytes(rows())
        dataset = Dataset.open(job_of(path))
        path.unlink()
        assert message(DataError, read_all, dataset).startswith(f"{path}: cannot be read: ")

    @pytest.mark.parametrize("kept", [0, 11, 100, 2000])
    @pytest.mark.parametrize("blocks", [512, 8 << 20])
    @pytest.mark.parametrize("breaks", [False, True])
    def test_shorter(self, tmp_path, monkeypatch, kept, blocks, breaks):
        monkeypatch.setattr(lines, "BLOCK_BYTES", blocks)
        path = tmp_path / "x.csv"
        whole = rows()
        path.write_bytes(whole)
        dataset = Dataset.open(job_of(path, quoted_line_breaks=breaks))
        path.write_bytes(whole[:kept])
        error = message(DataError, read_all, dataset)
        assert error.startswith(f"{path}: became shorter than the {len(whole):,} bytes"), error

    def test_shorter_in_the_middle_of_a_split(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lines, "READ_BYTES", 200)
        path = tmp_path / "x.csv"
        path.write_bytes(rows())
        source = Dataset.open(job_of(path))._parts["train"].source
        pieces = source.read(source.extents()[0], ["I1"])
        next(pieces)
        os.truncate(path, 1000)
        error = message(DataError, list, pieces)
        assert error.startswith(f"{path}: became shorter"), error

    def test_a_line_number_in_a_file_that_became_shorter(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lines, "READ_BYTES", 200)
        path = tmp_path / "x.csv"
        path.write_bytes(rows())
        source = Dataset.open(job_of(path))._parts["train"].source
        *_, last = source.read(source.extents()[0], ["I1"])
        os.truncate(path, 1000)
        error = message(DataError, last.place.locate, 0)
        assert error == f"{path}: became shorter while it was read"

    def test_a_folder_in_its_place(self, tmp_path):
        path = tmp_path / "x.csv"
        path.write_bytes(rows())
        dataset = Dataset.open(job_of(path))
        path.unlink()
        path.mkdir()
        assert message(DataError, read_all, dataset).startswith(f"{path}: cannot be read: ")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_no_permission(self, tmp_path):
        path = tmp_path / "x.csv"
        path.write_bytes(rows())
        path.chmod(stat.S_IWUSR)
        assert message(DataError, Dataset.open, job_of(path)).startswith(f"{path}: cannot be read")


def test_folders_that_match_where_no_file_does(tmp_path):
    (tmp_path / "day_1.csv").mkdir()
    (tmp_path / "day_1.csv" / "part.csv").write_bytes(rows())
    error = message(DataError, Dataset.open, job_of(f"{tmp_path}/day_*"))
    assert error == (
        f"{tmp_path}/day_*: no file matches, but the folder {tmp_path}/day_1.csv does; write "
        f"{tmp_path}/day_*/* to read the files of such folders"
    )


def test_text_that_says_what_it_is(tmp_path):
    """A compressed file without the ending of one, and UTF-16, are named."""
    path = tmp_path / "x.csv"
    # Whatever bytes the time has: line ends and quotes, too.
    for time_s in (0, 0x0D0D0D0D, 0x0A220A22, 0x220D2C0D):
        path.write_bytes(gzip.compress(rows(), mtime=time_s))
        words = message(DataError, Dataset.open, job_of(path))
        assert words.startswith(f"{path}:1: the header is not UTF-8")
    path.write_text(rows().decode(), encoding="utf-16")
    assert message(DataError, Dataset.open, job_of(path)).startswith(f"{path}:1: the header is not")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_rows_of_several_lines_are_named_by_lines_wherever_reading_begins(tmp_path, suffix):
    path, rows = tmp_path / f"x.csv{suffix}", ['1,"x\ny\n"\n', "2,z\n", '3,"\n"\n', "4,z\n"]

    def write(text):
        content = text.encode()
        path.write_bytes(gzip.compress(content) if suffix else content)
        return open_text(TextSource(path=str(path), quoted_line_breaks=True), {})

    source = write("a,b\n" + "".join(rows))
    (whole,) = source.extents()
    for row, line in enumerate([2, 5, 6, 8]):
        _, rest = source.cut(whole, row)
        found = [chunk for chunk in source.read(rest, ["a", "b"]) if chunk.table.num_rows]
        assert found[0].table["a"].to_pylist() == [str(n) for n in range(row + 1, 5)]
        assert found[0].place.locate(0) == f"{path}:{line}"
        assert found[0].place.locate(3 - row) == f"{path}:8"
    source = write("a,b\n" + "".join(rows) + '5,"never\nclosed\n')
    with pytest.raises(DataError, match=rf"{path}:9: in the row that begins here a quoted value n"):
        list(source.read(source.extents()[0], ["a"]))


def test_of_a_compressed_file_a_part_is_expected_to_have_the_rest(tmp_path):
    for name in ("0.csv.gz", "1.csv.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"a\n" + b"1\n" * 40))
    source = open_text(TextSource(path=str(tmp_path / "*.gz")), {})
    first, second = source.extents()
    assert source.expected_rows([second]) is None
    list(source.read(first, ["a"]))
    begin, rest = source.cut(second, 15)
    for extents, rows in (([second], 40), ([begin], 15), ([rest], 25), ([first, rest], 65)):
        assert source.expected_rows(extents) == RowCount(rows, is_exact=False)
    assert source.expected_rows([source.cut(second, 90)[1]]) == RowCount(0, is_exact=False)


def test_as_much_is_read_as_asked_for_whatever_a_member_holds(tmp_path):
    path, text = tmp_path / "x.csv.gz", b"label,count\n1,2\n3,4\n"
    path.write_bytes(b"".join(gzip.compress(text[n : n + 1]) for n in range(len(text))))
    with ByteStream(fs.LocalFileSystem(), str(path)) as stream:
        assert [stream.read_whole(9), stream.read_whole(99), stream.read_whole(1)] == [
            text[:9],
            text[9:],
            b"",
        ]
        assert stream.bytes_read == path.stat().st_size
    source = open_text(TextSource(path=str(path)), {"c*": "int64"})
    (extent,) = source.extents()
    tables = [chunk.table for chunk in source.read(extent, ["count"])]
    assert [n for table in tables for n in table["count"].to_pylist()] == [2, 4]


def test_as_much_is_read_as_asked_for_where_a_file_system_gives_less(tmp_path, monkeypatch):
    (tmp_path / "x.csv").write_bytes(b"label,count\n")

    class Short(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 3))

    with ByteStream(fs.LocalFileSystem(), str(tmp_path / "x.csv")) as stream:
        monkeypatch.setattr(stream, "_stream", Short(b"label,count\n"))
        assert [stream.read_whole(7), stream.read_whole(99)] == [b"label,c", b"ount\n"]


def test_a_column_of_text_that_is_said_to_hold_vectors_is_text(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"v\n1 2\n")
    source = open_text(TextSource(path=str(tmp_path / "x.csv")), {"v": Vector(2)})
    assert str(source.schema.field("v").type) == "string"

"""Sources of a user: Parquet files of a folder, whose rows are counted ahead or not."""

from pathlib import Path

import pyarrow.parquet as pq


class UncountedRows:
    def __init__(self, folder, at_once=29):
        self.folder, self.at_once = Path(folder), at_once

    def schema(self):
        return pq.read_schema(self.folder / "0.parquet")

    def parts(self):
        return sorted(path.stem for path in self.folder.glob("*.parquet"))

    def version(self, part):
        return str((self.folder / f"{part}.parquet").stat().st_size)

    def read(self, part, columns):
        file = pq.ParquetFile(self.folder / f"{part}.parquet")
        yield from file.iter_batches(self.at_once, columns=list(columns))


class CountedRows(UncountedRows):
    def rows(self, part):
        return pq.read_metadata(self.folder / f"{part}.parquet").num_rows

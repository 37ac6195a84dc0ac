"""Opens what a run has learnt, for evaluation and prediction."""

from __future__ import annotations

from penstock.config import (
    Job,
    ParquetSource,
    Shuffle,
    Source,
    SyntheticSource,
    TextSource,
)


def on_other_data(job: Job, path: str) -> Job:
    """The same job, reading all rows of `path` in order instead of its own data.

    The format is the one that the name ends with; where it says nothing, that of the job's source.
    """
    changes = {
        "source": _source_like(job.data.source, path),
        "evaluation_source": None,
        "split": None,
        "shuffle": Shuffle(window_rows=0),
    }
    return job.model_copy(update={"data": job.data.model_copy(update=changes)})


def _source_like(source: Source, path: str) -> Source:
    name = path.removesuffix(".gz")
    ending = name.rpartition(".")[2]
    known = {"parquet": "parquet", "csv": "csv", "tsv": "tsv"}
    kind = known.get(ending, "parquet" if isinstance(source, SyntheticSource) else source.format)
    if isinstance(source, TextSource) and kind in {"csv", "tsv"}:
        return source.model_copy(update={"path": path, "format": kind})
    if kind == "parquet":
        return ParquetSource(path=path)
    return TextSource(path=path, format="tsv" if kind == "tsv" else "csv")

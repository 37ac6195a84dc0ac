"""How the accesses of each embedding table are spread over its keys, from the data of a job.

A checkpoint holds rows without counts, and counting every key while training costs memory and
time; so the keys are counted when somebody asks, on a bounded sample of the job's data, as features
read it: after transforms, with all features of a shared table together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from penstock.config import Job
from penstock.data.columns.decode import Decoder
from penstock.data.columns.schema import default_text_types, resolve_columns, resolve_features
from penstock.data.opening import open_source
from penstock.survey.profile import spread_chunks
from penstock.survey.sketches import ValueCounts, ValueSummary, affordable_values

SAMPLE_ROWS = 262_144


@dataclass(frozen=True)
class KeySkew:
    """Accesses of each table by key."""

    rows: int
    """Samples looked at."""
    is_whole: bool
    """Whether these are all of `data.source`."""
    tables: Mapping[str, ValueSummary]


def key_skew(job: Job, max_rows: int = SAMPLE_ROWS) -> KeySkew:
    """Counts the keys of a sample of a job's data.

    Args:
      job: what is read, and which feature reads which table.
      max_rows: samples at most, from the beginnings of extents that are spread evenly over the
        files of `data.source`; the held-out part is among them.

    Raises:
      ConfigError: the job does not fit its data.
      DataError: the data is not there, or cannot be read.
    """
    source = open_source(job.data.source, default_text_types(job))
    columns = resolve_columns(job, source.schema, source.paths[0], "optional")
    features, _ = resolve_features(job, columns)
    keys_alone = replace(
        columns,
        labels=(),
        weight=None,
        event_time=None,
        teacher=None,
        numeric=(),
        groups=(),
        negatives=None,
    )
    decoder = Decoder(keys_alone)
    tables = dict.fromkeys(feature.table for feature in features)
    counts = {table: ValueCounts(affordable_values(len(tables))) for table in tables}
    rows = 0
    for _, chunk in spread_chunks(source, keys_alone.names, max_rows):
        decoded = decoder.decode(chunk)
        for feature, bags in zip(features, decoded.bags, strict=True):
            counts[feature.table].add(bags.values)
        rows += chunk.table.num_rows
    return KeySkew(rows, rows < max_rows, {table: one.summary() for table, one in counts.items()})

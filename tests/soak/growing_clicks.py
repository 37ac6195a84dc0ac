"""Acceptance on a real log: does a run over its hour files, as they appear, apply each click once?

    python -m tests.soak.growing_clicks CLICKS.parquet [--kills 8] [--seed 1]

The clicks of globo.com (columns `click_article_id`, `user_id`, ..., `hour_file`) are written as a
file an hour, which are copied one by one into a folder that a job follows: windows of an hour, four
negatives a click, which spare what the user chose, four lanes, deterministic. One run on one rank
and one on two ranks are killed (`kill -9`) at random moments and go on. Each must come to the bits
and counts of a run over all files at once that nobody killed, in which there are as many clicks
applied as there are rows of the table of clicks, one for each click; and to a right audit. Prints a
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.soak.bits_over_ranks import BINARY, differences, train
from tests.soak.growing_killed import PATH, Log, killed, outcome

_BEGIN = datetime(2017, 10, 1)
_FEATURES = ["click_environment", "click_deviceGroup", "click_os", "click_country", "click_region"]


def write_hours(clicks: Path, folder: Path) -> tuple[list[Path], int]:
    """A file of each hour, empty ones too, of numbered clicks; and how many clicks there are."""
    table = pq.read_table(clicks)
    table = table.append_column("click", pa.array(np.arange(len(table))))
    of_click, made = table["hour_file"].to_numpy(), []
    for hour in range(int(of_click.max()) + 1):
        at = _BEGIN + timedelta(hours=hour)
        path = folder / f"{at:%Y-%m-%d}" / f"{at:%H}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.filter(pa.array(of_click == hour)), path)
        made.append(path)
    return made, len(table)


def fields_of(folder: Path, end: str) -> dict[str, object]:
    """A job of files by the hour."""
    source = {"name": "logs", "files": {"format": "parquet", "path": str(folder / PATH)}}
    stream = {"name": "clicks", "window": "hour", "start": f"{_BEGIN:%Y-%m-%d}", "end": end}
    return {
        "data": {
            "source": {
                "format": "streams",
                "poll": "1s",
                "streams": [{**stream, "sources": [source]}],
            },
            "event_time": "click_timestamp",
            "negatives": {"per_positive": 4, "columns": ["click_article_id"], "user": "user_id"},
            "lanes": 4,
        },
        # A row of its own for each click: trained twice, it would have other bits.
        "features": [{"columns": ["click", "user_id", "click_article_id", *_FEATURES]}],
        "table_defaults": {"dim": 4},
        "model": {"kind": "dlrm", "bottom": [], "top": [16]},
        "training": {"batch_size": 4096, "deterministic": True},
        "checkpoint": {"every_steps": 150},
    }


def audit_of(out: Path) -> str:
    """What `penstock data audit` says of a run; AssertionError where it finds something wrong."""
    command = [BINARY, "data", "audit", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clicks", type=Path)
    parser.add_argument("--kills", type=int, default=8, help="of each run")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hours, clicks = write_hours(options.clicks, folder / "whole")
        end = f"{_BEGIN + timedelta(hours=len(hours)):%Y-%m-%dT%H}"
        (folder / "0").mkdir()
        job = folder / "whole.yaml"
        job.write_text(yaml.safe_dump(fields_of(folder / "whole", end)))
        train(job, folder / "0" / "run", 1)
        expected = outcome(folder / "0" / "run")
        read, filtered, quarantined, applied = expected["counts"]
        assert (read, quarantined) == (clicks, 0), expected["counts"]
        keys = expected["tables"]["click"]["keys"]
        assert len(keys) == applied == len(set(keys.tolist())), "a click was applied twice"
        print(f"whole: {applied:,} clicks applied, {filtered:,} left out", flush=True)
        log, met = Log(hours, fields_of, end, most_s=0.8), {}
        for ranks in (1, 2):
            out = folder / str(ranks)
            met[ranks] = killed(out, options.kills, [ranks], options.seed + ranks, log)
            unlike = differences(expected, outcome(out / "run"))
            assert not unlike, f"{ranks} ranks: {unlike[:5]}"
            print(audit_of(out / "run"))
            print(f"{ranks} ranks: {options.kills} kills, the same bits", flush=True)
    print(
        json.dumps({
            "soak": "growing_clicks",
            "outcome": "the same bits",
            "hours": len(hours),
            "clicks": clicks,
            "applied": applied,
            "filtered": filtered,
            "kills": {ranks: dict(of) for ranks, of in met.items()},
            "seed": options.seed,
            "seconds": round(time.monotonic() - began),
        })
    )


if __name__ == "__main__":
    main()

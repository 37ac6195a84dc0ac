"""Rows of two bytes learn what rows of four learn."""

import json

import pytest

from penstock import run
from penstock.config import parse_job


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    from small import SMALL

    known = {}

    def summary(dtype):
        if dtype not in known:
            fields = json.loads(json.dumps(SMALL))
            fields["data"]["source"] |= {"rows": 32_000, "keys_per_feature": 200}
            fields["table_defaults"] |= {"dtype": dtype}
            fields |= {"report": {"every_steps": 100}, "evaluation": {}}
            fields["training"]["optimizer"] = {"kind": "adam", "learning_rate": 0.005}
            known[dtype] = run.train(parse_job(fields), tmp_path_factory.mktemp(dtype) / "run")
        return known[dtype]

    return summary


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_rows_reach_the_auc_of_float32(train, dtype):
    narrow, full = train(dtype), train("float32")
    assert narrow["auc"] > 0.6
    assert narrow["auc"] > full["auc"] - 0.003
    sizes = [
        {name: table["bytes"] for name, table in each["tables"].items()} for each in (narrow, full)
    ]
    # 8 columns; Adam's state of 16 floats stays as it is.
    assert all(sizes[0][name] * 96 == size * 80 for name, size in sizes[1].items())

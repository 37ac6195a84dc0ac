"""Every model of the package learns on the small job what DLRM learns; its save holds all of it."""

import json

import pytest

from penstock import run
from penstock.config import parse_job


@pytest.fixture(scope="module")
def held_out_auc(tmp_path_factory):
    """AUC of the small job with a model, each trained once."""
    from small import SMALL

    known = {}

    def measure(kind):
        if kind not in known:
            fields = json.loads(json.dumps(SMALL))
            fields["data"]["source"] |= {"rows": 24_000, "keys_per_feature": 200}
            fields["model"] = {"kind": kind}
            fields |= {"report": {"every_steps": 100}, "evaluation": {}}
            fields["training"]["optimizer"] = {"kind": "adam", "learning_rate": 0.005}
            out = tmp_path_factory.mktemp(kind) / "run"
            known[kind] = run.train(parse_job(fields), out)["auc"], run.evaluate(out)["auc"]
        return known[kind]

    return measure


@pytest.mark.parametrize("kind", ["dcn_v2", "deepfm", "wide_deep", "shared_bottom", "mmoe"])
def test_a_model_learns_as_much_as_dlrm(held_out_auc, kind):
    trained, reopened = held_out_auc(kind)
    assert trained == reopened  # its checkpoint holds all of it
    assert trained > held_out_auc("dlrm")[0] - 0.02
    assert trained > 0.6

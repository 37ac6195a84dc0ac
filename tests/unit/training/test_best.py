"""The best evaluation so far: against a plain loop, and what is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.config import mode_of, parse_job
from penstock.errors import ConfigError
from penstock.training.checkpoint.best import BestSoFar, best_of

VALUES = st.lists(st.one_of(st.floats(-1, 1), st.just(math.nan)), max_size=12)


@given(VALUES, st.sampled_from(["max", "min"]), st.sampled_from([0.0, 0.25]), st.integers(0, 11))
def test_equals_a_plain_loop_and_is_saved_anywhere(values, mode, min_delta, cut):
    best = BestSoFar("tasks/click/auc", mode, min_delta)
    value, step, misses = None, -1, 0
    for number, given_value in enumerate(values):
        if number == cut:
            before, best = best, BestSoFar("tasks/click/auc", mode, min_delta)
            best.load(before.state())
        gain = math.nan if value is None else (given_value - value) * (1 if mode == "max" else -1)
        is_better = not math.isnan(given_value) and (value is None or gain > min_delta)
        if is_better:
            value, step, misses = given_value, number, 0
        else:
            misses += 1
        metrics = {"loss": 1.0, "tasks": {"click": {"auc": given_value}}}
        assert best.take(number, metrics) == is_better
        assert not best.take(number, metrics), "an evaluation counts once"
        assert (best.value, best.step, best.misses) == (value, step, misses)


def test_why_it_ends():
    best = BestSoFar("auc", "max")
    best.take(10, {"auc": math.nan})
    assert best.no_better(2) is None
    best.take(20, {"auc": math.nan})
    assert best.no_better(2) == (
        "auc was never defined, and the 2 evaluations since were no better "
        "(training.early_stopping)"
    )
    best.take(30, {"auc": 0.75})
    assert best.no_better(1) is None
    best.take(40, {"auc": 0.75})
    assert best.no_better(1) == (
        "auc was best at step 30 (0.75), and the 1 evaluations since were no better "
        "(training.early_stopping)"
    )


def test_another_metric_begins_anew():
    best = BestSoFar("auc", "max")
    best.take(3, {"auc": 0.7})
    other = BestSoFar("log_loss", "min")
    other.load(best.state())
    assert (other.value, other.step) == (None, -1)
    # The largest value says nothing of the smallest one.
    other = BestSoFar("auc", "min")
    other.load(best.state())
    assert (other.value, other.step) == (None, -1)


def test_a_metric_that_is_not_there():
    with pytest.raises(ConfigError) as raised:
        BestSoFar("grouped_auc/user/auc", "max").take(1, {"auc": 0.5, "tasks": {"a": {"auc": 1}}})
    assert str(raised.value) == (
        "the evaluation has no metric 'grouped_auc/user/auc'; there are auc, tasks/a/auc"
    )


def fields(**more):
    out = {
        "data": {
            "source": {"format": "parquet", "path": "x.parquet"},
            "label": {"column": "click"},
            "split": {"by": "fraction"},
        },
    }
    for path, value in more.items():
        *parents, name = path.split("__")
        group = out
        for one in parents:
            group = group.setdefault(one, {})
        group[name] = value
    return out


SEVERAL = [{"column": "click"}, {"column": "stars", "task": "regression"}]


@pytest.mark.parametrize(
    ("more", "metric", "mode"),
    [
        ({}, "auc", "max"),
        ({"data__label": {"column": "x", "task": "regression"}}, "rmse", "min"),
        ({"data__label": SEVERAL}, "loss", "min"),
        ({"checkpoint__keep_best": "log_loss"}, "log_loss", "min"),
        (
            {"data__label": SEVERAL, "checkpoint__keep_best": "tasks/click/auc"},
            "tasks/click/auc",
            "max",
        ),
    ],
)
def test_what_stops_by_default(more, metric, mode):
    job = parse_job(fields(training__early_stopping={"patience": 2}, **more))
    found = best_of(job)["early_stopping"]
    assert (found.metric, found.mode) == (metric, mode)


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("auc", "max"),
        ("tasks/click/grouped_auc/user/auc", "max"),
        ("share_of_teacher", "max"),
        ("recall_at_10", "max"),
        ("loss", "min"),
        ("tasks/click/log_loss", "min"),
        ("slices/country/values/de/normalized_entropy", "min"),
        ("rmse", "min"),
        ("mae", "min"),
    ],
)
def test_which_value_of_a_usual_metric_is_the_best(metric, mode):
    assert mode_of(metric, None) == mode
    assert [mode_of(metric, told) for told in ("max", "min")] == ["max", "min"]


@pytest.mark.parametrize(
    "metric", ["teacher_auc", "aucs", "auc/user", "recall_at_k", "recall_at_1/rest", "bias", "xmae"]
)
def test_of_another_metric_it_is_not_known(metric):
    with pytest.raises(ValueError, match=f"a small '{metric}' is better is not known; set mode to"):
        mode_of(metric, None)
    assert mode_of(metric, "min") == "min"


@pytest.mark.parametrize(
    ("more", "evaluates"),
    [
        ({}, False),
        ({"checkpoint__keep_best": "auc"}, True),
        ({"training__early_stopping": {"patience": 2}}, True),
        ({"checkpoint__keep_best": "auc", "evaluation__every_steps": 5}, False),
        ({"training__early_stopping": {"patience": 2}, "evaluation__every_steps": 5}, False),
    ],
)
def test_epochs_are_evaluated_where_something_goes_by_it(more, evaluates):
    assert parse_job(fields(**more)).evaluates_epochs is evaluates


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (
            {"checkpoint__keep_best": "acu"},
            "job: checkpoint: whether a large or a small 'acu' is better is not known; set "
            "best_mode to max or min",
        ),
        (
            {"checkpoint__keep_best": "rmse"},
            "job: checkpoint.keep_best: evaluations of this job have no metric 'rmse'; they have "
            "auc, log_loss, normalized_entropy, calibration",
        ),
        (
            {"checkpoint": {"keep_best": "aucs", "best_mode": "max"}},
            "job: checkpoint.keep_best: evaluations of this job have no metric 'aucs'; they have "
            "auc, log_loss, normalized_entropy, calibration",
        ),
        (
            {
                "data__label": SEVERAL,
                "data__source": {"format": "synthetic"},
                "evaluation__metrics": {"grouped_auc": ["user"], "slices": [{"by": "country"}]},
                "checkpoint": {"keep_best": "teacher_auc", "best_mode": "max"},
            },
            "job: checkpoint.keep_best: evaluations of this job have no metric 'teacher_auc'; they "
            "have loss, tasks/click/auc, tasks/click/log_loss, tasks/click/normalized_entropy, "
            "tasks/click/calibration, tasks/click/grouped_auc/user/auc, "
            "tasks/click/slices/country, tasks/stars/rmse, tasks/stars/mae, tasks/stars/bias, "
            "tasks/stars/slices/country",
        ),
        (
            {"training__early_stopping": {"patience": 2, "metric": "bias"}},
            "job: training.early_stopping: whether a large or a small 'bias' is better is not "
            "known; set mode to max or min",
        ),
        (
            {"training__early_stopping": {"patience": 2}, "data__split": None},
            "job: training.early_stopping goes by evaluations, and nothing is held out; set "
            "data.split or data.evaluation_source",
        ),
        (
            {"training__early_stopping": {"patience": 0}},
            "job: training.early_stopping.patience: input should be greater than 0 (got 0)",
        ),
    ],
)
def test_what_is_refused(more, text):
    with pytest.raises(ConfigError) as raised:
        parse_job(fields(**more))
    assert str(raised.value) == text

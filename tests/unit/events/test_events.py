"""The registry of events, their JSON, and the stream that gives them to sinks."""

import json
import math
import threading

import pytest

from penstock.errors import ConfigError, EventError
from penstock.events.event import Event, Role, check, event_of, line_of, measurements
from penstock.events.registry import KINDS, Group, Quantity, Unit
from penstock.events.stream import EventStream, Latest
from tests.unit.events import page

TRAINER = Role("trainer", 0)
HEAD = {"kind", "step", "time_s", "role"}


def event(kind="train", step=3, **values):
    return Event(kind, step, 1.5, TRAINER, values)


class Recorder:
    """A sink that keeps what it takes; raises at the event of a number."""

    def __init__(self, fails_at=None):
        self.taken, self.fails_at, self.closed = [], fails_at, 0

    def take(self, event):
        if len(self.taken) == self.fails_at:
            raise ConfigError("the disk is full")
        self.taken.append(event)

    def close(self):
        self.closed += 1


def every_field(fields, path=()):
    for name, field in fields.items():
        if isinstance(field, Group):
            yield from every_field(field.fields, (*path, name))
        else:
            yield (*path, name), field


def test_every_quantity_has_a_unit_and_a_meaning_and_no_name_of_the_head():
    for name, kind in KINDS.items():
        assert kind.meaning.endswith("."), name
        assert not HEAD & set(kind.fields), name
        for path, field in every_field(kind.fields):
            assert isinstance(field, Quantity), path
            assert field.unit in Unit and field.meaning, path


def test_the_page_says_what_the_registry_says():
    head, mark, rest = page.PAGE.read_text(encoding="utf-8").partition(page.MARK)
    assert mark + rest == page.generated(), "run: python -m tests.unit.events.page"
    assert head.startswith("# Events\n")


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (event("trian"), "'trian'"),
        (event(losss=1.0), "losss"),
        (event(tables={"user": {"row": 1}}), "tables/user/row"),
        (event(tables={"user": 1}), "tables/user"),
        (event(learning_rate={"a": 1.0}), "learning_rate"),
        (event(learning_rate=None), "learning_rate: None"),
        (event(learning_rate="high"), "learning_rate: 'high'"),
        (event(learning_rate=True), "learning_rate: True"),
        (event("warning", text=5), "text: 5"),
        (event("stopped", is_whole=1), "is_whole: 1"),
        (Event("start", 0, 1.5, Role("baker", 0), {}), "'baker 0'"),
        (Event("start", 0, 1.5, Role("trainer", -1), {}), "'trainer -1'"),
    ],
)
def test_what_is_not_registered_is_refused(bad, named):
    sink, stream = Recorder(), EventStream(bad.role)
    stream.add(sink)
    with pytest.raises(EventError, match=named):
        check(bad)
    with pytest.raises(EventError, match=named):
        stream.tell(bad.kind, bad.step, bad.values)
    assert not sink.taken


def test_labels_are_any_text_and_stand_for_one_quantity():
    slices = {"city/x": {"values": {"auc": {"auc": 0.5}}, "rest": {"auc": 0.25}}}
    told = event("evaluation", recall_at_10=0.5, recall_candidates=7, slices=slices)
    check(told)
    assert [("/".join(one.path), "/".join(one.name)) for one in measurements(told)] == [
        ("recall_at_10", "recall_at_<k>"),
        ("recall_candidates", "recall_candidates"),
        ("slices/city/x/values/auc/auc", "slices/<column>/values/<value>/auc"),
        ("slices/city/x/rest/auc", "slices/<column>/rest/auc"),
    ]


def test_json_gives_back_every_number_and_text():
    tables = {"null": {"rows": 0, "bytes": 1 << 60, "budget_used": math.nan}}
    told = [
        event(auc=math.nan, loss=math.inf, learning_rate=-math.inf, samples=4, tables=tables),
        event("evaluation", calibration_buckets=[[0.5, math.nan, 2.0], [math.inf, 1.0, 0.0]]),
        event("warning", text="Infinity"),
        event("stopped", is_whole=False, command="a\udce9\n"),
    ]
    for one in told:
        line = json.dumps(line_of(one), allow_nan=False)
        # repr tells NaN from other numbers, and 1 from 1.0 and True.
        assert repr(event_of(json.loads(line))) == repr(one)


def test_lines_of_before_are_read_and_what_is_no_event_is_refused():
    old = event_of({"kind": "train", "step": 7, "auc": None, "of_an_old_version": None})
    assert (old.kind, old.step, old.role) == ("train", 7, TRAINER)
    assert math.isnan(old.time_s) and math.isnan(old.values["auc"])
    assert old.values["of_an_old_version"] is None
    nameless, later = {"step": 1}, {"kind": "of later", "step": 1}
    for line in (nameless, later, {"kind": "train"}, {"kind": [], "step": 1}, [], None, 5):
        with pytest.raises(EventError, match="is no event"):
            event_of(line)
    for role in ("trainer", "trainer ", "trainer ²", "trainer -1", "trainer 1.0", "baker 0", None):
        with pytest.raises(EventError, match=f"^role '{role}' is unknown; roles are trainer, numb"):
            event_of({"kind": "train", "step": 1, "role": role})


def test_sinks_see_all_in_the_order_told():
    first, second, times = Recorder(), Recorder(), iter((10.0, 20.0, 30.0))
    stream = EventStream(TRAINER, clock=lambda: next(times))
    stream.add(first)
    stream.tell("start", 0, {"samples": 0})
    stream.add(second)
    stream.tell("train", 1, {"auc": 0.5})
    stream.tell("warning", 1, {"text": "x"})
    assert [(one.kind, one.step, one.time_s) for one in first.taken] == [
        ("start", 0, 10.0),
        ("train", 1, 20.0),
        ("warning", 1, 30.0),
    ]
    assert second.taken == first.taken[1:]
    stream.close()
    stream.close()
    assert (first.closed, second.closed) == (1, 1)


def test_a_sink_that_fails_gets_no_more_and_the_others_do():
    failing, other = Recorder(fails_at=1), Recorder()
    stream = EventStream(TRAINER)
    stream.add(failing, other)
    stream.tell("start", 0, {"samples": 0})
    with pytest.raises(ConfigError, match="the disk is full"):
        stream.tell("train", 1, {"auc": 0.5})
    stream.tell("failed", 1, {"text": "the disk is full"})
    assert [one.kind for one in failing.taken] == ["start"]
    assert [one.kind for one in other.taken] == ["start", "train", "failed"]
    stream.close()
    assert failing.closed == other.closed == 1


def test_the_first_sink_is_the_first_to_hear_and_to_complain_and_the_last_to_go():
    calls = []

    class Named:
        def __init__(self, name):
            self.name = name

        def take(self, event):
            calls.append((self.name, event.kind))
            if event.kind == "warning":
                raise ConfigError(f"{self.name} is full")

        def close(self):
            calls.append((self.name, "close"))

    stream = EventStream(TRAINER)
    stream.add(Named("a"), Named("b"))
    stream.add(Named("c"))
    stream.tell("start", 0, {"samples": 0})
    stream.close()
    assert [name for name, what in calls if what == "start"] == ["a", "b", "c"]
    assert [name for name, what in calls if what == "close"] == ["c", "b", "a"]
    stream.add(Named("a"), Named("b"))
    with pytest.raises(ConfigError, match="a is full"):
        stream.tell("warning", 0, {"text": "x"})


class Faulty(Recorder):
    """A sink with a fault of its own, in every call."""

    def take(self, event):
        raise RuntimeError(f"fault at {event.kind}")

    def close(self):
        super().close()
        raise RuntimeError("fault at the end")


def test_a_fault_of_one_sink_takes_nothing_from_the_others():
    faulty, full, others = Faulty(), Recorder(fails_at=0), [Recorder() for _ in range(3)]
    stream = EventStream(TRAINER)
    stream.add(others[0], faulty, others[1], full, others[2])
    with pytest.raises(RuntimeError, match="fault at start"):
        stream.tell("start", 0, {"samples": 0})
    stream.tell("failed", 0, {"text": "fault at start"})  # nothing stands in its way
    for other in others:
        assert [one.kind for one in other.taken] == ["start", "failed"]
    assert full.taken == []
    with pytest.raises(RuntimeError, match="fault at the end"):
        stream.close()
    assert [one.closed for one in (*others, faulty, full)] == [1] * 5


def test_threads_may_tell_at_once():
    one, two = Recorder(), Recorder()
    stream = EventStream(TRAINER)
    stream.add(one, two)

    def tell(number):
        for step in range(50):
            stream.tell("warning", step, {"text": str(number)})

    threads = [threading.Thread(target=tell, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert one.taken == two.taken and len(one.taken) == 200
    for number in range(4):
        assert [e.step for e in one.taken if e.values["text"] == str(number)] == [*range(50)]


def test_the_latest_of_each_kind():
    latest = Latest()
    for step in (1, 2):
        latest.take(event(step=step))
    assert latest.of("train").step == 2
    assert latest.of("evaluation") is None

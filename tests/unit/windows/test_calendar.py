"""Windows of event time: no moment is in none or in two, whatever clocks do."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from penstock.data.windows.calendar import Window, moment_ms, windows

HOUR, DAY = 3_600_000, 86_400_000


def ms(text, zone="UTC"):
    return round(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


def of(unit, zone, start, end):
    return list(windows(unit, ZoneInfo(zone), ms(start, zone), ms(end, zone)))


@pytest.mark.parametrize(
    ("zone", "day", "hours", "lengths"),
    [
        ("Europe/Paris", "2026-03-29", 23, {HOUR}),
        ("Europe/Paris", "2026-10-25", 25, {HOUR}),
        ("Europe/Paris", "2026-06-01", 24, {HOUR}),
        ("Australia/Lord_Howe", "2026-10-04", 24, {HOUR, HOUR // 2}),
        ("Australia/Lord_Howe", "2026-04-05", 25, {HOUR, HOUR // 2}),
        ("America/Sao_Paulo", "2017-10-15", 23, {HOUR}),
        ("America/Havana", "2026-11-01", 25, {HOUR}),
        ("Asia/Kathmandu", "2026-06-01", 24, {HOUR}),
        # A minute past midnight: what is left of the hour before and behind it.
        ("America/St_Johns", "2010-03-14", 24, {HOUR, HOUR // 60, HOUR - HOUR // 60}),
    ],
)
def test_days_have_the_hours_that_their_clocks_show(zone, day, hours, lengths):
    begin = datetime.fromisoformat(day)
    end = (begin + timedelta(days=1)).isoformat()
    found = of("hour", zone, day, end)
    assert len(found) == hours
    assert {one.stop_ms - one.start_ms for one in found} == lengths
    assert of("day", zone, day, end) == [Window(found[0].start_ms, found[-1].stop_ms)]
    # Each is one hour of the clock: the same number and the same offset from its begin to its end.
    for one in found:
        shown = {
            (at.date(), at.hour, at.utcoffset())
            for part in np.linspace(one.start_ms, one.stop_ms - 1, 7)
            for at in [datetime.fromtimestamp(part / 1000, ZoneInfo(zone))]
        }
        assert len(shown) == 1


def test_a_day_ends_with_its_first_midnight():
    days = of("day", "America/Havana", "2026-10-31", "2026-11-02")
    assert [one.stop_ms - one.start_ms for one in days] == [24 * HOUR, 25 * HOUR]


@pytest.mark.parametrize("seed", range(30))
def test_windows_follow_each_other_without_a_gap(seed):
    rng = np.random.default_rng(seed)
    zones = ["UTC", "Europe/Paris", "Australia/Lord_Howe", "America/St_Johns", "Africa/Casablanca"]
    zone = ZoneInfo(str(rng.choice(zones)))
    start = int(rng.integers(ms("2000-01-01"), ms("2030-01-01")))
    end = start + int(rng.integers(1, 60 * DAY))
    unit = ["hour", "day", int(rng.integers(60_000, 10 * DAY))][seed % 3]
    found = list(windows(unit, zone, start, end))
    assert found[0].start_ms == start
    assert found[-1].stop_ms == end
    assert all(one.stop_ms > one.start_ms for one in found)
    assert [one.stop_ms for one in found[:-1]] == [one.start_ms for one in found[1:]]
    if isinstance(unit, int):
        assert {one.stop_ms - one.start_ms for one in found[:-1]} <= {unit}
        return
    # A window ends where the clock shows a full hour, or a new day, or is changed.
    for one in found[:-1]:
        at = datetime.fromtimestamp(one.stop_ms / 1000, zone)
        before = datetime.fromtimestamp((one.stop_ms - 1) / 1000, zone)
        full = at.minute == at.second == 0 and (unit == "hour" or at.hour == 0)
        assert full or at.utcoffset() != before.utcoffset()
        assert at.date() != before.date() or unit == "hour"


def test_a_window_without_an_end_goes_on():
    endless = windows("hour", ZoneInfo("UTC"), 0, None)
    assert [next(endless).start_ms for _ in range(30)] == [n * HOUR for n in range(30)]


def test_local_times_that_are_there_twice_and_that_are_skipped():
    paris = ZoneInfo("Europe/Paris")
    assert moment_ms(datetime(2026, 10, 25, 2), paris) == ms("2026-10-25T01:00")
    assert moment_ms(datetime(2026, 3, 29, 2), paris) == ms("2026-03-29T01:00")
    assert moment_ms(datetime(2026, 3, 29, 3), paris) == ms("2026-03-29T01:00")
    assert moment_ms(datetime(2026, 3, 29, 1), paris) == ms("2026-03-29T00:00")


def test_words_name_the_day_once():
    window = Window(ms("2026-01-01T05:00"), ms("2026-01-01T06:00"))
    assert window.words(ZoneInfo("UTC")) == "2026-01-01 05:00 to 06:00"
    window = Window(ms("2026-01-01T23:00"), ms("2026-01-02T00:00"))
    assert window.words(ZoneInfo("UTC")) == "2026-01-01 23:00 to 2026-01-02 00:00"
    assert datetime.fromtimestamp(window.start_ms / 1000, UTC).hour == 23


def test_words_tell_hours_that_are_there_twice_apart():
    hours = of("hour", "Europe/Paris", "2026-10-25T01:00", "2026-10-25T04:00")
    assert [one.words(ZoneInfo("Europe/Paris")) for one in hours] == [
        "2026-10-25 01:00 to 02:00 +0200",
        "2026-10-25 02:00 +0200 to 02:00 +0100",
        "2026-10-25 02:00 +0100 to 03:00",
        "2026-10-25 03:00 to 04:00",
    ]
    hours = of("hour", "Europe/Paris", "2026-03-29T01:00", "2026-03-29T04:00")
    assert [one.words(ZoneInfo("Europe/Paris")) for one in hours] == [
        "2026-03-29 01:00 to 03:00",
        "2026-03-29 03:00 to 04:00",
    ]

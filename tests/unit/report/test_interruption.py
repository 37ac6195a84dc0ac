"""Signals: at once, or when it is asked for; and what happens to a process that does not hear."""

import ctypes
import os
import signal
import sys
import threading
import time

import pytest

from penstock import interruption as module
from penstock.errors import Interrupted, PenstockError
from penstock.interruption import interruption

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_at_first_a_signal_raises_where_it_arrives(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Interrupted) as raised, interruption():
        send(number)
    assert raised.value.exit_status == 128 + number
    assert str(raised.value) == f"stopped by {signal.Signals(number).name}"
    assert not raised.value.is_repeated
    assert not isinstance(raised.value, (Exception, PenstockError))
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_deferred_signal_waits_to_be_asked_for():
    with interruption() as stop, stop.deferred():
        stop.check()
        send(signal.SIGHUP)
        with pytest.raises(Interrupted) as raised:
            stop.check()
        assert raised.value.exit_status == 129
        entered = []
        with pytest.raises(Interrupted), stop.at_once():
            entered.append(True)
        assert not entered


def test_a_deferred_signal_is_over_with_the_block_that_it_came_in():
    with interruption() as stop:
        with stop.deferred():
            send(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM


def test_waiting_within_a_deferral_ends_at_once():
    with interruption() as stop, stop.deferred():
        timer = threading.Timer(0.05, send, (signal.SIGTERM,))
        timer.start()
        with pytest.raises(Interrupted), stop.at_once():
            assert threading.Event().wait(30)
        timer.join()
        # Out of it, signals are noted again; a second one raises all the same.
        with pytest.raises(Interrupted) as raised:
            send(signal.SIGINT)
        assert raised.value.is_repeated and raised.value.exit_status == 130


def test_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption() as stop:
            send(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_off_the_main_thread_signals_stay_as_they_are():
    handlers = []

    def look():
        with interruption() as stop:
            handlers.append((signal.getsignal(signal.SIGTERM), stop.signal))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [(signal.getsignal(signal.SIGTERM), None)]


def within_a_library(then, seconds, end=None):
    """Waits as a library does that handles no signal; once it does so, `then` is called.

    `end` ends the wait earlier. No signal ends a wait for a lock of the C library.
    """
    library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    assert library.pthread_mutex_lock(lock) == 0

    def hold():
        while int.from_bytes(lock.raw[:4], sys.byteorder) != 2:  # glibc's: locked and waited for
            time.sleep(0.001)
        then()
        (end or threading.Event()).wait(seconds)
        library.pthread_mutex_unlock(lock)

    holder = threading.Thread(target=hold)
    holder.start()
    library.pthread_mutex_lock(lock)
    holder.join()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into a lock of glibc")
@pytest.mark.parametrize("deferred", [False, True])
def test_a_process_that_does_not_hear_is_ended_unless_it_has_to_save(monkeypatch, deferred):
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    ends, ended = [], threading.Event()

    def end(number):
        ends.append(number)
        ended.set()

    def ask():
        send(signal.SIGTERM)

    with interruption(end) as stop:
        if deferred:
            with stop.deferred():
                within_a_library(ask, 0.3)
        else:
            with pytest.raises(Interrupted):
                within_a_library(ask, 60, ended)  # a busy machine may be late
    assert ends == ([] if deferred else [signal.SIGTERM])


def test_after_a_second_signal_there_is_little_time(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    ended = threading.Event()
    with interruption(lambda number: ended.set()) as stop, stop.deferred():
        send(signal.SIGTERM)
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)
        assert ended.wait(30)


def test_whoever_leaves_in_time_is_not_ended():
    ends = []
    with pytest.raises(Interrupted), interruption(ends.append) as stop, stop.deferred():
        send(signal.SIGTERM)
        send(signal.SIGINT)
    assert not ends
    assert not [one for one in threading.enumerate() if one.name == "penstock-signals"]


def test_a_process_that_has_heard_a_signal_may_take_longer_to_leave(monkeypatch):
    monkeypatch.setattr("penstock.interruption.PATIENCE_S", 0.1)
    ended = []
    with pytest.raises(Interrupted), interruption(ended.append):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Interrupted:
            time.sleep(0.5)  # what is open is closed
            raise
    assert ended == []

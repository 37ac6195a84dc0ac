"""The ledger that another process keeps: killed, stopped, asked by strangers, left alone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq

from penstock.errors import DataError, GroupError
from penstock.ledger import client as ledger_client
from penstock.ledger.client import Address, LedgerClient, Service, open_ledger
from penstock.ledger.file import LedgerFile

PLACES = [(number // 10, number % 10) for number in range(400)]


@pytest.fixture
def service(tmp_path):
    made = Service(tmp_path / "ledger.db", "127.0.0.1")
    yield made
    made.close()


@pytest.fixture
def client(service):
    made = LedgerClient(service.address)
    yield made
    made.close()


def wait_until(is_so, most_s=30.0):
    end_s = time.monotonic() + most_s
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_it_answers_as_the_file_does(service, client, tmp_path):
    assert client.take(0, 2, 0, PLACES) == (0, 0)
    assert client.take(0, 2, 1, PLACES[:1]) is None
    client.add_block(0, 0, (30, 8), [1, 2])
    assert client.block(0, 0, (30, 8)) == [1, 2]
    assert client.block(0, 1, (30, 8)) is None
    assert client.history(0, 2) == [(0, 0)]
    client.close()
    service.close()
    found = {one.name for one in tmp_path.iterdir()}
    assert found == {"ledger.db"}
    kept = LedgerFile(tmp_path / "ledger.db")
    assert kept.history(0, 2) == [(0, 0)]
    kept.close()


def test_killed_again_and_again_it_gives_nothing_twice(service):
    taken, kills, has_ended = [], [], threading.Event()

    def work(lane):
        client = LedgerClient(service.address)
        turn = 0
        while (one := client.take(0, lane, turn, PLACES)) is not None:
            taken.append(one)
            turn += 1
        client.close()

    def kill():
        for count in (50, 150, 300):
            wait_until(lambda count=count: len(taken) >= count or has_ended.is_set())
            before = service.process
            os.kill(before.pid, signal.SIGKILL)
            kills.append(before.pid)
            wait_until(lambda before=before: service.process is not before)

    killer = threading.Thread(target=kill)
    killer.start()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    has_ended.set()
    killer.join()
    assert len(set(kills)) == 3
    assert sorted(taken) == PLACES


def test_an_answer_that_comes_too_late_is_not_taken_for_another(service, client, monkeypatch):
    monkeypatch.setattr(ledger_client, "_ANSWER_S", 0.3)
    assert client.take(0, 0, 0, PLACES) == PLACES[0]
    os.kill(service.process.pid, signal.SIGSTOP)
    timer = threading.Timer(1.0, os.kill, (service.process.pid, signal.SIGCONT))
    timer.start()
    # Asked three or four times, and given once.
    assert client.take(0, 0, 1, PLACES) == PLACES[1]
    assert [client.take(0, 0, turn, PLACES) for turn in (2, 3)] == PLACES[2:4]
    assert client.history(0, 0) == PLACES[:4]


def test_who_does_not_answer_is_given_up_by_name(service, client, monkeypatch):
    monkeypatch.setattr(ledger_client, "_ANSWER_S", 0.1)
    monkeypatch.setattr(ledger_client, "_PATIENCE_S", 0.3)
    os.kill(service.process.pid, signal.SIGSTOP)
    with pytest.raises(GroupError, match=r"tcp://127.0.0.1:\d+, has not answered for 0.3 s"):
        client.take(0, 0, 0, PLACES)
    os.kill(service.process.pid, signal.SIGCONT)


def test_who_waits_ends_with_its_client(service, client):
    os.kill(service.process.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(client.take, 0, 0, 0, PLACES)
        time.sleep(0.2)
        began_s = time.monotonic()
        client.close()
        with pytest.raises(DataError, match="closed"):
            waits.result(5)
        assert time.monotonic() - began_s < 2
    os.kill(service.process.pid, signal.SIGCONT)


@pytest.mark.parametrize("kind", ["other key", "no key", "wrong service"])
def test_strangers_get_no_answer(service, client, kind):
    public, secret = (key.decode() for key in zmq.curve_keypair())
    address = service.address
    made = zmq.Context.instance().socket(zmq.REQ)
    made.linger = 0
    if kind != "no key":
        known = public if kind == "wrong service" else address.public
        mine = (public, secret) if kind == "other key" else address[2:]
        made.curve_serverkey = known.encode()
        made.curve_publickey, made.curve_secretkey = (key.encode() for key in mine)
    made.connect(address.endpoint)
    made.send(json.dumps([1, "take", 0, 0, 0, [[0, 0]]]).encode())
    assert not made.poll(400)
    made.close()
    assert client.history(0, 0) == []


@pytest.mark.parametrize(
    "request_",
    [b"", b"x", b"{}", b"[1]", b'[1, "close"]', b'[1, "take"]', b'[1, "take", 0, 0, 0, 5]'],
)
def test_a_request_that_makes_no_sense_is_refused_and_the_next_answered(service, client, request_):
    asked = client._connected()
    asked.send(request_)
    assert asked.poll(5000)
    number, verdict, _ = json.loads(asked.recv())
    assert (number, verdict) in {(-1, "refused"), (1, "refused")}
    assert client.take(0, 0, 0, PLACES) == PLACES[0]


def test_an_error_of_the_file_reaches_who_asks(service, client, tmp_path):
    client.take(0, 0, 0, PLACES)
    (tmp_path / "other").mkdir()
    client.add_block(0, 0, [1], [1])
    with pytest.raises(DataError, match="ledger at tcp://.*add_block"):
        client._ask("add_block", 0)


def test_it_listens_on_the_named_address_alone(service):
    port = int(service.address.endpoint.rsplit(":", 1)[1])
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {one[1] for one in lines if one[3] == "0A" and one[1].endswith(f":{port:04X}")}
    assert listening == {f"0100007F:{port:04X}"}


def test_it_ends_with_the_process_that_started_it(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from penstock.ledger.client import Service;"
        "s = Service(Path(sys.argv[1]), '127.0.0.1'); print(s.process.pid, flush=True);"
        "time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "ledger.db")], stdout=subprocess.PIPE
    )
    number = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()

    def is_gone():
        try:
            with open(f"/proc/{number}/stat") as stat:
                return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
        except FileNotFoundError:
            return True

    wait_until(is_gone, 10)


def test_signals_of_the_terminal_leave_it_running(service, client):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(service.process.pid, number)
    time.sleep(0.1)
    before = service.process
    assert client.take(0, 0, 0, PLACES) == PLACES[0]
    assert service.process is before and before.poll() is None


def test_a_ledger_that_somebody_has_is_refused(tmp_path):
    held = LedgerFile(tmp_path / "ledger.db")
    with pytest.raises(DataError, match=r"cannot be kept: .*keeps this ledger"):
        Service(tmp_path / "ledger.db", "127.0.0.1")
    held.close()


def test_what_dies_at_once_is_not_started_for_ever(service, monkeypatch):
    for _ in range(ledger_client._MOST_STARTS - 1):
        before = service.process
        os.kill(before.pid, signal.SIGKILL)
        wait_until(lambda before=before: service.process is not before)
    os.kill(service.process.pid, signal.SIGKILL)
    service._watch.join(10)
    assert not service._watch.is_alive()


class Two:
    """Two ranks in threads."""

    size = 2

    def __init__(self, rank, said, barrier):
        self.rank, self._said, self._barrier = rank, said, barrier

    def gathered_bytes(self, content):
        self._said[self.rank] = content
        self._barrier.wait(30)
        return list(self._said)


def on_two(path, *begin):
    said, barrier = [b"", b""], threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        made = [
            threads.submit(open_ledger, path, Two(rank, said, barrier), *begin) for rank in range(2)
        ]
        return [one.exception(60) or one.result() for one in made]


def test_all_ranks_ask_the_one_that_the_first_has_started(tmp_path):
    first, second = on_two(tmp_path / "ledger.db")
    assert first.take(0, 0, 0, PLACES) == PLACES[0]
    assert second.take(0, 1, 0, PLACES) == PLACES[1]
    second.close()
    first.close()


def test_the_others_hear_that_the_first_could_not(tmp_path):
    held = LedgerFile(tmp_path / "ledger.db")
    first, second = on_two(tmp_path / "ledger.db")
    assert isinstance(first, DataError)
    assert isinstance(second, GroupError) and "rank 0 cannot open the ledger" in str(second)
    held.close()


def test_what_the_first_does_before_is_done_once_and_heard_of(tmp_path):
    begun = []
    first, second = on_two(tmp_path / "ledger.db", lambda: begun.append(1))
    assert begun == [1]
    second.close()
    first.close()

    def fail():
        raise DataError("no such ledger")

    first, second = on_two(tmp_path / "ledger.db", fail)
    assert isinstance(first, DataError) and isinstance(second, GroupError)


def test_a_client_of_nobody_gives_up(monkeypatch):
    monkeypatch.setattr(ledger_client, "_ANSWER_S", 0.1)
    monkeypatch.setattr(ledger_client, "_PATIENCE_S", 0.2)
    keys = [key.decode() for key in (*zmq.curve_keypair(), *zmq.curve_keypair())]
    client = LedgerClient(Address("tcp://127.0.0.1:9", keys[0], keys[2], keys[3]))
    with pytest.raises(GroupError, match="has not answered"):
        client.history(0, 0)
    client.close()


def test_an_answer_to_another_request_is_not_taken(monkeypatch):
    client = LedgerClient(Address("tcp://127.0.0.1:9", "", "", ""))
    asked = []

    def recv():
        number, verb, *_ = json.loads(asked[-1])
        late = len(asked) % 2
        return json.dumps([number - late, "done", [7, late] if verb == "take" else None]).encode()

    stub = SimpleNamespace(send=asked.append, poll=lambda _: 1, recv=recv, close=lambda: None)
    monkeypatch.setattr(client, "_connected", lambda: stub)
    assert [client.take(0, 0, turn, PLACES) for turn in (0, 1)] == [(7, 0), (7, 0)]
    assert [json.loads(one)[0] for one in asked] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("variables", "known", "found"),
    [
        ({}, ["10.1.2.3"], "127.0.0.1"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, ["10.1.2.3"], "127.0.0.1"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, ["10.1.2.3"], "10.1.2.3"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, ["127.0.1.1", "10.1.2.3"], "10.1.2.3"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, ["127.0.1.1"], "the way out"),
    ],
)
def test_other_machines_are_told_an_address_that_they_can_reach(
    monkeypatch, variables, known, found
):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**variables, "MASTER_ADDR": "node-0"}.items():
        monkeypatch.setenv(name, value)
    infos = [(2, 1, 6, "", (one, 0)) for one in known]
    monkeypatch.setattr(ledger_client.socket, "getaddrinfo", lambda *_: infos)
    monkeypatch.setattr(ledger_client, "_way_out", lambda: "the way out")
    assert ledger_client._host() == found


def test_a_machine_that_nobody_knows_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "no-such-machine.invalid")
    with pytest.raises(DataError, match=r"MASTER_ADDR 'no-such-machine.invalid': no address"):
        ledger_client._host()

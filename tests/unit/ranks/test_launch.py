"""The launcher with small ranks: who failed first, signals, and that nothing stays behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from penstock.ranks.environment import LAUNCHER, MEETING
from penstock.ranks.launch import rank_environment

LAUNCH = """
import sys
from penstock.interruption import interruption
from penstock.ranks import launch as module
module.GRACE_S, module._TERMINATED_S = 0.5, 0.5
with interruption(lambda number: None) as stop:
    ended = module.launch([sys.executable, "-c", sys.argv[1]], int(sys.argv[2]), stop)
print(ended.words, file=sys.stderr)
sys.exit(ended.status)
"""
RANK = """
import os, signal, sys, time
from pathlib import Path
from penstock.ranks.environment import LOST, end_with_launcher, leave_words
end_with_launcher()
rank, here = int(os.environ["RANK"]), Path(os.environ["HERE"])
(here / f"started-{rank}").write_text(str(os.getpid()))
def note(number, frame):
    with open(here / f"signals-{rank}", "a") as file:
        file.write(signal.Signals(number).name + "\\n")
def all_started():
    while len(list(here.glob("started-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
"""


def start(tmp_path, rank, size=3, **more):
    environment = {**os.environ, "HERE": str(tmp_path), "TMPDIR": str(tmp_path / "tmp"), **more}
    (tmp_path / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, RANK + rank, str(size)],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as a shell gives a job a process group of its own
    )


def ended(process):
    out, errors = process.communicate(timeout=30)
    return process.returncode, out, errors


def until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("never")


def pids(tmp_path, size=3):
    files = [tmp_path / f"started-{rank}" for rank in range(size)]
    until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def is_gone(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def test_ranks_know_who_they_are_and_what_they_say_is_told_apart(tmp_path):
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"]
    status, out, errors = ended(
        start(
            tmp_path, f"print(*map(os.environ.get, {names}), sys.stdin.read())", OMP_NUM_THREADS="7"
        )
    )
    assert (status, out) == (0, "0 0 3 3 \n")
    assert sorted(errors.splitlines()) == ["None", "rank 1: 1 1 3 3 ", "rank 2: 2 2 3 3 "]
    assert not list((tmp_path / "tmp").iterdir())


def test_cores_are_shared_unless_the_user_says_otherwise():
    cores = len(os.sched_getaffinity(0))
    given = rank_environment({}, 1, 2, Path("/there"))
    assert given["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert given["GLOO_SOCKET_IFNAME"] == "lo"
    assert Path(given[MEETING]).parent == Path("/there")
    assert given[LAUNCHER] == str(os.getpid())
    assert rank_environment({"OMP_NUM_THREADS": "5"}, 1, 2, Path())["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(
    ("fails", "status", "words"),
    [
        ('leave_words("no such column"); sys.exit(2)', 2, "error: rank 1 of 3: no such column"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "error: rank 1 of 3 was killed by SIGKILL"),
        ("raise ValueError('odd')", 1, "error: rank 1 of 3 ended first, with exit status 1"),
    ],
)
def test_the_rank_that_failed_by_itself_is_named(tmp_path, fails, status, words):
    """The others end before it or after it, because of it; one does not end at all."""
    rank = f"""
all_started()
if rank == 0:
    leave_words("rank 0 lost the others"); sys.exit(LOST)
if rank == 1:
    time.sleep(0.2)
    {fails}
signal.signal(signal.SIGTERM, note)
while True:
    time.sleep(0.1)
"""
    began_s = time.monotonic()
    found, _, errors = ended(start(tmp_path, rank))
    assert time.monotonic() - began_s < 15
    assert found == status
    assert words in errors.splitlines()[-1]
    assert "lost the others" not in errors
    assert all(map(is_gone, pids(tmp_path)))
    assert (tmp_path / "signals-2").read_text() == "SIGTERM\n"
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        ('leave_words("no such column"); sys.exit(2)', "error: no such column"),
        ('leave_words("full"); sys.exit(LOST if rank else 2)', "error: full"),
        ("leave_words(f'row {rank // 2}'); sys.exit(2)", "of 3: row "),
    ],
)
def test_what_is_of_all_ranks_is_said_of_none(tmp_path, rank, words):
    """The job is wrong, or rank 0 has looked for all; else the rank is named."""
    status, _, errors = ended(start(tmp_path, "all_started(); " + rank))
    assert status == 2
    assert words in errors
    assert ("of 3" in errors) == ("of 3" in words)


def test_where_all_lost_each_other_the_first_says_so(tmp_path):
    rank = 'all_started(); time.sleep(rank / 5); leave_words(f"lost by {rank}"); sys.exit(LOST)'
    status, _, errors = ended(start(tmp_path, rank))
    assert (status, errors) == (2, "error: rank 0 of 3: lost by 0\n")


def test_a_rank_that_the_others_waited_for_in_vain_is_named(tmp_path):
    """Its model hangs, say: it says nothing."""
    rank = """
all_started()
if rank != 1:
    leave_words(f"rank {rank} lost the others"); sys.exit(LOST)
while True:
    time.sleep(0.1)
"""
    status, _, errors = ended(start(tmp_path, rank))
    assert status == 2
    assert "lost the others. Still there was rank 1: it did not come to the others" in errors


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_reaches_each_rank_as_often_as_it_comes(tmp_path, name, times):
    rank = f"""
for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(each, note)
(here / f"ready-{{rank}}").touch()
noted = here / f"signals-{{rank}}"
while not (noted.exists() and noted.read_text().count("\\n") == {times}):
    time.sleep(0.01)
time.sleep(0.2)
leave_words("stopped by {name}"); sys.exit(128 + signal.{name})
"""
    process = start(tmp_path, rank)
    until(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    for sent in range(1, times + 1):
        os.killpg(process.pid, getattr(signal, name))  # as a terminal sends it
        until(
            lambda sent=sent: all(
                (file := tmp_path / f"signals-{rank}").exists()
                and file.read_text().count("\n") == sent
                for rank in range(3)
            )
        )
    status, _, errors = ended(process)
    assert (status, errors) == (128 + getattr(signal, name), f"stopped by {name}\n")
    for rank in range(3):
        assert (tmp_path / f"signals-{rank}").read_text() == f"{name}\n" * times


def test_a_signal_while_ranks_start_reaches_those_that_come_later(tmp_path):
    process = start(tmp_path, "time.sleep(60)")
    until(lambda: (tmp_path / "started-0").exists())
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path):
    process = start(tmp_path, "time.sleep(60)")
    found = pids(tmp_path)
    process.kill()
    until(lambda: all(map(is_gone, found)))
    process.communicate()
    (left,) = (tmp_path / "tmp").iterdir()
    old = time.time() - 100
    os.utime(left, (old, old))
    assert ended(start(tmp_path, ""))[0] == 0
    assert not list((tmp_path / "tmp").iterdir())


def test_the_folder_of_a_launcher_that_runs_is_let_be(tmp_path):
    process = start(tmp_path, "time.sleep(60)")
    pids(tmp_path)
    (there,) = (tmp_path / "tmp").iterdir()
    old = time.time() - 100
    os.utime(there, (old, old))
    assert ended(start(tmp_path, "", size=1))[0] == 0
    assert list((tmp_path / "tmp").iterdir()) == [there]
    process.terminate()
    assert ended(process)[0] == 143


def test_a_rank_whose_launcher_has_ended_already_does_not_begin(tmp_path):
    environment = {
        **os.environ,
        "HERE": str(tmp_path),
        LAUNCHER: "1",
        MEETING: tempfile.gettempdir(),
    }
    environment["RANK"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", RANK + "print('began')"], env=environment, capture_output=True
    )
    assert (done.returncode, done.stdout) == (3, b"")

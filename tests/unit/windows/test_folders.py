"""Folders: listed once for all who ask, kept within a bound, and what no file is left out."""

import os
import threading

import pytest
from pyarrow import fs

from penstock.data.windows import folders
from penstock.data.windows.folders import Entries, Folders, listed
from penstock.errors import DataError


def test_names_come_in_order_with_their_sizes(tmp_path):
    for name, size in (("b", 2), ("a", 1), ("é", 5), ("a-", 3), ("Z", 4)):
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "y").mkdir()
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "nowhere", tmp_path / "broken")
    found = listed(fs.LocalFileSystem(), str(tmp_path))
    assert found.files.to_pylist() == ["Z", "a", "a-", "b", "é"]
    assert found.sizes.tolist() == [4, 1, 3, 2, 5]
    assert found.folders.to_pylist() == ["d", "y"]
    assert listed(fs.LocalFileSystem(), str(tmp_path / "none")) is None
    assert [len(one) for one in listed(fs.LocalFileSystem(), str(tmp_path / "d"))] == [0] * 4
    assert sorted(found.others) == ["broken", "pipe"]


class Odd(fs.FileSystemHandler):
    """A foreign file system that gives sizes to things that are no files, and none to a file."""

    __abstractmethods__ = frozenset()

    def get_type_name(self):
        return "odd"

    def get_file_info_selector(self, selector):
        kinds = {
            "b": (fs.FileType.File, None),
            "a": (fs.FileType.File, 7),
            "d": (fs.FileType.Directory, 4096),
            "l": (fs.FileType.Unknown, 12),
        }
        return [
            fs.FileInfo(f"{selector.base_dir}/{name}", kind, size=-1 if size is None else size)
            for name, (kind, size) in kinds.items()
        ]


Odd.__abstractmethods__ = frozenset()


def test_what_has_a_size_is_not_always_a_file():
    found = listed(fs.PyFileSystem(Odd()), "x")
    assert (found.folders.to_pylist(), found.files.to_pylist()) == (["d"], ["a", "b"])
    assert (found.sizes.tolist(), found.others) == ([7, 0], ["l"])


def test_a_name_that_is_no_text_is_told(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"")
    with open(os.fsencode(tmp_path) + b"/b\xff.csv", "wb"):
        pass
    with pytest.raises(DataError, match=r"a name in it is not UTF-8.*b\\xff.csv"):
        listed(fs.LocalFileSystem(), str(tmp_path))


def entries(number):
    return Entries.of([], [f"{number:04}{n:04}" for n in range(100)], [1] * 100)


def test_who_asks_at_the_same_time_waits_for_one_listing():
    gate, asked = threading.Event(), []

    def list_folder(folder):
        asked.append(folder)
        assert gate.wait(20)
        return entries(1)

    store = Folders(list_folder)
    found = []
    threads = [threading.Thread(target=lambda: found.append(store.entries("a"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(20)
    assert asked == ["a"]
    assert store.listings == 1
    assert len(found) == 6
    assert all(one is found[0] for one in found)


@pytest.mark.parametrize("error", [DataError("gone"), RuntimeError("odd")])
def test_who_waits_for_a_listing_that_fails_fails_too_and_later_it_is_tried_again(error):
    gate, first = threading.Event(), threading.Event()
    state = [error]

    def list_folder(folder):
        first.set()
        assert gate.wait(20)
        if state:
            raise state.pop()
        return entries(1)

    store = Folders(list_folder)
    raised = []

    def ask():
        try:
            store.entries("a")
        except (DataError, RuntimeError) as error:
            raised.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    threads[0].start()
    assert first.wait(20)
    for thread in threads[1:]:
        thread.start()
    threading.Event().wait(0.1)
    gate.set()
    for thread in threads:
        thread.join(20)
    assert raised == [error] * 3
    assert len(store.entries("a").files) == 100
    assert store.listings == 2


def test_what_was_asked_for_longest_ago_makes_room(monkeypatch):
    one = sum(part.nbytes for part in entries(1)[:3]) + 1001
    monkeypatch.setattr(folders, "KEPT_BYTES", 3 * one)
    store = Folders(lambda folder: entries(int(folder)) if folder != "9" else None)
    for folder in "123":
        store.entries(folder)
    assert store.entries("1").files[0].as_py() == "00010000"
    store.entries("4")  # for which 2 goes
    assert store.listings == 4
    for folder in "134":
        store.entries(folder)
    assert store.listings == 4
    store.entries("2")
    assert store.listings == 5
    assert store.entries("9") is store.entries("9") is None
    assert store.listings == 6
    monkeypatch.setattr(folders, "KEPT_BYTES", 1)
    for _ in range(2):
        store.entries("5")  # more than the bound, and alone
    assert store.listings == 7
    store.entries("4")
    assert store.listings == 8

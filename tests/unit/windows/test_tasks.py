"""Tasks by number: the runs of files of a plain loop, whose names come back as they were."""

import numpy as np
import pytest

from penstock.data.windows.tasks import Tasks
from penstock.errors import DataError
from tests.unit.windows.test_graph import Store, graph_of, source

DAYS = {
    "name": "s",
    "window": "day",
    "start": "2026-01-01",
    "end": "2026-01-03",
    "sources": [
        source("a", "a/{YYYY}-{MM}-{DD}/{HH}/*.parquet"),
        source("b", "b/*/{YYYY}{MM}{DD}-*.csv"),
    ],
}


@pytest.fixture
def store():
    rng = np.random.default_rng(0)
    paths = [
        f"a/2026-01-0{day}/{hour:02}/{part}.parquet"
        for day in (1, 2)
        for hour in range(24)
        for part in range(int(rng.integers(0, 7)))
    ]
    paths += [
        f"b/{shard}/2026010{day}-{part}.csv"
        for day in (1, 2)
        for shard in "xyz"
        for part in range(int(rng.integers(0, 7)))
    ]
    return Store(paths)


def parts_and_tasks(store, most):
    graph = graph_of(store, [DAYS])
    tasks = Tasks(graph.stored, most)
    parts = list(graph.parts())
    return parts, tasks, [tasks.add(part) for part in parts]


@pytest.mark.parametrize("most", [1, 3, 100])
def test_they_are_the_runs_of_a_plain_loop(store, most):
    parts, tasks, numbers = parts_and_tasks(store, most)
    runs = []
    for part in parts:
        paths = list(part.files)
        runs += [(part, paths[at : at + most]) for at in range(0, len(paths), most)]
    assert [one for of_part in numbers for one in of_part] == list(range(len(runs)))
    assert len(tasks) == len(runs)
    for number in np.random.default_rng(most).permutation(len(runs)):
        part, paths = runs[number]
        task = tasks[int(number)]
        assert (task.stream, task.window, task.source) == part[:3]
        assert list(part.files[task.start : task.stop]) == paths
        assert list(tasks.files(int(number))) == paths
    for wrong in (-1, len(tasks)):
        with pytest.raises(IndexError, match="task"):
            tasks[wrong]


def test_hours_without_a_file_have_no_task():
    few = Store(["a/2026-01-01/03/1.parquet", "a/2026-01-01/04/1.txt", "b/x/20260101-1.txt"])
    parts, tasks, numbers = parts_and_tasks(few, 3)
    assert [list(part.files) for part in parts] == [["a/2026-01-01/03/1.parquet"]]
    assert numbers == [range(1)]
    assert len(tasks) == 1


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "larger", "folder"])
def test_names_that_changed_meanwhile_are_told(store, change):
    parts, tasks, _ = parts_and_tasks(store, 3)
    last = parts[-1].files.parts[-1]
    names = store.below[last.folder][1]
    name = last.names[-1].as_py()
    before = list(tasks.files(len(tasks) - 1))
    tasks.files(0)  # so that those of the last part are let go
    assert list(tasks.files(len(tasks) - 1)) == before
    tasks.files(0)
    if change in ("removed", "renamed"):
        names.remove(name)
    if change in ("added", "renamed"):
        names.add(name.replace("-", "-1"))
    if change == "larger":
        store.sizes[f"{last.folder}/{name}"] = 99
    if change == "folder":
        del store.below[last.folder]
    with pytest.raises(DataError, match="files were added, removed or written anew since"):
        tasks.files(len(tasks) - 1)
    names.add("hidden~")  # what is no file of the source changes nothing
    assert list(tasks.files(0)) == list(parts[0].files[:3])

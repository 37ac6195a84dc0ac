"""Files as arrays: the same as a list of their paths, and a digest that sees any change."""

import numpy as np
import pyarrow as pa
import pytest

from penstock.data.windows.files import Files, InFolder


def in_folder(folder, names, sizes=None):
    sizes = [len(name) for name in names] if sizes is None else sizes
    whole = pa.array(["before", *names, "behind"], pa.large_string())
    rows = slice(1, len(names) + 1)
    return InFolder.of(folder, whole, np.array([0, *sizes, 0]), rows)


def test_slices_are_those_of_a_list():
    rng = np.random.default_rng(0)
    parts = [in_folder(f"f{n}" if n else "", [f"{n}-{m}" for m in range(m)]) for n, m in
             enumerate([3, 1, 5, 2])]  # fmt: skip
    files = Files(parts)
    paths = [f"f{n}/{n}-{m}" if n else f"0-{m}" for n, count in enumerate([3, 1, 5, 2])
             for m in range(count)]  # fmt: skip
    assert list(files) == list(files.paths) == paths
    assert files.sizes.tolist() == [3] * 11
    assert len(files) == 11
    assert [files[n] for n in range(-11, 11)] == paths + paths
    for _ in range(200):
        start, stop = (int(one) for one in rng.integers(-14, 14, 2))
        cut = files[start:stop]
        assert list(cut) == paths[start:stop]
        assert len(cut) == len(cut.sizes) == len(paths[start:stop])
        assert list(cut[1:]) == paths[start:stop][1:]
    assert list(files[:]) == paths
    for wrong in (11, -12):
        with pytest.raises(IndexError):
            files[wrong]
    with pytest.raises(ValueError, match="steps of 1"):
        files[::2]
    assert list(Files([])) == Files([]).sizes.tolist() == []
    assert list(Files.joined([files, files[2:3]])) == [*paths, paths[2]]


def test_the_digest_sees_names_sizes_folders_and_where_a_name_ends():
    cases = [
        [in_folder("f", ["a", "bc"])],
        [in_folder("f", ["ab", "c"], [1, 2])],
        [in_folder("g", ["a", "bc"])],
        [in_folder("f", ["a", "bc"], [1, 3])],
        [in_folder("f", ["a"])],
        [in_folder("f", ["a"]), in_folder("f", ["bc"])],
        [in_folder("f", ["a", "bd"])],
        [in_folder("f", ["a", "bc"], [2, 1])],
    ]
    digests = [Files(parts).digest() for parts in cases]
    assert len(set(digests)) == len(digests)
    again = InFolder("f", pa.array(["a", "bc"], pa.large_string()), np.array([1, 2]))
    assert Files([again]).digest() == digests[0]

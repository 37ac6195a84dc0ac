"""The short form of `tests/soak/ranks_in_trouble.py`; the long one is run by hand."""

import pytest

from tests.soak.ranks_in_trouble import Troubles


@pytest.fixture(scope="module")
def troubles(tmp_path_factory):
    return Troubles(tmp_path_factory.mktemp("troubles"))


@pytest.mark.parametrize(
    "trouble", [("evaluation", "kill", 1), ("save", "full", 1), ("forward", "hang", 0)]
)
def test_all_end_and_it_is_said_what_it_was(troubles, trouble):
    troubles.run(*trouble, goes_on=trouble[1] == "kill")

"""A source is registered by its configuration and one line that opens it; the rest follows."""

from typing import get_args

import pytest

from penstock.config import FILE_FORMATS, FILE_SOURCES, SOURCES, FileSource, Source, format_of_path
from penstock.data.opening import OPENERS


def formats_of(source):
    return get_args(source.model_fields["format"].annotation)


def test_each_configuration_is_opened():
    assert set(OPENERS) == set(SOURCES) == set(get_args(get_args(Source)[0]))
    assert set(FILE_SOURCES) == {one for one in SOURCES if issubclass(one, FileSource)}


@pytest.mark.parametrize("source", FILE_SOURCES)
def test_names_of_files_and_words_are_those_of_the_format(source):
    assert set(source.endings.values()) == set(formats_of(source)) <= set(FILE_FORMATS)
    assert source.extents
    for ending, name in source.endings.items():
        assert format_of_path(f"day.{ending}") == format_of_path(f"DAY.{ending.upper()}") == name


def test_no_two_formats_share_an_ending():
    endings = [ending for source in FILE_SOURCES for ending in source.endings]
    assert len(endings) == len(set(endings))

"""Where one rank cannot train on its part, the others leave it to that rank to say why."""

import pytest

from penstock.errors import FailedElsewhere, NonFiniteError
from penstock.training.steps.division import _refuse_failed


def test_a_rank_whose_numbers_are_fine_names_no_rows_of_its_own():
    with pytest.raises(NonFiniteError, match="of rank 2 is not finite") as raised:
        _refuse_failed(None, [0.0, 0.0, 2.0])
    assert isinstance(raised.value, FailedElsewhere)
    own = NonFiniteError("the loss is nan")
    with pytest.raises(NonFiniteError) as raised:
        _refuse_failed(own, [0.0, 0.0, 2.0])
    assert raised.value is own
    assert own.is_known_to_all

"""Malformed and hostile input, generated. tests/slow/test_inputs.py has the long version."""

import pytest
from fuzz import CASES


@pytest.mark.parametrize("name", CASES)
def test_generated_input_succeeds_or_is_refused_in_one_line(box, name):
    CASES[name](box, 20)

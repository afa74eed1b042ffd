"""The long version of tests/test_inputs.py: 10,800 generated inputs.

pytest -m slow tests/slow/test_inputs.py
"""

import pytest
from fuzz import CASES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", CASES)
def test_generated_input_succeeds_or_is_refused_in_one_line(box, name):
    CASES[name](box, 900)

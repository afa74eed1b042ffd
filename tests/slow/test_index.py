"""The long version of the kills in tests/test_index.py: 20 kills of one search, and of two at once.

pytest -m slow tests/slow/test_index.py
"""

import pytest
from faults import check_index_kills

pytest.importorskip("lancedb", reason="LanceDB is an extra: pip install lancedb")
pytestmark = pytest.mark.slow


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("seed", [1, 2])
def test_an_index_whose_makers_are_killed_20_times(processes, small_run, tmp_path, seed):
    check_index_kills(processes, small_run, tmp_path, num_kills=20, num_photos=4000, seed=seed)


@pytest.mark.xdist_group("processes")
def test_two_makers_at_once_are_killed_10_times(processes, small_run, tmp_path):
    check_index_kills(processes, small_run, tmp_path, num_kills=10, num_photos=2000, seed=3, num_processes=2)

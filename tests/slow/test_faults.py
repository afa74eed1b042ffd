"""The long versions of tests/test_faults.py: hundreds of kills, with ResNets too, and of damaged files.

pytest -m slow tests/slow/test_faults.py      says at its end how many there were
"""

import os
import shutil
import sys

import pytest
from builders import TINY
from faults import check_damages, check_kills, check_same, check_torchrun, linked

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", range(20))
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_state(
    processes, finished, tmp_path, record_property, seed
):
    record_property("kills", check_kills(processes, finished, tmp_path / "root", seed))


@pytest.mark.parametrize("seed", range(20, 30))
def test_a_resnet_that_is_killed_again_and_again_ends_in_the_same_state(
    processes, tiny_data, tiny_run, tmp_path, record_property, seed
):
    expected = linked(tiny_data, tiny_run.parent, tmp_path / "expected")
    record_property("kills", check_kills(processes, expected, tmp_path / "root", seed, small=False))


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_file_never_changes_a_number(threads, finished, tmp_path, capsys, record_property, seed):
    record_property("damaged files", check_damages(finished, tmp_path, lambda: capsys.readouterr().err, seed))


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_torchrun_with_three_processes(processes, tiny_data, tmp_path):
    four = ["--ensemble_size", "4"]
    check_torchrun(processes, tiny_data, tmp_path / "root", 3, *four)
    shutil.copytree(tiny_data, tmp_path / "expected" / "data", copy_function=os.link)
    processes.run("train.py", *TINY, *four, folder=tmp_path / "expected", small=False)
    check_same(tmp_path / "root", tmp_path / "expected")

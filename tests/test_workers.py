"""Worker processes: they end with their parent, and one that dies is noticed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreml.data.workers import WorkerDied, worker_pool


def test_a_worker_that_dies_is_noticed():
    with pytest.raises(WorkerDied), worker_pool(1) as pool:
        pool.submit(os._exit, 1).result()


def test_what_a_worker_raises_is_raised():
    with pytest.raises(ValueError, match="invalid literal"), worker_pool(1) as pool:
        pool.submit(int, "x").result()


BUSY = """
import time
from dreml.data.workers import worker_pool
if __name__ == "__main__":
    with worker_pool(1) as pool:
        pool.submit(time.sleep, 600)
        print("at work", flush=True)
        time.sleep(600)
"""


def test_a_worker_ends_when_its_parent_is_killed(tmp_path):
    (tmp_path / "busy.py").write_text(BUSY)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    parent = subprocess.Popen([sys.executable, tmp_path / "busy.py"], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout.readline() == b"at work\n"
    parent.kill()
    parent.communicate(timeout=30)  # the worker writes to the same pipe, which is closed when both have ended

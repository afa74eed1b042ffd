"""Worker processes: they end with their parent, and a few tasks are taken ahead."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dreml.workers import map_ahead


def test_a_few_tasks_are_taken_ahead_and_the_results_come_in_order():
    taken = []

    def tasks():
        for number in range(40):
            taken.append(number)
            yield number

    def square(number: int) -> int:
        time.sleep(0.001 * (number % 3))
        return number**2

    with ThreadPoolExecutor(3) as pool:
        for number, (task, result) in enumerate(map_ahead(pool, square, tasks(), ahead=5)):
            assert (task, result) == (number, number**2) and len(taken) == min(number + 5, 40)
        assert number == 39
        assert list(map_ahead(pool, square, iter([3]), ahead=5)) == [(3, 9)]
        assert list(map_ahead(pool, square, iter([]), ahead=5)) == []


BUSY = """
import time
from dreml.workers import worker_pool
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

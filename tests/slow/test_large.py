"""A million images: the memory and the time of data_utils.py, and of looking for changes.

pytest -m slow -s tests/slow/test_large.py prints them. Takes about five minutes and 1 GB of disk.
"""

import os
import subprocess
import sys

import pytest
from builders import random_image
from processes import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for memory")]

SCRIPT = """
import sys, time
import data_utils
for run in ("make", "look for changes"):
    start = time.perf_counter()
    assert data_utils.main(["--image_size", "8", "--data_path", sys.argv[1], "--data_name", "large"]) == 0
    print(run, time.perf_counter() - start, "s")
    peak = 1024 * int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
    print(peak)
"""


def test_a_million_images(tmp_path):
    """At most 400 MB in the process that lists them; its workers hold a few images each."""
    files = [tmp_path / f"{number}.png" for number in range(40)]
    for number, file in enumerate(files):
        random_image(number, 8, 8).save(file)
    for number in range(2000):
        split = "train" if number < 1000 else "test"
        folder = tmp_path / "large" / split / f"{split}_{number:04d}"
        folder.mkdir(parents=True)
        for image in range(500):
            os.link(files[(number + image) % 40], folder / f"{image:06d}.png")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, cwd=ROOT, check=True)
    print(done.stdout)
    assert int(done.stdout.splitlines()[-1]) < 400e6

"""A million images: the memory and the time of each script.

pytest -m slow -s tests/slow/test_large.py prints them. Takes about ten minutes, 1 GB of disk and 2 GB of memory.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import random_embeddings, random_image, write_run
from processes import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for memory")]

CLASSES, IMAGES = 1_000, 500  # of each split, and of each class: a million images
SIZES = {"small": (CLASSES, 2), "large": (CLASSES, IMAGES)}
GROWTH = 2 * CLASSES * (IMAGES - 2)  # by how many images the two differ


@pytest.fixture(scope="module")
def links(tmp_path_factory):
    """A data folder with two sets of images of 8 pixels: links to 40 files."""
    data = tmp_path_factory.mktemp("large")
    files = [data / f"{number}.png" for number in range(40)]
    for number, file in enumerate(files):
        random_image(number, 8, 8).save(file)
    for name, (num_classes, num_images) in SIZES.items():
        for number in range(2 * num_classes):
            split = "train" if number < num_classes else "test"
            folder = data / name / split / f"{split}_{number:04d}"
            folder.mkdir(parents=True)
            for image in range(num_images):
                os.link(files[(number + image) % 40], folder / f"{image:06d}.png")
    yield data
    shutil.rmtree(data)


def run(code: str, *arguments: object) -> dict:
    """Runs Python code in a process of its own. Returns what it prints last."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout.splitlines()[-1])


DATA_UTILS = """
import json, sys, time
import data_utils
start = time.perf_counter()
assert data_utils.main(["--image_size", "8", "--data_path", sys.argv[1], "--data_name", sys.argv[2]]) == 0
peak = 1024 * int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak}))
"""

TRAIN = """
import json, sys, threading, time
import torch
import builders, model, train
from dreml import run_writer as writer
torch.set_num_threads(1)
model.build_model = builders.build_small_model
own, events, step, score = [], {}, train.train_step, writer.recall_table

def watch():  # what is not of a file: without the memory maps
    while True:
        status = open("/proc/self/status").read()
        own.append(1024 * int(status.partition("RssAnon:")[2].split()[0]))
        time.sleep(0.01)

def first_step(*arguments):
    events.setdefault("seconds", time.perf_counter() - start)
    step(*arguments)

def no_score(embeddings, split, ks):  # its memory is that of the embeddings
    return score([], split, ks)

train.train_step, writer.recall_table = first_step, no_score
train.update_baseline = lambda *_: None  # as above
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
options = "--image_size 8 --weights none --device cpu --precision fp32 --num_epochs 1 --batch_size 512".split()
options += ["--data_path", sys.argv[1], "--data_name", sys.argv[2], "--results_path", sys.argv[3]]
assert train.main([*options, "--ensemble_size", "2", "--members", "1"]) == 0
print(json.dumps(events | {"own": max(own), "total": time.perf_counter() - start}))
"""

RETRIEVE = """
import json, sys, time
import retrieve
from dreml import runs as folder, search
apart = []

def timed(owner, name):
    call = getattr(owner, name)
    def timed_call(*arguments):
        start = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            apart.append(time.perf_counter() - start)
    setattr(owner, name, timed_call)

# Reading and checking the saved embeddings, and the search
for owner, name in ((folder.Members, "read"), (folder.Run, "embeddings"), (search, "unit_rows"),
                    (search, "nearest")):
    timed(owner, name)
start = time.perf_counter()
assert retrieve.main([sys.argv[1], "--query", "test:17", "--no_picture", "--output", sys.argv[2]]) == 0
print(json.dumps({"seconds": time.perf_counter() - start - sum(apart), "apart": sum(apart)}))
"""


@pytest.fixture(scope="module")
def cached(links) -> tuple[Path, dict[str, dict]]:
    """The data folder with its caches, and what each took."""
    return links, {name: run(DATA_UTILS, links, name) for name in SIZES}


def test_making_the_cache(cached):
    """At most 400 MB in the process that lists them; its workers hold a few images each."""
    large = cached[1]["large"]
    print(f"\ndata_utils.py: {large['seconds']:.1f} s, at most {large['peak'] / 1e6:.0f} MB")
    assert large["peak"] < 400e6


def test_training(cached, tmp_path):
    """At most 100 bytes an image beside the memory maps, up to the end of an epoch and the embedding."""
    small, large = (run(TRAIN, cached[0], name, tmp_path) for name in SIZES)
    growth = (large["own"] - small["own"]) / GROWTH
    print(
        f"\ntrain.py: first step after {small['seconds']:.1f} and {large['seconds']:.1f} s, {growth:.0f} bytes an image"
    )
    assert growth < 100


def test_a_search(small_run, tmp_path):
    """Whatever else the start does, it takes as long for a thousand test images as for a million, give or take 1 s."""
    times = []
    for number in (1_000, 1_000_000):
        folder = tmp_path / str(number)
        write_run(folder, small_run, random_embeddings(0, 1, number), np.arange(number) % 4)
        times.append(sorted((run(RETRIEVE, folder, tmp_path / "out") for _ in range(3)), key=lambda r: r["seconds"])[1])
    small, large = times
    print(f"\nretrieve.py: {small['seconds']:.2f} and {large['seconds']:.2f} s, and {large['apart']:.2f} s apart")
    shutil.rmtree(tmp_path)

"""Fixtures: a tiny drawn data set, and runs trained on it. No network, no GPU."""

import collections
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import TINY, Indexed, build_small_model, only_folder, save_image, train_tiny
from faults import linked
from processes import Processes

import data_utils
import model
import train
from dreml import batches, cache_writer
from dreml.cache import Cache, read_cache
from dreml.demo import draw_demo
from dreml.images import ImageSpec
from dreml.settings import Settings, settings_of

os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start
torch.set_num_threads(1)  # the suite runs in several processes; and the same bits everywhere


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A data folder with the drawn set `tiny`, 6 + 6 classes of 6 images, cached at 32 pixels. Not to be changed."""
    data = tmp_path_factory.mktemp("data")
    draw_demo(data / "tiny", num_classes=6, images_per_class=6, image_side=40)
    assert data_utils.main(["--data_path", str(data), "--data_name", "tiny", "--image_size", "32"]) == 0
    return data


@pytest.fixture
def tiny_cache(tiny_data) -> Cache:
    return read_cache(tiny_data, "tiny", ImageSpec(32))


@pytest.fixture(scope="session")
def tiny_run(tiny_data, tmp_path_factory) -> Path:
    """The run folder of two members trained on `tiny`. Not to be changed."""
    results = tmp_path_factory.mktemp("results")
    assert train_tiny(tiny_data, results) == 0
    return only_folder(results)


@pytest.fixture
def tiny_settings() -> Settings:
    """Those of the options TINY."""
    return settings_of(train.parse_args(TINY))


@pytest.fixture
def no_training(monkeypatch):
    def refuse(experiment, member, title, progress=None):
        raise AssertionError("nothing was to be trained")

    monkeypatch.setattr(train, "train_member", refuse)


@pytest.fixture
def small_network(monkeypatch):
    """Whatever backbone is asked for, a small network is built."""
    monkeypatch.setattr(model, "build_model", build_small_model)


@pytest.fixture(scope="session")
def _small_run(tiny_data, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "build_model", build_small_model)
        assert train_tiny(tiny_data, results) == 0
    return only_folder(results)


@pytest.fixture
def small_run(_small_run, small_network) -> Path:
    """The run folder of two small networks trained on `tiny`, which are built from now on. Not to be changed."""
    return _small_run


@pytest.fixture
def seen(monkeypatch) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The (images, corners, sides) of every batch that is cut from a cache from now on."""
    cuts, original = [], Cache.train_crops

    def train_crops(self, indices, corners, sides, out):
        cuts.append((indices, corners, sides))
        original(self, indices, corners, sides, out)

    monkeypatch.setattr(Cache, "train_crops", train_crops)
    monkeypatch.setattr(batches, "BATCHES_AHEAD", 1)  # so that they come in order
    return cuts


@pytest.fixture
def squashed_data(tmp_path) -> Path:
    """A data folder with the set `tiny` of wide images, with a cache of both kinds."""
    data = tmp_path / "data"
    for number, (split, name) in enumerate(itertools.product(("train", "test"), "aaabbbccc")):
        path = data / "tiny" / split / name / f"{number}.png"
        save_image(path, number, width=80, height=40)
    for resize in ("crop", "squash"):
        assert data_utils.main(["--data_path", str(data), "--image_size", "32", "--resize", resize]) == 0
    return data


@pytest.fixture
def shop_data(tmp_path) -> Path:
    """images.csv as In-Shop is: queries and gallery apart. Of its 4 test classes, `d` has no gallery image."""
    rows, lines = [("train", name, "", "") for name in "ppqqrr"], ["path,label,split,is_query,is_gallery"]
    rows += [("test", name, "1", "0") for name in "aaabbccd"] + [("test", name, "0", "1") for name in "aabbbcc"]
    rows += [("test", "b", "1", "1")]  # both
    for number, (split, name, is_query, is_gallery) in enumerate(rows):
        save_image(tmp_path / "data" / "shop" / f"{number}.png", number)
        lines.append(f"{number}.png,{name},{split},{is_query},{is_gallery}")
    (tmp_path / "data" / "shop" / "images.csv").write_text("\n".join(lines) + "\n")
    assert data_utils.main(["--data_path", str(tmp_path / "data"), "--image_size", "32"]) == 0
    return tmp_path / "data"


def pytest_terminal_summary(terminalreporter) -> None:
    """Says how many kills and damaged files were survived, by the properties that tests record."""
    counts = collections.Counter()
    for report in terminalreporter.stats.get("passed", []):
        counts.update({what: number for what, number in report.user_properties if what in ("kills", "damaged files")})
    if counts:
        terminalreporter.write_line(f"nothing was lost in {', '.join(f'{n} {what}' for what, n in counts.items())}")


@pytest.fixture(scope="session")
def processes(tmp_path_factory) -> Processes:
    return Processes(tmp_path_factory.mktemp("logs"))


@pytest.fixture
def finished(tiny_data, small_run, tmp_path) -> Path:
    """A folder with `tiny_data` as data/ and, in results/, `small_run`. Its files are links: not to be written to."""
    return linked(tiny_data, small_run.parent, tmp_path / "finished")


@pytest.fixture
def threads(monkeypatch) -> None:
    """Threads in place of the worker processes that make a cache, whose start would take most of the time."""
    monkeypatch.setattr(cache_writer, "worker_pool", ThreadPoolExecutor)


@pytest.fixture
def indexed(tmp_path) -> Indexed:
    """A folder of 48 small photos, which has no index yet."""
    return Indexed(tmp_path)

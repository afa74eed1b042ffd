"""Making a cache: its pixels, bad images, leaks, failures on the way, and what a killed run leaves behind."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import process
from pathlib import Path

import filelock
import numpy as np
import pytest
import torchvision.transforms.functional as TF
from builders import SPEC, build, jpeg_bytes, odd_images, paths_of, put, rewrite, tree, write_csv, write_image_folder

import data_utils
from dreml import cache_writer
from dreml.cache import read_cache
from dreml.cli import InputError, RunError
from dreml.images import ImageSpec, load_rgb


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("size", [32, 33])
def test_cache_equals_the_torchvision_pipeline(tmp_path, size, resize):
    odd_images(tmp_path / "odd")
    for split in ("train", "test"):
        for path in (tmp_path / "odd").iterdir():
            folder = tmp_path / "data" / "mine" / split / f"class_{path.stem[0]}"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder)
    spec = ImageSpec(size, resize)
    cache = build(tmp_path / "data", "mine", spec, num_workers=2)
    larger, smaller = ([side, side] if resize == "squash" else side for side in (int(1.1 * size), size))

    pixels, offsets, sizes = (cache.array(f"train_{name}") for name in ("pixels", "offsets", "sizes"))
    assert len(paths_of(cache, "train")) == len(sizes) == 27 and offsets[-1] == len(pixels)
    for number, path in enumerate(paths_of(cache, "train")):
        image = load_rgb(tmp_path / "data" / "mine" / path)
        expected = np.asarray(TF.resize(image, larger))
        cached = pixels[offsets[number] : offsets[number + 1]].reshape(*sizes[number], 3)
        np.testing.assert_array_equal(cached, expected, err_msg=path)
    assert cache.array("test_images").shape == (27, size, size, 3)
    for number, path in enumerate(paths_of(cache, "test")):
        image = load_rgb(tmp_path / "data" / "mine" / path)
        expected = np.asarray(TF.center_crop(TF.resize(image, smaller), size))
        np.testing.assert_array_equal(cache.array("test_images")[number], expected, err_msg=path)


def test_statistics_of_other_sets_come_from_the_cached_training_pixels(tiny_data):
    cache = read_cache(tiny_data, "tiny", SPEC)
    pixels = cache.array("train_pixels").reshape(-1, 3) / 255
    np.testing.assert_allclose(cache.meta.mean, pixels.mean(0), atol=1e-6)
    np.testing.assert_allclose(cache.meta.std, pixels.std(0), atol=1e-6)


def test_all_problems_are_counted_and_the_first_20_listed(tmp_path, threads):
    write_image_folder(tmp_path / "mine", classes=2, images=15)
    for path in sorted((tmp_path / "mine" / "train").rglob("*.png"))[:25]:
        path.write_bytes(b"")
    put("train/train_1/9.png", (tmp_path / "mine/test/test_0/0.png").read_bytes()[:-60])(tmp_path / "mine")
    with pytest.raises(InputError) as refusal:
        build(tmp_path, "mine")
    message = str(refusal.value)
    assert "mine: 26 problems, nothing written; --skip_bad goes on without bad images:" in message
    assert message.count(": unreadable") == 20


def test_a_bad_list_is_refused_before_any_image_is_opened(tmp_path, monkeypatch):
    write_csv(tmp_path / "csv")
    rewrite("images.csv", "ant,train", "ant,toast")(tmp_path / "csv")
    monkeypatch.setattr(cache_writer, "worker_pool", None)
    with pytest.raises(InputError, match=r"^csv: 1 problem, nothing written:\n.*'toast'"):
        build(tmp_path, "csv", skip_bad=True)


def test_skip_bad_leaves_them_out_and_lists_them(tmp_path, capsys):
    """The pixels are those of a data set without them."""
    bad = ["train/train_0/1.png", "train/train_1/notes.jpg", "test/test_2/0.png"]
    for name in ("clean", "mine"):
        write_image_folder(tmp_path / name, classes=3, images=3)
    for path in bad:
        (tmp_path / "clean" / path).unlink(missing_ok=True)
        (tmp_path / "mine" / path).write_bytes(jpeg_bytes()[:-60])
    with pytest.raises(InputError):
        build(tmp_path, "mine")
    mine, clean = (build(tmp_path, name, skip_bad=True, num_workers=2).folder for name in ("mine", "clean"))
    assert f"3 bad images left out, listed in {mine / 'skipped.txt'}\n" in capsys.readouterr().err
    listed = (mine / "skipped.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [str(tmp_path / "mine" / path) for path in bad]
    differing = dict(tree(mine).items() ^ tree(clean).items()).keys()
    assert differing == {"skipped.txt", "files.bin"}
    write_csv(tmp_path / "csv")
    for number in (3, 6):  # its queries
        (tmp_path / "csv" / "photos" / f"{number}.png").write_bytes(b"")
    with pytest.raises(InputError, match="no image is left in query"):
        build(tmp_path, "csv", skip_bad=True)


SAME_FILE = {  # -> how training image 1 becomes a test image, too, and the path of that
    "other spelling": (lambda root: None, "./photos/.//1.png"),
    "hard link": (lambda root: (root / "photos/7.png").hardlink_to(root / "photos/1.png"), "photos/7.png"),
    "link": (lambda root: (root / "photos/7.png").symlink_to(root / "photos/1.png"), "photos/7.png"),
    "link to the folder": (lambda root: (root / "other").symlink_to(root / "photos"), "other/1.png"),
    "copy": (lambda root: shutil.copy(root / "photos/1.png", root / "photos/7.png"), "photos/7.png"),  # not looked for
}


@pytest.mark.parametrize("kind", SAME_FILE)
def test_an_image_in_both_splits_is_a_warning(tmp_path, capsys, threads, kind):
    write_csv(tmp_path / "csv")
    link, path = SAME_FILE[kind]
    link(tmp_path / "csv")
    with open(tmp_path / "csv" / "images.csv", "a") as file:
        file.write(f"{path},fox,test,1,1\n")
    build(tmp_path, "csv")
    lines = [line for line in capsys.readouterr().err.splitlines() if "both" in line]
    start = "csv: warning: 1 image is in both train and test, such as "
    assert [line[: len(start)] for line in lines] == ([] if kind == "copy" else [start])


def test_a_read_only_folder_is_refused_with_a_way_on(tmp_path, threads, monkeypatch):
    """Before any image is opened. A cache that is there can be used."""

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    write_image_folder(tmp_path / "mine")
    build(tmp_path, "mine")
    monkeypatch.setattr(cache_writer, "take_lock", refuse)
    build(tmp_path, "mine")
    remedy = "--data_path (a folder of your own there, with links in it to what is in this one) names another folder"
    with pytest.raises(InputError, match=rf"^cannot write into {tmp_path}/mine \(Perm.*\); {re.escape(remedy)}$"):
        build(tmp_path, "mine", force=True)


def test_a_cache_that_cannot_be_flushed_is_not_published(tmp_path, threads, monkeypatch):
    def fail(file):
        raise OSError("no such luck")

    write_image_folder(tmp_path / "mine")
    monkeypatch.setattr(cache_writer, "flush_to_disk", fail)
    with pytest.raises(OSError, match="no such luck"):
        build(tmp_path, "mine")
    assert not list((tmp_path / "mine").glob("cache_32"))


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the patched function reaches forks only")
def test_a_killed_worker_is_named(tmp_path, monkeypatch):
    write_image_folder(tmp_path / "mine")
    monkeypatch.setattr(cache_writer, "load_rgb", lambda path: os._exit(1))
    with pytest.raises(RunError, match="a worker process was killed"):
        build(tmp_path, "mine")


def test_a_cache_in_the_making_is_not_disturbed(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer, "SECONDS_FOR_A_LOCK", 0.1)
    write_image_folder(tmp_path / "mine")
    with (
        filelock.FileLock(tmp_path / "mine" / ".cache_32.lock"),
        pytest.raises(InputError, match="cache_32 is being made by another process"),
    ):
        build(tmp_path, "mine")


def test_the_old_cache_returns_when_the_new_one_cannot_take_its_place(tmp_path, threads, monkeypatch):
    write_image_folder(tmp_path / "mine")
    build(tmp_path, "mine")
    before, rename = tree(tmp_path / "mine" / "cache_32"), os.rename

    def refuse(source, target):
        if ".new-" in str(source):
            raise OSError("refused")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="refused"):
        build(tmp_path, "mine", force=True)
    assert before and tree(tmp_path / "mine" / "cache_32") == before
    assert not [path for path in (tmp_path / "mine").glob(".cache*") if path.is_dir()]


def test_a_good_cache_is_kept_and_force_makes_it_again(tmp_path, capsys):
    """The same bits, whatever the number of workers. What a killed run left goes."""
    write_image_folder(tmp_path / "mine")
    cache = build(tmp_path, "mine", num_workers=2).folder
    number = cache.stat().st_ino
    before = tree(cache)
    (tmp_path / "mine" / ".cache_32.new-123").mkdir()
    (tmp_path / "mine" / ".cache_32.new-123" / "train_pixels.npy").write_bytes(b"half")
    build(tmp_path, "mine")
    assert f"mine: {cache} is there already (--force makes it again)\n" in capsys.readouterr().out
    assert cache.stat().st_ino == number
    build(tmp_path, "mine", force=True)
    assert cache.stat().st_ino != number and tree(cache) == before
    assert sorted(path.name for path in cache.parent.iterdir()) == [".cache_32.lock", "cache_32", "test", "train"]
    (cache / "test_labels.npy").unlink()  # a damaged one
    build(tmp_path, "mine")
    assert re.search(r"mine: making the cache again: .*test_labels\.npy is missing", capsys.readouterr().err)
    assert tree(cache) == before


def test_a_signal_while_the_workers_are_started_ends_them(tmp_path, capsys, monkeypatch):
    """In Python's own code it would end in a RuntimeError, and then wait for the workers without end."""
    write_image_folder(tmp_path / "mine")
    start = process._ExecutorManagerThread.start

    def start_with_a_signal(thread):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        start(thread)

    monkeypatch.setattr(process._ExecutorManagerThread, "start", start_with_a_signal)
    options = ["--data_path", str(tmp_path), "--data_name", "mine", "--image_size", "32", "--num_workers", "2"]
    assert data_utils.main(options) == 143
    assert "terminated; run the same command again to go on" in capsys.readouterr().err
    assert not multiprocessing.active_children()


BUSY = """
import time
from dreml.cache_writer import worker_pool
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


def test_a_disk_that_is_too_small_is_found_before_an_image_is_opened(tmp_path, threads, monkeypatch):
    write_image_folder(tmp_path / "mine", images=4)
    needed = 3 * 8 * (35 * 35 + 32 * 32)  # 8 images of each split
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(InputError, match=r"mine: the cache needs at least 0\.0 GB, only 0\.0 GB are free"):
        build(tmp_path, "mine")
    assert not list((tmp_path / "mine").glob("*cache_32"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    build(tmp_path, "mine")

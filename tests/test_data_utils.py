"""The script: its options, its summary, and several data sets of which some are bad."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from builders import SPEC, build, flip_a_bit, tree, write_cub, write_image_folder, write_sop

import data_utils
import train
from dreml.console import RunError
from dreml.data.cache import read_cache
from dreml.data.demo import draw_demo
from dreml.data.images import ImageSpec


def call(data: Path, *options: str) -> int:
    return data_utils.main(["--data_path", str(data), "--image_size", "32", "--num_workers", "1", *options])


def test_it_starts_without_torch_and_scipy():
    """They take seconds to import."""
    code = "import sys, data_utils; print({'torch', 'torchvision', 'scipy', 'pandas'} & set(sys.modules))"
    folder = Path(data_utils.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True).stdout == "set()\n"


def test_what_the_readme_imports():
    for name in ("ImageSpec", "load_rgb", "resize_test"):
        assert name in data_utils.__all__ and hasattr(data_utils, name)


def test_one_bad_set_does_not_stop_the_others(tmp_path, capsys):
    write_cub(tmp_path / "cub")
    write_sop(tmp_path / "sop")
    (tmp_path / "cub" / "images/001.Bird_1/Bird_0001.jpg").unlink()
    (tmp_path / "papers").mkdir()
    assert call(tmp_path) == 2
    output = capsys.readouterr()
    assert f"{tmp_path / 'papers'}: no data set, passed over" in output.out
    assert "data_utils.py: cub: 1 problems" in output.err
    assert re.search(r"\nsop +2 classes 4 images +2 classes 4 images +[\d.]+kB +\d", output.out)
    assert f"\ntrain on it with: python train.py --data_name sop --data_path {tmp_path} --image_size 32 " in output.out
    assert read_cache(tmp_path, "sop", SPEC).counts["test"] == (2, 4)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RunError("a worker process was killed")])
def test_a_set_that_fails_while_running_does_not_stop_the_others(tmp_path, capsys, monkeypatch, error):
    for name in ("first", "second"):
        write_image_folder(tmp_path / name)
    original = data_utils.build_cache

    def build_cache(data_path, name, *options):
        if name == "first":
            raise error
        return original(data_path, name, *options)

    monkeypatch.setattr(data_utils, "build_cache", build_cache)
    assert call(tmp_path) == 1
    output = capsys.readouterr()
    assert f"data_utils.py: failed: first: {error}\n" in output.err and re.search(r"\nsecond +2 classes", output.out)


def test_an_interruption_names_the_data_set(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    write_image_folder(tmp_path / "mine")
    monkeypatch.setattr(data_utils, "build_cache", interrupted)
    assert call(tmp_path) == 130
    assert capsys.readouterr().err == "data_utils.py: interrupted in mine; run the same command again to go on\n"


def test_no_data_set_at_all(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "missing"):
        assert call(folder) == 2
        message = capsys.readouterr().err
        assert "no data set found" in message and "python data_utils.py --data_name demo" in message


def test_named_set_that_is_not_there(tmp_path, capsys):
    (tmp_path / "car").mkdir()
    assert call(tmp_path, "--data_name", "cub", "car") == 2
    message = capsys.readouterr().err
    assert f"{tmp_path / 'cub'}: no such folder" in message and f"{tmp_path / 'car'} holds no data set" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data_name", "../x"], "'../x' is not the name of a folder"),
        (["--image_size", "0"], "'0' is not a positive integer"),
        (["--image_size", "5000"], "over 2048"),
        (["--verify", "--force"], "--verify only reads"),
        (["--a\nb"], "unrecognized arguments: --a b"),
        (["--num_workers", "many"], "'many' is not a positive integer"),
        (["--forc"], "unrecognized arguments: --forc"),
        (["--resize", "pad"], "argument --resize: invalid choice: 'pad'"),
    ],
)
def test_wrong_options(tmp_path, capsys, options, message):
    assert data_utils.main(["--data_path", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_all_options_reach_the_cache(tmp_path, capsys):
    write_image_folder(tmp_path / "mine")
    (tmp_path / "mine/train/train_0/0.png").write_bytes(b"")
    assert call(tmp_path, "--resize", "squash") == 2
    assert call(tmp_path, "--resize", "squash", "--skip_bad") == 0
    folder = tmp_path / "mine" / "cache_32_squash"
    before = folder.stat().st_ino
    assert call(tmp_path, "--resize", "squash") == 0
    assert folder.stat().st_ino == before
    assert call(tmp_path, "--resize", "squash", "--skip_bad", "--force") == 0
    assert folder.stat().st_ino != before
    command = f"python train.py --data_name mine --data_path {tmp_path} --image_size 32 --resize squash"
    command += " --meta_class_size 2 --recalls 1,2"
    assert capsys.readouterr().out.endswith(f"\ntrain on it with: {command}\n")


@pytest.mark.parametrize(
    ("classes", "images", "options"),
    [(2, 1, "--meta_class_size 2 --recalls 1"), (3, 2, "--meta_class_size 3 --recalls 1,2,4"), (12, 1, "")],
)
def test_the_suggested_command_fits_the_data_and_runs(
    tmp_path, capsys, monkeypatch, small_network, classes, images, options
):
    write_image_folder(tmp_path / "data" / "mine", classes, images)
    monkeypatch.chdir(tmp_path)
    assert data_utils.main(["--image_size", "32", "--num_workers", "1"]) == 0
    plain = "python train.py --data_name mine --image_size 32"
    (command,) = re.findall(r"\ntrain on it with: (.*)\n", capsys.readouterr().out)
    assert command == f"{plain} {options}".strip()
    quick = "--weights none --num_epochs 1 --ensemble_size 1 --device cpu"
    assert train.main([*command.split()[2:], *quick.split()]) == 0
    (folder,) = (path for path in (tmp_path / "results").iterdir() if path.is_dir())
    assert len(pd.read_csv(folder / "recall.csv")) == 1


@pytest.mark.parametrize(
    ("taken", "reason"),
    [("train/train_1", "it has one training class, and"), ("test/test_1", "yet: one test image cannot be searched;")],
)
def test_no_command_is_suggested_for_what_cannot_be_trained_on(tmp_path, capsys, taken, reason):
    write_image_folder(tmp_path / "mine", images=1)
    shutil.rmtree(tmp_path / "mine" / taken)
    assert call(tmp_path) == 0
    assert f"\nmine cannot be trained on{' ' if 'yet' in reason else ': '}{reason}" in capsys.readouterr().out


def test_verify_finds_a_flipped_bit(tmp_path, capsys):
    write_image_folder(tmp_path / "mine")
    build(tmp_path, "mine")
    assert call(tmp_path, "--verify", "--data_name", "mine") == 0
    (tmp_path / "papers").mkdir()
    assert call(tmp_path, "--verify") == 0  # looks at what has a cache
    for option, wanted in ((["--image_size", "64"], "cache_64"), (["--resize", "squash"], "cache_32_squash")):
        assert call(tmp_path, "--verify", *option) == 2
        assert f"no {wanted} found in {tmp_path}/" in capsys.readouterr().err
    flip_a_bit(tmp_path / "mine" / "cache_32" / "test_images.npy")
    assert call(tmp_path) == 0  # sizes alone do not show it
    assert call(tmp_path, "--verify", "--data_name", "mine") == 2
    assert "damaged: test_images; make it again with: python data_utils.py --data_name mine" in capsys.readouterr().err


def test_demo_is_drawn_once_and_never_over_another(tmp_path, capsys, monkeypatch):
    tiny = {"num_classes": 2, "images_per_class": 3, "image_side": 40}
    monkeypatch.setattr(data_utils, "draw_demo", lambda folder: draw_demo(folder, **tiny))
    assert call(tmp_path / "data", "--data_name", "demo") == 0
    assert "--image_size 32 --meta_class_size 2 --recalls 1,2,4 --weights none --no_flip --lr 1e-3\n" in capsys.readouterr().out
    drawn = tree(tmp_path / "data" / "demo" / "train")
    assert len(drawn) == 6 and read_cache(tmp_path / "data", "demo", SPEC).counts["test"] == (2, 6)

    write_image_folder(tmp_path / "mine" / "demo")
    mine = tree(tmp_path / "mine" / "demo" / "train")
    assert call(tmp_path / "mine", "--data_name", "demo", "--force") == 0
    assert tree(tmp_path / "mine" / "demo" / "train") == mine


def test_the_demo_is_drawn_into_a_data_folder_that_may_exist(tmp_path, monkeypatch):
    """Here by something quicker; the real one is tested in test_demo.py."""
    monkeypatch.setattr(data_utils, "draw_demo", write_image_folder)
    for data in (tmp_path, tmp_path / "not" / "yet"):
        assert data_utils.main(["--data_path", str(data), "--data_name", "demo", "--image_size", "16"]) == 0
        assert read_cache(data, "demo", ImageSpec(16)).counts == {"train": (2, 4), "test": (2, 4)}

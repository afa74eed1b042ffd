"""The script: its options, its summary, several data sets of which some are bad, holdouts."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import builders
import numpy as np
import pandas as pd
import pytest
from builders import (
    SPEC,
    build,
    flip_a_bit,
    paths_of,
    refused,
    save_image,
    tree,
    write_cub,
    write_image_folder,
    write_sop,
)

import data_utils
import train
from dreml import cache_writer
from dreml.cache import read_cache
from dreml.cli import InputError, RunError
from dreml.demo import draw_demo
from dreml.images import ImageSpec


def here(data: Path) -> list[str]:
    return ["--data_path", str(data), "--image_size", "32", "--num_workers", "1"]


def call(data: Path, *options: str) -> int:
    return data_utils.main([*here(data), *options])


def test_it_starts_without_torch_and_scipy_and_says_nothing_of_pillows_own():
    """They take seconds to import. Pillow would warn of images that are refused anyway."""
    code = "import sys, warnings, data_utils, PIL.Image; print({'torch', 'torchvision', 'scipy'} & set(sys.modules))\n"
    code += "warnings.warn('of 89 megapixels', PIL.Image.DecompressionBombWarning)"
    folder = Path(data_utils.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_one_bad_set_does_not_stop_the_others(tmp_path, capsys, threads):
    write_cub(tmp_path / "cub")
    write_sop(tmp_path / "sop")
    (tmp_path / "cub" / "images/001.Bird_1/Bird_0001.jpg").unlink()
    (tmp_path / "papers").mkdir()
    assert call(tmp_path) == 2
    output = capsys.readouterr()
    assert f"\npassed over: {tmp_path / 'papers'} holds no papers: expected is train/ and" in output.out
    assert "data_utils.py: cub: 1 problem, nothing written; --skip_bad" in output.err
    assert re.search(r"\nsop +2 classes 4 images +2 classes 4 images +[\d.]+kB +\d", output.out)
    assert f"\ntrain on it with: python train.py --data_name sop --data_path {tmp_path} --image_size 32 " in output.out
    assert read_cache(tmp_path, "sop", SPEC).counts["test"] == (2, 4)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RunError("a worker process was killed")])
def test_a_set_that_fails_while_running_does_not_stop_the_others(tmp_path, capsys, threads, monkeypatch, error):
    for name in ("first", "second"):
        write_image_folder(tmp_path / name)
    original = cache_writer.store_pixels

    def store_pixels(folder, images, source, *options):
        if source.name == "first":
            raise error
        return original(folder, images, source, *options)

    monkeypatch.setattr(cache_writer, "store_pixels", store_pixels)
    assert call(tmp_path) == 1
    output = capsys.readouterr()
    assert f"data_utils.py: failed: first: {error}\n" in output.err and re.search(r"\nsecond +2 classes", output.out)
    assert not list((tmp_path / "first").glob("*cache_32"))


def test_no_data_set_at_all(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "missing"):
        assert call(folder) == 2
        message = capsys.readouterr().err
        assert "no data set found" in message and "python data_utils.py --data_name demo" in message


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("cub", None, ": no such folder; expected is images.txt, image_class_labels.txt and images/"),
        ("car", "", " holds no car: expected is cars_annos.mat and car_ims/, or the devkit"),
        ("isc", "train/a", "; found: train; for images of your own, choose another name\n"),
        ("mine", "Train/a", " holds no mine: expected is train/ and test/ with a folder of images for each class"),
        ("mine", "inner/train/a", "; found: inner\n"),
    ],
)
def test_a_layout_that_is_not_known_is_refused_in_one_line(tmp_path, capsys, name, found, message):
    if found is not None:
        (tmp_path / name / found).mkdir(parents=True)
    error = refused(capsys, data_utils, *here(tmp_path), "--data_name", name)
    assert error.startswith(f"data_utils.py: {tmp_path / name}") and message in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data_name", "../x"], "'../x' is not the name of a folder"),
        (["--image_size", "0"], "--image_size 0 has to be at least 1 and at most 2,048"),
        (["--verify", "--force"], "--verify only reads"),
        (["--verify", "--data_name", "x", "--holdout", "0.6"], "--verify only reads"),
        (["--holdout", "0.4"], "--holdout needs --data_name"),
        (["--data_name", "mine", "--holdout_seed", "1"], "--holdout_seed goes with --holdout"),
        (["--data_name", "mine", "--holdout", "1.5"], "--holdout 1.5 has to be above 0 and at most 1"),
    ],
)
def test_wrong_options(tmp_path, capsys, options, message):
    assert message in refused(capsys, data_utils, "--data_path", tmp_path, *options)


def test_all_options_reach_the_cache(tmp_path, capsys, threads):
    write_image_folder(tmp_path / "mine")
    (tmp_path / "mine/train/train_0/0.png").write_bytes(b"")
    assert call(tmp_path, "--resize", "squash") == 2
    nodes = []
    for options in (["--skip_bad"], [], ["--skip_bad", "--force"]):
        assert call(tmp_path, "--resize", "squash", *options) == 0
        nodes.append((tmp_path / "mine" / "cache_32_squash").stat().st_ino)
    assert nodes[0] == nodes[1] != nodes[2]
    command = f"python train.py --data_name mine --data_path {tmp_path} --image_size 32 --resize squash"
    assert f"\ntrain on it with: {command} --meta_class_size all --recalls 1,2\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("classes", "images", "options"),
    [(2, 1, "--meta_class_size all --recalls 1"), (6, 1, "--meta_class_size 3 --recalls 1,2,4"), (12, 1, "")],
)
def test_the_suggested_command_fits_the_data_and_runs(
    tmp_path, capsys, monkeypatch, small_network, classes, images, options
):
    write_image_folder(tmp_path / "data" / "mine", classes, images)
    monkeypatch.chdir(tmp_path)
    assert data_utils.main(["--image_size", "32", "--num_workers", "1"]) == 0
    plain = "python train.py --data_name mine --image_size 32"
    output = capsys.readouterr().out
    (command,) = re.findall(r"\ntrain on it with: (.*)\n", output)
    advice = "(for one network in place of an ensemble: --meta_class_size all --ensemble_size 1)\n"
    assert output.endswith(advice) == (4 <= classes < 12)
    assert command == f"{plain} {options}".strip()
    quick = "--weights none --num_epochs 1 --ensemble_size 1 --device cpu"
    assert train.main([*command.split()[2:], *quick.split()]) == 0
    (folder,) = (path for path in (tmp_path / "results").iterdir() if path.is_dir())
    assert len(pd.read_csv(folder / "recall.csv")) == 1


@pytest.mark.parametrize("taken", ["train/train_1", "test/test_1"])
def test_no_command_is_suggested_for_what_cannot_be_trained_on(tmp_path, capsys, threads, taken):
    write_image_folder(tmp_path / "mine", images=1)
    shutil.rmtree(tmp_path / "mine" / taken)
    assert call(tmp_path) == 0
    assert "\nmine cannot be trained on: that takes two training classes, and two test" in capsys.readouterr().out


def test_photos_that_were_added_are_named_before_training(tmp_path, capsys, threads, monkeypatch):
    write_image_folder(tmp_path / "mine")
    assert call(tmp_path) == 0
    for number in range(12):
        save_image(tmp_path / "mine/train/new" / f"{number}.png")
    options = f"--data_name mine --data_path {tmp_path} --image_size 32"
    command = f"{options} --meta_class_size 2 --recalls 1 --weights none --results_path {tmp_path / 'runs'}"
    monkeypatch.setattr(train, "update_baseline", lambda *_: sys.exit(7))  # before the first step
    with pytest.raises(SystemExit):
        train.main(command.split())
    said = f"warning: 12 files are new, 0 changed, 0 gone since {tmp_path / 'mine/cache_32'} was made: "
    assert capsys.readouterr().err == f"{said}python data_utils.py {options} --force\n"
    assert data_utils.main([*options.split(), "--force"]) == 0
    assert read_cache(tmp_path, "mine", SPEC).counts["train"] == (3, 16)


def test_verify_finds_a_flipped_bit(tmp_path, capsys, threads):
    write_image_folder(tmp_path / "mine")
    build(tmp_path, "mine")
    assert call(tmp_path, "--verify", "--data_name", "mine") == 0
    (tmp_path / "papers").mkdir()
    assert call(tmp_path, "--verify") == 0  # looks at what has a cache
    said = refused(capsys, data_utils, *here(tmp_path), "--verify", "--resize", "squash")
    assert f"no {tmp_path}/NAME/cache_32_squash found; see --image_size and" in said
    flip_a_bit(tmp_path / "mine" / "cache_32" / "test_images.npy")
    assert call(tmp_path) == 0  # sizes alone do not show it
    said = refused(capsys, data_utils, *here(tmp_path), "--verify", "--data_name", "mine")
    assert "damaged: test_images; make it again with: python data_utils.py --data_name mine" in said


def test_demo_is_drawn_once_and_never_over_another(tmp_path, capsys, threads, monkeypatch):
    tiny = {"num_classes": 4, "images_per_class": 3, "image_side": 40}
    monkeypatch.setattr(data_utils, "draw_demo", lambda folder: draw_demo(folder, **tiny))
    data = tmp_path / "not yet"
    for holdout in ([], ["--holdout", "0.5"]):
        assert call(data, "--data_name", "demo", *holdout) == 0
        assert " --weights none --no_flip --lr 1e-3\n" in capsys.readouterr().out
    assert len(tree(data / "demo" / "train")) == 12 and read_cache(data, "demo", SPEC).counts["test"] == (4, 12)
    write_image_folder(tmp_path / "demo")
    mine = tree(tmp_path / "demo" / "train")
    assert call(tmp_path, "--data_name", "demo", "--force") == 0
    assert tree(tmp_path / "demo" / "train") == mine


WRITERS = {"car": builders.write_car_devkit, "cub": write_cub, "sop": write_sop, "isc": builders.write_isc}
WRITERS |= {"folder": write_image_folder, "listed": builders.write_csv}
CONTENTS = {  # -> what becomes of the bytes of a file; None: it is missing
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) * 2 // 3],
    "a web page": lambda content: b"<!DOCTYPE html>\n<html>Too many requests</html>\n",
    "an image": lambda content: builders.jpeg_bytes(),
    "a list": lambda content: b"1 1\n2 2\n",
    "zeros": lambda content: bytes(len(content)),
    "in UTF-16": lambda content: content.decode("latin-1").encode("utf-16"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_not_what_it_should_be(tmp_path, capsys, threads, name):
    """It is cached, or refused in one line that names it."""
    WRITERS[name](tmp_path / "good")
    files = [path.relative_to(tmp_path / "good") for path in sorted((tmp_path / "good").rglob("*")) if path.is_file()]
    images = [path for path in files if path.suffix.lower() in (".jpg", ".png")]
    lists = [path for path in files if path not in images]
    for path in [*lists, images[0], images[-1]]:
        for kind, change in CONTENTS.items():
            folder = tmp_path / "data" / name
            shutil.copytree(tmp_path / "good", folder)
            content = change((folder / path).read_bytes())
            (folder / path).unlink()
            if content is not None:
                (folder / path).write_bytes(content)
            code = data_utils.main(["--data_path", str(tmp_path / "data"), "--data_name", name, "--image_size", "16"])
            errors = capsys.readouterr().err
            refusals = [line for line in errors.splitlines() if line.startswith("data_utils.py: ")]
            assert code in (0, 2) and len(refusals) == (code == 2) and "Traceback" not in errors, (path, kind, errors)
            if path in images and kind not in ("missing", "an image"):
                assert code == 2 and f"{path}: unreadable (" in errors, (path, kind, errors)
            assert {item.name for item in tmp_path.iterdir()} == {"good", "data"}
            shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["mine", "cub"])
def test_a_share_of_the_training_classes_becomes_the_test_split(tmp_path, capsys, threads, name):
    """By whole classes; the true test split is left out; another seed divides otherwise; the pixels are the same.

    The classes are always those that were drawn in the first version, so that results can be compared.
    """
    if name == "cub":
        write_cub(tmp_path / "cub", classes=(*range(1, 11), 101, 200))
    else:
        write_image_folder(tmp_path / "mine", classes=10)
    whole = build(tmp_path, name)
    classes = whole.meta.train["classes"]
    held_out = []
    for options, folder in (([], "holdout"), (["--force"], "holdout"), (["--holdout_seed", "3"], "holdout3")):
        assert call(tmp_path, "--data_name", name, "--holdout", "0.3", *options) == 0
        assert f"train on it with: python train.py --data_name {name}_{folder} " in capsys.readouterr().out
        cache = read_cache(tmp_path, f"{name}_{folder}", SPEC)
        assert sorted(cache.meta.train["classes"] + cache.meta.test["classes"]) == sorted(classes)
        held_out.append([classes.index(name) for name in cache.meta.test["classes"]])
        paths = paths_of(cache, "train") + paths_of(cache, "test")
        assert sorted(paths) == sorted(f"{name}/{path}" for path in paths_of(whole, "train"))
        row = paths_of(whole, "train").index(paths[0].removeprefix(f"{name}/"))
        start, stop = whole.array("train_offsets")[row : row + 2]
        pixels = cache.array("train_pixels")[: cache.array("train_offsets")[1]]
        assert np.array_equal(pixels, whole.array("train_pixels")[start:stop])
    assert held_out == [[1, 6, 7], [1, 6, 7], [0, 6, 7]]


def test_a_holdout_is_a_data_set_as_any_other(tmp_path, capsys, threads):
    """At another size, with all data sets, when its images change."""
    write_image_folder(tmp_path / "mine", classes=5)
    assert call(tmp_path, "--data_name", "mine", "--holdout", "0.4") == 0
    assert (tmp_path / "mine_holdout/mine").readlink() == Path("../mine")  # the data folder may be moved
    assert data_utils.main([*here(tmp_path), "--image_size", "24"]) == 0
    assert read_cache(tmp_path, "mine_holdout", ImageSpec(24)).counts == {"train": (3, 6), "test": (2, 4)}
    assert call(tmp_path, "--verify", "--data_name", "mine_holdout") == 0
    save_image(tmp_path / "mine/train/train_0/0.png", 9, width=50)
    capsys.readouterr()
    assert call(tmp_path, "--data_name", "mine", "--holdout", "0.4") == 0
    said = capsys.readouterr().err
    assert said.startswith("warning: 0 files are new, 1 changed, 0 gone since ")
    assert said.endswith("was made: its --holdout command with --force\n")
    save_image(tmp_path / "mine/train/train_0/new.png", 9)
    assert call(tmp_path, "--data_name", "mine", "--holdout", "0.4", "--force") == 0
    assert capsys.readouterr().err == ""
    assert read_cache(tmp_path, "mine_holdout", SPEC).counts == {"train": (3, 6), "test": (2, 5)}
    assert call(tmp_path, "--data_name", "mine", "--holdout", "0.6") == 0
    with pytest.raises(InputError, match=r"cache_24/meta\.json is missing"):  # of the other share
        read_cache(tmp_path, "mine_holdout", ImageSpec(24))
    assert data_utils.main([*here(tmp_path), *"--data_name mine --image_size 24 --holdout 0.6".split()]) == 0
    assert read_cache(tmp_path, "mine_holdout", ImageSpec(24)).counts == {"train": (2, 4), "test": (3, 7)}


def test_what_a_holdout_refuses(tmp_path, capsys, threads):
    """Too few classes; a folder of something else; odd names."""
    write_image_folder(tmp_path / "mine", classes=5)
    hold_out = [*here(tmp_path), "--data_name", "mine", "--holdout"]
    assert data_utils.main([*hold_out, "0.4"]) == 0
    before = tree(tmp_path)
    for share, message in (
        ("0.9", "--holdout 0.9 of 5 training classes leaves 1 to train on and 4 to test on"),
        ("0.1", "and 0 to test on; it takes at least two of each"),
    ):
        assert message in refused(capsys, data_utils, *hold_out, share)
    assert tree(tmp_path) == before
    write_image_folder(tmp_path / "mine_holdout4")
    said = refused(capsys, data_utils, *hold_out, "0.4", "--holdout_seed", "4", "--force")
    assert "mine_holdout4 is there already, and was not made by --holdout: remove or rename it" in said
    (tmp_path / "mine/train/train_0").rename(tmp_path / "mine/train/ a")
    assert "a holdout cannot list ' a': rename it" in refused(capsys, data_utils, *hold_out, "0.4")

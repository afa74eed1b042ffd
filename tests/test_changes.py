"""The warning of raw files that changed since a cache was made."""

import os
import shutil

import pytest
from builders import build, rewrite, save_image, write_csv, write_image_folder

from dreml import changes

CHANGES = {  # -> what is changed, and how many files are new, changed, gone
    "none": (lambda root: None, None),
    "other programs": (lambda root: save_image(root / "train/@eaDir/0.png"), None),
    "new": (lambda root: save_image(root / "train/new/0.png"), (1, 0, 0)),
    "gone": (lambda root: (root / "test/test_0/0.png").unlink(), (0, 0, 1)),
    "renamed": (lambda root: (root / "train/train_0").rename(root / "train/x"), (2, 0, 2)),
    "another size": (lambda root: save_image(root / "train/train_0/0.png", 9, width=50), (0, 1, 0)),
    "another time": (lambda root: os.utime(root / "train/train_0/0.png", (0, 0)), (0, 1, 0)),
    "a bad one, mended": (lambda root: save_image(root / "train/train_1/bad.png"), (0, 1, 0)),
    "a copy": (lambda root: [os.utime(path, (9, 9)) for path in root.glob("t*/*/*.png") if path.exists()], None),
    "a list": (lambda root: write_csv(root), (7, 0, 0)),
    "a damaged record": (lambda root: (root / "cache_32/files.bin").write_text("x"), None),
    "no raw images": (lambda root: [shutil.rmtree(root / split) for split in ("train", "test")], None),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_changed_since_a_cache_was_made_is_counted(tmp_path, capsys, threads, kind):
    """With --force, nothing has changed any more. A link to nowhere from the start has not changed."""
    change, counts = CHANGES[kind]
    root = tmp_path / "mine"
    write_image_folder(root)
    (root / "train/train_1/bad.png").write_bytes(b"no image")
    (root / "train/train_1/link.png").symlink_to("nowhere")
    cache = build(tmp_path, "mine", skip_bad=True)
    change(root)
    capsys.readouterr()
    build(tmp_path, "mine")
    expected = ""
    if counts:
        new, changed, gone = counts
        expected = f"warning: {new} {'file is' if new == 1 else 'files are'} new, {changed} changed, {gone} gone since "
        command = f"python data_utils.py --data_name mine --data_path {tmp_path} --image_size 32 --force"
        expected += f"{cache.folder} was made: {command}\n"
    assert capsys.readouterr().err == expected
    if kind != "no raw images":
        build(tmp_path, "mine", skip_bad=True, force=True)
        capsys.readouterr()
        build(tmp_path, "mine")
        assert capsys.readouterr().err == ""


def test_a_class_that_changed_in_a_list_is_a_change_of_the_list(tmp_path, capsys, threads):
    write_csv(tmp_path / "csv")
    build(tmp_path, "csv")
    rewrite("images.csv", "zebra,", "ant,")(tmp_path / "csv")
    capsys.readouterr()
    build(tmp_path, "csv")
    assert capsys.readouterr().err.startswith("warning: 0 files are new, 1 changed, 0 gone since ")
    shutil.rmtree(tmp_path / "csv/photos")  # whoever has the cache may delete them
    build(tmp_path, "csv")
    assert capsys.readouterr().err == ""


def test_of_many_files_only_the_paths_are_compared(tmp_path, capsys, threads, monkeypatch):
    write_image_folder(tmp_path / "mine")
    build(tmp_path, "mine")
    save_image(tmp_path / "mine/train/train_0/0.png", 5, width=50)
    save_image(tmp_path / "mine/train/new/0.png")
    for largest, changed in ((1000, 1), (3, 0)):
        monkeypatch.setattr(changes, "MAX_COMPARED", largest)
        capsys.readouterr()
        build(tmp_path, "mine")
        assert capsys.readouterr().err.startswith(f"warning: 1 file is new, {changed} changed, 0 gone since ")

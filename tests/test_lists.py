"""Lists of images: images.csv, image folders, and what is wrong with them."""

import os
import shutil
import sys
import unicodedata

import numpy as np
import pytest
from builders import build, check_refused, put, rewrite, save_image, write_csv, write_cub, write_image_folder

from dreml.datasets import count_images
from dreml.folders import LeftOut, class_folders, subfolders
from dreml.lists import Listing, list_csv, list_image_folder


@pytest.mark.parametrize("key", [int, str])
def test_a_table_is_sorted_by_split_and_class_and_else_stays_as_it_came(tmp_path, key):
    """As a plain list of tuples would be."""
    generator = np.random.default_rng(0)
    listing = Listing(tmp_path)
    expected = []
    for number, class_id in enumerate(generator.integers(0, 12, 200).tolist()):
        split = "train" if generator.random() < 0.4 else "test"
        roles = (generator.random(2) < 0.5).tolist() if split == "test" else [True, True]
        expected.append((f"ü/{number}.png", key(class_id), split, *roles))
        listing.extend([expected[-1][0]], *expected[-1][1:])
    listing.make_table()
    expected.sort(key=lambda image: (image[2] != "train", image[1]))
    assert list(listing.images.itertuples(index=False, name=None)) == expected
    parts = {split: [image[1] for image in expected if image[2] == split] for split in ("train", "test")}
    parts["query"] = [image[1] for image in expected if image[2] == "test" and image[3]]
    parts["gallery"] = [image[1] for image in expected if image[2] == "test" and image[4]]
    assert count_images(listing.images) == {part: (len(set(labels)), len(labels)) for part, labels in parts.items()}


def test_csv_data_set(tmp_path, capsys):
    """As spreadsheets write it; train/ and test/ beside it, with other images, are not looked at."""
    write_image_folder(tmp_path / "listed")
    write_csv(tmp_path / "listed")
    lines = [
        "path , label,id,split,is_query,is_gallery",
        "photos/1.png,zebra,7,train,1,1",
        "photos/2.png,ant,7,train,1,1",
        'photos/3.png,fox,7,"test",1,0',
        '"photos/4.png","Grüße, ""cat""",7,test,0,1',
        "photos/5.png, fox ,7,test,0,1",
        'photos/6.png,"Grüße, ""cat""",,test,1,1',
        "",
    ]
    (tmp_path / "listed" / "images.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    cache = build(tmp_path, "listed")
    assert cache.meta.train["classes"] == ["ant", "zebra"]
    assert cache.meta.test["classes"] == ['Grüße, "cat"', "fox"]
    assert cache.paths("train") == ["photos/2.png", "photos/1.png"]
    assert cache.paths("test") == [f"photos/{number}.png" for number in (4, 6, 3, 5)]
    assert cache.array("test_labels").tolist() == [0, 0, 1, 1]
    assert cache.array("test_is_query").tolist() == [False, True, True, False]
    assert cache.array("test_is_gallery").tolist() == [True, True, False, True]
    output = capsys.readouterr()
    assert "listed: query lists 2 classes, 2 images\nlisted: gallery lists 2 classes, 3 images" in output.out
    assert output.err == ""


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_csv_line_ends_and_fields_over_two_lines(tmp_path, line_end):
    """The line of a problem is where its row ends; a row without any field is a blank line."""
    lines = ["path,label,split,note", 'a.png,x,train,"two', 'lines"', ",,,", "b.png,x,toast,", "c.png,y,test,1,2"]
    (tmp_path / "images.csv").write_bytes(line_end.join(lines).encode())
    listing = list_csv(tmp_path)
    assert listing.columns["path"] == ["a.png"]
    assert [problem.split(f"{tmp_path}/")[1] for problem in listing.problems] == [
        "images.csv, line 5: the split 'toast' is neither train nor test",
        "images.csv, line 6: more fields than the header has",
    ]


@pytest.mark.parametrize(
    ("lines", "is_query"),
    [
        (["label,path,split", "x,a.png,train", "y,b.png,test", "y,c.png,test"], [True, True, True]),
        (["label,path,split,is_query", "x,a.png,train,", "y,b.png,test,TRUE", "y,c.png,test,0"], [True, True, False]),
        (
            ["Path,label,SPLIT,is_query", "a.png,x,Train,", "b.png,y,validation,1.0", "c.png,y,validation,0.0"],
            [True, True, False],
        ),
    ],
)
def test_csv_as_people_and_other_libraries_write_it(tmp_path, lines, is_query):
    (tmp_path / "images.csv").write_text("\n".join(lines))
    listing = list_csv(tmp_path)
    assert not listing.problems
    assert listing.columns["split"] == ["train", "test", "test"]
    assert listing.columns["is_query"] == is_query and all(listing.columns["is_gallery"])


@pytest.mark.parametrize(
    ("listed", "on_disk"), [("NFC NFC", "NFD NFD"), ("NFD NFD", "NFC NFC"), ("NFC NFC", "NFC NFD")]
)
@pytest.mark.parametrize("kind", ["images.csv", "cub"])
def test_a_list_in_another_unicode_form_than_the_files_finds_them(tmp_path, kind, listed, on_disk):
    """As where a list was made on a Mac, or the files came from one."""
    paths = []
    for forms in (listed, on_disk):
        parts = [unicodedata.normalize(form, name) for form, name in zip(forms.split(), ("é", "ü.jpg"), strict=True)]
        paths.append("/".join(parts))
    if kind == "cub":
        write_cub(tmp_path / kind)
        rewrite("images.txt", "001.Bird_1/Bird_0001.jpg", paths[0])(tmp_path / kind)
        paths[1] = f"images/{paths[1]}"
    else:
        write_csv(tmp_path / kind)
        rewrite("images.csv", "photos/1.png", paths[0])(tmp_path / kind)
    save_image(tmp_path / kind / paths[1])
    assert paths[1] in build(tmp_path, kind).paths("train")


def test_image_folder(tmp_path, capsys, monkeypatch):
    """Classes at any depth, links to folders, files of other types, names of all kinds."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    root = tmp_path / "mine"
    for path in ("train/a/1.JPG", "train/a/2.png", "train/b/deep/er/3.Tiff", "test/c/4.webp", "test/c/.hidden.png"):
        save_image(root / path)
    for path in ("train/loose.png", "train/.cache/x/5.png"):
        save_image(root / path)
    for name in ("a/1.HEIC", "a/2.heic", "phone/4.mov", "phone/deep/5.mov", "a/Thumbs.db", "a/.hidden.txt", "README"):
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / name).write_text("no image")
    save_image(root / "val/e/1.png")
    (root / "test/ü c").symlink_to(root / "test/c", target_is_directory=True)  # a link is fine
    (root / "train/a/loop").symlink_to(root / "train", target_is_directory=True)  # and ends where it would go round
    cache = build(tmp_path, "mine")
    assert cache.meta.train["classes"] == ["a", "b/deep/er"] and cache.meta.test["classes"] == ["c", "ü c"]
    assert cache.paths("train") == ["train/a/1.JPG", "train/a/2.png", "train/b/deep/er/3.Tiff"]
    assert cache.paths("test") == ["test/c/4.webp", "test/ü c/4.webp"]
    error = capsys.readouterr().err
    said = "2 .heic (pip install pillow-heif), 2 .mov, 1 without a suffix, 1 outside any class folder"
    assert f"{root / 'train'}: left out: " in error
    assert all(part in error for part in said.split(", "))
    assert f"mine: warning: {root}: left alone: 'val'; only train/ and test/ are read\n" in error
    assert error.count("\n") == 2


@pytest.mark.skipif(os.name != "posix", reason="links and file names are others there")
def test_what_cannot_be_read_is_named_and_the_rest_is_listed(tmp_path, monkeypatch):
    """A folder without permission, a name that is not UTF-8; a link to itself is a bad image, see test_images.py."""
    write_image_folder(tmp_path)
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("train_1"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    train_0 = tmp_path / "train" / "train_0"
    (train_0 / "0.png").rename(train_0 / os.fsdecode(b"\xff.png"))
    (train_0 / "loop.png").symlink_to(train_0 / "loop.png")
    listing = list_image_folder(tmp_path)
    assert [path for path in listing.columns["path"] if "train" in path] == [
        "train/train_0/1.png",
        "train/train_0/loop.png",
    ]
    not_utf8, unreadable = listing.problems
    assert not_utf8.endswith("train_0/\\udcff.png': the name is not valid UTF-8: rename it")
    assert "train_1: unreadable folder (PermissionError" in unreadable


DAMAGES = {
    "csv column": (rewrite("images.csv", "label", "class"), "the first line has to name path, label and split: "),
    "csv separator": (put("images.csv", b"path|label|split\n"), "the first line has to name .*: .'path.label"),
    "csv split": (rewrite("images.csv", "zebra,train", "zebra,"), "line 2: the split '' is neither train nor"),
    "csv label": (rewrite("images.csv", "zebra", " "), "line 2: the label is empty"),
    "csv quote": (rewrite("images.csv", "zebra,", '"zebra,'), "images.csv: not valid CSV in UTF-8"),
    "csv bytes": (put("images.csv", b"path,label,split\n\n\xff"), "images.csv: not valid CSV in UTF-8"),
    "csv truth": (rewrite("images.csv", "test,1", "test,yes"), "line 4: is_query and is_gallery have to be 0 or 1"),
    "csv neither": (rewrite("images.csv", "test,1,0", "test,0,0"), "line 4: is_query and .*, and one of them 1"),
    "csv both": (rewrite("images.csv", "test", "val"), "both test and validation images: take the lines of one"),
    "csv gallery": (
        lambda root: [rewrite("images.csv", f"test,{old}", "test,1,0")(root) for old in ("0,1", "0,1", "1,1")],
        "the gallery split has no images",
    ),
    "no train folder": (lambda root: shutil.rmtree(root / "train"), "expected is train/ and test/, .*; found: .*test"),
    "empty split": (lambda root: [path.unlink() for path in root.glob("test/*/*")], "the test split has no images"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_input_is_named_and_an_earlier_cache_stays(tmp_path, damage):
    write = write_csv if damage.startswith("csv") else write_image_folder
    check_refused(tmp_path, "mine", write, *DAMAGES[damage])


def test_folders_of_programs_are_no_classes(tmp_path, capsys):
    """Thumbnails of a NAS, deleted photos, what macOS packs, results of this program: anywhere, and counted."""
    root = tmp_path / "mine"
    write_image_folder(root)
    of_train = ["train_0/@eaDir/0.png", "#recycle", "@Recycle", "$Recycle.Bin/S-1", "found"]
    for folder in (*(f"train/{name}" for name in of_train), "test/$RECYCLE.BIN/S-1", "test/__MACOSX/x", "@eaDir"):
        save_image(root / folder / "0.png")
    (root / "train/found/index.json").write_text("{}")
    save_image(root / "train/found/below/0.png")
    save_image(root / "train/train_0/worst_pooled.png")
    (root / "train/train_0/worst_pooled.csv").write_text("query,rank,path\n")
    (root / "train/train_1/neighbours_2024.csv").write_text("the user's own\n")
    cache = build(tmp_path, "mine")
    assert cache.meta.train["classes"] == ["train_0", "train_1"] and cache.meta.test["classes"] == ["test_0", "test_1"]
    error = capsys.readouterr().err
    for split, number in (("train", 6), ("test", 2)):
        assert f"{root / split}: left out: {number} of programs (folders such as @eaDir, results of this one)" in error
    assert list(class_folders(root / "test", [], LeftOut())) == [(f"test_{n}", ["0.png", "1.png"]) for n in (0, 1)]
    assert [folder.name for folder in subfolders(root)] == ["cache_32", "test", "train"]

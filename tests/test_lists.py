"""Lists of images: images.csv, image folders, and what is wrong with them."""

import os
import re
import shutil
import sys

import numpy as np
import pytest
from builders import build, check_refused, put, rewrite, save_image, write_csv, write_image_folder

from dreml.cli import InputError
from dreml.datasets import count_images
from dreml.lists import Entry, LeftOut, Listing, class_folders, list_csv, list_image_folder, subfolders


@pytest.mark.parametrize("key", [int, str])
def test_a_table_is_sorted_by_split_and_class_and_else_stays_as_it_came(key):
    """As a plain list of tuples would be."""
    generator = np.random.default_rng(0)
    listing = Listing()
    expected = []
    for number, class_id in enumerate(generator.integers(0, 12, 200).tolist()):
        split = "train" if generator.random() < 0.4 else "test"
        roles = generator.random(2) < 0.5 if split == "test" else (True, True)
        path = f"ü/{'x' * class_id}/{number}.png"
        expected.append(Entry(path, key(class_id), f"ü{class_id}", split, *map(bool, roles)))
        listing.append(expected[-1])
    table = listing.table()
    expected.sort(key=lambda entry: (entry.split != "train", entry.label))
    assert list(table.itertuples(index=False, name=None)) == expected
    parts = {split: [entry.label for entry in expected if entry.split == split] for split in ("train", "test")}
    parts["query"] = [entry.label for entry in expected if entry.split == "test" and entry.is_query]
    parts["gallery"] = [entry.label for entry in expected if entry.split == "test" and entry.is_gallery]
    assert count_images(table) == {part: (len(set(labels)), len(labels)) for part, labels in parts.items()}
    assert len(Listing().table()) == 0 and count_images(Listing().table()) == {"train": (0, 0), "test": (0, 0)}


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
    assert output.err.startswith("listed: warning: train: classes of one image: 'ant', 'zebra'; ")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_csv_line_ends_and_fields_over_two_lines(tmp_path, line_end):
    """The line of a problem is where its row starts; a row without any field is a blank line."""
    lines = ["", "path,label,split,note", 'a.png,x,train,"two', 'lines"', ",,,", "b.png,x,toast,", "c.png,y,test"]
    (tmp_path / "images.csv").write_bytes(line_end.join(lines).encode())
    listing = list_csv(tmp_path, "")
    assert listing.columns["path"] == ["a.png"]
    assert [problem.split(f"{tmp_path}/")[1] for problem in listing.problems] == [
        "images.csv, line 6: the split 'toast' is neither train nor test (or validation)",
        "images.csv, line 7: malformed line: 3 fields, the header has 4",
    ]


def test_csv_roles_default_to_both_and_take_words(tmp_path):
    (tmp_path / "images.csv").write_text("label,path,split\nx,a.png,train\ny,b.png,test")
    images = list_csv(tmp_path, "").table()
    assert images["is_query"].all() and images["is_gallery"].all()
    lines = ["label,path,split,is_query", "x,a.png,train,", "y,b.png,test,TRUE", "y,c.png,test,False", "y,d.png,test,0"]
    (tmp_path / "images.csv").write_text("\n".join(lines))
    listing = list_csv(tmp_path, "")
    assert not listing.problems
    assert listing.columns["is_query"] == [True, True, False, False] and all(listing.columns["is_gallery"])


def test_csv_as_pandas_and_other_libraries_write_it(tmp_path):
    lines = ["Path,label,SPLIT,is_query", "a.png,1,Train,", "b.png,2,validation,1.0", "c.png,2,validation,0.0"]
    (tmp_path / "images.csv").write_text("\n".join(lines))
    listing = list_csv(tmp_path, "")
    assert not listing.problems
    assert listing.columns["split"] == ["train", "test", "test"]
    assert listing.columns["is_query"] == [True, True, False]
    (tmp_path / "images.csv").write_text("\n".join([*lines, "d.png,3,test,1", "e.png,3,test,1"]))
    (problem,) = list_csv(tmp_path, "").problems
    assert "line 5: both test and validation images: take the lines of one of them out" in problem


def test_image_folder(tmp_path, capsys):
    root = tmp_path / "mine"
    for path in ("train/a/1.JPG", "train/a/2.png", "train/b/deep/er/3.Tiff", "test/c/4.webp", "test/c/.hidden.png"):
        save_image(root / path)
    for path in ("train/loose.png", "train/.cache/x/5.png"):
        save_image(root / path)
    (root / "train/a/notes.txt").write_text("no image")
    (root / "test/empty").mkdir()
    (root / "test/ü c").symlink_to(root / "test/c", target_is_directory=True)  # a link is fine
    (root / "train/a/loop").symlink_to(root / "train", target_is_directory=True)  # and ends where it would go round
    cache = build(tmp_path, "mine")
    meta = cache.meta
    assert meta.train["classes"] == ["a", "b/deep/er"] and meta.test["classes"] == ["c", "ü c"]
    assert cache.paths("train") == ["train/a/1.JPG", "train/a/2.png", "train/b/deep/er/3.Tiff"]
    assert cache.paths("test") == ["test/c/4.webp", "test/ü c/4.webp"]
    assert "1 images outside any class folder are left out" in capsys.readouterr().err


def test_files_of_other_types_are_counted(tmp_path, capsys, monkeypatch):
    """By suffix, in each split, without hidden files; a folder that has nothing else is named."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    root = tmp_path / "mine"
    write_image_folder(root)
    for name in ("train_0/1.HEIC", "train_0/2.heic", "phone/3.heic", "phone/4.mov", "phone/deep/5.mov", "a/note.txt"):
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / name).write_bytes(b"x")
    for number in range(2):
        save_image(root / "train" / "a" / "b" / f"{number}.png")  # so a has images below it
    for name in (".hidden.mov", "Thumbs.db"):
        (root / "test" / "test_0" / name).write_bytes(b"x")
    build(tmp_path, "mine")
    said = "3 .heic (pip install pillow-heif), 2 .mov, 1 .txt; folders without an image: "
    line = f"mine: warning: {root / 'train'}: left out: {said}'phone/deep', 'phone'\n"
    assert capsys.readouterr().err == line


def test_types_beyond_the_eighth_are_counted_together():
    left_out = LeftOut()
    assert not left_out
    for number in range(12):
        for _ in range(20 - number):
            left_out.add(f"file.type{number}")
    for name in ("no_suffix", "a.b c", "x." + "y" * 30):
        left_out.add(name)
    left_out.empty_folders = [f"c{number}" for number in range(1200)]
    text = str(left_out)
    assert text.startswith("left out: 20 .type0, 19 .type1, ") and "13 .type7 and 45 of other types; folders" in text
    assert text.endswith("'c8', 'c9' and 1,190 more") and "\n" not in text


def test_a_folder_that_cannot_be_read_is_listed(tmp_path, monkeypatch):
    write_image_folder(tmp_path / "mine")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("train_1"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError) as refusal:
        build(tmp_path, "mine")
    assert re.search(r"mine: 1 problems.*\n.*train_1: unreadable folder", str(refusal.value))


DAMAGES = {
    "csv empty": (put("images.csv", b" \n"), "images.csv: empty; its first line has to be path,label,split"),
    "csv column": (rewrite("images.csv", "label", "class"), "line 1: no column 'label' in the header"),
    "csv columns": (
        rewrite("images.csv", "is_query,is_gallery", "split,split"),
        "line 1: two columns 'split' in the header 'path,label,split,split,split'",
    ),
    "csv separator": (put("images.csv", b"path|label|split\n"), "no column 'path', .* in the header 'path.label"),
    "csv split": (rewrite("images.csv", "zebra,train", "zebra,"), "line 2: the split '' is neither train nor"),
    "csv label": (rewrite("images.csv", "zebra", " "), "line 2: the label is empty"),
    "csv quote": (rewrite("images.csv", "zebra,", '"zebra,'), "line 2: not valid CSV, read no further"),
    "csv bytes": (put("images.csv", b"path,label,split\n\n\xff"), "images.csv, line 3: not valid UTF-8: save"),
    "csv NUL": (rewrite("images.csv", "photos/3", "photos\0/3"), "line 4: unusable characters in "),
    "csv truth": (rewrite("images.csv", "test,1", "test,yes"), "line 4: is_query and is_gallery have to be 0, 1,"),
    "csv neither": (rewrite("images.csv", "test,1,0", "test,0,0"), "line 4: a test image has to be a query, in"),
    "csv gallery": (
        lambda root: [rewrite("images.csv", f"test,{old}", "test,1,0")(root) for old in ("0,1", "0,1", "1,1")],
        "the gallery split has no images",
    ),
    "no train folder": (lambda root: shutil.rmtree(root / "train"), "train: missing folder"),
    "empty split": (lambda root: [path.unlink() for path in root.glob("test/*/*")], "the test split has no images"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_input_is_named_and_an_earlier_cache_stays(tmp_path, damage):
    write = write_csv if damage.startswith("csv") else write_image_folder
    check_refused(tmp_path, "mine", write, *DAMAGES[damage])


@pytest.mark.skipif(os.name != "posix", reason="file names are not bytes there")
def test_a_file_name_that_is_not_utf8_is_a_problem(tmp_path):
    write_image_folder(tmp_path)
    name = os.fsdecode(b"\xff.png")
    (tmp_path / "train" / "train_0" / "0.png").rename(tmp_path / "train" / "train_0" / name)
    listing = list_image_folder(tmp_path, "")
    assert listing.problems == ["'train/train_0/\\udcff.png': the name is not valid UTF-8"]
    assert len(listing.table()) == 7


def test_folders_of_other_programs_are_no_classes(tmp_path, capsys):
    """Thumbnails of a NAS, deleted photos of Samba and Windows, what macOS packs: anywhere, and counted."""
    root = tmp_path / "mine"
    write_image_folder(root)
    for folder in (
        "train/train_0/@eaDir/0.png",
        "train/#recycle",
        "test/$RECYCLE.BIN/S-1",
        "test/__MACOSX/x",
        "@eaDir",
    ):
        save_image(root / folder / "0.png")
    cache = build(tmp_path, "mine")
    assert cache.meta.train["classes"] == ["train_0", "train_1"] and cache.meta.test["classes"] == ["test_0", "test_1"]
    error = capsys.readouterr().err
    for split in ("train", "test"):
        assert f"{root / split}: left out: 2 folders of other programs, such as @eaDir\n" in error
    assert list(class_folders(root / "test", [])) == [(f"test_{n}", ["0.png", "1.png"]) for n in (0, 1)]
    assert [folder.name for folder in subfolders(root)] == ["cache_32", "test", "train"]

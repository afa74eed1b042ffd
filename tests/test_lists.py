"""Lists of images: images.csv, image folders, and what is wrong with them."""

import os
import shutil
import sys
import unicodedata

import pytest
from builders import build, check_refused, paths_of, put, rewrite, save_image, write_csv, write_image_folder

from dreml import lists
from dreml.cli import InputError
from dreml.lists import LeftOut, class_folders, list_csv, list_image_folder, subfolders


def test_csv_data_set(tmp_path, capsys, threads):
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
    assert paths_of(cache, "train") == ["photos/2.png", "photos/1.png"]
    assert paths_of(cache, "test") == [f"photos/{number}.png" for number in (4, 6, 3, 5)]
    assert cache.array("test_labels").tolist() == [0, 0, 1, 1]
    assert cache.array("test_is_query").tolist() == [False, True, True, False]
    assert cache.array("test_is_gallery").tolist() == [True, True, False, True]
    output = capsys.readouterr()
    assert "listed: query lists 2 classes, 2 images\nlisted: gallery lists 2 classes, 3 images" in output.out
    assert output.err == ""


@pytest.mark.parametrize("change", [(",", ";"), (",", "\t"), ("/", "\\"), ("validation", "Val"), ("1.0", "TRUE")])
def test_csv_as_people_and_other_libraries_write_it(tmp_path, change):
    """With "validation" for the test split, as pandas writes numbers; with semicolons or tabs; with Windows' paths."""
    lines = ["label,Path,SPLIT,is_query", "x,a/1.png,Train,", "y,a/2.png,validation,1.0", "y,a/3.png,validation,0.0"]
    (tmp_path / "images.csv").write_text("\n".join(lines).replace(*change))
    listing = list_csv(tmp_path)
    assert not listing.problems
    assert list(listing.columns.values()) == [
        ["a/1.png", "a/2.png", "a/3.png"],
        ["x", "y", "y"],
        ["train", "test", "test"],
        [True, True, False],
        [True, True, True],
    ]


def test_csv_line_ends_and_fields_over_two_lines(tmp_path):
    """The line of a problem is where its row ends; a row without any field is a blank line."""
    lines = ["path,label,split,note", 'a.png,x,train,"two', 'lines"', ",,,", "b.png,x,toast,", "c.png,y,test,1,2"]
    (tmp_path / "images.csv").write_bytes("\r\n".join(lines).encode())
    listing = list_csv(tmp_path)
    assert listing.columns["path"] == ["a.png"]
    assert listing.problems == [
        f"{tmp_path}/images.csv, line 5: the split 'toast' is neither train nor test",
        f"{tmp_path}/images.csv, line 6: more fields than the header has",
    ]


def test_a_path_that_cannot_be_used_is_named_with_the_remedy(tmp_path):
    paths = ["", "/home/me/1.png", r"C:\me\1.png", "../1.png", r"a\..\1.png"]
    (tmp_path / "images.csv").write_text("\n".join(["path,label,split", *(f"{path},a,train" for path in paths)]))
    listing = list_csv(tmp_path)
    assert not listing.columns["path"] and len(listing.problems) == len(paths)
    remedy = "unusable path '/home/me/1.png': name an image by its path in the data set's folder (a link to it is fine)"
    assert listing.problems[1] == f"{tmp_path}/images.csv, line 3: {remedy}"


@pytest.mark.parametrize(
    ("listed", "on_disk"), [("NFC NFC", "NFD NFD"), ("NFD NFD", "NFC NFC"), ("NFC NFC", "NFC NFD")]
)
def test_a_list_in_another_unicode_form_than_the_files_finds_them(tmp_path, listed, on_disk):
    """As where a list was made on a Mac, or the files came from one."""
    paths = []
    for forms in (listed, on_disk):
        parts = [unicodedata.normalize(form, name) for form, name in zip(forms.split(), ("é", "ü.jpg"), strict=True)]
        paths.append("/".join(parts))
    (tmp_path / "images.csv").write_text(f"path,label,split\n{paths[0]},a,train\n", encoding="utf-8")
    save_image(tmp_path / paths[1])
    assert list_csv(tmp_path).columns["path"] == [paths[1]]


def test_image_folder(tmp_path, capsys, monkeypatch, threads):
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
    assert paths_of(cache, "train") == ["train/a/1.JPG", "train/a/2.png", "train/b/deep/er/3.Tiff"]
    assert paths_of(cache, "test") == ["test/c/4.webp", "test/ü c/4.webp"]
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
    paths = [path for path in listing.columns["path"] if "train" in path]
    assert paths == ["train/train_0/1.png", "train/train_0/loop.png"]
    not_utf8, unreadable = listing.problems
    assert not_utf8.endswith("train_0/\\udcff.png': the name is not valid UTF-8: rename it")
    assert "train_1: unreadable folder (PermissionError" in unreadable


DAMAGES = {
    "csv column": (rewrite("images.csv", "label", "class"), "has to name path, label and split, once: "),
    "csv twice": (rewrite("images.csv", "is_query", "Label"), "the first line has to name path, label and split, once"),
    "csv split": (rewrite("images.csv", "zebra,train", "zebra,"), "line 2: the split '' is neither train nor"),
    "csv label": (rewrite("images.csv", "zebra", " "), "line 2: the label is empty"),
    "csv quote": (rewrite("images.csv", "zebra,", '"zebra,'), "images.csv: not valid CSV in UTF-8"),
    "csv bytes": (put("images.csv", b"path,label,split\n\n\xff"), "images.csv: not valid CSV in UTF-8"),
    "csv truth": (rewrite("images.csv", "test,1", "test,yes"), "line 4: is_query and is_gallery have to be 0 or 1"),
    "csv both": (rewrite("images.csv", "test", "val"), "both test and validation images: take the lines of one"),
    "csv gallery": (
        lambda root: [rewrite("images.csv", f"test,{old}", "test,1,0")(root) for old in ("0,1", "0,1", "1,1")],
        "the gallery split has no images",
    ),
    "no train folder": (lambda root: shutil.rmtree(root / "train"), "expected is train/ and test/ .*; found: .*test"),
    "empty split": (lambda root: [path.unlink() for path in root.glob("test/*/*")], "the test split has no images"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_input_is_named_and_an_earlier_cache_stays(tmp_path, threads, damage):
    write = write_csv if damage.startswith("csv") else write_image_folder
    check_refused(tmp_path, "mine", write, *DAMAGES[damage])


def test_folders_of_programs_are_no_classes(tmp_path, capsys, threads):
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


@pytest.mark.parametrize("name", ["val", "Test", "validation"])
def test_a_test_split_of_another_name_is_not_left_out(tmp_path, name):
    save_image(tmp_path / "mine/train/a/1.png")
    save_image(tmp_path / "mine" / name / "b/1.png")
    with pytest.raises(InputError, match=f"found {name}/: rename it to test/$"):
        build(tmp_path, "mine")


# ------------------------------------------------------------------------------------------------ changes

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
        monkeypatch.setattr(lists, "MAX_COMPARED", largest)
        capsys.readouterr()
        build(tmp_path, "mine")
        assert capsys.readouterr().err.startswith(f"warning: 1 file is new, {changed} changed, 0 gone since ")

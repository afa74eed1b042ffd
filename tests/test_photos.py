"""photos.py: the photos of a folder, and reading them ahead. What an index makes of them: test_index.py."""

import os

import numpy as np
import torch
from builders import save_colors
from PIL import Image

from dreml import photos as photos_module
from dreml.files import file_id, sha256
from dreml.images import ImageSpec
from dreml.photos import IndexedPhotos, list_photos, read_photos, walk_order
from dreml.search import Item, folder_items


def test_the_order_is_that_of_the_walk(tmp_path):
    names = ["b/x.png", "b.png", "a/z.png", "a/b/c.png", "a b/1.png", "a!/1.png", "a/b.png", "z.png", "a/b/a.png"]
    save_colors(tmp_path, names)
    walk = [item.file.relative_to(tmp_path).as_posix() for item in folder_items("", tmp_path)]
    assert sorted(names, key=walk_order) == walk and walk[:3] == ["b.png", "z.png", "a/b.png"]


def test_photos_are_read_in_order_and_those_known_are_not_decoded(tmp_path):
    """Whatever is read ahead."""
    save_colors(tmp_path, [f"{number}.png" for number in range(30)])
    (tmp_path / "17.png").write_text("no image")
    photos = list_photos(tmp_path, [])
    assert [photo.path for photo in photos] == sorted(f"{number}.png" for number in range(30))
    known = {sha256(tmp_path / "3.png"), sha256(tmp_path / "17.png")}
    for ahead in (1, 4, 100):
        found = list(read_photos(tmp_path, photos, ImageSpec(8), known, ahead))
        assert [each.photo for each in found] == photos and not any(each.problem for each in found)
        assert [each.hash for each in found] == [sha256(tmp_path / photo.path) for photo in photos]
        assert {each.photo.path for each in found if each.pixels is None} == {"3.png", "17.png"}
        for each in found:
            if each.pixels is not None:
                assert (each.pixels == np.asarray(Image.open(tmp_path / each.photo.path))).all()


def test_a_query_finds_its_own_photo_by_its_name_first(tmp_path, monkeypatch):
    """Of many photos of one size and time; by another name it is found too, and a photo from elsewhere is not."""
    for number in range(30):
        path = tmp_path / "photos" / str(number % 3) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, ns=(5, 5))
    listed = list_photos(tmp_path / "photos", [])
    paths, sizes, mtimes = zip(*listed, strict=True)
    indexed = IndexedPhotos(tmp_path / "photos", list(paths), np.array(sizes), np.array(mtimes), torch.empty(30, 1))
    (tmp_path / "link.png").symlink_to(tmp_path / "photos" / "2" / "29.png")
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "4.png").write_bytes(b"x")
    os.utime(tmp_path / "1" / "4.png", ns=(5, 5))
    asked = []
    monkeypatch.setattr(photos_module, "file_id", lambda path: asked.append(path) or file_id(path))
    for name, expected, num_asked in (
        ("photos/1/../2/26.png", "2/26.png", 1),
        ("link.png", "2/29.png", 1),
        ("1/4.png", None, 30),
        ("gone.png", None, 0),
    ):
        asked.clear()
        place = indexed.place_of(Item("", "", None, tmp_path / name))
        assert (paths[place] if place >= 0 else None) == expected and len(asked) == num_asked

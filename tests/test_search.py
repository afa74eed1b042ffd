"""search.py: nearest neighbours and the embedding of image files."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from builders import copy_run, embed_files, save_image
from reference import mean_cosines

from dreml import search
from dreml.cli import InputError
from dreml.files import file_id, read_record, write_record
from dreml.runs import MemberRecord, member_path, read_run_record
from dreml.search import Item, SplitItems, embed_images, find_neighbours, folder_items, nearest, own_rows, query_items
from model import load_ensemble


@pytest.mark.parametrize("max_block", [1, 30, 2**22])
def test_ties_go_to_the_first(max_block):
    """Equal rows in scrambled places, in any blocks: by similarity, then by number; a query itself is left out."""
    generator = np.random.default_rng(0)
    rows = torch.nn.functional.normalize(torch.from_numpy(generator.normal(size=(4, 5))).float(), dim=1)
    gallery = rows[torch.from_numpy(generator.integers(0, 4, 40))]
    queries = torch.cat([rows, gallery[:6]])
    left_out = [-1] * 4 + list(range(6))
    similarities, numbers = nearest(queries, gallery, 12, left_out, max_block=max_block)
    expected = (queries.double() @ gallery.double().T).numpy().round(5)
    for query, itself in enumerate(left_out):
        order = [number for number in np.lexsort((np.arange(40), -expected[query])) if number != itself][:12]
        assert numbers[query].tolist() == order
        np.testing.assert_allclose(similarities[query], expected[query, order], atol=2e-5)


def test_rounding_breaks_no_tie():
    """Two similarities 6e-8 apart, as other orders of summation give them, are equal."""
    gallery = torch.tensor([[1.0], [1 + 2**-23], [1.001]])
    assert (0.5 * gallery).unique().numel() == 3
    assert nearest(torch.tensor([[0.5]]), gallery, 3, [-1])[1].tolist() == [[2, 0, 1]]


def test_after_a_bad_photo_no_more_is_embedded(tiny_run, tmp_path):
    """All bad ones are named, and none of the time of a large gallery is lost."""
    for name in "bcd":
        save_image(tmp_path / f"{name}.png")
    for name in "ae":
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    ensemble, embedded = load_ensemble(tiny_run), []
    ensemble.register_forward_hook(lambda *_: embedded.append(1))
    with pytest.raises(InputError, match=r"^--query: 2 problems:\n.*a\.png: .*\n.*e\.png: ") as refusal:
        embed_images("--query", folder_items("--query", tmp_path), ensemble, batch_size=1)
    assert "b.png" not in str(refusal.value) and not embedded


def test_photos_are_embedded_in_the_runs_own_way(tiny_run, tmp_path):
    """--resize squash: all of a wide image. Batches leave no trace."""
    run = copy_run(tiny_run, tmp_path / "run")
    record = read_run_record(run)
    record.settings = dataclasses.replace(record.settings, resize="squash")
    write_record(run / "args.json", record)
    path = member_path(run, 1, "json")
    write_record(path, dataclasses.replace(read_record(path, MemberRecord), settings_hash=record.settings_hash))
    files = [tmp_path / "photos" / f"{number}.png" for number in range(5)]
    for number, file in enumerate(files):
        save_image(file, number, width=150)
    items = folder_items("--gallery", tmp_path / "photos")
    ensemble = load_ensemble(run, num_members=1)
    rows = embed_images("--gallery", items, ensemble, batch_size=5).numpy()
    np.testing.assert_allclose(rows @ rows.T, mean_cosines(embed_files(ensemble, files)), atol=1e-5)
    np.testing.assert_allclose(embed_images("--gallery", items, ensemble, batch_size=2), rows, atol=1e-5)
    cropped = embed_images("--gallery", items, load_ensemble(tiny_run, num_members=1), batch_size=5)
    assert abs(cropped.numpy() - rows).max() > 0.01


@pytest.mark.parametrize("place", [0, 1])
def test_a_photo_that_lies_in_the_gallery_has_its_class_and_does_not_find_itself(tmp_path, place):
    """Also if it is the first one of the gallery."""
    gallery = [Item(name, name, name, tmp_path / name) for name in "abc"]
    query = gallery[place]._replace(class_name=None)
    (found,) = find_neighbours([query], torch.eye(3)[[place]], gallery, torch.eye(3), 2)
    assert found.query.class_name == gallery[place].class_name
    assert [item.name for item in found.neighbours] == [item.name for item in gallery if item is not gallery[place]]


def test_a_photo_is_known_as_a_test_image_by_its_name_and_then_by_its_file(tmp_path, monkeypatch):
    """By any path, through links, but not by its name alone. The disk is not asked for images of other names."""
    paths = [f"{name}/{number}.png" for name in "ab" for number in range(100)]
    test = pd.DataFrame({"path": paths, "class_name": "x"})
    for path in paths:
        (tmp_path / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / path).write_bytes(b"")
    (tmp_path / "data" / "b" / "6.png").unlink()
    (tmp_path / "7.png").write_bytes(b"")  # a photo from elsewhere
    (tmp_path / "link.png").symlink_to(tmp_path / "data" / "b" / "8.png")
    (tmp_path / "link_to_a").symlink_to(tmp_path / "data" / "a")
    names = ["7.png", "link.png", "link_to_a/9.png", "data/a/../b/10.png", "data/a/5.png", "data/a/6.png", "gone.png"]
    asked = []
    monkeypatch.setattr(search, "file_id", lambda path: asked.append(path) or file_id(path))
    rows = own_rows([tmp_path / name for name in names], test, tmp_path / "data")
    assert rows == [None, 108, 9, 110, 5, 6, None]
    assert len(asked) == 6 * 2 + len(names)
    (tmp_path / "gone.png").write_bytes(b"")
    queries, problems = query_items(
        [str(tmp_path / names[2]), "test:3", str(tmp_path / "gone.png")], test, tmp_path / "data"
    )
    assert [query.row for query in queries] == [9, 3, None] and not problems


def test_images_of_the_test_split_are_made_when_they_are_asked_for(tmp_path):
    test = pd.DataFrame({"path": [f"{row}.png" for row in range(9)], "class_name": list("aabbccdde")})
    gallery = SplitItems(test, tmp_path, np.array([1, 2, 5, 8]))
    assert [item.row for item in gallery] == [1, 2, 5, 8] and gallery[-1].class_name == "e"
    assert gallery[2] == Item("5.png", "5.png", "c", tmp_path / "5.png", 5)
    places = [gallery.place_of(gallery[2]._replace(row=row)) for row in (None, 0, 1, 2, 3, 5, 7, 8)]
    assert places == [-1, -1, 0, 1, -1, 2, -1, 3]
    assert SplitItems(test, tmp_path, np.array([1, 2])).place_of(gallery[3]) == -1

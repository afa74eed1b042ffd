"""search.py: the searcher, its queries and galleries, nearest neighbours, thresholds."""

import argparse
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from builders import (
    copy_run,
    edit_record,
    embed_files,
    queries_of,
    random_embeddings,
    random_image,
    save_image,
    write_colored_run,
    write_run,
)
from PIL import Image
from reference import mean_cosines

from dreml import search
from dreml.cli import InputError
from dreml.runs import read_run_record
from dreml.search import Searcher, nearest, threshold_at
from model import load_ensemble


@pytest.fixture
def photos(tmp_path):
    pytest.importorskip("lancedb", reason="LanceDB is an extra: pip install lancedb")
    return tmp_path / "photos"


def searcher_of(run, gallery, **options) -> Searcher:
    """A searcher of a gallery that leaves the run folder alone."""
    return Searcher(run, gallery, index=gallery.parent / "index", device="cpu", **options)


def found(answer) -> list[tuple]:
    return [(each.path, each.class_name, round(each.similarity, 4), each.right, each.found) for each in answer]


def test_ties_go_to_the_first():
    """Equal rows in scrambled places: by similarity, then by number; at most all of them."""
    generator = np.random.default_rng(0)
    queries = torch.nn.functional.normalize(torch.from_numpy(generator.normal(size=(4, 5))).float(), dim=1)
    gallery = queries[torch.from_numpy(generator.integers(0, 4, 40))]
    for query, expected in zip(queries, (queries.double() @ gallery.double().T).numpy().round(5), strict=True):
        similarities, numbers = nearest(query, gallery, 12)
        assert numbers == np.lexsort((np.arange(40), -expected))[:12].tolist()
        np.testing.assert_allclose(similarities, expected[numbers], atol=2e-5)
        assert sorted(nearest(query, gallery, 100)[1]) == list(range(40))


def test_rounding_breaks_no_tie():
    """Two similarities 6e-8 apart, as other orders of summation give them, are equal."""
    gallery = torch.tensor([[1.0], [1 + 2**-23], [1.001]])
    assert (0.5 * gallery).unique().numel() == 3
    assert nearest(torch.tensor([0.5]), gallery, 3)[1] == [2, 0, 1]


def test_a_photo_by_its_path_as_an_image_or_as_an_array(small_run, tmp_path):
    """The same neighbours; a turned, transparent image is seen as its file is, and stays as it is."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = random_image(3)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(tmp_path / "photo.png", exif=exif)
    searcher = Searcher(small_run, device="cpu")
    opened = Image.open(tmp_path / "photo.png")
    expected = searcher.find(tmp_path / "photo.png", top=5)
    assert found(searcher.find(opened, top=5)) == found(expected) and opened.size == image.size
    save_image(tmp_path / "plain.png", 4)
    array = np.asarray(Image.open(tmp_path / "plain.png"))
    answers = searcher.find_many([str(tmp_path / "plain.png"), array, 7, "test:7", np.int64(7)], top=3)
    assert found(answers[0]) == found(answers[1]) != found(answers[2])
    assert found(answers[2]) == found(answers[3]) == found(answers[4])
    test = pd.read_csv(small_run / "test.csv")
    assert answers[2].query.row == 7 and answers[2].query.class_name == test.class_name[7]
    assert {each.path for each in answers[2]} <= set(test.path) - {test.path[7]}
    assert answers[0].query.class_name is None and all(each.right is None for each in answers[0])


def test_what_is_no_query(small_run, tmp_path):
    """One sentence each; with a list for the problems, the others are answered."""
    searcher = Searcher(small_run, device="cpu")
    (tmp_path / "bad.png").write_text("no image")
    last = "the test split has 36 images, the first is test:0"
    cases = [("nowhere.png", "nowhere.png: missing image"), (tmp_path / "bad.png", "bad.png: unreadable"), (36, last)]
    cases += [(-1, last), ("test:" + "9" * 5000, last), ("a\udcff.png", "is not valid"), ("a\0.png", "is not valid")]
    cases += [(np.zeros((8, 8), np.uint8), r"an array has to be \(H, W, 3\) uint8, not \(8, 8\) uint8")]
    cases += [(np.zeros((8, 8, 3), np.float32), r"not \(8, 8, 3\) float32")]
    cases += [(Image.new("F", (8, 8)), "floating-point grey"), (Image.new("RGB", (1, 60_000)), "after the resize is")]
    problems = []
    answers = searcher.find_many([*(query for query, _ in cases), 3], problems=problems)
    assert [answer.query.name for answer in answers] == ["test:3"] and len(problems) == len(cases)
    for query, message in cases:
        with pytest.raises(InputError, match=f"^query: .*{message}"):
            searcher.find(query)


def test_several_threads_get_their_own_answers(small_run):
    """From a searcher that has embedded nothing yet."""
    expected = [found(answer) for answer in Searcher(small_run, device="cpu").find_many(range(16), top=4)]
    searcher = Searcher(small_run, device="cpu")
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda row: found(searcher.find(row, top=4)), range(16)))
    assert answers == expected


def test_a_gallery_gives_what_there_is(tiny_run, tmp_path):
    """A query in the gallery does not find itself; where it is not, there is one image more."""
    is_gallery = np.arange(12) >= 4
    run = write_colored_run(tmp_path, tiny_run, random_embeddings(2), is_query=~is_gallery, is_gallery=is_gallery)
    searcher = Searcher(run, device="cpu")
    for row, expected in ((5, 7), (0, 8)):
        answer = searcher.find(row, top=100)
        assert len(answer.neighbours) == expected and row not in {each.row for each in answer}
        assert [each.row for each in searcher.find(row, top=3)] == [each.row for each in answer][:3]


def test_photos_are_embedded_in_the_runs_own_way(tiny_run, photos, tmp_path, capsys):
    """--resize squash: all of a wide image. A bad photo is named and left out."""
    run = copy_run(tiny_run, tmp_path / "run")
    edit_record(run / "args.json", "settings", "resize", value="squash")
    edit_record(run / "member_001.json", "settings_hash", value=read_run_record(run).settings_hash)
    files = [photos / f"{number}.png" for number in range(5)]
    for number, file in enumerate(files):
        save_image(file, number, width=150)
    (photos / "bad.png").write_text("no image")
    gallery = searcher_of(run, photos, num_members=1).searched
    assert gallery.images == [file.name for file in files]
    assert "files that cannot be used (1):\n" in capsys.readouterr().err
    rows = gallery.vectors.numpy()
    expected = mean_cosines(embed_files(load_ensemble(run, num_members=1), files))
    np.testing.assert_allclose(rows @ rows.T, expected, atol=1e-5)


def test_which_neighbours_are_right(small_run, tiny_data, photos):
    """Classes are named by their folders' paths. A folder that is no class of the run says nothing of a test image."""
    test = pd.read_csv(small_run / "test.csv")
    name = test.class_name[0]
    folders = {"0.png": name, "1.png": f"{name}/more", "2.png": "other/a", "3.png": "other/b", "4.png": None}
    for number, (file, folder) in enumerate(folders.items()):
        save_image(photos / (folder or ".") / file, number)
    searcher = searcher_of(small_run, photos, data_path=tiny_data)
    assert {each.file.name: each.class_name for each in searcher.find(0)} == folders
    queries = [0, photos / "other" / "a" / "2.png", tiny_data / "tiny" / test.path[20]]
    right = [{each.file.name: each.right for each in answer} for answer in searcher.find_many(queries)]
    assert right[0] == {"0.png": True, "1.png": None, "2.png": None, "3.png": None, "4.png": None}
    assert right[1] == {"0.png": False, "1.png": False, "3.png": False, "4.png": None}
    assert right[2] == {"0.png": False, "1.png": None, "2.png": None, "3.png": None, "4.png": None}
    answers = Searcher(small_run, device="cpu").find_many([photos], top=36)
    right = {answer.query.file.name: {each.right for each in answer} for answer in answers}
    assert right == {file: {True, False} if file == "0.png" else {None} for file in folders}


def test_the_class_of_a_query_from_a_folder(small_run, photos, tmp_path):
    """A part of the gallery: the class that it has there. Else the folder, where that is a class of the gallery."""
    for number, path in enumerate(["photos/pet/cat", "photos/pet/cat", "photos/dog", "new/2024", "new/dog"]):
        save_image(tmp_path / path / f"{number}.png", number)
    searcher = searcher_of(small_run, photos)
    answers = searcher.find_many([photos / "pet", tmp_path / "new"])
    assert [answer.query.class_name for answer in answers] == ["pet/cat", "pet/cat", "2024", "dog"]
    right = [{each.class_name: each.right for each in answer} for answer in answers]
    assert right == 2 * [{"pet/cat": True, "dog": False}] + [
        {"pet/cat": None, "dog": None},
        {"pet/cat": False, "dog": True},
    ]


def test_the_query_itself_is_left_out(small_run, tiny_data, photos, monkeypatch):
    """Also a link to it, but no copy. Its class is that of its path. So, too, where the photos are gone."""
    for name in ("a/0.png", "b/1.png", *(f"a/{number}.png" for number in range(2, 7))):
        save_image(photos / name, int(name == "b/1.png"))
    (photos / "a/1.png").symlink_to(photos / "b/1.png")
    searcher = searcher_of(small_run, photos)
    copies = {str(photos / f"a/{number}.png") for number in (0, 2, 3, 4, 5, 6)}
    for name, class_name in (("b/1.png", "b"), ("a/1.png", "a")):
        answer = searcher.find(photos / name, 8)
        assert answer.query.class_name == class_name and {each.path for each in answer} == copies
    assert {each.path for each in searcher.find(photos / "a/6.png", 5)} == copies - {str(photos / "a/6.png")}
    assert [each.path for each in searcher.find(photos / "b/1.png", 1)] == [str(photos / "a/0.png")]
    outside = photos.parent / "outside"
    outside.mkdir()
    (outside / "link.png").symlink_to(photos / "a/3.png")
    answer = searcher.find(outside / "link.png", 5)
    assert answer.query.class_name == "a" and {each.path for each in answer} == copies - {str(photos / "a/3.png")}
    searcher = Searcher(small_run, tiny_data / "tiny", index=photos / "index", device="cpu")
    monkeypatch.setattr("os.path.exists", lambda path: False)
    assert str(searcher.item(0).file) not in [neighbour.path for neighbour in searcher.find(0)]


def test_what_cannot_be_asked(small_run, tmp_path):
    searcher = Searcher(small_run, device="cpu")
    with pytest.raises(InputError, match=r"find_many takes a list of queries, not '/': use find"):
        searcher.find_many("/")  # which would be the whole disk
    with pytest.raises(InputError, match="top has to be at least 1, not 0"):
        searcher.find(0, top=0)
    with pytest.raises(InputError, match="embedding has to be one of logits, pooled, not 'poled'"):
        Searcher(small_run, embedding="poled")
    with pytest.raises(InputError, match=r"^gallery 'a\\udcff': the name is not valid UTF-8$"):
        Searcher(small_run, "a\udcff")
    run = copy_run(small_run, tmp_path / "run")
    (run / "member_001.pooled.npy").unlink()
    with pytest.raises(InputError, match="member 1 of 1 is missing"):
        Searcher(run, embedding="pooled")
    (run / "test.csv").write_text((run / "test.csv").read_text().splitlines()[0] + "\n")
    with pytest.raises(InputError, match="its data set has no test images to search: name a gallery"):
        Searcher(run)


def test_the_options_of_a_command_line_make_its_searcher(small_run, tiny_data):
    parser = argparse.ArgumentParser()
    search.add_search_options(parser)
    options = f"{small_run} --embedding pooled --num_members 1 --device cpu --data_path {tiny_data}".split()
    made = search.searcher_of(parser.parse_args(options))
    assert (made.run.num_members, made.embedding, made.gallery, made.data_path) == (1, "pooled", None, tiny_data)
    assert made.device == torch.device("cpu") and made.refresh and not made.ann


# ------------------------------------------------------------------------------------------------ thresholds


@pytest.mark.parametrize("far", [0.1, 0.01, 0.25, 1.0])
@pytest.mark.parametrize("tied", [False, True])
def test_a_threshold_lets_its_share_through(far, tied):
    """As near below the share as ties allow: the next lower value would let too many through."""
    values = np.random.default_rng(0).uniform(-1, 1, size=2000)
    values = (values.round(2) if tied else values).astype(np.float32)
    threshold = threshold_at(queries_of(values), far)
    rounded = values.astype(float).round(6)
    assert (rounded >= threshold - 1e-9).mean() <= far and threshold == round(threshold, 6)
    lower = rounded[rounded < threshold - 1e-9]
    if far < 1:
        assert (rounded >= lower.max()).mean() > far
        assert tied or (rounded >= threshold - 1e-9).mean() == far
    else:
        assert threshold == -1 and not len(lower)


def test_no_threshold_where_fewer_than_ten_are_expected_above_it():
    """Queries without an image of another class are none. Of equal similarities, none passes."""
    values = np.linspace(0, 1, 1000)
    assert threshold_at(queries_of(values), 0.01) is not None and threshold_at(queries_of(values[1:]), 0.01) is None
    values[:1] = -np.inf
    assert threshold_at(queries_of(values), 0.01) is None
    assert threshold_at(queries_of(np.full(1000, -np.inf)), 1.0) is None
    assert threshold_at(queries_of(np.ones(1000)), 0.1) == pytest.approx(1.000001)


@pytest.mark.parametrize("far", [0, -1, 1.5, float("nan"), 5e-324])
def test_a_rate_outside_0_to_1_is_refused(small_run, far):
    with pytest.raises(InputError, match=r"^far has to be above 0 and at most 1, not"):
        Searcher(small_run, device="cpu").find(0, far=far)


@pytest.mark.parametrize("num_others", [0, 3, 20, 90])
def test_a_rate_takes_queries_that_have_another_class_to_find(small_run, tmp_path, num_others):
    """The gallery has one class: its own 100 queries have nothing wrong to find. What the refusal names would do."""
    labels = np.repeat([0, 1], [100, num_others])
    rows = random_embeddings(0, 1, len(labels))
    run = write_run(tmp_path / "run", small_run, rows, labels, np.ones(len(labels), bool), labels == 0)
    searcher = Searcher(run, device="cpu")
    with pytest.raises(
        InputError, match=f"^far 0.01 takes 1,000 test queries .*, and there are {num_others}: "
    ) as error:
        searcher.find(0, far=0.01)
    least = re.search(r"give far (\S+) or more, or your own threshold$", str(error.value))
    assert (least is None) == (num_others < 10)
    if least:
        assert len(searcher.find(0, far=float(least[1])).neighbours) == 8
        with pytest.raises(InputError):
            searcher.find(0, far=float(least[1]) - 0.001)

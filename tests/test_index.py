"""index.py: the index of a photo folder, its refresh, the searches in it."""

import dataclasses
import os
import shutil
import threading
import time

import pandas as pd
import pytest
from builders import PHOTO_NAMES, embed_files, index_rows, refused, save_colors, save_image
from faults import check_index_kills
from PIL import Image
from reference import mean_cosines

import retrieve
from dreml import index as index_module
from dreml.cli import InputError
from dreml.images import ImageSpec
from dreml.index import PhotoIndex, default_place, model_checksum
from dreml.lists import list_photos
from dreml.runs import read_run
from dreml.search import Searcher
from model import load_ensemble

pytest.importorskip("lancedb", reason="LanceDB is an extra: pip install lancedb")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(index_module, "BATCH_SIZE", 10)


def test_only_new_and_changed_photos_are_embedded(indexed, capsys):
    """By size and time of change. Those that were only touched keep their vectors. Quotes in a name do no harm."""
    photos = indexed.photos
    Image.new("RGB", (8, 8), "red").save(photos / "0.png", "BMP")  # all of one size
    assert indexed.refresh() == 48
    assert indexed.ensemble.batches == [10, 10, 10, 10, 8]
    indexed.check()
    assert "48 of 48 photos embedded, 0 removed" in capsys.readouterr().out
    assert indexed.refresh() == 0
    before = index_rows(indexed.place)
    save_colors(photos, ["new/1.png", "new/it's.png", "new/3.png"], seed=1)
    Image.new("RGB", (8, 8), "blue").save(photos / "0.png", "BMP")
    save_image(photos / "1.png", 5)
    os.utime(photos / "1.png", ns=(0, before["1.png"]["mtime"]))
    os.utime(photos / "bee" / "03.png", ns=(0, 12345))
    for number in range(5):
        (photos / "cat" / f"0{number}.png").unlink()
    assert indexed.refresh() == 5
    indexed.check()
    assert index_rows(indexed.place)["bee/03.png"]["vector"] == before["bee/03.png"]["vector"]
    assert "5 of 46 photos embedded, 5 removed" in capsys.readouterr().out
    (photos / "cat" / "05.png").unlink()  # nothing else
    assert indexed.refresh() == 0
    indexed.check()


def test_bad_files_are_skipped_and_named(indexed, capsys):
    for number in range(23):
        (indexed.photos / "bee" / f"bad{number:02d}.jpg").write_text("no image")
    (indexed.photos / "ant" / "00.png").write_text("no longer an image")
    (indexed.photos / "pipe.png").mkdir()  # a folder, whose name is no matter
    os.mkfifo(indexed.photos / "fifo.png")  # whoever opens it waits without end
    assert indexed.refresh() == 47
    error = capsys.readouterr().err
    assert "files that cannot be used (25):" in error and "fifo.png: not a regular file" in error
    assert "ant/00.png: unreadable" in error and "  … and 5 more" in error and error.count("\n") == 22
    (indexed.photos / "bee" / "00.png").write_text("no longer an image")
    assert indexed.refresh() == 0 and not {"ant/00.png", "bee/00.png"} & index_rows(indexed.place).keys()


def test_a_refresh_that_is_cut_off_goes_on(indexed, monkeypatch):
    """The index can be searched as it is. Its small files are joined now and then. What is stored is not made again."""
    monkeypatch.setattr(index_module, "BATCH_SIZE", 2)
    monkeypatch.setattr(index_module, "OPTIMIZE_AFTER", 7)

    def embed_ten(images):
        if len(indexed.ensemble.batches) == 10:
            raise KeyboardInterrupt
        return indexed.ensemble(images)

    with pytest.raises(KeyboardInterrupt):
        indexed.index().refresh(embed_ten, ImageSpec(8))
    assert len(indexed.index().read()[0]) == 20
    with indexed.index().opened() as table:
        assert table.stats()["fragment_stats"]["num_fragments"] == 5  # ten batches, of which six were joined: version 7
    assert indexed.refresh() == 28
    indexed.check()


def test_two_at_once_share_the_index(indexed):
    """The second one waits, and finds everything done."""
    started = threading.Event()

    def embed_slowly(images):
        started.set()
        time.sleep(0.1)
        return indexed.ensemble(images)

    first = threading.Thread(target=lambda: indexed.index().refresh(embed_slowly, ImageSpec(8)))
    first.start()
    assert started.wait(10)
    assert indexed.refresh() == 0
    first.join()
    assert sum(indexed.ensemble.batches) == 48
    indexed.check()


def test_old_versions_do_not_pile_up(indexed, monkeypatch):
    """But a reader of a version before is not cut off."""
    indexed.refresh()
    with indexed.index().opened() as reader:
        save_colors(indexed.photos, ["another.png"], seed=8)
        indexed.refresh()
        assert len(reader.search().to_arrow()) == 48
    monkeypatch.setattr(index_module, "KEPT_VERSIONS", index_module.KEPT_VERSIONS / 10**5)
    for number in range(5):
        save_colors(indexed.photos, [f"ant/{number}.png"], seed=10 + number)
        indexed.refresh()
    with indexed.index().opened() as table:
        assert len(table.list_versions()) <= 6


def test_the_nearest_of_an_index_are_those_of_the_definition(small_run, tmp_path):
    """A query's own file is left out. The rows lie in the table in another order than the paths, by which ties go."""
    photos = tmp_path / "photos"
    save_colors(photos, PHOTO_NAMES[:30])
    shutil.move(photos / "bee", tmp_path / "bee")
    options = {"gallery": photos, "index": tmp_path / "index", "device": "cpu"}
    Searcher(small_run, **options).find(0)
    shutil.move(tmp_path / "bee", photos / "bee")
    for name in ("ant/copy.png", "2copy.png"):
        shutil.copy(photos / "ant" / "00.png", photos / name)
    (tmp_path / "link.png").symlink_to(photos / "bee" / "08.png")
    save_image(tmp_path / "elsewhere.png")
    paths = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    queries = [photos / "ant" / "07.png", tmp_path / "link.png", tmp_path / "elsewhere.png"]
    answers = Searcher(small_run, **options).find_many(queries, top=40)
    cosines = mean_cosines(embed_files(load_ensemble(small_run), [*queries, *(photos / path for path in paths)]))
    for answer, values, itself in zip(answers, cosines, ("ant/07.png", "bee/08.png", None), strict=False):
        expected = {path: value for path, value in zip(paths, values[3:], strict=True) if path != itself}
        found = {str(each.file.relative_to(photos)): each.similarity for each in answer}
        assert found == pytest.approx(expected, abs=2e-6) and list(found.values()) == sorted(found.values())[::-1]
        ties = ["2copy.png", "ant/00.png", "ant/copy.png"]
        assert [path for path in found if path in ties] == ties


def test_approximate_search(small_run, tmp_path, capsys):
    """Finds nearly all of what exact search finds, also after changes; exact in a small folder."""
    photos = tmp_path / "photos"
    names = [f"{number % 9}/{number}.png" for number in range(1100)]
    save_colors(photos, names[:900])
    options = {"gallery": photos, "index": tmp_path / "index", "device": "cpu"}
    expected = Searcher(small_run, **options).find(0)
    assert Searcher(small_run, **options, ann=True).find(0) == expected
    assert "the search is exact" in capsys.readouterr().out
    save_colors(photos, names, seed=3)
    queries = [*range(6), photos / names[57]]
    for _ in range(2):
        found = Searcher(small_run, **options, ann=True).find_many(queries)
        exact = Searcher(small_run, **options, refresh=False).find_many(queries)
        pairs = zip(found, exact, strict=True)
        shared = sum(len({each.path for each in one} & {each.path for each in two}) for one, two in pairs)
        assert shared >= 50 and "the search is exact" not in capsys.readouterr().out
        assert all(len(answer.neighbours) == 8 for answer in found)
        assert str(photos / names[57]) not in {each.path for each in found[6]} and found[6].query.class_name == "3"
        for name in names[:50]:
            (photos / name).unlink(missing_ok=True)
        save_colors(photos, [f"dog/new{number}.png" for number in range(60)], seed=4)
    searcher = Searcher(small_run, **options, refresh=False)
    paths, vectors = searcher.index.read(searcher.saved[0], 5)
    assert len(paths) == len(vectors) == 5 and paths == sorted(paths)


def test_an_index_of_another_model_or_folder_is_refused_and_left_alone(indexed, tmp_path):
    """A link to the folder is the same folder."""
    indexed.refresh()
    before = index_rows(indexed.place)
    (tmp_path / "link").symlink_to(indexed.photos)
    PhotoIndex(tmp_path / "link", indexed.place, "m" * 64)
    shutil.copytree(indexed.photos, tmp_path / "new place")
    message = rf"^index .* was made for the photos in {indexed.photos}, or for another model: choose another place$"
    for folder, model in ((indexed.photos, "n" * 64), (tmp_path / "new place", "m" * 64)):
        with pytest.raises(InputError, match=message):
            PhotoIndex(folder, indexed.place, model)
    assert index_rows(indexed.place) == before


def test_the_model_is_all_that_an_embedding_hangs_on(small_run, tmp_path, monkeypatch):
    """The run, its weights, how many members, which embedding, how pixels are read. Each has an index of its own."""
    run = read_run(small_run, None, "logits")
    checksums = [model_checksum(run, "logits"), model_checksum(run, "pooled")]
    checksums.append(model_checksum(read_run(small_run, 1, "logits"), "logits"))
    (tmp_path / "link").symlink_to(tmp_path)
    places = [default_place(small_run, folder, model) for folder in (tmp_path, tmp_path / "link") for model in "mn"]
    assert places[0] == places[2] != places[1] == places[3] and places[0].parent == small_run / "index"
    monkeypatch.setattr(index_module, "IMAGE_VERSION", 99)
    checksums.append(model_checksum(run, "logits"))
    run.members[1].sha256["member_002.safetensors"] = "0" * 64
    checksums.append(model_checksum(run, "logits"))
    run.record.settings = dataclasses.replace(run.record.settings, seed=1)
    checksums.append(model_checksum(run, "logits"))
    assert len(set(checksums)) == 6


def test_what_is_no_index_is_refused_in_one_line(indexed):
    """Also a table of another program, which is left alone."""
    import lancedb

    damaged = r"^index .* cannot be used \(.*\): choose another place, or delete it if it is damaged$"
    with pytest.raises(InputError, match=r"there is no index in .* yet: search with refresh first"):
        indexed.index().read()
    assert not indexed.place.exists()
    indexed.place.write_text("")
    with pytest.raises(InputError, match=r"index names another folder"):
        indexed.refresh()
    indexed.place.unlink()
    lancedb.connect(indexed.place).create_table("photos", [{"path": "theirs"}])
    with pytest.raises(InputError, match=damaged):
        indexed.index()
    assert list(index_rows(indexed.place)) == ["theirs"]
    shutil.rmtree(indexed.place)
    (indexed.place / "photos.lance" / "_versions").mkdir(parents=True)  # of a process that was killed early
    indexed.refresh()
    indexed.check()
    record = (indexed.place / "index.json").read_bytes()
    (indexed.place / "index.json").write_bytes(record[:20])
    with pytest.raises(InputError, match=damaged):
        indexed.index()
    (indexed.place / "index.json").write_bytes(record)
    for path in indexed.place.rglob("*.manifest"):
        path.write_text("damaged")
    with pytest.raises(InputError, match=damaged):
        indexed.index()


def test_folders_without_photos(indexed):
    """Nothing is deleted for a disk that is not mounted."""
    indexed.refresh()
    shutil.rmtree(indexed.photos)
    with pytest.raises(InputError, match="No such file or directory"):
        indexed.refresh()
    indexed.photos.mkdir()
    with pytest.raises(InputError, match="no images below it"):
        indexed.refresh()
    assert len(index_rows(indexed.place)) == 48
    (indexed.photos / "bad.png").write_text("no image")
    indexed.refresh()
    with pytest.raises(InputError, match="no photo that can be searched"):
        indexed.index().read()


def test_the_command_line(small_run, tmp_path, capsys):
    """The index alone is searched when the folder is gone."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    for number in range(6):
        save_image(photos / "abc"[number % 3] / f"{number}.png", number)
    query = [small_run, "--query", "test:0", "--top", "3", "--no_picture", "--output", out]
    query = [*map(str, query), "--gallery", str(photos), "--index", str(tmp_path / "index")]
    assert retrieve.main([*query, "--export"]) == 0
    assert "6 of 6 photos embedded, 0 removed" in capsys.readouterr().out
    files = [str(path) for path in sorted(photos.rglob("*.png"))]
    assert pd.read_csv(out / "embedding_gallery.csv").path.tolist() == files
    expected = (out / "neighbours.csv").read_text()
    assert set(pd.read_csv(out / "neighbours.csv").path) < set(files)
    shutil.rmtree(photos)
    assert "no such folder" in refused(capsys, retrieve, *query)
    for options in (["--refresh", "never"], ["--refresh", "never", "--ann"]):
        assert retrieve.main([*query, *options]) == 0
        assert (out / "neighbours.csv").read_text() == expected and "embedded" not in capsys.readouterr().out


def test_a_photo_from_the_year_2300(tmp_path):
    """Its time of change in nanoseconds is above what the table can hold."""
    save_image(tmp_path / "a" / "late.png")
    os.utime(tmp_path / "a" / "late.png", (0, 10_413_792_000))
    assert list_photos(tmp_path, [])["a/late.png"][1] == 2**63 - 1


@pytest.mark.xdist_group("processes")
def test_kills(processes, small_run, tmp_path):
    check_index_kills(processes, small_run, tmp_path, num_kills=2, num_photos=400, seed=0)

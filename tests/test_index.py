"""index.py: the index of a photo folder, its refresh, exact search in it."""

import dataclasses
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from builders import PHOTO_NAMES, ColorEnsemble, index_rows, queries_of, refused, save_colors, save_image
from faults import check_index_kills
from PIL import Image

import retrieve
from dreml import index as index_module
from dreml.cli import InputError
from dreml.index import PhotoIndex, default_place, model_checksum
from dreml.runs import read_run
from dreml.search import find_neighbours, folder_items

pytest.importorskip("lancedb", reason="LanceDB is an extra: pip install lancedb")


# ------------------------------------------------------------------------------------------------ refresh


def test_a_folder_is_embedded_once(indexed, capsys):
    assert indexed.refresh() == {"photos": 48, "removed": 0, "new": 48, "embedded": 48}
    assert indexed.ensemble.batches == [10, 10, 10, 10, 8]
    indexed.check()
    assert "48 photos, 48 new; 48 embedded" in capsys.readouterr().out
    counts = indexed.index().refresh(lambda: pytest.fail("no ensemble is needed"), 10)
    assert counts["embedded"] == 0 and "48 photos, no changes; 0 embedded" in capsys.readouterr().out


def test_only_new_and_changed_photos_are_embedded(indexed, capsys):
    """Moved, copied and touched ones keep their vectors, among them one whose place another photo took."""
    indexed.refresh()
    before, photos = index_rows(indexed.place), indexed.photos
    indexed.ensemble.batches.clear()
    save_colors(photos, ["new/1.png", "new/2.png", "new/3.png"], seed=1)
    save_colors(photos, ["ant/00.png", "ant/01.png"], seed=2)
    os.rename(photos / "bee" / "00.png", photos / "cat" / "moved.png")
    os.rename(photos / "bee" / "01.png", photos / "cat" / "moved too.png")
    save_colors(photos, ["bee/01.png"], seed=3)  # in its place
    shutil.copy(photos / "bee" / "02.png", photos / "copy.png")
    shutil.copy(photos / "new" / "1.png", photos / "new" / "1 again.png")
    os.utime(photos / "bee" / "03.png", ns=(0, 12345))
    for number in range(5):
        (photos / "cat" / f"0{number}.png").unlink()
    counts = indexed.refresh(batch_size=4)
    expected = {"photos": 49, "new": 3, "changed": 3, "moved": 1, "copied": 3, "touched": 1, "removed": 5}
    assert counts == expected | {"embedded": 6}
    assert indexed.ensemble.num_embedded == 6
    indexed.check()
    after = index_rows(indexed.place)
    pairs = [("cat/moved.png", "bee/00.png"), ("cat/moved too.png", "bee/01.png"), ("bee/03.png", "bee/03.png")]
    for name, old in pairs:
        assert after[name]["vector"] == before[old]["vector"]
    assert "3 new, 3 changed, 1 moved, 3 copied, 1 touched, 5 removed; 6 embedded" in capsys.readouterr().out


def test_a_change_that_keeps_size_or_time_is_seen(indexed):
    """The size and the time of change both count."""
    first, second = indexed.photos / PHOTO_NAMES[0], indexed.photos / PHOTO_NAMES[1]
    Image.new("RGB", (8, 8), "red").save(second, "BMP")  # all of one size
    indexed.refresh()
    times, size = first.stat().st_mtime_ns, second.stat().st_size
    save_image(first, 5)
    os.utime(first, ns=(times, times))
    Image.new("RGB", (8, 8), "blue").save(second, "BMP")
    os.utime(second, ns=(0, 12345))
    assert second.stat().st_size == size and indexed.refresh()["changed"] == 2
    indexed.check()


def test_photos_that_need_no_embedding_do_not_split_a_batch(indexed, monkeypatch):
    """Many of them are stored while a batch still waits for more: a search that goes on makes the same batches."""
    indexed.refresh()
    indexed.ensemble.batches.clear()
    for name in PHOTO_NAMES:
        os.utime(indexed.photos / name, ns=(0, 12345))
    save_colors(
        indexed.photos, [f"{place}/new{number}.png" for place in ("ant", "bee", "cat") for number in range(3)], 1
    )
    monkeypatch.setattr(index_module, "MAX_WAITING", 3)
    assert indexed.refresh(batch_size=4)["touched"] == 48
    assert indexed.ensemble.batches == [4, 4, 1]
    indexed.check()


def test_bad_files_are_skipped_and_listed(indexed, capsys):
    for number in range(23):
        (indexed.photos / "bee" / f"bad{number:02d}.jpg").write_text("no image")
    (indexed.photos / "ant" / "00.png").write_text("no longer an image")
    (indexed.photos / "pipe.png").mkdir()  # a folder, whose name is no matter
    os.mkfifo(indexed.photos / "fifo.png")  # whoever opens it waits without end
    assert indexed.refresh()["embedded"] == 47
    error = capsys.readouterr().err
    lines = (indexed.place / "skipped.txt").read_text().splitlines()
    assert len(lines) == 25 and f"25 files cannot be used (listed in {indexed.place / 'skipped.txt'})" in error
    assert "  … and 5 more" in error and error.count("\n") == 22
    assert sum("/bad" in line for line in lines) == 23 and any("fifo.png" in line for line in lines)
    assert "ant/00.png" not in index_rows(indexed.place)
    (indexed.photos / "pipe.png").rmdir()
    for path in (*indexed.photos.rglob("bad*"), indexed.photos / "fifo.png", indexed.photos / "ant" / "00.png"):
        path.unlink()
    assert "embedded" not in indexed.refresh() and not (indexed.place / "skipped.txt").exists()
    indexed.check()


def test_a_photo_that_changes_while_it_is_read_is_left_out(indexed, monkeypatch, capsys):
    """Else the vector of one content would stand under the hash of another."""
    read, target = index_module.read_photos.__globals__["read_test_image"], indexed.photos / PHOTO_NAMES[5]

    def changing(file, spec):
        if file == target and file.stat().st_mtime_ns != 99:
            os.utime(file, ns=(99, 99))
        return read(file, spec)

    monkeypatch.setattr("dreml.photos.read_test_image", changing)
    assert indexed.refresh()["embedded"] == 47 and "changed while it was read" in capsys.readouterr().err
    assert indexed.refresh()["embedded"] == 1
    indexed.check()


def test_a_refresh_that_is_cut_off_ends_with_the_same_bits(indexed, tmp_path, monkeypatch):
    """After every number of batches: bad, moved and changed photos among them. The vectors hang on the whole batch."""

    class Cut(Exception):
        pass

    def change(photos: Path) -> None:
        save_colors(photos, [f"{place}/new{number}.png" for place in ("ant", "dog") for number in range(9)], seed=1)
        save_colors(photos, ["bee/00.png", "bee/01.png"], seed=2)
        os.rename(photos / "cat" / "02.png", photos / "ant" / "new again.png")
        (photos / "cat" / "03.png").unlink()
        for path in photos.rglob("*"):
            os.utime(path, ns=(0, 10**9 * path.stat().st_size + len(path.name)))

    (indexed.photos / "ant" / "bad.png").write_text("no image")
    indexed.refresh(4)
    change(indexed.photos)
    start = tmp_path / "start"
    shutil.copytree(indexed.place, start)
    indexed.refresh(4)
    expected, write = index_rows(indexed.place), PhotoIndex.write
    for kept in range(6):
        shutil.rmtree(indexed.place)
        shutil.copytree(start, indexed.place)
        calls = []

        def cut(self, *arguments, calls=calls, kept=kept):
            calls.append(1)
            if len(calls) > kept:
                raise Cut
            write(self, *arguments)

        monkeypatch.setattr(PhotoIndex, "write", cut)
        with pytest.raises(Cut):
            indexed.refresh(4)
        monkeypatch.setattr(PhotoIndex, "write", write)
        photos = indexed.index().photos()  # searchable as it is, each photo once
        assert len(photos) == len(set(photos.paths))
        indexed.ensemble.batches.clear()
        assert indexed.refresh(4).get("embedded", 0) == indexed.ensemble.num_embedded == max(0, 20 - 4 * kept)
        assert index_rows(indexed.place) == expected


def test_two_at_once_share_the_index(indexed, capsys):
    """The second one waits, and finds everything done."""
    ensembles, started = [ColorEnsemble(), ColorEnsemble()], threading.Event()

    def load_first():
        started.set()
        time.sleep(0.2)
        return ensembles[0]

    first = threading.Thread(target=lambda: indexed.index().refresh(load_first, 10))
    first.start()
    assert started.wait(10)
    indexed.index().refresh(lambda: ensembles[1], 10)
    first.join()
    assert [ensemble.num_embedded for ensemble in ensembles] == [48, 0]
    assert "another process works on" in capsys.readouterr().out
    indexed.check()


def test_old_versions_do_not_pile_up(indexed, monkeypatch):
    """Neither those of many refreshes nor the many small files of one. A reader of a version before is not cut off."""
    monkeypatch.setattr(index_module, "MAX_VERSIONS", 4)
    monkeypatch.setattr(index_module, "MAX_FRAGMENTS", 6)
    indexed.refresh(batch_size=2)
    table, reader = indexed.index().table(), indexed.index().table()
    assert table.stats()["fragment_stats"]["num_fragments"] < 8
    save_colors(indexed.photos, ["another.png"], seed=8)
    indexed.refresh()
    assert len(reader.search().to_arrow()) == 48
    monkeypatch.setattr(index_module, "KEPT_VERSIONS", index_module.KEPT_VERSIONS * 0)
    for number in range(9):
        save_colors(indexed.photos, [f"ant/{number}.png"], seed=10 + number)
        (indexed.photos / "ant" / f"0{number}.png").unlink()
        indexed.refresh()
    assert len(indexed.index().table().list_versions()) <= 6
    indexed.check()


# ------------------------------------------------------------------------------------------------ search


def test_exact_search_finds_what_a_search_without_index_finds(indexed, tmp_path):
    """To the row: with ties, and a query's own file left out. The rows lie in the table in another order."""
    for name in ("zebra/1.png", "ant/copy.png", "2copy.png", "bee hive/00 copy.png"):
        (indexed.photos / name).parent.mkdir(exist_ok=True)
        shutil.copy(indexed.photos / PHOTO_NAMES[3], indexed.photos / name)
    for name in ("cat", "bee"):
        os.rename(indexed.photos / name, tmp_path / name)
    indexed.refresh(4)
    for name in ("cat", "bee"):
        os.rename(tmp_path / name, indexed.photos / name)
    indexed.refresh(7)
    queries, rows = queries_of(indexed, tmp_path)
    gallery = folder_items("--gallery", indexed.photos)
    photos = indexed.index().photos()
    assert list(photos) == gallery
    table = index_rows(indexed.place)
    vectors = torch.tensor([table[path]["vector"] for path in photos.paths])
    assert torch.equal(photos.vectors, vectors)
    for top in (1, 5, 51):
        assert find_neighbours(queries, rows, photos, photos.vectors, top) == find_neighbours(
            queries, rows, gallery, vectors, top
        )
    assert photos.place_of(queries[0]) == -1 and photos.paths[photos.place_of(queries[2])] == PHOTO_NAMES[20]
    assert find_neighbours(queries[1:2], rows[1:2], photos, photos.vectors, 1)[0].query.class_name == "ant"


# ------------------------------------------------------------------------------------------------ which index


def test_an_index_of_another_model_is_refused_and_left_alone(indexed):
    indexed.refresh()
    before, other = index_rows(indexed.place), indexed.index("n" * 64)
    for use in (other.photos, lambda: other.refresh(lambda: indexed.ensemble, 10)):
        with pytest.raises(InputError, match=r"--index .* is of another model, .*delete it$"):
            use()
    assert index_rows(indexed.place) == before


def test_the_model_is_all_that_an_embedding_hangs_on(small_run, small_pooled_run, tmp_path, monkeypatch):
    """The run, its weights, how many members, which embedding, how pixels are read."""
    run, photos = read_run(small_run), tmp_path / "my photos"
    checksums = [
        model_checksum(run, "logits"),
        model_checksum(run, "pooled"),
        model_checksum(read_run(small_run, 1), "logits"),
    ]
    assert model_checksum(read_run(small_pooled_run), "logits") == checksums[0]
    monkeypatch.setattr(index_module, "IMAGE_VERSION", 99)
    checksums.append(model_checksum(run, "logits"))
    run.members.records[2].sha256["member_002.safetensors"] = "0" * 64
    checksums.append(model_checksum(run, "logits"))
    run.record.settings = dataclasses.replace(run.record.settings, seed=1)
    checksums.append(model_checksum(run, "logits"))
    assert len(set(checksums)) == 6
    places = {default_place(run, photos, model) for model in checksums} | {
        default_place(run, tmp_path / "x" / "my photos", checksums[0])
    }
    assert len(places) == 7 and all(place.parent == small_run / "index" for place in places)
    assert all(place.name.startswith("my_photos_") for place in places)
    (tmp_path / "link").symlink_to(photos)
    assert default_place(run, tmp_path / "link", checksums[0]) in places


def test_what_is_no_index_is_refused_in_one_line(indexed, tmp_path):
    with pytest.raises(InputError, match=r"there is no index in .* yet: search once without --refresh never"):
        indexed.index().photos()
    assert not indexed.place.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a folder"):
        PhotoIndex(indexed.photos, tmp_path / "file", "m" * 64)
    (indexed.place / "photos.lance" / "data").mkdir(parents=True)  # of a process that was killed early
    indexed.refresh()
    indexed.check()
    for path in indexed.place.rglob("*.manifest"):
        path.write_text("damaged")
    for use in (indexed.refresh, indexed.index().photos):
        with pytest.raises(
            InputError, match=r"^--index .* cannot be used \(.*\); if it is damaged, delete it"
        ) as refusal:
            use()
        assert "\n" not in str(refusal.value)


def test_folders_without_photos(indexed, tmp_path):
    """Nothing is deleted for a disk that is not mounted."""
    indexed.refresh()
    os.rename(indexed.photos, tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no such folder"):
        indexed.refresh()
    indexed.photos.mkdir()
    with pytest.raises(InputError, match="no images below it"):
        indexed.refresh()
    os.rmdir(indexed.photos)
    indexed.photos.mkdir(mode=0)  # a folder that must not be read, unless by root
    with pytest.raises(InputError):
        indexed.refresh()
    indexed.photos.chmod(0o700)
    assert len(index_rows(indexed.place)) == 48
    (indexed.photos / "bad.png").write_text("no image")
    indexed.refresh()
    with pytest.raises(InputError, match="no photo that can be searched"):
        indexed.index().photos()


# ------------------------------------------------------------------------------------------------ the command line


def test_the_command_line(small_run, tmp_path, capsys):
    """The same CSV with and without an index, and from the index alone when the folder is gone."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    for number in range(6):
        save_image(photos / "abc"[number % 3] / f"{number}.png", number)
    (photos / "bad.png").write_text("no image")
    query = [str(small_run), "--query", str(photos / "a" / "0.png"), "--top", "3", "--no_picture", "--output", str(out)]
    kept = ["--gallery", str(photos), "--index", str(tmp_path / "index")]
    assert retrieve.main([*query, *kept, "--export"]) == 0
    printed = capsys.readouterr()
    assert "7 photos, 6 new; 6 embedded" in printed.out and "bad.png: unreadable" in printed.err
    first = (out / "neighbours.csv").read_text()
    exported = np.load(out / "embedding_gallery.npy")
    assert pd.read_csv(out / "embedding_gallery.csv").path.tolist() == [
        str(path) for path in sorted(photos.rglob("[0-9]*"))
    ]
    (photos / "bad.png").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieve, "is_installed", lambda: False)
        assert retrieve.main([*query, *kept[:2], "--export"]) == 0
    assert (out / "neighbours.csv").read_text() == first
    np.testing.assert_allclose(np.load(out / "embedding_gallery.npy"), exported, atol=1e-6)
    shutil.rmtree(photos / "a")
    assert "no such image" in refused(capsys, retrieve, *query, *kept)
    query[2] = "test:0"
    assert retrieve.main([*query, *kept]) == 0
    assert "4 photos, 2 removed; 0 embedded" in capsys.readouterr().out
    shutil.rmtree(photos)
    never = [*query, *kept, "--refresh", "never"]
    assert retrieve.main(never) == 0
    assert len(pd.read_csv(out / "neighbours.csv")) == 3 and "photos," not in capsys.readouterr().out
    assert "--ann needs at least 1,000 photos" in refused(capsys, retrieve, *never, "--ann")


@pytest.mark.xdist_group("processes")
def test_kills(processes, small_run, tmp_path):
    check_index_kills(processes, small_run, tmp_path, num_kills=2, num_photos=400, seed=0)

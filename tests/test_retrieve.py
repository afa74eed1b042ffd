"""retrieve.py: queries, errors, the exported embedding, refusals. No test here needs LanceDB."""

import functools
import re
import shlex
import shutil
import sys
from pathlib import Path

import builders
import numpy as np
import pandas as pd
import pytest
import torch
from builders import CLASS_NAMES, LABELS, copy_run, random_embeddings, refused, save_image, write_colored_run
from PIL import Image
from reference import mean_cosines

import evaluate
import retrieve
from dreml import search
from dreml.confusions import confident_errors, first_neighbour_table
from dreml.figures import tile_corner
from dreml.runs import read_test
from model import load_ensemble

loaded = functools.cache(load_ensemble)


@pytest.fixture(autouse=True)
def loads_a_run_once(monkeypatch):
    monkeypatch.setattr(search, "load_ensemble", loaded)


@pytest.fixture(autouse=True)
def no_lancedb(monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)


def call(*arguments: str | Path) -> None:
    assert retrieve.main([str(argument) for argument in arguments]) == 0


def found_in(folder: Path, name: str = "neighbours") -> dict[str, pd.DataFrame]:
    """Query -> its rows of the CSV, in their order."""
    table = pd.read_csv(folder / f"{name}.csv", keep_default_na=False, dtype={"right": str})
    columns = ["query", "query_path", "query_class", "rank", "path", "class_name", "similarity", "right"]
    assert list(table.columns) == columns
    return {query: rows.reset_index(drop=True) for query, rows in table.groupby("query", sort=False)}


@pytest.fixture
def drawn(tiny_run, tmp_path):
    """Makes a run with random embeddings whose test images each have one colour. Returns arguments for retrieve.py."""

    def make(*arguments, **options) -> list[str]:
        folder = write_colored_run(tmp_path, tiny_run, *arguments, **options)
        return [str(folder), "--data_path", str(tmp_path / "data"), "--output", str(tmp_path / "out")]

    return make


def test_neighbours_are_those_of_the_definition(drawn, tmp_path, capsys):
    """Mean cosines of the members, the gallery's images only, without the query itself."""
    is_gallery = np.arange(len(LABELS)) % 4 != 1
    members = random_embeddings(3, 3)
    arguments = drawn(members, LABELS, np.ones(len(LABELS), bool), is_gallery)
    queries = [0, 1, 11]  # 1 is not in the gallery
    call(*arguments, "--query", *(f"test:{row}" for row in queries), "--top", "8")
    found = found_in(tmp_path / "out")
    cosines = mean_cosines(members)
    assert list(found) == ["test:0", "test:1", "test:11"]
    for row in queries:
        others = np.array([other for other in np.flatnonzero(is_gallery) if other != row])
        nearest = others[np.argsort(-cosines[row, others])][:8]
        rows = found[f"test:{row}"]
        assert rows["rank"].tolist() == list(range(1, 9))
        assert rows.path.tolist() == [f"{other}.png" for other in nearest]
        assert rows.class_name.tolist() == CLASS_NAMES[LABELS[nearest]].tolist()
        np.testing.assert_allclose(rows.similarity, cosines[row, nearest], atol=2e-6)
        assert rows.right.tolist() == [str(LABELS[other] == LABELS[row]) for other in nearest]
    out = capsys.readouterr().out
    best = found["test:11"].iloc[0]
    word = "right" if best.right == "True" else "wrong"
    path = tmp_path / "data" / "colors" / best.path
    assert "test:11 (d $x$)" in out and f"   1  {best.similarity:7.4f}  {word}  {best.class_name}  {path}\n" in out


def test_the_file_of_a_test_image_is_that_image(drawn, tmp_path, monkeypatch):
    """By any path that leads to it, also where the data set has links: its class is known; it does not find itself.

    Another test image that is a link to the same file is found, as evaluate.py counts it.
    """
    arguments = drawn(random_embeddings(5))
    colors = tmp_path / "data" / "colors"
    (colors / "3.png").rename(tmp_path / "elsewhere.png")
    (colors / "6.png").unlink()
    for name in ("3.png", "6.png"):
        (colors / name).symlink_to(tmp_path / "elsewhere.png")
    (tmp_path / "view").symlink_to(colors)
    (tmp_path / "link.png").symlink_to(tmp_path / "view" / "4.png")
    monkeypatch.chdir(tmp_path / "data")
    paths = {Path("colors/../colors/3.png"): 3, tmp_path / "link.png": 4, tmp_path / "view" / "5.png": 5}
    call(*arguments, "--query", *paths, *(f"test:{row}" for row in paths.values()), "colors", "--top", "11")
    found = found_in(tmp_path / "out")
    assert len(found) == len(paths) + 3 + len(LABELS)
    for path, row in {**paths, "colors/3.png": 3}.items():
        assert f"{row}.png" not in found[f"test:{row}"].path.tolist()
        assert found[str(path)].iloc[:, 3:].equals(found[f"test:{row}"].iloc[:, 3:])
    assert "6.png" in found["test:3"].path.tolist()


def test_queries_from_a_folder(tiny_run, tiny_data, tmp_path, capsys):
    """Any depth, sorted; the class is the folder's path; a photo between test images keeps its place."""
    test = pd.read_csv(tiny_run / "test.csv")
    folder = tmp_path / "photos"
    for number, name in ((0, "character_006/near/b.png"), (0, "character_006/a.png"), (35, "x.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny_data / "tiny" / test.path[number], folder / name)
    (folder / "films").mkdir()
    for name in ("notes.txt", "films/1.mov", "films/2.mov", ".hidden.mov"):
        (folder / name).write_text("no image")
    options = ("--top", "1", "--output", tmp_path, "--num_members", "1")
    call(tiny_run, "--query", "test:1", folder, "test:2", *options)
    assert capsys.readouterr().err == f"warning: {folder}: left out: 2 .mov, 1 .txt\n"
    found = found_in(tmp_path)
    names = ["x.png", "character_006/a.png", "character_006/near/b.png"]
    assert list(found) == ["test:1", *(str(folder / name) for name in names), "test:2"]
    assert [rows.path[0] for rows in found.values()][1:4] == [test.path[35], test.path[0], test.path[0]]
    assert [rows.right[0] for rows in found.values()][1:4] == ["", "True", ""]
    message = refused(capsys, retrieve, tiny_run, "--query", folder / "films", *options)
    assert message == f"retrieve.py: --query: {folder / 'films'}: no images below it (left out: 2 .mov)\n"


def test_every_bad_query_is_named_and_the_others_are_answered(tiny_run, tmp_path, capsys):
    """Those found before and after the images are opened; the exit code is 2. Without an answer, nothing is written."""
    save_image(tmp_path / "good.png")
    bad = [tmp_path / f"{number}.png" for number in range(25)]
    for path in bad:
        path.write_text("no image")
    options = ["--top", "2", "--output", tmp_path / "out"]
    message = f"retrieve.py: --query: {bad[0]}: unreadable (not an image of a known format)"
    assert refused(capsys, retrieve, tiny_run, "--query", bad[0], *options) == f"{message}\n"
    assert not (tmp_path / "out").exists()
    assert refused(capsys, retrieve, tiny_run, "--query", bad[0], "test:3", *options) == f"{message} (answered: 1)\n"
    queries = [*bad, tmp_path / "good.png", "nothing.jpg", "test:99", "test:3"]
    assert retrieve.main([str(each) for each in (tiny_run, "--query", *queries, *options)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("retrieve.py: --query: 27 problems (answered: 2):\n") and error.count("\n") == 28
    assert list(found_in(tmp_path / "out")) == [str(tmp_path / "good.png"), "test:3"]


def test_neighbours_below_a_threshold_are_not_found(drawn, tmp_path, capsys):
    """In the CSV, the list and the summary; the threshold itself passes."""
    arguments = [*drawn(random_embeddings(3, 2)), "--query", "test:0", "test:1", "test:5", "--top", "4"]
    call(*arguments)
    assert "not found" not in capsys.readouterr().out
    similarities = np.concatenate([rows.similarity for rows in found_in(tmp_path / "out").values()])
    threshold = np.sort(similarities)[7]
    call(*arguments, "--threshold", f"{threshold:.6f}")
    table = pd.read_csv(tmp_path / "out" / "neighbours.csv")
    assert table.found.tolist() == (similarities >= threshold).tolist() and table.found.sum() == 5
    assert len(re.findall(r"^ +\d  +\S+  not found  ", capsys.readouterr().out, re.MULTILINE)) == 7
    call(*arguments, "--threshold", "0.99")
    out = capsys.readouterr().out
    assert out.count(": none of these\n") == 3 and "not found: nothing for 3 of 3 queries reaches 0.9900\n" in out


def test_far_takes_the_threshold_that_evaluate_writes(drawn, tmp_path, capsys, monkeypatch):
    """Of this embedding and number of members; also a rate that evaluate.py does not write."""
    monkeypatch.setattr(builders, "IMAGE_COLORS", np.full((200, 3), 9, np.uint8))
    members = {"": random_embeddings(0, 3, 200), "_pooled": random_embeddings(1, 3, 200)}
    arguments = drawn(members[""], np.arange(200) % 4, pooled=members["_pooled"])
    queries = ["--query", *(f"test:{row}" for row in range(30)), "--top", "2", "--no_picture", "--export"]
    for embedding, suffix in (("logits", ""), ("pooled", "_pooled")):
        options = ["--num_members", "2", "--embedding", embedding]
        assert evaluate.main([str(arguments[0]), *options]) == 0
        call(*arguments, *queries, *options, "--far", "0.1")
        assert "10 % reached it in 200 images" in capsys.readouterr().out
        (row,) = pd.read_csv(tmp_path / "run" / f"thresholds{suffix}.csv").itertuples()
        found = pd.read_csv(tmp_path / "out" / f"neighbours{suffix}.csv")
        assert row.far == 0.1 and len(set(found.found)) == 2
        assert found.found.tolist() == (found.similarity >= row.threshold).tolist()
        cosines = mean_cosines(members[suffix][:2])
        np.testing.assert_allclose(found.similarity[:2], np.sort(cosines[0])[::-1][1:3], atol=2e-6)
        assert np.load(tmp_path / "out" / f"embedding{suffix}.npy").shape == (200, 6)
        call(*arguments, *queries, *options, "--far", "0.2")
        more = pd.read_csv(tmp_path / "out" / f"neighbours{suffix}.csv").found
        assert more.sum() > found.found.sum() and more[found.found].all()
    line = "takes 1,000 test queries (with other classes in the gallery), and there are 200: give far 0.05 or"
    message = refused(capsys, retrieve, *arguments, *queries, "--far", "0.01")
    assert f"far 0.01 {line} more, or your own threshold\n" in message
    call(*arguments, *queries, "--far", "0.05")


def test_worst_are_the_most_confident_errors(drawn, tmp_path, capsys):
    """Those of confusions.csv, whose order test_confusions.py compares with the similarities."""
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3])
    is_gallery = np.arange(12) != 7  # so 6 has nothing right to find
    members = random_embeddings(6, 2)
    arguments = drawn(members, labels, np.arange(12) != 4, is_gallery)
    test = read_test(tmp_path / "run")
    errors = confident_errors(first_neighbour_table([torch.from_numpy(rows) for rows in members], test))
    assert len(errors) > 4  # else the case says little
    for number in (3, 100):
        call(*arguments, "--worst", str(number), "--top", "2")
        found = found_in(tmp_path / "out", "worst")
        assert list(found) == [f"test:{row}" for row in errors.row[:number]]
        assert all(rows.right[0] == "False" for rows in found.values())
        first = [rows.similarity[0] for rows in found.values()]
        np.testing.assert_allclose(first, errors.similarity[:number], atol=2e-6)
        said = f"wrong first neighbours: {len(errors)} of 10 test queries; listed: {min(number, len(errors))}\n"
        assert said in capsys.readouterr().out
    assert (tmp_path / "out" / "worst.png").exists()


def test_export_of_the_test_split(drawn, tmp_path):
    """All of it, with its masks, wherever it is to go; no image is needed."""
    members = random_embeddings(2, 2)
    is_query = np.arange(len(LABELS)) < 5
    arguments = drawn(members, LABELS, is_query, ~is_query)
    shutil.rmtree(tmp_path / "data")
    targets = {(): "out/embedding.npy", ("vectors.npy",): "vectors.npy", ("new/folder",): "new/folder/embedding.npy"}
    for target, path in targets.items():
        call(*arguments, "--export", *(tmp_path / name for name in target))
        rows = np.load(tmp_path / path)
        table = pd.read_csv((tmp_path / path).with_suffix(".csv"))
        np.testing.assert_allclose(rows @ rows.T, mean_cosines(members), atol=1e-6)
        assert table.path.tolist() == [f"{row}.png" for row in range(len(LABELS))]
        assert table.label.tolist() == LABELS.tolist() and table.class_name.tolist() == CLASS_NAMES[LABELS].tolist()
        assert table.is_query.tolist() == is_query.tolist() and table.is_gallery.tolist() == (~is_query).tolist()
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_the_picture_and_the_csv_are_of_one_search(drawn, tmp_path, capsys, monkeypatch):
    """An earlier picture goes, with --no_picture and where none can be drawn. What is replaced is said."""
    monkeypatch.setattr(retrieve, "MAX_ROWS", 2)
    arguments = drawn(random_embeddings(5))
    picture = tmp_path / "out" / "neighbours.png"
    replaced = f"{picture.with_suffix('.csv')} (an earlier one was replaced; --output names another folder)\n"
    call(*arguments, "--query", "test:0", "test:1", "test:2", "--top", "2")
    out = capsys.readouterr().out
    assert "neighbours.png, the first 2 of 3 queries" in out and replaced not in out
    assert tile_corner(2, 0)[1] < Image.open(picture).height / 150 < tile_corner(3, 0)[1]
    assert len(found_in(tmp_path / "out")) == 3
    call(*arguments, "--query", "test:2", "--top", "2", "--no_picture")
    assert not picture.exists() and replaced in capsys.readouterr().out
    call(*arguments, "--query", "test:1", "--top", "2")
    shutil.rmtree(tmp_path / "data")
    refused(capsys, retrieve, *arguments, "--query", "test:2", "--top", "2")
    assert not picture.exists() and list(found_in(tmp_path / "out")) == ["test:2"]


def test_what_the_list_names_can_be_the_next_query(tiny_run, tiny_data, tmp_path, capsys):
    """Paths with spaces too, and test images whose files are gone; the CSV has the query's path and class."""
    (tmp_path / "my data").symlink_to(tiny_data)
    options = ["--top", "1", "--no_picture", "--output", tmp_path]
    test = pd.read_csv(tiny_run / "test.csv")
    for data_path in (tmp_path / "my data", tmp_path):
        call(tiny_run, "--query", "test:3", *options, "--data_path", data_path)
        first = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("   1  "))
        (path,) = shlex.split(first.split("  ")[-1])
        row = found_in(tmp_path)["test:3"].iloc[0]
        assert (row.query_path, row.query_class) == (test.path[3], test.class_name[3])
        call(tiny_run, "--query", path, *options, "--data_path", data_path)
        assert row.path == found_in(tmp_path)[path].query_path[0]
        capsys.readouterr()


def test_the_run_folder_is_left_alone_if_told_so(tiny_run, tmp_path, capsys):
    """Where it cannot be written, the option that names another folder is in the same line."""
    run = copy_run(tiny_run, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}
    call(run, "--worst", "2", "--top", "1", "--export", tmp_path / "x.npy", "--output", tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}
    call(run, "--query", "test:0", "--top", "1")
    assert sorted(path.name for path in (run / "retrieval").iterdir()) == ["neighbours.csv", "neighbours.png"]
    shutil.rmtree(run / "retrieval")
    (run / "retrieval").write_text("in its place")
    assert "; --output names another folder" in refused(capsys, retrieve, run, "--query", "test:0", "--no_picture")
    assert "; --export names another folder" in refused(capsys, retrieve, run, "--export", run / "retrieval" / "x.npy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to do: give --query, --worst or --export"),
        (["--query", "test:36"], "--query: test:36: the test split has 36 images, the first is test:0"),
        (["--worst", "0"], "--worst 0 has to be at least 1"),
        (["--worst", "--query", "test:0"], "--worst is for the test split, without --query and --gallery"),
        (["--query", "test:0", "--gallery", "."], "a gallery of photos needs: pip install lancedb"),
        (["--query", "test:0", "--ann"], "--index, --refresh and --ann are for the photos of --gallery"),
        (["--query", "test:0", "--far", "2"], "--far 2.0 has to be above 0 and at most 1"),
        (["--query", "test:0", "--threshold", "1.5"], "--threshold 1.5 has to be at least -1 and at most 1"),
        (["--export", "--threshold", "-0.5"], "they go with --query or --worst"),
    ],
)
def test_refusals(tiny_run, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, retrieve, tiny_run, *options, "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_embedding_that_is_not_finite(tiny_run, tmp_path, capsys, monkeypatch):
    ensemble = load_ensemble(tiny_run, num_members=1)
    ensemble.std.fill_(torch.nan)
    monkeypatch.setattr(search, "load_ensemble", lambda *_: ensemble)
    save_image(tmp_path / "photo.png")
    arguments = [tiny_run, "--query", tmp_path / "photo.png", "--output", tmp_path, "--num_members", "1"]
    assert retrieve.main([str(argument) for argument in arguments]) == 1
    assert "of some images is not finite" in capsys.readouterr().err


def test_matplotlib_is_needed_for_a_picture_only(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    call(tiny_run, "--export", tmp_path / "x.npy")
    arguments = [tiny_run, "--query", "test:0", "--output", tmp_path]
    assert "a picture needs: pip install matplotlib" in refused(capsys, retrieve, *arguments)
    call(*arguments, "--no_picture")
    assert list(found_in(tmp_path)) == ["test:0"] and not (tmp_path / "neighbours.png").exists()

"""What a run has learned: captions of errors and confusions, near copies, the map."""

import numpy as np
import torch
from builders import random_embeddings, random_image, write_run

from dreml import learned
from dreml.confusions import confusion_table
from dreml.learned import Learned
from dreml.search import Searcher, threshold_at


def test_captions_of_errors_and_confusions(small_run, tmp_path):
    """They are those of the tables, which test_confusions.py compares with the similarities."""
    searcher = Searcher(write_run(tmp_path / "run", small_run, random_embeddings(3)), device="cpu")
    found = Learned(searcher)
    worst = found.errors.iloc[0]
    picture, caption = found.pairs(found.errors)[0]
    assert caption == f"{worst.class_name} | {worst.neighbour_class}   {worst.similarity:.3f}"
    table = confusion_table(found.errors, searcher.run.test)
    captions = [caption for _, caption in found.confusions()]
    assert captions == [
        f"{each.class_name} → {each.neighbour_class}   {each.times} times" for each in table.itertuples()
    ]
    assert picture.size[1] < found.confusions()[0][0].size[1]  # one row of photos, and two


def test_the_histograms_have_the_thresholds_and_say_what_they_are(small_run, tmp_path):
    rows = random_embeddings(0, 1, 200)
    found = Learned(Searcher(write_run(tmp_path / "run", small_run, rows, np.arange(200) % 4), device="cpu"))
    (axes,) = found.histograms().axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("similarity", "queries")
    names = ["of its own class", "of another class", "threshold at 10 %"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == names
    assert axes.lines[0].get_xdata() == [threshold_at(found.queries, 0.1)] * 2


def test_near_copies_under_two_names_are_found(small_run, tmp_path):
    """The same picture saved twice, once as JPEG of low quality; another error of two different pictures is none."""
    rows = torch.eye(6)[[0, 0, 1, 1, 2, 3]]
    labels = np.array([0, 1, 2, 3, 0, 1])
    run = write_run(tmp_path / "run", small_run, [rows.numpy()], labels=labels)
    searcher = Searcher(run, device="cpu", data_path=tmp_path)
    searcher.data_folder.mkdir()
    for number, seed in enumerate([1, 1, 2, 3, 4, 5]):
        path = searcher.data_folder / searcher.run.test.path[number]
        random_image(seed, 60, 60).save(path, "JPEG", quality=95 - 10 * number)
    captions = [caption for _, caption in Learned(searcher).copies()]
    names = searcher.run.test.class_name
    assert captions == [f"{names[0]} | {names[1]}   1.000"]


def test_a_click_on_the_map_finds_the_nearest_point(small_run, tiny_data):
    searcher = Searcher(small_run, device="cpu", data_path=tiny_data)
    found = Learned(searcher)
    for method in learned.MAP_METHODS:
        rows, places = found.map_points(method)
        assert places.min() >= 0 and places.max() <= learned.MAP_SIZE and len(rows) == len(searcher.run.test)
        image, caption = found.at(method, *(places[7] + 0.1))
        assert caption == f"test image 7: {searcher.run.test.class_name[7]}"
        assert image == found.photo(searcher.item(7))


def test_the_recall_is_that_of_the_longer_table(small_run, tmp_path):
    """Of train.py or evaluate.py; one of the other embedding does not count."""
    run = write_run(tmp_path / "run", small_run, random_embeddings(3))
    found = Learned(Searcher(run, device="cpu", embedding="pooled"))
    assert not len(found.recalls())
    for name, sizes in (("recall", 4), ("recall_pooled", 2), ("evaluation_pooled", 3), ("recall_pooled", 1)):
        rows = "".join(f"{size},1{size},2{size}\n" for size in range(1, sizes + 1))
        (run / f"{name}.csv").write_text(f"ensemble_size,R@1,R@2\n{rows}")
    table = found.recalls()
    assert table[table.K == "R@2"].iloc[:, [0, 2]].values.tolist() == [[1, 21], [2, 22], [3, 23]]

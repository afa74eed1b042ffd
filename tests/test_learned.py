"""What a run has learned: errors, classes, confusions and near copies by hand; the map."""

import collections

import numpy as np
import pytest
import torch
from builders import random_embeddings, random_image, write_run

from dreml import learned
from dreml.confusions import class_table
from dreml.learned import Learned
from dreml.runs import read_run
from dreml.search import Searcher


def test_errors_classes_and_confusions_by_hand(small_run, tmp_path):
    """Against every similarity of the test images, one by one."""
    run = read_run(write_run(tmp_path / "run", small_run, random_embeddings(3)))
    members = [rows / rows.norm(dim=1, keepdim=True) for rows in run.embeddings("logits", torch.device("cpu"))]
    rows = torch.cat(members, 1) / 2**0.5
    searcher = Searcher(run.folder, device="cpu")
    found = Learned(searcher)
    labels = run.test.label.to_numpy()
    similarities = (rows @ rows.T).numpy()
    np.fill_diagonal(similarities, -2)
    first = similarities.argmax(1)
    wrong = [row for row in range(len(rows)) if labels[row] != labels[first[row]]]
    wrong.sort(key=lambda row: -similarities[row, first[row]])
    assert searcher.confident_errors.row.tolist() == wrong
    assert searcher.confident_errors.neighbour.tolist() == first[wrong].tolist()
    names = run.test.class_name.to_numpy()
    shares = {name: 100 * np.mean(labels[first[names == name]] == labels[names == name]) for name in set(names)}
    table = class_table(searcher.test_queries)
    assert dict(zip(table.class_name, table["R@1"], strict=True)) == pytest.approx(shares)
    assert table["R@1"].is_monotonic_increasing and table.queries.sum() == len(rows)
    times = collections.Counter(f"{names[row]} → {names[first[row]]}" for row in wrong)
    captions = [caption.removesuffix(" times").split("   ") for _, caption in found.confusions()]
    assert {names: int(number) for names, number in captions} == times
    assert int(captions[0][1]) == max(times.values())
    picture = found.pairs(searcher.confident_errors)[0]
    assert picture[1] == f"{names[wrong[0]]} | {names[first[wrong[0]]]}   {similarities[wrong[0]].max():.3f}"


def test_near_copies_under_two_names_are_found(small_run, tmp_path):
    """The same picture saved twice, once as JPEG of low quality; another error of two different pictures is none."""
    rows = torch.eye(6)[[0, 0, 1, 1, 2, 3]]
    labels = np.array([0, 1, 2, 3, 0, 1])
    run = write_run(tmp_path / "run", small_run, [rows.numpy()], labels=labels)
    searcher = Searcher(run, device="cpu")
    searcher.data_path = tmp_path
    searcher.data_folder.mkdir()
    for number, seed in enumerate([1, 1, 2, 3, 4, 5]):
        path = searcher.data_folder / searcher.test.path[number]
        random_image(seed, 60, 60).save(path, "JPEG", quality=95 - 10 * number)
    captions = [caption for _, caption in Learned(searcher).copies()]
    names = searcher.test.class_name
    assert captions == [f"{names[0]} | {names[1]}   1.000"]


def test_a_click_on_the_map_finds_the_nearest_point(small_run, tiny_data):
    searcher = Searcher(small_run, device="cpu")
    searcher.data_path = tiny_data
    found = Learned(searcher)
    for method in learned.MAP_METHODS:
        rows, places = found.map_points(method)
        assert places.min() >= 0 and places.max() <= learned.MAP_SIZE and len(rows) == len(searcher.test)
        image, caption = found.at(method, *(places[7] + 0.1))
        assert caption == f"test image 7: {searcher.test.class_name[7]}"
        assert image == found.photo(searcher.item(searcher.test, 7))

"""approximate.py: the search by Lance's vector index, and its recall."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from builders import queries_of, refused, save_colors

import retrieve
from dreml.approximate import ApproximateSearch
from dreml.cli import InputError
from dreml.search import find_neighbours

pytest.importorskip("lancedb", reason="LanceDB is an extra: pip install lancedb")


def test_approximate_search(indexed, tmp_path, capsys):
    """Finds nearly all of what exact search finds, prints how much, and stays right when photos come and go."""
    with pytest.raises(InputError, match=r"--ann needs at least 1,000 photos, .* has 0: search without --ann"):
        ApproximateSearch(indexed.index(), may_build=True)
    names = [f"dog/{number}.png" for number in range(1100)]
    save_colors(indexed.photos, names, seed=3)
    indexed.refresh(2000)
    with pytest.raises(InputError, match="has no vector index yet"):
        ApproximateSearch(indexed.index(), may_build=False)
    queries, rows = queries_of(indexed, tmp_path)
    for number in range(2):
        approximate, photos = ApproximateSearch(indexed.index(), may_build=number == 0), indexed.index().photos()
        found, exact = approximate.find(queries, rows, 8), find_neighbours(queries, rows, photos, photos.vectors, 8)
        assert [each.query for each in found] == [each.query for each in exact]
        shared = [
            len({item.file for item in one.neighbours} & {item.file for item in other.neighbours})
            for one, other in zip(found, exact, strict=True)
        ]
        assert sum(shared) >= 22
        capsys.readouterr()
        for top in (8, 100):  # more than the vector index has in view unless it is told
            approximate.print_recall(top)
            (recall,) = re.findall(rf"recall@{top} (\d\.\d{{4}}) against exact", capsys.readouterr().out)
            assert float(recall) > 0.95
        for name in names[:300]:
            (indexed.photos / name).unlink(missing_ok=True)
        save_colors(indexed.photos, [f"dog/new{number}.png" for number in range(250)], seed=4)
        indexed.refresh(2000)


def test_the_printed_recall_is_the_share_that_is_found(indexed, monkeypatch, capsys):
    """By a search that gives only every second neighbour, and is measured once for a state of the table."""
    save_colors(indexed.photos, [f"dog/{number}.png" for number in range(1100)], seed=3)
    indexed.refresh(2000)
    index = indexed.index()
    photos, asked = index.photos(), []

    def every_second(self, vector, top):
        asked.append(1)
        order = torch.argsort(photos.vectors @ vector, descending=True)
        kept = torch.cat([order[:1], order[1 : 4 * top : 2]]).tolist()
        paths, numbers = [photos.paths[row] for row in kept], np.array(kept)
        return type(photos)(photos.folder, paths, photos.sizes[numbers], photos.mtimes[numbers], photos.vectors[kept])

    monkeypatch.setattr(ApproximateSearch, "has_vector_index", lambda self: True)
    monkeypatch.setattr(ApproximateSearch, "candidates", every_second)
    for _ in range(2):
        ApproximateSearch(index, may_build=True).print_recall(10)
        assert "recall@10 0.5000 against exact search" in capsys.readouterr().out
    assert len(asked) == 100
    ApproximateSearch(index, may_build=True).print_recall(4)
    assert "recall@4 0.50" in capsys.readouterr().out and len(asked) == 200


def test_the_command_line_of_approximate_search(small_run, tmp_path, capsys):
    """The recall is printed; an index that is searched as it is stays as it is."""
    save_colors(tmp_path / "photos", [f"{number % 9}/{number}.png" for number in range(1000)])
    options = [str(small_run), "--query", "test:0", "test:7", "--top", "4", "--no_picture", "--output", str(tmp_path)]
    options += ["--gallery", str(tmp_path / "photos"), "--index", str(tmp_path / "index")]
    assert retrieve.main(options) == 0
    exact = pd.read_csv(tmp_path / "neighbours.csv")
    assert "no vector index yet" in refused(capsys, retrieve, *options, "--ann", "--refresh", "never")
    assert retrieve.main([*options, "--ann"]) == 0
    found, printed = pd.read_csv(tmp_path / "neighbours.csv"), capsys.readouterr().out
    assert found["query"].tolist() == exact["query"].tolist() and len(set(found.path) & set(exact.path)) >= 6
    assert re.search(r"approximate: recall@4 [01]\.\d{4} against exact search", printed)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")}
    assert retrieve.main([*options, "--ann", "--refresh", "never", "--top", "3"]) == 0
    assert "recall@3" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")} == before

"""evaluate.py: scores from saved embeddings, groups of seeds, the files it writes, refusals."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from builders import CLASS_NAMES, LABELS, copy_run, queries_of, random_embeddings, refused, write_run
from PIL import Image
from reference import slow_best_similarities, slow_map, slow_recall

import evaluate
from dreml.runs import read_run, run_lock

EVERY = np.ones(len(LABELS), bool)


def scores_in(folder: Path, name: str = "evaluation") -> np.ndarray:
    return pd.read_csv(folder / f"{name}.csv").iloc[:, 1:].to_numpy()


def score(*arguments: object) -> None:
    """Run evaluate.py. It has to succeed."""
    assert evaluate.main([str(argument) for argument in arguments]) == 0


def test_a_trained_run(tiny_run, tmp_path, capsys):
    """The recall is that of training; what is printed is what is written; the run folder stays as it was."""
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    output = tmp_path / "new" / "folder"
    score(tiny_run, "--recalls", "1,4", "--output", output)
    assert before == {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    sizes, alone = (pd.read_csv(output / f"{name}.csv") for name in ("evaluation", "members"))
    assert list(sizes.columns) == ["ensemble_size", "R@1", "R@4", "mAP@R", "R-Precision"]
    assert list(alone.columns) == ["member", *sizes.columns[1:]]
    pd.testing.assert_frame_equal(sizes.iloc[:, :3], pd.read_csv(tiny_run / "recall.csv"))
    *_, header, first, second, note = capsys.readouterr().out.splitlines()[:-3]
    assert note == "(alone: R@1 of the last member of the row by itself)"
    assert header.split() == [*sizes.columns, "alone"]
    printed = np.array([first.split(), second.split()], float)
    np.testing.assert_allclose(printed, np.column_stack([sizes, alone["R@1"]]), atol=0.0051)


def test_scores_are_those_of_the_definition(tiny_run, tmp_path):
    """Queries, gallery, labels, members and their order reach the scores: all differ. Written into the run folder."""
    masks = np.random.default_rng(5).random((2, len(LABELS))) < 0.7
    members = random_embeddings(0, 3)
    folder = write_run(tmp_path / "run", tiny_run, members, LABELS, *masks)
    score(folder, "--recalls", "1,2")
    for name, ensembles in (("evaluation", [members]), ("members", [[member] for member in members])):
        rows = []
        for ensemble in ensembles:
            recalls = slow_recall(ensemble, LABELS, [1, 2], *masks)
            rows.append(np.column_stack([recalls, *slow_map(ensemble, LABELS, *masks)]))
        np.testing.assert_allclose(scores_in(folder, name), 100 * np.concatenate(rows), atol=5e-5)


def test_queries_without_a_match(tiny_run, tmp_path):
    """One image alone in its class: a miss for Recall@K, left out of mAP@R."""
    members = [np.repeat(np.eye(3, dtype=np.float32), [2, 2, 1], axis=0)]
    folder = write_run(tmp_path / "run", tiny_run, members, np.array([0, 0, 1, 1, 2]))
    score(folder, "--recalls", "1,2")
    np.testing.assert_allclose(scores_in(folder), [[80, 80, 100, 100]])


@pytest.mark.parametrize(("name", "ks"), [("tiny", [1, 2, 4, 8]), ("isc", [1, 10, 20, 30])])
def test_default_recalls(tiny_run, tmp_path, name, ks):
    run = write_run(tmp_path / "r", tiny_run, random_embeddings(0, 1, 32), np.arange(32) // 16, data_name=name)
    score(run)
    assert list(pd.read_csv(run / "evaluation.csv").columns[1:-2]) == [f"R@{k}" for k in ks]


def test_all_runs_are_checked_before_any_is_scored(tiny_run, tmp_path, capsys):
    few = write_run(tmp_path / "few", tiny_run, [np.eye(3, dtype=np.float32)], np.zeros(3, int), seed=5)
    message = refused(capsys, evaluate, tiny_run, few, "--recalls", "1,3", "--output", tmp_path / "out")
    assert f"--recalls: 3 is not below the number of gallery images of {few}, 3" in message
    assert not (tmp_path / "out").exists()


def test_fewer_members_and_the_pooled_embedding(tiny_run, tmp_path):
    """The pooled embedding has files of its own."""
    pooled = random_embeddings(7, 3)
    folder = write_run(tmp_path / "run", tiny_run, random_embeddings(0, 3), pooled=pooled)
    (folder / "member_001.npy").unlink()
    score(folder, "--recalls", "1", "--embedding", "pooled", "--num_members", "2")
    names = ("classes", "confusions", "evaluation", "members", "thresholds")
    assert sorted(path.name for path in folder.glob("*_pooled.csv")) == [f"{name}_pooled.csv" for name in names]
    assert len(list(folder.glob("*.csv"))) == len(names) + 1  # and test.csv
    expected = 100 * slow_recall(pooled[:2], LABELS, [1])
    np.testing.assert_allclose(scores_in(folder, "evaluation_pooled")[:, 0], expected[:, 0], atol=5e-5)


def test_classes_and_confusions_by_hand(tiny_run, tmp_path):
    """The worst class and the most frequent confusion first, with its surest example. A lone class has no confusion."""
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2, 3])
    angles = np.deg2rad([0, 10, 50, 12, 56, 9, 200, 201, 300])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    folder = write_run(tmp_path / "run", tiny_run, [rows], labels)
    score(folder, "--recalls", "1")
    # 0 is nearest to 9 degrees, 10 to 9, 50 to 56: three of class 0. 12 is nearest to 10, 56 to 50, 9 to 10: class 1.
    a, b, c, d = CLASS_NAMES
    classes, confusions = (pd.read_csv(folder / f"{name}.csv") for name in ("classes", "confusions"))
    assert classes.values.tolist() == [[a, 3, 0], [b, 3, 0], [d, 1, 0], [c, 2, 100]]
    assert confusions.values.tolist() == [[a, b, 3, "1.png", "5.png"], [b, a, 3, "5.png", "1.png"]]


def test_thresholds_are_those_of_the_definition(tiny_run, tmp_path, capsys):
    """Of the similarities by the definition. Of too few queries, none is told."""
    labels, members = np.arange(150) % 5 % 4, random_embeddings(3, 2, 150)
    masks = np.arange(150) % 3 > 0, np.arange(150) % 7 > 0
    folder = write_run(tmp_path / "run", tiny_run, members, labels, *masks)
    score(folder)
    table = pd.read_csv(folder / "thresholds.csv")
    other, own = slow_best_similarities(members, labels, *masks)
    queries = pd.DataFrame({"own": own, "other": other, "right": other < own - 1e-6})
    pd.testing.assert_frame_equal(table, evaluate.threshold_table(queries, masks[1].sum()), atol=2e-6)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    row = lines[lines.index(["far", "threshold", "found", "queries", "gallery"]) + 1]
    assert [float(value) for value in row] == pytest.approx(table.iloc[0].tolist(), abs=6e-5)


def test_found_are_right_first_neighbours_at_or_above_the_threshold(monkeypatch):
    """What is right counts, and no similarity alone: a tie is more similar by less than the tolerance."""
    queries = queries_of(np.array([0.2, 0.8, 0.5, 0.1, -np.inf]), np.array([0.6, 0.7, 0.5 + 2e-7, 0.2999997, 0.4]))
    queries.loc[2, "right"] = False
    for threshold, expected in ((-1.0, 3), (0.3, 3), (0.300001, 2), (0.6, 1), (0.600001, 0)):
        monkeypatch.setattr(evaluate, "threshold_at", lambda *_, threshold=threshold: threshold)
        assert evaluate.threshold_table(queries, 5).found[0] == pytest.approx(100 * expected / 5)


def test_the_table_has_a_row_for_each_rate():
    generator = np.random.default_rng(0)
    queries = queries_of(generator.random(1000), generator.random(1000))
    table = evaluate.threshold_table(queries, 77)
    assert (table.queries == 1000).all() and (table.gallery == 77).all()
    assert table.far.tolist() == [0.1, 0.01]
    for row in table.itertuples():
        assert (queries.other.round(6) >= row.threshold).mean() == pytest.approx(row.far)
        assert row.found == pytest.approx(100 * (queries.right & (queries.own.round(6) >= row.threshold)).mean())


def test_a_test_split_that_is_too_small_has_no_threshold(tiny_run, tmp_path, capsys):
    folder = write_run(tmp_path / "run", tiny_run, random_embeddings(0))
    score(folder, "--recalls", "1")
    assert "\nno threshold at 0.1 or less: 12 queries are too few\n" in capsys.readouterr().out
    assert (folder / "thresholds.csv").read_text() == "far,threshold,found,queries,gallery\n"


def test_runs_are_compared_with_all_their_members_best_first(tiny_run, tmp_path, capsys):
    """Two seeds of one setting at the size that both have; one network; three members."""
    plan = {"r_s0_x": (0, 3, 12), "r_s7_x": (7, 2, 12), "r_D3_s0": (0, 1, 3), "r_D4_s0": (0, 3, 4)}
    sizes = {"r_s*_x": 2, "r_D3_s0": 1, "r_D4_s0": 3}
    runs, scores = [], {}
    for number, (name, (seed, size, meta_classes)) in enumerate(plan.items()):
        members = random_embeddings(number, size)
        folder = tmp_path / "results" / name
        runs.append(write_run(folder, tiny_run, members, seed=seed, meta_class_size=meta_classes))
        maps = slow_map(members, LABELS, EVERY, EVERY)[0]
        recalls = slow_recall(members, LABELS, [1, 2])
        common = sizes.get(name, 2)
        scores[name] = 100 * np.array([*recalls[common - 1], maps[common - 1]])
    output = tmp_path / "compared"
    score(*runs, "--recalls", "1,2", "--output", output)
    out = capsys.readouterr().out
    pair = np.array([scores["r_s0_x"], scores["r_s7_x"]])
    scores["r_s*_x"] = pair.mean(0)
    expected = sorted(sizes, key=lambda name: -scores[name][2])
    table = pd.read_csv(output / "comparison.csv", dtype={"seeds": str}).set_index("run")
    assert table.index.tolist() == expected and table.ensemble_size.to_dict() == sizes
    assert table.seeds["r_s*_x"] == "0 7" and table.n.to_dict() == dict.fromkeys(sizes, 1) | {"r_s*_x": 2}
    for name, row in table[["R@1", "R@2", "mAP@R"]].iterrows():
        np.testing.assert_allclose(row, scores[name], atol=5e-5)
    std = abs(pair[0] - pair[1]) / np.sqrt(2)  # of two values, with n - 1
    of_std = [name for name in table if name.endswith("_std")]
    np.testing.assert_allclose(table.loc["r_s*_x", of_std[:3]].astype(float), std, atol=5e-5)
    assert table.drop("r_s*_x")[of_std].isna().all(axis=None)
    assert "by mAP@R, best first" in out and f"{pair[:, 0].mean():.2f} ± {std[0]:.2f}" in out
    printed = [line.split()[0] for line in out.splitlines() if line.split()[:1] and line.split()[0] in scores]
    assert printed == expected
    assert [len(scores_in(output / name)) for name in plan] == [3, 2, 1, 3]
    assert not list((tmp_path / "results").rglob("evaluation.csv"))


@pytest.mark.filterwarnings("error")  # pandas warns where no run has another seed, unless it is asked otherwise
def test_without_output_the_comparison_is_only_printed(tiny_run, tmp_path, capsys, monkeypatch):
    """Runs of one name would overwrite each other's files with --output, and do not without."""
    runs = [write_run(tmp_path / f"{seed}" / "r", tiny_run, random_embeddings(seed), lr=seed + 1.0) for seed in (0, 1)]
    assert "have the same name" in refused(capsys, evaluate, *runs, "--output", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    score(*runs, "--recalls", "1")
    assert capsys.readouterr().out.endswith("(--output DIR writes this table)\n")
    assert all((folder / "evaluation.csv").exists() for folder in runs) and not list(tmp_path.rglob("comparison*"))


def test_runs_of_one_setting_and_data_set_are_a_group(tiny_run, tmp_path):
    different = [{}, {"seed": 1}, {"meta_class_size": 5}, {"meta_class_size": 5, "lr": 0.5}]
    runs = []
    for number, settings in enumerate(different):
        folder = write_run(tmp_path / str(number), tiny_run, random_embeddings(0, 1), **settings)
        runs.append(read_run(folder, None, "logits"))
    groups = evaluate.group_by_settings(runs)
    assert [[run.name for run in group] for group in groups] == [["0", "1"], ["2"], ["3"]]
    data = dataclasses.replace(runs[0].record.data, fingerprint="0123456789")
    runs[1].record = dataclasses.replace(runs[1].record, data=data)
    assert [len(group) for group in evaluate.group_by_settings(runs[:2])] == [1, 1]  # other data


def test_the_figure_is_drawn_as_png_and_svg(tiny_run, tmp_path):
    """The same bytes each time."""
    drawn = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        score(tiny_run, "--recalls", "1,2,4", "--plot", "--output", folder)
        drawn.append({path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".csv"})
    assert drawn[0] == drawn[1]
    assert sorted(drawn[0]) == ["evaluation.png", "evaluation.svg"]
    assert Image.open(tmp_path / "one" / "evaluation.png").width == round(300 * 3.4)  # a column at 300 dpi


def test_matplotlib_is_imported_for_figures_only(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    score(tiny_run, "--recalls", "1", "--output", tmp_path)
    assert "--plot needs: pip install matplotlib" in refused(capsys, evaluate, tiny_run, "--plot", "--output", tmp_path)


def test_the_run_is_locked_while_its_folder_is_written(tiny_run, tmp_path, monkeypatch):
    """Also by a link; train.py removes temporary files there. Another folder needs no lock."""
    folder = copy_run(tiny_run, tmp_path / "run")
    (tmp_path / "link").symlink_to(folder)
    locked = []
    monkeypatch.setattr(evaluate, "run_lock", lambda folder: locked.append(folder) or run_lock(folder))
    for arguments in ([tmp_path / "link"], [folder, "--output", tmp_path / "link"], [folder, "--output", tmp_path]):
        score(*arguments, "--recalls", "1")
    assert locked == [folder, folder]


def test_what_is_refused(tiny_run, tmp_path, capsys):
    """More about run folders is in test_runs.py."""
    assert "is not a run folder" in refused(capsys, evaluate, tiny_run, tmp_path / "nothing")
    assert "member 3 of 3 is missing" in refused(capsys, evaluate, tiny_run, "--num_members", "3")
    assert "invalid choice: 'pixels'" in refused(capsys, evaluate, tiny_run, "--embedding", "pixels")
    assert "RUN_FOLDER" in refused(capsys, evaluate)
    assert "device 'gpu' is not there" in refused(capsys, evaluate, tiny_run, "--device", "gpu")
    for other in (tiny_run, copy_run(tiny_run, tmp_path / "run")):
        assert "are the same run, seed 0: give one" in refused(capsys, evaluate, tiny_run, other)


def test_a_folder_that_cannot_be_written(tiny_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(capsys, evaluate, tiny_run, "--recalls", "1", "--output", tmp_path / "file")
    blocked = copy_run(tiny_run, tmp_path / "run")
    for folder, problem in ((blocked / "evaluation.csv", str(blocked)), (tmp_path / ".run.lock", ".run.lock")):
        folder.unlink(missing_ok=True)
        folder.mkdir()
        message = refused(capsys, evaluate, blocked, "--recalls", "1")
        assert problem in message and "--output names another folder" in message

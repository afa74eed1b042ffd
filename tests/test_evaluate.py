"""Scores from saved embeddings: tables, groups of seeds, figures, refusals."""

import hashlib
import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_utils import slow_map, slow_recall

import evaluate
import train
from utils import MEMBER_RECORD, RUN_RECORD, member_file, read_record, write_record

LABELS = np.repeat(np.arange(4), [4, 3, 3, 2])
NAMES = np.array(["Ünï", "猫", "a,b", "d $x$"], dtype=object)


def random_parts(seed: int, num_members: int = 2, num_images: int = len(LABELS)) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(num_images, 3)).astype(np.float32) for _ in range(num_members)]


def write_run(
    folder: Path,
    like: Path,
    parts: list[np.ndarray],
    labels: np.ndarray = LABELS,
    is_query: np.ndarray | None = None,
    is_gallery: np.ndarray | None = None,
    **settings,
) -> Path:
    """A finished run with these members' embeddings and changed settings; its weights are no weights."""
    folder.mkdir(parents=True)
    record = read_record(like / "args.json", RUN_RECORD)
    record["settings"] |= settings
    write_record(folder / "args.json", record)
    every = np.ones(len(labels), bool)
    table = {"path": [f"{number}.png" for number in range(len(labels))], "label": labels}
    table |= {"is_query": every if is_query is None else is_query}
    table |= {"is_gallery": every if is_gallery is None else is_gallery, "class_name": NAMES[labels]}
    pd.DataFrame(table).to_csv(folder / "test.csv", index=False)
    for number, part in enumerate(parts, 1):
        member = read_record(like / "member_001.json", MEMBER_RECORD)
        files = [folder / member_file(number, suffix) for suffix in ("pth", "npy")]
        files[0].write_bytes(b"no weights")
        np.save(files[1], part)
        member |= {"member": number, "run": train.run_identity(record)}
        member["sha256"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        write_record(folder / member_file(number, "json"), member)
    return folder


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder, ignore=lambda *_: ["retrieval"]))


def scores_of(folder: Path, name: str = "evaluation") -> np.ndarray:
    return pd.read_csv(folder / f"{name}.csv").iloc[:, 1:].to_numpy()


def refused(capsys, script, *arguments: str | Path) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert script.main([str(argument) for argument in arguments]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "Traceback" not in line
    return line


# ------------------------------------------------------------------------------------------------ one run


def test_a_trained_run(tiny_run, tmp_path, capsys):
    """The recall is that of training; what is printed is what is written; the run folder stays as it was."""
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    assert evaluate.main([str(tiny_run), "--recalls", "1,4", "--output", str(tmp_path / "new" / "folder")]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    sizes, alone = (pd.read_csv(tmp_path / "new" / "folder" / f"{name}.csv") for name in ("evaluation", "members"))
    assert list(sizes.columns) == ["ensemble_size", "R@1", "R@4", "mAP@R", "R-Precision"]
    assert list(alone.columns) == ["member", *sizes.columns[1:]]
    pd.testing.assert_frame_equal(sizes.iloc[:, :3], pd.read_csv(tiny_run / "recall.csv"))
    np.testing.assert_array_equal(alone.iloc[0, 1:], sizes.iloc[0, 1:])
    header, first, second = capsys.readouterr().out.splitlines()[1:4]
    assert header.split() == [*sizes.columns, "alone"]
    printed = np.array([first.split(), second.split()], float)
    np.testing.assert_allclose(printed, np.column_stack([sizes, alone["R@1"]]), atol=0.0051)


def test_scores_are_those_of_the_definition(tiny_run, tmp_path):
    """Queries, gallery, labels, members and their order reach the scores: all differ. Written into the run folder."""
    generator = np.random.default_rng(5)
    is_query, is_gallery = generator.random((2, len(LABELS))) < 0.7
    parts = random_parts(0, 3)
    folder = write_run(tmp_path / "run", tiny_run, parts, LABELS, is_query, is_gallery)
    assert evaluate.main([str(folder), "--recalls", "1,2"]) == 0
    for name, of_rows in (("evaluation", [parts]), ("members", [[part] for part in parts])):
        rows = []
        for some in of_rows:
            recalls = slow_recall(some, LABELS, [1, 2], is_query, is_gallery)
            rows.append(np.column_stack([recalls, *slow_map(some, LABELS, is_query, is_gallery)]))
        np.testing.assert_allclose(scores_of(folder, name), 100 * np.concatenate(rows), atol=5e-5)


def test_queries_without_a_match_are_named_once(tiny_run, tmp_path, capsys):
    """One lone class: a miss for Recall@K, left out of mAP@R."""
    labels = np.array([0, 0, 1, 1, 2])
    parts = [np.repeat(np.eye(3, dtype=np.float32), [2, 2, 1], axis=0)]
    folder = write_run(tmp_path / "run", tiny_run, parts, labels)
    assert evaluate.main([str(folder), "--recalls", "1,2"]) == 0
    out, err = capsys.readouterr()
    assert out.count("1 queries have no other image of their class in the gallery") == 1 and err == ""
    np.testing.assert_allclose(scores_of(folder), [[80, 80, 100, 100]])


def test_lone_queries():
    table = {"label": [0, 0, 1, 2, 2, 3], "is_query": [1, 1, 1, 1, 0, 0], "is_gallery": [1, 0, 1, 1, 0, 1]}
    test = pd.DataFrame({name: np.array(of, bool if name != "label" else int) for name, of in table.items()})
    run = evaluate.Run(Path(), {}, None, 1, test)
    assert run.truth.lone_queries().tolist() == [True, False, True, True, False, False]


@pytest.mark.parametrize(("name", "ks"), [("tiny", [1, 2, 4, 8]), ("isc", [1, 10, 20, 30])])
def test_default_recalls(tiny_run, tmp_path, name, ks):
    labels = np.repeat([0, 1], 16)
    folder = write_run(tmp_path / "run", tiny_run, random_parts(0, 1, 32), labels, data_name=name)
    assert evaluate.main([str(folder)]) == 0
    assert list(pd.read_csv(folder / "evaluation.csv").columns[1:-2]) == [f"R@{k}" for k in ks]


def test_a_comparison_with_isc_has_the_recalls_of_the_others(tiny_run, tmp_path, capsys):
    runs = [write_run(tmp_path / name, tiny_run, random_parts(1), data_name=name) for name in ("isc", "tiny")]
    assert evaluate.main([*map(str, runs)]) == 0
    assert "R@20" not in capsys.readouterr().out


def test_an_interruption_promises_nothing(tiny_run, tmp_path, capsys, monkeypatch):
    """There is nothing to go on with: a second run computes all of it again."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "scores", interrupted)
    assert evaluate.main([str(tiny_run), "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "evaluate.py: interrupted\n"


def test_weights_are_not_needed(tiny_run, tmp_path):
    folder = copy_of(tiny_run, tmp_path / "run")
    for path in folder.glob("*.pth"):
        path.unlink()
    assert evaluate.main([str(folder), "--recalls", "1"]) == 0 and len(scores_of(folder)) == 2


def test_all_runs_are_checked_before_any_is_scored(tiny_run, tmp_path, capsys):
    few = write_run(tmp_path / "few", tiny_run, [np.eye(3, dtype=np.float32)], np.zeros(3, int), seed=5)
    message = refused(capsys, evaluate, tiny_run, few, "--output", tmp_path / "out")
    assert f"--recalls: 8 is not below the number of gallery images of {few}, 3" in message
    assert not (tmp_path / "out").exists()


def test_names_that_the_terminal_lacks(tiny_run, tmp_path, monkeypatch):
    folder = copy_of(tiny_run, tmp_path / "ünï")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert evaluate.main([str(folder), "--recalls", "1"]) == 0
    out.flush()
    assert rb"\xfcn\xef" in out.buffer.getvalue()


def test_fewer_members(tiny_run, tmp_path):
    parts = random_parts(1, 3)
    folder = write_run(tmp_path / "run", tiny_run, parts)
    assert evaluate.main([str(folder), "--recalls", "1", "--num_members", "2"]) == 0
    expected = 100 * slow_recall(parts[:2], LABELS, [1])
    np.testing.assert_allclose(scores_of(folder)[:, 0], expected[:, 0], atol=5e-5)


def test_members_up_to_the_first_that_is_missing(tiny_run, tmp_path, capsys):
    folder = write_run(tmp_path / "run", tiny_run, random_parts(1, 3))
    (folder / "member_002.json").unlink()
    assert evaluate.main([str(folder), "--recalls", "1"]) == 0
    assert len(scores_of(folder)) == 1
    message = refused(capsys, evaluate, folder, "--num_members", "2")
    assert f"--num_members 2: {folder} has 1, member 2 is missing" in message
    (folder / "member_001.json").unlink()
    assert "member 1 is missing" in refused(capsys, evaluate, folder)


def test_the_pooled_embedding_has_files_of_its_own(tiny_run, tmp_path, monkeypatch):
    folder, parts = write_run(tmp_path / "run", tiny_run, random_parts(0)), random_parts(7)
    asked = []

    def saved_parts(*arguments):
        asked.append(arguments[2:4])
        return [torch.from_numpy(part) for part in parts]

    monkeypatch.setattr(evaluate, "saved_parts", saved_parts)
    monkeypatch.setattr("evaluate.Run.check", lambda *_: None)
    assert evaluate.main([str(folder), "--recalls", "1", "--embedding", "pooled"]) == 0
    assert asked == [(2, "pooled")] and not (folder / "evaluation.csv").exists()
    expected = 100 * slow_recall(parts, LABELS, [1])
    np.testing.assert_allclose(scores_of(folder, "evaluation_pooled")[:, 0], expected[:, 0], atol=5e-5)
    assert len(scores_of(folder, "members_pooled")) == 2


# ------------------------------------------------------------------------------------------------ several runs


def test_runs_that_differ_in_their_seed_are_averaged(tiny_run, tmp_path, capsys):
    """Two seeds of one setting and another setting, at the largest size that all have: two members."""
    members = {"r_s0_x": (0, 3, 12), "r_s7_x": (7, 2, 12), "r_D3_s0": (0, 2, 3)}
    runs, recalls, parts = [], {}, {}
    for number, (name, (seed, size, meta_classes)) in enumerate(members.items()):
        parts[name] = random_parts(number, size)
        path = tmp_path / "results" / name
        runs.append(write_run(path, tiny_run, parts[name], seed=seed, meta_class_size=meta_classes))
        recalls[name] = 100 * slow_recall(parts[name], LABELS, [1, 2])[1]
    before = {path.name for path in (tmp_path / "results").rglob("*")}
    output = tmp_path / "compared"
    assert evaluate.main([*map(str, runs), "--recalls", "1,2", "--output", str(output)]) == 0
    assert before == {path.name for path in (tmp_path / "results").rglob("*")}
    table = pd.read_csv(output / "comparison.csv", dtype={"seeds": str})
    assert table.run.tolist() == ["r_s*_x", "r_s0_x", "r_s7_x", "r_D3_s0"]
    assert table.seeds.tolist() == ["0 7", "0", "7", "0"] and table.n.tolist() == [2, 1, 1, 1]
    assert table.ensemble_size.tolist() == [2] * 4
    pair = np.array([recalls["r_s0_x"], recalls["r_s7_x"]])
    expected = [pair.mean(0), *pair, recalls["r_D3_s0"]]
    np.testing.assert_allclose(table[["R@1", "R@2"]], expected, atol=5e-5)
    std = abs(pair[0] - pair[1]) / np.sqrt(2)  # of two values, with n - 1
    np.testing.assert_allclose(table.loc[0, ["R@1_std", "R@2_std"]].astype(float), std, atol=5e-5)
    assert table.loc[1:, [name for name in table if name.endswith("_std")]].isna().all(axis=None)
    assert f"{pair[:, 0].mean():.2f} ± {std[0]:.2f}" in capsys.readouterr().out
    for name in members:
        assert len(scores_of(output / name)) == len(parts[name])


def test_the_comparison_is_drawn(tiny_run, tmp_path, monkeypatch):
    """A curve for each group in its colour."""
    monkeypatch.setattr(evaluate, "write_results", lambda *_: None)
    settings = [{"seed": 0}, {"seed": 1}, {"num_epochs": 7}]
    runs = [write_run(tmp_path / str(n), tiny_run, random_parts(n), **of_run) for n, of_run in enumerate(settings)]
    assert evaluate.main([*map(str, runs), "--recalls", "1", "--plot", "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"comparison.{s}" for s in ("csv", "png", "svg")
    ]
    picture = tmp_path / "out" / "comparison.png"
    assert [has_color(picture, color) for color in evaluate.COLORS[:3]] == [True, True, False]


def test_without_output_the_comparison_is_only_printed(tiny_run, tmp_path, capsys, monkeypatch):
    runs = [write_run(tmp_path / f"r_s{seed}", tiny_run, random_parts(seed), seed=seed) for seed in (0, 1)]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert evaluate.main([*map(str, runs), "--recalls", "1"]) == 0
    assert "r_s*   0 1  2" in capsys.readouterr().out
    assert all((folder / "evaluation.csv").exists() for folder in runs)
    assert not list(tmp_path.rglob("comparison*"))


def test_legends_say_what_differs(tiny_run, tmp_path):
    different = [{}, {"seed": 1}, {"meta_class_size": 5}, {"meta_class_size": 5, "lr": 0.5}]
    runs = [
        evaluate.read_run(write_run(tmp_path / str(number), tiny_run, random_parts(0, 1), **settings))
        for number, settings in enumerate(different)
    ]
    groups = evaluate.grouped(runs)
    assert groups == [[0, 1], [2], [3]]
    labels = evaluate.group_labels([[runs[number] for number in numbers] for numbers in groups])
    expected = ["meta_class_size 3, lr 0.001 (2 seeds)", "meta_class_size 5, lr 0.001", "meta_class_size 5, lr 0.5"]
    assert labels == expected
    runs[2].record["settings"] = runs[0].settings
    runs[2].record["data"]["fingerprint"] = "0123456789"
    assert evaluate.grouped(runs[1:3]) == [[0], [1]]  # other data
    assert evaluate.group_labels([[runs[0]], [runs[2]]])[1] == "cache 01234567"


# ------------------------------------------------------------------------------------------------ figures


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)


def has_color(path: Path, color: str) -> bool:
    wanted = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)])
    return bool((abs(pixels(path).astype(int) - wanted).max(1) < 8).sum() > 20)


def test_figures_are_drawn_as_png_and_svg(tiny_run, tmp_path):
    """A curve for each K in its colour, in the picture and in the file for papers; the same bytes each time."""
    drawn = []
    for name in ("one", "two"):
        arguments = [str(tiny_run), "--recalls", "1,2,4", "--plot", "--output", str(tmp_path / name)]
        assert evaluate.main(arguments) == 0
        drawn.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.suffix != ".csv"})
    assert drawn[0] == drawn[1]
    assert sorted(drawn[0]) == ["evaluation.png", "evaluation.svg", "training.png", "training.svg"]
    picture = tmp_path / "one" / "evaluation.png"
    assert [has_color(picture, color) for color in evaluate.COLORS[:5]] == [True, True, True, False, False]
    assert Image.open(picture).width == round(300 * 3.4)  # a column at 300 dpi


def test_the_curves_show_the_tables(tiny_run):
    sizes = pd.DataFrame({"ensemble_size": [1, 2, 3], "R@1": [10.0, 20, 30], "R@5": [40.0, 50, 60], "mAP@R": [1.0] * 3})
    alone = pd.DataFrame({"member": [1, 2, 3], "R@1": [10.0, 14, 12], "R@5": [0.0] * 3})
    with evaluate.drawing():
        axes = evaluate.draw_recall(sizes, alone).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["R@1", "R@5", "each member alone, R@1", "their mean, 12.0 %"]
    assert lines["R@5"].get_xydata().tolist() == [[1, 40], [2, 50], [3, 60]]
    assert lines["each member alone, R@1"].get_xydata().tolist() == [[1, 10], [2, 14], [3, 12]]
    styles = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in list(lines.values())[:2]]
    assert all(first != second for first, second in zip(*styles, strict=True))
    assert axes.get_xlabel() == "ensemble size (members)" and axes.get_ylabel() == "Recall@K (%)"


def test_training_curves_show_the_histories(tiny_run):
    run = evaluate.read_run(tiny_run)
    with evaluate.drawing():
        loss, accuracy = evaluate.draw_training(run).axes
    histories = [pd.DataFrame(run.members.records[member]["history"]) for member in (1, 2)]
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        curves = [line.get_ydata() for line in axes.lines]
        assert [len(curve) for curve in curves] == [2, 1, 2, 1, 2]  # each member, its best epoch; the mean
        np.testing.assert_allclose(curves[0], histories[0][name])
        np.testing.assert_allclose(curves[2], histories[1][name])
        np.testing.assert_allclose(curves[4], (histories[0][name] + histories[1][name]) / 2)
        best = [records["best_epoch"] for _, records in sorted(run.members.records.items())]
        assert [float(curves[place][0]) for place in (1, 3)] == [
            history[name][epoch] for history, epoch in zip(histories, best, strict=True)
        ]


@pytest.mark.parametrize("size", [1, 48])
def test_small_and_large_ensembles_have_whole_numbers_at_the_axis(size):
    values = {"ensemble_size": range(1, size + 1), "R@1": np.linspace(30, 80, size)}
    with evaluate.drawing():
        figure = evaluate.draw_recall(pd.DataFrame(values), pd.DataFrame({"member": [1], "R@1": [30.0]}))
    ticks = figure.axes[0].get_xticks().tolist()
    assert ticks == ([1] if size == 1 else [1, 5, 10, 15, 20, 25, 30, 35, 40, 45])


def test_the_comparison_has_a_band_for_seeds():
    curves = [("two", np.array([[10.0, 20], [20, 40]])), ("one", np.array([[50.0]]))]
    with evaluate.drawing():
        axes = evaluate.draw_comparison(curves, "R@1").axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 15], [2, 30]], [[1, 50]]]
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(15 - 50**0.5) and heights.max() == pytest.approx(30 + 200**0.5)


def fonts(*names: str) -> list:
    """The installed upright fonts of these names."""
    from matplotlib import font_manager

    entries = font_manager.fontManager.ttflist
    return [font for font in entries if font.name in names and (font.style, font.weight) == ("normal", 400)]


def test_characters_without_a_font_are_named_and_drawn_as_boxes(capfd, monkeypatch, recwarn):
    """DejaVu Sans has no Chinese; a "$" is no formula."""
    monkeypatch.setattr("matplotlib.font_manager.fontManager.ttflist", fonts("DejaVu Sans"))
    text = "a猫\n $\\frac{$ é"
    with evaluate.drawing([text]) as boxes:
        assert text.translate(boxes) == "a□□ $\\frac{$ é"
        figure = evaluate.new_figure(1)
        figure.text(0, 0, text.translate(boxes))
        figure.canvas.print_figure(io.BytesIO(), format="png")
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "no installed font can draw 猫" in err and not list(recwarn)


def test_another_font_is_used_for_what_dejavu_lacks(monkeypatch):
    """STIX stands for an installed font; but fonts of matplotlib's own, as STIX is, do not count."""
    from matplotlib import font_manager

    dejavu, stix = (
        set(font_manager.get_font(fonts(name)[0].fname).get_charmap()) for name in ("DejaVu Sans", "STIXGeneral")
    )
    character = next(chr(code) for code in sorted(stix - dejavu) if chr(code).isprintable())
    monkeypatch.setattr("matplotlib.font_manager.fontManager.ttflist", fonts("DejaVu Sans", "STIXGeneral"))
    assert evaluate.fonts_for(["é"]) == (["DejaVu Sans"], {})
    assert evaluate.fonts_for([character]) == (["DejaVu Sans"], {ord(character): "□"})
    monkeypatch.setattr("matplotlib.get_data_path", lambda: "/elsewhere")
    assert evaluate.fonts_for(["é", character]) == (["DejaVu Sans", "STIXGeneral"], {})


def test_matplotlib_is_imported_for_figures_only(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert evaluate.main([str(tiny_run), "--recalls", "1", "--output", str(tmp_path)]) == 0
    assert "needs matplotlib: pip install" in refused(capsys, evaluate, tiny_run, "--plot", "--output", tmp_path)


# ------------------------------------------------------------------------------------------------ refusals


def test_folders_that_cannot_be_scored(tiny_run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "is not a run folder" in refused(capsys, evaluate, tmp_path / "empty")
    assert "is not a run folder" in refused(capsys, evaluate, tmp_path / "nothing")
    bare = copy_of(tiny_run, tmp_path / "bare")
    for path in bare.glob("member_*.json"):
        path.unlink()
    assert "has no finished member" in refused(capsys, evaluate, bare)
    damaged = copy_of(tiny_run, tmp_path / "damaged")
    for content in ("path,label\n", "", "path,label,is_query,is_gallery,class_name\na.png,x,True,True,b\n"):
        (damaged / "test.csv").write_text(content)
        assert "test.csv is missing or damaged" in refused(capsys, evaluate, damaged)
    lines = (tiny_run / "test.csv").read_text().splitlines(keepends=True)
    (damaged / "test.csv").write_text("".join(lines[:-1]))
    assert "test.csv has 35 images, the embeddings 36" in refused(capsys, evaluate, damaged)


def test_options_that_do_not_fit(tiny_run, tmp_path, capsys):
    assert f"--recalls: 36 is not below the number of gallery images of {tiny_run}, 36" in refused(
        capsys, evaluate, tiny_run, "--recalls", "1,36", "--output", tmp_path
    )
    assert "--num_members 3" in refused(capsys, evaluate, tiny_run, "--num_members", "3")
    assert "invalid choice: 'pixels'" in refused(capsys, evaluate, tiny_run, "--embedding", "pixels")
    assert "RUN_FOLDER" in refused(capsys, evaluate)
    message = refused(capsys, evaluate, copy_of(tiny_run, tmp_path / "run"), "--embedding", "pooled")
    assert "with --embedding pooled makes it" in message
    assert "--device gpu" in refused(capsys, evaluate, tiny_run, "--device", "gpu")


def test_a_run_counts_once(tiny_run, tmp_path, capsys):
    again = copy_of(tiny_run, tmp_path / "copy")
    assert "are the same run, seed 0: give one" in refused(capsys, evaluate, tiny_run, again)
    assert "are the same run, seed 0: give one" in refused(capsys, evaluate, tiny_run, tiny_run)


def test_equal_names_do_not_overwrite_each_other(tiny_run, tmp_path, capsys):
    runs = [write_run(tmp_path / str(seed) / "run", tiny_run, random_parts(seed), seed=seed) for seed in (0, 1)]
    assert "have the same name" in refused(capsys, evaluate, *runs, "--output", tmp_path / "out")
    assert evaluate.main([*map(str, runs), "--recalls", "1"]) == 0  # each in its own folder


def test_a_folder_that_cannot_be_written(tiny_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = refused(capsys, evaluate, tiny_run, "--recalls", "1", "--output", tmp_path / "file")
    assert "cannot write" in message
    blocked = copy_of(tiny_run, tmp_path / "run")
    (blocked / "evaluation.csv").mkdir()
    message = refused(capsys, evaluate, blocked, "--recalls", "1")
    assert f"cannot write into {blocked}" in message and "--output" in message

"""dreml/baseline.py: what finds images without training, and who is told of it. And data without test images."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from builders import build_small_model, copy_run, digests, only_folder, refused, train_tiny
from reference import slow_recall

import data_utils
import evaluate
import retrieve
import train
from dreml import baseline
from dreml.backbones import own_scaling
from dreml.baseline import BaselineRecord, colour_histograms, print_baseline, read_baseline
from dreml.cli import InputError
from dreml.files import read_record, take_lock, write_record
from dreml.runs import read_run_record
from model import channel_statistics, extract_features, initial_model, load_ensemble


def test_a_colour_histogram_counts_the_pixels_of_216_colours():
    """Against a loop over the pixels; the same in pieces of one image."""
    images = np.random.default_rng(0).integers(0, 256, (3, 7, 7, 3), dtype=np.uint8)
    images[0, 0, :4] = [[0, 0, 0], [42, 43, 85], [255, 255, 255], [86, 213, 214]]
    expected = np.zeros((3, 6, 6, 6))
    for number, image in enumerate(images):
        for red, green, blue in image.reshape(-1, 3).tolist():
            expected[number, red * 6 // 256, green * 6 // 256, blue * 6 // 256] += 1
    for max_pixels in (1, 2 * 49, 2**22):
        counts = colour_histograms(images, max_pixels)
        assert counts.dtype == torch.float32 and np.array_equal(counts, expected.reshape(3, 216))


# ------------------------------------------------------------------------------------------------ in training


def test_the_baseline_of_a_run_is_the_recall_before_its_first_step(
    tiny_data, tiny_cache, tmp_path, small_network, capsys
):
    """Of member 1's network before its first step, and of the colours; in the files, and above the table."""
    assert train_tiny(tiny_data, tmp_path, "--ensemble_size", "1") == 0
    lines, folder = capsys.readouterr().out.splitlines(), only_folder(tmp_path)
    settings, images = read_run_record(folder).settings, np.array(tiny_cache.array("test_images"))
    statistics = channel_statistics(tiny_cache.meta, torch.device("cpu"))
    features = extract_features(initial_model(settings, 1, None), images, statistics, 36, "pooled").numpy()
    colours = colour_histograms(images).numpy()
    labels = np.array(tiny_cache.array("test_labels"))
    expected = 100 * np.concatenate([slow_recall([rows], labels, [1, 4]) for rows in (features, colours)])
    table = pd.read_csv(folder / "baseline.csv")
    assert list(table.columns) == ["baseline", "R@1", "R@4"]
    assert table.baseline.tolist() == ["initial weights", "colour histogram"]
    np.testing.assert_allclose(table.iloc[:, 1:], expected, atol=5e-5)
    said = [
        f"before training: R@1 {r1:.2f}, R@4 {r4:.2f} ({name})"
        for (r1, r4), name in zip(expected, table.baseline, strict=True)
    ]
    assert lines.index(said[0]) < lines.index(next(line for line in lines if "epoch 0" in line))
    header = next(number for number, line in enumerate(lines) if line.lstrip().startswith("ensemble_size"))
    assert [line for line in lines[header - 4 : header] if line.startswith("before training:")] == said


def test_pretrained_weights_are_scored_with_their_own_scaling(tiny_cache, tiny_settings, small_network, monkeypatch):
    scalings, extract = [], baseline.extract_features

    def look(model, images, scaling, *arguments):
        scalings.append(scaling)
        return extract(model, images, scaling, *arguments)

    monkeypatch.setattr(baseline, "extract_features", look)
    cpu = torch.device("cpu")
    baseline.initial_features(tiny_settings, "none", tiny_cache, cpu)
    state = {name: value for name, value in build_small_model("", 3, None).state_dict().items() if "fc" not in name}
    monkeypatch.setattr(baseline, "read_weights", lambda *_: state)
    baseline.initial_features(tiny_settings, "imagenet", tiny_cache, cpu)
    for found, expected in zip(scalings, (tiny_cache.meta.mean, [0.485, 0.456, 0.406]), strict=True):
        assert found[0].tolist() == pytest.approx(expected)
    assert scalings[1][1].tolist() == own_scaling("resnet18", cpu)[1].tolist()


def test_timms_networks_have_their_own_scaling():
    pytest.importorskip("timm", reason="timm is an extra")
    mean, std = own_scaling("timm:tf_efficientnet_lite0", torch.device("cpu"))
    assert mean.tolist() == [0.5] * 3 and std.tolist() == [0.5] * 3


def test_the_baseline_changes_no_draw(tiny_data, tmp_path, small_network, small_run, monkeypatch):
    monkeypatch.setattr(train, "update_baseline", lambda *_: torch.rand(7))
    assert train_tiny(tiny_data, tmp_path) == 0
    assert digests(only_folder(tmp_path), "member_*.npy") == digests(small_run, "member_*.npy")


@pytest.fixture
def scored(monkeypatch) -> list[str]:
    """The names of what was scored before training from now on."""
    calls, original = [], baseline.colour_histograms
    monkeypatch.setattr(baseline, "colour_histograms", lambda images: calls.append("colours") or original(images))
    return calls


def test_it_is_scored_once(tiny_data, tmp_path, small_run, scored, capsys):
    """And again for other K, if its file is damaged or of another run; the CSV is written again at each run."""
    folder = copy_run(small_run, tmp_path / small_run.name)
    (folder / "baseline.csv").unlink()
    for options in ([], ["--recalls", "4"], ["--ensemble_size", "3"]):
        assert train_tiny(tiny_data, tmp_path, *options) == 0
    assert not scored and digests(folder, "baseline.*") == digests(small_run, "baseline.*")
    assert train_tiny(tiny_data, tmp_path, "--recalls", "1,2") == 0
    assert scored == ["colours"] and list(read_baseline(folder, read_run_record(folder).settings_hash)) == [
        *("baseline", "R@1", "R@2", "R@4")
    ]
    record = read_record(folder / "baseline.json", BaselineRecord)
    write_record(folder / "baseline.json", dataclasses.replace(record, settings_hash="another"))
    assert train_tiny(tiny_data, tmp_path) == 0
    assert "baseline.json is damaged (ValueError: from another run)" in capsys.readouterr().err
    (folder / "baseline.json").write_bytes(b"{")
    assert train_tiny(tiny_data, tmp_path) == 0
    assert "baseline.json is damaged" in capsys.readouterr().err
    assert scored == ["colours"] * 3 and digests(folder, "baseline.*") == digests(small_run, "baseline.*")


def test_while_another_process_scores_it_training_goes_on(tiny_data, tmp_path, small_run, scored):
    folder = copy_run(small_run, tmp_path / small_run.name)
    for path in folder.glob("*_002.*"):
        path.unlink()
    (folder / "baseline.json").unlink()
    with take_lock(folder / ".baseline.lock"):
        assert train_tiny(tiny_data, tmp_path) == 0
    assert not scored and not (folder / "baseline.json").exists() and (folder / "member_002.json").exists()


@pytest.mark.parametrize("problem", ["no route to host", "their features are not finite"])
def test_a_finished_run_does_without_its_initial_weights(tiny_data, tmp_path, small_run, monkeypatch, capsys, problem):
    """As where there is no network to download them, or a file of weights is damaged."""

    def offline(*_):
        raise InputError(problem)

    def not_finite(model, images, *_):
        return torch.full((len(images), 3), float("nan"))

    folder = copy_run(small_run, tmp_path / small_run.name)
    (folder / "baseline.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(baseline, *(("read_weights", offline) if "host" in problem else ("extract_features", not_finite)))
        assert train_tiny(tiny_data, tmp_path) == 0
    assert f"warning: the initial weights are not scored: {problem}" in capsys.readouterr().err
    settings_hash = read_run_record(folder).settings_hash
    expected = read_baseline(small_run, settings_hash).iloc[[1]].reset_index(drop=True)
    assert read_baseline(folder, settings_hash).equals(expected)
    assert train_tiny(tiny_data, tmp_path) == 0  # the network is back
    assert digests(folder, "baseline.*") == digests(small_run, "baseline.*")


# ------------------------------------------------------------------------------------------------ what is said of it


@pytest.mark.parametrize(
    ("initial", "colours", "said"),
    [
        (20.0, 10.0, None),
        (30.0, 10.0, None),  # a tie
        (31.25, 10.0, r"R@2 31.25 (initial weights), 30.00 after; more members or epochs may pass it"),
        (31.25, 93.0, r"R@2 93.00 (colour histogram), 30.00 after; photos of one class may have been taken together"),
    ],
)
def test_a_baseline_that_is_ahead_is_said(tmp_path, capsys, initial, colours, said):
    """In the first score that both have, against the largest ensemble."""
    rows = [{"baseline": "initial weights", "R@2": initial}, {"baseline": "colour histogram", "R@2": colours}]
    write_record(tmp_path / "baseline.json", BaselineRecord("run", rows))
    table = pd.DataFrame({"ensemble_size": [1, 2], "R@1": [99.0, 99.0], "R@2": [10.0, 30.0], "mAP@R": [99.0, 99.0]})
    print_baseline(tmp_path, "run", table)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"before training: R@2 {initial:.2f} (initial weights)",
        f"before training: R@2 {colours:.2f} (colour histogram)",
    ]
    assert len(lines) == (3 if said else 2) and (not said or lines[2].startswith(f"before training is ahead: {said}"))


def test_without_a_score_in_common_nothing_is_said(tmp_path, capsys):
    table = pd.DataFrame({"ensemble_size": [1], "R@1": [99.0]})
    print_baseline(tmp_path, "run", table)
    write_record(tmp_path / "baseline.json", BaselineRecord("run", [{"baseline": "initial weights", "R@2": 1.0}]))
    print_baseline(tmp_path, "run", table)
    assert capsys.readouterr().out == ""


def test_evaluate_says_it_for_the_scores_in_common(small_run, tmp_path, capsys):
    assert evaluate.main([str(small_run), "--recalls", "2,4", "--output", str(tmp_path)]) == 0
    table = pd.read_csv(small_run / "baseline.csv")
    lines = capsys.readouterr().out.splitlines()[1:3]
    assert lines == [
        f"before training: R@4 {r4:.2f} ({name})" for name, r4 in zip(table.baseline, table["R@4"], strict=True)
    ]


# ------------------------------------------------------------------------------------------------ no test images


@pytest.fixture(scope="module")
def photos_only(tiny_data, tmp_path_factory) -> Path:
    """A data folder with the data set `tiny` that has no test/ folder, and its cache."""
    data = tmp_path_factory.mktemp("photos_only")
    shutil.copytree(tiny_data / "tiny" / "train", data / "tiny" / "train")
    assert data_utils.main(["--data_path", str(data), "--data_name", "tiny", "--image_size", "32"]) == 0
    return data


def test_without_test_images_all_but_scores_works(photos_only, tiny_data, tmp_path, small_network, capsys):
    """Training, resume, pooled features, search among photos, `load_ensemble`; what is left out is said."""
    results, photos = tmp_path / "results", tiny_data / "tiny" / "test"
    assert train_tiny(photos_only, results, "--ensemble_size", "1") == 0
    assert train_tiny(photos_only, results, "--embedding", "pooled", "--recalls", "1,1000") == 0
    out, folder = capsys.readouterr().out, only_folder(results)
    assert "no test images: all classes are trained on, and there will be no recall" in out
    assert out.endswith(f"2 members are finished in {folder}; there are no test images, and so no recall\n")
    assert not (folder / "baseline.json").exists() and (folder / "pooled_002.npy").exists()
    assert (folder / "recall.csv").read_text() == "ensemble_size,R@1,R@1000\n" or "R@4" in (
        folder / "recall.csv"
    ).read_text()
    assert load_ensemble(folder)(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).shape == (1, 6)

    files = [str(path) for path in sorted(photos.glob("*/00.png"))]
    found = ["--gallery", str(photos), "--top", "2", "--no_picture", "--threshold", "0.1", "--export"]
    assert retrieve.main([str(folder), "--query", *files, *found]) == 0
    assert len(pd.read_csv(folder / "retrieval" / "neighbours.csv")) == 12
    assert "there is nothing to score" in refused(capsys, evaluate, folder)
    for options in (["--worst"], ["--export"], ["--query", files[0]]):
        assert "has no test images to search: name a gallery" in refused(capsys, retrieve, folder, *options)
    options = ["--query", files[0], "--gallery", photos, "--far", "0.01"]
    assert "no thresholds: name a value" in refused(capsys, retrieve, folder, *options)
    options = ["--query", "test:0", "--gallery", photos]
    assert "test:0: the test split has 0 images" in refused(capsys, retrieve, folder, *options)


def test_data_without_test_images_are_cached_with_a_warning(tmp_path, tiny_data, capsys):
    """Folders, and a CSV; not where test images were listed and cannot be used, nor a known set."""
    arguments = ["--data_path", str(tmp_path), "--image_size", "32", "--data_name"]
    shutil.copytree(tiny_data / "tiny" / "train", tmp_path / "folders" / "train")
    shutil.copytree(tiny_data / "tiny" / "train", tmp_path / "list" / "train")
    rows = [f"{path.relative_to(tmp_path / 'list')},{path.parent.name}" for path in tmp_path.glob("list/train/*/*")]
    (tmp_path / "list" / "images.csv").write_text("path,label,split\n" + "".join(f"{row},train\n" for row in rows))
    warning = "no test images: all classes are trained on, and nothing can be measured"
    assert data_utils.main([*arguments, "folders", "list"]) == 0
    said = capsys.readouterr().err
    assert all(f"{name}: warning: {warning}" in said for name in ("folders", "list"))
    (tmp_path / "folders" / "test" / "one").mkdir(parents=True)
    assert "the test split has no images" in "".join(refused_lines(capsys, [*arguments, "folders", "--force"]))
    (tmp_path / "folders" / "test" / "one" / "bad.png").write_bytes(b"bad")
    lines = refused_lines(capsys, [*arguments, "folders", "--force", "--skip_bad"])
    assert "no image is left in test" in "".join(lines)


def refused_lines(capsys, arguments: list[str]) -> list[str]:
    capsys.readouterr()
    assert data_utils.main(arguments) == 2
    return capsys.readouterr().err.splitlines()

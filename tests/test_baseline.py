"""dreml/baseline.py: what finds images without training, and who is told of it. And data without test images."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from builders import build_small_model, copy_run, digests, only_folder, refused, train_tiny
from reference import slow_map, slow_recall

import data_utils
import evaluate
import retrieve
import train
from dreml import baseline
from dreml.backbones import own_scaling
from dreml.baseline import colour_histograms, print_baseline, read_baseline
from dreml.cli import InputError
from dreml.files import write_record
from dreml.runs import TestSplit, read_run_record
from model import channel_statistics, extract_features, initial_model, load_ensemble


def test_a_colour_histogram_counts_the_pixels_of_216_colours():
    """Against a loop over the pixels."""
    images = np.random.default_rng(0).integers(0, 256, (3, 7, 7, 3), dtype=np.uint8)
    images[0, 0, :4] = [[0, 0, 0], [42, 43, 85], [255, 255, 255], [86, 213, 214]]
    expected = np.zeros((3, 6, 6, 6))
    for number, image in enumerate(images):
        for red, green, blue in image.reshape(-1, 3).tolist():
            expected[number, red * 6 // 256, green * 6 // 256, blue * 6 // 256] += 1
    counts = colour_histograms(images)
    assert counts.dtype == torch.float32 and np.array_equal(counts, expected.reshape(3, 216))
    large = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    assert torch.equal(colour_histograms(large), colour_histograms(large[:, ::2, ::2]))


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
    every = np.ones(len(labels), bool)
    maps = [100 * slow_map([rows], labels, every, every)[0].item() for rows in (features, colours)]
    said = [
        f"before training: R@1 {r1:.2f}, R@4 {r4:.2f}, mAP@R {mean:.2f} ({name}, {dimensions} numbers an image)"
        for (r1, r4), mean, name, dimensions in zip(expected, maps, table.baseline, (16, 216), strict=True)
    ]
    assert lines.index(said[0]) < lines.index(next(line for line in lines if "epoch 0" in line))
    header = next(number for number, line in enumerate(lines) if line.lstrip().startswith("ensemble_size"))
    assert [line for line in lines[header - 5 : header] if line.startswith("before training:")] == said
    member = [np.load(folder / "member_001.npy")]
    ours = 100 * slow_map(member, labels, every, every)[0].item()
    assert f", mAP@R {ours:.2f} (3 numbers an image) in " in lines[-1] and lines[-1].startswith("1 member: R@1 ")


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


@pytest.fixture
def scored(monkeypatch) -> list[str]:
    """The names of what was scored before training from now on."""
    calls, original = [], baseline.colour_histograms
    monkeypatch.setattr(baseline, "colour_histograms", lambda images: calls.append("colours") or original(images))
    monkeypatch.setattr(train, "print_near_copies", lambda *_: None)
    return calls


def test_it_is_scored_once(tiny_data, tmp_path, small_run, scored, capsys):
    """And again for other K, and if its file is damaged; the CSV is written again at each run."""
    folder = copy_run(small_run, tmp_path / small_run.name)
    (folder / "baseline.csv").unlink()
    for options in ([], ["--recalls", "4"], ["--ensemble_size", "3"]):
        assert train_tiny(tiny_data, tmp_path, *options) == 0
    assert not scored and digests(folder, "baseline.*") == digests(small_run, "baseline.*")
    assert train_tiny(tiny_data, tmp_path, "--recalls", "1,2") == 0
    assert scored == ["colours"] and list(pd.read_csv(folder / "baseline.csv")) == ["baseline", "R@1", "R@2"]
    (folder / "baseline.json").write_bytes(b"{")
    assert train_tiny(tiny_data, tmp_path) == 0
    assert "baseline.json is damaged" in capsys.readouterr().err
    assert scored == ["colours"] * 2 and digests(folder, "baseline.*") == digests(small_run, "baseline.*")


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
    assert read_baseline(folder).equals(read_baseline(small_run).iloc[[1]].reset_index(drop=True))
    assert train_tiny(tiny_data, tmp_path) == 0  # the network is back
    assert digests(folder, "baseline.*") == digests(small_run, "baseline.*")


# ------------------------------------------------------------------------------------------------ what is said of it


def say(tmp_path, capsys, initial: float, colours: float, embedding="logits", weights="none") -> list[str]:
    """What is printed of two baselines, for an ensemble of R@2 30 and mAP@R 9."""
    rows = [{"baseline": "initial weights", "R@2": initial, "mAP@R": 8.0, "dimensions": 512}]
    rows += [{"baseline": "colour histogram", "R@2": colours, "mAP@R": 9.5, "dimensions": 216}]
    write_record(tmp_path / "baseline.json", {"recalls": rows})
    table = pd.DataFrame({"ensemble_size": [1, 2], "R@1": [99.0, 99.0], "R@2": [10.0, 30.0], "mAP@R": [1.0, 9.0]})
    print_baseline(tmp_path, table, embedding, weights)
    return capsys.readouterr().out.splitlines()


def test_a_baseline_that_is_ahead_says_what_to_try(tmp_path, capsys):
    """In the order of cost; what was tried is left out. By the first score that both have."""
    lines = [
        "before training: R@2 30.00, mAP@R 8.00 (initial weights, 512 numbers an image)",
        "before training: R@2 10.00, mAP@R 9.50 (colour histogram, 216 numbers an image)",
    ]
    assert say(tmp_path, capsys, 30.0, 10.0) == lines  # a tie
    ahead = "training has not helped: before it, R@2 31.25 (initial weights), 30.00 after; try "
    remedies = "--embedding pooled (seconds), then pretrained --weights, then more --num_epochs"
    assert say(tmp_path, capsys, 31.25, 10.0)[2:] == [ahead + remedies]
    assert say(tmp_path, capsys, 31.25, 10.0, "pooled")[2].endswith(
        "; try pretrained --weights, then more --num_epochs"
    )
    assert say(tmp_path, capsys, 31.25, 10.0, "pooled", "imagenet:x")[2].endswith("; try more --num_epochs")
    assert "R@2 93.00 (colour histogram), 30.00 after" in say(tmp_path, capsys, 31.25, 93.0)[2]
    print_baseline(tmp_path, pd.DataFrame({"ensemble_size": [1], "R@1": [99.0]}), "logits", "none")
    print_baseline(tmp_path / "nowhere", pd.DataFrame({"ensemble_size": [1], "R@2": [99.0]}), "logits", "none")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("num_copies", "said"), [(0, None), (2, "10 %"), (12, "60 %")])
def test_near_copies_are_counted(capsys, num_copies, said):
    """Of 20 queries: pairs of one colour and one embedding. One of either alone is no copy."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    rows = torch.from_numpy(generator.normal(size=(20, 30)).astype(np.float32))
    for number in range(0, num_copies, 2):
        images[number + 1] = images[number]
        rows[number + 1] = rows[number] + 0.01
    images[19] = images[18]
    rows[17] = rows[16]
    split = TestSplit(torch.arange(20) // 2, torch.ones(20).bool(), torch.ones(20).bool())
    baseline.print_near_copies([rows, 2 * rows], split, images)
    line = f"{said} of the queries have a near copy among the test images: it raises R@1 more than mAP@R\n"
    assert capsys.readouterr().out == (line if said else "")


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
    assert out.endswith(f"2 members finished in {folder}; there are no test images, so no recall\n")
    assert not (folder / "baseline.json").exists() and (folder / "pooled_002.npy").exists()
    assert (folder / "recall.csv").read_text() == "ensemble_size,R@1,R@1000\n"
    assert load_ensemble(folder)(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).shape == (1, 6)

    files = [str(path) for path in sorted(photos.glob("*/00.png"))]
    assert "there is nothing to score" in refused(capsys, evaluate, folder)
    for options in (["--worst"], ["--export"], ["--query", files[0]]):
        assert "has no test images to search: name a gallery" in refused(capsys, retrieve, folder, *options)
    pytest.importorskip("lancedb", reason="LanceDB is an extra: pip install lancedb")
    found = ["--gallery", str(photos), "--top", "2", "--no_picture", "--threshold", "0.1", "--export"]
    assert retrieve.main([str(folder), "--query", *files, *found]) == 0
    assert len(pd.read_csv(folder / "retrieval" / "neighbours.csv")) == 12
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

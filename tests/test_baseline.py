"""dreml/baseline.py: what finds images without training, and who is told of it. And data without test images."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from builders import build_small_model, copy_run, digests, edit_record, only_folder, refused, table_of, train_tiny
from reference import slow_map, slow_recall

import data_utils
import evaluate
import retrieve
import train
from dreml import baseline
from dreml.baseline import colour_histograms, print_baseline
from dreml.cli import InputError
from dreml.runs import read_run_record
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


def test_the_baseline_of_a_run_is_the_recall_before_its_first_step(
    tiny_data, tiny_cache, tmp_path, small_network, capsys
):
    """Of member 1's network before its first step, and of the colours; in the files, and above the table."""
    assert train_tiny(tiny_data, tmp_path, "--ensemble_size", "1") == 0
    lines, folder = capsys.readouterr().out.splitlines(), only_folder(tmp_path)
    settings, images = read_run_record(folder).settings, np.array(tiny_cache.array("test_images"))
    statistics = channel_statistics(tiny_cache.meta, torch.device("cpu"))
    features = extract_features(initial_model(settings, 1, None), images, statistics, 36)["pooled"].numpy()
    labels = np.array(tiny_cache.array("test_labels"))
    every = np.ones(len(labels), bool)
    table = pd.read_csv(folder / "baseline.csv")
    assert list(table.columns) == ["baseline", "R@1", "R@4"]
    assert table.baseline.tolist() == ["initial weights", "colour histogram"]
    said = []
    for row, rows in zip(table.itertuples(index=False), (features, colour_histograms(images).numpy()), strict=True):
        expected = 100 * slow_recall([rows], labels, [1, 4])[0]
        np.testing.assert_allclose(row[1:], expected, atol=5e-5)
        mean = 100 * slow_map([rows], labels, every, every)[0].item()
        scores = f"R@1 {expected[0]:.2f}, R@4 {expected[1]:.2f}, mAP@R {mean:.2f}"
        said.append(f"before training: {scores} ({row.baseline}, {rows.shape[1]} numbers an image)")
    assert lines.index(said[0]) < lines.index(next(line for line in lines if "epoch 0" in line))
    header = next(number for number, line in enumerate(lines) if line.lstrip().startswith("ensemble_size"))
    assert [line for line in lines[header - 5 : header] if line.startswith("before training:")] == said
    ours = 100 * slow_map([np.load(folder / "member_001.npy")], labels, every, every)[0].item()
    assert f", mAP@R {ours:.2f} (3 numbers an image) in " in lines[-1] and lines[-1].startswith("1 member: R@1 ")


def test_pretrained_weights_are_scored_with_their_own_scaling(tiny_cache, tiny_settings, small_network, monkeypatch):
    scalings = []

    def look(model, images, scaling, *_):
        scalings.append(torch.stack(scaling))
        return {"pooled": torch.zeros(len(images), 3)}

    monkeypatch.setattr(baseline, "extract_features", look)
    state = {name: value for name, value in build_small_model("", 3, None).state_dict().items() if "fc" not in name}
    for weights in (None, state):
        monkeypatch.setattr(baseline, "read_weights", lambda *_, weights=weights: weights)
        baseline.initial_features(tiny_settings, "", tiny_cache, torch.device("cpu"))
    of_imagenet = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    expected = torch.tensor([[tiny_cache.meta.mean, tiny_cache.meta.std], of_imagenet])
    torch.testing.assert_close(torch.stack(scalings), expected)


def test_it_is_scored_once(tiny_data, tmp_path, small_run, monkeypatch):
    """And again for other K, and if the run's record is lost; the CSV is written again at each run."""
    calls, original = [], baseline.colour_histograms
    monkeypatch.setattr(baseline, "colour_histograms", lambda images: calls.append("colours") or original(images))
    monkeypatch.setattr(train, "print_near_copies", lambda *_: None)
    folder = copy_run(small_run, tmp_path / small_run.name)
    (folder / "baseline.csv").unlink()
    for options in ([], ["--recalls", "4"], ["--ensemble_size", "3"]):
        assert train_tiny(tiny_data, tmp_path, *options) == 0
    assert not calls and digests(folder, "baseline.csv") == digests(small_run, "baseline.csv")
    record = folder / "args.json"
    other = {"data_path": "of another process"}
    patch = {"colour_histograms": lambda images: edit_record(record, "options", value=other) or original(images)}
    with monkeypatch.context() as context:
        context.setattr(baseline, *patch.popitem())
        assert train_tiny(tiny_data, tmp_path, "--recalls", "2") == 0
    assert read_run_record(folder).options == other and list(pd.read_csv(folder / "baseline.csv"))[1:] == ["R@2"]
    assert train_tiny(tiny_data, tmp_path, "--recalls", "1,2") == 0
    assert len(calls) == 1 and list(pd.read_csv(folder / "baseline.csv")) == ["baseline", "R@1", "R@2"]
    (folder / "args.json").unlink()
    assert train_tiny(tiny_data, tmp_path) == 0
    assert len(calls) == 2 and digests(folder, "baseline.csv") == digests(small_run, "baseline.csv")
    assert read_run_record(folder).baseline == read_run_record(small_run).baseline


def test_a_finished_run_does_without_its_initial_weights(tiny_data, tmp_path, small_run, monkeypatch, capsys):
    """As where there is no network to download them, or a file of weights is damaged."""

    def offline(*_):
        raise InputError("no route to host")

    def not_finite(model, images, *_):
        return {"pooled": torch.full((len(images), 3), float("nan"))}

    folder = copy_run(small_run, tmp_path / small_run.name)
    problems = {"read_weights": (offline, "no route to host"), "extract_features": (not_finite, "are not finite")}
    for name, (fail, problem) in problems.items():
        edit_record(folder / "args.json", "baseline", value=[])
        with monkeypatch.context() as patch:
            patch.setattr(baseline, name, fail)
            assert train_tiny(tiny_data, tmp_path) == 0
        line = capsys.readouterr().err
        assert line.startswith("warning: the initial weights are not scored: ") and problem in line
        assert read_run_record(folder).baseline == read_run_record(small_run).baseline[1:]
    assert train_tiny(tiny_data, tmp_path) == 0  # the network is back
    assert digests(folder, "baseline.csv") == digests(small_run, "baseline.csv")


@pytest.mark.parametrize(
    ("initial", "colours", "embedding", "weights", "ahead"),
    [
        (30, 10, "logits", "none", None),  # a tie
        (31.25, 10, "logits", "none", "R@2 31.25 (initial weights)"),
        (31.25, 10, "pooled", "none", "R@2 31.25 (initial weights)"),
        (31.25, 93, "pooled", "imagenet:x", "R@2 93.00 (colour histogram)"),
    ],
)
def test_a_baseline_that_is_ahead_says_what_to_try(tiny_run, capsys, initial, colours, embedding, weights, ahead):
    """In the order of cost; what was tried is left out. By the first score that both have."""
    rows = [{"baseline": "initial weights", "R@2": initial, "mAP@R": 8.0, "dimensions": 512}]
    rows += [{"baseline": "colour histogram", "R@2": colours, "mAP@R": 9.5, "dimensions": 216}]
    record = read_run_record(tiny_run)
    record.settings = replace(record.settings, weights=weights)
    record.baseline = rows
    table = pd.DataFrame({"ensemble_size": [1, 2], "R@1": [99.0, 99.0], "R@2": [10.0, 30.0], "mAP@R": [1.0, 9.0]})
    print_baseline(record, table, embedding)
    lines = [
        f"before training: R@2 {initial:.2f}, mAP@R 8.00 (initial weights, 512 numbers an image)",
        f"before training: R@2 {colours:.2f}, mAP@R 9.50 (colour histogram, 216 numbers an image)",
    ]
    if ahead:
        first = "--embedding pooled, then " if embedding == "logits" else ""
        second = "pretrained --weights, then " if weights == "none" else ""
        remedies = f"{first}{second}more --num_epochs"
        lines.append(f"training has not helped: before it, {ahead}, 30.00 after; try {remedies}")
    assert capsys.readouterr().out.splitlines() == lines
    print_baseline(record, table[["ensemble_size", "R@1"]], "logits")
    record.baseline = []
    print_baseline(record, table, "logits")
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
    baseline.print_near_copies([rows, 2 * rows], table_of(np.arange(20) // 2), images)
    line = f"{said} of the queries have a near copy among the test images: it raises R@1 more than mAP@R\n"
    assert capsys.readouterr().out == (line if said else "")


def test_without_test_images_all_but_scores_works(tiny_data, tmp_path, small_network, capsys):
    """Training, resume, pooled features, search among photos, `load_ensemble`; what is left out is said."""
    photos_only = tmp_path / "data"
    for name in ("tiny", "listed"):
        shutil.copytree(tiny_data / "tiny" / "train", photos_only / name / "train")
    rows = [
        f"train/{path.parent.name}/{path.name},{path.parent.name},train" for path in photos_only.glob("listed/*/*/*")
    ]
    (photos_only / "listed" / "images.csv").write_text("\n".join(["path,label,split", *rows]))
    assert data_utils.main(["--data_path", str(photos_only), "--image_size", "32"]) == 0
    assert capsys.readouterr().err.count("warning: no test images: all classes are trained on, and nothing can be") == 2
    results, photos = tmp_path / "results", tiny_data / "tiny" / "test"
    assert train_tiny(photos_only, results, "--ensemble_size", "1") == 0
    assert train_tiny(photos_only, results, "--embedding", "pooled", "--recalls", "1,1000") == 0
    out, folder = capsys.readouterr().out, only_folder(results)
    assert "no test images: all classes are trained on, and there will be no recall" in out
    assert out.endswith(f"2 members finished in {folder}; there are no test images, so no recall\n")
    assert not (folder / "baseline.csv").exists() and (folder / "member_002.pooled.npy").exists()
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
    line = "takes 100 test queries (with other classes in the gallery), and there are 0: give your own threshold"
    assert line in refused(capsys, retrieve, folder, "--query", files[0], *found[:5], "--far", "0.1")
    options = ["--query", "test:0", "--gallery", photos]
    assert "test:0: the test split has 0 images" in refused(capsys, retrieve, folder, *options)

"""The benchmarks run and print their tables, and the baseline that they compare with is right."""

import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import edit_record, random_embeddings, save_image, write_run
from processes import ROOT
from reference import slow_best_similarities, slow_recall

from benchmarks import export, plain, recall, thresholds, training
from dreml.files import sha256
from dreml.search import embed_images, folder_items
from model import load_ensemble


def table(output: str) -> dict[str, float]:
    """What -> ratio."""
    return {what: float(ratio) for what, ratio in re.findall(r"^\| (.+?) \|.*\| ([\d.]+) \|$", output, re.MULTILINE)}


@pytest.mark.parametrize("seed", range(10))
def test_the_plain_recall_is_recall(seed):
    generator = np.random.default_rng(seed)
    embedding, labels = generator.normal(size=(60, 4)).astype(np.float32), generator.integers(0, 12, 60)
    unit = torch.nn.functional.normalize(torch.from_numpy(embedding))
    expected = slow_recall([embedding], labels, [1, 2, 8])[0]
    np.testing.assert_allclose(plain.plain_recall(unit, torch.from_numpy(labels), [1, 2, 8]), expected, atol=1e-6)


def test_the_stopwatch_takes_medians_in_turns(monkeypatch):
    """By a clock that the runs turn on; the first call of each warms up and does not count."""
    clock, calls = [0.0], []
    monkeypatch.setattr(plain.time, "perf_counter", lambda: clock[0])
    durations = {"a": iter([90.0, 5.0, 1.0, 3.0]), "b": iter([90.0, 2.0, 8.0, 7.0])}

    def run(name):
        calls.append(name)
        clock[0] += next(durations[name])

    medians = plain.compare({name: lambda name=name: run(name) for name in "ab"}, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 4 and medians == {"a": 3.0, "b": 7.0}


def test_benchmark_of_training(threads, small_network, tiny_data, capsys):
    """Every row of the table, in its order: benchmarks/README.md has them."""
    options = "--image_size 32 --device cpu --repeats 1 --batch_size 4 --num_images 8 --num_steps 2"
    assert training.main([str(tiny_data / "tiny"), *options.split()]) == 0, capsys.readouterr().err
    ratios = table(capsys.readouterr().out)
    parts = [
        "preprocessing",
        "input: uint8",
        "input: the same",
        "input: float",
        "step",
        "embedding",
        "epoch of 2 steps",
    ]
    assert [what.startswith(part) for what, part in zip(ratios, parts, strict=True)] == [True] * 7
    assert all(ratio > 0 for ratio in ratios.values())


def test_benchmark_of_a_whole_job(processes, tiny_data, monkeypatch, capsys):
    """train.py and the plain script take the options that they are given, and both train and score."""
    scripts = []

    def run(command, **_):
        scripts.append(processes.start(*command[1:], folder=ROOT))
        return subprocess.CompletedProcess(command, scripts[-1].wait(), scripts[-1].out, scripts[-1].err)

    monkeypatch.setattr(training, "subprocess", SimpleNamespace(run=run))
    options = ["--image_size", "32", "--device", "cpu", "--repeats", "1", "--job"]
    assert training.main([str(tiny_data / "tiny"), *options]) == 0, capsys.readouterr().err
    (what,) = table(capsys.readouterr().out)
    assert "a whole job from its cache, tiny, 32 px" in what
    assert ["2 members: R@1" in script.out for script in scripts] == [True, True]
    assert [script.out.count("epoch 2: ") for script in scripts] == [2, 2]


@pytest.mark.parametrize(
    ("benchmark", "options", "message"),
    [
        (recall, ["--repeats", "0"], "not a positive integer"),
        (recall, ["--scale", "0.001"], "at least 0.01"),
        (recall, ["--device", "cuda:99"], "is not there"),
        (training, ["nowhere"], "nowhere: no such folder"),
        (training, [".", "--job", "--num_steps", "3"], "does not go with --num_images"),
        (training, [".", "--job", "--image_size", "7"], "no cache"),
        (export, ["nowhere"], "is not a run folder"),
    ],
)
def test_benchmarks_refuse_in_one_line(benchmark, options, message, capsys):
    assert benchmark.main(options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_benchmark_of_recall(capsys):
    assert recall.main(["--scale", "0.01", "--repeats", "1", "--big", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    ratios = table(output)
    assert {"N=200 d=1,024: recall_at_k / bare product", "N=81 d=576: recall_at_k / argsort"} <= set(ratios)
    assert sum("concatenation" in what for what in ratios) == 1
    assert re.search(r"N=605 d=8,000: [\d.]+ s, [\d.]+ GiB beside", output) and output.count("| 100 | 48 | 12 |") == 1


def test_benchmark_of_thresholds(tiny_run, tmp_path, capsys):
    """With enough queries for one rate: the three tables, and the images of the folder that is named."""
    members, labels = random_embeddings(0, 2, 400), np.arange(400) % 4
    run = write_run(tmp_path / "run", tiny_run, members, labels)
    shutil.copy(tiny_run / "member_001.pth", run)
    edit_record(run / "member_001.json", "sha256", "member_001.pth", value=sha256(run / "member_001.pth"))
    save_image(tmp_path / "photos" / "1.png")
    options = ["--num_members", "1", "--repeats", "2", "--number", "3", "--device", "cpu"]
    assert thresholds.main([str(run), "--elsewhere", str(tmp_path / "photos"), *options]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^\| 10 % \| [\d.]+ % \(.*\| [\d.]+ % \|", output, re.MULTILINE)
    assert "\n| 1 % | too few queries |" in output
    others, _ = slow_best_similarities(members[:1], labels, *[np.ones(400, bool)] * 2)
    above = np.sort(others[0])[-41] + 1e-6
    assert f"\n| 10 % | 400 | {above:.4f} | 10 % | 10 % |\n| 10 % | 200 | " in output
    names = ["drawn noise", "drawn screens", str(tmp_path / "photos"), "all of these", "test queries, another class"]
    last = output.split("searched in the whole test gallery")[1]
    numbers = re.findall(r"^\| (.+?) \| (\d+) \| .+ \| ([\d.]+) % \|$", last, re.MULTILINE)
    assert [row[:2] for row in numbers] == list(zip(names, ["3", "3", "1", "7", "400"], strict=True))
    assert numbers[-1][2] == f"{100 * (others[0] > above - 5e-7).mean():.3g}"


def test_benchmark_of_exports(small_run, monkeypatch, capsys):
    """A row for each number of cores and batch size, the first number onnxruntime's. (PyTorch is in its place.)"""
    pytest.importorskip("onnxruntime")
    networks, threads, calls = [], torch.get_num_threads(), []

    def write_graph(network, image_size, folder):
        networks.append(network)
        for name in ("model.onnx", "model.onnx.data"):
            (folder / name).write_bytes(bytes(500_000))

    def open_graph(folder, cores):
        return lambda images: calls.append((cores, torch.get_num_threads(), images.shape))

    def compare(runs, repeats, device):
        results = {name: run() for name, run in runs.items()}
        assert repeats == 3 and results["PyTorch"].shape == (calls[-1][2][0], 3)
        return {"exported": 0.25, "PyTorch": 1.0}

    monkeypatch.setattr(export, "check_packages", lambda: None)
    monkeypatch.setattr(export, "write_graph", write_graph)
    monkeypatch.setattr(export, "open_graph", open_graph)
    monkeypatch.setattr(export, "num_cores", lambda: 2)
    monkeypatch.setattr(export, "compare", compare)
    assert export.main([str(small_run), "--num_members", "1", "--repeats", "3"]) == 0
    output = capsys.readouterr().out
    assert "| 1 x resnet18, logits, 32 px, 1.0 MB | exported | PyTorch |" in output
    assert "\n| 1 core, batch 1 | 4.0 images/s | 1.0 images/s | 4.00 |\n| 1 core, batch 32 | 128.0 images/s |" in output
    assert list(table(output)) == ["1 core, batch 1", "1 core, batch 32", "2 cores, batch 1", "2 cores, batch 32"]
    assert calls == [(cores, cores, (batch, 32, 32, 3)) for cores in (1, 2) for batch in (1, 32)]
    assert len(networks[0].members) == 1 and torch.get_num_threads() == threads


def test_drawn_images_are_embedded_as_photos_are(tiny_run, tmp_path):
    """So that the similarities of both are on one scale, for several members too."""
    ensemble, generator = load_ensemble(tiny_run), np.random.default_rng(0)
    images = [thresholds.draw_noise(generator), thresholds.draw_screen(generator)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    expected = embed_images("--elsewhere", folder_items("--elsewhere", tmp_path), ensemble, 2)
    assert torch.equal(thresholds.embed_drawn(images, ensemble), expected)


def test_halves_of_the_classes_share_none():
    labels = torch.tensor([3, 1, 1, 2, 3, 5])
    pairs = list(thresholds.class_halves(labels, 4))
    assert len(pairs) == 8 and len({tuple(first.tolist()) for first, _ in pairs}) > 2
    for first, other in pairs:
        assert torch.equal(first, ~other) and not set(labels[first].tolist()) & set(labels[other].tolist())
        assert len(labels[first].unique()) == 2

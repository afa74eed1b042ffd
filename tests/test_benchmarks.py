"""The benchmarks run and print their tables, and the baseline that they compare with is right."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from builders import (
    STUDENT,
    STUDENT_TAG,
    build,
    build_small_model,
    edit_record,
    random_embeddings,
    refused,
    save_image,
    write_run,
)
from processes import ROOT
from reference import slow_best_similarities, slow_recall

import evaluate
from benchmarks import distill_search, export, plain, progress, recall, rivals, thresholds, training
from dreml.backbones import weights_tag
from dreml.console import InputError
from dreml.files import in_page_cache, read_record, sha256
from dreml.runs.settings import Settings
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


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_benchmark_of_a_cold_cache(tiny_data, capsys):
    with tempfile.NamedTemporaryFile() as file:
        os.pwrite(file.fileno(), bytes(10_000), 0)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if in_page_cache(file.fileno(), 0):
            pytest.skip("the folder for temporary files is in memory")
    options = "--image_size 32 --device cpu --repeats 2 --batch_size 4 --num_images 40 --cold"
    assert training.main([str(tiny_data / "tiny"), *options.split()]) == 0, capsys.readouterr().err
    (what,) = table(capsys.readouterr().out)
    assert what.startswith("input: uint8 from a cold cache")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_cache_that_stays_in_memory_is_not_called_cold(tiny_data, monkeypatch, capsys):
    monkeypatch.setattr(training, "evict", lambda path: path.read_bytes())
    options = "--image_size 32 --device cpu --repeats 1 --batch_size 4 --num_images 40 --cold"
    assert training.main([str(tiny_data / "tiny"), *options.split()]) == 1
    assert "its files stay in memory; choose a folder on a disk by TMPDIR" in capsys.readouterr().err


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
        (recall, ["--device", "cuda:99"], "--device cuda:99: this machine has "),
        (training, ["nowhere"], "nowhere: no such folder"),
        (training, [".", "--job", "--num_steps", "3"], "does not go with --num_images"),
        (training, [".", "--job", "--image_size", "7"], "no cache"),
        (training, [".", "--job", "--cold"], "--cold needs Linux, and does not go with --job"),
        (export, ["nowhere"], "is not a run folder"),
        (export, ["nowhere", "--student", "--num_members", "1"], "it goes without --num_members"),
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


def test_benchmark_of_progress(monkeypatch, capsys):
    """On a disk so slow that every file takes longer than an epoch; in a fifth of the epochs, each has one."""
    monkeypatch.setattr(progress, "build_model", build_small_model)
    options = "--num_epochs 10 --epoch_seconds 0.01 --megabytes 0.5 --device cpu".split()
    assert progress.main(options) == 0
    before, now = (line.split(" | ") for line in capsys.readouterr().out.splitlines()[-2:])
    assert before[:3] == ["| after each epoch", "2", "2"] and now[:4] == ["| each 30 s", "10", "0", ""]
    assert float(before[4].removesuffix(" s")) > 0.01


def test_the_slow_disk_is_slow(tmp_path):
    """As slow as it is said to be, and what is written is there."""
    disk, start = progress.SlowDisk(1e4), progress.time.perf_counter()
    with disk.open(tmp_path / "a", "wb") as file:
        file.write(bytes(1000))
    assert progress.time.perf_counter() - start >= 0.1 and (tmp_path / "a").read_bytes() == bytes(1000)
    assert (disk.num_files, disk.num_bytes) == (1, 1000)


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


@pytest.mark.parametrize(
    ("options", "what", "d"),
    [(["--num_members", "1"], "1 x resnet18, logits", 3), (["--student"], f"student {STUDENT_TAG}, pooled", 16)],
)
def test_benchmark_of_exports(small_student, monkeypatch, capsys, options, what, d):
    """A row for each number of cores and batch size, the first number onnxruntime's. (PyTorch is in its place.)"""
    pytest.importorskip("onnxruntime")
    networks, threads, calls = [], torch.get_num_threads(), []

    def write_graph(parts, image_size, folder):
        networks.extend(parts)
        for name in ("model.onnx", "model.onnx.data"):
            (folder / name).write_bytes(bytes(500_000))

    def open_graph(folder, cores):
        return lambda images: calls.append((cores, torch.get_num_threads(), images.shape))

    def compare(runs, repeats, device):
        results = {name: run() for name, run in runs.items()}
        assert repeats == 3 and results["PyTorch"].shape == (calls[-1][2][0], d)
        return {"exported": 0.25, "PyTorch": 1.0}

    monkeypatch.setattr(export, "check_packages", lambda: None)
    monkeypatch.setattr(export, "write_graph", write_graph)
    monkeypatch.setattr(export, "open_graph", open_graph)
    monkeypatch.setattr(export, "num_cores", lambda: 2)
    monkeypatch.setattr(export, "compare", compare)
    assert export.main([str(small_student), *options, "--repeats", "3"]) == 0
    output = capsys.readouterr().out
    assert f"| {what}, 32 px, 1.0 MB | exported | PyTorch |" in output
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


# ------------------------------------------------------------------------------------------------ ways of distilling


def try_recipe(run, *options: str) -> dict:
    """The row that a try adds to the run's table."""
    assert distill_search.main(["try", str(run), *STUDENT, *options]) == 0
    return pd.read_csv(run / "distill_search.csv").iloc[-1].to_dict()


def test_without_options_a_try_is_the_student_of_distill(small_student, tmp_path):
    """The same draws and steps, so the same bits; its teacher's recall stands beside it."""
    run = shutil.copytree(small_student, tmp_path / "run")
    folder = run / f"student_{STUDENT_TAG}"
    history, recall = read_record(folder / "student.json")["history"], pd.read_csv(folder / "recall.csv")
    row = try_recipe(run)
    assert row["loss"] == history[-1]["loss"] and row["num_members"] == 2 and row["weights"] == "member1"
    np.testing.assert_allclose([row["logits"], row["pooled"], row["ensemble"]], recall["R@1"][[0, 1, 3]], atol=5e-5)
    # Each block of the student beside its member's answer, (M, 2, D); both of length 1 / sqrt(2)
    blocks = np.stack(np.split(np.load(folder / "logits.npy"), 2, axis=1), 1)
    answers = np.stack([np.load(run / f"member_00{member}.npy") for member in (1, 2)], 1)
    cosines = (blocks * answers).sum(2) / np.linalg.norm(blocks, axis=2) / np.linalg.norm(answers, axis=2)
    assert row["cosine"] == pytest.approx(100 * cosines.mean(), abs=1e-3)
    assert evaluate.main([str(run), "--student"]) == 0
    evaluation = pd.read_csv(folder / "evaluation_pooled.csv")
    assert row["pooled_map"] == pytest.approx(evaluation["mAP@R"][0], abs=1e-3)


def test_every_way_of_distilling_is_another_student(small_run, tmp_path, capsys):
    run = shutil.copytree(small_run, tmp_path / "run")
    options = [["--targets", name] for name in distill_search.TARGETS] + [
        ["--mix", name] for name in distill_search.MIXERS if name != "mixup"
    ]
    options += [["--average"], ["--weight_decay", "0.5"], ["--targets", "labels", "--mix", "none"]]
    losses = [try_recipe(run, *each)["loss"] for each in options]
    assert len(set(losses)) == len(options) and np.isfinite(losses).all()
    assert pd.read_csv(run / "distill_search.csv").dim.tolist() == [0, 512, 512, 512, 32, *7 * [0]]
    assert "does not go with --targets labels" in refused(
        capsys, distill_search, "try", run, "--targets", "labels", "--dim", "3"
    )


@pytest.mark.parametrize("loss", rivals.LOSSES)
def test_a_rival_learns_the_classes(small_run, tmp_path, capsys, monkeypatch, loss):
    """Network and proxies both. The same seed gives the same row again."""
    pytest.importorskip("pytorch_metric_learning")
    learners, before = [], []

    def spied(build):
        def call(*args):
            learners.append(build(*args))
            before.append([parameter.detach().clone() for parameter in learners[-1].parameters()])
            return learners[-1]

        return call

    monkeypatch.setattr(rivals, "build_model", spied(rivals.build_model))
    monkeypatch.setattr(rivals, "make_loss", spied(rivals.make_loss))
    run = shutil.copytree(small_run, tmp_path / "run")
    for _ in range(2):
        assert rivals.main([str(run), "--loss", loss, "--num_epochs", "4"]) == 0
    losses = [float(text) for text in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[3] < losses[0] and losses[4:] == losses[:4]
    table = pd.read_csv(run / "rivals.csv").drop(columns="seconds")
    assert table.iloc[0].equals(table.iloc[1]) and 0 < table["R@1"][0] < 100
    network, proxies = (
        [*map(torch.equal, learner.parameters(), old)] for learner, old in zip(learners[:2], before[:2], strict=True)
    )
    assert proxies == [False] and sum(network) == 2  # its unused last layer


def test_a_rival_that_overflows_stops(small_run, tmp_path, capsys):
    pytest.importorskip("pytorch_metric_learning")
    run = shutil.copytree(small_run, tmp_path / "run")
    options = [str(run), "--loss", "proxy_anchor", "--num_epochs", "4"]
    assert rivals.main([*options, "--lr", "1e30"]) == 1
    assert "the loss is not finite; try a lower --lr" in capsys.readouterr().err
    assert "--lr" in refused(capsys, rivals, *options, "--lr", "0")


def test_a_rival_begins_as_the_members_did(tmp_path):
    state = torchvision.models.resnet18(num_classes=3).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    assert rivals.initial_weights(Settings("tiny", weights="none"), None) is None
    of_run = Settings("tiny", weights=weights_tag("resnet18", str(tmp_path / "weights.pth")))
    weights = rivals.initial_weights(of_run, str(tmp_path / "weights.pth"))
    assert torch.equal(weights["conv1.weight"], state["conv1.weight"])
    for given in (None, "none"):
        with pytest.raises(InputError, match="has to name that, or its file"):
            rivals.initial_weights(of_run, given)


def test_a_fifth_of_the_training_classes_becomes_the_test_split(tiny_data, tmp_path, capsys):
    """The real test images are nowhere; the links are a data set that can be cached."""
    source = tmp_path / "set"
    shutil.copytree(tiny_data / "tiny" / "train", source / "train")
    shutil.copytree(tiny_data / "tiny" / "test", source / "test")
    assert distill_search.main(["split", str(source)]) == 0
    assert capsys.readouterr().out == f"{source}_fifth: 5 classes to train on, 1 to judge by\n"
    counts = build(tmp_path, "set_fifth").counts
    assert counts == {"train": (5, 30), "test": (1, 6)}
    files = [path.resolve() for path in (tmp_path / "set_fifth").rglob("*.png")]
    assert sorted(files) == sorted((source / "train").rglob("*.png"))
    assert "is there already" in refused(capsys, distill_search, "split", source)


def test_cutmix_puts_a_box_of_the_partner_into_an_image():
    """Of area 1 - weight, cut at the border; the share of the image is what is left."""
    pixels = torch.stack([torch.full((3, 20, 20), float(number)) for number in range(3)])
    mixing = distill_search.Mixing(
        torch.tensor([1, 2, 2]), torch.tensor([0.75, 0.75, 0.0]), torch.tensor([[0.5, 0.25], [0.0, 1.0], [0.5, 0.5]])
    )
    mixed, shares = distill_search.cutmix(pixels, mixing)
    expected = pixels.clone()
    expected[0, :, 5:15, 0:10] = 1
    expected[1, :, :5, 15:] = 2
    assert torch.equal(mixed, expected)
    torch.testing.assert_close(shares, torch.tensor([0.75, 1 - 25 / 400, 0.0]))
    # Every other image so, the second one by mixup
    mixed, shares = distill_search.either(pixels, mixing)
    expected[1] = 0.75 * 1 + 0.25 * 2
    assert torch.equal(mixed, expected)
    torch.testing.assert_close(shares, torch.tensor([0.75, 0.75, 0.0]))


def test_the_losses_of_the_search():
    """Against their formulas, pair by pair and block by block."""
    generator = np.random.default_rng(0)
    outputs, answers = generator.normal(size=(4, 6)), generator.normal(size=(4, 5))
    answers /= np.linalg.norm(answers, axis=1, keepdims=True)
    unit = outputs / np.linalg.norm(outputs, axis=1, keepdims=True)
    total = 0.0
    for one in range(4):
        mean = np.mean([np.linalg.norm(unit[one] - other) for other in unit])
        for other in set(range(4)) - {one}:
            distance = np.linalg.norm(unit[one] - unit[other]) / mean
            alike = np.exp(-(np.linalg.norm(answers[one] - answers[other]) ** 2))
            total += alike * distance**2 + (1 - alike) * max(0, 1 - distance) ** 2
    found = distill_search.relaxed_contrastive_loss(torch.from_numpy(outputs), torch.from_numpy(answers))
    assert found.item() == pytest.approx(total / 12)

    shares = np.array([[[0.3, 0.7, 0.0], [1.0, 0.0, 0.0]]] * 4)  # (B, L, D)
    blocks = outputs.reshape(4, 2, 3)
    logs = blocks - np.log(np.exp(blocks).sum(2, keepdims=True))
    found = distill_search.hard_label_loss(torch.from_numpy(outputs), torch.from_numpy(shares))
    assert found.item() == pytest.approx(-(shares * logs).sum(2).mean())

"""The benchmarks run and print their tables, and the baseline that they compare with is right."""

import os
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import (
    build_small_model,
)
from processes import ROOT
from reference import slow_recall

from benchmarks import plain, progress, recall, rival, training
from dreml.batches import MixedTargets
from dreml.files import in_page_cache


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


# ------------------------------------------------------------------------------------------------ the rival


def test_the_rival_equals_the_library_where_each_image_has_one_class():
    """Against pytorch-metric-learning, with its gradient; then by hand for an image of two classes."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    loss, rows, labels = losses.ProxyAnchorLoss(7, 5), torch.randn(9, 5, requires_grad=True), torch.randint(0, 7, (9,))
    ours, theirs = rival.proxy_anchor(loss, rows, rival.class_shares(labels, 7)), loss(rows, labels)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, rows), torch.autograd.grad(theirs, rows))

    targets = MixedTargets(torch.tensor([1]), torch.tensor([4]), torch.tensor([0.25]))
    shares = rival.class_shares(targets, 7)
    assert shares.tolist() == [[0, 0.25, 0, 0, 0.75, 0, 0]]
    cosines = torch.cosine_similarity(rows[:1], loss.proxies)
    near = [torch.log(1 + share * torch.exp(-32 * (cosines[c] - 0.1))) for c, share in ((1, 0.25), (4, 0.75))]
    far = [torch.log(1 + (1 - shares[0, c]) * torch.exp(32 * (cosines[c] + 0.1))) for c in range(7)]
    expected = sum(near) / 2 + sum(far) / 7
    torch.testing.assert_close(rival.proxy_anchor(loss, rows[:1], shares), expected)


@pytest.mark.parametrize("options", [[], ["--mixup"]])
def test_the_rival_learns_the_classes(tiny_data, monkeypatch, capsys, options):
    pytest.importorskip("pytorch_metric_learning")
    monkeypatch.setattr(rival, "build_model", build_small_model)
    base = ["--data_name", "tiny", "--data_path", str(tiny_data), "--image_size", "32", "--weights", "none"]
    numbers = ["--num_epochs", "8", "--batch_size", "16", "--lr", "1e-2", "--schedule", "onecycle", "--device", "cpu"]
    assert rival.main([*base, *numbers, *options]) == 0
    output = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^epoch \d: loss (\S+)$", output, re.MULTILINE)]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert re.search(r"^R@1 \d+\.\d\d, mAP@R \d+\.\d\d, \d+ s of training$", output, re.MULTILINE)

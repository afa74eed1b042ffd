"""The benchmarks run and print their tables, and the baseline that they compare with is right."""

import re
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from builders import build_small_model
from processes import ROOT
from reference import slow_recall

from benchmarks import gpu, plain, progress, recall, rival, training
from dreml.files import read_record


def table(output: str) -> dict[str, float]:
    """What -> ratio."""
    return {what: float(ratio) for what, ratio in re.findall(r"^\| (.+?) \|.*\| ([\d.]+) \|$", output, re.MULTILINE)}


@pytest.fixture
def small_networks(small_network, monkeypatch):
    """Small networks in the plain way too."""
    small = lambda name, weights, num_classes: build_small_model(name, num_classes, None)  # noqa: E731
    monkeypatch.setattr(torchvision.models, "get_model", small)
    monkeypatch.setattr(progress, "build_model", build_small_model)


def test_the_plain_recall_is_recall():
    generator = np.random.default_rng(0)
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


def test_benchmark_of_training(threads, small_networks, tiny_data, capsys):
    """Every row of the table, in its order: benchmarks/README.md has them."""
    options = "--image_size 32 --device cpu --repeats 1 --batch_size 4 --num_images 8 --num_steps 2"
    assert training.main([str(tiny_data / "tiny"), *options.split()]) == 0, capsys.readouterr().err
    ratios = table(capsys.readouterr().out)
    parts = ["preprocessing", "step", "embedding", "epoch of 2 steps"]
    assert [what.startswith(part) for what, part in zip(ratios, parts, strict=True)] == [True] * 4
    assert all(ratio > 0 for ratio in ratios.values())


@pytest.mark.parametrize(
    ("benchmark", "options", "message"),
    [(recall, ["--scale", "0.001"], "at least 0.01"), (training, ["nowhere"], "nowhere: no such folder")],
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
    assert re.search(r"N=605 d=8,000: [\d.]+ s, [\d.]+ GiB beside", output)


def test_benchmark_of_progress(small_networks, monkeypatch, capsys):
    """On a disk so slow that writing takes longer than an epoch."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_WRITES", 0)
    assert progress.main("--num_epochs 10 --epoch_seconds 0.01 --megabytes 0.5 --device cpu".split()) == 0
    (line,) = re.findall(r"^\| every .*$", capsys.readouterr().out, re.MULTILINE)
    assert re.fullmatch(r"\| every 0 s at most, 0.5 MB/s \| [1-9]\d* \| 0 MB each \| 0\.\d\d \|", line)


def test_benchmark_of_a_gpu_on_a_cpu(processes, threads, small_networks, tmp_path, monkeypatch, capsys):
    """All parts but that of CUDA graphs; then the same command finds them in its file, and tries what is missing."""

    def start(command, **_):
        return processes.start(*command[1:], folder=ROOT)

    def run(command, **_):
        script = start(command)
        return SimpleNamespace(returncode=script.wait(), stdout=script.out, stderr=script.err)

    fake = SimpleNamespace(run=run, Popen=start, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(gpu, "subprocess", fake)
    options = ["--device", "cpu", "--small", "--file", str(tmp_path / "gpu.json")]
    assert gpu.main(options) == 0
    output = capsys.readouterr().out
    assert "| CUDA graph | not measured: RunError: CUDA graphs need CUDA | | |" in output
    assert output.count("not measured") == 1 and "--small --device cpu" in output.partition("\n")[0]
    assert list(read_record(tmp_path / "gpu.json")["parts"]) == [name for name in gpu.PARTS if name != "CUDA graph"]
    ratios = table(output)
    assert len(ratios) >= 19

    for name in gpu.PARTS:
        monkeypatch.setitem(gpu.PARTS, name, lambda plan: [["once more", "1 s", "2 s", "2.00"]])
    assert gpu.main(options) == 0
    assert table(capsys.readouterr().out) == ratios | {"once more": 2.0}
    assert gpu.main([*options[:2], *options[3:]]) == 2
    assert "gpu.json is of another machine or command" in capsys.readouterr().err


def test_what_a_gpu_has_no_time_for_is_named(tmp_path, monkeypatch, capsys):
    """Each part is stored as it is done; a part that fails is named and costs no other."""

    def fail(plan):
        raise ValueError("of this part")

    parts = {"a": lambda plan: [["a", "1 s", "2 s", "2.00"]], "b": fail, "c": lambda plan: pytest.fail("no time")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    clock = iter([0.0, 1.0, 2.0, 3.0, 4.0, 300.0])
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(clock))
    assert gpu.main(["--device", "cpu", "--file", str(tmp_path / "gpu.json")]) == 0
    output = capsys.readouterr().out
    assert "| b | not measured: ValueError: of this part | | |" in output
    assert "| c | not measured: not begun after 200 s" in output
    assert read_record(tmp_path / "gpu.json")["parts"] == {"a": [["a", "1 s", "2 s", "2.00"]]}


def test_windows_are_cut_on_the_device_as_in_the_cache(tiny_cache):
    generator = np.random.default_rng(0)
    images = generator.integers(0, len(tiny_cache.array("train_labels")), 10)
    corners = generator.integers(0, tiny_cache.array("train_sizes")[images] - 31)
    expected = np.empty((10, 32, 32, 3), np.uint8)
    tiny_cache.train_crops(images, corners, np.full(10, 32), expected)
    cache = gpu.ResidentCache(tiny_cache, torch.device("cpu"))
    crops = cache.crops(torch.from_numpy(images), torch.from_numpy(corners), 32)
    np.testing.assert_array_equal(crops, expected)
    batches = list(cache.random_batches(16, 32))
    assert sum(map(len, batches)) == len(tiny_cache.array("train_labels")) and batches[0].shape == (16, 32, 32, 3)


def test_the_rival_equals_the_library_where_each_image_has_one_class():
    """Against pytorch-metric-learning, with its gradient; then by hand for an image of two classes."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    loss, rows, labels = losses.ProxyAnchorLoss(7, 5), torch.randn(9, 5, requires_grad=True), torch.randint(0, 7, (9,))
    ours, theirs = rival.proxy_anchor(loss, rows, labels), loss(rows, labels)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, rows), torch.autograd.grad(theirs, rows))

    shares = torch.tensor([[0, 0.25, 0, 0, 0.75, 0, 0]])
    cosines = torch.cosine_similarity(rows[:1], loss.proxies)
    near = [torch.log(1 + share * torch.exp(-32 * (cosines[c] - 0.1))) for c, share in ((1, 0.25), (4, 0.75))]
    far = [torch.log(1 + (1 - shares[0, c]) * torch.exp(32 * (cosines[c] + 0.1))) for c in range(7)]
    expected = sum(near) / 2 + sum(far) / 7
    torch.testing.assert_close(rival.proxy_anchor(loss, rows[:1], shares), expected)


@pytest.mark.parametrize("options", [[], ["--mixup"]])
def test_the_rival_learns_the_classes(tiny_data, small_networks, capsys, options):
    pytest.importorskip("pytorch_metric_learning")
    base = ["--data_name", "tiny", "--data_path", str(tiny_data), "--image_size", "32", "--weights", "none"]
    numbers = ["--num_epochs", "8", "--batch_size", "16", "--lr", "1e-2", "--schedule", "onecycle", "--device", "cpu"]
    assert rival.main([*base, *numbers, *options]) == 0
    output = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^epoch \d: loss (\S+)$", output, re.MULTILINE)]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert re.search(r"^R@1 \d+\.\d\d, mAP@R \d+\.\d\d, \d+ s of training$", output, re.MULTILINE)

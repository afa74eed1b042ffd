"""Options, one member, the run folder and the logs."""

import copy
import hashlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from conftest import TINY, save_image
from test_utils import slow_recall
from torch import nn

import data_utils
import train
import utils
from data_utils import read_cache
from model import Head, build_model, load_ensemble, member_outputs, resize_windows
from train import (
    Batch,
    Members,
    Sums,
    batch_spans,
    learning_rate,
    make_optimizer,
    member_images,
    prepared,
    train_batches,
    train_member,
    train_step,
)
from utils import draws, meta_class_partition, read_record, write_record

CPU = torch.device("cpu")


def run(data: Path, results: Path, *options: str) -> int:
    """Later options override those of TINY."""
    return train.main([*TINY, "--data_path", str(data), "--results_path", str(results), *options])


def only_folder(results: Path) -> Path:
    (folder,) = (path for path in results.iterdir() if path.is_dir())
    return folder


def digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*_):
        raise AssertionError("nothing was to be trained")

    monkeypatch.setattr(train, "train_member", refuse)


# ------------------------------------------------------------------------------------------------ one member


@pytest.mark.parametrize(
    ("optimizer", "tenths"),
    [
        ("adam", [0]),
        ("adam", [0, 2]),
        ("adam", [0, 1, 2]),
        ("adam", [0] * 6 + [1] * 2 + [2] * 4),
        ("adam", [0] * 10 + [1] * 4 + [2] * 6),
        ("adam", [0] * 25 + [1] * 10 + [2] * 15),
        ("sgd", [0]),
        ("sgd", [0, 1, 2]),
        ("sgd", [0] * 6 + [1] * 3 + [2] * 3),
        ("sgd", [0] * 10 + [1] * 6 + [2] * 4),
    ],
)
def test_learning_rate(optimizer, tenths):
    num_epochs, milestones = len(tenths), train.RECIPES[optimizer].milestones
    rates = [learning_rate(0.5, epoch, num_epochs, milestones) for epoch in range(num_epochs)]
    np.testing.assert_allclose(rates, [0.5 * 10.0**-tenth for tenth in tenths])


@pytest.mark.parametrize(
    ("num_images", "batch_size", "expected"),
    [(10, 4, [(0, 4), (4, 8), (8, 10)]), (9, 4, [(0, 4), (4, 9)]), (8, 4, [(0, 4), (4, 8)]), (3, 4, [(0, 3)])],
)
def test_a_last_batch_of_one_joins_the_one_before(num_images, batch_size, expected):
    assert batch_spans(num_images, batch_size) == expected


def test_large_classes_are_cut_to_a_random_300():
    labels = np.repeat([0, 1, 2], [350, 20, 300])
    first, again, other = (member_images(labels, 0, member) for member in (1, 1, 2))
    assert np.bincount(labels[first]).tolist() == [300, 20, 300]
    assert len(np.unique(first)) == len(first) and np.array_equal(first, again)
    assert not np.array_equal(first, other)
    large = [np.intersect1d(images, np.arange(350)) for images in (first, other)]
    assert 240 < len(np.intersect1d(*large)) < 275  # two random 300 of 350 share 257 on average


@pytest.fixture
def tiny_args(tiny_data):
    return train.parse_args([*TINY, "--data_path", str(tiny_data)])


@pytest.fixture
def tiny_cache(tiny_data):
    return read_cache(tiny_data, "tiny", 32)


def epoch_of(cache, args, member=1, epoch=0):
    """The whole epoch in one batch: windows, targets (here the image's number), flips, sides."""
    images = np.arange(cache.counts["train"][1])
    batches = list(train_batches(cache, images, images, args, member, epoch, CPU))
    flips = [np.arange(len(batch.targets)) < batch.num_mirrored for batch in batches]
    sides = [np.full(len(b.targets), args.image_size) if b.sides is None else b.sides.numpy() for b in batches]
    windows, targets = (torch.cat([batch[place] for batch in batches]).numpy() for place in (0, 1))
    return windows, targets, np.concatenate(flips), np.concatenate(sides)


@pytest.fixture
def seen(monkeypatch):
    """The (images, corners, sides) of every batch that is cut from a cache from now on."""
    cuts, original = [], data_utils.Cache.train_crops

    def train_crops(self, images, corners, sides, out):
        cuts.append((images, corners, sides))
        original(self, images, corners, sides, out)

    monkeypatch.setattr(data_utils.Cache, "train_crops", train_crops)
    return cuts


def all_windows(cache, number, side):
    """Every window of this side of one cached training image, by brute force."""
    offsets, (height, width) = cache.array("train_offsets"), cache.array("train_sizes")[number]
    image = cache.array("train_pixels")[offsets[number] : offsets[number + 1]].reshape(height, width, 3)
    corners = [(top, left) for top in range(height - side + 1) for left in range(width - side + 1)]
    return np.array([image[top : top + side, left : left + side] for top, left in corners])


def test_batches_of_an_epoch(tiny_cache, tiny_args):
    """Every image once, in random order; each crop is a window of its image; all depends on (seed, member, epoch)."""
    crops, numbers, flips, _ = epoch_of(tiny_cache, tiny_args)
    assert sorted(numbers) == list(range(36)) and list(numbers) != list(range(36))
    assert crops.dtype == np.uint8 and crops.shape == (36, 32, 32, 3) and flips.dtype == bool
    for crop, number in zip(crops, numbers, strict=True):
        windows = all_windows(tiny_cache, number, 32)
        assert len(windows) == 16 and (windows == crop).all((1, 2, 3)).any()  # 35 -> 32
    again = epoch_of(tiny_cache, tiny_args)
    assert all(np.array_equal(a, b) for a, b in zip((crops, numbers, flips), again, strict=False))
    for other in (epoch_of(tiny_cache, tiny_args, member=2), epoch_of(tiny_cache, tiny_args, epoch=1)):
        assert not np.array_equal(numbers, other[1])
        assert set(numbers[flips]) != set(other[1][other[2]])


def test_every_offset_and_both_mirrorings_are_reached(tiny_cache, tiny_args, seen):
    """35 -> 32 leaves offsets 0..3 on both axes, independent and equally likely; half of the crops are mirrored."""
    flips = np.concatenate([epoch_of(tiny_cache, tiny_args, epoch=epoch)[2] for epoch in range(100)])
    corners = np.concatenate([corners for _, corners, _ in seen])
    counts = np.zeros((4, 4))
    np.add.at(counts, (corners[:, 0], corners[:, 1]), 1)  # 3,600 crops, 225 each, standard deviation 14.5
    assert counts.sum() == 3600 and counts.min() > 165 and counts.max() < 285
    assert abs(flips.mean() - 0.5) < 0.034  # four standard deviations
    tiny_args.no_flip = True
    assert not epoch_of(tiny_cache, tiny_args)[2].any()


def test_random_resize_draws_sides_and_then_corners(tiny_cache, tiny_args, seen):
    """--scale_min 0.75: sides 24..32 equally likely; whatever the side, each window of the image can come."""
    tiny_args.scale_min = 0.75
    windows, numbers, _, sides = epoch_of(tiny_cache, tiny_args)
    for window, number, side in zip(windows, numbers, sides, strict=True):
        assert (all_windows(tiny_cache, number, side) == window[:side, :side]).all((1, 2, 3)).any()
        assert not window[side:].any() and not window[:, side:].any()
    for epoch in range(1, 200):
        epoch_of(tiny_cache, tiny_args, epoch=epoch)
    corners, sides = (np.concatenate(arrays) for arrays in list(zip(*seen, strict=True))[1:])
    counts = np.bincount(sides)
    assert counts[:24].sum() == 0 and len(counts) == 33  # 7,200 windows, 800 of each side, standard deviation 27
    assert counts[24:].min() > 690 and counts[24:].max() < 910
    for side in range(24, 33):
        reached = corners[sides == side]
        assert (reached.min(0) == 0).all() and (reached.max(0) == 35 - side).all()
        assert abs(np.corrcoef(reached.T)[0, 1]) < 0.15  # both axes independent: four standard deviations
    again = epoch_of(tiny_cache, tiny_args)
    assert np.array_equal(windows, again[0])


def test_random_resize_never_draws_an_empty_window(tiny_cache, tiny_args, seen):
    tiny_args.scale_min = 1e-9
    epoch_of(tiny_cache, tiny_args)
    assert min(sides.min() for _, _, sides in seen) >= 1


def test_without_random_resize_nothing_is_resized(tiny_cache, tiny_args):
    images = np.arange(36)
    assert all(batch.sides is None for batch in train_batches(tiny_cache, images, images, tiny_args, 1, 0, CPU))


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
def test_the_optimizer_is_one_kernel(name, kind):
    for device, fused in (("cpu", True), ("cuda", True), ("mps", False)):
        optimizer = make_optimizer(name, nn.Linear(2, 2), 0.1, torch.device(device))
        assert type(optimizer) is kind and optimizer.defaults["fused"] == fused
        assert optimizer.defaults["weight_decay"] == 0


def test_corners_fit_images_of_every_shape(tmp_path, tiny_args, seen):
    """Portrait and landscape: a corner outside its own image would fail in train_crops, and all of it is reached."""
    for number, (width, height) in enumerate([(40, 80), (80, 40), (40, 40), (120, 40)]):
        for split in ("train", "test"):
            save_image(tmp_path / "odd" / split / f"c{number}" / "0.png", number, width=width, height=height)
    assert data_utils.main(["--data_path", str(tmp_path), "--image_size", "32"]) == 0
    cache = read_cache(tmp_path, "odd", 32)
    for epoch in range(50):
        epoch_of(cache, tiny_args, epoch=epoch)
    images, corners, _ = (np.concatenate(arrays) for arrays in zip(*seen, strict=True))
    for image, last in enumerate(cache.array("train_sizes") - 32):
        assert (corners[images == image].max(0) >= 0.8 * last).all()


def test_batches_draw_their_own_corners_and_flips(tiny_cache, tiny_args, seen):
    """The images mirrored are first in each batch; how many varies."""
    images = np.arange(36)
    mirrored = [
        b.num_mirrored
        for epoch in range(5)
        for b in train_batches(tiny_cache, images, images, tiny_args, 1, epoch, CPU)
    ]
    assert not np.array_equal(seen[0][1], seen[1][1]) and len(set(mirrored)) > 4


def test_prepared_mirrors_enlarges_and_normalises():
    torch.manual_seed(0)
    images, mean, std = (
        torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8),
        torch.tensor([0.5, 0.4, 0.3]),
        torch.tensor([0.2, 0.3, 0.4]),
    )
    for sides in (None, torch.tensor([8, 5, 6, 3])):
        whole = images if sides is None else resize_windows(images, sides)
        expected = (whole.permute(0, 3, 1, 2) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        expected = torch.cat([expected[:3].flip(-1), expected[3:]])
        pixels = prepared(Batch(images.clone(), torch.zeros(4), 3, sides), mean, std)
        torch.testing.assert_close(pixels, expected)
        assert pixels.is_contiguous(memory_format=torch.channels_last)


def no_scaling():
    return torch.amp.GradScaler("cpu", enabled=False)


def test_train_step_equals_a_plain_step():
    """Against the same step written out."""
    torch.manual_seed(0)
    # Small and smooth: in a ReLU network on few images, rounding alone moves gradients visibly.
    layers = [nn.Conv2d(3, 4, 5), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    models = [nn.Sequential(*layers), copy.deepcopy(nn.Sequential(*layers))]
    pixels, targets = torch.randn(8, 3, 32, 32), torch.tensor([0, 2, 1, 1, 0, 2, 0, 1])
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    sums = Sums(torch.tensor(10.0), torch.tensor(10), torch.tensor(3), 3)
    models[0][-1].weight.grad = torch.ones(3, 16)  # of an earlier step: must not count
    train_step(models[0], optimizers[0], no_scaling(), "fp32", pixels, targets, sums)

    logits = models[1](pixels)
    loss = -logits.log_softmax(1)[range(8), targets].mean()
    loss.backward()
    optimizers[1].step()
    assert (sums.steps, sums.finite_steps.item()) == (4, 4)
    assert sums.correct.item() == 10 + (logits.argmax(1) == targets).sum().item()
    assert sums.loss.item() == pytest.approx(10 + 8 * loss.item(), rel=1e-5)
    for parameter, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


def test_fp16_gradients_are_scaled_and_an_overflow_skips_the_step():
    """A loss so small that its gradients vanish in fp16 unless they are scaled; then a scale that overflows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Head(4, 2))
    model[3].weight.data = torch.tensor([[1e-7, 0, 0, 0], [0, 0, 0, 1e-7]])
    pixels, targets = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 1])
    gradients = {}
    for scale in (1.0, 2.0**16, 2.0**100):
        trained = copy.deepcopy(model)
        optimizer, scaler = make_optimizer("adam", trained, 0.1, CPU), torch.amp.GradScaler("cpu", init_scale=scale)
        train_step(trained, optimizer, scaler, "fp16", pixels, targets, Sums.zeros(CPU))
        gradients[scale] = trained[0].weight.grad.abs().max().item()
        moved = [
            not torch.equal(new.weight, old.weight) for new, old in ((trained[0], model[0]), (trained[3], model[3]))
        ]
        assert moved == {1.0: [False, True], 2.0**16: [True, True], 2.0**100: [False, False]}[scale]
        assert scaler.get_scale() == (scale / 2 if scale == 2.0**100 else scale)
    assert gradients[1.0] == 0


def test_sgd_equals_the_definition_of_momentum():
    """Against PyTorch's plain loop, and against the formula."""
    torch.manual_seed(0)
    ours, plain = nn.Linear(4, 3), nn.Linear(4, 3)
    plain.load_state_dict(ours.state_dict())
    weight, velocity = ours.weight.detach().clone(), torch.zeros(3, 4)
    optimizers = make_optimizer("sgd", ours, 0.1, CPU), torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    for _ in range(5):
        pixels, targets = torch.randn(8, 4), torch.randint(0, 3, (8,))
        train_step(ours, optimizers[0], no_scaling(), "fp32", pixels, targets, Sums.zeros(CPU))
        optimizers[1].zero_grad()
        nn.functional.cross_entropy(plain(pixels), targets).backward()
        optimizers[1].step()
        velocity = 0.9 * velocity + plain.weight.grad
        weight = weight - 0.1 * velocity
        torch.testing.assert_close(ours.weight, weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.bias, plain.bias, rtol=1e-5, atol=1e-6)


def test_the_momentum_of_sgd_survives_an_overflow_in_the_first_step():
    """PyTorch's fused SGD would go on from uninitialised memory."""
    model = nn.Linear(2, 2)
    optimizer = make_optimizer("sgd", model, 0.1, CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before, targets = copy.deepcopy(model.state_dict()), torch.tensor([0])
    train_step(model, optimizer, scaler, "fp32", torch.full((1, 2), 8.0), targets, Sums.zeros(CPU))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert scaler.get_scale() == 2.0**126
    for state in optimizer.state.values():
        assert not state["momentum_buffer"].any()
    assert len(optimizer.state) == 2


def test_sgd_makes_another_run(tiny_data, tmp_path):
    """At its own rate, with its own decay."""
    options = ["--ensemble_size", "1", "--num_epochs", "5", "--optimizer", "sgd"]
    assert run(tiny_data, tmp_path, *options, "--lr", "0.01") == 0
    folder = only_folder(tmp_path)
    assert folder.name == "tiny_resnet18_D3_e5_s0_i32_b16_sgd_wnone_fp32"
    settings = json.loads((folder / "args.json").read_text())["settings"]
    assert (settings["optimizer"], settings["lr"]) == ("sgd", 0.01)
    np.testing.assert_allclose(pd.read_csv(folder / "train.csv").lr, [1e-2, 1e-2, 1e-3, 1e-3, 1e-4])


@pytest.fixture
def squashed_data(tmp_path) -> Path:
    """Wide images with a cache of both kinds."""
    data = tmp_path / "data"
    for number, (split, name) in enumerate(itertools.product(("train", "test"), "aaabbbccc")):
        path = data / "tiny" / split / name / f"{number}.png"
        save_image(path, number, width=80, height=40)
    for resize in ("crop", "squash"):
        assert data_utils.main(["--data_path", str(data), "--image_size", "32", "--resize", resize]) == 0
    return data


def test_squash_makes_another_run_from_its_own_cache(squashed_data, tmp_path, seen):
    sizes = {}
    for resize in ("crop", "squash"):
        options = ["--resize", resize, "--ensemble_size", "1", "--num_epochs", "1"]
        assert run(squashed_data, tmp_path / resize, *options) == 0
        folder = only_folder(tmp_path / resize)
        tag = {"crop": "", "squash": "_squash"}[resize]
        assert folder.name == f"tiny_resnet18_D3_e1_s0_i32{tag}_b16_lr0.001_wnone_fp32"
        record = read_record(folder / "args.json", utils.RUN_RECORD)
        cache = read_cache(squashed_data, "tiny", 32, resize)
        assert (
            record["settings"]["resize"] == load_ensemble(folder).resize == resize
            and record["data"]["fingerprint"] == cache.fingerprint
        )
        sizes[resize] = max(corners[:, 1].max() for _, corners, _ in seen)
        seen.clear()
    assert sizes["squash"] <= 3 < sizes["crop"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_another_precision(tiny_data, tmp_path, precision, monkeypatch):
    """Backbone in that precision in training and in embedding, gradient scaling for fp16 only; all of it recorded."""
    seen, scaling, original = [], [], train.train_step

    def step(model, optimizer, scaler, *rest):
        scaling.append(scaler.is_enabled())
        hook = model.conv1.register_forward_hook(
            lambda module, inputs, output: seen.append((model.training, output.dtype))
        )
        original(model, optimizer, scaler, *rest)
        if len(scaling) < 6:
            hook.remove()  # the last one stays for the embedding

    monkeypatch.setattr(train, "train_step", step)
    assert run(tiny_data, tmp_path, "--precision", precision, "--ensemble_size", "1") == 0
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert set(seen) == {(True, dtype), (False, dtype)} and set(scaling) == {precision == "fp16"}
    folder = only_folder(tmp_path)
    assert folder.name.endswith(f"_wnone_{precision}")
    assert json.loads((folder / "args.json").read_text())["settings"]["precision"] == precision
    assert 10 < pd.read_csv(folder / "recall.csv")["R@1"][0] < 100


def test_random_resize_makes_another_run(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert run(tiny_data, tmp_path, "--ensemble_size", "1", "--scale_min", "0.5") == 0
    folder = only_folder(tmp_path)
    assert folder.name.endswith("_scale0.5_fp32") and torch.backends.cudnn.benchmark
    assert json.loads((folder / "args.json").read_text())["settings"]["scale_min"] == 0.5


@pytest.mark.parametrize("value", ["0", "1.01", "-1", "nan", "x"])
def test_a_scale_outside_0_to_1_is_refused(tiny_data, tmp_path, capsys, value):
    assert run(tiny_data, tmp_path, "--scale_min", value) == 2
    error = capsys.readouterr().err
    assert "--scale_min" in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_auto_goes_on_in_the_precision_of_the_run(tiny_data, tmp_path, monkeypatch, capsys):
    """Begun on a device that is fast in bf16, gone on with on one that is not."""
    monkeypatch.setattr(train, "pick_precision", lambda device: "bf16")
    assert run(tiny_data, tmp_path, "--precision", "auto", "--ensemble_size", "1") == 0
    monkeypatch.setattr(train, "pick_precision", lambda device: "fp32")
    capsys.readouterr()
    assert run(tiny_data, tmp_path, "--precision", "auto", "--ensemble_size", "2") == 0
    assert "1 of 2 members are finished; device cpu" in (out := capsys.readouterr().out) and ", bf16\n" in out
    assert run(tiny_data, tmp_path / "new", "--precision", "auto", "--ensemble_size", "1") == 0
    both = only_folder(tmp_path / "new").parents[1]
    records = {path.parent.parent.name: json.loads(path.read_text()) for path in both.rglob("args.json")}
    assert [records[name]["settings"]["precision"] for name in (tmp_path.name, "new")] == ["bf16", "fp32"]
    assert records["new"]["options"]["precision"] == "auto"


def test_train_and_embedding_steps_never_wait_for_the_device():
    """The data-less device `meta` refuses .item(), copies to the host and mixed devices.

    It has no fused optimiser and no autocast: both are tested on the CPU.
    """
    meta = torch.device("meta")
    model = build_model("resnet18", 12, None).to(meta)
    optimizer = make_optimizer("adam", model, 1e-4, meta)
    images, targets, sides = torch.empty(4, 64, 64, 3, dtype=torch.uint8), torch.zeros(4).long(), torch.ones(4).long()
    mean, std = torch.ones(3, device=meta), torch.ones(3, device=meta)
    sums = Sums.zeros(meta)
    for batch in (Batch(images.to(meta), targets.to(meta), 2, s) for s in (None, sides.to(meta))):
        train_step(model, optimizer, no_scaling(), "fp32", prepared(batch, mean, std), batch.targets, sums)
    assert all(parameter.grad is not None for parameter in model.parameters())
    logits = member_outputs(model, np.zeros((5, 64, 64, 3), np.uint8), mean, std, batch_size=2, precision="fp32")
    assert logits.device == meta and logits.shape == (5, 12)
    with pytest.raises((RuntimeError, NotImplementedError)):
        sums.loss.item()


@pytest.mark.parametrize(("correct", "best"), [([3, 9, 7, 9], 1), ([5, 5, 5, 5], 0), ([1, 2, 3, 4], 3), ([0] * 4, 0)])
def test_the_best_epoch_by_training_accuracy_is_kept(tiny_cache, tiny_args, monkeypatch, correct, best):
    """With planned numbers of right answers; the weights of each epoch are marked with its number."""
    tiny_args.num_epochs, tiny_args.batch_size = 4, 64  # one step an epoch
    steps, rates = iter(range(4)), []

    def step(model, optimizer, scaler, precision, pixels, targets, sums):
        epoch = next(steps)
        rates.append(optimizer.param_groups[0]["lr"])
        model.fc.bias.data.fill_(epoch)
        sums.correct += correct[epoch]

    monkeypatch.setattr(train, "train_step", step)
    model, record = train_member(tiny_cache, None, tiny_args, 1, CPU, "fp32")
    assert record["best_epoch"] == best and model.fc.bias.tolist() == [best] * 3
    assert [row["correct"] for row in record["history"]] == correct
    assert rates == [row["lr"] for row in record["history"]] == [1e-3, 1e-3, 1e-5, 1e-5]


def test_the_first_loss_that_is_not_finite_is_remembered():
    sums, targets = Sums.zeros(CPU), torch.tensor([0, 1])
    for value in (1.0, float("inf"), 1.0, float("nan")):  # a new model each time: one that saw inf never recovers
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train_step(model, optimizer, no_scaling(), "fp32", torch.full((2, 3, 2, 2), value), targets, sums)
    assert (sums.steps, sums.finite_steps.item()) == (4, 1)


def test_a_loss_that_is_not_finite_ends_the_run(tiny_data, tmp_path, capsys, monkeypatch):
    def step(model, optimizer, scaler, precision, pixels, targets, sums):
        sums.steps += 1
        sums.finite_steps += sums.steps < 3

    monkeypatch.setattr(train, "train_step", step)
    assert run(tiny_data, tmp_path) == 1
    message = "member 1, epoch 0, batch 2: the loss is not finite; try a lower --lr than 0.001"
    assert capsys.readouterr().err.endswith(f"{message}\n")
    assert not list(only_folder(tmp_path).glob("member_*"))
    assert run(tiny_data, tmp_path, "--precision", "fp16") == 1
    assert f"{message}, or --precision fp32 (fp16 was used)" in capsys.readouterr().err


def test_an_embedding_that_is_not_finite_ends_the_run(tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "train_step", lambda *_: None)
    monkeypatch.setattr(train, "member_outputs", lambda *_: torch.full((36, 3), float("nan")))
    assert run(tiny_data, tmp_path) == 1
    assert "member 1: its embedding is not finite; try a lower --lr" in capsys.readouterr().err
    assert not list(only_folder(tmp_path).glob("member_*"))


def test_each_member_starts_from_its_own_head(tiny_cache, tiny_args, monkeypatch):
    monkeypatch.setattr(train, "train_step", lambda *_: None)
    assert not torch.equal(*(train_member(tiny_cache, None, tiny_args, m, CPU, "fp32")[0].fc.weight for m in (1, 2)))


def test_members_do_not_depend_on_each_other(tiny_run, tiny_cache, tiny_args):
    """Member 2 trained alone is bit for bit member 2 of the run; member 1 and seed 1 are others."""
    model, record = train_member(tiny_cache, None, tiny_args, 2, CPU, "fp32")
    saved = torch.load(tiny_run / "member_002.pth", weights_only=True)
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    earlier = json.loads((tiny_run / "member_002.json").read_text())
    assert record["partition"] == earlier["partition"]
    assert record["partition"] == meta_class_partition(6, 3, draws(0, 2, 0, "partition")).tolist()
    first = torch.load(tiny_run / "member_001.pth", weights_only=True)
    tiny_args.seed = 1
    reseeded = train_member(tiny_cache, None, tiny_args, 2, CPU, "fp32")[0].state_dict()
    for other in (first, reseeded):
        assert not torch.equal(other["fc.weight"], saved["fc.weight"])


# ------------------------------------------------------------------------------------------------ run folder and logs


def test_run_folder(tiny_run, tiny_data, tiny_cache):
    assert tiny_run.name == "tiny_resnet18_D3_e2_s0_i32_b16_lr0.001_wnone_fp32"
    names = {"args.json", "cache_compared.json", "recall.csv", "test.csv", "train.csv"}
    names |= {f"member_00{member}.{suffix}" for member in (1, 2) for suffix in ("json", "npy", "pth")}
    assert {path.name for path in tiny_run.iterdir() if not path.name.endswith(".lock")} == names

    record = json.loads((tiny_run / "args.json").read_text())
    assert record["options"]["ensemble_size"] == 2 and record["settings"]["lr"] == 1e-3
    assert record["data"]["fingerprint"] == tiny_cache.fingerprint
    assert record["data"]["counts"]["train"] == {"classes": 6, "images": 36}
    assert record["environment"]["torch"] == torch.__version__

    test = pd.read_csv(tiny_run / "test.csv")
    assert list(test.columns[:4]) == ["path", "label", "is_query", "is_gallery"]
    assert test.label.tolist() == tiny_cache.array("test_labels").tolist() and test.is_query.all()
    assert all((tiny_data / "tiny" / path).is_file() for path in test.path)

    for member in (1, 2):
        finished = json.loads((tiny_run / f"member_00{member}.json").read_text())
        hashes = digests(tiny_run, f"member_00{member}.[np]*")
        assert finished["sha256"] == hashes and finished["member"] == member
        assert np.load(tiny_run / f"member_00{member}.npy").dtype == np.float32


def test_train_log(tiny_run):
    log = pd.read_csv(tiny_run / "train.csv")
    assert ",".join(log.columns) == "member,epoch,loss,accuracy,lr,seconds,images_per_second"
    assert log[["member", "epoch"]].values.tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    np.testing.assert_allclose(log.lr, [1e-3, 1e-5, 1e-3, 1e-5])
    history = json.loads((tiny_run / "member_002.json").read_text())["history"]
    assert log.accuracy[3] == pytest.approx(100 * history[1]["correct"] / 36, abs=1e-4)
    assert log.loss.between(0.1, 3).all() and (log.images_per_second > 0).all()


def test_recall_log_equals_the_definition(tiny_run):
    """From the files alone, by the slow implementation."""
    labels = pd.read_csv(tiny_run / "test.csv").label.to_numpy()
    parts = [np.load(tiny_run / f"member_00{member}.npy") for member in (1, 2)]
    expected = 100 * slow_recall(parts, labels, [1, 4])
    lines = (tiny_run / "recall.csv").read_text().splitlines()
    assert lines[0] == "ensemble_size,R@1,R@4"
    assert lines[1:] == [f"{size},{r1:.4f},{r4:.4f}" for size, (r1, r4) in enumerate(expected, 1)]
    assert 20 < expected[1, 0] < 100  # chance is 14 %


def test_the_json_of_a_member_is_written_last(tmp_path, monkeypatch):
    written = []
    original = utils.atomic_open
    for module in (train, utils):
        monkeypatch.setattr(
            module, "atomic_open", lambda path, *mode: written.append(path.suffix) or original(path, *mode)
        )
    train.save_member(tmp_path, 1, nn.Linear(2, 2), torch.zeros(3, 2), {})
    assert written == [".pth", ".npy", ".json"]


def test_the_recall_log_ends_before_a_missing_member(tiny_run, tiny_args, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    record = read_record(tmp_path / "run" / "member_002.json", {})
    (tmp_path / "run" / "member_002.json").unlink()
    for suffix in ("npy", "pth"):
        shutil.move(tmp_path / "run" / f"member_002.{suffix}", tmp_path / "run" / f"member_003.{suffix}")
    hashes = {name.replace("002", "003"): value for name, value in record["sha256"].items()}
    write_record(tmp_path / "run" / "member_003.json", record | {"member": 3, "sha256": hashes})
    tiny_args.ensemble_size = 3
    truth = train.Truth(torch.arange(36) // 6, torch.ones(36).bool(), torch.ones(36).bool())
    members = Members(tmp_path / "run", record["run"])
    table, parts = train.write_logs(members, tiny_args, truth, "logits", CPU)
    assert sorted(members.records) == [1, 3] and len(table) == len(parts) == 1


def test_growing_an_ensemble(tiny_data, tiny_run, tmp_path, capsys, monkeypatch):
    """One member and then a second are the two members at once; asking for less again only rewrites the log."""
    assert run(tiny_data, tmp_path, "--ensemble_size", "1") == 0
    assert (only_folder(tmp_path) / "recall.csv").read_text().count("\n") == 2
    first = digests(only_folder(tmp_path), "member_001.*")
    capsys.readouterr()
    assert run(tiny_data, tmp_path) == 0
    assert "1 of 2 members are finished" in capsys.readouterr().out
    assert digests(only_folder(tmp_path), "member_001.*") == first
    for pattern in ("member_*.npy", "recall.csv", "test.csv"):
        assert digests(only_folder(tmp_path), pattern) == digests(tiny_run, pattern)

    monkeypatch.setattr(train, "train_member", None)  # would fail if called
    assert run(tiny_data, tmp_path, "--ensemble_size", "1", "--recalls", "2,1") == 0
    lines = (only_folder(tmp_path) / "recall.csv").read_text().splitlines()
    assert lines[0] == "ensemble_size,R@2,R@1" and len(lines) == 2
    assert pd.read_csv(only_folder(tmp_path) / "train.csv").member.tolist() == [1, 1, 2, 2]  # all that are finished
    assert lines[1].split(",")[2] == (tiny_run / "recall.csv").read_text().splitlines()[1].split(",")[1]


def test_the_last_line_is_the_final_recall(tiny_data, tiny_run, tmp_path, capsys, no_training):
    shutil.copytree(tiny_run, tmp_path / tiny_run.name)
    assert run(tiny_data, tmp_path) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    r1, r4 = (tmp_path / tiny_run.name / "recall.csv").read_text().splitlines()[2].split(",")[1:]
    csv = tmp_path / tiny_run.name / "recall.csv"
    assert last == f"2 members: R@1 {float(r1):.2f}, R@4 {float(r4):.2f} in {csv}"


def test_the_column_alone(tiny_data, tiny_run, tmp_path, capsys, no_training):
    shutil.copytree(tiny_run, tmp_path / tiny_run.name)
    assert run(tiny_data, tmp_path) == 0
    row = capsys.readouterr().out.splitlines()[-3].split()
    labels = torch.from_numpy(pd.read_csv(tiny_run / "test.csv").label.to_numpy(copy=True))
    second = torch.from_numpy(np.load(tiny_run / "member_002.npy"))
    assert float(row[-1]) == pytest.approx(100 * utils.recall_at_k(second, labels, [1]).item(), abs=0.006)


def test_a_disk_that_will_be_full_is_a_warning(tmp_path, capsys, monkeypatch):
    (tmp_path / "member_001.pth").write_bytes(b"x" * 1000)
    usage = shutil.disk_usage(tmp_path)
    for free, warned in ((1999, True), (2000, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        train.print_outlook(tmp_path, "member_001.*", 2, 1.0)
        assert ("the disk will be full" in capsys.readouterr().err) == warned


def test_percentages_are_exact(monkeypatch):
    """Every share of 8,131 queries, through the float32 of recall_at_k, prints its four right decimals."""
    shares = torch.arange(8132).double() / 8131
    monkeypatch.setattr(train, "recall_at_k", lambda *_: shares.float()[None])
    is_query = torch.arange(12000) < 8131  # the others are in the gallery
    for mask in (is_query, torch.ones(8131).bool()):
        percent = train.recall_percent([], [], train.Truth(torch.zeros(len(mask)).long(), mask, torch.ones_like(mask)))
        assert [f"{value:.4f}" for value in percent[0]] == [f"{100 * hits / 8131:.4f}" for hits in range(8132)]


def test_a_test_class_of_one_image_is_said_once(tmp_path, capfd):
    """Its query is a miss in every log, and no more than one line says so."""
    data_utils.draw_demo(tmp_path / "data" / "tiny", num_classes=3, images_per_class=3, image_side=40)
    for path in sorted((tmp_path / "data" / "tiny" / "test" / "character_003").iterdir())[1:]:
        path.unlink()
    assert data_utils.main(["--data_path", str(tmp_path / "data"), "--image_size", "32"]) == 0
    assert run(tmp_path / "data", tmp_path / "results", "--num_epochs", "1") == 0
    output = capfd.readouterr()
    assert (output.out + output.err).count("no other image of their class") == 1
    last = pd.read_csv(only_folder(tmp_path / "results") / "recall.csv").iloc[-1]
    assert last["R@4"] <= 100 * 6 / 7 + 1e-4


@pytest.fixture
def shop_data(tmp_path) -> Path:
    """images.csv as In-Shop is: queries and gallery apart. Of its 4 test classes, `d` has no gallery image."""
    rows, lines = [("train", name, "", "") for name in "ppqqrr"], ["path,label,split,is_query,is_gallery"]
    rows += [("test", name, "1", "0") for name in "aaabbccd"] + [("test", name, "0", "1") for name in "aabbbcc"]
    rows += [("test", "b", "1", "1")]  # both
    for number, (split, name, is_query, is_gallery) in enumerate(rows):
        save_image(tmp_path / "data" / "shop" / f"{number}.png", number)
        lines.append(f"{number}.png,{name},{split},{is_query},{is_gallery}")
    (tmp_path / "data" / "shop" / "images.csv").write_text("\n".join(lines) + "\n")
    assert data_utils.main(["--data_path", str(tmp_path / "data"), "--image_size", "32"]) == 0
    return tmp_path / "data"


def test_queries_are_scored_against_the_gallery(shop_data, tmp_path, capfd):
    """recall.csv and the column `alone` by the slow implementation, from the files alone."""
    options = ["--data_name", "shop", "--num_epochs", "1", "--recalls", "1,2,7"]
    assert run(shop_data, tmp_path / "results", *options) == 0
    output, folder = capfd.readouterr(), only_folder(tmp_path / "results")
    assert output.out.count("\n9 queries against a gallery of 8 images\n") == 1
    assert (output.out + output.err).count("no other image of their class") == 1
    assert "\n1 queries have no other image of their class in the gallery: they count as misses\n" in output.out
    test = pd.read_csv(folder / "test.csv")
    masks = test.is_query.to_numpy(), test.is_gallery.to_numpy()
    assert [mask.sum() for mask in masks] == [9, 8]
    parts = [np.load(folder / f"member_00{member}.npy") for member in (1, 2)]
    expected = 100 * slow_recall(parts, test.label.to_numpy(), [1, 2, 7], *masks)
    lines = [",".join([str(size), *(f"{value:.4f}" for value in row)]) for size, row in enumerate(expected, 1)]
    assert (folder / "recall.csv").read_text().splitlines()[1:] == lines
    assert expected[1, 0] != 100 * slow_recall(parts, test.label.to_numpy(), [1])[1, 0]
    alone = [100 * slow_recall([part], test.label.to_numpy(), [1], *masks).item() for part in parts]
    assert [float(line.split()[-1]) for line in output.out.splitlines()[-4:-2]] == pytest.approx(alone, abs=0.006)


def test_recalls_have_to_be_below_the_gallery(shop_data, tmp_path, capsys, no_training):
    assert run(shop_data, tmp_path / "results", "--data_name", "shop", "--recalls", "1,8") == 2
    assert "--recalls: 8 is not below the number of gallery images, 8\n" in capsys.readouterr().err


def test_a_full_disk_costs_the_member_but_no_file(tiny_data, tiny_run, tmp_path, capsys, monkeypatch):
    shutil.copytree(tiny_run, tmp_path / tiny_run.name)
    before = digests(tmp_path / tiny_run.name, "member_*")

    def full(file):
        if "member" in file.name:
            raise OSError(28, "No space left on device", file.name)

    monkeypatch.setattr(utils, "flush_to_disk", full)
    assert run(tiny_data, tmp_path, "--ensemble_size", "3") == 1
    error = capsys.readouterr().err
    assert "train.py: failed: [Errno 28] No space left on device" in error and error.count("\n") == 1
    assert digests(tmp_path / tiny_run.name, "*member_*[!k]") == before


def test_out_of_memory_in_the_evaluation_costs_time_only(tiny_data, tiny_run, tmp_path, monkeypatch):
    """Batches of 32 and 16 do not fit, nor blocks of 1 GiB and 512 MiB: the same results come of less."""
    sizes = {"member_outputs": [], "recall_at_k": []}

    def limited(name, largest):
        original = getattr(train, name)

        def call(*arguments):
            size = next(a for a in arguments[::-1] if isinstance(a, int))
            sizes[name].append(size)
            if size > largest:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return original(*arguments)

        monkeypatch.setattr(train, name, call)

    limited("member_outputs", 8)
    limited("recall_at_k", 2**28)
    assert run(tiny_data, tmp_path, "--ensemble_size", "1") == 0
    assert sizes["member_outputs"] == [32, 16, 8] and sizes["recall_at_k"][:3] == [2**30, 2**29, 2**28]
    logits = [np.load(folder / "member_001.npy") for folder in (only_folder(tmp_path), tiny_run)]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)
    first_two = [(folder / "recall.csv").read_text().splitlines()[:2] for folder in (only_folder(tmp_path), tiny_run)]
    assert first_two[0] == first_two[1]


def test_what_never_fits_is_an_error():
    tried = []

    def call(size):
        tried.append(size)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        train.with_less_memory(call, 5)
    assert tried == [5, 2, 1]


def test_out_of_memory_names_the_options(tiny_data, tmp_path, capsys, monkeypatch):
    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(train, "train_step", step)
    assert run(tiny_data, tmp_path) == 1
    error = capsys.readouterr().err
    assert "try a smaller --batch_size or --image_size" in error and error.count("\n") == 1


@pytest.mark.parametrize(("meta_classes", "batch_size"), [(2, 2), (2, 3), (3, 128)])
def test_odd_data_sets_are_trained_on(tmp_path, meta_classes, batch_size):
    """Images smaller than the crop or 1 pixel wide, one class more than D or as many, batches of one image."""
    sizes = {"ä b": (1, 50), "c,d": (50, 1), "ﬁn": (2, 2)}
    for name, (width, height) in sizes.items():
        save_image(tmp_path / "odd" / "train" / name / "é 1.png", width=width, height=height)
    save_image(tmp_path / "odd" / "train" / "c,d" / "2.png")
    for name in ("x y", "x y/deeper", "ü"):
        save_image(tmp_path / "odd" / "test" / name / "1 ö.png", width=1, height=7)
    save_image(tmp_path / "odd" / "test" / "x y" / "2.png")
    assert data_utils.main(["--data_path", str(tmp_path), "--data_name", "odd", "--image_size", "32"]) == 0
    options = ["--data_name", "odd", "--meta_class_size", str(meta_classes), "--batch_size", str(batch_size)]
    assert run(tmp_path, tmp_path / "results", *options, "--recalls", "1", "--num_epochs", "1") == 0
    folder = only_folder(tmp_path / "results")
    assert pd.read_csv(folder / "test.csv").class_name.tolist() == ["x y", "x y", "x y/deeper", "ü"]
    table = pd.read_csv(folder / "recall.csv")
    assert len(table) == 2 and table["R@1"].between(0, 50).all()  # two of the four have no other of their class
    assert read_record(folder / "member_001.json", {})["history"][0]["images"] == 4


def test_what_the_first_member_tells_of_the_rest(tiny_data, tmp_path, capsys):
    assert run(tiny_data, tmp_path, "--num_epochs", "1", "--ensemble_size", "3") == 0
    output = capsys.readouterr().out
    assert re.search(r"the other 2 members need about [\d.]+ minutes and 89\.\d MB \([\d.]+ [GT]B are free\)", output)
    assert output.count("the other") == 1
    assert re.search(r"member 1/3 epoch 0: loss \d\.\d+, accuracy [\d.]+%, [\d,]+ images/s", output)


def test_a_cut_of_large_classes_is_said(tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "MAX_IMAGES_PER_CLASS", 4)
    assert run(tiny_data, tmp_path, "--ensemble_size", "1", "--num_epochs", "1") == 0
    assert "a random 4 of each and leaves out 12 of 36 images" in capsys.readouterr().out
    assert json.loads((only_folder(tmp_path) / "member_001.json").read_text())["history"][0]["images"] == 24


def edited(folder: Path, *keys: str, value) -> None:
    """Changes one entry of args.json."""
    record = read_record(folder / "args.json", {})
    inner = record
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    write_record(folder / "args.json", record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: edited(folder, "settings", "lr", value=0.5), "other settings: lr 0.5, not 0.001"),
        (lambda folder: edited(folder, "settings", "flip", value=False), "other settings: flip False, not True"),
        (
            lambda folder: edited(folder, "data", "fingerprint", value="0"),
            r"other settings: cache \(fingerprint\) 0, not",
        ),
    ],
)
def test_other_settings_under_the_same_name_are_refused(
    tiny_data, tiny_run, tmp_path, capsys, no_training, change, message
):
    folder = tmp_path / tiny_run.name
    shutil.copytree(tiny_run, folder)
    change(folder)
    before = digests(folder)
    assert run(tiny_data, tmp_path, "--ensemble_size", "3") == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert digests(folder) == before


@pytest.mark.parametrize("change", ["missing", "damaged"])
def test_the_members_stand_in_for_a_lost_run_record(tiny_data, tiny_run, tmp_path, capsys, no_training, change):
    """It is written anew for members that fit the command, and never for members of something else."""
    folder = tmp_path / tiny_run.name
    shutil.copytree(tiny_run, folder)
    path = folder / "args.json"
    lines = path.read_text().replace('"flip": true', '"flip": false')
    path.unlink() if change == "missing" else path.write_text(lines)
    assert run(tiny_data, tmp_path) == 0
    assert ("args.json is damaged" in capsys.readouterr().err) == (change == "damaged")
    records = [read_record(run_folder / "args.json", {}) for run_folder in (folder, tiny_run)]
    assert records[0]["settings"] == records[1]["settings"]

    path.unlink()
    for member in (1, 2):
        record = read_record(folder / f"member_00{member}.json", {}) | {"run": "another"}
        write_record(folder / f"member_00{member}.json", record)
    before = digests(folder)
    assert run(tiny_data, tmp_path) == 2
    assert "no sound args.json and no member of these settings and data" in capsys.readouterr().err
    assert digests(folder) == before


def test_another_environment_is_a_warning_and_recorded(tiny_data, tiny_run, tmp_path, capsys):
    folder = tmp_path / tiny_run.name
    shutil.copytree(tiny_run, folder)
    edited(folder, "environment", "torch", value="1.0")
    assert run(tiny_data, tmp_path) == 0 and "warning" not in capsys.readouterr().err  # nothing to train
    assert run(tiny_data, tmp_path, "--ensemble_size", "3") == 0
    assert f"warning: this run was begun with torch 1.0 (now {torch.__version__})\n" in capsys.readouterr().err
    assert read_record(folder / "args.json", {})["environment"]["torch"] == "1.0"
    assert json.loads((folder / "member_003.json").read_text())["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize("suffix", ["pth", "json"])
def test_a_damaged_member_is_named_and_trained_again(tiny_data, tiny_run, tmp_path, capsys, suffix):
    folder = tmp_path / tiny_run.name
    shutil.copytree(tiny_run, folder)
    path = folder / f"member_001.{suffix}"
    path.write_bytes(path.read_bytes()[:-9])
    assert run(tiny_data, tmp_path) == 0
    output = capsys.readouterr()
    assert re.search(rf"member 1 counts as not trained, damaged: {path.name}", output.err)
    assert "1 of 2 members are finished" in output.out
    for pattern in ("member_*.npy", "recall.csv"):
        assert digests(folder, pattern) == digests(tiny_run, pattern)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_embedding_is_made_again_without_training(tiny_data, tiny_run, tmp_path, capsys, no_training, damage):
    folder = tmp_path / tiny_run.name
    shutil.copytree(tiny_run, folder)
    path = folder / "member_001.npy"
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-9])
    assert run(tiny_data, tmp_path) == 0
    assert "the embedding of member 1 is damaged (member_001.npy)\n" in capsys.readouterr().err
    for pattern in ("member_*", "recall.csv", "train.csv"):
        assert digests(folder, pattern) == digests(tiny_run, pattern)


def test_the_progress_of_finished_members_is_removed(tiny_data, tiny_run, tmp_path, no_training):
    """Of a process that was killed before it could."""
    folder = tmp_path / tiny_run.name
    shutil.copytree(tiny_run, folder)
    names = ["progress_001.pt", ".progress_002.pt.tmp-123", "progress_003.pt"]
    for name in names:
        (folder / name).write_bytes(b"x")
    assert run(tiny_data, tmp_path) == 0
    assert [(folder / name).exists() for name in names] == [False, False, True]


# ------------------------------------------------------------------------------------------------ pooled features


def pool(data: Path, results: Path, *options: str) -> int:
    return run(data, results, "--embedding", "pooled", *options)


def test_pooled_features_of_the_saved_members(pooled_run, tiny_run, tiny_data, tiny_cache):
    """Against torchvision's own network and transforms with the saved weights; the members stay as they are."""
    names = {path.name for path in pooled_run.iterdir()} - {path.name for path in tiny_run.iterdir()}
    assert names == {"recall_pooled.csv", *(f"pooled_00{m}.{suffix}" for m in (1, 2) for suffix in ("json", "npy"))}
    for pattern in ("member_*", "train.csv", "recall.csv"):
        assert digests(pooled_run, pattern) == digests(tiny_run, pattern)
    images = torch.from_numpy(np.array(tiny_cache.array("test_images"))).permute(0, 3, 1, 2) / 255
    images = torchvision.transforms.functional.normalize(images, tiny_cache.meta["mean"], tiny_cache.meta["std"])
    parts, labels = [], pd.read_csv(pooled_run / "test.csv").label.to_numpy()
    for member in (1, 2):
        model, seen = torchvision.models.resnet18(num_classes=3).eval(), []
        model.load_state_dict(torch.load(pooled_run / f"member_00{member}.pth", weights_only=True))
        model.avgpool.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.flatten(1)))
        with torch.no_grad():
            model(images)
        parts.append(np.load(pooled_run / f"pooled_00{member}.npy"))
        assert parts[-1].dtype == np.float32 and parts[-1].shape == (36, 512)
        np.testing.assert_allclose(parts[-1], seen[0], rtol=1e-4, atol=1e-4)
        record = read_record(pooled_run / f"pooled_00{member}.json", utils.POOLED_RECORD)
        hashes = digests(pooled_run, f"*_00{member}.[np]*")
        assert record["weights"] == hashes[f"member_00{member}.pth"]
        assert record["sha256"] == hashes[f"pooled_00{member}.npy"] and record["member"] == member
        assert record["run"] == read_record(pooled_run / f"member_00{member}.json", {})["run"]
    expected = 100 * slow_recall(parts, labels, [1, 4])
    lines = (pooled_run / "recall_pooled.csv").read_text().splitlines()
    assert lines == ["ensemble_size,R@1,R@4", *(f"{n},{r1:.4f},{r4:.4f}" for n, (r1, r4) in enumerate(expected, 1))]
    assert lines != (pooled_run / "recall.csv").read_text().splitlines()


def test_nothing_is_made_twice(pooled_run, tiny_data, tmp_path, no_training, capsys, monkeypatch):
    """Neither trained nor pooled; the table and the last line are of the embedding that was asked for."""
    folder = tmp_path / pooled_run.name
    shutil.copytree(pooled_run, folder)
    monkeypatch.setattr(train, "pool_member", lambda *_: pytest.fail("nothing was to be made"))
    for embedding, csv in (("pooled", "recall_pooled.csv"), ("logits", "recall.csv")):
        assert run(tiny_data, tmp_path, "--embedding", embedding) == 0
        output = capsys.readouterr()
        r1, r4 = (float(value) for value in (pooled_run / csv).read_text().splitlines()[2].split(",")[1:])
        *_, row, _, last = output.out.splitlines()
        assert last == f"2 members: R@1 {r1:.2f}, R@4 {r4:.2f} in {folder / csv}" and output.err == ""
        kind = "pooled" if embedding == "pooled" else "member"
        part = torch.from_numpy(np.load(folder / f"{kind}_002.npy"))
        alone = 100 * utils.recall_at_k(part, torch.arange(36) // 6, [1]).item()
        assert [float(value) for value in row.split()] == pytest.approx([2, r1, r4, alone], abs=0.006)
    for pattern in ("member_*", "pooled_*", "*.csv"):
        assert digests(folder, pattern) == digests(pooled_run, pattern)


def test_training_and_pooling_in_one_run(pooled_run, tiny_data, tmp_path, capsys):
    """Member by member; the logs grow with each."""
    tables, write_logs = [], train.write_logs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_logs", lambda *args: tables.append(len((result := write_logs(*args))[0])) or result)
        assert pool(tiny_data, tmp_path) == 0
    output = capsys.readouterr().out
    assert tables == [1, 2, 2] and len(re.findall(r"^member \d/2: training accuracy", output, re.MULTILINE)) == 2
    assert "44.8 MB" not in output and re.search(r"the other 1 members need about [\d.]+ minutes and 44\.9 MB", output)
    for pattern in ("member_*.npy", "pooled_*.npy", "recall*.csv"):
        assert digests(only_folder(tmp_path), pattern) == digests(pooled_run, pattern)


def change_record(**entries):
    return lambda path: write_record(path, read_record(path, {}) | entries)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pooled_001.npy", lambda path: path.write_bytes(path.read_bytes()[:-9]), "the checksum of its .npy"),
        ("pooled_001.npy", Path.unlink, "No such file"),
        ("pooled_001.json", lambda path: path.write_bytes(path.read_bytes()[:-9]), "JSONDecodeError"),
        ("pooled_001.json", change_record(weights="0" * 64), "of another run, member or weights"),
        ("pooled_001.json", change_record(member=2), "of another run, member or weights"),
        ("pooled_001.json", change_record(run="another"), "of another run, member or weights"),
        ("pooled_001.json", change_record(sha256=1), "another version"),
        ("pooled_001.json", Path.unlink, None),
    ],
)
def test_bad_pooled_files_are_named_and_made_again(
    pooled_run, tiny_data, tmp_path, capsys, no_training, name, change, message
):
    folder = tmp_path / pooled_run.name
    shutil.copytree(pooled_run, folder)
    change(folder / name)
    assert pool(tiny_data, tmp_path) == 0
    output = capsys.readouterr()
    if message:
        assert "warning: pooled_001.json counts as not made (" in output.err and message in output.err
        assert output.err.count("\n") == 1
    else:
        assert output.err == ""
    assert re.search(r"^member 1/2: pooled features, [\d.]+ s$", output.out, re.MULTILINE)
    for pattern in ("member_*", "pooled_*", "*.csv"):
        assert digests(folder, pattern) == digests(pooled_run, pattern)


def test_logits_need_no_pooled_files(pooled_run, tiny_data, tmp_path, capsys, no_training):
    folder = tmp_path / pooled_run.name
    shutil.copytree(pooled_run, folder)
    (folder / "pooled_001.json").write_text("damaged")
    assert run(tiny_data, tmp_path) == 0
    assert capsys.readouterr().err == "" and (folder / "pooled_001.json").read_text() == "damaged"


def test_a_member_of_other_weights_is_pooled_again(pooled_run, tiny_data, tmp_path, no_training):
    folder = tmp_path / pooled_run.name
    shutil.copytree(pooled_run, folder)
    for suffix in ("pth", "npy"):
        shutil.copy(folder / f"member_002.{suffix}", folder / f"member_001.{suffix}")
    record = read_record(folder / "member_001.json", {})
    hashes = digests(folder, "member_001.[np]*")
    write_record(folder / "member_001.json", record | {"sha256": hashes})
    assert pool(tiny_data, tmp_path) == 0
    pooled = digests(folder, "pooled_*.npy")
    assert pooled["pooled_001.npy"] == pooled["pooled_002.npy"] == digests(pooled_run)["pooled_002.npy"]


def test_processes_share_the_pooling(pooled_run, tiny_run, tiny_data, tmp_path, capsys, no_training):
    """A member whose lock another one holds is left to it; --members limits it too."""
    folder = tmp_path / tiny_run.name
    shutil.copytree(tiny_run, folder)
    with utils.take_lock(folder / ".member_001.lock"):
        assert pool(tiny_data, tmp_path) == 0
    output = capsys.readouterr().out
    assert output.endswith("without pooled features: member 1; the process that finishes the last one scores\n")
    assert [path.name for path in sorted(folder.glob("pooled_*"))] == ["pooled_002.json", "pooled_002.npy"]
    assert (folder / "recall_pooled.csv").read_text() == "ensemble_size,R@1,R@4\n"
    (folder / "pooled_002.json").unlink()
    assert pool(tiny_data, tmp_path, "--members", "1") == 0
    assert "without pooled features: member 2;" in capsys.readouterr().out
    assert pool(tiny_data, tmp_path) == 0
    for pattern in ("member_*", "pooled_*", "*.csv"):
        assert digests(folder, pattern) == digests(pooled_run, pattern)


def test_what_another_process_has_just_made_is_not_made_again(pooled_run, tiny_run, tiny_data, tmp_path, monkeypatch):
    """It finishes member 1 while this one waits for the lock."""
    folder, pooled = tmp_path / tiny_run.name, []
    shutil.copytree(tiny_run, folder)
    take_lock, pool_member = train.take_lock, train.pool_member

    def late_lock(path, **kwargs):
        if path.name == ".member_001.lock":
            for suffix in ("npy", "json"):
                shutil.copy(pooled_run / f"pooled_001.{suffix}", folder)
        return take_lock(path, **kwargs)

    monkeypatch.setattr(train, "take_lock", late_lock)
    monkeypatch.setattr(train, "pool_member", lambda *args: pooled.append(args[1]) or pool_member(*args))
    assert pool(tiny_data, tmp_path) == 0
    assert pooled == [2] and digests(folder, "*.csv") == digests(pooled_run, "*.csv")


def test_pooling_that_is_interrupted_anywhere_goes_on(pooled_run, tiny_run, tiny_data, tmp_path, capsys, monkeypatch):
    """Before each file of pooled features, and each log of them, takes its place."""
    folder, replace = tmp_path / tiny_run.name, os.replace
    for number in itertools.count():
        shutil.copytree(tiny_run, folder)
        calls = itertools.count()

        def interrupted(source, target, calls=calls, number=number):
            if "pooled" in Path(target).name and next(calls) == number:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            code = pool(tiny_data, tmp_path)
        error = capsys.readouterr().err
        if code == 130:
            assert re.search(r"interrupted( in member [12]/2)?; run the same command again to go on\n$", error)
            assert pool(tiny_data, tmp_path) == 0 and "warning" not in capsys.readouterr().err
        for pattern in ("*member_*[!k]", "*pooled_*", "*.csv"):
            assert digests(folder, pattern) == digests(pooled_run, pattern)
        shutil.rmtree(folder)
        if code == 0:
            break
    assert number == 5


def test_pooling_scores_once_and_says_what_it_needs(tiny_run, tiny_data, tmp_path, capsys, monkeypatch, no_training):
    """Scores of many wide features take long: not after each member. 36 x 512 floats and a record are 74 kB."""
    shutil.copytree(tiny_run, tmp_path / tiny_run.name)
    scored, write_logs = [], train.write_logs
    monkeypatch.setattr(train, "write_logs", lambda *args: scored.append(args[3]) or write_logs(*args))
    assert pool(tiny_data, tmp_path) == 0
    assert scored == ["logits", "pooled"]
    assert re.search(r"the other 1 members need about [\d.]+ minutes and 74\.\d kB", capsys.readouterr().out)


def test_embeddings_that_do_not_fit_on_the_device_are_scored_on_the_cpu(
    pooled_run, tiny_data, tmp_path, capsys, monkeypatch, no_training
):
    folder = tmp_path / pooled_run.name
    shutil.copytree(pooled_run, folder)
    (folder / "recall_pooled.csv").unlink()

    def full(part, device):
        raise RuntimeError("MPS backend out of memory")

    monkeypatch.setattr(torch.Tensor, "to", full)
    parts = train.saved_parts(folder, train.open_run(folder)[1], 2, "pooled", torch.device("mps"))
    assert "do not fit on mps: they are scored on the CPU\n" in capsys.readouterr().err
    assert [part.numpy().tobytes() for part in parts] == [
        np.load(folder / f"pooled_00{member}.npy").tobytes() for member in (1, 2)
    ]


def test_runs_from_before_an_option_go_on(tiny_run, tiny_data, tmp_path, capsys, no_training):
    """Their args.json lacks it and so has its default; another value is another run."""
    folder = tmp_path / tiny_run.name
    shutil.copytree(tiny_run, folder)
    record = read_record(folder / "args.json", {})
    assert (record["settings"].pop("optimizer"), record["settings"].pop("resize")) == ("adam", "crop")
    identity = utils.text_sha256({"settings": record["settings"], "fingerprint": record["data"]["fingerprint"]})
    assert read_record(folder / "member_001.json", {})["run"] == identity
    write_record(folder / "args.json", record)
    assert load_ensemble(folder).resize == "crop"
    assert run(tiny_data, tmp_path) == 0
    assert capsys.readouterr().err == "" and digests(folder, "recall.csv") == digests(tiny_run, "recall.csv")
    record["settings"]["optimizer"] = "sgd"
    assert utils.run_identity(record) != identity


def test_weights_that_change_meanwhile_are_not_pooled(tiny_run, tiny_data, tmp_path, capsys, monkeypatch, no_training):
    """By another process that has found the member damaged, say: the run ends, and the next one sees the new state."""
    folder = tmp_path / tiny_run.name
    shutil.copytree(tiny_run, folder)
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_logs", lambda *_: shutil.copy(folder / "member_002.pth", folder / "member_001.pth"))
        assert pool(tiny_data, tmp_path) == 1
    message = (
        f"train.py: failed: {folder / 'member_001.pth'} has changed since this run began; run the same command again\n"
    )
    assert capsys.readouterr().err == message and not list(folder.glob("pooled_*"))


def test_a_cache_that_changes_while_pooling_is_noticed(tiny_run, tiny_data, tmp_path, capsys, monkeypatch, no_training):
    shutil.copytree(tiny_data, tmp_path / "data")
    shutil.copytree(tiny_run, tmp_path / "results" / tiny_run.name)
    embedded, meta = train.embedded, tmp_path / "data" / "tiny" / "cache_32" / "meta.json"

    def meanwhile(*args):
        write_record(meta, read_record(meta, {}) | {"mean": [0.1, 0.2, 0.3]})
        return embedded(*args)

    monkeypatch.setattr(train, "embedded", meanwhile)
    assert pool(tmp_path / "data", tmp_path / "results") == 1
    assert "cache_32 has been changed during the run" in capsys.readouterr().err
    assert not list((tmp_path / "results").glob("*/pooled_*"))


def test_leftovers_of_pooling_go(tiny_run, tiny_data, tmp_path, no_training):
    folder = tmp_path / tiny_run.name
    shutil.copytree(tiny_run, folder)
    (folder / ".pooled_001.npy.tmp-123").write_text("half")
    assert pool(tiny_data, tmp_path) == 0
    assert not list(folder.glob("*tmp*"))


def test_pooled_features_that_are_not_finite_end_the_run(tiny_run, tiny_data, tmp_path, capsys, monkeypatch):
    shutil.copytree(tiny_run, tmp_path / tiny_run.name)
    monkeypatch.setattr(train, "member_outputs", lambda *_: torch.full((36, 512), float("nan")))
    assert pool(tiny_data, tmp_path) == 1
    assert "member 1: its embedding is not finite; try a lower --lr" in capsys.readouterr().err
    assert not list(only_folder(tmp_path).glob("pooled_*"))


def test_pooled_features_are_made_in_the_precision_of_the_run(tiny_data, tmp_path):
    options = ["--precision", "bf16", "--num_epochs", "1", "--ensemble_size", "1"]
    assert run(tiny_data, tmp_path, *options) == 0 and pool(tiny_data, tmp_path, *options) == 0
    features = torch.from_numpy(np.load(only_folder(tmp_path) / "pooled_001.npy"))
    assert features.dtype == torch.float32 and torch.equal(features.bfloat16().float(), features)


# ------------------------------------------------------------------------------------------------ reading a run


def test_a_run_folder_is_opened_without_its_data_and_left_as_it_is(pooled_run, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(pooled_run, folder)
    (folder / "progress_001.pt").write_bytes(b"x")
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    record, members = train.open_run(folder)
    parts = {(e, n): train.saved_parts(folder, members, n, e, CPU) for e in ("logits", "pooled") for n in (1, 2, 5)}
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]} == before
    assert record["settings"]["data_name"] == "tiny" and sorted(members.records) == [1, 2]
    assert [len(of_run) for of_run in parts.values()] == [1, 2, 2] * 2
    for embedding, kind in (("logits", "member"), ("pooled", "pooled")):
        for member, part in enumerate(parts[embedding, 5], 1):
            assert part.dtype == torch.float32
            np.testing.assert_array_equal(part, np.load(pooled_run / f"{kind}_00{member}.npy"))


def test_only_sound_parts_are_read(pooled_run, tmp_path, capsys):
    """Damaged ones and those behind them are not returned; pooled ones need the record of their member."""

    def lengths(*changed: str) -> list[int]:
        shutil.copytree(pooled_run, tmp_path / "run")
        for name in changed:
            (tmp_path / "run" / name).write_bytes(b"x")
        _, members = train.open_run(tmp_path / "run")
        found = [len(train.saved_parts(tmp_path / "run", members, 2, e, CPU)) for e in ("logits", "pooled")]
        shutil.rmtree(tmp_path / "run")
        return found

    assert lengths("pooled_002.npy") == [2, 1] and lengths("pooled_001.json") == [2, 0]
    assert "pooled_001.json counts as not made" in capsys.readouterr().err
    assert lengths("member_002.npy") == [1, 1] and lengths("member_001.json") == [0, 0]
    assert lengths("member_001.pth") == [2, 2]  # the weights are not read


def test_what_is_no_run_is_not_opened(pooled_run, tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(utils.InputError, match=message) as error:
            train.open_run(tmp_path)
        assert "\n" not in str(error.value)

    refused("is not a run folder: it has no args.json$")
    (tmp_path / "args.json").write_text("{}")
    refused(r"args.json is damaged \(.*\); train.py makes it again$")
    record = read_record(pooled_run / "args.json", {})
    write_record(tmp_path / "args.json", record | {"settings": record["settings"] | {"precision": "fp8"}})
    refused("args.json is damaged .*unknown precision")
    write_record(tmp_path / "args.json", record)
    refused("has no finished member$")
    with pytest.raises(utils.InputError, match="is not a run folder"):
        train.open_run(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ names of runs


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "tiny_resnet18_D12_e12_s0"),
        (["--ensemble_size", "48", "--recalls", "1", "--device", "cpu"], "tiny_resnet18_D12_e12_s0"),
        (["--embedding", "pooled"], "tiny_resnet18_D12_e12_s0"),
        (["--backbone", "resnet50", "--meta_class_size", "5", "--num_epochs", "3"], "tiny_resnet50_D5_e3_s0"),
        (["--seed", "7", "--batch_size", "64", "--image_size", "128"], "tiny_resnet18_D12_e12_s7_i128_b64"),
        (["--lr", "3e-05", "--no_flip", "--weights", "none"], "tiny_resnet18_D12_e12_s0_lr3e-05_wnone_noflip"),
        (["--weights", "w.pth"], "tiny_resnet18_D12_e12_s0_wabcdef01"),
        (["--resize", "squash", "--image_size", "64"], "tiny_resnet18_D12_e12_s0_i64_squash"),
        (["--optimizer", "sgd"], "tiny_resnet18_D12_e12_s0_sgd"),
        (["--optimizer", "sgd", "--lr", "0.01"], "tiny_resnet18_D12_e12_s0_sgd"),
        (["--optimizer", "sgd", "--lr", "1e-4"], "tiny_resnet18_D12_e12_s0_sgd_lr0.0001"),
        (["--lr", "0.01"], "tiny_resnet18_D12_e12_s0_lr0.01"),
    ],
)
def test_run_name(options, name):
    args = train.parse_args(["--data_name", "tiny", *options])
    identity = "sha256:abcdef0123" if args.weights == "w.pth" else args.weights
    assert train.run_name(args, identity) == name


# ------------------------------------------------------------------------------------------------ wrong options


def test_members_are_ranges_and_numbers():
    assert train.member_list("13-15") == [13, 14, 15]
    assert train.member_list("9,1-3,2") == [1, 2, 3, 9]


@pytest.mark.parametrize(
    ("option", "local_rank", "gpus", "device"),
    [
        ("auto", "2", 4, "cuda:2"),
        ("cuda", "3", 4, "cuda:3"),
        ("cuda", "3", 1, "cuda:0"),  # a launcher that shows each process its own GPU
        ("cuda:1", "2", 4, "cuda:1"),
        ("auto", None, 4, "cuda"),
        ("auto", "1", 0, "cpu"),
    ],
)
def test_each_process_of_torchrun_takes_its_gpu(monkeypatch, option, local_rank, gpus, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", local_rank) if local_rank else monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert train.pick_device(option) == torch.device(device)


def test_deterministic(tiny_data, tiny_run, tmp_path, monkeypatch, no_training, capsys):
    """It asks PyTorch for deterministic algorithms, is recorded, and a run without it asks for none."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    shutil.copytree(tiny_run, tmp_path / tiny_run.name)
    monkeypatch.setattr(train, "finish_member", lambda *_: pytest.fail("deterministic" if asked() else "not"))
    for options, message in ((["--deterministic"], "deterministic"), ([], "not")):
        with pytest.raises(pytest.fail.Exception, match=f"^{message}$"):
            run(tiny_data, tmp_path, "--ensemble_size", "3", *options)
        warned = "begun with deterministic False (now True)" in capsys.readouterr().err
        assert warned == bool(options)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def asked() -> bool:
    algorithms = torch.are_deterministic_algorithms_enabled(), not torch.backends.cudnn.benchmark
    assert algorithms[0] == algorithms[1]
    return algorithms[0]


def test_the_content_of_a_cache_is_compared_once(tiny_data, tiny_run, tmp_path, monkeypatch, capsys, no_training):
    shutil.copytree(tiny_run, tmp_path / "results" / tiny_run.name)
    shutil.copytree(tiny_data, tmp_path / "data", copy_function=shutil.copy)  # the same content of another time
    compared = []
    verify_cache = train.verify_cache
    monkeypatch.setattr(train, "verify_cache", lambda cache: compared.append(1) or verify_cache(cache))
    for expected in (1, 1):
        assert run(tmp_path / "data", tmp_path / "results") == 0 and len(compared) == expected
    path = tmp_path / "data" / "tiny" / "cache_32" / "test_images.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for expected in (2, 3):  # a damaged one is not remembered
        assert run(tmp_path / "data", tmp_path / "results") == 2 and len(compared) == expected
        error = capsys.readouterr().err
        assert re.search(r"damaged: test_images; make it again with: python data_utils\.py .*--force\n$", error)
    assert (
        data_utils.main(["--data_path", str(tmp_path / "data"), *"--data_name tiny --image_size 32 --force".split()])
        == 0
    )
    assert run(tmp_path / "data", tmp_path / "results") == 0 and len(compared) == 4


def test_defaults_are_those_of_the_original_command_line():
    args = train.parse_args([])
    assert args.data_name == "car"
    assert (args.recalls, args.batch_size, args.num_epochs) == ([1, 2, 4, 8], 128, 12)
    assert (args.ensemble_size, args.meta_class_size, args.lr, args.weights) == (12, 12, 1e-4, "imagenet")
    assert train.parse_args("--data_name sop --recalls 1,10,100,1000".split()).recalls == [1, 10, 100, 1000]
    assert train.parse_args("--data_name sop".split()).recalls == [1, 2, 4, 8]
    assert train.parse_args("--data_name isc".split()).recalls == [1, 10, 20, 30]
    assert train.parse_args("--data_name isc --recalls 1".split()).recalls == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--data_name", "other"],
            r"no such folder; .*python data_utils\.py --data_name other --data_path .* --image_size 32",
        ),
        (["--image_size", "64"], r"no cache: .*--data_name tiny --data_path .* --image_size 64"),
        (["--data_name", "../tiny"], "is not the name of a folder"),
        (["--meta_class_size", "7"], r"--meta_class_size 7 has to be in 2\.\.6"),
        (["--meta_class_size", "1"], r"--meta_class_size 1 has to be in 2\.\.6"),
        (["--recalls", "1,1"], "names a K twice"),
        (["--recalls", "0,1"], "'0' is not a positive integer"),
        (["--recalls", "1,,2"], "'' is not a positive integer"),
        (["--recalls", "1,36"], "36 is not below the number of gallery images, 36"),
        (["--batch_size", "1"], "at least 2"),
        (["--num_epochs", "0"], "'0' is not a positive integer"),
        (["--ensemble_size", "-3"], "'-3' is not a positive integer"),
        (["--ensemble_size", "10001"], "--ensemble_size 10001 is over 10,000"),
        (["--ensemble_size", "1" * 5000], "is not a positive integer below 10"),
        (["--members", "3-1"], "'3-1' is no range of members"),
        (["--members", "1-99999"], "'1-99999' is no range of members"),
        (["--members", "1-"], "'' is not a positive integer"),
        (["--members", "2,5"], "--members 5 is above --ensemble_size 2"),
        (["--lr", "nan"], "'nan' is not a positive number"),
        (["--seed", "-1"], "'-1' is not an integer"),
        (["--seed", "4294967296"], "is not an integer in"),
        (["--backbone", "vgg16"], "--backbone 'vgg16' is not one of .*resnet18"),
        (["--weights", "nowhere.pth"], "--weights 'nowhere.pth': no such file"),
        (["--device", "tpu"], "--device tpu is not one of auto, cuda, cuda:i, mps, cpu"),
        (["--device", "cuda:99"], "--device cuda:99 is not there"),
        (["--device", "cpu:"], "--device cpu: is not one of"),
        (["--device", "cpu:0"], "--device cpu:0 is not one of"),
        (["--resize", "stretch"], "argument --resize: invalid choice: 'stretch'"),
        (["--resize", "squash"], r"no cache: .*cache_32_squash.* --image_size 32 --resize squash"),
        (["--embedding", "both"], "argument --embedding: invalid choice: 'both'"),
        (["--optimizer", "adamw"], "argument --optimizer: invalid choice: 'adamw'"),
        (["--ensemble", "3"], "unrecognized arguments: --ensemble 3"),
        (["--lr"], "expected one argument"),
    ],
)
def test_wrong_options_end_at_once_in_one_line(tiny_data, tmp_path, capsys, no_training, options, message):
    assert run(tiny_data, tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and error.startswith("train.py: ")
    assert not list(tmp_path.iterdir())


def test_unwritable_results_end_at_once(tiny_data, tmp_path, capsys, no_training):
    (tmp_path / "results").write_text("a file, not a folder")
    assert run(tiny_data, tmp_path / "results") == 2
    error = capsys.readouterr().err
    assert "cannot write the results" in error and error.count("\n") == 1


def test_a_member_file_of_another_member_is_not_taken(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    for suffix in ("npy", "pth", "json"):
        shutil.copy(tmp_path / "run" / f"member_001.{suffix}", tmp_path / "run" / f"member_003.{suffix}")
    record = read_record(tmp_path / "run" / "member_002.json", {})

    def finished(identity=record["run"]):
        members = Members(tmp_path / "run", identity)
        members.look()
        return sorted(members.records)

    assert finished() == [1, 2] and finished("another run") == []
    path = tmp_path / "run" / "member_002.json"
    for change in ({"member": 1}, {"run": "another run"}):
        write_record(path, record | change)
        assert finished() == [1]
    path.write_text(json.dumps(record | {"checksum": "0"}))
    assert finished() == [1]
    write_record(path, record)
    assert finished() == [1, 2]


def test_without_arguments_and_data_it_says_what_to_do_next(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([]) == 2
    assert "then: python data_utils.py --data_name car; to try it without one: " in capsys.readouterr().err

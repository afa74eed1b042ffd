"""Batches loaded ahead, normalised and enlarged; the training batches: order, windows, mirroring, mixing, targets."""

import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image

from dreml.batches import (
    Batch,
    batch_spans,
    epoch_batches,
    image_batches,
    input_memory,
    normalize,
    prepare,
    resize_windows,
    spans,
)
from dreml.cache import read_cache
from dreml.cli import run_main
from dreml.images import ImageSpec
from utils import rng_for

CPU = torch.device("cpu")


def test_spans_are_pieces_of_a_range():
    assert spans(2, 8, 3) == [(2, 5), (5, 8)] and spans(0, 2, 3) == [(0, 2)] and spans(3, 3, 2) == []


def test_batches_are_prepared_four_ahead():
    """And no more, for the sake of memory. An error while filling reaches the consumer."""
    filled = []

    def fill(start, stop, out):
        filled.append(start)
        out.fill(1 // (7 - start))

    batches = image_batches(fill, spans(0, 8, 1), 4, CPU)
    for number in range(3):
        batch = next(batches)
        wait_until(lambda number=number: len(filled) >= number + 5)
        time.sleep(0.05)
        assert sorted(filled) == list(range(number + 5)) and batch.shape == (1, 4, 4, 3)
    with pytest.raises(ZeroDivisionError):
        list(batches)


def test_four_batches_are_loaded_at_a_time():
    barrier = threading.Barrier(4, timeout=20)
    batches = image_batches(lambda *_: barrier.wait(), spans(0, 8, 1), 4, CPU)
    assert len(list(batches)) == 8


def wait_until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)


def test_batches_hold_what_was_filled_in_and_stop_at_a_signal():
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    seen = []

    def fill(start, stop, out):
        out[:] = images[start:stop]

    def run():
        for batch in image_batches(fill, spans(0, 7, 1), 4, CPU):
            seen.append(batch)
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    batches = list(image_batches(fill, spans(0, 7, 3), 4, CPU))
    assert [len(batch) for batch in batches] == [3, 3, 1] and batches[0].dtype == torch.uint8
    np.testing.assert_array_equal(torch.cat(batches), images)
    assert run_main("script.py", run, "less") == 143 and len(seen) == 2


def test_normalize_equals_torchvision():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    mean, std = (0.4853, 0.4965, 0.4295), (0.2237, 0.2193, 0.2568)
    expected = [TF.normalize(TF.to_tensor(Image.fromarray(image)), mean, std) for image in images]
    result = normalize(torch.from_numpy(images), torch.tensor(mean), torch.tensor(std))
    assert torch.equal(result, torch.stack(expected)) and result.is_contiguous(memory_format=torch.channels_last)


def test_one_batch_after_the_other_is_normalised_into_the_same_memory():
    images, statistics = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8), (torch.rand(3), torch.rand(3))
    memory = input_memory(3, 8, torch.device("cpu"))
    for part in (images[:3], images[3:], images[:3].float()):
        result = normalize(part, *statistics, memory)
        assert torch.equal(result, normalize(part, *statistics)) and result.data_ptr() == memory.data_ptr()


def test_windows_are_enlarged_as_one_by_one():
    """What lies outside a window must not leak in."""
    torch.manual_seed(0)
    images, sides = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8), torch.tensor([16, 15, 9, 2, 1])
    resized = resize_windows(images, sides)
    assert resized.dtype == torch.float32 and resized.shape == images.shape
    for result, image, side in zip(resized, images, sides.tolist(), strict=True):
        window = image[:side, :side].permute(2, 0, 1)[None].float()
        expected = F.interpolate(window, (16, 16), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
        torch.testing.assert_close(result, expected, rtol=0, atol=0.01)  # of 255
    assert torch.equal(resized[0].round().byte(), images[0])


@pytest.mark.parametrize(
    ("num_images", "batch_size", "expected"),
    [(10, 4, [(0, 4), (4, 8), (8, 10)]), (9, 4, [(0, 4), (4, 9)]), (8, 4, [(0, 4), (4, 8)]), (3, 4, [(0, 3)])],
)
def test_a_last_batch_of_one_joins_the_one_before(num_images, batch_size, expected):
    assert batch_spans(num_images, batch_size) == expected


def batches_of(cache, settings, member=1, epoch=0, images=None) -> list[Batch]:
    """The batches of an epoch over all images. The target of an image is its number."""
    numbers = np.arange(cache.counts["train"][1])
    draw = partial(rng_for, settings.seed, member, epoch)
    return list(epoch_batches(cache, numbers if images is None else images, numbers, settings, draw, CPU))


def epoch_of(cache, settings, **which):
    """The whole epoch in one batch: windows, targets (here the image's number), flips, sides."""
    batches = batches_of(cache, settings, **which)
    flips = [np.arange(len(batch.targets)) < batch.num_mirrored for batch in batches]
    sides = [np.full(len(b.targets), settings.image_size) if b.sides is None else b.sides.numpy() for b in batches]
    windows, targets = (torch.cat([batch[place] for batch in batches]).numpy() for place in (0, 1))
    return windows, targets, np.concatenate(flips), np.concatenate(sides)


def all_windows(cache, number, side):
    """Every window of this side of one cached training image, by brute force."""
    offsets, (height, width) = cache.array("train_offsets"), cache.array("train_sizes")[number]
    image = cache.array("train_pixels")[offsets[number] : offsets[number + 1]].reshape(height, width, 3)
    corners = [(top, left) for top in range(height - side + 1) for left in range(width - side + 1)]
    return np.array([image[top : top + side, left : left + side] for top, left in corners])


def test_batches_of_an_epoch(tiny_cache, tiny_settings):
    """Every image once, in random order; each crop is a window of its image; all depends on (seed, member, epoch)."""
    crops, numbers, flips, _ = epoch_of(tiny_cache, tiny_settings)
    assert sorted(numbers) == list(range(36)) and list(numbers) != list(range(36))
    assert crops.dtype == np.uint8 and crops.shape == (36, 32, 32, 3) and flips.dtype == bool
    for crop, number in zip(crops, numbers, strict=True):
        windows = all_windows(tiny_cache, number, 32)
        assert len(windows) == 16 and (windows == crop).all((1, 2, 3)).any()  # 35 -> 32
    again = epoch_of(tiny_cache, tiny_settings)
    assert all(np.array_equal(a, b) for a, b in zip((crops, numbers, flips), again, strict=False))
    others = [epoch_of(tiny_cache, tiny_settings, member=2), epoch_of(tiny_cache, tiny_settings, epoch=1)]
    for other in [*others, epoch_of(tiny_cache, replace(tiny_settings, seed=1))]:
        assert not np.array_equal(numbers, other[1])
        assert set(numbers[flips]) != set(other[1][other[2]])


def test_every_offset_and_both_mirrorings_are_reached(tiny_cache, tiny_settings, seen):
    """35 -> 32 leaves offsets 0..3 on both axes, independent and equally likely; half of the crops are mirrored."""
    flips = np.concatenate([epoch_of(tiny_cache, tiny_settings, epoch=epoch)[2] for epoch in range(100)])
    corners = np.concatenate([corners for _, corners, _ in seen])
    counts = np.zeros((4, 4))
    np.add.at(counts, (corners[:, 0], corners[:, 1]), 1)  # 3,600 crops, 225 each, standard deviation 14.5
    assert counts.sum() == 3600 and counts.min() > 165 and counts.max() < 285
    assert abs(flips.mean() - 0.5) < 0.034  # four standard deviations
    assert not epoch_of(tiny_cache, replace(tiny_settings, flip=False))[2].any()


def test_random_resize_draws_sides_and_then_corners(tiny_cache, tiny_settings, seen):
    """--scale_min 0.75: sides 24..32 equally likely; whatever the side, each window of the image can come."""
    settings = replace(tiny_settings, scale_min=0.75)
    windows, numbers, _, sides = epoch_of(tiny_cache, settings)
    for window, number, side in zip(windows, numbers, sides, strict=True):
        assert (all_windows(tiny_cache, number, side) == window[:side, :side]).all((1, 2, 3)).any()
        assert not window[side:].any() and not window[:, side:].any()
    for epoch in range(1, 200):
        epoch_of(tiny_cache, settings, epoch=epoch)
    corners, sides = (np.concatenate(arrays) for arrays in list(zip(*seen, strict=True))[1:])
    counts = np.bincount(sides)
    assert counts[:24].sum() == 0 and len(counts) == 33  # 7,200 windows, 800 of each side, standard deviation 27
    assert counts[24:].min() > 690 and counts[24:].max() < 910
    for side in range(24, 33):
        reached = corners[sides == side]
        assert (reached.min(0) == 0).all() and (reached.max(0) == 35 - side).all()
        assert abs(np.corrcoef(reached.T)[0, 1]) < 0.15  # both axes independent: four standard deviations
    epoch_of(tiny_cache, replace(tiny_settings, scale_min=1e-9))
    assert min(sides.min() for _, _, sides in seen) >= 1  # never an empty window
    assert all(batch.sides is None for batch in batches_of(tiny_cache, tiny_settings))


def test_corners_fit_images_of_every_shape(squashed_data, tiny_settings, seen):
    """Wide images: a corner outside its own image would fail in train_crops, and all of it is reached."""
    cache = read_cache(squashed_data, "tiny", ImageSpec(32))
    for epoch in range(50):
        epoch_of(cache, tiny_settings, epoch=epoch)
    corners = np.concatenate([corners for _, corners, _ in seen])
    last = cache.array("train_sizes")[0] - 32
    assert last[1] > last[0] and (corners.max(0) == last).all()


def test_prepare_mirrors_enlarges_and_normalises():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    for sides in (None, torch.tensor([8, 5, 6, 3])):
        whole = images if sides is None else resize_windows(images, sides)
        expected = (whole.permute(0, 3, 1, 2) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        expected = torch.cat([expected[:3].flip(-1), expected[3:]])
        pixels = prepare(Batch(images.clone(), torch.zeros(4), 3, sides), mean, std)
        torch.testing.assert_close(pixels, expected)
        assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_each_image_is_mixed_with_another_one_of_its_batch(tiny_cache, tiny_settings):
    """Every image is a partner once; the shares are uniform in 0..1; without --mixup nothing is drawn."""
    settings, shares, pairs = replace(tiny_settings, mixup=True, meta_class_size=36), [], []
    for epoch in range(60):
        for plain, mixed in zip(
            batches_of(tiny_cache, tiny_settings, epoch=epoch),
            batches_of(tiny_cache, settings, epoch=epoch),
            strict=True,
        ):
            assert plain.partners is None and torch.equal(plain.images, mixed.images)
            places = torch.arange(len(plain.images))
            assert torch.equal(mixed.partners.sort().values, places)
            assert (mixed.partners != places).all()
            shares.append(mixed.shares.numpy())
            for targets, own, partner, share in zip(
                mixed.targets, plain.targets, plain.targets[mixed.partners], mixed.shares, strict=True
            ):
                expected = torch.zeros(36)
                expected[own] += share
                expected[partner] += 1 - share
                torch.testing.assert_close(targets, expected)
            pairs.append(mixed.partners[0].item())
    counts = np.histogram(np.concatenate(shares), bins=10, range=(0, 1))[0]
    assert counts.sum() == 60 * 36 and counts.min() > 216 - 56 and counts.max() < 216 + 56  # four standard deviations
    assert len(set(pairs)) > 10


def test_a_mixed_image_is_the_weighted_mean_of_two(tiny_cache, tiny_settings):
    """Of pixels that are mirrored and normalised already; channels_last as those."""
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    plain = batches_of(tiny_cache, tiny_settings)[0]
    mixed = batches_of(tiny_cache, replace(tiny_settings, mixup=True, meta_class_size=36))[0]
    pixels, found = prepare(plain, mean, std), prepare(mixed, mean, std)
    for row, (partner, share) in enumerate(zip(mixed.partners, mixed.shares, strict=True)):
        torch.testing.assert_close(found[row], share * pixels[row] + (1 - share) * pixels[partner])
    assert found.is_contiguous(memory_format=torch.channels_last)

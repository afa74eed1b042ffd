"""Batches loaded ahead, normalised and enlarged."""

import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image

from dreml.batches import image_batches, input_memory, normalize, resize_windows, spans
from dreml.cli import run_main

CPU = torch.device("cpu")


def test_spans_are_pieces_of_a_range():
    assert spans(0, 7, 3) == [(0, 3), (3, 6), (6, 7)] and spans(2, 8, 3) == [(2, 5), (5, 8)]
    assert spans(0, 2, 3) == [(0, 2)] and spans(3, 3, 2) == []


def test_batches_are_prepared_two_ahead():
    """And no more, for the sake of memory. An error while filling reaches the consumer."""
    filled = []

    def fill(start, stop, out):
        filled.append(start)
        out.fill(1 // (5 - start))

    batches = image_batches(fill, spans(0, 6, 1), 4, CPU)
    for number in range(3):
        batch = next(batches)
        wait_until(lambda number=number: len(filled) >= number + 3)
        time.sleep(0.05)
        assert filled == list(range(number + 3)) and batch.shape == (1, 4, 4, 3)
    with pytest.raises(ZeroDivisionError):
        list(batches)


def test_what_a_batch_needs_is_asked_for_two_batches_before():
    """Once; of the first batches before the first one."""
    events = []

    def read_ahead(start, stop):
        events.append(("ask", start, stop))

    def fill(start, stop, out):
        events.append(("fill", start, stop))

    list(image_batches(fill, spans(0, 9, 2), 4, CPU, read_ahead))
    asked = [("ask", start, stop) for start, stop in spans(0, 9, 2)]
    filled = [("fill", start, stop) for start, stop in spans(0, 9, 2)]
    assert events == [*asked[:3], filled[0], asked[3], filled[1], asked[4], *filled[2:]]


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

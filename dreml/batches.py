"""Batches of images for the network: loading ahead, random order, crops, mirroring, normalising, mixing."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dreml.cache import Cache
from dreml.cli import ahead
from dreml.settings import Settings

BATCHES_AHEAD = 4  # batches loaded while one is computed on, each in a thread: so a slow disk gets several requests


def spans(start: int, stop: int, step: int) -> list[tuple[int, int]]:
    """Split the range start..stop into (start, stop) pairs of at most `step`."""
    return [(left, min(left + step, stop)) for left in range(start, stop, step)]


def batch_spans(num_images: int, batch_size: int) -> list[tuple[int, int]]:
    """List (start, stop) of each batch. A last batch of one image joins the one before: BatchNorm needs two images."""
    starts = list(range(0, num_images, batch_size))
    if num_images % batch_size == 1 and len(starts) > 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_images], strict=True))


def image_batches(
    fill: Callable[[int, int, np.ndarray], None],
    batches: Sequence[tuple[int, int]],
    image_size: int,
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """Yield a batch `(stop - start, S, S, 3) uint8` on the device for each (start, stop) of `batches`.

    `fill(start, stop, out)` writes a batch's pixels. It runs in threads, ahead of the batches. Copying from a memory
    map releases the GIL; the processes of a DataLoader were slower (benchmarks/README.md).
    """

    def load(start: int, stop: int) -> torch.Tensor:
        shape = (stop - start, image_size, image_size, 3)
        # The host does not wait for a copy from pinned memory. PyTorch reuses that memory when the copy is done.
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        fill(start, stop, batch.numpy())
        return batch

    with ThreadPoolExecutor(BATCHES_AHEAD) as loaders:
        futures = (loaders.submit(load, start, stop) for start, stop in batches)
        for pixels in ahead(futures, BATCHES_AHEAD):
            yield pixels.to(device, non_blocking=device.type == "cuda")


class Batch(NamedTuple):
    """A batch of training images on the device, not yet mirrored, normalised and mixed. See `prepare`."""

    images: torch.Tensor  # (B, S, S, 3) uint8, each image's window in its top left corner
    targets: torch.Tensor  # (B,) int64, meta-classes; with --mixup, (B, D) float32, the share of each meta-class
    num_mirrored: int  # number of images to mirror: the first ones
    sides: torch.Tensor | None  # (B,) int64, the windows' sides; None: all S
    partners: torch.Tensor | None = None  # (B,) int64, the index in the batch of each image's partner
    shares: torch.Tensor | None = None  # (B,) float32 in 0..1, the weight of the image itself


def epoch_batches(
    cache: Cache,
    images: np.ndarray,
    targets: np.ndarray,
    settings: Settings,
    draw: Callable[[str], np.random.Generator],
    device: torch.device,
) -> Iterator[Batch]:
    """Yield the batches of one epoch.

    Args:
        images: `(n,) int64`, the indices of the training images to use.
        targets: `(N,) int64`, the meta-class of every training image of the cache.
        draw: returns the random generator for a purpose: "order", "scale", "crop", "flip" and "mix".
    """
    size = settings.image_size
    smallest = max(1, round(settings.scale_min * size))
    order = draw("order").permutation(images)
    sides = draw("scale").integers(smallest, size + 1, len(order))
    ranges = cache.array("train_sizes")[order] - sides[:, None] + 1
    corners = draw("crop").integers(0, ranges)
    mirrored = draw("flip").random(len(order)) < (0.5 if settings.flip else 0.0)

    # Within a batch, images to be mirrored come first, so that mirroring is one slice: a mask took 30 times as long.
    batches = batch_spans(len(order), settings.batch_size)
    batch_of = np.repeat(np.arange(len(batches)), [stop - start for start, stop in batches])
    sorting = np.lexsort((~mirrored, batch_of))
    order = order[sorting]
    sides = sides[sorting]
    corners = corners[sorting]
    num_mirrored = np.bincount(batch_of, mirrored).astype(int).tolist()

    def fill(start: int, stop: int, out: np.ndarray) -> None:
        cache.train_crops(order[start:stop], corners[start:stop], sides[start:stop], out)

    all_targets = torch.from_numpy(targets[order]).to(device)
    all_sides = torch.from_numpy(sides).to(device) if settings.scale_min < 1 else None
    if settings.mixup:
        all_partners, all_shares = (values.to(device) for values in draw_mixing(batches, draw("mix")))
    loaded = image_batches(fill, batches, size, device)
    for (start, stop), pixels, mirror in zip(batches, loaded, num_mirrored, strict=True):
        batch_targets = all_targets[start:stop]
        batch_sides = None if all_sides is None else all_sides[start:stop]
        partners = None
        shares = None
        if settings.mixup:
            partners = all_partners[start:stop]
            shares = all_shares[start:stop]
            classes = F.one_hot(batch_targets, settings.meta_class_size).float()
            batch_targets = classes[partners].lerp_(classes, shares[:, None])
        yield Batch(pixels, batch_targets, mirror, batch_sides, partners, shares)


def draw_mixing(batches: list[tuple[int, int]], generator: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the partners (`(n,) int64`, indices in the batch) and shares (`(n,) float32`) of an epoch's batches.

    The images of a batch form a random circle. Each is mixed with the next one; its share is uniform in 0..1.
    """
    partners = []
    for start, stop in batches:
        circle = generator.permutation(stop - start)
        partner = np.empty_like(circle)
        partner[circle] = np.roll(circle, -1)
        partners.append(partner)
    shares = generator.random(batches[-1][1], np.float32)
    return torch.from_numpy(np.concatenate(partners)), torch.from_numpy(shares)


def input_memory(num_images: int, image_size: int, device: torch.device) -> torch.Tensor:
    """Allocate memory that `normalize` can reuse for every batch of at most `num_images` images.

    On a CPU, the system has to clear new memory for each batch. That took six times as long as the arithmetic.
    """
    return torch.empty(num_images * 3 * image_size**2, device=device)


def normalize(
    images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, memory: torch.Tensor | None = None
) -> torch.Tensor:
    """Scale pixels for the network: every channel has mean 0 and standard deviation 1 over the data set.

    `(N, S, S, 3) uint8` or float in 0..255 -> `(N, 3, S, S) float32` in the memory format channels_last. Equals
    torchvision's ToTensor and Normalize, on the CPU bit for bit. `mean` and `std`, `(3,)` each, are of values in 0..1.
    `memory` (from `input_memory`) holds the result until the next call overwrites it; None: new memory.
    """
    num_images, height, width, _ = images.shape
    # Use whole rows and tiled statistics: broadcasting over three channels took five times as long on a CPU.
    shape = (num_images * height, width * 3)
    out = None if memory is None else memory[: images.numel()].view(shape)
    rows = torch.div(images.reshape(shape), 255, out=out)
    rows.sub_(mean.repeat(width)).div_(std.repeat(width))
    return rows.view(num_images, height, width, 3).permute(0, 3, 1, 2)


def resize_windows(images: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """Enlarge the top left window of each image, `sides` `(N,)` pixels wide and high, to the whole image.

    `(N, S, S, 3) uint8` -> `(N, S, S, 3) float32`; bilinear, as `F.interpolate` of each window.
    """
    size = images.shape[1]
    pixels = torch.arange(size, device=images.device)
    last = (sides - 1)[:, None]
    places = torch.minimum(((pixels + 0.5) * sides[:, None] / size - 0.5).clamp(min=0), last)  # (N, S)
    places = places * (2 / max(size - 1, 1)) - 1  # grid_sample counts from -1 to 1
    rows = places[:, :, None].expand(-1, -1, size)
    columns = places[:, None, :].expand(-1, size, -1)
    grid = torch.stack([columns, rows], dim=3)
    resized = F.grid_sample(images.permute(0, 3, 1, 2).float(), grid, align_corners=True)
    return resized.permute(0, 2, 3, 1)


def prepare(batch: Batch, mean: torch.Tensor, std: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
    """Enlarge, mirror (in place), normalise and mix a batch: the network's input, `(B, 3, S, S) float32`.

    Mixing is share * image + (1 - share) * partner, with one share per image (Zhang et al., "mixup: Beyond Empirical
    Risk Minimization", ICLR 2018, with alpha = 1).
    """
    images = batch.images if batch.sides is None else resize_windows(batch.images, batch.sides)
    images[: batch.num_mirrored] = images[: batch.num_mirrored].flip(2)
    pixels = normalize(images, mean, std, memory)
    if batch.partners is None:
        return pixels
    rows = pixels.permute(0, 2, 3, 1)  # the order in memory, so that the copy is channels_last too
    mixed = rows[batch.partners].lerp_(rows, batch.shares[:, None, None, None])
    return mixed.permute(0, 3, 1, 2)

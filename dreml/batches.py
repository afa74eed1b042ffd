"""From images in memory to the network's input: batches loaded ahead, normalised, enlarged."""

import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

BATCHES_AHEAD = 2  # loaded while one is computed on


def spans(start: int, stop: int, step: int) -> list[tuple[int, int]]:
    """The range start..stop in pieces of at most `step`, as (start, stop) pairs."""
    return [(left, min(left + step, stop)) for left in range(start, stop, step)]


def image_batches(
    fill: Callable[[int, int, np.ndarray], None],
    batches: Sequence[tuple[int, int]],
    image_size: int,
    device: torch.device,
    read_ahead: Callable[[int, int], None] | None = None,
) -> Iterator[torch.Tensor]:
    """Yields a batch `(stop - start, S, S, 3) uint8` on the device for each (start, stop) of `batches`.

    `fill(start, stop, out)` writes its pixels. It runs in a thread, two batches ahead: copying rows from a memory map
    releases Python's lock, and a DataLoader's processes, which pass every batch on through shared memory, were slower
    (benchmarks/README.md). `read_ahead(start, stop)` runs two batches before it, to ask a slow disk for what it needs.
    """

    def load(number: int) -> torch.Tensor:
        if read_ahead:
            for later in batches[number + BATCHES_AHEAD if number else 0 : number + BATCHES_AHEAD + 1]:
                read_ahead(*later)
        start, stop = batches[number]
        shape = (stop - start, image_size, image_size, 3)
        # Nobody waits for a copy from pinned memory; PyTorch reuses it when the copy is done.
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        fill(start, stop, batch.numpy())
        return batch

    with ThreadPoolExecutor(1) as loader:
        waiting, loading = collections.deque(range(len(batches))), collections.deque()
        while waiting or loading:
            while waiting and len(loading) <= BATCHES_AHEAD:
                loading.append(loader.submit(load, waiting.popleft()))
            yield loading.popleft().result().to(device, non_blocking=device.type == "cuda")


def input_memory(num_images: int, image_size: int, device: torch.device) -> torch.Tensor:
    """Memory in which `normalize` can put one batch after the other, of at most `num_images` images.

    On a CPU, new memory for each batch, which the system has to clear, took six times as long as the arithmetic.
    """
    return torch.empty(num_images * 3 * image_size**2, device=device)


def normalize(
    images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, memory: torch.Tensor | None = None
) -> torch.Tensor:
    """Pixels as the network takes them: every channel scaled to mean 0 and standard deviation 1 over the data set.

    `(N, S, S, 3) uint8` or float in 0..255 -> `(N, 3, S, S) float32` in the memory format channels_last. Equals
    torchvision's ToTensor and Normalize, on the CPU bit for bit. `mean` and `std` `(3,)`: of values in [0, 1]. With
    `memory`, see `input_memory`, the result lies in it, until the next one does.
    """
    num_images, height, width, _ = images.shape
    # Whole rows against the tiled statistics: broadcasting over three channels took five times as long on a CPU.
    shape = (num_images * height, width * 3)
    out = None if memory is None else memory[: images.numel()].view(shape)
    rows = torch.div(images.reshape(shape), 255, out=out)
    rows.sub_(mean.repeat(width)).div_(std.repeat(width))
    return rows.view(num_images, height, width, 3).permute(0, 3, 1, 2)


def resize_windows(images: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """Enlarges the top left window of each image, `sides` `(N,)` pixels wide and high, to the whole image.

    `(N, S, S, 3) uint8` -> `(N, S, S, 3) float32`; bilinear, as `F.interpolate` of each window.
    """
    size = images.shape[1]
    pixels = torch.arange(size, device=images.device)
    last = (sides - 1)[:, None]
    places = torch.minimum(((pixels + 0.5) * sides[:, None] / size - 0.5).clamp(min=0), last)  # (N, S)
    places = places * (2 / max(size - 1, 1)) - 1  # grid_sample counts from -1 to 1
    rows, columns = places[:, :, None].expand(-1, -1, size), places[:, None, :].expand(-1, size, -1)
    grid = torch.stack([columns, rows], dim=3)
    resized = F.grid_sample(images.permute(0, 3, 1, 2).float(), grid, align_corners=True)
    return resized.permute(0, 2, 3, 1)

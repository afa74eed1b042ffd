"""The training batches of an epoch: random order, random windows, mirroring, and the meta-class of every image."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from dreml.batches import image_batches, normalize, resize_windows
from dreml.cache import Cache
from dreml.settings import Settings


class Mixing(NamedTuple):
    """With which other image of its batch each image is mixed (--mixup), on the device."""

    partners: torch.Tensor  # (B,) int64, places in the batch
    shares: torch.Tensor  # (B,) float32 in 0..1, the weight of the image itself; its partner has the rest


class MixedTargets(NamedTuple):
    """The meta-classes of mixed images, `(B,)` each, on the device."""

    own: torch.Tensor  # int64
    partners: torch.Tensor  # int64
    shares: torch.Tensor  # float32, the weight of the own one

    @property
    def larger(self) -> torch.Tensor:
        """That with the larger share, `(B,) int64`. An answer counts as correct if it names this one."""
        return torch.where(self.shares >= 0.5, self.own, self.partners)


Targets = torch.Tensor | MixedTargets  # meta-classes, `(B,) int64`


class Batch(NamedTuple):
    """A batch of training images on the device, not yet mirrored, normalised and mixed. See `prepare`."""

    images: torch.Tensor  # (B, S, S, 3) uint8, each image's window in its top left corner
    targets: Targets
    num_mirrored: int  # the first so many images are to be mirrored
    sides: torch.Tensor | None  # (B,) int64, the windows' sides; None: all S
    mixing: Mixing | None = None


def batch_spans(num_images: int, batch_size: int) -> list[tuple[int, int]]:
    """(start, stop) of each batch. A last batch of one image joins the one before it: BatchNorm needs two."""
    starts = list(range(0, num_images, batch_size))
    if num_images % batch_size == 1 and len(starts) > 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_images], strict=True))


def epoch_batches(
    cache: Cache,
    images: np.ndarray,
    targets: np.ndarray,
    settings: Settings,
    draw: Callable[[str], np.random.Generator],
    device: torch.device,
) -> Iterator[Batch]:
    """The batches of one epoch.

    Args:
        images: `(n,) int64`, the training images that take part.
        targets: `(N,) int64`, the meta-class of every training image of the cache.
        draw: gives the random generator for a purpose: "order", "scale", "crop", "flip" and "mix".
    """
    size, smallest = settings.image_size, max(1, round(settings.scale_min * settings.image_size))
    order = draw("order").permutation(images)
    sides = draw("scale").integers(smallest, size + 1, len(order))
    ranges = cache.array("train_sizes")[order] - sides[:, None] + 1
    corners = draw("crop").integers(0, ranges)
    mirrored = draw("flip").random(len(order)) < (0.5 if settings.flip else 0.0)

    # Within a batch, images to be mirrored come first, so that mirroring is one slice: a mask took 30 times as long.
    spans = batch_spans(len(order), settings.batch_size)
    batch_of = np.repeat(np.arange(len(spans)), [stop - start for start, stop in spans])
    sorting = np.lexsort((~mirrored, batch_of))
    order, sides, corners = order[sorting], sides[sorting], corners[sorting]
    num_mirrored = np.bincount(batch_of, mirrored).astype(int).tolist()

    def fill(start: int, stop: int, out: np.ndarray) -> None:
        cache.train_crops(order[start:stop], corners[start:stop], sides[start:stop], out)

    def read_ahead(start: int, stop: int) -> None:
        cache.read_ahead(order[start:stop], corners[start:stop], sides[start:stop])

    epoch_targets = torch.from_numpy(targets[order]).to(device)
    epoch_sides = torch.from_numpy(sides).to(device) if settings.scale_min < 1 else None
    mixing = epoch_mixing(spans, draw("mix"), device) if settings.mixup else None
    loaded = image_batches(fill, spans, size, device, read_ahead)
    for (start, stop), pixels, mirror in zip(spans, loaded, num_mirrored, strict=True):
        batch_sides = None if epoch_sides is None else epoch_sides[start:stop]
        batch_targets, batch_mixing = epoch_targets[start:stop], None
        if mixing is not None:
            batch_mixing = Mixing(mixing.partners[start:stop], mixing.shares[start:stop])
            batch_targets = MixedTargets(batch_targets, batch_targets[batch_mixing.partners], batch_mixing.shares)
        yield Batch(pixels, batch_targets, mirror, batch_sides, batch_mixing)


def epoch_mixing(spans: list[tuple[int, int]], generator: np.random.Generator, device: torch.device) -> Mixing:
    """The mixing of all batches of an epoch, one after the other.

    The images of a batch stand in a random circle: each is mixed with the next one, with a share uniform in 0..1.
    """
    partners = []
    for start, stop in spans:
        circle = generator.permutation(stop - start)
        partner = np.empty_like(circle)
        partner[circle] = np.roll(circle, -1)
        partners.append(partner)
    shares = generator.random(spans[-1][1], np.float32)
    return Mixing(torch.from_numpy(np.concatenate(partners)).to(device), torch.from_numpy(shares).to(device))


def prepare(batch: Batch, mean: torch.Tensor, std: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
    """The network's input, `(B, 3, S, S) float32`: enlarged, mirrored (in place), normalised (`normalize`), mixed."""
    images = batch.images if batch.sides is None else resize_windows(batch.images, batch.sides)
    images[: batch.num_mirrored] = images[: batch.num_mirrored].flip(2)
    pixels = normalize(images, mean, std, memory)
    return pixels if batch.mixing is None else mix(pixels, batch.mixing)


def mix(pixels: torch.Tensor, mixing: Mixing) -> torch.Tensor:
    """share * image + (1 - share) * partner for each image, `(B, 3, S, S) float32`, in the memory format of `pixels`.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, with alpha = 1 and a share for each image.
    """
    rows = pixels.permute(0, 2, 3, 1)  # as they lie in memory, so that the copy is channels_last too
    mixed = rows[mixing.partners].lerp_(rows, mixing.shares[:, None, None, None])
    return mixed.permute(0, 3, 1, 2)
